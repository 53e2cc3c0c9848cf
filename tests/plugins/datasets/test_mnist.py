"""MNIST's files: what is read from them, how they are shared out, and what a broken one is told."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.plugins.datasets.mnist.dataset import MNIST
from fedtower.plugins.datasets.mnist.example import write
from fedtower.recsys.examples import ExampleTable
from fedtower.recsys.testing.dataset import DatasetPromises

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def load(seed: int = 1, **settings: Any) -> ExampleTable:
    return MNIST(**settings).load(draws=Draws(seed), progress=lambda message: None)


@pytest.fixture
def example(tmp_path: Path) -> dict[str, Any]:
    """Settings for made-up files of 240 and 60 images."""
    return write(tmp_path) | {"path": tmp_path}


class TestMNIST(DatasetPromises):
    @pytest.fixture(autouse=True)
    def _made(self, example: dict[str, Any]) -> None:
        self.settings = example

    def made(self) -> MNIST:
        return MNIST(**self.settings)


class TestMNISTInShards(TestMNIST):
    def made(self) -> MNIST:
        return MNIST(**self.settings, partition="shards")


def numbered(folder: Path) -> None:
    """Give each training image its number as its first two pixels."""
    head, body = (folder / IMAGES).read_bytes()[:16], bytearray((folder / IMAGES).read_bytes()[16:])
    for number in range(240):
        body[number * 196 : number * 196 + 2] = bytes(divmod(number, 256))
    (folder / IMAGES).write_bytes(head + bytes(body))


def numbers(images: NDArray[np.float32]) -> list[int]:
    pixels = np.rint(images[:, 0, :2] * 255).astype(int)
    return [int(number) for number in pixels[:, 0] * 256 + pixels[:, 1]]


@pytest.mark.parametrize("partition", ["iid", "shards"])
def test_every_image_belongs_to_one_client_or_is_held_out(example: dict[str, Any], partition: str) -> None:
    numbered(example["path"])
    data = load(**example, partition=partition)
    own = numbers(data.training.dense) + numbers(data.validation.dense)
    assert sorted(own) == list(range(240))
    assert len(data.validation.labels) == 30
    labels = np.frombuffer((example["path"] / LABELS).read_bytes()[8:], dtype=np.uint8)
    np.testing.assert_array_equal(np.concatenate([data.training.labels, data.validation.labels]), labels[own])
    assert set(data.training.lengths.tolist()) <= {17, 18}
    assert data.training.dense.max() <= 1.0


def test_shards_show_a_client_few_digits(example: dict[str, Any]) -> None:
    example["validation_images"] = 0
    mixed, apart = (load(**example, partition=partition).training for partition in ("iid", "shards"))
    assert max(len(set(labels)) for labels in _by_client(apart)) <= 4  # two shards of at most two digits
    assert min(len(set(labels)) for labels in _by_client(mixed)) >= 5
    (one,) = {len(labels) for labels in _by_client(apart)}
    assert one == 20


def _by_client(held: Any) -> list[list[float]]:
    return [held.labels[start:stop].tolist() for start, stop in zip(held.offsets[:-1], held.offsets[1:], strict=True)]


def test_the_seed_decides_who_gets_what(example: dict[str, Any]) -> None:
    for partition in ("iid", "shards"):
        first = load(**example, partition=partition).training.dense
        assert np.array_equal(first, load(**example, partition=partition).training.dense)
        assert not np.array_equal(first, load(2, **example, partition=partition).training.dense)


def test_the_curve_can_be_of_the_test_images_and_then_nothing_is_held_out(example: dict[str, Any]) -> None:
    held = load(**example | {"validation_images": 0, "curve": "test"})
    np.testing.assert_array_equal(held.validation.dense, held.test.dense)
    assert (len(held.training.labels), held.card.validation, held.card.test) == (240, 60, 60)
    assert "nothing may be tuned by it" in held.card.extra["curve"]
    assert len(load(**example | {"validation_images": 0}).validation.labels) == 0
    with pytest.raises(RecipeError, match=r"leaves data.validation_images = 30 unused"):
        load(**example, curve="test")


def test_packed_files_are_the_same_data(example: dict[str, Any]) -> None:
    plain = load(**example)
    for path in list(example["path"].iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(load(**example).training.dense, plain.training.dense)


def _shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _headless(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:7])


def _huge(path: Path) -> None:
    path.write_bytes(struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1))


def _labels(path: Path) -> None:
    path.write_bytes((path.parent / LABELS).read_bytes() + bytes(20))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_shorter, "expected 47,040 bytes after the head, as its sizes 240 x 14 x 14 say, got 47,039"),
        (_longer, "got more"),
        (_headless, "has 7 bytes; expected at least the 16 of its head"),
        (_huge, "got 0; fetch"),
        (_labels, "expected the magic number 2051 .*, got 2049"),
    ],
)
def test_a_broken_file_is_named(example: dict[str, Any], spoil: Callable[[Path], None], message: str) -> None:
    spoil(example["path"] / IMAGES)
    with pytest.raises(DataError, match=f"{IMAGES}.*{message}"):
        load(**example)


def test_labels_that_do_not_fit_are_refused(example: dict[str, Any]) -> None:
    path = example["path"] / LABELS
    content = bytearray(path.read_bytes())
    content[8 + 17] = 10
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="label of image 17 of train: expected 0 to 9, got 10"):
        load(**example)
    path.write_bytes(struct.pack(">2I", 0x0801, 3) + bytes(3))
    with pytest.raises(DataError, match="240 images of train, and 3 labels"):
        load(**example)


def test_files_that_are_not_there_are_named(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example["path"] / LABELS).unlink()
    with pytest.raises(DataError, match=f"has no {LABELS} or {LABELS}.gz; it has t10k"):
        load(**example)
    with pytest.raises(DataError, match="is not a folder"):
        load(path=tmp_path / "nothing")
    monkeypatch.setenv("FEDTOWER_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"MNIST is not on this machine.* set FEDTOWER_DATA to the folder that holds"):
        load()


def test_more_clients_than_images_are_refused(example: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot be cut into 500 parts"):
        load(**example | {"clients": 500})
    with pytest.raises(DataError, match="validation"):
        load(**example | {"validation_images": 240})


@pytest.mark.parametrize("settings", [{"clients": 0}, {"shards_per_client": 0}, {"validation_images": -1}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"data\."):
        MNIST(**settings)


def test_the_real_files_are_a_hundred_clients_of_600(shared_data: Path) -> None:
    data = load(path=shared_data / "mnist")
    assert data.training.lengths.tolist() == [600] * 100
    assert data.dense_shape == (28, 28)
    assert len(data.test.labels) == 10_000
    shards = load(path=shared_data / "mnist", partition="shards")
    assert sorted({len(set(labels)) for labels in _by_client(shards.training)})[-1] <= 4
    assert np.mean([len(set(labels)) for labels in _by_client(shards.training)]) < 2.5
