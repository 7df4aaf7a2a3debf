"""The simulator beside NVIDIA Dynamo's offline replay: same trace, same times of steps, FCFS.

Both read the first 600 s of the Azure conversation trace (2,867 requests) and one profile of
Llama-3.1-8B on an H100. Means and 99th percentiles of TTFT, TPOT and end-to-end latency must agree
within 1 %; percentiles are taken from the times of all requests in the same way for both.

    python -m benchmarks.sim_check
"""

import argparse
import json
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.environments import python_of
from benchmarks.record import Recorder, table
from benchmarks.rooms.scenarios import TRACES
from jaxserve.core.cost import StepLoad, longest_chunk
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import latencies
from jaxserve.sim.request import SimRequest

PEER = Path(__file__).parent / "peers" / "dynamo_replay.py"
LIMIT = 0.01
SPEC = ReplicaSpec(num_pages=28_000, page_size=16, max_num_seqs=256, max_num_batched_tokens=8192)


class ProfileCost:
    """Times of steps as Dynamo's replay reads them from a profile.

    A step takes the time of its prefill and that of its decodes. The prefill counts as that many
    prompts of their mean length, rounded down; the decodes are interpolated over their tokens of
    context and the mean of those, rounded down; both go on in straight lines past their edges.

    Args:
        path: An NPZ file with `prefill_isl`, `prefill_ttft_ms`, `decode_active_kv_tokens`,
            `decode_context_length` and `decode_itl`.
    """

    def __init__(self, path: Path) -> None:
        """Read the profile."""
        with np.load(path) as found:
            self._lengths = found["prefill_isl"].tolist()
            self._prefill = (found["prefill_ttft_ms"] / 1000).tolist()
            self._active = found["decode_active_kv_tokens"].tolist()
            self._means = found["decode_context_length"].tolist()
            self._decode = (found["decode_itl"] / 1000).tolist()

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes."""
        seconds = 0.0
        if load.prefill:
            tokens = load.prefill // load.prefills * load.prefills
            at, part = _place(self._lengths, tokens)
            times = self._prefill
            seconds += times[at] + part * (times[at + 1] - times[at])
        if load.decodes:
            at, part = _place(self._active, load.context)
            column, share = _place(self._means, load.context // load.decodes)
            low, high = self._decode[at], self._decode[at + 1]
            first = low[column] + share * (low[column + 1] - low[column])
            second = high[column] + share * (high[column + 1] - high[column])
            seconds += first + part * (second - first)
        return seconds

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last."""
        context, decodes = load.context, load.decodes
        return [self.step_time(load._replace(context=context + i * decodes)) for i in range(count)]

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of a chunk that can be added within a time."""
        if self.step_time(load.with_chunk(1, past)) > seconds:
            return 0
        return longest_chunk(self, seconds, load, past, 512)


def _place(values: Sequence[float], value: float) -> tuple[int, float]:
    at = min(max(bisect_right(values, value) - 1, 0), len(values) - 2)
    return at, (value - values[at]) / (values[at + 1] - values[at])


def simulated(trace: Path, profile: Path) -> tuple[dict[str, float], float]:
    """Return latencies of our simulator in seconds, and the seconds that it took."""
    requests: list[SimRequest] = []
    for number, line in enumerate(trace.read_text().splitlines()):
        row = json.loads(line)
        requests.append(
            SimRequest(
                request_id=number,
                arrival=row["timestamp"] / 1000,
                prompt_len=row["input_length"],
                output_len=row["output_length"],
            )
        )
    replica = Replica(SPEC, FcfsScheduler(), ProfileCost(profile))
    began = time.perf_counter()
    done = simulate(requests, [replica])
    return latencies(done), time.perf_counter() - began


def replayed(python: Path, trace: Path, profile: Path) -> tuple[dict[str, float], float]:
    """Return the same of the peer."""
    sizes = {
        "num_gpu_blocks": SPEC.num_pages,
        "block_size": SPEC.page_size,
        "max_num_seqs": SPEC.max_num_seqs,
        "max_num_batched_tokens": SPEC.max_num_batched_tokens,
    }
    command = [str(python), str(PEER), str(trace), str(profile), json.dumps(sizes)]
    began = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if run.returncode:
        raise SystemExit(f"the replay failed: {run.stderr.strip().splitlines()[-1]}")
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    rows = [json.loads(line) for line in lines]
    samples = {
        "ttft": [row["ttft_ms"] for row in rows],
        "tpot": [row["tpot_ms"] for row in rows if row["output_length"] > 1],
        "e2e": [row["e2e_ms"] for row in rows],
    }
    found: dict[str, float] = {}
    for name, values in samples.items():
        found[f"{name}_mean"] = float(np.mean(values)) / 1000
        found[f"{name}_p99"] = float(np.quantile(values, 0.99)) / 1000
    return found, took


def main() -> None:
    """Compare, print, record, and fail if anything differs by more than 1 %."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces")
    args = parser.parse_args()
    trace = args.traces / "peer_reference" / "azconv600_mooncake.jsonl"
    profile = args.traces / "gpu_batch_latency" / "h100_llama3.1-8b_profile.npz"
    for file in (trace, profile):
        if not file.is_file():
            parser.error(f"{file.name} is missing; name the folder of the traces with --traces")
    theirs, their_time = replayed(python_of("dynamo"), trace, profile)
    ours, our_time = simulated(trace, profile)
    off = {name: ours[name] / theirs[name] - 1 for name in theirs}
    lines = [
        [name, f"{ours[name] * 1000:.3f}", f"{theirs[name] * 1000:.3f}", f"{off[name]:+.4%}"]
        for name in theirs
    ]
    print(table(["ms", "jaxserve", "dynamo", "difference"], lines))
    print(f"seconds: {our_time:.2f} and {their_time:.2f} (the latter with its start)")
    Recorder("sim_check").write(
        "latencies", peer="ai-dynamo 1.6.1 offline replay", jaxserve=ours, dynamo=theirs,
        difference=off, seconds={"jaxserve": our_time, "dynamo": their_time},
    )  # fmt: skip
    worst = max(abs(value) for value in off.values())
    if worst > LIMIT:
        sys.exit(f"differences must be within {LIMIT:.0%}, the largest is {worst:.2%}")


if __name__ == "__main__":
    main()
