"""The MovieLens data set: its settings, where its files are looked for, and what is made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.plugins.datasets.movielens.editions import EDITIONS, Edition
from fedtower.plugins.datasets.movielens.ncf import read_split
from fedtower.recsys.archive import Archive, cache_folder
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.interactions import Interactions

# The first rating of all is of 1995 (Unix time 789,652,009): a smaller fourth field counts ratings, not seconds.
_LARGEST_RANK = 100_000_000


@dataclass(frozen=True)
class MovieLens:
    """One edition of MovieLens; every rating is an event, and only movies that somebody rated are items."""

    version: Literal["100k", "1m", "latest-small", "25m"] = field(default="100k", metadata={"help": "which edition"})
    path: Path | None = field(
        default=None,
        metadata={"help": "the folder of its files; else $FEDTOWER_DATA/ml-<version>, else where `data fetch` puts it"},
    )
    complete: bool = field(
        default=True, metadata={"help": "refuse files without the published number of ratings and users"}
    )

    @property
    def archive(self) -> Archive:
        """Where the files are published, and under which licence."""
        return self._edition.archive

    def load(self, *, draws: Draws, progress: Callable[[str], None]) -> EventTable:
        """The population. Ratings count as events alike; ties in time keep the order of the file."""
        folder = self.folder()
        progress(f"reading {self._edition.title} from {folder}")
        files = self._edition.read(folder)
        if self.complete:
            self._check_counts(folder, len(files.ratings), files.ratings["user"].nunique())
        extra = {"source": f"GroupLens, {self._edition.page}", "licence": self._edition.terms}
        split = read_split(folder, files.ratings) if self.version == "1m" else None
        if split is not None:
            extra["given split"] = (
                f"NCF: {len(split.users):,} test items with {split.negatives.shape[1]} negatives each"
            )
        return Interactions(
            self._edition.title,
            files.ratings if split is None else split.apply(files.ratings),
            users=files.users,
            items=files.items,
            times_are_ranks=bool(files.ratings["time"].max() < _LARGEST_RANK),
            extra=extra,
        ).to_table(None if split is None else split.held_out)

    def folder(self) -> Path:
        """The folder with the files.

        Raises:
            DataError: it is nowhere; the message says how to get it.
        """
        name = self._edition.archive.folder
        if self.path is not None:
            folder = self.path.expanduser()
            if folder.is_dir():
                return folder
            raise DataError(f"data.path = {str(self.path)!r} is not a folder; expected the files of {name} there")
        root = os.environ.get("FEDTOWER_DATA")
        places = [*([Path(root) / name] if root else []), cache_folder() / name]
        for place in places:
            if place.is_dir():
                return place
        raise DataError(
            f"{self._edition.title} is not on this machine: looked for {' and '.join(map(str, places))}. Set "
            f"FEDTOWER_DATA to the folder that holds {name}/, or data.path to {name} itself, or download it: "
            f"`fedtower data fetch movielens --version {self.version} --accept-licence`"
        )

    @property
    def _edition(self) -> Edition:
        return EDITIONS[self.version]

    def _check_counts(self, folder: Path, ratings: int, users: int) -> None:
        for noun, got, published in (
            ("ratings", ratings, self._edition.num_ratings),
            ("users", users, self._edition.num_users),
        ):
            if published is not None and got != published:
                raise DataError(
                    f"{folder / self._edition.ratings_file} has {got:,} {noun}, but {self._edition.title} came out "
                    f"with {published:,}: the file is cut or was changed; fetch it again, or set data.complete = false "
                    "to use what is there"
                )
