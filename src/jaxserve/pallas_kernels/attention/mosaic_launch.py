"""How Mosaic attention kernels are launched: one CTA per run of work items, operands by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxserve.pallas_kernels.attention.mosaic_pages import Ring
from jaxserve.pallas_kernels.attention.mosaic_tile import Ref
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan


@dataclasses.dataclass(frozen=True)
class Refs:
    """References that every attention kernel has: operands, results, and rings of tiles."""

    plan: Ref
    q: Ref
    keys: Ring
    values: Ring
    small: Mapping[str, Ref]
    o: Ref
    lse: Ref
    part: Ref
    part_lse: Ref


def launch[R: Refs](
    kernel: Callable[[R], None],
    refs: type[R],
    operands: tuple[Plan, Array, PagedKV, Mapping[str, Array]],
    *,
    results: tuple[jax.ShapeDtypeStruct, ...],
    scratch: Mapping[str, Any],
    warpgroups: int,
) -> tuple[Array, Array, Array, Array]:
    """Run a kernel in every CTA of the plan.

    Args:
        kernel: The body.
        refs: The record that it takes.
        operands: The plan, queries, pages, and small arrays by name.
        results: Outputs, their lse, partial outputs, and theirs.
        scratch: Shared memory and barriers by their names in the record; `k_ring` and `v_ring`
            become the rings of tiles.
        warpgroups: Threads of the kernel.
    """
    plan, q, kv, small = operands
    names = tuple(small)

    def body(
        plan: Ref,
        q: Ref,
        k: Ref,
        v: Ref,
        *rest: Ref,
        k_ring: dict[str, Ref],
        v_ring: dict[str, Ref],
        **scratch: Ref,
    ) -> None:
        o, lse, part, part_lse = rest[len(names) :]
        kernel(
            refs(
                plan=plan,
                q=q,
                keys=Ring(k, **k_ring),
                values=Ring(v, **v_ring),
                small=dict(zip(names, rest, strict=False)),
                o=o,
                lse=lse,
                part=part,
                part_lse=part_lse,
                **scratch,
            )
        )

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=dict(scratch),
        grid=(plan.spec.num_ctas,),
        grid_names=("cta",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(plan.buffer, q, kv.k, kv.v, *small.values())
