import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, LeakError
from fedtower.plugins.datasets.movielens import example
from fedtower.plugins.datasets.movielens.dataset import MovieLens
from fedtower.plugins.datasets.movielens.editions import EDITIONS
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.splits import TEST, TRAIN, make_split
from fedtower.recsys.testing.dataset import DatasetPromises


def load(dataset: MovieLens) -> EventTable:
    return dataset.load(draws=Draws(0), progress=lambda text: None)


def genres(*on: int) -> str:
    return "|".join(str(int(place in on)) for place in range(19))


# What each edition looks like, in six made-up ratings of three people.
U_DATA = "5\t20\t3\t880000000\n2\t10\t5\t880000007\n5\t10\t4\t880000000\n2\t30\t1\t880000003\n9\t20\t2\t880000001\n"
U_ITEM = (
    f"10|Café Noir (1947)|01-Jan-1947||http://a|{genres(8, 10)}\n"
    f"20|Nothing Said|||http://b|{genres(0)}\n30|Two (1998)|01-Jan-1998||http://c|{genres(5)}\n"
    f"40|Unseen (1990)||||{genres(1)}\n"
)
U_USER = "2|17|F|writer|00000\n5|56|M|artist|T8H1N\n9|49|F|writer|00000\n"
LAYOUTS: dict[str, dict[str, str]] = {
    "100k": {"u.data": U_DATA, "u.item": U_ITEM, "u.user": U_USER},
    "1m": {
        "ratings.dat": U_DATA.replace("\t", "::"),
        "movies.dat": "10::Café Noir (1947)::Drama|Film-Noir\n20::Nothing Said::\n30::Two (1998)::Comedy\n",
        "users.dat": "2::F::1::20::00000\n5::M::56::2::00000\n9::F::45::20::00000-1234\n",
    },
    "latest-small": {
        "ratings.csv": "userId,movieId,rating,timestamp\n" + U_DATA.replace("\t", ","),
        "movies.csv": 'movieId,title,genres\n10,"Café, Noir (1947)",Drama|Film-Noir\n'
        "20,Nothing Said,(no genres listed)\n30,Two (1998),Comedy\n",
    },
}
LAYOUTS["25m"] = LAYOUTS["latest-small"]


