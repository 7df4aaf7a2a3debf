"""The cluster index against k-means in float64, and the laws that it must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.attention.tactic.clustering import append_segment, cluster_segment, empty_index
from tests.rooms.tactic.cases import CAPACITY, SMALL, Context, config, random_context

ONE = config(sinks=0)
LENGTH = SMALL.clusters.segment_len


def _clusters(**changes):
    return dataclasses.replace(SMALL.clusters, **changes)


def check_mean(found, mean) -> None:
    """Compare with a mean in float64, as exactly as the index holds it."""
    rtol = 2.0**-8 if found.dtype == jnp.bfloat16 else 0.0
    np.testing.assert_allclose(np.asarray(found, np.float64), mean, rtol=rtol, atol=2e-5)


def check_index(context: Context, index, keys, values) -> None:
    """Every token is in one place; every clustered one in one cluster, whose means are its own."""
    permutation = np.asarray(index.permutation)
    assert (np.sort(permutation, axis=-1) == np.arange(CAPACITY)).all()
    moved = permutation[..., None]
    assert (np.asarray(keys) == np.take_along_axis(context.keys, moved, axis=2)).all()
    assert (np.asarray(values) == np.take_along_axis(context.values, moved, axis=2)).all()
    sizes, begin, end = (np.asarray(x) for x in (index.sizes, index.begin, index.end))
    for row in range(sizes.shape[0]):
        sinks = min(SMALL.sinks, end[row])
        for head in range(sizes.shape[1]):
            # What is not clustered keeps its place, and segments keep their tokens.
            place = permutation[row, head]
            fixed = np.r_[np.arange(sinks), np.arange(end[row], CAPACITY)]
            assert (place[fixed] == fixed).all()
            assert (place // LENGTH == np.arange(CAPACITY) // LENGTH).all()
            used = np.flatnonzero(sizes[row, head])
            runs = [begin[row, head, c] + np.arange(sizes[row, head, c]) for c in used]
            covered = np.concatenate(runs) if runs else np.arange(0)
            assert (np.sort(covered) == np.arange(sinks, end[row])).all()
            for c, run in zip(used, runs, strict=True):
                own = np.asarray(keys)[row, head, run].astype(np.float64)
                mean = own.mean(0)
                check_mean(index.centroids[row, head, c], mean)
                variance = np.square(own - mean).mean()
                np.testing.assert_allclose(index.spread[row, head, c], variance, atol=5e-5)
                of_values = np.asarray(values)[row, head, run].astype(np.float64).mean(0)
                check_mean(index.value_means[row, head, c], of_values)


@settings(max_examples=6)
@given(
    st.integers(0, 1000),
    st.integers(0, CAPACITY),
    st.integers(0, CAPACITY),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_every_token_is_in_one_cluster_or_read_anyway(seed, first, second, dtype):
    context = random_context(seed, (first, second))
    index, keys, values = context.build(config(clusters=_clusters(dtype=dtype)))
    assert index.centroids.dtype == index.value_means.dtype == dtype
    check_index(context, index, keys, values)
    for row, length in enumerate((first, second)):
        want = max(length - SMALL.window, 0)
        is_too_short = want - SMALL.sinks < SMALL.clusters.cluster_size
        assert index.end[row] == (0 if is_too_short else want)


def lloyd(x: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each point after some iterations, and its distance, in float64."""
    member = np.full(len(x), -1)
    for step in range(iterations + 1):
        distance = np.square(x[:, None] - centroids[None]).sum(-1)
        after = distance.argmin(1)
        if step == iterations or (after == member).all():
            break
        member = after
        for c in range(len(centroids)):
            if (member == c).any():
                centroids[c] = x[member == c].mean(0)
    return after, distance.min(1)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.sampled_from([0, 1, 10]), st.none() | st.integers(0, LENGTH - 1))
