import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtower.core.errors import DataError
from fedtower.recsys.vocabulary import Vocabulary


@given(st.lists(st.integers(-(2**62), 2**62), unique=True))
def test_numbers_go_to_rows_and_back(ids: list[int]) -> None:
    vocabulary = Vocabulary(np.array(ids, dtype=np.int64))
    assert vocabulary.rows(np.array(ids, dtype=np.int64)).tolist() == list(range(len(ids)))
    assert [vocabulary.name(row) for row in range(len(vocabulary))] == [str(raw) for raw in ids]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), unique=True))
def test_texts_go_to_rows_and_back(ids: list[str]) -> None:
    vocabulary = Vocabulary(np.array(ids, dtype=str))
    assert [vocabulary.row(vocabulary.name(row)) for row in range(len(ids))] == list(range(len(ids)))


@pytest.mark.parametrize("unknown", ["999", "a", "", "1.5", str(2**70)])
def test_what_is_no_number_is_no_known_number(unknown: str) -> None:
    vocabulary = Vocabulary(np.array([0, 1, 15], dtype=np.int64))
    assert vocabulary.rows(np.array([unknown, "15"])).tolist() == [-1, 2]


def test_an_unknown_user_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no user 'alicia' among the 2 users of this data .did you mean 'alice'"):
        Vocabulary(np.array(["alice", "bob"]), noun="user").row("alicia")


def test_an_id_cannot_have_two_rows() -> None:
    with pytest.raises(DataError, match="the item id '7' is there twice"):
        Vocabulary(np.array([7, 3, 7]), noun="item")


def test_a_row_that_is_not_there_is_refused() -> None:
    for row in (-1, 1):
        with pytest.raises(IndexError, match=f"row {row} is not among the 1 rows of users"):
            Vocabulary(np.array(["bob"]), noun="user").name(row)


def test_an_empty_vocabulary_knows_nobody() -> None:
    vocabulary = Vocabulary(np.zeros(0, dtype=np.int64), noun="user")
    assert vocabulary.rows(np.array([1, 2])).tolist() == [-1, -1]
    with pytest.raises(DataError, match="among the 0 users"):
        vocabulary.row("1")
