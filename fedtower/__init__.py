"""A plugin-based federated recommender platform: ``fedtower.run("dssm-synthetic")`` trains one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedtower.core.garbage import undisturbed

if TYPE_CHECKING:
    from fedtower.core.recipe import load_recipe
    from fedtower.recsys.run import Run, load, resume, run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load", "load_recipe", "resume", "run"]

# Imported on first use: `import fedtower` must stay as light as its command line, and these bring torch.
_HOMES = {
    "Run": "fedtower.recsys.run",
    "load": "fedtower.recsys.run",
    "load_recipe": "fedtower.core.recipe",
    "resume": "fedtower.recsys.run",
    "run": "fedtower.recsys.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    with undisturbed():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
