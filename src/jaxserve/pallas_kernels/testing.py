"""Proof of Mosaic GPU kernels without a GPU: interpreted with race detection, and compiled.

Neither is enough alone. The interpreter knows barriers and copies but no register layouts, so a
kernel that passes may still not compile; the compiler knows nothing of races. This module is the
only user of JAX's internals: whether races were found, and what the assembler reported, have no
public name.
"""

import collections
import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # noqa: TID251
from jax._src.pallas.mosaic_gpu.interpret import (  # noqa: TID251
    interpret_pallas_call as internals,
)
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.core.errors import UnsupportedError

ASYNCHRONOUS_CLOCKS = 512
"""Clocks that copies and products take in turn.

Two that are in flight on one clock pass for ordered, which hides races. The most are in flight
where tokens are gathered one by one: 128 copies for each stage of keys and values.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Interpreted[T]:
    """What came of an interpreted call.

    Attributes:
        value: The function's result.
        races_found: Whether two accesses to one place, one of them a write, were unordered; of
            the last kernel, if the function runs several. None if nobody looked.
    """

    value: T
    races_found: bool | None


def interpret[T](
    function: Callable[..., T], *args: object, detect_races: bool = True
) -> Interpreted[T]:
    """Run a function whose Mosaic GPU kernels are interpreted on the CPU.

    Interpreting is slow, seconds for a few hundred keys.

    Args:
        function: Anything that calls kernels; it is compiled anew.
        *args: Its arguments.
        detect_races: Whether to look for races.
    """
    params = plgpu.InterpretGPUParams(
        detect_races=detect_races, num_tma_threads_per_device=ASYNCHRONOUS_CLOCKS
    )
    if hasattr(params, "on_race"):  # from JAX 0.12 on; a race would raise, but the caller decides
        params = dataclasses.replace(params, on_race="warn")
    try:
        with plgpu.force_gpu_interpret_mode(params), _operands_checked():
            value = jax.block_until_ready(_fresh(function)(*args))
        races = internals.get_races().races_found if detect_races else None
    finally:
        # An interpreter that failed remembers its threads and barriers.
        internals.reset_gpu_interpret_mode_state()
    return Interpreted(value=value, races_found=races)


@contextlib.contextmanager
def _operands_checked() -> Generator[None]:
    """Have operands that Hopper's matrix unit reads from shared memory checked for races.

    JAX's interpreter checks those of Blackwell's only. As there, a product sees what was committed,
    and is asynchronous: it reads at an instant of its own, which its thread knows to have passed
    only when it takes the accumulator.
    """
    multiply, take = gpu_callbacks.wgmma, gpu_callbacks.wgmma_accumulator_deref
    running: dict[Any, collections.deque[Any]] = collections.defaultdict(collections.deque)

    def checked_multiply(**arguments: Any) -> Any:  # noqa: ANN401
        memory = gpu_callbacks._get_shared_memory()  # noqa: SLF001
        if memory.detect_races:
            thread = arguments["thread"]
            clock = memory.incr_clock(thread)
            clock.inc(memory.get_next_tma_thread_id())
            running[thread].append(clock)
            for name in ("a", "b"):
                key = cast("Any", gpu_callbacks).HostAllocationKey.from_array(
                    arguments[f"{name}_allocation_key_as_array"]
                )
                transforms = gpu_callbacks._remove_noop_transforms(  # noqa: SLF001
                    arguments[f"{name}_transforms"]
                )
                access = memory.access(key, jax.tree.map(int, transforms))
                gpu_callbacks.get_races().check_read(
                    thread, clock.async_smem_clock, key, access, arguments["source_info"]
                )
        return multiply(**arguments)

    def checked_take(**arguments: Any) -> Any:  # noqa: ANN401
        memory = gpu_callbacks._get_shared_memory()  # noqa: SLF001
        if memory.detect_races and arguments["wait_n"] is not None:  # None: nothing is waited for
            thread = arguments["thread"]
            memory.incr_clock(thread)
            with memory.lock:
                while len(running[thread]) > arguments["wait_n"]:
                    memory.clocks[thread].update(running[thread].popleft())
        return take(**arguments)

    gpu_callbacks.wgmma = gpu_callbacks.fail_on_exception(checked_multiply)
    gpu_callbacks.wgmma_accumulator_deref = gpu_callbacks.fail_on_exception(checked_take)
    try:
        yield
    finally:
        gpu_callbacks.wgmma, gpu_callbacks.wgmma_accumulator_deref = multiply, take


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the assembler and the launch say of one compiled kernel.

    Attributes:
        registers: Registers per thread.
        stack: Bytes of stack per thread.
        spill_stores: Bytes per thread written because registers ran out.
        spill_loads: Bytes per thread read back.
        shared_memory: Bytes of shared memory per CTA.
        threads: Threads per CTA.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    threads: int

    @property
    def ctas_per_multiprocessor(self) -> int:
        """CTAs that fit a Hopper multiprocessor: 64 Ki registers, 228 KiB, 2048 threads."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(
            65_536 // registers, 233_472 // (self.shared_memory + 1024), 2048 // self.threads
        )


