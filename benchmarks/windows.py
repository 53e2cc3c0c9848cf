"""Time windows over 100,000 devices: virtual time to a target metric, and what devices worked for nothing, by policy.

    python benchmarks/windows.py [--json FILE] [--target 0.68] [--devices 100000] [--seeds 1 2 3] [--only NAME ...]

Every policy trains the same two towers on the same generated clients, from the same first parameters, over the same
devices (fedtower.core.traces.DeviceSettings says where their distributions are from), from the same hour on, until
HR@10 (99 negatives) over the validation items of the same 2,000 clients is at the target in two looks on end, or its
rounds are over. Time is virtual, so how busy this machine is changes nothing but the last column. Everything is drawn
by the seed: a second run prints the same table, that column aside. *wasted* are the device seconds of visits that did
not count: of who vanished, and of who came when the round was over. Figures are means over the seeds, between which
clients, devices and cohorts differ; *from .. to* are the hours of the fastest and the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import Recipe, load_recipe
from fedtower.core.registry import Registry, discover
from fedtower.core.traces import Load
from fedtower.core.transport import Costs
from fedtower.core.updates import Updates
from fedtower.plugins.samplers.uniform import Uniform
from fedtower.plugins.transports.virtual_clock.transport import VirtualClock
from fedtower.recsys.public import part_of
from fedtower.recsys.tasks import Histories, make_task
from fedtower.recsys.training import Federated, Setting

COHORT, JUDGES, METRIC = 100, 2_000, "HR@10"

RECIPE = (
    "data.items=1000",
    "data.mean_events=40",
    "model.dim=16",
    "model.hidden=32",
    "local.steps=4",
    "local.batch_size=16",
    "local.negatives=40",
    "local.history_length=20",
    f"cohort.size={COHORT}",
    "runtime.name=vectorized",
    "transport.name=virtual_clock",
    "transport.start_hour=20",
    "transport.block=100",
    "server.decay=none",
)
"""Clients small enough that five minutes are for training and not for waiting; what a visit takes is virtual."""

FIXED_600 = ("deadline.name=fixed", "deadline.seconds=600")
POLICIES: Mapping[str, Sequence[str]] = {
    "fixed 600 s": FIXED_600,
    "fixed 30 s": ("deadline.name=fixed", "deadline.seconds=30"),
    "fixed 5 s": ("deadline.name=fixed", "deadline.seconds=5"),
    "adaptive": ("deadline.name=adaptive",),
    "fixed 600 s, 1.1 asked": (*FIXED_600, "cohort.over_selection=1.1"),
    "adaptive, 1.1 asked": ("deadline.name=adaptive", "cohort.over_selection=1.1"),
    "fixed 600 s, 1.3 asked": (*FIXED_600, "cohort.over_selection=1.3"),
    "adaptive, 1.3 asked": ("deadline.name=adaptive", "cohort.over_selection=1.3"),
    "asynchronous, 50 a step": ("asynchronous.buffer=50", f"asynchronous.concurrency={COHORT}"),
    "asynchronous, 20 a step": ("asynchronous.buffer=20", f"asynchronous.concurrency={COHORT}"),
}
"""What each policy adds to the recipe. As many clients work at once in asynchronous rounds (FedBuff) as in others; a
round is a step of fewer updates, so there may be as many more of them, and looks are as many updates apart.
"""


@dataclass(frozen=True)
class Row:
    """One policy's way to the target, by one seed. ``seconds`` are virtual, of devices too; ``cpu_seconds`` are this
    machine's.
    """

    policy: str
    seed: int
    reached: bool
    metric: float
    seconds: float
    rounds: int
    clients: float
    device_seconds: float
    wasted_seconds: float
    cpu_seconds: float


def main() -> None:
    """Print the table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--target", type=float, default=0.68)
    parser.add_argument("--devices", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=200, help="at most so many")
    parser.add_argument("--look", type=int, default=5, help="rounds between two looks at the metric")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--quick", action="store_true", help="10 rounds over 2,000 devices: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.devices, arguments.rounds, arguments.seeds = 2_000, 10, [1]
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "devices": arguments.devices,
        "target": arguments.target,
        "seeds": arguments.seeds,
        "recipe": list(RECIPE),
    }
    print(f"{about}\n\n{HEAD}")
    common = [*RECIPE, f"data.users={arguments.devices}", f"rounds={arguments.rounds}"]
    shared = [Shared.of([*common, f"seed={seed}"]) for seed in arguments.seeds]
    rows: list[Row] = []
    for policy in arguments.only:
        ways = [way(each, policy, arguments.target, arguments.look) for each in shared]
        print(line(ways), flush=True)
        rows += ways
    costs = {devices: transport_milliseconds(devices) for devices in (1_000, 10_000, 100_000, 1_000_000)}
    print("\na round without training, CPU milliseconds (best of 20), by how many devices there are:")
    print("   ".join(f"{devices:,}: {cost:.2f}" for devices, cost in costs.items()))
    if arguments.json is not None:
        table = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps({**about, "rows": table, "transport_ms": costs}, indent=1) + "\n")


