"""GPU tests and GPU benchmarks in one go, at most ten minutes; `make gpu` runs it.

    python -m benchmarks.gpu [--rehearse] [--dry]

1. What the device can do at most: memory bandwidth (reading and copying), bfloat16 matrix products.
2. The configurations of the attention kernels (`benchmarks.tuning`): the fastest ones become the
   table that everything below reads.
3. The kernels: steps of attention on every backend, beside cuDNN through JAX's dense attention, and
   FlashInfer and torch's SDPA where they can be imported, as shares of what was measured in 1;
   decodes over lists of one token in ten, beside those that read all; then every other operation.
4. The tests marked `gpu`: among others, every kernel against float64.
5. The shape of Llama-3.1-8B with random bfloat16 weights: decode at batch 1, 8 and 64 as a share of
   the measured bandwidth, prefill as a share of the measured matrix rate, with transformers (static
   cache, compiled step) in a process of its own on the same GPU, interleaved.

Each part is guarded: one that fails is reported, and the others still write their results. Without
a GPU it says what it would do and ends with 0. `--rehearse` runs everything with tiny sizes on
whatever device is there, to test this program; `--dry` compiles the kernels of 3 for Hopper, in
the environments of `make test-aot` and `make test-triton`, and then rehearses 1 to 3.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.child import (
    ROOT,
    Child,
    PeerError,
    oracle_python,
    quiet_environment,
    random_prompts,
)
from benchmarks.gpu_cases import DIM, HEADS, LIST_STEPS, STEPS, TINY_LIST_STEPS, TINY_STEPS
from benchmarks.kernels import ENVIRONMENTS
from benchmarks.record import Recorder, summary, table
from jaxserve.pallas_kernels.cards import PLACES

BUDGET_S = 570.0
TESTS_S = 170.0
KERNELS_S = 130.0
"""Most seconds for measuring kernels; steps that come too late are left out, and named."""
TUNING_S = 70.0
"""Most seconds for measuring configurations; keys that come too late keep their guess."""
OURS, PEER = "jaxserve", "transformers"

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        config: Shape of the model, as config.json has it.
        batches: Concurrent sequences of the decode columns.
        context: Tokens of context before decoding.
        prefill: Tokens of the prefill column.
        steps: Decode steps per sample.
        read_gib: Array that is read and copied.
        matrix: Rows and columns of the matrices.
        repeats: Rounds.
    """

    config: dict[str, Any]
    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 256
    prefill: int = 4096
    steps: int = 64
    read_gib: float = 8.0
    matrix: int = 8192
    repeats: int = 3

    def num_weights(self) -> tuple[int, int]:
        """Return (weights of the layers, weights of the output projection)."""
        c = self.config
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        hidden = c["hidden_size"]
        attention = hidden * dim * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * c["intermediate_size"]
        return c["num_hidden_layers"] * layer, hidden * c["vocab_size"]

    def decode_bytes(self, batch: int) -> float:
        """Return the fewest bytes that a decode step must read: weights, keys and values."""
        c = self.config
        per_token = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] * 2
        return 2.0 * sum(self.num_weights()) + batch * per_token * (self.context + self.steps / 2)

    def prefill_flops(self) -> float:
        """Return the operations of a prefill: matrix products and causal attention."""
        c, n = self.config, self.prefill
        layers, head = self.num_weights()
        width = c["num_attention_heads"] * c["head_dim"]
        return 2.0 * layers * n + 2.0 * head + 2.0 * n * n * width * c["num_hidden_layers"]


