"""The card of rotary position embedding."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.card import Axis, KernelCard, Sizes, Tensor, Tolerance
from jaxserve.pallas_kernels.rope import api, reference

TOLERANCES = {
    "float32": Tolerance(rtol=1e-6, atol=1e-6, reason="contracted products"),
    "float16": Tolerance(rtol=1e-3, atol=1e-3, reason="one unit in the last place"),
    "bfloat16": Tolerance(rtol=8e-3, atol=8e-3, reason="one unit in the last place"),
}

_HEADS = Tensor(axes=("tokens", "heads", "head_dim"), dtypes=api.DTYPES, meaning="queries or keys")
_TABLE = Tensor(axes=("tokens", "pairs"), dtypes=("float32",), meaning="cosines, and sines")


def supports(backend: str, sizes: Sizes, dtype: str) -> str | None:
    """Say why a backend cannot rotate such heads in this process; None if it can."""
    if dtype not in api.DTYPES:
        return f"dtype {dtype} is none of {', '.join(api.DTYPES)}"
    if 2 * sizes["pairs"] > sizes["head_dim"]:
        return f"{sizes['pairs']} pairs do not fit into a head of {sizes['head_dim']}"
    return triton_launch.unavailable() if backend == "triton" else None


def _make(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(seed)
    shape = (sizes["tokens"], sizes["heads"], sizes["head_dim"])
    position = jnp.asarray(rng.integers(0, 8192, sizes["tokens"]))
    rates = 10_000.0 ** -(np.arange(sizes["pairs"]) / sizes["pairs"])
    return {
        "x": jnp.asarray(rng.normal(size=shape), dtype),
        "tables": api.rope_tables(position, jnp.asarray(rates, jnp.float32)),
        "interleaved": False,
    }


def _num_bytes(sizes: Sizes, dtype: str) -> int:
    moved = 2 * sizes["tokens"] * sizes["heads"] * sizes["head_dim"] * jnp.dtype(dtype).itemsize
    return moved + 2 * sizes["tokens"] * sizes["pairs"] * 4


CARD = KernelCard(
    name="rope",
    summary="rotate queries or keys by their positions",
    axes={
        "tokens": Axis(sizes=(3, 1, 64, 4096), varies=True, meaning="tokens of a step"),
        "heads": Axis(sizes=(2, 32, 8), varies=False, meaning="heads of queries or keys"),
        "head_dim": Axis(sizes=(16, 128, 64), varies=False, meaning="numbers of a head"),
        "pairs": Axis(sizes=(8, 64, 32), varies=False, meaning="pairs of them that are rotated"),
    },
    inputs={"x": _HEADS, "tables": _TABLE},
    outputs={"rotated": _HEADS},
    make=_make,
    run=api.rope,
    reference=reference.rope,
    tolerances=TOLERANCES,
    backends=("xla", "triton"),
    supports=supports,
    num_bytes=_num_bytes,
    num_flops=lambda sizes: 6 * sizes["tokens"] * sizes["heads"] * sizes["pairs"],
    source="RoFormer, arXiv 2104.09864",
)
