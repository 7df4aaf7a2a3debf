"""What sparse attention is compared with, on one key-value head, over its tokens by position.

Each function tells which tokens are read besides those that are read anyway. All share one list per
key-value head, ranked like clusters are: by the largest share that a token has for any of the
query heads, tokens that are read anyway counted in. None is made to be fast.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LOWEST = -1e30


def exact_scores(
    q: Float[Array, "group head_dim"], keys: Float[Array, "tokens head_dim"]
) -> Float[Array, "group tokens"]:
    """Return the true scores: the oracle."""
    return jnp.einsum("gd,nd->gn", q, keys.astype(jnp.float32))


def int4_scores(
    q: Float[Array, "group head_dim"], keys: Float[Array, "tokens head_dim"]
) -> Float[Array, "group tokens"]:
    """Return scores of keys in 4 bits, with a scale and an offset per token.

    Source: Twilight, arXiv 2502.02770, section 4 (top-p over keys in 4 bits).
    """
    keys = keys.astype(jnp.float32)
    low, high = keys.min(-1, keepdims=True), keys.max(-1, keepdims=True)
    step = jnp.maximum((high - low) / 15, 1e-12)
    return jnp.einsum("gd,nd->gn", q, jnp.round((keys - low) / step) * step + low)


def page_bounds(
    q: Float[Array, "group head_dim"],
    keys: Float[Array, "tokens head_dim"],
    candidates: Bool[Array, " tokens"],
    *,
    page_size: int = 16,
) -> Float[Array, "group tokens"]:
    """Return for each token the largest score that a key of its page could have.

    Args:
        q: Scaled queries.
        keys: Keys by position; the last page may be partial.
        candidates: Keys that count.
        page_size: Tokens of a page.

    Source: Quest, arXiv 2406.10774, section 3.3.
    """
    tokens, dim = keys.shape
    pages = -(-tokens // page_size)
    rest = pages * page_size - tokens
    padded = jnp.pad(keys.astype(jnp.float32), ((0, rest), (0, 0))).reshape(pages, page_size, dim)
    there = jnp.pad(candidates, (0, rest)).reshape(pages, page_size, 1)
    low = jnp.min(jnp.where(there, padded, jnp.inf), axis=1)
    high = jnp.max(jnp.where(there, padded, -jnp.inf), axis=1)
    used = there.any(axis=1)
    low, high = jnp.where(used, low, 0.0), jnp.where(used, high, 0.0)
    larger = jnp.einsum("gd,pd->gp", jnp.maximum(q, 0), high)
    bound = larger + jnp.einsum("gd,pd->gp", jnp.minimum(q, 0), low)
    return jnp.repeat(bound, page_size, axis=1)[:, :tokens]


def _shares(
    scores: Float[Array, "group tokens"],
    candidates: Bool[Array, " tokens"],
    kept: Float[Array, " group"],
) -> tuple[Float[Array, "group tokens"], Float[Array, " group"]]:
    """Turn scores into shares of the mass, candidates' and kept ones' together."""
    scores = jnp.where(candidates, scores, _LOWEST)
    level = jnp.maximum(kept, scores.max(-1))
    weight = jnp.where(candidates, jnp.exp(scores - level[:, None]), 0.0)
    kept_mass = jnp.exp(kept - level)
    total = kept_mass + weight.sum(-1)
    return weight / total[:, None], kept_mass / total


def top_p(
    scores: Float[Array, "group tokens"],
    candidates: Bool[Array, " tokens"],
    kept: Float[Array, " group"],
    p: Float[Array, ""],
    *,
    order_by: Float[Array, "group tokens"] | None = None,
) -> Bool[Array, " tokens"]:
    """Read the fewest leading tokens with which every query head reaches p, by the given scores.

    Args:
        scores: Scores that masses are computed from.
        candidates: Tokens to choose from.
        kept: Logarithm of the mass that is read anyway.
        p: Share of the mass.
        order_by: Scores that the order is made from, if it is not these.
    """
    share, kept_share = _shares(scores, candidates, kept)
    ranked_by = share if order_by is None else _shares(order_by, candidates, kept)[0]
    order = jnp.argsort(jnp.where(candidates, -ranked_by.max(0), 1.0), stable=True)
    before = jnp.cumsum(share[:, order], axis=-1) - share[:, order]
    # A rounding error is no reason to read on.
    reads = jnp.any(kept_share[:, None] + before < p - 1e-6, axis=0)
    return jnp.zeros_like(candidates).at[order].set(reads) & candidates


def top_k(
    scores: Float[Array, "group tokens"],
    candidates: Bool[Array, " tokens"],
    kept: Float[Array, " group"],
    budget: Int[Array, ""],
) -> Bool[Array, " tokens"]:
    """Read a fixed number of tokens, those with the largest shares."""
    share, _ = _shares(scores, candidates, kept)
    order = jnp.argsort(jnp.where(candidates, -share.max(0), 1.0), stable=True)
    reads = jnp.arange(order.shape[0]) < budget
    return jnp.zeros_like(candidates).at[order].set(reads) & candidates


def recent(candidates: Bool[Array, " tokens"], budget: Int[Array, ""]) -> Bool[Array, " tokens"]:
    """Read the last candidates: with sinks and a window kept anyway, a longer window.

    Source: StreamingLLM, arXiv 2309.17453.
    """
    place = jnp.arange(candidates.shape[0])
    behind = jnp.max(jnp.where(candidates, place, -1)) + 1
    return candidates & (place >= behind - budget)
