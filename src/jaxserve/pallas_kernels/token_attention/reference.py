"""The oracle, which is also what runs without Triton: all chosen keys in one flat axis.

A softmax over a list is a segmented maximum and two segmented sums, so lists may have any lengths.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.state import LOG2_E, AttentionState
from jaxserve.pallas_kernels.token_attention.lists import TokenLists
from jaxserve.pallas_kernels.variant import AttentionVariant, OperandMod


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a variant's functions may ask; arrays broadcast against their tile.

    Attributes:
        sm_scale: What products of queries and keys were multiplied with.
        q_heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_dim: Dimension of queries and keys.
        request: Request of each row.
        q_len: Query tokens of the request: one.
        kv_len: Keys of the request.
        head: Query head.
        variant: Says how extras are indexed.
        extra: The arrays.
    """

    sm_scale: float
    q_heads: int
    kv_heads: int
    head_dim: int
    request: Array
    q_len: Array
    kv_len: Array
    head: Array
    variant: AttentionVariant
    extra: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        """Read an extra of kind `scalar`, `head` or `request`."""
        kind, value = self.variant.extras[name], jnp.asarray(self.extra[name])
        if kind == "head":
            return value[self.head]
        return value[self.request] if kind == "request" else value

    def take(self, name: str, *index: Array) -> Array:
        """Look up an extra of kind `array`; indices beyond its ends are clipped."""
        value = jnp.asarray(self.extra[name])
        clipped = (jnp.clip(i, 0, n - 1) for i, n in zip(index, value.shape, strict=True))
        return value[tuple(clipped)]


def token_attention(
    q: Float[Array, "requests q_heads head_dim"],
    cache: PagedKV,
    kv_indptr: Int[Array, " requests_and_one"],
    kv_indices: Int[Array, " pages"],
    kv_len: Int[Array, " requests"],
    tokens: TokenLists,
    *,
    sm_scale: float,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
) -> AttentionState:
    """Attend from one token of each request to the tokens on its lists, in float32."""
    requests, q_heads, head_dim = q.shape
    kv_heads, group = cache.kv_heads, q_heads // cache.kv_heads
    rows = requests * kv_heads
    place = jnp.arange(tokens.positions.shape[0])
    row = jnp.searchsorted(tokens.indptr[1:], place, side="right")
    is_listed = row < rows
    row = jnp.minimum(row, rows - 1)
    request, kv_head = row // kv_heads, row % kv_heads
    k_pos = jnp.where(is_listed, tokens.positions, 0)
    page = jnp.where(is_listed, kv_indices[kv_indptr[request] + k_pos // cache.page_size], 0)
    offset = k_pos % cache.page_size

    def read(pool: Array, scale: Array | None) -> Array:
        listed = pool[page, kv_head, offset].astype(jnp.float32)
        if scale is not None:
            per_page = jnp.ndim(scale) == 2
            listed *= jnp.broadcast_to(
                scale[page, kv_head] if per_page else jnp.broadcast_to(scale, kv_heads)[kv_head],
                listed.shape[:1],
            )[:, None]
        # Memory that is on no list may hold anything.
        return jnp.where(is_listed[:, None], listed, 0.0)

    k, v = read(cache.k, cache.k_scale), read(cache.v, cache.v_scale)
    grouped = q.astype(jnp.float32).reshape(rows, group, head_dim)[row]
    head = kv_head[:, None] * group + jnp.arange(group)[None, :]
    tile = Tile(
        sm_scale=sm_scale,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        request=request[:, None],
        q_len=jnp.ones_like(request)[:, None],
        kv_len=kv_len[request][:, None],
        head=head,
        variant=variant,
        extra=extra,
    )
    q_pos = tile.kv_len - 1
    if variant.q_mod is not None:
        grouped = _halves(variant.q_mod, grouped, tile, q_pos[..., None])
    if variant.k_mod is not None:
        k = _halves(variant.k_mod, k, tile, k_pos[:, None])
    scores = jnp.einsum("kgd,kd->kg", grouped, k) * sm_scale
    if variant.score_mod is not None:
        scores = variant.score_mod(scores, tile, q_pos, k_pos[:, None], head)
    seen = is_listed[:, None]
    if variant.mask_mod is not None:
        seen = seen & variant.mask_mod(tile, q_pos, k_pos[:, None], head)
    seen = jnp.broadcast_to(seen, scores.shape)

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(x, row, rows, indices_are_sorted=True)

    if not variant.use_softmax:
        o = total(jnp.where(seen, scores, 0.0)[:, :, None] * v[:, None, :])
        o = o.reshape(requests, q_heads, v.shape[-1])
        return AttentionState(o=o, lse=jnp.zeros(o.shape[:2], jnp.float32))
    top = jax.ops.segment_max(jnp.where(seen, scores, -jnp.inf), row, rows, indices_are_sorted=True)
    base = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.where(seen, jnp.exp(scores - base[row]), 0.0)
    mass, o = total(weights), total(weights[:, :, None] * v[:, None, :])
    some = jnp.where(mass > 0, mass, 1.0)
    lse = jnp.where(mass > 0, (base + jnp.log(some)) * LOG2_E, -jnp.inf)
    return AttentionState(
        o=(o / some[..., None]).reshape(requests, q_heads, v.shape[-1]),
        lse=lse.reshape(requests, q_heads),
    )


def _halves(mod: OperandMod, x: Array, tile: Tile, position: Array) -> Array:
    half = x.shape[-1] // 2
    column = jnp.arange(half).reshape((1,) * (x.ndim - 1) + (half,))
    return jnp.concatenate(mod(x[..., :half], x[..., half:], tile, position, column), axis=-1)
