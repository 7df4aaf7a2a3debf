"""Files of one JSON object per line, whose first line says what they are."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, cast

from jaxserve.core.errors import ConfigError

MOST_BYTES = 1 << 30
"""A log that has become so long ends."""
_BUFFER = 1 << 18


class LogFile:
    """Writes lines, buffered, from any thread.

    Args:
        path: The file; replaced if it is there.
        head: The first line.
        kind: What the file is called in messages.
        most_bytes: Longest log.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(
        self, path: Path, head: Mapping[str, Any], *, kind: str, most_bytes: int = MOST_BYTES
    ) -> None:
        """Open the file and write its first line."""
        try:
            self._file: TextIO | None = path.open("w", encoding="utf-8", buffering=_BUFFER)
        except OSError as error:
            raise ConfigError(
                f"the {kind} {path.name} cannot be written: {error.strerror or error}."
            ) from None
        self._lock = threading.Lock()
        self._left = most_bytes
        self.write(head)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write a line, or that the log is full."""
        text = json.dumps(line, separators=(",", ":")) + "\n"
        with self._lock:
            if self._file is None:
                return
            self._left -= len(text)
            if self._left < 0:
                self._file.write('{"end":"the log is full"}\n')
                self._file.close()
                self._file = None
                return
            self._file.write(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        with self._lock:
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Write out what is buffered and close the file; harmless when that has happened."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def read_head(path: Path, *, name: str, version: int, otherwise: str) -> dict[str, Any]:
    """Read the first line of a log.

    Args:
        path: The file.
        name: The format that it must be of.
        version: Its version.
        otherwise: What is said of a file of another format, behind its name.

    Raises:
        ConfigError: If it cannot be read, or is of another format or version.
    """
    try:
        with path.open(encoding="utf-8") as file:
            given = json.loads(file.readline() or "null")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}.") from None
    if not isinstance(given, dict) or given.get("format") != name:
        raise ConfigError(f"{path.name} {otherwise}")
    if given.get("version") != version:
        raise ConfigError(
            f"{path.name} must be of version {version}, got {given.get('version')!r}."
        )
    return cast("dict[str, Any]", given)


def read_lines[T](path: Path, read: Callable[[int, Mapping[str, Any]], T]) -> Iterator[T]:
    """Yield what lines behind the first one say; the last one may have been cut short.

    Args:
        path: The file.
        read: Reads a line, given its number from 1.

    Raises:
        ConfigError: If a line is damaged.
    """
    with path.open(encoding="utf-8") as file:
        next(file)
        for number, text in enumerate(file, start=2):
            if not text.endswith("\n"):
                return  # the writer was stopped while it wrote
            try:
                line = json.loads(text)
                if "end" in line:
                    return
                found = read(number, line)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ConfigError(
                    f"line {number} of {path.name} is damaged: {type(error).__name__}: {error}."
                ) from None
            yield found
