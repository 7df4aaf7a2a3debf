"""Attention of decoding rows against dense slots: append one key and value, then attend.

Each row reads its own keys and no more, whatever the lengths of the others, and nothing is copied.
A row's result does not depend on its neighbours. Source: the running softmax of FlashAttention.
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
    ITEM_BYTES,
    Emitter,
    Value,
    const,
    weight_type,
)
from jaxserve.cpu_kernels.heads import KEY_BLOCK, LOWEST, Heads, soften


def decode(
    q: Float[Array, "rows q_heads head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    position: Int[Array, " rows"],
    *,
    scale: float,
) -> tuple[Float[Array, "rows q_heads head_dim"], Array, Array]:
    """Append one token per row to the first slots and attend from it.

    Args:
        q: Queries, rotated.
        k: Keys of the same tokens, rotated.
        v: Their values.
        keys: Slots, float32 or bfloat16; changed in place where the caller donates them.
        values: Likewise.
        position: Position of each row's token; -1 for a row that does nothing and yields zeros.
        scale: Multiplies the scores.

    Returns:
        The float32 outputs and the slots.
    """
    _, q_heads, head_dim = q.shape
    kind = weight_type(keys.dtype)
    shape = Heads(q_heads=q_heads, kv_heads=k.shape[1], head_dim=head_dim, kind=kind)
    name = f"jaxserve_decode_{q_heads}_{k.shape[1]}_{head_dim}_{kind}"
    ffi.register(name, lambda: _kernel(name, shape))
    outs = [
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        jax.ShapeDtypeStruct(values.shape, values.dtype),
    ]
    call = jax.ffi.ffi_call(name, outs, input_output_aliases={3: 1, 4: 2})
    scaled = q.astype(jnp.float32) * scale
    out, keys, values = call(
        scaled, k.astype(jnp.float32), v.astype(jnp.float32), keys, values, position
    )
    return out, keys, values


def _kernel(name: str, shape: Heads) -> ffi.Kernel:
    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        q, k, v, _, _, position, out, keys, values = buffers
        row = e.b.sdiv(index, const(shape.kv_heads))
        place = e.b.load(e.at(position, row, 4), typ=I32)
        at = e.b.sext(place, ir.IntType(64))
        with e.b.if_else(e.b.icmp_signed("<", at, const(0))) as (idle, busy):
            with idle:
                zero = e.splat_const(0.0)
                low = e.b.mul(index, const(shape.group * shape.head_dim))
                for i in range(shape.group * shape.head_dim // e.width):
                    e.store(zero, e.at(out, e.b.add(low, const(i * e.width)), 4))
            with busy:
                head = _Head(e, shape, index, sizes[1])
                head.append(k, keys, at)
                head.append(v, values, at)
                head.attend(q, keys, values, out, e.b.add(at, const(1)))

    return ffi.Kernel(
        name=name,
        num_args=6,
        num_rets=3,
        dims=[(0, 0), (3, 2)],
        num_chunks=lambda e, sizes, _threads: e.b.mul(sizes[0], const(shape.kv_heads)),
        chunk=chunk,
    )


class _Head:
    """Emits the work of one row and one key-value head.

    Args:
        e: Where instructions go.
        shape: Heads and sizes.
        index: row * kv_heads + head; slots and rows are numbered alike.
        capacity: Tokens of a slot.
    """

    def __init__(self, e: Emitter, shape: Heads, index: Value, capacity: Value) -> None:
        self.e, self.shape, self.index = e, shape, index
        self.base = e.b.mul(e.b.mul(index, capacity), const(shape.head_dim))
        self.parts = shape.head_dim // e.width

    def _slot(self, slots: Value, position: Value, part: int) -> Value:
        e, dim = self.e, self.shape.head_dim
        at = e.b.add(self.base, e.b.mul(position, const(dim)))
        return e.at(slots, e.b.add(at, const(part * e.width)), ITEM_BYTES[self.shape.kind])

    def append(self, new: Value, slots: Value, position: Value) -> None:
        """Write the new token's key or value."""
        e, dim = self.e, self.shape.head_dim
        low = e.b.mul(self.index, const(dim))
        for part in range(self.parts):
            value = e.load(e.at(new, e.b.add(low, const(part * e.width)), 4), "float32")
            e.store_as(value, self._slot(slots, position, part), self.shape.kind)

    def attend(self, q: Value, keys: Value, values: Value, out: Value, length: Value) -> None:
        """Attend from the heads of the group to the first `length` keys."""
        e, b, group = self.e, self.e.b, self.shape.group
        zero, lowest = e.splat_const(0.0), ir.Constant(F32, LOWEST)
        q_low = b.mul(self.index, const(group * self.shape.head_dim))

        def head_place(buffer: Value, g: int, part: int) -> Value:
            at = b.add(q_low, const(g * self.shape.head_dim + part * e.width))
            return e.at(buffer, at, 4)

        top = [e.variable(F32, lowest) for _ in range(group)]
        mass = [e.variable(e.vector, zero) for _ in range(group)]
        sums = [[e.variable(e.vector, zero) for _ in range(self.parts)] for _ in range(group)]
        scores = [e.array(F32, KEY_BLOCK) for _ in range(group)]
        with e.loop(const(0), length, const(KEY_BLOCK)) as start:
            count = e.minimum(b.sub(length, start), const(KEY_BLOCK))
            queries = [
                [e.load(head_place(q, g, part), "float32") for part in range(self.parts)]
                for g in range(group)
            ]
            with e.loop(const(0), count, const(e.width)) as i:
                self._score(queries, keys, scores, start, i, count)
            for g in range(group):
                soften(e, scores[g], count, top[g], mass[g], sums[g])
            with e.loop(const(0), count, const(1)) as i:
                at = b.add(start, i)
                parts = [
                    e.load(self._slot(values, at, part), self.shape.kind)
                    for part in range(self.parts)
                ]
                for g in range(group):
                    weight = e.splat(b.load(e.at(scores[g], i, 4), typ=F32))
                    for part in range(self.parts):
                        total = b.load(sums[g][part], typ=e.vector)
                        b.store(e.fma(weight, parts[part], total), sums[g][part])
        for g in range(group):
            total = e.splat(e.sum_lanes(b.load(mass[g], typ=e.vector)))
            for part in range(self.parts):
                share = b.fdiv(b.load(sums[g][part], typ=e.vector), total)
                e.store(share, head_place(out, g, part))

    def _score(
        self,
        queries: list[list[Value]],
        keys: Value,
        scores: list[Value],
        start: Value,
        i: Value,
        count: Value,
    ) -> None:
        """Score one vector of keys; those behind the last one get the lowest score."""
        e, b = self.e, self.e.b

        def products(lane: int) -> list[Value]:
            at = b.add(b.add(start, i), const(lane))
            parts = [e.load(self._slot(keys, at, p), self.shape.kind) for p in range(self.parts)]
            totals: list[Value] = []
            for query in queries:
                total = b.fmul(query[0], parts[0])
                for p in range(1, self.parts):
                    total = e.fma(query[p], parts[p], total)
                totals.append(total)
            return totals

        mask = e.lanes_below(b.sub(count, i))
        lanes = [products(lane) for lane in range(e.width)]
        for g, row in enumerate(zip(*lanes, strict=True)):
            kept = b.select(mask, e.sum_vectors(row), e.splat_const(LOWEST))
            e.store(kept, e.at(scores[g], i, 4))
