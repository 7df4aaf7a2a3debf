"""Decode attention over lists of tokens that the device chose."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.core.errors import UnsupportedError, did_you_mean
from jaxserve.pallas_kernels import backends, triton_launch
from jaxserve.pallas_kernels.attention.backends import present_device
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.state import AttentionState, add_mass
from jaxserve.pallas_kernels.token_attention import reference
from jaxserve.pallas_kernels.token_attention.lists import TokenLists as TokenLists
from jaxserve.pallas_kernels.variant import PLAIN, AttentionVariant

ListBackend = Literal["auto", "mosaic", "triton", "xla", "reference"]
"""`mosaic` needs a Hopper GPU, `triton` an NVIDIA GPU; the others, one and the same, need none."""

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of queries."""

CAPABILITIES = ("9.0",)
"""Compute capabilities that have the instructions of the Mosaic kernel."""

MAX_HEAD_DIM = 256
"""Widest heads that the Triton kernel holds."""


def token_attention(
    q: Float[Array, "requests q_heads head_dim"],
    cache: PagedKV,
    kv_indptr: Int[Array, " requests_and_one"],
    kv_indices: Int[Array, " pages"],
    kv_len: Int[Array, " requests"],
    tokens: TokenLists,
    *,
    sm_scale: float | None = None,
    variant: AttentionVariant = PLAIN,
    extra: Mapping[str, Array] | None = None,
    chunk: int | None = None,
    backend: ListBackend = "auto",
) -> AttentionState:
    """Attend from one token of each request to the tokens on its lists, and to nothing else.

    The work is laid out on the device, as only it knows how long the lists are: each list is cut
    into chunks, and programs find theirs by the running count of chunks.

    Args:
        q: Queries, one token per request, at the position of its last key.
        cache: Pages of any size.
        kv_indptr: Where each request's pages begin in `kv_indices`.
        kv_indices: Pages of all requests.
        kv_len: Keys of each request; at least 1.
        tokens: What each key-value head of each request reads; its query heads share the list.
        sm_scale: What products of queries and keys are multiplied with; None is
            `head_dim ** -0.5`.
        variant: How scores are changed; without a packed mask.
        extra: Arrays that the variant reads.
        chunk: Keys per program of the Triton kernel; None chooses by the capacity of the lists.
        backend: "auto" is, on a GPU, the first of the kernels that can do it, and plain JAX
            elsewhere.

    Returns:
        Outputs in the dtype of `q`, and the base-2 logarithm of the mass of the tokens read; an
        empty list gives zeros and minus infinity. States over disjoint lists can be merged.

    Raises:
        ValueError: If shapes do not fit, or an extra is missing.
        UnsupportedError: If a dtype, the size of a head or the variant is not supported, or the
            backend cannot run here.

    Source: ours; the use is top-p sparse attention (Twilight, arXiv 2502.02770; Tactic, arXiv
    2502.12216).
    """
    extra = dict(extra or {})
    _check(q, cache, kv_indptr, kv_len, tokens, chunk)
    _check_variant(variant, extra)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    chosen = choose(backend, q, cache, variant)
    if chosen == "mosaic":
        from jaxserve.pallas_kernels.token_attention import mosaic  # noqa: PLC0415

        state = mosaic.token_attention(
            q, cache, kv_indptr, kv_indices, tokens, sm_scale=scale, variant=variant
        )
    elif chosen == "triton":
        from jaxserve.pallas_kernels.token_attention import triton  # noqa: PLC0415

        state = triton.token_attention(
            q,
            cache,
            kv_indptr,
            kv_indices,
            kv_len,
            tokens,
            sm_scale=scale,
            variant=variant,
            extra=extra,
            chunk=chunk,
        )
    else:
        state = reference.token_attention(
            q,
            cache,
            kv_indptr,
            kv_indices,
            kv_len,
            tokens,
            sm_scale=scale,
            variant=variant,
            extra=extra,
        )
    return _finish(q, cache, kv_len, state, scale, variant, extra)


def refusal(
    backend: Literal["mosaic", "triton"],
    q: Array | jax.ShapeDtypeStruct,
    cache: PagedKV,
    variant: AttentionVariant = PLAIN,
) -> str | None:
    """Return why a kernel cannot attend to lists in this process, with what would do; or None.

    Args:
        backend: Which kernel.
        q: Queries, or their shape and dtype.
        cache: Keys and values, or theirs.
        variant: How scores are changed.
    """
    if backend == "triton":
        widest = max(cache.k.shape[3], cache.v.shape[3])
        if widest > MAX_HEAD_DIM:
            return f"it holds heads of at most {MAX_HEAD_DIM} numbers, got {widest}"
        return triton_launch.unavailable()
    platform, capability = present_device()
    if capability not in CAPABILITIES:
        found = f"{platform} {capability}".strip()
        return f"it needs a GPU of compute capability {' or '.join(CAPABILITIES)}, found {found}"
    from jaxserve.pallas_kernels.token_attention import mosaic  # noqa: PLC0415

    return mosaic.why_not(q, cache, variant)


