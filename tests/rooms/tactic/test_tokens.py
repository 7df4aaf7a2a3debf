"""Two levels: tokens of chosen clusters that do not count, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.attention.tactic import reference
from jaxserve.attention.tactic.attention import sparse_decode
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.select import read_mask, select
from jaxserve.core.errors import ConfigError
from tests.rooms.tactic.cases import (
    DIM,
    GROUP,
    HEADS,
    SCALE,
    Context,
    by_position,
    config,
    random_context,
)
from tests.rooms.tactic.test_select import kept_log_mass


def cut(context: Context, p: float, settings_: TacticConfig):
    """Return what is read, and what of it counts, by position; and the true spare mass."""
    index, keys, _ = context.build(settings_)
    rows = len(context.length)
    grouped = context.q.reshape(rows, HEADS, GROUP, DIM)
    kept = jnp.asarray(kept_log_mass(context, index.end, settings_.sinks), jnp.float32)
    chosen = select(
        jnp.asarray(grouped * np.float32(SCALE)), keys, index, kept, jnp.full((rows,), p),
        config=settings_,
    )  # fmt: skip
    length = jnp.asarray(context.length)
    read = by_position(np.asarray(read_mask(chosen, index, length, config=settings_)), index)
    counts = read.copy()
    found = chosen.cut
    least = np.log(np.maximum(np.asarray(found.least, np.float64), 1e-300))
    least += np.asarray(found.level, np.float64)
    for row in range(rows):
        for head in range(HEADS):
            enough = reference.tokens_that_count(
                grouped[row, head], context.keys[row, head], least[row, head], SCALE
            )
            # Places of the clusters whose tokens are looked at one by one.
            by_token = np.zeros(read.shape[2], bool)
            number = np.asarray(found.clusters)[row, head][np.asarray(found.by_token)[row, head]]
            for begin, size in zip(
                np.asarray(index.begin)[row, head, number],
                np.asarray(index.sizes)[row, head, number],
                strict=True,
            ):
                by_token[begin : begin + size] = True
            looked_at = np.zeros_like(by_token)
            looked_at[np.asarray(index.permutation)[row, head]] = by_token
            counts[row, head] &= enough | ~looked_at
    return read, counts


def attend(context: Context, p: float, settings_: TacticConfig):
    index, keys, values = context.build(settings_)
    out, stats = sparse_decode(
        jnp.asarray(context.q), keys, values, jnp.asarray(context.length), index,
        jnp.full(context.length.shape, p), scale=SCALE, config=settings_,
    )  # fmt: skip
    return np.asarray(out), stats


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    p=st.sampled_from([0.7, 0.9]),
    level=st.sampled_from([0.2, 0.6]),
)
def test_outputs_are_attention_to_what_counts(seed, p, level):
    context = random_context(seed)
    settings_ = config(tail="drop", token_level=level, min_spread=0.5)
    out, stats = attend(context, p, settings_)
    read, counts = cut(context, p, settings_)
    assert (np.asarray(stats.tokens) == read.sum(-1)).all()
    # Rounding decides about a token that weighs just as much as it takes.
    assert np.abs(np.asarray(stats.values) - counts.sum(-1)).max() <= 1
    assert (np.asarray(stats.values) <= np.asarray(stats.tokens)).all()
    np.testing.assert_allclose(out, context.attend(counts), atol=5e-3)


def test_some_tokens_of_chosen_clusters_do_not_count_and_p_is_reached_without_them():
    reached, lost, values = [], [], []
    settings_ = config(token_level=0.5, head_len=64, num_strata=8, samples_per_stratum=16)
    for seed in range(8):
        context = random_context(seed, (1000, 1000), sharpness=2.0)
        read, counts = cut(context, 0.9, settings_)
        reached.append(context.mass(counts))
        lost.append(context.mass(read) - context.mass(counts))
        values.append(counts.sum() / read.sum())
    assert np.mean(values) < 0.9
    # Half of what may stay unread, as far as the estimate of everything goes.
    assert np.concatenate(lost).max() < 0.06
    assert (np.concatenate(reached) >= 0.88).mean() >= 0.9


def test_what_does_not_count_is_represented_by_means():
    errors = {"drop": [], "mean": []}
    for seed in range(6):
        context = random_context(seed)
        dense = context.dense()
        for tail, found in errors.items():
            out, _ = attend(context, 0.8, config(tail=tail, token_level=0.5))
            found.append(np.linalg.norm(out - dense, axis=-1).mean())
    assert np.mean(errors["mean"]) < np.mean(errors["drop"])


def test_all_of_the_mass_is_everything():
    context = random_context(3)
    out, stats = attend(context, 1.0, config(token_level=0.5, min_spread=0.0))
    np.testing.assert_allclose(out, context.dense(), atol=3e-5)
    assert (np.asarray(stats.values) == context.length[:, None]).all()


@pytest.mark.parametrize("level", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range_are_refused(level):
    with pytest.raises(ConfigError, match="token_level must be at least 0 and below 1"):
        config(token_level=level)
    with pytest.raises(ConfigError, match="min_spread must be at least 0"):
        config(min_spread=-1.0 if level == level else level)
