"""The PostgreSQL journal's door."""

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the journal."""
    registry.journal(
        "postgresql",
        "fedtower.plugins.journals.postgresql.journal:PostgreSQL",
        summary="in a PostgreSQL database; several intakes, on several machines",
        capabilities={"example": "fedtower.plugins.journals.postgresql.server:example"},
    )
