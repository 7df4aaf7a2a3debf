"""Sparse attention to a target share of the mass: what is read, what is reached, what it costs.

    python -m benchmarks.rooms.tactic
    python -m benchmarks.rooms.tactic --speed

Quality, on queries of a real model at the end of real documents, every few layers: each estimator
and baseline at equal p; all of them at equal numbers of tokens, by interpolation between settings;
and an ablation of order, count and what stands in for the rest. Masses are true ones, computed from
all keys. Intervals are those of Student's t at 95 %: over documents, and over clustering seeds.

Speed, on longer contexts drawn around the clusters of a real layer's keys: a step of decode
attention, dense and sparse in turn, with the share of time that goes into choosing.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import Recorder, summary, table
from benchmarks.rooms import captures, decode, mass
from jaxserve import cpu_kernels
from jaxserve.attention.tactic.attention import sparse_decode
from jaxserve.attention.tactic.clustering import build_index
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.select import select

TARGETS = (0.8, 0.9, 0.95)
_KNOBS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.985, 0.995)
_BUDGETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5)
_CLUSTERED = (mass.clustered, mass.cluster_order)
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Two-sided quantiles of Student's t for so many values."""

BASE = TacticConfig(max_share=1.0, min_context=0)
"""Settings of the comparison: nothing is read whole, so that estimators are seen as they are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    """A method with its settings.

    Attributes:
        method: What is read.
        config: Settings.
        is_budget: Whether its knob is the share of tokens rather than p.
    """

    method: mass.Method
    config: TacticConfig = BASE
    is_budget: bool = False


def _estimator(**changes: Any) -> TacticConfig:  # noqa: ANN401
    return mass.with_estimator(BASE, **changes)


CONTESTANTS: Mapping[str, Contestant] = {
    "oracle top-p": Contestant(mass.oracle_top_p),
    "cluster order, oracle count": Contestant(mass.cluster_order),
    "sampled (default)": Contestant(mass.clustered),
    "hyperbola (Tactic)": Contestant(
        mass.clustered, _estimator(name="hyperbola", correction="none")
    ),
    "centroid mass (Double-P)": Contestant(
        mass.clustered, _estimator(name="centroid", correction="none")
    ),
    "int4 keys, top-p (Twilight)": Contestant(mass.int4_top_p),
    "page bounds, oracle count": Contestant(mass.pages_top_p),
    "page bounds, budget (Quest)": Contestant(mass.pages_top_k, is_budget=True),
    "exact top-k, budget": Contestant(mass.exact_top_k, is_budget=True),
    "sinks and window": Contestant(mass.sinks_and_window, is_budget=True),
}

_COUNTS: Mapping[str, tuple[mass.Method, Mapping[str, object]]] = {
    "oracle": (mass.cluster_order, {}),
    "centroid": (mass.clustered, {"name": "centroid"}),
    "hyperbola": (mass.clustered, {"name": "hyperbola"}),
    "sampled, means": (mass.clustered, {"control_variate": False, "failure_rate": 0.5}),
    "sampled, ratios": (mass.clustered, {"failure_rate": 0.5}),
    "sampled, ratios, bound": (mass.clustered, {}),
}
ABLATION: Mapping[str, Contestant] = {
    f"{order} | {count}": Contestant(method, _estimator(correction=correction, **changes))
    for order, correction in (("means", "none"), ("spread", "spread"))
    for count, (method, changes) in _COUNTS.items()
}
"""Order of clusters, and how tokens are counted."""

Results = dict[tuple[str, int], dict[str, np.ndarray]]
"""Per document and seed: quantities, `[knobs, cases]`."""


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean."""
    if len(values) < min(_T95):
        return float("nan")
    return _T95[min(len(values), max(_T95))] * statistics.stdev(values) / len(values) ** 0.5


# Quality ----------------------------------------------------------------------------------------


def measure(
    taken: Mapping[str, Sequence[captures.Capture]],
    contestants: Mapping[str, Contestant],
    args: argparse.Namespace,
) -> dict[str, Results]:
    """Measure contestants on all documents, layers and seeds."""
    found: dict[str, Results] = {name: {} for name in contestants}
    for document, layers in taken.items():
        for seed in range(args.seeds):
            parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in contestants}
            for capture in layers:
                layer = _layer(capture, seed, args)
                for name, each in contestants.items():
                    if seed and each.method not in _CLUSTERED:
                        continue
                    knobs = jnp.asarray(_BUDGETS if each.is_budget else _KNOBS)
                    values = mass.measure(each.method, layer, knobs, config=each.config)
                    parts[name].append({key: _flat(value) for key, value in values.items()})
            for name, measured in parts.items():
                if not measured:
                    # What knows no clusters is the same for all seeds.
                    found[name][document, seed] = found[name][document, 0]
                    continue
                found[name][document, seed] = {
                    key: np.concatenate([part[key] for part in measured], axis=1)
                    for key in measured[0]
                }
        print(f"measured: {document}", flush=True)
    return found


