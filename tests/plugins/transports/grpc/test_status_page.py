"""The live page, as a real browser sees it of a real run: server, devices and all."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from playwright.sync_api import Page

from fedtower.core.cli import call
from fedtower.protos.v1 import federation_pb2 as pb
from fedtower.protos.v1.federation_pb2_grpc import FederationStub
from fedtower.recsys.process_log import logged
from fedtower.recsys.report import write_report

Opens = Callable[..., Page]

CLIENTS = 4
NAME = "<img src=x onerror=alert(1)>"
SMALL = {
    "name": NAME,
    "data.users": 40,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 8,
    "local.batch_size": 8,
    "local.negatives": 8,
    "local.history_length": 8,
    "cohort.size": 3,
    "rounds": 500,
    "evaluation.every": 2,
    "evaluation.negatives": 10,
}
SERVED = {"transport.wait_for": CLIENTS, "transport.deadline_seconds": 300.0}


class Served:
    """A server and a swarm of devices that go on for as long as they are looked at."""

    def __init__(self, place: Path) -> None:
        self.place, self.page, self.target = place, "", ""
        self.said = (place / "said").open("w+")
        self.processes: list[subprocess.Popen[bytes]] = []

    def begin(self) -> None:
        """Serve, and let the devices call."""
        place, keys = self.place, self.place / "keys"
        small = [word for key, value in SMALL.items() for word in ("-o", f"{key}={json.dumps(value)}")]
        served = [word for key, value in SERVED.items() for word in ("-o", f"{key}={json.dumps(value)}")]
        assert call(["data", "shard", "dssm-synthetic", str(place / "shards"), "-n", str(CLIENTS), *small]) == 0
        assert call(["keygen", str(keys)]) == 0
        codes = self.output(
            "enrol", "codes", str(keys / "credentials.sqlite"), "-n", str(CLIENTS), "--first-client", "0"
        )
        (place / "codes").write_text(codes)
        doors = ("--port", "0", "--insecure", "--keys", str(keys), "--runs", str(place / "runs"))
        self.server = self.start("serve", "dssm-synthetic", *doors, *small, *served)
        ready = self.soon(lambda: json.loads((self.folder / "intake.json").read_text()))
        self.page, self.target = ready["page"], f"127.0.0.1:{ready['port']}"
        self.start(
            *("swarm", "--server", self.target, "--insecure", "--data", str(place / "shards")),
            *("--codes", str(place / "codes"), "--keys", str(keys), "--patience", "30"),
        )

    @property
    def folder(self) -> Path:
        return next((self.place / "runs").iterdir())

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fedtower", *arguments]
        process = subprocess.Popen(command, stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True)
        self.processes.append(process)
        return process

    def output(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "fedtower", *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.output("status", str(self.folder), "--json"))
        return told

    def soon(self, look: Callable[[], Any]) -> Any:
        until = time.monotonic() + 120.0
        while time.monotonic() < until:
            try:
                if found := look():
                    return found
            except (OSError, ValueError, KeyError, StopIteration):
                pass
            assert self.server.poll() is None, (self.place / "said").read_text()[-3000:]
            time.sleep(0.1)
        raise AssertionError((self.place / "said").read_text()[-3000:])

    def end(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
                process.wait(30.0)
        self.said.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, browser: Opens) -> Iterator[Served]:
    """A run that is being served, where there is a browser to see it."""
    run = Served(tmp_path_factory.mktemp("served"))
    try:
        run.begin()
        yield run
    finally:
        run.end()


@pytest.fixture(scope="module")
def page(served: Served, browser: Opens) -> Page:
    """The live page, once there is something to see."""
    page = browser()
    page.goto(served.page)
    seen(page, lambda: page.locator("#charts figure").count() > 1)
    return page


def seen(page: Page, look: Callable[[], bool], seconds: float = 90.0) -> None:
    """Return once it is to be seen. The page's own scripts may not evaluate text, so nothing waits inside of it."""
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until, page.locator("body").inner_text()
        page.wait_for_timeout(100)


def told(page: Page) -> dict[str, Any]:
    """What the page is told."""
    values: dict[str, Any] = page.evaluate("fetch('status.json').then((answer) => answer.json())")
    return values


def tile(page: Page, name: str) -> str:
    return (
        page.locator("#tiles div", has=page.locator("dt", has_text=re.compile(f"^{name}$")))
        .locator("dd")
        .first.inner_text()
    )


def test_rounds_and_curves_are_drawn_as_they_come(served: Served, page: Page) -> None:
    assert page.locator("h1").inner_text() == NAME
    assert page.locator("img").count() == 0
    rounds, planned = map(int, tile(page, "Rounds done").split(" / "))
    assert (rounds >= 2, planned) == (True, 500)
    seen(page, lambda: int(tile(page, "Rounds done").split(" / ")[0]) > rounds)
    assert tile(page, "Devices there") == str(CLIENTS)
    assert page.locator("#processes tbody tr").all_inner_texts()[0].startswith("supervisor")
    assert "committed" in page.locator("#windows").inner_text()


