"""The scenarios of the scheduling benchmarks, from public traces in `../shared/data/traces`."""

import csv
import gzip
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.record import ROOT
from jaxserve.core.cost import PUBLISHED_COSTS, CostModel
from jaxserve.core.cost_table import TableCost
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.workload import Shape, Workload, interleave

TRACES = ROOT.parent / "shared" / "data" / "traces"
NAMES = ("chatbot", "coder", "summarise", "reasoning", "tools", "mixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A server: how long its steps take, and how large it is."""

    name: str
    cost: CostModel
    spec: ReplicaSpec


def machine(name: str, traces: Path = TRACES) -> Machine:
    """Return one of the two servers.

    `a100` is the published model of a 7B on an A100; its pages hold what is left of 80 GB at the
    160 KB per token that its cost per context token means at 2 TB/s. `h100` is the measured table
    of Llama-3.1-8B, with pages for what is left of 80 GB at 128 KB per token.
    """
    if name == "a100":
        return Machine(
            name=name, cost=PUBLISHED_COSTS["7b-a100"], spec=ReplicaSpec(num_pages=22_000)
        )
    table = traces / "gpu_batch_latency" / "h100_sxm_llama3.1-8b_tp1.csv.gz"
    return Machine(name=name, cost=TableCost.read(table), spec=ReplicaSpec(num_pages=28_000))


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file, gzipped or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return list(csv.DictReader(io.StringIO(text)))


def azure(which: str, traces: Path = TRACES) -> tuple[tuple[float, ...], list[tuple[int, int]]]:
    """Return arrivals in seconds and lengths of an Azure trace of 2023: `code` or `conv`."""
    found = rows(traces / "azure2023" / f"AzureLLMInferenceTrace_{which}.csv")
    # Digits beyond microseconds are dropped.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in found]
    lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in found]
    return tuple(time - times[0] for time in times), lengths


def load(name: str, traces: Path = TRACES) -> Workload:
    """Return one scenario.

    Reasoning holds every token to the target of its thinking, since objectives have one target per
    request. The rounds of tool calling arrive as requests of their own, and find the prompts of
    their databases in the prefix cache.
    """
    arrivals, chats = azure("conv", traces)
    if name == "chatbot":
        shapes = _shapes(name, chats, 5, 0.1)
        return Workload(name=name, arrivals=arrivals, shapes=shapes, is_paired=True)
    if name == "coder":
        arrivals, lengths = azure("code", traces)
        shapes = _shapes(name, lengths, 5, 0.05)
        return Workload(name=name, arrivals=arrivals, shapes=shapes, is_paired=True)
    if name == "tools":
        return Workload(name=name, arrivals=arrivals, shapes=_rounds(traces))
    if name == "mixed":
        parts = [load(part, traces).shapes for part in ("chatbot", "coder", "summarise")]
        return interleave(name, arrivals, *parts)
    if name == "summarise":
        file = "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz"
        columns, tpot_s = ("num_prefill_tokens", "num_decode_tokens"), 0.1
        found = rows(traces / "splitwise" / file)
    else:
        columns, tpot_s = ("input_tokens", "output_tokens"), 0.05
        found = rows(traces / "servegen" / "reason_deepseek-r1_5rps_1800s.csv.gz")
    lengths = [(int(row[columns[0]]), int(row[columns[1]])) for row in found]
    return Workload(name=name, arrivals=arrivals, shapes=_shapes(name, lengths, 3, tpot_s))


def _shapes(
    name: str, lengths: Iterable[tuple[int, int]], slowdown: float, tpot_s: float
) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            prompt_len=max(1, prompt),
            output_len=max(1, output),
            ttft_slowdown=slowdown,
            tpot_s=tpot_s,
            name=name,
        )
        for prompt, output in lengths
    )


def _rounds(traces: Path) -> tuple[Shape, ...]:
    data = gzip.decompress((traces / "agentic_synthetic" / "nl2sql_2000.jsonl.gz").read_bytes())
    shapes: list[Shape] = []
    for line in data.decode().splitlines():
        stages = [stage for stage in json.loads(line)["stages"] if "output_tokens" in stage]
        for place, stage in enumerate(stages):
            shapes.append(
                Shape(
                    prompt_len=stage["prefix_tokens"] + stage["new_tokens"],
                    output_len=stage["output_tokens"],
                    cached_len=stage["prefix_tokens"],
                    ttft_slowdown=3,
                    tpot_s=0.1 if place == len(stages) - 1 else 0.05,
                    name="tools",
                )
            )
    return tuple(shapes)
