"""How long exchanges take between real processes, over links whose rates are bounded.

Two transports. Over sockets, GPUs run programs: `direct`, `source rail`, `balanced` rails without
an order, and `flash` in stages without barriers. Over JAX and gloo, processes run compiled
exchanges: a padded all-to-all, flat or on balanced rails, and stages. Times run from a common start
to the last byte at the last GPU; every byte is compared once with what was sent.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.record import Recorder, summary, table
from benchmarks.rooms.flash.jaxnode import WIDTH
from benchmarks.rooms.flash.matrices import make
from benchmarks.rooms.flash.namespaces import Cluster, why_not
from benchmarks.rooms.flash.planning import lines_of
from benchmarks.rooms.flash.programs import Algorithm, as_json, compile_programs
from jaxserve.sharding.flash import CostModel

SERVERS: Final = 4
GPUS: Final = 2
MATRICES: Final = ("zipf 0.8", "zipf 1.2", "moe", "uniform")
SOCKETS: Final[dict[str, tuple[Algorithm, int]]] = {
    "direct": ("direct", 0),
    "source rail": ("source rail", 0),
    "balanced": ("balanced", 0),
    "flash": ("flash", 2),
    "flash, 4 in flight": ("flash", 4),
}
"""Algorithms, and messages of a GPU under way at a time: 0 for all."""
QUANTUM: Final = 32
WAYS: Final[dict[str, dict[str, Any]]] = {
    "flat padded": {"flat": True},
    "balanced padded": {"backend": "dense"},
    "rotations": {"backend": "rotation", "quantum": QUANTUM},
    "stages": {"backend": "ppermute", "quantum": QUANTUM},
    "stages, 2 in flight": {"backend": "ppermute", "quantum": QUANTUM, "in_flight": 2},
}
TARGETS: Final = {
    ("sockets", "flash"): ("direct", 1.25, ("zipf 0.8", "zipf 1.2")),
    ("sockets", "flash, 4 in flight"): ("direct", 1.25, ("zipf 0.8", "zipf 1.2")),
    ("gloo", "stages"): ("balanced padded", 1.5, ("zipf 0.8",)),
}
_LEAD_S: Final = 0.25
"""Between a command and the common start, for all processes to have read it."""
_ROW: Final = 4 * WIDTH


def _traffic(name: str, per_gpu: int) -> np.ndarray:
    """Return bytes between servers; what stays inside is left out."""
    found = make(name, SERVERS, GPUS, per_gpu)
    found[np.arange(SERVERS), :, np.arange(SERVERS)] = 0
    return found


def _bound_s(traffic: np.ndarray, mbit: float) -> float:
    """Return R / (m B2): frames and headers are left out, and add some 5 %."""
    servers = traffic.sum(axis=(1, 3))
    return float(max(servers.sum(0).max(), servers.sum(1).max()) / GPUS / (mbit * 1e6 / 8))


def measure(
    recorder: Recorder, *, mbit: float, megabytes: float, repeats: int, transports: Sequence[str]
) -> str | None:
    """Measure all matrices, runs of the ways being interleaved, and record them.

    Returns:
        Why nothing was measured; None if it was.
    """
    reason = why_not()
    if reason is not None:
        return f"skipped: --net {reason}."
    per_gpu = round(megabytes * 1e6)
    if "sockets" in transports:
        _over_sockets(recorder, mbit, per_gpu, repeats)
    if "gloo" in transports:
        _over_gloo(recorder, mbit, per_gpu, repeats)
    return None


def _timed(cluster: Cluster, command: str) -> float:
    start = time.monotonic() + _LEAD_S
    cluster.tell([f"go {command}{start}"] * (SERVERS * GPUS))
    return max(map(float, cluster.hear("done"))) - start


def _check(cluster: Cluster, command: str) -> None:
    cluster.tell([command] * (SERVERS * GPUS))
    if set(cluster.hear("checked")) != {"True"}:
        raise RuntimeError(f"{command}: a GPU got other bytes than were sent.")


def _write(
    recorder: Recorder, name: str, mbit: float, per_gpu: int, bound: float, **values: Any  # noqa: ANN401
) -> None:  # fmt: skip
    times = values.pop("times")
    found = summary(times)
    recorder.write(
        "net", matrix=name, servers=SERVERS, gpus=GPUS, mbit=mbit, bytes_per_gpu=per_gpu,
        bound_s=round(bound, 4), seconds=[round(t, 4) for t in times],
        median_s=round(found["median"], 4), over_bound=round(found["median"] / bound, 3),
        load=[round(x, 2) for x in os.getloadavg()], **values,
    )  # fmt: skip
    print(f"{name:10} {values['way']:20} {found['median']:.3f} s, bound {bound:.3f} s", flush=True)


def _over_sockets(recorder: Recorder, mbit: float, per_gpu: int, repeats: int) -> None:
    rate = mbit * 1e6 / 8
    cost = CostModel(
        gpus=GPUS, up_rate=100 * rate, out_rate=rate, up_latency=1e-4, out_latency=2e-3
    )
    count = SERVERS * GPUS
    with Cluster(SERVERS, GPUS, mbit, "benchmarks.rooms.flash.node") as cluster:
        cluster.tell(["connect"] * count)
        cluster.hear("connected")
        for name in MATRICES:
            traffic = _traffic(name, per_gpu)
            times: dict[str, list[float]] = {way: [] for way in SOCKETS}
            stages = 0
            for repeat in range(repeats):
                for way in SOCKETS:
                    pieces, programs, schedule = compile_programs(
                        traffic, SOCKETS[way][0], cost, in_flight=SOCKETS[way][1]
                    )
                    stages = schedule.num_stages if schedule else stages
                    cluster.tell([f"program {json.dumps(as_json(pieces, programs))}"] * count)
                    cluster.hear("prepared")
                    times[way].append(_timed(cluster, ""))
                    if repeat == 0:
                        _check(cluster, "check")
            for way, (algorithm, _) in SOCKETS.items():
                _write(
                    recorder, name, mbit, per_gpu, _bound_s(traffic, mbit), transport="sockets",
                    way=way, times=times[way], stages=stages if algorithm == "flash" else None,
                )  # fmt: skip


def _over_gloo(recorder: Recorder, mbit: float, per_gpu: int, repeats: int) -> None:
    count = SERVERS * GPUS
    with Cluster(SERVERS, GPUS, mbit, "benchmarks.rooms.flash.jaxnode") as cluster:
        cluster.tell(["connect"] * count)
        cluster.hear("connected")
        for name in MATRICES:
            traffic = _traffic(name, per_gpu)
            parts = -(-traffic.sum(axis=(1, 3)) // (GPUS * _ROW))
            pairs = -(-traffic.reshape(count, count) // _ROW)
            job = {"parts": parts.tolist(), "pairs": pairs.tolist(), "ways": WAYS}
            cluster.tell([f"matrix {json.dumps(job)}"] * count)
            cluster.hear("prepared")
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for way in WAYS:
                _check(cluster, f"check {way}")
            for _ in range(repeats):
                for way in WAYS:
                    times[way].append(_timed(cluster, f"{way} "))
            for way in WAYS:
                _write(
                    recorder, name, mbit, per_gpu, _bound_s(traffic, mbit), transport="gloo",
                    way=way, times=times[way],
                )  # fmt: skip


def report(path: Path) -> str:
    """Return a table of what has been recorded."""
    lines = lines_of(path, "net", "transport", "matrix", "way")
    medians = {(line["transport"], line["matrix"], line["way"]): line["median_s"] for line in lines}
    rows: list[list[str]] = []
    for line in lines:
        verdict = ""
        target = TARGETS.get((line["transport"], line["way"]))
        if target is not None:
            other, wanted, matrices = target
            gain = medians[line["transport"], line["matrix"], other] / line["median_s"]
            verdict = f"{gain:.2f} x over {other}"
            if line["matrix"] in matrices:
                verdict += f": {'met' if gain >= wanted else 'MISSED'} ({wanted})"
        rows.append(
            [
                f"{line['transport']}, {line['matrix']}, {line['way']}",
                f"{line['bound_s']:.3f}",
                f"{line['median_s']:.3f}",
                f"{min(line['seconds']):.3f}",
                f"{max(line['seconds']):.3f}",
                f"{line['over_bound']:.2f}",
                f"{line['load'][0]:.1f}",
                verdict,
            ]
        )
    header = ["exchange", "bound s", "median s", "least", "most", "over bound", "load", "target"]
    return table(header, rows)
