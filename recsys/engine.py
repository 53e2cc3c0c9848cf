"""Engine: a process of its own in which somebody else's compiled code runs; when it dies, the caller is told and lives.

The parent sends a request (a word, a few plain values, arrays) and gets an answer of the same form. In the child a
*host* answers: what the function named by ``target`` returns, called in the child. Nothing is unpickled on either side.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import FedtowerError, MissingDependency
from fedtower.core.offers import HOST, how_to_install

Array = NDArray[Any]
Values = Mapping[str, Any]
Arrays = Mapping[str, Array]

_HEADER = struct.Struct("<QQ")  # bytes of the JSON, bytes of the arrays
_MOST_HEADER_BYTES = 16 << 20
_KINDS = {"float32", "float64", "int32", "int64", "bool", "uint8"}
_UNSAFE_TO_FORK = ("torch", "grpc")  # they run threads of their own, whose locks a fork may leave taken


class EngineError(FedtowerError):
    """The device engine refused, or failed."""


class EngineCrashed(EngineError):
    """The engine's process died; the message says how, and what it printed last."""


class Host(Protocol):
    """What answers in the child."""

    def answer(self, word: str, values: Values, arrays: Arrays) -> tuple[Values, Arrays]:
        """The answer to one request; an exception is passed on to the parent as an EngineError."""
        ...


class Engine:
    """The parent's end. ``target`` is ``"package.module:function"``, called without arguments in the child.

    A light process forks itself, which costs no memory that is not written to; one that holds torch or runs threads
    starts a fresh interpreter.

    Args:
        timeout_seconds: After so long without an answer the child is ended.
    """

    def __init__(self, target: str, *, timeout_seconds: float = 600.0, fork: bool | None = None) -> None:
        self._target = target
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the child may print)
        self._line, theirs = socket.socketpair()
        self._line.settimeout(timeout_seconds)
        if _may_fork() if fork is None else fork:
            self._process = _forked(target, self._line, theirs, self._output)
        else:
            self._process = _spawned(target, theirs, self._output)
        theirs.close()
        self._end = weakref.finalize(self, _end, self._line, self._process, self._output)

    @property
    def alive(self) -> bool:
        """Whether it may still be asked."""
        return self._end.alive

    def ask(self, word: str, values: Values | None = None, arrays: Arrays | None = None) -> tuple[Values, Arrays]:
        """The host's answer.

        Raises:
            EngineError: the host raised; the message is its.
            MissingDependency: a library that the host imports is not installed.
            EngineCrashed: the process died, or did not answer in time.
        """
        if not self.alive:
            raise EngineError(f"the engine {self._target} has been closed")
        try:
            _send(self._line, {"word": word, **(values or {})}, arrays or {})
            answer, out = _receive(self._line)
        except TimeoutError as error:
            self.close()
            raise EngineCrashed(
                f"the engine {self._target} gave no answer to {word!r} in {self._line_timeout()} seconds; it was ended"
            ) from error
        except (OSError, EOFError, ValueError) as error:
            message = self._obituary(word)
            self.close()
            raise EngineCrashed(message) from error
        if "missing" in answer:
            raise MissingDependency(
                f"the engine {self._target} needs {answer['missing']}, which is not installed; "
                f"{how_to_install(answer['missing'], HOST)}"
            )
        if "error" in answer:
            raise EngineError(f"the engine {self._target} refused {word!r}: {answer['error']}")
        return answer, out

    def close(self) -> None:
        """End the child. An engine that is no longer referred to ends by itself."""
        self._end()

    def _line_timeout(self) -> str:
        return "the given" if self._line.fileno() < 0 else f"{self._line.gettimeout():g}"

    def _obituary(self, word: str) -> str:
        code = self._process.wait(5.0)
        how = f"with exit code {code}"
        if code is None:
            how = "without closing down"
        elif code < 0:
            with contextlib.suppress(ValueError):
                how = f"by {signal.Signals(-code).name}"
        self._output.seek(0)
        said = self._output.read()[-400:].decode("utf-8", "replace").strip().replace("\n", " | ")
        last = f"; it said: {said}" if said else ""
        return f"the engine {self._target} died {how} while it answered {word!r}{last}"


