"""Attention over pages in float64, request by request and head by head, and cases to try it on."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.variant import AttentionVariant


@dataclasses.dataclass
class Context:
    """What variants ask besides their tile, for one head of one request."""

    sm_scale: float
    q_heads: int
    kv_heads: int
    head_dim: int
    request: Any
    q_len: Any
    kv_len: Any
    head: int
    variant: AttentionVariant
    extra: dict[str, Any]

    def __getitem__(self, name):
        kind, value = self.variant.extras[name], jnp.asarray(self.extra[name])
        return {"scalar": value, "head": value[..., self.head], "request": value[self.request]}[
            kind
        ]

    def take(self, name, *index):
        return jnp.asarray(self.extra[name])[tuple(jnp.broadcast_arrays(*index))]


def pages_of(pool, pages, scale, head, count):
    """Read the first `count` keys or values of a head through its pages, in float64."""
    rows = np.asarray(pool)[pages, head].astype(np.float64)
    if scale is not None:
        scale = np.asarray(scale, np.float64)
        rows *= {0: lambda: scale, 1: lambda: scale[head], 2: lambda: scale[pages, head]}[
            scale.ndim
        ]()[..., None, None]
    return rows.reshape(-1, rows.shape[-1])[:count]


def attend64(
    q,
    cache: PagedKV,
    table: PageTable,
    q_len,
    *,
    sm_scale,
    causal=True,
    window=None,
    variant=None,
    extra=None,
    masks=None,
    chosen=None,
):
    """Attend packed tokens to their requests' keys.

    Args:
        q: Packed queries.
        cache: Pages.
        table: Pages of each request.
        q_len: Tokens of each request.
        sm_scale: Scale.
        causal: Whether later keys are hidden.
        window: Keys seen back.
        variant: Score, mask and operand functions are applied; not what acts on merged states.
        extra: Arrays of the variant.
        masks: What each token of a request sees, per request, maybe per head.
        chosen: (request, kv_head) -> positions that are read; None reads all.

    Returns:
        Outputs and base-2 lse, float64.
    """
    q = np.asarray(q, np.float64)
    tokens, q_heads, head_dim = q.shape
    kv_heads, v_dim = cache.kv_heads, cache.v.shape[-1]
    group = q_heads // kv_heads
    out, lse = np.zeros((tokens, q_heads, v_dim)), np.full((tokens, q_heads), -np.inf)
    start = 0
    for request, (length, keys) in enumerate(zip(q_len, table.kv_len, strict=True)):
        pages = table.indices[table.indptr[request] : table.indptr[request + 1]]
        positions = keys - length + np.arange(length)
        for head in range(q_heads):
            k_pos = np.arange(keys)
            if chosen is not None:
                k_pos = np.asarray(chosen[request, head // group], int)
            k = pages_of(cache.k, pages, cache.k_scale, head // group, keys)[k_pos]
            v = pages_of(cache.v, pages, cache.v_scale, head // group, keys)[k_pos]
            rows = q[start : start + length, head]
            ctx = Context(
                sm_scale, q_heads, kv_heads, head_dim, request, length, keys, head, variant, extra
            )
            grid = (jnp.asarray(positions)[:, None], jnp.asarray(k_pos)[None, :], jnp.int32(head))
            if variant and variant.q_mod:
                rows = operand(variant.q_mod, rows, ctx, positions)
            if variant and variant.k_mod:
                k = operand(variant.k_mod, k, ctx, k_pos)
            scores = rows @ k.T * sm_scale
            if variant and variant.score_mod:
                bent = variant.score_mod(jnp.asarray(scores, jnp.float32), ctx, *grid)
                scores = np.broadcast_to(np.asarray(bent, np.float64), scores.shape)
            seen = visible(positions, k_pos, causal, window, variant, ctx, grid)
            if masks is not None:
                seen &= masks[request][head] if masks[request].ndim == 3 else masks[request]
            at = slice(start, start + length)
            out[at, head], lse[at, head] = weigh(scores, seen, v, variant)
        start += length
    return out, lse


def visible(positions, k_pos, causal, window, variant, ctx, grid):
    seen = np.ones((positions.size, k_pos.size), bool)
    if causal:
        seen &= k_pos[None, :] <= positions[:, None]
    if window:
        seen &= k_pos[None, :] > positions[:, None] - window
    if variant and variant.mask_mod:
        seen &= np.asarray(variant.mask_mod(ctx, *grid))
    return seen


def weigh(scores, seen, v, variant):
    out, lse = np.zeros((seen.shape[0], v.shape[1])), np.full(seen.shape[0], -np.inf)
    if variant and not variant.use_softmax:
        return np.where(seen, scores, 0.0) @ v, lse
    for i in range(seen.shape[0]):
        if seen[i].any():
            mine = scores[i][seen[i]]
            weight = np.exp(mine - mine.max())
            out[i] = weight @ v[seen[i]] / weight.sum()
            lse[i] = (mine.max() + np.log(weight.sum())) / np.log(2)
    return out, lse


def operand(mod, x, ctx, position):
    half = x.shape[1] // 2
    low, high = (jnp.asarray(part, jnp.float32) for part in (x[:, :half], x[:, half:]))
    column = jnp.arange(half)[None, :]
    return np.concatenate(mod(low, high, ctx, jnp.asarray(position)[:, None], column), axis=1)


def random_case(
    rng,
    *,
    q_len,
    kv_len,
    q_heads,
    kv_heads,
    head_dim,
    page_size,
    v_dim=None,
    dtype="float32",
    kv_dtype=None,
    scale_axes=None,
):
    """Make queries, pages in random order, and their table; what no request uses is NaN."""
    kv_dtype = kv_dtype or dtype
    used = [-(-int(n) // page_size) for n in kv_len]
    num_pages = 2 + sum(used)
    pages = 1 + rng.permutation(num_pages - 1)[: sum(used)]
    indptr = np.cumsum([0, *used]).astype(np.int32)
    table = PageTable(
        indptr=indptr, indices=pages.astype(np.int32), kv_len=np.asarray(kv_len, np.int32)
    )
    scale = None
    if scale_axes is not None:
        shape = [(), (kv_heads,), (num_pages, kv_heads)][scale_axes]
        scale = jnp.asarray(np.exp(rng.normal(size=shape) * 0.3), jnp.float32)
    is_float = jnp.issubdtype(jnp.dtype(kv_dtype), jnp.floating)

    def pool(dim):
        size = (num_pages, kv_heads, page_size, dim)
        values = rng.normal(size=size) if is_float else rng.integers(-3, 4, size=size)
        if is_float:
            poison = np.full(size, np.nan)
            for request, keys in enumerate(kv_len):
                for position in range(int(keys)):
                    page = pages[indptr[request] + position // page_size]
                    poison[page, :, position % page_size] = 0
            values = values + poison
        return jnp.asarray(values, "float32").astype(kv_dtype)

    cache = PagedKV(k=pool(head_dim), v=pool(v_dim or head_dim), k_scale=scale, v_scale=scale)
    q = jnp.asarray(rng.normal(size=(int(np.sum(q_len)), q_heads, head_dim)), dtype)
    return q, cache, table
