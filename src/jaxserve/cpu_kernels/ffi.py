"""Turns a kernel into a target that XLA calls: the call frame, and work shared among threads.

The offsets are those of the structures in `xla/ffi/api/c_api.h`, which ships with jaxlib and is
kept compatible within one major version.
"""

import ctypes
import functools
import logging
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from llvmlite import binding, ir

from jaxserve.cpu_kernels.emit import I32, I64, POINTER, VOID, Emitter, Value, const

logger = logging.getLogger(__name__)

_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT, _FRAME_STAGE = 8, 16, 24, 32
_FRAME_ARGS, _FRAME_RETS = 72, 112
_BUFFER_DATA, _BUFFER_DIMS = 24, 40
_API_VERSION_MAJOR, _API_SCHEDULE, _API_NUM_THREADS = 32, 136, 144
_EXTENSION_METADATA = 24
_METADATA_MAJOR, _METADATA_TRAITS, _METADATA_STATE = 24, 32, 40
_STAGE_EXECUTE = 3
_SCHEDULE_BYTES, _NUM_THREADS_BYTES = 40, 32

_PATIENCE = 4096
"""Looks at a counter before the processor is offered to others: some microseconds; a power of 2."""

_NEXT, _DONE, _REFERENCES, _TOTAL, _WORDS = 0, 64, 128, 136, 192
"""Offsets in the shared record; the two counters that threads fight for have lines of their own."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """What kernels need to know of the processor.

    Attributes:
        width: Lanes of a vector register of float32.
        registers: Vector registers.
        has_float16: Whether instructions turn float16 into float32.
    """

    width: int
    registers: int
    has_float16: bool


@functools.cache
def host() -> Cpu:
    """Look at this machine's processor."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return Cpu(width=16, registers=32, has_float16=True)
    if features.get("avx2") and features.get("fma"):
        return Cpu(width=8, registers=16, has_float16=bool(features.get("f16c")))
    is_arm = binding.get_process_triple().startswith(("aarch64", "arm64"))
    return Cpu(width=4, registers=32, has_float16=is_arm)


