"""Attack: what some clients of a simulation do to the model of all the others, and who they are."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.client import ClientData
from fedtower.core.draws import Draws
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan
from fedtower.core.runtime import Work
from fedtower.core.updates import Updates
from fedtower.recsys.population import DataCard, Events, Population
from fedtower.recsys.public import PartOfPopulation

IntArray = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Market:
    """What attackers know of the catalogue: ``popular`` (I,), all items, most touched first; ``promoted``, the item
    that is to be shown to everybody; and draws of their own.
    """

    popular: IntArray
    promoted: int
    draws: Draws


class Attack:
    """What attackers do: each method is what an honest client does, and an attack overrides those in which it differs.

    What an attacker makes up depends on her own data and on the market, and not on who else is asked for.
    """

    def forged(self, events: Events, market: Market) -> IntArray:
        """The items (E,) that attackers say they touched, in the place of those of ``events``: as many, at the same
        times. Nobody's last two may be among her others: they may be held out.
        """
        return events.items

    def relabelled(self, work: Work, attackers: Mask) -> Work:
        """The batches of a block, of whose clients ``attackers`` (C,) is true of some: of the same shapes, and of the
        same rows.
        """
        return work

    def sent(self, updates: Updates, attackers: Mask) -> Updates:
        """What arrives of a block; the updates of the others stay as they are. Attackers see all of the block, which is
        the whole cohort where the attack's offer has the capability ``whole_cohort``: other recipes are refused then.
        """
        return updates


def overrides(attack: Attack, method: str) -> bool:
    """Whether an attack does something of its own there."""
    return getattr(type(attack), method) is not getattr(Attack, method)


@dataclass(frozen=True, eq=False)
class Siege:
    """An attack, and the clients (A,) who make it."""

    attackers: IntArray
    attack: Attack
    market: Market

    def honest(self, num_clients: int) -> IntArray:
        """The others."""
        return np.setdiff1d(np.arange(num_clients, dtype=np.int64), self.attackers)

    def among(self, clients: IntArray) -> Mask:
        """Who of ``clients`` (C,) is an attacker."""
        return np.isin(clients, self.attackers)

    def population(self, whole: Population) -> Population:
        """The population with the events that attackers make up."""
        if not overrides(self.attack, "forged"):
            return whole
        return Forged(whole, np.arange(whole.num_clients, dtype=np.int64), self)

    def data(self, honest: ClientData) -> ClientData:
        """The clients' data with the batches that attackers label otherwise."""
        return Relabelled(honest, self) if overrides(self.attack, "relabelled") else honest

    @hookimpl(wrapper=True)
    def client_train(self, plan: Plan, clients: IntArray) -> Generator[None, Any, Any]:
        """Around the training of a block: what attackers send comes in the place of what they trained."""
        updates, states = yield
        bad = self.among(clients)
        return (self.attack.sent(updates, bad) if bad.any() else updates), states


@dataclass(frozen=True, eq=False)
class Forged(PartOfPopulation):
    """A population in which the attackers' events are made up."""

    siege: Siege

    @property
    def card(self) -> DataCard:
        """The whole's: attackers do not say what they are."""
        return self.whole.card

    def events(self, clients: IntArray) -> Events:
        """All events of these clients."""
        events = super().events(clients)
        bad = self.siege.among(clients)
        items, theirs = np.array(events.items), bad[events.owners]
        if theirs.any():
            items[theirs] = self.siege.attack.forged(_of(events, bad), self.siege.market)
        return replace(events, items=items)


@dataclass(frozen=True, eq=False)
class Relabelled:
    """The clients' data, in which attackers label their batches otherwise."""

    honest: ClientData
    siege: Siege

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """The batches of one visit of each client."""
        work, bad = self.honest.work(plan, clients), self.siege.among(clients)
        return self.siege.attack.relabelled(work, bad) if bad.any() else work


def _of(events: Events, chosen: Mask) -> Events:
    """The events of the chosen clients (C,)."""
    kept = chosen[events.owners]
    offsets = np.concatenate([[0], np.cumsum(events.lengths[chosen])]).astype(np.int64)
    return Events(events.clients[chosen], offsets, events.items[kept], events.times[kept], events.ratings[kept])
