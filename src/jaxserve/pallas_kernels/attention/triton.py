"""Paged attention in Triton, decode and prefill, driven by the plan.

Each program is one CTA of the plan: it takes its run of work items, loads an item's query rows, and
lets them see the item's keys. Items with few rows take a narrow tile, which is what decoding
needs; all others take a wide one. Rows whose keys were split leave partial states, which a second
launch merges.

This is the portable form, for every device that Triton knows; see `triton_tile` for its core.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.attention.backends import Case
from jaxserve.pallas_kernels.attention.triton_tile import (
    LOWEST,
    attend_keys,
    finish_rows,
    load_query,
    merge_kernel,
)
from jaxserve.pallas_kernels.attention.triton_variant import (
    MAX_EXTRAS,
    TritonVariant,
    ordered_extras,
    translate,
    untranslatable,
)
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Item, Plan, PlanSpec
from jaxserve.pallas_kernels.state import AttentionState
from jaxserve.pallas_kernels.triton_launch import launch
from jaxserve.pallas_kernels.variant import AttentionVariant

MAX_HEAD_DIM = 256
"""Widest heads that fit into the registers of a program."""

NARROW_ROWS = 16
"""Rows of the narrow tile: the fewest that tensor cores multiply without waste."""

_DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
_STORED = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_FIELDS = tl.constexpr(len(Item))


@triton.jit
def attend_item(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    plan_ptr,
    mask_ptr,
    extra0,
    extra1,
    extra2,
    extra3,
    o_ptr,
    lse_ptr,
    part_o_ptr,
    part_lse_ptr,
    item,
    score_mod: tl.constexpr,
    mask_mod: tl.constexpr,
    q_mod: tl.constexpr,
    k_mod: tl.constexpr,
    sm_scale: tl.constexpr,
    causal: tl.constexpr,
    window: tl.constexpr,
    packed: tl.constexpr,
    hides_blocks: tl.constexpr,
    use_softmax: tl.constexpr,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    heads_per_tile: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    v_head_dim: tl.constexpr,
    stored: tl.constexpr,
    compute: tl.constexpr,
    k_scale_axes: tl.constexpr,
    v_scale_axes: tl.constexpr,
    block_kv: tl.constexpr,
    block_d: tl.constexpr,
    block_v: tl.constexpr,
    halves: tl.constexpr,
    precision: tl.constexpr,
    items_at: tl.constexpr,
    table_at: tl.constexpr,
    request_at: tl.constexpr,
    position_at: tl.constexpr,
    q_len_at: tl.constexpr,
    kv_len_at: tl.constexpr,
    mask_stride: tl.constexpr,
    block_q: tl.constexpr,
    skips_masks: tl.constexpr,
):
    """Carry out one item with a tile of `block_q` rows."""
    field = plan_ptr + items_at + item * _FIELDS
    kv_head = tl.load(field + 1)
    first_head = tl.load(field + 2)
    q_start = tl.load(field + 3)
    num_tokens = tl.load(field + 4)
    kv_begin = tl.load(field + 6)
    kv_end = tl.load(field + 7)
    table_base = tl.load(field + 10)
    slot = tl.load(field + 11)

    row = tl.arange(0, block_q)[:, None]
    token = row // heads_per_tile
    head = first_head + row % heads_per_tile
    has_row = token < num_tokens
    place = q_start + token
    q_pos = tl.load(plan_ptr + position_at + place, mask=has_row, other=0)
    request = tl.load(plan_ptr + request_at + place, mask=has_row, other=0)
    q_len = tl.load(plan_ptr + q_len_at + request, mask=has_row, other=0)
    kv_len = tl.load(plan_ptr + kv_len_at + request, mask=has_row, other=0)
    if packed:
        words = (tl.load(field + 12) + 31) // 32
        mask_row = tl.load(field + 14) + token * words + head * mask_stride
    else:
        mask_row = token

    q_low, q_high = load_query(
        q_ptr,
        (place * q_heads + head).to(tl.int64),
        has_row,
        q_pos,
        head,
        request,
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
    # Stretches of keys of which some are hidden, none, and some again; the first is empty unless
    # there is a window. Narrow tiles wait for memory, and mask always.
    if skips_masks:
        full_begin = kv_begin
        if window > 0 or hides_blocks:
            hidden = tl.maximum(tl.load(field + 8) - kv_begin, 0)
            full_begin += (hidden + block_kv - 1) // block_kv * block_kv
        full_end = tl.minimum(tl.load(field + 9), kv_end)
        full_end = full_begin + tl.maximum(full_end - full_begin, 0) // block_kv * block_kv
        full_begin = tl.minimum(full_begin, kv_end)
        full_end = tl.minimum(full_end, kv_end)
    else:
        full_begin = kv_end
        full_end = kv_end
    has_head: tl.constexpr = not skips_masks or window > 0 or hides_blocks
    for stretch in tl.static_range(0 if has_head else 1, 3 if skips_masks else 1):
        if stretch == 0:
            low = kv_begin
            high = full_begin
        elif stretch == 1:
            low = full_begin
            high = full_end
        else:
            low = full_end
            high = kv_end
        acc, top, mass = attend_keys(
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
            low,
            high,
            plan_ptr,
            plan_ptr + table_at + table_base,
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
            score_mod,
            mask_mod,
            k_mod,
            sm_scale,
            causal,
            window,
            packed,
            use_softmax,
            False,
            stretch == 1,
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
    flat_row = tl.arange(0, block_q)
    flat_there = flat_row // heads_per_tile < num_tokens
    if slot < 0:
        out = (place * q_heads + head).to(tl.int64)
        tl.store(o_ptr + out * v_head_dim + column, acc.to(o_ptr.dtype.element_ty), mask=there)
        flat = (q_start + flat_row // heads_per_tile) * q_heads
        flat += first_head + flat_row % heads_per_tile
        tl.store(lse_ptr + flat, lse, mask=flat_there)
    else:
        unit = slot.to(tl.int64) * heads_per_tile
        tl.store(part_o_ptr + (unit + row) * v_head_dim + column, acc, mask=there)
        tl.store(part_lse_ptr + unit + flat_row, lse, mask=flat_there)


@triton.jit
def paged_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    plan_ptr,
    mask_ptr,
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
    causal: tl.constexpr,
    window: tl.constexpr,
    packed: tl.constexpr,
    hides_blocks: tl.constexpr,
    use_softmax: tl.constexpr,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    heads_per_tile: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    v_head_dim: tl.constexpr,
    stored: tl.constexpr,
    compute: tl.constexpr,
    k_scale_axes: tl.constexpr,
    v_scale_axes: tl.constexpr,
    block_kv: tl.constexpr,
    block_d: tl.constexpr,
    block_v: tl.constexpr,
    halves: tl.constexpr,
    precision: tl.constexpr,
    items_at: tl.constexpr,
    table_at: tl.constexpr,
    request_at: tl.constexpr,
    position_at: tl.constexpr,
    q_len_at: tl.constexpr,
    kv_len_at: tl.constexpr,
    mask_stride: tl.constexpr,
    work_at: tl.constexpr,
    narrow_rows: tl.constexpr,
    wide_rows: tl.constexpr,
):
    """Work through the items of the plan that fall to one program."""
    cta = tl.program_id(0)
    first = tl.load(plan_ptr + work_at + cta)
    last = tl.load(plan_ptr + work_at + cta + 1)
    for item in range(first, last):
        num_rows = tl.load(plan_ptr + items_at + item * _FIELDS + 4) * heads_per_tile
        if num_rows <= narrow_rows:
            attend_item(
                q_ptr,
                k_ptr,
                v_ptr,
                k_scale_ptr,
                v_scale_ptr,
                plan_ptr,
                mask_ptr,
                extra0,
                extra1,
                extra2,
                extra3,
                o_ptr,
                lse_ptr,
                part_o_ptr,
                part_lse_ptr,
                item,
                score_mod,
                mask_mod,
                q_mod,
                k_mod,
                sm_scale,
                causal,
                window,
                packed,
                hides_blocks,
                use_softmax,
                q_heads,
                kv_heads,
                heads_per_tile,
                page_size,
                head_dim,
                v_head_dim,
                stored,
                compute,
                k_scale_axes,
                v_scale_axes,
                block_kv,
                block_d,
                block_v,
                halves,
                precision,
                items_at,
                table_at,
                request_at,
                position_at,
                q_len_at,
                kv_len_at,
                mask_stride,
                narrow_rows,
                False,
            )
        elif wide_rows > 0:
            attend_item(
                q_ptr,
                k_ptr,
                v_ptr,
                k_scale_ptr,
                v_scale_ptr,
                plan_ptr,
                mask_ptr,
                extra0,
                extra1,
                extra2,
                extra3,
                o_ptr,
                lse_ptr,
                part_o_ptr,
                part_lse_ptr,
                item,
                score_mod,
                mask_mod,
                q_mod,
                k_mod,
                sm_scale,
                causal,
                window,
                packed,
                hides_blocks,
                use_softmax,
                q_heads,
                kv_heads,
                heads_per_tile,
                page_size,
                head_dim,
                v_head_dim,
                stored,
                compute,
                k_scale_axes,
                v_scale_axes,
                block_kv,
                block_d,
                block_v,
                halves,
                precision,
                items_at,
                table_at,
                request_at,
                position_at,
                q_len_at,
                kv_len_at,
                mask_stride,
                wide_rows,
                packed == 0 and (mask_mod is None or hides_blocks),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonTiles:
    """Sizes of tiles and launches.

    Attributes:
        wide_rows: Query rows of the wide tile; 0 if no item needs it.
        block_kv: Keys per tile.
        num_warps: Warps of a program.
        num_stages: Tiles of keys on their way at once.
    """

    wide_rows: int
    block_kv: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        """Refuse what Triton cannot do."""
        for name in ("block_kv", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of 2, got {value}.")
        if self.wide_rows and (self.wide_rows < 16 or self.wide_rows & (self.wide_rows - 1)):
            raise ValueError(f"wide_rows must be 0 or a power of 2 from 16, got {self.wide_rows}.")


def tune(spec: PlanSpec) -> PlanSpec:
    """Return the spec with tiles whose rows registers hold.

    Products of float32 without tensor cores hold both operands, so that wide heads leave room for
    half as many rows; compiled for Hopper, 64 rows of 128 spill and 32 do not.
    """
    wide = max(spec.head_dim, spec.v_dim) > 64
    is_full = "float32" in (spec.q_dtype, spec.kv_dtype)
    return replace(spec, tile_q=min(spec.tile_q, 32)) if wide and is_full else spec


def choose_tiles(spec: PlanSpec, capability: int) -> TritonTiles:
    """Choose tiles that fit into the registers and the shared memory of a device.

    Args:
        spec: What is static about the plan.
        capability: Compute capability, times ten.
    """
    most_rows = min(spec.max_tokens, spec.tile_tokens) * spec.heads_per_tile
    wide = 0 if most_rows <= NARROW_ROWS else triton.next_power_of_2(most_rows)
    dim = triton.next_power_of_2(max(spec.head_dim, spec.v_dim))
    num_bytes = 4 if "float32" in (spec.q_dtype, spec.kv_dtype) else 2
    block_kv = 64 if dim * num_bytes <= 256 else 32
    # Keys and values of every stage but the one in registers, queries, and scores on their way from
    # one layout to another.
    held = max(wide, NARROW_ROWS) * (dim * num_bytes + 4 * block_kv)
    stages = 3
    room = triton_launch.shared_bytes(capability) - held
    while stages > 1 and (stages - 1) * 2 * block_kv * dim * num_bytes > room:
        stages -= 1
    return TritonTiles(
        wide_rows=wide,
        block_kv=block_kv,
        # A thread of four warps would hold half a row of 64 outputs, or of as many bytes.
        num_warps=8 if wide * num_bytes >= 128 else 4,
        num_stages=stages,
    )


def supports(case: Case) -> str | None:
    """Return None, or why the case cannot be done; see `backends.Backend`."""
    spec, variant = case.spec, case.variant
    if spec.q_dtype not in _DTYPES:
        return f"queries in {spec.q_dtype}; the kernels read {', '.join(_DTYPES)}"
    widest = max(spec.head_dim, spec.v_dim)
    if widest > MAX_HEAD_DIM:
        return f"heads of {widest} numbers; the kernels hold at most {MAX_HEAD_DIM}"
    if len(variant.extras) > MAX_EXTRAS:
        return f"a variant with {len(variant.extras)} arrays; the kernels read {MAX_EXTRAS}"
    if (variant.q_mod or variant.k_mod) and spec.head_dim < 32:
        return f"q_mod and k_mod with heads of {spec.head_dim}; they need at least 32"
    if case.platform == "gpu" and case.capability and float(case.capability) < 8.0:
        return f"compute capability {case.capability}; the kernels need 8.0"
    return untranslatable(variant) or triton_launch.unavailable()


def run(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant,
    extra: dict[str, Array],
    sm_scale: float,
) -> AttentionState:
    """Attend; see `backends.Backend.run`."""
    spec = plan.spec
    arrays = [extra[name] for name in ordered_extras(variant)]
    functions = translate(
        variant,
        {n: jax.ShapeDtypeStruct(extra[n].shape, extra[n].dtype) for n in variant.extras},
        sm_scale=sm_scale,
        q_heads=spec.q_heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
    )
    tiles = choose_tiles(spec, triton_launch.capability())
    layout = {name: start for name, (start, _, _) in spec.layout.items()}
    mask = extra["mask"] if variant.packed_mask != "none" else plan.buffer
    part = (spec.bounds[1], spec.heads_per_tile)
    o, lse, part_o, part_lse = launch(
        paged_kernel,
        q,
        kv.k,
        kv.v,
        # Where there is no scale, mask or extra, the plan stands in for it and is not read as one.
        plan.buffer if kv.k_scale is None else kv.k_scale,
        plan.buffer if kv.v_scale is None else kv.v_scale,
        plan.buffer,
        mask,
        *arrays,
        *[plan.buffer] * (MAX_EXTRAS - len(arrays)),
        grid=(spec.num_ctas,),
        outputs=(
            jax.ShapeDtypeStruct((*q.shape[:2], spec.v_dim), q.dtype),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
            jax.ShapeDtypeStruct((*part, spec.v_dim), jnp.float32),
            jax.ShapeDtypeStruct(part, jnp.float32),
        ),
        constants={
            **_constants(spec, kv, variant, functions, tiles, sm_scale),
            "items_at": layout["items"],
            "work_at": layout["work_indptr"],
            "table_at": layout["kv_indices"],
            "request_at": layout["token_request"],
            "position_at": layout["token_position"],
            "q_len_at": layout["q_len"],
            "kv_len_at": layout["kv_len"],
            "mask_stride": mask.shape[-1] if variant.packed_mask == "per_head" else 0,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if may_split(spec):
        o, lse = launch(
            merge_kernel,
            part_o,
            part_lse,
            plan.buffer,
            grid=spec.layout["merge_target"][2],
            updates=(o, lse),
            constants={
                "num_at": layout["counts"] + 4,
                "indptr_at": layout["merge_indptr"],
                "target_at": layout["merge_target"],
                "units_at": layout["merge_units"],
                "heads": spec.heads_per_tile,
                "v_head_dim": spec.v_dim,
                "use_softmax": variant.use_softmax,
                "block_h": triton.next_power_of_2(spec.heads_per_tile),
                "block_v": triton.next_power_of_2(spec.v_dim),
            },
        )
    return AttentionState(o=o, lse=lse)


def may_split(spec: PlanSpec) -> bool:
    """Tell whether plans of a spec can have rows whose keys were split."""
    cuts_blocks = spec.variant.block_mask is not None
    return spec.split_mode != "none" or spec.cascade_levels > 0 or cuts_blocks


def _constants(
    spec: PlanSpec,
    kv: PagedKV,
    variant: AttentionVariant,
    functions: TritonVariant,
    tiles: TritonTiles,
    sm_scale: float,
) -> dict[str, Any]:
    name = kv.k.dtype.name
    compute = name if name in _DTYPES else "float16"
    if "float32" in (spec.q_dtype, name):
        compute = "float32"
    halves = functions.q_mod is not None or functions.k_mod is not None
    return {
        "score_mod": functions.score_mod,
        "mask_mod": functions.mask_mod,
        "q_mod": functions.q_mod,
        "k_mod": functions.k_mod,
        "sm_scale": float(sm_scale),
        "causal": spec.causal,
        "window": spec.window or 0,
        "packed": int(variant.packed_mask != "none"),
        "hides_blocks": spec.variant.block_mask is not None,
        "use_softmax": variant.use_softmax,
        "q_heads": spec.q_heads,
        "kv_heads": spec.kv_heads,
        "heads_per_tile": spec.heads_per_tile,
        "page_size": spec.page_size,
        "head_dim": spec.head_dim,
        "v_head_dim": spec.v_dim,
        "stored": _STORED.get(name, "as it is"),
        "compute": _DTYPES[compute],
        "k_scale_axes": -1 if kv.k_scale is None else jnp.ndim(kv.k_scale),
        "v_scale_axes": -1 if kv.v_scale is None else jnp.ndim(kv.v_scale),
        "block_kv": tiles.block_kv,
        "block_d": max(16, triton.next_power_of_2(spec.head_dim // (2 if halves else 1))),
        "block_v": max(16, triton.next_power_of_2(spec.v_dim)),
        "halves": halves,
        # Three products of tensor cores, which together are about as exact as float32.
        "precision": "tf32x3",
        "narrow_rows": NARROW_ROWS,
        "wide_rows": tiles.wide_rows,
    }
