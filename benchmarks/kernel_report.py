"""What every kernel takes in every configuration, from the compilers; no GPU is needed.

    python -m benchmarks.kernel_report mosaic|triton [--only WORD] [--jobs 2]

Prints one JSON line per configuration; `python -m benchmarks.kernels --report` runs it where each
compiler is, and makes a table of the lines. Registers, spills and shared memory are the assembler's
for Hopper; bytes and operations are those that the operation's card counts for an example step.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import list_builds
from benchmarks.kernel_builds import Build, builds, chosen_for_triton
from benchmarks.list_builds import ListBuild
from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.attention.backends import BACKENDS, Case, refusal, tuned
from jaxserve.pallas_kernels.cards import PLACES, card_of
from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.testing import Resources, compile_for, gpu_target
from jaxserve.pallas_kernels.triton_compile import compile_launch
from jaxserve.pallas_kernels.variant import AttentionVariant

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = ROOT / "tests" / "kernels" / "h200.txtpb"
REQUESTS = 64
"""Requests of the example step of attention."""
KEYS = 4096
"""Keys of each of them."""
CAPABILITY = 90


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One kernel in one configuration.

    Attributes:
        compiler: "mosaic" or "triton".
        kernel: Its name.
        configuration: What it was built for.
        registers: Registers of a thread; None if it does not compile.
        spill_bytes: Bytes of a thread that are written and read because registers ran out.
        shared_memory: Bytes of shared memory of a CTA.
        threads: Threads of a CTA.
        num_bytes: Bytes that the example step must move.
        num_flops: Operations that it must do.
        backends: Backends that can do the same on an H200; filled in where Triton is.
    """

    compiler: str
    kernel: str
    configuration: str
    registers: int | None
    spill_bytes: int
    shared_memory: int
    threads: int
    num_bytes: int
    num_flops: int
    backends: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether it compiles and nothing spills."""
        return self.registers is not None and self.spill_bytes == 0


def measure_mosaic(build: Build | ListBuild) -> Line:
    """Compile one Mosaic kernel."""
    taken: Resources | None = None
    try:
        (taken,) = compile_for(
            gpu_target(DESCRIPTION.read_text()), build.function, *build.arguments
        )
    except ValueError as error:  # what the compiler says of tiles that do not fit
        print(f"{build.name}: {error}", file=sys.stderr)
    return Line(
        compiler="mosaic",
        kernel=build.kernel,
        configuration=build.configuration,
        registers=taken and taken.registers,
        spill_bytes=taken.spill_stores + taken.spill_loads if taken else 0,
        shared_memory=taken.shared_memory if taken else 0,
        threads=taken.threads if taken else 0,
        num_bytes=num_bytes(build),
        num_flops=num_flops(build),
        backends=(),
    )


def sizes_of(build: Build) -> dict[str, int]:
    """Return the example step of a build in the words of attention's card."""
    spec = build.spec
    q_len = spec.max_tokens // REQUESTS
    return {
        "requests": REQUESTS,
        "q_len": q_len,
        "kv_len": min(KEYS, spec.window + q_len) if spec.window else KEYS,
        "q_heads": spec.q_heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "page_size": spec.page_size,
    }


def num_bytes(build: Build | ListBuild) -> int:
    """Return the bytes of queries and outputs, and of keys and values, whose dtypes may differ."""
    if isinstance(build, ListBuild):
        return card_of("token_attention").num_bytes(build.sizes, build.dtype)
    sizes, count = sizes_of(build), card_of("attention").num_bytes
    rows = count({**sizes, "kv_heads": 0}, build.spec.q_dtype)
    return rows + count({**sizes, "q_heads": 0}, build.spec.kv_dtype)


def num_flops(build: Build | ListBuild) -> int:
    """Return the operations of both products; a window's edges are counted in full."""
    if isinstance(build, ListBuild):
        return card_of("token_attention").num_flops(build.sizes)
    return card_of("attention").num_flops(sizes_of(build))


def able(spec: PlanSpec, variant: AttentionVariant, scales: str) -> tuple[str, ...]:
    """Return the backends that say they can do this on an H200; asked where Triton is."""
    case = Case(
        spec=spec,
        variant=variant,
        platform="gpu",
        capability="9.0",
        k_scale=scales,
        v_scale=scales,
    )
    with triton_launch.record_launches(CAPABILITY):  # or Triton would be refused for want of a GPU
        return tuple(name for name in BACKENDS if refusal(name, case) is None)


