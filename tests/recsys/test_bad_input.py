"""What goes wrong outside of fedtower is told in one paragraph that says what to do, with the documented exit code.

Full and read-only disks are real file systems, mounted for a child process alone. That takes the right to mount, which
root has, and most Linux machines give to anybody in a user namespace; where neither is so the tests are skipped on a
desk, and fail where CI is set.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtower.core.cli import EXIT_CODES, call
from fedtower.core.draws import Draws
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.run import Run
from fedtower.recsys.testing.states import saved

Start = Callable[..., Any]
Options = Callable[..., list[str]]
Refused = Callable[..., str]

DRAWS = Draws(4)
WIDTH = shutil.get_terminal_size().columns
NO_DISK = 77  # of forks.py


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Types a command line that must be refused with this exit code; its one paragraph, in one line."""

    def type_it(code: int, *words: object) -> str:
        capsys.readouterr()
        got = call([str(word) for word in words])
        out, err = capsys.readouterr()
        assert got == code, err
        return paragraph(err, out)

    return type_it


def paragraph(err: str, out: str = "") -> str:
    """What was said, once it is sure that it is one paragraph and no traceback."""
    assert "Traceback" not in out + err
    assert 'File "' not in err
    assert err.startswith("error: ")
    assert "\n\n" not in err.strip()
    assert all(len(line) <= WIDTH or " " not in line for line in err.removeprefix("error: ").splitlines())
    assert "bug" not in err
    return " ".join(err.split())


@pytest.fixture
def run_copy(federated_run: Run, tmp_path: Path) -> Path:
    """The finished run with checkpoints of rounds 4 and 6, to be damaged."""
    return Path(shutil.copytree(federated_run.folder, tmp_path / "run"))


def csv(folder: Path, *changes: tuple[int, str], more: str = "") -> list[str]:
    """The options that use a file of 30 users with 12 events each; ``changes`` are lines of it, counted from 1."""
    lines = ["user,item,rating,timestamp"]
    for user in range(30):
        for time, item in enumerate(DRAWS.permutation(120, "items", user)[:12]):
            lines.append(f"{user},{item},{1 + time % 5},{1_000_000 + 100 * time + user}")
    for line, text in changes:
        lines[line - 1] = text
    (folder / "visits.csv").write_text("\n".join(lines) + "\n" + more, "utf-8")
    return words_for("visits.csv")


def words_for(path: str) -> list[str]:
    settings = {
        "data.name": "interactions",
        "data.path": path,
        "data.rating": "rating",
        "data.timestamp": "timestamp",
        "rounds": 2,
        "cohort.size": 5,
        "model.dim": 8,
        "local.negatives": 10,
        "local.history_length": 5,
    }
    return [f"--option={key}={value}" for key, value in settings.items()]


def test_the_exit_codes_are_documented() -> None:
    told = textwrap.dedent(EXIT_CODES)
    for code, words in ((2, "recipe"), (3, "data"), (5, "checkpoint"), (6, "disk"), (130, "interrupted")):
        assert any(line.split()[:1] == [str(code)] and words in line for line in told.splitlines())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("local.negativs=3", "local.negativs is not a setting of LocalSettings (did you mean 'negatives'?)"),
        ("lokal.negatives=3", "lokal is not a setting of Recipe (did you mean 'local'?)"),
        ("model.dimm=8", "model.dimm is not a setting of DSSM (did you mean 'dim'?)"),
        ("local.lr=fast", "local.lr must be float, but is 'fast' (str)"),
        ("model.dim=6", "model.dim must be a positive multiple of 4, not 6"),
        ("aggregator.name=fedavgg", "no plugin offers the aggregator 'fedavgg' (did you mean 'fedavg'?)"),
        ("model.name=dsm", "no plugin offers the model 'dsm' (did you mean 'dssm'?)"),
        ("data.name=sinthetic", "no plugin offers the dataset 'sinthetic' (did you mean 'synthetic'?)"),
        ("data.split=leave_one_ou", "(did you mean 'leave_one_out'?)"),
        ("plugins.block=['model-dsmm']", "(did you mean 'model-dssm'?)"),
    ],
)
def test_a_misspelt_word_is_refused_and_the_nearest_is_named(
    run_root: Path, refused: Refused, override: str, said: str
) -> None:
    code = 4 if override.startswith("plugins") else 2
    assert said in refused(code, "run", "dssm-synthetic", "-o", override)
    assert not list(run_root.iterdir())


