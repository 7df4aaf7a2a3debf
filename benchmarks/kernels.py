"""Kernels: attention beside its peers, and what every kernel takes.

    python -m benchmarks.kernels --cpu
    python -m benchmarks.kernels --report [--only WORD] [--jobs 2]

`--report` compiles every kernel in every configuration for Hopper, without a GPU, in the
environments of `make test-aot` and `make test-triton`, and fails if a Mosaic kernel spills.

`--cpu`: the portable backend, over pages, against dense attention of JAX and torch on one CPU. The
peer in JAX is what one would write without kernels: gather the pages of every request into a dense
batch, then `jax.nn.dot_product_attention`. That of torch (`peers/sdpa_peer.py`) is spared the
gather. All get the same values, take turns, and are compared by their outputs first; ratios are of
medians.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.child import ROOT, Child, PeerError, oracle_python, quiet_environment
from benchmarks.peers.attention_inputs import dense_inputs
from benchmarks.record import Recorder, summary, table
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan

TOLERANCE = {"float32": 2e-4, "bfloat16": 3e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured case.

    Attributes:
        name: Name in the table.
        q_len: Query tokens of each request.
        kv_len: Keys of each request.
        heads: Query heads and key-value heads.
        dim: Dimension of a head.
        page_size: Tokens per page.
        dtype: Of everything.
    """

    name: str
    q_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    heads: tuple[int, int] = (32, 8)
    dim: int = 128
    page_size: int = 16
    dtype: str = "float32"


