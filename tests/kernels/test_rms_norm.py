import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import MissingExtraError, UnsupportedError
from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.rms_norm import add_rms_norm, rms_norm


@settings(max_examples=20)
@given(
    rows=st.sampled_from([0, 3]),
    hidden=st.sampled_from([1, 7, 200]),
    plus_one=st.booleans(),
    backend=st.sampled_from(["auto", "xla", "reference"]),
    seed=st.integers(0, 1 << 20),
)
def test_it_agrees_with_float64(rows, hidden, plus_one, backend, seed):
    rng = np.random.default_rng(seed)
    x, residual = rng.normal(size=(2, rows, hidden)).astype(np.float32)
    weight = rng.normal(size=hidden).astype(np.float32)
    normed, total = add_rms_norm(
        jnp.asarray(x),
        jnp.asarray(residual),
        jnp.asarray(weight),
        epsilon=1e-5,
        plus_one=plus_one,
        backend=backend,
    )
    wide = x.astype(np.float64) + residual
    want = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normed, want * (weight + plus_one), rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(total, wide, rtol=1e-6, atol=1e-6)
    alone = rms_norm(total, jnp.asarray(weight), epsilon=1e-5, plus_one=plus_one, backend=backend)
    np.testing.assert_allclose(alone, normed, rtol=3e-6, atol=3e-6)


def test_bad_input_is_named():
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    with pytest.raises(
        ValueError, match=r"weight must have the length .* \(2, 8\) and weight \(7,"
    ):
        rms_norm(x, jnp.ones(7))
    with pytest.raises(ValueError, match=r"epsilon must be greater than 0, got 0\.0; 1e-6"):
        rms_norm(x, weight, epsilon=0.0)
    with pytest.raises(UnsupportedError, match=r"x must have one of .* got int32; cast it"):
        rms_norm(x.astype(jnp.int32), weight)
    with pytest.raises(
        ValueError, match=r"residual must have the shape of x, \(2, 8\), got \(2, 9\)"
    ):
        add_rms_norm(x, jnp.ones((2, 9)), weight)
    with pytest.raises(ValueError, match=r"got 'tritn'\. Did you mean 'triton'\?"):
        rms_norm(x, weight, backend="tritn")


def test_triton_by_name_says_what_is_missing(monkeypatch):
    x, weight = jnp.ones((2, 8)), jnp.ones(8)
    if triton_launch.unavailable() is None:
        pytest.skip("Triton can run here")
    with pytest.raises((MissingExtraError, UnsupportedError), match=r"use backend='xla'|choose"):
        rms_norm(x, weight, backend="triton")


def test_rows_too_wide_for_the_kernel_are_refused():
    with (
        triton_launch.record_launches(),
        pytest.raises(UnsupportedError, match=r"at most 131072 numbers, got 131073; use backend"),
    ):
        rms_norm(jnp.ones((1, 131073)), jnp.ones(131073), backend="triton")
