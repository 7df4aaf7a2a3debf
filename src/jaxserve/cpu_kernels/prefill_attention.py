"""Attention of prefill chunks against dense slots, tile by tile, with nothing copied.

A row meets its keys in blocks that begin at position 0, whatever the chunk it came in, so the
result does not depend on how a prompt was cut up. Source: the tiling and running softmax of
FlashAttention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

_TOKENS = 32
"""Tokens of one chunk of work."""
_PANEL = 4 * KEY_BLOCK
"""Keys that are transposed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape(Heads):
    """Sizes that are fixed when the kernel is built.

    Attributes:
        q_block: Most tokens of a prefill block.
        rows: Query rows that share a tile.
        across: Vectors of keys, or of the head, in a tile.
    """

    q_block: int
    rows: int
    across: int

    @property
    def parts(self) -> int:
        """Chunks of one block and key-value head."""
        return -(-self.q_block // _TOKENS)


def append(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    blocks: Int[Array, "blocks 4"],
) -> tuple[Array, Array]:
    """Write prefill keys and values into their slots.

    Args:
        k: Keys, rotated.
        v: Values.
        keys: Slots, float32 or bfloat16; changed in place where the caller donates them.
        values: Likewise.
        blocks: First token, slot, position and number of tokens of each block; unused ones have
            no tokens.
    """
    kv_heads, head_dim = k.shape[1:]
    kind = weight_type(keys.dtype)
    name = f"jaxserve_append_{kv_heads}_{head_dim}_{kind}"
    shape = _Shape(
        q_heads=kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_block=_TOKENS,
        kind=kind,
        rows=1,
        across=1,
    )
    ffi.register(name, lambda: _append_kernel(name, shape))
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)]
    call = jax.ffi.ffi_call(name, outs, input_output_aliases={2: 0, 3: 1})
    keys, values = call(k.astype(jnp.float32), v.astype(jnp.float32), keys, values, blocks)
    return keys, values


def prefill(
    q: Float[Array, "tokens q_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    blocks: Int[Array, "blocks 4"],
    *,
    q_block: int,
    scale: float,
) -> Float[Array, "tokens q_heads head_dim"]:
    """Attend causally from the tokens of some blocks to all keys of their slots so far.

    Args:
        q: Queries, rotated.
        keys: Slots that already hold the blocks' own keys.
        values: Likewise.
        blocks: As for `append`.
        q_block: Most tokens of a block.
        scale: Multiplies the scores.

    Returns:
        The float32 outputs; those of tokens of no block are undefined.
    """
    _, q_heads, head_dim = q.shape
    kv_heads, kind = keys.shape[1], weight_type(keys.dtype)
    name = f"jaxserve_prefill_{q_heads}_{kv_heads}_{head_dim}_{q_block}_{kind}"
    rows, across = (6, 4) if ffi.host().registers >= 32 else (6, 2)
    shape = _Shape(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q_block=q_block,
        kind=kind,
        rows=rows,
        across=across,
    )
    ffi.register(name, lambda: _prefill_kernel(name, shape))
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    return jax.ffi.ffi_call(name, out)(q.astype(jnp.float32) * scale, keys, values, blocks)


def _append_kernel(name: str, shape: _Shape) -> ffi.Kernel:
    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, _parts: Value
    ) -> None:
        k, v, _, _, blocks, keys, values = buffers
        block = _Block(e, shape, blocks, index, sizes[1])
        with e.loop(const(0), block.length, const(1)) as i:
            token = e.b.add(block.start, i)
            at = e.b.add(e.b.mul(token, const(shape.kv_heads)), block.head)
            low = e.b.mul(at, const(shape.head_dim))
            for new, slots in ((k, keys), (v, values)):
                for part in range(shape.head_dim // e.width):
                    place = e.at(new, e.b.add(low, const(part * e.width)), 4)
                    target = block.slot(slots, e.b.add(block.position, i), part)
                    e.store_as(e.load(place, "float32"), target, shape.kind)

    return ffi.Kernel(
        name=name,
        num_args=5,
        num_rets=2,
        dims=[(4, 0), (2, 2)],
        num_chunks=lambda e, sizes, _threads: e.b.mul(sizes[0], const(shape.kv_heads)),
        chunk=chunk,
    )


def _prefill_kernel(name: str, shape: _Shape) -> ffi.Kernel:
    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, parts: Value
    ) -> None:
        q, keys, values, blocks, out = buffers
        b = e.b
        # The last chunks have the most keys; they go first.
        turned = b.sub(b.sub(parts, const(1)), index)
        block = _Block(e, shape, blocks, b.sdiv(turned, const(shape.parts)), sizes[1])
        first = b.mul(b.srem(turned, const(shape.parts)), const(_TOKENS))
        with b.if_then(b.icmp_signed("<", first, block.length)):
            count = e.minimum(b.sub(block.length, first), const(_TOKENS))
            _Chunk(e, shape, block, first, count).emit(q, keys, values, out)

    return ffi.Kernel(
        name=name,
        num_args=4,
        num_rets=1,
        dims=[(3, 0), (1, 2)],
        num_chunks=lambda e, sizes, _threads: e.b.mul(
            sizes[0], const(shape.kv_heads * shape.parts)
        ),
        chunk=chunk,
    )


