"""Checkpoints: what was written is read, damage is noticed, and a kill at any moment leaves the old one or the new."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from fedtower.core.checkpoint import (
    attachment,
    earlier_attachments,
    grouped,
    list_checkpoints,
    read_attachments,
    read_checkpoint,
    storage_errors,
    write_checkpoint,
)
from fedtower.core.errors import CheckpointError, StorageError
from fedtower.core.manifest import write_manifest

Arrays = Mapping[str, NDArray[Any]]

law = settings(deadline=None, max_examples=25)

any_array = arrays_of.arrays(
    dtype=st.one_of(arrays_of.scalar_dtypes(), arrays_of.unicode_string_dtypes(), arrays_of.byte_string_dtypes()),
    shape=arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4),
)


def state(value: float) -> dict[str, NDArray[Any]]:
    """A small state all of whose entries say ``value``."""
    return {
        "parameters/w": np.full((2, 3), value, dtype=np.float32),
        "optimizer/steps": np.asarray(value, dtype=np.int64),
        "tables/none": np.zeros((0, 4)),
    }


def attached(value: float) -> dict[str, Callable[[Path], None]]:
    """An attachment of two files, one of them nested, that say ``value``."""

    def write(place: Path) -> None:
        (place / "inner").mkdir()
        for file in ("first", "inner/second"):
            (place / file).write_text(str(value))

    return {"shards": write}


def value_of(folder: Path, round: int) -> float:
    """What a readable checkpoint says, all of whose entries and attached files agree."""
    arrays = read_checkpoint(folder, round)
    assert set(arrays) == set(state(0))
    said = {float(number) for array in arrays.values() for number in array.ravel()}
    for place in read_attachments(folder, round).values():
        said |= {float((place / file).read_text()) for file in ("first", "inner/second")}
    (value,) = said
    return value


# A kill, unlike a power cut, is the same on a disk and in memory, and there a flush costs nothing.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


@pytest.fixture
def memory() -> Iterator[Path]:
    """An empty folder in memory, where there is such a thing."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@law
@given(st.dictionaries(st.text(max_size=12), any_array, max_size=3))
def test_every_array_comes_back_to_the_last_bit(arrays: Arrays) -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        write_checkpoint(Path(folder), 3, arrays, keep=1)
        back = read_checkpoint(Path(folder), 3)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("scalar", [np.float32(1.5), np.asarray(7), np.int64(7)], ids=["float32", "0-d", "int64"])
def test_a_single_number_stays_a_single_number(tmp_path: Path, scalar: Any) -> None:
    write_checkpoint(tmp_path, 1, {"steps": scalar}, keep=1)
    back = read_checkpoint(tmp_path, 1)["steps"]
    assert back.shape == ()
    assert back == scalar


def test_columns_first_and_strides_come_back_by_value(tmp_path: Path) -> None:
    grid = np.arange(12.0).reshape(3, 4)
    write_checkpoint(tmp_path, 1, {"turned": grid.T, "every second": grid[::2, ::2]}, keep=1)
    back = read_checkpoint(tmp_path, 1)
    np.testing.assert_array_equal(back["turned"], grid.T)
    np.testing.assert_array_equal(back["every second"], grid[::2, ::2])


def test_objects_are_refused_and_leave_the_old_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, state(1), keep=1)
    with pytest.raises(ValueError, match="Object arrays"):
        write_checkpoint(tmp_path, 2, {"thing": np.array([object()])}, keep=1)
    assert list_checkpoints(tmp_path) == [1]
    write_checkpoint(tmp_path, 2, state(2), keep=1)
    assert names(tmp_path) == ["000002"]


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    for round in (5, 10, 15, 20):
        assert write_checkpoint(tmp_path, round, state(round), keep=2) == tmp_path / f"{round:06d}"
    assert list_checkpoints(tmp_path) == [15, 20]


