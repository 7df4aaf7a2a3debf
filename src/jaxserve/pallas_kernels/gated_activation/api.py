"""Gated activations over the last axis, whose first half is the gate."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import backends
from jaxserve.pallas_kernels.backends import Backend
from jaxserve.pallas_kernels.gated_activation import reference
from jaxserve.pallas_kernels.gated_activation.reference import Kind

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of activations."""


def silu_mul(
    x: Float[Array, "*rows two_hidden"], *, backend: Backend = "auto"
) -> Float[Array, "*rows hidden"]:
    """Multiply SiLU of the first half of each row with the second half.

    Args:
        x: Gate and value side by side, as one product of matrices gives them.
        backend: "auto" leaves it to XLA, which fuses it with its neighbours.

    Returns:
        Half as many columns, in the dtype of `x`; arithmetic is in float32, rounded once.

    Raises:
        ValueError: If the last axis does not have two halves.
        UnsupportedError: If the dtype is none of `DTYPES`, or the backend cannot run here.

    Source: Shazeer, arXiv 2002.05202 (SwiGLU).
    """
    return _gated(x, "silu", backend)


def gelu_mul(
    x: Float[Array, "*rows two_hidden"], *, approximate: bool = True, backend: Backend = "auto"
) -> Float[Array, "*rows hidden"]:
    """Multiply GELU of the first half of each row with the second half.

    Args:
        x: Gate and value side by side.
        approximate: Whether to use the formula with tanh, which most checkpoints are trained with.
        backend: "auto" leaves it to XLA, which fuses it with its neighbours.

    Returns:
        Half as many columns, in the dtype of `x`; arithmetic is in float32, rounded once.

    Raises:
        ValueError: If the last axis does not have two halves.
        UnsupportedError: If the dtype is none of `DTYPES`, or the backend cannot run here.

    Source: Shazeer, arXiv 2002.05202 (GEGLU); Hendrycks and Gimpel, arXiv 1606.08415.
    """
    return _gated(x, "gelu_tanh" if approximate else "gelu", backend)


def _gated(x: Array, kind: Kind, backend: Backend) -> Array:
    if x.ndim < 1 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(
            f"the last axis of x must hold a gate and as many values, an even number, got "
            f"{x.shape}; put the two halves side by side."
        )
    name = jnp.dtype(x.dtype).name
    if name not in DTYPES:
        raise UnsupportedError(
            f"x must have one of the dtypes {', '.join(DTYPES)}, got {name}; cast it."
        )
    if backends.choose(backend, prefers_triton=False) == "triton":
        from jaxserve.pallas_kernels.gated_activation import triton  # noqa: PLC0415

        return triton.gated(x, kind=kind)
    return reference.gated(x, kind=kind)
