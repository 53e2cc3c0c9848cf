"""Where a table or a tower lives, and so who ever sees its parameters."""

from __future__ import annotations

from enum import StrEnum


class Placement(StrEnum):
    """``cloud`` never reaches a device, ``shared`` reaches every device and comes back as deltas, ``device`` never
    leaves.
    """

    CLOUD = "cloud"
    SHARED = "shared"
    DEVICE = "device"