@dataclass(slots=True)
class Run:
    """One call of this program.

    Attributes:
        sizes: How much.
        device: Facts of the device.
        recorder: Where lines go.
        deadline: Instant at which everything must have ended.
        rehearsal: Whether it is only a test of this program.
        is_dry: Whether kernels are compiled and rehearsed only.
        problems: What went wrong.
        rates: Samples by (engine, column).
    """

    sizes: Sizes
    device: dict[str, Any]
    recorder: Recorder
    deadline: float
    rehearsal: bool
    is_dry: bool = False
    problems: list[str] = field(default_factory=list)
    ceilings: dict[str, Any] = field(default_factory=dict)
    rates: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def left_s(self) -> float:
        """Seconds until everything must have ended."""
        return self.deadline - time.monotonic()

    def guard(self, name: str, part: Callable[[], None]) -> None:
        """Carry out one part; whatever happens, the next one gets its turn."""
        started = time.monotonic()
        print(f"[{name}] ...", flush=True)
        try:
            part()
        except Exception as error:  # noqa: BLE001  the other parts must still run
            text = f"{name}: {type(error).__name__}: {error}"
            self.problems.append(text)
            self.recorder.write("problem", part=name, error=str(error)[:500])
            print(f"  FAILED: {text[:500]}")
        print(f"[{name}] {time.monotonic() - started:.0f} s", flush=True)


