"""Core's own door: the kinds of part that a round is made of, and the commands about plugins."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Kind, Registry

KINDS = (
    Kind(
        "sampler", "fedtower.core.cohort:Sampler", "fedtower.core.testing.sampler:SamplerPromises", "chooses a cohort"
    ),
    Kind(
        "runtime",
        "fedtower.core.runtime:RuntimeFactory",
        "fedtower.core.testing.runtime:RuntimePromises",
        "trains on a client",
    ),
    Kind(
        "transform",
        "fedtower.core.transform:Transform",
        "fedtower.core.testing.transform:TransformPromises",
        "changes updates on their way",
    ),
    Kind(
        "aggregator",
        "fedtower.core.aggregation:Aggregator",
        "fedtower.core.testing.aggregator:AggregatorPromises",
        "makes many updates one",
    ),
    Kind(
        "server_optimizer",
        "fedtower.core.server:ServerOptimizer",
        "fedtower.core.testing.server_optimizer:ServerOptimizerPromises",
        "makes the total new parameters",
    ),
    Kind(
        "transport",
        "fedtower.core.transport:Transport",
        "fedtower.core.testing.transport:TransportPromises",
        "reaches a cohort",
    ),
    Kind(
        "tracker", "fedtower.core.hooks:Observing", "fedtower.core.testing.observer:ObserverPromises", "records a run"
    ),
    Kind("recipe", "fedtower.core.recipe:Recipe", "fedtower.core.testing.recipe:RecipePromises", "a run, as TOML"),
    Kind("command", "click:Command", "fedtower.core.testing.command:CommandPromises", "a subcommand of `fedtower`"),
)


@hookimpl
def fedtower_kinds(registry: Registry) -> None:
    """Declare core's kinds."""
    for kind in KINDS:
        registry.declare(kind)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the commands about plugins."""
    registry.command("plugins", "fedtower.core.plugin_commands:plugins", summary="list, show, check and begin plugins")
