"""Rows of an engine's step: entries of segments, in slots and in pages, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxserve import cpu_kernels
from jaxserve.attention import xla
from jaxserve.attention.metadata import ScoreRule
from jaxserve.attention.tactic import reference
from jaxserve.attention.tactic.config import ClusterConfig, EstimatorConfig, TacticConfig
from jaxserve.attention.tactic.rows import attend_rows, no_clusters, plan_rows, set_entry
from tests.cases import slow

ROWS, KV_HEADS, GROUP, DIM, PAGE, SEGMENT, CAPACITY = 3, 2, 2, 16, 8, 64, 256
SCALE = DIM**-0.5
CONFIG = TacticConfig(
    min_context=0,
    dense_layers=0,
    window=16,
    tail="drop",
    max_share=1.0,
    clusters=ClusterConfig(segment_len=SEGMENT, cluster_size=4),
)
needs_llvm = pytest.mark.skipif(not cpu_kernels.is_available(), reason="needs llvmlite")


def draw(seed, *, sharpness=3.0):
    """Keys in a few bundles, and queries that look at one."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((ROWS, KV_HEADS, 12, DIM)).astype(np.float32)
    chosen = random.integers(0, 12, (ROWS, KV_HEADS, CAPACITY))
    keys = np.take_along_axis(centres, chosen[..., None], axis=2)
    keys = keys + 0.3 * random.standard_normal(keys.shape).astype(np.float32)
    values = random.standard_normal(keys.shape).astype(np.float32)
    q = centres[:, :, :1] + 0.3 * random.standard_normal((ROWS, KV_HEADS, GROUP, DIM))
    return (sharpness * q).astype(np.float32), keys.astype(np.float32), values


def to_pages(slots, order):
    """Scatter slots over pages in some order; page 0 holds nothing."""
    out = np.zeros((1 + len(order), KV_HEADS, PAGE, DIM), np.float32)
    parts = np.asarray(slots).reshape(ROWS, KV_HEADS, -1, PAGE, DIM).swapaxes(1, 2)
    out[1 + order] = parts.reshape(-1, KV_HEADS, PAGE, DIM)
    return jnp.asarray(out)


def dense_state(q, keys, values, length):
    """The state over all keys, as a step measures it."""
    seen = jnp.arange(CAPACITY) < length[:, None, None]
    seen = jnp.broadcast_to(seen, (ROWS, GROUP, CAPACITY))
    rule = ScoreRule(scale=SCALE)
    return xla.visit(xla.begin(q.shape), q, keys, values, seen, rule=rule)


@partial(jax.jit, static_argnames="config")
def make_entries(keys, values, entries, *, config):
    """Cluster all segments of all rows."""
    layer = no_clusters(1 + entries.size, KV_HEADS, DIM, config=config)

    def add(i, layer):
        row, number = i // entries.shape[1], i % entries.shape[1]
        at, size = (row, 0, number * SEGMENT, 0), (1, KV_HEADS, SEGMENT, DIM)
        part = [lax.dynamic_slice(x, at, size)[0] for x in (keys, values)]
        return set_entry(layer, *part, number, entries[row, number], config=config)

    return lax.fori_loop(0, entries.size, add, layer)


