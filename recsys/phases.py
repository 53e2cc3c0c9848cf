"""Phases: which steps of a visit train the device's own part alone (``local.head_first``).

FedRep, Collins et al., 2021, https://arxiv.org/abs/2102.07078, algorithm 1: a client makes its head fit the
representation that it was sent, and then moves the representation under that head.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtower.core.plan import LocalSettings
from fedtower.core.runtime import Work

HEAD = "head"
"""The input that tells a step its phase."""


def phased(work: Work, local: LocalSettings) -> Work:
    """The work, with the input ``head`` (C, S) where ``local.head_first`` asks for phases: 1 in the steps of the head,
    0 in those of all else.

    A client with fewer steps than others divides them in the same proportion, rounded up, as long as one is left for
    the rest; a single step is the rest's.
    """
    if not local.head_first:
        return work
    whole = local.epochs or local.steps or 1
    first = np.minimum(-(-work.steps * local.head_first // whole), work.steps - 1)
    steps = np.arange(work.inputs["weight"].shape[1], dtype=np.int64)
    head = (steps[None, :] < first[:, None]).astype(np.float32)
    return replace(work, inputs={**work.inputs, HEAD: head})
