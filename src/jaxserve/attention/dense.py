"""The one door to attention: append this step's keys and values, then attend.

Two layouts of the cache, both head-major so that a head's keys are contiguous:

* slots, `[rows, kv_heads, capacity, head_dim]`: one dense row per running sequence. On a CPU a
  gather of pages in every step costs more than the attention itself.
* pages, `[pages, kv_heads, page_size, head_dim]`: gathered through a page table; page 0 is a
  dummy that padding writes to.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.attention import reference, xla
from jaxserve.attention.metadata import AttentionPlan, CausalPlan
from jaxserve.cache.buffers import KvLayer


def attend(
    q: Float[Array, "*tokens q_heads head_dim"],
    k: Float[Array, "*tokens kv_heads head_dim"],
    v: Float[Array, "*tokens kv_heads head_dim"],
    cache: KvLayer | None,
    plan: AttentionPlan | CausalPlan,
    *,
    scale: float,
) -> tuple[Float[Array, "*tokens q_heads head_dim"], KvLayer | None]:
    """Append keys and values to the cache and attend.

    Args:
        q: Queries, rotated.
        k: Keys of the same tokens, rotated.
        v: Values of the same tokens.
        cache: The layer's cache; None with a `CausalPlan`.
        plan: Which token sees which keys.
        scale: Multiplies the scores, usually head_dim ** -0.5.

    Returns:
        The outputs, and the updated cache. Outputs of padding tokens are arbitrary but finite.
    """
    if isinstance(plan, CausalPlan):
        if plan.backend == "reference":
            mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))[None]
            return reference.softmax_attend(q, k, v, mask, scale=scale), cache
        return xla.causal(q, k, v, scale=scale), cache
    if cache is None:
        raise ValueError("an AttentionPlan needs a cache, got None; use a CausalPlan without one.")
    if plan.page_table is None:
        return _attend_slots(q, k, v, cache, plan, scale=scale)
    return _attend_pages(q, k, v, cache, plan, plan.page_table, scale=scale)


def _attend_slots(
    q: Array, k: Array, v: Array, cache: KvLayer, plan: AttentionPlan, *, scale: float
) -> tuple[Array, KvLayer]:
    rows = plan.rows
    keys, values = cache
    capacity = keys.shape[2]
    # Padding rows write to the last position, which no sequence reaches.
    active = plan.token_row[:rows] >= 0
    position = jnp.where(active, plan.token_position[:rows], capacity - 1)
    index = jnp.arange(rows)
    keys = keys.at[index, :, position].set(k[:rows])
    values = values.at[index, :, position].set(v[:rows])
    num_prefill = q.shape[0] - rows
    if num_prefill:
        keys, values = _append_blocks(keys, values, k[rows:], v[rows:], plan)
    if plan.backend == "reference":
        return reference.paged_attend(q, keys, values, plan, scale=scale), (keys, values)
    size = (keys.shape[1], plan.kv_tile, keys.shape[3])

    def decode_tile(i: Int[Array, ""]) -> xla.Tile:
        at, dims = (0, 0, i * plan.kv_tile, 0), (rows, *size)
        return lax.dynamic_slice(keys, at, dims), lax.dynamic_slice(values, at, dims)

    def row_tile(row: Int[Array, ""], i: Int[Array, ""]) -> xla.Tile:
        at, dims = (row, 0, i * plan.kv_tile, 0), (1, *size)
        return lax.dynamic_slice(keys, at, dims), lax.dynamic_slice(values, at, dims)

    out = _attend_tiles(q, plan, keys.shape[1], decode_tile, row_tile, scale=scale)
    return out, (keys, values)


def _append_blocks(
    keys: Array, values: Array, k: Array, v: Array, plan: AttentionPlan
) -> tuple[Array, Array]:
    """Write prefill keys and values into slots, one contiguous run per block.

    A short block also writes what follows it in the packed tokens behind its own end: those
    positions are not yet valid, are masked until their own tokens overwrite them, and the slots
    are `q_block` longer than the longest sequence so that the run always fits.
    """
    length = min(plan.q_block, k.shape[0])
    k, v = _pad_tail(k, length), _pad_tail(v, length)

    def append(i: Int[Array, ""], kv: tuple[Array, Array]) -> tuple[Array, Array]:
        at = (plan.block_row[i], 0, plan.block_position[i], 0)
        start = plan.block_start[i]
        new_k = lax.dynamic_slice_in_dim(k, start, length).swapaxes(0, 1)[None]
        new_v = lax.dynamic_slice_in_dim(v, start, length).swapaxes(0, 1)[None]
        return (
            lax.dynamic_update_slice(kv[0], new_k, at),
            lax.dynamic_update_slice(kv[1], new_v, at),
        )

    return lax.fori_loop(0, plan.num_blocks, append, (keys, values))


def _attend_tiles(
    q: Array,
    plan: AttentionPlan,
    kv_heads: int,
    decode_tile: Callable[[Array], xla.Tile],
    row_tile: Callable[[Array, Array], xla.Tile],
    *,
    scale: float,
) -> Array:
    """Attend from decode rows and, block by block, from prefill tokens."""
    rows, tile_len = plan.rows, plan.kv_tile
    num_prefill, heads, dim = q.shape[0] - rows, q.shape[1], q.shape[2]
    group = heads // kv_heads
    position = plan.token_position[:rows]
    out = xla.attend_tiles(
        q[:rows].reshape(rows, kv_heads, group, dim),
        decode_tile,
        jnp.max(position) // tile_len + 1,
        jnp.broadcast_to(position[:, None], (rows, group)),
        tile_len=tile_len,
        scale=scale,
        upcast=plan.upcast,
    ).reshape(rows, heads, dim)
    if not num_prefill:
        return out
    length = min(plan.q_block, num_prefill)
    queries = _pad_tail(q[rows:], length)

    def attend_block(i: Int[Array, ""], result: Array) -> Array:
        start, first = plan.block_start[i], plan.block_position[i]
        block = lax.dynamic_slice_in_dim(queries, start, length)
        # [length, heads, dim] -> [1, kv_heads, group * length, dim]
        block = block.reshape(length, kv_heads, group, dim).transpose(1, 2, 0, 3)
        attended = xla.attend_tiles(
            block.reshape(1, kv_heads, group * length, dim),
            lambda tile: row_tile(plan.block_row[i], tile),
            (first + length - 1) // tile_len + 1,
            jnp.tile(first + jnp.arange(length), group)[None],
            tile_len=tile_len,
            scale=scale,
            upcast=plan.upcast,
        )
        attended = attended.reshape(kv_heads, group, length, dim).transpose(2, 0, 1, 3)
        attended = attended.reshape(length, heads, dim)
        return lax.dynamic_update_slice_in_dim(result, attended, start, axis=0)

    prefill = lax.fori_loop(0, plan.num_blocks, attend_block, jnp.zeros_like(queries))
    return jnp.concatenate([out, prefill[:num_prefill]])


def _pad_tail(x: Array, extra: int) -> Array:
    return jnp.pad(x, ((0, extra), (0, 0), (0, 0)))


def _attend_pages(
    q: Array,
    k: Array,
    v: Array,
    cache: KvLayer,
    plan: AttentionPlan,
    page_table: Array,
    *,
    scale: float,
) -> tuple[Array, KvLayer]:
    page_size = cache[0].shape[2]
    row = jnp.maximum(plan.token_row, 0)
    page = page_table[row, plan.token_position // page_size]
    page = jnp.where(plan.token_row >= 0, page, 0)
    offset = plan.token_position % page_size
    keys = cache[0].at[page, :, offset].set(k)
    values = cache[1].at[page, :, offset].set(v)

    def gather(buffer: Array, pages: Array) -> Array:
        # [*, n, kv_heads, page_size, head_dim] -> [*, kv_heads, n * page_size, head_dim]
        taken = jnp.moveaxis(buffer[pages], -4, -3)
        return taken.reshape(*taken.shape[:-3], -1, taken.shape[-1])

    if plan.backend == "reference":
        out = reference.paged_attend(
            q, gather(keys, page_table), gather(values, page_table), plan, scale=scale
        )
        return out, (keys, values)

    pages_per_tile = plan.kv_tile // page_size

    def decode_tile(i: Int[Array, ""]) -> xla.Tile:
        pages = lax.dynamic_slice_in_dim(page_table, i * pages_per_tile, pages_per_tile, axis=1)
        return gather(keys, pages), gather(values, pages)

    def row_tile(row: Int[Array, ""], i: Int[Array, ""]) -> xla.Tile:
        pages = lax.dynamic_slice(page_table, (row, i * pages_per_tile), (1, pages_per_tile))
        return gather(keys, pages), gather(values, pages)

    out = _attend_tiles(q, plan, keys.shape[1], decode_tile, row_tile, scale=scale)
    return out, (keys, values)
