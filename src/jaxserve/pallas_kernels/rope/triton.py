"""One program per token and block of heads: a tile of first halves and a tile of second ones."""

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from jaxserve.pallas_kernels.triton_launch import launch

_MAX_TILE = 4096
"""Numbers of a tile of one half."""


@triton.jit
def pair_columns(pair, pairs: tl.constexpr, interleaved: tl.constexpr):
    """Return the columns of both numbers of each pair."""
    if interleaved:
        return 2 * pair, 2 * pair + 1
    else:
        return pair, pair + pairs


@triton.jit
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
):
    """Rotate some heads of one token; one program per token and block of heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    row = (token * heads + head[:, None]) * head_dim
    has_head = head[:, None] < heads
    pair = tl.arange(0, block_pairs)[None, :]
    has_pair = pair < pairs
    cos = tl.load(cos_ptr + token * pairs + pair, mask=has_pair, other=0.0)
    sin = tl.load(sin_ptr + token * pairs + pair, mask=has_pair, other=0.0)
    low, high = pair_columns(pair, pairs, interleaved)
    first = tl.load(x_ptr + row + low, mask=has_head & has_pair, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + row + high, mask=has_head & has_pair, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    tl.store(out_ptr + row + low, new_first.to(kind), mask=has_head & has_pair)
    tl.store(out_ptr + row + high, new_second.to(kind), mask=has_head & has_pair)
    if 2 * pairs < head_dim:
        column = 2 * pairs + tl.arange(0, block_rest)[None, :]
        inside = has_head & (column < head_dim)
        tl.store(out_ptr + row + column, tl.load(x_ptr + row + column, mask=inside), mask=inside)


def rope(x: Array, tables: tuple[Array, Array], *, interleaved: bool) -> Array:
    """Rotate heads; arguments are those of the public function, checked."""
    tokens, heads, head_dim = x.shape
    if x.size == 0:
        return x
    pairs = tables[0].shape[1]
    block_pairs = triton.next_power_of_2(pairs)
    block_heads = min(triton.next_power_of_2(heads), max(1, _MAX_TILE // block_pairs))
    (out,) = launch(
        rope_kernel,
        x,
        *(table.astype("float32") for table in tables),
        grid=(tokens, triton.cdiv(heads, block_heads)),
        outputs=(jax.ShapeDtypeStruct(x.shape, x.dtype),),
        constants={
            "heads": heads,
            "head_dim": head_dim,
            "pairs": pairs,
            "interleaved": interleaved,
            "block_heads": block_heads,
            "block_pairs": block_pairs,
            "block_rest": triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
        },
        num_warps=max(1, min(8, block_heads * block_pairs // 256)),
    )
    return out
