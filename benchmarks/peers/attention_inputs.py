"""The same queries, keys and values for every implementation of attention; numpy only."""

from collections.abc import Sequence

import numpy as np


def dense_inputs(
    q_len: Sequence[int],
    kv_len: Sequence[int],
    heads: tuple[int, int],
    dim: int,
    seed: int,
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Draw queries, keys and values of each request, `[length, heads, dim]`."""
    rng = np.random.default_rng(seed)

    def draw(lengths: Sequence[int], count: int) -> list[np.ndarray]:
        return [rng.standard_normal((n, count, dim), np.float32) for n in lengths]

    return draw(q_len, heads[0]), draw(kv_len, heads[1]), draw(kv_len, heads[1])
