"""What attackers do to each aggregator: HR@10 of honest users, and how often a promoted item is shown to them.

    FEDTOWER_DATA=... python benchmarks/robustness.py --rounds 300 [--shares S ...] [--attacks A ...] [--rules R ...]
                                                      [--recipe NAME] [--seed N] [--json FILE]

DSSM on MovieLens 100K. A tenth of the users are the cloud's own (``rows.public.share``, for FLTrust, and for the others
too so that all have the same clients); of the rest, ``--shares`` are attackers, drawn by the seed:

* *flip*: what an attacker did not touch counts as what she chose, as many items as she has events.
* *sign*: the update an attacker should send, times -100.
* *alie*: the mean of the block less z deviations, of each coordinate (Baruch et al., 2019,
  https://arxiv.org/abs/1902.06156): z is as large as may hide among the honest; attackers see everybody's updates.
* *promote*: every second event of an attacker is with one rarely touched item, the others are with popular ones, and
  her update is sent ten times as long (Bagdasaryan et al., 2020, https://arxiv.org/abs/1807.00459): as it is, the many
  who draw the item as a negative undo it.

ER@10 is the share of the honest users who never touched the promoted item that are shown it among their ten first of
all items that they did not touch; HR@10 is over their test items, ranked among 99 others. One seed: the standard error
of HR@10 is about .015.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.plan import Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.updates import Updates
from fedtower.recsys.evaluation import evaluate, make_cases
from fedtower.recsys.learned import Learned
from fedtower.recsys.population import Events, Population
from fedtower.recsys.public import PartOfPopulation, set_apart
from fedtower.recsys.tasks import Histories, make_task
from fedtower.recsys.training import Federated, Setting

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

PUBLIC = 0.1
RULES: Mapping[str, Sequence[str]] = {
    "fedavg": ["aggregator.name=fedavg", "aggregator.weights=equal"],
    "norm_bound": ["aggregator.name=norm_bound", "aggregator.norm={norm}", "aggregator.weights=equal"],
    "median": ["aggregator.name=median"],
    "trimmed_mean": ["aggregator.name=trimmed_mean", "aggregator.attackers=0.25"],
    "krum": ["aggregator.name=krum", "aggregator.attackers=0.25"],
    "multi_krum": ["aggregator.name=krum", "aggregator.attackers=0.25", "aggregator.select=0"],
    "geometric_median": ["aggregator.name=geometric_median"],
    "fltrust": ["aggregator.name=fltrust"],
}
LENGTHENED = {"sign": -100.0, "promote": 10.0}
ATTACKS = ("none", "flip", "sign", "alie", "promote")


@dataclass(frozen=True, eq=False)
class Forged(PartOfPopulation):
    """A population in which some clients' events are made up: the same number at the same times."""

    attackers: IntArray
    attack: str
    target: int
    popular: IntArray  # items, most touched first
    draws: Draws

    def events(self, clients: IntArray) -> Events:
        """All events of these clients."""
        events = super().events(clients)
        items = events.items.copy()
        for place in np.flatnonzero(np.isin(clients, self.attackers)).tolist():
            mine = slice(int(events.offsets[place]), int(events.offsets[place + 1]))
            items[mine] = self._made_up(int(clients[place]), events.items[mine])
        return replace(events, items=items)

    def _made_up(self, client: int, own: IntArray) -> IntArray:
        order = self.draws.permutation(self.num_items, "forged", client)
        if self.attack == "flip":
            return np.resize(order[~np.isin(order, own)], len(own))
        first = self.popular[:300][self.draws.permutation(min(300, self.num_items), "forged", client)]
        order = np.concatenate([first, self.popular[300:]])
        made = np.resize(order[order != self.target], len(own))
        made[: len(own) - 2 : 2] = self.target  # the last two are held out, and what is held out is not trained on
        return made


class Sabotage:
    """Attackers whose training is honest, and whose updates are not."""

    def __init__(self, attackers: IntArray, attack: str) -> None:
        self._attackers, self._attack = attackers, attack

    @hookimpl(wrapper=True)
    def client_train(self, plan: Plan, clients: IntArray) -> Generator[None, Any, Any]:
        updates, states = yield
        bad = np.isin(clients, self._attackers)
        if bad.any() and self._attack in LENGTHENED:
            return updates.scaled(np.where(bad, LENGTHENED[self._attack], 1.0)), states
        return (_hidden(updates, bad) if bad.any() and self._attack == "alie" else updates), states


def _hidden(updates: Updates, bad: NDArray[np.bool_]) -> Updates:
    """The block, in which each attacker sends what lies z deviations from the mean."""
    count, attackers = len(updates), int(bad.sum())
    needed = count // 2 + 1 - attackers  # honest ones that must be nearer to the mean than the attackers are
    z = max(NormalDist().inv_cdf((count - attackers - needed) / (count - attackers)), 0.0)
    dense = {}
    for name, delta in updates.dense.items():
        values = delta.astype(np.float64)
        dense[name] = delta.copy()
        dense[name][bad] = values.mean(axis=0) - z * values.std(axis=0)
    rows = {}
    for table, part in updates.rows.items():
        _, row = np.unique(part.row_ids, return_inverse=True)
        touched = np.bincount(row)[:, None]
        sums, squares = (np.zeros((len(touched), part.row_deltas.shape[1])) for _ in range(2))
        np.add.at(sums, row, part.row_deltas)
        np.add.at(squares, row, np.square(part.row_deltas, dtype=np.float64))
        mean = sums / touched
        hidden = mean - z * np.sqrt(np.maximum(squares / touched - mean**2, 0.0))
        deltas = np.where(bad[part.owners][:, None], hidden[row], part.row_deltas).astype(np.float32)
        rows[table] = replace(part, row_deltas=deltas)
    return replace(updates, dense=dense, rows=rows)


