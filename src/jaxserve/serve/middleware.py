"""What happens to a request before any route sees it; plain ASGI, because streams pass through."""

import hashlib
import hmac
from collections.abc import Sequence

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.core.units import format_bytes
from jaxserve.serve.errors import Problem
from jaxserve.serve.paths import route_path
from jaxserve.serve.translate import MAX_ID_LEN

GUARDED = "/v1"
REQUEST_ID = "x-request-id"
GUARDED_BY_ROUTE = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Administration that has its place below /v1; these routes look at keys by themselves."""


class ApiKeys:
    """Lets only requests with a known key reach /v1.

    Args:
        app: What comes next.
        keys: The known keys.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        """Keep the keys' digests, so that comparing takes the same time for every wrong key."""
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and self._is_guarded(scope):
            problem = self._problem(Headers(scope=scope).get("authorization"))
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    @staticmethod
    def _is_guarded(scope: Scope) -> bool:
        path = route_path(scope)
        return path == GUARDED or (path.startswith(GUARDED + "/") and path not in GUARDED_BY_ROUTE)

    def _problem(self, header: str | None) -> Problem | None:
        scheme, _, key = (header or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        if scheme.lower() == "bearer" and any(known):
            return None
        found = "no key" if header is None else "a wrong key"
        message = f"Got {found}; send `Authorization: Bearer KEY` with a key of this server."
        headers = {"WWW-Authenticate": "Bearer"}
        return Problem(status=401, message=message, headers=headers)


class BodyLimit:
    """Refuses request bodies above a size, whether or not the client says it beforehand.

    Args:
        app: What comes next.
        max_bytes: Largest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Keep the limit."""
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            problem = Problem(status=413, message=self._message(), headers={"Connection": "close"})
            await problem.response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._message(), {"Connection": "close"})
            return message

        await self.app(scope, counted, send)

    def _message(self) -> str:
        return (
            f"The body must be at most {format_bytes(self._max_bytes)}; send less, or start the "
            "server with a larger --max-request-body-bytes."
        )


class RequestIds:
    """Sends a client's X-Request-Id back, so that both logs can be laid side by side.

    Args:
        app: What comes next.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Keep what comes next."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        given = Headers(scope=scope).get(REQUEST_ID) if scope["type"] == "http" else None
        if given is None or len(given) > MAX_ID_LEN or not given.isascii():
            await self.app(scope, receive, send)
            return

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = given
            await send(message)

        await self.app(scope, receive, labelled)


class RootPath:
    """Answers below a path as well as without it, since some proxies strip it and some do not.

    Args:
        app: What comes next.
        path: The path, without a slash at its end.
    """

    def __init__(self, app: ASGIApp, path: str) -> None:
        """Keep the path."""
        self.app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        await self.app({**scope, "root_path": self._path}, receive, send)
