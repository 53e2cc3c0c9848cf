"""Goal: the validation figures at which a run has what it was for, and ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtower.core.errors import RecipeError, nearest
from fedtower.core.hooks import hookimpl
from fedtower.core.round import RoundReport
from fedtower.recsys.evaluation import Evaluation


@dataclass
class Goal:
    """Ends a run after the first look that finds every metric of ``until`` at least so good (a loss: at most).

    A run that has ended so and is resumed goes on to its next look.
    """

    until: Mapping[str, float]
    _seen: Mapping[str, float] | None = field(default=None, init=False)

    @hookimpl
    def evaluated(self, round: int, subject: str, evaluation: Evaluation) -> None:
        """Note what the model reached on the validation data."""
        if subject == "model" and evaluation.role == "validation":
            self._seen = evaluation.metrics

    @hookimpl
    def stop_run(self, report: RoundReport) -> str | None:
        """Whether that is enough; a look counts once.

        Raises:
            RecipeError: no look can find what it waits for.
        """
        seen, self._seen = self._seen, None
        if seen is None or not all(self._is_reached(name, seen) for name in self.until):
            return None
        return f"evaluation.until is reached: {', '.join(f'{name} {seen[name]:.4g}' for name in self.until)}"

    def _is_reached(self, name: str, seen: Mapping[str, float]) -> bool:
        if name not in seen:
            raise RecipeError(
                f"evaluation.until waits for {name!r}{nearest(name, list(seen))}, and a look at the validation data "
                f"finds {', '.join(seen)}; name one of those"
            )
        return seen[name] <= self.until[name] if name.endswith("loss") else seen[name] >= self.until[name]
