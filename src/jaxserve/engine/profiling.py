"""Traces of what host and device do, written by JAX's profiler into a folder."""

import tempfile
import threading
from pathlib import Path

import jax

from jaxserve.core.errors import RequestError

_CONFLICT = 409


class Profiler:
    """Records at most one trace at a time; JAX has one profiler per process."""

    def __init__(self) -> None:
        """Start idle."""
        self._lock = threading.Lock()
        self._folder: Path | None = None

    @property
    def is_active(self) -> bool:
        """Whether a trace is being recorded."""
        return self._folder is not None

    def start(self, folder: Path | str | None = None) -> Path:
        """Begin a trace.

        Args:
            folder: Where it goes; None makes a new folder for temporary files.

        Returns:
            The folder.

        Raises:
            RequestError: With status 409, if a trace is being recorded already.
        """
        with self._lock:
            if self._folder is not None:
                raise RequestError("a profile is being recorded; stop it first.", status=_CONFLICT)
            place = Path(folder or tempfile.mkdtemp(prefix="jaxserve-profile-"))
            try:
                jax.profiler.start_trace(str(place))
            except RuntimeError as error:  # somebody else in this process profiles
                raise RequestError(
                    f"a profile cannot be started: {error}", status=_CONFLICT
                ) from error
            self._folder = place
            return place

    def stop(self) -> Path:
        """End the trace and write it.

        Returns:
            The folder.

        Raises:
            RequestError: With status 409, if no trace is being recorded.
        """
        with self._lock:
            if self._folder is None:
                raise RequestError("no profile is being recorded.", status=_CONFLICT)
            folder, self._folder = self._folder, None
            jax.profiler.stop_trace()
            return folder
