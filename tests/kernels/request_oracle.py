"""Attention in float64 numpy, request by request: the outside oracle of every backend.

What makes a variant different is written here a second time, so that a mistake in a variant's
functions does not cancel out.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxserve.pallas_kernels.paged import PageTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What differs from plain causal attention."""

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None
    sigmoid_bias: float | None = None
    theta: float | None = None
    first: int = 0
    masks: Sequence[np.ndarray] | None = None
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None


def attend(
    q: np.ndarray,
    k_pool: np.ndarray,
    v_pool: np.ndarray,
    table: PageTable,
    q_len: Sequence[int],
    options: Options,
    *,
    q_start: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend from packed tokens.

    Args:
        q: `[tokens, q_heads, head_dim]`.
        k_pool: `[pages, kv_heads, page_size, head_dim]`.
        v_pool: Likewise.
        table: Pages and lengths.
        q_len: Tokens of each request.
        options: What differs.
        q_start: First token of each request; None packs them.

    Returns:
        Outputs and lse in base 2; zeros and minus infinity where nothing is seen.
    """
    tokens, heads, dim = q.shape
    group = heads // k_pool.shape[1]
    starts = np.concatenate([[0], np.cumsum(q_len)[:-1]]) if q_start is None else q_start
    o = np.zeros((tokens, heads, v_pool.shape[3]))
    lse = np.full((tokens, heads), -np.inf)
    scale = dim**-0.5 if options.scale is None else options.scale
    for r, (start, count, kv_len) in enumerate(zip(starts, q_len, table.kv_len, strict=True)):
        if not count:
            continue
        keys = _dense(k_pool, options.k_scale, table, r)
        values = _dense(v_pool, options.v_scale, table, r)
        queries = q[start : start + count].astype(np.float64)
        position = kv_len - count + np.arange(count)
        if options.theta is not None:
            queries = _rotate(queries, position, options.theta)
            keys = _rotate(keys, np.arange(kv_len), options.theta)
        keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
        scores = queries.swapaxes(0, 1) @ keys.transpose(1, 2, 0) * scale
        seen = _seen(options, r, position, int(kv_len), heads)
        scores = _changed(scores, options, position)
        if options.sigmoid_bias is not None:
            weights = np.where(seen, 1 / (1 + np.exp(-(scores + options.sigmoid_bias))), 0.0)
            o[start : start + count] = (weights @ values.swapaxes(0, 1)).swapaxes(0, 1)
            continue
        sink = np.full(heads, -np.inf) if options.sinks is None else options.sinks
        column = np.broadcast_to(sink[:, None, None], (heads, count, 1))
        scores = np.concatenate([np.where(seen, scores, -np.inf), column], axis=2)
        top = scores.max(axis=2, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
        mass = weights.sum(axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            part = (weights[:, :, :-1] @ values.swapaxes(0, 1)).swapaxes(0, 1)
            part = part / mass.T[:, :, None]
            lse[start : start + count] = ((top[:, :, 0] + np.log(mass)) / np.log(2)).T
        o[start : start + count] = np.where(mass.T[:, :, None] > 0, part, 0.0)
    return o, lse


def _dense(pool: np.ndarray, scale: np.ndarray | None, table: PageTable, r: int) -> np.ndarray:
    """Return `[kv_len, kv_heads, dim]` of one request."""
    pages = table.indices[table.indptr[r] : table.indptr[r + 1]]
    taken = pool[pages].astype(np.float64)
    if scale is not None:
        factor = np.asarray(scale, np.float64)
        factor = factor[pages] if factor.ndim == 2 else np.broadcast_to(factor, (pool.shape[1],))
        taken = taken * (factor[..., None, None] if factor.ndim == 2 else factor[:, None, None])
    return taken.swapaxes(1, 2).reshape(-1, pool.shape[1], pool.shape[3])[: table.kv_len[r]]


def _rotate(x: np.ndarray, position: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[2] // 2
    angle = position[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=2)


def _seen(options: Options, r: int, position: np.ndarray, kv_len: int, heads: int) -> np.ndarray:
    """Return `[heads, q, k]`."""
    key, query = np.arange(kv_len)[None, :], position[:, None]
    seen = np.broadcast_to(key <= query, (position.size, kv_len))
    if not options.causal:
        seen = np.ones_like(seen)
    if options.window is not None:
        seen = seen & ((key > query - options.window) | (key < options.first))
    seen = np.broadcast_to(seen, (heads, *seen.shape))
    return seen if options.masks is None else seen & options.masks[r]


def _changed(scores: np.ndarray, options: Options, position: np.ndarray) -> np.ndarray:
    if options.soft_cap is not None:
        scores = options.soft_cap * np.tanh(scores / options.soft_cap)
    if options.slopes is not None:
        distance = position[:, None] - np.arange(scores.shape[2])[None, :]
        scores = scores - options.slopes[:, None, None] * distance
    return scores
