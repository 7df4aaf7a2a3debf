"""Clients on bare sockets: they see status, headers and every event, and can die at any moment."""

import asyncio
import json
import socket
import struct
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.client import lines_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD_REASONS = frozenset({"stop", "length", "tool_calls"})
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset, as when a process is killed."""


class Connection:
    """One request on a connection of its own.

    Attributes:
        status: HTTP status, once `open` has returned.
        headers: Headers of the answer, names in lower case.
    """

    def __init__(self, url: str, path: str, body: Mapping[str, Any]) -> None:
        """Remember what to ask; nothing is sent yet."""
        self._place = urllib.parse.urlsplit(url)
        self._path = path
        self._body = json.dumps(body).encode()
        self.status = 0
        self.headers: dict[str, str] = {}

    async def open(self) -> None:
        """Send the request and read the head of the answer.

        Raises:
            OSError: If the server does not take connections.
            EOFError: If it closes this one without an answer.
        """
        host, port = self._place.hostname or "", self._place.port or 80
        self._reader, self._writer = await asyncio.open_connection(host, port, limit=2**22)
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(self._body)}\r\nConnection: close\r\n\r\n"
        )
        self._writer.write(head.encode() + self._body)
        await self._writer.drain()
        first, *rest = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1])
        pairs = (line.partition(":") for line in rest if line)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def body(self) -> bytes:
        """Read an answer that is no stream."""
        return await self._reader.readexactly(int(self.headers["content-length"]))

    async def events(self) -> AsyncIterator[str]:
        """Yield the data of each event of a stream, `[DONE]` included."""
        async for line in lines_of(self._reader):
            if line.startswith(b"data: "):
                yield line[6:].decode()

    def kill(self, *, with_reset: bool) -> None:
        """Die: with a reset, as a killed process, or with a plain end, as one that crashed."""
        if with_reset:
            raw: socket.socket = self._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._writer.transport.abort()

    def close(self) -> None:
        """Close."""
        self._writer.close()


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of one request.

    Attributes:
        status: HTTP status; 0 if there was none.
        headers: Headers of the answer.
        reasons: Finish reason of each completion that ended.
        num_tokens: Generated tokens, as the server counted them.
        text: Text of the first completion.
        arrivals: When each piece of it came, in seconds of a steady clock.
        error: What went wrong: no answer, a broken stream, an error event, or the refusal's text.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    num_tokens: int = 0
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it was accepted and came to a proper end."""
        reasons = self.reasons
        return (
            self.status == 200 and not self.error and bool(reasons) and {*reasons} <= GOOD_REASONS
        )

    @property
    def is_refused(self) -> bool:
        """Whether it was refused as a server should: 503, with the seconds to wait."""
        after = self.headers.get("retry-after", "")
        return self.status == 503 and after.isdecimal() and int(after) > 0


async def complete(url: str, body: Mapping[str, Any], *, path: str = COMPLETIONS) -> Outcome:
    """Send one request and follow it to its end, whatever that is."""
    outcome = Outcome()
    connection = Connection(url, path, body)
    try:
        await connection.open()
        outcome.status, outcome.headers = connection.status, connection.headers
        if outcome.headers.get("content-type", "").startswith("text/event-stream"):
            await _follow(connection, outcome)
        else:
            _read(json.loads(await connection.body()), outcome)
    except (OSError, EOFError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    finally:
        if hasattr(connection, "_writer"):
            connection.close()
    return outcome


def _read(answer: dict[str, Any], outcome: Outcome) -> None:
    if "error" in answer:
        outcome.error = str(answer["error"]["message"])
        return
    outcome.reasons = [choice["finish_reason"] for choice in answer["choices"]]
    outcome.num_tokens = answer["usage"]["completion_tokens"]
    first = answer["choices"][0]
    outcome.text = first["text"] if "text" in first else first["message"]["content"] or ""


async def _follow(connection: Connection, outcome: Outcome) -> None:
    is_done = False
    async for data in connection.events():
        if data == "[DONE]":
            is_done = True
            continue
        event = json.loads(data)
        if "error" in event:
            outcome.error = str(event["error"]["message"])
            continue
        if event.get("usage"):
            outcome.num_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content")
            if piece and choice["index"] == 0:
                outcome.text += piece
                outcome.arrivals.append(time.perf_counter())
            if choice["finish_reason"] is not None:
                outcome.reasons.append(choice["finish_reason"])
    if not is_done and not outcome.error:
        outcome.error = "the stream ended without [DONE]"


async def wait_until(condition: Any, timeout_s: float) -> float:  # noqa: ANN401  a callable
    """Wait for a condition that is asked on a thread of its own.

    Returns:
        Seconds until it held; `inf` if it did not in time.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < timeout_s:
        if await asyncio.to_thread(condition):
            return time.perf_counter() - start
        await asyncio.sleep(0.02)
    return float("inf")
