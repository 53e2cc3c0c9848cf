"""What all promise classes share: how the part under test is made, and how two results are compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

NOT_MADE = "not promised here: "
"""How the reason begins why a promise does not apply; a test that is skipped otherwise counts as broken."""


class Promises:
    """Base of the promise classes.

    ``make`` is the part's class, or any callable without arguments that gives a new part (a lambda, when the part has
    settings without defaults).
    """

    make: ClassVar[Callable[[], Any]]

    def made(self) -> Any:
        """A new part."""
        make = inspect.getattr_static(type(self), "make")
        # A lambda in a class body would be bound to the test; whoever wrote `make = lambda: ...` did not mean that.
        return make.__func__() if isinstance(make, staticmethod) else make()


def not_promised(reason: str) -> NoReturn:
    """End a test whose promise parts of this sort do not make; :mod:`.verdict` then leaves it out of its count."""
    import pytest

    pytest.skip(NOT_MADE + reason)


def assert_same_bits(one: Any, other: Any, what: str = "result") -> None:
    """Two results are equal to the last bit, however deep their arrays are."""
    _walk(one, other, what, exact=True)


def assert_close(one: Any, other: Any, what: str = "result", *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Two results are equal up to rounding."""
    _walk(one, other, what, exact=False, rtol=rtol, atol=atol)


class Untouched:
    """Inside of ``with Untouched(value):``, nobody may write into the arrays of ``value``."""

    def __init__(self, *values: Any) -> None:
        self._values = values
        self._before = deepcopy(values)

    def __enter__(self) -> Untouched:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            assert_same_bits(self._values, self._before, "an input was written into: input")


def _walk(one: Any, other: Any, what: str, *, exact: bool, rtol: float = 0.0, atol: float = 0.0) -> None:
    if is_dataclass(one) and not isinstance(one, type):
        assert type(one) is type(other), f"{what}: {type(one).__name__} and {type(other).__name__}"
        for each in fields(one):
            _walk(
                getattr(one, each.name),
                getattr(other, each.name),
                f"{what}.{each.name}",
                exact=exact,
                rtol=rtol,
                atol=atol,
            )
    elif isinstance(one, Mapping):
        assert sorted(one) == sorted(other), f"{what} holds {sorted(one)} here and {sorted(other)} there"
        for name in one:
            _walk(one[name], other[name], f"{what}[{name!r}]", exact=exact, rtol=rtol, atol=atol)
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), f"{what} has {len(one)} entries here and {len(other)} there"
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            _walk(left, right, f"{what}[{place}]", exact=exact, rtol=rtol, atol=atol)
    elif isinstance(one, np.ndarray):
        assert one.shape == np.shape(other), f"{what} has shape {one.shape} here and {np.shape(other)} there"
        if exact or not np.issubdtype(one.dtype, np.inexact):
            np.testing.assert_array_equal(one, other, err_msg=what)
        else:
            np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=what)
    else:
        assert one == other, f"{what} is {one!r} here and {other!r} there"
