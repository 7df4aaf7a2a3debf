"""The one door to Triton: calls a Triton kernel on JAX arrays, through jax_triton.

Kernels that are launched from here declare their parameters in this order: inputs, one unused
pointer for each buffer that is updated in place, these buffers, outputs, and then what is constant.
The unused pointers are there because jax_triton 0.3 hands an updated buffer over twice, and 0.4
once; so one kernel serves both.

Three things can happen to a launch:

* on a GPU it is compiled into the XLA program around it;
* where Triton's interpreter is switched on (`TRITON_INTERPRET=1`, before Triton is imported) its
  grid is walked in numpy, on the CPU, for tests;
* inside `record_launches` it is only written down, for tests that compile it without a GPU.
"""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxserve.core.errors import MissingExtraError, UnsupportedError
from jaxserve.pallas_kernels.triton_interpreter import Kernel, interpret

PTX_VERSION = 85
"""PTX that ptxas of CUDA 12.6 can read, the oldest that JAX's wheels for CUDA bring along. Triton
would write for the ptxas that ships with it, which may be newer than the one that XLA finds."""

_NEWEST_FOR_PTX_VERSION = 90
_FIRST_WITH_E4M3 = 89
_INTERPRETED_AS = 90

_recording: contextvars.ContextVar[tuple[list["Launch"], int] | None] = contextvars.ContextVar(
    "recording", default=None
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a kernel, with all that compiling it depends on.

    Attributes:
        kernel: What `triton.jit` made.
        arguments: Shapes and dtypes of the array parameters, or the values of scalar ones, in the
            order in which the kernel declares them.
        constants: Values of its `constexpr` parameters.
        grid: Programs along each axis.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    kernel: Kernel
    arguments: tuple[jax.ShapeDtypeStruct | int | float, ...]
    constants: Mapping[str, Any]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int


@contextlib.contextmanager
def record_launches(capability: int = 90) -> Iterator[list[Launch]]:
    """Write launches down instead of making them; what they would return is zero.

    JAX forgets what it has traced, before and after: inside, a function that was traced already
    would launch nothing, and outside, one that was traced here would return zeros.

    Args:
        capability: Compute capability that the launches shall be for, times ten.

    Yields:
        The launches so far, in order; it fills while functions are traced inside the context.
    """
    launches: list[Launch] = []
    jax.clear_caches()
    token = _recording.set((launches, capability))
    try:
        yield launches
    finally:
        _recording.reset(token)
        jax.clear_caches()


def is_recording() -> bool:
    """Tell whether launches are only written down at the moment."""
    return _recording.get() is not None


def is_interpreting() -> bool:
    """Tell whether Triton's interpreter is switched on in this process."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs  # noqa: PLC0415

    return bool(knobs.runtime.interpret)


def unavailable() -> str | None:
    """Say why no Triton kernel can be launched in this process; None if it can.

    Returns:
        A sentence for an error message or for a table of backends.
    """
    if is_recording() or is_interpreting():
        return None
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("jax_triton") is None:
        return "the packages triton and jax-triton are not installed"
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {jax.default_backend()} here"
    return _mismatch()


def require() -> None:
    """Raise if no Triton kernel can be launched in this process.

    Raises:
        MissingExtraError: If packages are missing.
        UnsupportedError: If there is no GPU, or versions do not fit each other.
    """
    reason = unavailable()
    if reason is None:
        return
    if "not installed" in reason:
        raise MissingExtraError(
            f"backend 'triton' cannot be used: {reason}. Install them with "
            "pip install 'jaxserve[triton]', or choose backend='xla'."
        )
    raise UnsupportedError(f"backend 'triton' cannot be used: {reason}; choose backend='xla'.")


def launch(
    kernel: Kernel,
    *inputs: Array | int | float,
    grid: Sequence[int],
    outputs: Sequence[jax.ShapeDtypeStruct] = (),
    updates: Sequence[Array] = (),
    constants: Mapping[str, object],
    num_warps: int = 4,
    num_stages: int = 3,
) -> tuple[Array, ...]:
    """Launch a Triton kernel; under `jit` it becomes a part of the program.

    Args:
        kernel: What `triton.jit` made; see above for the order of its parameters.
        *inputs: Arrays that it reads, and scalars known now.
        grid: Programs along up to three axes.
        outputs: Shapes and dtypes of what it writes in whole.
        updates: Arrays that it writes parts of. Where the caller donates them, nothing is copied.
        constants: Values of its `constexpr` parameters.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline of its loops.

    Returns:
        The new values of `updates`, then the outputs.
    """
    recording = _recording.get()
    if recording is not None:
        shapes = [*map(_shape_of, inputs), *[0] * len(updates), *map(_shape_of, updates), *outputs]
        recording[0].append(
            Launch(
                kernel=kernel,
                arguments=tuple(shapes),
                constants=dict(constants),
                grid=tuple(grid),
                num_warps=num_warps,
                num_stages=num_stages,
            )
        )
        return (*updates, *(jnp.zeros(out.shape, out.dtype) for out in outputs))
    if is_interpreting():
        return interpret(kernel, inputs, tuple(grid), outputs, updates, constants)
    options: dict[str, object] = {"num_warps": num_warps, "num_stages": num_stages}
    name = kernel.fn.__name__
    if _jax_triton_version() < (0, 4):
        return _call_0_3(
            kernel, inputs, outputs, updates, grid=tuple(grid), name=name, **options, **constants
        )
    return _call_0_4(
        kernel, inputs, outputs, updates, grid=tuple(grid), name=name, **options, **constants
    )


def backend_options(capability: int) -> dict[str, Any]:
    """Return options of Triton's compiler, the same in programs and in tests that only compile.

    Args:
        capability: Compute capability of the device, times ten.
    """
    # Contracting a product and a sum is Triton's default up to 3.9, and is not from 3.10 on.
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if capability <= _NEWEST_FOR_PTX_VERSION:
        options["ptx_version"] = PTX_VERSION
    if capability < _FIRST_WITH_E4M3:
        # Kernels read and write the bytes; the type must only be allowed to be named.
        options["supported_fp8_dtypes"] = ("fp8e4b15", "fp8e4nv", "fp8e5")
    return options


def _shape_of(argument: Array | int | float) -> jax.ShapeDtypeStruct | int | float:
    if isinstance(argument, (int, float)):
        return argument
    return jax.ShapeDtypeStruct(argument.shape, argument.dtype)


def _call_0_4(
    kernel: Kernel,
    inputs: Sequence[Array | int | float],
    outputs: Sequence[jax.ShapeDtypeStruct],
    updates: Sequence[Array],
    **options: object,
) -> tuple[Array, ...]:
    jax_triton = _load_jax_triton()
    refs = [jax.new_ref(buffer) for buffer in updates]
    results = jax_triton.triton_call(
        *inputs,
        *[0] * len(refs),
        *refs,
        kernel=kernel,
        out_type=tuple(outputs),
        backend_options=backend_options(_device_capability()),
        compute_capability=_device_capability(),
        **options,
    )
    return (*(jax.freeze(ref) for ref in refs), *results)


def _call_0_3(
    kernel: Kernel,
    inputs: Sequence[Array | int | float],
    outputs: Sequence[jax.ShapeDtypeStruct],
    updates: Sequence[Array],
    **options: object,
) -> tuple[Array, ...]:
    jax_triton = _load_jax_triton()
    num_arrays = sum(not isinstance(argument, (int, float)) for argument in inputs)
    updated = [jax.ShapeDtypeStruct(buffer.shape, buffer.dtype) for buffer in updates]
    return tuple(
        jax_triton.triton_call(
            *inputs,
            *updates,
            kernel=kernel,
            out_shape=(*updated, *outputs),
            input_output_aliases={num_arrays + i: i for i in range(len(updates))},
            enable_fp_fusion=True,
            compute_capability=_device_capability(),
            **options,
        )
    )


@functools.cache
def _load_jax_triton() -> ModuleType:
    """Import jax_triton and mend what does not fit this JAX.

    jax_triton 0.4.1 registers a rule for removing dead code that takes two arguments, and JAX 0.12
    passes three. The rule says only that its primitive is always kept; without it JAX keeps the
    primitive where an output is used or a buffer is written, which is all that is wanted.
    """
    import jax_triton  # noqa: PLC0415
    from jax.interpreters import partial_eval  # noqa: PLC0415
    from jax_triton import triton_lib  # noqa: PLC0415

    partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    return jax_triton


def capability() -> int:
    """Return the compute capability of the device that launches are for, times ten."""
    recording = _recording.get()
    if recording is not None:
        return recording[1]
    if is_interpreting():
        return _INTERPRETED_AS
    return _device_capability()


def shared_bytes(capability: int) -> int:
    """Return the most shared memory of a program, by compute capability times ten.

    Source: CUDA programming guide, technical specifications per compute capability.
    """
    return {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227}.get(capability, 99) << 10


def _device_capability() -> int:
    major, minor = str(jax.devices("gpu")[0].compute_capability).split(".")
    return 10 * int(major) + int(minor)


@functools.cache
def _mismatch() -> str | None:
    """Say what about the versions of JAX, Triton and jax_triton does not fit."""
    triton, bridge = _release("triton"), _jax_triton_version()
    if bridge < (0, 3):
        needed = "0.3.1 (with Triton 3.6) or 0.4.1 or newer (with Triton 3.7 or newer)"
    elif bridge < (0, 4) and triton[:2] != (3, 6):
        needed = "0.4.1 or newer" if triton > (3, 6) else "another Triton, 3.6 or newer"
    elif bridge >= (0, 4) and triton < (3, 7):
        needed = "0.3.1" if triton[:2] == (3, 6) else "another Triton, 3.7 or newer"
    else:
        return None
    found = f"Triton {metadata.version('triton')} and jax-triton {metadata.version('jax-triton')}"
    return f"{found} do not fit each other: this needs jax-triton {needed}"


def _jax_triton_version() -> tuple[int, ...]:
    return _release("jax-triton")


@functools.cache
def _release(package: str) -> tuple[int, ...]:
    """Return the leading numbers of a package's version."""
    numbers: list[int] = []
    for part in metadata.version(package).split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
