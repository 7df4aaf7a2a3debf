"""The card of an operation: all that tests, benchmarks and documents need to know about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Sizes = Mapping[str, int]
"""Axis name -> size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One named axis of an operation.

    Attributes:
        sizes: Sizes to try; the first is the tiny one that interpreted kernels use, the second
            that of a usual model. Empty for an axis that follows from others.
        varies: Whether the size changes from call to call (a length, a batch), rather than with
            the model (heads, dimensions). What varies must not recompile anything.
        meaning: What is counted.
    """

    sizes: tuple[int, ...]
    varies: bool
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One input or output of an operation.

    Attributes:
        axes: Names of axes; `()` is a scalar.
        dtypes: Names of dtypes that are accepted or produced; the first is the usual one.
        meaning: What it holds.
        optional: Whether it may be left out.
    """

    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    meaning: str
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a result may lie from the reference: `|got - want| <= atol + rtol * |want|`.

    Attributes:
        rtol: Relative part.
        atol: Absolute part.
        reason: Where the numbers come from.
    """

    rtol: float
    atol: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCard:
    """One operation.

    Attributes:
        name: Name, as the documents and the benchmarks spell it.
        summary: What it computes, in one line.
        axes: Every axis that inputs and outputs are written in.
        inputs: Inputs by name.
        outputs: Outputs by name.
        make: Makes inputs from sizes, a dtype and a seed: the keyword arguments of `run` and of
            `reference`.
        run: The public function.
        reference: The oracle, with the same arguments and results.
        tolerances: By dtype of the inputs.
        backends: Every backend, in the order in which "auto" tries them.
        supports: Asked with a backend, sizes and a dtype: None, or why it cannot run here.
        num_bytes: Bytes that must be read and written, by sizes and dtype.
        num_flops: Floating-point operations that must be done, by sizes.
        source: Papers or public implementations that were followed.
    """

    name: str
    summary: str
    axes: Mapping[str, Axis]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    make: Callable[[Sizes, str, int], Mapping[str, Any]]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    tolerances: Mapping[str, Tolerance]
    backends: tuple[str, ...]
    supports: Callable[[str, Sizes, str], str | None]
    num_bytes: Callable[[Sizes, str], int]
    num_flops: Callable[[Sizes], int]
    source: str

    def __post_init__(self) -> None:
        """Check that tensors are written in the axes of the card."""
        for name, tensor in {**self.inputs, **self.outputs}.items():
            unknown = [axis for axis in tensor.axes if axis not in self.axes]
            if unknown:
                raise ValueError(
                    f"card {self.name!r}: {name} has unknown axes {unknown}, "
                    f"expected some of {sorted(self.axes)}; add them to the card."
                )

    def tiny(self) -> dict[str, int]:
        """Return the first size of every axis that has some."""
        return {name: axis.sizes[0] for name, axis in self.axes.items() if axis.sizes}

    def usual(self) -> dict[str, int]:
        """Return the second size of every axis, or the only one: what a served model has."""
        return {
            n: axis.sizes[min(1, len(axis.sizes) - 1)]
            for n, axis in self.axes.items()
            if axis.sizes
        }

    def difference(self, got: ArrayLike, want: ArrayLike, dtype: str) -> str | None:
        """Compare a result with the reference's.

        Args:
            got: The result.
            want: The reference's.
            dtype: Dtype of the inputs; names the tolerance.

        Returns:
            None if they agree; otherwise how far apart they are and where.
        """
        limit = self.tolerances[dtype]
        left, right = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if left.shape != right.shape:
            return f"shape {left.shape}, expected {right.shape}"
        equal = (left == right) | (np.isnan(left) & np.isnan(right))
        with np.errstate(invalid="ignore"):
            excess = np.abs(left - right) - (limit.atol + limit.rtol * np.abs(right))
        bad = ~equal & ~(excess <= 0)
        if not bad.any():
            return None
        at = tuple(int(i) for i in np.argwhere(bad)[np.argmax(excess[bad])])
        return (
            f"{int(bad.sum())} of {bad.size} values differ by more than {limit.atol} + "
            f"{limit.rtol} * |value|; the worst, at {at}, is {left[at]}, expected {right[at]}"
        )
