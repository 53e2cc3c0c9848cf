"""A folder that a user names is made, or it is said why not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtower.core.cli import call
from fedtower.core.errors import StorageError
from fedtower.core.folders import make_folder


def in_a_file(place: Path) -> Path:
    (place / "file").touch()
    return place / "file" / "keys"


def a_file(place: Path) -> Path:
    (place / "file").touch()
    return place / "file"


def a_link_to_nowhere(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere" / "at all")
    return place / "link"


def a_link_to_itself(place: Path) -> Path:
    (place / "link").symlink_to(place / "link")
    return place / "link" / "keys"


IMPOSSIBLE: dict[str, Callable[[Path], Path]] = {
    "a part of that path is a file": in_a_file,
    "something else has that name": a_file,
    "a link to nowhere": a_link_to_nowhere,
    "a part of that path is not there and cannot be made": lambda _: Path("/proc/nothing/keys"),
    "a name in it is too long": lambda place: place / ("x" * 300),
    "links that lead to one another": a_link_to_itself,
}


def test_a_folder_is_made_with_those_above_it_and_stays(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
        (tmp_path / "a" / "b" / "kept").touch()


@pytest.mark.parametrize("why", IMPOSSIBLE)
def test_one_that_cannot_be_made_is_refused_with_the_reason(why: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"cannot be made: .*{why}"):
        make_folder(IMPOSSIBLE[why](tmp_path))


@pytest.mark.parametrize("why", IMPOSSIBLE)
@pytest.mark.parametrize(
    "command",
    [["certs", "{}", "--host", "localhost"], ["keygen", "{}"]],
    ids=lambda command: command[0],
)
def test_a_command_says_so_and_does_not_call_it_a_bug(
    command: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = IMPOSSIBLE[why](tmp_path)
    code = call([word.format(place) for word in command])
    said = capsys.readouterr().err
    assert "bug" not in said
    assert code in (2, StorageError.exit_code)  # 2: click looks at an argument before the command does
    assert "choose another" in " ".join(said.split()) or code == 2
