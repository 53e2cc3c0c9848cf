"""Visitor: one device's visits: a task is taken, done with the bundle's graphs, and what came of it is handed in.

Nothing that was fetched is parsed before it was verified: the plan by its signature, all else by the digests in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread

import numpy as np

from fedtower.core.checkpoint import storage_errors
from fedtower.core.client import ClientSide
from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError, TrustError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import FloatArray, Plan
from fedtower.core.recipe import EvaluationSettings
from fedtower.core.registry import Registry
from fedtower.core.settings import build
from fedtower.core.signing import Verifier
from fedtower.core.updates import Updates
from fedtower.plugins.transports.grpc.artefacts import Artefact, decode_parameter, to_artefact
from fedtower.plugins.transports.grpc.cache import ArtefactCache
from fedtower.plugins.transports.grpc.caller import Caller, Leased
from fedtower.plugins.transports.grpc.codec import Belongs, Submission, encode_submission
from fedtower.plugins.transports.grpc.engines import Engines
from fedtower.plugins.transports.grpc.holding import Fetching, Holding, come_by
from fedtower.plugins.transports.grpc.kept import KeptOnDevice
from fedtower.plugins.transports.grpc.plans import PublishedPlan, open_plan
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.remote import RemoteRows
from fedtower.recsys.bundle import Bundle, read_tensors, write_tensors
from fedtower.recsys.evaluation import MetricSum
from fedtower.recsys.on_device import Held
from fedtower.recsys.own_model import judging, tuned
from fedtower.recsys.shards import Shard

_NOTHING = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Upload:
    """What is to be handed in under a lease, and what the device keeps once it was: on disk, until both are done."""

    folder: Path
    lease: bytes

    @property
    def path(self) -> Path:
        """The serialised update."""
        return self.folder / self.lease.hex()

    def is_ready(self) -> bool:
        """Whether it is all here."""
        return self.path.is_file()

    def write(self, data: bytes, run: str, states: Mapping[str, FloatArray]) -> None:
        """Write both; the update last, whole or not at all. Uploads under other leases are of no use any more."""
        with storage_errors(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(
                self._states, {f"{run}/{name}": value for name, value in states.items()} or {f"{run}/": _NOTHING}
            )
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_bytes(data)
            unfinished.replace(self.path)

    def states(self) -> tuple[str, dict[str, FloatArray]]:
        """The run, and what the device is to keep of it, (1, *shape) by name."""
        held = read_tensors(self._states.read_bytes(), str(self._states))
        run = next(iter(held)).partition("/")[0]
        return run, {name.partition("/")[2]: value for name, value in held.items() if not name.endswith("/")}

    def remove(self) -> None:
        """Forget it."""
        for path in (self.path, self._states):
            path.unlink(missing_ok=True)

    @property
    def _states(self) -> Path:
        return self.path.with_suffix(".states")


class RoundOver(Exception):
    """The round for which this device works waits no more: it may stop."""


@dataclass
class Visitor:
    """A device, between its data and the wire.

    Args:
        folder: Where it keeps what is its own, and what it fetched.
        engines: What runs the graphs.
    """

    caller: Caller
    verifier: Verifier
    shard: Shard
    folder: Path
    registry: Registry
    engines: Engines
    federation: str = ""
    cache_bytes: int = 256 << 20
    hooks: Hooks = field(default_factory=Hooks.none)
    _opened: dict[bytes, Bundle] = field(default_factory=dict, repr=False)

    @property
    def num_examples(self) -> int:
        """How many training examples this device has."""
        return Held(self.shard, Draws(0)).num_examples

    def do(self, leased: Leased) -> bool:
        """Do a task to its end; whether it had been done before. What came of it is acknowledged when this returns.

        Raises:
            Refused: what was fetched is not to be trusted, or the server does not want what was sent.
            RoundOver: the round waits no more.
        """
        upload = Upload(self.folder / "uploads", leased.lease)
        with self._alive(leased) as alive:
            begun = upload.is_ready()
            if not begun:  # else it was done, and the device ended before it was handed in
                submission, run, states = self._work(leased, alive)
                upload.write(encode_submission(submission), run, states)
            try:
                duplicate = self.caller.submit(leased.lease, upload.path, begun=begun)
            except Refused:
                upload.remove()
                raise
            self._keep(*upload.states())
            upload.remove()
            return duplicate

    def _keep(self, run: str, states: Mapping[str, FloatArray]) -> None:
        """Keep what a visit left; what is of other runs goes."""
        own = self.folder / "own"
        for other in own.iterdir() if own.is_dir() else ():
            if other.name != run:
                shutil.rmtree(other, ignore_errors=True)
        store, one = KeptOnDevice(own / run, self.shard.client), np.array([self.shard.client])
        for name, values in states.items():
            store.declare(name, values[0])
            store.write(name, one, values)

    def _work(self, leased: Leased, alive: Callable[[], None]) -> tuple[Submission, str, Mapping[str, FloatArray]]:
        """What is to be handed in, and what the device keeps of which run once that was taken."""
        published = self._plan(leased)
        bundle = self._bundle(leased, published)
        plan = published.plan(self._parameters(leased, published, bundle))
        rows = RemoteRows(self.caller, leased.lease, {each.name: each for each in published.rows})
        held = Held(self.shard, Draws(published.seed))
        belongs = Belongs(published.federation, published.model, published.round, leased.lease, leased.task)
        alive()
        if leased.task == "evaluate":
            sums = self._judged(published, bundle, plan, held, rows, alive)
            nothing = Updates(weights=np.zeros(1), clients=held.client, rounds=np.array([plan.round]))
            return Submission(belongs, nothing, held.num_examples, sums=sums), published.run, {}
        side = self._side(published, bundle, plan, held, rows)
        updates = side.visit(plan, held.client)
        return Submission(belongs, updates, held.num_examples), published.run, side.staged[0].states

    def _side(self, published: PublishedPlan, bundle: Bundle, plan: Plan, held: Held, rows: RemoteRows) -> ClientSide:
        """The client's half of a round, with everything remote in its place."""
        transforms = [
            self.registry.make("transform", part, path=f"the plan's transforms.{place}")
            for place, part in enumerate(published.transforms)
        ]
        store = self._kept(published, bundle)
        side = ClientSide(
            data=held.data(),
            runtime=self.engines.runtime(bundle, plan.local),
            rows=rows if published.rows else None,
            transforms=transforms,
            store=store,
            hooks=self.hooks,
            draws=held.draws,
            device_state=bundle.manifest.on_device,
        )
        side.declare(plan)
        return side

    def _judged(
        self,
        published: PublishedPlan,
        bundle: Bundle,
        plan: Plan,
        held: Held,
        rows: RemoteRows,
        alive: Callable[[], None],
    ) -> dict[str, MetricSum]:
        asked = dict(published.evaluation)
        role, visit = asked.pop("role", "validation"), asked.pop("visit", None)
        if role not in ("validation", "test"):
            raise Refused(Reason.CORRUPT, f"the plan asks for an evaluation of {role!r}")
        settings = build(EvaluationSettings, asked, path="the plan's evaluation")
        scorer = self.engines.scorer(bundle, plan.parameters)
        with self.engines.alone():
            alive()  # in a swarm it may have been long until it was this device's turn
            if visit is not None:
                side = self._side(published, bundle, plan, held, rows)
                own, own_rows = tuned(replace(plan, round=_round(visit)), side, held.client)
                return held.judge(scorer, own_rows, own, role, settings)
            own = judging(self._kept(published, bundle).snapshot(), personal=settings.personal)
            return held.judge(scorer, rows if published.rows else None, own, role, settings)

    def _kept(self, published: PublishedPlan, bundle: Bundle) -> KeptOnDevice:
        kept = KeptOnDevice(self.folder / "own" / published.run, self.shard.client)
        if bundle.manifest.on_device:
            initial = bundle.parameters()
            for name in bundle.manifest.on_device:
                kept.declare(name, initial[name])
        return kept

    def _plan(self, leased: Leased) -> PublishedPlan:
        """The plan of a lease: verified, then parsed, then held to what the lease says."""
        data = self._fetched(leased, to_artefact(leased.plan.artefact)).read_bytes()
        plan = open_plan(leased.plan, data, self.verifier)
        if leased.client != self.shard.client:
            raise TrustError(
                f"this device enrolled as client {leased.client}, and its data is of client {self.shard.client}: enrol "
                f"it with a code for that client (`fedtower enrol codes --first-client {self.shard.client}`)"
            )
        if not plan.run.isalnum():  # a folder here will have its name
            raise Refused(Reason.CORRUPT, f"the server's plan is of the run {plan.run!r}, which is no name")
        for what, got, want in (
            ("federation", plan.federation, self.federation or plan.federation),
            ("round", plan.round, leased.round),
        ):
            if got != want:
                raise Refused(
                    Reason.OTHER_FEDERATION if what == "federation" else Reason.OTHER_ROUND,
                    f"the server's plan is of the {what} {got!r}, and this device belongs to {want!r}",
                )
        return plan

    def _bundle(self, leased: Leased, plan: PublishedPlan) -> Bundle:
        """The plan's bundle: links to verified files, under the names that its manifest gives them."""
        if plan.bundle.digest not in self._opened:
            place = self.folder / "bundles" / plan.bundle.digest.hex()
            wanted = [Artefact("manifest.json", plan.bundle.digest, plan.bundle.size), *plan.files]
            keep = [each.digest for each in wanted]
            with storage_errors(place):
                if place.parent.is_dir():
                    for other in place.parent.iterdir():
                        shutil.rmtree(other, ignore_errors=True)
                place.mkdir(parents=True)
                for each in wanted:
                    if Path(each.name).name != each.name:
                        raise Refused(
                            Reason.WRONG_NAMES, f"the plan names the file {each.name!r}, which is no file's name"
                        )
                    _link(self._fetched(leased, each, keep), place / each.name)
            self._opened = {plan.bundle.digest: Bundle.open(place)}
        return self._opened[plan.bundle.digest]

    def _parameters(self, leased: Leased, plan: PublishedPlan, bundle: Bundle) -> Mapping[str, FloatArray]:
        """The shared parameters, in the order of the bundle; those that did not change are here already."""
        held = Holding() if plan.messages is None else Holding.read(self.folder / "held.json", plan.run)
        keep = [each.digest for each in (*plan.artefacts, *held.parameters)]
        self._cache.keep_only([leased.plan.artefact.digest, *keep])
        fetch = Fetching(self._cache, self.caller, leased.lease, keep)
        if plan.messages is not None:
            come_by(plan, plan.messages, held, fetch, self.registry, bundle.manifest.parameters)
        came = zip(plan.parameters, fetch.all(plan.parameters), strict=True)
        fetched = {each.name: decode_parameter(each, data) for each, data in came}
        if plan.messages is not None and plan.messages.differences:
            Holding(plan.run, plan.messages.round, plan.parameters).write(self.folder / "held.json")
        return {name: fetched[name] for name in bundle.manifest.parameters if name in fetched} | fetched

    def _fetched(self, leased: Leased, artefact: Artefact, keep: list[bytes] | None = None) -> Path:
        return self._cache.get(artefact, lambda each, at: self.caller.fetch(leased.lease, each, at), keep=keep or ())

    @property
    def _cache(self) -> ArtefactCache:
        return ArtefactCache(self.folder / "cache", self.cache_bytes)

    @contextmanager
    def _alive(self, leased: Leased) -> Iterator[Callable[[], None]]:
        """Heartbeats while a task is done; what is yielded raises RoundOver once the server does not wait any more."""
        done, over = Event(), []
        # Its own back-off: a heartbeat that finds nobody must not wait while the work goes on.
        caller = replace(self.caller, back_off=replace(self.caller.back_off, give_up_seconds=leased.heartbeat_seconds))

        def beat() -> None:
            while not done.wait(leased.heartbeat_seconds):
                try:
                    caller.heartbeat(leased.lease, 0.0)
                except Refused as refused:
                    over.append(refused)
                    return
                except FedtowerError:
                    continue  # the next one may get through

        def check() -> None:
            if over:
                raise RoundOver(str(over[0]))

        thread = Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield check
        finally:
            done.set()


def _round(visit: object) -> int:
    if not isinstance(visit, int) or isinstance(visit, bool) or visit < 1:
        raise Refused(Reason.CORRUPT, f"the plan asks for the visit of round {visit!r} before an evaluation")
    return visit


def _link(held: Path, name: Path) -> None:
    """Give a file another name; where a disk cannot, make another file."""
    try:
        os.link(held, name)
    except OSError:
        shutil.copyfile(held, name)
