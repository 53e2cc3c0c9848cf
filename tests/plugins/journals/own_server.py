"""A PostgreSQL server of a test's own, which it may end and start again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedtower.core.errors import MissingDependency
from fedtower.plugins.journals.postgresql.server import Server, find_programs


@contextmanager
def own_server(why: str) -> Iterator[Server]:
    """The server; where PostgreSQL is not installed the test is skipped, and with ``CI`` set it fails, saying why."""
    try:
        find_programs()
    except MissingDependency as missing:
        if os.environ.get("CI"):
            pytest.fail(f"{missing}, and CI is set: {why}")
        pytest.skip(str(missing))
    server = Server()
    server.make()
    server.start()
    try:
        yield server
    finally:
        server.remove()
