from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels.gated_activation import gelu_mul, silu_mul

KINDS = {
    "silu": silu_mul,
    "gelu_tanh": gelu_mul,
    "gelu": partial(gelu_mul, approximate=False),
}


def gated64(x, kind):
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=-1)
    if kind == "silu":
        return gate * special.expit(gate) * up
    if kind == "gelu":
        return gate * special.ndtr(gate) * up
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(inner)) * up


@settings(max_examples=15)
@given(
    rows=st.sampled_from([0, 3]),
    hidden=st.sampled_from([1, 33]),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 1 << 20),
)
def test_it_agrees_with_float64(rows, hidden, kind, seed):
    x = (np.random.default_rng(seed).normal(size=(rows, 2 * hidden)) * 3).astype("float32")
    got = KINDS[kind](jnp.asarray(x))
    np.testing.assert_allclose(got, gated64(x, kind), rtol=3e-6, atol=3e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"an even number, got \(2, 7\); put the two halves"):
        silu_mul(jnp.ones((2, 7)))
    with pytest.raises(UnsupportedError, match=r"x must have one of .* got int32; cast it"):
        gelu_mul(jnp.ones((2, 8), "int32"))