@dataclass(frozen=True)
class Shared:
    """What is made once for all policies: the clients, and some of them who judge."""

    registry: Registry
    overrides: Sequence[str]
    recipe: Recipe
    draws: Draws
    task: Histories
    judges: Histories

    @classmethod
    def of(cls, overrides: Sequence[str]) -> Shared:
        """The clients of the recipe; the judges are drawn among them."""
        registry = discover()
        recipe = load_recipe("dssm-synthetic", overrides, registry)
        draws = Draws(recipe.seed)
        data = registry.make("dataset", recipe.data.part, path="data").load(draws=draws, progress=lambda message: None)
        task = make_task(data, recipe, draws)
        assert isinstance(task, Histories)
        members = np.sort(draws.permutation(data.num_clients, "judges")[:JUDGES])
        few = part_of(data, members)
        return cls(
            registry, overrides, recipe, draws, task, Histories(few, recipe, draws, replace(task.split, population=few))
        )


def way(shared: Shared, policy: str, target: float, look: int) -> Row:
    """One policy until it is at the target, or at its end."""
    recipe = load_recipe("dssm-synthetic", [*shared.overrides, *POLICIES[policy]], shared.registry)
    if recipe.asynchronous is not None:
        longer = COHORT // recipe.asynchronous.buffer
        recipe, look = replace(recipe, rounds=recipe.rounds * longer), look * longer
    task = replace(shared.task, recipe=recipe)
    setting = Setting(recipe, shared.registry, task, Hooks.none(), shared.draws, time.monotonic)
    began, training = time.process_time(), Federated(setting)
    sums: dict[str, float] = dict.fromkeys(("seconds", "clients", "device_seconds", "wasted_seconds"), 0.0)
    metric, before = 0.0, 0.0
    for report in training.rounds():
        sums = {name: value + getattr(report, name) for name, value in sums.items()}
        if report.round % look == 0:
            before, metric = metric, shared.judges.judge(training.learned(), "validation").metrics[METRIC]
            if min(metric, before) >= target:
                break
    return Row(
        policy=policy,
        seed=recipe.seed,
        reached=min(metric, before) >= target,
        metric=metric,
        seconds=sums["seconds"],
        rounds=report.round,
        clients=sums["clients"] / report.round,
        device_seconds=sums["device_seconds"],
        wasted_seconds=sums["wasted_seconds"],
        cpu_seconds=time.process_time() - began,
    )


def transport_milliseconds(devices: int) -> float:
    """Processor time of choosing a cohort among those who are there and letting its visits pass, with no training."""
    plan = Plan(1, {"w": np.zeros(1_000, np.float32)}, LocalSettings(steps=4))
    transport = VirtualClock().over(load_of(plan), Uniform(COHORT))
    transport.begin({})
    draws, times = Draws(1), []
    for round in range(21):  # the first makes the devices
        began = time.process_time()
        cohort = transport.sample(round, devices, draws)
        for _ in transport.exchange(replace(plan, round=round), cohort, nothing, draws, 30.0):
            pass
        times.append(time.process_time() - began)
    return 1e3 * min(times[1:])


def load_of(plan: Plan) -> Costs:
    """The same load for everybody."""
    return lambda _, clients: Load(*(np.full(len(clients), float(each)) for each in (plan.nbytes, 4, plan.nbytes)))


def nothing(plan: Plan, clients: np.ndarray[Any, np.dtype[np.int64]]) -> Updates:
    """Updates that hold nothing."""
    return Updates(np.ones(len(clients)), clients=clients)


HEAD = (
    f"{'policy':24}{'virtual h':>10}{'from .. to':>15}{'rounds':>8}{'s a round':>11}{'clients':>9}{'device h':>10}"
    f"{'wasted h':>10}{'wasted':>8}{'CPU s':>7}"
)


def line(ways: Sequence[Row]) -> str:
    """A policy's row of the table; ways that did not come to the target are told."""

    def mean(name: str) -> float:
        return statistics.fmean(getattr(row, name) for row in ways)

    hours = [row.seconds / 3600 for row in ways]
    missed = sum(not row.reached for row in ways)
    return (
        f"{ways[0].policy:24}{mean('seconds') / 3600:10.2f}{f'{min(hours):.2f} .. {max(hours):.2f}':>15}"
        f"{mean('rounds'):8.0f}{mean('seconds') / mean('rounds'):11.1f}{mean('clients'):9.1f}"
        f"{mean('device_seconds') / 3600:10.2f}{mean('wasted_seconds') / 3600:10.2f}"
        f"{mean('wasted_seconds') / mean('device_seconds'):8.1%}{mean('cpu_seconds'):7.1f}"
        f"{f'  ({missed} of {len(ways)} did not reach it)' if missed else ''}"
    )


if __name__ == "__main__":
    main()
