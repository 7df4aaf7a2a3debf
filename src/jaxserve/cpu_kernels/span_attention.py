"""Attention of decoding rows to runs of places of dense slots, each head to its own runs.

Runs are strung together into blocks of keys, so that short ones cost no more than long ones. How
many runs there are is known on the device only; nothing is read for those that are not there.

Source: the running softmax of FlashAttention.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from llvmlite import ir

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.emit import (
    F32,
    I32,
    I64,
    ITEM_BYTES,
    Emitter,
    Value,
    const,
    weight_type,
)
from jaxserve.cpu_kernels.heads import KEY_BLOCK, LOWEST, Heads


def attend_spans(
    q: Float[Array, "rows q_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    begin: Int[Array, "rows kv_heads runs"],
    size: Int[Array, "rows kv_heads runs"],
    num_tokens: Int[Array, "rows kv_heads"],
    order: Int[Array, "rows kv_heads capacity"] | None = None,
) -> tuple[
    Float[Array, "rows q_heads head_dim"],
    Float[Array, "rows q_heads"],
    Float[Array, "rows q_heads"],
]:
    """Attend to the places of some runs of the first slots.

    Args:
        q: Scaled queries.
        keys: Slots, float32 or bfloat16.
        values: Likewise.
        begin: First place of each run.
        size: Places of each run. Those that are read come first and are not empty.
        num_tokens: Places that are read; the last run may be longer than that.
        order: Where in its slot each place lies; None if places lie in their order.

    Returns:
        Sums of weighted values, the largest score, and the mass relative to it. A head without
        tokens has zeros, -1e30 and 0.
    """
    _, q_heads, head_dim = q.shape
    kind = weight_type(keys.dtype)
    shape = Heads(q_heads=q_heads, kv_heads=keys.shape[1], head_dim=head_dim, kind=kind)
    ordered = "" if order is None else "_ordered"
    name = f"jaxserve_spans_{q_heads}_{keys.shape[1]}_{head_dim}_{kind}{ordered}"
    ffi.register(name, lambda: _kernel(name, shape, is_ordered=order is not None))
    state = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    outs = [jax.ShapeDtypeStruct(q.shape, jnp.float32), state, state]
    call = jax.ffi.ffi_call(name, outs)
    given = (begin, size, num_tokens) if order is None else (begin, size, num_tokens, order)
    whole = (x.astype(jnp.int32) for x in given)
    out, top, mass = call(q.astype(jnp.float32), keys, values, *whole)
    return out, top, mass


def _kernel(name: str, shape: Heads, *, is_ordered: bool) -> ffi.Kernel:
    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        *inputs, out, top, mass = buffers
        order = inputs.pop() if is_ordered else None
        buffers = [*inputs, out, top, mass]
        _Head(e, shape, buffers, index, capacity=sizes[1], runs=sizes[2], order=order).attend()

    return ffi.Kernel(
        name=name,
        num_args=7 if is_ordered else 6,
        num_rets=3,
        dims=[(0, 0), (1, 2), (3, 2)],
        num_chunks=lambda e, sizes, _threads: e.b.mul(sizes[0], const(shape.kv_heads)),
        chunk=chunk,
    )


class _Head:
    """Emits the work of one row and one key-value head.

    Args:
        e: Where instructions go.
        shape: Heads and sizes.
        buffers: Inputs and outputs.
        index: row * kv_heads + head; slots and rows are numbered alike.
        capacity: Places of a slot.
        runs: Runs that a head may have.
        order: Where in its slot each place lies; None if places lie in their order.
    """

    def __init__(
        self,
        e: Emitter,
        shape: Heads,
        buffers: Sequence[Value],
        index: Value,
        *,
        capacity: Value,
        runs: Value,
        order: Value | None,
    ) -> None:
        self.e, self.shape, self.index = e, shape, index
        self.q, self.keys, self.values, begin, size, count, self.out, self.top, self.mass = buffers
        first = e.b.mul(index, runs)
        self.begin, self.size = e.at(begin, first, 4), e.at(size, first, 4)
        self.last_run = e.b.sub(runs, const(1))
        self.total = e.b.sext(e.b.load(e.at(count, index, 4), typ=I32), I64)
        self.base = e.b.mul(e.b.mul(index, capacity), const(shape.head_dim))
        self.order = None if order is None else e.at(order, e.b.mul(index, capacity), 4)
        self.parts = shape.head_dim // e.width
        self.places = e.array(I64, KEY_BLOCK)
        self.run, self.offset = e.variable(I64, const(0)), e.variable(I64, const(0))

    def _slot(self, slots: Value, i: Value, part: int) -> Value:
        """Return where a part of the i-th key or value of the block lies."""
        e = self.e
        place = e.b.load(e.at(self.places, i, 8), typ=I64)
        at = e.b.add(self.base, e.b.mul(place, const(self.shape.head_dim)))
        return e.at(slots, e.b.add(at, const(part * e.width)), ITEM_BYTES[self.shape.kind])

    def _head_place(self, buffer: Value, g: int, part: int) -> Value:
        group, dim = self.shape.group, self.shape.head_dim
        low = self.e.b.mul(self.index, const(group * dim))
        return self.e.at(buffer, self.e.b.add(low, const(g * dim + part * self.e.width)), 4)

    def _fill(self, count: Value) -> None:
        """List the places of the next block; behind its end those of an earlier one stay."""
        e, b = self.e, self.e.b
        with e.loop(const(0), count, const(1)) as i:
            run, offset = b.load(self.run, typ=I64), b.load(self.offset, typ=I64)
            begin = b.sext(b.load(e.at(self.begin, run, 4), typ=I32), I64)
            size = b.sext(b.load(e.at(self.size, run, 4), typ=I32), I64)
            place = b.add(begin, offset)
            if self.order is not None:
                place = b.sext(b.load(e.at(self.order, place, 4), typ=I32), I64)
            b.store(place, e.at(self.places, i, 8))
            after = b.add(offset, const(1))
            ends = b.icmp_signed(">=", after, size)
            b.store(b.select(ends, const(0), after), self.offset)
            following = e.minimum(b.add(run, const(1)), self.last_run)
            b.store(b.select(ends, following, run), self.run)

    def attend(self) -> None:
        """Attend from the heads of the group to all runs."""
        e, b, group = self.e, self.e.b, self.shape.group
        zero, lowest = e.splat_const(0.0), ir.Constant(F32, LOWEST)
        with e.loop(const(0), const(KEY_BLOCK), const(1)) as i:
            b.store(const(0), e.at(self.places, i, 8))
        top = [e.variable(F32, lowest) for _ in range(group)]
        mass = [e.variable(e.vector, zero) for _ in range(group)]
        sums = [[e.variable(e.vector, zero) for _ in range(self.parts)] for _ in range(group)]
        scores = [e.array(F32, KEY_BLOCK) for _ in range(group)]
        with e.loop(const(0), self.total, const(KEY_BLOCK)) as start:
            count = e.minimum(b.sub(self.total, start), const(KEY_BLOCK))
            self._fill(count)
            queries = [
                [e.load(self._head_place(self.q, g, part), "float32") for part in range(self.parts)]
                for g in range(group)
            ]
            with e.loop(const(0), count, const(e.width)) as i:
                self._score(queries, scores, i, count)
            for g in range(group):
                self._soften(scores[g], count, top[g], mass[g], sums[g])
            with e.loop(const(0), count, const(1)) as i:
                parts = [
                    e.load(self._slot(self.values, i, part), self.shape.kind)
                    for part in range(self.parts)
                ]
                for g in range(group):
                    weight = e.splat(b.load(e.at(scores[g], i, 4), typ=F32))
                    for part in range(self.parts):
                        total = b.load(sums[g][part], typ=e.vector)
                        b.store(e.fma(weight, parts[part], total), sums[g][part])
        row = b.mul(self.index, const(group))
        for g in range(group):
            at = b.add(row, const(g))
            b.store(b.load(top[g], typ=F32), e.at(self.top, at, 4))
            b.store(e.sum_lanes(b.load(mass[g], typ=e.vector)), e.at(self.mass, at, 4))
            for part in range(self.parts):
                e.store(b.load(sums[g][part], typ=e.vector), self._head_place(self.out, g, part))

    def _score(
        self, queries: list[list[Value]], scores: list[Value], i: Value, count: Value
    ) -> None:
        """Score one vector of keys; those behind the last one get the lowest score."""
        e, b = self.e, self.e.b

        def products(lane: int) -> list[Value]:
            at = b.add(i, const(lane))
            parts = [
                e.load(self._slot(self.keys, at, part), self.shape.kind)
                for part in range(self.parts)
            ]
            totals: list[Value] = []
            for query in queries:
                total = b.fmul(query[0], parts[0])
                for part in range(1, self.parts):
                    total = e.fma(query[part], parts[part], total)
                totals.append(total)
            return totals

        mask = e.lanes_below(b.sub(count, i))
        lanes = [products(lane) for lane in range(e.width)]
        for g, row in enumerate(zip(*lanes, strict=True)):
            kept = b.select(mask, e.sum_vectors(row), e.splat_const(LOWEST))
            e.store(kept, e.at(scores[g], i, 4))

    def _soften(
        self, scores: Value, count: Value, top: Value, mass: Value, sums: list[Value]
    ) -> None:
        """Turn a block's scores into weights relative to the running maximum."""
        e, b = self.e, self.e.b
        best = e.variable(e.vector, e.splat_const(LOWEST))
        b.store(e.splat_const(LOWEST), best)
        with e.loop(const(0), count, const(e.width)) as i:
            row = e.load(e.at(scores, i, 4), "float32")
            b.store(e.larger(b.load(best, typ=e.vector), row), best)
        before = b.load(top, typ=F32)
        highest = e.max_lanes(b.load(best, typ=e.vector))
        after = b.select(b.fcmp_ordered(">", highest, before), highest, before)
        b.store(after, top)
        fade = e.exp(e.splat(b.fsub(before, after)))
        b.store(b.fmul(b.load(mass, typ=e.vector), fade), mass)
        for part in sums:
            b.store(b.fmul(b.load(part, typ=e.vector), fade), part)
        shift = e.splat(after)
        with e.loop(const(0), count, const(e.width)) as i:
            place = e.at(scores, i, 4)
            weight = e.exp(b.fsub(e.load(place, "float32"), shift))
            e.store(weight, place)
            b.store(b.fadd(b.load(mass, typ=e.vector), weight), mass)
