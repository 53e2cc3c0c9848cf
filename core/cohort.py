"""Cohort: the clients of one round, and the seam that chooses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Cohort:
    """The clients of one round, sorted and distinct.

    So many updates as ``target`` are enough: where it is less than C, more were asked than are needed. ``None``: all.

    Shape:
        ``clients`` (C,), each in 0 .. population-1.
    """

    round: int
    clients: IntArray
    population: int
    target: int | None = None

    def __post_init__(self) -> None:
        if len(self.clients) and not (
            self.clients[0] >= 0 and self.clients[-1] < self.population and np.all(np.diff(self.clients) > 0)
        ):
            raise FedtowerError(
                f"the cohort of round {self.round} must be sorted, distinct clients from 0 to {self.population - 1}, "
                f"but it holds "
                f"{self.clients[:5].tolist()}...; what chose it (a sampler, or a plugin's select_clients) is at fault"
            )

    def __len__(self) -> int:
        return len(self.clients)

    def places(self, clients: IntArray) -> IntArray:
        """Where each of ``clients`` (n,) stands in the cohort, (n,); -1 for those who are not of it.

        >>> Cohort(1, np.array([2, 5, 9]), 10).places(np.array([9, 3, 2])).tolist()
        [2, -1, 0]
        """
        if not len(self):
            return np.full(len(clients), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.clients, clients), len(self) - 1)
        return np.where(self.clients[places] == clients, places, -1)


class Sampler(Protocol):
    """Chooses who takes part: the same draws give the same cohort."""

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        """The cohort of ``round`` out of clients 0 .. population-1."""
        ...


@runtime_checkable
class Informed(Protocol):
    """A sampler that has to know how many examples each client holds."""

    def knowing(self, examples: IntArray) -> Sampler:
        """What samples clients who hold so many ``examples`` (C,). Raises RecipeError where that cannot be."""
        ...


@runtime_checkable
class TellsApart(Protocol):
    """A sampler to which clients are not all alike."""

    def among(self, clients: IntArray) -> Sampler:
        """What samples these ``clients`` (n,) alone; they are numbered anew, from 0."""
        ...


def among(sampler: Sampler, clients: IntArray) -> Sampler:
    """What samples ``clients`` (n,) alone, those who are there: any sampler to which all are alike."""
    return sampler.among(clients) if isinstance(sampler, TellsApart) else sampler
