"""Holding: the publication whose parameters a device has, and the shorter way from there to a plan's.

Whatever way they are come by, parameters are those of the plan's digests, or they are fetched as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtower.core.checkpoint import storage_errors
from fedtower.core.download import Download, parted
from fedtower.core.errors import UpdateError
from fedtower.core.plan import FloatArray
from fedtower.core.registry import Registry
from fedtower.plugins.transports.grpc.artefacts import Artefact, decode_parameter, encode_parameter
from fedtower.plugins.transports.grpc.cache import ArtefactCache
from fedtower.plugins.transports.grpc.caller import Caller
from fedtower.plugins.transports.grpc.plans import Messages, PublishedPlan
from fedtower.plugins.transports.grpc.refusals import Reason, Refused

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Holding:
    """The parameters of one publication of a run; of none, if there are none."""

    run: str = ""
    round: int = 0
    parameters: tuple[Artefact, ...] = ()

    @classmethod
    def read(cls, path: Path, run: str) -> Holding:
        """What a device wrote down of a run; nothing, if it did not, or the file is damaged: it then fetches more."""
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            parameters = (Artefact(name, bytes.fromhex(digest), size) for name, digest, size in held["parameters"])
            return cls(run, int(held["round"]), tuple(parameters)) if held["run"] == run else cls()
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, path: Path) -> None:
        """Write it down, whole or not at all."""
        named = [(each.name, each.digest.hex(), each.size) for each in self.parameters]
        unfinished = path.with_suffix(".unfinished")
        with storage_errors(path):
            text = json.dumps({"run": self.run, "round": self.round, "parameters": named})
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)


@dataclass(frozen=True)
class Fetching:
    """Artefacts under a lease, into a device's cache, where those of the digests in ``keep`` stay."""

    cache: ArtefactCache
    caller: Caller
    lease: bytes
    keep: Sequence[bytes]

    def all(self, artefacts: Sequence[Artefact]) -> list[bytes]:
        """The bytes of each."""
        self.cache.gather(artefacts, lambda several: self.caller.fetch_together(self.lease, several))
        return [self._one(each).read_bytes() for each in artefacts]

    def _one(self, artefact: Artefact) -> Path:
        return self.cache.get(artefact, lambda each, at: self.caller.fetch(self.lease, each, at), keep=self.keep)


def come_by(
    plan: PublishedPlan, messages: Messages, held: Holding, fetch: Fetching, registry: Registry, shapes: Shapes
) -> None:
    """Make a plan's parameters of messages, as far as there is a way to them from what is ``held``, and put them into
    the cache. ``shapes`` are the bundle's.

    Raises:
        Refused: ``WRONG_NAMES`` for parameters that the bundle does not have, ``CORRUPT`` for messages that cannot be
            decoded.
    """
    if unknown := sorted({each.name for each in plan.parameters} - set(shapes)):
        raise Refused(Reason.WRONG_NAMES, f"round {plan.round} has the parameters {unknown}, which the bundle has not")
    needed = messages.publication.needed(held.round)
    if not needed:
        return
    before = _held(held, fetch.cache, shapes) if messages.differences else {}
    if before is None:
        return
    names = [each.name for each in plan.parameters]
    download: Download = registry.make("download", messages.download, path="the plan's download")
    for each, data in zip(messages.artefacts[-needed:], fetch.all(messages.artefacts[-needed:]), strict=True):
        try:
            coded = parted(data, names)
            before = {name: download.decode(coded[name], shapes[name], before.get(name)) for name in names}
        except UpdateError as error:
            raise Refused(
                Reason.CORRUPT,
                f"the publication of round {each.name} cannot be decoded by the plan's download: {error}",
            ) from error
    _put(plan.parameters, before, fetch)


def _held(held: Holding, cache: ArtefactCache, shapes: Shapes) -> dict[str, FloatArray] | None:
    """The parameters that are held, unless one is missing or of another shape."""
    found = {each.name: (each, cache.find(each)) for each in held.parameters}
    values = {name: decode_parameter(each, path.read_bytes()) for name, (each, path) in found.items() if path}
    whole = len(values) == len(held.parameters) and all(shapes.get(n) == value.shape for n, value in values.items())
    return values if whole else None


def _put(parameters: Sequence[Artefact], values: Mapping[str, FloatArray], fetch: Fetching) -> None:
    """Keep what has come to be what it should be; the rest will be fetched as it is."""
    for artefact in parameters:
        data = encode_parameter(artefact.name, values[artefact.name])
        if Artefact.of(artefact.name, data) == artefact:
            fetch.cache.put(artefact, data, keep=fetch.keep)
