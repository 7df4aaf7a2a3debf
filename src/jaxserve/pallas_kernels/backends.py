"""Choosing among the backends of the small operations, those beside attention."""

from typing import Literal, get_args

from jaxserve.core.errors import did_you_mean
from jaxserve.pallas_kernels import triton_launch

Backend = Literal["auto", "triton", "xla", "reference"]
"""`triton` needs an NVIDIA GPU; `xla` runs everywhere; `reference` is slow and obvious."""


def choose(backend: Backend, *, prefers_triton: bool) -> Literal["triton", "xla", "reference"]:
    """Resolve the name of a backend.

    Args:
        backend: One of `Backend`.
        prefers_triton: What "auto" means where Triton can run: its kernel, or what XLA makes of
            plain JAX. Both give the same results up to rounding.

    Returns:
        "triton", "xla" or "reference".

    Raises:
        ValueError: If there is no such backend.
        MissingExtraError: If Triton is asked for by name and not installed.
        UnsupportedError: If Triton is asked for by name and cannot run here.
    """
    if backend not in get_args(Backend):
        names = get_args(Backend)
        raise ValueError(
            f"backend must be one of {', '.join(names)}, got {backend!r}."
            f"{did_you_mean(str(backend), names)}"
        )
    if backend == "auto":
        is_there = prefers_triton and triton_launch.unavailable() is None
        return "triton" if is_there else "xla"
    if backend == "triton":
        triton_launch.require()
    return backend
