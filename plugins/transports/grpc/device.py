"""The device's process: it calls, does what it is given, and waits, until the federation is over."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import grpc

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import TrustError
from fedtower.core.folders import make_folder
from fedtower.core.hooks import Hooks
from fedtower.core.registry import Registry
from fedtower.core.signing import Verifier
from fedtower.plugins.transports.grpc.caller import BackOff, Caller, Later, Leased, Over, Wait
from fedtower.plugins.transports.grpc.engines import Engines
from fedtower.plugins.transports.grpc.enrolment import Enrolled, begin_enrolment, finish_enrolment
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.tls import DeviceTls, refuse_contradiction
from fedtower.plugins.transports.grpc.visitor import RoundOver, Visitor
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.recsys.bundle import InputError
from fedtower.recsys.engine import EngineError
from fedtower.recsys.shards import read_shard

Said = Callable[[str, dict[str, Any]], None]

_MOST_FAILURES = 3  # on end: it is not the one task that is at fault
_FOR_GOOD = (Reason.UNKNOWN_DEVICE, Reason.REVOKED, Reason.OTHER_PROTOCOL, Reason.OTHER_FEDERATION)


@dataclass(frozen=True)
class Place:
    """Where the server is, and what it is known by."""

    address: str
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    longest_pause: float = BackOff.most_seconds

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A line to it.

        Raises:
            TrustError: plaintext that would leave this machine, or a certificate that cannot be used.
        """
        tls = None if self.authority is None else DeviceTls(self.authority, self.certificate, self.key)
        refuse_contradiction(tls, self.address, insecure=self.insecure)
        if tls is None:
            made = grpc.insecure_channel(self.address, self.options)
        else:
            made = grpc.secure_channel(self.address, tls.credentials(), self.options)
        with made as channel:
            yield channel

    @property
    def options(self) -> list[tuple[str, int]]:
        """What gRPC is told of the line."""
        return [
            ("grpc.max_receive_message_length", 1 << 20),
            ("grpc.use_local_subchannel_pool", 1),  # each channel is a connection of its own
            # As a device's own calls: the line waits no longer to come back than they do.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", round(1e3 * self.longest_pause)),
        ]


@dataclass(frozen=True)
class Device:
    """One device: its place, its data, its folder."""

    place: Place
    data: Path
    folder: Path
    verifier: Verifier
    registry: Registry
    hooks: Hooks
    engines: Engines
    code: str | None = None
    cache_bytes: int = 256 << 20
    back_off: BackOff = field(default_factory=BackOff)
    said: Said = lambda word, values: None
    wait: Wait = time.sleep

    def run(self, channel: grpc.Channel, *, most_tasks: int | None = None) -> int:
        """Take part until the federation is over, or so many tasks are done; how many were.

        Raises:
            Unreachable: the server did not answer for too long.
            TrustError: all that time its certificate was not believed.
            Refused: this device may not take part.
            SignatureError: what came is not of the server whose key is pinned.
        """
        shard, chance = read_shard(self.data), Random()
        stranger = self.caller(channel, chance)
        enrolled = self._enrolled(stranger, f"{platform.node()}-{shard.client}")
        caller = replace(stranger, metadata=enrolled.metadata)
        visitor = Visitor(
            caller=caller,
            verifier=self.verifier,
            shard=shard,
            folder=self.folder,
            registry=self.registry,
            engines=self.engine(),
            federation=enrolled.federation,
            cache_bytes=self.cache_bytes,
            hooks=self.hooks,
        )
        done = failures = 0
        while most_tasks is None or done < most_tasks:
            self._await_eligible()
            try:
                leased = caller.check_in(enrolled.federation, self._capabilities(), b"", visitor.num_examples)
                if isinstance(leased, Over):
                    self.said("over", {"reason": leased.reason})
                    break
                self._do(leased, visitor)
                done, failures = done + 1, 0
            except Later as later:
                # A third more or less: devices that were sent away together do not come back together.
                self.wait(later.seconds * chance.uniform(0.7, 1.3))
            except (EngineError, InputError) as error:
                failures += 1
                self.said("failed", {"message": str(error)})
                if failures == _MOST_FAILURES:
                    raise
                self.wait(chance.uniform(1.0, 5.0))
            except RoundOver as over:
                self.said("round over", {"reason": str(over)})
            except Refused as refused:
                self.said("refused", {"reason": refused.reason.name, "message": str(refused)})
                if refused.reason in _FOR_GOOD:
                    raise
                self.wait(chance.uniform(0.2, 1.0))
        return done

    def caller(self, channel: grpc.Channel, chance: Random) -> Caller:
        """The device's end of the wire."""
        return Caller(channel, (), self.back_off, chance, self.wait)

    def engine(self) -> Engines:
        """What runs the graphs."""
        return self.engines

    def _enrolled(self, caller: Caller, name: str) -> Enrolled:
        """Who this device is: kept since it enrolled, or found out now.

        Raises:
            TrustError: it never enrolled, and has no code to.
        """
        path = self.folder / "enrolled.json"
        if self.code is None and not path.is_file():
            raise TrustError(
                f"this device has not enrolled ({path} is not there): give it a code with --code; "
                f"`fedtower enrol codes` makes them"
            )
        with storage_errors(self.folder):
            make_folder(self.folder)
        begun = begin_enrolment(path, self.code or "", name)
        return begun if isinstance(begun, Enrolled) else finish_enrolment(path, caller.enrol(begun))

    def _do(self, leased: Leased, visitor: Visitor) -> None:
        self.said("task", {"task": leased.task, "round": leased.round})
        started = time.monotonic()
        again = visitor.do(leased)
        seconds = round(time.monotonic() - started, 3)
        self.said("done", {"task": leased.task, "round": leased.round, "seconds": seconds, "again": again})

    def _await_eligible(self) -> None:
        """Wait while a plugin says that this is no time: on battery, on a metered network, in use."""
        told = ""
        while reason := self.hooks.decide("device_busy"):
            if reason != told:
                self.said("waiting", {"reason": reason})
                told = reason
            self.wait(5.0)

    def _capabilities(self) -> pb.Capabilities:
        return pb.Capabilities(
            formats=[self.engines.format.suffix],
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            free_disk_bytes=shutil.disk_usage(self.data.parent).free,
        )
