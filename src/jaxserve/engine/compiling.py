"""Compiled programs: one store per runner, filled at warm-up, and caches beyond.

What one runner compiled, the next one of this process finds ready if nothing about it differs; what
another process compiled is read from disk. The first saves tracing as well, which takes longer than
compiling where a model is small.
"""

import contextlib
import functools
import inspect
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.core.errors import JaxserveError

logger = logging.getLogger(__name__)


MOST_SHARED = 256
"""Programs that are kept for runners to come; a model has about as many as step shapes."""


class _SharedPrograms:
    """The programs of this process that any runner may take, those taken last at the end."""

    def __init__(self) -> None:
        self._programs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, identity: Hashable | None) -> Callable[..., Any] | None:
        if identity is None:
            return None
        with self._lock:
            program = self._programs.get(identity)
            if program is not None:
                self._programs.move_to_end(identity)
            return program

    def keep(self, identity: Hashable | None, program: Callable[..., Any]) -> None:
        if identity is None:
            return
        with self._lock:
            self._programs[identity] = program
            while len(self._programs) > MOST_SHARED:
                self._programs.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._programs.clear()


_shared = _SharedPrograms()


def forget_programs() -> None:
    """Drop the programs that are kept for runners to come, and with them their memory."""
    _shared.clear()


class LateCompileError(JaxserveError, RuntimeError):
    """A program was compiled after warm-up although that is forbidden."""


class Programs:
    """The compiled programs of a runner, each compiled once, by whichever thread needs it first.

    Args:
        matmul_precision: Precision of matrix products; "highest" for float32.
        on_compile: Called with the seconds of every compilation.
        cache_dir: Where compiled programs are kept between processes; None keeps none.
        forbid_late: Whether a compilation after warm-up is an error.
        shares: Whether function and arguments say everything about a program, so that runners of
            this process can share it.

    Attributes:
        is_sealed: Whether warm-up has ended: every program that can be needed is compiled.
        takes_larger: Whether work may run in a larger shape that is compiled already.
    """

    def __init__(
        self,
        *,
        matmul_precision: str,
        on_compile: Callable[[float], None],
        cache_dir: str | None,
        forbid_late: bool,
        shares: bool = True,
    ) -> None:
        """Compile nothing yet."""
        self.is_sealed = False
        self.takes_larger = False
        self._matmul_precision = matmul_precision
        self._on_compile = on_compile
        self._cache_dir = cache_dir
        self._forbid_late = forbid_late
        self._shares = shares
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._lock = threading.Lock()
        self._is_stopped = False

    def __contains__(self, key: Hashable) -> bool:
        """Tell whether a program is compiled."""
        return key in self._compiled

    def __len__(self) -> int:
        """Count the programs compiled so far."""
        return len(self._compiled)

    def get(
        self, key: Hashable, fn: Callable[..., Any], donate: Sequence[int], *args: object
    ) -> Callable[..., Any]:
        """Return a program; one that is new is compiled, or taken from another runner.

        Args:
            key: Its name.
            fn: What to compile.
            donate: Positions of the arguments that it may overwrite.
            *args: Its arguments, or descriptions of them.

        Raises:
            LateCompileError: If it is new after warm-up, and that is forbidden.
        """
        program = self._compiled.get(key)
        if program is not None:
            return program
        if self.is_sealed and self._forbid_late:
            raise LateCompileError(f"{key} would be compiled after warm-up.")
        with self._lock:
            program = self._compiled.get(key)
            if program is None:
                start = time.perf_counter()
                donated = tuple(donate)
                identity = None
                if self._shares:
                    identity = _identity(fn, args, (donated, self._matmul_precision))
                program = _shared.find(identity)
                if program is None:
                    with jax.default_matmul_precision(self._matmul_precision):
                        lowered = jax.jit(fn, donate_argnums=donated).lower(*args)
                    with persistent_cache(self._cache_dir):
                        program = lowered.compile()
                    _shared.keep(identity, program)
                self._compiled[key] = program
                took = time.perf_counter() - start
                self._on_compile(took)
                logger.debug("compiled %s in %.2f s", key, took)
        return program

    def warm_up(
        self,
        todo: Sequence[Callable[[], object]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compile every program, so that nothing is compiled later.

        Args:
            todo: Compiles one program each.
            on_progress: Called with (programs done, programs in all).
        """
        for index, compile_one in enumerate(todo):
            if self._is_stopped:
                return
            compile_one()
            if on_progress is not None:
                on_progress(index + 1, len(todo))
        self.is_sealed = True

    def stop(self) -> None:
        """Let a warm-up on another thread end after the program it is compiling."""
        self._is_stopped = True

    def clear(self) -> None:
        """Free the programs."""
        self._compiled.clear()


def _identity(fn: Callable[..., Any], args: tuple[object, ...], how: Hashable) -> Hashable | None:
    """Return what two programs are equal by; None if that cannot be told.

    Args:
        fn: A function of a module, or one with some arguments bound to hashable values.
        args: Its arguments, or descriptions of them.
        how: What else a program depends on.
    """
    bound: Hashable = ()
    if isinstance(fn, functools.partial):
        fn, bound = fn.func, (fn.args, tuple(sorted(fn.keywords.items())))
    # What a decorator wraps is as fixed as what it was made of.
    if not inspect.isfunction(fn) or inspect.unwrap(fn).__closure__:
        return None
    leaves, tree = jax.tree.flatten(args)
    if not all(hasattr(leaf, "sharding") for leaf in leaves):
        return None
    shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    identity = (fn, bound, tree, shapes, how, bool(jax.config.jax_enable_x64))
    try:
        hash(identity)
    except TypeError:
        return None
    return identity


@contextlib.contextmanager
def persistent_cache(directory: str | None) -> Generator[None]:
    """Keep what is compiled within this context, unless the user set up a cache of JAX's own.

    Args:
        directory: Where; None keeps nothing.
    """
    if directory is None or jax.config.jax_compilation_cache_dir:
        yield
        return
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (directory, 0.0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
