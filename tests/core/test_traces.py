"""Traces: what a visit takes by hand, who is there when, and devices drawn as the published figures say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.traces import COLUMNS, HOUR, DeviceSettings, Load, Traces, generated, read_traces


def devices(*rows: tuple[float, ...]) -> Traces:
    return Traces(*(np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)))


# latency, step, downlink, uplink, dropout, from, hours
TWO = devices((1.0, 0.5, 1_000.0, 100.0, 0.0, 8.0, 2.0), (0.0, 2.0, 10.0, 20.0, 1.0, 23.0, 3.0))


def test_a_visit_takes_the_sum_of_its_parts() -> None:
    load = Load(np.array([2_000.0, 30.0, 30.0]), np.array([4.0, 1.0, 0.0]), np.array([300.0, 60.0, 0.0]))
    assert TWO.durations(np.array([0, 1, 3]), load).tolist() == [1 + 2 + 2 + 3, 0 + 3 + 2 + 3, 3.0]


@pytest.mark.parametrize(
    ("hour", "there"), [(7.9, (0, 0)), (8.0, (1, 0)), (10.0, (0, 0)), (23.0, (0, 1)), (24 + 1.9, (0, 1)), (2.0, (0, 0))]
)
def test_a_device_is_there_in_its_hours_also_beyond_midnight(hour: float, there: tuple[int, int]) -> None:
    assert TWO.there(2, hour * HOUR).tolist() == [bool(each) for each in there]
    assert TWO.there(5, hour * HOUR).tolist() == [bool(there[client % 2]) for client in range(5)]


def test_always_is_24_hours() -> None:
    always = devices((0, 0, 1, 1, 0, 17.0, 24.0))
    assert all(always.there(1, hour * HOUR)[0] for hour in np.arange(0, 48, 0.5))


def test_who_vanishes_does_so_in_the_middle_of_a_visit() -> None:
    clients = np.arange(1_000, dtype=np.int64)
    share = TWO.vanish(1, clients, Draws(1))
    assert np.all(np.isinf(share[::2]))
    assert np.all((share[1::2] >= 0) & (share[1::2] < 1))
    assert not np.array_equal(share, TWO.vanish(2, clients, Draws(1)))
    assert_same_bits(share[7:9], TWO.vanish(1, clients[7:9], Draws(1)))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    made = generated(DeviceSettings(), 50, Draws(3))
    made.write(tmp_path / "traces.csv")
    assert_same_bits(read_traces(tmp_path / "traces.csv"), made)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "must begin with the line latency_seconds,"),
        (",".join(COLUMNS) + "\n", "holds no device"),
        (",".join(COLUMNS) + "\n1,1,1,1,0,0,x\n", "could not convert"),
        (",".join(COLUMNS) + "\n1,1,1,1,0,0\n", "cannot be read"),
        (",".join(COLUMNS) + "\n1,1,0,1,0,0,24\n", "downlink of device 0 is 0, and must be above 0"),
        (",".join(COLUMNS) + "\n1,1,1,1,0,24,24\n", "from_hour of device 0 is 24, and must be from 0 to below 24"),
        (",".join(COLUMNS) + "\nnan,1,1,1,0,0,24\n", "latency_seconds of device 0 is nan"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_path(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as error:
        read_traces(tmp_path / "bad.csv")
    assert "bad.csv" in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read"):
        read_traces(Path("nowhere.csv"))


def test_generated_devices_are_spread_as_the_figures_say() -> None:
    made = generated(DeviceSettings(), 100_000, Draws(5))
    assert np.median(made.step_seconds) == pytest.approx(0.43, rel=0.02)
    assert np.std(np.log(made.step_seconds)) == pytest.approx(0.6, rel=0.02)
    megabits = made.downlink * 8 / 1e6
    assert np.median(megabits) == pytest.approx(6.1, rel=0.02)
    assert np.mean(megabits < 3) == pytest.approx(0.26, abs=0.01)
    share = [float(np.mean(made.there(100_000, hour * HOUR))) for hour in np.arange(0, 24, 0.25)]
    assert max(share) / min(share) == pytest.approx(4.0, rel=0.1)
    assert np.mean(share) == pytest.approx(8 / 24, rel=0.02)


def test_a_device_depends_on_its_number_alone() -> None:
    few, many = generated(DeviceSettings(), 10, Draws(5)), generated(DeviceSettings(), 1_000, Draws(5))
    for name in COLUMNS:
        assert_same_bits(getattr(few, name), getattr(many, name)[:10])


def test_a_swing_that_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"swing = 4 cannot be reached .* 20 hours"):
        DeviceSettings(hours=20.0)
    assert DeviceSettings(hours=24.0).hours == 24.0
    with pytest.raises(RecipeError, match="dropout"):
        DeviceSettings(dropout=1.0)
