"""TensorBoard's door; the tracker itself, and the library it needs, are imported when a recipe names it."""

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the tracker."""
    registry.tracker(
        "tensorboard",
        "fedtower.plugins.trackers.tensorboard.tracker:TensorBoard",
        summary="curves for `tensorboard --logdir RUN/tensorboard`",
    )
