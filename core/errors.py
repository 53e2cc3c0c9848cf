"""Errors that tell their reader what was expected, what came, and what to do; each kind has its exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class FedtowerError(Exception):
    """Anything fedtower refuses on purpose. The command line prints its message as one paragraph, without a
    traceback.
    """

    exit_code = 1
    is_told = False
    """Whether somebody has said it already: then the command line only ends with its code."""


class RecipeError(FedtowerError):
    """A recipe, an override or an option asks for something that does not exist or does not fit."""

    exit_code = 2


class DataError(FedtowerError):
    """A data set is missing, broken, or not what its layout promises."""

    exit_code = 3


class LeakError(DataError):
    """A held-out item reached training: every figure of such a run would be worthless."""


class PluginError(FedtowerError):
    """A plugin is broken, blocked, or offers what somebody else already offers."""

    exit_code = 4


class CheckpointError(FedtowerError):
    """A checkpoint or run folder is damaged or belongs to something else."""

    exit_code = 5


class StorageError(FedtowerError):
    """The disk said no: read-only, full, or no permission."""

    exit_code = 6


class MissingDependency(FedtowerError):
    """A part needs a library that is not installed; the message names the extra that brings it."""

    exit_code = 7


class TrustError(FedtowerError):
    """A signature, a certificate, a key or a token is not to be trusted."""

    exit_code = 10


class UpdateError(FedtowerError):
    """A client's update, or a total, cannot be used."""

    exit_code = 8


class Unreachable(FedtowerError):
    """The other side could not be reached, for as long as was tried."""

    exit_code = 11


class ServingError(FedtowerError):
    """A process of a federation cannot be kept running."""

    exit_code = 12


class ShapeMismatch(UpdateError):
    """An array does not have the shape that the plan asked for."""


class RowsNotSupported(UpdateError):
    """An aggregator cannot fold embedding rows."""

    def __init__(self, aggregator: str, tables: Iterable[str], try_instead: str) -> None:
        super().__init__(
            f"the aggregator {aggregator!r} folds dense parameters only, but the updates hold rows of "
            f"{', '.join(tables)}; set aggregator.name = {try_instead!r}, or train no rows on devices "
            f'(rows.train = "frozen" or "public")'
        )


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest choice, or nothing.

    >>> nearest("medain", ["fedavg", "median"])
    " (did you mean 'median'?)"
    """
    close = get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# What the operating system says when the disk, and not the program, is at fault.
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "there is no permission to do that; choose another folder, or change its permissions",
    errno.EPERM: "the system does not permit that; choose another folder, or change its permissions",
    errno.ENOTDIR: "a part of that path is a file; choose another folder",
    errno.ENAMETOOLONG: "a name in it is too long; choose another folder",
    errno.ELOOP: "there are links that lead to one another in that path; choose another folder",
}
