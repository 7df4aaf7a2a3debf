"""Compiled programs: one store per runner, filled at warm-up, and a cache between processes."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.core.errors import JaxserveError

logger = logging.getLogger(__name__)


class LateCompileError(JaxserveError, RuntimeError):
    """A program was compiled after warm-up although that is forbidden."""


class Programs:
    """The compiled programs of a runner, each compiled once, by whichever thread needs it first.

    Args:
        matmul_precision: Precision of matrix products; "highest" for float32.
        on_compile: Called with the seconds of every compilation.
        cache_dir: Where compiled programs are kept between processes; None keeps none.
        forbid_late: Whether a compilation after warm-up is an error.

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
    ) -> None:
        """Compile nothing yet."""
        self.is_sealed = False
        self.takes_larger = False
        self._matmul_precision = matmul_precision
        self._on_compile = on_compile
        self._cache_dir = cache_dir
        self._forbid_late = forbid_late
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
        """Return a program, compiling it if it is new.

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
                with jax.default_matmul_precision(self._matmul_precision):
                    lowered = jax.jit(fn, donate_argnums=tuple(donate)).lower(*args)
                with persistent_cache(self._cache_dir):
                    program = lowered.compile()
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
