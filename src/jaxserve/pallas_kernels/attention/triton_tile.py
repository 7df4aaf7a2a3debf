"""What attention kernels in Triton share: one tile of query rows against a run of keys.

Softmax is online and in base 2. Keys are found one by one through the page table, so pages may have
any size and the keys of a run may be any list; where pages are larger than a tile, neighbours in a
tile are neighbours in memory, and loads are as wide as ever.

Source: FlashAttention-2 (arXiv 2307.08691); paging as in FlashInfer (arXiv 2501.01005).
"""

import triton
import triton.language as tl

from jaxserve.pallas_kernels.triton_numbers import as_bytes, from_float8

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)
"""Where maxima begin. It is finite, as the difference of two infinities would be NaN."""


@triton.jit
def load_rows(
    pool_ptr,
    row,
    column,
    inside,
    dim: tl.constexpr,
    stored: tl.constexpr,
    compute: tl.constexpr,
):
    """Load rows of the pool as a tile in the dtype of computing; what is outside is 0."""
    at = row * dim + column
    if stored == "e4m3":
        tile = from_float8(tl.load(as_bytes(pool_ptr) + at, mask=inside, other=0), 3)
    elif stored == "e5m2":
        tile = from_float8(tl.load(as_bytes(pool_ptr) + at, mask=inside, other=0), 2)
    else:
        tile = tl.load(pool_ptr + at, mask=inside, other=0)
    return tile.to(compute)


@triton.jit
def load_scale(scale_ptr, page, kv_head, kv_heads: tl.constexpr, scale_axes: tl.constexpr, inside):
    """Load the scale of each key's page, or the one scale of all."""
    if scale_axes == 2:
        return tl.load(scale_ptr + page * kv_heads + kv_head, mask=inside, other=0.0)
    elif scale_axes == 1:
        return tl.load(scale_ptr + kv_head)
    else:
        return tl.load(scale_ptr)