class Lengths:
    """Notes how long honest updates are."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    @hookimpl
    def update_received(self, round: int, updates: Updates) -> None:
        self.seen += updates.norms.tolist()


def setting_of(recipe_name: str, options: Sequence[str], attack: str, share: float) -> tuple[Setting, IntArray, int]:
    """What a run has, the attackers among its clients, and the promoted item."""
    registry = discover()
    recipe = load_recipe(recipe_name, [f"rows.public.share={PUBLIC}", *options], registry)
    draws = Draws(recipe.seed)
    data: Population = registry.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
    stay, _ = set_apart(data.num_clients, PUBLIC, draws)
    attackers = np.sort(stay[draws.permutation(len(stay), "attackers")[: round(share * len(stay))]])
    everyone = np.arange(data.num_clients, dtype=np.int64)
    touched = np.bincount(data.events(everyone).items, minlength=data.num_items)
    rare = np.flatnonzero((touched >= 5) & (touched <= 20))
    target = int(rare[draws.integers(len(rare), "promoted item")])
    if attack in ("flip", "promote"):
        popular = np.argsort(-touched, kind="stable")
        data = Forged(data, everyone, attackers, attack, target, popular, Draws(int(draws.bits("forged"))))
    hooks = Hooks.none()
    inside = np.searchsorted(stay, attackers)
    hooks.add(Sabotage(inside, attack), "attackers")
    return Setting(recipe, registry, make_task(data, recipe, draws), hooks, draws, time.monotonic), inside, target


def judge(setting: Setting, learned: Learned, attackers: IntArray, target: int) -> dict[str, float]:
    """HR@10 and ER@10 of those who are no attackers."""
    task = setting.task
    assert isinstance(task, Histories)
    honest = np.setdiff1d(np.arange(task.num_clients, dtype=np.int64), attackers)
    settings = replace(setting.recipe.evaluation, protocol="sampled", k=(10,))
    scorer = task.scorer(learned, "test")
    figures = evaluate(scorer, task.population, task.split, "test", settings, task.draws, honest).metrics
    cases = make_cases(task.population, task.split, honest, "test")
    scores = scorer.score_all(cases.clients, cases.cut)
    events = task.population.events(cases.clients)
    scores[events.owners, events.items] = -np.inf
    strangers = np.isfinite(scores[:, target])
    better = (scores > scores[:, target : target + 1]).sum(axis=1)
    return {"HR@10": figures["HR@10"], "ER@10": float(np.mean(better[strangers] < 10))}


def run(recipe: str, options: Sequence[str], rule: str, attack: str, share: float, norm: float) -> dict[str, Any]:
    """One line of the table."""
    given = [*options, *(option.format(norm=norm) for option in RULES[rule])]
    setting, attackers, target = setting_of(recipe, given, attack, share)
    training, started, broke = Federated(setting), time.process_time(), ""
    try:
        for _ in training.rounds():
            pass
    except Exception as error:  # an undefended run may end itself
        broke = f"{type(error).__name__}: {error}"[:120]
    figures: Mapping[str, float] = {}
    if not broke:
        figures = judge(setting, training.learned(), attackers, target)
    seconds = time.process_time() - started
    return {"rule": rule, "attack": attack, "share": share, **figures, "broke": broke, "cpu seconds": round(seconds)}


def median_length(recipe: str, options: Sequence[str]) -> float:
    """How long an honest update is, over a round: what norm bounding is set to."""
    setting, _, _ = setting_of(recipe, [*options, "rounds=1"], "none", 0.0)
    lengths = Lengths()
    setting.hooks.add(lengths, "lengths")
    for _ in Federated(setting).rounds():
        pass
    return float(np.median(lengths.seen))


def main() -> None:
    """Run what was asked for, a line each, and write all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--recipe", default="dssm-ml-100k")
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--option", "-o", action="append", default=[], help="an override of the recipe")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    options = [
        f"rounds={asked.rounds}",
        f"seed={asked.seed}",
        "evaluation.every=0",
        "transport.name=in_process",
        "transport.block=100",
        *asked.option,
    ]
    norm = median_length(asked.recipe, options)
    lines = []
    for attack in asked.attacks:
        for share in asked.shares if attack != "none" else [0.0]:
            for rule in asked.rules:
                lines.append(run(asked.recipe, options, rule, attack, share, norm))
                print("  ".join(f"{name} {value}" for name, value in lines[-1].items() if value != ""), flush=True)
                asked.json.write_text(
                    json.dumps({**vars(asked), "json": "", "norm": norm, "lines": lines}, indent=1) + "\n"
                )


if __name__ == "__main__":
    # `make bench` asks for nothing: this takes hours and needs real data, so it is run on purpose only.
    if len(sys.argv) > 1:
        main()
    else:
        print(__doc__)
