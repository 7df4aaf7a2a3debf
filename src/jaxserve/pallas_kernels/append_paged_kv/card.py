"""The card of appending to pages."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.append_paged_kv import api, reference
from jaxserve.pallas_kernels.card import Axis, KernelCard, Sizes, Tensor, Tolerance
from jaxserve.pallas_kernels.paged import KV_DTYPES, PagedKV
from jaxserve.pallas_kernels.rope.api import DTYPES

TOLERANCES = {
    "float32": Tolerance(rtol=1e-6, atol=0.0, reason="division by scales"),
    "float16": Tolerance(rtol=1e-3, atol=0.0, reason="one unit in the last place"),
    "bfloat16": Tolerance(rtol=8e-3, atol=0.0, reason="one unit in the last place"),
}

_NEW = Tensor(axes=("tokens", "kv_heads", "head_dim"), dtypes=DTYPES, meaning="keys and values")
_POOL = Tensor(
    axes=("pages", "kv_heads", "page_size", "head_dim"), dtypes=KV_DTYPES, meaning="pages"
)


def supports(backend: str, sizes: Sizes, dtype: str) -> str | None:
    """Say why a backend cannot append in this process; None if it can."""
    del sizes
    if dtype not in DTYPES:
        return f"dtype {dtype} is none of {', '.join(DTYPES)}"
    return triton_launch.unavailable() if backend == "triton" else None


def _make(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(seed)
    new = (sizes["tokens"], sizes["kv_heads"], sizes["head_dim"])
    pool = jnp.zeros(
        (sizes["pages"], sizes["kv_heads"], sizes["page_size"], sizes["head_dim"]), dtype
    )
    room = sizes["pages"] * sizes["page_size"]
    return {
        "cache": PagedKV(k=pool, v=pool),
        "k": jnp.asarray(rng.normal(size=new), dtype),
        "v": jnp.asarray(rng.normal(size=new), dtype),
        "slots": jnp.asarray(rng.permutation(room)[: sizes["tokens"]], jnp.int32),
    }


def _num_bytes(sizes: Sizes, dtype: str) -> int:
    numbers = sizes["tokens"] * sizes["kv_heads"] * sizes["head_dim"]
    return 4 * numbers * jnp.dtype(dtype).itemsize + 4 * sizes["tokens"]


CARD = KernelCard(
    name="append_paged_kv",
    summary="write keys and values of a step into the pages of their requests",
    axes={
        "tokens": Axis(sizes=(5, 1, 64, 4096), varies=True, meaning="tokens of a step"),
        "pages": Axis(sizes=(4, 8192), varies=False, meaning="pages of the pool"),
        "page_size": Axis(sizes=(4, 16, 64), varies=False, meaning="tokens of a page"),
        "kv_heads": Axis(sizes=(2, 8), varies=False, meaning="heads of keys and values"),
        "head_dim": Axis(sizes=(16, 128), varies=False, meaning="numbers of a head"),
    },
    inputs={
        "cache": _POOL,
        "k": _NEW,
        "v": _NEW,
        "slots": Tensor(axes=("tokens",), dtypes=("int32",), meaning="place of each token"),
    },
    outputs={"k_pages": _POOL, "v_pages": _POOL},
    make=_make,
    run=api.append_paged_kv,
    reference=reference.append_paged_kv,
    tolerances=TOLERANCES,
    backends=("triton", "xla"),
    supports=supports,
    num_bytes=_num_bytes,
    num_flops=lambda sizes: 0 * sizes["tokens"],
    source="ours; FlashInfer's append_paged_kv_cache",
)
