import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.rms_norm import add_rms_norm, rms_norm
from tests.triton.checks import compile_all, examples, lower_for_cuda, shape, slow

EPSILON = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Two units in the last place for float32, which rounds a few times; one for the others."""


@pytest.mark.interpreted
@examples(25)
@given(
    rows=st.integers(0, 4),
    hidden=st.one_of(st.integers(1, 300), st.sampled_from([8192, 8193, 20000])),
    dtype=st.sampled_from(sorted(EPSILON)),
    plus_one=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1 << 20),
)
def test_the_kernel_agrees_with_float64(rows, hidden, dtype, plus_one, scale, seed):
    rng = np.random.default_rng(seed)
    x, residual = (jnp.asarray(rng.normal(size=(rows, hidden)) * scale, dtype) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=hidden), dtype)
    options = {"epsilon": 1e-5, "plus_one": plus_one, "backend": "triton"}
    plain = jax.jit(lambda *a: rms_norm(*a, **options))(x, weight)
    normed, total = jax.jit(lambda *a: add_rms_norm(*a, **options))(x, residual, weight)

    x64, r64, w64 = (np.asarray(a, np.float64) for a in (x, residual, weight))
    w64 = w64 + plus_one

    def norm(a):
        return a / np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + 1e-5) * w64

    near = {"rtol": EPSILON[dtype], "atol": EPSILON[dtype] * 0.1}
    assert plain.dtype == normed.dtype == total.dtype == dtype
    np.testing.assert_allclose(np.asarray(plain, np.float64), norm(x64), **near)
    np.testing.assert_allclose(np.asarray(normed, np.float64), norm(x64 + r64), **near)
    np.testing.assert_allclose(np.asarray(total, np.float64), x64 + r64, **near)


@pytest.mark.interpreted
def test_sum_and_norm_may_have_dtypes_of_their_own():
    x = jnp.ones((2, 5), jnp.bfloat16)
    normed, total = add_rms_norm(
        x, jnp.ones((2, 5), jnp.float32), jnp.ones(5, jnp.float16), backend="triton"
    )
    assert (normed.dtype, total.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(total, np.full((2, 5), 2.0))


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [
        (4096, "bfloat16"),
        slow(64, "bfloat16"),
        slow(16384, "bfloat16"),
        *(slow(hidden, "float32") for hidden in (64, 4096, 16384)),
    ],
)
def test_it_compiles_for_every_device(hidden, dtype):
    x, weight = shape(8, hidden, dtype=dtype), shape(hidden, dtype=dtype)
    compile_all(lambda x, w: rms_norm(x, w, backend="triton"), x, weight)
    compile_all(lambda x, w: add_rms_norm(x, x, w, plus_one=True, backend="triton"), x, weight)


@pytest.mark.compiled
def test_a_launch_becomes_part_of_a_program(monkeypatch):
    x, weight = shape(8, 512, dtype="bfloat16"), shape(512, dtype="bfloat16")

    def twice(x, weight):
        once = rms_norm(x * 2, weight, backend="triton")
        return add_rms_norm(once, x, weight, backend="triton")[0] + 1

    text = lower_for_cuda(monkeypatch, twice, x, weight)
    assert text.count("triton_kernel_call") == 2
