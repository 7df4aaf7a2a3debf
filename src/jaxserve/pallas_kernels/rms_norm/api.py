"""Root-mean-square norm over the last axis."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import backends
from jaxserve.pallas_kernels.backends import Backend
from jaxserve.pallas_kernels.rms_norm import reference

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of activations and weights."""

MAX_HIDDEN = 1 << 17
"""Widest row of the Triton kernel, a limit against slips rather than one of the device."""


def rms_norm(
    x: Float[Array, "*rows hidden"],
    weight: Float[Array, " hidden"],
    *,
    epsilon: float = 1e-6,
    plus_one: bool = False,
    backend: Backend = "auto",
) -> Float[Array, "*rows hidden"]:
    """Divide each row by its root mean square and scale it.

    Args:
        x: Rows.
        weight: What the normed row is multiplied with.
        epsilon: Added to the mean square, greater than 0.
        plus_one: Whether the weight says by how much the scale differs from one.
        backend: "auto" leaves it to XLA, which fuses the norm with its neighbours; a kernel by
            itself would send its input and output through memory.

    Returns:
        Rows in the dtype of `x`; arithmetic is in float32, rounded once.

    Raises:
        ValueError: If shapes do not fit, or epsilon is not positive.
        UnsupportedError: If a dtype is none of `DTYPES`, or the backend cannot run here.

    Source: Zhang and Sennrich, arXiv 1910.07467; the offset weight is Gemma's.
    """
    _check(x, weight, epsilon)
    chosen = backends.choose(backend, prefers_triton=False)
    if chosen == "triton":
        _check_width(x)
        from jaxserve.pallas_kernels.rms_norm import triton  # noqa: PLC0415

        return triton.rms_norm(x, weight, epsilon=epsilon, plus_one=plus_one)
    return reference.rms_norm(x, weight, epsilon=epsilon, plus_one=plus_one)


def add_rms_norm(
    x: Float[Array, "*rows hidden"],
    residual: Float[Array, "*rows hidden"],
    weight: Float[Array, " hidden"],
    *,
    epsilon: float = 1e-6,
    plus_one: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Array, "*rows hidden"], Float[Array, "*rows hidden"]]:
    """Add to the residual stream and norm the sum, before the sum is rounded.

    Args:
        x: What a layer adds.
        residual: The stream so far.
        weight: What the normed row is multiplied with.
        epsilon: Added to the mean square, greater than 0.
        plus_one: Whether the weight says by how much the scale differs from one.
        backend: See `rms_norm`.

    Returns:
        The normed sum in the dtype of `x`, and the sum in that of `residual`.

    Raises:
        ValueError: If shapes do not fit, or epsilon is not positive.
        UnsupportedError: If a dtype is none of `DTYPES`, or the backend cannot run here.

    Source: as `rms_norm`; fused with the addition as in FlashInfer's `fused_add_rmsnorm`.
    """
    _check(x, weight, epsilon)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {x.shape}, got {residual.shape}; reshape it."
        )
    _check_dtype("residual", residual)
    chosen = backends.choose(backend, prefers_triton=False)
    if chosen == "triton":
        _check_width(x)
        from jaxserve.pallas_kernels.rms_norm import triton  # noqa: PLC0415

        return triton.add_rms_norm(x, residual, weight, epsilon=epsilon, plus_one=plus_one)
    return reference.add_rms_norm(x, residual, weight, epsilon=epsilon, plus_one=plus_one)


def _check(x: Array, weight: Array, epsilon: float) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:] or x.shape[-1] < 1:
        raise ValueError(
            f"weight must have the length of the last axis of x, x {x.shape} and weight "
            f"{weight.shape} do not fit; pass one number per column."
        )
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, got {epsilon}; 1e-6 is usual.")
    _check_dtype("x", x)
    _check_dtype("weight", weight)


def _check_dtype(name: str, array: Array) -> None:
    found = jnp.dtype(array.dtype).name
    if found not in DTYPES:
        raise UnsupportedError(
            f"{name} must have one of the dtypes {', '.join(DTYPES)}, got {found}; cast it, "
            "float32 loses least."
        )


def _check_width(x: Array) -> None:
    if x.shape[-1] > MAX_HIDDEN:
        raise UnsupportedError(
            f"backend 'triton' norms rows of at most {MAX_HIDDEN} numbers, got {x.shape[-1]}; "
            "use backend='xla'."
        )
