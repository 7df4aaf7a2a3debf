"""Attention of decoding rows to runs of places of dense slots, each head to its own runs.

How many runs there are is known on the device only; nothing is read for those that are not there.

Source: the running softmax of FlashAttention.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.emit import ITEM_BYTES, Emitter, Value, const, weight_type
from jaxserve.cpu_kernels.heads import Heads
from jaxserve.cpu_kernels.places import PIECE, PlaceReader, RunWalk, StatePlace, load_int


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
        q, keys, values, begin, size, count = inputs
        b, group, dim = e.b, const(shape.group), const(shape.head_dim)
        _, capacity, runs = sizes
        first = b.mul(index, capacity)
        slot = b.mul(first, dim)
        row = b.mul(index, group)
        reader = PlaceReader(
            e,
            shape,
            e.at(q, b.mul(row, dim), 4),
            e.at(keys, slot, ITEM_BYTES[shape.kind]),
            e.at(values, slot, ITEM_BYTES[shape.kind]),
        )
        at = b.mul(index, runs)
        walk = RunWalk(
            e, e.at(begin, at, 4), e.at(size, at, 4),
            run=const(0), offset=const(0), last=b.sub(runs, const(1)),
        )  # fmt: skip

        def visit(place: Value, i: Value) -> None:
            reader.put(place if order is None else load_int(e, e.at(order, first, 4), place), i)

        total = load_int(e, count, index)
        with e.loop(const(0), total, const(PIECE)) as start:
            own = e.minimum(b.sub(total, start), const(PIECE))
            walk.list(own, visit)
            reader.read(own)
        out, top, mass = e.at(out, b.mul(row, dim), 4), e.at(top, row, 4), e.at(mass, row, 4)
        reader.write(StatePlace(out, top, mass))

    return ffi.Kernel(
        name=name,
        num_args=7 if is_ordered else 6,
        num_rets=3,
        dims=[(0, 0), (1, 2), (3, 2)],
        num_chunks=lambda e, sizes, _threads: e.b.mul(sizes[0], const(shape.kv_heads)),
        chunk=chunk,
    )