def _layer(capture: captures.Capture, seed: int, args: argparse.Namespace) -> mass.Layer:
    clusters = dataclasses.replace(BASE.clusters, seed=seed, segment_len=args.segment_len)
    return mass.make_layer(
        capture.q,
        capture.k,
        capture.v,
        np.linspace(0, len(capture.q) - 1, args.queries).astype(int).tolist(),
        capture.scale,
        len(capture.k) - len(capture.q),
        config=dataclasses.replace(BASE, clusters=clusters),
    )


def _flat(value: jax.Array) -> np.ndarray:
    """Lay out cases side by side; what counts for a group of query heads counts for each."""
    return np.asarray(value).reshape(value.shape[0], -1)


def _at(results: Results, knob: int, what: Callable[[dict[str, np.ndarray], int], float]) -> dict:
    """Describe one quantity: its mean, and intervals over documents and seeds."""
    values = {key: what(cases, knob) for key, cases in results.items()}

    def means(axis: int) -> list[float]:
        groups: dict[object, list[float]] = {}
        for key, value in values.items():
            groups.setdefault(key[axis], []).append(value)
        return [statistics.fmean(group) for group in groups.values()]

    return {
        "mean": statistics.fmean(values.values()),
        "documents": interval(means(0)),
        "seeds": interval(means(1)),
    }


def describe(results: Results, knob: int, target: float) -> dict[str, dict]:
    """Describe what a contestant does at one knob."""
    quantities = {
        "read": lambda cases, i: float(cases["read"][i].mean()),
        "mass": lambda cases, i: float(cases["mass"][i].mean()),
        "mass_p10": lambda cases, i: float(np.percentile(cases["mass"][i], 10)),
        "kept_promise": lambda cases, i: float((cases["mass"][i] >= target - 0.02).mean()),
        "error": lambda cases, i: float(cases["error"][i].mean()),
        "tail_error": lambda cases, i: float(cases.get("tail_error", cases["error"])[i].mean()),
    }
    return {name: _at(results, knob, what) for name, what in quantities.items()}


def report_equal_p(
    found: Mapping[str, Results], recorder: Recorder, settings: Mapping[str, object]
) -> None:
    """Print and record every method that knows a p, at the same ones."""
    rows = []
    for name, each in CONTESTANTS.items():
        if each.is_budget:
            continue
        cells = [name]
        for target in TARGETS:
            line = describe(found[name], _KNOBS.index(target), target)
            recorder.write("equal p", method=name, p=target, **line, **settings)
            cells.append(
                f"{line['read']['mean']:.3f}±{line['read']['documents']:.3f} "
                f"{line['mass_p10']['mean']:.3f} {line['kept_promise']['mean']:.1%}"
            )
        rows.append(cells)
    print("\nshare of optional tokens read (±95 %, documents), 10th percentile of the mass,")
    print("share of cases within 0.02 of the target")
    print(table(["method", *(f"p = {p}" for p in TARGETS)], rows))


def report_equal_tokens(
    found: Mapping[str, Results], recorder: Recorder, settings: Mapping[str, object]
) -> None:
    """Print and record all methods where they read as many tokens as the default does."""
    default = found["sampled (default)"]
    budgets = [
        describe(default, _KNOBS.index(target), target)["read"]["mean"] for target in TARGETS
    ]
    rows = []
    for name, each in CONTESTANTS.items():
        knobs = _BUDGETS if each.is_budget else _KNOBS
        lines = [describe(found[name], i, 0.0) for i in range(len(knobs))]
        read = [line["read"]["mean"] for line in lines]
        cells = [name]
        for budget in budgets:
            values = {
                key: float(np.interp(budget, read, [line[key]["mean"] for line in lines]))
                for key in ("mass", "mass_p10", "error", "tail_error")
            }
            inside = min(read) <= budget <= max(read)
            recorder.write(
                "equal tokens", method=name, read=budget, inside=inside, **values, **settings
            )
            cells.append(
                f"{values['mass']:.3f} {values['mass_p10']:.3f} {values['error']:.3f}"
                if inside
                else "-"
            )
        rows.append(cells)
    print("\nmean mass, its 10th percentile, error of the output, at equal numbers of tokens")
    print(table(["method", *(f"read {budget:.3f}" for budget in budgets)], rows))


