"""What may be imported where, looked at from fresh interpreters."""

import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "plugins", "protos", "recsys")

HEAVY = {"torch", "torchrec", "fbgemm_gpu", "pandas", "pyarrow", "onnx", "faiss", "mlflow", "tensorboard"}
NOT_ON_A_DEVICE = HEAVY | {"click", "rich"}

# The floor of recsys that devices stand on too.
STARRED = (
    *("vocabulary", "history", "batches", "negatives", "metrics", "evaluation"),
    *("bundle", "device", "engine", "reranking", "visits", "shards", "on_device", "own_model", "line"),
    *("process_log", "running", "runlog", "status"),
)

# The wire, the signer, and what a device and a server without torch have of the transport.
WIRE = (
    "fedtower.protos.v1.federation_pb2_grpc",
    "fedtower.plugins.signers.ed25519.verifier",
    *(
        f"fedtower.plugins.transports.grpc.{name}"
        for name in (
            *("artefacts", "bounds", "codec", "credentials", "enrolment", "interceptors"),
            *("plans", "rates", "refusals", "tensors", "tls", "serve", "device"),
        )
    ),
)


def modules_after(code: str, cwd: Path = ROOT) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running the code."""
    listing = "import json, sys\nprint()\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    child = subprocess.run(
        [sys.executable, "-c", f"{code}\n{listing}"], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return set(json.loads(child.stdout.splitlines()[-1]))


def device_path() -> list[str]:
    """Core without its top layer (the command line and the promises), the lower floor of recsys, and the wire."""
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    top = parser["importlinter:contract:core"]["layers"].strip().splitlines()[0]
    above = {"__init__", *(name.strip() for name in top.split(":"))}
    core = sorted(path.stem for path in (ROOT / "core").glob("*.py") if path.stem not in above)
    return [f"fedtower.core.{name}" for name in core] + [f"fedtower.recsys.{name}" for name in STARRED] + [*WIRE]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_not_importable_by_its_bare_name(room: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode != 0
    assert f"ImportError: import fedtower.{room}, not {room}" in child.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_importable_from_anywhere(room: str, tmp_path: Path) -> None:
    modules_after(f"import fedtower.{room}", cwd=tmp_path)


def test_the_device_path_imports_no_heavy_library() -> None:
    modules = device_path()
    assert len(modules) > 20
    held = modules_after("\n".join(f"import {module}" for module in modules))
    assert "numpy" in held
    assert not held & NOT_ON_A_DEVICE


def test_importing_fedtower_imports_nothing_but_itself() -> None:
    assert not modules_after("import fedtower") & (NOT_ON_A_DEVICE | {"numpy", "pluggy"})


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["plugins", "list"], ["plugins", "list", "--json"], ["recipes"]]
)
def test_light_commands_import_no_heavy_library(words: list[str]) -> None:
    run = f"""
from fedtower.core.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code, end.code
"""
    assert not modules_after(run) & HEAVY


def test_the_search_for_heavy_modules_finds_them() -> None:
    assert "pandas" in modules_after("import pandas")


def test_help_imports_three_libraries() -> None:
    loaded = modules_after("from fedtower.core.cli import call; assert call(['--help']) == 0")
    others = {name for name in loaded - set(sys.stdlib_module_names) if not name.startswith("_")}
    assert others == {"fedtower", "click", "numpy", "pluggy"}, "each one more is paid by every command"


def test_the_public_names_are_what_they_say() -> None:
    import fedtower

    for name in fedtower.__all__:
        assert getattr(fedtower, name) is not None
    assert set(fedtower.__all__) <= set(dir(fedtower))
    with pytest.raises(AttributeError, match="has no attribute 'runn'; it offers"):
        _ = fedtower.runn
