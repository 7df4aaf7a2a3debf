"""Which configurations of the Mosaic attention kernels are fastest on the GPU that is present.

    python -m benchmarks.tuning [--budget 300] [--rehearse]
    python -m benchmarks.tuning --adopt LINES

Every candidate of the kernels' tuning tables is measured on a step of its kind, candidates of one
key in turns, the common keys first; keys that come too late are named and keep their guess. Results
are lines of `tuning.jsonl` in OUT, and the table that kernels read, in OUT and in this checkout.
`--adopt` writes the table of lines that come from another machine. `--rehearse` interprets a tiny
step instead, to test this program, and leaves the checkout alone.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernels import chained
from benchmarks.kernel_builds import KV_HEADS
from benchmarks.record import ROOT, Recorder, summary, table
from jaxserve.core.errors import JaxserveError
from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention import mosaic_decode, mosaic_prefill, tuning
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.testing import interpret
from jaxserve.pallas_kernels.token_attention import TokenLists
from jaxserve.pallas_kernels.token_attention import mosaic as token_lists
from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant

KERNELS: dict[str, Any] = {
    "decode": mosaic_decode,
    "prefill": mosaic_prefill,
    "token_lists": token_lists,
}
PAGE_SIZE = 16
WORTH = 0.98
"""A candidate takes the guess's place if its time is below this share of the guess's."""
DIFFERENCE = 0.05
"""Most that outputs of two candidates may differ; sizes are those of averages of normal numbers."""
TABLES = Path("src") / "jaxserve" / "pallas_kernels" / "attention" / "tables"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a step is.

    Attributes:
        requests: Requests of it.
        keys: Keys of each.
        chunk: Query tokens of each in prefill.
        multiprocessors: Of the device; None asks it.
    """

    requests: int
    keys: int
    chunk: int = 1
    multiprocessors: int | None = None


SIZES = {
    "decode": Size(requests=64, keys=4096),
    "prefill": Size(requests=4, keys=4096, chunk=2048),
    "token_lists": Size(requests=8, keys=32768),
}
TINY = Size(requests=2, keys=64, multiprocessors=1)


def popularity(kernel: str, key: Any) -> tuple[Any, ...]:  # noqa: ANN401  any kernel's key
    """Sort keys by how many models need them; a smaller result comes first."""
    if kernel == "token_lists":
        return (False, (128, 64, 256).index(key.dim), False, 16, kernel)
    size = key.rows if kernel == "decode" else key.warpgroups
    return (key.changes_keys, (128, 64, 256).index(key.dim), key.itemsize == 1, size, kernel)


