"""Importing TorchRec without hearing from it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing that torchrec and fbgemm do at import is left: they raise deprecation warnings of their own, log through
    the root logger, and install a handler there.
    """
    handlers = list(logging.root.handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
        yield
    logging.root.handlers[:] = handlers


def hush_torch() -> None:
    """From now on nobody hears what torch says to TorchRec: that it calls functions that will have other names."""
    for said in ("Please use DTensor instead", r"`torch\.distributed\.\w+` is deprecated"):
        warnings.filterwarnings("ignore", message=said, category=FutureWarning)
