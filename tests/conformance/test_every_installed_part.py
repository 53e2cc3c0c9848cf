"""Every part that is installed keeps the promises of its kind; how many there are is said first."""

from __future__ import annotations

from collections import Counter

from fedtower.core.registry import discover
from fedtower.core.testing.offered import promises_of

REGISTRY = discover()

HOW_MANY = {
    "aggregator": 8,
    "attack": 4,
    "command": 19,
    "dataset": 6,
    "deadline": 2,
    "download": 2,
    "exporter": 2,
    "journal": 2,
    "index": 2,
    "model": 7,
    "recipe": 10,
    "runtime": 4,
    "sampler": 3,
    "server_optimizer": 6,
    "signer": 1,
    "suite": 5,
    "tracker": 3,
    "transform": 8,
    "transport": 3,
}


def test_there_are_as_many_as_expected() -> None:
    assert Counter(offer.kind for offer in REGISTRY.offers() if offer.distribution == "fedtower") == HOW_MANY


def test_every_kind_has_a_part() -> None:
    assert {kind.name for kind in REGISTRY.kinds()} == set(HOW_MANY)


def test_no_plugin_of_ours_failed() -> None:
    ours = [plugin for plugin in REGISTRY.plugins() if plugin.distribution == "fedtower"]
    assert not [f"{plugin.name}: {plugin.reason}" for plugin in ours if plugin.status != "active"]


# One class for each offer, under a name of its own: that is what pytest collects.
for _offer in REGISTRY.offers():
    _class = promises_of(REGISTRY, _offer)
    globals()[_class.__name__] = _class
