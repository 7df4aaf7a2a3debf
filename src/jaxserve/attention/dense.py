"""The one door to attention: append this step's keys and values, then attend.

Two layouts of the cache, both head-major so that a head's keys are contiguous:

* slots, `[rows, kv_heads, capacity, head_dim]`: one dense row per running sequence. On a CPU a
  gather of pages in every step costs more than the attention itself.
* pages, `[pages, kv_heads, page_size, head_dim]`: gathered through a page table, or read by planned
  kernels; page 0 is a dummy that padding writes to.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve import cpu_kernels
from jaxserve.attention import reference, xla
from jaxserve.attention.metadata import (
    KERNEL_BACKENDS,
    AttentionPlan,
    Backend,
    CausalPlan,
    PaddedPlan,
    ScoreRule,
)
from jaxserve.attention.sharded import attend_by_heads, head_axes
from jaxserve.attention.tactic.attention import SpanBackend
from jaxserve.attention.tactic.rows import attend_rows
from jaxserve.cache.buffers import KvLayer
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan
from jaxserve.pallas_kernels.token_attention.api import kernel_for

SINKS = "sinks"
"""What planned kernels call the array of `pallas_kernels.variant.sinks`."""
_MOST_COMPILED = 4096
"""Numbers in the queries of one head of keys for which kernels are compiled for the CPU."""
_MOST_STATIC_BLOCKS = 8
"""Blocks of queries that are unrolled; longer chunks get longer blocks."""


def attend(
    q: Float[Array, "*tokens q_heads head_dim"],
    k: Float[Array, "*tokens kv_heads head_dim"],
    v: Float[Array, "*tokens kv_heads head_dim"],
    cache: KvLayer | None,
    plan: AttentionPlan | CausalPlan | PaddedPlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " q_heads"] | None = None,
) -> tuple[Float[Array, "*tokens q_heads head_dim"], KvLayer | None]:
    """Append keys and values to the cache and attend.

    Args:
        q: Queries, rotated.
        k: Keys of the same tokens, rotated.
        v: Values of the same tokens.
        cache: The layer's cache; None with a `CausalPlan` or a `PaddedPlan`.
        plan: Which token sees which keys.
        scale: Multiplies the products of queries and keys, usually head_dim ** -0.5. Static, as
            are the next two.
        window: Keys that a token sees back from itself, itself included; None sees all.
        soft_cap: Scores are bent to stay between minus and plus this; None leaves them.
        sinks: Score of a key without a value, per head, that every token sees; None has none.

    Returns:
        The outputs, and the updated cache. Outputs of padding tokens are arbitrary but finite.
    """
    rule = ScoreRule(scale=scale, window=window, soft_cap=soft_cap)
    if isinstance(plan, CausalPlan):
        if plan.backend == "reference":
            position = jnp.arange(q.shape[1])
            mask = position[None, :] <= position[:, None]
            mask = (mask & rule.in_window(position[:, None], position[None, :]))[None]
            return reference.softmax_attend(q, k, v, mask, rule=rule, sinks=sinks), cache
        return xla.causal(q, k, v, rule=rule, sinks=sinks), cache
    if isinstance(plan, PaddedPlan):
        if window is not None:
            raise ValueError("a PaddedPlan knows no window, got one; pass None.")
        if sinks is not None:
            raise ValueError("a PaddedPlan knows no sinks, got some; pass None.")
        seen = jnp.arange(q.shape[1])[None, :] < plan.lengths[:, None]
        if plan.backend == "reference":
            return reference.softmax_attend(q, k, v, seen[:, None, :], rule=rule), cache
        return xla.padded(q, k, v, seen, rule=rule), cache
    return _attend_cached(q, k, v, cache, plan, rule=rule, sinks=sinks)


def _attend_cached(
    q: Array,
    k: Array,
    v: Array,
    cache: KvLayer | None,
    plan: AttentionPlan,
    *,
    rule: ScoreRule,
    sinks: Array | None,
) -> tuple[Array, KvLayer | None]:
    """Attend against the cache, on one device or on several."""
    if cache is None:
        raise ValueError("an AttentionPlan needs a cache, got None; use a CausalPlan without one.")
    if plan.sharding is not None:
        axes = head_axes(plan.sharding, q.shape[1], k.shape[1])
        if axes or plan.sharding.groups > 1:
            return attend_by_heads(
                functools.partial(_attend_cached, rule=rule), q, k, v, cache, plan,
                sharding=plan.sharding, axes=axes, sinks=sinks,
            )  # fmt: skip
    if plan.kernel_plans:
        return _attend_kernels(q, k, v, cache, plan, rule=rule, sinks=sinks)
    if sinks is not None and plan.sparse is not None:
        raise ValueError("attention that leaves something unread knows no sinks, got some.")
    if plan.page_table is None:
        return _attend_slots(q, k, v, cache, plan, rule=rule, sinks=sinks)
    return _attend_pages(q, k, v, cache, plan, plan.page_table, rule=rule, sinks=sinks)


def _attend_slots(
    q: Array,
    k: Array,
    v: Array,
    cache: KvLayer,
    plan: AttentionPlan,
    *,
    rule: ScoreRule,
    sinks: Array | None,
) -> tuple[Array, KvLayer]:
    rows = plan.rows
    keys, values, *_ = cache
    capacity = keys.shape[2]
    # The kernels know neither windows nor caps nor sinks; such layers take the way through XLA.
    is_plain = rule.window is None and rule.soft_cap is None and sinks is None
    # They hold all queries of a head of keys at once, which for latent attention is far too much.
    is_small = q.shape[1] // k.shape[1] * q.shape[2] <= _MOST_COMPILED
    is_compiled = plan.backend == "llvm" and is_plain and is_small
    if is_compiled and cpu_kernels.supports_slots(q.shape[2], capacity, keys.dtype.name):
        return _attend_slots_compiled(q, k, v, cache, plan, scale=rule.scale)
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
        out = reference.paged_attend(q, keys, values, plan, rule=rule, sinks=sinks)
        return out, (keys, values)

    def decode_keys(start: Array | int, length: int) -> xla.Tile:
        if jnp.ndim(start):
            return _cut_rows(keys, start, length), _cut_rows(values, start, length)
        return _cut_all(keys, values, rows, start, length)

    row_tile = _slot_tiles(keys, values, plan.kv_tile)
    out = _attend_tiles(
        q,
        k,
        v,
        plan,
        decode_keys,
        row_tile,
        row_len=capacity,
        unit=1,
        rule=rule,
        sinks=sinks,
    )
    return _attend_sparse(out, q, (keys, values), plan, decode_keys, rule=rule)


def _attend_sparse(
    out: Array,
    q: Array,
    cache: KvLayer,
    plan: AttentionPlan,
    decode_keys: Callable[[Array | int, int], xla.Tile],
    *,
    rule: ScoreRule,
    backend: SpanBackend = "xla",
) -> tuple[Array, KvLayer]:
    """Put the outputs of rows that leave something unread into their places.

    Args:
        out: Outputs of all tokens; those of such rows are arbitrary.
        q: Queries of all tokens.
        cache: Keys and values, the step's own appended.
        plan: The step.
        decode_keys: So many keys and values of every row, from a position on.
        rule: How products become scores.
        backend: What reads keys and values.

    Returns:
        The outputs; keys, values, and what was counted.
    """
    sparse, rows = plan.sparse, plan.rows
    if sparse is None:
        return out, cache
    keys, values, *_ = cache
    length, tile_len = sparse.length, plan.kv_tile

    def whole() -> xla.State:
        queries = _by_head(q[:rows, None].astype(jnp.float32), keys.shape[1])
        position = jnp.broadcast_to(length[:, None] - 1, (rows, queries.shape[2]))
        return xla.visit_tiles(
            xla.begin(queries.shape),
            queries,
            lambda i: decode_keys(i * tile_len, tile_len),
            (0, (jnp.max(length) + tile_len - 1) // tile_len),
            position + 1,
            tile_len=tile_len,
            rule=rule,
            position=position,
        )

    own, counts, sums = attend_rows(
        q[:rows],
        keys,
        values,
        plan.page_table,
        sparse,
        whole,
        scale=rule.scale,
        backend=backend,
    )
    own = jnp.where(sparse.is_sparse[:, None, None], own.astype(out.dtype), out[:rows])
    return jnp.concatenate([own, out[rows:]]), (keys, values, counts, sums)


def _attend_slots_compiled(
    q: Array, k: Array, v: Array, cache: KvLayer, plan: AttentionPlan, *, scale: float
) -> tuple[Array, KvLayer]:
    """Attend with the kernels for this machine's CPU."""
    rows = plan.rows
    position = jnp.where(plan.token_row[:rows] >= 0, plan.token_position[:rows], -1)
    keys, values, *_ = cache
    if plan.sparse is not None:
        # These rows' keys are appended here, as the kernel appends only where it attends. By a
        # kernel of its own: from a scatter to the next kernel XLA:CPU copies the whole cache.
        index = jnp.arange(rows, dtype=jnp.int32)
        one = plan.sparse.is_sparse.astype(jnp.int32)
        own = jnp.stack([index, index, jnp.maximum(position, 0), one], axis=-1)
        keys, values = cpu_kernels.append(k[:rows], v[:rows], keys, values, own)
        position = jnp.where(plan.sparse.is_sparse, -1, position)
    out, keys, values = cpu_kernels.decode(
        q[:rows], k[:rows], v[:rows], keys, values, position, scale=scale
    )
    if q.shape[0] > rows:
        is_used = jnp.arange(plan.block_len.shape[0]) < plan.num_blocks
        length = jnp.where(is_used, plan.block_len, 0)
        blocks = jnp.stack([plan.block_start, plan.block_row, plan.block_position, length], axis=-1)
        keys, values = cpu_kernels.append(k[rows:], v[rows:], keys, values, blocks)
        prefill = cpu_kernels.prefill(
            q[rows:], keys, values, blocks, q_block=plan.q_block, scale=scale
        )
        seen = plan.token_row[rows:, None, None] >= 0
        out = jnp.concatenate([out, jnp.where(seen, prefill, 0.0)])
    return _attend_sparse(
        out.astype(q.dtype),
        q,
        (keys, values),
        plan,
        functools.partial(_cut_all, keys, values, rows),
        rule=ScoreRule(scale=scale),
        backend="llvm",
    )