def write(folder: Path, version: str, *, packed: bool = False, changed: Mapping[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    encoding = "latin-1" if version in ("100k", "1m") else "utf-8"
    for name, text in {**LAYOUTS[version], **(changed or {})}.items():
        content = text.encode(encoding)
        (folder / f"{name}.gz" if packed else folder / name).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", ["100k", "1m", "latest-small", "25m"])
def test_every_layout_is_read(tmp_path: Path, version: str, packed: bool) -> None:
    table = load(MovieLens(version, write(tmp_path, version, packed=packed), complete=False))  # type: ignore[arg-type]
    assert [table.user_name(client) for client in range(table.num_clients)] == ["2", "5", "9"]
    assert [table.item_name(item) for item in range(table.num_items)] == ["10", "20", "30"]
    assert table.item_title(0) == ("Café, Noir (1947)" if version.startswith(("l", "2")) else "Café Noir (1947)")
    events = table.events(np.arange(3))
    assert events.items.tolist() == [2, 0, 1, 0, 1]  # of user 5 in one second, in the order of the file
    assert events.ratings.tolist() == [1, 5, 3, 4, 2]
    assert table.card.to_dict()["first_time"] == "1997-11-20T04:26:40+00:00"
    decades = table.item_features(np.arange(3))[:, -2:]
    assert decades.tolist() == [[1, 0], [0, 0], [0, 1]]
    assert "genres" in table.card.extra["item features"]
    assert "GroupLens" in table.card.extra["source"]


@pytest.mark.parametrize("version", ["100k", "1m"])
def test_ages_are_the_same_groups_in_every_edition(tmp_path: Path, version: str) -> None:
    table = load(MovieLens(version, write(tmp_path, version), complete=False))  # type: ignore[arg-type]
    assert table.card.extra["user features"] == "gender (2), age (3), occupation (2)"
    # F M | 45-49, 56 or more, under 18 | of the occupations, sorted
    first = table.user_features(np.arange(3))[:, :5]
    assert first.tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]


BROKEN: list[tuple[str, str, Callable[[str], str], str]] = [
    (
        "100k",
        "u.data",
        lambda t: t.replace("9\t20\t2", "9\tX\t2"),
        "u.data, line 5, column 2 (item): expected a whole number",
    ),
    (
        "100k",
        "u.data",
        lambda t: t.replace("5\t10\t4", "5\t10\t6"),
        "u.data, line 3, column 3 (rating): expected a whole number from 1 to 5, got '6'",
    ),
    (
        "100k",
        "u.item",
        lambda t: t.replace("|0|0\n", "|0\n", 1),
        "u.item, line 1, column 24: expected 24 columns separated by '|', got 23",
    ),
    (
        "100k",
        "u.user",
        lambda t: t.replace("|M|", "||"),
        "u.user, line 2, column 3 (gender): expected a text that is not empty",
    ),
    (
        "1m",
        "ratings.dat",
        lambda t: t.replace("::880000001", ""),
        "ratings.dat, line 5, column 4: expected 4 columns separated by '::', got 3",
    ),
    ("1m", "ratings.dat", lambda t: t[:-3] + "\n2", "ratings.dat, line 6, column 2: expected 4 columns"),
    (
        "25m",
        "ratings.csv",
        lambda t: t.replace(",5,", ",5.5,"),
        "ratings.csv, line 3, column 3 (rating): expected a number from 0.5 to 5, got '5.5'",
    ),
    ("25m", "ratings.csv", lambda t: t.replace("rating", "stars"), "ratings.csv, line 1, has no column 'rating'"),
    ("25m", "movies.csv", lambda t: t.replace('Noir (1947)"', "Noir (1947)"), "movies.csv, line 2, is not CSV"),
]


@pytest.mark.parametrize(("version", "name", "change", "message"), BROKEN, ids=[case[3][:24] for case in BROKEN])
def test_a_broken_line_is_refused_with_its_place(
    tmp_path: Path, version: str, name: str, change: Callable[[str], str], message: str
) -> None:
    changed = change(LAYOUTS[version][name])
    assert changed != LAYOUTS[version][name]
    write(tmp_path, version, changed={name: changed})
    with pytest.raises(DataError) as refused:
        load(MovieLens(version, tmp_path, complete=False))  # type: ignore[arg-type]
    assert message in str(refused.value)


@pytest.mark.parametrize(("version", "published"), [("100k", "100,000"), ("1m", "1,000,209"), ("25m", "25,000,095")])
def test_a_file_without_all_ratings_is_refused(tmp_path: Path, version: str, published: str) -> None:
    with pytest.raises(DataError, match=f"has 5 ratings, but MovieLens .* came out with {published}: the file is cut"):
        load(MovieLens(version, write(tmp_path, version)))  # type: ignore[arg-type]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path, "100k") / "u.user").unlink()
    with pytest.raises(
        DataError, match=r"has no u.user or u.user.gz, .* it has u.data, u.item; is data.version the right"
    ):
        load(MovieLens("100k", tmp_path, complete=False))


def test_the_folder_is_the_setting_then_the_environment_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTOWER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError) as refused:
        MovieLens("1m").folder()
    for words in (str(tmp_path / "data" / "ml-1m"), str(tmp_path / "cache" / "fedtower" / "ml-1m"), "FEDTOWER_DATA"):
        assert words in str(refused.value)
    assert "`fedtower data fetch movielens --version 1m --accept-licence`" in str(refused.value)
    cached = tmp_path / "cache" / "fedtower" / "ml-1m"
    cached.mkdir(parents=True)
    assert MovieLens("1m").folder() == cached
    named = tmp_path / "data" / "ml-1m"
    named.mkdir(parents=True)
    assert MovieLens("1m").folder() == named
    assert MovieLens("1m", tmp_path).folder() == tmp_path
    with pytest.raises(DataError, match=r"data.path = '.*nowhere' is not a folder"):
        MovieLens("1m", tmp_path / "nowhere").folder()


