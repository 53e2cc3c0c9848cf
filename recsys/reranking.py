"""Request: what a device has at hand to rank candidates for its user: the rows of her history and of the candidates.

It is a safetensors file. Everything here needs only numpy, and the bundle's engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import DataError
from fedtower.recsys.bundle import BundleError, read_tensors, write_tensors
from fedtower.recsys.device import BundleScorer, best

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """One user's history and candidates.

    Shape:
        history ``(t, W)``, oldest first; user ``(F,)``; candidates ``(n, W)``; ``names`` of the n items, and what the
        device keeps of its own by parameter.
    """

    history: FloatArray
    user: FloatArray
    candidates: FloatArray
    names: tuple[str, ...]
    own: Mapping[str, FloatArray] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file."""
        names = np.frombuffer(json.dumps(list(self.names)).encode(), dtype=np.uint8)
        own = {f"own/{name}": value for name, value in self.own.items()}
        rows = {"history": self.history, "user": self.user, "candidates": self.candidates}
        write_tensors(path, {**rows, **own, "names": names})


def read_request(path: Path) -> Request:
    """The request of a file.

    Raises:
        DataError: the file is not there, or holds no request.
    """
    try:
        held = read_tensors(path.read_bytes(), str(path))
        names = json.loads(held["names"].tobytes())
        if not isinstance(names, list) or len(names) != len(held["candidates"]):
            raise ValueError("there must be a name for every candidate")
        return Request(
            held["history"],
            held["user"],
            held["candidates"],
            tuple(str(name) for name in names),
            {name.removeprefix("own/"): value for name, value in held.items() if name.startswith("own/")},
        )
    except (OSError, KeyError, ValueError, TypeError, BundleError) as error:
        raise DataError(f"{path} is not a request: {error}; `fedtower export RUN --request USER` writes one") from error


def rerank(scorer: BundleScorer, request: Request, count: int) -> list[tuple[str, float]]:
    """The best candidates and their scores, best first.

    Raises:
        InputError: the request does not fit the bundle.
    """
    scores = scorer.score(request.history, request.user, request.candidates, request.own)
    return [(request.names[place], float(scores[place])) for place in best(scores, count)]
