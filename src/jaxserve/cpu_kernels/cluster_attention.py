"""Sparse attention of decoding rows in one kernel: predict, choose, read, and merge.

Clusters lie in entries of whole segments, of which a row names its own; nothing is copied together.
Each stage is cut into chunks of about equal work, by blocks of clusters and pieces of what is read,
so that threads have the same to do however much each head reads. How a head's work is cut depends
on nothing but its own length, so neighbours and threads do not change its result.

Source: ours; see `attention/tactic`. Split keys and their merge are those of FlashAttention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from llvmlite import ir

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.choice_emitter import Choice
from jaxserve.cpu_kernels.cluster_tables import (
    CLUSTER_BLOCK,
    Sampling,
    Table,
    Workspace,
    digest,
    num_blocks,
)
from jaxserve.cpu_kernels.emit import (
    F32,
    I32,
    ITEM_BYTES,
    Emitter,
    Value,
    WeightType,
    const,
    weight_type,
)
from jaxserve.cpu_kernels.heads import LOWEST, Heads
from jaxserve.cpu_kernels.places import (
    PIECE,
    PlaceReader,
    RunWalk,
    StatePlace,
    load_float,
    load_int,
    scale_add,
    store_word,
)

_AHEAD = 16
"""Clusters from one whose mean value is added up to one that is asked for."""
_KEPT_PARTS, _READ_PARTS = 4, 16
"""Into how many parts a head's always read, and its chosen places are dealt out."""


