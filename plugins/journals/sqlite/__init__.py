"""The SQLite journal's door."""

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the journal."""
    registry.journal(
        "sqlite",
        "fedtower.plugins.journals.sqlite.journal:SQLite",
        summary="payloads in append-only files, their index in SQLite; one machine",
    )
