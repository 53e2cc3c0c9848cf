"""Meters: what an intake counts, for Prometheus and for the status page."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedtower.core.journal import RoundRecord, Task
from fedtower.plugins.transports.grpc.refusals import Reason
from fedtower.plugins.transports.grpc.seats import Counted


class Meters:
    """Counters of one process; ``registry`` is what a scrape reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        self._leases = Counter("fedtower_leases", "Leases given out", ["task"], registry=of)
        self._uploads = Counter("fedtower_uploads", "Updates acknowledged", ["task", "duplicate"], registry=of)
        self._refusals = Counter("fedtower_refusals", "Calls and updates refused", ["reason"], registry=of)
        self._received = Counter("fedtower_received_bytes", "Bytes of updates that came in whole", registry=of)
        self._sent = Counter("fedtower_sent_bytes", "Bytes of artefacts and rows sent", registry=of)
        self._calls = Histogram("fedtower_call_seconds", "Seconds until a call was answered", ["call"], registry=of)
        self._of_call: dict[str, Histogram] = {}
        self._round = Gauge("fedtower_round", "The newest round", ["task"], registry=of)
        self._accepted = Gauge("fedtower_round_updates", "Updates accepted in the newest round", ["task"], registry=of)

    def counted(self) -> Counted:
        """What was counted so far, for whoever goes on counting."""
        counters = (family for family in self.registry.collect() if family.type == "counter")
        return {
            family.name: [(dict(each.labels), each.value) for each in family.samples if each.name.endswith("_total")]
            for family in counters
        }

    def go_on(self, counted: Counted) -> None:
        """Count from where another has left off: what is scraped does not begin again after a kill."""
        known = {"leases": self._leases, "uploads": self._uploads, "refusals": self._refusals}
        known |= {"received_bytes": self._received, "sent_bytes": self._sent}
        for name, counter in known.items():
            for labels, value in counted.get(f"fedtower_{name}", ()):
                (counter.labels(**labels) if labels else counter).inc(value)

    def leased(self, task: Task) -> None:
        """A lease was given out."""
        self._leases.labels(task).inc()

    def acknowledged(self, task: Task, *, duplicate: bool) -> None:
        """An update is durable."""
        self._uploads.labels(task, str(duplicate).lower()).inc()

    def refused(self, reason: Reason) -> None:
        """Something was refused."""
        self._refusals.labels(reason.name.lower()).inc()

    def received(self, count: int) -> None:
        """Bytes came."""
        self._received.inc(count)

    def sent(self, count: int) -> None:
        """Bytes went."""
        self._sent.inc(count)

    def answered(self, call: str, seconds: float) -> None:
        """A call was answered."""
        if call not in self._of_call:
            self._of_call[call] = self._calls.labels(call)
        self._of_call[call].observe(seconds)

    def windows(self, records: Sequence[RoundRecord]) -> None:
        """How far the rounds are."""
        for record in records:
            self._round.labels(record.task).set(record.round)
            self._accepted.labels(record.task).set(record.accepted)
