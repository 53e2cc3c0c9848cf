"""What a round publishes, what the server keeps of it, and how many bytes it is for whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.download import MOST_MESSAGES, joined, kept, parted, publish
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.publication import Publication
from fedtower.core.recipe import check, parse_recipe
from fedtower.core.registry import discover
from fedtower.core.round import Parts, make_plan, run_round
from fedtower.core.runtime import Work, as_updates
from fedtower.core.server import Schedule, ServerState
from fedtower.core.store import ClientStore
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.updates import Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.downloads.quantize import Quantize
from fedtower.plugins.downloads.selective import Selective
from fedtower.plugins.server_optimizers.sgd import SGD
from fedtower.plugins.transports.in_process import InProcess

DRAWS = Draws(5)
SIZE = 1000
REGISTRY = discover()


def server(round: int) -> dict[str, Any]:
    """What the server has in a round."""
    return {"w": DRAWS.normal("w", round, np.arange(SIZE)).astype(np.float32), "b": np.full(1, round, dtype=np.float32)}


def plans(download: Any, rounds: int, state: Mapping[str, Any] | None = None, first: int = 1) -> list[Plan]:
    """The plans of some rounds, each published on what was kept of the one before."""
    made = []
    state = state or {}
    for round in range(first, rounds + 1):
        parameters, publication = publish(download, round, server(round), state, DRAWS)
        made.append(Plan(round, parameters, LocalSettings(steps=1), publication=publication))
        state = kept(made[-1])
    return made


def test_the_first_publication_of_differences_is_of_all_there_is() -> None:
    (plan,) = plans(Selective(0.1), 1)
    assert_same_bits(dict(plan.parameters), server(1))
    assert plan.bytes_down(np.array([0])).tolist() == [4 * SIZE + 4]


def test_who_has_the_last_needs_one_message_and_who_has_an_older_those_since() -> None:
    *_, plan = plans(Selective(0.05), 6)
    assert plan.publication is not None
    sizes = plan.publication.sizes
    assert len(sizes) == 5, "one a round, from the second on"
    assert plan.bytes_down(np.array([0, 1, 4, 5, 6])).tolist() == [
        4 * SIZE + 4,
        sum(sizes),
        sizes[3] + sizes[4],
        sizes[4],
        0,
    ]


def test_a_device_that_decodes_the_messages_has_the_bits_of_the_plan() -> None:
    download = Selective(0.05)
    first, *_, last = plans(download, 6)
    assert last.publication is not None
    held = dict(first.parameters)
    for data in last.publication.messages:
        coded = parted(data, list(held))
        held = {name: download.decode(coded[name], value.shape, value) for name, value in held.items()}
    assert_same_bits(held, dict(last.parameters))


def test_differences_that_are_more_bytes_than_all_there_is_are_forgotten() -> None:
    *_, plan = plans(Selective(0.3), 8)  # 1,000 entries in 4,004 bytes: 301 of them are some 1,300
    assert plan.publication is not None
    assert len(plan.publication.sizes) == 2 or sum(plan.publication.sizes) < 4 * SIZE + 4
    assert plan.bytes_down(np.array([1])).tolist() == [4 * SIZE + 4]
    *_, whole = plans(Selective(1.0), 3)
    assert_same_bits(dict(whole.parameters), server(3))
    assert whole.bytes_down(np.array([2])).tolist() == [4 * SIZE + 4], "a message of everything is longer"


def test_no_plan_names_more_messages_than_may_be() -> None:
    *_, plan = plans(Selective(0.001), MOST_MESSAGES + 5)
    assert plan.publication is not None
    assert len(plan.publication.sizes) == MOST_MESSAGES


def test_it_goes_on_from_what_was_kept_with_the_same_bits() -> None:
    whole = plans(Selective(0.05), 6)
    saved = {name: np.array(value) for name, value in kept(whole[2]).items()}
    reverse = dict(reversed(list(saved.items())))  # as a checkpoint may give it back
    assert_same_bits(plans(Selective(0.05), 6, reverse, first=4), whole[3:])


def test_what_needs_nothing_before_it_keeps_nothing_and_is_the_same_for_everybody() -> None:
    first, second = plans(Quantize(8), 2)
    assert kept(second) == {}
    size = (4 + 2 * 4 + SIZE) + (4 + 4 + 1)  # a length, scales and codes each
    assert second.bytes_down(np.array([0, 1, 2])).tolist() == [size] * 3
    assert not np.array_equal(first.parameters["w"], server(1)["w"])


def test_a_message_that_is_no_shorter_is_not_sent() -> None:
    parameters, publication = publish(Quantize(8), 1, {"b": np.full(1, 3, dtype=np.float32)}, {}, DRAWS)
    assert publication.sizes == ()
    assert Plan(1, parameters, LocalSettings(steps=1), publication=publication).bytes_down(np.array([0])) == [4]


def test_who_is_ahead_or_has_nothing_takes_everything() -> None:
    assert Publication(2, (10, 20), differences=True).needed(0) is None
    assert Publication(3, (10,), differences=True).needed(4) is None, "of a run that went back to a checkpoint"


def test_messages_are_joined_in_the_order_of_their_names() -> None:
    coded = {"b": np.array([7], dtype=np.uint8), "a": np.zeros(0, dtype=np.uint8)}
    data = joined(coded)
    assert data == bytes([0, 0, 0, 0, 1, 0, 0, 0, 7])
    assert_same_bits(parted(data, ["b", "a"]), coded)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "ends before its message of 'a'"),
        (bytes([0, 0, 0, 0, 2, 0, 0, 0, 7]), "ends before its message of 'b'"),
        (bytes([255, 255, 255, 255, 1, 0, 0, 0, 7]), "ends before its message of 'a'"),
        (bytes([0, 0, 0, 0, 1, 0, 0, 0, 7, 7]), "1 bytes after the last"),
    ],
)
def test_bytes_that_are_no_publication_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(UpdateError, match=said):
        parted(data, ["a", "b"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": "standalone"}, 'nothing goes down with mode = "standalone"'),
        (
            {"asynchronous": {"buffer": 2, "concurrency": 4}, "transport": {"name": "virtual_clock"}},
            "several versions at once",
        ),
        ({"local": {"steps": 1, "control": "scaffold"}}, "'scaffold' reckons with deltas"),
    ],
)
@pytest.mark.parametrize("name", ["quantize", "selective"])
def test_what_cannot_be_had_with_it_is_refused_in_words(name: str, values: dict[str, Any], said: str) -> None:
    recipe = {**examples.recipe().to_dict(), "download": {"name": name}}
    check(parse_recipe(recipe), REGISTRY)
    with pytest.raises(RecipeError, match=said):
        check(parse_recipe({**recipe, **values}), REGISTRY)


class Anything:
    """One example a client."""

    def work(self, plan: Plan, clients: Any) -> Work:
        one = np.ones_like(clients)
        return Work(clients, one, one, inputs={})


class ToTarget:
    """A visit leads from wherever it begins to what the client wants: its number, but for the first two entries."""

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, Any]]:
        wanted = np.repeat(work.clients[:, None].astype(np.float32), SIZE, axis=1)
        wanted[:, 0], wanted[:, 1] = 100, 10 * work.clients
        return as_updates(plan, work, {"w": wanted}, {}, losses=np.ones(len(work))), {}


@dataclass(frozen=True)
class InTurn:
    """Clients 1 and 2, and in round 2 client 1 alone; in round 3 nobody."""

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        clients = {2: [1], 3: []}.get(round, [1, 2])
        return Cohort(round, np.array(clients, dtype=np.int64), population)


def a_run(download: Any) -> tuple[Parts, ServerState]:
    hooks, store = Hooks.none(pytest.fail), ClientStore(3)
    side = ClientSide(Anything(), ToTarget(), None, [], store, hooks, DRAWS)
    parts = Parts(
        population=3,
        rounds=9,
        sampler=InTurn(),
        transport=InProcess(),
        client=side,
        transforms=[],
        aggregator=FedAvg(),
        optimizer=SGD(),
        store=None,
        local=LocalSettings(steps=1),
        rows=RowSettings(),
        lr=1.0,
        schedule=Schedule("none", to=1.0, rounds=9),
        hooks=hooks,
        draws=DRAWS,
        clock=lambda: 0.0,
        download=download,
    )
    state = ServerState(0, {"w": np.zeros(SIZE, dtype=np.float32)})
    side.declare(make_plan(state, parts))
    return parts, state


def test_rounds_by_hand_deltas_are_from_what_was_sent_and_bytes_are_of_what_was_missed() -> None:
    parts, state = a_run(Selective(1 / SIZE))  # one entry a round
    message = 4 + 5 + 2 + 1 + 4  # a length, a head, a gap of as many bits as it takes and their number, a value
    bytes_down, held, server = [], [], []
    for _ in range(5):
        plan = make_plan(state, parts)
        state, report = run_round(state, parts)
        bytes_down.append(report.bytes_down)
        held.append(plan.parameters["w"][[0, 1]].tolist())
        server.append(state.parameters["w"][[0, 1]].tolist())
    # Everybody begins at 0 and wants (100, 10) or (100, 20). Then (100, 0) is published, and client 1 alone moves the
    # server by 10 from there. Nobody comes in round 3, but something is published: what is furthest away is entry 1.
    assert held[:3] == [[0, 0], [100, 0], [100, 25]]
    assert server[:3] == [[100, 15], [100, 25], [100, 25]]
    assert bytes_down[0] == 2 * 4 * SIZE
    assert bytes_down[2] == 0
    one, two, three = state.download["sizes"][:3].tolist()
    assert bytes_down[1] == one <= message
    assert bytes_down[3] == (two + three) + (one + two + three), "of client 1, and of client 2, who was not there"
    assert state.download["sizes"].tolist() == [one, two, three, state.download["sizes"][3]]


def test_a_share_of_one_has_the_bits_and_the_bytes_of_a_run_without() -> None:
    ends = []
    for download in (None, Selective(1.0)):
        parts, state = a_run(download)
        bytes_down = []
        for _ in range(5):
            state, report = run_round(state, parts)
            bytes_down.append(report.bytes_down)
        ends.append((dict(state.parameters), bytes_down))
    assert_same_bits(ends[0], ends[1])
