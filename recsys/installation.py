"""An installation: what is there, what can be imported, what runs it, and the commands that change it.

Versions are read from the installed metadata. Whether a library can be imported is tried in a process of its own,
because a library built for another machine may crash and not only raise.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fedtower
from fedtower.core.offers import canonical

TIMEOUT_SECONDS = 120

# What torchrec 1.8 asks for besides fbgemm-gpu, and the CPU build of that.
TORCHREC_NEEDS = ["fbgemm-gpu-cpu==1.8.0", "tensordict", "torchmetrics==1.0.3", "tqdm", "pyre-extensions"]


def install_command(extra: str, *, cuda: bool = False) -> str:
    """The command that brings an extra: from the pins of a checkout, else by what the extra asks for."""
    checkout = Path(fedtower.__file__).resolve().parent.parent
    asked = requirements(extra)
    if extra == "cloud" and cuda:
        # 2.13.0+cpu satisfies torch==2.13.0, so it has to go first.
        return f"{pip('uninstall -y torch fbgemm-gpu fbgemm-gpu-cpu')} && {pip('install ' + shlex.join(asked))}"
    if extra in ("cloud", "trackers") and (checkout / "requirements" / "cpu.txt").exists():
        return f"cd {shlex.quote(str(checkout))} && {pip('install -r requirements/cpu.txt')}"
    if extra == "cloud":
        # Without the checkout there is no stand-in for fbgemm-gpu, so torchrec comes without what it asks for.
        others = [name for name in asked if not re.match("torchrec|fbgemm", name)] + TORCHREC_NEEDS
        torchrec = next(name for name in asked if name.startswith("torchrec"))
        return f"{pip('install ' + shlex.join(others))} && {pip('install --no-deps ' + torchrec)}"
    return pip("install " + shlex.join(asked))


def requirements(extra: str) -> list[str]:
    """What an extra asks for, from the installed metadata.

    >>> [name for name in requirements("cloud") if name.startswith("torch")]
    ['torch==2.13.0', 'torchrec==1.8.0']
    """
    parted = (line.partition(";") for line in metadata.requires("fedtower") or [])
    return [name.strip() for name, _, marker in parted if re.search(rf"extra == ['\"]{extra}['\"]", marker)]


def installed() -> dict[str, str]:
    """The version of every installed distribution, by canonical name."""
    names = ((entry.metadata["Name"], entry.version) for entry in metadata.distributions())
    return {canonical(name): version for name, version in names if name}


def why_not_importable(module: str) -> str | None:
    """Import a module in a process of its own; ``None`` if that works, else the last thing that it said."""
    try:
        # -P: what lies in the folder that we happen to be in is not installed.
        child = _child(f"import {module}")
    except subprocess.TimeoutExpired:
        return f"its import had not ended after {TIMEOUT_SECONDS} s"
    if child.returncode == 0:
        return None
    said = child.stderr.strip().splitlines()
    if child.returncode < 0:
        return f"its import crashed with signal {-child.returncode}"
    return said[-1] if said else f"its import ended with exit code {child.returncode}"


def torch_sees_cuda() -> bool:
    """Whether torch, asked in a process of its own, sees a GPU."""
    try:
        return _child("import torch; print(torch.cuda.is_available())").stdout.strip().endswith("True")
    except subprocess.TimeoutExpired:
        return False


def has_gpu_driver() -> bool:
    """Whether an NVIDIA driver is loaded."""
    return Path("/proc/driver/nvidia/version").exists()


def this_machine() -> dict[str, str]:
    """What runs this process."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "compiler": shutil.which("g++") or "",
        "data": os.environ.get("FEDTOWER_DATA", ""),
    }


def pip(arguments: str) -> str:
    """A command of this interpreter's pip."""
    return f"{shlex.quote(sys.executable)} -m pip {arguments}"


def _child(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
