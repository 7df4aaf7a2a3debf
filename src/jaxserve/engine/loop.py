"""The thread on which an engine runs."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from jaxserve.core.errors import EngineDeadError
from jaxserve.core.request import Request
from jaxserve.engine.engine import Engine
from jaxserve.engine.inbox import Sink

logger = logging.getLogger(__name__)

_IDLE_TURN_S = 0.001


class EngineThread:
    """Turns an engine as long as it has work; sleeps otherwise.

    Args:
        engine: Stepped by this thread alone.
    """

    def __init__(self, engine: Engine) -> None:
        """Start the thread."""
        self.engine = engine
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a request over; see `Engine.submit`."""
        if self._is_closing:
            raise EngineDeadError("the engine has been closed.")
        self.engine.submit(request, sink)
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """End a request."""
        self.engine.cancel(request_id)
        self._wake.set()

    def call[T](self, work: Callable[[], T], *, when_idle: bool = False) -> Future[T]:
        """Do something between two steps; see `Engine.call`."""
        if self._is_closing:
            raise EngineDeadError("the engine has been closed.")
        future = self.engine.call(work, when_idle=when_idle)
        self._wake.set()
        return future

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do.

        Args:
            timeout_s: Longest wait in seconds.

        Returns:
            Whether everything has ended.
        """
        return self.engine.wait_idle(timeout_s)

    def close(self) -> None:
        """Abort what is under way and stop the thread."""
        if self._is_closing:
            return
        self._is_closing = True
        if self.engine.dead is None:  # else its requests are about to end with the reason
            self.engine.cancel_all()
        self._wake.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            self._turn()
        except BaseException as error:
            # Nothing that a request causes gets here. Whatever does must not leave anyone waiting.
            logger.exception("the engine's loop has ended")
            self.engine.stop(f"its loop has ended: {type(error).__name__}: {error}")

    def _turn(self) -> None:
        engine = self.engine
        while True:
            if not engine.has_work:
                if self._is_closing:
                    engine.stop("it has been closed")
                    return
                self._wake.wait()
                self._wake.clear()
                continue
            before = engine.metrics.num_steps
            engine.step()
            if engine.dead is not None:
                logger.error("engine stopped: %s", engine.dead)
                return
            if engine.metrics.num_steps == before and not engine.is_busy:
                # Work that cannot move yet, such as a request that waits for memory.
                self._wake.wait(_IDLE_TURN_S)
