"""Controls: a model with control variates beside its shared parameters (:mod:`fedtower.core.control`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedtower.core.control import CONTROL, OWN
from fedtower.core.plan import LocalSettings
from fedtower.recsys.beside import beside
from fedtower.recsys.models import Declared


def with_controls(declared: Declared, local: LocalSettings) -> Declared:
    """The model, where ``local.control`` asks for them with variates of 0 for every shared parameter that is trained;
    parameters that live on devices drift from nobody's.
    """
    if local.control == "none":
        return declared
    shared = {
        name: torch.zeros_like(value)
        for name, value in declared.shared.named_parameters()
        if name not in declared.on_device and name not in local.frozen
    }
    tower = declared.shared
    for prefix in (CONTROL, OWN) if local.control == "scaffold" else (OWN,):
        tower = beside(tower, prefix, shared)
    return replace(declared, shared=tower, on_device=(*declared.on_device, *(OWN + name for name in shared)))
