"""One program per row and block of columns; memory-bound."""

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from jaxserve.pallas_kernels.triton_launch import launch

_MAX_BLOCK = 2048


@triton.jit
def gated_kernel(x_ptr, out_ptr, hidden: tl.constexpr, kind: tl.constexpr, block: tl.constexpr):
    """Activate the first half of a row and multiply it by the second; one program per block."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < hidden
    gate = tl.load(x_ptr + row * 2 * hidden + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + (row * 2 + 1) * hidden + column, mask=inside, other=0.0).to(tl.float32)
    if kind == "silu":
        active = gate * tl.sigmoid(gate)
    elif kind == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(x)) is the sigmoid of 2 x.
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * inner)
    out = (active * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * hidden + column, out, mask=inside)


def gated(x: Array, *, kind: str) -> Array:
    """Gate rows; arguments are those of the public functions, checked."""
    hidden = x.shape[-1] // 2
    rows = x.size // (2 * hidden)
    shape = (*x.shape[:-1], hidden)
    if rows == 0:
        return x[..., :hidden]
    block = min(_MAX_BLOCK, triton.next_power_of_2(hidden))
    (out,) = launch(
        gated_kernel,
        x,
        grid=(rows, triton.cdiv(hidden, block)),
        outputs=(jax.ShapeDtypeStruct(shape, x.dtype),),
        constants={"hidden": hidden, "kind": kind, "block": block},
        num_warps=max(1, min(8, block // 256)),
    )
    return out
