"""Made-up files in the layout of MNIST's: what the data set is tried with."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

_SIDE = 14


def write(folder: Path) -> dict[str, Any]:
    """Write the four files, and return the settings that use them."""
    for name, count in (("train", 240), ("t10k", 60)):
        at = np.arange(count)
        labels = (at * 7 % 10).astype(np.uint8)
        pixels = (
            at[:, None, None] * 31 + np.arange(_SIDE)[None, :, None] * 17 + np.arange(_SIDE)[None, None, :] * 11
        ) % 97
        lit = (np.arange(_SIDE) // 2 == labels[:, None] % 7)[:, :, None] * np.uint8(150)
        images = (pixels + lit).astype(np.uint8)
        head = struct.pack(">4I", 0x0803, count, _SIDE, _SIDE)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x0801, count) + labels.tobytes())
    return {"path": str(folder), "clients": 12, "validation_images": 30}
