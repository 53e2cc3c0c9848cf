"""MLflow's door; the tracker itself, and the library it needs, are imported when a recipe names it."""

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the tracker."""
    registry.tracker(
        "mlflow",
        "fedtower.plugins.trackers.mlflow.tracker:MLflow",
        summary="an MLflow run, in the run's folder or on a tracking server",
    )
