"""Appending the keys and values of a step to the pages of their requests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import backends
from jaxserve.pallas_kernels.append_paged_kv import reference
from jaxserve.pallas_kernels.backends import Backend
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.rope import RopeTables, rope
from jaxserve.pallas_kernels.rope.api import DTYPES, check_rope


def token_slots(
    token_request: Int[Array, " tokens"],
    token_position: Int[Array, " tokens"],
    kv_indptr: Int[Array, " requests_and_one"],
    kv_indices: Int[Array, " pages"],
    *,
    page_size: int,
) -> Int[Array, " tokens"]:
    """Find the place of each token in the pool; once per step, for all layers.

    Args:
        token_request: Request of each token; -1 is padding.
        token_position: Position of each token in its request.
        kv_indptr: Where each request's pages begin in `kv_indices`.
        kv_indices: Pages of all requests.
        page_size: Tokens per page.

    Returns:
        Page times page size plus the offset in the page; -1 for padding.
    """
    request = jnp.maximum(token_request, 0)
    page = kv_indices[kv_indptr[request] + token_position // page_size]
    slot = page * page_size + token_position % page_size
    return jnp.where(token_request < 0, -1, slot).astype(jnp.int32)


def append_paged_kv(
    cache: PagedKV,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"],
    slots: Int[Array, " tokens"],
    *,
    backend: Backend = "auto",
) -> PagedKV:
    """Write each token's keys and values into its slot.

    Where the cache is narrower than the keys (float8, int8), they are divided by its scales and
    rounded to even; what is too large becomes the largest number of the dtype.

    Args:
        cache: The pages; donate them, and nothing but the new tokens moves.
        k: Keys, rotated.
        v: Values.
        slots: What `token_slots` found; two tokens of one slot leave either of them.
        backend: "auto" is the kernel on a GPU, and a scatter elsewhere.

    Returns:
        The pages after the write.

    Raises:
        ValueError: If shapes do not fit.
        UnsupportedError: If dtypes are not among those supported, or the backend cannot run here.

    Source: ours; the operation is FlashInfer's `append_paged_kv_cache`.
    """
    _check(cache, k, v, slots)
    chosen = backends.choose(backend, prefers_triton=True)
    if chosen == "triton":
        from jaxserve.pallas_kernels.append_paged_kv import triton  # noqa: PLC0415

        return triton.append(cache, k, v, slots)
    return reference.append_paged_kv(cache, k, v, slots)


def rope_append_paged_kv(
    cache: PagedKV,
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"],
    slots: Int[Array, " tokens"],
    tables: RopeTables,
    *,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Array, "tokens q_heads head_dim"], PagedKV]:
    """Rotate queries and keys, and write keys and values into their slots, in one launch.

    Keys are rotated in float32 and rounded once, to the dtype of the cache.

    Args:
        cache: The pages; donate them.
        q: Queries, not rotated.
        k: Keys, not rotated.
        v: Values.
        slots: What `token_slots` found.
        tables: What `rope_tables` made for the positions of the tokens.
        interleaved: Whether pairs are neighbours; see `rope`.
        backend: See `append_paged_kv`.

    Returns:
        The rotated queries, and the pages after the write.

    Raises:
        ValueError: If shapes do not fit.
        UnsupportedError: If dtypes are not among those supported, or the backend cannot run here.

    Source: ours; the operation is FlashInfer's `rope_quantize_fp8_append_paged_kv_cache`.
    """
    _check(cache, k, v, slots)
    check_rope(q, tables, name="q")
    check_rope(k, tables, name="k")
    chosen = backends.choose(backend, prefers_triton=True)
    if chosen == "triton":
        from jaxserve.pallas_kernels.append_paged_kv import triton  # noqa: PLC0415

        return triton.rope_append(cache, q, k, v, slots, tables, interleaved=interleaved)
    turned = rope(k.astype(jnp.float32), tables, interleaved=interleaved, backend=chosen)
    cache = reference.append_paged_kv(cache, turned, v, slots)
    return rope(q, tables, interleaved=interleaved, backend=chosen), cache


def kv_scale(
    x: Float[Array, "tokens kv_heads dim"], dtype: str, *, headroom: float = 1.0
) -> Float[Array, " kv_heads"]:
    """Choose the scale of each head from keys or values that are typical of it.

    Args:
        x: Keys, rotated if the cache holds them so, or values.
        dtype: Dtype of the cache.
        headroom: How many times larger than in `x` numbers may become before they are clipped.

    Returns:
        What stored numbers are multiplied with, for `PagedKV`; 1 where a head is all zeros.

    Raises:
        ValueError: If the dtype needs no scale, or the headroom is not positive.
    """
    if dtype not in reference.LARGEST:
        raise ValueError(
            f"only {', '.join(reference.LARGEST)} have scales, got {dtype!r}; leave them out."
        )
    if not headroom > 0:
        raise ValueError(f"headroom must be greater than 0, got {headroom}; 1 clips nothing of x.")
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 2), initial=0.0)
    scale = largest * (headroom / reference.LARGEST[dtype])
    return jnp.where(largest > 0, scale, 1.0)


def _check(cache: PagedKV, k: Array, v: Array, slots: Array) -> None:
    cache.check()
    wanted = {"k": (cache.kv_heads, cache.k.shape[3]), "v": (cache.kv_heads, cache.v.shape[3])}
    for name, new in (("k", k), ("v", v)):
        if new.ndim != 3 or new.shape[1:] != wanted[name] or new.shape[0] != k.shape[0]:
            raise ValueError(
                f"{name} must be [tokens, {wanted[name][0]}, {wanted[name][1]}] to fit the cache, "
                f"with as many tokens as k, got {new.shape} beside k {k.shape}."
            )
        found = jnp.dtype(new.dtype).name
        if found not in DTYPES:
            raise UnsupportedError(
                f"{name} must have one of the dtypes {', '.join(DTYPES)}, got {found}; cast it."
            )
    if slots.shape != k.shape[:1] or not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(
            f"slots must be one integer per token, [{k.shape[0]}], got {slots.dtype.name} "
            f"{slots.shape}; token_slots makes them."
        )
    most = jnp.iinfo(jnp.int32).max
    if cache.num_pages * cache.page_size > most:
        raise UnsupportedError(
            f"the pool must hold at most {most} tokens, got {cache.num_pages} pages of "
            f"{cache.page_size}; use fewer pages."
        )
    for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        if scale is not None and jax.typeof(scale).dtype != jnp.float32:
            raise UnsupportedError(
                f"{name} must be float32, got {jax.typeof(scale).dtype.name}; cast it."
            )
