import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fedtower.core.cli import call
from fedtower.plugins.datasets.movielens import editions, example


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A mirror with a made-up latest-small and its checksum."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(
            "ml-latest-small/ratings.csv", "userId,movieId,rating,timestamp\n1,5,3.5,964982703\n1,7,4,964982931\n"
        )
        archive.writestr(
            "ml-latest-small/movies.csv", "movieId,title,genres\n5,Five (1995),Drama\n7,Seven (1995),Crime\n"
        )
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "ml-latest-small.zip").write_bytes(content.getvalue())
    digest = hashlib.md5(content.getvalue()).hexdigest()
    (folder / "ml-latest-small.zip.md5").write_text(f"{digest}  ml-latest-small.zip\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FEDTOWER_DATA", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_the_card_of_a_data_set_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["data", "card", "synthetic", "-o", "data.users=70", "-o", "data.taste=0.5", "-o", "seed=9"]) == 0
    printed = capsys.readouterr().out
    for words in ("synthetic", "70", "3,000", "2020-01-01 to 2022-12-31", "generated from seed 9, taste 0.5"):
        assert words in printed


def test_the_card_of_a_recipes_data_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["data", "card", "dssm-synthetic", "-o", "data.users=70", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["name"], card["users"]) == ("synthetic", 70)
    assert card["density"] == card["interactions"] / (70 * card["items"])


def test_a_card_without_times_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "[bold]a.csv").write_text("user,item\na,x\nb,y\n")
    assert call(["data", "card", "interactions", "-o", "data.path=[bold]a.csv"]) == 0
    printed = capsys.readouterr()
    assert "unknown" in printed.out
    assert "[bold]a.csv" in printed.out
    assert "reading [bold]a.csv" in printed.err


def test_nothing_is_downloaded_before_the_licence_is_accepted(
    tmp_path: Path, site: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["data", "fetch", "movielens", "--version", "latest-small", "--site", site]) == 2
    printed = capsys.readouterr()
    assert "do not use it for any commercial or revenue-bearing purpose" in " ".join(printed.out.split())
    assert f"{editions.SITE}/ml-latest-small-README.html" in printed.out
    assert "add --accept-licence" in " ".join(printed.err.split())
    assert not (tmp_path / "cache").exists()


def test_an_accepted_data_set_is_fetched_and_found(site: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["data", "fetch", "movielens", "--version", "latest-small", "--accept-licence", "--site", site]) == 0
    assert "Next: fedtower data card movielens -o data.version=latest-small" in capsys.readouterr().out
    assert call(["data", "card", "movielens", "-o", "data.version=latest-small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["interactions"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data", "fetch", "synthetic", "--accept-licence"], 2, "'synthetic' is not one that can be downloaded"),
        (["data", "fetch", "movielens", "--version", "10m"], 2, "data.version must be"),
        (["data", "card", "movielens"], 3, "fedtower data fetch movielens --version 100k --accept-licence"),
        (["data", "fetch", "synthetic", "--accept-licence"], 2, "`fedtower plugins show synthetic`"),
        (["data", "card", "movilens"], 2, "'movilens' (did you mean 'movielens'?); the data sets are criteo,"),
        (["data", "fetch", "dssm-ml-100"], 2, "(did you mean 'dssm-ml-100k'?)"),
        (["data", "card", "nothere.toml"], 2, "nothere.toml cannot be read"),
        (["data", "card", "synthetic", "-o", "data.user=7"], 2, "did you mean 'users'?"),
        (["data", "card", "synthetic", "-o", "data.users=7", "-o", "seeds=1"], 2, "did you mean 'seed'?"),
    ],
)
def test_a_wrong_command_is_refused_in_a_paragraph(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(arguments) == code
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split())
    assert "Traceback" not in printed.err


def test_a_broken_ratings_file_is_refused_in_a_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.write(tmp_path)
    lines = (tmp_path / "ratings.dat").read_text().splitlines()
    (tmp_path / "ratings.dat").write_text("\n".join([*lines[:2], "1::two::3::4", *lines[3:]]))
    options = ["-o", "data.version=1m", "-o", f"data.path={tmp_path}", "-o", "data.complete=false"]
    assert call(["data", "card", "movielens", *options]) == 3
    printed = " ".join(capsys.readouterr().err.split())
    assert (
        f"error: {tmp_path}/ratings.dat, line 3, column 2 (item): expected a whole number of 0 or more, got 'two'"
        in printed
    )
