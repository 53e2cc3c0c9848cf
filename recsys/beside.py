"""Beside: a tower with more parameters under a prefix of their own, which its methods do not look at."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

from torch import Tensor, nn

from fedtower.recsys.models import SharedTower


def beside(tower: SharedTower, prefix: str, values: Mapping[str, Tensor]) -> SharedTower:
    """The tower, and a copy of each of ``values`` as the parameter ``prefix + name``; the tower itself stays as it was.

    ``prefix`` ends in a dot, ``values`` are by dotted names.
    """
    more = copy(tower)
    more._modules = dict(tower._modules)
    more.add_module(prefix.removesuffix("."), _holding(values))
    return more


def _holding(values: Mapping[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name, value in values.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(leaf, nn.Parameter(value.detach().clone()))
    return root
