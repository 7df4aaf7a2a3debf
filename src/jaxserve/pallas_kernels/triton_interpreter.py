"""Launches in Triton's interpreter: the grid is walked in numpy, on the CPU, for tests only.

The interpreter expects torch tensors. It needs little of them: an address, an element type, and a
way to copy to the host and back, which numpy arrays are given here. It has no arithmetic in
bfloat16: kernels that turn their inputs into float32 first are exact, products of matrices in
bfloat16 are not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array

ELEMENT_TYPES: dict[np.dtype, str] = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(ml_dtypes.float8_e4m3fn): "fp8e4nv",
    np.dtype(ml_dtypes.float8_e5m2): "fp8e5",
    np.dtype(np.int32): "i32",
    np.dtype(np.uint32): "u32",
    np.dtype(np.int8): "i8",
    np.dtype(np.uint8): "u8",
    np.dtype(np.int64): "i64",
}
"""What Triton calls the element types that kernels here read and write."""

_UNWRITTEN = 0x7F
"""Byte that fills outputs before a launch, so that what a kernel forgets to write stands out."""


class Kernel(Protocol):
    """What `triton.jit` makes, for the compiler or for the interpreter.

    Attributes:
        fn: The function that was decorated.
        arg_names: Names of its parameters.
    """

    fn: Callable[..., object]
    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """Return what launches it over a grid, where Triton itself does that."""
        ...


class HostBuffer:
    """A numpy array that looks enough like a torch tensor for Triton's interpreter.

    Attributes:
        array: The memory, which the kernel reads and writes in place.
        dtype: Triton's name of the element type.
    """

    def __init__(self, array: np.ndarray) -> None:
        """Wrap a contiguous array."""
        self.array = array
        self.dtype = ELEMENT_TYPES[array.dtype]

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostBuffer":
        """Return the memory itself."""
        return self

    def cpu(self) -> "HostBuffer":
        """Return the memory on the host, where it is already."""
        return self

    def new_empty(self, _size: int, *, device: str) -> "HostBuffer":
        """Return a tensor whose memory is about to be set."""
        del device
        return HostBuffer(self.array)

    def set_(self, storage: "HostBuffer", *_layout: object) -> None:
        """Take the memory of another."""
        self.array = storage.array

    def copy_(self, other: "HostBuffer") -> None:
        """Take over contents, which are the same memory here."""

    def storage_offset(self) -> int:
        """Return where in its memory it begins."""
        return 0

    def size(self) -> tuple[int, ...]:
        """Return the shape."""
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        """Return the strides; nobody looks at them."""
        return ()


def interpret(
    kernel: Kernel,
    inputs: Sequence[Array | int | float],
    grid: tuple[int, ...],
    outputs: Sequence[jax.ShapeDtypeStruct],
    updates: Sequence[Array],
    constants: Mapping[str, object],
) -> tuple[Array, ...]:
    """Launch a kernel in the interpreter, as part of a JAX program; see `triton_launch.launch`."""
    is_array = [not isinstance(argument, (int, float)) for argument in inputs]
    scalars = [a for a, array in zip(inputs, is_array, strict=True) if not array]
    num_read = sum(is_array)

    def walk(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        read = iter([HostBuffer(np.ascontiguousarray(a)) for a in arrays[:num_read]])
        known = iter(scalars)
        arguments = [next(read) if array else next(known) for array in is_array]
        written = [np.array(a, order="C") for a in arrays[num_read:]]
        written += [_unwritten(out) for out in outputs]
        buffers = [HostBuffer(a) for a in written]
        # On a device exponentials overflow to infinity without a word.
        with np.errstate(over="ignore"):
            kernel[grid](*arguments, *[0] * len(updates), *buffers, **constants)
        return tuple(written)

    arrays = [jnp.asarray(a) for a, array in zip(inputs, is_array, strict=True) if array]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in updates]
    return tuple(jax.pure_callback(walk, (*shapes, *outputs), *arrays, *updates))


def _unwritten(out: jax.ShapeDtypeStruct) -> np.ndarray:
    # In every float type here these bytes are NaN or huge; in integers they are far out of range.
    array = np.empty(out.shape, out.dtype)
    array.view(np.uint8).fill(_UNWRITTEN)
    return array
