"""The MNIST data set: images and labels, and how they are shared among clients.

LeCun et al., 1998, https://doi.org/10.1109/5.726791; the partitions are those of McMahan et al., 2017,
https://arxiv.org/abs/1602.05629, section 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.plugins.datasets.mnist.idx import read
from fedtower.recsys.archive import cache_folder
from fedtower.recsys.examples import ExampleCard, Examples, ExampleTable
from fedtower.recsys.layout import find_file

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

CLASSES = 10


@dataclass(frozen=True)
class MNIST:
    """Images from 0 to 1, shared evenly. ``iid``: shuffled; ``shards``: sorted by label and cut into shards, of which
    every client gets ``shards_per_client``, so that it sees few digits.
    """

    path: Path | None = field(
        default=None,
        metadata={"help": "the folder of the four files; else $FEDTOWER_DATA/mnist, else the user's cache"},
    )
    partition: Literal["iid", "shards"] = field(default="iid", metadata={"help": "how the images are shared out"})
    clients: int = field(default=100, metadata={"help": "how many clients share the training images"})
    shards_per_client: int = field(default=2, metadata={"help": "shards: how many each client gets"})
    validation_images: int = field(
        default=0, metadata={"help": "training images that no client gets, drawn at random, to tune on"}
    )
    curve: Literal["validation", "test"] = field(
        default="validation",
        metadata={"help": "the images of the looks on the way; test: as papers count rounds, and to tune nothing by"},
    )

    def __post_init__(self) -> None:
        for name, least in (("clients", 1), ("shards_per_client", 1), ("validation_images", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"data.{name} must be at least {least}, but is {getattr(self, name)}")
        if self.curve == "test" and self.validation_images:
            raise RecipeError(
                f'data.curve = "test" leaves data.validation_images = {self.validation_images} unused; set that to 0, '
                f"or leave data.curve out"
            )

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> ExampleTable:
        """The images of the clients, and the test images."""
        folder = self.folder()
        progress(f"reading MNIST from {folder}")
        images, labels = _pair(folder, "train")
        test = _everybody(*_pair(folder, "t10k"))
        drawn = draws.permutation(len(images), "mnist validation")
        held, kept = np.sort(drawn[: self.validation_images]), np.sort(drawn[self.validation_images :])
        owners, order = self._shared_out(labels[kept], draws)
        mine = kept[order]
        looked_at = test if self.curve == "test" else _everybody(images[held], labels[held])
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=self.clients))]).astype(np.int64)
        numbers = np.arange(self.clients, dtype=np.int64)
        training = Examples(numbers, offsets, images[mine], _no_categories(len(mine)), labels[mine])
        return ExampleTable(
            card=self._card(training, len(looked_at.labels), len(test.labels)),
            training=training,
            validation=looked_at,
            test=test,
            num_classes=CLASSES,
        )

    def folder(self) -> Path:
        """The folder with the files.

        Raises:
            DataError: it is nowhere; the message says where it was looked for.
        """
        if self.path is not None:
            folder = self.path.expanduser()
            if folder.is_dir():
                return folder
            raise DataError(f"data.path = {str(self.path)!r} is not a folder; expected the four files of MNIST there")
        root = os.environ.get("FEDTOWER_DATA")
        places = [*([Path(root) / "mnist"] if root else []), cache_folder() / "mnist"]
        for place in places:
            if place.is_dir():
                return place
        raise DataError(
            f"MNIST is not on this machine: looked for {' and '.join(map(str, places))}. Put its four files "
            f"(train-images-idx3-ubyte and so on, plain or .gz) there, or set FEDTOWER_DATA to the folder that holds "
            f"mnist/, or data.path to mnist itself"
        )

    def _shared_out(self, labels: FloatArray, draws: Draws) -> tuple[IntArray, IntArray]:
        """Whose each image is, (E,), clients in order, and which image that is, (E,)."""
        count = len(labels)
        pieces = self.clients * (self.shards_per_client if self.partition == "shards" else 1)
        if pieces > count:
            raise DataError(
                f"{count:,} training images cannot be cut into {pieces:,} parts; set fewer data.clients, or fewer "
                f"data.validation_images"
            )
        piece = np.arange(count, dtype=np.int64) * pieces // count
        order = draws.permutation(count, "mnist images")
        if self.partition == "iid":
            return piece, order
        by_label = order[np.argsort(labels[order], kind="stable")]
        owner = draws.permutation(pieces, "mnist shards")[piece] % self.clients
        by_owner = np.argsort(owner, kind="stable")
        return owner[by_owner], by_label[by_owner]

    def _card(self, training: Examples, validation: int, test: int) -> ExampleCard:
        shared = "at random" if self.partition == "iid" else f"{self.shards_per_client} shards of one digit or two each"
        return ExampleCard(
            name="MNIST",
            clients=self.clients,
            training=len(training.labels),
            validation=validation,
            test=test,
            extra={
                "clients": f"{training.lengths.min()} to {training.lengths.max()} images each, {shared}",
                **({"curve": "of the test images: nothing may be tuned by it"} if self.curve == "test" else {}),
                "images": f"{' x '.join(map(str, training.dense.shape[1:]))}, from 0 to 1; {CLASSES} digits",
                "source": "LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/",
                "licence": "commonly stated as CC BY-SA 3.0",
            },
        )


def _pair(folder: Path, name: str) -> tuple[FloatArray, FloatArray]:
    """Images from 0 to 1, ``(E, H, W)``, and their labels, ``(E,)``."""
    images, labels = (
        read(_file(folder, f"{name}-{part}-ubyte"), dimensions)
        for part, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{folder} has {len(images):,} images of {name}, and {len(labels):,} labels; expected as many, and some"
        )
    if labels.max() >= CLASSES:
        at = int(np.argmax(labels >= CLASSES))
        raise DataError(f"{folder}, the label of image {at} of {name}: expected 0 to {CLASSES - 1}, got {labels[at]}")
    return images.astype(np.float32) / np.float32(255), labels.astype(np.float32)


def _file(folder: Path, name: str) -> Path:
    path = find_file(folder, [name])
    if path is None:
        there = sorted(entry.name for entry in folder.iterdir())[:12]
        raise DataError(f"{folder} has no {name} or {name}.gz; it has {', '.join(there) or 'nothing'}")
    return path


def _everybody(images: FloatArray, labels: FloatArray) -> Examples:
    """Examples that belong to nobody who trains."""
    ends = np.array([0, len(labels)], dtype=np.int64)
    return Examples(np.zeros(1, dtype=np.int64), ends, images, _no_categories(len(labels)), labels)


def _no_categories(count: int) -> IntArray:
    return np.zeros((count, 0), dtype=np.int64)
