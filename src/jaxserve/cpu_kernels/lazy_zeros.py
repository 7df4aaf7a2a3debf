"""Large zeroed buffers that take memory only where something is written to them.

Writing zeros into gigabytes takes seconds, most of it in the system's handling of new pages, before
the first request is heard. Linux promises that pages given back to it read as zeros afterwards.
"""

import mmap
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array
from llvmlite import ir

from jaxserve.cpu_kernels import ffi
from jaxserve.cpu_kernels.emit import I32, I64, POINTER, Emitter, Value, const

_DONT_NEED, _HUGE_PAGES = 4, 14
"""`MADV_DONTNEED` and `MADV_HUGEPAGE` of Linux."""


def _kernel(name: str, num_bytes: int) -> ffi.Kernel:
    def chunk(
        e: Emitter, buffers: Sequence[Value], sizes: Sequence[Value], index: Value, parts: Value
    ) -> None:
        del sizes, index, parts
        b, page = e.b, mmap.PAGESIZE
        start = b.ptrtoint(buffers[0], I64)
        end = b.add(start, const(num_bytes))
        low = b.and_(b.add(start, const(page - 1)), const(-page))
        high = b.and_(end, const(-page))
        advise = ffi.libc(e, "madvise", I32, [POINTER, I64, I32])
        inside = [b.inttoptr(low, POINTER), b.sub(high, low)]
        failed = b.call(advise, [*inside, ir.Constant(I32, _DONT_NEED)])
        with b.if_else(b.icmp_signed("!=", failed, ir.Constant(I32, 0))) as (by_hand, by_system):
            with by_hand:
                _clear(e, start, end)
            with by_system:
                _clear(e, start, low)
                _clear(e, high, end)
                # Fewer and larger pages, where the system lets programs ask for them.
                b.call(advise, [*inside, ir.Constant(I32, _HUGE_PAGES)])

    return ffi.Kernel(
        name=name,
        num_args=0,
        num_rets=1,
        dims=[],
        num_chunks=lambda e, sizes, threads: const(1),  # noqa: ARG005  the form of a kernel
        chunk=chunk,
    )


def _clear(e: Emitter, start: Value, end: Value) -> None:
    fill = ffi.libc(e, "memset", POINTER, [POINTER, I32, I64])
    e.b.call(fill, [e.b.inttoptr(start, POINTER), ir.Constant(I32, 0), e.b.sub(end, start)])


def zeros(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Return a buffer of zeros of which nothing is in memory yet.

    Args:
        shape: Its shape; at least a few pages of memory, or nothing is saved.
        dtype: Of its elements.
    """
    out = jax.ShapeDtypeStruct(shape, dtype)
    num_bytes = out.size * out.dtype.itemsize
    if num_bytes < 2 * mmap.PAGESIZE:
        return jnp.zeros(shape, dtype)
    name = f"jaxserve_zeros_{num_bytes}"
    ffi.register(name, lambda: _kernel(name, num_bytes))
    return jax.ffi.ffi_call(name, out)()