def _cut_all(keys: Array, values: Array, rows: int, start: Array | int, length: int) -> xla.Tile:
    """Cut the same run of positions out of the first rows."""
    at, dims = (0, 0, start, 0), (rows, keys.shape[1], length, keys.shape[3])
    return lax.dynamic_slice(keys, at, dims), lax.dynamic_slice(values, at, dims)


def _slot_tiles(keys: Array, values: Array, tile_len: int) -> Callable[[Array, Array], xla.Tile]:
    """Return a function that reads one tile of one slot."""
    size = (1, keys.shape[1], tile_len, keys.shape[3])

    def tile(row: Int[Array, ""], i: Int[Array, ""]) -> xla.Tile:
        at = (row, 0, i * tile_len, 0)
        return lax.dynamic_slice(keys, at, size), lax.dynamic_slice(values, at, size)

    return tile


def _upcast(plan: AttentionPlan, *parts: Array) -> tuple[Array, ...]:
    return tuple(x.astype(jnp.float32) for x in parts) if plan.upcast else parts


def _cut_rows(buffer: Array, start: Array | int, length: int) -> Array:
    """Cut a run of positions out of each row, from a place of its own."""
    rows = jnp.asarray(start).shape[0]
    dims = (buffer.shape[1], length, buffer.shape[3])
    return jax.vmap(lambda row, at: lax.dynamic_slice(row, (0, at, 0), dims))(buffer[:rows], start)


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
    k: Array,
    v: Array,
    plan: AttentionPlan,
    decode_keys: Callable[[Array | int, int], xla.Tile],
    row_tile: Callable[[Array, Array], xla.Tile],
    *,
    row_len: int,
    unit: int,
    rule: ScoreRule,
    sinks: Array | None,
) -> Array:
    """Attend from decode rows and from prefill tokens.

    Args:
        q: Queries of all packed tokens.
        k: Their keys.
        v: Their values.
        plan: The step.
        decode_keys: So many keys and values of every row, from a position on: one for all rows,
            or one of each row.
        row_tile: Keys and values of one tile of one row.
        row_len: Most keys that a row of the cache can hold.
        unit: Keys that can only be read together: a page.
        rule: How products become scores, and how far back a token sees.
        sinks: Score of each head's sink; None has none.
    """
    rows, dtype = plan.rows, q.dtype
    q, k, v = _upcast(plan, q, k, v)
    group = q.shape[1] // k.shape[1]
    queries = _by_head(q[:rows, None], k.shape[1])
    position = jnp.broadcast_to(plan.token_position[:rows, None], (rows, group))
    num_seen = position + 1
    if plan.sparse is not None:
        num_seen = jnp.where(plan.sparse.is_sparse[:, None], 0, num_seen)
    longest, tile_len = jnp.max(num_seen), plan.kv_tile

    def few(count: int) -> xla.State:
        keys, values = (part.astype(q.dtype) for part in decode_keys(0, count))
        key = jnp.arange(count)[None, None, :]
        seen = (key < num_seen[:, :, None]) & rule.in_window(position[:, :, None], key)
        return xla.visit(xla.begin(queries.shape, sinks), queries, keys, values, seen, rule=rule)

    def many() -> xla.State:
        # With a window each row begins at the first tile that it sees, wherever others are.
        first = None
        if rule.window is not None:
            first = jnp.maximum(num_seen[:, 0] - rule.window, 0) // tile_len * tile_len
        count = longest if first is None else jnp.max(num_seen[:, 0] - first)
        return xla.visit_tiles(
            xla.begin(queries.shape, sinks),
            queries,
            lambda i: decode_keys(i * tile_len + (0 if first is None else first), tile_len),
            (0, (count + tile_len - 1) // tile_len),
            num_seen,
            tile_len=tile_len,
            rule=rule,
            position=position,
            offset=first,
        )

    # Short contexts are read in one piece, which was faster than tiles at 8 and 16 rows on a CPU.
    counts = [tile_len // 2] if tile_len % (2 * unit) == 0 else []
    counts += [count for count in (tile_len, 2 * tile_len) if count <= row_len]
    index = jnp.sum(longest > jnp.asarray(counts), dtype=jnp.int32)
    branches = [functools.partial(few, count) for count in counts]
    state = many() if plan.batch_invariant else lax.switch(index, [*branches, many])
    out = _by_token(xla.finish(state, dtype), group)[:, 0]
    if q.shape[0] == rows:
        return out
    prefill = _attend_prefill(q[rows:], k[rows:], v[rows:], plan, row_tile, rule=rule, sinks=sinks)
    return jnp.concatenate([out, prefill.astype(dtype)])


def _attend_prefill(
    q: Array,
    k: Array,
    v: Array,
    plan: AttentionPlan,
    row_tile: Callable[[Array, Array], xla.Tile],
    *,
    rule: ScoreRule,
    sinks: Array | None,
) -> Array:
    """Attend among the step's own prefill tokens, then to what the cache held before.

    The first part has static shapes and no loop: XLA's CPU backend runs element-wise work inside
    loops and branches on one thread only.
    """
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    row, position = plan.token_row[plan.rows :], plan.token_position[plan.rows :]
    keys, values = k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None]
    parts: list[xla.State] = []
    block = max(plan.q_block, -(-q.shape[0] // _MOST_STATIC_BLOCKS))
    for low in range(0, q.shape[0], block):
        high = min(low + block, q.shape[0])
        # Tokens of a sequence lie side by side, so what is as far away as the window is hidden.
        first = 0 if rule.window is None else max(0, low + 1 - rule.window)
        queries = _by_head(q[None, low:high], kv_heads)
        own, key = position[low:high, None], position[None, first:high]
        seen = (row[low:high, None] == row[None, first:high]) & (own >= key)
        seen &= rule.in_window(own, key)
        parts.append(
            xla.visit(
                xla.begin(queries.shape, sinks),
                queries,
                keys[:, :, first:high],
                values[:, :, first:high],
                jnp.tile(seen, (group, 1))[None],
                rule=rule,
            )
        )
    # One state per token and head: [tokens, heads, ...], so that runs of tokens can be cut out.
    out, top, mass = (
        jnp.concatenate([_by_token(part[i], group)[0] for part in parts]) for i in range(3)
    )
    length = min(plan.q_block, q.shape[0])
    padded = tuple(_pad_tail(x, length) for x in (q, out, top, mass))

    def add_context(i: Int[Array, ""], state: tuple[Array, ...]) -> tuple[Array, ...]:
        start, context = plan.block_start[i], plan.block_context[i]
        taken = [lax.dynamic_slice_in_dim(x, start, length) for x in (padded[0], *state)]
        queries, *before = (_by_head(x[None], kv_heads) for x in taken)
        # What follows a short block belongs to another sequence and sees nothing here.
        place = jnp.arange(length)
        num_seen = jnp.where(place < plan.block_len[i], context, 0)
        own = plan.block_position[i] + place
        first = 0
        if rule.window is not None:
            first = jnp.maximum(plan.block_position[i] + 1 - rule.window, 0) // plan.kv_tile
        after = xla.visit_tiles(
            (before[0], before[1], before[2]),
            queries,
            lambda tile: row_tile(plan.block_row[i], tile),
            (first, (context + plan.kv_tile - 1) // plan.kv_tile),
            jnp.tile(num_seen, group)[None],
            tile_len=plan.kv_tile,
            rule=rule,
            position=jnp.tile(own, group)[None],
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, _by_token(part, group)[0], start, axis=0)
            for whole, part in zip(state, after, strict=True)
        )

    out, _, mass = lax.fori_loop(0, plan.num_context_blocks, add_context, padded[1:])
    return (out / jnp.maximum(mass, 1e-30)[..., None])[: q.shape[0]]


def _by_head(x: Array, kv_heads: int) -> Array:
    """Lay queries that share a key-value head side by side.

    `[rows, length, heads, ...]` becomes `[rows, kv_heads, group * length, ...]`.
    """
    rows, length, heads, *rest = x.shape
    group = heads // kv_heads
    x = jnp.moveaxis(x.reshape(rows, length, kv_heads, group, *rest), 1, 3)
    return x.reshape(rows, kv_heads, group * length, *rest)


def _by_token(x: Array, group: int) -> Array:
    """Undo `_by_head`."""
    rows, kv_heads, packed, *rest = x.shape
    x = jnp.moveaxis(x.reshape(rows, kv_heads, group, packed // group, *rest), 3, 1)
    return x.reshape(rows, packed // group, kv_heads * group, *rest)


def _pad_tail(x: Array, extra: int) -> Array:
    return jnp.pad(x, ((0, extra), *((0, 0) for _ in x.shape[1:])))


def _attend_kernels(
    q: Array,
    k: Array,
    v: Array,
    cache: KvLayer,
    plan: AttentionPlan,
    *,
    rule: ScoreRule,
    sinks: Array | None,
) -> tuple[Array, KvLayer]:
    """Attend with planned paged kernels."""
    paged = next((p for p in plan.kernel_plans if p.spec.window == rule.window), None)
    if plan.sparse is not None:
        paged = plan.kernel_plans[-1]  # without work for decodes that leave something unread
    if paged is None:
        windows = [p.spec.window for p in plan.kernel_plans]
        raise ValueError(f"a layer has the window {rule.window}, but plans are for {windows}.")
    size = paged.spec.page_size
    request = jnp.maximum(plan.token_row, 0)
    if paged.spec.max_requests > plan.rows:
        # Each row has two requests: a decode, and the drafts behind it. Only the second has all the
        # pages that drafts reach, which can be one more than the decode before them needs.
        request = 2 * request + (jnp.arange(request.shape[0]) >= plan.rows)
    page = paged.kv_indices[paged.kv_indptr[request] + plan.token_position // size]
    page = jnp.where(plan.token_row >= 0, page, 0)
    offset = plan.token_position % size
    keys = cache[0].at[page, :, offset].set(k)
    values = cache[1].at[page, :, offset].set(v)
    out = attention(
        q,
        PagedKV(k=keys, v=values),
        paged,
        extra=plan.extra if sinks is None else {**plan.extra, SINKS: sinks.astype(jnp.float32)},
        sm_scale=rule.scale,
        backend=KERNEL_BACKENDS[plan.backend],
    )
    if plan.sparse is None:
        return out, (keys, values)
    table = _planned_pages(paged, plan)
    row_plan = dataclasses.replace(plan, page_table=table)

    def decode_keys(start: Array | int, length: int) -> xla.Tile:
        pages = lax.dynamic_slice_in_dim(table, start // size, length // size, axis=1)
        return _gather_pages(keys, pages), _gather_pages(values, pages)

    backend = _list_backend(plan.backend, q, PagedKV(k=keys, v=values))
    return _attend_sparse(out, q, (keys, values), row_plan, decode_keys, rule=rule, backend=backend)


def _planned_pages(paged: Plan, plan: AttentionPlan) -> Int[Array, "rows pages_per_row"]:
    """Return the pages of decode rows, of which plans have a list; 0 where there is none."""
    per_row = 2 if paged.spec.max_requests > plan.rows else 1
    per_tile = plan.kv_tile // paged.spec.page_size
    most = -(-paged.spec.max_pages // paged.spec.max_requests // per_tile) * per_tile
    begin, end = (paged.kv_indptr[i : i + plan.rows * per_row : per_row, None] for i in range(2))
    at = begin + jnp.arange(most)
    last = paged.kv_indices.shape[0] - 1
    return jnp.where(at < end, paged.kv_indices[jnp.minimum(at, last)], 0)


def _list_backend(backend: Backend, q: Array, cache: PagedKV) -> SpanBackend:
    """Say what reads the tokens that decodes choose, where planned kernels read all others."""
    if backend == "pallas-reference":
        return "reference"
    like = jax.ShapeDtypeStruct(q.shape, cache.k.dtype)
    return kernel_for(backend, like, cache) or "xla"


def _gather_pages(buffer: Array, pages: Array) -> Array:
    """Put pages together: `[*, n, kv_heads, page, dim]` becomes `[*, kv_heads, n * page, dim]`."""
    taken = jnp.moveaxis(buffer[pages], -4, -3)
    return taken.reshape(*taken.shape[:-3], -1, taken.shape[-1])


def _attend_pages(
    q: Array,
    k: Array,
    v: Array,
    cache: KvLayer,
    plan: AttentionPlan,
    page_table: Array,
    *,
    rule: ScoreRule,
    sinks: Array | None,
) -> tuple[Array, KvLayer]:
    page_size = cache[0].shape[2]
    row = jnp.maximum(plan.token_row, 0)
    page = page_table[row, plan.token_position // page_size]
    page = jnp.where(plan.token_row >= 0, page, 0)
    offset = plan.token_position % page_size
    keys = cache[0].at[page, :, offset].set(k)
    values = cache[1].at[page, :, offset].set(v)

    if plan.backend == "reference":
        out = reference.paged_attend(
            q,
            _gather_pages(keys, page_table),
            _gather_pages(values, page_table),
            plan,
            rule=rule,
            sinks=sinks,
        )
        return out, (keys, values)

    pages_per_tile = plan.kv_tile // page_size

    row_len = page_table.shape[1] * page_size

    def decode_keys(start: Array | int, length: int) -> xla.Tile:
        first, count = start // page_size, length // page_size
        if jnp.ndim(start):
            index = jnp.asarray(first)[:, None] + jnp.arange(count)
            pages = jnp.take_along_axis(page_table, index, axis=1, mode="clip")
        else:
            pages = lax.dynamic_slice_in_dim(page_table, first, count, axis=1)
        return _gather_pages(keys, pages), _gather_pages(values, pages)

    def row_tile(row: Int[Array, ""], i: Int[Array, ""]) -> xla.Tile:
        pages = lax.dynamic_slice(page_table, (row, i * pages_per_tile), (1, pages_per_tile))
        return _gather_pages(keys, pages), _gather_pages(values, pages)

    out = _attend_tiles(
        q,
        k,
        v,
        plan,
        decode_keys,
        row_tile,
        row_len=row_len,
        unit=page_size,
        rule=rule,
        sinks=sinks,
    )
    return _attend_sparse(out, q, (keys, values), plan, decode_keys, rule=rule)
