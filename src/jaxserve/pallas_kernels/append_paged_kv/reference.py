"""The oracle, which is also what runs without Triton: one scatter for keys, one for values."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.paged import PagedKV

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
"""Largest finite number of the dtypes that are narrower than activations."""


def narrow(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Array:
    """Round to a dtype, ties to even; what is too large for a narrow one becomes its largest.

    NaN stays NaN where the dtype has one, and is 0 where it has none.
    """
    name = jnp.dtype(dtype).name
    if name not in LARGEST:
        return x.astype(dtype)
    clipped = jnp.clip(x.astype(jnp.float32), -LARGEST[name], LARGEST[name])
    if name == "int8":
        clipped = jnp.where(jnp.isnan(clipped), 0.0, jnp.round(clipped))
    return clipped.astype(dtype)


def append_paged_kv(
    cache: PagedKV,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"],
    slots: Int[Array, " tokens"],
) -> PagedKV:
    """Write each token's keys and values into its slot; a negative slot is nobody's."""
    page = jnp.where(slots < 0, cache.num_pages, slots // cache.page_size)
    offset = slots % cache.page_size

    def put(pool: Array, new: Array, scale: Array | None) -> Array:
        wide = new.astype(jnp.float32)
        if scale is not None:
            wide = wide / _scale_of(scale, page)
        return pool.at[page, :, offset].set(narrow(wide, pool.dtype), mode="drop")

    return dataclasses.replace(
        cache, k=put(cache.k, k, cache.k_scale), v=put(cache.v, v, cache.v_scale)
    )


def _scale_of(scale: Array, page: Array) -> Array:
    """Return the scale of each token and head, `[tokens or 1, kv_heads or 1, 1]`."""
    wide = jnp.asarray(scale, jnp.float32)
    if wide.ndim == 2:
        return wide[jnp.minimum(page, wide.shape[0] - 1)][:, :, None]
    return wide.reshape(1, -1, 1)