def report_ablation(
    found: Mapping[str, Results], recorder: Recorder, settings: Mapping[str, object]
) -> None:
    """Print and record order, count and tail at p = 0.9."""
    rows = []
    for name in ABLATION:
        line = describe(found[name], _KNOBS.index(0.9), 0.9)
        recorder.write("ablation", method=name, p=0.9, **line, **settings)
        rows.append(
            [
                name,
                f"{line['read']['mean']:.3f}±{line['read']['seeds']:.3f}",
                f"{line['mass']['mean']:.3f}",
                f"{line['mass_p10']['mean']:.3f}",
                f"{line['kept_promise']['mean']:.1%}",
                f"{line['error']['mean']:.3f}",
                f"{line['tail_error']['mean']:.3f}",
            ]
        )
    header = ["order | count", "read (±seeds)", "mass", "p10", "kept", "dropped", "stand-in"]
    print("\np = 0.9; the last two are errors of the output without and with a stand-in")
    print(table(header, rows))


def report_text(
    scores: Mapping[str, Mapping[float, Mapping[str, float]]],
    recorder: Recorder,
    settings: Mapping[str, object],
) -> None:
    """Print and record how likely the tokens behind the prompts are."""
    rows = []
    for p in (1.0, *TARGETS):
        lines = {name: score[p] for name, score in scores.items()}
        lost = [
            scores[name][1.0]["log_likelihood"] - x["log_likelihood"] for name, x in lines.items()
        ]
        read = statistics.fmean(line["read"] for line in lines.values())
        mean = statistics.fmean(line["log_likelihood"] for line in lines.values())
        recorder.write(
            "text", p=p, documents_scored=lines, lost=statistics.fmean(lost),
            lost_interval=interval(lost), read=read, **settings,
        )  # fmt: skip
        rows.append(
            [
                "dense" if p == 1 else f"p = {p}",
                f"{read:.1%}",
                f"{np.exp(-mean):.3f}",
                f"{statistics.fmean(lost):+.4f}±{interval(lost):.4f}",
            ]
        )
    print("\nteacher-forced tokens behind the prompts, all layers sparse but the first ones")
    print(table(["attention", "read", "perplexity", "nats lost per token"], rows))


def report_quality(recorder: Recorder, args: argparse.Namespace) -> None:
    """Capture, measure, print and record."""
    model, tokenizer = captures.load(args.model)
    taken: dict[str, list[captures.Capture]] = {}
    scores: dict[str, dict[float, dict[str, float]]] = {}
    for name, ids in captures.documents(tokenizer, args.tokens, args.data).items():
        _, layers = captures.run(model, ids)
        clusters = dataclasses.replace(BASE.clusters, segment_len=args.segment_len)
        config = dataclasses.replace(TacticConfig(min_context=0), clusters=clusters)
        scores[name] = decode.score(
            model, ids, layers, args.tokens - args.generated, config, (1.0, *TARGETS)
        )
        taken[name] = [
            dataclasses.replace(layer, q=layer.q[-args.generated :])
            for layer in layers[:: args.every]
        ]
        print(f"captured: {name}", flush=True)
    settings = {
        "model": args.model,
        "tokens": args.tokens,
        "layers": len(next(iter(taken.values()))),
        "queries": args.queries,
        "clustering_seeds": args.seeds,
        "documents": list(taken),
        "segment_len": args.segment_len,
    }
    report_text(scores, recorder, settings)
    found = measure(taken, {**CONTESTANTS, **ABLATION}, args)
    report_equal_p(found, recorder, settings)
    report_equal_tokens(found, recorder, settings)
    report_ablation(found, recorder, settings)


# Speed ------------------------------------------------------------------------------------------


