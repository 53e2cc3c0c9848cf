"""What the recommender's tests share: populations written down by hand, a small recipe, runs that are trained once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedtower
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import Registry, discover
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.run import Run
from fedtower.recsys.tasks import make_task
from fedtower.recsys.training import Setting
from fedtower.recsys.vocabulary import Vocabulary

SMALL = {
    "data.users": 60,
    "data.items": 200,
    "data.mean_events": 40,
    "model.dim": 8,
    "model.hidden": 16,
    "model.user_vector": True,
    "local.batch_size": 16,
    "local.negatives": 20,
    "local.history_length": 20,
    "cohort.size": 12,
    "runtime.name": "torch_loop",
    "transport.name": "in_process",
    "transport.dropout": 0.1,
    "transforms.0.name": "clip",
    "transforms.0.norm": 0.5,
    "rounds": 6,
    "standalone.epochs": 4,
    "standalone.users_per_batch": 16,
    "evaluation.every": 2,
    "checkpoint.every": 2,
}
"""What makes ``dssm-synthetic`` a matter of a second, with the per-user vector, clients that vanish, and clipping."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run in as many processes as there are cores, so each has one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small() -> Mapping[str, Any]:
    """The overrides that make ``dssm-synthetic`` small."""
    return SMALL


@pytest.fixture(scope="session")
def population_of() -> Callable[..., EventTable]:
    """Makes a population of clients who touched these items, in this order; user 2 has the features ``(2, 1)``."""

    def make(histories: Sequence[Sequence[int]], num_items: int) -> EventTable:
        owners = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        items = np.array([item for history in histories for item in history], dtype=np.int64)
        return EventTable.build(
            "written down",
            users=Vocabulary(np.arange(len(histories)), "user"),
            items=Vocabulary(np.arange(num_items), "item"),
            client_rows=owners.astype(np.int64),
            item_rows=items,
            times=np.arange(len(items), dtype=np.int64),
            user_table=np.stack([np.arange(len(histories)), np.ones(len(histories))], axis=1).astype(np.float32),
        )

    return make


@pytest.fixture(scope="session")
def registry() -> Registry:
    """All installed plugins."""
    return discover()


@pytest.fixture(scope="session")
def setting_of(registry: Registry) -> Callable[..., Setting]:
    """Makes what a run of the small recipe has before anything is trained; ``epochs`` instead of steps a visit."""

    def make(overrides: Mapping[str, Any] | None = None, epochs: int | None = None) -> Setting:
        given = [f"{key}={_toml(value)}" for key, value in {**SMALL, **(overrides or {})}.items()]
        recipe = load_recipe("dssm-synthetic", given, registry)
        if epochs is not None:
            recipe = replace(recipe, local=replace(recipe.local, steps=None, epochs=epochs))
        draws = Draws(recipe.seed)
        population = registry.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
        task = make_task(population, recipe, draws)
        return Setting(recipe, registry, task, Hooks.none(), draws, time.monotonic)

    return make


@pytest.fixture(scope="session")
def federated_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished small run in simulated mode. Nobody may write into its folder."""
    return fedtower.run("dssm-synthetic", SMALL, runs=tmp_path_factory.mktemp("federated"))


@pytest.fixture(scope="session")
def standalone_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished small run in standalone mode. Nobody may write into its folder."""
    return fedtower.run("dssm-synthetic", {**SMALL, "mode": "standalone"}, runs=tmp_path_factory.mktemp("standalone"))


class Child:
    """A command line that runs in a process of its own."""

    def __init__(self, pid: int, folder: Path, ask: Callable[[Mapping[str, Any]], Any]) -> None:
        self.pid, self.folder, self._ask = pid, folder, ask
        self.code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus a signal, or ``None`` while it runs."""
        if self.code is None:
            self.code = self._ask({"wait": self.pid})
        return self.code

    def wait(self, seconds: float = 120.0) -> int:
        """Its exit code, once it has one; it is killed when that takes too long."""
        until = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"no end after {seconds} s: {self.out[-500:]} {self.err[-500:]}")
            time.sleep(0.002)
        return code

    def kill(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal, and wait for its end."""
        if self.poll() is None:
            os.kill(self.pid, how)
        return self.wait()

    @property
    def out(self) -> str:
        """What it wrote to stdout."""
        return (self.folder / "out").read_text("utf-8")

    @property
    def err(self) -> str:
        """What it wrote to stderr, in one line."""
        return " ".join((self.folder / "err").read_text("utf-8").split())


@pytest.fixture(scope="session")
def fork() -> Iterator[Callable[..., Child]]:
    """Starts a command line in a forked process, which has no seconds of imports before it; see forks.py."""
    program = str(Path(__file__).with_name("forks.py"))
    with subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        talk_to, listen_to = server.stdin, server.stdout

        def ask(order: Mapping[str, Any]) -> Any:
            talk_to.write(json.dumps(order) + "\n")
            talk_to.flush()
            return json.loads(listen_to.readline())

        def start(*arguments: object, folder: Path, **more: Any) -> Child:
            order = {"arguments": [str(word) for word in arguments], "folder": str(folder), **more}
            return Child(ask(order), folder, ask)

        yield start
        talk_to.close()


@pytest.fixture(scope="session")
def options(small: Mapping[str, Any]) -> Callable[..., list[str]]:
    """The words of a command line that make a recipe small; and these overrides too."""

    def of(overrides: Mapping[str, Any] | None = None) -> list[str]:
        return [f"--option={key}={_toml(value)}" for key, value in {**small, **(overrides or {})}.items()]

    return of


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
