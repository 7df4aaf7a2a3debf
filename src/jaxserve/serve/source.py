"""The events of one request, from the engine to whoever answers it."""

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from jaxserve.core.event import TokenEvent
from jaxserve.core.request import Request

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncLLM


class EventSource(AsyncIterator[TokenEvent]):
    """Submits a request at once, and yields its events.

    Not a generator: closing it before anybody has read from it must still free the pages.

    Args:
        engine: Where the request goes.
        request: What to do.
        on_end: Called once, when the request has ended or was given up.

    Raises:
        RequestError: If the request can never be served.
        CapacityError: If too many completions are under way.
        EngineDeadError: If the engine has stopped.
    """

    def __init__(
        self, engine: "AsyncLLM", request: Request, on_end: "Callable[[EventSource], None]"
    ) -> None:
        """Submit the request."""
        self._engine = engine
        self._request = request
        self._on_end = on_end
        self._queue = engine.submit(request)
        self._num_open = request.sampling.n
        self._first: TokenEvent | None = None

    @property
    def names(self) -> frozenset[str]:
        """Ids by which a client may know the request: its answer's, with and without prefix."""
        answer = self._request.request_id.rpartition("-")[0]
        stem, _, number = answer.rpartition("-")
        known = {self._request.request_id, answer, *([stem] if number.isdecimal() else [])}
        return frozenset(known | {name.partition("-")[2] for name in known})

    def __aiter__(self) -> "EventSource":
        """Return itself."""
        return self

    async def __anext__(self) -> TokenEvent:
        """Wait for the next event; the last one of every completion has a finish reason."""
        if not self._num_open:
            raise StopAsyncIteration
        event, self._first = self._first or await self._queue.get(), None
        if event.finish_reason is not None:
            self._num_open -= 1
            if not self._num_open:
                self._on_end(self)
        return event

    async def peek(self) -> TokenEvent:
        """Wait for the first event, which is then still to be read."""
        if self._first is None:
            self._first = await self._queue.get()
        return self._first

    async def abort(self) -> None:
        """End the request early; its events then end with the finish reason `abort`."""
        await self._engine.abort(self._request.request_id)

    async def aclose(self) -> None:
        """Give the request up, unless it has ended; no further event is read."""
        if self._num_open:
            self._num_open = 0
            self._on_end(self)
            await self.abort()
