"""Server-sent events and disconnects.

A chunk is one JSON dump of a small object, or for plain text one dump of the text between two
prepared halves; sixteen streams share two cores with the model.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

DONE = b"data: [DONE]\n\n"
STATUS_CLIENT_GONE = 499
"""For the access log only; nobody is left to read it."""


def encode_json(value: object) -> bytes:
    r"""Write a value as compact JSON.

    Lone surrogates, which only a client's own text can contain, become question marks.

    >>> encode_json({"text": "é"})
    b'{"text":"\xc3\xa9"}'
    """
    return _encoder.encode(value).encode("utf-8", "replace")


def frame(value: object) -> bytes:
    r"""Write a value as one server-sent event.

    >>> frame({"a": 1})
    b'data: {"a":1}\n\n'
    """
    return b"data: " + encode_json(value) + b"\n\n"


def text_framer(template: object, slot: str) -> Callable[[str], bytes]:
    r"""Prepare an event of which only one string changes.

    Args:
        template: The event's object, with `slot` where the text goes.
        slot: A string that occurs in it once.

    Returns:
        A function from text to the finished event.

    >>> text_framer({"id": 1, "text": "@"}, "@")("hi")
    b'data: {"id":1,"text":"hi"}\n\n'
    """
    head, tail = frame(template).split(encode_json(slot))
    encode = _encoder.encode

    def write(text: str) -> bytes:
        return head + encode(text).encode() + tail

    return write


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


async def until_disconnect[T](receive: Receive, work: Coroutine[object, object, T]) -> T:
    """Await `work`, but cancel it as soon as the client goes away.

    Args:
        receive: ASGI channel of a request whose body has been read.
        work: What the client waits for.

    Raises:
        ClientGoneError: If the client went first; `work` has ended by then.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for future in (task, watcher):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come, and closes their source when the client goes away.

    Args:
        events: Finished events, `data: ...` with an empty line behind; always closed at the end.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        """Keep the source; nothing is sent yet."""
        self.events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        _ = scope
        with contextlib.suppress(ClientGoneError):
            await until_disconnect(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merge[T](sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Interleave several sources as their items come.

    Args:
        sources: What to read from; closed by whoever made them.

    Yields:
        The position of a source and its next item.

    Raises:
        Exception: The first one that a source raises; the others are no longer read then.
    """
    if len(sources) == 1:  # the common case needs no queue
        async for item in sources[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def read(position: int, source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                queue.put_nowait((position, item))
        except Exception as error:  # noqa: BLE001  raised again by the reader of the queue
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.ensure_future(read(i, source)) for i, source in enumerate(sources)]
    try:
        open_sources = len(tasks)
        while open_sources:
            item = await queue.get()
            if item is None:
                open_sources -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Closable(Protocol):
    """What must be told when nobody reads it any more."""

    def aclose(self) -> Coroutine[object, object, None]:
        """Stop; harmless when it has ended."""
        ...


async def close_all(sources: Sequence[Closable]) -> None:
    """Close every source, whatever the others do."""
    await asyncio.gather(*(source.aclose() for source in sources), return_exceptions=True)