@triton.jit
def load_query(
    q_ptr,
    row,
    inside,
    position,
    head,
    request,
    q_len,
    kv_len,
    extra0,
    extra1,
    extra2,
    extra3,
    q_mod: tl.constexpr,
    dim: tl.constexpr,
    block: tl.constexpr,
    halves: tl.constexpr,
    compute: tl.constexpr,
):
    """Load query rows, whole or in two halves; without halves the second result is the first."""
    if halves:
        column = tl.arange(0, block)[None, :]
        there = inside & (column < dim // 2)
        low = tl.load(q_ptr + row * dim + column, mask=there, other=0.0)
        high = tl.load(q_ptr + row * dim + dim // 2 + column, mask=there, other=0.0)
        if q_mod is not None:
            low, high = q_mod(
                low.to(tl.float32),
                high.to(tl.float32),
                position,
                column,
                head,
                request,
                q_len,
                kv_len,
                extra0,
                extra1,
                extra2,
                extra3,
            )
        return low.to(compute), high.to(compute)
    else:
        column = tl.arange(0, block)[None, :]
        tile = tl.load(q_ptr + row * dim + column, mask=inside & (column < dim), other=0.0)
        tile = tile.to(compute)
        return tile, tile


@triton.jit
def attend_keys(
    acc,
    top,
    mass,
    q_low,
    q_high,
    q_pos,
    head,
    request,
    q_len,
    kv_len,
    kv_head,
    kv_begin,
    kv_end,
    list_ptr,
    table_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    mask_ptr,
    mask_row,
    extra0,
    extra1,
    extra2,
    extra3,
    score_mod: tl.constexpr,
    mask_mod: tl.constexpr,
    k_mod: tl.constexpr,
    sm_scale: tl.constexpr,
    causal: tl.constexpr,
    window: tl.constexpr,
    packed: tl.constexpr,
    use_softmax: tl.constexpr,
    use_list: tl.constexpr,
    is_full: tl.constexpr,
    kv_heads: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    v_head_dim: tl.constexpr,
    stored: tl.constexpr,
    k_scale_axes: tl.constexpr,
    v_scale_axes: tl.constexpr,
    block_kv: tl.constexpr,
    block_d: tl.constexpr,
    block_v: tl.constexpr,
    halves: tl.constexpr,
    precision: tl.constexpr,
):
    """Let rows see the keys `kv_begin <= i < kv_end` of a run, and bring their state up to date.

    Args that speak of rows are `[rows, 1]`. With `use_list` the run is a list of positions;
    otherwise i is the position. With `is_full` nothing hides any key, and they fill whole tiles.
    """
    compute: tl.constexpr = q_low.dtype
    for low in range(kv_begin, kv_end, block_kv):
        index = low + tl.arange(0, block_kv)
        inside = index < kv_end
        if use_list:
            k_pos = tl.load(list_ptr + index, mask=inside, other=0)
        else:
            k_pos = index
        page = tl.load(table_ptr + k_pos // page_size, mask=inside, other=0).to(tl.int64)
        row = (page * kv_heads + kv_head) * page_size + k_pos % page_size
        column = tl.arange(0, block_d)[None, :]
        if halves:
            there = inside[:, None] & (column < head_dim // 2)
            k_low = load_rows(k_ptr, row[:, None], column, there, head_dim, stored, compute)
            k_high = load_rows(
                k_ptr, row[:, None], head_dim // 2 + column, there, head_dim, stored, compute
            )
            if k_mod is not None:
                # A key belongs to no query head; functions of keys must not ask for one.
                k_low, k_high = k_mod(
                    k_low.to(tl.float32),
                    k_high.to(tl.float32),
                    k_pos[:, None],
                    column,
                    kv_head,
                    tl.max(request),
                    tl.max(q_len),
                    tl.max(kv_len),
                    extra0,
                    extra1,
                    extra2,
                    extra3,
                )
                k_low = k_low.to(compute)
                k_high = k_high.to(compute)
            scores = tl.dot(q_low, tl.trans(k_low), input_precision=precision)
            scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=precision)
        else:
            there = inside[:, None] & (column < head_dim)
            k = load_rows(k_ptr, row[:, None], column, there, head_dim, stored, compute)
            scores = tl.dot(q_low, tl.trans(k), input_precision=precision)
        if k_scale_axes == 2:
            scores *= load_scale(k_scale_ptr, page, kv_head, kv_heads, 2, inside)[None, :]
        elif k_scale_axes >= 0:
            scores *= load_scale(k_scale_ptr, page, kv_head, kv_heads, k_scale_axes, inside)

        if score_mod is None:
            scores *= sm_scale * LOG2_E
        else:
            scores = score_mod(
                scores * sm_scale,
                q_pos,
                k_pos[None, :],
                head,
                request,
                q_len,
                kv_len,
                extra0,
                extra1,
                extra2,
                extra3,
            )
            if use_softmax:
                scores *= LOG2_E
        seen = inside[None, :]
        if not is_full:
            if causal:
                seen = seen & (k_pos[None, :] <= q_pos)
            if window > 0:
                seen = seen & (k_pos[None, :] > q_pos - window)
            if mask_mod is not None:
                seen = seen & mask_mod(
                    scores,
                    q_pos,
                    k_pos[None, :],
                    head,
                    request,
                    q_len,
                    kv_len,
                    extra0,
                    extra1,
                    extra2,
                    extra3,
                )
            if packed:
                word = tl.load(mask_ptr + mask_row + k_pos[None, :] // 32, mask=seen, other=0)
                seen = seen & (((word >> (k_pos[None, :] % 32)) & 1) != 0)
        if use_softmax:
            if not is_full:
                scores = tl.where(seen, scores, LOWEST)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            shrink = tl.exp2(top - new_top)
            weights = tl.exp2(scores - new_top[:, None])
            if not is_full:
                # In a row that has seen nothing yet the lowest maximum makes hidden keys weigh 1.
                weights = tl.where(seen, weights, 0.0)
            mass = mass * shrink + tl.sum(weights, axis=1)
            acc = acc * shrink[:, None]
            top = new_top
        elif is_full:
            weights = scores
        else:
            weights = tl.where(seen, scores, 0.0)
        if v_scale_axes == 2:
            weights *= load_scale(v_scale_ptr, page, kv_head, kv_heads, 2, inside)[None, :]
        v_column = tl.arange(0, block_v)[None, :]
        v_there = inside[:, None] & (v_column < v_head_dim)
        v = load_rows(v_ptr, row[:, None], v_column, v_there, v_head_dim, stored, compute)
        acc = tl.dot(weights.to(compute), v, acc, input_precision=precision)
    return acc, top, mass


@triton.jit
def finish_rows(
    acc, top, mass, v_scale_ptr, kv_head, v_scale_axes: tl.constexpr, use_softmax: tl.constexpr
):
    """Turn sums into a state: a mean of values, and the base-2 logarithm of the mass."""
    if v_scale_axes == 0:
        acc *= tl.load(v_scale_ptr)
    elif v_scale_axes == 1:
        acc *= tl.load(v_scale_ptr + kv_head)
    if use_softmax:
        some = tl.where(mass > 0, mass, 1.0)
        acc = acc / some[:, None]
        lse = tl.where(mass > 0, top + tl.log2(some), float("-inf"))
    else:
        lse = mass
    return acc, lse


@triton.jit
def add_state(acc, top, mass, o, lse, use_softmax: tl.constexpr):
    """Merge a partial state into the sums of rows; see `state.merge`."""
    if use_softmax:
        new_top = tl.maximum(top, lse)
        weight = tl.exp2(lse - new_top)
        shrink = tl.exp2(top - new_top)
        return acc * shrink[:, None] + o * weight[:, None], new_top, mass * shrink + weight
    else:
        return acc + o, top, mass


@triton.jit
def merge_kernel(
    part_o_ptr,
    part_lse_ptr,
    plan_ptr,
    o_unused,
    lse_unused,
    o_ptr,
    lse_ptr,
    num_at: tl.constexpr,
    indptr_at: tl.constexpr,
    target_at: tl.constexpr,
    units_at: tl.constexpr,
    heads: tl.constexpr,
    v_head_dim: tl.constexpr,
    use_softmax: tl.constexpr,
    block_h: tl.constexpr,
    block_v: tl.constexpr,
):
    """Merge the partial states of one unit of the output: one program each."""
    merge = tl.program_id(0)
    if merge < tl.load(plan_ptr + num_at):
        target = tl.load(plan_ptr + target_at + merge).to(tl.int64)
        head = tl.arange(0, block_h)
        column = tl.arange(0, block_v)[None, :]
        there = (head[:, None] < heads) & (column < v_head_dim)
        acc = tl.zeros((block_h, block_v), tl.float32)
        top = tl.full((block_h,), LOWEST, tl.float32)
        mass = tl.zeros((block_h,), tl.float32)
        first = tl.load(plan_ptr + indptr_at + merge)
        last = tl.load(plan_ptr + indptr_at + merge + 1)
        for i in range(first, last):
            row = tl.load(plan_ptr + units_at + i).to(tl.int64) * heads + head
            at = row[:, None] * v_head_dim + column
            o = tl.load(part_o_ptr + at, mask=there, other=0.0)
            lse = tl.load(part_lse_ptr + row, mask=head < heads, other=float("-inf"))
            acc, top, mass = add_state(acc, top, mass, o, lse, use_softmax)
        acc, lse = finish_rows(acc, top, mass, plan_ptr, 0, -1, use_softmax)
        row = target * heads + head
        at = row[:, None] * v_head_dim + column
        tl.store(o_ptr + at, acc.to(o_ptr.dtype.element_ty), mask=there)
        tl.store(lse_ptr + row, lse, mask=head < heads)
