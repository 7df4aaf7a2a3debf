"""The card of decode attention over lists of tokens.

What the Mosaic kernel can hold on an H200, by calculation, as it has not run on a GPU. A tile of 64
tokens of 128 numbers is 32 KiB of keys and values; at the 4.3 TB/s that copies reach, 132
multiprocessors at 1.755 GHz have 1760 cycles for each, and 2510 at 70 % of that. Per tile, with
groups of any size up to 8, as its assembly for sm_90a says:

* computing takes 225 instructions a warp, 16 of them products, on a chain of some 1000 cycles with
  its five barriers; two CTAs share a multiprocessor, so 500 cycles per tile;
* shared memory moves each byte four times, by the copy, out of the ring, into the swizzled tile and
  into the matrix unit: 1024 cycles at 128 bytes each, none of them lost to bank conflicts;
* gathering takes 700 instructions a warp, and waits for two loads in a row, some 1500 cycles; again
  with two CTAs, 1100 cycles per tile;
* 128 row copies of 256 bytes, one per 14 cycles;
* 256 arrivals at barriers, two per row copy, as that is what a copy by one warp costs in Pallas.

So nothing but the last two can be what bounds it, of which no number is public: at 70 % a
multiprocessor must take a bulk copy every 20 cycles, and a warp's arrival every 10.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.card import Axis, KernelCard, Sizes, Tensor, Tolerance
from jaxserve.pallas_kernels.paged import KV_DTYPES, PagedKV
from jaxserve.pallas_kernels.token_attention import api, reference
from jaxserve.pallas_kernels.token_attention.lists import TokenLists
from jaxserve.pallas_kernels.variant import PLAIN

TOLERANCES = {
    "float32": Tolerance(rtol=1e-5, atol=1e-5, reason="sums in another order"),
    "float16": Tolerance(rtol=1e-3, atol=1e-3, reason="weights and outputs in float16"),
    "bfloat16": Tolerance(rtol=1e-2, atol=1e-2, reason="weights and outputs in bfloat16"),
}

_HEADS = Tensor(axes=("requests", "q_heads", "head_dim"), dtypes=api.DTYPES, meaning="queries")
_POOL = Tensor(
    axes=("pages", "kv_heads", "page_size", "head_dim"), dtypes=KV_DTYPES, meaning="pages"
)


def supports(backend: str, sizes: Sizes, dtype: str) -> str | None:
    """Say why a backend cannot attend to lists in this process; None if it can."""
    if dtype not in api.DTYPES:
        return f"dtype {dtype} is none of {', '.join(api.DTYPES)}"
    if sizes["q_heads"] % sizes["kv_heads"]:
        return f"{sizes['q_heads']} query heads are no multiple of {sizes['kv_heads']}"
    if backend not in ("mosaic", "triton"):
        return None
    heads = (sizes["q_heads"], sizes["head_dim"])
    pool: Any = jax.ShapeDtypeStruct(
        (sizes["pages"], sizes["kv_heads"], sizes["page_size"], sizes["head_dim"]), dtype
    )
    q = jax.ShapeDtypeStruct((sizes["requests"], *heads), jnp.dtype(dtype))
    return api.refusal(backend, q, PagedKV(k=pool, v=pool))


def _make(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(seed)
    requests, kv_heads, listed = sizes["requests"], sizes["kv_heads"], sizes["listed"]
    pages_each = sizes["pages"] // requests
    keys = pages_each * sizes["page_size"]
    shape = (sizes["pages"], kv_heads, sizes["page_size"], sizes["head_dim"])
    rows = [rng.permutation(keys)[:listed] for _ in range(requests * kv_heads)]
    return {
        "q": jnp.asarray(rng.normal(size=(requests, sizes["q_heads"], sizes["head_dim"])), dtype),
        "cache": PagedKV(
            k=jnp.asarray(rng.normal(size=shape), dtype),
            v=jnp.asarray(rng.normal(size=shape), dtype),
        ),
        "kv_indptr": jnp.arange(requests + 1) * pages_each,
        "kv_indices": jnp.asarray(rng.permutation(sizes["pages"]), jnp.int32),
        "kv_len": jnp.full(requests, keys, jnp.int32),
        "tokens": TokenLists(
            indptr=jnp.asarray(np.cumsum([0, *map(len, rows)]), jnp.int32),
            positions=jnp.asarray(np.concatenate(rows), jnp.int32),
        ),
        "sm_scale": sizes["head_dim"] ** -0.5,
    }


def _reference(**inputs: Any) -> Any:  # noqa: ANN401
    state = reference.token_attention(**inputs, variant=PLAIN, extra={})
    return api.AttentionState(o=state.o.astype(inputs["q"].dtype), lse=state.lse)


def _num_bytes(sizes: Sizes, dtype: str) -> int:
    itemsize = jnp.dtype(dtype).itemsize
    keys = sizes["requests"] * sizes["kv_heads"] * sizes["listed"]
    rows = sizes["requests"] * sizes["q_heads"]
    return keys * (2 * sizes["head_dim"] * itemsize + 4) + 2 * rows * sizes["head_dim"] * itemsize


CARD = KernelCard(
    name="token_attention",
    summary="decode attention over tokens that each key-value head chose",
    axes={
        "requests": Axis(sizes=(2, 8, 64), varies=True, meaning="requests of a step"),
        "q_heads": Axis(sizes=(4, 32), varies=False, meaning="heads of queries"),
        "kv_heads": Axis(sizes=(2, 8), varies=False, meaning="heads of keys and values"),
        "head_dim": Axis(sizes=(16, 128), varies=False, meaning="numbers of a head"),
        "pages": Axis(sizes=(14, 4096), varies=False, meaning="pages of the pool"),
        "page_size": Axis(sizes=(4, 16, 1), varies=False, meaning="tokens of a page"),
        "listed": Axis(sizes=(9, 1024, 4096), varies=True, meaning="tokens on each list"),
    },
    inputs={
        "q": _HEADS,
        "cache": _POOL,
        "tokens": Tensor(
            axes=("requests", "kv_heads", "listed"), dtypes=("int32",), meaning="positions"
        ),
    },
    outputs={
        "o": _HEADS,
        "lse": Tensor(axes=("requests", "q_heads"), dtypes=("float32",), meaning="log2 of mass"),
    },
    make=_make,
    run=api.token_attention,
    reference=_reference,
    tolerances=TOLERANCES,
    backends=("mosaic", "triton", "xla"),
    supports=supports,
    num_bytes=_num_bytes,
    num_flops=lambda sizes: (
        4 * sizes["requests"] * sizes["q_heads"] * sizes["listed"] * sizes["head_dim"]
    ),
    source="Twilight, arXiv 2502.02770; Tactic, arXiv 2502.12216",
)
