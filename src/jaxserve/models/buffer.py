"""Host arrays that a device can take over: aligned, contiguous, laid out as models want them."""

import math

import numpy as np
from numpy.typing import DTypeLike

_ALIGNMENT = 64
"""What XLA asks of memory on the CPU; buffers aligned so are served in place, without a copy."""


def empty_buffer(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Allocate an array that a CPU device can use in place.

    Args:
        shape: Its shape.
        dtype: Its element type.

    Returns:
        A contiguous array of arbitrary values that starts on a multiple of 64 bytes.
    """
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(kind).reshape(shape)


def prepare_buffer(value: np.ndarray, dtype: DTypeLike, *, transpose: bool) -> np.ndarray:
    """Bring an array into the type and layout that a device takes.

    Args:
        value: Any array; it may be a view of a file.
        dtype: The element type wanted.
        transpose: Whether to exchange the two last axes.

    Returns:
        An aligned and contiguous array of its own; `value` itself if it already is one.
    """
    kind = np.dtype(dtype)
    with np.errstate(over="ignore"):  # a bfloat16 weight beyond float16 becomes infinite
        cast = value.astype(kind, copy=False)
    if transpose:
        *stack, num_rows, num_columns = cast.shape
        out = empty_buffer((*stack, num_columns, num_rows), kind)
        rows = max(1, _ALIGNMENT // kind.itemsize)
        for place in np.ndindex(*stack):
            source, target = cast[place], out[place]
            # A strip as wide as a cache line; one whole transposed copy takes 3 to 6 times as long.
            for start in range(0, num_rows, rows):
                target[:, start : start + rows] = source[start : start + rows].T
        return out
    is_own = cast.flags.writeable and cast.flags.c_contiguous
    if is_own and cast.ctypes.data % _ALIGNMENT == 0:
        return cast
    out = empty_buffer(cast.shape, kind)
    out[...] = cast
    return out
