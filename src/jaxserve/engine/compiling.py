"""Where compiled programs are kept between processes."""

import contextlib
from collections.abc import Generator

import jax
from jax.experimental.compilation_cache import compilation_cache


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
