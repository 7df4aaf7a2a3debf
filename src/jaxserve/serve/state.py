"""What all requests share: the engine once it is there, the model's names, the load."""

import asyncio
import logging
from collections.abc import Collection, Coroutine, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxserve.core.clock import WallClock
from jaxserve.core.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    RequestError,
    UnsupportedError,
    did_you_mean,
)
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.source import EventSource
from jaxserve.serve.sse import close_all
from jaxserve.serve.translate import Job

if TYPE_CHECKING:
    from jaxserve.core.lora import Adapter, LoRARequest
    from jaxserve.engine.async_engine import AsyncLLM

logger = logging.getLogger("jaxserve.serve")

STARTING_RETRY_S = 5.0
DRAINING_RETRY_S = 10.0
POLL_S = 0.05


def _stopping() -> CapacityError:
    return CapacityError("The server is stopping; use another one.", retry_after_s=DRAINING_RETRY_S)


def _is_cancelled() -> bool:
    """Tell whether the caller itself is being cancelled, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class ServerState:
    """The server between start and stop.

    Args:
        config: Settings of the server.
        model: The model as the user named it.
        engine: The engine, if it is ready already.

    Attributes:
        config: Settings of the server.
        model: The model as the user named it.
        engine: The engine; None while the model is being loaded.
        is_draining: Whether new requests are refused because the server is about to stop.
        load: Generating requests that are being answered.
        clock: Where `created` comes from.
        lora_lock: Held while an adapter is loaded or unloaded.
    """

    def __init__(
        self, config: ServerConfig, *, model: str, engine: "AsyncLLM | None" = None
    ) -> None:
        """Stand ready, with or without an engine."""
        self.config = config
        self.engine = engine
        self.is_draining = False
        self.load = 0
        self.clock = WallClock()
        self.model = model
        self.lora_lock = asyncio.Lock()
        self._open: set[EventSource] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._started = int(self.clock.unix())

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use; the first one is echoed."""
        if self.config.api.served_model_name:
            return self.config.api.served_model_name
        return (self.model,)

    @property
    def lora_requests(self) -> "list[LoRARequest]":
        """Adapters that requests may use by their names."""
        return [] if self.engine is None else self.engine.lora_requests

    @property
    def started(self) -> int:
        """Seconds since 1970 when the server started."""
        return self._started

    def ready_engine(self, task: str | None = None) -> "AsyncLLM":
        """Return the engine, if it can take requests.

        Args:
            task: What the model must be used for: `generate` or `pooling`; None is anything.

        Raises:
            CapacityError: While the model is being loaded or the server is stopping.
            EngineDeadError: If the engine has stopped.
            RequestError: If the model is not used for the task.
        """
        if self.is_draining:
            raise _stopping()
        if self.engine is None or not self.engine.is_ready:
            if self.engine is not None:
                self.engine.check_health()
            raise CapacityError(
                "The model is being loaded; try again soon.", retry_after_s=STARTING_RETRY_S
            )
        self.engine.check_health()
        if task is not None:
            self.engine.require(task)
        return self.engine

    def is_healthy(self) -> bool:
        """Tell whether requests would be taken now."""
        try:
            self.ready_engine()
        except (CapacityError, EngineDeadError):
            return False
        return True

    def checked_model(self, name: str | None) -> str:
        """Return the name to echo for the model that a request asks for.

        Raises:
            RequestError: With status 404, if it is not served here.
        """
        names = self.model_names
        if name is None:
            return names[0]
        if name not in names:
            names += tuple(known.lora_name for known in self.lora_requests)
        if name not in names:
            raise RequestError(
                f"The model {name[:200]!r} does not exist here; this server has "
                f"{', '.join(map(repr, names))}.{did_you_mean(name, names)}",
                status=404,
                param="model",
            )
        return name

    async def adapter(self, engine: "AsyncLLM", model: str) -> "Adapter | None":
        """Return the adapter that a model's name stands for, its weights read if need be.

        Args:
            engine: Where it will be used.
            model: A name that `checked_model` has returned.

        Raises:
            RequestError: If it can no longer be read.
        """
        if model in self.model_names:
            return None
        known = next((one for one in self.lora_requests if one.lora_name == model), None)
        if known is None:  # unloaded meanwhile
            self.checked_model(model)
        try:
            return await engine.get_adapter(known)
        except (ConfigError, UnsupportedError) as error:
            raise RequestError(str(error), param="model") from error

    async def open(self, engine: "AsyncLLM", job: Job) -> list[EventSource]:
        """Hand a job's requests to the engine.

        Returns:
            The events of each request; whoever gets them closes them.

        Raises:
            RequestError: If one of them is refused or its grammar does not compile; none runs then.
            CapacityError: If the queue is full; none runs then.
            EngineDeadError: If the engine has stopped.
        """
        self._log(job)
        sources: list[EventSource] = []
        try:
            for request in job.requests:
                source = EventSource(engine, request, self._open.discard)
                self._open.add(source)
                sources.append(source)
            for request in job.requests:
                await engine.grammar_ready(request)
        except BaseException:
            await close_all(sources)
            raise
        return sources

    async def abort(self, ids: Collection[str] | None = None) -> int:
        """End requests early; the clients get what there is, with reason `abort`.

        Args:
            ids: Ids of answers, with or without their `cmpl-` or `chatcmpl-`; None is all.

        Returns:
            How many there were.
        """
        found = [s for s in self._open if ids is None or not s.names.isdisjoint(ids)]
        for source in found:
            await source.abort()
        return len(found)

    async def give_up_calls(self) -> None:
        """End what is being embedded and scored; its clients are told to ask another server."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def call[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Do work that `give_up_calls` may end.

        Raises:
            CapacityError: If it did.
        """
        task = asyncio.ensure_future(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if self.is_draining and task.cancelled() and not _is_cancelled():
                raise _stopping() from None
            raise
        finally:
            task.cancel()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until every request has been answered.

        Args:
            timeout_s: Longest wait in seconds.

        Returns:
            Whether that was so in time.
        """
        limit = self.clock.now() + timeout_s
        while self.load:
            if self.clock.now() >= limit:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def _log(self, job: Job) -> None:
        if not self.config.log.enable_log_requests:
            return
        for request in job.requests:
            prompt = request.prompt
            shown = repr(None if prompt is None else prompt[: self.config.log.max_log_len])
            logger.info(
                "request %s: %d prompt tokens, prompt %s, %s",
                request.request_id, len(request.prompt_token_ids), shown, request.sampling,
            )  # fmt: skip

    @contextmanager
    def working(self) -> Generator[None]:
        """Count a request as being answered."""
        self.load += 1
        try:
            yield
        finally:
            self.load -= 1
