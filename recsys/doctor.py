"""The doctor: what is installed, what is missing for what, and the command that mends it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fedtower
from fedtower.core.errors import MissingDependency
from fedtower.core.offers import canonical
from fedtower.recsys.installation import (
    has_gpu_driver,
    install_command,
    installed,
    pip,
    this_machine,
    torch_sees_cuda,
    why_not_importable,
)

SHIM = "cpu.shim"

# torchrec's compiled half and torch itself must be of one release; other pairs fail at import with an undefined symbol.
TORCH_OF_TORCHREC: Mapping[str, str] = {"1.6": "2.11", "1.7": "2.12", "1.8": "2.13", "1.9": "2.14"}

Health = Literal["ok", "missing", "broken"]
_STYLES: Mapping[Health, str] = {"ok": "green", "missing": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Library:
    """A library that fedtower may use: its names, what it is for, and the extra that brings it, if any."""

    distribution: str
    module: str
    used_for: str
    extra: str | None = None


@dataclass(frozen=True)
class Finding:
    """What was found out about one library or tool."""

    name: str
    health: Health
    version: str
    used_for: str
    detail: str = ""


@dataclass(frozen=True)
class Feature:
    """Something that a user wants to do, and the libraries that it needs."""

    name: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a feature works here; if not, why, and the command that mends it."""

    feature: str
    works: bool
    why: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Problem:
    """A known bad state, and the command that mends it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor saw."""

    fedtower: str
    machine: Mapping[str, str]
    findings: tuple[Finding, ...]
    problems: tuple[Problem, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def base_works(self) -> bool:
        """Whether the command line and the light half work at all."""
        return self.verdicts[0].works


BASE = ("numpy", "pluggy", "click", "rich", "tomli-w")
TRAINING = (*BASE, "torch", "torchrec", "fbgemm-gpu")

LIBRARIES = (
    Library("numpy", "numpy", "everything"),
    Library("pluggy", "pluggy", "plugins"),
    Library("click", "click", "the command line"),
    Library("rich", "rich", "tables and progress lines"),
    Library("tomli-w", "tomli_w", "writing a run's recipe"),
    Library("torch", "torch", "training", "cloud"),
    Library("torchrec", "torchrec", "tables of the cloud", "cloud"),
    Library("fbgemm-gpu", "fbgemm_gpu", "torchrec's kernels", "cloud"),
    Library("pandas", "pandas", "data sets from files", "cloud"),
    Library("pyarrow", "pyarrow", "Parquet files", "cloud"),
    Library("tensorboard", "tensorboard", "the tensorboard tracker", "trackers"),
    Library("mlflow-skinny", "mlflow", "the mlflow tracker", "trackers"),
    Library("psycopg", "psycopg", "the postgresql journal", "postgresql"),
    Library("onnx", "onnx", "export to devices", "cloud"),
    Library("onnxscript", "onnxscript", "export to devices", "cloud"),
    Library("onnxruntime", "onnxruntime", "the onnx runtime", "cloud"),
    Library("safetensors", "safetensors", "bundles for devices", "cloud"),
    Library("faiss-cpu", "faiss", "the faiss index: search in large catalogues", "cloud"),
    Library("grpcio", "grpc", "the wire between devices and a server", "device"),
    Library("protobuf", "google.protobuf", "the messages of the wire", "device"),
    Library("ray", "ray", "a simulation's workers on a cluster", "ray"),
    Library("MNN", "MNN", "the mnn runtime: training on devices", "device"),
    Library("prometheus-client", "prometheus_client", "what a server counts", "server"),
    Library("cryptography", "cryptography", "certificates, and signatures of plans", "device"),
)

EXPORT = ("onnx", "onnxscript", "onnxruntime", "safetensors")
WIRE = ("grpcio", "protobuf", "cryptography")

FEATURES = (
    Feature("the command line, recipes and plugins", BASE),
    Feature("training, evaluation and recommendation", TRAINING),
    Feature("data sets from CSV files, and MovieLens", (*TRAINING, "pandas")),
    Feature("data sets from Parquet files", (*TRAINING, "pandas", "pyarrow")),
    Feature('device = "cuda"', (*TRAINING, "CUDA")),
    Feature("the faiss index", (*TRAINING, "faiss-cpu")),
    Feature("the tensorboard tracker", ("torch", "tensorboard")),
    Feature("the mlflow tracker", ("mlflow-skinny",)),
    Feature("the postgresql journal", ("psycopg",)),
    Feature("export to devices, and the onnx runtime", (*TRAINING, *EXPORT)),
    Feature("certificates, enrolment and signatures", (*BASE, *WIRE)),
    Feature("a server for devices: fedtower serve", (*TRAINING, *EXPORT, "MNN", *WIRE, "prometheus-client")),
    Feature("a device: fedtower device", (*BASE, *WIRE, "MNN", "safetensors")),
    Feature("runtime.cluster: workers on a Ray cluster", (*TRAINING, "ray")),
    Feature("the mnn runtime", (*TRAINING, "onnx", "onnxscript", "MNN", "safetensors")),
)


def examine(
    versions: Mapping[str, str],
    probe: Callable[[str], str | None],
    machine: Mapping[str, str],
    cuda: bool | None = None,
) -> Diagnosis:
    """The diagnosis of an installation.

    Args:
        versions: Of the installed distributions, by canonical name; see :func:`installed`.
        probe: Gives why a module cannot be imported, or ``None``; see :func:`why_not_importable`.
        machine: System, architecture and Python version; see :func:`this_machine`.
        cuda: Whether torch sees a GPU; ``None`` asks torch in a process of its own.
    """
    present = [library for library in LIBRARIES if _version(library, versions)]
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        reasons = dict(zip(present, pool.map(lambda library: probe(library.module), present), strict=True))
    findings = [_finding(library, versions, reasons.get(library)) for library in LIBRARIES]
    if cuda is None:
        cuda = any(f.name == "torch" and f.health == "ok" for f in findings) and torch_sees_cuda()
    findings.append(_cuda(cuda, versions))
    problems = (*machine_problems(machine), *fbgemm_problems(versions, cuda), *pairing_problems(versions))
    by_name = {finding.name: finding for finding in findings}
    verdicts = tuple(_verdict(feature, by_name) for feature in FEATURES)
    return Diagnosis(fedtower.__version__, machine, tuple(findings), problems, verdicts)


def machine_problems(machine: Mapping[str, str]) -> tuple[Problem, ...]:
    """What this machine lacks from the start.

    >>> machine_problems({"system": "Linux", "architecture": "x86_64", "python": "3.11.4"})
    ()
    """
    problems = []
    system, architecture, python = machine["system"], machine["architecture"], machine["python"]
    if (system, architecture) != ("Linux", "x86_64"):
        what = (
            f"fedtower is made for Linux on x86-64, and this is {system} on {architecture}, for which torchrec's CPU "
            "kernels (fbgemm-gpu-cpu) have no wheels: the base works, training does not"
        )
        problems.append(Problem(what, "run it on a Linux x86-64 machine or in such a container"))
    if tuple(map(int, python.split(".")[:2])) < (3, 11):
        problems.append(Problem(f"Python {python} is too old: 3.11 or newer is needed", "install Python 3.11"))
    return tuple(problems)


def fbgemm_problems(versions: Mapping[str, str], cuda: bool) -> tuple[Problem, ...]:
    """What is wrong between fbgemm's CUDA build and its CPU build, which share one import directory.

    >>> print(fbgemm_problems({"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, cuda=True)[0].what)
    fbgemm-gpu and fbgemm-gpu-cpu are both installed: they share one directory, and one overwrote the other
    >>> fbgemm_problems({"fbgemm-gpu": "1.8.0+cpu.shim", "fbgemm-gpu-cpu": "1.8.0"}, cuda=False)
    ()
    """
    gpu, cpu = versions.get("fbgemm-gpu"), versions.get("fbgemm-gpu-cpu")
    real = gpu is not None and SHIM not in gpu
    if real and cpu is not None:
        what = "fbgemm-gpu and fbgemm-gpu-cpu are both installed: they share one directory, and one overwrote the other"
    elif real and not cuda:
        what = "fbgemm-gpu is the CUDA build, which cannot be imported where torch sees no GPU"
    elif cuda and cpu is not None:
        what = "torch sees a GPU, but fbgemm is the CPU build: tables cannot live on the GPU"
    else:
        return ()
    return (Problem(what, f"{pip('uninstall -y fbgemm-gpu fbgemm-gpu-cpu')} && {install_command('cloud', cuda=cuda)}"),)


def pairing_problems(versions: Mapping[str, str]) -> tuple[Problem, ...]:
    """Releases of torch, torchrec and fbgemm that do not belong together.

    >>> print(pairing_problems({"torch": "2.14.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"})[0].what)
    torchrec 1.8.0 belongs to torch 2.13 and fbgemm 1.8, but torch is 2.14.0
    """
    torchrec = versions.get("torchrec")
    if torchrec is None:
        return ()
    release = _release(torchrec)
    wanted = {"torch": TORCH_OF_TORCHREC.get(release), "fbgemm-gpu": release, "fbgemm-gpu-cpu": release}
    wrong = [
        f"{name} is {versions[name]}"
        for name, want in wanted.items()
        if want is not None and name in versions and _release(versions[name]) != want
    ]
    if not wrong:
        return ()
    what = (
        f"torchrec {torchrec} belongs to torch {wanted['torch'] or '?'} and fbgemm {release}, but {' and '.join(wrong)}"
    )
    return (Problem(what, install_command("cloud", cuda=SHIM not in versions.get("fbgemm-gpu", SHIM))),)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything that was found as JSON.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Say what is installed, what is missing for what, and which command mends it.

    \b
    Example:
      fedtower doctor --json
    """
    diagnosis = examine(installed(), why_not_importable, this_machine())
    if as_json:
        click.echo(json.dumps(as_dict(diagnosis), indent=2))
    else:
        show(diagnosis, Console())
    context.exit(0 if diagnosis.base_works else MissingDependency.exit_code)


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain data, for scripts."""
    return {**asdict(diagnosis), "base_works": diagnosis.base_works}


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis: libraries, then features, then what to type."""
    machine = diagnosis.machine
    console.print(
        f"fedtower {diagnosis.fedtower}, Python {machine['python']}, {machine['system']} {machine['architecture']}, "
        f"{machine['cores']} cores, {'g++ at ' + machine['compiler'] if machine['compiler'] else 'no g++'}, "
        f"FEDTOWER_DATA {machine['data'] or 'not set'}",
        highlight=False,
        soft_wrap=True,
    )
    libraries = Table("library", "", "version", "used for")
    for finding in diagnosis.findings:
        health = Text(finding.health, style=_STYLES[finding.health])
        libraries.add_row(finding.name, health, finding.version, Text(finding.used_for))
    console.print(libraries)
    features = Table("feature", "", "because")
    for verdict in diagnosis.verdicts:
        works = Text("on", style="green") if verdict.works else Text("off", style="yellow")
        features.add_row(Text(verdict.feature), works, Text(verdict.why))
    console.print(features)
    for finding in diagnosis.findings:
        if finding.detail:
            _say(console, f"{finding.name}: {finding.detail}")
    for problem in diagnosis.problems:
        _say(console, f"problem: {problem.what}\n  mend it with: {problem.remedy}")
    for remedy in dict.fromkeys(verdict.remedy for verdict in diagnosis.verdicts if verdict.remedy):
        names = ", ".join(verdict.feature for verdict in diagnosis.verdicts if verdict.remedy == remedy)
        _say(console, f"to switch on {names}:\n  {remedy}")


def _finding(library: Library, versions: Mapping[str, str], reason: str | None) -> Finding:
    version = _version(library, versions)
    if not version:
        return Finding(library.distribution, "missing", "", library.used_for)
    if reason is not None:
        return Finding(library.distribution, "broken", version, library.used_for, f"cannot be imported: {reason}")
    return Finding(library.distribution, "ok", version, library.used_for)


def _version(library: Library, versions: Mapping[str, str]) -> str:
    """The installed version of a library; of fbgemm, whichever build is there; of mlflow, the full or the light one."""
    stands_in = {"fbgemm-gpu": "fbgemm-gpu-cpu", "mlflow-skinny": "mlflow", "faiss-cpu": "faiss-gpu"}
    name = canonical(library.distribution)
    found = versions.get(name, "")
    other = stands_in.get(name, "")
    if SHIM in found:
        return f"{versions[other]} (CPU build)" if other in versions else ""
    return found or versions.get(other, "")


def _cuda(cuda: bool, versions: Mapping[str, str]) -> Finding:
    use = 'device = "cuda"'
    if cuda and "fbgemm-gpu-cpu" in versions:
        return Finding("CUDA", "broken", "", use, "torch sees a GPU, but fbgemm is the CPU build")
    if cuda:
        return Finding("CUDA", "ok", "", use)
    if has_gpu_driver():
        return Finding("CUDA", "broken", "", use, "there is an NVIDIA driver, but torch sees no GPU")
    return Finding("CUDA", "missing", "", use)


def _verdict(feature: Feature, findings: Mapping[str, Finding]) -> Verdict:
    lacking = [findings[name] for name in feature.needs if findings[name].health != "ok"]
    if not lacking:
        return Verdict(feature.name, True)
    why = ", ".join(f"{finding.name} is {finding.health}" for finding in lacking)
    if any(finding.name == "CUDA" for finding in lacking):
        remedy = install_command("cloud", cuda=True) if has_gpu_driver() else ""
        return Verdict(feature.name, False, why, remedy)
    wanted = {finding.name for finding in lacking}
    extras = dict.fromkeys(library.extra for library in LIBRARIES if library.distribution in wanted)
    base = [name for name in BASE if name in wanted]
    commands = [pip(f"install --force-reinstall {shlex.join(base)}")] if base else []
    return Verdict(feature.name, False, why, " && ".join(commands + [install_command(e) for e in extras if e]))


def _say(console: Console, words: str) -> None:
    # Commands are there to be copied: no wrapping, no markup.
    console.print(words, highlight=False, markup=False, soft_wrap=True)


def _release(version: str) -> str:
    """The first two numbers of a version: '1.8' of '1.8.0+cpu.shim'."""
    return ".".join(version.split("+")[0].split(".")[:2])
