"""A device comes to a plan's parameters by the fewest bytes from where it stands, and never to others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtower.core import plugin
from fedtower.core.download import kept, publish
from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.registry import Registry
from fedtower.core.settings import Part
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.downloads import quantize as quantize_plugin
from fedtower.plugins.downloads import selective as selective_plugin
from fedtower.plugins.transports.grpc.artefact_store import ArtefactStore
from fedtower.plugins.transports.grpc.artefacts import Artefact, decode_parameter
from fedtower.plugins.transports.grpc.cache import ArtefactCache
from fedtower.plugins.transports.grpc.holding import Fetching, Holding, come_by
from fedtower.plugins.transports.grpc.plans import Messages, PublishedPlan, decode_plan, encode_plan
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.table import TableSide, Terms

DRAWS = Draws(3)
SHAPES = {"w": (40, 25), "b": (3,)}
WHOLE, LARGE = 4 * (1000 + 3), 4 * 1000  # the other parameter is not fetched again where it did not change
HEADER = 40  # of a parameter's artefact that is fetched as it is: its name, type and shape


@dataclass
class Line:
    """What a server has, given out, and counted."""

    store: ArtefactStore
    sent: int = 0

    def fetch(self, lease: bytes, artefact: Artefact, at: int) -> Iterator[bytes]:
        yield from self._counted(self.store.chunks(artefact.digest, at, (), 1 << 18))

    def fetch_together(self, lease: bytes, several: Sequence[Artefact]) -> Iterator[tuple[Artefact, bytes]]:
        for each in several:
            yield each, b"".join(self._counted(self.store.chunks(each.digest, 0, (), 1 << 18)))

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.sent += len(chunk)
            yield chunk


@dataclass
class Server:
    """Publishes other parameters each round."""

    folder: Path
    registry: Registry
    download: Part
    made: list[Plan] = field(default_factory=list)

    def publish(self) -> PublishedPlan:
        """The next round's plan, as a device decodes it."""
        round = len(self.made) + 1
        wanted = {
            name: DRAWS.normal(name, round, np.arange(np.prod(shape))).astype(np.float32).reshape(shape)
            for name, shape in SHAPES.items()
        }
        state = kept(self.made[-1]) if self.made else {}
        parameters, publication = publish(self.registry.make("download", self.download), round, wanted, state, DRAWS)
        self.made.append(Plan(round, parameters, LocalSettings(steps=1), publication=publication))
        bundle = Artefact.of("manifest.json", b"{}")
        template = PublishedPlan("f", 0, 1, bundle, (), (), LocalSettings(steps=1), run="run")
        template = replace(template, messages=Messages(self.download))
        nobody: Any = None
        side = TableSide(self.folder, nobody, 1, nobody, template, Terms(9.0, 3.0, 9.0, 1.0), said=pytest.fail)
        return decode_plan(encode_plan(side._published(self.made[-1])))


@dataclass
class Device:
    """What a visitor does with a plan, and how many bytes it took."""

    folder: Path
    server: Server

    def visit(self, plan: PublishedPlan) -> tuple[dict[str, Any], int]:
        held, cache = Holding.read(self.folder / "held.json", plan.run), ArtefactCache(self.folder / "cache")
        line: Any = Line(ArtefactStore(self.server.folder / "artefacts"))
        keep = [each.digest for each in (*plan.artefacts, *held.parameters)]
        cache.keep_only(keep)
        fetch = Fetching(cache, line, b"lease", keep)
        assert plan.messages is not None
        come_by(plan, plan.messages, held, fetch, self.server.registry, SHAPES)
        came = zip(plan.parameters, fetch.all(plan.parameters), strict=True)
        parameters = {each.name: decode_parameter(each, data) for each, data in came}
        if plan.messages.differences:
            Holding(plan.run, plan.messages.round, plan.parameters).write(self.folder / "held.json")
        return parameters, line.sent


@pytest.fixture(scope="module")
def registry() -> Registry:
    made = Registry()
    plugin.fedtower_kinds(made)
    for each in (quantize_plugin, selective_plugin):
        each.fedtower_register(made)
    return made


def devices(server: Server, *names: str) -> list[Device]:
    made = [Device(server.folder / name, server) for name in names]
    for device in made:
        device.folder.mkdir()
    return made


