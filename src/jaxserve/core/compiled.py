"""The door to numba, which compiles loops on the host.

Without numba the loops run as they stand: the same results, slowly.

What was compiled is kept beside the source and is made anew when that source changes; numba does
not notice when only a function changes that it calls in another file. After such a change remove
the `.nbi` files in `__pycache__`.
"""

import logging
from collections.abc import Callable
from typing import Any, cast

try:
    import numba
except ImportError:
    numba = None
    logging.getLogger(__name__).warning(
        "numba is not installed, so plans of attention take milliseconds and simulated fleets "
        "hours; install numba."
    )

is_compiled = numba is not None and not cast("Any", numba).config.DISABLE_JIT
"""Whether loops are compiled here; numba's own NUMBA_DISABLE_JIT turns that off."""


def compiled[F: Callable[..., Any]](function: F) -> F:
    """Compile a function at its first call; what was compiled is kept on disk where that can be."""
    return _jit(function)


def inlined[F: Callable[..., Any]](function: F) -> F:
    """Compile a function into its callers; for what is called in one place.

    Each compiled function is compiled again as a part of whoever calls it, so that deep towers of
    calls take minutes.
    """
    return _jit(function, inline="always")


def lean[F: Callable[..., Any]](function: F) -> F:
    """Compile a function that makes no arrays and calls none that does.

    Nobody then counts references to the arrays that it is handed, which would take half the time of
    small functions that call each other.
    """
    return _jit(function, _nrt=False)


def _jit[F: Callable[..., Any]](function: F, **options: object) -> F:
    if numba is None:
        return function
    jit = cast("Any", numba).njit
    try:
        return jit(function, cache=True, nogil=True, **options)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return jit(function, nogil=True, **options)