def find_device(*, any_device: bool) -> dict[str, Any] | None:
    """Ask a process of its own what JAX sees, so that this one holds no device memory."""
    code = (
        "import jax, json; d = jax.devices()[0]; "
        "s = d.memory_stats() or {}; "
        "print(json.dumps({'kind': d.device_kind, 'platform': d.platform, "
        "'memory_gib': s.get('bytes_limit', 0) / 2**30}))"
    )
    environment = {**quiet_environment(), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.99"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None
    if found["platform"] == "cpu" and not any_device:
        return None
    return {**found, "driver": driver_version()}


def driver_version() -> str:
    """Ask nvidia-smi for the driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# Parts ----------------------------------------------------------------------------------------


def run_tests(run: Run) -> None:
    """Run the tests in `tests/gpu`, all of them marked `gpu`."""
    limit = min(TESTS_S, run.left_s)
    # Only this folder: the others import packages that a GPU machine need not have. Its versions of
    # Flax and JAX are its own, so that their warnings are no errors.
    options = ["-q", "-W", "default", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(6, os.cpu_count() or 1))]  # most of the time goes to compiling
    command = [sys.executable, "-m", "pytest", *options, "tests/gpu"]
    environment = {
        **quiet_environment(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **({} if run.rehearsal else {"JAX_PLATFORMS": "cuda"}),
    }
    log = run.recorder.path.with_name("gpu_tests.log")
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            timeout=limit, check=False,
        )  # fmt: skip
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    print(f"  {last}")
    run.recorder.write("tests", rc=done.returncode, summary=last)
    if done.returncode not in (0, 5):  # 5: no test was selected
        raise RuntimeError(f"pytest ended with {done.returncode}: {last}")


def measure_ceilings(run: Run, ours: Child) -> None:
    """Measure bandwidth and matrix rate before anything else fills the memory."""
    found = ours.ask(
        "ceilings", gib=run.sizes.read_gib, size=run.sizes.matrix, timeout_s=min(120, run.left_s)
    )
    run.ceilings = found
    run.recorder.write("ceilings", **found)
    print(
        f"  read {found['read_gb_s']:.0f} GB/s, copy {found['copy_gb_s']:.0f} GB/s, bfloat16 "
        f"product {found['matmul_tflop_s']:.1f} TFLOP/s"
    )


def load_ours(run: Run, ours: Child, config_dir: Path) -> None:
    """Draw our weights on the device; steps are compiled when they are first used."""
    sizes, config = run.sizes, run.sizes.config
    longest = max(2 * sizes.prefill, 2 * (sizes.context + sizes.steps))
    tokens = max(sizes.batches) * (sizes.context + sizes.steps + 64) + longest
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    about = ours.ask(
        "load",
        model=str(config_dir),
        dtype="bfloat16",
        load_format="dummy",
        warmup="lazy",
        max_num_seqs=max(sizes.batches),
        max_num_batched_tokens=sizes.prefill,
        max_model_len=longest,
        kv_cache_memory_bytes=int(tokens * per_token * 1.2),
        kv_layout="pages",
        timeout_s=run.left_s,
    )
    run.recorder.write("about", engine=OURS, versions=about["versions"], settings=about["settings"])


def load_peer(run: Run, peer: Child, config_dir: Path) -> None:
    """Draw the peer's weights on the device."""
    device = "cpu" if run.device["platform"] == "cpu" else "cuda"
    about = peer.ask(
        "load", config_dir=str(config_dir), dtype="bfloat16", device=device,
        timeout_s=min(150, run.left_s),
    )  # fmt: skip
    run.recorder.write("about", engine=PEER, versions=about["versions"], settings=about["settings"])


def sample(run: Run, name: str, child: Child, column: str, seed: int) -> None:
    """Take one sample of one column from one engine."""
    sizes = run.sizes
    vocab = sizes.config["vocab_size"] - 1
    if column == "prefill":
        (prompt,) = random_prompts([seed, 1], 1, sizes.prefill, vocab)
        answer = child.ask("prefill", prompt=prompt, timeout_s=run.left_s)
        run.rates[name, column].append(sizes.prefill / answer["seconds"])
        return
    batch = int(column.removeprefix("decode"))
    prompts = random_prompts([seed, batch], batch, sizes.context, vocab)
    answer = child.ask("decode", prompts=prompts, steps=sizes.steps, timeout_s=run.left_s)
    run.rates[name, column].append(answer["tokens_per_s"])


def measure_rounds(run: Run, children: dict[str, Child]) -> None:
    """Warm every column up, then measure in rounds; the order of the engines alternates."""
    columns = ["prefill", *(f"decode{batch}" for batch in run.sizes.batches)]
    alive = dict(children)

    def take(name: str, column: str, seed: int) -> None:
        try:
            sample(run, name, alive[name], column, seed)
        except PeerError as error:
            run.problems.append(f"{name} {column}: {error}")
            print(f"  {name} {column} FAILED: {error}")
            if "took longer" in str(error) or "process ended" in str(error):
                alive.pop(name)

    for name in list(alive):
        for column in columns:
            if name in alive and run.left_s > 40:
                take(name, column, seed=10**6)
                take(name, column, seed=10**6 + 1)
    run.rates.clear()
    for number in range(run.sizes.repeats):
        started = time.monotonic()
        order = sorted(alive, reverse=number % 2 == 1)
        for column in columns:
            for name in order:
                if name in alive and run.left_s > 20:
                    take(name, column, seed=number)
        if time.monotonic() - started > run.left_s - 20:
            break


def share(run: Run, column: str, rate: float) -> float:
    """Return a rate as a share of what the device can do at most."""
    if column == "prefill":
        seconds = run.sizes.prefill / rate
        return run.sizes.prefill_flops() / seconds / (run.ceilings["matmul_tflop_s"] * 1e12)
    batch = int(column.removeprefix("decode"))
    bandwidth = 1e9 * max(run.ceilings["read_gb_s"], run.ceilings["copy_gb_s"])
    return run.sizes.decode_bytes(batch) * (rate / batch) / bandwidth


def report(run: Run) -> None:
    """Print one table and write one line per engine and column."""
    rows = []
    for column in dict.fromkeys(column for _, column in run.rates):
        row = [column]
        medians: list[float] = []
        for name in (OURS, PEER):
            samples = run.rates.get((name, column))
            if not samples:
                row += ["-", "-"]
                continue
            middle = statistics.median(samples)
            medians.append(middle)
            part = share(run, column, middle) if run.ceilings else float("nan")
            row += [f"{middle:.1f}", f"{part:.1%}"]
            run.recorder.write(
                column, engine=name, dtype="bfloat16", unit="tokens/s", **summary(samples),
                share_of_ceiling=part, samples=[round(value, 1) for value in samples],
                context=run.sizes.context, prefill=run.sizes.prefill,
                shape={k: v for k, v in run.sizes.config.items() if isinstance(v, int | float)},
            )  # fmt: skip
        row.append(f"{medians[0] / medians[1]:.2f}" if len(medians) == 2 else "-")
        rows.append(row)
    if rows:
        header = ["bfloat16", "jaxserve tok/s", "share", "transformers tok/s", "share", "ratio"]
        print(table(header, rows))
        print("share: of the measured bandwidth (decode), of the measured matrix rate (prefill)")


def measure_configurations(run: Run) -> None:
    """Let a process of its own measure configurations and write the table."""
    command = [sys.executable, "-m", "benchmarks.tuning", "--budget", str(TUNING_S)]
    done = subprocess.run(
        [*command, *(["--rehearse"] if run.rehearsal else [])],
        env={**quiet_environment(), "OUT": str(run.recorder.path.parent)},
        cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=max(1.0, min(3 * TUNING_S, run.left_s)),
    )  # fmt: skip
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])


