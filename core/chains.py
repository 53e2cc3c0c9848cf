"""Chains: whether a recipe's transforms can follow one another, and its aggregator them, by what their offers declare.

Capabilities of a transform, all false unless declared:

* ``encodes``: it sends bytes in place of deltas. What follows must declare ``takes_bytes``.
* ``sends_values``: the bytes are places and 32-bit values, as :mod:`fedtower.core.sparse` makes them; ``takes_values``:
  it encodes those values, and may follow such encoders and no others.
* ``sparse``: most of what is decoded of it is zero, because it was not sent and not because it was zero.
* ``additive``: what it sends may be added up as it is, without being decoded.
* ``bounded_norm``: what it sends is no longer than a bound; ``keeps_norm``: no longer than what it got.
* ``unbiased``: what is decoded is right on average over its draws. SCAFFOLD's variates may be encoded by no other.
* ``stateful``: clients keep something for it between visits.
* ``needs_dense``, ``needs_additive``, ``needs_bounded_norm``: it is of no use, or unsafe, after any without that.

An aggregator declares ``needs_dense`` or ``needs_bounded_norm`` likewise. A transform that declares nothing is taken
to read and send plain deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from fedtower.core.errors import RecipeError
from fedtower.core.offers import Offer
from fedtower.core.registry import Registry
from fedtower.core.settings import Part

_MOST_PERMUTED = 6  # 720 orders; nobody chains more


def refuse_unfit(transforms: Sequence[Part], aggregator: Part, registry: Registry, control: str = "none") -> None:
    """Raise RecipeError, with the reason and what would work, unless each of these can follow what is before it."""
    chain = [registry.get("transform", part.name) for part in transforms]
    fold = registry.get("aggregator", aggregator.name)
    reason = objection(chain, fold)
    if reason:
        raise RecipeError(f"{reason}. {_alternative(chain, fold, registry)}")
    biased = next((offer.name for offer in chain if _is(offer, "encodes") and not _is(offer, "unbiased")), None)
    if control == "scaffold" and biased:
        others = [offer.name for offer in registry.offers("transform") if _is(offer, "unbiased")]
        raise RecipeError(
            f"local.control = 'scaffold' sends variates beside the deltas, whose mean must stay the clients', and "
            f"{biased!r} does not keep it. These do: {', '.join(others)}; or set local.control = 'none'"
        )


def objection(chain: Sequence[Offer], aggregator: Offer) -> str:
    """Why this chain and this aggregator do not fit; nothing if they do."""
    for place, offer in enumerate(chain):
        reason = _objection_to(offer, chain[:place], f"transforms.{place} = {offer.name!r}")
        if reason:
            return reason
    return _objection_to(aggregator, chain, f"the aggregator {aggregator.name!r}")


def _objection_to(offer: Offer, before: Sequence[Offer], who: str) -> str:
    """Why ``offer`` cannot follow these."""
    encoder = next((each for each in before if _is(each, "encodes")), None)
    if encoder and offer.kind == "transform" and not _is(offer, "takes_bytes") and not _takes_values(offer, before):
        return f"{who} changes deltas, but {encoder.name!r} before it has made bytes of them"
    sparse = next((each for each in before if _is(each, "sparse")), None)
    if sparse and _is(offer, "needs_dense"):
        return f"{who} takes every entry as said, but {sparse.name!r} leaves most of them out, and a zero says nothing"
    mixed = next((each for each in before if not _is(each, "additive")), None)
    if mixed and _is(offer, "needs_additive"):
        return f"{who} adds updates up as they are sent, but what {mixed.name!r} sends cannot be added"
    if _is(offer, "needs_bounded_norm") and not _is_bounded(before):
        longer = before[-1].name if before else "training"
        return f"{who} needs updates of a bounded norm, and {longer!r} before it bounds none"
    return ""


def _takes_values(offer: Offer, before: Sequence[Offer]) -> bool:
    """Whether all that was made into bytes before are values that it takes, and nobody has put bytes around them."""
    touched = [each for each in before if _is(each, "encodes") or _is(each, "takes_bytes")]
    return _is(offer, "takes_values") and all(_is(each, "sends_values") for each in touched)


def _is_bounded(chain: Sequence[Offer]) -> bool:
    """Whether what leaves the chain has a bounded norm: it was bounded, and nothing after that made it longer."""
    for offer in reversed(chain):
        if _is(offer, "bounded_norm"):
            return True
        if not _is(offer, "keeps_norm"):
            return False
    return False


def _is(offer: Offer, capability: str) -> bool:
    return bool(offer.capabilities.get(capability, False))


def _alternative(chain: Sequence[Offer], aggregator: Offer, registry: Registry) -> str:
    """What works: another order, another aggregator, another transform put first, or one less. It was looked at."""
    orders = permutations(chain) if len(chain) <= _MOST_PERMUTED else iter(())
    for order in orders:
        if not objection(order, aggregator):
            return f"This order works: {_words(order)}"
    for other in registry.offers("aggregator"):
        if other.name != aggregator.name and not objection(chain, other):
            return f"With aggregator.name = {other.name!r} it works"
    for more in registry.offers("transform"):
        if _is(more, "bounded_norm") and not objection([more, *chain], aggregator):
            return f"With {more.name!r} before them it works: {_words([more, *chain])}"
    for place, offer in reversed(list(enumerate(chain))):
        rest = [*chain[:place], *chain[place + 1 :]]
        if not objection(rest, aggregator):
            return f"Without {offer.name!r} it works: {_words(rest)}"
    return "Without transforms it works" if not objection((), aggregator) else "Choose another aggregator"


def _words(chain: Sequence[Offer]) -> str:
    return "transforms " + ", ".join(repr(offer.name) for offer in chain) if chain else "no transforms"
