"""Controls: a model with control variates beside its shared parameters (:mod:`fedtower.core.control`)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedtower.core.control import CONTROL, OWN
from fedtower.core.plan import LocalSettings
from fedtower.recsys.models import Declared


def with_controls(declared: Declared, local: LocalSettings) -> Declared:
    """The model, where ``local.control`` asks for them with variates of 0 for every shared parameter that is trained;
    parameters that live on devices drift from nobody's.
    """
    if local.control == "none":
        return declared
    shared = {
        name: value
        for name, value in declared.shared.named_parameters()
        if name not in declared.on_device and name not in local.frozen
    }
    tower = copy(declared.shared)
    tower._modules = dict(declared.shared._modules)
    for prefix in (CONTROL, OWN) if local.control == "scaffold" else (OWN,):
        tower.add_module(prefix.removesuffix("."), _zeros(shared))
    return replace(declared, shared=tower, on_device=(*declared.on_device, *(OWN + name for name in shared)))


def _zeros(like: Mapping[str, Tensor]) -> nn.Module:
    """A module with parameters of 0 under these dotted names."""
    root = nn.Module()
    for name, value in like.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(leaf, nn.Parameter(torch.zeros_like(value)))
    return root