class _Block:
    """One block and key-value head.

    Args:
        e: Where instructions go.
        shape: Sizes.
        blocks: Their table.
        index: block * kv_heads + head.
        capacity: Tokens of a slot.
    """

    def __init__(
        self, e: Emitter, shape: _Shape, blocks: Value, index: Value, capacity: Value
    ) -> None:
        b = e.b
        self._e, self._shape = e, shape
        row = b.mul(b.sdiv(index, const(shape.kv_heads)), const(4))
        self.head = b.srem(index, const(shape.kv_heads))
        self.start, slot, self.position, self.length = (
            b.sext(b.load(e.at(blocks, b.add(row, const(i)), 4), typ=I32), I64) for i in range(4)
        )
        at = b.add(b.mul(slot, const(shape.kv_heads)), self.head)
        self._base = b.mul(b.mul(at, capacity), const(shape.head_dim))

    def slot(self, slots: Value, position: Value, part: int) -> Value:
        """Return the address of one vector of the key or value at a position."""
        e, dim = self._e, self._shape.head_dim
        at = e.b.add(self._base, e.b.mul(position, const(dim)))
        return e.at(slots, e.b.add(at, const(part * e.width)), ITEM_BYTES[self._shape.kind])


class _Chunk:
    """Emits the attention of some tokens of a block, for one key-value head.

    Query rows are the tokens' heads of the group, token by token.

    Args:
        e: Where instructions go.
        shape: Sizes.
        block: The block.
        first: First token, counted from the block's.
        count: Tokens.
    """

    def __init__(
        self, e: Emitter, shape: _Shape, block: _Block, first: Value, count: Value
    ) -> None:
        b = e.b
        self.e, self.shape, self.block = e, shape, block
        self.token = b.add(block.start, first)
        self.position = b.add(block.position, first)
        self.num_rows = b.mul(count, const(shape.group))
        self.num_keys = b.add(self.position, count)
        most = -(-_TOKENS * shape.group // shape.rows) * shape.rows
        self.top, self.mass = e.array(F32, most), e.array(F32, most)
        self.sums = e.array(F32, most * shape.head_dim)
        self.panel = e.array(F32, _PANEL * shape.head_dim)
        self.weights = e.array(F32, shape.rows * KEY_BLOCK)
        self.most = most

    def emit(self, q: Value, keys: Value, values: Value, out: Value) -> None:
        """Emit everything."""
        e, b, shape = self.e, self.e.b, self.shape
        with e.loop(const(0), const(self.most), const(1)) as row:
            b.store(ir.Constant(F32, LOWEST), e.at(self.top, row, 4))
            b.store(ir.Constant(F32, 0.0), e.at(self.mass, row, 4))
        with e.loop(const(0), const(self.most * shape.head_dim), const(e.width)) as i:
            e.store(e.splat_const(0.0), e.at(self.sums, i, 4))
        with e.loop(const(0), self.num_keys, const(_PANEL)) as low:
            high = e.minimum(b.add(low, const(_PANEL)), self.num_keys)
            self._transpose(keys, low, high)
            with e.loop(const(0), self.num_rows, const(shape.rows)) as row:
                tile = [self._row(row, r) for r in range(shape.rows)]
                end = e.minimum(high, b.add(self._position(tile[-1]), const(1)))
                with e.loop(low, end, const(KEY_BLOCK)) as key:
                    self._visit(tile, row, q, values, (low, key, end))
        with e.loop(const(0), self.num_rows, const(1)) as row:
            total = e.splat(b.load(e.at(self.mass, row, 4), typ=F32))
            for part in range(shape.head_dim // e.width):
                at = b.add(b.mul(row, const(shape.head_dim)), const(part * e.width))
                share = b.fdiv(e.load(e.at(self.sums, at, 4), "float32"), total)
                e.store(share, self._place(out, row, const(part * e.width)))

    def _row(self, first: Value, r: int) -> Value:
        """Return row `first + r`, or the last one where the tile is not full."""
        return self.e.minimum(self.e.b.add(first, const(r)), self.e.b.sub(self.num_rows, const(1)))

    def _position(self, row: Value) -> Value:
        return self.e.b.add(self.position, self.e.b.sdiv(row, const(self.shape.group)))

    def _place(self, buffer: Value, row: Value, offset: Value) -> Value:
        """Return an address in queries or outputs `[tokens, q_heads, head_dim]`."""
        b, shape = self.e.b, self.shape
        token = b.add(self.token, b.sdiv(row, const(shape.group)))
        head = b.add(b.mul(self.block.head, const(shape.group)), b.srem(row, const(shape.group)))
        at = b.add(b.mul(token, const(shape.q_heads)), head)
        return self.e.at(buffer, b.add(b.mul(at, const(shape.head_dim)), offset), 4)

    def _transpose(self, keys: Value, low: Value, high: Value) -> None:
        """Lay keys side by side: the panel is `[head_dim, keys]`."""
        e, b = self.e, self.e.b
        with e.loop(low, high, const(e.width)) as key:
            column = b.sub(key, low)
            for part in range(self.shape.head_dim // e.width):
                square = [
                    e.load(self.block.slot(keys, b.add(key, const(i)), part), self.shape.kind)
                    for i in range(e.width)
                ]
                for i, line in enumerate(e.transpose(square)):
                    at = b.add(const((part * e.width + i) * _PANEL), column)
                    e.store(line, e.at(self.panel, at, 4))

    def _visit(
        self,
        tile: list[Value],
        row: Value,
        q: Value,
        values: Value,
        span: tuple[Value, Value, Value],
    ) -> None:
        """Let the rows of a tile see one block of keys."""
        e, shape = self.e, self.shape
        low, key, end = span
        self._score(tile, q, e.b.sub(key, low))
        fades = [self._soften(each, row, r, key) for r, each in enumerate(tile)]
        width = shape.across * e.width
        for column in range(0, shape.head_dim, width):
            parts = min(shape.across, (shape.head_dim - column) // e.width)
            self._gather(row, values, (key, end), fades, column // e.width, parts)

    def _score(self, tile: list[Value], q: Value, column: Value) -> None:
        e, b, shape = self.e, self.e.b, self.shape
        lines = [self._place(q, each, const(0)) for each in tile]
        for low in range(0, KEY_BLOCK, shape.across * e.width):
            totals = [
                [e.variable(e.vector, e.splat_const(0.0)) for _ in range(shape.across)]
                for _ in tile
            ]
            with e.loop(const(0), const(shape.head_dim), const(1)) as d:
                at = b.add(b.mul(d, const(_PANEL)), b.add(column, const(low)))
                parts = [
                    e.load(e.at(self.panel, b.add(at, const(v * e.width)), 4), "float32")
                    for v in range(shape.across)
                ]
                for line, row in zip(lines, totals, strict=True):
                    factor = e.splat(b.load(e.at(line, d, 4), typ=F32))
                    for part, total in zip(parts, row, strict=True):
                        b.store(e.fma(factor, part, b.load(total, typ=e.vector)), total)
            for r, row in enumerate(totals):
                for v, total in enumerate(row):
                    at = const(r * KEY_BLOCK + low + v * e.width)
                    e.store(b.load(total, typ=e.vector), e.at(self.weights, at, 4))

    def _soften(self, row: Value, first: Value, r: int, key: Value) -> Value:
        """Turn a row's scores into weights; return by how much what it has gathered fades."""
        e, b = self.e, self.e.b
        seen = b.sub(b.add(self._position(row), const(1)), key)
        places = [
            e.at(self.weights, const(r * KEY_BLOCK + v), 4) for v in range(0, KEY_BLOCK, e.width)
        ]
        masks = [e.lanes_below(b.sub(seen, const(v))) for v in range(0, KEY_BLOCK, e.width)]
        scores = [
            b.select(mask, e.load(place, "float32"), e.splat_const(LOWEST))
            for mask, place in zip(masks, places, strict=True)
        ]
        best = scores[0]
        for part in scores[1:]:
            best = e.larger(best, part)
        # A tile that is not full repeats its last row; each copy has a place of its own.
        at = b.add(first, const(r))
        top, mass = e.at(self.top, at, 4), e.at(self.mass, at, 4)
        before, highest = b.load(top, typ=F32), e.max_lanes(best)
        after = b.select(b.fcmp_ordered(">", highest, before), highest, before)
        b.store(after, top)
        fade, shift = e.exp(e.splat(b.fsub(before, after))), e.splat(after)
        total = e.splat_const(0.0)
        for score, mask, place in zip(scores, masks, places, strict=True):
            weight = b.select(mask, e.exp(b.fsub(score, shift)), e.splat_const(0.0))
            e.store(weight, place)
            total = b.fadd(total, weight)
        faded = b.fmul(b.load(mass, typ=F32), b.extract_element(fade, ir.Constant(I32, 0)))
        b.store(b.fadd(faded, e.sum_lanes(total)), mass)
        return fade

    def _gather(
        self,
        row: Value,
        values: Value,
        keys: tuple[Value, Value],
        fades: list[Value],
        part: int,
        parts: int,
    ) -> None:
        """Add the weighted values to some vectors of each row."""
        e, b, shape = self.e, self.e.b, self.shape
        places = [
            [
                e.at(
                    self.sums,
                    b.add(
                        b.mul(b.add(row, const(r)), const(shape.head_dim)),
                        const((part + v) * e.width),
                    ),
                    4,
                )
                for v in range(parts)
            ]
            for r in range(shape.rows)
        ]
        totals = [
            [e.variable(e.vector, b.fmul(e.load(place, "float32"), fade)) for place in line]
            for line, fade in zip(places, fades, strict=True)
        ]
        key, end = keys
        stop = e.minimum(b.add(key, const(KEY_BLOCK)), end)
        with e.loop(key, stop, const(1)) as i:
            found = [e.load(self.block.slot(values, i, part + v), shape.kind) for v in range(parts)]
            for r in range(shape.rows):
                at = b.add(const(r * KEY_BLOCK), b.sub(i, key))
                weight = e.splat(b.load(e.at(self.weights, at, 4), typ=F32))
                for v in range(parts):
                    b.store(
                        e.fma(weight, found[v], b.load(totals[r][v], typ=e.vector)), totals[r][v]
                    )
        for r in range(shape.rows):
            for v in range(parts):
                e.store(b.load(totals[r][v], typ=e.vector), places[r][v])
