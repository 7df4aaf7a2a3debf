"""Attention against the cache in plain XLA: fast on a CPU, acceptable on any GPU.

Keys are visited tile by tile in a loop whose trip count is dynamic, with a running softmax, so one
compiled step serves every context length, reads no more than a tile too much, and stays small: a
branch per length instead costs five times the compile time and is no faster.

A tile that a row may not see leaves the row's state exactly as it was, so a row's result does not
depend on how long its neighbours are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.attention.metadata import ScoreRule
from jaxserve.attention.softmax import MASKED, State

Tile = tuple[Array, Array]
"""Keys and values of one tile."""


def causal(
    q: Float[Array, "batch time q_heads head_dim"],
    k: Float[Array, "batch time kv_heads head_dim"],
    v: Float[Array, "batch time kv_heads head_dim"],
    *,
    rule: ScoreRule,
    sinks: Float[Array, " q_heads"] | None = None,
) -> Float[Array, "batch time q_heads head_dim"]:
    """Plain causal attention without a cache; differentiable."""
    batch, time, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, time, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    position = jnp.arange(time)
    seen = position[None, :] <= position[:, None]
    seen &= rule.in_window(position[:, None], position[None, :])
    scores = jnp.where(seen, rule.scores(scores), MASKED)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], -1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :time].astype(q.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


def padded(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch time heads head_dim"],
    v: Float[Array, "batch time heads head_dim"],
    seen: Bool[Array, "batch time"],
    *,
    rule: ScoreRule,
) -> Float[Array, "batch time heads head_dim"]:
    """Attention of every token to every key that may be seen; differentiable."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None, :], rule.scores(scores), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def begin(shape: tuple[int, ...], sinks: Float[Array, " q_heads"] | None = None) -> State:
    """Return the state of queries that have seen no key, or each its head's sink.

    Args:
        shape: Of the queries, `[rows, kv_heads, queries, head_dim]`; those of a head lie side by
            side.
        sinks: Score of a key without a value, per head; None has none.
    """
    out = jnp.zeros(shape, jnp.float32)
    if sinks is None:
        top = jnp.full(shape[:-1], MASKED, jnp.float32)
        return out, top, jnp.zeros(shape[:-1], jnp.float32)
    by_head = sinks.astype(jnp.float32).reshape(shape[1], -1)
    top = jnp.repeat(by_head, shape[2] // by_head.shape[1], axis=1)
    return out, jnp.broadcast_to(top, shape[:-1]), jnp.ones(shape[:-1], jnp.float32)


def visit(
    state: State,
    q: Float[Array, "rows kv_heads queries head_dim"],
    k: Float[Array, "rows kv_heads keys head_dim"],
    v: Float[Array, "rows kv_heads keys head_dim"],
    seen: Bool[Array, "rows queries keys"],
    *,
    rule: ScoreRule,
) -> State:
    """Let queries see some more keys.

    Args:
        state: What they have seen so far; unchanged where `seen` is false throughout.
        q: Queries that share a key-value head lie side by side.
        k: Keys.
        v: Values.
        seen: Which query may see which key.
        rule: How products become scores.

    Source: the running softmax of FlashAttention.
    """
    out, top, mass = state
    scores = jnp.einsum("rkqd,rksd->rkqs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None], rule.scores(scores), MASKED)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    fade = jnp.exp(top - new_top)
    mass = mass * fade + jnp.sum(weights, axis=-1)
    part = jnp.einsum(
        "rkqs,rksd->rkqd", weights.astype(q.dtype), v, preferred_element_type=jnp.float32
    )
    return out * fade[..., None] + part, new_top, mass


def finish(state: State, dtype: jnp.dtype) -> Float[Array, "rows kv_heads queries head_dim"]:
    """Turn a state into the attention output."""
    out, _, mass = state
    return (out / jnp.maximum(mass, 1e-30)[..., None]).astype(dtype)


def visit_tiles(
    state: State,
    q: Float[Array, "rows kv_heads queries head_dim"],
    tile: Callable[[Int[Array, ""]], Tile],
    tiles: tuple[Int[Array, ""] | int, Int[Array, ""]],
    num_seen: Int[Array, "rows queries"],
    *,
    tile_len: int,
    rule: ScoreRule,
    position: Int[Array, "rows queries"],
    offset: Int[Array, " rows"] | None = None,
) -> State:
    """Let queries see the first keys of their rows, tile by tile.

    Args:
        state: What they have seen so far.
        q: Queries that share a key-value head lie side by side.
        tile: Gives keys and values `[rows, kv_heads, tile_len, head_dim]` of one tile.
        tiles: The first tile to visit, and the one behind the last.
        num_seen: How many keys, from the first, each query may see unless its window hides them.
        tile_len: Keys per tile.
        rule: How products become scores, and how far back a query sees.
        position: Position of each query.
        offset: Position of the first key of tile 0 in each row; None is 0.
    """
    start = 0 if offset is None else offset[:, None, None]

    def step(i: Int[Array, ""], state: State) -> State:
        k, v = (part.astype(q.dtype) for part in tile(i))
        key = start + (i * tile_len + jnp.arange(tile_len))[None, None, :]
        seen = (key < num_seen[:, :, None]) & rule.in_window(position[:, :, None], key)
        return visit(state, q, k, v, seen, rule=rule)

    return lax.fori_loop(*tiles, step, state)
