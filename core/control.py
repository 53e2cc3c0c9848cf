"""Control variates: what corrects a client's steps for its drift towards its own data, and how they are kept.

SCAFFOLD, Karimireddy et al., 2020, https://arxiv.org/abs/1910.06378, algorithm 1 with option II. Each shared parameter
x has two more beside it: the server's variate ``control.x``, which travels with the plan, and the client's own,
``own_control.x``, which stays on the device. A step descends along ``g - own + control``.

FedDyn, Acar et al., 2021, https://arxiv.org/abs/2111.04263, algorithm 1: here the client's own is the gradient at which
its last visit ended, and the pull of ``local.proximal`` is added, so that a step descends along
``g - own + alpha (x - start)``. The server's half is the server optimiser of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.plan import Plan
from fedtower.core.updates import Updates

FloatArray = NDArray[np.float32]

CONTROL, OWN = "control.", "own_control."


def is_variate(name: str) -> bool:
    """Whether a parameter is a control variate, the server's or a client's.

    >>> is_variate("control.out.weight"), is_variate("own_control.out.weight"), is_variate("out.weight")
    (True, True, False)
    """
    return name.startswith((CONTROL, OWN))


def without_variates(parameters: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The parameters that are trained, and so are the server optimiser's."""
    return {name: value for name, value in parameters.items() if not is_variate(name)}


def corrected(
    plan: Plan, own: Mapping[str, FloatArray], updates: Updates, states: Mapping[str, FloatArray]
) -> tuple[Updates, dict[str, FloatArray]]:
    """The updates, with how much each client's variates changed where the server has some too; and what the devices
    keep, their variates among it.

    SCAFFOLD: after K steps a client's variate is the mean of its gradients on the way, ``own - control - delta / (K
    lr)``. One without a step keeps its own.

    Shape:
        ``own[name]`` (C, *shape): what the clients kept before the visit.
    """
    if plan.local.control == "feddyn":
        alpha = np.float32(plan.local.proximal)
        after = {name: value - alpha * updates.dense[name.removeprefix(OWN)] for name, value in _own(own).items()}
        return updates, {**states, **after}
    steps = updates.metrics["steps"]
    rates = np.divide(1.0, steps * plan.local.lr, out=np.zeros(len(updates)), where=steps > 0)
    dense, kept = dict(updates.dense), dict(states)
    for name, control in plan.parameters.items():
        if not name.startswith(CONTROL):
            continue
        trained = name.removeprefix(CONTROL)
        per_client = (-1, *([1] * control.ndim))
        gradient = updates.dense[trained] * rates.reshape(per_client)
        change = np.where((steps > 0).reshape(per_client), -control[None] - gradient, 0.0).astype(np.float32)
        dense[name] = change
        kept[OWN + trained] = own[OWN + trained] + change
    return replace(updates, dense=dense), kept


def _own(states: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    return {name: value for name, value in states.items() if name.startswith(OWN)}


def moved(parameters: Mapping[str, FloatArray], delta: Mapping[str, FloatArray], share: float) -> dict[str, FloatArray]:
    """The server's variates after a round in which ``share`` of all clients counted: they stay the mean of those of
    all clients.
    """
    return {
        name: np.asarray(value + share * delta[name], np.float32)
        for name, value in parameters.items()
        if is_variate(name)
    }