@pytest.fixture
def selective(tmp_path: Path, registry: Registry) -> Server:
    return Server(tmp_path, registry, Part("selective", {"share": 0.05}))


def counted(server: Server, held: int) -> int:
    """What a simulation counts for a device that had the publication of round ``held`` last."""
    return int(server.made[-1].bytes_down(np.array([held]))[0])


def test_who_was_away_fetches_what_it_has_missed_and_no_byte_more_than_is_counted(selective: Server) -> None:
    always, sometimes = devices(selective, "always", "sometimes")
    for round in range(1, 6):
        plan = selective.publish()
        want = dict(selective.made[-1].parameters)
        got, sent = always.visit(plan)
        assert_same_bits(got, want)
        assert counted(selective, round - 1) == (sent if round > 1 else WHOLE)
        if round in (1, 4):
            got, sent = sometimes.visit(plan)
            assert_same_bits(got, want)
            assert sent == counted(selective, 1) if round == 4 else WHOLE < sent < WHOLE + 2 * HEADER
    assert sent < WHOLE / 4


def test_who_asks_again_in_the_same_round_fetches_nothing(selective: Server) -> None:
    (device,) = devices(selective, "device")
    device.visit(selective.publish())
    plan = selective.publish()
    device.visit(plan)
    assert device.visit(plan)[1] == 0


def test_who_is_of_another_run_or_too_far_behind_takes_everything(selective: Server) -> None:
    stranger, late = devices(selective, "stranger", "late")
    plan = selective.publish()
    for device in (stranger, late):
        device.visit(plan)
    other = Holding("another run", 1, plan.parameters)
    other.write(stranger.folder / "held.json")
    _, sent = stranger.visit(selective.publish())
    assert sent > LARGE
    for _ in range(30):
        plan = selective.publish()
    got, sent = late.visit(plan)
    assert_same_bits(got, dict(selective.made[-1].parameters))
    assert sent > LARGE
    assert counted(selective, 1) == WHOLE


@pytest.mark.parametrize("damage", ["cache", "file", "value"])
def test_a_damaged_holding_costs_a_download_and_nothing_else(selective: Server, damage: str) -> None:
    (device,) = devices(selective, "device")
    device.visit(selective.publish())
    path = device.folder / "held.json"
    if damage == "cache":
        for each in (device.folder / "cache").iterdir():
            each.unlink()
    elif damage == "file":
        path.write_text("{")
    else:  # what it says that it holds is of another publication
        said = json.loads(path.read_text())
        path.write_text(json.dumps({**said, "round": 2}))
        selective.publish()
    got, sent = device.visit(selective.publish())
    assert_same_bits(got, dict(selective.made[-1].parameters))
    assert sent > LARGE


def test_quantised_parameters_take_as_many_bytes_as_are_counted(tmp_path: Path, registry: Registry) -> None:
    server = Server(tmp_path, registry, Part("quantize", {"bits": 4}))
    (device,) = devices(server, "device")
    for _ in range(2):
        plan = server.publish()
        got, sent = device.visit(plan)
        assert_same_bits(got, dict(server.made[-1].parameters))
        assert sent == counted(server, 0) == (4 + 2 * 4 + 500) + (4 + 4 + 2)
        assert device.visit(plan)[1] == 0, "it has them already"
    assert not (device.folder / "held.json").exists()


def test_messages_that_cannot_be_decoded_are_refused_by_name(selective: Server) -> None:
    (device,) = devices(selective, "device")
    device.visit(selective.publish())
    plan = selective.publish()
    assert plan.messages is not None
    broken = ArtefactStore(selective.folder / "artefacts").put("2", b"\xff" * 300)
    spoilt = replace(plan, messages=replace(plan.messages, artefacts=(broken,)))
    with pytest.raises(Refused, match="publication of round 2 cannot be decoded") as caught:
        device.visit(spoilt)
    assert caught.value.reason is Reason.CORRUPT


def test_parameters_that_the_bundle_does_not_have_are_refused(selective: Server) -> None:
    (device,) = devices(selective, "device")
    plan = selective.publish()
    renamed = replace(plan, parameters=(replace(plan.parameters[0], name="v"), plan.parameters[1]))
    with pytest.raises(Refused, match=r"\['v'\], which the bundle has not"):
        device.visit(renamed)
