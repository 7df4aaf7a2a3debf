"""The page at `/`: a chat with the model and a live view of the server, as files of this package.

The files need no build step and load nothing from elsewhere. They are read once, when the
application is made, and answered from memory. All their links are relative, so that the page works
below any path under which a proxy publishes it.
"""

import hashlib
import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.core.errors import CapacityError, EngineDeadError, RequestError
from jaxserve.serve.reply_models import Live, replies
from jaxserve.serve.sse import encode_json
from jaxserve.serve.state import ServerState

INDEX = "index.html"
LIVE = "/pages/live"

MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""Every kind of file that the page consists of; anything else in its folder is not served."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content security policy: only files of this server, no inline code, in nobody's frame."""

_HEADERS = {
    "Cache-Control": "no-cache",  # kept by the browser, but asked about: answered by 304
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page.

    Attributes:
        content: Its bytes.
        media_type: What they are.
        etag: Quoted digest of the content.
    """

    content: bytes
    media_type: str
    etag: str


def load_files() -> dict[str, PageFile]:
    """Read the page's files.

    Returns:
        The files by name.
    """
    files: dict[str, PageFile] = {}
    for entry in (resources.files("jaxserve.serve") / "pages").iterdir():
        media_type = MEDIA_TYPES.get(PurePath(entry.name).suffix)
        if media_type is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[entry.name] = PageFile(content, media_type, etag)
    return files


def wants_html(accept: str | None) -> bool:
    """Tell whether an Accept header names HTML, as every browser's does and no API client's.

    >>> wants_html("text/html,application/xhtml+xml,*/*;q=0.8")
    True
    >>> wants_html("*/*"), wants_html(None), wants_html("text/html;q=0, */*")
    (False, False, False)
    """
    for part in (accept or "").split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if kind in ("text/html", "application/xhtml+xml"):
            refusals = {"q=0", "q=0.0", "q=0.00", "q=0.000"}
            return not any(parameter.replace(" ", "") in refusals for parameter in parameters)
    return False


def _is_known(header: str | None, etag: str) -> bool:
    """Tell whether an If-None-Match header lists a file as it is now."""
    listed = {tag.strip().removeprefix("W/") for tag in (header or "").split(",")}
    return etag in listed or "*" in listed


def _answer(request: Request, file: PageFile, headers: dict[str, str]) -> Response:
    headers = {**_HEADERS, **headers, "ETag": file.etag}
    if _is_known(request.headers.get("if-none-match"), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def page_router(state: ServerState) -> APIRouter:
    """Return the routes of the page; none needs a key, like `/metrics`.

    Args:
        state: What all requests share.
    """
    router = APIRouter()
    files = load_files()
    methods = ["GET", "HEAD"]

    @router.api_route("/", methods=methods, include_in_schema=False)
    async def index(request: Request) -> Response:
        """Show browsers the page, and tell everybody else where the doors are."""
        if wants_html(request.headers.get("accept")):
            return _answer(request, files[INDEX], {"Vary": "Accept"})
        return Response(
            encode_json(_signpost(state, request.scope.get("root_path", ""))),
            media_type="application/json",
            headers={"Vary": "Accept"},
        )

    @router.get(LIVE, responses=replies(Live))
    async def live() -> Response:
        """Tell how busy the engine is; a cheap extract of `/metrics` for the page."""
        return Response(
            encode_json(live_numbers(state)),
            media_type="application/json",
            headers={"Cache-Control": "no-store"},
        )

    @router.api_route("/pages/{name}", methods=methods, include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        """Send one file of the page."""
        file = files.get(name)
        if file is None or name == INDEX:
            raise RequestError(f"The page has no file {name[:100]!r}.", status=404)
        return _answer(request, file, {})

    _ = index, live, asset
    return router


def _signpost(state: ServerState, root: str) -> dict[str, Any]:
    root = root.rstrip("/")
    has_docs = not state.config.api.disable_fastapi_docs
    return {
        "name": "jaxserve",
        "version": __version__,
        "model": state.model_names[0],
        "openai_api": f"{root}/v1",
        "health": f"{root}/health",
        "metrics": f"{root}/metrics",
        "docs": f"{root}/docs" if has_docs else None,
    }


def _status(state: ServerState) -> str:
    """Return `ready`, `loading`, `paused`, `sleeping`, `stopping` or `dead`."""
    if state.is_draining:
        return "stopping"
    try:
        engine = state.ready_engine()
    except CapacityError:
        return "loading"
    except EngineDeadError:
        return "dead"
    if engine.is_sleeping():
        return "sleeping"
    return "paused" if engine.is_paused() else "ready"


def live_numbers(state: ServerState) -> dict[str, Any]:
    """Return what the page draws.

    Nothing is told that `/metrics`, `/version` and a refused request do not tell to anybody.

    Args:
        state: What all requests share.

    Returns:
        `status`, `version`, `model`, `needs_key`, `time` (seconds of a steady clock); once there is
        an engine also `running` and `waiting` (sequences), `kv_usage` (0 to 1), and the counters
        `prompt_tokens`, `cached_tokens`, `generation_tokens`, `preemptions` and `finished`.
    """
    numbers: dict[str, Any] = {
        "status": _status(state),
        "version": __version__,
        "model": state.model_names[0],
        "needs_key": bool(state.config.access.api_key),
        "time": state.clock.now(),
    }
    if state.engine is not None:
        metrics = state.engine.metrics
        numbers |= {
            "running": metrics.num_running,
            "waiting": metrics.num_waiting,
            "kv_usage": metrics.kv_usage,
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.cached_tokens,
            "generation_tokens": metrics.generation_tokens,
            "preemptions": metrics.num_preemptions,
            "finished": metrics.finished_by_reason.total(),
        }
    return numbers


class WithoutPolls(logging.Filter):
    """Keeps the page's own polling, once a second, out of the access log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line of uvicorn's access log is worth printing."""
        match record.args:
            case (_, "GET", str(path), _, 200):
                return not path.partition("?")[0].endswith(LIVE)
            case _:
                return True