def test_every_edition_says_where_it_is_published() -> None:
    for version, edition in EDITIONS.items():
        archive = MovieLens(version).archive  # type: ignore[arg-type]
        assert f"{archive.site}/{archive.file}" == f"https://files.grouplens.org/datasets/movielens/ml-{version}.zip"
        assert archive.folder == f"ml-{version}"
        assert "commercial" in archive.licence
        assert archive.licence_url.startswith(f"{archive.site}/ml-{version}-README.")
        assert (archive.md5 is None) == (edition.num_ratings is None)


# The split of the NCF paper


def ncf(folder: Path) -> MovieLens:
    settings = example.write(folder)
    return MovieLens(settings["version"], Path(settings["path"]), settings["complete"])


def test_the_given_items_are_the_test_items_and_count_as_last(tmp_path: Path) -> None:
    table = load(ncf(tmp_path))
    clients = np.arange(table.num_clients)
    events, given = table.events(clients), table.held_out(clients)
    assert given is not None
    assert events.items[events.offsets[1:] - 1].tolist() == given.items.tolist()
    split = make_split("ncf", table, validation=False, draws=Draws(0))
    role = split.parts(events).role
    assert (role == TEST).sum() == len(clients)
    assert (role == TRAIN).sum() == len(role) - len(clients)
    assert (
        role.tolist()
        == make_split("leave_one_out", table, validation=False, draws=Draws(0)).parts(events).role.tolist()
    )


def test_a_given_item_is_the_last_of_those_in_the_same_second(tmp_path: Path) -> None:
    dataset = ncf(tmp_path)
    lines = (tmp_path / "ratings.dat").read_text().splitlines()
    # User 1 rated all in one second, and the file begins with the test item.
    mine = [line.rpartition("::")[0] + "::978300000" for line in lines if line.startswith("1::")]
    (tmp_path / "ratings.dat").write_text("\n".join([*mine[-1:], *mine[:-1], *lines[len(mine) :]]))
    (tmp_path / "ncf_item_map.csv").write_text(
        "ncf_item,movie_id\n"
        + "".join(f"{n},{m}\n" for n, m in enumerate(dict.fromkeys(r.split("::")[1] for r in lines)))
    )
    table = load(dataset)
    assert table.item_name(int(table.events(np.array([0])).items[-1])) == mine[-1].split("::")[1]


def test_a_given_item_is_the_last_whatever_its_time(tmp_path: Path) -> None:
    dataset = ncf(tmp_path)
    lines = (tmp_path / "ratings.dat").read_text().splitlines()
    at = max(n for n, line in enumerate(lines) if line.startswith("7::"))
    lines[at] = lines[at].rpartition("::")[0] + "::5"
    (tmp_path / "ratings.dat").write_text("\n".join(lines))
    table = load(dataset)
    events = table.events(np.array([6]))
    assert table.item_name(int(events.items[-1])) == lines[at].split("::")[1]
    assert (np.diff(events.times) >= 0).all()


def test_positions_instead_of_times_have_no_time_span(tmp_path: Path) -> None:
    ranked = "\n".join(f"{user}::{movie}::4::{k}" for user in (2, 5, 9) for k, movie in enumerate((10, 20, 30)))
    table = load(MovieLens("1m", write(tmp_path, "1m", changed={"ratings.dat": ranked}), complete=False))
    assert (table.card.first_time, table.card.last_time) == (None, None)
    assert "no time span" in table.card.extra["times"]


