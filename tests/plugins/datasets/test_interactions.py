import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.core.settings import build
from fedtower.plugins.datasets.interactions import example
from fedtower.plugins.datasets.interactions.dataset import InteractionsFile
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.testing.dataset import DatasetPromises

TEXT = "when,who,what,stars\n30,ann,x,5\n10,bob,x,1\n20,ann,y,2\n10,ann,z,4\n10,ann,x,3\n"


def made(path: Path, **settings: Any) -> InteractionsFile:
    return build(InteractionsFile, {"path": str(path), "user": "who", "item": "what", **settings}, path="data")


def load(dataset: InteractionsFile) -> EventTable:
    return dataset.load(draws=Draws(0), progress=lambda text: None)


def events_of(table: EventTable, user: str) -> list[tuple[str, int, float]]:
    events = table.events(np.array([table.client_index(user)]))
    names = [table.item_name(int(item)) for item in events.items]
    return list(zip(names, events.times.tolist(), events.ratings.tolist(), strict=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "visits.csv"
    file.write_text(TEXT)
    return file


@pytest.fixture(params=["csv", "tsv", "gz", "parquet"])
def any_format(request: pytest.FixtureRequest, path: Path) -> Iterator[InteractionsFile]:
    settings = {"rating": "stars", "timestamp": "when"}
    match request.param:
        case "csv":
            yield made(path, **settings)
        case "tsv":
            path.write_text(TEXT.replace(",", "\t"))
            yield made(path, separator="\t", **settings)
        case "gz":
            packed = path.with_suffix(".csv.gz")
            packed.write_bytes(gzip.compress(TEXT.encode()))
            yield made(packed, **settings)
        case _:
            pd.read_csv(path).to_parquet(path.with_suffix(".parquet"))
            yield made(path.with_suffix(".parquet"), **settings)


def test_every_format_gives_the_same_population(any_format: InteractionsFile) -> None:
    table = load(any_format)
    # ann saw x twice: the later time stays.
    assert events_of(table, "ann") == [("z", 10, 4.0), ("y", 20, 2.0), ("x", 30, 5.0)]
    assert events_of(table, "bob") == [("x", 10, 1.0)]
    assert table.card.interactions == 4
    assert table.card.extra["source"] == str(any_format.path)


def test_without_a_timestamp_the_order_of_the_file_counts(path: Path) -> None:
    table = load(made(path))
    assert [name for name, _, _ in events_of(table, "ann")] == ["y", "z", "x"]
    assert table.card.first_time is None


def test_low_ratings_are_left_out(path: Path) -> None:
    table = load(made(path, rating="stars", timestamp="when", min_rating=3))
    assert events_of(table, "ann") == [("z", 10, 4.0), ("x", 30, 5.0)]
    assert table.card.users == 1
    assert table.card.extra["left out"] == "2 ratings below 3"
    with pytest.raises(DataError, match=r"has no stars of 6 or more; lower data.min_rating"):
        load(made(path, rating="stars", min_rating=6))


@pytest.mark.parametrize(
    ("times", "unit", "seconds"),
    [
        (["2024-05-01T12:30:00", "2024-05-01", "2024-05-01T14:00:00+02:00"], "s", [1714566600, 1714521600, 1714564800]),
        (["1714566600500", "1714566600250", "1714566599999"], "ms", [1714566600, 1714566600, 1714566599]),
        (["12.75", "12.5", "11"], "s", [12, 12, 11]),
    ],
)
def test_times_are_numbers_or_iso_8601(tmp_path: Path, times: list[str], unit: str, seconds: list[int]) -> None:
    rows = [f"ann,{item},{time}" for item, time in zip("abc", times, strict=True)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["who,what,when", *rows]))
    table = load(made(path, timestamp="when", timestamp_unit=unit))
    expected = sorted(zip(times, "abc", seconds, strict=True), key=lambda row: (row[2], row[0]))
    assert [(name, time) for name, time, _ in events_of(table, "ann")] == [(name, time) for _, name, time in expected]


FEATURES = "who,what,town,kind,name\nann,x,N,a|b,Xylo\nbob,x,S,a|b,Xylo\nann,y,S,,Yes\n"


def test_features_may_be_columns_of_the_interactions(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(FEATURES)
    table = load(made(path, user_features=["town"], item_features=["kind"], title="name"))
    assert table.user_features(np.arange(2)).tolist() == [[1], [1]]  # ann has moved from N to S
    assert table.item_features(np.arange(2)).tolist() == [[1, 1], [0, 0]]
    assert [table.item_title(item) for item in range(2)] == ["Xylo", "Yes"]


def test_features_may_have_a_file_of_their_own(tmp_path: Path, path: Path) -> None:
    users, items = tmp_path / "users.csv", tmp_path / "items.csv"
    users.write_text("who,town\nbob,N\nann,S\ncem,S\n")
    items.write_text("what,kind,name\nz,a,Zoo\nx,b,Xylo\n")
    table = load(
        made(
            path,
            users_path=str(users),
            user_features=["town"],
            items_path=str(items),
            item_features=["kind"],
            title="name",
        )
    )
    assert table.user_features(np.arange(2)).tolist() == [[0, 1], [1, 0]]
    assert table.item_features(np.arange(3)).tolist() == [[0, 1], [0, 0], [1, 0]]
    assert [table.item_title(item) for item in range(3)] == ["Xylo", None, "Zoo"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,bob,x,1", "visits.csv, line 3, column 1 (when): expected a number from 0 to 253402300799, got 'x'"),
        ("-1,bob,x,1", "visits.csv, line 3, column 1 (when): expected a number from 0 to 253402300799, got '-1'"),
        ("1e12,bob,x,1", 'if these are milliseconds, set data.timestamp_unit = "ms"'),
        ("10,,x,1", "visits.csv, line 3, column 2 (who): expected a text that is not empty"),
        ("10,bob,x,good", "visits.csv, line 3, column 4 (stars): expected a number, got 'good'"),
        ("10,bob,x", "visits.csv, line 3, column 4: expected 4 columns separated by ',', got 3"),
    ],
)
def test_a_broken_line_is_refused_with_its_place(path: Path, line: str, message: str) -> None:
    path.write_text(TEXT.replace("10,bob,x,1", line))
    with pytest.raises(DataError) as refused:
        load(made(path, rating="stars", timestamp="when"))
    assert message in str(refused.value)


def test_a_broken_date_is_refused_with_its_place(path: Path) -> None:
    path.write_text("who,what,when\nann,x,2024-05-01\nann,y,2024-13-01\n")
    with pytest.raises(DataError, match=r"line 3, column 3 .when.: expected a time .* in ISO 8601, .*got '2024-13"):
        load(made(path, timestamp="when"))


def test_a_broken_time_in_parquet_is_refused_with_its_row(path: Path) -> None:
    parquet = path.with_suffix(".parquet")
    pd.DataFrame({"who": ["a", "a", "b"], "what": ["x", "y", "z"], "when": [1, 2, -3]}).to_parquet(parquet)
    with pytest.raises(DataError, match=r"visits.parquet, row 3, column 'when': expected a number from 0 to"):
        load(made(parquet, timestamp="when"))


def test_a_missing_column_is_refused_with_the_nearest(path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1, has no column 'star' .did you mean 'stars'.*are when, who"):
        load(made(path, rating="star"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file nowhere.csv; expected a CSV or Parquet file, from /"):
        load(made(Path("nowhere.csv")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_rating": 3}, "data: min_rating needs rating"),
        ({"separator": "::"}, "data: separator must be one character, but is '::'"),
        ({"users_path": "users.csv"}, "data: users_path needs user_features"),
        ({"items_path": "items.csv"}, "data: items_path needs item_features or title"),
        ({"item_features": ["a"], "title": "a"}, "data: title = 'a' must not be one of item_features"),
        ({"timestamp_unit": "us"}, "data.timestamp_unit must be"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        made(path, **settings)
    assert message in str(refused.value)


class TestPromises(DatasetPromises):
    @pytest.fixture(autouse=True)
    def _example(self, tmp_path: Path) -> None:
        type(self).make = staticmethod(lambda: build(InteractionsFile, example.write(tmp_path), path="data"))
