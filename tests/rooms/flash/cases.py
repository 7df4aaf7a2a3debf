"""Cases of traffic, and links, for the tests of plans."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxserve.sharding.flash import CostModel

COST = CostModel(gpus=8, up_rate=448e9, out_rate=12.5e9)


def server_counts(max_servers=9, most=10**6):
    """Square matrices: dense, sparse, with large entries among small ones."""
    entry = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, most))
    return st.integers(1, max_servers).flatmap(
        lambda n: hnp.arrays(np.int64, (n, n), elements=entry)
    )


def gpu_counts(max_servers=4, max_gpus=4, most=1000):
    """Traffic of GPUs, `[n, m, n, m]`."""
    entry = st.one_of(st.just(0), st.integers(0, most))
    return st.tuples(st.integers(1, max_servers), st.integers(1, max_gpus)).flatmap(
        lambda size: hnp.arrays(np.int64, (*size, *size), elements=entry)
    )


def off_diagonal(counts):
    return counts * (1 - np.eye(len(counts), dtype=np.int64))


def largest_sum(counts):
    counts = off_diagonal(counts)
    return max(counts.sum(axis=0).max(), counts.sum(axis=1).max())


def links(gpus, *, up=9.0, latency=0.0, incast=0.0):
    """One row per second between servers."""
    return CostModel(
        gpus=gpus, up_rate=up, out_rate=1.0, up_latency=latency / 4, out_latency=latency,
        incast=incast,
    )  # fmt: skip