def test_clusters_are_those_of_lloyds_algorithm_and_far_keys_are_apart(seed, iterations, far):
    x = random_context(seed).keys[0, 0, :LENGTH]
    if far is not None:
        x[far] = 10 * x[far] / np.linalg.norm(x[far])
    settings_ = config(sinks=0, clusters=_clusters(max_iterations=iterations, seed=seed % 3))
    found = cluster_segment(jnp.asarray(x), jnp.asarray(x), 0, LENGTH, config=settings_)
    drawn = jax.random.permutation(jax.random.key(settings_.clusters.seed), LENGTH)
    # One of 16 clusters is for a key that lies far from the others.
    count = len(found.sizes) - 1
    start = x[np.asarray(drawn)[:count]].astype(np.float64)
    want, off = lloyd(x.astype(np.float64), start, iterations)
    if off.max() > 2 * off.mean():
        want[off.argmax()] = count
    assert (np.asarray(found.sizes) == np.bincount(want, minlength=count + 1)).all()
    assert (np.asarray(found.order) == np.argsort(want, kind="stable")).all()


def test_the_same_seed_gives_the_same_clusters_and_another_one_others():
    context = random_context(5)
    first, second = (context.build(SMALL)[0] for _ in range(2))
    other, _, _ = context.build(config(clusters=_clusters(seed=1)))
    assert (np.asarray(first.permutation) == np.asarray(second.permutation)).all()
    assert (np.asarray(first.permutation) != np.asarray(other.permutation)).any()


def test_clusters_do_not_depend_on_what_lies_behind_the_prompt_or_in_other_rows():
    context = random_context(6)
    alone = context.build(SMALL)[0]
    context.keys[0, :, 700:] = 1e4
    context.keys[1] = -context.keys[1]
    changed = context.build(SMALL)[0]
    assert (np.asarray(alone.permutation[0]) == np.asarray(changed.permutation[0])).all()
    assert (np.asarray(alone.centroids[0]) == np.asarray(changed.centroids[0])).all()


@pytest.mark.parametrize("length", [0, 1, 20, 35])
def test_contexts_shorter_than_a_cluster_are_not_clustered(length):
    index, _, _ = random_context(1, (length,)).build(SMALL)
    assert index.end.tolist() == [0]
    assert not np.asarray(index.sizes).any()


def test_rows_without_room_for_a_segment_have_no_clusters():
    small = config(clusters=_clusters(segment_len=2048))
    index, keys, _ = random_context(1).build(small)
    assert index.sizes.shape[-1] == 0
    assert index.end.tolist() == [0, 0]
    assert keys.shape[2] == CAPACITY


def test_identical_keys_make_one_cluster_per_segment():
    context = random_context(2)
    context.keys[:] = context.keys[:, :, :1]
    index, keys, values = context.build(SMALL)
    check_index(context, index, keys, values)
    assert (np.count_nonzero(index.sizes, axis=-1) == [[3, 3], [4, 4]]).all()


def test_appended_tokens_are_clustered_as_a_prompt_would_be():
    context = random_context(3, (300, 650))
    whole = random_context(3, (900, 650))
    index, keys, values = context.build(SMALL)
    end = jnp.asarray([900 - SMALL.window, 0])
    ends = [index.end.tolist()]
    while index.end[0] < end[0]:
        index, keys, values = append_segment(index, keys, values, end, config=SMALL)
        ends.append(index.end.tolist())
    check_index(context, index, keys, values)
    assert ends == [[284, 634], [512, 634], [768, 634], [884, 634]]
    want, want_keys, _ = whole.build(SMALL)
    # The second segment was clustered twice, from another order of its first tokens; the others
    # are the same as in one go.
    same = np.r_[np.arange(256), np.arange(512, CAPACITY)]
    assert (np.asarray(index.permutation)[0][:, same] == want.permutation[0][:, same]).all()
    assert (np.asarray(keys)[1] == np.asarray(want_keys)[1]).all()


def test_appending_starts_from_nothing_as_well():
    context = random_context(4, (0, 0))
    index = empty_index(2, 2, CAPACITY, 16, 16, config=SMALL)
    keys, values = jnp.asarray(context.keys), jnp.asarray(context.values)
    index, keys, values = append_segment(index, keys, values, jnp.asarray([100, 10]), config=SMALL)
    check_index(context, index, keys, values)
    assert index.end.tolist() == [100, 0]


def test_a_full_row_takes_no_more():
    context = random_context(4, (CAPACITY, CAPACITY))
    index, keys, values = context.build(config(window=1))
    for _ in range(3):
        index, keys, values = append_segment(
            index, keys, values, jnp.asarray([CAPACITY + 50, CAPACITY]), config=SMALL
        )
    assert index.end.tolist() == [CAPACITY, CAPACITY]
    check_index(context, index, keys, values)
