"""Editions of MovieLens: where each is published, under which licence, and how its files are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedtower.core.errors import DataError
from fedtower.recsys.archive import Archive
from fedtower.recsys.interactions import read_table
from fedtower.recsys.layout import Column, Layout, find_file

SITE = "https://files.grouplens.org/datasets/movielens"

_BY = "Acknowledge GroupLens in publications; imply no endorsement by the University of Minnesota or GroupLens; "
_NOT_COMMERCIAL = (
    "do not use it for any commercial or revenue-bearing purpose without first obtaining permission from GroupLens. "
    "Nobody guarantees that it is correct or fit for a purpose."
)
_RESEARCH_ONLY = f"For research. {_BY}do not redistribute the data without separate permission; {_NOT_COMMERCIAL}"
_SHARE_ALIKE = f"{_BY}redistribute the data only under these same conditions; {_NOT_COMMERCIAL}"
_GENRES_100K = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
# The age groups of 1M, by their lower ends; 100K's ages are put into the same.
_AGES = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56 or more"}

_USER, _MOVIE = Column("user", "integer", 0), Column("item", "integer", 0)
_STARS, _HALF_STARS = Column("rating", "integer", 1, 5), Column("rating", "number", 0.5, 5)
_TIME = Column("time", "integer", 0)

_RATINGS_100K = Layout((_USER, _MOVIE, _STARS, _TIME), separator="\t")
_ITEMS_100K = Layout(
    (
        *(
            _MOVIE,
            Column("title"),
            Column("released", empty=True),
            Column("video", empty=True),
            Column("url", empty=True),
        ),
        *(Column(genre, "integer", 0, 1) for genre in _GENRES_100K),
    ),
    separator="|",
    encoding="latin-1",
)
_USERS_100K = Layout(
    (_USER, Column("age", "integer", 0, 150), Column("gender"), Column("occupation"), Column("zip", empty=True)),
    separator="|",
    encoding="latin-1",
)
_RATINGS_1M = Layout((_USER, _MOVIE, _STARS, _TIME), separator="::")
_ITEMS_1M = Layout((_MOVIE, Column("title"), Column("genres", empty=True)), separator="::", encoding="latin-1")
_USERS_1M = Layout(
    (_USER, Column("gender"), Column("age", "integer", 0, 150), Column("occupation"), Column("zip", empty=True)),
    separator="::",
    encoding="latin-1",
)
_RATINGS_CSV = Layout(
    (
        *(Column("userId", "integer", 0), Column("movieId", "integer", 0)),
        *(Column("rating", "number", 0.5, 5), Column("timestamp", "integer", 0)),
    ),
    header=True,
    quoted=True,
)
_ITEMS_CSV = Layout(
    (Column("movieId", "integer", 0), Column("title"), Column("genres", empty=True)), header=True, quoted=True
)


@dataclass(frozen=True, eq=False)
class Files:
    """What the files of an edition say: frames of ratings (user, item, rating, time), users and items."""

    ratings: pd.DataFrame
    users: pd.DataFrame | None
    items: pd.DataFrame


@dataclass(frozen=True)
class Edition:
    """One edition: its archive, its reader, and how many ratings and users it was published with, if that is fixed."""

    title: str
    archive: Archive
    read: Callable[[Path], Files]
    ratings_file: str
    num_ratings: int | None = None
    num_users: int | None = None

    @property
    def terms(self) -> str:
        """The licence in a line."""
        free = self.archive.licence == _SHARE_ALIKE
        use = "redistribution under the same conditions" if free else "research use, no redistribution"
        return f"{use}, no commercial use without permission; {self.archive.licence_url}"

    @property
    def page(self) -> str:
        """The page that describes it."""
        return f"https://grouplens.org/datasets/movielens/{self.archive.folder.removeprefix('ml-').split('-')[0]}/"


def _read_100k(folder: Path) -> Files:
    ratings = read_table(_file(folder, "u.data"), _RATINGS_100K)
    items = read_table(_file(folder, "u.item"), _ITEMS_100K)
    users = read_table(_file(folder, "u.user"), _USERS_100K)
    flags = items[list(_GENRES_100K)].to_numpy(bool)
    items["genres"] = ["|".join(genre for genre, on in zip(_GENRES_100K, row, strict=True) if on) for row in flags]
    return Files(ratings, _user_features(users), _item_features(items))


def _read_1m(folder: Path) -> Files:
    ratings = read_table(_file(folder, "ratings.dat"), _RATINGS_1M)
    items = read_table(_file(folder, "movies.dat"), _ITEMS_1M)
    users = read_table(_file(folder, "users.dat"), _USERS_1M)
    return Files(ratings, _user_features(users), _item_features(items))


def _read_csv(folder: Path) -> Files:
    ratings = read_table(_file(folder, "ratings.csv"), _RATINGS_CSV)
    items = read_table(_file(folder, "movies.csv"), _ITEMS_CSV)
    ratings.columns = pd.Index(["user", "item", "rating", "time"])
    items = items.rename(columns={"movieId": "item"})
    items["genres"] = items["genres"].replace("(no genres listed)", "")
    return Files(ratings, None, _item_features(items))


def _user_features(users: pd.DataFrame) -> pd.DataFrame:
    lower_ends = sorted(_AGES)
    bins = pd.cut(users["age"], [*lower_ends, 1_000], right=False, labels=[_AGES[age] for age in lower_ends])
    features = pd.DataFrame({"gender": users["gender"], "age": bins.astype("str"), "occupation": users["occupation"]})
    return features.set_index(users["user"])


def _item_features(items: pd.DataFrame) -> pd.DataFrame:
    """Genres and the decade of release, which every edition has at the end of the title."""
    decade = items["title"].str.extract(r"\((\d{3})\d\)\s*$", expand=False)
    features = pd.DataFrame({"title": items["title"], "genres": items["genres"], "decade": (decade + "0s").fillna("")})
    return features.set_index(items["item"])


def _file(folder: Path, name: str) -> Path:
    path = find_file(folder, [name])
    if path is None:
        there = sorted(entry.name for entry in folder.iterdir())[:12]
        raise DataError(
            f"{folder} has no {name} or {name}.gz, which this edition of MovieLens comes with; it has "
            f"{', '.join(there) or 'nothing'}; is data.version the right one?"
        )
    return path


def _archive(folder: str, licence: str, readme: str, md5: str | None = None) -> Archive:
    return Archive(f"{folder}.zip", folder, SITE, licence, f"{SITE}/{folder}-README.{readme}", md5)


# Checksums: the .md5 files that GroupLens publishes beside the archives.
EDITIONS = {
    "100k": Edition(
        "MovieLens 100K",
        _archive("ml-100k", _RESEARCH_ONLY, "txt", md5="0e33842e24a9c977be4e0107933c0723"),
        _read_100k,
        "u.data",
        100_000,
        943,
    ),
    "1m": Edition(
        "MovieLens 1M",
        _archive("ml-1m", _RESEARCH_ONLY, "txt", md5="c4d9eecfca2ab87c1945afe126590906"),
        _read_1m,
        "ratings.dat",
        1_000_209,
        6_040,
    ),
    "latest-small": Edition(
        "MovieLens latest-small",
        _archive("ml-latest-small", _SHARE_ALIKE, "html"),
        _read_csv,
        "ratings.csv",
    ),
    "25m": Edition(
        "MovieLens 25M",
        _archive("ml-25m", _SHARE_ALIKE, "html", md5="6b51fb2759a8657d3bfcbfc42b592ada"),
        _read_csv,
        "ratings.csv",
        25_000_095,
        162_541,
    ),
}
