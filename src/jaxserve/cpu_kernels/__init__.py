"""Kernels that LLVM compiles for this machine's CPU while the engine starts; no compiler needed.

llvmlite is imported only where a kernel is built: on a machine without it, `is_available` says so
and the engine runs on XLA alone.
"""

import functools
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.cpu_kernels.cluster_attention import attend_clusters as attend_clusters
    from jaxserve.cpu_kernels.cluster_choice import choose_clusters as choose_clusters
    from jaxserve.cpu_kernels.decode_attention import decode as decode
    from jaxserve.cpu_kernels.lazy_zeros import zeros as zeros
    from jaxserve.cpu_kernels.matmul import multiply as multiply
    from jaxserve.cpu_kernels.matmul import multiply_transposed as multiply_transposed
    from jaxserve.cpu_kernels.prefill_attention import append as append
    from jaxserve.cpu_kernels.prefill_attention import prefill as prefill
    from jaxserve.cpu_kernels.span_attention import attend_spans as attend_spans

_KERNELS = {
    "multiply": "matmul",
    "multiply_transposed": "matmul",
    "attend_clusters": "cluster_attention",
    "choose_clusters": "cluster_choice",
    "decode": "decode_attention",
    "append": "prefill_attention",
    "prefill": "prefill_attention",
    "attend_spans": "span_attention",
    "zeros": "lazy_zeros",
}
"""Which module holds which kernel."""

_FEW_ROWS = {
    "float32": (2, 32),
    "bfloat16": (1, 12),
    "int8": (1, 16),
    "float8_e4m3fn": (1, 16),
}
"""Numbers of rows for which `matmul` beat XLA on two cores of Zen 4, by dtype of the weights."""
_MANY_ROWS = {"float32": 24, "bfloat16": 16, "int8": 12, "float8_e4m3fn": 6}
"""Rows from which on `block_matmul` beat both `matmul` and XLA on two cores of Zen 3.

With float32 and 512 rows it is as fast as XLA; with bfloat16 prefill took 3/4 of the time.
"""
_MEASURED_WIDTH = 8
"""Lanes of the vectors there. Processors with longer ones may multiply bfloat16 as it is."""
_CACHED = ("float32", "bfloat16")
"""Types of keys and values that the attention kernels read."""


@functools.cache
def is_available() -> bool:
    """Tell whether kernels can be compiled and called here."""
    if importlib.util.find_spec("llvmlite") is None:
        return False
    from jaxserve.cpu_kernels import ffi  # noqa: PLC0415  llvmlite is optional

    return ffi.is_supported()


def has_lazy_zeros() -> bool:
    """Tell whether `zeros` works here: Linux alone clears the pages that it is given back."""
    return sys.platform == "linux" and is_available()


def supports_slots(head_dim: int, capacity: int, dtype: str) -> bool:
    """Tell whether the attention kernels can work with slots of this form."""
    if not is_available() or dtype not in _CACHED:
        return False
    from jaxserve.cpu_kernels import heads  # noqa: PLC0415  llvmlite is optional

    return heads.supports(head_dim, capacity)


def pays(rows: int, dtype: str, *, is_transposed: bool = False) -> bool:
    """Tell whether products of so many rows are faster here than through XLA.

    Args:
        rows: Rows.
        dtype: Of the weights.
        is_transposed: Whether the weights are.
    """
    least, most = _FEW_ROWS.get(dtype, (1, 0))
    is_faster = least <= rows <= most or (not is_transposed and blocks_pay(rows, dtype))
    return is_faster and (dtype != "float8_e4m3fn" or _reads_float8())


def blocks_pay(rows: int, dtype: str) -> bool:
    """Tell whether so many rows are multiplied faster in blocks than otherwise."""
    from jaxserve.cpu_kernels import ffi  # noqa: PLC0415  llvmlite is optional

    return dtype in _MANY_ROWS and rows >= _MANY_ROWS[dtype] and ffi.host().width == _MEASURED_WIDTH


def _reads_float8() -> bool:
    """Tell whether the processor widens float16, through which a float8 goes."""
    from jaxserve.cpu_kernels import ffi  # noqa: PLC0415  llvmlite is optional

    return ffi.host().has_float16


def __getattr__(name: str) -> Any:  # noqa: ANN401  the form of a module's hook
    """Load a kernel's module when the kernel is first asked for."""
    if name not in _KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_KERNELS[name]}"), name)
