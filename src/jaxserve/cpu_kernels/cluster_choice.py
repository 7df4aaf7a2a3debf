"""Chooses the clusters of keys that each head reads: the order, the samples and the count in one.

The same steps as `attention.tactic` takes through XLA, of which the sort alone costs more than the
attention that follows; here the order comes from counting buckets.

Source: ours; see `attention/tactic/counting.py`, whose `count_by_samples` this is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from llvmlite import ir

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.emit import F32, I32, I64, ITEM_BYTES, Emitter, Value, const, weight_type
from jaxserve.cpu_kernels.heads import LOWEST, Heads

_HIGHEST = 60.0
"""Most that a weight may exceed its level, in the exponent."""

_Visit = Callable[[Value, Value, Value, Value, Value], None]
"""Emits what happens to a cluster: its rank, number, size, first token, and range of ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is fixed when the kernel is built.

    Attributes:
        head_len: Samples of the first range, which are all of its tokens.
        num_strata: Ranges behind it.
        drawn: Samples of each.
        z: Standard deviations of safety.
        uses_spread: Whether predicted weights count variances.
        uses_ratio: Whether samples correct predicted weights, rather than give mean ones.
        most: Tokens of the last cluster that are read at a time.
        num_buckets: Buckets of the order.
        bucket_shift: Bits of a float that it does not look at.
        highest_bucket: The remaining bits of the largest share.
    """

    head_len: int
    num_strata: int
    drawn: int
    z: float
    uses_spread: bool
    uses_ratio: bool
    most: int
    num_buckets: int
    bucket_shift: int
    highest_bucket: int

    @property
    def num_samples(self) -> int:
        """Samples of a head."""
        return self.head_len + self.num_strata * self.drawn


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `choose_clusters` returns; see `attention.tactic.select.Selection`.

    Attributes:
        begin: First place of each run, in the order; `[rows, kv_heads, clusters]`.
        size: Places of each run.
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
    spread: Float[Array, "rows kv_heads clusters head_dim"],
    sizes: Int[Array, "rows kv_heads clusters"],
    begin: Int[Array, "rows kv_heads clusters"],
    kept: Float[Array, "rows q_heads"],
    p: Float[Array, " rows"],
    max_share: float,
    edges: Int[Array, "rows kv_heads edges"],
    ranks: Int[Array, "rows kv_heads samples"],
    order: Int[Array, "rows kv_heads capacity"] | None = None,
    *,
    sampling: Sampling,
) -> Chosen:
    """Choose what each head reads.

    Args:
        q: Scaled queries.
        keys: Slots, float32 or bfloat16.
        centroids: Mean keys; their number is a multiple of 16.
        spread: Variances of keys.
        sizes: Tokens of each cluster.
        begin: Their first places.
        kept: Logarithm of the mass that is read anyway.
        p: Share of the mass.
        max_share: Where more than this share of the tokens is needed, all are read.
        edges: Where ranges of ranks begin, and where the last one ends.
        ranks: Tokens to look at, ascending; numbered along the order.
        order: Where in its slot each place lies; None if places lie in their order.
        sampling: How samples are used.
    """
    rows, q_heads, dim = q.shape
    kv_heads, clusters = centroids.shape[1:3]
    kind = weight_type(keys.dtype)
    shape = Heads(q_heads=q_heads, kv_heads=kv_heads, head_dim=dim, kind=kind)
    digest = abs(hash(sampling)) % 16**12
    ordered = "" if order is None else "_ordered"
    name = f"jaxserve_choose_{q_heads}_{kv_heads}_{dim}_{kind}_{digest:x}{ordered}"
    ffi.register(name, lambda: _kernel(name, shape, sampling, is_ordered=order is not None))
    runs = jax.ShapeDtypeStruct((rows, kv_heads, clusters), jnp.int32)
    state = jax.ShapeDtypeStruct((rows, q_heads), jnp.float32)
    outs = [
        runs,
        runs,
        jax.ShapeDtypeStruct((rows, kv_heads), jnp.int32),
        jax.ShapeDtypeStruct((rows, q_heads, clusters), jnp.float32),
        state,
        state,
        runs,
    ]
    limits = jnp.stack([p, jnp.full_like(p, max_share)], axis=-1)
    call = jax.ffi.ffi_call(name, outs)
    last = () if order is None else (order,)
    found = call(q, keys, centroids, spread, sizes, begin, kept, limits, edges, ranks, *last)
    return Chosen(*found[:6])


def _kernel(name: str, shape: Heads, sampling: Sampling, *, is_ordered: bool) -> ffi.Kernel:
    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        order = None
        if is_ordered:
            order, buffers = buffers[10], [*buffers[:10], *buffers[11:]]
        _Head(e, shape, sampling, buffers, index, sizes, order).choose()

    return ffi.Kernel(
        name=name,
        num_args=11 if is_ordered else 10,
        num_rets=7,
        dims=[(0, 0), (1, 2), (2, 2)],
        num_chunks=lambda e, sizes, _threads: e.b.mul(sizes[0], const(shape.kv_heads)),
        chunk=chunk,
    )


class _Head:
    """Emits the work of one row and one key-value head.

    Args:
        e: Where instructions go.
        shape: Heads and sizes.
        sampling: How samples are used.
        buffers: Inputs and outputs.
        index: row * kv_heads + head.
        sizes: Rows, places of a slot, clusters.
        where: Where in its slot each place lies; None if places lie in their order.
    """

    def __init__(
        self,
        e: Emitter,
        shape: Heads,
        sampling: Sampling,
        buffers: Sequence[Value],
        index: Value,
        sizes: Sequence[Value],
        where: Value | None,
    ) -> None:
        self.e, self.shape, self.sampling, self.index = e, shape, sampling, index
        self.clusters = sizes[2]
        self.group, self.dim, self.parts = shape.group, shape.head_dim, shape.head_dim // e.width
        (q, keys, centroids, spread, size, begin, kept, limits, edges, ranks, *outs) = buffers
        b, per_head = e.b, e.b.mul(index, self.clusters)
        capacity = b.mul(index, sizes[1])
        self.where = None if where is None else e.at(where, capacity, 4)
        self.q = e.at(q, b.mul(index, const(self.group * self.dim)), 4)
        self.keys = e.at(keys, b.mul(capacity, const(self.dim)), ITEM_BYTES[shape.kind])
        self.centroids = e.at(centroids, b.mul(per_head, const(self.dim)), 4)
        self.spread = e.at(spread, b.mul(per_head, const(self.dim)), 4)
        self.size, self.begin = e.at(size, per_head, 4), e.at(begin, per_head, 4)
        heads = b.mul(index, const(self.group))
        self.kept = e.at(kept, heads, 4)
        row = b.sdiv(index, const(shape.kv_heads))
        self.limits = e.at(limits, b.mul(row, const(2)), 4)
        self.edges = e.at(edges, b.mul(index, const(sampling.num_strata + 2)), 4)
        self.ranks = e.at(ranks, b.mul(index, const(sampling.num_samples)), 4)
        run_begin, run_size, count, tail, level, mass, order = outs
        self.run_begin, self.run_size = e.at(run_begin, per_head, 4), e.at(run_size, per_head, 4)
        self.count = e.at(count, index, 4)
        self.order = e.at(order, per_head, 4)
        by_query = b.mul(per_head, const(self.group))
        self.weight = [
            e.at(tail, b.add(by_query, b.mul(self.clusters, const(g))), 4)
            for g in range(self.group)
        ]
        self.level_out, self.mass_out = e.at(level, heads, 4), e.at(mass, heads, 4)

    # Small things ----------------------------------------------------------------------------

    def _int(self, base: Value, i: Value) -> Value:
        return self.e.b.sext(self.e.b.load(self.e.at(base, i, 4), typ=I32), I64)

    def _float(self, base: Value, i: Value) -> Value:
        return self.e.b.load(self.e.at(base, i, 4), typ=F32)

    def _put(self, value: Value, base: Value, i: Value) -> None:
        e = self.e
        if value.type == I64:
            value = e.b.trunc(value, I32)
        e.b.store(value, e.at(base, i, 4))

    def _number(self, value: Value) -> Value:
        return self.e.b.sitofp(value, F32)

    def _larger(self, a: Value, c: Value) -> Value:
        return self.e.b.select(self.e.b.fcmp_ordered(">", a, c), a, c)

    def _exp(self, value: Value) -> Value:
        e = self.e
        return e.b.extract_element(e.exp(e.splat(value)), ir.Constant(I32, 0))

    # The steps -------------------------------------------------------------------------------

    def choose(self) -> None:
        """Choose."""
        levels, kept = self._predict()
        num_tokens = self._sort(levels, kept)
        ratios, noises = self._sample(levels)
        self._count(kept, ratios, noises, num_tokens)

    def _predict(self) -> tuple[list[Value], list[Value]]:
        """Write the logarithm of each cluster's weight; return levels, and kept masses."""
        e, b, group = self.e, self.e.b, self.group
        best = [e.variable(e.vector, e.splat_const(LOWEST)) for _ in range(group)]
        half = e.splat_const(0.5)
        with e.loop(const(0), self.clusters, const(e.width)) as start:
            queries = [
                [e.load(e.at(self.q, const(g * self.dim + p * e.width), 4), "float32")
                 for p in range(self.parts)]
                for g in range(group)
            ]  # fmt: skip
            squares = [[b.fmul(b.fmul(part, part), half) for part in query] for query in queries]
            lanes: list[list[Value]] = []
            for lane in range(e.width):
                at = b.mul(b.add(start, const(lane)), const(self.dim))
                totals: list[Value] = [None] * group
                tables = [(self.centroids, queries)]
                if self.sampling.uses_spread:
                    tables.append((self.spread, squares))
                for table, factors in tables:
                    for p in range(self.parts):
                        part = e.load(e.at(table, b.add(at, const(p * e.width)), 4), "float32")
                        for g in range(group):
                            known = totals[g]
                            totals[g] = (
                                b.fmul(factors[g][p], part)
                                if known is None
                                else e.fma(factors[g][p], part, known)
                            )
                lanes.append(totals)
            lanes_of_size = b.load(
                e.at(self.size, start, 4), align=4, typ=ir.VectorType(I32, e.width)
            )
            none = ir.Constant(ir.VectorType(I32, e.width), [0] * e.width)
            there = b.icmp_signed(">", lanes_of_size, none)
            for g in range(group):
                score = e.sum_vectors([totals[g] for totals in lanes])
                score = b.select(there, score, e.splat_const(LOWEST))
                e.store(score, e.at(self.weight[g], start, 4))
                b.store(e.larger(b.load(best[g], typ=e.vector), score), best[g])
        levels: list[Value] = []
        kept: list[Value] = []
        for g in range(group):
            own = self._float(self.kept, const(g))
            level = self._larger(own, e.max_lanes(b.load(best[g], typ=e.vector)))
            self._put(level, self.level_out, const(g))
            levels.append(level)
            kept.append(self._exp(b.fsub(own, level)))
        return levels, kept

    def _sort(self, levels: list[Value], kept: list[Value]) -> Value:
        """Turn scores into weights and write the order; return the number of tokens."""
        e, b, group, settings = self.e, self.e.b, self.group, self.sampling
        wide = ir.VectorType(I32, e.width)
        totals = [e.variable(e.vector, e.splat_const(0.0)) for _ in range(group)]
        with e.loop(const(0), self.clusters, const(e.width)) as start:
            raw = b.load(e.at(self.size, start, 4), align=4, typ=wide)
            size = b.sitofp(raw, e.vector)
            there = b.icmp_signed(">", raw, ir.Constant(wide, [0] * e.width))
            for g in range(group):
                place = e.at(self.weight[g], start, 4)
                weight = e.exp(b.fsub(e.load(place, "float32"), e.splat(levels[g])))
                weight = b.select(there, weight, e.splat_const(0.0))
                e.store(weight, place)
                b.store(e.fma(weight, size, b.load(totals[g], typ=e.vector)), totals[g])
        inverse = [
            b.fdiv(ir.Constant(F32, 1.0), b.fadd(k, e.sum_lanes(b.load(total, typ=e.vector))))
            for k, total in zip(kept, totals, strict=True)
        ]
        buckets = settings.num_buckets
        counts = e.array(I32, buckets + 2)
        with e.loop(const(0), const(buckets + 2), const(1)) as i:
            self._put(const(0), counts, i)
        num_tokens = e.variable(I64, const(0))
        # Counted one place further on, so that the running sum is where a bucket begins.
        with e.loop(const(0), self.clusters, const(1)) as c:
            size = self._int(self.size, c)
            share = b.fmul(self._float(self.weight[0], c), inverse[0])
            for g in range(1, group):
                share = self._larger(share, b.fmul(self._float(self.weight[g], c), inverse[g]))
            bits = b.ashr(b.bitcast(share, I32), ir.Constant(I32, settings.bucket_shift))
            bucket = b.sub(const(settings.highest_bucket), b.sext(bits, I64))
            bucket = e.minimum(e.maximum(bucket, const(0)), const(buckets - 1))
            bucket = b.select(b.icmp_signed(">", size, const(0)), bucket, const(buckets))
            self._put(bucket, self.run_begin, c)
            after = b.add(bucket, const(1))
            self._put(b.add(self._int(counts, after), const(1)), counts, after)
            b.store(b.add(b.load(num_tokens, typ=I64), size), num_tokens)
        with e.loop(const(1), const(buckets + 1), const(1)) as i:
            before = self._int(counts, b.sub(i, const(1)))
            self._put(b.add(before, self._int(counts, i)), counts, i)
        with e.loop(const(0), self.clusters, const(1)) as c:
            bucket = self._int(self.run_begin, c)
            at = self._int(counts, bucket)
            self._put(c, self.order, at)
            self._put(b.add(at, const(1)), counts, bucket)
        return b.load(num_tokens, typ=I64)

    def _sample(self, levels: list[Value]) -> tuple[list[Value], list[Value]]:
        """Look at the samples; return each range's ratios, and squares of what they leave."""
        e, b, group, settings = self.e, self.e.b, self.group, self.sampling
        samples = -(-settings.num_samples // e.width) * e.width
        places = e.array(I64, samples)
        expected = [e.array(F32, samples) for _ in range(group)]
        weights = [e.array(F32, samples) for _ in range(group)]
        positions = e.array(I64, settings.num_samples)
        with e.loop(const(0), const(samples), const(1)) as i:
            b.store(const(0), e.at(places, i, 8))
        last = b.sub(self.clusters, const(1))
        at, first = e.variable(I64, const(0)), e.variable(I64, const(0))
        n = self._int(self.edges, const(settings.num_strata + 1))
        with e.loop(const(0), const(settings.num_samples), const(1)) as i:
            rank = self._int(self.ranks, i)
            self._advance(at, first, rank, last)
            cluster = self._int(self.order, b.load(at, typ=I64))
            place = b.add(self._int(self.begin, cluster), b.sub(rank, b.load(first, typ=I64)))
            if self.where is not None:
                place = self._int(self.where, place)
            b.store(place, e.at(places, i, 8))
            b.store(b.load(at, typ=I64), e.at(positions, i, 8))
            # A context shorter than the head is its own head, each token once.
            short = b.icmp_signed("<", n, const(settings.head_len))
            counts = b.or_(b.icmp_signed("<", i, n), b.not_(short))
            for g in range(group):
                value = ir.Constant(F32, 1.0)
                if settings.uses_ratio:
                    value = self._float(self.weight[g], cluster)
                self._put(b.select(counts, value, ir.Constant(F32, 0.0)), expected[g], i)
        self._weigh(places, expected, weights, levels, samples)
        self._fit_head(positions, expected, weights)
        strata = settings.num_strata + 1
        ratios = [e.array(F32, strata) for _ in range(group)]
        squares = [e.array(F32, strata) for _ in range(group)]
        with e.loop(const(0), const(strata), const(1)) as s:
            is_head = b.icmp_signed("==", s, const(0))
            behind = b.add(
                const(settings.head_len), b.mul(b.sub(s, const(1)), const(settings.drawn))
            )
            low = b.select(is_head, const(0), behind)
            high = b.add(low, b.select(is_head, const(settings.head_len), const(settings.drawn)))
            for g in range(group):
                self._fit(s, low, high, expected[g], weights[g], ratios[g], squares[g])
        return ratios, squares

    def _fit_head(self, positions: Value, expected: list[Value], weights: list[Value]) -> None:
        """Give the clusters that the head looks into ratios of their own; 0 where there is none."""
        e, b, length = self.e, self.e.b, self.sampling.head_len
        zero = ir.Constant(F32, 0.0)
        known = [e.array(F32, length) for _ in range(self.group)]
        self.own = [e.array(F32, length) for _ in range(self.group)]
        self.has_own = [e.array(F32, length) for _ in range(self.group)]
        with e.loop(const(0), const(length), const(1)) as i:
            for array in (*known, *self.own):
                self._put(zero, array, i)
        with e.loop(const(0), const(length), const(1)) as i:
            # Each token moves on by a cluster at most, but for empty ones, which come last.
            at = e.minimum(b.load(e.at(positions, i, 8), typ=I64), const(length - 1))
            for g in range(self.group):
                for array, part in ((known[g], expected[g]), (self.own[g], weights[g])):
                    self._put(b.fadd(self._float(array, at), self._float(part, i)), array, at)
        with e.loop(const(0), const(length), const(1)) as i:
            for g in range(self.group):
                least = self._larger(self._float(known[g], i), ir.Constant(F32, 1e-30))
                self._put(b.fdiv(self._float(self.own[g], i), least), self.own[g], i)
                self._put(self._float(known[g], i), self.has_own[g], i)

    def _is_head(self, g: int, i: Value) -> tuple[Value, Value]:
        """Tell whether a cluster of the order has a ratio of its own, and return where."""
        e, b, length = self.e, self.e.b, self.sampling.head_len
        at = e.minimum(i, const(length - 1))
        known = b.fcmp_ordered(">", self._float(self.has_own[g], at), ir.Constant(F32, 0.0))
        return b.and_(known, b.icmp_signed("<", i, const(length))), at

    def _mass(self, g: int, i: Value, part: Value, ratios: list[Value], s: Value) -> Value:
        """Return the mass of tokens of a cluster from what the model says."""
        is_head, at = self._is_head(g, i)
        own, common = self._float(self.own[g], at), self._float(ratios[g], s)
        return self.e.b.fmul(part, self.e.b.select(is_head, own, common))

    def _advance(self, at: Value, first: Value, rank: Value, last: Value) -> None:
        """Move on to the cluster of the order that holds a token."""
        b = self.e.b
        head, body, end = (b.append_basic_block(name) for name in ("seek", "next", "found"))
        b.branch(head)
        b.position_at_end(head)
        here = b.load(at, typ=I64)
        ends = b.add(b.load(first, typ=I64), self._int(self.size, self._int(self.order, here)))
        behind = b.icmp_signed(">=", rank, ends)
        b.cbranch(b.and_(behind, b.icmp_signed("<", here, last)), body, end)
        b.position_at_end(body)
        b.store(b.add(here, const(1)), at)
        b.store(ends, first)
        b.branch(head)
        b.position_at_end(end)

    def _weigh(
        self,
        places: Value,
        expected: list[Value],
        weights: list[Value],
        levels: list[Value],
        samples: int,
    ) -> None:
        """Compute the weights of the keys at some places."""
        e, b, group = self.e, self.e.b, self.group
        with e.loop(const(0), const(samples), const(e.width)) as start:
            queries = [
                [e.load(e.at(self.q, const(g * self.dim + p * e.width), 4), "float32")
                 for p in range(self.parts)]
                for g in range(group)
            ]  # fmt: skip
            lanes: list[list[Value]] = []
            for lane in range(e.width):
                place = b.load(e.at(places, b.add(start, const(lane)), 8), typ=I64)
                low = b.mul(place, const(self.dim))
                parts = [
                    e.load(
                        e.at(
                            self.keys,
                            b.add(low, const(p * e.width)),
                            ITEM_BYTES[self.shape.kind],
                        ),
                        self.shape.kind,
                    )
                    for p in range(self.parts)
                ]
                totals = [b.fmul(query[0], parts[0]) for query in queries]
                for p in range(1, self.parts):
                    totals = [
                        e.fma(q[p], parts[p], t) for q, t in zip(queries, totals, strict=True)
                    ]
                lanes.append(totals)
            for g in range(group):
                score = b.fsub(e.sum_vectors([each[g] for each in lanes]), e.splat(levels[g]))
                most = e.splat_const(_HIGHEST)
                score = b.select(b.fcmp_ordered("<", score, most), score, most)
                known = e.load(e.at(expected[g], start, 4), "float32")
                used = b.fcmp_ordered(">", known, e.splat_const(0.0))
                weight = b.select(used, e.exp(score), e.splat_const(0.0))
                e.store(weight, e.at(weights[g], start, 4))

    def _fit(
        self,
        s: Value,
        low: Value,
        high: Value,
        expected: Value,
        weights: Value,
        ratios: Value,
        squares: Value,
    ) -> None:
        """Find one range's ratio, and the squares of what it leaves."""
        e, b = self.e, self.e.b
        found, known, rest = (e.variable(F32, ir.Constant(F32, 0.0)) for _ in range(3))
        with e.loop(low, high, const(1)) as i:
            b.store(b.fadd(b.load(found, typ=F32), self._float(weights, i)), found)
            b.store(b.fadd(b.load(known, typ=F32), self._float(expected, i)), known)
        least = self._larger(b.load(known, typ=F32), ir.Constant(F32, 1e-30))
        ratio = b.fdiv(b.load(found, typ=F32), least)
        self._put(ratio, ratios, s)
        with e.loop(low, high, const(1)) as i:
            left = b.fsub(self._float(weights, i), b.fmul(ratio, self._float(expected, i)))
            b.store(b.fadd(b.load(rest, typ=F32), b.fmul(left, left)), rest)
        self._put(b.load(rest, typ=F32), squares, s)

    def _walk(self, visit: _Visit) -> None:
        """Visit clusters in their order, with the range of ranks that each belongs to."""
        e, b, settings = self.e, self.e.b, self.sampling
        first, stratum = e.variable(I64, const(0)), e.variable(I64, const(0))
        with e.loop(const(0), self.clusters, const(1)) as i:
            cluster = self._int(self.order, i)
            size = self._int(self.size, cluster)
            rank = b.load(first, typ=I64)
            middle = b.add(rank, b.sdiv(size, const(2)))
            head, body, end = (b.append_basic_block(name) for name in ("seek", "next", "found"))
            b.branch(head)
            b.position_at_end(head)
            s = b.load(stratum, typ=I64)
            edge = self._int(self.edges, b.add(s, const(1)))
            ahead = b.and_(
                b.icmp_signed(">=", middle, edge), b.icmp_signed("<", s, const(settings.num_strata))
            )
            b.cbranch(ahead, body, end)
            b.position_at_end(body)
            b.store(b.add(s, const(1)), stratum)
            b.branch(head)
            b.position_at_end(end)
            visit(i, cluster, size, rank, s)
            b.store(b.add(rank, size), first)

    def _modelled(self, g: int, cluster: Value, size: Value) -> Value:
        number = self._number(size)
        if not self.sampling.uses_ratio:
            return number
        return self.e.b.fmul(self._float(self.weight[g], cluster), number)

    def _count(
        self, kept: list[Value], ratios: list[Value], squares: list[Value], num_tokens: Value
    ) -> None:
        """Find how far to read; write the runs, and what is left."""
        e, b, group, settings = self.e, self.e.b, self.group, self.sampling
        zero, one = ir.Constant(F32, 0.0), ir.Constant(F32, 1.0)
        strata = settings.num_strata + 1
        whole = [e.array(F32, strata) for _ in range(group)]
        total = [e.variable(F32, zero) for _ in range(group)]
        noise = [e.variable(F32, zero) for _ in range(group)]
        with e.loop(const(0), const(strata), const(1)) as s:
            for g in range(group):
                self._put(zero, whole[g], s)

        def add(i: Value, cluster: Value, size: Value, _rank: Value, s: Value) -> None:
            for g in range(group):
                part = self._modelled(g, cluster, size)
                mass = self._mass(g, i, part, ratios, s)
                b.store(b.fadd(b.load(total[g], typ=F32), mass), total[g])
                is_head, _ = self._is_head(g, i)
                part = b.select(is_head, zero, part)
                self._put(b.fadd(self._float(whole[g], s), part), whole[g], s)

        self._walk(add)
        with e.loop(const(0), const(strata), const(1)) as s:
            width = b.sub(self._int(self.edges, b.add(s, const(1))), self._int(self.edges, s))
            wide = self._number(e.maximum(width, const(1)))
            unread = self._larger(
                b.fsub(one, b.fdiv(ir.Constant(F32, float(settings.drawn)), wide)), zero
            )
            unread = b.select(b.icmp_signed("==", s, const(0)), zero, unread)
            real = self._number(width)
            scale = b.fmul(b.fmul(real, real), unread)
            scale = b.fdiv(scale, ir.Constant(F32, float(settings.drawn * (settings.drawn - 1))))
            for g in range(group):
                known = self._float(whole[g], s)
                variance = b.fmul(scale, self._float(squares[g], s))
                # Only ranges that hold clusters have an error.
                used = b.fcmp_ordered(">", known, zero)
                variance = b.select(used, variance, zero)
                b.store(b.fadd(b.load(noise[g], typ=F32), variance), noise[g])
                each = b.fdiv(variance, self._larger(known, ir.Constant(F32, 1e-30)))
                self._put(each, squares[g], s)
        self._find(kept, ratios, squares, total, noise, num_tokens)

    def _find(
        self,
        kept: list[Value],
        ratios: list[Value],
        noises: list[Value],
        total: list[Value],
        noise: list[Value],
        num_tokens: Value,
    ) -> None:
        e, b, group, settings = self.e, self.e.b, self.group, self.sampling
        zero, one = ir.Constant(F32, 0.0), ir.Constant(F32, 1.0)
        p, share = self._float(self.limits, const(0)), self._float(self.limits, const(1))
        target: list[Value] = []
        for g in range(group):
            mass = b.load(total[g], typ=F32)
            self._put(mass, self.mass_out, const(g))
            target.append(b.fsub(b.fmul(p, b.fadd(kept[g], mass)), kept[g]))
        reached = [e.variable(F32, zero) for _ in range(group)]
        below = [e.variable(F32, zero) for _ in range(group)]
        met = [e.variable(ir.IntType(1), ir.Constant(ir.IntType(1), 0)) for _ in range(group)]
        wanted = e.variable(I64, const(0))
        for g in range(group):
            b.store(b.fcmp_ordered("<=", target[g], zero), met[g])
        rest = b.fsub(one, p)
        rest_square, p_square = b.fmul(rest, rest), b.fmul(p, p)
        z_square = ir.Constant(F32, settings.z**2)

        def count(i: Value, cluster: Value, size: Value, rank: Value, s: Value) -> None:
            for g in range(group):
                part = self._modelled(g, cluster, size)
                mass = self._mass(g, i, part, ratios, s)
                after = b.fadd(b.load(reached[g], typ=F32), mass)
                b.store(after, reached[g])
                inside = b.fadd(b.load(below[g], typ=F32), b.fmul(part, self._float(noises[g], s)))
                b.store(inside, below[g])
                outside = self._larger(b.fsub(b.load(noise[g], typ=F32), inside), zero)
                error = b.fadd(b.fmul(rest_square, inside), b.fmul(p_square, outside))
                ahead = b.fsub(after, target[g])
                safe = b.fcmp_ordered(">=", b.fmul(ahead, ahead), b.fmul(z_square, error))
                enough = b.and_(safe, b.fcmp_ordered(">=", ahead, zero))
                known = b.load(met[g], typ=ir.IntType(1))
                with b.if_then(b.not_(known)):
                    # Up to the end of the cluster where it is enough, or as far as it goes.
                    deviation = self.e.intrinsic("llvm.sqrt", [F32], F32, [b.fmul(z_square, error)])
                    missing = b.fdiv(
                        b.fsub(ahead, deviation), self._larger(mass, ir.Constant(F32, 1e-30))
                    )
                    missing = b.select(b.fcmp_ordered("<", missing, one), missing, one)
                    taken = b.fmul(b.fsub(one, missing), self._number(size))
                    taken = b.fptosi(e.intrinsic("llvm.ceil", [F32], F32, [taken]), I64)
                    taken = b.select(enough, taken, size)
                    need = b.add(rank, taken)
                    b.store(e.maximum(b.load(wanted, typ=I64), need), wanted)
                b.store(b.or_(known, enough), met[g])

        self._walk(count)
        want = b.load(wanted, typ=I64)
        most = b.fmul(share, self._number(num_tokens))
        is_diffuse = b.or_(
            b.fcmp_ordered(">", self._number(want), most), b.fcmp_ordered(">=", p, one)
        )
        self._write(ratios, b.select(is_diffuse, num_tokens, want))

    def _write(self, ratios: list[Value], wanted: Value) -> None:
        """Write runs, and the mass of what is not read."""
        e, b, settings = self.e, self.e.b, self.sampling
        number = e.variable(I64, const(0))

        def write(i: Value, cluster: Value, size: Value, rank: Value, s: Value) -> None:
            left = e.maximum(b.sub(wanted, rank), const(0))
            # The last cluster is finished, or as much of a large one.
            units = b.sdiv(b.add(left, const(settings.most - 1)), const(settings.most))
            taken = e.minimum(b.mul(units, const(settings.most)), size)
            self._put(self._int(self.begin, cluster), self.run_begin, i)
            self._put(taken, self.run_size, i)
            b.store(b.add(b.load(number, typ=I64), taken), number)
            rest = b.sub(size, taken)
            for g in range(self.group):
                mass = self._mass(g, i, self._modelled(g, cluster, rest), ratios, s)
                self._put(mass, self.weight[g], cluster)

        self._walk(write)
        self._put(b.load(number, typ=I64), self.count, const(0))