def grow(
    capture: captures.Capture, tokens: int, query: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a longer context around the clusters of a real one, as large and as wide as they are.

    What is always read gains on the rest as the rest grows in number, so that shares of the mass
    stay those of the real context, and with them the share of tokens that p takes: real contexts
    get sparser as they grow, so this is on the safe side.

    Args:
        capture: The real context.
        tokens: Tokens of the longer one.
        query: Which query the step has.
        rng: Draws.

    Returns:
        Keys and values, `[kv_heads, tokens, head_dim]`.
    """
    keys, values = (np.asarray(x).swapaxes(0, 1) for x in (capture.k, capture.v))
    heads, length, dim = keys.shape
    unit = BASE.clusters.cluster_size
    clusters = dataclasses.replace(BASE.clusters, segment_len=length // unit * unit)
    index, _, _ = build_index(
        jnp.asarray(keys)[None],
        jnp.asarray(values)[None],
        jnp.asarray([length]),
        config=dataclasses.replace(BASE, clusters=clusters),
    )
    always = np.r_[: BASE.sinks, tokens - BASE.window : tokens]
    groups = np.asarray(capture.q)[query].reshape(heads, -1, dim) * capture.scale
    drawn_keys = np.empty((heads, tokens, dim), np.float32)
    drawn_values = np.empty((heads, tokens, values.shape[2]), np.float32)
    for head in range(heads):
        sizes = np.asarray(index.sizes[0, head], np.float64)
        member = rng.choice(len(sizes), size=tokens, p=sizes / sizes.sum())
        width = np.sqrt(np.asarray(index.spread[0, head]))
        noise = rng.standard_normal((tokens, dim), np.float32)
        drawn_keys[head] = np.asarray(index.centroids[0, head])[member] + width[member] * noise
        drawn_values[head] = np.asarray(index.value_means[0, head])[member]
        drawn_values[head] += values[head].std() * rng.standard_normal(drawn_values[head].shape)
        gain = np.full(groups.shape[1], np.log(tokens / length))
        drawn_keys[head, always] = keys[head, always - (always >= length) * (tokens - length)]
        drawn_keys[head, always] += np.linalg.pinv(groups[head]) @ gain
        drawn_values[head, : BASE.sinks] = values[head, : BASE.sinks]
    return drawn_keys, drawn_values


class Step:
    """Decode attention of some layers, dense and sparse, over contexts of one length.

    Args:
        taken: Layers of a real model.
        context: Tokens.
        args: Settings.
    """

    def __init__(
        self, taken: Sequence[captures.Capture], context: int, args: argparse.Namespace
    ) -> None:
        """Draw contexts, cluster them and compile."""
        rng = np.random.default_rng(args.seed)
        dtype = jnp.dtype(args.dtype)
        clusters = dataclasses.replace(BASE.clusters, segment_len=min(args.segment_len, context))
        self.config = dataclasses.replace(TacticConfig(min_context=0), clusters=clusters)
        self.length = jnp.full((args.batch,), context, jnp.int32)
        self.p = jnp.full((args.batch,), args.p, jnp.float32)
        self.layers: list[dict[str, object]] = []
        self.index_seconds = 0.0
        for capture in taken:
            chosen = len(capture.q) - 1 - rng.integers(64, size=args.batch)
            rows = [grow(capture, context, query, rng) for query in chosen]
            keys, values = (jnp.asarray(np.stack(part), dtype) for part in zip(*rows, strict=True))
            start = time.perf_counter()
            index, moved_keys, moved_values = jax.block_until_ready(
                build_index(keys, values, self.length - 1, config=self.config)
            )
            self.index_seconds = time.perf_counter() - start  # of the last, which is compiled
            self.layers.append(
                {
                    "q": jnp.asarray(np.asarray(capture.q)[chosen]),
                    "k": keys[:, :, -1].astype(jnp.float32),
                    "v": values[:, :, -1].astype(jnp.float32),
                    "dense": (jnp.array(keys), jnp.array(values)),
                    "sparse": (moved_keys, moved_values),
                    "index": index,
                }
            )
        self.scale = taken[0].scale
        self._dense = jax.jit(partial(cpu_kernels.decode, scale=self.scale), donate_argnums=(3, 4))
        self._sparse = jax.jit(self._sparse_layer, donate_argnums=(3, 4))
        self._select = jax.jit(self._select_layer)

    def _sparse_layer(self, q, k, v, keys, values, index):  # noqa: ANN001, ANN202
        row = jnp.arange(q.shape[0])
        keys = keys.at[row, :, self.length - 1].set(k.astype(keys.dtype))
        values = values.at[row, :, self.length - 1].set(v.astype(values.dtype))
        out, stats = sparse_decode(
            q, keys, values, self.length, index, self.p,
            scale=self.scale, config=self.config, backend="llvm",
        )  # fmt: skip
        return out, keys, values, stats

    def _select_layer(self, q, keys, index):  # noqa: ANN001, ANN202
        rows, _, dim = q.shape
        grouped = q.reshape(rows, keys.shape[1], -1, dim) * self.scale
        kept = jnp.zeros(grouped.shape[:3])
        chosen = select(grouped, keys, index, kept, self.p, config=self.config, backend="llvm")
        return chosen.num_tokens

    def dense(self) -> float:
        """Return the milliseconds of all layers with dense attention."""
        start = time.perf_counter()
        position = self.length - 1
        for layer in self.layers:
            out, *slots = self._dense(layer["q"], layer["k"], layer["v"], *layer["dense"], position)
            layer["dense"] = tuple(slots)
            jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - start)

    def sparse(self) -> float:
        """Return the milliseconds of all layers with sparse attention, choosing included."""
        start = time.perf_counter()
        for layer in self.layers:
            out, *slots, layer["stats"] = self._sparse(
                layer["q"], layer["k"], layer["v"], *layer["sparse"], layer["index"]
            )
            layer["sparse"] = tuple(slots)
            jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - start)

    def select(self) -> float:
        """Return the milliseconds of choosing alone."""
        start = time.perf_counter()
        for layer in self.layers:
            jax.block_until_ready(self._select(layer["q"], layer["sparse"][0], layer["index"]))
        return 1e3 * (time.perf_counter() - start)

    def read(self) -> float:
        """Return the share of tokens that the last sparse step read."""
        tokens = [np.asarray(layer["stats"].tokens).mean() for layer in self.layers]
        return float(np.mean(tokens) / self.length[0])


def report_speed(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record steps at several lengths of the context."""
    if not cpu_kernels.is_available():
        raise SystemExit("kernels cannot be compiled here, so there is no dense step to compare to")
    model, tokenizer = captures.load(args.model)
    ids = next(iter(captures.documents(tokenizer, args.tokens, args.data).values()))
    _, layers = captures.run(model, ids)
    taken = [layers[i] for i in args.layers]
    rows = []
    for context in args.contexts:
        step = Step(taken, context, args)
        for part in (step.dense, step.sparse, step.select):
            part()
        samples = [(step.dense(), step.sparse(), step.select()) for _ in range(args.repeats)]
        dense, sparse, choosing = (list(part) for part in zip(*samples, strict=True))
        gain = summary([d / s for d, s in zip(dense, sparse, strict=True)])
        share = summary([c / s for c, s in zip(choosing, sparse, strict=True)])
        recorder.write(
            "speed", context=context, batch=args.batch, dtype=args.dtype, p=args.p,
            layers=args.layers, dense_ms=summary(dense), sparse_ms=summary(sparse),
            select_ms=summary(choosing), gain=gain, select_share=share, read=step.read(),
            index_seconds=step.index_seconds, model=args.model,
        )  # fmt: skip
        rows.append(
            [
                str(context),
                f"{summary(dense)['median']:.2f}",
                f"{summary(sparse)['median']:.2f}",
                f"{gain['median']:.2f} ({gain['p10']:.2f}-{gain['p90']:.2f})",
                f"{share['median']:.0%}",
                f"{step.read():.1%}",
            ]
        )
        print("  ".join(rows[-1]), flush=True)
    header = ["context", "dense ms", "sparse ms", "gain (p10-p90)", "choosing", "read"]
    print(f"\n{len(args.layers)} layers, batch {args.batch}, {args.dtype}, p = {args.p}")
    print(table(header, rows))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or path")
    parser.add_argument("--data", type=Path, default=captures.DATA, help="folder of the texts")
    parser.add_argument("--out", type=Path, help="folder of the result lines")
    parser.add_argument("--segment-len", type=int, default=BASE.clusters.segment_len)
    quality = parser.add_argument_group("quality")
    quality.add_argument("--tokens", type=int, default=4096, help="of each document")
    quality.add_argument("--generated", type=int, default=128, help="tokens behind the prompt")
    quality.add_argument("--queries", type=int, default=4, help="of each layer and document")
    quality.add_argument("--every", type=int, default=3, help="take each so-many-th layer")
    quality.add_argument("--seeds", type=int, default=3, help="clusterings of each document")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--speed", action="store_true", help="measure speed instead")
    speed.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    speed.add_argument("--layers", type=int, nargs="+", default=[6, 12, 18, 24])
    speed.add_argument("--batch", type=int, default=1)
    speed.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    speed.add_argument("--p", type=float, default=0.9)
    speed.add_argument("--repeats", type=int, default=15)
    speed.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"{args.data.name} is not there; name the folder of the texts with --data")
    return args


def main() -> None:
    """Measure."""
    args = parse_args()
    recorder = Recorder("tactic", out=args.out)
    if args.speed:
        report_speed(recorder, args)
    else:
        report_quality(recorder, args)


if __name__ == "__main__":
    main()
