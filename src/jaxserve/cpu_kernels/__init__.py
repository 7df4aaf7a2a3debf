"""Kernels that LLVM compiles for this machine's CPU while the engine starts; no compiler needed.

llvmlite is imported only where a kernel is built: on a machine without it, `is_available` says so
and the engine runs on XLA alone.
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence

from jaxtyping import Array, Float, Int

logger = logging.getLogger(__name__)

_FASTER_ROWS = {"float32": (2, 32), "bfloat16": (1, 12)}
"""Numbers of rows for which `multiply` beat XLA on two cores of Zen 4, by dtype of the weights."""


@functools.cache
def is_available() -> bool:
    """Tell whether kernels can be compiled and called here."""
    if importlib.util.find_spec("llvmlite") is None:
        return False
    from jaxserve.cpu_kernels import ffi  # noqa: PLC0415  llvmlite is optional

    return ffi.is_supported()


def supports_slots(head_dim: int, capacity: int, dtype: str) -> bool:
    """Tell whether the attention kernels can work with slots of this form."""
    if not is_available() or dtype not in _FASTER_ROWS:
        return False
    from jaxserve.cpu_kernels import decode_attention  # noqa: PLC0415  llvmlite is optional

    return decode_attention.supports(head_dim, capacity)


def pays(rows: int, dtype: str) -> bool:
    """Tell whether products of so many rows are faster here than through XLA."""
    least, most = _FASTER_ROWS.get(dtype, (1, 0))
    return least <= rows <= most


def multiply(
    x: Float[Array, "rows in_size"], weights: Sequence[Float[Array, "in_size out_size"]]
) -> list[Float[Array, "rows out_size"]]:
    """Multiply a few rows with one or more weights; see `matmul.multiply`."""
    from jaxserve.cpu_kernels import matmul  # noqa: PLC0415  llvmlite is optional

    return matmul.multiply(x, weights)


def multiply_transposed(
    x: Float[Array, "rows in_size"], weight: Float[Array, "out_size in_size"]
) -> Float[Array, "rows out_size"]:
    """Multiply a few rows with a transposed weight; see `matmul.multiply_transposed`."""
    from jaxserve.cpu_kernels import matmul  # noqa: PLC0415  llvmlite is optional

    return matmul.multiply_transposed(x, weight)


def decode(
    q: Float[Array, "rows q_heads head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    position: Int[Array, " rows"],
    *,
    scale: float,
) -> tuple[Float[Array, "rows q_heads head_dim"], Array, Array]:
    """Append one token per row and attend from it; see `decode_attention.decode`."""
    from jaxserve.cpu_kernels import decode_attention  # noqa: PLC0415  llvmlite is optional

    return decode_attention.decode(q, k, v, keys, values, position, scale=scale)


def append(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    blocks: Int[Array, "blocks 4"],
) -> tuple[Array, Array]:
    """Write prefill keys and values into their slots; see `prefill_attention.append`."""
    from jaxserve.cpu_kernels import prefill_attention  # noqa: PLC0415  llvmlite is optional

    return prefill_attention.append(k, v, keys, values, blocks)


def prefill(
    q: Float[Array, "tokens q_heads head_dim"],
    keys: Float[Array, "slots kv_heads capacity head_dim"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    blocks: Int[Array, "blocks 4"],
    *,
    q_block: int,
    scale: float,
) -> Float[Array, "tokens q_heads head_dim"]:
    """Attend from prefill tokens to all keys of their slots; see `prefill_attention.prefill`."""
    from jaxserve.cpu_kernels import prefill_attention  # noqa: PLC0415  llvmlite is optional

    return prefill_attention.prefill(q, keys, values, blocks, q_block=q_block, scale=scale)
