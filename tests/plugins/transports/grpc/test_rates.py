"""A device calls as often as it may, and not more often."""

import asyncio
import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedtower.core.errors import RecipeError
from fedtower.core.recipe import parse_recipe
from fedtower.core.registry import discover
from fedtower.core.settings import build
from fedtower.plugins.transports.grpc.rates import Bucket, Rates, RateSettings
from fedtower.plugins.transports.grpc.refusals import Reason, Refused
from fedtower.plugins.transports.grpc.transport import Grpc
from fedtower.recsys.opening import as_deployed
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.serving import Door, intake_config
from tests.plugins.transports.grpc.standing import Standing, standing


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.floats(0.1, 100), st.floats(1, 100), st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 20)), max_size=40))
def test_what_is_taken_is_never_more_than_the_burst_and_what_came_since(
    rate: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now, taken = Bucket(rate, burst, 0.0), 0.0, 0.0
    for pause, amount in steps:
        now += pause
        if not bucket.take(amount, now):
            taken += amount
    assert taken <= (burst + rate * now) * (1 + 1e-9)


@given(st.floats(0.1, 100), st.floats(1, 100), st.floats(0.1, 1))
def test_who_comes_back_when_told_is_let_in(rate: float, burst: float, share: float) -> None:
    bucket, now = Bucket(rate, burst, 0.0), 0.0
    assert bucket.take(burst, now) == 0.0
    wait = bucket.take(share * burst, now)
    assert 0 < wait <= burst / rate * (1 + 1e-9)
    assert bucket.take(share * burst, now + wait * (1 + 1e-9) + 1e-9) == 0.0


def test_one_that_calls_too_often_is_refused_and_others_are_not() -> None:
    clock = Clock()
    rates = Rates(RateSettings(calls_per_second=2.0, calls_burst=3.0), clock)
    for _ in range(3):
        rates.call("one")
    with pytest.raises(Refused, match=r"one sends more calls than one may; come back in 0\.5 s") as caught:
        rates.call("one")
    assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.RATE, 0.5)
    rates.call("other")
    clock.now += 0.5
    rates.call("one")


def test_bytes_are_counted_apart_from_calls() -> None:
    rates = Rates(RateSettings(bytes_per_second=10.0, bytes_burst=100.0), Clock())
    rates.sent("one", 100)
    rates.call("one")
    with pytest.raises(Refused, match="more bytes"):
        rates.sent("one", 1)


def test_memory_does_not_grow_with_those_who_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtower.plugins.transports.grpc.rates._MOST_KEPT", 10)
    rates = Rates(RateSettings(calls_per_second=1e-9, calls_burst=2.0), Clock())
    rates.call("one")
    for caller in range(9):
        rates.call(str(caller))
    rates.call("one")  # heard of again: it is kept before others
    for caller in range(5):
        rates.call(f"new {caller}")
    with pytest.raises(Refused):
        rates.call("one")
    assert len(rates._buckets) == 10


def test_more_than_a_burst_is_never_let_in() -> None:
    rates = Rates(RateSettings(bytes_burst=100.0), Clock())
    with pytest.raises(Refused, match="than one ever may") as caught:
        rates.sent("one", 101)
    assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.TOO_LARGE, 0.0)
    rates.sent("one", 100)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_is_above_nothing(value: float) -> None:
    with pytest.raises(RecipeError, match="calls_per_second must be above 0"):
        RateSettings(calls_per_second=value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rates.calls_burst=0.5", "calls_burst must be at least 1"),
        ("rates.calls_per_second=0", "calls_per_second must be above 0"),
        ("rates.bytes_burst=1000", "bytes_burst must be at least 294,912, the bytes of one message, not 1,000"),
        ("rates.calls_a_second=3", "rates.calls_a_second is not a setting"),
    ],
)
def test_rates_that_would_let_nobody_in_are_refused_in_a_recipe(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        as_deployed("dssm-synthetic", [f"transport.{setting}"], discover())


def test_the_rates_of_a_recipe_are_those_of_its_server(tmp_path: Path) -> None:
    registry = discover()
    recipe = as_deployed("dssm-synthetic", ["transport.rates.calls_per_second=0.001"], registry)
    again = parse_recipe(tomllib.loads(tomli_w.dumps(recipe.to_dict())))
    (tmp_path / "federation.json").write_text(json.dumps({"name": "f", "run": "1", "keys": str(tmp_path)}))
    told = intake_config(RunFolder(tmp_path), again, Door())["transport"]
    assert build(Grpc, told, path="transport").rates == RateSettings(calls_per_second=0.001)

    async def scenario(at: Standing) -> None:
        async with at.peer(0) as one, at.peer(1) as other:
            answers = [await one.check_in() for _ in range(4)]
            assert [answer.outcome for answer in answers] == ["come_back"] * 3 + ["refusal"]
            refusal = answers[3].refusal
            assert refusal is not None
            assert (refusal.reason, refusal.retry_after_seconds > 100) == (Reason.RATE, True)
            assert (await other.check_in()).outcome == "come_back"

    few = {**told["rates"], "calls_burst": 3}
    (tmp_path / "at").mkdir()
    with standing(tmp_path / "at", 2, transport={"rates": few}) as at:
        asyncio.run(scenario(at))


def test_one_that_is_refused_again_and_again_is_told_when_to_come_back_and_others_are_not() -> None:
    clock = Clock()
    rates = Rates(RateSettings(refusals_per_second=1.0, refusals_burst=2.0), clock)
    assert [rates.refused("one") for _ in range(4)] == [(0.0, 0), (0.0, 0), (1.0, 0), (1.0, 0)]
    assert rates.refused("other") == (0.0, 0)
    clock.now += 1.0
    assert rates.refused("one") == (0.0, 2)  # two went unsaid before it
    assert rates.refused("one") == (1.0, 0)


def test_the_table_of_the_refused_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtower.plugins.transports.grpc.rates._MOST_KEPT", 10)
    rates = Rates(RateSettings(), Clock())
    for caller in range(100):
        rates.refused(str(caller))
    assert len(rates._refusals) == 10


def test_a_device_has_so_many_calls_at_once_and_no_more() -> None:
    rates = Rates(RateSettings(calls_at_once=2), Clock())
    with rates.running("one"), rates.running("other"):
        refused = pytest.raises(Refused, match="2 calls of one are being answered")
        with rates.running("one"), refused as caught, rates.running("one"):
            raise AssertionError("it was let in")
        assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.RATE, 1.0)
        with rates.running("one"):
            pass
    assert not rates._running
