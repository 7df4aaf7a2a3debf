"""Attention over pages: one function for decoding, prefill, both at once, and shared prefixes."""

import functools
from collections.abc import Mapping
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxserve.core.errors import UnsupportedError, did_you_mean
from jaxserve.pallas_kernels.attention.backends import (
    Backend,
    Case,
    ScaleKind,
    choose,
    load,
    present_device,
)
from jaxserve.pallas_kernels.attention.context import context
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.state import AttentionState, add_mass
from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant

Q_DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of queries and outputs."""


@overload
def attention(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant | None = None,
    extra: Mapping[str, Array] | None = None,
    sm_scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    fallback: bool = False,
) -> Float[Array, "tokens q_heads v_head_dim"]: ...


@overload
def attention(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant | None = None,
    extra: Mapping[str, Array] | None = None,
    sm_scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    fallback: bool = False,
) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"]]: ...


def attention(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant | None = None,
    extra: Mapping[str, Array] | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    fallback: bool = False,
) -> Array | tuple[Array, Array]:
    """Attend from packed query tokens to the pages of their requests.

    The keys of this step must be in the cache already. May be called inside `jax.jit`, with the
    plan as an argument; nothing is compiled anew when only lengths change.

    Args:
        q: Queries of all requests, packed as the plan was told.
        kv: Keys and values of one layer.
        plan: What `make_plan` made for this step.
        variant: How attention differs from the plain one; None is what the plan's spec says.
        extra: Arrays that the variant reads, by name, and `mask` for a packed mask.
        sm_scale: Multiplies products of queries and keys; None is head_dim ** -0.5.
        return_lse: Whether to return the logarithm of the mass of each row, in base 2.
        backend: "auto", "mosaic", "triton", "xla" or "reference"; all compute the same.
        fallback: Whether another backend may stand in where the named one cannot do it.

    Returns:
        The outputs in the dtype of `q`, zeros for tokens that see no key and for padding; and,
        if asked for, their lse, minus infinity for such tokens.

    Raises:
        ValueError: If shapes, dtypes, extras or the plan do not fit each other.
        UnsupportedError: If the backend, or every backend, lacks something that is asked for.

    Source: FlashInfer (arXiv 2501.01005).
    """
    spec = plan.spec
    variant = spec.variant if variant is None else variant
    extra = dict(extra or {})
    _check_arrays(q, kv, spec)
    _check_variant(variant, extra, spec, return_lse=return_lse)
    if isinstance(plan.buffer, np.ndarray):  # elsewhere only the device knows
        _check_plan(plan, kv, variant, extra)
    scale = float(spec.head_dim**-0.5 if sm_scale is None else sm_scale)
    platform, capability = present_device()
    case = Case(
        spec=spec,
        variant=variant,
        platform=platform,
        capability=capability,
        k_scale=_scale_kind(kv.k_scale),
        v_scale=_scale_kind(kv.v_scale),
    )
    chosen = choose(case, backend, fallback=fallback)
    state = _attend(q, kv, plan, extra, variant=variant, sm_scale=scale, backend=chosen)
    return (state.o, state.lse) if return_lse else state.o


def decode(
    q: Float[Array, "requests q_heads head_dim"],
    kv: PagedKV,
    table: PageTable,
    *,
    window: int | None = None,
    variant: AttentionVariant = PLAIN,
    extra: Mapping[str, Array] | None = None,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "requests q_heads v_head_dim"]:
    """Attend from one token per request, its last; plans by itself, so not inside `jax.jit`.

    Args:
        q: One query token per request.
        kv: Keys and values.
        table: Pages and lengths of the requests.
        window: Keys that a token sees back from itself; None sees all.
        variant: How attention differs from the plain one.
        extra: Arrays that the variant reads.
        sm_scale: Multiplies products of queries and keys; None is head_dim ** -0.5.
        backend: Which implementation runs.
    """
    return prefill(
        q,
        kv,
        np.ones(q.shape[0], np.int64),
        table,
        window=window,
        variant=variant,
        extra=extra,
        sm_scale=sm_scale,
        backend=backend,
    )


def prefill(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    q_len: np.ndarray,
    table: PageTable,
    *,
    causal: bool = True,
    window: int | None = None,
    variant: AttentionVariant = PLAIN,
    extra: Mapping[str, Array] | None = None,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "tokens q_heads v_head_dim"]:
    """Attend from the last `q_len` tokens of each request; plans by itself.

    Args:
        q: Query tokens, request after request.
        kv: Keys and values, those of these tokens included.
        q_len: Query tokens of each request.
        table: Pages and lengths of the requests.
        causal: Whether a token sees no key behind its own position.
        window: Keys that a token sees back from itself; None sees all.
        variant: How attention differs from the plain one.
        extra: Arrays that the variant reads.
        sm_scale: Multiplies products of queries and keys; None is head_dim ** -0.5.
        backend: Which implementation runs.
    """
    if q.shape[0] == 0:
        return jnp.zeros((0, q.shape[1], kv.v.shape[3]), q.dtype)
    spec = PlanSpec(
        q_heads=q.shape[1],
        kv_heads=kv.kv_heads,
        head_dim=q.shape[2],
        v_head_dim=kv.v.shape[3],
        page_size=kv.page_size,
        q_dtype=q.dtype.name,
        kv_dtype=kv.k.dtype.name,
        max_requests=_bucket(len(q_len)),
        max_tokens=q.shape[0],
        max_pages=_bucket(table.indices.size),
        causal=causal,
        window=window,
        variant=variant,
        tile_kv=64 if 64 % kv.page_size == 0 else kv.page_size,
    )
    plan = make_plan(spec, q_len, table)
    return attention(q, kv, plan, extra=extra, sm_scale=sm_scale, backend=backend)


@functools.partial(jax.jit, static_argnames=("variant", "sm_scale", "backend"))
def _attend(
    q: Array,
    kv: PagedKV,
    plan: Plan,
    extra: dict[str, Array],
    *,
    variant: AttentionVariant,
    sm_scale: float,
    backend: str,
) -> AttentionState:
    """Run a backend, and do what all backends leave to be done."""
    spec = plan.spec
    if spec.cascade_levels:
        q = q[plan.token_order]
    state = _loaded(backend).run(q, kv, plan, variant=variant, extra=extra, sm_scale=sm_scale)
    head = jnp.arange(spec.q_heads, dtype=jnp.int32)[None, :]
    request, q_pos = plan.token_request[:, None], plan.token_position[:, None]
    ctx = context(plan, variant, extra, sm_scale, request=request, head=head)
    if variant.row_init is not None:
        score, mass = variant.row_init(ctx, head)
        state = add_mass(state, jnp.broadcast_to(score, state.lse.shape), mass)
    o, lse = state.o, state.lse
    if variant.out_mod is not None:
        tiles = (ctx.expanded(), lse[..., None], q_pos[..., None], head[..., None])
        o = variant.out_mod(o.astype(jnp.float32), *tiles)
    is_real = plan.token_request >= 0
    o = jnp.where(is_real[:, None, None], o, 0).astype(q.dtype)
    lse = jnp.where(is_real[:, None], lse, -jnp.inf)
    if spec.cascade_levels:
        o, lse = o[plan.token_place], lse[plan.token_place]
    return AttentionState(o=o, lse=lse)


def _loaded(name: str) -> Backend:
    backend = load(name)
    if backend is None:
        raise UnsupportedError(f"backend {name!r} is not installed.")
    return backend


def _check_arrays(q: Array, kv: PagedKV, spec: PlanSpec) -> None:
    kv.check()
    shape = (spec.max_tokens, spec.q_heads, spec.head_dim)
    if q.shape != shape:
        raise ValueError(
            f"q must be [max_tokens, q_heads, head_dim] = {shape} as the plan says, got "
            f"{q.shape}; pad it, or make a plan for it."
        )
    for name, found, planned in (
        ("kv_heads", kv.kv_heads, spec.kv_heads),
        ("page_size", kv.page_size, spec.page_size),
        ("head_dim of keys", kv.k.shape[3], spec.head_dim),
        ("head_dim of values", kv.v.shape[3], spec.v_dim),
        ("dtype of q", q.dtype.name, spec.q_dtype),
        ("dtype of keys and values", kv.k.dtype.name, spec.kv_dtype),
    ):
        if found != planned:
            raise ValueError(f"{name} is {found}, but the plan was made for {planned}.")
    if spec.q_dtype not in Q_DTYPES:
        raise UnsupportedError(
            f"q must be one of {', '.join(Q_DTYPES)}, got {spec.q_dtype}; cast it to bfloat16."
        )


def _check_variant(
    variant: AttentionVariant, extra: Mapping[str, Array], spec: PlanSpec, *, return_lse: bool
) -> None:
    planned = spec.variant
    if planned.block_mask is not None and variant != planned:
        raise ValueError(
            "the plan leaves out blocks that its variant hides, so it serves no other variant; "
            "make a plan with this one."
        )
    if variant.packed_mask != "none" and planned.packed_mask == "none":
        raise ValueError(
            f"the variant has a packed mask ({variant.packed_mask}), of which the plan knows "
            "nothing; make a plan with this variant."
        )
    spec.check_variant(variant)
    if return_lse and not variant.use_softmax:
        raise ValueError("there is no lse without softmax; drop return_lse.")
    shapes = {
        "scalar": (),
        "head": (spec.q_heads,),
        "request": (spec.max_requests,),
    }
    wanted = dict(variant.extras)
    known = [*wanted, *(["mask"] if variant.packed_mask != "none" else [])]
    for name in extra:
        if name not in known:
            raise ValueError(
                f"unknown extra {name!r}.{did_you_mean(name, known)} "
                f"The variant reads: {', '.join(known) or 'none'}."
            )
    missing = [name for name in known if name not in extra]
    if missing:
        raise ValueError(f"the variant reads the extras {missing}, which are missing.")
    for name, kind in wanted.items():
        if kind != "array" and jnp.shape(extra[name]) != shapes[kind]:
            raise ValueError(
                f"the extra {name!r} is one per {kind}, so of shape {shapes[kind]}, got "
                f"{jnp.shape(extra[name])}."
            )
    if variant.packed_mask != "none":
        _check_mask(extra["mask"], variant, spec)


def _check_mask(mask: Array, variant: AttentionVariant, spec: PlanSpec) -> None:
    leading = (spec.q_heads,) if variant.packed_mask == "per_head" else ()
    is_right = mask.dtype == jnp.uint32 and jnp.ndim(mask) == len(leading) + 1
    if not is_right or jnp.shape(mask)[:-1] != leading:
        raise ValueError(
            f"the mask must be uint32 words {[*leading, 'words']}, got {mask.dtype} "
            f"{jnp.shape(mask)}; pack_mask makes them."
        )


def _check_plan(
    plan: Plan, kv: PagedKV, variant: AttentionVariant, extra: Mapping[str, Array]
) -> None:
    pages = plan.kv_indices
    if pages.min() < 0 or pages.max() >= kv.num_pages:
        raise ValueError(
            f"the page table names pages {pages.min()} to {pages.max()}, but the pool has "
            f"{kv.num_pages}: 0 to {kv.num_pages - 1}."
        )
    if variant.packed_mask != "none":
        words, wanted = extra["mask"].shape[-1], int(plan.mask_indptr[-1])
        if words < wanted:
            raise ValueError(
                f"the mask has {words} words, but the requests of this step need {wanted}; "
                "pack_mask makes them, one row of bits per query token."
            )


def _scale_kind(scale: Array | None) -> ScaleKind:
    kinds: tuple[ScaleKind, ...] = ("tensor", "head", "page")
    return "none" if scale is None else kinds[jnp.ndim(scale)]


def _bucket(count: int) -> int:
    """Round up to a power of two, so that few programs serve many batches."""
    return 1 << max(0, count - 1).bit_length()