class _Child:
    """A process by its id, forked or spawned."""

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | None = None) -> None:
        self.pid, self._popen, self._code = pid, popen, None

    _code: int | None

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None when it still runs."""
        if self._popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._popen.wait(seconds)
            return None
        waited = threading.Event()
        for _ in range(max(int(seconds / 0.005), 1)):
            if self._code is not None:
                break
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
                    break
            waited.wait(0.005)
        return self._code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _end(line: socket.socket, process: _Child, output: IO[bytes]) -> None:
    line.close()  # the child reads the end, and leaves
    if process.wait(1.0) is None:
        process.kill()
        process.wait(1.0)
    output.close()


def _may_fork() -> bool:
    return threading.active_count() == 1 and not any(name in sys.modules for name in _UNSAFE_TO_FORK)


def _forked(target: str, ours: socket.socket, theirs: socket.socket, output: IO[bytes]) -> _Child:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return _Child(pid)
    code = 1
    try:  # pragma: no cover  (in the child)
        ours.close()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = serve(target, theirs)
    finally:
        os._exit(code)


def _spawned(target: str, theirs: socket.socket, output: IO[bytes]) -> _Child:
    environment = {**os.environ, "PYTHONPATH": own_path()}
    command = [sys.executable, "-m", __name__, target, str(theirs.fileno())]
    popen = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[theirs.fileno()],
        env=environment,
        start_new_session=True,
    )
    return _Child(popen.pid, popen)


def own_path() -> str:
    """This process's search path, for a child: one that found another fedtower would be another program."""
    return os.pathsep.join(each or str(Path.cwd()) for each in sys.path)


def serve(target: str, line: socket.socket) -> int:
    """Answer until the parent hangs up; the exit code."""
    host: Host | None = None
    module, _, function = target.partition(":")
    while True:
        try:
            values, arrays = _receive(line)
        except (EOFError, OSError):
            return 0
        try:
            if host is None:
                host = getattr(import_module(module), function)()
            answer, out = host.answer(values["word"], values, arrays)
            if answer.keys() & {"error", "missing"}:
                raise ValueError("an answer cannot hold a value named 'error' or 'missing'")
        except ModuleNotFoundError as error:
            answer, out = {"missing": (error.name or str(error)).partition(".")[0]}, {}
        except Exception as error:
            answer, out = {"error": f"{type(error).__name__}: {error}"}, {}
        _send(line, answer, out)


def _send(line: socket.socket, values: Values, arrays: Arrays) -> None:
    held = [np.asarray(value, order="C") for value in arrays.values()]
    listed = [[name, value.dtype.name, list(value.shape)] for name, value in zip(arrays, held, strict=True)]
    header = json.dumps({"values": dict(values), "arrays": listed}).encode()
    line.sendall(_HEADER.pack(len(header), sum(value.nbytes for value in held)) + header)
    for value in held:
        if value.size:
            line.sendall(value.reshape(-1).view(np.uint8).data)


def _receive(line: socket.socket) -> tuple[dict[str, Any], dict[str, Array]]:
    length, rest = _HEADER.unpack(_exactly(line, _HEADER.size))
    if length > _MOST_HEADER_BYTES:
        raise ValueError("that is no message")
    header = json.loads(bytes(_exactly(line, length)))
    arrays: dict[str, Array] = {}
    for name, kind, shape in header["arrays"]:
        if kind not in _KINDS:
            raise ValueError(f"arrays of {kind!r} are not sent")
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        rest -= size
        arrays[name] = np.frombuffer(_exactly(line, size), dtype=kind).reshape(shape)
    if rest:
        raise ValueError("a message is longer than what it lists")
    return header["values"], arrays


def _exactly(line: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        read = line.recv_into(view[got:])
        if not read:
            raise EOFError("the other side hung up")
        got += read
    return data


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2]))))
