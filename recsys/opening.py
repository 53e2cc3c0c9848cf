"""Opening: the folder of a run that is to be served, found or made by a process of its own, which then ends.

A recipe is checked by making its parts, and these bring torch, pandas and what else a plugin imports: a process that
looks after others for weeks would hold all of it and use none. So the one that serves asks another:
``python -m fedtower.recsys.opening``, a question on its standard input, the answer on its standard output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtower.core import errors
from fedtower.core.cli import as_known
from fedtower.core.discovery import Gate, installed
from fedtower.core.errors import FedtowerError, RecipeError, ServingError, TrustError
from fedtower.core.garbage import begin_program
from fedtower.core.recipe import Recipe, check, load_recipe
from fedtower.core.registry import Registry
from fedtower.recsys.engine import own_path
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.serving import found, intake_module
from fedtower.recsys.tether import TETHER, end_with_starter


def opened(
    name: str, overrides: Sequence[str], runs: Path, keys: Path, registry: Registry, tether: int
) -> tuple[RunFolder, Recipe]:
    """The folder and the recipe of a run: one that was served before, or a new one; its parts are not imported here.

    ``registry`` is told of the folder's plugins. The process that looks ends when what holds the ``tether`` has.

    Raises:
        FedtowerError: what that process raised.
        ServingError: it ended without an answer.
    """
    question = {
        "name": name,
        "overrides": list(overrides),
        "runs": str(runs),
        "keys": str(keys),
        "plugins": None if registry.folder is None else str(registry.folder),
        "gates": [asdict(gate) for gate in registry.gates],
    }
    folder = RunFolder.open(Path(_asked(question, tether)))
    registry.use_folder(folder.path)
    return folder, folder.recipe()


def _asked(question: Mapping[str, Any], tether: int) -> str:
    """Where the folder is."""
    child = subprocess.run(
        [sys.executable, "-m", "fedtower.recsys.opening"],
        input=json.dumps(question).encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": own_path(), TETHER: str(tether)},
        pass_fds=[tether],
        check=False,
    )
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ServingError(
            f"the process that was to open the run ended with exit code {child.returncode} and without an answer; what "
            f"it said stands above"
        ) from error
    if "folder" in answer:
        return str(answer["folder"])
    raise getattr(errors, answer["error"])(answer["message"])


def open_here(
    name: str, overrides: Sequence[str], runs: Path, keys: Path, registry: Registry
) -> tuple[RunFolder, Recipe]:
    """The same, with all that the recipe's parts import.

    Raises:
        FedtowerError: the run cannot be served; the message says what to do.
    """
    if (Path(name) / "recipe.toml").is_file():
        if overrides:
            raise RecipeError("a run goes on with the recipe it was started with: leave -o out, or begin another run")
        folder = RunFolder.open(Path(name))
        folder.federation()
        recipe = folder.recipe()
        registry.use_folder(folder.path)
        return folder, check(recipe, registry)
    recipe = as_deployed(name, overrides, registry)
    if not (keys / "signing.pem").is_file():
        raise TrustError(
            f"there is no signing key {keys / 'signing.pem'}: `fedtower keygen {keys}` makes it, and the public half "
            f"that devices pin"
        )
    folder = RunFolder.create(recipe, registry, runs)
    found(folder, keys)
    return folder, recipe


def as_deployed(name: str, overrides: Sequence[str], registry: Registry) -> Recipe:
    """The recipe with mode = "deployed", over a transport that devices can call: the first one, if it names none."""
    asked = [*overrides, "mode=deployed"]
    if not any(each.partition("=")[0].strip() == "transport.name" for each in overrides):
        own = load_recipe(name, [each for each in asked if not each.strip().startswith("transport.")], registry)
        reaching = [offer.name for offer in registry.offers("transport") if "intake" in offer.capabilities]
        if own.transport.name not in reaching and reaching:
            asked.append(f"transport.name={reaching[0]}")
    recipe = load_recipe(name, asked, registry)
    intake_module(registry, recipe)
    return recipe


def _answer(question: Mapping[str, Any]) -> dict[str, str]:
    """Where the folder is, or what is wrong: the nearest of our errors, which whoever asked raises."""
    gates = [Gate(each["origin"], tuple(each["allow"]), tuple(each["block"])) for each in question["gates"]]
    registry = Registry(installed(), gates)
    if question["plugins"] is not None:
        registry.use_folder(Path(question["plugins"]))
    asked = (question["name"], question["overrides"], Path(question["runs"]), Path(question["keys"]))
    try:
        folder, _ = open_here(*asked, registry)
    except Exception as error:
        known = as_known(error)
        if known is None:
            raise
        return {"error": _class_of(known), "message": str(known)}
    return {"folder": str(folder.path)}


def _class_of(error: FedtowerError) -> str:
    """The name of its nearest class that takes a message and nothing else, and that whoever asked knows too."""
    ours = [cls for cls in type(error).__mro__ if getattr(errors, cls.__name__, None) is cls]
    return next(str(cls.__name__) for cls in ours if "__init__" not in vars(cls))


def main() -> int:
    """Answer the question; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever asked is interrupted too, and says so
    end_with_starter()
    begin_program()
    with redirect_stdout(sys.stderr):  # what a plugin says when it is imported is no answer
        answer = _answer(json.load(sys.stdin))
    sys.stdout.write(f"{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
