"""What every plugin of hooks promises: an observer, a tracker, or anything that decides or wraps."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks, hook_names, hooks_of
from fedtower.core.testing import examples
from fedtower.core.testing.promises import Promises
from fedtower.core.updates import Updates


class ObserverPromises(Promises):
    """``make`` gives what is registered: a module with marked functions (``make = lambda: my_module``) or an object."""

    @pytest.fixture
    def failures(self) -> list[str]:
        """What the hooks reported as failed."""
        return []

    @pytest.fixture
    def hooks(self, failures: list[str]) -> Hooks:
        """Hooks with only this plugin. Adding it checks that no hook is misspelt and that their arguments exist."""
        hooks = Hooks.none(failures.append)
        hooks.add(self.made(), "under test")
        return hooks

    def test_it_has_hooks(self, hooks: Hooks) -> None:
        plugin = self.made()
        found = [name for name in hooks_of(hooks.manager, plugin) if name not in hook_names("offer")]
        assert found, f"nothing of {plugin!r} is marked with @hookimpl"

    def test_it_survives_a_whole_run(self, hooks: Hooks, failures: list[str], tmp_path: Path) -> None:
        for name, values in a_run(tmp_path):
            hooks.observe(name, **values)
        assert not failures, "\n".join(failures)

    def test_it_leaves_what_it_is_shown_alone(self, hooks: Hooks, tmp_path: Path) -> None:
        for name, values in a_run(tmp_path):
            before = deepcopy(values)
            hooks.observe(name, **values)
            # Arrays have no single truth value, and their text does.
            assert repr(values) == repr(before), f"{name} changed its arguments"

    def test_it_decides_with_what_the_round_can_use(self, hooks: Hooks) -> None:
        chosen = hooks.decide("select_clients", round=1, population=100, draws=Draws(7))
        if chosen is not None:
            clients = np.asarray(chosen)
            assert np.issubdtype(clients.dtype, np.integer)
            assert len(np.unique(clients)) == len(clients)
            assert np.all((clients >= 0) & (clients < 100))
        seconds = hooks.decide("round_deadline", round=1)
        assert seconds is None or float(seconds) > 0
        for name, values in (
            ("accept_update", {"update": examples.updates(1), "plan": examples.plan()}),
            ("stop_run", {"report": examples.report()}),
        ):
            reason = hooks.decide(name, **values)
            assert reason is None or (isinstance(reason, str) and reason), f"{name} gives a reason, or None"

    @pytest.mark.parametrize("name", hook_names("wrap"))
    def test_it_passes_on_what_it_wraps(self, hooks: Hooks, name: str) -> None:
        shown: dict[str, dict[str, Any]] = {
            "client_train": {"plan": examples.plan(), "clients": examples.cohort().clients},
            "aggregate": {"round": 1},
            "export": {"folder": Path("bundle")},
        }
        if name == "export":
            bundle = SimpleNamespace(path=Path("bundle"))
            assert hooks.wrap(name, lambda: bundle, **shown[name]) is bundle
            return
        result: Any = hooks.wrap(name, lambda: (examples.updates(7), {}), **shown[name])
        assert isinstance(result[0], Updates)
        assert isinstance(result[1], Mapping)


def a_run(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Every hook of the observing family, as a run of three rounds calls them."""
    calls: list[tuple[str, Mapping[str, Any]]] = [
        ("run_started", {"recipe": examples.recipe(), "folder": folder}),
        ("data_loaded", {"card": examples.DATA_CARD, "headline": ("HR@10", "NDCG@10")}),
        ("model_built", {"shared_bytes": 40, "table_bytes": 176}),
        ("run_resumed", {"round": 0}),
    ]
    for round in (1, 2, 3):
        calls += [
            ("round_started", {"round": round, "cohort": examples.cohort(round)}),
            ("update_received", {"round": round, "updates": examples.updates(6, round=round)}),
            ("client_dropped", {"round": round, "clients": np.array([20]), "reason": "sent no update that counted"}),
            ("update_refused", {"round": round, "client": 20, "reason": "norm", "words": "its update is too long"}),
            ("privacy_spent", {"round": round, "spent": {"epsilon": 0.5 * round, "delta": 1e-6}}),
            ("deadline_changed", {"round": round, "seconds": 8.1, "why": "deadline 12.4 s → 8.1 s: all came early"}),
            ("round_finished", {"report": examples.report(round)}),
        ]
    return [
        *calls,
        ("evaluated", {"round": 3, "subject": "model", "evaluation": examples.Evaluation()}),
        ("evaluated", {"round": 3, "subject": "ItemPop", "evaluation": examples.Evaluation(role="test")}),
        ("checkpoint_written", {"round": 3, "path": folder / "checkpoints" / "000003"}),
        ("index_built", {"round": 3, "figures": examples.INDEX}),
        ("warned", {"message": "something is not as it should be"}),
        ("run_finished", {"summary": {"rounds": 3, "seconds": 0.75, "metrics": {"HR@10": 0.5}}}),
    ]
