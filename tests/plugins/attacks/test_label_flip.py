from __future__ import annotations

import numpy as np

from fedtower.core.runtime import Work
from fedtower.core.testing import examples
from fedtower.plugins.attacks.label_flip import LabelFlip
from fedtower.recsys.testing.attack import AttackPromises, batches


def two_clients() -> Work:
    """Clients with targets at slots 2 and 3, the second of client 1 padding; rows 0 to 3 are history, 4 to 6 not."""
    slots = {"history": np.array([[[0, 1, 2, 3]]] * 2), "negatives": np.array([[[4, 5, 6]]] * 2)}
    weight = np.array([[[1, 1]], [[1, 0]]], dtype=np.float32)
    inputs = {"target": np.array([[[2, 3]], [[2, 0]]]), "weight": weight}
    return Work(np.arange(2), np.ones(2, np.int64), weight.sum(axis=(1, 2)).astype(np.int64), inputs, slots)


def test_targets_change_places_with_negatives_and_padding_stays() -> None:
    after = LabelFlip().relabelled(two_clients(), np.array([False, True]))
    assert after.slots["history"].tolist() == [[[0, 1, 2, 3]], [[0, 1, 4, 3]]]
    assert after.slots["negatives"].tolist() == [[[4, 5, 6]], [[2, 5, 6]]]
    both = LabelFlip().relabelled(two_clients(), np.array([True, True]))
    assert both.slots["history"][0].tolist() == [[0, 1, 4, 5]]
    assert both.slots["negatives"][0].tolist() == [[2, 3, 6]]


def test_flipped_twice_it_is_as_it_was() -> None:
    work, bad = batches(), AttackPromises.attackers
    again = LabelFlip().relabelled(LabelFlip().relabelled(work, bad), bad)
    for name, slots in work.slots.items():
        np.testing.assert_array_equal(again.slots[name], slots)


def test_a_scale_makes_the_update_longer() -> None:
    updates, bad = examples.updates(3), np.array([True, False, False])
    assert LabelFlip().sent(updates, bad) is updates
    np.testing.assert_allclose(LabelFlip(scale=10).sent(updates, bad).norms / updates.norms, [10, 1, 1], rtol=1e-6)
