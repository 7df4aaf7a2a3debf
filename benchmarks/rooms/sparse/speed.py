"""What a step of decode attention costs, dense and sparse in turn, with the share of choosing.

Contexts longer than the model's are drawn around the clusters of a real layer's keys.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.record import Recorder, summary, table
from benchmarks.rooms.sparse import captures, texts
from benchmarks.rooms.sparse.contestants import BASE
from jaxserve import cpu_kernels
from jaxserve.attention.tactic.attention import SparseStats, sparse_decode
from jaxserve.attention.tactic.clustering import ClusterIndex, build_index
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.select import select


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
        width = np.sqrt(np.asarray(index.spread[0, head]))[:, None]
        noise = rng.standard_normal((tokens, dim), np.float32)
        drawn_keys[head] = np.asarray(index.centroids[0, head])[member] + width[member] * noise
        drawn_values[head] = np.asarray(index.value_means[0, head])[member]
        drawn_values[head] += values[head].std() * rng.standard_normal(drawn_values[head].shape)
        gain = np.full(groups.shape[1], np.log(tokens / length))
        drawn_keys[head, always] = keys[head, always - (always >= length) * (tokens - length)]
        drawn_keys[head, always] += np.linalg.pinv(groups[head]) @ gain
        drawn_values[head, : BASE.sinks] = values[head, : BASE.sinks]
    return drawn_keys, drawn_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """What one layer attends with, and to; slots are separate, as a step changes them.

    Attributes:
        q: Queries, `[rows, q_heads, head_dim]`.
        k: Keys of the step's tokens, `[rows, kv_heads, head_dim]`.
        v: Their values.
        index: Clusters; none for dense attention.
    """

    q: Array
    k: Array
    v: Array
    index: ClusterIndex | None


Slots = list[tuple[Array, Array]]
"""Keys and values of each layer."""


class Step:
    """Decode attention of some layers, dense and sparse, over contexts of one length.

    A step is one compiled program of all its layers, as it is in the engine.

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
        self.layers: list[Inputs] = []
        self.slots: dict[str, Slots] = {"dense": [], "sparse": []}
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
            queries = jnp.asarray(np.asarray(capture.q)[chosen])
            k, v = (x[:, :, -1].astype(jnp.float32) for x in (keys, values))
            self.layers.append(Inputs(queries, k, v, index))
            self.slots["dense"].append((jnp.array(keys), jnp.array(values)))
            self.slots["sparse"].append((moved_keys, moved_values))
        self.scale = taken[0].scale
        self.stats: list[SparseStats] = []
        programs = {"dense": self._dense, "sparse": self._sparse}
        self._programs = {k: jax.jit(f, donate_argnums=1) for k, f in programs.items()}
        self._select = jax.jit(self._select_layers)

    def _dense(self, layers: list[Inputs], slots: Slots) -> tuple[list[Array], Slots]:
        found = [
            cpu_kernels.decode(x.q, x.k, x.v, *own, self.length - 1, scale=self.scale)
            for x, own in zip(layers, slots, strict=True)
        ]
        return [out for out, _, _ in found], [(keys, values) for _, keys, values in found]

    def _sparse(
        self, layers: list[Inputs], slots: Slots
    ) -> tuple[list[tuple[Array, SparseStats]], Slots]:
        row, last = jnp.arange(self.length.size), self.length - 1
        found: list[tuple[Array, SparseStats]] = []
        after: Slots = []
        for x, (old_keys, old_values) in zip(layers, slots, strict=True):
            keys = old_keys.at[row, :, last].set(x.k.astype(old_keys.dtype))
            values = old_values.at[row, :, last].set(x.v.astype(old_values.dtype))
            found.append(
                sparse_decode(
                    x.q,
                    keys,
                    values,
                    self.length,
                    x.index,
                    self.p,
                    scale=self.scale,
                    config=self.config,
                    backend="llvm",
                )
            )
            after.append((keys, values))
        return found, after

    def _select_layers(self, layers: list[Inputs], slots: Slots) -> list[Array]:
        found: list[Array] = []
        for x, (keys, _) in zip(layers, slots, strict=True):
            rows, _, dim = x.q.shape
            grouped = x.q.reshape(rows, keys.shape[1], -1, dim) * self.scale
            kept = jnp.zeros(grouped.shape[:3])
            chosen = select(
                grouped, keys, x.index, kept, self.p, config=self.config, backend="llvm"
            )
            found.append(chosen.num_tokens)
        return found

    def _run(self, name: str) -> tuple[Any, float]:
        start = time.perf_counter()
        out, self.slots[name] = self._programs[name](self.layers, self.slots[name])
        jax.block_until_ready(out)
        return out, 1e3 * (time.perf_counter() - start)

    def dense(self) -> float:
        """Return the milliseconds of all layers with dense attention."""
        return self._run("dense")[1]

    def sparse(self) -> float:
        """Return the milliseconds of all layers with sparse attention, choosing included."""
        found, milliseconds = self._run("sparse")
        self.stats = [stats for _, stats in found]
        return milliseconds

    def select(self) -> float:
        """Return the milliseconds of choosing alone."""
        start = time.perf_counter()
        jax.block_until_ready(self._select(self.layers, self.slots["sparse"]))
        return 1e3 * (time.perf_counter() - start)

    def read(self) -> float:
        """Return the share of tokens that the last sparse step read."""
        tokens = [np.asarray(stats.tokens).mean() for stats in self.stats]
        return float(np.mean(tokens) / self.length[0])


def report(recorder: Recorder, args: argparse.Namespace) -> None:
    """Measure, print and record steps at several lengths of the context."""
    if not cpu_kernels.is_available():
        raise SystemExit("kernels cannot be compiled here, so there is no dense step to compare to")
    model, tokenizer = captures.load(args.model)
    ids = next(iter(texts.documents(tokenizer, args.context, args.data).values()))
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
