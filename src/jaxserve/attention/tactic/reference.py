"""The slow, obvious version in float64 numpy: the oracle of the tests."""

import numpy as np
from numpy.typing import NDArray


def weights(
    q: NDArray[np.floating], keys: NDArray[np.floating], scale: float
) -> NDArray[np.float64]:
    """Return the softmax of one query over keys.

    Args:
        q: The query, `[head_dim]`.
        keys: Keys, `[tokens, head_dim]`.
        scale: Multiplies the products.
    """
    scores = keys.astype(np.float64) @ q.astype(np.float64) * scale
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def attend(
    q: NDArray[np.floating],
    keys: NDArray[np.floating],
    values: NDArray[np.floating],
    read: NDArray[np.bool_],
    scale: float,
) -> NDArray[np.float64]:
    """Attend from one query to the keys that are read."""
    chosen = weights(q, keys[read], scale)
    return chosen @ values[read].astype(np.float64)


def mass(
    q: NDArray[np.floating],
    keys: NDArray[np.floating],
    read: NDArray[np.bool_],
    scale: float,
) -> float:
    """Return the share of the softmax mass that lies on the keys that are read."""
    return float(weights(q, keys, scale)[read].sum())


def fewest(
    q: NDArray[np.floating], keys: NDArray[np.floating], p: float, scale: float
) -> NDArray[np.bool_]:
    """Return the smallest set of keys whose mass is at least p: exact top-p."""
    found = weights(q, keys, scale)
    order = np.argsort(-found, kind="stable")
    count = int(np.searchsorted(np.cumsum(found[order]), p - 1e-12)) + 1
    read = np.zeros(len(found), bool)
    read[order[:count]] = True
    return read


def tokens_that_count(
    q: NDArray[np.floating],
    keys: NDArray[np.floating],
    least: NDArray[np.floating],
    scale: float,
) -> NDArray[np.bool_]:
    """Tell which tokens have enough weight for any query of a group: the second level.

    Args:
        q: Queries of the group, `[group, head_dim]`.
        keys: Keys, `[tokens, head_dim]`.
        least: Logarithm of the weight that is enough, for each query.
        scale: Multiplies the products.
    """
    scores = q.astype(np.float64) @ keys.astype(np.float64).T * scale
    return (scores >= np.asarray(least, np.float64)[:, None]).any(axis=0)
