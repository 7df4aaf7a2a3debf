"""Matrices of traffic between GPUs, from seeds: what an all-to-all may have to carry."""

from collections.abc import Callable
from typing import Final

import numpy as np

MIB: Final = 2**20


def uniform(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return equal rows for all pairs; `[n, m, n, m]`, as of all that follow."""
    del rng
    return _scale(np.ones((n, m, n, m)), total)


def random(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return rows between none and twice the mean, evenly distributed."""
    return _scale(rng.random((n, m, n, m)), total)


def zipf(exponent: float) -> Callable[[int, int, int, np.random.Generator], np.ndarray]:
    """Return a maker of rows by Zipf's law over shuffled pairs of GPUs."""

    def make(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
        weights = np.arange(1, (n * m) ** 2 + 1, dtype=np.float64) ** -exponent
        rng.shuffle(weights)
        return _scale(weights.reshape(n, m, n, m), total)

    return make


def moe(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return a dispatch to experts: each GPU has as many tokens, experts follow Zipf's law.

    Each GPU has four experts of 8192 bytes per token; each source has preferences of its own
    around the common ones.
    """
    gpus, experts, token = n * m, 4 * n * m, 8192
    popular = np.arange(1, experts + 1, dtype=np.float64) ** -0.5
    rng.shuffle(popular)
    popular /= popular.sum()
    tokens = max(1, total // (gpus * token))
    found = np.empty((gpus, gpus))
    for source in range(gpus):
        own = rng.dirichlet(popular * experts)
        found[source] = rng.multinomial(tokens, own).reshape(gpus, 4).sum(axis=1)
    return _scale(found.reshape(n, m, n, m), total)


def hot_row(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return traffic of which one GPU sends half."""
    found = rng.random((n * m, n * m))
    found[0] *= found.sum() / found[0].sum()
    return _scale(found.reshape(n, m, n, m), total)


def hot_column(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return traffic of which one GPU gets half."""
    found = rng.random((n * m, n * m))
    found[:, 0] *= found.sum() / found[:, 0].sum()
    return _scale(found.reshape(n, m, n, m), total)


def hot_pair(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return traffic of which one pair of GPUs, of different servers, has half."""
    found = rng.random((n * m, n * m))
    found[0, -1] += found.sum()
    return _scale(found.reshape(n, m, n, m), total)


def block_diagonal(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return traffic within groups of two servers only."""
    found = rng.random((n, m, n, m))
    group = np.arange(n) // 2
    return _scale(found * (group[:, None] == group)[:, None, :, None], total)


def permutation(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return traffic of each GPU to one other."""
    found = np.zeros((n * m, n * m))
    found[np.arange(n * m), rng.permutation(n * m)] = 1
    return _scale(found.reshape(n, m, n, m), total)


def zero(n: int, m: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return no traffic."""
    del total, rng
    return np.zeros((n, m, n, m), np.int64)


MATRICES: Final = {
    "uniform": uniform,
    "random": random,
    "zipf 0.4": zipf(0.4),
    "zipf 0.8": zipf(0.8),
    "zipf 1.2": zipf(1.2),
    "moe": moe,
    "hot row": hot_row,
    "hot column": hot_column,
    "hot pair": hot_pair,
    "block diagonal": block_diagonal,
    "permutation": permutation,
    "zero": zero,
}
"""Makers by name, of servers, GPUs per server, bytes of all, and a generator of random numbers."""


def make(name: str, n: int, m: int, per_gpu: int, seed: int = 0) -> np.ndarray:
    """Return a matrix of bytes, `[n, m, n, m]`, int64.

    Args:
        name: One of `MATRICES`.
        n: Servers.
        m: GPUs per server.
        per_gpu: Bytes of each GPU, on average.
        seed: Of the random numbers; the same for all names.
    """
    return MATRICES[name](n, m, n * m * per_gpu, np.random.default_rng([seed, n, m]))


def _scale(weights: np.ndarray, total: int) -> np.ndarray:
    return np.rint(weights * (total / weights.sum())).astype(np.int64)
