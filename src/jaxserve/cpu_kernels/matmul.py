"""Products of a few rows with large weights: what decoding spends its time on.

Weights are read once, as they lie, and widened to float32 on the way. Each result is summed in one
order whatever the number of rows and threads, so a row's result does not depend on its neighbours.
Quantised weights are multiplied as the plain numbers that they are; scales come afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from llvmlite import ir

from jaxserve.cpu_kernels import block_matmul, blocks_pay, ffi
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

_CHUNKS_PER_THREAD = 2
"""Chunks are long, so that memory is read in long runs, yet a thread that is held up loses few."""
_DEPTH = 12
"""Rows of the weights between two visits to the sums; prefetching runs as far ahead."""


_GROUPS = 8
"""Groups of weight rows that one tile of `x` meets before the next tile does."""
_AHEAD = 1
"""Groups by which prefetching runs ahead."""
_LINE = 64
"""Bytes that one prefetch brings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How a kernel uses the vector registers.

    Attributes:
        rows: Rows of `x`.
        tile: Most rows that are summed at once.
        across: Vectors of columns, or rows of the weights, that are summed at once.
        kind: Element type of the weights.
    """

    rows: int
    tile: int
    across: int
    kind: WeightType

    def row_tiles(self) -> list[tuple[int, int]]:
        """List the first row and the size of each tile."""
        return [(r, min(self.tile, self.rows - r)) for r in range(0, self.rows, self.tile)]


def _shape(rows: int, kind: WeightType) -> _Shape:
    registers = ffi.host().registers
    most, others = (8, 6) if registers >= 32 else (4, 4)
    tile = -(-rows // -(-rows // most))  # tiles of equal size
    return _Shape(rows=rows, tile=tile, across=min(8, (registers - others) // tile), kind=kind)


def _split(e: Emitter, total: Value, index: Value, parts: Value) -> tuple[Value, Value]:
    """Return the bounds of part `index` of `total` things."""
    low = e.b.sdiv(e.b.mul(total, index), parts)
    return low, e.b.sdiv(e.b.mul(total, e.b.add(index, const(1))), parts)


def _num_chunks(e: Emitter, tiles: Value, threads: Value) -> Value:
    return e.minimum(tiles, e.b.mul(threads, const(_CHUNKS_PER_THREAD)))


# Weights [in, out] ----------------------------------------------------------------------------


def _columns_kernel(name: str, shape: _Shape, count: int) -> ffi.Kernel:
    """`x [rows, k]` times `count` weights `[k, n_i]`."""
    columns = shape.across * ffi.host().width

    def tiles(e: Emitter, n: Value) -> Value:
        return e.b.sdiv(e.b.add(n, const(columns - 1)), const(columns))

    def num_tiles(e: Emitter, sizes: Sequence[Value]) -> Value:
        total = const(0)
        for n in sizes[1:]:
            total = e.b.add(total, tiles(e, n))
        return total

    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, parts: Value
    ) -> None:
        x, weights, outs = buffers[0], buffers[1 : 1 + count], buffers[1 + count :]
        low, high = _split(e, num_tiles(e, sizes), index, parts)
        before = const(0)
        for weight, out, n in zip(weights, outs, sizes[1:], strict=True):
            after = e.b.add(before, tiles(e, n))
            first = e.b.sub(e.maximum(low, before), before)
            last = e.b.sub(e.minimum(high, after), before)
            with e.b.if_then(e.b.icmp_signed("<", first, last)):
                span = (
                    e.b.mul(first, const(columns)),
                    e.minimum(e.b.mul(last, const(columns)), n),
                )
                _columns(e, shape, (x, weight, out), (sizes[0], n), span)
            before = after

    return ffi.Kernel(
        name=name,
        num_args=1 + count,
        num_rets=count,
        dims=[(0, 1), *((1 + i, 1) for i in range(count))],
        num_chunks=lambda e, sizes, threads: _num_chunks(e, num_tiles(e, sizes), threads),
        chunk=chunk,
    )


def _columns(
    e: Emitter,
    shape: _Shape,
    buffers: tuple[Value, Value, Value],
    sizes: tuple[Value, Value],
    span: tuple[Value, Value],
) -> None:
    """Compute the columns of `span`; the sums stay in the output between visits."""
    b, (low, high) = e.b, span
    step = shape.across * e.width
    whole = b.sub(high, b.srem(b.sub(high, low), const(step)))
    with e.loop(const(0), sizes[0], const(_DEPTH)) as k0:
        k1 = e.minimum(b.add(k0, const(_DEPTH)), sizes[0])
        for start, stop, across in ((low, whole, shape.across), (whole, high, 1)):
            with e.loop(start, stop, const(across * e.width)) as j:
                mask = e.lanes_below(b.sub(high, j)) if across == 1 else None
                for rows in shape.row_tiles():
                    tile = _ColumnTile(rows, across, shape.kind, mask)
                    tile.emit(e, buffers, sizes, j, (k0, k1))


@dataclass(frozen=True, slots=True)
class _ColumnTile:
    """Sums of some rows and some vectors of columns, held in registers."""

    rows: tuple[int, int]
    across: int
    kind: WeightType
    mask: Value | None

    def emit(
        self,
        e: Emitter,
        buffers: tuple[Value, Value, Value],
        sizes: tuple[Value, Value],
        j: Value,
        depth: tuple[Value, Value],
    ) -> None:
        """Add the products of rows `depth` of the weights, for the columns from `j` on."""
        b = e.b
        (x, weight, out), (k_size, n) = buffers, sizes
        first, count = self.rows
        places = [
            [
                e.at(out, b.add(b.mul(n, const(first + r)), b.add(j, const(v * e.width))), 4)
                for v in range(self.across)
            ]
            for r in range(count)
        ]
        is_start = b.icmp_signed("==", depth[0], const(0))
        zero = e.splat_const(0.0)
        sums = [
            [
                e.variable(
                    e.vector, b.select(is_start, zero, e.load(place, "float32", mask=self.mask))
                )
                for place in row
            ]
            for row in places
        ]
        with e.loop(*depth, const(1)) as k:
            columns = self._load(e, weight, b.add(b.mul(k, n), j))
            if first == 0:
                ahead = b.add(b.mul(b.add(k, const(_DEPTH)), n), j)
                item = ITEM_BYTES[self.kind]
                for v in range(0, self.across, max(1, _LINE // (e.width * item))):
                    e.prefetch(e.at(weight, b.add(ahead, const(v * e.width)), item))
            for r in range(count):
                at = b.add(b.mul(k_size, const(first + r)), k)
                factor = e.splat(b.load(e.at(x, at, 4), typ=F32))
                for v in range(self.across):
                    total = b.load(sums[r][v], typ=e.vector)
                    b.store(e.fma(factor, columns[v], total), sums[r][v])
        for r in range(count):
            for v in range(self.across):
                e.store(b.load(sums[r][v], typ=e.vector), places[r][v], mask=self.mask)

    def _load(self, e: Emitter, weight: Value, at: Value) -> list[Value]:
        item = ITEM_BYTES[self.kind]
        return [
            e.load(e.at(weight, e.b.add(at, const(v * e.width)), item), self.kind, mask=self.mask)
            for v in range(self.across)
        ]


def multiply(
    x: Float[Array, "rows in_size"], weights: Sequence[Float[Array, "in_size out_size"]]
) -> list[Float[Array, "rows out_size"]]:
    """Multiply rows with one or more weights, in float32.

    Args:
        x: The rows.
        weights: Of equal dtype, one that `emit.WeightType` names, as they lie in memory.

    Returns:
        One float32 product per weight.
    """
    rows, kind = x.shape[0], weight_type(weights[0].dtype)
    if blocks_pay(rows, kind):
        return block_matmul.multiply_many(x, weights)
    name = f"jaxserve_columns_{rows}_{kind}_{len(weights)}"
    ffi.register(name, lambda: _columns_kernel(name, _shape(rows, kind), len(weights)))
    outs = [jax.ShapeDtypeStruct((rows, w.shape[1]), jnp.float32) for w in weights]
    return list(jax.ffi.ffi_call(name, outs)(x.astype(jnp.float32), *weights))


# Weights [out, in] ----------------------------------------------------------------------------


def _rows_kernel(name: str, shape: _Shape) -> ffi.Kernel:
    """`x [rows, k]` times the transpose of `weight [n, k]`."""

    def num_tiles(e: Emitter, n: Value) -> Value:
        return e.b.sdiv(e.b.add(n, const(shape.across - 1)), const(shape.across))

    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, parts: Value
    ) -> None:
        n = sizes[1]
        low, high = _split(e, num_tiles(e, n), index, parts)
        start = e.b.mul(low, const(shape.across))
        stop = e.minimum(e.b.mul(high, const(shape.across)), n)
        whole = e.b.sub(stop, e.b.srem(e.b.sub(stop, start), const(shape.across)))
        for begin, end, across in ((start, whole, shape.across), (whole, stop, 1)):
            # Rows of `x` and rows of the weights take turns in the innermost cache.
            with e.loop(begin, end, const(across * _GROUPS)) as first:
                after = e.minimum(e.b.add(first, const(across * _GROUPS)), end)
                for rows in shape.row_tiles():
                    with e.loop(first, after, const(across)) as j:
                        _dot_tile(e, shape.kind, rows, across, buffers, (sizes[0], n), j)

    return ffi.Kernel(
        name=name,
        num_args=2,
        num_rets=1,
        dims=[(0, 1), (1, 0)],
        num_chunks=lambda e, sizes, threads: _num_chunks(
            e, num_tiles(e, sizes[1]), e.b.mul(threads, const(4))
        ),
        chunk=chunk,
    )


def _dot_tile(
    e: Emitter,
    kind: WeightType,
    rows: tuple[int, int],
    across: int,
    buffers: Sequence[Value],
    sizes: tuple[Value, Value],
    j: Value,
) -> None:
    """Multiply some rows with some rows of the weights, lane by lane, and add the lanes up."""
    b, (x, weight, out), (depth, n) = e.b, buffers, sizes
    first, count = rows
    zero = e.splat_const(0.0)
    sums = [[e.variable(e.vector, zero) for _ in range(across)] for _ in range(count)]
    bases_x = [b.mul(depth, const(first + r)) for r in range(count)]
    bases_w = [b.mul(depth, b.add(j, const(v))) for v in range(across)]

    def visit(k: Value, mask: Value | None) -> None:
        w = [
            e.load(e.at(weight, b.add(base, k), ITEM_BYTES[kind]), kind, mask=mask)
            for base in bases_w
        ]
        if first == 0:
            for base in bases_w:
                ahead = b.add(b.add(base, k), b.mul(depth, const(across * _AHEAD)))
                e.prefetch(e.at(weight, ahead, ITEM_BYTES[kind]))
        for r in range(count):
            part = e.load(e.at(x, b.add(bases_x[r], k), 4), "float32", mask=mask)
            for v in range(across):
                b.store(e.fma(part, w[v], b.load(sums[r][v], typ=e.vector)), sums[r][v])

    whole = b.sub(depth, b.srem(depth, const(e.width)))
    with e.loop(const(0), whole, const(e.width)) as k:
        visit(k, None)
    with b.if_then(b.icmp_signed("<", whole, depth)):
        visit(whole, e.lanes_below(b.sub(depth, whole)))
    cells = [(r, v) for r in range(count) for v in range(across)]
    for low in range(0, len(cells), e.width):
        some = cells[low : low + e.width]
        totals = e.sum_vectors([b.load(sums[r][v], typ=e.vector) for r, v in some])
        for lane, (r, v) in enumerate(some):
            at = b.add(b.mul(n, const(first + r)), b.add(j, const(v)))
            total = b.extract_element(totals, ir.Constant(I32, lane))
            b.store(total, e.at(out, at, 4), align=4)


def multiply_transposed(
    x: Float[Array, "rows in_size"], weight: Float[Array, "out_size in_size"]
) -> Float[Array, "rows out_size"]:
    """Multiply a few rows with a transposed weight, such as a tied embedding, in float32.

    Args:
        x: The rows.
        weight: Of a dtype that `emit.WeightType` names, as it lies in memory.
    """
    rows, kind = x.shape[0], weight_type(weight.dtype)
    name = f"jaxserve_rows_{rows}_{kind}"
    ffi.register(name, lambda: _rows_kernel(name, _shape(rows, kind)))
    out = jax.ShapeDtypeStruct((rows, weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(name, out)(x.astype(jnp.float32), weight)
