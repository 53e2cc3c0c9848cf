from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedtower.core.errors import DataError
from fedtower.recsys.interactions import MOST_VALUES, Interactions, encode, read_parquet
from fedtower.recsys.layout import Column
from fedtower.recsys.vocabulary import Vocabulary


def test_raw_ids_become_rows_in_their_natural_order() -> None:
    frame = pd.DataFrame({"user": [30, 4, 30], "item": ["b", "a", "a"], "time": [5, 6, 4], "rating": [1.0, 2.0, 3.0]})
    table = Interactions("some", frame).to_table()
    assert [table.user_name(client) for client in range(2)] == ["4", "30"]
    assert [table.item_name(item) for item in range(2)] == ["a", "b"]
    events = table.events(np.array([1, 0]))
    assert events.items.tolist() == [0, 1, 0]
    assert events.ratings.tolist() == [3.0, 1.0, 2.0]
    assert table.client_index("30") == 1
    assert (table.card.first_time, table.card.last_time) == (4, 6)


def test_without_times_the_order_of_the_rows_is_the_order_of_time() -> None:
    frame = pd.DataFrame({"user": ["u", "v", "u", "u"], "item": ["c", "c", "a", "b"]})
    table = Interactions("some", frame).to_table()
    assert table.events(np.array([0])).items.tolist() == [2, 0, 1]
    assert table.events(np.array([0])).ratings.tolist() == [1.0, 1.0, 1.0]
    assert table.card.first_time is None
    assert "no time span" in table.card.extra["times"]


def test_features_are_one_hot_and_multi_hot() -> None:
    frame = pd.DataFrame({"user": [1, 2, 3], "item": [7, 8, 9]})
    users = pd.DataFrame({"sex": ["f", "m"], "age": ["old", ""]}, index=[2, 1])
    items = pd.DataFrame(
        {"title": ["Nine", "", "Five"], "genre": ["x|y", None, "z"]}, index=[9, 8, 5]
    )  # nobody touched 5, and nothing is known of 7
    table = Interactions("some", frame, users=users, items=items).to_table()
    assert table.user_features(np.arange(3)).tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
    assert table.item_features(np.arange(3)).tolist() == [[0, 0], [0, 0], [1, 1]]
    assert [table.item_title(item) for item in range(3)] == [None, None, "Nine"]
    assert table.card.extra["user features"] == "sex (2), age (1)"
    assert table.card.extra["item features"] == "genre (2)"


def test_too_many_values_of_a_feature_are_refused() -> None:
    ids = np.arange(MOST_VALUES + 1)
    frame = pd.DataFrame({"postcode": ids.astype(str)}, index=ids)
    assert encode(frame.iloc[1:], Vocabulary(ids)).table.sum() == MOST_VALUES
    with pytest.raises(DataError, match="'postcode' has 1,001 different values, for example '0'; at most 1,000"):
        encode(frame, Vocabulary(ids))


def test_an_id_with_two_lines_of_features_is_refused() -> None:
    frame = pd.DataFrame({"genre": ["x", "y"]}, index=["a", "a"])
    with pytest.raises(DataError, match="the item 'a' has two lines of features"):
        encode(frame, Vocabulary(np.array(["a"]), "item"))


COLUMNS = (Column("user"), Column("rating", "number", 0, 5), Column("note", empty=True))


def test_parquet_is_held_to_the_same_promises(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"rating": [1, 5], "other": [1, 2], "user": [7, 8], "note": [None, "x"]}).to_parquet(path)
    frame = read_parquet(path, COLUMNS)
    assert frame["user"].tolist() == ["7", "8"]
    assert frame["rating"].tolist() == [1.0, 5.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"user": ["a", None]}, "row 2, column 1 (user): expected a text that is not empty"),
        ({"user": ["a", " "]}, "row 2, column 1 (user): expected a text that is not empty, got ' '"),
        ({"rating": [1.0, 6.0]}, "row 2, column 2 (rating): expected a number from 0 to 5, got 6.0"),
        ({"rating": [float("nan"), 1.0]}, "row 1, column 2 (rating): expected a number from 0 to 5, got nan"),
        ({"rating": ["1", "many"]}, "row 2, column 2 (rating): expected a number from 0 to 5, got 'many'"),
    ],
)
def test_a_broken_row_of_parquet_is_refused_with_its_place(
    tmp_path: Path, values: dict[str, list[object]], message: str
) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"user": ["a", "b"], "rating": [1.0, 2.0], "note": ["", ""], **values}).to_parquet(path)
    with pytest.raises(DataError) as refused:
        read_parquet(path, COLUMNS)
    assert message in str(refused.value)


def test_a_parquet_file_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"user": ["a"], "ratings": [1.0], "note": [""]}).to_parquet(path)
    with pytest.raises(DataError, match="has no column 'rating'"):
        read_parquet(path, COLUMNS)


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and then nothing that makes sense")
    with pytest.raises(DataError, match="is not a Parquet file, or a damaged one"):
        read_parquet(path, COLUMNS)