def test_going_back_removes_neither_what_is_written_nor_what_it_came_from(tmp_path: Path) -> None:
    # 30 is damaged, say: the run goes on from 20, and its next checkpoint is 25.
    for round in (10, 20, 30):
        write_checkpoint(tmp_path, round, state(round), keep=3)
    write_checkpoint(tmp_path, 25, state(25), keep=2)
    assert list_checkpoints(tmp_path) == [20, 25, 30]
    assert value_of(tmp_path, 25) == 25


def test_a_round_can_be_written_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, state(1), keep=1)
    write_checkpoint(tmp_path, 5, state(2), keep=1)
    assert value_of(tmp_path, 5) == 2
    assert names(tmp_path) == ["000005"]


def test_rounds_are_listed_by_number_and_other_things_are_not(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nothing") == []
    for round in (999_999, 1_000_000, 7):
        write_checkpoint(tmp_path, round, state(round), keep=9)
    (tmp_path / "0-notes").mkdir()
    (tmp_path / ".hidden").write_text("somebody's own")
    assert list_checkpoints(tmp_path) == [7, 999_999, 1_000_000]
    write_checkpoint(tmp_path, 8, state(8), keep=9)
    assert (tmp_path / ".hidden").read_text() == "somebody's own"


# For each case, forks are killed at their n-th file operation (or told that the disk is full from there on), for
# n = 0, 1, ... until one gets through. An audit hook comes before each operation, so between them they leave behind
# every state in between. One process forks them all: it has numpy already.
FORKS = """
import errno, json, os, shutil, signal, sys
from pathlib import Path
import numpy as np
from fedtower.core.checkpoint import write_checkpoint
from fedtower.core.errors import StorageError

ARRAYS = {"parameters/w": np.full((2, 3), 100, dtype=np.float32), "optimizer/steps": np.asarray(100),
          "tables/none": np.zeros((0, 4))}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def attached(place):
    (place / "inner").mkdir()
    for file in ("first", "inner/second"):
        (place / file).write_text("100")

def write(folder, round, keep, mode, spared):
    seen = 0
    def at(event, arguments):
        nonlocal seen
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        seen += 1
        if seen > spared and mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        takes_space = arguments[2] & WRITING if event == "open" else event in ("os.mkdir", "os.rename")
        if seen > spared and takes_space:
            raise OSError(errno.ENOSPC, "no space left on device")
    sys.addaudithook(at)
    try:
        write_checkpoint(folder, round, ARRAYS, keep, {"shards": attached})
    except StorageError:
        return 6
    return 0

def interrupted(base, tries, round, keep, mode):
    codes = []
    for spared in range(1000):
        folder = Path(tries) / f"{spared:04d}"
        shutil.copytree(base, folder)
        fork = os.fork()
        if fork == 0:
            code = 9
            try:
                code = write(folder, round, keep, mode, spared)
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
        if codes[-1] == 0:
            return codes

for job in json.loads(sys.argv[1]):
    print(json.dumps(interrupted(*job)))
"""


def nothing(folder: Path) -> None:
    """No checkpoint yet."""


def one(folder: Path) -> None:
    """Round 1."""
    write_checkpoint(folder, 1, state(1), keep=9, attachments=attached(1))


def two(folder: Path) -> None:
    """Rounds 1 and 2."""
    one(folder)
    write_checkpoint(folder, 2, state(2), keep=9, attachments=attached(2))


def left_by_a_kill(folder: Path) -> None:
    """Round 1, set aside; and something unfinished and something half removed lie about."""
    one(folder)
    (folder / "000001").rename(folder / ".000001.replaced")
    for name in (".000002.unfinished", ".000000.removed"):
        (folder / name).mkdir()
        (folder / name / "0000.npy").write_bytes(b"half")


@dataclass(frozen=True)
class Case:
    """What is there, the round that is written over it, and what may be the newest before and is there after."""

    prepare: Callable[[Path], None]
    round: int
    keep: int
    old: list[tuple[int, float]]
    left: list[int]


CASES = {
    "the first": Case(nothing, round=1, keep=1, old=[], left=[1]),
    "the next": Case(one, round=2, keep=1, old=[(1, 1.0)], left=[2]),
    "with older ones": Case(two, round=3, keep=2, old=[(2, 2.0)], left=[2, 3]),
    "the same again": Case(one, round=1, keep=1, old=[(1, 1.0)], left=[1]),
    "after a kill": Case(left_by_a_kill, round=2, keep=1, old=[(1, 1.0)], left=[2]),
    "the same after a kill": Case(left_by_a_kill, round=1, keep=1, old=[(1, 1.0)], left=[1]),
}
MODES = {"kill": -signal.SIGKILL, "full": StorageError.exit_code}


@pytest.fixture(scope="module")
def interrupted() -> Iterator[Mapping[tuple[str, str], list[Path]]]:
    """By case and mode, the folders that interrupted writes left behind, one for each operation, and a finished one."""
    with TemporaryDirectory(dir=MEMORY) as place:
        jobs: dict[tuple[str, str], tuple[str, str, int, int, str]] = {}
        for case, mode in product(CASES, MODES):
            base, tries = Path(place) / case / mode / "base", Path(place) / case / mode / "tries"
            base.mkdir(parents=True)
            tries.mkdir()
            CASES[case].prepare(base)
            jobs[case, mode] = (str(base), str(tries), CASES[case].round, CASES[case].keep, mode)
        command = [sys.executable, "-c", FORKS, json.dumps(list(jobs.values()))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for (case, mode), line in zip(jobs, done.stdout.splitlines(), strict=True):
            codes = json.loads(line)
            assert len(codes) > 10, "there are several operations, and each was interrupted"
            assert codes == [MODES[mode]] * (len(codes) - 1) + [0], f"{case}, {mode}: {done.stderr}"
        yield {job: sorted(Path(tries).iterdir()) for job, (_, tries, *_) in jobs.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_an_interruption_leaves_the_old_one_or_the_new_one(
    interrupted: Mapping[tuple[str, str], list[Path]], case: str, mode: str
) -> None:
    round, committed = CASES[case].round, False
    for folder in interrupted[case, mode]:
        readable = [(each, value_of(folder, each)) for each in list_checkpoints(folder)]  # what is listed is whole
        newest = readable[-1:]
        assert newest == [(round, 100)] or (not committed and newest == CASES[case].old), folder.name
        committed = newest == [(round, 100)]
        if mode == "full":
            assert not [name for name in names(folder) if name.endswith(".unfinished")], "it takes no space any longer"
        # And the next one to write there finds its way, and leaves nothing lying about.
        write_checkpoint(folder, round, state(100), CASES[case].keep)
        assert names(folder) == [f"{each:06d}" for each in CASES[case].left]
        assert value_of(folder, round) == 100
    assert committed


def test_a_full_disk_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"disk is full; free.*before is intact") as caught, storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "no space left on device")
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_place_that_cannot_be_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of that path is a file; choose another folder"):
        write_checkpoint(tmp_path / "file" / "checkpoints", 1, state(1), keep=1)


def test_what_is_not_the_disk_s_fault_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="an odd one"), storage_errors(tmp_path):
        raise OSError(errno.ECHILD, "an odd one")