@functools.cache
def is_supported() -> bool:
    """Tell whether this jaxlib speaks the interface described above, and LLVM can compile here."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError:
        return False
    major = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", text)
    return major is not None and major.group(1) == "0" and _can_compile()


def _can_compile() -> bool:
    """Try it: some systems let no program write code that it then runs."""
    module = ir.Module("probe")
    function = ir.Function(module, ir.FunctionType(VOID, []), "probe")
    Emitter(function, 1).b.ret_void()
    try:
        ctypes.CFUNCTYPE(None)(_compile(module).get_function_address("probe"))
    except (OSError, RuntimeError) as error:
        logger.warning("LLVM cannot compile here, so the CPU runs on XLA alone: %s", error)
        return False
    return True


_NumChunks = Callable[[Emitter, Sequence[Value], Value], Value]
_Chunk = Callable[[Emitter, Sequence[Value], Sequence[Value], Value, Value], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Chunks that need what all chunks before them have written; see `Kernel`."""

    num_chunks: _NumChunks
    chunk: _Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel whose work falls into independent chunks.

    Attributes:
        name: Unique name of the target.
        num_args: Inputs.
        num_rets: Outputs.
        dims: Which sizes it needs: (index of the input, axis).
        num_chunks: Emits the number of chunks, from the sizes and the number of threads.
        chunk: Emits the work of one chunk: given the emitter, the addresses of inputs and outputs,
            the sizes, the chunk's index and the number of chunks.
        later: Stages that follow, in their order.
    """

    name: str
    num_args: int
    num_rets: int
    dims: Sequence[tuple[int, int]]
    num_chunks: _NumChunks
    chunk: _Chunk
    later: Sequence[Stage] = ()

    @property
    def stages(self) -> Sequence[Stage]:
        """All stages."""
        return [Stage(num_chunks=self.num_chunks, chunk=self.chunk), *self.later]


_loaded: dict[str, object] = {}
_lock = threading.Lock()


def register(name: str, make: Callable[[], Kernel]) -> None:
    """Compile a kernel and make it known to XLA, once per process.

    Args:
        name: Name of the target.
        make: Builds the kernel.
    """
    with _lock:
        if name in _loaded:
            return
        kernel = make()
        module = ir.Module(name)
        _build(module, kernel, host().width)
        engine = _compile(module)
        address = engine.get_function_address("handler")
        handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
        _loaded[name] = (engine, handler)


@functools.cache
def _target_machine() -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


def _compile(module: ir.Module) -> binding.ExecutionEngine:
    machine = _target_machine()
    module.triple = machine.triple
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(
        machine, binding.create_pipeline_tuning_options(speed_level=3)
    )
    passes.getModulePassManager().run(parsed, passes)
    # The engine takes its machine over, so each one gets its own.
    _target_machine.cache_clear()
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


def _build(module: ir.Module, kernel: Kernel, width: int) -> None:
    num_words = kernel.num_args + kernel.num_rets + len(kernel.dims)
    chunks = [
        _build_chunk(module, kernel, stage, f"chunk{i}", width)
        for i, stage in enumerate(kernel.stages)
    ]
    work = _build_work(module, chunks, num_words, width)
    task = _build_task(module, work, width)
    _build_handler(module, kernel, work, task, num_words, width)


def _build_chunk(
    module: ir.Module, kernel: Kernel, stage: Stage, name: str, width: int
) -> ir.Function:
    function = ir.Function(module, ir.FunctionType(VOID, [POINTER, I64, I64]), name)
    function.linkage = "internal"
    e = Emitter(function, width)
    state, index, total = function.args
    num_buffers = kernel.num_args + kernel.num_rets
    buffers = [e.word(state, _WORDS + 8 * i, POINTER) for i in range(num_buffers)]
    sizes = [e.word(state, _WORDS + 8 * (num_buffers + i)) for i in range(len(kernel.dims))]
    stage.chunk(e, buffers, sizes, index, total)
    e.b.ret_void()
    return function


def _build_work(
    module: ir.Module, chunks: Sequence[ir.Function], num_words: int, width: int
) -> ir.Function:
    """Claim chunks until none is left; a thread that comes late finds none and touches nothing.

    Who claims a chunk of a later stage waits for the stages before it: their chunks have been
    claimed by threads that run.
    """
    function = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "work")
    e = Emitter(function, width)
    (state,) = function.args
    b = e.b
    head, body, end = (b.append_basic_block(name) for name in ("claim", "do", "end"))
    total = e.word(state, _TOTAL)
    b.branch(head)
    b.position_at_end(head)
    index = b.atomic_rmw("add", e.field(state, _NEXT), const(1), "acq_rel")
    b.cbranch(b.icmp_signed("<", index, total), body, end)
    b.position_at_end(body)
    finished, first = b.append_basic_block("finished"), const(0)
    for i, chunk in enumerate(chunks):
        after = e.word(state, _WORDS + 8 * (num_words + i))
        own, other = b.append_basic_block("own"), b.append_basic_block("other")
        b.cbranch(b.icmp_signed("<", index, after), own, other)
        b.position_at_end(own)
        if i:
            _emit_wait(e, state, first)
        b.call(chunk, [state, b.sub(index, first), b.sub(after, first)])
        b.branch(finished)
        b.position_at_end(other)
        first = after
    b.branch(finished)
    b.position_at_end(finished)
    b.atomic_rmw("add", e.field(state, _DONE), const(1), "acq_rel")
    b.branch(head)
    b.position_at_end(end)
    b.ret_void()
    return function


def _emit_release(e: Emitter, state: Value) -> None:
    b = e.b
    left = b.atomic_rmw("sub", e.field(state, _REFERENCES), const(1), "acq_rel")
    with b.if_then(b.icmp_signed("==", left, const(1))):
        b.call(libc(e, "free", VOID, [POINTER]), [state])


def libc(e: Emitter, name: str, result: Value, kinds: Sequence[Value]) -> ir.Function:
    """Declare a function of the C library."""
    module = e.function.module
    found = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, list(kinds)), name)


def _build_task(module: ir.Module, work: ir.Function, width: int) -> ir.Function:
    function = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "task")
    e = Emitter(function, width)
    (state,) = function.args
    e.b.call(work, [state])
    _emit_release(e, state)
    e.b.ret_void()
    return function


def _build_handler(
    module: ir.Module,
    kernel: Kernel,
    work: ir.Function,
    task: ir.Function,
    num_words: int,
    width: int,
) -> None:
    """Build what XLA calls; behind the words of buffers and sizes lie the ends of the stages."""
    function = ir.Function(module, ir.FunctionType(POINTER, [POINTER]), "handler")
    e = Emitter(function, width)
    b = e.b
    (frame,) = function.args
    nothing = ir.Constant(POINTER, None)
    extension = e.word(frame, _FRAME_EXTENSION, POINTER)
    with b.if_then(b.icmp_unsigned("!=", extension, nothing)):
        _emit_metadata(e, frame, extension)
        b.ret(nothing)
    is_other = b.icmp_signed(
        "!=", e.word(frame, _FRAME_STAGE, I32), ir.Constant(I32, _STAGE_EXECUTE)
    )
    with b.if_then(is_other):
        b.ret(nothing)
    size = const(_WORDS + 8 * (num_words + len(kernel.stages)))
    state = b.call(libc(e, "malloc", POINTER, [I64]), [size])
    values = _frame_words(e, kernel, frame)
    for i, value in enumerate(values):
        b.store(value, e.field(state, _WORDS + 8 * i))
    sizes = values[kernel.num_args + kernel.num_rets :]
    api, context = e.word(frame, _FRAME_API, POINTER), e.word(frame, _FRAME_CONTEXT, POINTER)
    threads = _emit_num_threads(e, api, context)
    total = const(0)
    for i, stage in enumerate(kernel.stages):
        total = b.add(total, stage.num_chunks(e, sizes, threads))
        b.store(total, e.field(state, _WORDS + 8 * (num_words + i)))
    for offset in (_NEXT, _DONE):
        b.store(const(0), e.field(state, offset))
    b.store(total, e.field(state, _TOTAL))
    helpers = b.sub(e.minimum(threads, total), const(1))
    b.store(b.add(helpers, const(1)), e.field(state, _REFERENCES))
    with e.loop(const(0), helpers, const(1)):
        _emit_schedule(e, api, context, task, state)
    b.call(work, [state])
    _emit_wait(e, state, total)
    _emit_release(e, state)
    b.ret(nothing)


def _emit_metadata(e: Emitter, frame: Value, extension: Value) -> None:
    """Answer XLA's question at registration: which interface version, no traits, no state."""
    b = e.b
    api = e.word(frame, _FRAME_API, POINTER)
    metadata = e.word(extension, _EXTENSION_METADATA, POINTER)
    version = e.word(api, _API_VERSION_MAJOR)  # major and minor number in one word
    b.store(version, e.field(metadata, _METADATA_MAJOR))
    b.store(ir.Constant(I32, 0), e.field(metadata, _METADATA_TRAITS))
    b.store(const(0), e.field(metadata, _METADATA_STATE))