def measure_kernels(run: Run, folder: Path) -> None:
    """Measure kernels beside their peers, until their time is over."""
    deadline = time.monotonic() + min(KERNELS_S, run.left_s)
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    children = {OURS: Child(sys.executable, "benchmarks.gpu_kernels", folder / "k.log", memory)}
    python = peer_python("torch")
    if python is None:
        print("  no Python with torch is at hand: jaxserve and JAX alone")
    else:
        module = "benchmarks.peers.gpu_attention_peer"
        children["torch"] = Child(python, module, folder / "kernel_peer.log")
    try:
        for name, child in children.items():
            where = {"device": "cpu"} if run.device["platform"] == "cpu" else {}
            about = child.ask("load", timeout_s=100, **(where if name != OURS else {}))
            run.recorder.write("about", engine=f"{name} kernels", versions=about["versions"])
        rows, late = measure_steps(run, children, deadline)
        listed, left = measure_lists(run, children[OURS], deadline)
        operations, missed = measure_operations(run, children[OURS], deadline)
    finally:
        for child in children.values():
            child.close()
    header = ["by", "us", "GB/s", "of copy", "TFLOP/s", "of matmul", "difference"]
    for what, lines in (("attention", rows), ("lists", listed)):
        if lines:
            print(table([what, *header], lines))
    if operations:
        print(table(["operation", "by", "us", "GB/s", "of copy"], operations))
    late += left + missed
    if late:
        run.recorder.write("late", parts=late)
        print(f"  no time was left for: {', '.join(late)}")


def measure_steps(
    run: Run, children: dict[str, Child], deadline: float
) -> tuple[list[list[str]], list[str]]:
    """Measure the steps of attention; return rows of the table, and what came too late."""
    rows: list[list[str]] = []
    late: list[str] = []
    repeats = 3 if run.rehearsal else 20
    for name, step in (TINY_STEPS if run.rehearsal else STEPS).items():
        if time.monotonic() > deadline - 15:
            late.append(name)
            continue
        found = children[OURS].ask(
            "attention", name=name, repeats=repeats, timeout_s=min(120, run.left_s)
        )
        if "torch" in children and step.kv_dtype == "bfloat16" and not step.cascade:
            theirs = children["torch"].ask(
                "attention", q_len=step.q_len, kv_len=step.kv_len, page_size=step.page_size,
                heads=HEADS, dim=DIM, repeats=repeats, timeout_s=min(120, run.left_s),
            )  # fmt: skip
            for key in ("seconds", "refusals"):
                found[key].update(theirs[key])
        rows += record_found(run, name, found)
    return rows, late


def record_found(run: Run, name: str, found: Mapping[str, Any]) -> list[list[str]]:
    """Record what one step took on each implementation; return rows of the table.

    Args:
        run: The run.
        name: Of the step.
        found: What a worker answered; of those that read everything the bytes are `dense_bytes`,
            where the step has any.
    """
    rows: list[list[str]] = []
    for label, reason in found["refusals"].items():
        run.recorder.write(name, implementation=label, refused=reason)
    for label, samples in found["seconds"].items():
        kind = "dense" if label.startswith("dense") and "dense_bytes" in found else "num"
        work = {f"num_{part}": found[f"{kind}_{part}"] for part in ("bytes", "flops")}
        rates = rates_of(run, work, samples)
        difference = found["difference"].get(label)
        run.recorder.write(
            name, implementation=label, unit="us", difference=difference,
            **summary([1e6 * value for value in samples]), **rates,
        )  # fmt: skip
        rows.append(
            [
                name,
                label,
                f"{1e6 * statistics.median(samples):.1f}",
                f"{rates['gb_s']:.0f}",
                f"{rates['share_of_copy']:.1%}",
                f"{rates['tflop_s']:.1f}",
                f"{rates['share_of_matmul']:.1%}",
                "-" if difference is None else f"{difference:.1e}",
            ]
        )
    return rows