@pytest.fixture
def folder(memory: Path) -> Path:
    """Checkpoints of the rounds 10 and 20."""
    for round in (10, 20):
        write_checkpoint(memory, round, state(round), keep=9)
    return memory


@pytest.mark.parametrize("file", ["0000.npy", "0001.npy", "0002.npy", "manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("left", ["half", "nothing", "missing"])
def test_a_cut_file_is_refused_and_the_older_one_is_named(folder: Path, file: str, left: str) -> None:
    path = folder / "000020" / file
    held = path.read_bytes()
    if left == "missing":
        path.unlink()
    else:
        path.write_bytes(held[: len(held) // 2] if left == "half" else b"")
    with pytest.raises(CheckpointError, match=r"000020.*Continue from the one before it with --from 10\."):
        read_checkpoint(folder, 20)
    assert value_of(folder, 10) == 10


def test_without_an_older_one_it_says_so(folder: Path) -> None:
    (folder / "000010" / "0000.npy").unlink()
    with pytest.raises(CheckpointError, match="There is no older one here: start the run again"):
        read_checkpoint(folder, 10)


def test_a_round_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"000015.*--from 10"):
        read_checkpoint(folder, 15)


@law
@given(st.data())
def test_no_altered_byte_goes_unnoticed(data: st.DataObject) -> None:
    with TemporaryDirectory(dir=MEMORY) as place:
        write_checkpoint(Path(place), 1, state(1), keep=1)
        path = data.draw(st.sampled_from(sorted((Path(place) / "000001").glob("*.npy"))))
        held = bytearray(path.read_bytes())
        held[data.draw(st.integers(0, len(held) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(held)
        with pytest.raises(CheckpointError, match=f"is damaged: {path.name}"):
            read_checkpoint(Path(place), 1)


@law
@given(st.data())
def test_no_altered_byte_of_the_manifest_goes_unnoticed(data: st.DataObject) -> None:
    with TemporaryDirectory(dir=MEMORY) as place:
        write_checkpoint(Path(place), 1, state(1), keep=1)
        path = Path(place) / "000001" / data.draw(st.sampled_from(["manifest.json", "manifest.sha256"]))
        held = bytearray(path.read_bytes())
        held[data.draw(st.integers(0, len(held) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(held)
        with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json is not the one that manifest\.sha256"):
            read_checkpoint(Path(place), 1)


def test_a_manifest_cut_anywhere_is_refused(folder: Path) -> None:
    manifest = folder / "000020" / "manifest.json"
    whole = manifest.read_text()
    for length in range(0, len(whole), 7):
        manifest.write_text(whole[:length])
        with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json .*--from 10"):
            read_checkpoint(folder, 20)


@pytest.mark.parametrize(
    "content",
    [
        None,
        7,
        [],
        {},
        {"format": 2},
        {"format": 1, "arrays": []},
        {"format": 2, "arrays": [], "attachments": {}},
        {"format": 2, "arrays": {}},
        {"format": 2, "arrays": {}, "attachments": {"shards": 7}},
        {"format": 2, "arrays": {"w": 7}, "attachments": {}},
        {"format": 2, "arrays": {"w": {"file": "0000.npy"}}, "attachments": {}},
        {"format": 2, "arrays": {"w": {"file": "0000.npy", "bytes": "many", "sha256": ""}}, "attachments": {}},
        {"format": 2, "arrays": {"w": {"file": 7, "bytes": 7, "sha256": ""}}, "attachments": {}},
    ],
    ids=json.dumps,
)
def test_a_manifest_that_says_something_else_is_refused(folder: Path, content: Any) -> None:
    write_manifest(folder / "000020", content)
    with pytest.raises(CheckpointError, match=r"has no readable manifest\.json"):
        read_checkpoint(folder, 20)


def test_another_format_names_the_way_to_read_it(folder: Path) -> None:
    write_manifest(folder / "000020", {"format": 9, "contents": "of the future"})
    with pytest.raises(
        CheckpointError, match="has format 9, and this fedtower reads 2; use the fedtower that wrote it"
    ):
        read_checkpoint(folder, 20)


def test_a_checkpoint_from_before_manifests_were_sealed_is_read(folder: Path) -> None:
    place = folder / "000020"
    manifest = json.loads((place / "manifest.json").read_text())
    del manifest["attachments"]
    (place / "manifest.sha256").unlink()
    (place / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert value_of(folder, 20) == 20


def test_a_manifest_without_its_seal_is_refused(folder: Path) -> None:
    (folder / "000020" / "manifest.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.sha256 is missing\. Continue.*--from 10"):
        read_checkpoint(folder, 20)


@pytest.fixture
def shards(memory: Path) -> Path:
    """Checkpoints of the rounds 10 and 20 with an attachment."""
    for round in (10, 20):
        write_checkpoint(memory, round, state(round), keep=9, attachments=attached(round))
    return memory


def test_an_attachment_comes_back_file_by_file(shards: Path) -> None:
    for round in (10, 20):
        place = attachment(shards, round, "shards")
        assert read_attachments(shards, round) == {"shards": place}
        assert [(place / file).read_text() for file in ("first", "inner/second")] == [str(round)] * 2


def test_an_attachment_that_writes_nothing_is_there_and_empty(memory: Path) -> None:
    write_checkpoint(memory, 1, {}, keep=1, attachments={"nothing": lambda place: None})
    assert list(attachment(memory, 1, "nothing").iterdir()) == []


def test_an_attachment_that_is_not_there_is_refused(shards: Path) -> None:
    with pytest.raises(CheckpointError, match="000020 holds no 'clients': it was written by a run with other parts"):
        attachment(shards, 20, "clients")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/"])
def test_an_attachment_stays_in_a_folder_of_its_own(memory: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is the name of its folder"):
        write_checkpoint(memory, 1, {}, keep=1, attachments={name: lambda place: None})
    assert list_checkpoints(memory) == []


@pytest.mark.parametrize("file", ["first", "inner/second"])
@pytest.mark.parametrize("left", ["half", "other", "missing"])
def test_a_damaged_attachment_is_refused_and_the_older_one_is_named(shards: Path, file: str, left: str) -> None:
    path = shards / "000020" / "attachments" / "shards" / file
    path.unlink() if left == "missing" else path.write_text("2" if left == "half" else "99")
    with pytest.raises(CheckpointError, match=rf"is damaged: {path.name} \(shards\).*--from 10\."):
        attachment(shards, 20, "shards")
    assert value_of(shards, 10) == 10


def test_a_file_that_was_added_to_an_attachment_is_refused(shards: Path) -> None:
    (shards / "000020" / "attachments" / "shards" / "inner" / "third").write_text("20")
    with pytest.raises(CheckpointError, match=r"third is not one of the files it was written with.*--from 10"):
        attachment(shards, 20, "shards")


def test_an_attachment_that_fails_leaves_the_old_one_and_takes_no_space(shards: Path) -> None:
    def fails(place: Path) -> None:
        (place / "first").write_text("30")
        raise RuntimeError("a shard is not there")

    with pytest.raises(RuntimeError, match="a shard is not there"):
        write_checkpoint(shards, 30, state(30), keep=1, attachments={"shards": fails})
    assert names(shards) == ["000010", "000020"]


def linked(place: Path) -> None:
    """Both files, as links to those of the newest checkpoint there is."""
    newest = earlier_attachments(place)[0]
    (place / "inner").mkdir()
    for file in ("first", "inner/second"):
        (place / file).hardlink_to(newest / file)


def test_a_file_can_be_linked_from_the_checkpoint_before_which_may_then_go(shards: Path) -> None:
    write_checkpoint(shards, 30, state(20), keep=1, attachments={"shards": linked})
    assert names(shards) == ["000030"]
    assert value_of(shards, 30) == 20


def test_a_link_to_a_damaged_file_is_not_taken_for_its_content(shards: Path) -> None:
    path = shards / "000020" / "attachments" / "shards" / "first"
    with path.open("r+") as stream:
        stream.write("99")
    write_checkpoint(shards, 30, state(20), keep=9, attachments={"shards": linked})
    with pytest.raises(CheckpointError, match=r"is damaged: first \(shards\)"):
        attachment(shards, 30, "shards")


def test_groups_are_taken_apart_by_their_prefix() -> None:
    numbers = {name: np.asarray(place) for place, name in zip(count(), ("a/x", "a/b/y", "ab/z", "b/a/x"))}
    assert {name: int(value) for name, value in grouped(numbers, "a").items()} == {"x": 0, "b/y": 1}
