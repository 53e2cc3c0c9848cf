"""The cache of exported graphs keeps within its size, and takes from nobody what he uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtower.recsys.bundle import Bundle
from fedtower.recsys.engine import own_path
from fedtower.recsys.graph_cache import GraphCache
from fedtower.recsys.testing.exporter import exported


@pytest.fixture
def whole() -> Path:
    return exported("clicks").path


@pytest.fixture
def cache(tmp_path: Path, whole: Path) -> GraphCache:
    """A cache with room for two entries."""
    (tmp_path / "graphs").mkdir()
    return GraphCache(tmp_path / "graphs", most_bytes=2 * size_of(whole))


def size_of(place: Path) -> int:
    return sum(path.stat().st_size for path in place.iterdir())


def put(cache: GraphCache, whole: Path, key: str) -> Bundle:
    return cache.keep(Path(shutil.copytree(whole, cache.folder / f".{key}-made")), key)


def keys(cache: GraphCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_what_was_kept_is_found_and_nothing_else(cache: GraphCache, whole: Path) -> None:
    assert cache.find("one") is None
    put(cache, whole, "one")
    found = cache.find("one")
    assert found is not None
    assert found.manifest == Bundle.open(whole).manifest
    assert cache.find("two") is None


def test_the_least_recently_used_goes_first(cache: GraphCache, whole: Path) -> None:
    put(cache, whole, "one")
    put(cache, whole, "two")
    assert keys(cache) == ["one", "two"]
    assert cache.find("one") is not None  # used again, and given back
    put(cache, whole, "three")
    assert keys(cache) == ["one", "three"]


def test_what_somebody_refers_to_stays_and_goes_when_nobody_does(cache: GraphCache, whole: Path) -> None:
    held = put(cache, whole, "one")
    for key in ("two", "three", "four"):
        put(cache, whole, key)
    assert keys(cache) == ["four", "one"]
    assert held.read("train.onnx")
    del held
    put(cache, whole, "five")
    assert keys(cache) == ["five", "four"]


def test_the_one_that_is_kept_stays_however_little_room_there_is(cache: GraphCache, whole: Path) -> None:
    small = GraphCache(cache.folder, most_bytes=0)
    assert put(small, whole, "one").read("train.onnx")
    assert keys(cache) == ["one"]


def test_what_another_process_uses_stays_until_it_ends(cache: GraphCache, whole: Path) -> None:
    put(cache, whole, "one")
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(cache.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": own_path()},
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"it is mine\n"
        GraphCache(cache.folder, most_bytes=0).prune()
        assert keys(cache) == ["one"]
        user.kill()
    GraphCache(cache.folder, most_bytes=0).prune()
    assert keys(cache) == []


USER = """
import sys
from pathlib import Path
from fedtower.recsys.graph_cache import GraphCache
held = GraphCache(Path(sys.argv[1])).find("one")
print("it is mine", flush=True)
sys.stdin.read()
"""


def test_a_damaged_entry_is_removed_and_another_takes_its_place(cache: GraphCache, whole: Path) -> None:
    put(cache, whole, "one")
    (cache.folder / "one" / "train.onnx").write_bytes(b"")
    assert cache.find("one") is None
    assert keys(cache) == []
    assert put(cache, whole, "one").read("train.onnx")


def test_who_comes_second_with_the_same_gets_the_first_ones(cache: GraphCache, whole: Path) -> None:
    first = put(cache, whole, "one")
    second = put(cache, whole, "one")
    assert second.path == first.path == cache.folder / "one"


def test_what_a_kill_left_goes_after_a_day(cache: GraphCache, whole: Path) -> None:
    for name, age in ((".old-made", 90_000.0), (".new-made", 60.0)):
        place = Path(shutil.copytree(whole, cache.folder / name))
        os.utime(place, (time.time() - age, time.time() - age))
    cache.prune()
    assert keys(cache) == [".new-made"]


def test_processes_at_once_find_whole_entries_or_none(cache: GraphCache, whole: Path) -> None:
    command = [sys.executable, "-c", MANY, str(cache.folder), str(whole), str(size_of(whole))]
    environment = {**os.environ, "PYTHONPATH": own_path()}
    users = [
        subprocess.Popen([*command, str(seed)], stderr=subprocess.PIPE, env=environment, text=True) for seed in range(3)
    ]
    said = [(user.communicate(timeout=120)[1], user.returncode) for user in users]
    for errors, code in said:
        assert (errors, code) == ("", 0)
    GraphCache(cache.folder, most_bytes=size_of(whole)).prune()
    assert len(keys(cache)) == 1


# Three keys, room for one entry: each process finds or makes entries, and looks at them as an engine does, by path.
MANY = """
import shutil, sys
from pathlib import Path
from fedtower.recsys.bundle import Bundle
from fedtower.recsys.graph_cache import GraphCache
folder, whole, size, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cache = GraphCache(folder, most_bytes=size)
for turn in range(60):
    key = "abc"[(turn * (seed + 1)) % 3]
    held = cache.find(key)
    if held is None:
        made = Path(shutil.copytree(whole, folder / f".{key}-{seed}-{turn}"))
        held = cache.keep(made, key)
        shutil.rmtree(made, ignore_errors=True)
    for name in held.manifest.files:
        held.read(name)
"""
