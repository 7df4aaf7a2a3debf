"""The cards of the norms."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.card import Axis, KernelCard, Sizes, Tensor, Tolerance
from jaxserve.pallas_kernels.rms_norm import api, reference

AXES = {
    "rows": Axis(sizes=(3, 1, 64, 4096), varies=True, meaning="tokens of a step"),
    "hidden": Axis(sizes=(48, 4096, 8192), varies=False, meaning="numbers per token"),
}

TOLERANCES = {
    "float32": Tolerance(rtol=4e-6, atol=4e-6, reason="sums in another order"),
    "float16": Tolerance(rtol=1e-3, atol=1e-3, reason="one unit in the last place"),
    "bfloat16": Tolerance(rtol=8e-3, atol=8e-3, reason="one unit in the last place"),
}

_ROWS = Tensor(axes=("rows", "hidden"), dtypes=api.DTYPES, meaning="activations")
_WEIGHT = Tensor(axes=("hidden",), dtypes=api.DTYPES, meaning="scale of each column")


def supports(backend: str, sizes: Sizes, dtype: str) -> str | None:
    """Say why a backend cannot norm such rows in this process; None if it can."""
    if dtype not in api.DTYPES:
        return f"dtype {dtype} is none of {', '.join(api.DTYPES)}"
    if backend != "triton":
        return None
    if sizes["hidden"] > api.MAX_HIDDEN:
        return f"rows are longer than {api.MAX_HIDDEN}"
    return triton_launch.unavailable()


def _make(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(seed)
    shape = (sizes["rows"], sizes["hidden"])
    x = jnp.asarray(rng.normal(size=shape), dtype)
    weight = jnp.asarray(rng.normal(size=sizes["hidden"]), dtype)
    return {"x": x, "weight": weight, "epsilon": 1e-6, "plus_one": False}


def _make_both(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    return {**_make(sizes, dtype, seed), "residual": _make(sizes, dtype, seed + 1)["x"]}


def _num_bytes(sizes: Sizes, dtype: str, *, times: int) -> int:
    numbers = times * sizes["rows"] * sizes["hidden"] + sizes["hidden"]
    return numbers * jnp.dtype(dtype).itemsize


CARD = KernelCard(
    name="rms_norm",
    summary="divide each row by its root mean square and scale it",
    axes=AXES,
    inputs={"x": _ROWS, "weight": _WEIGHT},
    outputs={"normed": _ROWS},
    make=_make,
    run=api.rms_norm,
    reference=reference.rms_norm,
    tolerances=TOLERANCES,
    backends=("xla", "triton"),
    supports=supports,
    num_bytes=lambda sizes, dtype: _num_bytes(sizes, dtype, times=2),
    num_flops=lambda sizes: 4 * sizes["rows"] * sizes["hidden"],
    source="Zhang and Sennrich, arXiv 1910.07467",
)

ADD_CARD = KernelCard(
    name="add_rms_norm",
    summary="add to the residual stream and norm the sum",
    axes=AXES,
    inputs={"x": _ROWS, "residual": _ROWS, "weight": _WEIGHT},
    outputs={"normed": _ROWS, "sum": _ROWS},
    make=_make_both,
    run=api.add_rms_norm,
    reference=reference.add_rms_norm,
    tolerances=TOLERANCES,
    backends=("xla", "triton"),
    supports=supports,
    num_bytes=lambda sizes, dtype: _num_bytes(sizes, dtype, times=4),
    num_flops=lambda sizes: 5 * sizes["rows"] * sizes["hidden"],
    source="Zhang and Sennrich, arXiv 1910.07467; FlashInfer's fused_add_rmsnorm",
)
