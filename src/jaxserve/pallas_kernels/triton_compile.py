"""Compiling launches for a GPU that is not there, to see that they compile and what they take."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.pallas_kernels.triton_interpreter import ELEMENT_TYPES
from jaxserve.pallas_kernels.triton_launch import Launch, backend_options

_ALIGNED = [["tt.divisibility", 16]]
"""What jax_triton promises Triton of every array: XLA aligns buffers better than that."""

_WARP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What one launch takes on one kind of device.

    Attributes:
        name: Name of the kernel.
        capability: Compute capability, times ten.
        registers: Registers of a thread.
        stack_bytes: Stack of a thread; with none there are no spilled registers.
        shared_bytes: Shared memory of a program.
        threads: Threads of a program.
        ptx: The program in PTX.
    """

    name: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    ptx: str


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile one launch down to machine code.

    Args:
        launch: One of those that `record_launches` wrote down.
        capability: Compute capability, times ten.
    """
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for name, argument in zip(names, launch.arguments, strict=True):
        signature[name] = type_of(argument)
        if isinstance(argument, jax.ShapeDtypeStruct):
            attributes[(launch.kernel.arg_names.index(name),)] = _ALIGNED
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, signature, dict(launch.constants), attributes)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **backend_options(capability),
    }
    target = GPUTarget("cuda", capability, _WARP)
    compiled = triton.compile(source, target=target, options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(
        name=launch.kernel.fn.__name__,
        capability=capability,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=int(compiled.metadata.shared),
        threads=_WARP * launch.num_warps,
        ptx=compiled.asm["ptx"],
    )


def type_of(argument: jax.ShapeDtypeStruct | int | float) -> str:
    """Return Triton's name of the type of an argument."""
    if isinstance(argument, float):
        return "fp32"
    if isinstance(argument, int):
        return "i32" if -(2**31) <= argument < 2**31 else "i64"
    return f"*{ELEMENT_TYPES[np.dtype(argument.dtype)]}"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Read registers and stack bytes per thread out of machine code."""
    from triton import knobs  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump names no registers: {text[:200]!r}; another version of it?")
    return int(found.group(1)), int(found.group(2))
