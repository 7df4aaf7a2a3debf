"""Results as JSON lines: what was measured, with which command, on what, with which versions.

Lines hold no host names and no paths, so that they can be committed and shown.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxserve", "jax", "jaxlib", "flax", "numpy")


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Describe samples by their median, tenth and ninetieth percentile, and number.

    >>> summary([3.0, 1.0, 2.0])["median"]
    2.0
    """
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "repeats": len(ordered),
    }


def machine() -> dict[str, Any]:
    """Describe the processor and memory."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit of this checkout, with `+` where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line() -> str:
    """Return the command that runs this program, paths reduced to their last part."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    called = module and module.name.removesuffix(".__main__")
    name = f"-m {called}" if called else Path(sys.argv[0]).name
    shown = [Path(arg).name if arg.startswith(("/", "~", ".")) else arg for arg in sys.argv[1:]]
    return " ".join(["python", name, *shown])


class Recorder:
    """Appends the lines of one benchmark to `OUT/<name>.jsonl`.

    Args:
        name: The benchmark.
        out: Folder; None: the variable OUT, else `benchmarks/results`.
        device: What computes, if it is not the processor.
    """

    def __init__(
        self, name: str, *, out: Path | None = None, device: Mapping[str, Any] | None = None
    ) -> None:
        """Look at the machine once; nothing is written yet."""
        folder = out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        self._facts = {
            "benchmark": name,
            "command": command_line(),
            "machine": {**machine(), **({"device": device} if device else {})},
            "versions": versions(),
            "commit": commit(),
        }

    def write(self, what: str, **values: Any) -> None:  # noqa: ANN401  anything JSON knows
        """Append one line.

        Args:
            what: The quantity or part.
            **values: Sizes, dtype, settings and results.
        """
        date = datetime.now(UTC).isoformat(timespec="seconds")
        line = {**self._facts, "date": date, "what": what, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Set rows of text in columns; the first column is flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])
