"""Sparse attention against float64 over what it says that it reads."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import cpu_kernels
from jaxserve.attention.tactic import reference
from jaxserve.attention.tactic.attention import sparse_decode
from jaxserve.attention.tactic.config import ClusterConfig
from jaxserve.core.errors import UnsupportedError
from tests.rooms.tactic.cases import SCALE, Context, config, random_context
from tests.rooms.tactic.test_select import choose

BACKENDS = ["xla"]
if cpu_kernels.supports_slots(16, 1024, "float32"):
    BACKENDS.append("llvm")


def attend(context: Context, p, settings_, *, backend="xla", dtype=jnp.float32):
    index, keys, values = context.build(settings_)
    shares = jnp.broadcast_to(jnp.asarray(p, jnp.float32), context.length.shape)
    out, stats = sparse_decode(
        jnp.asarray(context.q), keys.astype(dtype), values.astype(dtype),
        jnp.asarray(context.length), index, shares, scale=SCALE, config=settings_, backend=backend,
    )  # fmt: skip
    return np.asarray(out), stats


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
    p=st.sampled_from([0.5, 0.9]),
)
def test_outputs_are_attention_to_what_is_read(backend, seed, lengths, p):
    context = random_context(seed, lengths)
    settings_ = config(tail="drop")
    out, stats = attend(context, p, settings_, backend=backend)
    _, read, _ = choose(context, p, settings_, backend=backend)
    np.testing.assert_allclose(out, context.attend(read), atol=3e-5)
    assert (np.asarray(stats.tokens) == read.sum(-1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", ["drop", "mean"])
def test_all_of_the_mass_is_dense_attention(backend, tail):
    for lengths in [(1, 1024), (30, 700)]:
        context = random_context(7, lengths)
        out, stats = attend(context, 1.0, config(tail=tail), backend=backend)
        np.testing.assert_allclose(out, context.dense(), atol=3e-5)
        assert (np.asarray(stats.tokens) == context.length[:, None]).all()
        assert (np.asarray(stats.mass) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_tokens_yield_zeros(backend):
    out, stats = attend(random_context(7, (0, 500)), 0.9, config(), backend=backend)
    assert not out[0].any()
    assert np.isfinite(out).all()
    assert not np.asarray(stats.tokens)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_may_be_bfloat16(backend):
    context = random_context(8)
    for name in ("keys", "values"):
        rounded = np.asarray(jnp.asarray(getattr(context, name)).astype(jnp.bfloat16))
        setattr(context, name, rounded.astype(np.float32))
    out, _ = attend(context, 1.0, config(), backend=backend, dtype=jnp.bfloat16)
    np.testing.assert_allclose(out, context.dense(), atol=3e-5)


def test_a_mean_value_for_the_rest_is_nearer_than_nothing():
    # As sharp as the heads of real models. Of sharper ones, over clusters that mix clumps, one
    # variance for all dimensions promises too much, and nothing is the better stand-in.
    errors = {"drop": [], "mean": []}
    for seed in range(6):
        context = random_context(seed, sharpness=1.5)
        dense = context.dense()
        for tail, found in errors.items():
            out, _ = attend(context, 0.8, config(tail=tail))
            found.append(np.linalg.norm(out - dense, axis=-1).mean())
    assert np.mean(errors["mean"]) < 0.7 * np.mean(errors["drop"])


def test_what_is_dropped_bounds_the_error():
    context = random_context(9)
    settings_ = config(tail="drop")
    out, _ = attend(context, 0.8, settings_)
    _, read, _ = choose(context, 0.8, settings_)
    largest = np.linalg.norm(context.values, axis=-1).max()
    bound = 2 * (1 - context.mass(read).reshape(2, -1)) * largest
    assert (np.linalg.norm(out - context.dense(), axis=-1) <= bound + 1e-5).all()


def test_slots_that_kernels_cannot_read_are_refused():
    context = random_context(8)
    index, keys, values = context.build(config())
    with pytest.raises(UnsupportedError, match=r"got keys \(2, 2, 1024, 16\) in float16 .*'xla'"):
        sparse_decode(
            jnp.asarray(context.q), keys.astype(jnp.float16), values.astype(jnp.float16),
            jnp.asarray(context.length), index, jnp.ones(2), scale=SCALE, config=config(),
            backend="llvm",
        )  # fmt: skip


def test_short_contexts_are_read_whole():
    context = random_context(10, (500, 1000))
    out, stats = attend(context, 0.5, config(min_context=600))
    np.testing.assert_allclose(out[0], context.dense()[0], atol=3e-5)
    assert (np.asarray(stats.tokens)[0] == 500).all()
    assert (np.asarray(stats.tokens)[1] < 1000).all()


def test_other_lengths_and_shares_compile_nothing():
    sparse_decode.clear_cache()
    for lengths, p in [((10, 1000), 0.9), ((700, 0), 0.5), ((1024, 1024), 1.0)]:
        attend(random_context(1, lengths), p, config())
    assert sparse_decode._cache_size() == 1


@pytest.mark.skipif("llvm" not in BACKENDS, reason="LLVM cannot compile kernels here")
@settings(max_examples=10)
@given(st.data())
def test_runs_of_places_are_read_where_they_lie(data):
    from jaxserve.cpu_kernels import attend_spans

    seed = data.draw(st.integers(0, 1000))
    context = random_context(seed, (1024, 1024))
    runs = data.draw(st.lists(st.tuples(st.integers(0, 1023), st.integers(1, 150)), max_size=9))
    runs = [(begin, min(size, 1024 - begin)) for begin, size in runs]
    begin, size = np.zeros((2, 2, 2, 12), np.int32)
    for i, (low, count) in enumerate(runs):
        begin[:, :, i], size[:, :, i] = low, count
    total = np.full((2, 2), sum(count for _, count in runs), np.int32)
    total[1, 0] = 0
    q = context.q * np.float32(SCALE)
    out, top, mass = (
        np.asarray(x)
        for x in attend_spans(
            jnp.asarray(q), jnp.asarray(context.keys), jnp.asarray(context.values),
            jnp.asarray(begin), jnp.asarray(size), jnp.asarray(total),
        )
    )  # fmt: skip
    places = np.concatenate([np.arange(b, b + s) for b, s in runs] or [np.arange(0)])
    for row in range(2):
        for head in range(q.shape[1]):
            kv = head // 3
            if not total[row, kv]:
                assert (out[row, head] == 0).all()
                assert (top[row, head], mass[row, head]) == (np.float32(-1e30), 0)
                continue
            scores = context.keys[row, kv, places].astype(np.float64) @ q[row, head]
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(top[row, head], scores.max(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(mass[row, head], weights.sum(), rtol=1e-4)
            want = weights @ context.values[row, kv, places]
            np.testing.assert_allclose(out[row, head], want, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif("llvm" not in BACKENDS, reason="LLVM cannot compile kernels here")
@pytest.mark.parametrize("p", [0.9, 1.0])
def test_long_contexts_are_dealt_out_in_parts(p):
    """More places than the parts of a head hold pieces; heads read different numbers of them."""
    rng = np.random.default_rng(0)
    capacity, dim, settings_ = 12288, 16, config(tail="drop", failure_rate=0.5)
    settings_ = dataclasses.replace(settings_, clusters=ClusterConfig(segment_len=4096))
    keys, values = rng.standard_normal((2, 1, 2, capacity, dim)).astype(np.float32)
    q = rng.standard_normal((1, 4, dim)).astype(np.float32)
    q[:, 2:] *= 6
    length = np.asarray([capacity - 3], np.int32)
    context = Context(q, keys, values, length)
    index, moved_keys, moved_values = context.build(settings_)
    found = {}
    for backend in BACKENDS:
        out, stats = sparse_decode(
            jnp.asarray(q), moved_keys, moved_values, jnp.asarray(length), index,
            jnp.full((1,), p), scale=SCALE, config=settings_, backend=backend,
        )  # fmt: skip
        found[backend] = np.asarray(out), np.asarray(stats.tokens)
    (out, tokens), (expected, wanted) = found["llvm"], found["xla"]
    assert np.abs(tokens - wanted).max() <= 128  # sums in another order may decide about a cluster
    np.testing.assert_allclose(out, expected, atol=0.01 if p < 1 else 3e-5)
    if p == 1:
        assert (tokens == length[0]).all()
        for head in range(4):
            want = reference.attend(
                q[0, head], keys[0, head // 2, : length[0]], values[0, head // 2, : length[0]],
                np.ones(length[0], bool), SCALE,
            )  # fmt: skip
            np.testing.assert_allclose(out[0, head], want, atol=3e-5)
    else:
        assert tokens[0, 0] > 1.5 * tokens[0, 1]
