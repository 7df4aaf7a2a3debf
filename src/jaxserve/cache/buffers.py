"""Device buffers of the key-value cache and the programs that move its parts.

With dense slots the pages are a store beside the slots: full pages of a prefix are copied out
once (`save_pages`) and copied back on a hit (`load_pages`), which is cheap beside a gather in
every step.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxserve import cpu_kernels

KvLayer = tuple[Array, ...]
"""Keys and values of one layer, in one of the two layouts of `attention.dense`.

Behind them, as attention returns them: what it counted, where it may leave something unread.
"""

KvBuffers = tuple[KvLayer, ...]
"""One (keys, values) pair per layer, slots or pages."""

_MOVE_CHUNK = 128
"""Tokens copied at once when a row moves."""


def slot_capacity(max_model_len: int, q_block: int, kv_tile: int) -> int:
    """Count tokens per slot.

    Args:
        max_model_len: Most tokens of a sequence.
        q_block: Tokens of a prefill block, for which there is room behind the longest sequence.
        kv_tile: Keys per tile of attention; the count is a multiple of it.

    Returns:
        Room for all of these, and for a scratch position that padding writes to.
    """
    return -(-(max_model_len + q_block + 1) // kv_tile) * kv_tile


def allocate(
    num_layers: int,
    shape: tuple[int, int, int, int],
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding,
) -> KvBuffers:
    """Allocate zeroed buffers `[rows or pages, kv_heads, length, head_dim]`, two per layer."""
    zeros = _zeros_program(shape, dtype, sharding)
    return tuple((zeros(), zeros()) for _ in range(num_layers))


@functools.lru_cache(maxsize=16)
def _zeros_program(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding
) -> Callable[[], Array]:
    """Return one program per kind of buffer, so that allocating anew compiles nothing."""
    (*others, device) = sharding.device_set
    is_one_cpu = not others and device.platform == "cpu"
    make = cpu_kernels.zeros if is_one_cpu and cpu_kernels.has_lazy_zeros() else jnp.zeros
    return jax.jit(functools.partial(make, shape, dtype), out_shardings=sharding)


def save_pages(
    store: KvBuffers,
    slots: KvBuffers,
    count: Int[Array, ""],
    row: Int[Array, " moves"],
    block: Int[Array, " moves"],
    page: Int[Array, " moves"],
) -> KvBuffers:
    """Copy pages out of slots: block `block[i]` of row `row[i]` becomes page `page[i]`.

    Args:
        store: Pages; donated.
        slots: Dense rows.
        count: How many of the moves are real.
        row: Slot of each move.
        block: Which page-sized part of the slot.
        page: Page to fill.
    """
    page_size = store[0][0].shape[2]

    def move(i: Array, pages: KvBuffers) -> KvBuffers:
        def copy(dst: Array, src: Array) -> Array:
            size = (1, src.shape[1], page_size, src.shape[3])
            part = lax.dynamic_slice(src, (row[i], 0, block[i] * page_size, 0), size)
            return lax.dynamic_update_slice(dst, part, (page[i], 0, 0, 0))

        return jax.tree.map(copy, pages, slots)

    return lax.fori_loop(0, count, move, store)


def load_pages(
    slots: KvBuffers,
    store: KvBuffers,
    count: Int[Array, ""],
    row: Int[Array, " moves"],
    block: Int[Array, " moves"],
    page: Int[Array, " moves"],
) -> KvBuffers:
    """Copy pages into slots; the inverse of `save_pages`. `slots` is donated."""
    page_size = store[0][0].shape[2]

    def move(i: Array, rows: KvBuffers) -> KvBuffers:
        def copy(dst: Array, src: Array) -> Array:
            size = (1, src.shape[1], page_size, src.shape[3])
            part = lax.dynamic_slice(src, (page[i], 0, 0, 0), size)
            return lax.dynamic_update_slice(dst, part, (row[i], 0, block[i] * page_size, 0))

        return jax.tree.map(copy, rows, store)

    return lax.fori_loop(0, count, move, slots)


def move_row(
    slots: KvBuffers, source: Int[Array, ""], target: Int[Array, ""], length: Int[Array, ""]
) -> KvBuffers:
    """Copy the first `length` tokens of one slot into another; `slots` is donated."""
    if not slots:
        return slots
    capacity = slots[0][0].shape[2]
    chunk = min(_MOVE_CHUNK, capacity)

    def step(i: Array, rows: KvBuffers) -> KvBuffers:
        # At the end of a slot whose capacity is no multiple, the last chunk overlaps its neighbour.
        low = jnp.minimum(i * chunk, capacity - chunk)

        def copy(buffer: Array) -> Array:
            size = (1, buffer.shape[1], chunk, buffer.shape[3])
            part = lax.dynamic_slice(buffer, (source, 0, low, 0), size)
            return lax.dynamic_update_slice(buffer, part, (target, 0, low, 0))

        return jax.tree.map(copy, rows)

    return lax.fori_loop(0, (length + chunk - 1) // chunk, step, slots)
