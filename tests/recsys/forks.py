"""A process that has imported everything, and forks a child for each command line that it is given.

It reads one JSON object a line, ``{"arguments": [...], "folder": ..., "disk": [place, kind, size], "later": [[size,
arguments], ...], "environment": {...}}``, and answers with the child's process id. The child runs ``fedtower`` with
these arguments in that folder and that environment, its output in the files ``out`` and ``err`` there. With ``disk``,
the child alone sees another file system at ``place``; with ``later``, that one gets another size, other arguments are
run, and what is on it is kept in ``kept``. With ``program``, that file is run instead of ``fedtower``.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
NO_DISK = 77
"""The exit code of a child that may not have a file system of its own."""


def serve() -> None:
    """Fork a child for every line of stdin, until there are no more."""
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or become(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def warm_up() -> None:
    """Train a little, so that all is imported and set up; on one thread, as a fork inherits no others."""
    import torch

    from fedtower.core.cli import call

    importlib.import_module("fedtower.recsys.tables.sharded")  # what several processes at once need more

    torch.set_num_threads(1)
    little = {
        "data.users": 20,
        "data.items": 200,
        "data.mean_events": 21,
        "cohort.size": 2,
        "rounds": 1,
        "model.dim": 4,
    }
    with tempfile.TemporaryDirectory() as runs, redirect_stdout(io.StringIO()):
        options = [word for key, value in little.items() for word in ("-o", f"{key}={value}")]
        assert call(["run", "dssm-synthetic", "--runs", runs, *options]) == 0


def become(order: dict[str, Any]) -> NoReturn:
    """Be the command line of the order, and end with its exit code."""
    code = 70
    try:
        folder = Path(order["folder"])
        for number, name in ((0, os.devnull), (1, folder / "out"), (2, folder / "err")):
            os.dup2(os.open(name, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if number else 0), 0o644), number)
        os.chdir(folder)
        os.environ.update(order.get("environment") or {})
        if order.get("disk"):
            own_disk(*order["disk"])
        from fedtower.core.cli import call

        if order.get("program"):
            try:
                runpy.run_path(order["program"], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        else:
            code = call(order["arguments"])
        for size, arguments in order.get("later") or []:
            mount(b"none", order["disk"][0].encode(), None, MS_REMOUNT, f"size={size}".encode())
            code = call(arguments)
            shutil.copytree(order["disk"][0], folder / "kept")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def own_disk(place: str, kind: str, size: int) -> None:
    """Mount ``tmpfs`` of ``size`` bytes at ``place``, or make what is there ``readonly``, for this process alone."""
    libc = ctypes.CDLL(None)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS) and not libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
        Path("/proc/self/setgroups").write_text("deny", "utf-8")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", "utf-8")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", "utf-8")
    at = place.encode()
    mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    if kind == "tmpfs":
        mount(b"tmpfs", at, b"tmpfs", 0, f"size={size}".encode())
    else:
        mount(at, at, None, MS_BIND)
        mount(b"none", at, None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def mount(source: bytes, target: bytes, system: bytes | None, flags: int, data: bytes | None = None) -> None:
    """Mount, or end with the reason."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, target, system, ctypes.c_ulong(flags), data):
        os.write(2, os.strerror(ctypes.get_errno()).encode())
        os._exit(NO_DISK)


if __name__ == "__main__":
    serve()
