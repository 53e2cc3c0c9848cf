"""Traces: how fast devices are, when they are there, and how often a visit comes to nothing: what virtual time is of.

A file of traces is CSV: a line of the names below, and a line of numbers a device. It may come from measurements of
one's own; without any, :func:`generated` draws devices after published figures.

======================  ===============================================================================================
``latency_seconds``     what a visit takes beside bytes and steps: connecting, starting, waiting
``step_seconds``        one training step
``downlink``            bytes a second to the device
``uplink``              bytes a second from it
``dropout``             probability that a visit comes to nothing
``from_hour``           hour of the day, from 0 to below 24, at which the device comes to be there
``hours``               for how long, up to 24: always
======================  ===============================================================================================
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

HOUR = 3_600.0


@dataclass(frozen=True, eq=False)
class Load:
    """What a visit asks of C devices: bytes to each, its training steps, and bytes from it, all (C,)."""

    bytes_down: FloatArray
    steps: FloatArray
    bytes_up: FloatArray


@dataclass(frozen=True, eq=False)
class Traces:
    """N devices; client c has device c modulo N. Every field is (N,), as the table above says.

    Raises:
        DataError: a column that is not as long as the others, or a number out of its range.
    """

    latency_seconds: FloatArray
    step_seconds: FloatArray
    downlink: FloatArray
    uplink: FloatArray
    dropout: FloatArray
    from_hour: FloatArray
    hours: FloatArray

    def __post_init__(self) -> None:
        for name in COLUMNS:
            values = getattr(self, name)
            if values.shape != self.hours.shape or not len(values):
                raise DataError(f"traces need one number a device, but {name} has the shape {values.shape}")
            wrong = np.flatnonzero(~_in_range(name, values))
            if len(wrong):
                raise DataError(
                    f"{name} of device {wrong[0]} is {values[wrong[0]]:g}, and must be {_RANGES[name][2]}; "
                    f"{len(wrong)} of {len(values)} devices are so"
                )

    def __len__(self) -> int:
        return len(self.hours)

    def durations(self, clients: IntArray, load: Load) -> FloatArray:
        """How many seconds a visit of each client takes, (C,): latency + bytes down / downlink + steps x seconds a step
        + bytes up / uplink.

        >>> traces = Traces(*(np.array([value]) for value in (1.0, 0.5, 1_000.0, 100.0, 0.0, 0.0, 24.0)))
        >>> traces.durations(np.array([7]), Load(*(np.array([value]) for value in (2_000.0, 4.0, 300.0))))
        array([8.])
        """
        device = clients % len(self)
        seconds: FloatArray = (
            self.latency_seconds[device]
            + load.bytes_down / self.downlink[device]
            + load.steps * self.step_seconds[device]
            + load.bytes_up / self.uplink[device]
        )
        return seconds

    def there(self, population: int, now: float) -> BoolArray:
        """Which of the clients 0 .. ``population`` - 1 are there at ``now``, in seconds since some midnight,
        (population,).
        """
        hour = now / HOUR % 24.0
        end = self.from_hour + self.hours
        # Those whose hours go beyond midnight are also there before the end of them, a day earlier.
        there = ((self.from_hour <= hour) & (hour < end)) | (hour < end - 24.0)
        return np.resize(there, population) if population != len(self) else there

    def vanish(self, visit: int, clients: IntArray, draws: Draws) -> FloatArray:
        """The share of its visit after which each client vanishes, (C,), uniform; infinity for those who stay.

        ``visit`` is the round, or what else tells one visit of a client from another.
        """
        gone = draws.uniform("vanish", visit, clients) < self.dropout[clients % len(self)]
        return np.where(gone, draws.uniform("vanish/when", visit, clients), np.inf)

    def write(self, path: Path) -> None:
        """Write the traces as a file that :func:`read_traces` reads."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(np.stack([getattr(self, name) for name in COLUMNS], axis=1).tolist())


COLUMNS = tuple(each.name for each in fields(Traces))
"""The names of a file's columns, in order."""

_RANGES = {
    "latency_seconds": (0.0, np.inf, "0 or more"),
    "step_seconds": (0.0, np.inf, "0 or more"),
    "downlink": (np.finfo(np.float64).tiny, np.inf, "above 0"),
    "uplink": (np.finfo(np.float64).tiny, np.inf, "above 0"),
    "dropout": (0.0, 1.0, "from 0 to 1"),
    "from_hour": (0.0, np.nextafter(24.0, 0.0), "from 0 to below 24"),
    "hours": (0.0, 24.0, "from 0 to 24"),
}


def _in_range(name: str, values: FloatArray) -> BoolArray:
    least, most, _ = _RANGES[name]
    return np.asarray(np.isfinite(values) & (values >= least) & (values <= most))