def _frame_words(e: Emitter, kernel: Kernel, frame: Value) -> list[Value]:
    def buffer(base: int, index: int) -> Value:
        return e.word(e.word(frame, base, POINTER), 8 * index, POINTER)

    args = [buffer(_FRAME_ARGS, i) for i in range(kernel.num_args)]
    rets = [buffer(_FRAME_RETS, i) for i in range(kernel.num_rets)]
    data = [e.word(each, _BUFFER_DATA, POINTER) for each in (*args, *rets)]
    sizes = [
        e.word(e.word(args[index], _BUFFER_DIMS, POINTER), 8 * axis) for index, axis in kernel.dims
    ]
    return [*data, *sizes]


def _emit_num_threads(e: Emitter, api: Value, context: Value) -> Value:
    b = e.b
    count = e.variable(I64, const(1))
    request = e.array(I64, _NUM_THREADS_BYTES // 8)
    b.store(const(_NUM_THREADS_BYTES), request)
    b.store(const(0), e.field(request, 8))
    b.store(context, e.field(request, 16))
    b.store(count, e.field(request, 24))
    ask = e.word(api, _API_NUM_THREADS)
    _call(b, ask, [request])
    return b.load(count, typ=I64)


def _emit_schedule(e: Emitter, api: Value, context: Value, task: ir.Function, state: Value) -> None:
    b = e.b
    request = e.array(I64, _SCHEDULE_BYTES // 8)
    b.store(const(_SCHEDULE_BYTES), request)
    b.store(const(0), e.field(request, 8))
    b.store(context, e.field(request, 16))
    b.store(task, e.field(request, 24))
    b.store(state, e.field(request, 32))
    schedule = e.word(api, _API_SCHEDULE)
    failed = _call(b, schedule, [request])
    # Without a pool the caller does everything itself.
    with b.if_then(b.icmp_unsigned("!=", failed, ir.Constant(POINTER, None))):
        _emit_release(e, state)


def _call(b: ir.IRBuilder, address: Value, arguments: list[Value]) -> Value:
    """Call a function of the interface: one structure in, an error or nothing out."""
    kind = ir.FunctionType(POINTER, [POINTER])
    return b.call(b.inttoptr(address, ir.PointerType(kind)), arguments)


def _emit_wait(e: Emitter, state: Value, total: Value) -> None:
    """Wait until so many chunks are done; on a busy machine others get the processor meanwhile."""
    b = e.b
    spins = e.variable(I64, const(0))
    head, spin, end = (b.append_basic_block(name) for name in ("wait", "spin", "done"))
    b.branch(head)
    b.position_at_end(head)
    done = b.load_atomic(e.field(state, _DONE), "acquire", 8, typ=I64)
    b.cbranch(b.icmp_signed("<", done, total), spin, end)
    b.position_at_end(spin)
    count = b.add(b.load(spins, typ=I64), const(1))
    b.store(count, spins)
    if sys.platform != "win32":
        is_long = b.icmp_signed("==", b.and_(count, const(_PATIENCE - 1)), const(0))
        with b.if_then(is_long):
            b.call(libc(e, "sched_yield", I32, []), [])
    b.branch(head)
    b.position_at_end(end)
