"""What is selected, by its true mass in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import cpu_kernels
from jaxserve.attention.tactic import reference
from jaxserve.attention.tactic.select import read_mask, select
from tests.rooms.tactic.cases import (
    CAPACITY,
    DIM,
    GROUP,
    HEADS,
    SCALE,
    Context,
    by_position,
    config,
    random_context,
)

ESTIMATORS = ("sampled", "hyperbola", "centroid")
DEFAULT = config()
SAMPLED = config(head_len=64, num_strata=8, samples_per_stratum=16)
"""As many samples as clustered tokens of such short contexts allow."""


def kept_log_mass(context: Context, end: np.ndarray, sinks: int) -> np.ndarray:
    """Return the logarithm of the mass that is read anyway, from float64."""
    rows = len(context.length)
    grouped = context.q.reshape(rows, HEADS, GROUP, DIM).astype(np.float64) * SCALE
    scores = np.einsum("rkgd,rksd->rkgs", grouped, context.keys.astype(np.float64))
    place = np.arange(CAPACITY)
    always = (place < sinks) | (place >= np.asarray(end)[:, None])
    always &= place < context.length[:, None]
    scores = np.where(always[:, None, None], scores, -np.inf)
    return np.log(np.maximum(np.exp(scores).sum(-1), 1e-300))


def choose(context: Context, p, settings_=DEFAULT, *, backend="xla"):
    """Select, and return the selection with its mask by position."""
    index, keys, _ = context.build(settings_)
    rows = len(context.length)
    q = jnp.asarray(context.q.reshape(rows, HEADS, GROUP, DIM) * np.float32(SCALE))
    kept = jnp.asarray(kept_log_mass(context, index.end, settings_.sinks), jnp.float32)
    shares = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (rows,))
    chosen = select(q, keys, index, kept, shares, config=settings_, backend=backend)
    mask = read_mask(chosen, index, jnp.asarray(context.length), config=settings_)
    return chosen, by_position(np.asarray(mask), index), index


def fraction(context: Context, read: np.ndarray) -> np.ndarray:
    return read.sum(-1) / context.length[:, None]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_of_the_mass_is_everything(name):
    context = random_context(0)
    _, read, _ = choose(context, 1.0, config(name=name))
    assert (read == (np.arange(CAPACITY) < context.length[:, None])[:, None]).all()


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(ESTIMATORS), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_masks_say_what_selections_say(seed, name, p):
    context = random_context(seed)
    settings_ = config(name=name)
    chosen, read, index = choose(context, p, settings_)
    always = context.length - index.end + np.minimum(settings_.sinks, index.end)
    assert (read.sum(-1) == chosen.num_tokens + np.asarray(always)[:, None]).all()
    assert (np.asarray(chosen.size).sum(-1) == chosen.num_tokens).all()
    # The last cluster is read to its end, or some dozens of tokens at a time of a large one.
    sizes = np.asarray(chosen.size)
    assert (np.diff((sizes > 0).astype(int), axis=-1) <= 0).all()


def test_the_default_reaches_its_target_and_reads_little_more_than_the_fewest():
    reached, shares, best = [], [], []
    for seed in range(12):
        context = random_context(seed, (1000, 1000), sharpness=1.5)
        _, read, _ = choose(context, 0.9, SAMPLED)
        reached.append(context.mass(read))
        shares.append(fraction(context, read))
        for row in range(2):
            for head in range(HEADS):
                fewest = [
                    reference.fewest(q, context.keys[row, head, :1000], 0.9, SCALE)
                    for q in context.q[row, head * GROUP : (head + 1) * GROUP]
                ]
                best.append(np.logical_or.reduce(fewest).mean())
    assert (np.concatenate(reached) >= 0.88).mean() >= 0.9
    assert np.mean(shares) <= 1.5 * np.mean(best) + 0.03


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("p", [0.3, 0.8, 0.95])
def test_attention_to_all_alike_reads_a_share_of_about_p(name, p):
    context = random_context(1, (1000, 700))
    context.q[:] = 0
    _, read, _ = choose(context, p, config(name=name, failure_rate=0.5))
    assert (fraction(context, read) >= p - 0.01).all()
    assert (fraction(context, read) <= p + 0.05).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_identical_keys_are_attention_to_all_alike(name):
    context = random_context(1)
    context.keys[:] = context.keys[:, :, :1]
    chosen, read, _ = choose(context, 0.8, config(name=name, failure_rate=0.5))
    assert np.abs(fraction(context, read) - 0.8).max() < 0.05
    np.testing.assert_allclose(chosen.estimated, context.mass(read), atol=0.01)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(0, 999), st.integers(0, GROUP - 1))
def test_a_planted_needle_is_always_selected(seed, place, asking):
    context = random_context(seed, (1000, 1000))
    # One key that one query of the group wants: as long as the longest others, and all that the
    # query attends to.
    for head in range(HEADS):
        q = context.q[:, head * GROUP + asking].astype(np.float64)
        context.keys[:, head, place] = 9 * q / np.linalg.norm(q, axis=-1, keepdims=True)
        context.q[:, head * GROUP + asking] = 16 * q / np.linalg.norm(q, axis=-1, keepdims=True)
    _, read, _ = choose(context, 0.8)
    assert read[:, :, place].all()
    assert (context.mass(read)[:, :, asking] >= 0.78).all()


@settings(max_examples=6)
@given(st.integers(0, 10_000))
def test_rows_of_one_batch_may_want_different_shares(seed):
    context = random_context(seed, (700, 1000))
    mixed, read, _ = choose(context, [0.6, 0.95])
    for row, p in enumerate([0.6, 0.95]):
        alone = Context(
            context.q[row : row + 1], context.keys[row : row + 1],
            context.values[row : row + 1], context.length[row : row + 1],
        )  # fmt: skip
        chosen, own, _ = choose(alone, p)
        assert (own[0] == read[row]).all()
        assert (chosen.num_tokens[0] == mixed.num_tokens[row]).all()


def test_heads_choose_for_themselves():
    context = random_context(3, sharpness=6.0)
    context.q[:, :GROUP] = 0
    chosen, _, _ = choose(context, 0.9)
    assert (np.asarray(chosen.num_tokens)[:, 0] > 1.3 * np.asarray(chosen.num_tokens)[:, 1]).all()


@settings(max_examples=6)
@given(st.integers(0, 10_000), st.sampled_from(ESTIMATORS))
def test_a_larger_share_never_reads_less(seed, name):
    context = random_context(seed)
    settings_ = config(name=name)
    counts = [
        np.asarray(choose(context, p, settings_)[0].num_tokens) for p in (0.5, 0.7, 0.9, 0.99)
    ]
    assert (np.diff(counts, axis=0) >= 0).all()


def test_diffuse_heads_are_read_whole():
    context = random_context(3)
    context.q[:, :GROUP] = 0
    _, read, _ = choose(context, 0.8, config(max_share=0.5))
    assert (fraction(context, read)[:, 0] == 1).all()


def test_what_is_read_anyway_may_be_enough():
    context = random_context(3)
    for row, length in enumerate(context.length):
        context.keys[row, :, length - 1] = 5 * context.keys[row, :, length - 1]
        context.q[row] = np.repeat(context.keys[row, :, length - 1], GROUP, axis=0)
    chosen, _, _ = choose(context, 0.9)
    assert not np.asarray(chosen.num_tokens).any()
    assert (np.asarray(chosen.estimated) > 0.9).all()


def test_a_lower_failure_rate_reads_more_and_fails_less():
    failures, counts = [], []
    for rate in (0.5, 0.2, 0.02):
        missed, total = [], 0
        for seed in range(5):
            context = random_context(seed, (1000, 1000), clumps=60)
            chosen, read, _ = choose(context, 0.9, config(failure_rate=rate))
            missed.append((context.mass(read).min(-1) < 0.9).mean())
            total += int(np.asarray(chosen.num_tokens).sum())
        failures.append(np.mean(missed))
        counts.append(total)
    assert counts[0] < counts[1] < counts[2]
    assert failures[0] >= failures[1] >= failures[2]
    assert failures[0] > failures[2]


def test_estimated_mass_is_near_the_true_one():
    errors = []
    for seed in range(6):
        context = random_context(seed, sharpness=1.5)
        chosen, read, _ = choose(context, 0.9, SAMPLED)
        errors.append(np.asarray(chosen.estimated) - context.mass(read))
    assert np.abs(np.concatenate(errors)).mean() < 0.03


def test_rows_that_are_not_clustered_select_nothing():
    context = random_context(3, (10, 0))
    chosen, read, _ = choose(context, 0.9)
    assert not np.asarray(chosen.num_tokens).any()
    assert (read.sum(-1) == context.length[:, None]).all()


def test_settings_can_be_compared_and_hashed():
    assert dataclasses.replace(DEFAULT) == DEFAULT
    assert hash(dataclasses.replace(DEFAULT)) == hash(DEFAULT)


@pytest.mark.skipif(not cpu_kernels.supports_slots(DIM, CAPACITY, "float32"), reason="no LLVM here")
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.tuples(st.integers(0, CAPACITY), st.integers(0, CAPACITY)),
    p=st.tuples(st.floats(0.3, 0.99), st.sampled_from([0.9, 1.0])),
    changes=st.sampled_from(
        [{}, {"failure_rate": 0.5}, {"control_variate": False}, {"correction": "none"}]
    ),
)
def test_the_kernel_chooses_what_xla_does(seed, lengths, p, changes):
    context = random_context(seed, lengths)
    settings_ = config(max_share=0.7, **changes)
    index, keys, _ = context.build(settings_)
    q = jnp.asarray(context.q.reshape(2, HEADS, GROUP, DIM) * np.float32(SCALE))
    kept = jnp.asarray(kept_log_mass(context, index.end, settings_.sinks), jnp.float32)
    want, found = (
        select(q, keys, index, kept, jnp.asarray(p, jnp.float32), config=settings_, backend=backend)
        for backend in ("xla", "llvm")
    )
    # Sums in another order move a share across the border of its bucket, rarely.
    masks = [
        np.asarray(read_mask(each, index, jnp.asarray(context.length), config=settings_))
        for each in (want, found)
    ]
    assert (masks[0] != masks[1]).sum() <= 2 * settings_.clusters.cluster_size
    assert (np.asarray(found.num_tokens) == np.asarray(found.size).sum(-1)).all()
    same = (masks[0] == masks[1]).all(-1)
    for name in ("level", "estimated", "tail_mass"):
        np.testing.assert_allclose(
            np.asarray(getattr(found, name))[same], np.asarray(getattr(want, name))[same],
            rtol=2e-3, atol=2e-3,
        )  # fmt: skip
