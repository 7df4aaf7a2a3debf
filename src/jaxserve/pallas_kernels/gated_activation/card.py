"""The cards of gated activations."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.card import Axis, KernelCard, Sizes, Tensor, Tolerance
from jaxserve.pallas_kernels.gated_activation import api, reference
from jaxserve.pallas_kernels.gated_activation.reference import Kind

TOLERANCES = {
    "float32": Tolerance(rtol=3e-6, atol=1e-6, reason="exponentials of other libraries"),
    "float16": Tolerance(rtol=1e-3, atol=1e-3, reason="one unit in the last place"),
    "bfloat16": Tolerance(rtol=8e-3, atol=8e-3, reason="one unit in the last place"),
}


def supports(backend: str, sizes: Sizes, dtype: str) -> str | None:
    """Say why a backend cannot gate such rows in this process; None if it can."""
    del sizes
    if dtype not in api.DTYPES:
        return f"dtype {dtype} is none of {', '.join(api.DTYPES)}"
    return triton_launch.unavailable() if backend == "triton" else None


def _make(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(seed)
    shape = (sizes["rows"], sizes["two_hidden"])
    return {"x": jnp.asarray(2 * rng.normal(size=shape), dtype)}


def _card(name: str, run: Callable[..., Any], kind: Kind, source: str) -> KernelCard:
    return KernelCard(
        name=name,
        summary=f"{kind} of the first half of each row times the second half",
        axes={
            "rows": Axis(sizes=(3, 1, 64, 4096), varies=True, meaning="tokens of a step"),
            "two_hidden": Axis(sizes=(96, 28672), varies=False, meaning="gate and value"),
            "hidden": Axis(sizes=(48, 14336), varies=False, meaning="half of it"),
        },
        inputs={
            "x": Tensor(axes=("rows", "two_hidden"), dtypes=api.DTYPES, meaning="gate and value")
        },
        outputs={"gated": Tensor(axes=("rows", "hidden"), dtypes=api.DTYPES, meaning="product")},
        make=_make,
        run=run,
        reference=partial(reference.gated, kind=kind),
        tolerances=TOLERANCES,
        backends=("xla", "triton"),
        supports=supports,
        num_bytes=lambda sizes, dtype: (
            sizes["rows"] * sizes["two_hidden"] * 3 * jnp.dtype(dtype).itemsize // 2
        ),
        num_flops=lambda sizes: 5 * sizes["rows"] * sizes["two_hidden"] // 2,
        source=source,
    )


CARD = _card("silu_mul", api.silu_mul, "silu", "Shazeer, arXiv 2002.05202")
GELU_CARD = _card("gelu_mul", api.gelu_mul, "gelu_tanh", "Shazeer, arXiv 2002.05202")
