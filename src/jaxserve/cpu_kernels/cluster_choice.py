"""Chooses the clusters of keys that each head reads: the order, the samples and the count in one.

The same steps as `attention.tactic` takes through XLA, of which the sort alone costs more than the
attention that follows; here the order comes from counting buckets. Clusters are gone through as few
times as possible, in vectors where their order allows it, and up to where the mass is reached.

Source: ours; see `attention/tactic/counting.py`, whose `count_by_samples` this is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from llvmlite import ir

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.choice_emitter import Choice
from jaxserve.cpu_kernels.cluster_tables import Sampling, Table, Workspace, digest, num_blocks
from jaxserve.cpu_kernels.emit import (
    F32,
    ITEM_BYTES,
    Emitter,
    Value,
    WeightType,
    const,
    weight_type,
)
from jaxserve.cpu_kernels.heads import Heads
from jaxserve.cpu_kernels.places import load_float


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `choose_clusters` returns; see `attention.tactic.select.Selection`.

    Attributes:
        begin: First place of each run; `[rows, kv_heads, clusters]`.
        size: Places of each run; runs without any follow the others.
        num_tokens: Tokens that are read; `[rows, kv_heads]`.
        tail_mass: Mass of what is not read, by cluster; `[rows, q_heads, clusters]`.
        level: What masses are relative to; `[rows, q_heads]`.
        mass: Estimated mass of all clusters; `[rows, q_heads]`.
    """

    begin: Array
    size: Array
    num_tokens: Array
    tail_mass: Array
    level: Array
    mass: Array


