"""Criteo's file: what its columns become, whose each line is, and what a broken line is told."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.plugins.datasets.criteo import reader
from fedtower.plugins.datasets.criteo.dataset import Criteo, by_value, counted, hashed, logarithms
from fedtower.plugins.datasets.criteo.example import write
from fedtower.recsys.examples import ExampleTable
from fedtower.recsys.testing.dataset import DatasetPromises

Line = list[str]


def load(**settings: Any) -> ExampleTable:
    return Criteo(**settings).load(draws=Draws(1), progress=lambda message: None)


@pytest.fixture
def example(tmp_path: Path) -> dict[str, Any]:
    """Settings for a made-up file of 150 lines."""
    return write(tmp_path) | {"path": tmp_path / "train.txt"}


@pytest.fixture
def lines(example: dict[str, Any]) -> list[Line]:
    """The fields of the made-up file."""
    return [line.split("\t") for line in example["path"].read_text("utf-8").splitlines()]


class TestCriteo(DatasetPromises):
    @pytest.fixture(autouse=True)
    def _made(self, example: dict[str, Any]) -> None:
        self.settings = example

    def made(self) -> Criteo:
        return Criteo(**self.settings)


class TestCriteoByColumn(TestCriteo):
    def made(self) -> Criteo:
        return Criteo(**self.settings, silos="column", column="C3")


class TestCriteoCounted(TestCriteo):
    def made(self) -> Criteo:
        return Criteo(**self.settings, categories="counted", min_count=2)


def test_lines_are_split_by_time_and_clients_are_stretches_of_it(example: dict[str, Any], lines: list[Line]) -> None:
    data = load(**example)
    labels = np.array([float(line[0]) for line in lines])
    assert data.training.lengths.tolist() == [11] * 10
    np.testing.assert_array_equal(data.training.labels, labels[:110])
    np.testing.assert_array_equal(data.held_out("validation").labels, labels[110:130])
    np.testing.assert_array_equal(data.held_out("test").labels, labels[130:])
    numbers = [[0.0 if not text else np.log1p(max(int(text), 0)) for text in line[1:14]] for line in lines]
    np.testing.assert_allclose(data.training.dense, np.array(numbers)[:110], rtol=1e-6)


def test_the_logarithm_of_negative_and_missing_numbers_is_0() -> None:
    numbers = np.array([[-3.0, np.nan, 0.0, 1.0, 65535.0]], dtype=np.float32)
    np.testing.assert_allclose(logarithms(numbers), [[0.0, 0.0, 0.0, np.log(2), np.log(65536)]], rtol=1e-6)


def test_equal_values_of_a_field_share_a_row_and_fields_share_none(example: dict[str, Any], lines: list[Line]) -> None:
    data = load(**example | {"hash_size": 100_000})
    rows = np.concatenate([data.training.categories, data.validation.categories, data.test.categories])
    for field in range(26):
        texts = [line[14 + field] for line in lines]
        assert len(set(zip(texts, rows[:, field].tolist(), strict=True))) == len(set(texts)), "a value has two rows"
        assert {row for text, row in zip(texts, rows[:, field], strict=True) if not text} <= {field * 100_001}
    assert data.cardinalities == (100_001,) * 26


def test_a_hash_needs_nobody_elses_rows() -> None:
    words = np.array([[0x68FD1E64] * 26, [reader.MISSING] * 26], dtype=np.int64)
    rows, sizes = hashed(words, 1_000)
    alone, _ = hashed(words[:1], 1_000)
    np.testing.assert_array_equal(rows[:1], alone)
    assert rows[1].tolist() == [0] * 26
    assert sizes == [1_001] * 26
    # A device that computes them, in whatever language, has to get these.
    assert rows[0, :4].tolist() == [451, 443, 723, 963]
    assert len(set(rows[0].tolist())) > 20, "the same word in two fields is two values"


def test_a_hash_spreads_evenly() -> None:
    words = np.arange(100_000, dtype=np.int64)[:, None]
    counts = np.bincount(hashed(words, 100)[0][:, 0], minlength=101)
    assert counts[0] == 0
    # A hundred cells of 1,000 each: a chi-squared of 99 degrees of freedom is below 150 in 999 of 1,000 cases.
    assert ((counts[1:] - 1_000) ** 2 / 1_000).sum() < 150


def test_only_values_that_training_rows_have_often_get_a_row() -> None:
    column = np.array([7, 7, 7, 5, 5, 3, reader.MISSING, 9, 7, 9, 9, 9], dtype=np.int64)[:, None]
    rows, sizes = counted(column, train=8, min_count=2)
    assert sizes == [4]
    assert rows[:, 0].tolist() == [3, 3, 3, 2, 2, 1, 0, 1, 3, 1, 1, 1]


def test_a_field_of_rare_values_only_has_two_rows() -> None:
    rows, sizes = counted(np.array([[3], [4], [reader.MISSING]]), train=3, min_count=2)
    assert (rows[:, 0].tolist(), sizes) == ([1, 1, 0], [2])


def test_a_client_is_a_value_and_the_rare_ones_are_put_together(example: dict[str, Any], lines: list[Line]) -> None:
    data = load(**example, silos="column", column="C9")
    texts = np.array([line[14 + 8] for line in lines[:110]])
    assert data.training.lengths.sum() == 110
    assert data.training.lengths.min() >= 5
    assert data.num_clients == len({text for text in texts if (texts == text).sum() >= 5})


@pytest.mark.parametrize(("smallest", "expected"), [(1, [0, 1, 2]), (3, [0, 1, 1]), (4, [0, 1, 1]), (99, [0, 0, 0])])
def test_what_is_left_at_last_joins_the_last_client(smallest: int, expected: list[int]) -> None:
    owners = by_value(np.array([8] * 5 + [4] * 3 + [6]), smallest)
    assert [int(owners[at]) for at in (0, 5, 8)] == expected


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_file_is_read_in_blocks_of_lines(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path = example["path"]
    whole = reader.read(path, 150)
    if ending:
        path = path.with_suffix(".txt.gz")
        path.write_bytes(gzip.compress(example["path"].read_bytes()))
    monkeypatch.setattr(reader, "_BLOCK", 1_000)
    again = reader.read(path, 150)
    for name in ("labels", "integers", "words"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_no_more_is_read_than_is_asked_for(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_BLOCK", 1_000)
    content = example["path"].read_bytes()
    example["path"].write_bytes(content + b"nonsense\n")
    assert len(reader.read(example["path"], 100).labels) == 100
    with pytest.raises(DataError, match="line 151"):
        reader.read(example["path"], 151)


def test_windows_line_ends_and_a_missing_last_one_do_not_matter(example: dict[str, Any]) -> None:
    whole = reader.read(example["path"], 150)
    content = example["path"].read_bytes()
    example["path"].write_bytes(content.replace(b"\n", b"\r\n").rstrip())
    np.testing.assert_array_equal(reader.read(example["path"], 150).words, whole.words)


def _field(place: int, text: str) -> Callable[[Line], Line]:
    return lambda line: [*line[:place], text, *line[place + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_field(0, "2"), r"line 42, column 1 \(label\): expected a whole number from 0 to 1, got '2'"),
        (_field(0, ""), r"line 42, column 1 \(label\): expected a whole number from 0 to 1, got ''"),
        (_field(3, "2.5"), r"line 42, column 4 \(I3\): expected a whole number, or nothing, got '2.5'"),
        (_field(3, "nan"), r"line 42, column 4 \(I3\): expected a whole number, or nothing, got 'nan'"),
        (_field(5, "inf"), r"line 42, column 6 \(I5\): expected a whole number, or nothing, got 'inf'"),
        (_field(5, "x"), r"line 42, column 6 \(I5\): expected a whole number, or nothing, got 'x'"),
        (_field(14, "68fd1e6"), r"line 42, column 15 \(C1\): expected 8 hexadecimal digits, or nothing, got '68fd1e6'"),
        (_field(39, "xxxxxxxx"), r"line 42, column 40 \(C26\): expected 8 hexadecimal digits, or nothing"),
        (lambda line: line[:20], r"line 42, column 21: expected 40 columns separated by '\\t', got 20"),
        (lambda line: [*line, "more"], r"line 42, column 41: expected 40 columns separated by '\\t', got 41"),
    ],
)
def test_a_broken_line_is_named(
    example: dict[str, Any], lines: list[Line], change: Callable[[Line], Line], message: str
) -> None:
    lines[41] = change(lines[41])
    example["path"].write_text("".join("\t".join(line) + "\n" for line in lines), "utf-8")
    with pytest.raises(DataError, match=message):
        load(**example)


def test_a_file_that_is_too_short_says_how_long_it_is(example: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="has 150 lines"):
        load(**example | {"train_rows": 111})


def test_an_empty_and_a_missing_file_say_so(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example["path"].write_text("")
    with pytest.raises(DataError, match="is empty"):
        load(**example)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(path=tmp_path / "nothing.txt")
    monkeypatch.setenv("FEDTOWER_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"train\.txt.*FEDTOWER_DATA"):
        load()


def test_the_file_is_found_in_the_data_folder(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "criteo").mkdir()
    (tmp_path / "criteo" / "train.txt.gz").write_bytes(gzip.compress(example.pop("path").read_bytes()))
    monkeypatch.setenv("FEDTOWER_DATA", str(tmp_path))
    assert load(**example).num_clients == 10
    assert load(**example, path=tmp_path / "criteo").num_clients == 10


@pytest.mark.parametrize(
    "settings",
    [
        {"train_rows": 0},
        {"test_rows": 0},
        {"hash_size": 0},
        {"min_count": 0},
        {"column": "I1"},
        {"clients": 99, "train_rows": 98},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"data\."):
        Criteo(**settings)


def test_the_recovered_extract_has_its_published_click_rate(shared_data: Path) -> None:
    data = load(path=shared_data / "criteo")
    assert (data.num_clients, len(data.training.labels)) == (100, 64_000)
    labels = [data.training.labels, data.validation.labels, data.test.labels]
    assert np.concatenate(labels).mean() == pytest.approx(0.224, abs=5e-4)
    by_site = load(path=shared_data / "criteo", silos="column")
    assert by_site.training.lengths.min() >= 100
    assert by_site.training.lengths.max() > 8_000, "the largest silo has an eighth of all rows"
    assert by_site.training.lengths.sum() == 64_000
