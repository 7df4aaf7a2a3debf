"""One program per row; rows that fit into registers are read once.

Memory-bound: a row is read, normed and written. Reductions are over the whole row in float32.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from jaxserve.pallas_kernels.triton_launch import launch

_MAX_BLOCK = 8192
"""Numbers of a row that are held in registers at once; longer rows are read twice."""


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    hidden: tl.constexpr,
    epsilon: tl.constexpr,
    plus_one: tl.constexpr,
    has_residual: tl.constexpr,
    block: tl.constexpr,
):
    """Normalise one row, after adding the residual if there is one; one program per row."""
    start = tl.program_id(0).to(tl.int64) * hidden
    columns = tl.arange(0, block)
    if block >= hidden:
        inside = columns < hidden
        row = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        if has_residual:
            row += tl.load(residual_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(sum_ptr + start + columns, row.to(sum_ptr.dtype.element_ty), mask=inside)
        scale = tl.math.rsqrt(tl.sum(row * row, axis=0) / hidden + epsilon)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if plus_one:
            weight += 1.0
        out = (row * scale) * weight
        tl.store(out_ptr + start + columns, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((block,), tl.float32)
        for low in range(0, hidden, block):
            at = low + columns
            inside = at < hidden
            row = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            if has_residual:
                row += tl.load(residual_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(sum_ptr + start + at, row.to(sum_ptr.dtype.element_ty), mask=inside)
            squares += row * row
        scale = tl.math.rsqrt(tl.sum(squares, axis=0) / hidden + epsilon)
        for low in range(0, hidden, block):
            at = low + columns
            inside = at < hidden
            row = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            if has_residual:
                row += tl.load(residual_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if plus_one:
                weight += 1.0
            out = (row * scale) * weight
            tl.store(out_ptr + start + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Array, weight: Array, *, epsilon: float, plus_one: bool) -> Array:
    """Norm rows; arguments are those of the public function, checked."""
    return _launch(x, None, weight, epsilon=epsilon, plus_one=plus_one)[0]


def add_rms_norm(
    x: Array, residual: Array, weight: Array, *, epsilon: float, plus_one: bool
) -> tuple[Array, Array]:
    """Add and norm rows; arguments are those of the public function, checked."""
    out, total = _launch(x, residual, weight, epsilon=epsilon, plus_one=plus_one)
    return out, total


def _launch(
    x: Array, residual: Array | None, weight: Array, *, epsilon: float, plus_one: bool
) -> tuple[Array, Array]:
    hidden = x.shape[-1]
    rows = x.size // hidden
    if rows == 0:
        return x, x if residual is None else residual
    block = min(triton.next_power_of_2(hidden), _MAX_BLOCK)
    # Without a residual the sum is a dummy that is never written.
    total = jax.ShapeDtypeStruct((1,), jnp.float32)
    if residual is not None:
        total = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    out, total = launch(
        rms_norm_kernel,
        x,
        x if residual is None else residual,
        weight,
        grid=(rows,),
        outputs=(jax.ShapeDtypeStruct(x.shape, x.dtype), total),
        constants={
            "hidden": hidden,
            "epsilon": epsilon,
            "plus_one": plus_one,
            "has_residual": residual is not None,
            "block": block,
        },
        # Sixteen numbers per thread, of at most sixteen warps.
        num_warps=max(1, min(16, block // 512)),
    )
    return out, total
