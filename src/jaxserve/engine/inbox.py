"""The way into an engine, for any thread: requests, cancellations, and calls between two steps."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from jaxserve.core.errors import CapacityError, EngineDeadError, RequestError
from jaxserve.core.event import TokenEvent
from jaxserve.core.request import Request
from jaxserve.engine.intake import Intake
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.slo import missed

Sink = Callable[[TokenEvent], None]
"""Where the events of one request go; called on the engine's thread, must not block."""


class Door(Protocol):
    """What takes requests and gives them back as events."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Accept a request, or refuse it at once; see `Inbox.submit`."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request; its completions finish with reason `abort`."""
        ...


PAUSED_RETRY_S = 5.0
"""Seconds after which to try again at an engine that takes nothing new for now."""


class Inbox:
    """What an engine has been asked for and has not taken up yet.

    Args:
        intake: Checks requests.
        metrics: Counters.
        max_num_queued_reqs: Most unfinished completions; None is no limit.

    Attributes:
        metrics: Counters.
        dead: Why the engine has stopped; None while it lives.
        refusal: Why new requests are refused for now; None takes them.
    """

    def __init__(
        self, intake: Intake, metrics: EngineMetrics, *, max_num_queued_reqs: int | None
    ) -> None:
        """Start open and empty."""
        self.metrics = metrics
        self.dead: str | None = None
        self.refusal: str | None = None
        self._intake = intake
        self._max_queued = max_num_queued_reqs
        self._inbox: deque[tuple[str, object]] = deque()
        self._admission = threading.Condition()
        self._num_open = 0

    @property
    def num_unfinished(self) -> int:
        """Completions that have been accepted and have not ended."""
        return self._num_open

    def submit(self, request: Request, sink: Sink) -> None:
        """Accept a request, or refuse it at once.

        Args:
            request: What to do.
            sink: Receives its events; the last one of every completion has a finish reason.

        Raises:
            RequestError: If it can never be served.
            CapacityError: If too many completions are under way.
            EngineDeadError: If the engine has stopped.
        """
        self._intake.check(request)
        count = request.sampling.n
        if self._max_queued is not None and count > self._max_queued:
            raise RequestError(
                f"n must be at most {self._max_queued}, the most completions that are accepted at "
                f"once (--max-num-queued-reqs), got {count}.",
                param="n",
            )
        with self._admission:
            if self.dead is not None:
                raise EngineDeadError(f"the engine has stopped: {self.dead}")
            if self.refusal is not None:
                self._count_refusal(request, "paused")
                raise CapacityError(self.refusal, retry_after_s=PAUSED_RETRY_S)
            if self._max_queued is not None and self._num_open + count > self._max_queued:
                self._count_refusal(request, "max_num_queued_reqs")
                raise CapacityError(
                    f"{self._num_open} completions are under way and at most {self._max_queued} "
                    f"are accepted; {count} more were asked for. Try again later.",
                    retry_after_s=self._retry_after(),
                )
            self._num_open += count
            self._inbox.append(("submit", (request, sink)))

    def _count_refusal(self, request: Request, reason: str) -> None:
        self.metrics.rejected(reason)
        if request.slo is not None:
            self.metrics.judged(request.slo.tier, missed(request.slo))

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no completion is under way; not on the engine's own thread.

        Args:
            timeout_s: Longest wait in seconds.

        Returns:
            Whether everything has ended.
        """
        with self._admission:
            return self._admission.wait_for(lambda: not self._num_open, timeout_s)

    def cancel(self, request_id: str) -> None:
        """Ask for a request to end; its completions finish with reason `abort`."""
        self._inbox.append(("cancel", request_id))

    def cancel_all(self) -> None:
        """Ask for every request to end."""
        self._inbox.append(("cancel_all", None))

    def forget_prefixes(self) -> None:
        """Ask for the prefix cache to be emptied."""
        self._inbox.append(("forget", None))

    def call[T](self, work: Callable[[], T], *, when_idle: bool = False) -> Future[T]:
        """Ask for something to be done on the engine's thread between two steps.

        No step is on the device meanwhile, and every token before it has been sent.

        Args:
            work: What to do; what it raises reaches the future only.
            when_idle: Whether to wait until no completion is under way.

        Returns:
            Its result; cannot be cancelled.

        Raises:
            EngineDeadError: If the engine has stopped.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  raised again by whoever waits
                future.set_exception(error)

        with self._admission:
            if self.dead is not None:
                raise EngineDeadError(f"the engine has stopped: {self.dead}")
            self._inbox.append(("call when idle" if when_idle else "call", run))
        return future

    def _close(self, count: int) -> None:
        """Take ended completions off the count of open ones."""
        with self._admission:
            self._num_open -= count
            if not self._num_open:
                self._admission.notify_all()

    def _retry_after(self) -> float:
        done = self.metrics.e2e_latency
        return max(1.0, round(done.mean, 0)) if done.count else 1.0
