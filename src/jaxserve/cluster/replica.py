"""What a fleet needs of a replica, whether it is a thread of this process or an actor elsewhere."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from jaxserve.core.request import Request
from jaxserve.engine.engine import EngineReport
from jaxserve.engine.inbox import Sink
from jaxserve.engine.metrics import EngineMetrics


class Replica(Protocol):
    """One engine that serves.

    Whatever happens to it, each completion of each request that `submit` has taken gets a last
    event: its own, or one with finish reason `error`, from whichever thread finds out.
    """

    @property
    def failure(self) -> str | None:
        """Why it has stopped; None while it lives."""
        ...

    @property
    def metrics(self) -> EngineMetrics:
        """Its counters, as far as they are known here."""
        ...

    def report(self) -> EngineReport:
        """Tell what it was doing when it was last heard of; does not wait."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a request over; see `Inbox.submit`."""
        ...

    def cancel(self, request_id: str) -> None:
        """End a request; its completions finish with reason `abort`."""
        ...

    def control(self, verb: str, *args: object, **options: object) -> "Future[Any]":
        """Pull one of its levers: a method of `Levers`, or of `AbstractHost`.

        Args:
            verb: Name of the method.
            *args: Its arguments.
            **options: Its keyword arguments.

        Returns:
            What the method returns, or what its future does.
        """
        ...

    def close(self) -> None:
        """Abort what is under way and free memory; harmless if that has happened, or it is dead."""
        ...


type ReplicaMaker = Callable[[int], Replica]
"""Starts the replica of a number, warm and ready; takes its time, and raises if that fails."""
