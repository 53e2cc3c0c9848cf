"""The recommender's own door: its kinds of part, its commands and its recipes."""

from __future__ import annotations

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Kind, Registry

KINDS = (
    Kind(
        "exporter",
        seam="fedtower.recsys.export:Exporter",
        promises="fedtower.recsys.testing.exporter:ExporterPromises",
        template="fedtower.recsys:scaffold/exporter",
        summary="writes a train step for a device's engine",
    ),
    Kind(
        "dataset",
        seam="fedtower.recsys.population:Dataset",
        promises="fedtower.recsys.testing.dataset:DatasetPromises",
        template="fedtower.recsys:scaffold/dataset",
        summary="who touched what, and when",
    ),
    Kind(
        "model",
        seam="fedtower.recsys.models:Model",
        promises="fedtower.recsys.testing.model:ModelPromises",
        template="fedtower.recsys:scaffold/model",
        summary="tables and towers, and where they live",
    ),
    Kind(
        "runtime",
        seam="fedtower.core.runtime:RuntimeFactory",
        promises="fedtower.recsys.testing.runtime:RuntimePromises",
        template="fedtower.recsys:scaffold/runtime",
        summary="trains a model on clients",
    ),
    Kind(
        "index",
        seam="fedtower.recsys.retrieval:IndexBuilder",
        promises="fedtower.recsys.testing.index:IndexPromises",
        template="fedtower.recsys:scaffold/index",
        summary="finds the items that suit a user",
    ),
    Kind(
        "attack",
        seam="fedtower.recsys.attacks:Attack",
        promises="fedtower.recsys.testing.attack:AttackPromises",
        template="fedtower.recsys:scaffold/attack",
        summary="what some clients of a simulation do to the others' model",
    ),
    Kind(
        "suite",
        seam="fedtower.recsys.suite:Suite",
        promises="fedtower.recsys.testing.suite:SuitePromises",
        template="fedtower.recsys:scaffold/suite",
        summary="runs recipes over seeds, and lays their figures out",
        reader="fedtower.recsys.suite:load_suite",
    ),
)

COMMANDS = (
    ("run", "commands:run", "train a recipe"),
    ("resume", "commands:resume", "continue a run that was stopped"),
    ("evaluate", "commands:evaluate", "measure a run's model again"),
    ("recommend", "commands:recommend", "the top items for one user"),
    ("export", "device_commands:export", "write a run's model as a bundle for devices"),
    ("parity", "device_commands:parity", "compare the runtimes: do they give the same numbers?"),
    ("serve", "serve_command:serve_command", "train a recipe over devices that call"),
    ("bench", "bench_command:bench", "run a suite of recipes over seeds, and compare"),
    ("status", "status_command:status_command", "how a served run stands"),
    ("recipes", "commands:recipes", "list the recipes that can be run by name"),
    ("report", "report:report_command", "write one HTML page about one run or several"),
    ("data", "data_command:data", "prepare a data set and show its card"),
    ("doctor", "doctor:doctor", "say what is installed, and what is missing for what"),
)

RECIPES = (
    ("dssm-synthetic", "a two-tower recommender on generated data; the first thing to run"),
    ("dssm-ml-100k", "the two-tower recommender on MovieLens 100K"),
    ("dssm-ml-1m", "the two-tower recommender on MovieLens 1M, the NCF split"),
    ("pfedrec-ml-100k", "PFedRec on MovieLens 100K: a score function of each client's own, which stays on its device"),
    ("pfedrec-ml-1m", "PFedRec on MovieLens 1M"),
    ("wide-deep-criteo", "Wide & Deep on Criteo's clicks, 100 silos"),
    ("dlrm-criteo", "DLRM on Criteo's clicks, 100 silos"),
    ("fedsgd-mnist-mlp", "handwritten digits by federated SGD: one step a round on all of each client's images"),
    ("fedavg-mnist-mlp", "handwritten digits by federated averaging, fully connected layers"),
    ("fedavg-mnist-lenet5", "handwritten digits by federated averaging, LeNet-5"),
)


@hookimpl
def fedtower_kinds(registry: Registry) -> None:
    """Declare the recommender's kinds."""
    for kind in KINDS:
        registry.declare(kind)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    """Offer the recommender's commands and recipes."""
    for name, target, summary in COMMANDS:
        registry.command(name, f"fedtower.recsys.{target}", summary=summary)
    for name, summary in RECIPES:
        registry.recipe(name, f"fedtower.recsys:recipes/{name}.toml", summary=summary)
