"""Tokens per second of a tiny Qwen3-MoE with its experts on eight devices, by ways of sending.

Eight devices of one processor compute whole prompts of few different tokens, so that a few experts
are asked for most. Once all are in one process, where sending is copying; once, where namespaces
can be made, each server is a process behind a link whose rate is bounded. Each way is first
compared with the model on one device.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks.record import ROOT, Recorder, summary, table
from benchmarks.rooms.flash.namespaces import Cluster, why_not
from benchmarks.rooms.flash.planning import lines_of

SERVERS: Final = 4
GPUS: Final = 2
MODULE: Final = "benchmarks.rooms.flash.moenode"
QUANTUM: Final = 32
WAYS: Final[dict[str, dict[str, Any]]] = {
    f"{name}{', once' if dedup else ''}{', EPLB' if eplb else ''}": {
        "backend": backend, "quantum": QUANTUM, "dedup": dedup, "eplb": eplb,
    }
    for name, backend in (("dense", "dense"), ("rotations", "rotation"), ("FLASH", "ppermute"))
    for eplb in (False, True)
    for dedup in (False, True)
}  # fmt: skip
"""`once`: one copy per token and server. Capacities always suffice."""
PLACES: Final = ("process", "links")
JOB: Final[dict[str, Any]] = {"sequences": 2, "length": 64, "skew": 1.2, "seed": 0}
TOLERANCE: Final = 1e-5
_LEAD_S: Final = 0.25


class _Talk(Protocol):
    def tell(self, lines: Sequence[str]) -> None: ...

    def hear(self, word: str) -> list[str]: ...


class _Alone:
    """One process that is all servers."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, "0", "1", "1", "0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **environment},
        )  # fmt: skip

    def tell(self, lines: Sequence[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(lines[0] + "\n")
        self._process.stdin.flush()

    def hear(self, word: str) -> list[str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return [line.removeprefix(word).strip()]
        raise RuntimeError(f"the process ended where {word!r} was expected; it said why above.")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(
    recorder: Recorder,
    *,
    mbit: float,
    repeats: int,
    where: Sequence[str] = PLACES,
    ways: Sequence[str] = tuple(WAYS),
) -> str | None:
    """Measure ways, interleaved, in one process and over shaped links, and record them.

    Returns:
        Why links were left out; None if they were not, or not asked for.
    """
    environment = {"FLASH_SERVERS": str(SERVERS), "FLASH_GPUS": str(GPUS)}
    if "process" in where:
        alone = _Alone(environment)
        try:
            _measure(recorder, alone, 1, "one process", None, repeats, ways)
        finally:
            alone.close()
    if "links" not in where:
        return None
    reason = why_not()
    if reason is not None:
        return f"skipped: links of --moe: {reason}."
    # A server's GPUs share the link of its process, which is as fast as theirs together.
    with Cluster(SERVERS, 1, GPUS * mbit, MODULE, environment) as cluster:
        _measure(recorder, cluster, SERVERS, "links", mbit, repeats, ways)
    return None


def _measure(
    recorder: Recorder,
    talk: _Talk,
    count: int,
    where: str,
    mbit: float | None,
    repeats: int,
    ways: Sequence[str],
) -> None:
    def ask(line: str, word: str, read: Callable[[str], Any]) -> list[Any]:
        talk.tell([line] * count)
        return [read(found) for found in talk.hear(word)]

    facts = ask(f"job {json.dumps(JOB)}", "facts", json.loads)[0]
    errors: dict[str, float] = {}
    for name in ways:
        options = WAYS[name]
        line = f"prepare {json.dumps({'name': name, **options})}"
        errors[name] = max(ask(line, "prepared", float))
        if errors[name] > TOLERANCE:
            raise RuntimeError(f"{name} is off by {errors[name]:.2g} from the model on one device.")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name in ways:
            start = time.monotonic() + _LEAD_S
            times[name].append(max(ask(f"go {name} {start}", "done", float)) - start)
    for name in ways:
        options = WAYS[name]
        key = ("dedup" if options["dedup"] else "all") + (" eplb" if options["eplb"] else "")
        rows = facts["wire_rows"][key]
        median = summary(times[name])["median"]
        recorder.write(
            "moe", where=where, way=name, servers=SERVERS, gpus=GPUS, mbit=mbit,
            tokens=facts["tokens"], tokens_per_s=round(facts["tokens"] / median, 1),
            seconds=[round(t, 4) for t in times[name]], relative_error=errors[name],
            wire_rows=rows, imbalance=facts["imbalance_eplb" if options["eplb"] else "imbalance"],
            load=[round(x, 2) for x in os.getloadavg()], **JOB,
        )  # fmt: skip
        print(f"{where:12} {name:22} {facts['tokens'] / median:8.0f} tokens/s", flush=True)


def report(path: Path) -> str:
    """Return a table of what has been recorded."""
    rows: list[list[str]] = []
    lines = lines_of(path, "moe", "where", "way")
    base = {line["where"]: line["tokens_per_s"] for line in lines if line["way"] == "dense"}
    for line in lines:
        speed = line["tokens_per_s"]
        slow, fast = (line["tokens"] / f(line["seconds"]) for f in (max, min))
        rows.append(
            [
                f"{line['where']}, {line['way']}", f"{speed:.0f}", f"{slow:.0f}-{fast:.0f}",
                f"{speed / base.get(line['where'], math.nan):.2f}", f"{line['imbalance']:.2f}",
                str(line["wire_rows"]), f"{line['load'][0]:.1f}",
            ]
        )  # fmt: skip
    header = ["experts", "tokens/s", "range", "over dense", "max/mean", "rows on wire", "load"]
    return table(header, rows)