def kernel_for(
    attention_backend: str, q: Array | jax.ShapeDtypeStruct, cache: PagedKV
) -> Literal["mosaic", "triton"] | None:
    """Return the kernel that goes with kernels of attention; None if none of its kind can do it.

    Args:
        attention_backend: What serves attention to whole contexts; Triton stands in for Mosaic,
            as it does more.
        q: Queries, or their shape and dtype.
        cache: Keys and values, or theirs.
    """
    able: dict[str, tuple[Literal["mosaic", "triton"], ...]] = {
        "mosaic": ("mosaic", "triton"),
        "triton": ("triton",),
    }
    names = able.get(attention_backend, ())
    return next((name for name in names if refusal(name, q, cache) is None), None)


def choose(
    backend: ListBackend,
    q: Array | jax.ShapeDtypeStruct,
    cache: PagedKV,
    variant: AttentionVariant = PLAIN,
) -> Literal["mosaic", "triton", "xla", "reference"]:
    """Resolve the name of a backend for what is to be attended.

    Raises:
        ValueError: If there is no such backend.
        MissingExtraError: If Triton is asked for by name and not installed.
        UnsupportedError: If a kernel is asked for by name and cannot do it here.
    """
    if backend not in get_args(ListBackend):
        names = get_args(ListBackend)
        raise ValueError(
            f"backend must be one of {', '.join(names)}, got {backend!r}."
            f"{did_you_mean(str(backend), names)}"
        )
    if backend == "mosaic" or (backend == "auto" and refusal("mosaic", q, cache, variant) is None):
        reason = refusal("mosaic", q, cache, variant)
        if reason is not None:
            raise UnsupportedError(
                f"backend 'mosaic' cannot do this: {reason}; use backend='auto', which takes the "
                "next best."
            )
        return "mosaic"
    is_wide = max(cache.k.shape[3], cache.v.shape[3]) > MAX_HEAD_DIM
    if is_wide and backend == "auto":
        return "xla"
    chosen = backends.choose(backend, prefers_triton=True)
    if chosen == "triton" and is_wide:
        raise UnsupportedError(
            f"backend 'triton' cannot do this: {refusal('triton', q, cache)}; use backend='xla'."
        )
    return chosen


def _finish(
    q: Array,
    cache: PagedKV,
    kv_len: Array,
    state: AttentionState,
    sm_scale: float,
    variant: AttentionVariant,
    extra: Mapping[str, Array],
) -> AttentionState:
    """Apply what acts once, on whole rows: sinks, and changes of the output."""
    requests, q_heads = q.shape[:2]
    request = jnp.arange(requests)[:, None]
    head = jnp.broadcast_to(jnp.arange(q_heads), (requests, q_heads))
    tile = reference.Tile(
        sm_scale=sm_scale,
        q_heads=q_heads,
        kv_heads=cache.kv_heads,
        head_dim=q.shape[2],
        request=request,
        q_len=jnp.ones_like(request),
        kv_len=kv_len[:, None],
        head=head,
        variant=variant,
        extra=extra,
    )
    if variant.row_init is not None:
        score, mass = variant.row_init(tile, head)
        wide = jnp.broadcast_to(jnp.asarray(score, jnp.float32), head.shape)
        state = add_mass(state, wide, mass)
    o = state.o
    if variant.out_mod is not None:
        wide_tile = dataclasses.replace(tile, request=request[..., None], head=head[..., None])
        o = variant.out_mod(
            o.astype(jnp.float32),
            wide_tile,
            state.lse[..., None],
            kv_len[:, None, None] - 1,
            head[..., None],
        )
    return AttentionState(o=o.astype(q.dtype), lse=state.lse)


def _check(
    q: Array,
    cache: PagedKV,
    kv_indptr: Array,
    kv_len: Array,
    tokens: TokenLists,
    chunk: int | None,
) -> None:
    cache.check()
    if q.ndim != 3 or q.shape[2] != cache.k.shape[3] or q.shape[1] % cache.kv_heads:
        raise ValueError(
            f"q must be [requests, a multiple of {cache.kv_heads} heads, {cache.k.shape[3]}] to "
            f"fit the cache, got {q.shape}."
        )
    if jnp.dtype(q.dtype).name not in DTYPES:
        raise UnsupportedError(
            f"q must have one of the dtypes {', '.join(DTYPES)}, got {q.dtype.name}; cast it."
        )
    rows = q.shape[0] * cache.kv_heads
    if tokens.indptr.shape != (rows + 1,) or tokens.positions.ndim != 1:
        raise ValueError(
            f"token lists need an indptr of requests * kv_heads + 1 = {rows + 1} and positions in "
            f"one axis, got {tokens.indptr.shape} and {tokens.positions.shape}."
        )
    if kv_indptr.shape != (q.shape[0] + 1,) or kv_len.shape != q.shape[:1]:
        raise ValueError(
            f"{q.shape[0]} requests need kv_indptr of {q.shape[0] + 1} and kv_len of "
            f"{q.shape[0]}, got {kv_indptr.shape} and {kv_len.shape}."
        )
    if chunk is not None and (chunk < 16 or chunk & (chunk - 1)):
        near = 16 if chunk < 16 else 1 << (chunk.bit_length() - 1)
        raise ValueError(f"chunk must be a power of 2 from 16, got {chunk}; {near} is near.")


def _check_variant(variant: AttentionVariant, extra: Mapping[str, Array]) -> None:
    if variant.packed_mask != "none":
        raise UnsupportedError(
            "token lists hide what is not on them, and take no packed mask; leave tokens out."
        )
    missing = sorted(set(variant.extras) - set(extra))
    if missing:
        raise ValueError(f"the variant reads the extras {missing}, which were not passed.")
