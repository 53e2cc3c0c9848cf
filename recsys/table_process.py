"""The table process of a deployed run: ``python -m fedtower.recsys.table_process RUN``; `fedtower serve` starts it."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from fedtower.core.errors import FedtowerError
from fedtower.recsys.display import Display
from fedtower.recsys.run import train_deployed


def main(arguments: list[str]) -> int:
    """Train to the end; the exit code."""
    parser = argparse.ArgumentParser(prog="fedtower table process")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--verbose", action="store_true")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(highlight=False)
    try:
        with Display(console, verbose=asked.verbose) as display:
            train_deployed(asked.folder, observers=[display], progress=display.say)
    except FedtowerError as error:
        Console(stderr=True, highlight=False, markup=False).print(f"error: {error}", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
