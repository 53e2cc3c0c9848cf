"""An adaptive deadline: as long as past rounds needed, and some slack.

Bonawitz et al., 2019, https://arxiv.org/abs/1902.01046, section 9, tune the length of rounds and the number of devices
by the distribution of the times at which devices report; Oort's pacer (Lai et al., 2021,
https://www.usenix.org/conference/osdi21/presentation/lai) goes by a percentile of how long clients take. Here a
round *needs* the time until so many have reported as count, and the deadline is a quantile of that over the last
rounds. Whoever has not reported when a round ends comes later than that, or never: a round in which too few came is
known to need more than it had, and is taken to need ``growth`` times as much. So a deadline that was too short grows,
and one that was too long shrinks as soon as ``window`` rounds have said so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fedtower.core.deadline import Arrivals, State
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@dataclass(frozen=True)
class Adaptive:
    """The ``quantile`` of what the last ``window`` rounds needed, times ``slack``, from ``least`` to ``most`` seconds.

    A round needs the time until ``share`` of those asked have reported, or its target if that is fewer.
    """

    first: float = field(default=600.0, metadata={"help": "seconds for a round before anything was seen"})
    # 6 % to 10 % of devices drop out (Bonawitz et al.): a share that leaves no room for them is met by luck only.
    share: float = field(default=0.8, metadata={"help": "of those asked, how many are to be in time; or the target"})
    quantile: float = field(default=0.9, metadata={"help": "share of past rounds that it would have been enough for"})
    window: int = field(default=10, metadata={"help": "rounds that are looked back on"})
    slack: float = field(default=1.25, metadata={"help": "times that quantile, so that slower rounds are seen"})
    growth: float = field(default=2.0, metadata={"help": "a round with too few updates needs so many times its length"})
    tolerance: float = field(default=0.1, metadata={"help": "a change by less than this share is left"})
    least: float = field(default=1.0, metadata={"help": "never fewer seconds"})
    most: float = field(default=3_600.0, metadata={"help": "never more seconds"})

    def __post_init__(self) -> None:
        for name in ("share", "quantile"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"deadline.{name} must be above 0 and at most 1, not {getattr(self, name)}")
        for name, least in (("slack", 1.0), ("growth", 1.0), ("window", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"deadline.{name} must be at least {least}, not {getattr(self, name)}")
        if self.growth == 1:
            raise RecipeError("deadline.growth must be above 1: a deadline that was too short could never grow")
        if not 0 <= self.tolerance < 1:
            raise RecipeError(f"deadline.tolerance must be from 0 to below 1, not {self.tolerance}")
        if not 0 < self.least <= self.first <= self.most:
            raise RecipeError(
                f"deadline.least, first and most must be above 0 and in that order; they are {self.least:g}, "
                f"{self.first:g} and {self.most:g}"
            )

    def init(self) -> State:
        """No round was seen: ``seconds`` (), and what each of the last rounds ``needed`` (n,), ``met`` (n,) or not."""
        return {"seconds": np.array(self.first), "needed": np.zeros(0), "met": np.zeros(0, dtype=bool)}

    def limit(self, state: State) -> float:
        return float(state["seconds"])

    def learn(self, state: State, arrivals: Arrivals) -> tuple[State, str]:
        enough = min(arrivals.target, math.ceil(self.share * arrivals.asked))
        if not enough or len(arrivals.seconds) + arrivals.unknown >= enough > len(arrivals.seconds):
            return state, ""  # nobody was asked, or enough came and when is not known
        when = arrivals.when(enough)
        met = math.isfinite(when)
        needed = np.append(state["needed"], when if met else self.growth * arrivals.ended)[-self.window :]
        seen = {**state, "needed": needed, "met": np.append(state["met"], met)[-self.window :]}
        within = float(np.quantile(needed, self.quantile, method="higher"))
        seconds, before = min(max(self.slack * within, self.least), self.most), self.limit(state)
        if abs(seconds - before) <= self.tolerance * before:
            return seen, ""
        return {**seen, "seconds": np.array(seconds)}, self._why(before, seconds, within, seen)

    def _why(self, before: float, seconds: float, within: float, seen: State) -> str:
        rounds, missed = len(seen["met"]), int(np.count_nonzero(~seen["met"]))
        short = (
            f", of which {missed} did not get as many and are taken as {self.growth:g} times as long" if missed else ""
        )
        share = f"{self.quantile:.0%} of the last {rounds} rounds" if rounds > 1 else "the only round so far"
        return f"deadline {before:.3g} s → {seconds:.3g} s: {share} had enough updates within {within:.3g} s{short}"


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.deadline(
        "adaptive",
        "fedtower.plugins.deadlines.adaptive:Adaptive",
        summary="as long as past rounds needed, and some slack",
    )
