"""Attention in float64 with numpy, one row after another: what every kernel must come close to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is different from plain attention.

    Attributes:
        scale: What products are multiplied with.
        causal: Whether a query sees no key behind itself.
        window: Keys that a query sees back from itself.
        score: (score, query position, key positions, head) -> scores.
        mask: (request, token of the request, head) -> whether each key is seen.
        rotate: (vectors, positions) -> vectors; applied to queries and keys.
        softmax: Whether scores become weights by a softmax, or are weights.
    """

    scale: float = 0.125
    causal: bool = True
    window: int | None = None
    score: Callable | None = None
    mask: Callable | None = None
    rotate: Callable | None = None
    softmax: bool = True


def attend(
    q: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    q_len: Sequence[int],
    rules: Rules,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend; request by request.

    Args:
        q: `[tokens, q_heads, dim]`.
        keys: `[kv_heads, kv_len, dim]` for each request.
        values: Likewise.
        q_len: Query tokens of each request, the last ones of it.
        rules: What is different.

    Returns:
        Outputs, and logarithms of mass in base 2.
    """
    tokens, q_heads, _ = q.shape
    o = np.zeros((tokens, q_heads, values[0].shape[-1]))
    lse = np.full((tokens, q_heads), -np.inf)
    token = 0
    for request, count in enumerate(q_len):
        k, v = keys[request].astype(np.float64), values[request].astype(np.float64)
        length = k.shape[1]
        k_pos = np.arange(length)
        if rules.rotate is not None:
            k = rules.rotate(k, k_pos)
        for index in range(count):
            position = length - count + index
            for head in range(q_heads):
                kv_head = head // (q_heads // k.shape[0])
                query = q[token, head].astype(np.float64)
                if rules.rotate is not None:
                    query = rules.rotate(query[None], np.array([position]))[0]
                s = k[kv_head] @ query * rules.scale
                if rules.score is not None:
                    s = rules.score(s, position, k_pos, head)
                seen = np.ones(length, bool)
                if rules.causal:
                    seen &= k_pos <= position
                if rules.window is not None:
                    seen &= k_pos > position - rules.window
                if rules.mask is not None:
                    seen &= rules.mask(request, index, head)
                if not rules.softmax:
                    o[token, head] = np.where(seen, s, 0.0) @ v[kv_head]
                elif seen.any():
                    top = s[seen].max()
                    weights = np.where(seen, np.exp(np.where(seen, s, top) - top), 0.0)
                    o[token, head] = weights @ v[kv_head] / weights.sum()
                    lse[token, head] = (top + np.log(weights.sum())) / np.log(2.0)
            token += 1
    return o, lse
