"""The state of a running softmax, which every way of attending shares."""

from jaxtyping import Array

MASKED = -1e30
"""Score of a key that may not be seen; finite, so that an all-masked row gives no NaN."""

State = tuple[Array, Array, Array]
"""Unnormalised output, largest score and mass so far, per query; float32."""
