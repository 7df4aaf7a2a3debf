"""What the commands of `jaxserve sim` share: values of flags, files, and tables."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from jaxserve.core.cost import PUBLISHED_COSTS
from jaxserve.core.cost_file import CostFile, read_cost
from jaxserve.core.errors import ConfigError

MS = 1000
"""Milliseconds of a second."""


def cost_of(name: str) -> CostFile:
    """Return a published cost model, or one of a file.

    Raises:
        ConfigError: If there is neither, or the file holds something else.
    """
    if name in PUBLISHED_COSTS:
        return CostFile(cost=PUBLISHED_COSTS[name])
    if not Path(name).is_file():
        raise ConfigError(
            f"the cost model must be a file or one of {', '.join(PUBLISHED_COSTS)}, got {name!r}; "
            "`jaxserve profile` writes one."
        )
    return read_cost(Path(name))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align cells, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def opened(path: Path) -> TextIO:
    """Open a file for writing.

    Raises:
        ConfigError: If that cannot be.
    """
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None


def number(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def positive(text: str) -> float:
    """Read a number above zero."""
    value = number(text)
    if not 0 < value < sys.float_info.max:
        raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
    return value


def not_negative(text: str) -> float:
    """Read a number that is not below zero."""
    value = number(text)
    if not 0 <= value < sys.float_info.max:
        raise argparse.ArgumentTypeError(f"must be zero or more, got {text}")
    return value


def share(text: str) -> float:
    """Read a number between 0 and 1."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def count(text: str) -> int:
    """Read a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above zero, got {text!r}")
    return int(text)
