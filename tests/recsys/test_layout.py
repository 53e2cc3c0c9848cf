import gzip
from pathlib import Path

import pytest

from fedtower.core.errors import DataError
from fedtower.recsys.interactions import read_table
from fedtower.recsys.layout import Column, Layout, find_file

USER, STARS = Column("user", "integer", 1), Column("rating", "number", 0.5, 5)
DOUBLE_COLON = Layout((USER, Column("title"), STARS), separator="::", encoding="latin-1")
CSV = Layout((STARS, USER), header=True, quoted=True)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.dat", "a.dat.gz"])
def test_columns_by_place(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "1::Léon: NA::4\n\n2::NA::0.5\n", "latin-1")
    frame = read_table(path, DOUBLE_COLON)
    assert frame.values.tolist() == [[1, "Léon: NA", 4.0], [2, "NA", 0.5]]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_columns_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, 'user,what,rating\n1,"a,\nb",4\n2,,5\n')
    assert read_table(path, CSV).to_dict("list") == {"rating": [4.0, 5.0], "user": [1, 2]}


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert len(read_table(write(tmp_path / "a.csv", "\ufeffuser,rating\n1,2\n"), CSV)) == 1
    with pytest.raises(DataError, match=r"line 2, column 2 .rating.: .* got 'x'"):
        read_table(write(tmp_path / "a.csv", "\ufeffuser,rating\n1,x\n"), CSV)


@pytest.mark.parametrize("word", ["inf", "-inf", "nan"])
def test_what_is_not_finite_is_no_number(tmp_path: Path, word: str) -> None:
    with pytest.raises(DataError, match=f"line 3, column 1 .x.: expected a number, got '{word}'"):
        read_table(write(tmp_path / "a.csv", f"x\n1e300\n{word}\n"), Layout((Column("x", "number"),), header=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1::a::4\nx::b::4\n", "line 2, column 1 (user): expected a whole number of 1 or more, got 'x'"),
        ("1::a::4\n2.5::b::4\n", "line 2, column 1 (user): expected a whole number of 1 or more, got '2.5'"),
        ("1::a::4\n0::b::4\n", "line 2, column 1 (user): expected a whole number of 1 or more, got '0'"),
        (f"1::a::4\n{2**70}::b::4\n", "line 2, column 1 (user): expected a whole number of 1 or more, got '1180"),
        ("1::a::4\n2::b::6\n", "line 2, column 3 (rating): expected a number from 0.5 to 5, got '6'"),
        ("1::a::4\n2::b::nan\n", "line 2, column 3 (rating): expected a number from 0.5 to 5, got 'nan'"),
        ("1::a::4\n2::b::inf\n", "line 2, column 3 (rating): expected a number from 0.5 to 5, got 'inf'"),
        ("1::a::4\n2::b::\n", "line 2, column 3 (rating): expected a number from 0.5 to 5, got ''"),
        ("1::a::4\n\n2:: ::4\n", "line 3, column 2 (title): expected a text that is not empty, got ' '"),
        ("1::a::4\n2::b\n", "line 2, column 3: expected 3 columns separated by '::', got 2"),
        ("1::a::4\n2::b::4::5\n", "line 2, column 4: expected 3 columns separated by '::', got 4"),
        ("1::a::4::9\n2::b::4::5\n", "line 1, column 4: expected 3 columns separated by '::', got 4"),
        ("1,a,4\n", "line 1, column 2: expected 3 columns separated by '::', got 1"),
        ("", "is empty"),
    ],
)
def test_a_broken_line_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.dat", text)
    with pytest.raises(DataError) as refused:
        read_table(path, DOUBLE_COLON)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,rating\n1,4\n2,five\n", "line 3, column 2 (rating): expected a number from 0.5 to 5, got 'five'"),
        ('user,t,rating\n1,"a\nb",4\n2,c,9\n', "line 4, column 3 (rating): expected a number from 0.5 to 5, got '9'"),
        ("user,rating\n1,4\n2\n", "line 3, column 2: expected 2 columns separated by ',', got 1"),
        ("user,rating\n1,4\n2,3,4\n", "line 3, column 3: expected 2 columns separated by ',', got 3"),
        ("user,rating\n1,4,5\n2,3,4\n", "line 2, column 3: expected 2 columns separated by ',', got 3"),
        ('user,rating\n1,4\n2,"3\n3,4\n', "line 3, is not CSV"),
        ("user,rating\n", "is empty"),
        ("user,stars\n1,4\n", "line 1, has no column 'rating'; its columns, separated by ',', are user, stars"),
        ("user,ratings\n1,4\n", "line 1, has no column 'rating' (did you mean 'ratings'?)"),
        ("user;rating\n1;4\n", "has no column 'rating'"),
        ("", "is empty"),
    ],
)
def test_a_broken_line_of_csv_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DataError) as refused:
        read_table(path, CSV)
    assert message in str(refused.value)


def test_text_in_another_encoding_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "user,rating,title\n1,4,Leon\n2,3,Léon\n", "latin-1")
    with pytest.raises(DataError, match="line 3, byte 6: expected utf-8 text, got the byte 0xe9; convert the file"):
        read_table(path, CSV)


def test_a_cut_gzip_file_is_told_in_plain_words(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d::a::4\n" % n for n in range(1, 5000)))
    path = tmp_path / "a.dat.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="ends too early: the gzip file is cut, probably a download that broke off"):
        read_table(path, DOUBLE_COLON)


@pytest.mark.parametrize(
    "content", [b"1::a::4\n", gzip.compress(b"1::a::4\n" * 999, mtime=0)[:-8] + b"checksum"], ids=["plain", "changed"]
)
def test_a_damaged_gzip_file_is_told_in_plain_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.dat.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a gzip file, or a damaged one"):
        read_table(path, DOUBLE_COLON)


def test_a_plain_file_comes_before_a_packed_one(tmp_path: Path) -> None:
    assert find_file(tmp_path, ["b", "a"]) is None
    packed = write(tmp_path / "a.gz", "")
    assert find_file(tmp_path, ["b", "a"]) == packed
    plain = write(tmp_path / "a", "")
    assert find_file(tmp_path, ["b", "a"]) == plain


def test_what_a_time_is() -> None:
    time = Column("when", "time")
    accepted = [time.accepts(text) for text in ("2024-05-01", "2024-05-01T12:30:00+02:00", "1969-12-31", "yesterday")]
    assert accepted == [True, True, False, False]
