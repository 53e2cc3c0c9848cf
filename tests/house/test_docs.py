"""What the docs point at is there: files, headings, modules of the tree, and every kind of part."""

import re
from pathlib import Path

import pytest

from fedtower.core.registry import discover

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for room in ("docs", "protos", "benchmarks") for page in ROOT.glob(f"{room}/**/*.md"))]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"`((?:core|recsys|plugins|protos|benchmarks|tests)/[\w/.-]+\.(?:py|proto|toml|md))")


def anchors(page: Path) -> set[str]:
    """The headings of a page, as a link names them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_are_pages_to_look_at() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/plugins.md", "protos/README.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in LINK.findall(page.read_text("utf-8")):
        if not link.startswith(("http://", "https://")):
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (heading and heading not in anchors(target)):
                lost.append(link)
    assert not lost, f"{page.relative_to(ROOT)} points at what is not there: {lost}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_module_that_is_named_is_there(page: Path) -> None:
    lost = [name for name in MODULE.findall(page.read_text("utf-8")) if not (ROOT / name).exists()]
    assert not lost, f"{page.relative_to(ROOT)} names what is not there: {lost}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_said_to_be_in_a_module_is_in_it(page: Path) -> None:
    named = re.findall(r"`((?:core|recsys|plugins)/[\w/]+\.py): (\w+)", page.read_text("utf-8"))
    lost = [
        f"{path}: {name}" for path, name in named if not re.search(rf"\b{name}\b", (ROOT / path).read_text("utf-8"))
    ]
    assert not lost, f"{page.relative_to(ROOT)} looks for {lost}"


def test_every_kind_of_part_is_explained() -> None:
    told = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "plugins.md").read_text("utf-8"), flags=re.MULTILINE)
    assert sorted(told) == sorted(kind.name for kind in discover().kinds())


def test_every_page_of_docs_is_found_from_the_readme() -> None:
    linked = LINK.findall((ROOT / "README.md").read_text("utf-8"))
    lost = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in linked]
    assert not lost, f"README.md links to {linked}, and not to {lost}"