def keys_in_order() -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Return (kernel, key, candidates) of everything that has a choice, what is common first."""
    found = [
        (name, key, candidates)
        for name, module in KERNELS.items()
        for key, candidates in module.tuning_table().items()
        if len(candidates) > 1
    ]
    return sorted(found, key=lambda each: popularity(each[0], each[1]))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One step that a key's candidates are measured on.

    Attributes:
        kernel: Its kernel.
        spec: The plan's; its CTAs are for one per multiprocessor.
        size: How large it is.
        variant: With a change of keys if the key has one.
    """

    kernel: str
    spec: PlanSpec
    size: Size
    variant: AttentionVariant

    @classmethod
    def of(cls, kernel: str, key: Any, size: Size) -> "Problem":  # noqa: ANN401
        """Return the step for a key.

        Raises:
            JaxserveError: If the step turns out to have another key.
        """
        if kernel == "decode":
            heads, tokens = (4 if key.rows == 8 else 8), max(1, key.rows // 8)
            tiles = {"tile_q": tokens * heads, "tile_kv": 64}
        else:
            heads, tokens = 4, size.chunk
            tile_q = mosaic_prefill.tile_q(heads, warpgroups=key.warpgroups)
            tiles = {"tile_q": tile_q, "tile_kv": key.tile_kv}
        narrow = key.itemsize == 1
        spec = PlanSpec(
            q_heads=heads * KV_HEADS,
            kv_heads=KV_HEADS,
            head_dim=key.dim,
            page_size=PAGE_SIZE,
            q_dtype="bfloat16",
            kv_dtype="float8_e4m3fn" if narrow else "bfloat16",
            max_requests=size.requests,
            max_tokens=size.requests * tokens,
            max_pages=size.requests * -(-size.keys // PAGE_SIZE),
            variant=variants.rope() if key.changes_keys else PLAIN,
            num_ctas=size.multiprocessors or tuning.multiprocessors(),
            **tiles,
        )
        found = KERNELS[kernel].TuningKey.of(spec, spec.variant)
        if found != key:
            raise JaxserveError(f"the step for {key} has {found}; mend benchmarks/tuning.py.")
        return cls(kernel=kernel, spec=spec, size=size, variant=spec.variant)

    def arrays(self) -> tuple[jax.Array, PagedKV]:
        """Draw queries and pages."""
        spec = self.spec
        pool = (spec.max_pages + 1, spec.kv_heads, PAGE_SIZE, spec.head_dim)
        keys = jax.random.split(jax.random.key(0), 3)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
            return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)

        k, v = (draw(key, pool, spec.kv_dtype) for key in keys[:2])
        scale = jnp.ones(spec.kv_heads, jnp.float32) if "float8" in spec.kv_dtype else None
        q = draw(keys[2], (spec.max_tokens, spec.q_heads, spec.head_dim), spec.q_dtype)
        return q, PagedKV(k=k, v=v, k_scale=scale, v_scale=scale)

    def plan(self, config: Any) -> Plan:  # noqa: ANN401  either kernel's configuration
        """Plan the step for a configuration; pages lie in random order."""
        ctas = getattr(config, "ctas", 1)
        spec = dataclasses.replace(self.spec, num_ctas=ctas * self.spec.num_ctas)
        each = -(-self.size.keys // PAGE_SIZE)
        pages = 1 + np.random.default_rng(0).permutation(spec.max_pages).astype(np.int32)
        page_table = PageTable(
            indptr=np.arange(0, spec.max_pages + 1, each, dtype=np.int32),
            indices=pages,
            kv_len=np.full(self.size.requests, self.size.keys, np.int32),
        )
        q_len = np.full(self.size.requests, spec.max_tokens // self.size.requests)
        return make_plan(spec, q_len, page_table)

    def program(self, config: Any) -> Callable[..., jax.Array]:  # noqa: ANN401
        """Return the kernel with a configuration: outputs of queries, cache and plan."""
        run = getattr(KERNELS[self.kernel], self.kernel)
        scale = self.spec.head_dim**-0.5

        def call(q: jax.Array, kv: PagedKV, plan: Plan) -> jax.Array:
            o, _ = run(q, kv, plan, variant=self.variant, extra={}, sm_scale=scale, config=config)
            return o

        return call


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListProblem:
    """One step over lists that a key's candidates are measured on.

    Attributes:
        key: The key.
        size: How large it is; of one token in eight on average, but a list differs from the next.
    """

    key: token_lists.TuningKey
    size: Size

    def arrays(self) -> tuple[jax.Array, PagedKV]:
        """Draw queries and pages."""
        pages = self.size.requests * -(-self.size.keys // PAGE_SIZE)
        pool = (pages + 1, KV_HEADS, PAGE_SIZE, self.key.dim)
        keys = jax.random.split(jax.random.key(0), 3)
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        k, v = (draw(key, pool, jnp.bfloat16) for key in keys[:2])
        q = draw(keys[2], (self.size.requests, 4 * KV_HEADS, self.key.dim), jnp.bfloat16)
        return q, PagedKV(k=k, v=v)

    def plan(self, config: token_lists.TuningConfig) -> tuple[jax.Array, jax.Array, TokenLists]:
        """Return where pages begin, pages in random order, and lists, whatever is measured."""
        del config
        rng, size = np.random.default_rng(0), self.size
        each = -(-size.keys // PAGE_SIZE)
        pages = 1 + rng.permutation(size.requests * each).astype(np.int32)
        shares = rng.choice([0.01, 0.05, 0.1, 0.34], size.requests * KV_HEADS)
        rows = [rng.permutation(size.keys)[: max(1, round(s * size.keys))] for s in shares]
        lists = TokenLists(
            indptr=jnp.asarray(np.cumsum([0, *map(len, rows)]), jnp.int32),
            positions=jnp.asarray(np.concatenate(rows), jnp.int32),
        )
        return jnp.arange(size.requests + 1, dtype=jnp.int32) * each, jnp.asarray(pages), lists

    def program(self, config: token_lists.TuningConfig) -> Callable[..., jax.Array]:
        """Return the kernel with a configuration: outputs of queries, cache and plan."""

        def call(q: jax.Array, kv: PagedKV, plan: tuple[Any, ...]) -> jax.Array:
            return token_lists.token_attention(
                q,
                kv,
                *plan,
                sm_scale=self.key.dim**-0.5,
                variant=PLAIN,
                config=config,
                multiprocessors=self.size.multiprocessors,
            ).o

        return call


def problem_of(kernel: str, key: Any, size: Size) -> Problem | ListProblem:  # noqa: ANN401
    """Return the step that a key's candidates are measured on."""
    if kernel == "token_lists":
        return ListProblem(key=key, size=size)
    return Problem.of(kernel, key, size)


def interpreted(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a function whose kernels are interpreted, for where there is no GPU."""
    return lambda *args: interpret(function, *args, detect_races=False).value


def measure(
    problem: Problem | ListProblem,
    candidates: Sequence[Any],
    *,
    rounds: int,
    calls: int,
    compile_with: Callable[..., Callable[..., jax.Array]] = jax.jit,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Measure candidates in turns.

    Args:
        problem: What they compute.
        candidates: Configurations, the guess first.
        rounds: Samples of each.
        calls: Calls of the kernel per sample.
        compile_with: Makes programs of functions.

    Yields:
        Each configuration with its `seconds` per call and its `difference` from the first one that
        works, or with an `error`.
    """
    q, kv = problem.arrays()
    ready: dict[int, tuple[Callable[..., Any], Any]] = {}
    answers: list[dict[str, Any]] = [{} for _ in candidates]
    first: np.ndarray | None = None
    for index, config in enumerate(candidates):
        try:
            plan = jax.device_put(problem.plan(config))
            once = compile_with(problem.program(config))(q, kv, plan)
            out = np.asarray(once, np.float32)
            first = out if first is None else first
            answers[index]["difference"] = float(np.abs(out - first).max())
            program = compile_with(chained(problem.program(config), calls))
            jax.block_until_ready(program(q, kv, plan))
            ready[index] = program, plan
        except Exception as error:  # noqa: BLE001  the others must still run
            answers[index]["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    for _, (index, (program, plan)) in itertools.product(range(rounds), ready.items()):
        started = time.perf_counter()
        jax.block_until_ready(program(q, kv, plan))
        seconds = (time.perf_counter() - started) / calls
        answers[index].setdefault("seconds", []).append(seconds)
    yield from zip(candidates, answers, strict=True)


def fastest(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Choose a configuration for each key.

    Args:
        lines: Result lines; those of one key begin with the guess, and newer ones replace others.

    Returns:
        Entries of a table: kernel, key, configuration, its time and the guess's, in microseconds.
    """
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        if "median" in line and line["difference"] <= DIFFERENCE:
            configs = found.setdefault((line["kernel"], line["key"]), {})
            configs[json.dumps(line["config"], sort_keys=True)] = line
    entries_: list[dict[str, Any]] = []
    for (kernel, key), configs in sorted(found.items()):
        guess = next((line for line in configs.values() if line["is_guess"]), None)
        best = min(configs.values(), key=lambda line: line["median"])
        if guess is not None and best["median"] > WORTH * guess["median"]:
            best = guess
        entries_.append(
            {
                "kernel": kernel,
                "key": key,
                "config": best["config"],
                "us": round(best["median"], 2),
                "guess_us": None if guess is None else round(guess["median"], 2),
            }
        )
    return entries_


def write_tables(lines: Sequence[Mapping[str, Any]], folders: Iterable[Path]) -> list[Path]:
    """Write the table of every device that lines come from.

    Args:
        lines: Result lines.
        folders: Where to.

    Returns:
        The files.
    """
    devices = dict.fromkeys(line["machine"]["device"]["kind"] for line in lines)
    written: list[Path] = []
    for device, folder in itertools.product(devices, folders):
        own = [line for line in lines if line["machine"]["device"]["kind"] == device]
        content = {
            "device": device,
            "versions": own[-1]["versions"],
            "date": own[-1]["date"],
            "command": own[-1]["command"],
            "entries": fastest(own),
        }
        text = json.dumps(content, indent=1) + "\n"
        tuning.read(text, device)
        path = folder / f"{tuning.slug(device)}.json"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read result lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tune(recorder: Recorder, *, budget_s: float, is_rehearsal: bool) -> None:
    """Measure until the time is over; print one row per key."""
    deadline = time.monotonic() + budget_s
    rows: list[list[str]] = []
    late: list[str] = []
    keys = keys_in_order()
    if is_rehearsal:
        keys = [(kernel, key, each[:2]) for kernel, key, each in keys if kernel == "decode"][:1]
    for kernel, key, candidates in keys:
        name = f"{kernel}: {tuning.name_of(key)}"
        if time.monotonic() > deadline:
            late.append(name)
            continue
        problem = problem_of(kernel, key, TINY if is_rehearsal else SIZES[kernel])
        if is_rehearsal:
            found = measure(problem, candidates, rounds=1, calls=1, compile_with=interpreted)
        else:
            found = measure(problem, candidates, rounds=7, calls=10)
        medians: list[str] = []
        for config, answer in found:
            about = {
                "kernel": kernel,
                "key": tuning.name_of(key),
                "config": dataclasses.asdict(config),
                "is_guess": config == candidates[0],
            }
            if "error" in answer:
                recorder.write("candidate", **about, error=answer["error"])
                medians.append("failed")
                continue
            micros = [1e6 * value for value in answer["seconds"]]
            recorder.write(
                "candidate", **about, unit="us", difference=answer["difference"], **summary(micros)
            )
            medians.append(f"{statistics.median(micros):.1f}")
        rows.append([name, *medians, *[""] * (4 - len(medians))])
    print(table(["us per call", "guess", "second", "third", "fourth"], rows))
    if late:
        recorder.write("late", keys=late)
        print(f"no time was left for {len(late)} keys, which keep their guess: {'; '.join(late)}")


def main() -> None:
    """Measure, or adopt what was measured elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for measuring")
    parser.add_argument("--rehearse", action="store_true", help="interpret a tiny step")
    parser.add_argument("--adopt", type=Path, metavar="LINES", help="tuning.jsonl from elsewhere")
    args = parser.parse_args()
    if args.adopt is not None:
        lines = [line for line in read_lines(args.adopt) if line["what"] == "candidate"]
        for path in write_tables(lines, [ROOT / TABLES]):
            print(f"wrote {path.relative_to(ROOT)}")
        return
    device = jax.devices()[0]
    if tuning.device_name() == "" and not args.rehearse:
        print("No GPU that JAX can use. On a machine with one, this would do the following.\n")
        print(__doc__.split("\n\n", 2)[2])
        return
    name = "tuning_rehearsal" if args.rehearse else "tuning"
    recorder = Recorder(name, device={"kind": device.device_kind})
    before = len(read_lines(recorder.path)) if recorder.path.exists() else 0
    tune(recorder, budget_s=args.budget, is_rehearsal=args.rehearse)
    lines = [x for x in read_lines(recorder.path)[before:] if x["what"] == "candidate"]
    folders = [recorder.path.parent, *([] if args.rehearse else [ROOT / TABLES])]
    for path in write_tables(lines, folders):
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