def test_a_recipe_that_is_not_toml_is_refused_with_the_line(run_root: Path, refused: Refused) -> None:
    (run_root / "my.toml").write_text('name = "x"\nrounds = = 3\n', "utf-8")
    assert "my.toml is not TOML: Invalid value (at line 2, column 10)" in refused(2, "run", "my.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3,7,five,10", "visits.csv, line 18, column 3 (rating): expected a number, got 'five'"),
        ("3,7", "visits.csv, line 18, column 3: expected 4 columns separated by ',', got 2"),
        ("3,7,1,10,11", "visits.csv, line 18, column 5: expected 4 columns separated by ',', got 5"),
        (",7,1,10", "visits.csv, line 18, column 1 (user): expected"),
        ("3,7,1,soon", "visits.csv, line 18, column 4 (timestamp): expected"),
    ],
)
def test_a_broken_line_is_named_with_what_was_expected(run_root: Path, refused: Refused, text: str, said: str) -> None:
    told = refused(3, "run", "dssm-synthetic", *csv(run_root, (18, text)))
    assert said in told
    assert "correct or remove" in told


@pytest.mark.parametrize("content", ["", "user,item,rating,timestamp\n"])
def test_a_file_without_events_is_refused(run_root: Path, refused: Refused, content: str) -> None:
    (run_root / "none.csv").write_text(content, "utf-8")
    assert "none.csv is empty; expected" in refused(3, "run", "dssm-synthetic", *words_for("none.csv"))


def test_a_file_that_is_not_there_is_refused_with_where_it_was_looked_for(run_root: Path, refused: Refused) -> None:
    told = refused(3, "run", "dssm-synthetic", *words_for("gone.csv"))
    assert "there is no file gone.csv; expected a CSV or Parquet file" in told
    assert str(run_root) in told


def test_a_user_with_one_event_harms_nobody(run_root: Path) -> None:
    assert call(["run", "dssm-synthetic", *csv(run_root, more="lonely,5,3,1000000\n")]) == 0
    summary = json.loads((run_root / "runs/dssm-synthetic-1/summary.json").read_text("utf-8"))
    assert {event["users"] for event in summary["evaluations"]} == {30}
    assert call(["recommend", "runs/dssm-synthetic-1", "--user", "lonely"]) == 0


def test_data_of_nothing_but_users_with_one_event_is_refused(run_root: Path, refused: Refused) -> None:
    lines = ["user,item,rating,timestamp", *(f"{user},{user % 9},3,{1000 + user}" for user in range(40))]
    (run_root / "lonely.csv").write_text("\n".join(lines), "utf-8")
    told = refused(3, "run", "dssm-synthetic", *words_for("lonely.csv"))
    assert "their histories are too short" in told
    assert "choose another data.split" in told


def test_a_user_who_touched_everything_is_refused_with_a_way_out(run_root: Path, refused: Refused) -> None:
    lines = ["user,item,rating,timestamp", *(f"{user},{item},3,{item}" for user in range(9) for item in range(6))]
    (run_root / "all.csv").write_text("\n".join(lines), "utf-8")
    told = refused(3, "run", "dssm-synthetic", *words_for("all.csv"))
    assert "has touched all of the 6 items" in told
    assert "leave such clients out of the data, or use a larger catalogue" in told


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("simulated", 8, "lower local.lr or add 'clip'"),
        ("standalone", 9, "the training has most likely diverged: lower the learning rates, or add the transform clip"),
    ],
)
def test_a_training_that_diverges_is_stopped_with_what_to_do(
    run_root: Path, refused: Refused, options: Options, mode: str, code: int, said: str
) -> None:
    wild = {"mode": mode, "local.lr": 1e30, "standalone.lr": 1e30, "standalone.row_lr": 1e30, "transforms": []}
    words = [word for word in options(wild) if "transforms.0" not in word]
    assert said in refused(code, "run", "dssm-synthetic", *words)


@pytest.mark.parametrize("words", [["resume"], ["evaluate"], ["recommend", "--user", "u1"]])
@pytest.mark.parametrize("how", ["cut", "altered", "gone", "manifest"])
def test_a_damaged_checkpoint_is_refused_with_the_one_before_it(
    run_copy: Path, refused: Refused, words: list[str], how: str
) -> None:
    newest = run_copy / "checkpoints" / "000006"
    file = max(newest.glob("*.npy"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "altered":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "gone":
        file.unlink()
    else:
        manifest = newest / "manifest.json"
        manifest.write_text(manifest.read_text("utf-8")[:100], "utf-8")
    told = refused(5, *words, run_copy)
    assert str(newest) in told
    assert "Continue from the one before it with --from 4." in told
    assert "is damaged" in told


def test_the_way_out_of_a_damaged_checkpoint_works(run_copy: Path, refused: Refused, federated_run: Run) -> None:
    for file in (run_copy / "checkpoints" / "000006").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:50])
    refused(5, "resume", run_copy)
    assert call(["resume", str(run_copy), "--from", "4"]) == 0
    assert Run(run_copy).metrics == federated_run.metrics
    assert Run(run_copy).evaluate().metrics == federated_run.metrics


def test_the_only_checkpoint_damaged_leaves_the_beginning(run_copy: Path, refused: Refused) -> None:
    shutil.rmtree(run_copy / "checkpoints" / "000004")
    (run_copy / "checkpoints" / "000006" / "manifest.json").unlink()
    assert "There is no older one here: start the run again" in refused(5, "resume", run_copy)


