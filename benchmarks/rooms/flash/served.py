"""Tokens per second of jaxserve serving a tiny Qwen3-MoE with EP=8 on four processes over gloo.

Each process has two CPU devices and is a server behind a link whose rate is bounded. Prompts of few
different tokens come at once, so that a few experts are asked for most. Each way's tokens must be
those of the engine on one device.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.record import Recorder, summary, table
from benchmarks.rooms.flash.namespaces import Cluster, why_not
from benchmarks.rooms.flash.planning import lines_of

SERVERS: Final = 4
GPUS: Final = 2
MODULE: Final = "benchmarks.rooms.flash.servednode"
EXPERTS: Final = 32
SPARE: Final = 8
WAYS: Final[dict[str, dict[str, Any]]] = {
    "repeated, sum": {"enable_dp_attention": False, "all_to_all_backend": "allreduce"},
    "repeated, rotations, once": {"enable_dp_attention": False, "all_to_all_backend": "rotation"},
} | {
    f"{name}{', once' if dedup else ''}{', EPLB' if eplb else ''}": {
        "all_to_all_backend": backend, "all_to_all_dedup": dedup or backend == "allreduce",
        **({"enable_eplb": True, "num_redundant_experts": SPARE} if eplb else {}),
    }
    for eplb in (False, True)
    for name, backend, dedup in (
        ("sum", "allreduce", False), ("dense", "dense", False), ("dense", "dense", True),
        ("rotations", "rotation", False), ("rotations", "rotation", True),
        ("FLASH", "flash", False), ("FLASH", "flash", True),
    )
}  # fmt: skip
"""`once`: a token crosses once to a server, and its results once back. `sum`: over all devices.

