"""Checks: whether a decoded submission may count under its lease: what it belongs to, its form, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fedtower.core.checking import CheckSettings, Leased, check
from fedtower.core.cohort import Cohort
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.rows import IntArray, RowIds
from fedtower.core.transform import Transform, decode
from fedtower.plugins.transports.grpc.artefact_store import ArtefactStore
from fedtower.plugins.transports.grpc.artefacts import decode_parameter
from fedtower.plugins.transports.grpc.codec import Belongs, Submission
from fedtower.plugins.transports.grpc.plans import RowSource, decode_plan
from fedtower.plugins.transports.grpc.refusals import Reason, Refused, refusal_of_check
from fedtower.plugins.transports.grpc.windows import Window

if TYPE_CHECKING:
    from fedtower.plugins.transports.grpc.intake import Caller


@dataclass(frozen=True)
class Expected:
    """What a submission in a window is held to."""

    window: Window
    belongs: Belongs
    plan: Plan
    rows: Mapping[str, RowSource] = field(default_factory=dict)
    settings: CheckSettings = field(default_factory=CheckSettings)
    transforms: Sequence[Transform] = ()

    @cached_property
    def cohort(self) -> Cohort:
        """Who may take part."""
        clients = self.window.clients
        return Cohort(self.window.round, clients, int(clients[-1]) + 1)


def expected_of(window: Window, artefacts: ArtefactStore, federation: str, registry: Registry) -> Expected:
    """What a window's plan asks for; of its parameters only the shapes are kept."""
    published = decode_plan(artefacts.path(window.digest).read_bytes())
    shapes = {
        each.name: decode_parameter(each, artefacts.path(each.digest).read_bytes()).shape
        for each in published.parameters
    }
    plan = Plan(
        round=window.round,
        parameters={name: np.broadcast_to(np.float32(0.0), shape) for name, shape in shapes.items()},
        local=published.local,
        train_rows=published.train_rows,
    )
    belongs = Belongs(federation, published.model, window.round, b"", window.task)
    return Expected(
        window,
        belongs,
        plan,
        rows={each.name: each for each in published.rows},
        settings=CheckSettings(max_norm=published.norm_bound or None),
        transforms=[registry.make("transform", part) for part in published.transforms],
    )


def refuse_unfit(
    submission: Submission,
    expected: Expected,
    lease: bytes,
    caller: Caller,
    given: Mapping[str, IntArray],
    examples: int | None,
) -> None:
    """Raise Refused, with the reason, for a submission that may not count.

    ``given`` are the rows that were given out under the lease, ``examples`` how many the device said that it has.
    """
    _refuse_stranger(submission.belongs, expected.belongs, lease, caller)
    if submission.belongs.task == "evaluate":
        for name, each in submission.sums.items():
            if not np.isfinite(each.total) or each.cases < 0:
                raise Refused(
                    Reason.NOT_FINITE, f"{caller.whose} says that its {name!r} is {each.total} of {each.cases}"
                )
        return
    updates = submission.updates
    weight, count = float(updates.weights[0]), submission.num_examples
    if (weight > 0 and count == 0) or (examples is not None and count > examples):
        raise Refused(
            Reason.NUM_EXAMPLES,
            f"{caller.whose} gives weight {weight:g} to an update of {count} examples, and said that it has {examples}",
        )
    leased = {
        name: Leased(RowIds(np.array([0, len(ids)], dtype=np.int64), ids), source.width)
        for name, source in expected.rows.items()
        for ids in [given.get(name, np.zeros(0, dtype=np.int64))]
    }
    try:
        decoded = decode(expected.transforms, updates, expected.plan)
    except Exception as error:  # whatever a decoder can raise at the bytes of a stranger
        raise Refused(
            Reason.WRONG_CODEC, f"the update of {caller.whose} cannot be decoded: {type(error).__name__}: {error}"
        ) from error
    leased = leased if expected.plan.train_rows else {}
    objection = check(decoded, expected.plan, expected.cohort, expected.settings, leased)[0]
    if objection is not None:
        raise refusal_of_check(objection, caller.client)


def _refuse_stranger(said: Belongs, expected: Belongs, lease: bytes, caller: Caller) -> None:
    """Raise Refused for an update of another federation, model, round, task or lease."""
    for reason, what, got, want in (
        (Reason.OTHER_FEDERATION, "federation", said.federation, expected.federation),
        (Reason.OTHER_ROUND, "round", said.round, expected.round),
        (Reason.OTHER_MODEL, "model", said.model.hex()[:16], expected.model.hex()[:16]),
        (Reason.UNKNOWN_LEASE, "lease", said.lease.hex(), lease.hex()),
        (Reason.OTHER_ROUND, "task", said.task, expected.task),
    ):
        if got != want:
            early = what == "round" and said.round > expected.round
            raise Refused(
                Reason.EARLY if early else reason,
                f"the update of {caller.whose} is of the {what} {got!r}, and its lease is of {want!r}",
            )