@pytest.mark.parametrize("mode", ["federated", "standalone"])
@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("dim = 8", "dim = 12", "'table/item' has shape (200, 8), but this model has (200, 12)"),
        ("hidden = 16", "hidden = 24", "'first.bias' has shape (16,), but this model's has (24,)"),
        ("users = 60", "users = 40", "but the data has 40 clients; bring back the data that the run was started with"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest, refused: Refused, mode: str, was: str, becomes: str, said: str
) -> None:
    run = Path(shutil.copytree(request.getfixturevalue(f"{mode}_run").folder, tmp_path / "run"))
    recipe = run / "recipe.toml"
    text = recipe.read_text("utf-8")
    assert text.count(was) == 1
    recipe.write_text(text.replace(was, becomes), "utf-8")
    assert said in refused(5, "resume", run)


@pytest.mark.parametrize("file", ["recipe.toml", "log.jsonl"])
def test_a_run_folder_that_lacks_a_file_is_refused(run_copy: Path, refused: Refused, file: str) -> None:
    (run_copy / file).unlink()
    assert "not a run folder" in refused(5, "resume", run_copy)


def test_a_place_that_is_below_a_file_is_refused(run_root: Path, refused: Refused, options: Options) -> None:
    (run_root / "runs").write_text("", "utf-8")
    told = refused(6, "run", "dssm-synthetic", *options(), "--runs", "runs/mine")
    assert "the folder runs/mine cannot be made: a part of that path is a file; choose another folder" in told


@pytest.fixture
def on_disk(fork: Start) -> Start:
    """Runs a command line for which a folder is a file system of its own: ``tmpfs`` of a size, or ``readonly``."""

    def run(*words: object, folder: Path, disk: tuple[Path, str, int], **more: Any) -> Any:
        place, kind, size = disk
        child = fork(*words, folder=folder, disk=[str(place), kind, size], **more)
        if child.wait() == NO_DISK:
            missing = f"this process may not mount a file system ({child.err})"
            if os.environ.get("CI"):
                pytest.fail(f"{missing}, and CI is set: full and read-only disks must be tried here")
            pytest.skip(f"{missing}: run as root, or where user namespaces are allowed")
        return child

    return run


@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_read_only_disk_is_refused(
    tmp_path: Path, run_copy: Path, on_disk: Start, options: Options, command: str
) -> None:
    words = ["resume", run_copy] if command == "resume" else ["run", "dssm-synthetic", "--runs", run_copy, *options()]
    before = sorted((path, path.stat().st_mtime_ns) for path in run_copy.rglob("*"))
    child = on_disk(*words, folder=tmp_path, disk=(run_copy, "readonly", 0))
    assert child.code == 6, child.err
    told = paragraph((tmp_path / "err").read_text("utf-8"), child.out)
    assert f"cannot write to {run_copy}: the file system is read-only; choose another folder" in told
    assert sorted((path, path.stat().st_mtime_ns) for path in run_copy.rglob("*")) == before


@pytest.mark.parametrize("words", [["evaluate"], ["recommend", "--user", "u1"]])
def test_a_finished_run_on_a_read_only_disk_can_be_used(
    tmp_path: Path, run_copy: Path, on_disk: Start, words: list[str]
) -> None:
    child = on_disk(*words, run_copy, folder=tmp_path, disk=(run_copy, "readonly", 0))
    assert (child.code, child.err) == (0, "")


# 4 kB are full with the first files, 60 kB with the first checkpoint, 200 kB with a later one.
@pytest.mark.parametrize("size", [4_096, 60_000, 200_000])
def test_a_full_disk_is_refused_and_the_run_goes_on_when_there_is_space(
    tmp_path: Path, on_disk: Start, options: Options, federated_run: Run, size: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["--runs", str(disk), *options({"checkpoint.every": 1, "checkpoint.keep": 9})]
    again = ["resume", str(disk / "dssm-synthetic-1")] if size == 200_000 else ["run", "dssm-synthetic", *words]
    child = on_disk("run", "dssm-synthetic", *words, folder=tmp_path, disk=(disk, "tmpfs", size))
    assert child.code == 6, child.err
    told = paragraph((tmp_path / "err").read_text("utf-8"), child.out)
    assert f"cannot write to {disk}" in told
    assert "the disk is full; free some space" in told

    child = on_disk(
        "run", "dssm-synthetic", *words, folder=tmp_path, disk=(disk, "tmpfs", size), later=[[10_000_000, again]]
    )
    assert child.code == 0, child.err
    (finished,) = [path.parent for path in (tmp_path / "kept").glob("*/summary.json")]
    one, other = (saved(folder / "checkpoints", 6) for folder in (finished, federated_run.folder))
    assert_same_bits(one, other)
