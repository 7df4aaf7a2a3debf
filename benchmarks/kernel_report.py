"""What every Mosaic kernel takes in every configuration, from the compiler; no GPU is needed.

    python -m benchmarks.kernel_report [--only WORD] [--jobs 2] [--out FILE]

Registers, spills and shared memory are the assembler's for Hopper; bytes and operations are those
that an example step must move and do. JAX's CUDA plugin is needed: where it is missing, the
environment of `make test-aot` is used.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.kernel_builds import Build, tuned, varied
from benchmarks.record import table
from jaxserve.pallas_kernels.attention.backends import BACKENDS, Case, load
from jaxserve.pallas_kernels.testing import Resources, compile_for, gpu_target

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = ROOT / "tests" / "kernels" / "h200.txtpb"
REQUESTS = 64
"""Requests of the example step."""
KEYS = 4096
"""Keys of each of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One kernel in one configuration.

    Attributes:
        kernel: Its name.
        configuration: What it was built for.
        resources: What it takes; None if it does not compile.
        num_bytes: Bytes that the example step must move.
        num_flops: Operations that it must do.
        backends: Backends that can do the same on an H200.
    """

    kernel: str
    configuration: str
    resources: Resources | None
    num_bytes: int
    num_flops: int
    backends: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing spills."""
        return self.resources is not None and self.resources.spill_stores == 0


def builds() -> list[Build]:
    """Return everything that is reported."""
    return [*tuned(), *varied()]


def measure(index: int) -> Line:
    """Compile one of `builds`; run in a process of its own, as compiling is single-threaded."""
    build = builds()[index]
    try:
        (resources,) = compile_for(
            gpu_target(DESCRIPTION.read_text()), build.function, *build.arguments
        )
    except ValueError as error:  # what the compiler says of tiles that do not fit
        print(f"{build.name}: {error}", file=sys.stderr)
        resources = None
    return Line(
        kernel=build.kernel,
        configuration=build.configuration,
        resources=resources,
        num_bytes=num_bytes(build),
        num_flops=num_flops(build),
        backends=able(build),
    )


def example_tokens(build: Build) -> int:
    """Return the query tokens per request of the example step."""
    return build.spec.max_tokens // REQUESTS


def num_bytes(build: Build) -> int:
    """Return the bytes of queries, keys, values and outputs of the example step."""
    spec = build.spec
    q_size = 2
    kv_size = 1 if spec.kv_dtype == "float8_e4m3fn" else 2
    rows = REQUESTS * example_tokens(build) * spec.q_heads
    keys = min(KEYS, spec.window + example_tokens(build)) if spec.window else KEYS
    kept = REQUESTS * keys * spec.kv_heads
    dims = spec.head_dim + spec.v_dim
    return rows * dims * q_size + kept * dims * kv_size


def num_flops(build: Build) -> int:
    """Return the operations of both products of the example step."""
    spec = build.spec
    keys = min(KEYS, spec.window) if spec.window else KEYS
    rows = REQUESTS * example_tokens(build) * spec.q_heads
    return 2 * rows * keys * (spec.head_dim + spec.v_dim)


def able(build: Build) -> tuple[str, ...]:
    """Return the backends that say they can do this on an H200."""
    _, kv, _, _ = build.arguments
    kind = "none" if kv.k_scale is None else ("head" if len(kv.k_scale.shape) == 1 else "page")
    case = Case(
        spec=build.spec,
        variant=build.variant,
        platform="gpu",
        capability="9.0",
        k_scale=kind,
        v_scale=kind,
    )
    found = [(name, load(name)) for name in BACKENDS]
    return tuple(n for n, backend in found if backend and backend.supports(case) is None)


def report(lines: list[Line]) -> str:
    """Return the table, and a line that says whether all is well."""
    rows = []
    for line in lines:
        taken = line.resources
        numbers = ["-"] * 4
        if taken is not None:
            numbers = [
                str(taken.registers),
                str(taken.spill_stores + taken.spill_loads),
                f"{taken.shared_memory:,}",
                str(taken.ctas_per_multiprocessor),
            ]
        work = [f"{line.num_bytes / 1e6:,.1f}", f"{line.num_flops / 1e9:,.1f}"]
        rows.append([line.kernel, line.configuration, *numbers, *work, " ".join(line.backends)])
    head = [
        "kernel",
        "configuration",
        "registers",
        "spill bytes",
        "shared memory",
        "CTAs per SM",
        "MB",
        "GFLOP",
        "backends",
    ]
    bad = [line for line in lines if not line.is_good]
    verdict = f"{len(lines)} configurations, {len(bad)} that spill or do not compile"
    example = f"MB and GFLOP are those of {REQUESTS} requests with {KEYS} keys each."
    return "\n".join([table(head, rows), "", example, verdict])


def main() -> None:
    """Compile, print the table, and fail if something spills."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="a word that kernel or configuration contains")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, help="where to write the table as well")
    args = parser.parse_args()
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        sys.exit(_elsewhere())
    chosen = [i for i, build in enumerate(builds()) if args.only in build.name]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        lines = list(pool.map(measure, chosen))
    text = report(lines)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    sys.exit(0 if all(line.is_good for line in lines) else 1)


def _elsewhere() -> int:
    """Run in the environment that can compile."""
    python = ROOT / ".venv-aot" / "bin" / "python"
    if not python.exists():
        print(
            f"compiling for a GPU needs JAX's CUDA plugin, and {python} is not there; "
            "run `make test-aot` first.",
            file=sys.stderr,
        )
        return 1
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [python, "-m", "benchmarks.kernel_report", *sys.argv[1:]]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    main()
