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

KvLayer = tuple[Array, Array]
"""Keys and values of one layer, in one of the two layouts."""


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
    assert cache is not None
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
    out = xla.decode(
        q[:rows],
        lambda extent: keys[:rows, :, :extent],
        lambda extent: values[:rows, :, :extent],
        plan.token_position[:rows],
        plan,
        scale=scale,
    )
    if num_prefill:
        shape = (1, keys.shape[1], 0, keys.shape[3])

        def row_slice(buffer: Array, row: Array, extent: int) -> Array:
            size = (*shape[:2], extent, shape[3])
            return lax.dynamic_slice(buffer, (row, 0, 0, 0), size)[0]

        prefill = _prefill_loop(q[rows:], plan, keys, values, row_slice, scale=scale)
        out = jnp.concatenate([out, prefill])
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


def _prefill_loop(
    q: Array,
    plan: AttentionPlan,
    keys: Array,
    values: Array,
    row_slice: Callable[[Array, Array, int], Array],
    *,
    scale: float,
) -> Array:
    num_tokens = q.shape[0]
    length = min(plan.q_block, num_tokens)
    q = _pad_tail(q, length)

    def body(i: Int[Array, ""], out: Array) -> Array:
        start = plan.block_start[i]
        row = plan.block_row[i]
        result = xla.prefill_block(
            lax.dynamic_slice_in_dim(q, start, length),
            lambda extent: row_slice(keys, row, extent),
            lambda extent: row_slice(values, row, extent),
            plan.block_position[i],
            plan.block_extent[i],
            plan,
            scale=scale,
        )
        return lax.dynamic_update_slice_in_dim(out, result, start, axis=0)

    return lax.fori_loop(0, plan.num_blocks, body, jnp.zeros_like(q))[:num_tokens]


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
    rows = plan.rows
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

    def decode_rows(buffer: Array, extent: int) -> Array:
        return gather(buffer, page_table[:rows, : -(-extent // page_size)])[..., :extent, :]

    out = xla.decode(
        q[:rows],
        lambda extent: decode_rows(keys, extent),
        lambda extent: decode_rows(values, extent),
        plan.token_position[:rows],
        plan,
        scale=scale,
    )
    if q.shape[0] > rows:

        def row_slice(buffer: Array, row: Array, extent: int) -> Array:
            pages = lax.dynamic_index_in_dim(page_table, row, keepdims=False)
            return gather(buffer, pages[: -(-extent // page_size)])[:, :extent]

        prefill = _prefill_loop(q[rows:], plan, keys, values, row_slice, scale=scale)
        out = jnp.concatenate([out, prefill])
    return out, (keys, values)
