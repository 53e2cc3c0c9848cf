import functools
import hashlib
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedtower.core.errors import DataError
from fedtower.recsys.archive import Archive, cache_folder, fetch

README, RATINGS = b"be kind", bytes(range(256)) * 4_000


def packed(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


WHOLE = packed({"some/README": README, "some/deep/ratings": RATINGS})


class Site:
    """A site with files, which may stop sending after so many bytes, and which remembers what was asked for."""

    def __init__(self, files: dict[str, bytes], *, resumes: bool = True, stops_after: int | None = None) -> None:
        self.files, self.resumes, self.stops_after = files, resumes, stops_after
        self.ranges: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    def __init__(self, site: Site, *arguments: object) -> None:
        self.site = site
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if name not in self.site.files:
            self.send_error(404, "Not Found")
            return
        content, asked = self.site.files[name], self.headers["Range"]
        self.site.ranges.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and self.site.resumes else 0  # type: ignore[union-attr]
        if start and start >= len(content):
            self.send_error(416, "Range Not Satisfiable")
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:][: self.site.stops_after])

    def log_message(self, *_: object) -> None:
        pass


class Served:
    def __init__(self) -> None:
        self.site = Site({})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(self._handler))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def _handler(self, *arguments: object) -> Handler:
        return Handler(self.site, *arguments)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Served()
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.server.shutdown()
    thread.join()
    served.server.server_close()


def some(served: Served, md5: str | None = hashlib.md5(WHOLE).hexdigest()) -> Archive:
    return Archive("some.zip", "some", served.url, "be kind", f"{served.url}/README", md5)


def quiet(done: int, total: int | None) -> None:
    pass


def test_an_archive_is_fetched_checked_and_unpacked(tmp_path: Path, served: Served) -> None:
    served.site = Site({"some.zip": WHOLE})
    told: list[tuple[int, int | None]] = []
    folder = fetch(some(served), tmp_path / "cache", lambda done, total: told.append((done, total)))
    assert folder == tmp_path / "cache" / "some"
    assert (folder / "README").read_bytes() == README
    assert (folder / "deep" / "ratings").read_bytes() == RATINGS
    assert [path.name for path in folder.parent.iterdir()] == ["some"]
    assert told[0] == (0, len(WHOLE))
    assert told[-1] == (len(WHOLE), len(WHOLE))


def test_what_is_there_is_not_fetched_again(tmp_path: Path, served: Served) -> None:
    (tmp_path / "some").mkdir()
    assert fetch(some(served), tmp_path, quiet) == tmp_path / "some"
    assert served.site.ranges == []


def test_a_download_goes_on_where_it_stopped(tmp_path: Path, served: Served) -> None:
    served.site = Site({"some.zip": WHOLE})
    (tmp_path / "some.zip.part").write_bytes(WHOLE[:1000])
    told: list[int] = []
    fetch(some(served), tmp_path, lambda done, total: told.append(done))
    assert served.site.ranges == ["bytes=1000-"]
    assert told[0] == 1000
    assert (tmp_path / "some" / "deep" / "ratings").read_bytes() == RATINGS


def test_a_site_that_stops_sending_is_asked_for_the_rest(tmp_path: Path, served: Served) -> None:
    served.site = Site({"some.zip": WHOLE}, stops_after=200_000)
    fetch(some(served), tmp_path, quiet)
    assert served.site.ranges == [None, *(f"bytes={have}-" for have in range(200_000, len(WHOLE), 200_000))]


def test_a_site_that_cannot_resume_sends_all_again(tmp_path: Path, served: Served) -> None:
    served.site = Site({"some.zip": WHOLE}, resumes=False)
    (tmp_path / "some.zip.part").write_bytes(b"something older")
    fetch(some(served), tmp_path, quiet)
    assert (tmp_path / "some" / "README").read_bytes() == README


def test_a_download_that_was_whole_already_is_only_unpacked(tmp_path: Path, served: Served) -> None:
    served.site = Site({"some.zip": WHOLE})
    (tmp_path / "some.zip.part").write_bytes(WHOLE)
    assert (fetch(some(served), tmp_path, quiet) / "README").exists()


