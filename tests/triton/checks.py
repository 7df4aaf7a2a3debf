"""What is checked of every Triton kernel: that it compiles everywhere, and fits."""

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest
from hypothesis import settings

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.triton_compile import Compiled, compile_launch


def examples(most: int) -> settings:
    """Let hypothesis try a few examples, or all where THOROUGH=1 (make test-triton-slow).

    Triton's interpreter takes seconds for what a device does in microseconds.
    """
    return settings(max_examples=most if os.environ.get("THOROUGH") == "1" else max(3, most // 4))


def slow(*values: Any) -> Any:
    """Mark a case of a parameter that a quicker case covers most of."""
    return pytest.param(*values, marks=pytest.mark.slow)


def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def compile_all(
    function: Callable[..., Any],
    *arguments: Any,
    capabilities: tuple[int, ...] = (80, 89, 90),
    spills: bool = False,
) -> list[Compiled]:
    """Compile every launch of a function for every capability, and check what they take."""
    compiled: list[Compiled] = []
    for capability in capabilities:
        with triton_launch.record_launches(capability) as launches:
            jax.eval_shape(function, *arguments)
        assert launches
        compiled += [compile_launch(launch, capability) for launch in launches]
    for program in compiled:
        assert program.shared_bytes <= triton_launch.shared_bytes(program.capability), program.name
        assert program.registers * program.threads <= 65536, program.name
        assert spills or program.stack_bytes == 0, (program.name, program.capability)
    return compiled


def lower_for_cuda(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *arguments: Any, **jit: Any
) -> str:
    """Lower a function into a program for a GPU, launches included; returns the program's text."""
    monkeypatch.setattr(triton_launch, "_device_capability", lambda: 90)
    monkeypatch.setattr(triton_launch, "unavailable", lambda: None)
    traced = jax.jit(function, **jit).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
