import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.gated_activation import gelu_mul, silu_mul
from tests.kernels.test_gated_activation import KINDS, gated64
from tests.triton.checks import compile_all, examples, shape

EPSILON = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.interpreted
@examples(15)
@given(
    rows=st.integers(0, 4),
    hidden=st.one_of(st.integers(1, 100), st.just(2049)),
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(sorted(EPSILON)),
    seed=st.integers(0, 1 << 20),
)
def test_the_kernel_agrees_with_float64(rows, hidden, kind, dtype, seed):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(rows, 2 * hidden)) * 3, dtype)
    got = KINDS[kind](x, backend="triton")
    want = gated64(np.asarray(x, np.float64), kind)
    assert got.dtype == x.dtype
    near = EPSILON[dtype]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=near, atol=near)


@pytest.mark.compiled
def test_they_compile_for_every_device():
    x = shape(64, 28672, dtype="bfloat16")
    for function in (silu_mul, gelu_mul, lambda x, **o: gelu_mul(x, approximate=False, **o)):
        compile_all(lambda x, f=function: f(x, backend="triton"), x)