def measure_lists(run: Run, ours: Child, deadline: float) -> tuple[list[list[str]], list[str]]:
    """Measure decodes over lists beside those that read all; return rows, and what was too late."""
    rows: list[list[str]] = []
    late: list[str] = []
    for name in TINY_LIST_STEPS if run.rehearsal else LIST_STEPS:
        if time.monotonic() > deadline - 10:
            late.append(name)
            continue
        found = ours.ask(
            "lists", name=name, repeats=3 if run.rehearsal else 20, timeout_s=min(60, run.left_s)
        )
        rows += record_found(run, name, found)
    return rows, late


def rates_of(run: Run, found: dict[str, Any], samples: list[float]) -> dict[str, float]:
    """Return rates, and their shares of what the device was measured to do at most."""
    seconds = statistics.median(samples)
    gb_s, tflop_s = found["num_bytes"] / seconds / 1e9, found["num_flops"] / seconds / 1e12
    copy, matmul = (run.ceilings.get(n, float("nan")) for n in ("copy_gb_s", "matmul_tflop_s"))
    return {
        "gb_s": gb_s,
        "share_of_copy": gb_s / copy,
        "tflop_s": tflop_s,
        "share_of_matmul": tflop_s / matmul,
    }


def measure_operations(run: Run, ours: Child, deadline: float) -> tuple[list[list[str]], list[str]]:
    """Measure all operations but attention; return rows, and what came too late."""
    rows: list[list[str]] = []
    late: list[str] = []
    for name in sorted(PLACES.keys() - {"attention"}):
        if time.monotonic() > deadline - 5:
            late.append(name)
            continue
        found = ours.ask(
            "operation", name=name, dtype="bfloat16", repeats=3 if run.rehearsal else 20,
            tiny=run.rehearsal, timeout_s=min(60, run.left_s),
        )  # fmt: skip
        for label, reason in found["refusals"].items():
            run.recorder.write(name, implementation=label, refused=reason)
        for label, samples in found["seconds"].items():
            rates = rates_of(run, found, samples)
            run.recorder.write(
                name, implementation=label, unit="us", sizes=found["sizes"],
                **summary([1e6 * value for value in samples]), **rates,
            )  # fmt: skip
            micros = f"{1e6 * statistics.median(samples):.1f}"
            rows.append(
                [name, label, micros, f"{rates['gb_s']:.0f}", f"{rates['share_of_copy']:.1%}"]
            )
    return rows, late


def compile_kernels(compiler: str, environment: str) -> None:
    """Compile the kernels that are measured, for a GPU that need not be there."""
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        target = "test-aot" if compiler == "mosaic" else "test-triton"
        raise RuntimeError(f"{environment} is not there; run `make {target}` first")
    done = subprocess.run(
        [python, "-m", "benchmarks.gpu_kernels", "--compile", compiler],
        env={**quiet_environment(), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])


# The whole ------------------------------------------------------------------------------------


def fit(config: dict[str, Any], memory_gib: float) -> dict[str, Any]:
    """Drop layers where the card cannot hold both engines' weights and caches."""
    if not memory_gib or memory_gib > 70:
        return config
    layers = max(2, int(config["num_hidden_layers"] * memory_gib / 70))
    return config | {"num_hidden_layers": layers}