def test_a_curve_has_a_point_for_each_value_and_tells_it(page: Page) -> None:
    curves = told(page)["curves"]
    assert list(curves) == ["training loss", "validation HR@10", "validation NDCG@10"]
    losses = page.locator("#charts figure").first
    points = losses.locator("circle title").all_text_contents()
    assert len(points) >= 2
    for said, (round, loss) in zip(points, curves["training loss"], strict=False):
        assert said == f"round {round}: training loss {loss:.3f}"
    path = losses.locator("path").get_attribute("d") or ""
    assert path.startswith("M")
    assert path.count("L") == len(points) - 1


def test_a_refusal_is_seen_by_its_reason(served: Served, page: Page) -> None:
    channel = grpc.insecure_channel(served.target)
    with channel, pytest.raises(grpc.RpcError):
        FederationStub(channel).CheckIn(pb.CheckInRequest(), metadata=(("authorization", "Bearer a.b"),), timeout=10.0)
    seen(page, lambda: "unknown_device" in page.locator("#refusals").inner_text())
    assert tile(page, "Refused") == "1"


@pytest.mark.parametrize(("dark", "width"), [(False, 1100), (True, 1100), (False, 390), (True, 390)])
def test_it_reads_in_light_and_dark_and_on_a_phone(
    served: Served, browser: Opens, tmp_path: Path, dark: bool, width: int
) -> None:
    page = browser(dark=dark, width=width)
    page.goto(served.page)
    page.wait_for_selector("#charts svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = "getComputedStyle(document.body)[%r]"
    page_colour, text = (page.evaluate(colours % name) for name in ("backgroundColor", "color"))
    assert (page_colour, text) == (
        ("rgb(20, 24, 29)", "rgb(232, 236, 240)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    )
    picture = (
        Path(os.environ.get("FEDTOWER_SCREENSHOTS", tmp_path)) / f"status-{'dark' if dark else 'light'}-{width}.png"
    )
    assert len(page.screenshot(path=picture, full_page=True)) > 10_000
    page.close()


def test_the_terminal_says_the_same_in_eighty_columns(served: Served, page: Page) -> None:
    ours, theirs = served.status(), json.loads(served.output("status", "--server", served.page, "--json"))
    assert ours.keys() == theirs.keys() == told(page).keys()
    assert [each["name"] for each in ours["processes"] if each["alive"]] == ["supervisor", "intake", "table"]
    assert ours["page"] == served.page
    assert ours["bytes_up"] > 0
    assert ours["bytes_down"] > 0
    until = time.monotonic() + 30.0
    while served.status()["acknowledged"]["train"] < 3 * ours["round"]:  # what is counted is written each second
        assert time.monotonic() < until
        time.sleep(0.2)
    lines = served.output("status", "--runs", str(served.place / "runs")).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("live page" in line for line in lines)


def test_the_page_says_when_the_server_is_gone_and_goes_on_when_it_is_back(served: Served, page: Page) -> None:
    gone = page.locator("#gone")
    assert gone.is_hidden()
    intake = next(each["pid"] for each in served.status()["processes"] if each["name"] == "intake")
    os.kill(intake, signal.SIGSTOP)
    try:
        page.wait_for_selector("body[data-server=gone]", timeout=30_000)
        assert "The server is gone: nobody answers. What you see is of" in gone.inner_text()
    finally:
        os.kill(intake, signal.SIGKILL)
    page.wait_for_selector("body[data-server=there]", timeout=60_000)
    assert gone.is_hidden()
    assert tile(page, "Refused") == "1"  # what was counted before the kill still counts


def test_a_table_process_that_was_killed_is_missed_until_it_gives_rows_again(served: Served) -> None:
    def reasons() -> set[str]:
        with closing(http.client.HTTPConnection(urlsplit(served.page).netloc, timeout=5.0)) as line:
            line.request("GET", "/health")
            answer = line.getresponse()
            found = set(json.loads(answer.read())["reasons"])
        assert answer.status == (503 if found else 200)
        return found

    served.soon(lambda: not reasons())
    table = next(each["pid"] for each in served.status()["processes"] if each["name"] == "table")
    os.kill(table, signal.SIGKILL)
    served.soon(lambda: reasons() == {"table"})
    served.soon(lambda: not reasons())


def test_afterwards_the_folder_says_how_it_stood(served: Served, page: Page, browser: Opens) -> None:
    served.server.send_signal(signal.SIGTERM)
    assert served.server.wait(30.0) == 130
    page.wait_for_selector("body[data-server=gone]", timeout=30_000)
    ended = served.status()
    assert (ended["phase"], ended["page"], ended["trouble"]) == ("stopped", "", "")
    assert not [each for each in ended["processes"] if each["alive"]]
    assert ended["round"] >= 2
    lines = list(logged(served.folder))
    assert {name for name, _ in lines} == {"supervisor", "intake", "table"}
    assert all({"time", "process", "pid", "level", "event"} <= values.keys() for _, values in lines)
    events = [values["event"] for name, values in lines if name == "supervisor"]
    assert [events[0], events[-1], "restarting" in events] == ["started", "stopped", True]
    report = browser(dark=True, width=390)
    report.goto(write_report([served.folder]).resolve().as_uri())
    assert "fedtower serve" in report.locator(".note").first.inner_text()
    assert report.locator("svg").count() >= 2
    assert report.evaluate("document.documentElement.scrollWidth") <= 390
    picture = os.environ.get("FEDTOWER_SCREENSHOTS")
    if picture:
        report.screenshot(path=Path(picture) / "report-dark-390.png", full_page=True)
