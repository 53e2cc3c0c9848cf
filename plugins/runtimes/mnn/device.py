"""The runtime ``mnn`` on a device: a bundle, and nothing that needs torch."""

from __future__ import annotations

from pathlib import Path

from fedtower.core.plan import LocalSettings
from fedtower.recsys.bundle import Bundle
from fedtower.recsys.device import BundleScorer, DeviceRuntime, Format


def format_of(timeout_seconds: float = 600.0) -> Format:
    """The files that this runtime reads, and its engine."""
    return Format("mnn", "fedtower.plugins.runtimes.mnn.engine:host", timeout_seconds)


def open_bundle(path: str | Path, local: LocalSettings | None = None) -> DeviceRuntime:
    """The runtime of a bundle, for the visit that it was exported for or for one that differs in rates and steps.

    Raises:
        BundleError: the bundle is damaged, or ``local`` asks for what its graph does not do.
    """
    bundle = Bundle.open(Path(path))
    return DeviceRuntime(bundle, local or bundle.manifest.settings, format_of())


def open_scorer(path: str | Path) -> BundleScorer:
    """What scores with the forward graph of a bundle. Raises BundleError when it is damaged."""
    return BundleScorer(Bundle.open(Path(path)), format_of())
