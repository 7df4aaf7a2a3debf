"""What planning a step's attention costs on the host, and how even the plans are.

    python -m benchmarks.plan

Times are of `make_plan` into words that are cleared first and used again, as the engine does it,
lengths new in every call, with 32 query heads over 8 of keys and values and pages of 16. Makespan:
work of the busiest CTA over the least that any plan could give it, an even share; with unsplit
work, at least the longest piece. Compilations: of attention on the `xla` backend over mixes of
lengths within one plan's room, after the first call.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import Recorder, table
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import Item, Plan, PlanSpec
from jaxserve.pallas_kernels.planner import make_plan

PAGE_SIZE = 16
BATCHES = (1, 4, 16, 64, 256, 1024)
LENGTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, n: rng.integers(64, 4096, n),
    "log-normal": lambda rng, n: np.clip(rng.lognormal(7, 1, n), 16, 32768).astype(np.int64),
    "one long": lambda rng, n: np.append(rng.integers(900, 1100, n - 1), 32768),
}
MODES: dict[str, dict[str, Any]] = {
    "balanced": {},
    "fixed": {"fixed_split_size": 1024},
    "unsplit": {"disable_split": True},
}


def page_table(kv_len: np.ndarray, rng: np.random.Generator) -> PageTable:
    """Scatter requests over pages."""
    used = -(-kv_len // PAGE_SIZE)
    indptr = np.zeros(kv_len.size + 1, np.int32)
    np.cumsum(used, out=indptr[1:])
    indices = 1 + rng.permutation(int(indptr[-1])).astype(np.int32)
    return PageTable(indptr=indptr, indices=indices, kv_len=kv_len.astype(np.int32))


def spec_for(batch: int, pages: int, **settings: Any) -> PlanSpec:  # noqa: ANN401
    """Return a spec with room for a decoding batch."""
    heads = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
    room = {"max_requests": batch, "max_tokens": batch, "max_pages": pages}
    return PlanSpec(**{**heads, **room, "page_size": PAGE_SIZE, **settings})


def unevenness(plan: Plan) -> float:
    """Return the work of the busiest CTA over the least possible."""
    spec, items = plan.spec, plan.items[: int(plan.num_items)]
    keys = (items[:, Item.KV_END] - items[:, Item.KV_BEGIN]).astype(np.int64)
    rows = items[:, Item.Q_LEN] * spec.heads_per_tile
    cost = -(-keys // spec.tile_kv) * spec.tile_kv + spec.item_cost + spec.row_cost * rows
    sums = np.concatenate([[0], np.cumsum(cost)])
    load = sums[plan.work_indptr[1:]] - sums[plan.work_indptr[:-1]]
    least = max(cost.sum() / spec.num_ctas, cost.max())
    return float(load.max() / least)


def measure(batch: int, lengths: str, mode: str, repeats: int) -> dict[str, Any]:
    """Plan many batches of one kind; every one is timed, and none twice."""
    rng = np.random.default_rng([batch, len(lengths)])
    tables = [page_table(LENGTHS[lengths](rng, batch), rng) for _ in range(repeats)]
    spec = spec_for(batch, max(t.indices.size for t in tables), **MODES[mode])
    if mode == "fixed":
        most = max(int((-(-table_.kv_len // 1024)).sum()) for table_ in tables)
        room = most * spec.kv_heads
        spec = spec_for(batch, spec.max_pages, max_items=room, max_units=room, **MODES[mode])
    q_len = np.ones(batch, np.int64)
    out = np.zeros(spec.num_words, np.int32)
    for table_ in tables[:20]:
        out.fill(0)
        make_plan(spec, q_len, table_, out=out)
    times: list[float] = []
    spent: list[float] = []
    uneven: list[float] = []
    for table_ in tables:
        start, busy = time.perf_counter(), time.process_time()
        out.fill(0)
        plan = make_plan(spec, q_len, table_, out=out)
        spent.append(1e6 * (time.process_time() - busy))
        times.append(1e6 * (time.perf_counter() - start))
        uneven.append(unevenness(plan))
    return {
        "batch": batch,
        "lengths": lengths,
        "mode": mode,
        "median_us": float(np.median(times)),
        "p99_us": float(np.percentile(times, 99)),
        "least_us": float(np.min(times)),
        "cpu_median_us": float(np.median(spent)),
        "repeats": repeats,
        "makespan_over_bound": float(np.max(uneven)),
        "items": int(plan.num_items),
        "partial_units": int(plan.num_units),
    }


def count_compilations(mixes: int) -> int:
    """Run attention over mixes of lengths; count what is compiled after the first."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:  # noqa: ANN401
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    requests, tokens, longest = 8, 64, 400
    pages = requests * -(-longest // PAGE_SIZE)
    spec = PlanSpec(
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        page_size=PAGE_SIZE,
        q_dtype="float32",
        kv_dtype="float32",
        max_requests=requests,
        max_tokens=tokens,
        max_pages=pages,
    )
    pool = jnp.ones((pages + 1, 2, PAGE_SIZE, 16), jnp.float32)
    kv, q = PagedKV(k=pool, v=pool), jnp.ones((tokens, 4, 16), jnp.float32)
    rng = np.random.default_rng(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    for number in range(mixes):
        count = int(rng.integers(1, requests + 1))
        kv_len = rng.integers(1, longest, count)
        q_len = np.minimum(rng.integers(1, tokens // requests + 1, count), kv_len)
        plan = make_plan(spec, q_len, page_table(kv_len, rng))
        attention(q, kv, plan).block_until_ready()
        if number == 0:
            compiled.clear()
    return len(compiled)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--mixes", type=int, default=50, help="mixes of lengths")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    args = parser.parse_args()
    recorder = Recorder("plan", out=args.out)
    rows: list[list[str]] = []
    for mode in args.modes:
        for lengths in LENGTHS:
            for batch in args.batches:
                found = measure(batch, lengths, mode, args.repeats)
                recorder.write("plan", **found)
                names = ("median_us", "p99_us", "least_us", "cpu_median_us")
                cells = [found[name] for name in names]
                rows.append(
                    [
                        f"{mode}, {lengths}, batch {batch}",
                        *(f"{cell:.0f}" for cell in cells),
                        f"{found['makespan_over_bound']:.3f}",
                        str(found["items"]),
                        str(found["partial_units"]),
                    ]
                )
    header = [
        "plan",
        "median us",
        "p99 us",
        "least us",
        "cpu us",
        "makespan/bound",
        "items",
        "partial",
    ]
    print(table(header, rows))
    compilations = count_compilations(args.mixes)
    recorder.write("compilations", mixes=args.mixes, compilations=compilations)
    print(f"compilations over {args.mixes} mixes of lengths: {compilations}")
    raise SystemExit(1 if compilations else 0)


if __name__ == "__main__":
    main()
