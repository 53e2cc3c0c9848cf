"""A journal on a small file system of its own: filled, looked into, made larger, and gone on with.

``python -m tests.plugins.journals.full_disk FOLDER payloads|index`` prints how many uploads were acknowledged until the
disk was full, how many clients were refused by then, how many of these were accepted when there was space again, and
the suffix of the file that could not grow first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from fedtower.core.errors import StorageError
from fedtower.core.journal import Journal, Outcome, Upload
from fedtower.plugins.journals.sqlite.journal import SQLite
from tests.recsys.forks import MS_REMOUNT, mount, own_disk

SIZE, LARGER = 6_000_000, b"size=20000000"
REFUSALS: list[str] = []


def main(folder: Path, what: str) -> None:
    """Fill it, and go on."""
    own_disk(str(folder), "tmpfs", SIZE)
    journal = SQLite().open(folder, "a federation")
    journal.open_round(journal.claim(), 1, "train", "plan")
    # 100 kB each fill the disk with payloads; where somebody else has filled it, the index cannot grow first.
    size = 100_000 if what == "payloads" else 10
    done = accept(journal, range(30), size)
    if what == "index":
        fill(folder / "filler")
    tried = range(30)
    while len(done) == len(tried):
        tried = range(len(tried) + 10)
        done |= accept(journal, tried[-10:], size)
    refused = set(tried) - done
    assert held(journal) == done
    mount(b"none", str(folder).encode(), None, MS_REMOUNT, LARGER)
    again = accept(journal, sorted(refused), size)
    assert held(journal) == done | again
    journal.close()
    sys.stdout.write(f"{len(done)} {len(refused)} {len(again)} {REFUSALS[0]}\n")


def fill(path: Path) -> None:
    """Take all that is left."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        for _ in count():
            file.write(bytes(4_096))


def held(journal: Journal) -> set[int]:
    """The clients that count, each once and with what it sent."""
    found = list(journal.accepted(1, "train"))
    assert all(set(upload.payload) == {upload.client} for upload in found)
    clients = {upload.client for upload in found}
    assert len(clients) == len(found)
    return clients


def accept(journal: Journal, clients: Iterable[int], size: int) -> set[int]:
    """The clients whose uploads were acknowledged; all others were told that it is the disk."""
    done = set()
    for client in clients:
        try:
            lease = journal.lease(1, "train", client, 600.0).result()
            assert lease is not None
            outcome = journal.accept(Upload.of(lease.id, bytes([client]) * size)).result()
        except StorageError as error:
            said = re.search(r"cannot write to \S+(\.\w+): the disk", str(error))
            if said is None:
                raise
            REFUSALS.append(said[1])
            continue
        assert outcome is Outcome.ACCEPTED
        done.add(client)
    return done


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
