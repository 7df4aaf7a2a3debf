"""Products of many rows with large weights: what prefill spends its time on.

A panel of the weights, as wide as two vectors, is copied so that it lies in one piece in a near
cache, and all rows pass over it. Each result is summed in ascending order of the inner dimension,
as `matmul` sums it too, so a row's result depends neither on its neighbours nor on their number.
Source: the blocking of K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix
Multiplication" (2008), without its copy of the left side: rows are read as they lie.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from llvmlite import ir

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.emit import (
    F32,
    I64,
    ITEM_BYTES,
    POINTER,
    VOID,
    Emitter,
    Value,
    WeightType,
    const,
    weight_type,
)

_PANEL_BYTES = 36 << 10
"""Most bytes of a panel."""
_ROWS_BYTES = 900 << 10
"""Most bytes of the parts of rows that pass over a chunk's panels one after the other."""
_ACROSS = 2
"""Vectors of a panel's width."""
_CHUNKS_PER_THREAD = 12
"""The last chunk, on which one thread works alone, should be short."""


def _tile_rows() -> int:
    """Return how many rows are summed at once.

    Their sums fill the registers, but for the panel's vectors and a factor.
    """
    host = ffi.host()
    return (host.registers - _ACROSS - (host.registers < 32) - 1) // _ACROSS


def _columns() -> int:
    return _ACROSS * ffi.host().width


def _depth() -> int:
    """Return the most rows of a panel."""
    return _PANEL_BYTES // (4 * _columns())


def _rounded_up(e: Emitter, value: Value, unit: int) -> Value:
    """Return `value / unit`, rounded up."""
    return e.b.sdiv(e.b.add(value, const(unit - 1)), const(unit))


def _cut(e: Emitter, total: Value, index: Value, count: Value) -> tuple[Value, Value]:
    """Return the bounds of one of `count` runs of about equal length."""
    b = e.b
    return (
        b.sdiv(b.mul(total, index), count),
        b.sdiv(b.mul(total, b.add(index, const(1))), count),
    )


