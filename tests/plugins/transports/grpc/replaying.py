"""What a run would have come to, had nobody been killed: the accepted updates, folded and stepped in one process."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks, hookimpl, new_manager
from fedtower.core.plan import Plan
from fedtower.core.registry import discover
from fedtower.core.transport import Visit
from fedtower.core.updates import Updates
from fedtower.plugins.transports.grpc.codec import decode_submission
from fedtower.recsys.deployed import _FIELDS, Elsewhere
from fedtower.recsys.run import _setting
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.training import Federated
from tests.plugins.transports.grpc.keeping import digest_of

MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class Kept:
    """The accepted uploads of a run, by window, in the order of acceptance: client and payload."""

    uploads: Mapping[tuple[int, str], list[tuple[int, bytes]]]

    @classmethod
    def read(cls, folder: Path) -> Kept:
        """Those that the run has kept; positions go from 1 without a gap, and no client has two."""
        found: dict[tuple[int, str], list[tuple[int, bytes]]] = {}
        for path in sorted(folder.glob("*-*-*-*")):
            round, task, position, client = path.name.split("-")
            window = found.setdefault((int(round), task), [])
            window.append((int(client), path.read_bytes()))
            assert len(window) == int(position)
        for uploads in found.values():
            assert len({client for client, _ in uploads}) == len(uploads)
        return cls(found)

    def clients(self, round: int, task: str = "train") -> list[int]:
        """Who counted in a window."""
        return sorted(client for client, _ in self.uploads[round, task])

    def updates(self, round: int) -> Iterator[Updates]:
        """What a round was made of."""
        for client, payload in self.uploads[round, "train"]:
            yield decode_submission(payload, client, most_bytes=MOST_BYTES).updates

    def sums(self, round: int) -> dict[str, float]:
        """What the devices said in a window of evaluation, as means."""
        totals: dict[str, tuple[float, int]] = {}
        for client, payload in self.uploads[round, "evaluate"]:
            for name, each in decode_submission(payload, client, most_bytes=MOST_BYTES).sums.items():
                held = totals.get(name, (0.0, 0))
                totals[name] = (held[0] + each.total, held[1] + each.cases)
        return {name: total / count for name, (total, count) in totals.items() if count}

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        """Those who counted, as a cohort."""
        return Cohort(round, np.array(self.clients(round), dtype=np.int64), population)

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        """Their updates."""
        return self.updates(plan.round)


class Replayed(Federated):
    """The training of a served run, over what it has kept."""

    def __init__(self, folder: Path, kept: Kept) -> None:
        registry, hooks = discover(), Hooks(new_manager())
        recipe = RunFolder.open(folder).recipe()
        super().__init__(_setting(recipe, registry, hooks, lambda _: None))
        self.totals: dict[int, str] = {}
        hooks.add(self, "totals")
        client = Elsewhere(**{name: getattr(self._parts.client, name) for name in _FIELDS})
        self._parts = replace(self._parts, transport=kept, sampler=kept, client=client)

    @hookimpl(wrapper=True)
    def aggregate(self, round: int) -> Generator[None, Any, Any]:
        """Write down what a round adds up to."""
        result = yield
        self.totals[round] = digest_of(result[0])
        return result

    def bits(self) -> dict[str, Any]:
        """All that a checkpoint holds, after every round."""
        for _ in self.rounds():
            pass
        return dict(self.snapshot())