`repeated`: every group attends to the sequences of all, so that only results travel.
"""
JOB: Final[dict[str, Any]] = {"prompts": 16, "length": 60, "skew": 1.2, "seed": 0, "max_tokens": 4}
SETTINGS: Final[dict[str, Any]] = {
    "data_parallel_size": SERVERS * GPUS, "enable_expert_parallel": True, "load_format": "dummy",
    "dtype": "float32", "warmup": "lazy", "enable_prefix_caching": False, "max_model_len": 64,
    "max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_mixed_prefill_tokens": 1024,
    "block_size": 16, "num_gpu_blocks_override": 64, "eplb_step_interval": 8,
}  # fmt: skip


def make_prompts() -> list[list[int]]:
    """Return prompts, each pair with favourite tokens of its own."""
    from benchmarks.rooms.flash import expert_parallel as model

    gpus = SERVERS * GPUS
    ids = model.prompts(gpus, JOB["prompts"] // gpus, JOB["length"], JOB["skew"], JOB["seed"])
    return ids.tolist()


def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what the engine generates on one device."""
    from jaxserve import LLM, SamplingParams

    alone = {
        name: value
        for name, value in SETTINGS.items()
        if name not in ("data_parallel_size", "enable_expert_parallel")
    }
    sampling = SamplingParams(
        max_tokens=JOB["max_tokens"], temperature=0.0, ignore_eos=True, detokenize=False
    )
    with LLM(str(model), **alone) as llm:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def measure(
    recorder: Recorder, *, mbit: float, repeats: int, ways: Sequence[str] = tuple(WAYS)
) -> str | None:
    """Measure ways, interleaved, and record them.

    Returns:
        Why nothing was measured; None if it was.
    """
    reason = why_not()
    if reason is not None:
        return f"skipped: served part of --moe: {reason}."
    from benchmarks.rooms.flash.expert_parallel import TINY

    environment = {"FLASH_GPUS": str(GPUS)}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        (model / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
        prompts = make_prompts()
        wanted = expected(model, prompts)
        # A server's devices share the link of its process, which is as fast as theirs together.
        with Cluster(SERVERS, 1, GPUS * mbit, MODULE, environment) as cluster:
            talk = _Talk(cluster, model, prompts)
            for name in ways:
                talk.prepare(name)
                found = talk.serve(name)[0]
                if found["tokens"] != wanted:
                    raise RuntimeError(f"{name} gives other tokens than one device.")
                print(f"{name:24} is ready", flush=True)
            runs: dict[str, list[tuple[dict[str, Any], int]]] = {name: [] for name in ways}
            try:
                for number in range(repeats + 2):
                    for name in ways:
                        run = talk.serve(name)
                        if number > 1:  # experts settle in the first two
                            runs[name].append(run)
                    print(f"round {number - 1} of {repeats}", flush=True)
            finally:  # what has been measured is kept, however it ends
                for name in ways:
                    if runs[name]:
                        _record(recorder, name, runs[name], mbit)
    return None


class _Talk:
    """Asks the processes."""

    def __init__(self, cluster: Cluster, model: Path, prompts: list[list[int]]) -> None:
        self._cluster, self._model, self._prompts = cluster, model, prompts

    def _ask(self, word: str, **job: Any) -> list[str]:  # noqa: ANN401  anything JSON knows
        self._cluster.tell([json.dumps(job)] * SERVERS)
        return self._cluster.hear(word)

    def prepare(self, name: str) -> None:
        settings = SETTINGS | WAYS[name]
        self._ask("prepared", do="prepare", name=name, model=str(self._model), settings=settings)

    def _sent(self) -> int:
        return sum(map(int, self._ask("sent", do="bytes")))

    def serve(self, name: str) -> tuple[dict[str, Any], int]:
        """Return what the first process says, and the bytes that all have sent meanwhile."""
        before = self._sent()
        job = {"name": name, "prompts": self._prompts, "max_tokens": JOB["max_tokens"]}
        found = json.loads(self._ask("served", do="serve", **job)[0])
        return found, self._sent() - before


def _record(
    recorder: Recorder, name: str, runs: Sequence[tuple[dict[str, Any], int]], mbit: float
) -> None:
    seconds = [found["seconds"] for found, _ in runs]
    first = summary([found["first"] for found, _ in runs])["median"]
    tokens = JOB["prompts"] * (JOB["length"] + JOB["max_tokens"])
    last = runs[-1][0]
    speed = tokens / summary(seconds)["median"]
    recorder.write(
        "served", way=name, servers=SERVERS, gpus=GPUS, mbit=mbit, tokens=tokens,
        tokens_per_s=round(speed, 1), seconds=[round(t, 4) for t in seconds],
        prompt_s=round(first, 4),
        decode_s=round((summary(seconds)["median"] - first) / (JOB["max_tokens"] - 1), 4),
        sent_bytes=int(summary([sent for _, sent in runs])["median"]),
        imbalance=last["imbalance"] if WAYS[name].get("enable_eplb") else None,
        moved=last["moved"], load=[round(x, 2) for x in os.getloadavg()], **JOB,
    )  # fmt: skip
    print(f"{name:24} {speed:8.0f} tokens/s", flush=True)


def report(path: Path) -> str:
    """Return a table of what has been recorded."""
    rows: list[list[str]] = []
    lines = lines_of(path, "served", "way")
    base = next((line["tokens_per_s"] for line in lines if line["way"] == "sum"), float("nan"))
    for line in lines:
        slow, fast = (line["tokens"] / f(line["seconds"]) for f in (max, min))
        rows.append(
            [
                line["way"], f"{line['tokens_per_s']:.0f}", f"{slow:.0f}-{fast:.0f}",
                f"{line['tokens_per_s'] / base:.2f}", f"{1e3 * line['prompt_s']:.0f}",
                f"{1e3 * line['decode_s']:.0f}", f"{line['sent_bytes'] / 1e6:.2f}",
                f"{line['load'][0]:.1f}",
            ]
        )  # fmt: skip
    header = ["served", "tokens/s", "range", "over sum", "prompts ms", "step ms", "MB", "load"]
    return table(header, rows)