def cases(dtype: str) -> list[Case]:
    """List the cases of one dtype."""
    rng = np.random.default_rng(0)
    mixed = tuple(int(n) for n in rng.integers(256, 2048, 16))
    skewed = (8192, *(int(n) for n in rng.integers(128, 512, 15)))
    many = tuple(int(n) for n in rng.integers(32, 512, 64))
    make = functools.partial(Case, dtype=dtype)
    return [
        make(name="decode 1 x 4096", q_len=(1,), kv_len=(4096,)),
        make(name="decode 16 x 1024", q_len=(1,) * 16, kv_len=(1024,) * 16),
        make(name="decode 16, 256..2048", q_len=(1,) * 16, kv_len=mixed),
        make(name="decode 16, one long", q_len=(1,) * 16, kv_len=skewed),
        make(name="decode 64, short", q_len=(1,) * 64, kv_len=many),
        make(name="decode 16, small model", q_len=(1,) * 16, kv_len=mixed, heads=(9, 3), dim=64),
        make(name="chunk 256 of 1024", q_len=(256,), kv_len=(1024,)),
        make(name="chunk 512 of 4096", q_len=(512,), kv_len=(4096,)),
        make(name="4 chunks of 128", q_len=(128,) * 4, kv_len=(300, 1000, 2000, 130)),
        make(name="chunk, small model", q_len=(512,), kv_len=(1024,), heads=(9, 3), dim=64),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A case on the device."""

    q: jax.Array
    kv: PagedKV
    table: PageTable


def inputs_of(case: Case, seed: int) -> Inputs:
    """Draw a case and scatter it over pages."""
    q, keys, values = dense_inputs(case.q_len, case.kv_len, case.heads, case.dim, seed)
    rng = np.random.default_rng(seed)
    size = case.page_size
    used = [-(-n // size) for n in case.kv_len]
    pages = 1 + rng.permutation(sum(used))
    pool = np.zeros((2, sum(used) + 1, case.heads[1], size, case.dim), np.float32)
    indptr = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    for i, count in enumerate(used):
        for which, dense in enumerate((keys[i], values[i])):
            padded = np.zeros((count * size, *dense.shape[1:]), np.float32)
            padded[: len(dense)] = dense
            tiles = padded.reshape(count, size, *dense.shape[1:]).swapaxes(1, 2)
            pool[which, pages[indptr[i] : indptr[i + 1]]] = tiles
    dtype = jnp.dtype(case.dtype)
    return Inputs(
        q=jnp.asarray(np.concatenate(q), dtype),
        kv=PagedKV(k=jnp.asarray(pool[0], dtype), v=jnp.asarray(pool[1], dtype)),
        table=PageTable(
            indptr=indptr, indices=pages.astype(np.int32), kv_len=np.array(case.kv_len, np.int32)
        ),
    )


def ours(case: Case, inputs: Inputs) -> Callable[[], jax.Array]:
    """Return the call of the portable backend; the plan is made once, as for many layers."""
    spec = PlanSpec(
        q_heads=case.heads[0],
        kv_heads=case.heads[1],
        head_dim=case.dim,
        page_size=case.page_size,
        q_dtype=case.dtype,
        kv_dtype=case.dtype,
        max_requests=len(case.q_len),
        max_tokens=sum(case.q_len),
        max_pages=inputs.table.indices.size,
    )
    plan = jax.device_put(make_plan(spec, np.array(case.q_len), inputs.table))
    return lambda: attention(inputs.q, inputs.kv, plan, backend="xla")


def dense_jax(case: Case, inputs: Inputs) -> Callable[[], jax.Array]:
    """Return a gather of all pages into a padded batch, and JAX's attention."""
    batch, most_q = len(case.q_len), max(case.q_len)
    width = -(-max(case.kv_len) // case.page_size)
    rows = np.zeros((batch, width), np.int32)
    indptr = inputs.table.indptr
    for i in range(batch):
        rows[i, : indptr[i + 1] - indptr[i]] = inputs.table.indices[indptr[i] : indptr[i + 1]]
    starts = np.cumsum(case.q_len) - np.array(case.q_len)
    place = np.minimum(starts[:, None] + np.arange(most_q), sum(case.q_len) - 1)
    seen = np.zeros((batch, 1, most_q, width * case.page_size), np.bool_)
    for i, (n, m) in enumerate(zip(case.q_len, case.kv_len, strict=True)):
        position = m - n + np.arange(most_q)
        seen[i, 0] = np.arange(seen.shape[3])[None, :] <= np.minimum(position, m - 1)[:, None]

    @jax.jit
    def attend(q: jax.Array, kv: PagedKV, rows: jax.Array, place: jax.Array, seen: jax.Array):  # noqa: ANN202
        def gather(pool: jax.Array) -> jax.Array:
            taken = jnp.swapaxes(pool[rows], 2, 3)
            return taken.reshape(batch, -1, *taken.shape[3:])

        mask = None if most_q == 1 and len(set(case.kv_len)) == 1 else seen
        return jax.nn.dot_product_attention(q[place], gather(kv.k), gather(kv.v), mask=mask)

    arguments = [jnp.asarray(x) for x in (rows, place, seen)]
    return lambda: attend(inputs.q, inputs.kv, *arguments)


def last_rows(case: Case, out: np.ndarray, *, is_padded: bool) -> np.ndarray:
    """Return what the last query of each request got, the first numbers of its first head."""
    ends = np.cumsum(case.q_len) - 1
    rows = [out[i, n - 1] if is_padded else out[ends[i]] for i, n in enumerate(case.q_len)]
    return np.stack(rows)[:, 0, :4].astype(np.float32)


def measure(case: Case, peer: Child | None, rounds: int, seed: int) -> dict[str, list[float]]:
    """Check that all agree, then time them in turn.

    Returns:
        Seconds by implementation.
    """
    inputs = inputs_of(case, seed)
    calls = {"xla": ours(case, inputs), "dense jax": dense_jax(case, inputs)}
    answers = {
        name: last_rows(case, np.asarray(call()), is_padded=name != "xla")
        for name, call in calls.items()
    }
    if peer is not None:
        peer.ask(
            "prepare",
            q_len=list(case.q_len),
            kv_len=list(case.kv_len),
            heads=list(case.heads),
            dim=case.dim,
            dtype=case.dtype,
            seed=seed,
        )
        answers["torch"] = np.array(peer.ask("run", repeats=2)["last"])
    for name, answer in answers.items():
        limit = TOLERANCE[case.dtype]
        np.testing.assert_allclose(answer, answers["xla"], atol=limit, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    for number in range(rounds):
        for name in sorted(answers, reverse=number % 2 == 1):
            if name == "torch" and peer is not None:
                seconds[name] += peer.ask("run", repeats=3)["seconds"][1:]
                continue
            calls[name]().block_until_ready()
            for _ in range(2):
                start = time.perf_counter()
                calls[name]().block_until_ready()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def start_peer(folder: Path) -> Child | None:
    """Start torch, where the oracle environment is at hand."""
    python = oracle_python()
    if python is None:
        print("no Python with torch is at hand (make oracles): JAX alone")
        return None
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    # Threads that spin while they wait would take the other implementations' processors.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    peer = Child(python, "benchmarks.peers.sdpa_peer", folder / "torch.log", environment)
    try:
        peer.ask("load", threads=threads, timeout_s=120)
    except PeerError as error:
        print(f"torch cannot be measured: {error}")
        peer.close()
        return None
    return peer


def compare_on_cpu(args: argparse.Namespace) -> bool:
    """Measure, print and record; tell whether every required ratio was reached."""
    recorder = Recorder("kernels_cpu", out=args.out)
    rows: list[list[str]] = []
    is_met = True
    with tempfile.TemporaryDirectory(prefix="jaxserve-kernels-") as folder:
        peer = start_peer(Path(folder))
        for dtype in args.dtypes:
            for number, case in enumerate(cases(dtype)):
                if args.only and args.only not in case.name:
                    continue
                seconds = measure(case, peer, args.rounds, number)
                middle = {name: statistics.median(times) for name, times in seconds.items()}
                ratios = {n: t / middle["xla"] for n, t in middle.items() if n != "xla"}
                is_met &= ratios["dense jax"] >= 1.0
                for name, times in seconds.items():
                    recorder.write(
                        case.name,
                        implementation=name,
                        dtype=dtype,
                        unit="ms",
                        **summary([1e3 * t for t in times]),
                        ratio_to_xla=middle[name] / middle["xla"],
                    )
                rows.append(
                    [
                        f"{dtype} {case.name}",
                        *(f"{1e3 * middle[n]:.2f}" if n in middle else "-" for n in NAMES),
                        *(f"{ratios[n]:.2f}" if n in ratios else "-" for n in NAMES[1:]),
                    ]
                )
        if peer is not None:
            peer.close()
    header = ["ms", "xla", "dense jax", "torch", "dense/xla", "torch/xla"]
    print(table(header, rows))
    print("required: dense/xla at least 1.0" + ("" if is_met else "; NOT MET"))
    return is_met


NAMES = ("xla", "dense jax", "torch")

ENVIRONMENTS = {"mosaic": ".venv-aot", "triton": ".venv-triton"}
"""Where each compiler is."""


def compiled(compiler: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile everything with one compiler, in its environment; return what it says."""
    python = ROOT / ENVIRONMENTS[compiler] / "bin" / "python"
    if not python.exists():
        name = "aot" if compiler == "mosaic" else compiler
        sys.exit(f"{ENVIRONMENTS[compiler]} is not there; run `make test-{name}` first.")
    command = [python, "-m", "benchmarks.kernel_report", compiler, "--jobs", str(args.jobs)]
    done = subprocess.run(
        [*command, "--only", args.only or ""],
        env={**quiet_environment(), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def report(args: argparse.Namespace) -> bool:
    """Compile every kernel, print and record; tell whether no Mosaic kernel spills."""
    from_triton = compiled("triton", args)
    able = {line["name"]: line["backends"] for line in from_triton if "name" in line}
    lines = compiled("mosaic", args)
    for line in lines:
        line["backends"] = able[f"{line['kernel']}: {line['configuration']}"]
    lines += [line for line in from_triton if "name" not in line]
    recorder = Recorder("kernel_report", out=args.out)
    rows = []
    for line in lines:
        recorder.write(line["kernel"], **{n: v for n, v in line.items() if n != "kernel"})
        numbers = ("registers", "spill_bytes", "shared_memory", "threads")
        rows.append(
            [
                f"{line['compiler']} {line['kernel']}",
                *("-" if line[n] is None else f"{line[n]:,}" for n in numbers),
                f"{line['num_bytes'] / 1e6:,.2f}",
                f"{line['num_flops'] / 1e9:,.2f}",
                " ".join(line["backends"]),
                line["configuration"],
            ]
        )
    header = ["kernel", "registers", "spill B", "shared B", "threads", "MB", "GFLOP", "backends"]
    print(table([*header, "configuration"], rows))
    mosaic = [line for line in lines if line["compiler"] == "mosaic"]
    bad = [line for line in mosaic if line["registers"] is None or line["spill_bytes"]]
    print(f"{len(lines)} lines; {len(bad)} Mosaic configurations spill or do not compile")
    return not bad


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="the portable backend beside peers")
    parser.add_argument("--report", action="store_true", help="what every kernel takes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    args = parser.parse_args()
    if args.report:
        sys.exit(0 if report(args) else 1)
    if not args.cpu:
        parser.print_help()
        sys.exit(2)
    sys.exit(0 if compare_on_cpu(args) else 1)


if __name__ == "__main__":
    main()