def read_traces(path: Path) -> Traces:
    """The traces in a file.

    Raises:
        DataError: it cannot be read, or holds other columns, or what is no number or out of range.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header = tuple(next(csv.reader(file), ()))
            if header != COLUMNS:
                raise DataError(f"{path} must begin with the line {','.join(COLUMNS)}, but begins with {header}")
            lines = file.readlines()
        if not lines:
            raise DataError("it holds no device")
        table = np.loadtxt(lines, delimiter=",", ndmin=2, dtype=np.float64)
        return Traces(*(table.reshape(-1, len(COLUMNS)).T))
    except (OSError, ValueError) as error:
        raise DataError(f"the traces {path} cannot be read: {error}") from error
    except DataError as error:
        raise DataError(f"the traces {path} cannot be used: {error}") from error


@dataclass(frozen=True)
class DeviceSettings:
    """The distributions that :func:`generated` draws devices from, with where the defaults are from.

    Seconds a step are log-normal, as FedScale (Lai et al., 2022, https://arxiv.org/abs/2105.11367) draws them in
    ``get_completion_time_lognormal``: exp(N(1, 0.6)) times 5 ms an example, which is a median of 0.43 s for 32
    examples. Bandwidths are log-normal with a median of 6.1 Mbit/s, of which 26 % are below 3 Mbit/s: that is how
    readers of FedScale's device file, made of MobiPerf's measurements, quote it (the file itself was not at hand);
    like there, one bandwidth holds both ways. 6 % to 10 % of devices drop out, and over a day the number of those that
    take part goes up and down by a factor of four (Bonawitz et al., 2019, https://arxiv.org/abs/1902.01046, section 9).
    The latency, and eight hours a day, are choices.
    """

    latency_seconds: float = field(default=1.0, metadata={"help": "what a visit takes beside bytes and steps"})
    step_seconds: float = field(default=0.43, metadata={"help": "one training step, the median device"})
    step_spread: float = field(default=0.6, metadata={"help": "standard deviation of the logarithm of that"})
    bandwidth: float = field(default=762_500.0, metadata={"help": "bytes a second, the median device"})
    bandwidth_spread: float = field(default=1.1, metadata={"help": "standard deviation of the logarithm of that"})
    dropout: float = field(default=0.08, metadata={"help": "probability that a visit comes to nothing"})
    hours: float = field(default=8.0, metadata={"help": "how long a device is there each day; 24: always"})
    swing: float = field(default=4.0, metadata={"help": "the most that are there in a day, over the fewest"})

    def __post_init__(self) -> None:
        for name in ("latency_seconds", "step_seconds", "step_spread", "bandwidth_spread"):
            if getattr(self, name) < 0:
                raise RecipeError(f"devices.{name} must be 0 or more, not {getattr(self, name)}")
        if self.bandwidth <= 0 or not 0 <= self.dropout < 1 or not 0 < self.hours <= 24:
            raise RecipeError(
                f"devices.bandwidth must be above 0, dropout from 0 to below 1 and hours above 0 and at most 24; they "
                f"are {self.bandwidth:g}, {self.dropout:g} and {self.hours:g}"
            )
        if self.hours < 24 and not 0 <= self.tilt <= 1:
            raise RecipeError(
                f"devices.swing = {self.swing:g} cannot be reached by devices that are there for {self.hours:g} hours "
                f"a day; it must be from 1 to {self.most_swing:.3g}, or the hours fewer"
            )

    @property
    def tilt(self) -> float:
        """How much likelier than on average a device comes at the busiest hour.

        Where arrivals have the density (1 + tilt cos(2 pi t / 24)) / 24, those that are there go up and down by tilt
        times sin(x) / x, x = pi hours / 24.
        """
        return (self.swing - 1) / (self.swing + 1) / self._smoothing

    @property
    def most_swing(self) -> float:
        """The largest swing that devices with these hours can have."""
        return (1 + self._smoothing) / (1 - self._smoothing)

    @property
    def _smoothing(self) -> float:
        return float(np.sinc(self.hours / 24))


def generated(settings: DeviceSettings, devices: int, draws: Draws) -> Traces:
    """Devices drawn from the distributions of ``settings``; each depends on its number and the draws alone."""
    each = np.arange(devices, dtype=np.int64)
    speed = np.exp(settings.step_spread * draws.normal("device/step", each))
    bandwidth = settings.bandwidth * np.exp(settings.bandwidth_spread * draws.normal("device/bandwidth", each))
    return Traces(
        latency_seconds=np.full(devices, settings.latency_seconds),
        step_seconds=settings.step_seconds * speed,
        downlink=bandwidth,
        uplink=bandwidth,
        dropout=np.full(devices, settings.dropout),
        from_hour=_from_hour(settings, draws.uniform("device/hour", each)),
        hours=np.full(devices, settings.hours),
    )


def _from_hour(settings: DeviceSettings, u: FloatArray) -> FloatArray:
    """Hours of coming, by the inverse of their distribution function, which is tabled: a quarter of a minute apart."""
    if settings.hours == 24:
        return np.zeros(len(u))
    grid = np.linspace(0.0, 24.0, 24 * 240 + 1)
    below = grid / 24.0 + settings.tilt / (2 * np.pi) * np.sin(2 * np.pi * grid / 24.0)
    return np.minimum(np.interp(u, below, grid), np.nextafter(24.0, 0.0))
