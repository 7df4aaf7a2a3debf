"""Every card's own inputs, in Triton's interpreter, at the tiniest sizes."""

import jax
import numpy as np
import pytest

from jaxserve.pallas_kernels.cards import PLACES, card_of


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(PLACES.keys() - {"attention"}))
def test_the_kernel_agrees_with_the_reference(name, dtype):
    card = card_of(name)
    if name == "token_attention" and dtype == "bfloat16":
        pytest.skip("the interpreter does not multiply matrices in bfloat16")
    inputs = card.make(card.tiny(), dtype, 7)
    got = jax.tree.leaves(card.run(**inputs, backend="triton"))
    want = jax.tree.leaves(card.reference(**inputs))
    assert len(got) == len(want) == len(card.outputs)
    for left, right in zip(got, want, strict=True):
        assert left.dtype == right.dtype
        error = card.difference(np.asarray(left, np.float32), np.asarray(right, np.float32), dtype)
        assert error is None, error
    assert card.supports("triton", card.tiny(), dtype) is None
    assert card.num_bytes(card.tiny(), dtype) > 0
    assert card.num_flops(card.tiny()) >= 0