def gpu_target(description: str) -> jax.sharding.Sharding:
    """Return where to place arguments of what is compiled for a GPU that need not be there.

    Args:
        description: XLA's text description of a GPU.

    Raises:
        UnsupportedError: If JAX's CUDA plugin is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=description
        )
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedError(
            f"compiling for a GPU needs JAX's CUDA plugin ({error}); run in the environment that "
            "`make test-aot` makes."
        ) from error
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compile_for(
    target: jax.sharding.Sharding, function: Callable[..., object], *args: object
) -> tuple[Resources, ...]:
    """Compile a function for a GPU that need not be there.

    Args:
        target: From `gpu_target`.
        function: What to compile; it is traced anew.
        *args: Arguments, or trees of shapes and dtypes that stand for them.

    Returns:
        One record for each Mosaic GPU kernel of the function, in the order of compilation.
    """
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target), args
    )
    with _dump() as folder:
        _fresh(function).lower(*shapes).compile()
        # The two kinds of files are numbered apart, so a failed compilation shifts their numbers.
        reports = zip(
            sorted(folder.glob("*.ptxas"), key=_number),
            sorted(folder.glob("*.after_layout_inference.txt"), key=_number),
            strict=True,
        )
        return tuple(_read(*files) for files in reports)


def _fresh(function: Callable[..., object]) -> Any:  # noqa: ANN401  a jitted function
    """Jit a function so that no program from before is taken, traced under other settings."""

    def anew(*args: object) -> object:
        return function(*args)

    return jax.jit(anew)


@contextlib.contextmanager
def _dump() -> Generator[Path]:
    """Have the compiler write its reports to a folder of its own."""
    names = ("MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_DUMP_PTXAS")
    before = {name: os.environ.get(name) for name in names}
    cached = jax.config.jax_enable_compilation_cache
    # A program from the cache would write no report. JAX remembers whether it uses one.
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    compilation_cache.reset_cache()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(zip(names, (folder, "1"), strict=True))
        try:
            yield Path(folder)
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
            compilation_cache.reset_cache()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _number(path: Path) -> int:
    """Return the number that a dumped file's name ends with; the first one has none."""
    found = re.search(r"_(\d+)$", path.name.partition(".")[0])
    return int(found.group(1)) if found else -1


def _read(report: Path, layouts: Path) -> Resources:
    text, module = report.read_text(), layouts.read_text()

    def number(pattern: str, where: str) -> int:
        found = re.search(pattern, where)
        if found is None:
            raise RuntimeError(
                f"no {pattern!r} in the compiler's report {report.name}; this version of JAX "
                "writes another form, so teach jaxserve.pallas_kernels.testing to read it."
            )
        return int(found.group(1))

    return Resources(
        registers=number(r"Used (\d+) registers", text),
        stack=number(r"(\d+) bytes stack frame", text),
        spill_stores=number(r"(\d+) bytes spill stores", text),
        spill_loads=number(r"(\d+) bytes spill loads", text),
        shared_memory=number(r"dynamic_shared_memory_size %c(\d+)_i32", module),
        threads=number(r"threads\([^)]*\) in \(%\w+ = %c(\d+)", module),
    )