def test_what_came_is_kept_when_the_site_gives_up(tmp_path: Path, served: Served) -> None:
    served.site = Site({"some.zip": WHOLE}, stops_after=0)
    (tmp_path / "some.zip.part").write_bytes(WHOLE[:1000])
    with pytest.raises(DataError, match=r"stopped sending. 1,000 bytes are kept in .*: the same command goes on from"):
        fetch(some(served), tmp_path, quiet)
    assert (tmp_path / "some.zip.part").read_bytes() == WHOLE[:1000]


def test_a_damaged_download_is_removed_and_not_unpacked(tmp_path: Path, served: Served) -> None:
    served.site = Site({"some.zip": WHOLE[:-1] + b"!"})
    with pytest.raises(DataError, match=r"has the md5 checksum .* was expected: it was damaged on the way"):
        fetch(some(served), tmp_path, quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_sites_own_checksum_counts_where_none_is_fixed(tmp_path: Path, served: Served) -> None:
    digest = hashlib.md5(WHOLE).hexdigest()
    served.site = Site({"some.zip": WHOLE, "some.zip.md5": f"MD5 (some.zip) = {digest}\n".encode()})
    assert fetch(some(served, None), tmp_path / "a", quiet).is_dir()
    served.site.files["some.zip.md5"] = b"0" * 32
    with pytest.raises(DataError, match=r"0{32} was expected"):
        fetch(some(served, None), tmp_path / "b", quiet)
    served.site.files["some.zip.md5"] = b"<html>welcome</html>"
    with pytest.raises(DataError, match="does not hold a checksum, but '<html>"):
        fetch(some(served, None), tmp_path / "c", quiet)
    del served.site.files["some.zip.md5"]
    with pytest.raises(DataError, match=r"checksum .*some.zip.md5 cannot be fetched"):
        fetch(some(served, None), tmp_path / "d", quiet)


def test_a_site_that_says_no_is_quoted(tmp_path: Path, served: Served) -> None:
    with pytest.raises(DataError, match=r"some.zip cannot be fetched: the site says 404 Not Found"):
        fetch(some(served), tmp_path, quiet)


def test_a_site_that_is_not_there_is_told(tmp_path: Path, served: Served) -> None:
    nobody = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    nobody.server_close()
    with pytest.raises(DataError, match=r"some.zip cannot be fetched: .*refused.* 0 bytes are kept"):
        fetch(some(served), tmp_path, quiet, site=f"http://127.0.0.1:{nobody.server_address[1]}")


def test_a_mirror_may_stand_in(tmp_path: Path, served: Served) -> None:
    served.site = Site({"here/some.zip": WHOLE})
    archive = Archive("some.zip", "some", "https://nowhere.invalid", "", "", hashlib.md5(WHOLE).hexdigest())
    assert fetch(archive, tmp_path, quiet, site=f"{served.url}/here/").is_dir()


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "some/../../evil", "other/README", "some/..\\..\\evil", "C:\\evil", "some/link"]
)
def test_an_archive_that_writes_elsewhere_is_refused(tmp_path: Path, served: Served, name: str) -> None:
    member = zipfile.ZipInfo(name)
    if name.endswith("link"):
        member.external_attr = 0o120777 << 16
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("some/README", README)
        archive.writestr(member, "/etc/passwd")
    evil = content.getvalue()
    served.site = Site({"some.zip": evil})
    into = tmp_path / "deep" / "cache"
    with pytest.raises(DataError, match="which is not a plain file in some/; nothing was unpacked"):
        fetch(some(served, hashlib.md5(evil).hexdigest()), into, quiet)
    assert [path.name for path in into.iterdir()] == ["some.zip.part"]
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("content", "message"), [(b"hello", "not a zip file"), (packed({}), "does not hold the folder")]
)
def test_what_is_no_archive_is_refused(tmp_path: Path, served: Served, content: bytes, message: str) -> None:
    served.site = Site({"some.zip": content})
    with pytest.raises(DataError, match=message):
        fetch(some(served, hashlib.md5(content).hexdigest()), tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["some.zip.part"]


def test_the_cache_is_where_the_desktop_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fedtower"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fedtower"
