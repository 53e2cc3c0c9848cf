"""A traced step as machine code: compiled once for a machine, kept on disk, and called without a tensor library's
dispatch.

Where it cannot be compiled (no C++ compiler), the graph runs as it is, operation by operation, and the reason is logged
once.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fedtower.plugins.runtimes.vectorized.products import SOURCE

Flat = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_log = logging.getLogger("fedtower.vectorized")
# One thread: a cohort is spread over processes, and a kernel's bits must not depend on how many cores are free.
_OPTIONS = {"cpp.threads": 1, "max_autotune": False}


def compiled(graph: GraphModule, example: Sequence[Tensor]) -> Flat:
    """The graph as machine code for arguments shaped like ``example``, from the disk if it has been compiled before.

    Falls back on the graph itself, with a warning in the log, if it cannot be compiled.
    """
    place = cache_folder() / f"{digest(graph, example)}.so"
    try:
        if not place.exists():
            with _alone(place):
                if not place.exists():
                    _compile(graph, example, place)
        return _load(place)
    except Exception as error:  # whatever a compiler chain can raise: the graph itself gives the same numbers, slowly
        _warn_once(_first_line(error))
        return plain(graph)


def plain(graph: GraphModule) -> Flat:
    """The graph as it is."""

    def run(values: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            out: Sequence[Tensor] = graph(*values)
        return out

    return run


def cache_folder() -> Path:
    """Where compiled steps are kept: beside the compiler's own cache (``TORCHINDUCTOR_CACHE_DIR`` moves both)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "fedtower"


def digest(graph: GraphModule, example: Sequence[Tensor]) -> str:
    """What a compiled step depends on: the operations, the shapes, the constants, the compiler, the processor, and how
    our own products are made.
    """
    said = hashlib.sha256()
    for part in (graph.code, torch.__version__, str(sorted(_OPTIONS.items())), _processor(), SOURCE):
        said.update(part.encode())
    for value in example:
        said.update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
    for name, constant in sorted(graph.state_dict().items()):
        said.update(name.encode() + constant.detach().contiguous().numpy().tobytes())
    for name, constant in sorted(vars(graph).items()):
        if isinstance(constant, Tensor):
            said.update(name.encode() + constant.detach().contiguous().numpy().tobytes())
    return said.hexdigest()[:40]


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process compiles, the others wait for what it makes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(graph: GraphModule, example: Sequence[Tensor], place: Path) -> None:
    """The graph as a file, with our own small products, or with the library's where the compiler does not take ours."""
    try:
        from fedtower.plugins.runtimes.vectorized.lowering import small_products

        with small_products():
            _build(graph, example, place)
    except Exception as error:  # whatever a compiler chain can raise; if it is not about our products, it comes again
        _build(graph, example, place)
        _warn_of_products_once(_first_line(error))


def _build(graph: GraphModule, example: Sequence[Tensor], place: Path) -> None:
    from torch._inductor import aot_compile

    with tempfile.TemporaryDirectory(dir=place.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch
        made = Path(folder) / place.name
        aot_compile(graph, tuple(example), options={**_OPTIONS, "aot_inductor.output_path": str(made)})
        made.replace(place)  # whoever looks finds all of it or nothing


def _load(place: Path) -> Flat:
    from torch._C._aoti import AOTIModelContainerRunnerCpu

    runner = AOTIModelContainerRunnerCpu(str(place), 1)

    def run(values: Sequence[Tensor]) -> Sequence[Tensor]:
        out: Sequence[Tensor] = runner.run(list(values))
        return out

    return run


def _processor() -> str:
    """The processor's instruction sets: code compiled for one machine must not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def _warn_once(reason: str) -> None:
    _log.warning(
        "the step could not be compiled, so the vectorized runtime runs it operation by operation, several times "
        "slower (a C++ compiler such as g++ is needed; runtime.compile = false says this is wanted): %s",
        reason,
    )


@cache
def _warn_of_products_once(reason: str) -> None:
    _log.warning(
        "this version of torch's compiler does not take the vectorized runtime's own matrix products, so the step is "
        "compiled with the library's, up to twice as slow: %s",
        reason,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
