"""How long planning takes."""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.record import Recorder, table
from benchmarks.rooms.flash.matrices import MIB, make
from benchmarks.rooms.flash.optimum import scipy_stages
from jaxserve.sharding.flash import CostModel, plan
from jaxserve.sharding.flash.rails import sum_servers

SERVERS: Final = (4, 8, 16, 32, 64, 128)
TARGETS_US: Final = {4: 10, 8: 20, 16: 100, 32: 1000, 128: 5000}
COST: Final = CostModel(up_rate=448e9, out_rate=12.5e9)
_MATRICES: Final = ("zipf 0.8", "moe", "random")
_SCIPY_SERVERS: Final = 32


def _measure(call: Callable[[], object], seconds: float, least: int) -> np.ndarray:
    """Return the microseconds of calls, sorted, over about so many seconds."""
    call()
    times: list[int] = []
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    gc.enable()
    return np.sort(np.array(times)) / 1000


def measure(recorder: Recorder, min_servers: int, max_servers: int) -> None:
    """Measure plans of each size, and record them."""
    for n in (n for n in SERVERS if min_servers <= n <= max_servers):
        for name in _MATRICES:
            counts = [sum_servers(make(name, n, 8, 64 * MIB, seed)) for seed in range(5)]
            for mode in ("auto", "halving", "bottleneck", "paper", "scipy per stage"):
                if mode == "scipy per stage" and (n > _SCIPY_SERVERS or name != "zipf 0.8"):
                    continue
                times: list[np.ndarray] = []
                stages, lengths, rotations = [], [], []
                for one in counts:
                    if mode == "scipy per stage":
                        times.append(_measure(lambda one=one: scipy_stages(one), 0.0, 1))
                        stages.append(scipy_stages(one))
                        continue
                    times.append(_measure(lambda one=one, mode=mode: plan(one, COST, mode), 0.2, 5))
                    found = plan(one, COST, mode)
                    assert np.array_equal(found.to_matrix(), one * (1 - np.eye(n, dtype=np.int64)))
                    stages.append(found.num_stages)
                    rotations.append(found.num_rotations)
                    lengths.append(found.durations.sum() / found.bottleneck)
                every = np.sort(np.concatenate(times))
                recorder.write(
                    "plan", servers=n, matrix=name, mode=mode, calls=len(every),
                    p50_us=round(float(np.quantile(every, 0.5)), 1),
                    p99_us=round(float(np.quantile(every, 0.99)), 1),
                    least_us=round(float(every[0]), 1),
                    stages=float(np.mean(stages)),
                    rotations=float(np.mean(rotations)) if rotations else None,
                    length=round(float(np.mean(lengths)), 4) if lengths else None,
                )  # fmt: skip


def lines_of(path: Path, what: str, *names: str) -> list[dict[str, Any]]:
    """Return the newest line of each setting."""
    found: dict[tuple, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["what"] == what:
            found[tuple(line[name] for name in names)] = line
    return list(found.values())


def report(path: Path) -> str:
    """Return a table of what has been recorded."""
    rows = []
    for line in lines_of(path, "plan", "servers", "matrix", "mode"):
        target, verdict = TARGETS_US.get(line["servers"]), ""
        if line["mode"] == "auto" and target:
            is_met = line["p50_us"] <= target and line["p99_us"] <= 3 * line["p50_us"]
            verdict = f"{'met' if is_met else 'MISSED'} (p50 <= {target}, p99 <= 3 p50)"
        rows.append(
            [
                f"{line['servers']} {line['matrix']}, {line['mode']}",
                f"{line['p50_us']:.1f}",
                f"{line['p99_us']:.1f}",
                f"{line['stages']:.0f}",
                "" if line["rotations"] is None else f"{line['rotations']:.0f}",
                "" if line["length"] is None else f"{line['length']:.3f}",
                verdict,
            ]
        )
    header = ["servers", "p50 us", "p99 us", "stages", "of them rotations", "length / R", "target"]
    return table(header, rows)