@dataclass(frozen=True, slots=True)
class Attended:
    """What `attend_clusters` returns.

    Attributes:
        out: Outputs; zeros for a row without tokens; `[rows, q_heads, head_dim]`.
        read: State of what was read, without what stands in for the rest: sums of weighted values,
            largest scores, and masses relative to them.
        num_tokens: Tokens that were chosen, beside those that are always read; `[rows, kv_heads]`.
        share: Estimated share of the mass that was read; `[rows, q_heads]`.
    """

    out: Array
    read: tuple[Array, Array, Array]
    num_tokens: Array
    share: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What is fixed when the kernel is built."""

    shape: Heads
    sampling: Sampling
    per_entry: int
    segments: int
    segment_len: int
    index_kind: WeightType
    is_ordered: bool
    uses_tail: bool

    @property
    def clusters(self) -> int:
        return self.per_entry * self.segments

    @property
    def blocks(self) -> int:
        return num_blocks(self.clusters)

    @property
    def name(self) -> str:
        shape = self.shape
        sizes = (shape.q_heads, shape.kv_heads, shape.head_dim, self.per_entry, self.segments)
        kinds = (shape.kind, self.index_kind, "ordered" * self.is_ordered, "tail" * self.uses_tail)
        words = "_".join(map(str, (*sizes, self.segment_len, *kinds)))
        return f"jaxserve_attend_clusters_{words}_{digest(self.sampling)}"


def attend_clusters(
    q: Float[Array, "rows q_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    entries: Int[Array, "rows segments"],
    num_segments: Int[Array, " rows"],
    kept_begin: Int[Array, "rows kv_heads 2"],
    kept_size: Int[Array, "rows kv_heads 2"],
    centroids: Float[Array, "entries kv_heads clusters head_dim"],
    spread: Float[Array, "entries kv_heads clusters"],
    value_means: Float[Array, "entries kv_heads clusters head_dim"],
    sizes: Int[Array, "entries kv_heads clusters"],
    begin: Int[Array, "entries kv_heads clusters"],
    p: Float[Array, " rows"],
    max_share: float,
    edges: Int[Array, "rows edges"],
    ranks: Int[Array, "rows samples"],
    order: Int[Array, "entries kv_heads segment_len"] | None = None,
    *,
    sampling: Sampling,
    uses_tail: bool,
) -> Attended:
    """Attend from each row of the first slots to as much as a share of its mass takes.

    Args:
        q: Scaled queries.
        keys: Slots, float32 or bfloat16.
        values: Likewise.
        entries: Entries of each row's segments, in their order; arbitrary behind `num_segments`.
        num_segments: Segments of each row that have entries; 0 chooses nothing.
        kept_begin: First places of two runs that are always read; the first is not empty if any is.
        kept_size: Their places.
        centroids: Mean keys of each entry; their number is a multiple of 16.
        spread: Variances of keys, means over dimensions; float32.
        value_means: Mean values.
        sizes: Tokens of each cluster.
        begin: Their first places within the segment.
        p: Share of the mass.
        max_share: Where more than this share of the tokens is needed, all are read.
        edges: Where ranges of ranks begin, and where the last one ends.
        ranks: Tokens to look at, ascending; numbered along the order of clusters.
        order: Which token of its segment comes to each place; None if places lie in their order,
            and segments are whole rows.
        sampling: How samples are used.
        uses_tail: Whether mean values stand in for what is not read.
    """
    rows, q_heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    per_entry, segments = centroids.shape[2], entries.shape[1]
    form = _Form(
        shape=Heads(q_heads=q_heads, kv_heads=kv_heads, head_dim=dim, kind=weight_type(keys.dtype)),
        sampling=sampling,
        per_entry=per_entry,
        segments=segments,
        segment_len=0 if order is None else order.shape[2],
        index_kind=weight_type(centroids.dtype),
        is_ordered=order is not None,
        uses_tail=uses_tail,
    )
    ffi.register(form.name, lambda: _kernel(form))
    group, clusters, pieces = q_heads // kv_heads, form.clusters, -(-capacity // PIECE)
    states = _KEPT_PARTS + _READ_PARTS

    def floats(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *axes), jnp.float32)

    def words(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, kv_heads, *axes), jnp.int32)

    outs = [
        floats(q_heads, dim),
        floats(q_heads, dim),
        *[floats(q_heads)] * 2,
        words(),
        floats(q_heads),
    ]
    scratch = [
        *[floats(q_heads)] * 3,
        floats(q_heads, form.blocks),
        *[floats(q_heads, clusters)] * 2,
        *[words(clusters)] * 7,
        words(pieces, 2),
        floats(kv_heads, states, group, dim),
        *[floats(kv_heads, states, group)] * 2,
        floats(kv_heads, form.blocks, group, dim),
    ]
    limits = jnp.stack([p, jnp.full_like(p, max_share)], axis=-1)
    last = () if order is None else (order,)
    found = jax.ffi.ffi_call(form.name, [*outs, *scratch])(
        q, keys, values, entries, num_segments, kept_begin, kept_size, centroids, spread,
        value_means, sizes, begin, limits, edges, ranks, *last,
    )  # fmt: skip
    out, sums, top, mass, num_tokens, share, *_ = found
    return Attended(out, (sums, top, mass), num_tokens, share)


def _kernel(form: _Form) -> ffi.Kernel:
    parts = form.blocks + _KEPT_PARTS, form.blocks * form.uses_tail + _READ_PARTS

    def heads(each: int) -> ffi._NumChunks:
        return lambda e, sizes, _threads: e.b.mul(sizes[0], const(form.shape.kv_heads * each))

    def prepare(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        head = _Head(e, form, buffers, sizes[1], e.b.udiv(index, const(parts[0])))
        part = e.b.urem(index, const(parts[0]))
        is_kept = e.b.icmp_signed("<", part, const(_KEPT_PARTS))
        with e.b.if_else(is_kept) as (kept, predicted):
            with kept:
                head.read_kept(part)
            with predicted:
                head.choice.predict(e.b.sub(part, const(_KEPT_PARTS)), head.used)

    def choose(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        _Head(e, form, buffers, sizes[1], index).choose()

    def read(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        head = _Head(e, form, buffers, sizes[1], e.b.udiv(index, const(parts[1])))
        part = e.b.urem(index, const(parts[1]))
        if not form.uses_tail:
            head.read_chosen(part)
            return
        is_read = e.b.icmp_signed("<", part, const(_READ_PARTS))
        with e.b.if_else(is_read) as (chosen, rest):
            with chosen:
                head.read_chosen(part)
            with rest:
                head.add_means(e.b.sub(part, const(_READ_PARTS)))

    def merge(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        _Head(e, form, buffers, sizes[1], index).merge()

    return ffi.Kernel(
        name=form.name,
        num_args=15 + form.is_ordered,
        num_rets=24,
        dims=[(0, 0), (1, 2)],
        num_chunks=heads(parts[0]),
        chunk=prepare,
        later=[
            ffi.Stage(num_chunks=heads(1), chunk=choose),
            ffi.Stage(num_chunks=heads(parts[1]), chunk=read),
            ffi.Stage(num_chunks=heads(1), chunk=merge),
        ],
    )


class _Head:
    """Emits the work of one row and one key-value head.

    Args:
        e: Where instructions go.
        form: What is fixed.
        buffers: Inputs and outputs.
        capacity: Places of a slot.
        index: row * kv_heads + head; slots and rows are numbered alike.
    """

    def __init__(
        self, e: Emitter, form: _Form, buffers: Sequence[Value], capacity: Value, index: Value
    ) -> None:
        self.e, self.form = e, form
        shape, sampling = form.shape, form.sampling
        b, group, dim = e.b, shape.group, shape.head_dim
        order = buffers[15] if form.is_ordered else None
        (
            q, keys, values, entries, num_segments, kept_begin, kept_size, centroids, spread,
            self.value_means, sizes, begin, limits, edges, ranks,
        ) = buffers[:15]  # fmt: skip
        (
            out, read_out, read_top, read_mass, num_tokens, share, level, mass, tail, best,
            weight, model, size, first, ordered, rank, ordered_size, run_begin, run_size, pieces,
            state_out, state_top, state_mass, tail_out,
        ) = buffers[15 + form.is_ordered :]  # fmt: skip
        row, head = b.udiv(index, const(shape.kv_heads)), b.urem(index, const(shape.kv_heads))
        queries, at = b.mul(index, const(group)), b.mul(index, const(form.clusters))
        slot = b.mul(b.mul(index, capacity), const(dim * ITEM_BYTES[shape.kind]))

        def by_query(buffer: Value, each: int) -> list[Value]:
            low = b.mul(queries, const(each))
            return [e.at(buffer, b.add(low, const(g * each)), 4) for g in range(group)]

        self.q = e.at(q, b.mul(queries, const(dim)), 4)
        self.keys, self.values = e.at(keys, slot, 1), e.at(values, slot, 1)
        own_entries = e.at(entries, b.mul(row, const(form.segments)), 4)
        self.used = b.mul(load_int(e, num_segments, row), const(form.per_entry))
        self.kept_begin = e.at(kept_begin, b.mul(index, const(2)), 4)
        self.kept_size = e.at(kept_size, b.mul(index, const(2)), 4)
        self.table = Table(
            entries=own_entries, head=head, kv_heads=shape.kv_heads, per_entry=form.per_entry,
            centroids=centroids, spread=spread, sizes=sizes, begin=begin, kind=form.index_kind,
            segment_len=form.segment_len,
        )  # fmt: skip
        most = b.udiv(b.add(capacity, const(PIECE - 1)), const(PIECE))
        self.space = Workspace(
            best=by_query(best, form.blocks), weight=by_query(weight, form.clusters),
            size=e.at(size, at, 4), begin=e.at(first, at, 4), order=e.at(ordered, at, 4),
            ordered_size=e.at(ordered_size, at, 4), rank=e.at(rank, at, 4),
            model=by_query(model, form.clusters), run_begin=e.at(run_begin, at, 4),
            run_size=e.at(run_size, at, 4), num_tokens=e.at(num_tokens, index, 4),
            level=e.at(level, queries, 4), mass=e.at(mass, queries, 4),
            tail=e.at(tail, queries, 4), share=e.at(share, queries, 4),
            pieces=e.at(pieces, b.mul(b.mul(index, most), const(2)), 4),
        )  # fmt: skip
        self.out = e.at(out, b.mul(queries, const(dim)), 4)
        self.whole = StatePlace(
            e.at(read_out, b.mul(queries, const(dim)), 4),
            e.at(read_top, queries, 4),
            e.at(read_mass, queries, 4),
        )
        states = b.mul(queries, const(_KEPT_PARTS + _READ_PARTS))
        self.states = StatePlace(
            e.at(state_out, b.mul(states, const(dim)), 4),
            e.at(state_top, states, 4),
            e.at(state_mass, states, 4),
        )
        self.tail_out = e.at(tail_out, b.mul(queries, const(form.blocks * dim)), 4)
        self.where = None
        if order is not None:
            self.where = _Where(e, form, own_entries, head, order)
        self.choice = Choice(
            e, shape, sampling, self.table, self.space,
            q=self.q, keys=self.keys,
            limits=e.at(limits, b.mul(row, const(2)), 4),
            edges=e.at(edges, b.mul(row, const(sampling.num_strata + 2)), 4),
            ranks=e.at(ranks, b.mul(row, const(sampling.num_samples)), 4),
            where=self.where,
        )  # fmt: skip

    def _state(self, number: Value) -> StatePlace:
        e, group = self.e, self.form.shape.group
        low = e.b.mul(number, const(group))
        return StatePlace(
            e.at(self.states.out, e.b.mul(low, const(self.form.shape.head_dim)), 4),
            e.at(self.states.top, low, 4),
            e.at(self.states.mass, low, 4),
        )

    def _num_kept(self) -> Value:
        return self.e.b.add(*(load_int(self.e, self.kept_size, const(i)) for i in range(2)))

    def _num_parts(self, tokens: Value, most: int) -> Value:
        """Return how many parts have anything to read."""
        b = self.e.b
        return self.e.minimum(b.udiv(b.add(tokens, const(PIECE - 1)), const(PIECE)), const(most))

    def read_kept(self, part: Value) -> None:
        """Attend to each so-many-th piece of what is always read."""
        e, b, total = self.e, self.e.b, self._num_kept()
        with b.if_then(b.icmp_signed("<", part, self._num_parts(total, _KEPT_PARTS))):
            reader = PlaceReader(e, self.form.shape, self.q, self.keys, self.values)
            first = load_int(e, self.kept_size, const(0))
            step = const(_KEPT_PARTS * PIECE)
            with e.loop(b.mul(part, const(PIECE)), total, step) as start:
                is_first = b.icmp_signed("<", start, first)
                walk = RunWalk(
                    e,
                    self.kept_begin,
                    self.kept_size,
                    run=b.select(is_first, const(0), const(1)),
                    offset=b.select(is_first, start, b.sub(start, first)),
                    last=const(1),
                )
                own = e.minimum(b.sub(total, start), const(PIECE))
                walk.list(own, reader.put)
                reader.read(own)
            reader.write(self._state(part))

    def choose(self) -> None:
        """Choose what else is read."""
        e, b, space, group = self.e, self.e.b, self.space, self.form.shape.group
        count = self._num_parts(self._num_kept(), _KEPT_PARTS)
        tops = [e.variable(F32, ir.Constant(F32, LOWEST)) for _ in range(group)]
        masses = [e.variable(F32, ir.Constant(F32, 0.0)) for _ in range(group)]
        for g in range(group):
            with e.loop(const(0), count, const(1)) as i:
                top = load_float(e, self._state(i).top, const(g))
                before = b.load(tops[g], typ=F32)
                b.store(b.select(b.fcmp_ordered(">", top, before), top, before), tops[g])
            with e.loop(const(0), count, const(1)) as i:
                state = self._state(i)
                fade = self._exp(b.fsub(load_float(e, state.top, const(g)), self._value(tops[g])))
                part = b.fmul(load_float(e, state.mass, const(g)), fade)
                b.store(b.fadd(self._value(masses[g]), part), masses[g])
        top, mass = ([self._value(x) for x in each] for each in (tops, masses))
        with b.if_else(b.icmp_signed(">", self.used, const(0))) as (some, none):
            with some:
                self.choice.choose(self.used, top, mass)
                if self.form.uses_tail:
                    self.choice.scatter_tail()
            with none:
                store_word(e, const(0), space.num_tokens, const(0))
                for g in range(group):
                    store_word(e, top[g], space.level, const(g))
                    store_word(e, ir.Constant(F32, 0.0), self._tail, const(g))
                    store_word(e, ir.Constant(F32, 1.0), self._share, const(g))

    @property
    def _tail(self) -> Value:
        return self.space.tail

    @property
    def _share(self) -> Value:
        return self.space.share

    def _value(self, variable: Value) -> Value:
        return self.e.b.load(variable, typ=F32)

    def _exp(self, value: Value) -> Value:
        e = self.e
        return e.b.extract_element(e.exp(e.splat(value)), ir.Constant(I32, 0))

    def read_chosen(self, part: Value) -> None:
        """Attend to each so-many-th piece of what was chosen."""
        e, b, space = self.e, self.e.b, self.space
        total = load_int(e, space.num_tokens, const(0))
        with b.if_then(b.icmp_signed("<", part, self._num_parts(total, _READ_PARTS))):
            reader = PlaceReader(e, self.form.shape, self.q, self.keys, self.values)

            def visit(place: Value, i: Value) -> None:
                reader.put(place if self.where is None else self.where(place), i)

            step = const(_READ_PARTS * PIECE)
            with e.loop(b.mul(part, const(PIECE)), total, step) as start:
                low = b.mul(b.udiv(start, const(PIECE)), const(2))
                walk = RunWalk(
                    e,
                    space.run_begin,
                    space.run_size,
                    run=load_int(e, space.pieces, low),
                    offset=load_int(e, space.pieces, b.add(low, const(1))),
                    last=const(self.form.clusters - 1),
                )
                own = e.minimum(b.sub(total, start), const(PIECE))
                walk.list(own, visit)
                reader.read(own)
            reader.write(self._state(b.add(part, const(_KEPT_PARTS))))

    def add_means(self, block: Value) -> None:
        """Add up mean values, by the mass that is not read, of one block of clusters.

        They come as they lie, those without such mass too: in the order of choice most rows would
        be waited for.
        """
        e, b, shape, kind = self.e, self.e.b, self.form.shape, self.form.index_kind
        first = b.mul(block, const(CLUSTER_BLOCK))
        count = b.sub(e.minimum(b.add(first, const(CLUSTER_BLOCK)), self.used), first)
        row_bytes = const(shape.head_dim * ITEM_BYTES[kind])

        def row(i: Value) -> Value:
            number = self.table.row(e, b.add(first, i))
            return e.at(self.value_means, b.mul(number, row_bytes), 1)

        def later(i: Value) -> Value:
            return row(e.minimum(b.add(i, const(_AHEAD)), b.sub(count, const(1))))

        with b.if_then(b.icmp_signed(">", count, const(0))):
            parts = shape.head_dim // e.width
            zero = e.splat_const(0.0)
            sums = [[e.variable(e.vector, zero) for _ in range(parts)] for _ in range(shape.group)]
            masses = [e.at(each, first, 4) for each in self.space.weight]
            scale_add(e, sums, masses, count, row, kind, later)
            low = b.mul(block, const(shape.group * shape.head_dim))
            for g in range(shape.group):
                for part in range(parts):
                    at = b.add(low, const(g * shape.head_dim + part * e.width))
                    e.store(b.load(sums[g][part], typ=e.vector), e.at(self.tail_out, at, 4))

    def merge(self) -> None:
        """Merge what was read, then what stands in for the rest."""
        e, b, space, shape = self.e, self.e.b, self.space, self.form.shape
        kept = self._num_parts(self._num_kept(), _KEPT_PARTS)
        chosen = self._num_parts(load_int(e, space.num_tokens, const(0)), _READ_PARTS)
        count = b.add(kept, chosen)
        blocks = b.udiv(b.add(self.used, const(CLUSTER_BLOCK - 1)), const(CLUSTER_BLOCK))

        def number(i: Value) -> Value:
            skipped = b.sub(const(_KEPT_PARTS), kept)
            return b.select(b.icmp_signed("<", i, kept), i, b.add(i, skipped))

        for g in range(shape.group):
            top = e.variable(F32, ir.Constant(F32, LOWEST))
            with e.loop(const(0), count, const(1)) as i:
                own, before = load_float(e, self._state(number(i)).top, const(g)), self._value(top)
                b.store(b.select(b.fcmp_ordered(">", own, before), own, before), top)
            mass = e.variable(F32, ir.Constant(F32, 0.0))
            parts = range(0, shape.head_dim, e.width)
            sums = [e.variable(e.vector, e.splat_const(0.0)) for _ in parts]
            highest = self._value(top)
            with e.loop(const(0), count, const(1)) as i:
                state = self._state(number(i))
                fade = self._exp(b.fsub(load_float(e, state.top, const(g)), highest))
                part = b.fmul(load_float(e, state.mass, const(g)), fade)
                b.store(b.fadd(self._value(mass), part), mass)
                for total, low in zip(sums, parts, strict=True):
                    place = e.at(state.out, const(g * shape.head_dim + low), 4)
                    added = e.fma(
                        e.load(place, "float32"), e.splat(fade), b.load(total, typ=e.vector)
                    )
                    b.store(added, total)
            store_word(e, highest, self.whole.top, const(g))
            store_word(e, self._value(mass), self.whole.mass, const(g))
            for total, low in zip(sums, parts, strict=True):
                place = e.at(self.whole.out, const(g * shape.head_dim + low), 4)
                e.store(b.load(total, typ=e.vector), place)
            if self.form.uses_tail:
                self._add_tail(g, highest, mass, sums, blocks)
            least = ir.Constant(F32, 1e-30)
            whole = self._value(mass)
            whole = b.select(b.fcmp_ordered(">", whole, least), whole, least)
            for total, low in zip(sums, parts, strict=True):
                share = b.fdiv(b.load(total, typ=e.vector), e.splat(whole))
                e.store(share, e.at(self.out, const(g * shape.head_dim + low), 4))

    def _add_tail(
        self, g: int, top: Value, mass: Value, sums: Sequence[Value], blocks: Value
    ) -> None:
        """Add what stands in for the rest, which is relative to a level of its own."""
        e, b, space, shape = self.e, self.e.b, self.space, self.form.shape
        level = load_float(e, space.level, const(g))
        highest = b.select(b.fcmp_ordered(">", level, top), level, top)
        fade, tail_fade = (self._exp(b.fsub(x, highest)) for x in (top, level))
        tail = b.fmul(load_float(e, self._tail, const(g)), tail_fade)
        b.store(b.fadd(b.fmul(self._value(mass), fade), tail), mass)
        for total in sums:
            b.store(b.fmul(b.load(total, typ=e.vector), e.splat(fade)), total)
        with e.loop(const(0), blocks, const(1)) as block:
            first = b.mul(block, const(shape.group * shape.head_dim))
            for i, total in enumerate(sums):
                at = b.add(first, const(g * shape.head_dim + i * e.width))
                part = e.load(e.at(self.tail_out, at, 4), "float32")
                b.store(e.fma(part, e.splat(tail_fade), b.load(total, typ=e.vector)), total)


class _Where:
    """Emits the look-up of the token that comes to a place of a row.

    Args:
        e: Where instructions go.
        form: What is fixed.
        entries: The entries of the row.
        head: Number of the head.
        order: Orders of all entries.
    """

    def __init__(self, e: Emitter, form: _Form, entries: Value, head: Value, order: Value) -> None:
        self.e, self.form, self.entries, self.head, self.order = e, form, entries, head, order

    def __call__(self, place: Value) -> Value:
        """Return the position of the token at a place."""
        e, b, length = self.e, self.e.b, const(self.form.segment_len)
        segment, inside = b.udiv(place, length), b.urem(place, length)
        entry = load_int(e, self.entries, segment)
        first = b.mul(b.add(b.mul(entry, const(self.form.shape.kv_heads)), self.head), length)
        token = load_int(e, e.at(self.order, first, 4), inside)
        return b.add(b.mul(segment, length), token)
