"""Rates: how often, how much at once, and with how many bytes, one device may call; and how often it is refused."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedtower.core.errors import RecipeError
from fedtower.plugins.transports.grpc.refusals import Reason, Refused

_MOST_KEPT = 100_000


@dataclass(frozen=True)
class RateSettings:
    """Token buckets: each fills at so much a second up to its burst, and every call and byte takes from it."""

    # Of rounds of 50 ms, which a trial has, a device makes 100.
    calls_per_second: float = field(default=200.0, metadata={"help": "calls of one device"})
    calls_burst: float = field(default=500.0, metadata={"help": "calls of one device at once, after a pause"})
    bytes_per_second: float = field(default=32e6, metadata={"help": "bytes that one device sends"})
    bytes_burst: float = field(default=256e6, metadata={"help": "bytes that one device sends at once, after a pause"})
    calls_at_once: int = field(default=16, metadata={"help": "calls of one device that are answered at the same time"})
    refusals_per_second: float = field(
        default=1.0, metadata={"help": "calls of one address without good credentials; and lines of the log about one"}
    )
    refusals_burst: float = field(default=100.0, metadata={"help": "such calls at once, after a pause"})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise RecipeError(f"{name} must be above 0, not {value}")
        for name in ("calls_burst", "refusals_burst"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)}: no call would ever be let in")


class Bucket:
    """Holds up to ``burst``; fills by ``rate`` a second."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst, self._held, self._at = rate, burst, burst, now

    def take(self, amount: float, now: float) -> float:
        """0 when there was enough, which is taken; else the seconds until there will be (infinite for more than the
        burst), and nothing is taken.

        >>> bucket = Bucket(rate=2.0, burst=3.0, now=0.0)
        >>> [bucket.take(1.0, 0.0) for _ in range(4)], bucket.take(1.0, 0.5)
        ([0.0, 0.0, 0.0, 0.5], 0.0)
        """
        self._held = min(self._burst, self._held + self._rate * (now - self._at))
        self._at = now
        if amount > self._burst:
            return math.inf
        if amount > self._held:
            return (amount - self._held) / self._rate
        self._held -= amount
        return 0.0


class Rates:
    """The buckets of all who call; those who were not heard of for longest are forgotten, and begin anew."""

    def __init__(self, settings: RateSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._buckets: OrderedDict[str, tuple[Bucket, Bucket]] = OrderedDict()
        self._refusals: OrderedDict[str, tuple[Bucket, int]] = OrderedDict()
        self._running: Counter[str] = Counter()

    def call(self, who: str) -> None:
        """Count a call. Raises Refused (``RATE``), with when to come back."""
        self._take(who, 0, 1, "calls")

    def sent(self, who: str, size: int) -> None:
        """Count bytes. Raises Refused (``RATE``), with when to come back."""
        self._take(who, 1, size, "bytes")

    @contextmanager
    def running(self, who: str) -> Iterator[None]:
        """A call that is being answered meanwhile. Raises Refused (``RATE``) for one too many."""
        if self._running[who] >= self._settings.calls_at_once:
            raise Refused(
                Reason.RATE,
                f"{self._running[who]} calls of {who} are being answered, and one has no more at once; come back when "
                f"they have ended",
                retry_after_seconds=1.0,
            )
        self._running[who] += 1
        try:
            yield
        finally:
            self._running[who] -= 1
            if not self._running[who]:
                del self._running[who]

    def refused(self, who: str) -> tuple[float, int]:
        """Count a refusal: 0 seconds while there are few, and how many before it were one too many; or, for such a
        one, the seconds until there are few again.
        """
        now, most = self._clock(), (self._settings.refusals_per_second, self._settings.refusals_burst)
        bucket, silent = self._refusals.pop(who, (Bucket(*most, now), 0))
        wait = bucket.take(1, now)
        self._refusals[who] = (bucket, silent + 1 if wait else 0)
        if len(self._refusals) > _MOST_KEPT:
            self._refusals.popitem(last=False)
        return (wait, 0) if wait else (0.0, silent)

    def _take(self, who: str, which: int, amount: float, what: str) -> None:
        now = self._clock()
        wait = self._of(who, now)[which].take(amount, now)
        if wait == math.inf:
            raise Refused(Reason.TOO_LARGE, f"{who} sent more {what} at once ({amount:,}) than one ever may")
        if wait:
            raise Refused(
                Reason.RATE,
                f"{who} sends more {what} than one may; come back in {wait:.1f} s",
                retry_after_seconds=wait,
            )

    def _of(self, who: str, now: float) -> tuple[Bucket, Bucket]:
        if who not in self._buckets:
            limits = self._settings
            self._buckets[who] = (
                Bucket(limits.calls_per_second, limits.calls_burst, now),
                Bucket(limits.bytes_per_second, limits.bytes_burst, now),
            )
            if len(self._buckets) > _MOST_KEPT:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(who)
        return self._buckets[who]
