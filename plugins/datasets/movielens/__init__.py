"""MovieLens: the data sets of GroupLens, from their official files.

Harper and Konstan, 2015, "The MovieLens Datasets: History and Context", https://doi.org/10.1145/2827872.
"""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer this data set."""
    registry.dataset(
        "movielens",
        "fedtower.plugins.datasets.movielens.dataset:MovieLens",
        summary="MovieLens 100K, 1M, latest-small and 25M, from their official files",
        capabilities={"download": True, "example": "fedtower.plugins.datasets.movielens.example:write"},
    )