def choose_clusters(
    q: Float[Array, "rows q_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    centroids: Float[Array, "rows kv_heads clusters head_dim"],
    spread: Float[Array, "rows kv_heads clusters"],
    sizes: Int[Array, "rows kv_heads clusters"],
    begin: Int[Array, "rows kv_heads clusters"],
    kept: Float[Array, "rows q_heads"],
    p: Float[Array, " rows"],
    max_share: float,
    edges: Int[Array, "rows edges"],
    ranks: Int[Array, "rows samples"],
    *,
    sampling: Sampling,
) -> Chosen:
    """Choose what each head reads.

    Args:
        q: Scaled queries.
        keys: Slots, float32 or bfloat16.
        centroids: Mean keys; their number is a multiple of 16.
        spread: Variances of keys, means over dimensions; float32.
        sizes: Tokens of each cluster.
        begin: Their first places.
        kept: Logarithm of the mass that is read anyway.
        p: Share of the mass.
        max_share: Where more than this share of the tokens is needed, all are read.
        edges: Where ranges of ranks begin, and where the last one ends.
        ranks: Tokens to look at, ascending; numbered along the order.
        sampling: How samples are used.
    """
    rows, q_heads, dim = q.shape
    kv_heads, clusters = centroids.shape[1:3]
    kind, index_kind = weight_type(keys.dtype), weight_type(centroids.dtype)
    shape = Heads(q_heads=q_heads, kv_heads=kv_heads, head_dim=dim, kind=kind)
    name = (
        f"jaxserve_choose_{q_heads}_{kv_heads}_{dim}_{kind}_{index_kind}_{clusters}"
        f"_{digest(sampling)}"
    )
    ffi.register(name, lambda: _kernel(name, shape, sampling, clusters, index_kind))
    words, state = (
        (lambda *axes: jax.ShapeDtypeStruct((rows, *axes), jnp.int32)),
        jax.ShapeDtypeStruct((rows, q_heads), jnp.float32),
    )
    by_query = jax.ShapeDtypeStruct((rows, q_heads, clusters), jnp.float32)
    by_head = words(kv_heads, clusters)
    outs = [by_head, by_head, words(kv_heads), by_query, state, state]
    scratch = [
        jax.ShapeDtypeStruct((rows, q_heads, num_blocks(clusters)), jnp.float32),
        by_query,
        *[by_head] * 5,
    ]
    limits = jnp.stack([p, jnp.full_like(p, max_share)], axis=-1)
    entries = jnp.arange(rows, dtype=jnp.int32)
    call = jax.ffi.ffi_call(name, [*outs, *scratch])
    found = call(q, keys, entries, centroids, spread, sizes, begin, kept, limits, edges, ranks)
    return Chosen(*found[: len(outs)])


def _kernel(
    name: str, shape: Heads, sampling: Sampling, clusters: int, index_kind: WeightType
) -> ffi.Kernel:
    blocks = num_blocks(clusters)

    def head_of(
        e: Emitter, buffers: Sequence[Value], capacity: Value, index: Value
    ) -> tuple["Choice", Value]:
        b, group, dim = e.b, shape.group, shape.head_dim
        (
            q, keys, entries, centroids, spread, sizes, begin, kept, limits, edges, ranks,
            run_begin, run_size, num_tokens, weight, level, mass,
            best, model, size, first, order, rank, ordered_size,
        ) = buffers  # fmt: skip
        row, head = b.udiv(index, const(shape.kv_heads)), b.urem(index, const(shape.kv_heads))
        at, queries = b.mul(index, const(clusters)), b.mul(index, const(group))

        def by_query(buffer: Value, each: int) -> list[Value]:
            low = b.mul(queries, const(each))
            return [e.at(buffer, b.add(low, const(g * each)), 4) for g in range(group)]

        table = Table(
            entries=e.at(entries, row, 4), head=head, kv_heads=shape.kv_heads,
            per_entry=clusters, centroids=centroids, spread=spread, sizes=sizes, begin=begin,
            kind=index_kind, segment_len=0,
        )  # fmt: skip
        space = Workspace(
            best=by_query(best, blocks), weight=by_query(weight, clusters),
            size=e.at(size, at, 4), begin=e.at(first, at, 4), order=e.at(order, at, 4),
            ordered_size=e.at(ordered_size, at, 4), rank=e.at(rank, at, 4),
            model=by_query(model, clusters),
            run_begin=e.at(run_begin, at, 4), run_size=e.at(run_size, at, 4),
            num_tokens=e.at(num_tokens, index, 4), level=e.at(level, queries, 4),
            mass=e.at(mass, queries, 4),
        )  # fmt: skip
        slot = b.mul(b.mul(index, capacity), const(dim))
        choice = Choice(
            e, shape, sampling, table, space,
            q=e.at(q, b.mul(queries, const(dim)), 4),
            keys=e.at(keys, slot, ITEM_BYTES[shape.kind]),
            limits=e.at(limits, b.mul(row, const(2)), 4),
            edges=e.at(edges, b.mul(row, const(sampling.num_strata + 2)), 4),
            ranks=e.at(ranks, b.mul(row, const(sampling.num_samples)), 4),
        )  # fmt: skip
        return choice, e.at(kept, queries, 4)

    def predict(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        head, block = e.b.udiv(index, const(blocks)), e.b.urem(index, const(blocks))
        choice, _ = head_of(e, buffers, sizes[1], head)
        choice.predict(block, const(clusters))

    def choose(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        choice, kept = head_of(e, buffers, sizes[1], index)
        tops = [load_float(e, kept, const(g)) for g in range(shape.group)]
        masses = [ir.Constant(F32, 1.0)] * shape.group
        choice.choose(const(clusters), tops, masses)
        choice.scatter_tail()
        choice.clear_runs(const(clusters))

    def heads(e: Emitter, sizes: Sequence[Value], _threads: Value) -> Value:
        return e.b.mul(sizes[0], const(shape.kv_heads))

    return ffi.Kernel(
        name=name,
        num_args=11,
        num_rets=13,
        dims=[(0, 0), (1, 2)],
        num_chunks=lambda e, sizes, threads: e.b.mul(heads(e, sizes, threads), const(blocks)),
        chunk=predict,
        later=[ffi.Stage(num_chunks=heads, chunk=choose)],
    )