def has(python: Path | str, packages: str) -> bool:
    """Tell whether a Python can import packages."""
    code = f"import {packages}"
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, timeout=90, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def peer_python(packages: str = "torch, transformers") -> Path | str | None:
    """Find a Python with torch: this one, as on GPU machines, else the oracle environment's."""
    candidates = [sys.executable, *filter(None, [oracle_python()])]
    return next((python for python in candidates if has(python, packages)), None)


def run_all(run: Run) -> None:
    """Carry out every part; of a dry run, those that concern kernels."""
    if run.is_dry:
        for compiler, environment in ENVIRONMENTS.items():
            run.guard(
                f"compile {compiler}", functools.partial(compile_kernels, compiler, environment)
            )
    preallocate = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    }
    with tempfile.TemporaryDirectory(prefix="jaxserve-gpu-") as folder:
        config_dir = Path(folder)
        (config_dir / "config.json").write_text(json.dumps(run.sizes.config))
        probe = Child(sys.executable, "benchmarks.worker", config_dir / "probe.log", preallocate)
        try:
            run.guard("ceilings", lambda: measure_ceilings(run, probe))
        finally:
            probe.close()
        run.guard("tuning", lambda: measure_configurations(run))
        run.guard("kernels", lambda: measure_kernels(run, config_dir))
        if run.is_dry:
            return
        run.guard("tests", lambda: run_tests(run))
        children: dict[str, Child] = {}
        try:
            run.guard("load jaxserve", lambda: start_ours(run, children, config_dir, preallocate))
            run.guard("load transformers", lambda: start_peer(run, children, config_dir))
            run.guard("measure", lambda: measure_rounds(run, children))
        finally:
            for child in children.values():
                child.close()
        run.guard("report", lambda: report(run))


def start_ours(
    run: Run, children: dict[str, Child], config_dir: Path, environment: dict[str, str]
) -> None:
    """Start and load our process."""
    child = Child(sys.executable, "benchmarks.worker", config_dir / "ours.log", environment)
    try:
        load_ours(run, child, config_dir)
    except PeerError:
        child.close()
        raise
    children[OURS] = child


def start_peer(run: Run, children: dict[str, Child], config_dir: Path) -> None:
    """Start and load the peer's process, where a Python with torch is at hand."""
    python = peer_python()
    if python is None:
        print("  no Python with torch and transformers is at hand: jaxserve alone")
        return
    module = "benchmarks.peers.transformers_gpu_peer"
    child = Child(python, module, config_dir / "peer.log")
    try:
        load_peer(run, child, config_dir)
    except PeerError:
        child.close()
        raise
    children[PEER] = child


def main() -> None:
    """Run everything, or say what would be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on any device")
    parser.add_argument("--dry", action="store_true", help="compile kernels; needs no GPU")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything")
    args = parser.parse_args()
    args.rehearse |= args.dry
    started = time.monotonic()
    device = find_device(any_device=args.rehearse)
    if device is None:
        print("No GPU that JAX can use. On a machine with one, this would do the following.\n")
        print(__doc__.split("\n\n", 2)[2])
        raise SystemExit(0)
    if args.rehearse:
        sizes = Sizes(
            config=TINY, context=32, prefill=64, steps=8, read_gib=0.05, matrix=512, repeats=2
        )
    else:
        sizes = Sizes(config=fit(LLAMA_8B, device["memory_gib"]))
    run = Run(
        sizes=sizes,
        device=device,
        recorder=Recorder("gpu_rehearsal" if args.rehearse else "gpu", device=device),
        deadline=started + args.budget,
        rehearsal=args.rehearse,
        is_dry=args.dry,
    )
    print(f"{device['kind']}, {device['memory_gib']:.0f} GiB, driver {device['driver']}")
    if not args.rehearse and sizes.config != LLAMA_8B:
        print(f"to fit the card, the model has {sizes.config['num_hidden_layers']} layers here")
    run_all(run)
    for text in run.problems:
        print(f"PROBLEM: {text[:300]}")
    print(f"result lines: {run.recorder.path.name}; {time.monotonic() - started:.0f} s in all")
    raise SystemExit(1 if run.problems else 0)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