def all_builds() -> dict[str, Build | ListBuild]:
    """Return every build of every Mosaic kernel by its name."""
    return {build.name: build for build in [*builds(), *list_builds.builds()]}


def able_to_build(build: Build | ListBuild) -> tuple[str, ...]:
    """Return the backends that say they can do what a Mosaic kernel was built for."""
    if isinstance(build, ListBuild):
        return build.backends()
    _, kv, _, _ = build.arguments
    kinds = {None: "none", 1: "head", 2: "page"}
    return able(build.spec, build.variant, kinds[kv.k_scale and len(kv.k_scale.shape)])


def measure_operation(name: str, dtype: str) -> list[Line]:
    """Compile all Triton launches of an operation at the sizes of a usual model."""
    card = card_of(name)
    sizes = card.usual()
    inputs: Any = card.make(sizes, dtype, 0)
    options = {n: v for n, v in inputs.items() if isinstance(v, bool | float)}
    arrays = {n: v for n, v in inputs.items() if n not in options}
    if name == "attention":  # it asks which GPU is there
        plan = inputs["plan"]
        spec = tuned("triton", plan.spec)
        count = int(plan.kv_indptr[-1])
        table = PageTable(
            indptr=plan.kv_indptr, indices=plan.kv_indices[:count], kv_len=plan.kv_len
        )
        arrays["plan"] = make_plan(spec, plan.q_len, table)
        backends = able(spec, spec.variant, "none")
    else:
        with triton_launch.record_launches(CAPABILITY):
            backends = tuple(b for b in card.backends if card.supports(b, sizes, dtype) is None)
    return measure_launches(
        lambda a: card.run(**a, **options, backend="triton"),
        (arrays,),
        kernel=name,
        configuration=", ".join([dtype, *(f"{axis} {size}" for axis, size in sizes.items())]),
        num_bytes=card.num_bytes(sizes, dtype),
        num_flops=card.num_flops(sizes),
        backends=backends,
    )


def measure_attention(build: Build) -> list[Line]:
    """Compile Triton's launches for what a Mosaic kernel was built for."""
    return measure_launches(
        lambda q, kv, plan, extra: attention(q, kv, plan, extra=extra, backend="triton"),
        build.arguments,
        kernel="attention",
        configuration=build.configuration.partition(" ->")[0],
        num_bytes=num_bytes(build),
        num_flops=num_flops(build),
        backends=able_to_build(build),
    )


def measure_launches(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    kernel: str,
    **line: Any,  # noqa: ANN401
) -> list[Line]:
    """Compile every Triton launch of a function.

    Args:
        function: Calls the kernels.
        arguments: Arrays, or what stands for them.
        kernel: Name of the operation.
        **line: Further fields of the lines.
    """
    with triton_launch.record_launches(CAPABILITY) as launches:
        jax.eval_shape(function, *arguments)
        found = list(launches)
    return [
        Line(
            compiler="triton",
            kernel=f"{kernel}: {taken.name.strip('_')}",
            registers=taken.registers,
            spill_bytes=taken.stack_bytes,
            shared_memory=taken.shared_bytes,
            threads=taken.threads,
            **line,
        )
        for taken in (compile_launch(launch, CAPABILITY) for launch in found)
    ]


def measure(task: tuple[str, str, str]) -> list[Line]:
    """Compile what a task names; run in a process of its own, as compiling is single-threaded."""
    kind, name, dtype = task
    if kind == "operation":
        return measure_operation(name, dtype)
    build = all_builds()[name]
    if kind == "attention" and isinstance(build, Build):
        return measure_attention(build)
    return [measure_mosaic(build)]


def tasks(compiler: str) -> list[tuple[str, str, str]]:
    """Return what there is to compile: kind, name, dtype."""
    if compiler == "mosaic":
        return [("mosaic", name, "") for name in all_builds()]
    found = [("operation", name, d) for name in sorted(PLACES) for d in card_of(name).tolerances]
    return found + [("attention", build.name, "") for build in chosen_for_triton()]


def main() -> None:
    """Compile, and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("compiler", choices=("mosaic", "triton"))
    parser.add_argument("--only", default="", help="a word that kernel or configuration contains")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    chosen = [task for task in tasks(args.compiler) if args.only in " ".join(task)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for lines in pool.map(measure, chosen):
            for line in lines:
                print(json.dumps(dataclasses.asdict(line)), flush=True)
    if args.compiler == "triton":
        for name, build in all_builds().items():
            if args.only in name:
                print(json.dumps({"name": name, "backends": able_to_build(build)}))


if __name__ == "__main__":
    main()
