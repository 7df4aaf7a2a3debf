"""One program per chunk of a list; programs find their list by counting chunks, on the device."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.attention.triton_tile import (
    LOWEST,
    add_state,
    attend_keys,
    finish_rows,
    load_query,
)
from jaxserve.pallas_kernels.attention.triton_variant import (
    MAX_EXTRAS,
    ordered_extras,
    translate,
)
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.state import AttentionState
from jaxserve.pallas_kernels.token_attention.lists import TokenLists
from jaxserve.pallas_kernels.triton_launch import launch
from jaxserve.pallas_kernels.variant import AttentionVariant

_DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
_STORED = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_PROGRAMS = 264
"""Programs that a full list should give work to: two per multiprocessor of an H100."""


@triton.jit
def token_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    kv_len_ptr,
    list_indptr_ptr,
    list_ptr,
    chunk_end_ptr,
    extra0,
    extra1,
    extra2,
    extra3,
    o_ptr,
    lse_ptr,
    part_o_ptr,
    part_lse_ptr,
    score_mod: tl.constexpr,
    mask_mod: tl.constexpr,
    q_mod: tl.constexpr,
    k_mod: tl.constexpr,
    sm_scale: tl.constexpr,
    use_softmax: tl.constexpr,
    rows: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    v_head_dim: tl.constexpr,
    stored: tl.constexpr,
    compute: tl.constexpr,
    k_scale_axes: tl.constexpr,
    v_scale_axes: tl.constexpr,
    chunk: tl.constexpr,
    block_rows: tl.constexpr,
    block_q: tl.constexpr,
    block_kv: tl.constexpr,
    block_d: tl.constexpr,
    block_v: tl.constexpr,
    halves: tl.constexpr,
    precision: tl.constexpr,
):
    """Attend to a chunk of one list of tokens; one program per chunk."""
    work = tl.program_id(0)
    if work < tl.load(chunk_end_ptr + rows - 1):
        # The list of this chunk is the number of lists that end before it.
        before = tl.zeros((block_rows,), tl.int32)
        for low in range(0, rows, block_rows):
            at = low + tl.arange(0, block_rows)
            end = tl.load(chunk_end_ptr + at, mask=at < rows, other=2147483647)
            before += (end <= work).to(tl.int32)
        listed = tl.sum(before, axis=0)
        first_chunk = tl.load(chunk_end_ptr + listed - 1, mask=listed > 0, other=0)
        num_chunks = tl.load(chunk_end_ptr + listed) - first_chunk
        begin = tl.load(list_indptr_ptr + listed)
        end = tl.load(list_indptr_ptr + listed + 1)
        low = begin + (work - first_chunk) * chunk
        high = tl.minimum(low + chunk, end)
        request = listed // kv_heads
        kv_head = listed % kv_heads

        row = tl.arange(0, block_q)[:, None]
        has_row = row < group
        head = kv_head * group + tl.minimum(row, group - 1)
        keys = tl.load(kv_len_ptr + request)
        kv_len = keys + row * 0
        q_pos = kv_len - 1
        requests = request + row * 0
        q_len = row * 0 + 1
        q_low, q_high = load_query(
            q_ptr,
            (listed * group + row).to(tl.int64),
            has_row,
            q_pos,
            head,
            requests,
            q_len,
            kv_len,
            extra0,
            extra1,
            extra2,
            extra3,
            q_mod,
            head_dim,
            block_d,
            halves,
            compute,
        )
        acc = tl.zeros((block_q, block_v), tl.float32)
        top = tl.full((block_q,), LOWEST, tl.float32)
        mass = tl.zeros((block_q,), tl.float32)
        acc, top, mass = attend_keys(
            acc,
            top,
            mass,
            q_low,
            q_high,
            q_pos,
            head,
            requests,
            q_len,
            kv_len,
            kv_head,
            low,
            high,
            list_ptr,
            kv_indices_ptr + tl.load(kv_indptr_ptr + request),
            k_ptr,
            v_ptr,
            k_scale_ptr,
            v_scale_ptr,
            list_ptr,
            row,
            extra0,
            extra1,
            extra2,
            extra3,
            score_mod,
            mask_mod,
            k_mod,
            sm_scale,
            False,
            0,
            0,
            use_softmax,
            True,
            False,
            kv_heads,
            page_size,
            head_dim,
            v_head_dim,
            stored,
            k_scale_axes,
            v_scale_axes,
            block_kv,
            block_d,
            block_v,
            halves,
            precision,
        )
        acc, lse = finish_rows(acc, top, mass, v_scale_ptr, kv_head, v_scale_axes, use_softmax)
        column = tl.arange(0, block_v)[None, :]
        there = has_row & (column < v_head_dim)
        flat = tl.arange(0, block_q)
        if num_chunks == 1:
            out = (listed * group + row).to(tl.int64) * v_head_dim + column
            tl.store(o_ptr + out, acc.to(o_ptr.dtype.element_ty), mask=there)
            tl.store(lse_ptr + listed * group + flat, lse, mask=flat < group)
        else:
            out = (work * group + row).to(tl.int64) * v_head_dim + column
            tl.store(part_o_ptr + out, acc, mask=there)
            tl.store(part_lse_ptr + work * group + flat, lse, mask=flat < group)


@triton.jit
def merge_chunks_kernel(
    part_o_ptr,
    part_lse_ptr,
    chunk_end_ptr,
    o_unused,
    lse_unused,
    o_ptr,
    lse_ptr,
    group: tl.constexpr,
    v_head_dim: tl.constexpr,
    use_softmax: tl.constexpr,
    block_q: tl.constexpr,
    block_v: tl.constexpr,
):
    """Merge the chunks of one list; lists of one chunk are done, empty ones become zeros."""
    listed = tl.program_id(0)
    first = tl.load(chunk_end_ptr + listed - 1, mask=listed > 0, other=0)
    last = tl.load(chunk_end_ptr + listed)
    if last - first != 1:
        flat = tl.arange(0, block_q)
        row = flat[:, None]
        column = tl.arange(0, block_v)[None, :]
        there = (row < group) & (column < v_head_dim)
        acc = tl.zeros((block_q, block_v), tl.float32)
        top = tl.full((block_q,), LOWEST, tl.float32)
        mass = tl.zeros((block_q,), tl.float32)
        for work in range(first, last):
            at = (work * group + row).to(tl.int64) * v_head_dim + column
            o = tl.load(part_o_ptr + at, mask=there, other=0.0)
            lse = tl.load(
                part_lse_ptr + work * group + flat, mask=flat < group, other=float("-inf")
            )
            acc, top, mass = add_state(acc, top, mass, o, lse, use_softmax)
        acc, lse = finish_rows(acc, top, mass, part_lse_ptr, 0, -1, use_softmax)
        tl.store(lse_ptr + listed * group + flat, lse, mask=flat < group)
        out = (listed * group + row).to(tl.int64) * v_head_dim + column
        tl.store(o_ptr + out, acc.to(o_ptr.dtype.element_ty), mask=there)


def token_attention(
    q: Array,
    cache: PagedKV,
    kv_indptr: Array,
    kv_indices: Array,
    kv_len: Array,
    tokens: TokenLists,
    *,
    sm_scale: float,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
    chunk: int | None,
) -> AttentionState:
    """Attend to lists; arguments are those of the public function, checked."""
    requests, q_heads, head_dim = q.shape
    kv_heads, v_dim = cache.kv_heads, cache.v.shape[3]
    rows, group = requests * kv_heads, q_heads // kv_heads
    capacity = tokens.positions.shape[0]
    if rows == 0 or capacity == 0:
        return AttentionState.empty((requests, q_heads, v_dim), q.dtype)
    functions = translate(
        variant,
        {n: jax.ShapeDtypeStruct(extra[n].shape, extra[n].dtype) for n in variant.extras},
        sm_scale=sm_scale,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    arrays = [extra[name] for name in ordered_extras(variant)]
    tile = choose_tile(cache, q.dtype.name, group, triton_launch.capability())
    if chunk is None:
        chunk = max(tile["block_kv"], min(1024, triton.next_power_of_2(capacity // _PROGRAMS + 1)))
    tile["block_kv"] = min(tile["block_kv"], chunk)
    # Every list but the empty ones may end in a chunk that is not full.
    most_chunks = capacity // chunk + min(rows, capacity)
    ends = jnp.cumsum(-(-(tokens.indptr[1:] - tokens.indptr[:-1]) // chunk)).astype(jnp.int32)
    halves = functions.q_mod is not None or functions.k_mod is not None
    name = cache.k.dtype.name
    compute = "float32" if "float32" in (q.dtype.name, name) else name
    constants: dict[str, Any] = {
        "use_softmax": variant.use_softmax,
        "group": group,
        "v_head_dim": v_dim,
        "block_q": max(16, triton.next_power_of_2(group)),
        "block_v": max(16, triton.next_power_of_2(v_dim)),
    }
    o, lse, part_o, part_lse = launch(
        token_kernel,
        q,
        cache.k,
        cache.v,
        ends if cache.k_scale is None else cache.k_scale,
        ends if cache.v_scale is None else cache.v_scale,
        kv_indptr.astype("int32"),
        kv_indices.astype("int32"),
        kv_len.astype("int32"),
        tokens.indptr.astype("int32"),
        tokens.positions.astype("int32"),
        ends,
        *arrays,
        *[ends] * (MAX_EXTRAS - len(arrays)),
        grid=(most_chunks,),
        outputs=(
            jax.ShapeDtypeStruct((requests, q_heads, v_dim), q.dtype),
            jax.ShapeDtypeStruct((requests, q_heads), jnp.float32),
            jax.ShapeDtypeStruct((most_chunks, group, v_dim), jnp.float32),
            jax.ShapeDtypeStruct((most_chunks, group), jnp.float32),
        ),
        constants={
            **constants,
            "score_mod": functions.score_mod,
            "mask_mod": functions.mask_mod,
            "q_mod": functions.q_mod,
            "k_mod": functions.k_mod,
            "sm_scale": sm_scale,
            "rows": rows,
            "kv_heads": kv_heads,
            "page_size": cache.page_size,
            "head_dim": head_dim,
            "stored": _STORED.get(name, "as it is"),
            "compute": _DTYPES.get(compute, tl.float16),
            "k_scale_axes": -1 if cache.k_scale is None else jnp.ndim(cache.k_scale),
            "v_scale_axes": -1 if cache.v_scale is None else jnp.ndim(cache.v_scale),
            "chunk": chunk,
            "block_rows": min(1024, triton.next_power_of_2(rows)),
            "block_kv": tile["block_kv"],
            "block_d": max(16, triton.next_power_of_2(head_dim // (2 if halves else 1))),
            "halves": halves,
            "precision": "tf32x3",
        },
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    o, lse = launch(
        merge_chunks_kernel,
        part_o,
        part_lse,
        ends,
        grid=(rows,),
        updates=(o, lse),
        constants=constants,
    )
    return AttentionState(o=o, lse=lse)


def choose_tile(cache: PagedKV, q_dtype: str, group: int, capability: int) -> dict[str, int]:
    """Choose the tile that fits into the shared memory of a device."""
    dim = triton.next_power_of_2(max(cache.k.shape[3], cache.v.shape[3]))
    num_bytes = 4 if "float32" in (q_dtype, cache.k.dtype.name) else 2
    room = triton_launch.shared_bytes(capability) - max(16, group) * dim * num_bytes
    block_kv = 64
    while 4 * block_kv * dim * num_bytes > room and block_kv > 16:
        block_kv //= 2
    # Products of float32 without tensor cores hold both operands: four warps would spill.
    is_large = num_bytes == 4 and dim > 64
    return {"block_kv": block_kv, "num_warps": 8 if is_large else 4, "num_stages": 3}
