"""Health: whether an intake should be sent devices, for a load balancer; looked at once a second.

It is not well when its journal or the disk of the run's folder takes nothing, when the table process is away or gives
no rows to those who should have some, while it drains, and when nobody has looked for some seconds: then its event loop
hangs. A device that comes all the same loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtower.core.errors import FedtowerError, StorageError
from fedtower.plugins.transports.grpc.intake import Intake, RowsAway
from fedtower.plugins.transports.grpc.seats import Seat
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.recsys.bundle import MANIFEST, parse_manifest
from fedtower.recsys.running import running_of

EVERY_SECONDS = 1.0
_ANSWER_SECONDS = 3.0
_STALE_SECONDS = 10.0
# A failure that no probe sees: a balancer that sends nobody would otherwise never learn that it is over.
_STUMBLED_SECONDS = 10.0


@dataclass
class Health:
    """What was found when it was looked at last; ``said`` is told when that changes."""

    intake: Intake
    seat: Seat
    said: Callable[[str, int, Mapping[str, Any]], None]
    troubles: Mapping[str, str] = field(default_factory=lambda: {"intake": "the intake has just been started"})
    looked: float = field(default_factory=time.monotonic)
    has_rows: bool | None = None

    def answer(self) -> tuple[bool, dict[str, Any]]:
        """Whether devices should be sent here, and the same with reasons, by what they are of; any thread may ask."""
        reasons = dict(self.troubles)
        if time.monotonic() - self.looked > _STALE_SECONDS:
            reasons["intake"] = "the intake is not answering"
        if self.intake.draining:
            reasons["draining"] = "the server is about to stop"
        status = "draining" if self.intake.draining else "failing" if reasons else "ok"
        return not reasons, {"status": status, "reasons": reasons}

    async def watch(self) -> None:
        """Look every second, for as long as this task is not cancelled; write down what was counted, too."""
        while True:
            try:
                await self.look()
            except Exception as error:  # whatever it is: who stops looking would be taken for somebody who hangs
                self.troubles, self.looked = {"intake": f"{type(error).__name__}: {error}"}, time.monotonic()
            await asyncio.sleep(EVERY_SECONDS)

    async def look(self) -> None:
        """Look once."""
        found = {"disk": self.keep(), "journal": await self._journal(), "table": await self._table()}
        troubles = {name: why for name, why in found.items() if why}
        if troubles.keys() != self.troubles.keys():
            level = logging.WARNING if troubles else logging.INFO
            self.said("unwell" if troubles else "well", level, troubles)
        self.troubles, self.looked = troubles, time.monotonic()

    def keep(self) -> str:
        """Write down what was counted; why that cannot be done, or nothing."""
        try:
            self.seat.write(self.intake.meters.counted())
        except (StorageError, OSError) as error:
            return str(error)
        return ""

    async def _journal(self) -> str:
        """Why the journal takes nothing: it is asked to renew a lease that there is not, which takes its lock."""
        if time.monotonic() - self.intake.stumbled < _STUMBLED_SECONDS:
            return "an update or a lease could not be stored a moment ago"
        try:
            renewed = asyncio.wrap_future(self.intake.journal.renew(bytes(16), 1.0))
            await asyncio.wait_for(renewed, _ANSWER_SECONDS)
        except TimeoutError:
            return f"the journal has not answered for {_ANSWER_SECONDS:g} seconds"
        except FedtowerError as error:
            return str(error)
        return ""

    async def _table(self) -> str:
        """Why there is nobody who trains, or gives rows of a model that has some; a run that has ended needs nobody."""
        if self.intake.finished():
            return ""
        processes = {each.name: each for each in running_of(self.intake.folder)}
        if "supervisor" in processes and not ("table" in processes and processes["table"].is_alive):
            return "the table process is away, and is being started again"
        manifest = self.intake.folder / "bundle" / MANIFEST
        if self.has_rows is None and manifest.is_file():  # it is written once, when a run is begun
            self.has_rows = parse_manifest(manifest.read_bytes(), str(manifest)).rows is not None
        if self.has_rows is None:
            return "the table process is starting"
        if not self.has_rows:
            return ""
        try:
            given = await asyncio.wait_for(self._gives_rows(), _ANSWER_SECONDS)
        except (RowsAway, TimeoutError):
            return "the table process gives no rows"
        if not given and self.intake.has_windows:  # before the first round there is nobody who should have any
            return "the table process gives no rows yet: it is on the way to the round that is open"
        return ""

    async def _gives_rows(self) -> bool:
        """Ask for rows of nothing: a refusal says that there are some, and to be sent away that there are none yet."""
        async for chunk in self.intake.rows(b""):
            return pb.RowsChunk.FromString(chunk).WhichOneof("outcome") != "come_back"
        return False
