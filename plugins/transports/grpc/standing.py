"""Standing: how a federation stands, read from the files of its windows and its intakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedtower.core.journal import Clock, RoundRecord, since_boot
from fedtower.plugins.transports.grpc.seats import all_counted
from fedtower.plugins.transports.grpc.steps import read_steps
from fedtower.plugins.transports.grpc.table import elapsed
from fedtower.plugins.transports.grpc.windows import read_window
from fedtower.recsys.line import Counts, Waiting


def waiting_of(folder: Path, records: Sequence[RoundRecord], clock: Clock = since_boot) -> list[Waiting]:
    """The windows that are open, with what their files in ``folder`` say of them; of asynchronous rounds the newest,
    which has accepted what waits for its step in any of them.
    """
    found = []
    training = [record for record in records if record.task == "train" and record.state == "open"]
    for record in records:
        window = read_window(folder, record.round, record.task) if record.state == "open" else None
        if window is not None and record not in training[:-1]:
            seconds = window.deadline_seconds
            found.append(
                Waiting(
                    round=record.round,
                    task=record.task,
                    clients=len(window.clients),
                    target=window.target,
                    accepted=record.accepted if window.concurrency is None else _untaken(folder.parent, training),
                    seconds_left=max(seconds - elapsed(window.opened, clock()), 0.0),
                )
            )
    return found


def _untaken(run: Path, training: Sequence[RoundRecord]) -> int:
    """How many updates of these windows no step has taken."""
    taken = Counter(window for step in read_steps(run / "steps") for window, _ in step.taken)
    return sum(record.accepted - taken[record.round] for record in training)


def counts_of(folder: Path) -> Counts:
    """What all intakes of a run have counted."""
    leases, acknowledged, refusals, single = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for counted in all_counted(folder):
        for name, of in counted.items():
            for labels, value in of:
                if name == "fedtower_leases":
                    leases[labels["task"]] += int(value)
                elif name == "fedtower_uploads" and labels["duplicate"] == "false":
                    acknowledged[labels["task"]] += int(value)
                elif name == "fedtower_refusals":
                    refusals[labels["reason"]] += int(value)
                else:
                    single[name] += int(value)
    return Counts(
        leases=dict(leases),
        acknowledged=dict(acknowledged),
        duplicates=single["fedtower_uploads"],
        refusals=dict(refusals.most_common()),
        bytes_up=single["fedtower_received_bytes"],
        bytes_down=single["fedtower_sent_bytes"],
    )
