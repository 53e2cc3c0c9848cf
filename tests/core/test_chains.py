"""Chains are refused when a recipe is read, with the reason and something that works."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedtower.core.chains import objection, refuse_unfit
from fedtower.core.errors import RecipeError
from fedtower.core.recipe import check, parse_recipe
from fedtower.core.registry import discover
from fedtower.core.settings import Part
from fedtower.core.testing import examples

CLIP = "fedtower.plugins.transforms.clip:Clip"
FEDAVG = "fedtower.plugins.aggregators.fedavg:FedAvg"
SETTINGS: dict[str, dict[str, Any]] = {"clip": {"norm": 1.0}, "top_k": {"density": 0.1}, "sign": {"step": 0.1}}


def read(*transforms: str, aggregator: str = "fedavg") -> None:
    """Check a recipe with these parts; those of nobody's are offered here."""
    registry = discover()
    for name, capabilities in {
        "masks": {"needs_additive": True, "encodes": True},
        "noise": {"needs_bounded_norm": True},
        "halves": {"keeps_norm": True, "additive": True},
        "envelope": {"takes_bytes": True},
    }.items():
        registry.offer("transform", name, CLIP, capabilities=capabilities)
        SETTINGS[name] = {"norm": 1.0}
    registry.offer("aggregator", "middle", FEDAVG, capabilities={"needs_dense": True})
    named = [{"name": name, **SETTINGS.get(name, {})} for name in transforms]
    values = {**examples.recipe().to_dict(), "transforms": named, "aggregator": {"name": aggregator}}
    check(parse_recipe(values), registry)


@pytest.mark.parametrize(
    ("transforms", "aggregator"),
    [
        ((), "middle"),
        (("clip", "top_k"), "fedavg"),
        (("clip", "quantize"), "middle"),
        (("quantize", "envelope"), "fedavg"),
        (("clip", "halves", "noise"), "fedavg"),
        (("clip", "masks"), "fedavg"),
        (("clip", "dgc", "quantize", "envelope"), "fedavg"),
    ],
)
def test_what_fits_is_accepted(transforms: tuple[str, ...], aggregator: str) -> None:
    read(*transforms, aggregator=aggregator)


@pytest.mark.parametrize(
    ("transforms", "aggregator", "reason", "instead"),
    [
        (
            ("top_k", "clip"),
            "fedavg",
            "transforms.1 = 'clip' changes deltas, but 'top_k'",
            "order works.* 'clip', 'top_k'",
        ),
        (("dgc", "eden"), "fedavg", "'dgc' before it has made bytes", "Without 'eden' it works.*'dgc'"),
        (("quantize", "quantize"), "fedavg", "'quantize' before it has made bytes", "Without 'quantize' it works"),
        (("top_k", "envelope", "quantize"), "fedavg", "'quantize' changes deltas", "order works.*'quantize', 'env"),
        (("dgc", "quantize"), "middle", "'middle' takes every entry as said", "With aggregator.name = 'fedavg' it"),
        (("top_k",), "middle", "'middle' takes every entry as said", "With aggregator.name = 'fedavg' it works"),
        (("quantize", "masks"), "fedavg", "'masks' changes deltas", "Without 'masks' it works"),
        (("envelope", "masks"), "fedavg", "what 'envelope' sends cannot be added", "order works.* 'masks', 'envelope'"),
        (("noise",), "fedavg", "'training' before it bounds none", "With 'clip' before them it works.*'clip', 'noise'"),
        (
            ("clip", "envelope", "noise"),
            "fedavg",
            "'envelope' before it bounds none",
            "order works.*'clip', 'noise', 'env",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    transforms: tuple[str, ...], aggregator: str, reason: str, instead: str
) -> None:
    with pytest.raises(RecipeError, match=reason) as refused:
        read(*transforms, aggregator=aggregator)
    assert re.search(instead, str(refused.value)), refused.value


def test_variates_are_encoded_without_a_bias_or_not_at_all() -> None:
    registry, fedavg = discover(), Part("fedavg")
    refuse_unfit([Part("clip"), Part("quantize")], fedavg, registry, "scaffold")
    refuse_unfit([Part("sign")], fedavg, registry, "feddyn")
    with pytest.raises(RecipeError, match=r"'sign' does not keep it\. These do: eden, quantize; or set"):
        refuse_unfit([Part("clip"), Part("sign")], fedavg, registry, "scaffold")


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean"])
def test_a_rule_of_each_coordinate_is_not_given_what_was_left_out(aggregator: str) -> None:
    registry = discover()
    fold = registry.get("aggregator", aggregator)
    assert "leaves most of them out" in objection([registry.get("transform", "dgc")], fold)
    assert not objection([registry.get("transform", "quantize")], fold)


def test_every_installed_transform_fits_alone_with_fedavg_and_after_clip() -> None:
    registry = discover()
    fedavg, clip = registry.get("aggregator", "fedavg"), registry.get("transform", "clip")
    ours = [offer for offer in registry.offers("transform") if offer.distribution == "fedtower"]
    assert len(ours) > 5
    for offer in ours:
        assert not objection([offer], fedavg)
        assert not objection([clip, offer], fedavg)