def _kernel(name: str, kind: WeightType, count: int) -> ffi.Kernel:
    """`x [rows, k]` times `count` weights `[k, n_i]`."""

    def num_panels(e: Emitter, sizes: Sequence[Value]) -> Value:
        total = const(0)
        for n in sizes[2:]:
            total = e.b.add(total, _rounded_up(e, n, _columns()))
        return total

    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, parts: Value
    ) -> None:
        b = e.b
        x, weights, outs = buffers[0], buffers[1 : 1 + count], buffers[1 + count :]
        rows, inner = sizes[:2]
        panel = e.array(F32, _depth() * _columns())
        pass_rows = _PanelFunction(e, kind).function
        low, high = _cut(e, num_panels(e, sizes), index, parts)
        # Parts of equal length: a short one would load and store its sums for little.
        num_steps = _rounded_up(e, inner, _depth())
        tiles = _rounded_up(e, rows, _tile_rows())
        num_blocks = _rounded_up(e, rows, max(1, _ROWS_BYTES // (4 * _depth())))
        with e.loop(const(0), num_blocks, const(1)) as block:
            top, bottom = (b.mul(t, const(_tile_rows())) for t in _cut(e, tiles, block, num_blocks))
            bottom = e.minimum(bottom, rows)
            with e.loop(const(0), num_steps, const(1)) as step:
                part = _cut(e, inner, step, num_steps)
                before = const(0)
                for weight, out, n in zip(weights, outs, sizes[2:], strict=True):
                    after = b.add(before, _rounded_up(e, n, _columns()))
                    first = b.sub(e.maximum(low, before), before)
                    last = b.sub(e.minimum(high, after), before)
                    with e.loop(first, last, const(1)) as number:
                        column = b.mul(number, const(_columns()))
                        where = [inner, n, column, *part, top, bottom]
                        b.call(pass_rows, [x, weight, out, panel, *where])
                    before = after

    return ffi.Kernel(
        name=name,
        num_args=1 + count,
        num_rets=count,
        dims=[(0, 0), (0, 1), *((1 + i, 1) for i in range(count))],
        num_chunks=lambda e, sizes, threads: e.minimum(
            num_panels(e, sizes), e.b.mul(threads, const(_CHUNKS_PER_THREAD))
        ),
        chunk=chunk,
    )


class _PanelFunction:
    """A function that copies a part of a panel and lets some rows pass.

    Attributes:
        function: Takes the addresses of `x`, weight, result and panel, then the inner dimension,
            the weight's columns, the panel's first column, and the bounds of the part and the rows.
    """

    def __init__(self, caller: Emitter, kind: WeightType) -> None:
        """Add the function to the caller's module."""
        signature = ir.FunctionType(VOID, [POINTER] * 4 + [I64] * 7)
        self.function = ir.Function(caller.function.module, signature, "panel")
        self.function.linkage = "internal"
        self.function.attributes.add("noinline")
        self._kind: WeightType = kind
        self._x, self._weight, self._out, self._panel = self.function.args[:4]
        self._inner, self._n, self._column = self.function.args[4:7]
        self._part, self._rows = self.function.args[7:9], self.function.args[9:]
        self._e = e = Emitter(self.function, caller.width)
        end = e.b.add(self._column, const(_columns()))
        with e.b.if_else(e.b.icmp_signed("<=", end, self._n)) as (is_whole, is_narrow):
            with is_whole:
                self._pass([None] * _ACROSS)
            with is_narrow:
                left = e.b.sub(self._n, self._column)
                self._pass(
                    [e.lanes_below(e.b.sub(left, const(v * e.width))) for v in range(_ACROSS)]
                )
        e.b.ret_void()

    def _pass(self, masks: Sequence[Value | None]) -> None:
        self._copy(masks)
        first, end = self._rows
        with self._e.loop(first, end, const(_tile_rows())) as row:
            self._tile(row, masks)

    def _copy(self, masks: Sequence[Value | None]) -> None:
        e, b, item = self._e, self._e.b, ITEM_BYTES[self._kind]
        low, high = self._part
        with e.loop(low, high, const(1)) as k:
            place = b.mul(b.sub(k, low), const(_columns()))
            base = b.add(b.mul(k, self._n), self._column)
            for v, mask in enumerate(masks):
                shift = const(v * e.width)
                found = e.load(e.at(self._weight, b.add(base, shift), item), self._kind, mask=mask)
                e.store(found, e.at(self._panel, b.add(place, shift), 4))

    def _tile(self, first: Value, masks: Sequence[Value | None]) -> None:
        """Add the products of a part of the panel to the sums of some rows."""
        e, b = self._e, self._e.b
        low, high = self._part
        last = b.sub(self._rows[1], const(1))
        # Where rows run out, the last one takes the place of those that are missing.
        rows = [e.minimum(b.add(first, const(r)), last) for r in range(_tile_rows())]
        places = [
            [
                e.at(
                    self._out,
                    b.add(b.mul(row, self._n), b.add(self._column, const(v * e.width))),
                    4,
                )
                for v in range(_ACROSS)
            ]
            for row in rows
        ]
        zero = e.splat_const(0.0)
        sums = [[e.variable(e.vector, zero) for _ in masks] for _ in rows]
        for line in sums:
            for total in line:
                b.store(zero, total)
        with b.if_then(b.icmp_signed(">", low, const(0))):
            for line, slots in zip(sums, places, strict=True):
                for total, place, mask in zip(line, slots, masks, strict=True):
                    b.store(e.load(place, "float32", mask=mask), total)
        bases = [e.at(self._x, b.add(b.mul(row, self._inner), low), 4) for row in rows]
        with e.loop(const(0), b.sub(high, low), const(1)) as k:
            place = b.mul(k, const(_columns()))
            columns = [
                e.load(e.at(self._panel, b.add(place, const(v * e.width)), 4), "float32")
                for v in range(_ACROSS)
            ]
            for base, line in zip(bases, sums, strict=True):
                factor = e.splat(b.load(e.at(base, k, 4), typ=F32))
                for column, total in zip(columns, line, strict=True):
                    b.store(e.fma(factor, column, b.load(total, typ=e.vector)), total)
        for line, slots in zip(sums, places, strict=True):
            for total, place, mask in zip(line, slots, masks, strict=True):
                e.store(b.load(total, typ=e.vector), place, mask=mask)


def multiply_many(
    x: Float[Array, "rows in_size"], weights: Sequence[Float[Array, "in_size out_size"]]
) -> list[Float[Array, "rows out_size"]]:
    """Multiply many rows with one or more weights, in float32.

    Args:
        x: The rows.
        weights: Of equal dtype, one that `emit.WeightType` names, as they lie in memory.

    Returns:
        One float32 product per weight.
    """
    kind = weight_type(weights[0].dtype)
    name = f"jaxserve_blocks_{kind}_{len(weights)}"
    ffi.register(name, lambda: _kernel(name, kind, len(weights)))
    outs = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32) for w in weights]
    return list(jax.ffi.ffi_call(name, outs)(x.astype(jnp.float32), *weights))