@partial(jax.jit, static_argnames=("config", "layout", "backend"))
def run(q, keys, values, length, entries, p, paged, layer, *, config, layout, backend):
    most = entries.shape[1]
    sparse = plan_rows(
        p, length, jnp.minimum(length // SEGMENT, most), entries, (layer,),
        config=config, is_measured=jnp.bool_(True),
    )  # fmt: skip
    grouped = q.reshape(ROWS, KV_HEADS, GROUP, DIM)
    cache = (keys, values, None) if layout == "slots" else paged
    return attend_rows(
        q, *cache, sparse, lambda: dense_state(grouped, keys, values, length), scale=SCALE,
        backend=backend,
    )  # fmt: skip


WAYS = [
    ("slots", "xla"),
    ("pages", "xla"),
    ("pages", "reference"),
    pytest.param("slots", "llvm", marks=needs_llvm),
]


def step(seed, length, p, *, layout, backend, config=CONFIG):
    q, keys, values = (jnp.asarray(x) for x in draw(seed))
    order = np.random.default_rng(seed).permutation(ROWS * CAPACITY // PAGE)
    most = CAPACITY // SEGMENT
    entries = 1 + np.random.default_rng(seed).permutation(ROWS * most).reshape(ROWS, most)
    entries = jnp.asarray(entries, jnp.int32)
    out = run(
        q.reshape(ROWS, -1, DIM), keys, values, jnp.asarray(length), entries,
        jnp.asarray(p, jnp.float32), (*(to_pages(x, order) for x in (keys, values)),
        jnp.asarray(1 + order.reshape(ROWS, -1), jnp.int32)),
        make_entries(keys, values, entries, config=config), config=config, layout=layout,
        backend=backend,
    )  # fmt: skip
    return [np.asarray(x) for x in (q, keys, values)], [np.asarray(x) for x in out]


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        slow("slots", "xla"),
        ("pages", "xla"),
        slow("pages", "reference"),
        pytest.param("slots", "llvm", marks=needs_llvm),
    ],
)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(SEGMENT, CAPACITY), min_size=3, max_size=3),
    p=st.sampled_from([0.6, 0.9, 0.97]),
)
def test_what_is_left_unread_bounds_the_error(layout, backend, seed, lengths, p):
    length = np.asarray(lengths, np.int32)
    (q, keys, values), (out, counts, sums) = step(
        seed, length, [p] * ROWS, layout=layout, backend=backend
    )
    out = out.reshape(q.shape)
    read, there, heads, measured, _ = counts
    assert heads == ROWS * KV_HEADS
    assert measured == ROWS * KV_HEADS * GROUP
    assert there == KV_HEADS * length.sum()
    assert 0 < read <= there
    worst = 0.0
    for row in range(ROWS):
        everything = np.ones(length[row], bool)
        for head in range(KV_HEADS):
            k, v = keys[row, head, : length[row]], values[row, head, : length[row]]
            for member in range(GROUP):
                whole = reference.attend(q[row, head, member], k, v, everything, SCALE)
                error = np.abs(out[row, head, member] - whole).max()
                worst = max(worst, error / (2 * np.abs(v).max()))
    # |out - whole| <= 2 (1 - mass) max |v|, for the head with the least mass too.
    assert worst <= measured - sums[1] + 1e-4
    assert sums[1] / measured >= p - 0.05


@pytest.mark.parametrize(("layout", "backend"), WAYS)
def test_all_ways_read_the_same(layout, backend):
    length = np.asarray([256, 130, 200], np.int32)
    _, first = step(3, length, [0.9, 0.8, 0.9], layout="slots", backend="xla")
    _, other = step(3, length, [0.9, 0.8, 0.9], layout=layout, backend=backend)
    # The kernels add up in another order, which may decide about a cluster.
    np.testing.assert_allclose(other[0], first[0], atol=0.05 if backend == "llvm" else 1e-5)
    np.testing.assert_allclose(other[1], first[1], atol=64)  # a cluster more or less
    np.testing.assert_allclose(other[2], first[2], rtol=0.02)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("xla", "hyperbola"),
        ("xla", "centroid"),
        pytest.param("llvm", "hyperbola", marks=[needs_llvm, pytest.mark.slow]),
        pytest.param("llvm", "centroid", marks=needs_llvm),
    ],
)
def test_every_estimator_finds_tokens_where_they_lie(name, backend):
    config = TacticConfig(
        min_context=0, window=16, max_share=1.0, clusters=CONFIG.clusters,
        estimator=EstimatorConfig(name=name),
    )  # fmt: skip
    length = np.asarray([256, 256, 200], np.int32)
    (q, keys, values), (out, counts, _) = step(
        5, length, [0.9] * ROWS, layout="slots", backend=backend, config=config
    )
    assert counts[0] < 0.8 * counts[1]
    everything = np.ones(256, bool)
    whole = reference.attend(q[0, 1, 0], keys[0, 1], values[0, 1], everything, SCALE)
    assert np.abs(out.reshape(q.shape)[0, 1, 0] - whole).max() < 0.5 * np.abs(values).max()


@pytest.mark.parametrize(("layout", "backend"), [("slots", "xla"), ("pages", "reference")])
def test_rows_that_read_everything_or_nothing_are_left_alone(layout, backend):
    length = np.asarray([256, 256, 0], np.int32)
    way = {"layout": layout, "backend": backend}
    _, (_, counts, _) = step(1, length, [1.0, 0.9, 0.9], **way)
    assert counts[2] == KV_HEADS  # row 1 alone
    assert counts[1] == KV_HEADS * 256
    _, (out, counts, sums) = step(1, length, [1.0] * 3, **way)
    assert not counts.any()
    assert not sums.any()
    assert not out.any()
