from functools import partial

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxserve.core.errors import UnsupportedError
from jaxserve.engine.sampler import SamplingInputs, filter_logits
from jaxserve.pallas_kernels.sampling import random, reference, sample

DRAWS = 20_000


def exact(logits, temperature, top_k, top_p, min_p):
    """The wanted distribution of one row, in float64, by sorting."""
    x = np.asarray(logits, np.float64) / temperature
    p = np.exp(x - x.max())
    p[p < min_p * p.max()] = 0
    if top_k:
        p[p < np.sort(p)[::-1][min(top_k, p.size) - 1]] = 0
    ranked = np.sort(p)[::-1]
    if top_p < 1:
        enough = np.searchsorted(np.cumsum(ranked), top_p * ranked.sum() * (1 - 1e-12))
        p[p < ranked[min(enough, p.size - 1)]] = 0
    return p / p.sum()


@partial(jax.jit, static_argnames="backend")
def sample_rows(logits, key, settings, backend):
    return sample(logits, key, **settings, backend=backend)


def filled(count, **row):
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | row
    return {n: np.full(count, v, "int32" if n == "top_k" else "float32") for n, v in full.items()}


def draw(logits, count, backend, seed=0, **row):
    key = np.random.default_rng(seed).integers(0, 1 << 32, (count, 2), np.uint32)
    tiled = np.tile(np.asarray(logits, np.float32), (count, 1))
    return np.asarray(sample_rows(tiled, key, filled(count, **row), backend))


def chi_square(tokens, p):
    """The chance of counts at least as far from the expected ones; nothing else may be drawn."""
    counts = np.bincount(tokens, minlength=p.size)
    assert not counts[p == 0].any()
    likely = p * tokens.size >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(p[likely], p[~likely].sum()) * tokens.size
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue if keep.sum() > 1 else 1.0


ROWS = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 8, "top_p": 0.6},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.optimized
@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_draws_have_the_exact_distribution(row, backend):
    logits = np.random.default_rng(5).normal(size=40) * 1.5
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | row
    p = exact(logits, **full)
    tokens = draw(logits, DRAWS, backend, **row)
    assert chi_square(tokens, p) > 1e-4
    # The test has power: it tells this distribution from one that is a little warmer.
    warmer = exact(logits, **{**full, "temperature": full["temperature"] * 1.25})
    if np.array_equal(warmer > 0, p > 0):
        assert chi_square(tokens, warmer) < 1e-4


@jax.jit
def kept_by_both(logits, settings):
    """What the reference keeps, and the engine's sampler, which bisects for the same thresholds."""
    zero = jnp.zeros(logits.shape[0])
    others = {n: zero for n in SamplingInputs.__dataclass_fields__ if n not in settings}
    inputs = SamplingInputs(**settings, **others)
    theirs = filter_logits(logits / settings["temperature"][:, None], inputs)
    return reference.kept(logits, **settings), jnp.isfinite(theirs)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1 << 20),
    vocab=st.sampled_from([1, 2, 7, 40]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 39, 100]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_only_what_is_kept_is_drawn(seed, vocab, ties, temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=vocab) * 3
    if ties:
        logits = np.round(logits)
    logits[rng.random(vocab) < 0.1] = -np.inf
    logits[rng.integers(vocab)] = 1.0
    if vocab > 1:  # as many columns always, for one program
        logits = np.append(logits, np.full(40 - vocab, -np.inf))
    row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tokens = draw(logits, 64, "xla", seed=seed, **row)
    kept, theirs = (
        np.asarray(a)[0] for a in kept_by_both(np.asarray([logits], np.float32), filled(1, **row))
    )
    assert kept[tokens].all()
    assert set(np.flatnonzero(kept)) >= {int(np.argmax(logits))}
    likely = np.exp((logits - logits.max()) / temperature) > 1e-30
    np.testing.assert_array_equal(theirs[likely], kept[likely])


def test_rows_do_not_depend_on_their_neighbours():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    key = jnp.asarray(rng.integers(0, 1 << 32, (6, 2)), jnp.uint32)
    options = {
        "temperature": jnp.asarray([1.0, 0.0, 0.5, 2.0, 1.0, 1.0]),
        "top_k": jnp.asarray([0, 0, 5, 0, 1, 20]),
        "top_p": jnp.asarray([1.0, 1.0, 0.5, 0.9, 1.0, 0.3]),
        "min_p": jnp.asarray([0.0, 0.0, 0.0, 0.1, 0.0, 0.0]),
    }
    together = sample_rows(logits, key, options, "xla")
    for row in range(6):
        mine = slice(row, row + 1)
        part = {name: value[mine] for name, value in options.items()}
        alone = sample_rows(logits[mine], key[mine], part, "xla")
        assert alone[0] == together[row]
    assert together[1] == jnp.argmax(logits[1])
    assert together[4] == jnp.argmax(logits[4])


def test_random_numbers_are_those_of_threefry():
    zero = random.threefry(jnp.zeros((1, 2), jnp.uint32), jnp.zeros(1, jnp.uint32))
    # A test vector of the authors' library, for 20 rounds.
    assert (int(zero[0][0]), int(zero[1][0])) == (0x6B200159, 0x99BA4EFE)
    rng = np.random.default_rng(2)
    for _ in range(5):
        key, count = rng.integers(0, 1 << 32, 2), rng.integers(0, 1 << 32)
        words = [jnp.asarray(a, jnp.uint32) for a in (key, [count, 0])]
        left, right = random.threefry(words[0][None], words[1][:1])
        np.testing.assert_array_equal(
            np.concatenate([left, right]), jax.extend.random.threefry_2x32(*words)
        )
    key = jnp.asarray(np.random.default_rng(1).integers(0, 1 << 32, (4000, 2)), jnp.uint32)
    drawn = np.concatenate([np.asarray(random.uniform(key, turn)) for turn in range(5)])
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_bad_input_is_named():
    logits, key = jnp.zeros((2, 9)), jnp.zeros((2, 2), jnp.uint32)
    ones, none = jnp.ones(2), jnp.zeros(2, jnp.int32)
    good = {"temperature": ones, "top_k": none, "top_p": ones, "min_p": ones}
    with pytest.raises(ValueError, match=r"\[rows, vocab\] with a token at least, got \(2, 0\)"):
        sample(logits[:, :0], key, **good)
    with pytest.raises(UnsupportedError, match=r"logits must have one .* got int32; cast them"):
        sample(logits.astype(int), key, **good)
    with pytest.raises(ValueError, match=r"key must be two words .* \[2, 2\], got int32 \(2, 2\)"):
        sample(logits, key.astype(int), **good)
    with pytest.raises(ValueError, match=r"top_k must be one integer per row, \[2\], got float32"):
        sample(logits, key, **{**good, "top_k": ones})
    with pytest.raises(ValueError, match=r"top_p must be one float per row, .* got float32 \(3,\)"):
        sample(logits, key, **{**good, "top_p": jnp.ones(3)})
