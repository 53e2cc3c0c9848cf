"""DLRM: TorchRec's own modules with the same weights give the same logits."""

from __future__ import annotations

import warnings

import pytest
import torch

from fedtower.core.errors import RecipeError
from fedtower.plugins.models.dlrm.model import DLRM, dot_products, pairs
from fedtower.recsys.models import ExampleSchema
from fedtower.recsys.testing.model import ModelPromises


class TestDLRM(ModelPromises):
    make = DLRM


class TestDLRMWithoutHiddenLayers(ModelPromises):
    @staticmethod
    def make() -> DLRM:
        return DLRM(bottom=(), top=())


@pytest.mark.parametrize("count", [2, 3, 4, 5, 26, 27])
def test_each_pair_is_met_once_and_none_meets_itself(count: int) -> None:
    met = [frozenset(pair) for pair in pairs(count)]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
    assert all(len(pair) == 2 for pair in met)
    vectors = torch.randn(3, count, 4, generator=torch.Generator().manual_seed(count))
    slowly = torch.stack([(vectors[:, i] * vectors[:, j]).sum(dim=1) for i, j in pairs(count)], dim=1)
    torch.testing.assert_close(dot_products(vectors), slowly)


@pytest.mark.parametrize("num_fields", [2, 5, 26])
def test_it_is_the_dlrm_of_torchrec(num_fields: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchrec.models.dlrm import DLRM as Reference
        from torchrec.modules.embedding_configs import EmbeddingBagConfig
        from torchrec.modules.embedding_modules import EmbeddingBagCollection
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    dim, batch, per_field = 8, 16, 7
    generator = torch.Generator().manual_seed(3)
    schema = ExampleSchema((13,), (per_field,) * num_fields)
    ours = DLRM(dim=dim, bottom=(32,), top=(24, 12)).declare(schema, generator).shared
    table = torch.randn(num_fields * per_field, dim, generator=generator)
    ids = torch.randint(0, per_field, (batch, num_fields), generator=generator)
    dense = torch.randn(batch, 13, generator=generator)

    keys = [f"f{place}" for place in range(num_fields)]
    configs = [
        EmbeddingBagConfig(name=f"t_{key}", embedding_dim=dim, num_embeddings=per_field, feature_names=[key])
        for key in keys
    ]
    theirs = Reference(
        EmbeddingBagCollection(tables=configs),
        dense_in_features=13,
        dense_arch_layer_sizes=[32, dim],
        over_arch_layer_sizes=[24, 12, 1],
    )
    with torch.no_grad():
        for place, key in enumerate(keys):
            bag = theirs.sparse_arch.embedding_bag_collection.embedding_bags[f"t_{key}"]
            bag.weight.copy_(table[place * per_field : (place + 1) * per_field])
        mine = list(ours.parameters())
        yours = [*theirs.dense_arch.parameters(), *theirs.over_arch.parameters()]
        # They list the pairs row by row of the upper triangle, we in an order that exports: the columns of the first
        # layer behind them are put into theirs.
        order = {frozenset(pair): at for at, pair in enumerate(pairs(num_fields + 1))}
        upper = torch.triu_indices(num_fields + 1, num_fields + 1, offset=1).T.tolist()
        columns = [*range(dim), *(dim + order[frozenset(pair)] for pair in upper)]
        for my, your in zip(mine, yours, strict=True):
            your.copy_(my[:, columns] if my.shape[1:] == (len(columns),) else my)
    lengths = torch.ones(num_fields * batch, dtype=torch.int64)
    jagged = KeyedJaggedTensor(keys=keys, values=ids.T.reshape(-1), lengths=lengths)
    rows = table[ids + per_field * torch.arange(num_fields)]
    with torch.no_grad():
        expected = theirs(dense, jagged)[:, 0]
        logits = ours.logits({"category": rows}, {"dense": dense})  # type: ignore[operator]
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{"dim": 6}, {"bottom": (0,)}, {"top": (16, 0)}])
def test_widths_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="model"):
        DLRM(**settings)  # type: ignore[arg-type]
