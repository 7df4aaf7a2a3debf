"""Cases that take minutes, kept as they are done, so that a run can be stopped and taken up again.

A part of the benchmark with its settings has a file below `build/tactic`; a line of it is a case.
The file is named by a checksum over the settings and the sources that decide results, so nothing is
taken up that was measured with other ones.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT

Case = dict[str, Any]
"""What was found in one case; JSON."""

_FOLDER = ROOT / "build" / "tactic"
_TASKS = Path(__file__).with_name("tasks.py")


def sources() -> str:
    """Return a checksum of the package's sources, and of the tasks that it is given."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "src" / "jaxserve").rglob("*.py")), _TASKS):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Cases:
    """The cases of one part.

    Args:
        part: Its name.
        settings: What decides results.
        minutes: When to start no further case; counted from now.
        fresh: Whether to forget what was done before.
        folder: Where files are.

    Attributes:
        settings: The settings.
        missing: Cases that the time did not suffice for.
    """

    def __init__(
        self,
        part: str,
        settings: Mapping[str, Any],
        *,
        minutes: float = math.inf,
        fresh: bool = False,
        folder: Path = _FOLDER,
    ) -> None:
        """Read what is there."""
        self.settings = dict(settings)
        self.missing = 0
        self._late_at = time.monotonic() + 60 * minutes
        text = json.dumps([self.settings, sources()], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._path = folder / f"{part}-{digest}.jsonl"
        if fresh:
            self._path.unlink(missing_ok=True)
        self._done: dict[str, Case] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                # The last line of a run that was killed may be cut.
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self._done[key] = value

    def get(self, key: str) -> Case | None:
        """Return a case that is done."""
        return self._done.get(key)

    def run(self, key: str, measure: Callable[[], Case]) -> Case | None:
        """Return a case, measured now if it is not done; None if the time is over."""
        found = self.get(key)
        if found is None and self.is_late:
            self.missing += 1
            return None
        return self.put(key, measure()) if found is None else found

    def put(self, key: str, value: Case) -> Case:
        """Keep a case."""
        self._done[key] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, value]) + "\n")
        print(f"{self._path.stem}: {key}", flush=True)
        return value

    @property
    def is_late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._late_at