@pytest.mark.parametrize(
    ("name", "line", "change", "message"),
    [
        (
            "ncf.test.rating",
            2,
            lambda t: t.replace("\t4\t", "\tx\t"),
            "rating, line 3, column 3 (rating): expected a whole",
        ),
        ("ncf.test.rating", 0, lambda t: "0\t999\t4\t5", "expected (0,999), as in the test file"),
        ("ncf.test.negative", 4, lambda t: t.replace("(4,", "(3,"), "negative, line 5, column 1: expected (4,"),
        ("ncf.test.negative", 4, lambda t: t + "x", "negative, line 5, column 10: expected an item's number, got"),
        ("ncf.test.negative", 4, lambda t: t[: t.rindex("\t")], "line 5: expected 9 negatives, as in line 1, got 8"),
        ("ncf.test.negative", 59, lambda t: "", "ends after line 59: expected 60 lines; it is cut"),
        ("ncf.test.negative", 3, lambda t: t[: t.rindex("\t")] + "\t9999", "has the item 9999, but the items are 0 to"),
    ],
)
def test_a_broken_split_is_refused_with_its_place(
    tmp_path: Path, name: str, line: int, change: Callable[[str], str], message: str
) -> None:
    dataset = ncf(tmp_path)
    lines = (tmp_path / name).read_text().splitlines()
    lines[line] = change(lines[line])
    (tmp_path / name).write_text("\n".join(filter(None, lines)) + "\n")
    with pytest.raises(DataError) as refused:
        load(dataset)
    assert message in str(refused.value)


def test_a_planted_negative_is_caught(tmp_path: Path) -> None:
    dataset = ncf(tmp_path)
    rated = (tmp_path / "ncf.test.rating").read_text().splitlines()
    lines = (tmp_path / "ncf.test.negative").read_text().splitlines()
    # Number 0 is the first movie in the file, which user 1 (line 1) rated first.
    assert not rated[0].startswith("0\t0\t")
    lines[0] = lines[0].rpartition("\t")[0] + "\t0"
    (tmp_path / "ncf.test.negative").write_text("\n".join(lines))
    with pytest.raises(LeakError, match=r"negative 9 .movie 1. of user 1 was rated by that user"):
        load(dataset)


def test_a_test_item_of_other_ratings_is_refused(tmp_path: Path) -> None:
    dataset = ncf(tmp_path)
    lines = (tmp_path / "ratings.dat").read_text().splitlines()
    (tmp_path / "ratings.dat").write_text("\n".join(lines[:-1]))
    with pytest.raises(
        DataError, match=r"ncf.test.rating, line 60: the test item .movie \d+. was not rated by user 60"
    ):
        load(dataset)


# The real data


def test_100k_is_whole(shared_data: Path) -> None:
    table = load(MovieLens("100k", shared_data / "ml-100k"))
    assert (table.num_clients, table.num_items, table.card.interactions) == (943, 1_682, 100_000)
    assert np.bincount(table.log.ratings.astype(int)).tolist() == [0, 6_110, 11_370, 27_145, 34_174, 21_201]
    assert (table.num_user_features, table.num_item_features) == (2 + 7 + 21, 19 + 8)
    assert table.log.offsets[1:].min() >= 20


def test_latest_small_is_whole(shared_data: Path) -> None:
    table = load(MovieLens("latest-small", shared_data / "ml-latest-small"))
    assert (table.num_clients, table.num_items, table.card.interactions) == (671, 9_066, 100_004)


def test_1m_is_whole_and_its_ncf_split_exact(shared_data: Path) -> None:
    table = load(MovieLens("1m", shared_data / "ml-1m"))
    assert (table.num_clients, table.num_items, table.card.interactions) == (6_040, 3_706, 1_000_209)
    assert np.bincount(table.log.ratings.astype(int)).tolist() == [0, 56_174, 107_557, 261_197, 348_971, 226_310]
    clients = np.arange(6_040)
    events, given = table.events(clients), table.held_out(clients)
    assert given is not None
    assert given.negatives.shape == (6_040, 99)
    role = make_split("ncf", table, validation=False, draws=Draws(0)).parts(events).role
    assert (role == TRAIN).sum() == 994_169
    # Popularity among the given negatives, ties against the item: the check figures of this split.
    popular = np.bincount(events.items[role == TRAIN], minlength=table.num_items)
    rank = (popular[given.negatives] >= popular[given.items][:, None]).sum(axis=1)
    assert round(float((rank < 10).mean()), 3) == 0.452
    assert round(float(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean()), 3) == 0.253


class TestPromises(DatasetPromises):
    @pytest.fixture(autouse=True)
    def _example(self, tmp_path: Path) -> None:
        type(self).make = staticmethod(lambda: ncf(tmp_path))
