"""One program per token and job: its keys, its values, or a block of its query heads.

Pure movement of memory: every program reads one token's row, turns and narrows it in registers,
and stores it head by head, each head's part being contiguous in its page.
"""

import dataclasses

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from jaxserve.pallas_kernels.append_paged_kv.reference import LARGEST
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.rope.triton import pair_columns
from jaxserve.pallas_kernels.triton_launch import launch
from jaxserve.pallas_kernels.triton_numbers import as_bytes, to_float8, to_int8

_MAX_TILE = 4096
"""Numbers that a program holds at once; more heads are done one block after another."""

_STORED = {"float8_e4m3fn": "float8", "float8_e5m2": "float8", "int8": "int8"}
_MANTISSA = {"float8_e4m3fn": 3, "float8_e5m2": 2}


@triton.jit
def store_narrow(
    pointer, offset, x, mask, stored: tl.constexpr, mantissa: tl.constexpr, largest: tl.constexpr
):
    """Round float32 to what the buffer holds, and store it."""
    if stored == "float8":
        tl.store(as_bytes(pointer) + offset, to_float8(x, mantissa, largest), mask=mask)
    elif stored == "int8":
        tl.store(pointer + offset, to_int8(x), mask=mask)
    else:
        tl.store(pointer + offset, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_scale(scale_ptr, page, head, heads: tl.constexpr, scale_axes: tl.constexpr):
    """Load the scale of each head: one number, one per head, or one per page and head."""
    if scale_axes == 0:
        return tl.load(scale_ptr + head * 0)
    elif scale_axes == 1:
        return tl.load(scale_ptr + head, mask=head < heads, other=1.0)
    else:
        return tl.load(scale_ptr + page * heads + head, mask=head < heads, other=1.0)


@triton.jit
def put_heads(
    new_ptr,
    pool_ptr,
    scale_ptr,
    cos_ptr,
    sin_ptr,
    token,
    slot,
    heads: tl.constexpr,
    dim: tl.constexpr,
    page_size: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    scale_axes: tl.constexpr,
    stored: tl.constexpr,
    mantissa: tl.constexpr,
    largest: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Move all heads of one token, keys or values, into their place in the pool."""
    page = slot // page_size
    offset = slot % page_size
    pair = tl.arange(0, block_pairs)[None, :]
    for low_head in tl.static_range(0, heads, block_heads):
        head = low_head + tl.arange(0, block_heads)[:, None]
        has_head = head < heads
        source = (token * heads + head) * dim
        target = ((page * heads + head) * page_size + offset) * dim
        if scale_axes >= 0:
            scale = load_scale(scale_ptr, page, head, heads, scale_axes)
        if pairs > 0:
            inside = has_head & (pair < pairs)
            cos = tl.load(cos_ptr + token * pairs + pair, mask=pair < pairs, other=0.0)
            sin = tl.load(sin_ptr + token * pairs + pair, mask=pair < pairs, other=0.0)
            low, high = pair_columns(pair, pairs, interleaved)
            first = tl.load(new_ptr + source + low, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(new_ptr + source + high, mask=inside, other=0.0).to(tl.float32)
            new_first = first * cos - second * sin
            new_second = second * cos + first * sin
            if scale_axes >= 0:
                new_first = tl.math.div_rn(new_first, tl.broadcast_to(scale, new_first.shape))
                new_second = tl.math.div_rn(new_second, tl.broadcast_to(scale, new_second.shape))
            store_narrow(pool_ptr, target + low, new_first, inside, stored, mantissa, largest)
            store_narrow(pool_ptr, target + high, new_second, inside, stored, mantissa, largest)
        if 2 * pairs < dim:
            column = 2 * pairs + tl.arange(0, block_dim)[None, :]
            inside = has_head & (column < dim)
            row = tl.load(new_ptr + source + column, mask=inside, other=0.0).to(tl.float32)
            if scale_axes >= 0:
                row = tl.math.div_rn(row, tl.broadcast_to(scale, row.shape))
            store_narrow(pool_ptr, target + column, row, inside, stored, mantissa, largest)


@triton.jit
def append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slot_ptr,
    cos_ptr,
    sin_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_unused,
    v_unused,
    k_pool_ptr,
    v_pool_ptr,
    q_out_ptr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    v_head_dim: tl.constexpr,
    page_size: tl.constexpr,
    q_heads: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    k_scale_axes: tl.constexpr,
    v_scale_axes: tl.constexpr,
    stored: tl.constexpr,
    mantissa: tl.constexpr,
    largest: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
):
    """Append one token's keys or values, or rotate some of its queries; a program each."""
    token = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if job == 0:
        if slot >= 0:
            put_heads(
                k_ptr,
                k_pool_ptr,
                k_scale_ptr,
                cos_ptr,
                sin_ptr,
                token,
                slot,
                kv_heads,
                head_dim,
                page_size,
                pairs,
                interleaved,
                k_scale_axes,
                stored,
                mantissa,
                largest,
                block_heads,
                block_pairs,
                block_k,
            )
    elif job == 1:
        if slot >= 0:
            put_heads(
                v_ptr,
                v_pool_ptr,
                v_scale_ptr,
                cos_ptr,
                sin_ptr,
                token,
                slot,
                kv_heads,
                v_head_dim,
                page_size,
                0,
                False,
                v_scale_axes,
                stored,
                mantissa,
                largest,
                block_heads,
                1,
                block_v,
            )
    else:
        # Queries of padding are rotated too: what they hold may matter to nobody, but it is finite.
        pair = tl.arange(0, block_pairs)[None, :]
        has_pair = pair < pairs
        cos = tl.load(cos_ptr + token * pairs + pair, mask=has_pair, other=0.0)
        sin = tl.load(sin_ptr + token * pairs + pair, mask=has_pair, other=0.0)
        low, high = pair_columns(pair, pairs, interleaved)
        head = (job - 2) * block_heads + tl.arange(0, block_heads)[:, None]
        has_head = head < q_heads
        row = (token * q_heads + head) * head_dim
        inside = has_head & has_pair
        first = tl.load(q_ptr + row + low, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(q_ptr + row + high, mask=inside, other=0.0).to(tl.float32)
        kind = q_out_ptr.dtype.element_ty
        tl.store(q_out_ptr + row + low, (first * cos - second * sin).to(kind), mask=inside)
        tl.store(q_out_ptr + row + high, (second * cos + first * sin).to(kind), mask=inside)
        if 2 * pairs < head_dim:
            column = 2 * pairs + tl.arange(0, block_k)[None, :]
            rest = has_head & (column < head_dim)
            tl.store(q_out_ptr + row + column, tl.load(q_ptr + row + column, mask=rest), mask=rest)


def append(cache: PagedKV, k: Array, v: Array, slots: Array) -> PagedKV:
    """Append without rotation; arguments are those of the public function, checked."""
    return _launch(cache, None, k, v, slots, None, interleaved=False)[1]


def rope_append(
    cache: PagedKV,
    q: Array,
    k: Array,
    v: Array,
    slots: Array,
    tables: tuple[Array, Array],
    *,
    interleaved: bool,
) -> tuple[Array, PagedKV]:
    """Rotate and append; arguments are those of the public function, checked."""
    turned, cache = _launch(cache, q, k, v, slots, tables, interleaved=interleaved)
    return turned, cache


def _launch(
    cache: PagedKV,
    q: Array | None,
    k: Array,
    v: Array,
    slots: Array,
    tables: tuple[Array, Array] | None,
    *,
    interleaved: bool,
) -> tuple[Array, PagedKV]:
    tokens, kv_heads, head_dim = k.shape
    v_head_dim = v.shape[2]
    if tokens == 0:
        return k if q is None else q, cache
    pairs = 0 if tables is None else tables[0].shape[1]
    cos, sin = (slots, slots) if tables is None else (t.astype("float32") for t in tables)
    q_heads = 0 if q is None else q.shape[1]
    widest = max(triton.next_power_of_2(head_dim), triton.next_power_of_2(v_head_dim))
    block_heads = max(1, _MAX_TILE // widest)
    block_heads = min(block_heads, triton.next_power_of_2(max(kv_heads, q_heads)))
    name = cache.k.dtype.name
    k_pool, v_pool, turned = launch(
        append_kernel,
        k if q is None else q,
        k,
        v,
        slots.astype("int32"),
        cos,
        sin,
        # Where there is no scale, any array stands in for it and is never read.
        slots if cache.k_scale is None else cache.k_scale,
        slots if cache.v_scale is None else cache.v_scale,
        grid=(tokens, 2 + triton.cdiv(q_heads, block_heads)),
        updates=(cache.k, cache.v),
        outputs=(
            jax.ShapeDtypeStruct((1,) if q is None else q.shape, k.dtype if q is None else q.dtype),
        ),
        constants={
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "page_size": cache.page_size,
            "q_heads": q_heads,
            "pairs": pairs,
            "interleaved": interleaved,
            "k_scale_axes": -1 if cache.k_scale is None else cache.k_scale.ndim,
            "v_scale_axes": -1 if cache.v_scale is None else cache.v_scale.ndim,
            "stored": _STORED.get(name, "as it is"),
            "mantissa": _MANTISSA.get(name, 0),
            "largest": LARGEST.get(name, 0.0),
            "block_heads": block_heads,
            "block_pairs": triton.next_power_of_2(max(1, pairs)),
            "block_k": triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
            "block_v": triton.next_power_of_2(v_head_dim),
        },
        num_warps=4,
    )
    return turned, dataclasses.replace(cache, k=k_pool, v=v_pool)
