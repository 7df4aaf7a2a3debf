"""The backend for Hopper: Pallas on Mosaic GPU.

Plans whose tiles hold few rows go to the decode kernel, which has keys on the long side of the
products; all others, those of mixed steps and shared prefixes included, to the prefill kernel.
"""

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.attention import mosaic_decode, mosaic_prefill, tuning
from jaxserve.pallas_kernels.attention.backends import Case
from jaxserve.pallas_kernels.attention.context import context, modified
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.state import AttentionState
from jaxserve.pallas_kernels.variant import AttentionVariant

CAPABILITIES = ("9.0",)
"""Compute capabilities that have the instructions of both kernels."""
DECODE_ROWS = 64
"""Most rows of a tile, padding included, for which the decode kernel is taken."""


def supports(case: Case) -> str | None:
    """Return None, or why the case cannot be done: what was found and what would do."""
    if case.platform != "gpu" or case.capability not in CAPABILITIES:
        found = f"{case.platform} {case.capability}".strip()
        return f"it needs a GPU of compute capability {' or '.join(CAPABILITIES)}, found {found}"
    if uses_decode(case.spec, case.variant):
        return None
    reason = mosaic_prefill.why_not(case.spec, case.variant)
    if reason is None and "page" in (case.k_scale, case.v_scale):
        reason = mosaic_prefill.why_no_page_scales(case.spec)
    return reason


def uses_decode(spec: PlanSpec, variant: AttentionVariant) -> bool:
    """Tell whether the decode kernel serves a plan, rather than the prefill kernel."""
    few = mosaic_decode.Sizes(spec).rows <= DECODE_ROWS
    return few and mosaic_decode.why_not(spec, variant) is None


def tune(spec: PlanSpec) -> PlanSpec:
    """Return a spec with the tiles and the CTAs that suit the kernels best.

    A step of single tokens goes to the decode kernel, one token per item. Others go to the prefill
    kernel, with both warpgroups where requests have more tokens than one of them takes. Where a
    result must not depend on other requests, all steps have tiles of one size: one warpgroup's.

    Args:
        spec: What is to be computed; its tiles and CTAs change only if kernels can then do it.
    """
    variant = spec.variant
    if spec.max_tokens <= spec.max_requests and spec.split_mode == "balanced":
        for tile_kv in _widths(spec, 64):
            for rows in mosaic_decode.ROWS[::-1]:
                tuned = replace(spec, tile_q=min(spec.group, rows), tile_kv=tile_kv)
                if mosaic_decode.why_not(tuned, variant) is None:
                    ctas = mosaic_decode.choose(tuned, variant).ctas
                    return replace(tuned, num_ctas=ctas * tuning.multiprocessors())
    heads = replace(spec, tile_q=mosaic_prefill.WARPGROUP_ROWS).heads_per_tile
    one = mosaic_prefill.WARPGROUP_ROWS // heads
    is_long = spec.max_tokens > one * spec.max_requests and spec.split_mode == "balanced"
    for warpgroups in (2, 1) if is_long else (1,):
        for tile_kv in _widths(spec, 128, 64):
            tile_q = mosaic_prefill.tile_q(heads, warpgroups=warpgroups)
            tuned = replace(spec, tile_q=tile_q, tile_kv=tile_kv)
            if mosaic_prefill.why_not(tuned, variant) is None:
                return replace(tuned, num_ctas=tuning.multiprocessors())
    return spec


def _widths(spec: PlanSpec, *wanted: int) -> Iterator[int]:
    """Yield keys per tile that go with the pages, and with the size of splits."""
    for width in dict.fromkeys(max(width, spec.page_size) for width in wanted):
        if width % spec.page_size == 0 and (spec.fixed_split_size or width) % width == 0:
            yield width


def run(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant,
    extra: dict[str, Array],
    sm_scale: float,
) -> AttentionState:
    """Attend; see `backends.Backend.run`.

    Raises:
        UnsupportedError: If neither kernel serves the plan.
    """
    q = changed_queries(q, plan, variant=variant, extra=extra, sm_scale=sm_scale)
    few_rows = uses_decode(plan.spec, variant)
    kernel = mosaic_decode.decode if few_rows else mosaic_prefill.prefill
    o, lse = kernel(q, kv, plan, variant=variant, extra=extra, sm_scale=sm_scale)
    return AttentionState(o=o, lse=lse)


def changed_queries(
    q: Float[Array, "tokens q_heads head_dim"],
    plan: Plan,
    *,
    variant: AttentionVariant,
    extra: dict[str, Array],
    sm_scale: float,
) -> Float[Array, "tokens q_heads head_dim"]:
    """Apply the variant's change of queries, which costs less once than in every work item."""
    if variant.q_mod is None:
        return q
    head = jnp.arange(plan.spec.q_heads, dtype=jnp.int32)[None, :, None]
    request, position = plan.token_request[:, None, None], plan.token_position[:, None, None]
    ctx = context(plan, variant, extra, sm_scale, request=request, head=head)
    changed = modified(q.astype(jnp.float32), variant, ctx, position, is_key=False)
    return changed.astype(q.dtype)
