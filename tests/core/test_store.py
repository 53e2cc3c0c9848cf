"""ClientStore: what was written is read, nothing else, against a plain dictionary."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.checkpoint import attachment, write_checkpoint
from fedtower.core.errors import CheckpointError, ShapeMismatch, StorageError
from fedtower.core.store import ClientStore

law = settings(deadline=None, max_examples=60)

FIRST = np.array([7.0, 8.0], dtype=np.float32)
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # a flush costs nothing there
visits = st.lists(st.lists(st.integers(0, 19), unique=True, max_size=8), max_size=8)


def store(*names: str) -> ClientStore:
    """Twenty clients that keep two numbers by each name."""
    made = ClientStore(20)
    for name in names:
        made.declare(name, FIRST)
    return made


def ids(*clients: int) -> NDArray[np.int64]:
    return np.array(clients, dtype=np.int64)


def written(cohorts: list[list[int]]) -> tuple[ClientStore, dict[int, list[float]]]:
    """A store after visits of these cohorts, and a dictionary that says what it must hold."""
    kept, plain = store("mine"), dict[int, list[float]]()
    for visit, clients in enumerate(cohorts):
        values = np.array([[100 * visit + client, -client] for client in clients], dtype=np.float32).reshape(-1, 2)
        kept.write("mine", ids(*clients), values)
        plain |= dict(zip(clients, values.tolist(), strict=True))
    return kept, plain


def test_everybody_starts_with_the_declared_value() -> None:
    assert store("mine").read("mine", ids(3, 0, 3)).tolist() == [[7, 8]] * 3
    assert store("mine", "other").names == ("mine", "other")


def test_the_file_is_not_looked_at_where_nobody_wrote_and_what_is_read_is_a_copy() -> None:
    kept, looked = store("mine"), list[int]()
    kept.write("mine", ids(4, 9), np.full((2, 2), 3.0, dtype=np.float32))
    (file,) = kept._files.values()

    class Looked(np.ndarray[tuple[int, ...], np.dtype[np.float32]]):
        """The values, who was looked at remembered: a look at a hole in the file makes a page of it."""

        def __getitem__(self, clients: Any) -> Any:
            looked.extend(clients.tolist())
            return np.asarray(self)[clients]

    file.values = file.values.view(Looked)
    everybody = np.arange(20)
    read = kept.read("mine", everybody)
    assert read[:, 1].tolist() == [3.0 if client in (4, 9) else 8.0 for client in range(20)]
    read[:] = 0.0
    assert kept.read("mine", ids(9, 4)).tolist() == [[3.0, 3.0]] * 2
    assert kept.read("mine", ids(1)).tolist() == [[7.0, 8.0]]
    assert looked == [4, 9, 9, 4]


def test_nothing_at_all_may_be_kept() -> None:
    kept = ClientStore(5)
    kept.declare("mine", np.zeros((0, 3), dtype=np.float32))
    kept.write("mine", ids(4, 1), np.zeros((2, 0, 3), dtype=np.float32))
    assert kept.read("mine", ids(1, 2)).shape == (2, 0, 3)


@given(visits)
@law
def test_the_last_value_written_is_the_one_that_is_read(cohorts: list[list[int]]) -> None:
    kept, plain = written(cohorts)
    wanted = [plain.get(client, FIRST.tolist()) for client in range(20)]
    assert kept.read("mine", np.arange(20)).tolist() == wanted


def test_reading_nobody_reads_nothing() -> None:
    assert store("mine").read("mine", ids()).shape == (0, 2)


def test_what_is_read_is_the_reader_s_own() -> None:
    kept = store("mine")
    kept.write("mine", ids(4), np.ones((1, 2), dtype=np.float32))
    for client in (4, 5):
        kept.read("mine", ids(client))[:] = 99
    assert kept.read("mine", ids(4, 5)).tolist() == [[1, 1], [7, 8]]


def test_names_do_not_share_values() -> None:
    kept = store("mine", "other")
    kept.write("mine", ids(4), np.ones((1, 2), dtype=np.float32))
    assert kept.read("other", ids(4)).tolist() == [[7, 8]]


@given(visits)
@law
def test_a_snapshot_holds_what_was_written_and_restores_it(cohorts: list[list[int]]) -> None:
    kept, plain = written(cohorts)
    arrays = {name: array.copy() for name, array in kept.snapshot().items()}
    assert arrays["mine.clients"].tolist() == sorted(plain)
    assert arrays["mine.values"].tolist() == [plain[client] for client in sorted(plain)]
    again = store("mine")
    again.write("mine", ids(1), np.zeros((1, 2), dtype=np.float32))  # forgotten when it is restored
    again.restore(arrays)
    np.testing.assert_array_equal(again.read("mine", np.arange(20)), kept.read("mine", np.arange(20)))


@given(visits, visits)
@law
def test_a_restored_store_goes_on_alike(before: list[list[int]], after: list[list[int]]) -> None:
    kept, _ = written(before)
    again = store("mine")
    again.restore(kept.snapshot())
    for clients in after:
        values = np.full((len(clients), 2), len(clients), dtype=np.float32)
        kept.write("mine", ids(*clients), values)
        again.write("mine", ids(*clients), values)
    for name, array in kept.snapshot().items():
        np.testing.assert_array_equal(array, again.snapshot()[name])


def test_a_snapshot_is_not_changed_by_later_visits() -> None:
    kept, _ = written([[3, 1]])
    taken = kept.snapshot()
    kept.write("mine", ids(1), np.zeros((1, 2), dtype=np.float32))
    assert taken["mine.values"].tolist() == [[1, -1], [3, -3]]


def test_a_snapshot_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"holds no client state 'other'.*with the recipe it was written with"):
        store("mine", "other").restore(store("mine").snapshot())


@pytest.mark.parametrize("shape", [(2, 1), (2,), (1, 2), (2, 2, 1)])
def test_values_of_another_shape_are_refused_and_not_broadcast(shape: tuple[int, ...]) -> None:
    kept = store("mine")
    with pytest.raises(ShapeMismatch, match="'mine' was declared with shape"):
        kept.write("mine", ids(3, 4), np.zeros(shape, dtype=np.float32))
    assert kept.read("mine", ids(3, 4)).tolist() == [[7, 8]] * 2


def test_numbers_and_matrices_can_be_kept_too() -> None:
    kept = ClientStore(5)
    kept.declare("number", np.float32(2.0) * np.ones((), dtype=np.float32))
    kept.declare("matrix", np.eye(2, dtype=np.float32))
    kept.write("number", ids(1), np.array([9.0], dtype=np.float32))
    assert kept.read("number", ids(0, 1)).tolist() == [2, 9]
    assert kept.read("matrix", ids(3)).shape == (1, 2, 2)


def test_memory_grows_with_those_who_wrote_and_not_with_the_population() -> None:
    tracemalloc.start()
    try:
        kept = ClientStore(1_000_000)
        kept.declare("mine", np.zeros(64, dtype=np.float32))
        for start in range(0, 900, 100):
            kept.write("mine", np.arange(start, start + 100), np.ones((100, 64), dtype=np.float32))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Four bytes a client, and at most twice what was written: everybody's values would be 256 MB.
    assert held < 4 * 1_000_000 + 2 * 900 * 64 * 4 + 100_000


def test_a_client_s_place_costs_no_disk_until_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free = shutil.disk_usage(tmp_path).free
    kept = ClientStore(1_000_000)
    kept.declare("mine", np.zeros(4096, dtype=np.float32))  # 16 GB, were they all written
    clients = ids(0, 500_000, 999_999)
    values = np.arange(3 * 4096, dtype=np.float32).reshape(3, -1)
    kept.write("mine", clients, values)
    assert free - shutil.disk_usage(tmp_path).free < 1 << 30
    np.testing.assert_array_equal(kept.read("mine", clients[::-1]), values[::-1])
    assert list(tmp_path.iterdir()) == [], "a kill would leave a file behind"


def test_a_full_disk_is_an_error_and_the_client_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store("mine")
    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(StorageError, match="cannot write to"):
        kept.write("mine", ids(4), np.ones((1, 2), dtype=np.float32))
    assert kept.read("mine", ids(4)).tolist() == [[7, 8]]


def full_disk(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def saved(folder: Path, round: int, kept: ClientStore, keep: int = 9) -> int:
    """The bytes that the files of a checkpoint take which no checkpoint before had, once the store is saved with it."""
    before = {path.stat().st_ino for path in folder.rglob("*.npy")}
    write_checkpoint(folder, round, {}, keep, {"clients": kept.save})
    status = [path.stat() for path in attachment(folder, round, "clients").glob("*.npy")]
    return sum(each.st_size for each in status if each.st_ino not in before)


def loaded(folder: Path, round: int, *names: str) -> ClientStore:
    made = store(*names)
    made.load(attachment(folder, round, "clients"))
    return made


@given(st.lists(visits, min_size=1, max_size=6), st.data())
@law
def test_every_save_is_restored_to_the_last_bit(rounds: list[list[list[int]]], data: st.DataObject) -> None:
    with TemporaryDirectory(dir=MEMORY) as place:
        kept, wanted = store("mine"), list[NDArray[np.float32]]()
        for round, cohorts in enumerate(rounds):
            if data.draw(st.booleans()) and round:  # the run is resumed from any of its checkpoints
                back = data.draw(st.integers(0, round - 1))
                kept = loaded(Path(place), back, "mine")
                np.testing.assert_array_equal(kept.read("mine", np.arange(20)), wanted[back])
            for visit, clients in enumerate(cohorts):
                values = np.full((len(clients), 2), 100 * round + visit, dtype=np.float32)
                kept.write("mine", ids(*clients), values)
            saved(Path(place), round, kept)
            wanted.append(kept.read("mine", np.arange(20)))
        for round, values in enumerate(wanted):
            np.testing.assert_array_equal(loaded(Path(place), round, "mine").read("mine", np.arange(20)), values)


def million(written: int) -> ClientStore:
    """A million clients that keep eight numbers, of whom ``written`` have been seen."""
    made = ClientStore(1_000_000)
    made.declare("mine", np.zeros(8, dtype=np.float32))
    made.write("mine", 7 * np.arange(written), np.ones((written, 8), dtype=np.float32))
    return made


def visit(kept: ClientStore, round: int) -> None:
    clients = 100 * 7 * round + 7 * np.arange(100) + 3
    kept.write("mine", clients, np.full((100, 8), round, dtype=np.float32))


def test_what_a_checkpoint_writes_does_not_grow_with_who_was_written_before() -> None:
    told: dict[int, list[int]] = {}
    for before in (0, 20_000, 100_000):
        with TemporaryDirectory(dir=MEMORY) as place:
            kept = million(before)
            saved(Path(place), 0, kept, keep=1)
            told[before] = []
            for round in range(1, 65):
                visit(kept, round)
                told[before].append(saved(Path(place), round, kept, keep=1))
    assert told[0] == told[20_000] == told[100_000]
    record, rounds = 100 * (8 + 4 * 8), 64
    assert sorted(told[0])[rounds // 2] < 2.2 * record, "half of them write one cohort, or two"
    assert sum(told[0]) < (1 + np.log2(rounds)) * rounds * 1.1 * record, "a value is written again log2(64) times"


def test_clients_that_come_again_and_again_take_the_room_of_one() -> None:
    with TemporaryDirectory(dir=MEMORY) as place:
        kept = million(0)
        for round in range(9):
            visit(kept, 1)
            saved(Path(place), round, kept)
        assert len(list(attachment(Path(place), 8, "clients").glob("*.npy"))) == 1


def test_a_save_that_was_never_committed_is_no_ground_to_build_on(tmp_path: Path) -> None:
    kept, _ = written([[1, 2, 3, 4, 5]])
    saved(tmp_path, 1, kept)
    kept.write("mine", ids(6), np.ones((1, 2), dtype=np.float32))

    def fails(place: Path) -> None:
        kept.save(place)
        raise RuntimeError("another part")

    with pytest.raises(RuntimeError, match="another part"):
        write_checkpoint(tmp_path, 2, {}, 9, {"clients": fails})
    kept.write("mine", ids(7), np.ones((1, 2), dtype=np.float32))
    saved(tmp_path, 3, kept)
    assert loaded(tmp_path, 3, "mine").read("mine", ids(5, 6, 7)).tolist() == [[5, -5], [1, 1], [1, 1]]


@pytest.mark.parametrize("damaged", [False, True])
def test_where_the_disk_has_no_links_files_are_copied_if_they_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    kept, _ = written([[1, 2, 3, 4, 5]])
    saved(tmp_path, 1, kept)
    (file,) = attachment(tmp_path, 1, "clients").glob("*.npy")
    if damaged:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(Path, "hardlink_to", no_links)
    kept.write("mine", ids(9), np.ones((1, 2), dtype=np.float32))
    saved(tmp_path, 2, kept)
    held = attachment(tmp_path, 2, "clients")
    assert (held / file.name).exists() == (not damaged)
    assert file.stat().st_nlink == 1
    assert loaded(tmp_path, 2, "mine").read("mine", ids(5, 9)).tolist() == [[5, -5], [1, 1]]


def no_links(*arguments: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_what_another_model_saved_is_refused(tmp_path: Path) -> None:
    kept, _ = written([[1]])
    saved(tmp_path, 1, kept)
    with pytest.raises(CheckpointError, match=r"holds no client state 'other'.*with the recipe it was written with"):
        loaded(tmp_path, 1, "mine", "other")
    wider = ClientStore(20)
    wider.declare("mine", np.zeros(3, dtype=np.float32))
    with pytest.raises(CheckpointError, match=r"'mine' has shape \(2,\), but this run's has \(3,\)"):
        wider.load(attachment(tmp_path, 1, "clients"))


def test_what_more_clients_saved_is_refused(tmp_path: Path) -> None:
    kept, _ = written([[1, 19]])
    saved(tmp_path, 1, kept)
    fewer = ClientStore(19)
    fewer.declare("mine", FIRST)
    with pytest.raises(CheckpointError, match="what client 19 keeps, but the data has 19 clients"):
        fewer.load(attachment(tmp_path, 1, "clients"))
    with pytest.raises(CheckpointError, match="what client 19 keeps, but the data has 19 clients"):
        fewer.restore(kept.snapshot())


def test_a_write_that_the_disk_takes_in_parts_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: at_once(file, content[:3], place))
    kept, plain = written([[4, 5, 6, 9]])
    assert kept.read("mine", ids(4, 5, 6, 9)).tolist() == [plain[client] for client in (4, 5, 6, 9)]
