"""A made-up folder in the layout of MovieLens 1M, with a split beside it: what the data set is tried with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_USERS, _MOVIES, _EACH = 60, 130, 24
_GENRES = ("Action", "Comedy", "Drama", "Film-Noir")


def write(folder: Path) -> dict[str, Any]:
    """Write the files, and return the settings that use them."""
    rated = {user: [(user * 7 + 11 * k + k * k) % _MOVIES for k in range(_EACH)] for user in range(_USERS)}
    rated = {user: list(dict.fromkeys(movies)) for user, movies in rated.items()}
    ratings = [
        f"{user + 1}::{movie + 1}::{1 + (user + movie) % 5}::{978_300_000 + 500 * user + 7 * k // 2}"
        for user, movies in rated.items()
        for k, movie in enumerate(movies)
    ]
    titles = [f"Film {n} ({1920 + n % 80})::{_GENRES[n % 4]}|{_GENRES[(n + 1) % 4]}" for n in range(1, _MOVIES + 1)]
    people = [f"{n}::{'FM'[n % 2]}::{(1, 18, 25, 35, 45, 50, 56)[n % 7]}::{n % 5}::00000" for n in range(1, _USERS + 1)]
    files = {
        "ratings.dat": ratings,
        "movies.dat": [f"{n}::{title}" for n, title in enumerate(titles, start=1)],
        "users.dat": people,
        **_split(rated),
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="latin-1")
    return {"version": "1m", "path": str(folder), "complete": False}


def _split(rated: dict[int, list[int]]) -> dict[str, list[str]]:
    """Every user's last movie, and the first nine that the user did not rate."""
    number = {movie: n for n, movie in enumerate(dict.fromkeys(m for movies in rated.values() for m in movies))}
    test, negatives = [], []
    for user, movies in rated.items():
        test.append(f"{user}\t{number[movies[-1]]}\t4\t978300000")
        others = [str(n) for movie, n in number.items() if movie not in movies][:9]
        negatives.append("\t".join([f"({user},{number[movies[-1]]})", *others]))
    return {"ncf.test.rating": test, "ncf.test.negative": negatives}
