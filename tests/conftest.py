"""What tests of every room share: the public data sets, a place for runs, and a browser."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

# What a shell starts in the background ignores SIGINT, and so would all children: tests that interrupt them could not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each takes half a minute or more: none shall be left for last, when one worker would wait for another.
LONG = (
    "plugins/transports/grpc/test_kills.py",
    "third_party/test_new_plugins.py",
    "plugins/transports/grpc/test_status_page.py",
    "plugins/transports/grpc/test_vanishing.py",
    "plugins/transports/grpc/test_asynchronous_federation.py",
    "plugins/transports/grpc/test_federation.py",
    "recsys/test_bench.py",
    "recsys/test_processes.py",
    "third_party/test_other_peoples_packages.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long modules first; within a module, and among the others, the order stays."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """What was imported stays: garbage is not looked for there any more."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets that ``FEDTOWER_DATA`` names.

    Without it a test is skipped on a desk, and fails where ``CI`` is set: there nothing may go unseen.
    """
    named = os.environ.get("FEDTOWER_DATA", "")
    folder = Path(named) if named else None
    if folder is not None and folder.is_dir():
        return folder
    missing = f"FEDTOWER_DATA names {named!r}, which is not a folder" if named else "FEDTOWER_DATA is not set"
    if os.environ.get("CI"):
        pytest.fail(f"{missing}, and CI is set: the tests on real data must run here")
    pytest.skip(f"{missing}: set it to a folder with ml-100k, ml-1m and ml-latest-small")


@pytest.fixture
def run_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the current one, so that `runs/` is made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def browser() -> "Iterator[Callable[..., Page]]":
    """Opens a page of a real browser without a window: ``browser(dark=True, width=390)``.

    The browser is Debian's. Without it a test is skipped on a desk, and fails where ``CI`` is set. A page that asks for
    anything outside of this machine, or whose script fails, fails the test.
    """
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        missing = "there is no browser: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(f"{missing}; CI is set, so the pages must be seen here")
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright  # a third of a second, which other tests need not wait for

    failures: list[str] = []
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])

        def open_page(*, dark: bool = False, width: int = 1100) -> "Page":
            page = program.new_page(
                color_scheme="dark" if dark else "light",
                viewport={"width": width, "height": 900},
                reduced_motion="reduce",
            )
            page.on("pageerror", lambda error: failures.append(str(error)))
            page.on("request", lambda request: failures.extend(_elsewhere(request.url)))
            return page

        yield open_page
        program.close()
    assert not failures


def _elsewhere(url: str) -> list[str]:
    """The address, if it is not of this machine."""
    return [] if url.startswith(("file:", "data:", "http://127.0.0.1:")) else [url]
