"""Core's own door: the kinds of part that a round is made of, and the commands about plugins."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Kind, Registry

KINDS = (
    Kind(
        "sampler",
        seam="fedtower.core.cohort:Sampler",
        promises="fedtower.core.testing.sampler:SamplerPromises",
        template="fedtower.core:scaffold/sampler",
        summary="chooses the clients of a round",
    ),
    Kind(
        "transform",
        seam="fedtower.core.transform:Transform",
        promises="fedtower.core.testing.transform:TransformPromises",
        template="fedtower.core:scaffold/transform",
        summary="changes updates on their way",
    ),
    Kind(
        "aggregator",
        seam="fedtower.core.aggregation:Aggregator",
        promises="fedtower.core.testing.aggregator:AggregatorPromises",
        template="fedtower.core:scaffold/aggregator",
        summary="makes one update of many",
    ),
    Kind(
        "server_optimizer",
        seam="fedtower.core.server:ServerOptimizer",
        promises="fedtower.core.testing.server_optimizer:ServerOptimizerPromises",
        template="fedtower.core:scaffold/server_optimizer",
        summary="makes the total new parameters",
    ),
    Kind(
        "transport",
        seam="fedtower.core.transport:Transport",
        promises="fedtower.core.testing.transport:TransportPromises",
        template="fedtower.core:scaffold/transport",
        summary="reaches the clients of a cohort",
    ),
    Kind(
        "download",
        seam="fedtower.core.download:Download",
        promises="fedtower.core.testing.download:DownloadPromises",
        template="fedtower.core:scaffold/download",
        summary="sends the shared parameters down in fewer bytes",
    ),
    Kind(
        "deadline",
        seam="fedtower.core.deadline:Deadline",
        promises="fedtower.core.testing.deadline:DeadlinePromises",
        template="fedtower.core:scaffold/deadline",
        summary="says how long a round may take",
    ),
    Kind(
        "signer",
        seam="fedtower.core.signing:Signer",
        promises="fedtower.core.testing.signer:SignerPromises",
        template="fedtower.core:scaffold/signer",
        summary="signs what devices run",
    ),
    Kind(
        "journal",
        seam="fedtower.core.journal:JournalFactory",
        promises="fedtower.core.testing.journal:JournalPromises",
        template="fedtower.core:scaffold/journal",
        summary="keeps what was accepted, durably",
    ),
    Kind(
        "tracker",
        seam="fedtower.core.hooks:Observing",
        promises="fedtower.core.testing.observer:ObserverPromises",
        template="fedtower.core:scaffold/tracker",
        summary="records a run somewhere",
    ),
    Kind(
        "recipe",
        seam="fedtower.core.recipe:Recipe",
        promises="fedtower.core.testing.recipe:RecipePromises",
        template="fedtower.core:scaffold/recipe",
        reader="fedtower.core.recipe:load_recipe",
        summary="a whole run, as TOML",
    ),
    Kind(
        "command",
        seam="click:Command",
        promises="fedtower.core.testing.command:CommandPromises",
        template="fedtower.core:scaffold/command",
        summary="a subcommand of fedtower",
    ),
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
