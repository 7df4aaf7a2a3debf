"""The card of sampling."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.card import Axis, KernelCard, Sizes, Tensor, Tolerance
from jaxserve.pallas_kernels.sampling import api, xla

_EXACT = Tolerance(rtol=0.0, atol=0.0, reason="all backends draw the same random numbers")
_SETTING = Tensor(axes=("rows",), dtypes=("float32",), meaning="setting of each row")


def supports(backend: str, sizes: Sizes, dtype: str) -> str | None:
    """Say why a backend cannot draw in this process; None if it can."""
    del sizes
    if dtype not in api.DTYPES:
        return f"dtype {dtype} is none of {', '.join(api.DTYPES)}"
    return triton_launch.unavailable() if backend == "triton" else None


def _make(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(seed)
    rows = sizes["rows"]
    return {
        "logits": jnp.asarray(3 * rng.normal(size=(rows, sizes["vocab"])), dtype),
        "key": jnp.asarray(rng.integers(0, 1 << 32, (rows, 2)), jnp.uint32),
        "temperature": jnp.full(rows, 0.8, jnp.float32),
        "top_k": jnp.full(rows, 20, jnp.int32),
        "top_p": jnp.full(rows, 0.95, jnp.float32),
        "min_p": jnp.zeros(rows, jnp.float32),
    }


CARD = KernelCard(
    name="sample",
    summary="draw a token per row within top-k, top-p and min-p, without sorting",
    axes={
        "rows": Axis(sizes=(4, 1, 64, 256), varies=True, meaning="tokens to draw"),
        "vocab": Axis(sizes=(70, 32000, 151936), varies=False, meaning="tokens to draw from"),
    },
    inputs={
        "logits": Tensor(axes=("rows", "vocab"), dtypes=api.DTYPES, meaning="scores"),
        "temperature": _SETTING,
        "top_k": Tensor(axes=("rows",), dtypes=("int32",), meaning="setting of each row"),
        "top_p": _SETTING,
        "min_p": _SETTING,
    },
    outputs={"token": Tensor(axes=("rows",), dtypes=("int32",), meaning="token ids")},
    make=_make,
    run=api.sample,
    # The sorting oracle has the same distribution, but other draws; tests compare distributions.
    reference=xla.sample,
    tolerances=dict.fromkeys(api.DTYPES, _EXACT),
    backends=("triton", "xla"),
    supports=supports,
    # The logits must come from memory once; further passes find them in the cache.
    num_bytes=lambda sizes, dtype: (
        sizes["rows"] * (sizes["vocab"] * jnp.dtype(dtype).itemsize + 28)
    ),
    num_flops=lambda sizes: 6 * sizes["rows"] * sizes["vocab"],
    source="FlashInfer, arXiv 2501.01005",
)
