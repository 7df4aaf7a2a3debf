import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxserve.pallas_kernels.sampling import reference, sample
from tests.triton.checks import compile_all, examples, lower_for_cuda, shape, slow


def settings_of(rng, rows):
    """Every kind of row beside each other: greedy, plain, and each filter on or off."""
    pick = rng.choice
    return {
        "temperature": jnp.asarray(pick([0.0, 0.3, 1.0, 2.0], rows), jnp.float32),
        "top_k": jnp.asarray(pick([0, 1, 3, 1000], rows), jnp.int32),
        "top_p": jnp.asarray(pick([1e-9, 0.3, 0.9, 1.0], rows), jnp.float32),
        "min_p": jnp.asarray(pick([0.0, 0.05, 1.0], rows), jnp.float32),
    }


@pytest.mark.interpreted
@examples(20)
@given(
    vocab=st.sampled_from([1, 2, 40, 300, 4096, 9000]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    ties=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_it_draws_what_plain_jax_draws(vocab, dtype, ties, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, vocab)) * 3
    if ties:
        logits = np.round(logits)
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    logits[:, rng.integers(vocab)] = 1.0
    logits = jnp.asarray(logits, dtype)
    key = jnp.asarray(rng.integers(0, 1 << 32, (5, 2)), jnp.uint32)
    options = settings_of(rng, 5)
    got = np.asarray(jax.jit(lambda *a: sample(*a, **options, backend="triton"))(logits, key))
    kept = np.asarray(reference.kept(logits.astype(jnp.float32), **options))
    greedy = np.asarray(options["temperature"]) == 0
    wide = np.asarray(logits, np.float64)
    assert kept[np.arange(5), got][~greedy].all()
    np.testing.assert_array_equal(got[greedy], wide.argmax(axis=-1)[greedy])
    want = np.asarray(sample(logits, key, **options, backend="xla"))
    # Sums in another order may decide otherwise where a target meets the end of a token.
    assert (got == want).sum() >= 4


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("row", "count"),
    [
        ({"top_k": 4}, 160),
        ({"top_p": 0.7}, 160),
        slow({}, 500),
        slow({"top_k": 4}, 800),
        slow({"top_p": 0.7}, 800),
        slow({"top_k": 6, "top_p": 0.8, "min_p": 0.02}, 300),
    ],
)
def test_draws_have_the_exact_distribution(row, count):
    rng = np.random.default_rng(4)
    logits = jnp.asarray(rng.permutation(np.linspace(0.0, 6.0, 12)), jnp.float32)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | row
    options = {
        n: jnp.full(count, v, "int32" if n == "top_k" else "float32") for n, v in full.items()
    }
    key = jnp.asarray(rng.integers(0, 1 << 32, (count, 2)), jnp.uint32)
    tokens = sample(jnp.tile(logits, (count, 1)), key, **options, backend="triton")
    mask = reference.kept(logits[None], **{n: v[:1] for n, v in options.items()})[0]
    p = np.where(mask, np.exp(np.asarray(logits, np.float64)), 0.0)
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert not counts[~np.asarray(mask)].any()
    expected = p[p > 0] / p.sum() * count
    assert stats.chisquare(counts[p > 0], expected).pvalue > 1e-4
    # The test has power: these counts do not fit equal chances.
    assert stats.chisquare(counts[p > 0]).pvalue < 1e-4


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(151936, "float32"), slow(32000, "bfloat16"), slow(50, "float32")],
)
def test_it_compiles_for_every_device(vocab, dtype):
    options = {n: shape(8, dtype="float32") for n in ("temperature", "top_p", "min_p")}
    options["top_k"] = shape(8, dtype="int32")
    logits, key = shape(8, vocab, dtype=dtype), shape(8, 2, dtype="uint32")
    compile_all(lambda x, k, o: sample(x, k, **o, backend="triton"), logits, key, options)


@pytest.mark.compiled
def test_a_launch_becomes_part_of_a_program(monkeypatch):
    options = {n: shape(8, dtype="float32") for n in ("temperature", "top_p", "min_p")}
    options["top_k"] = shape(8, dtype="int32")
    logits, key = shape(8, 1000, dtype="float32"), shape(8, 2, dtype="uint32")

    def step(x, k, o):
        return sample(x * 2, k, **o, backend="triton")

    text = lower_for_cuda(monkeypatch, step, logits, key, options)
    assert text.count("triton_kernel_call") == 1
