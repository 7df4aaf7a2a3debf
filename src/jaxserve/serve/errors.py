"""Error bodies: `{"error": {"message", "type", "param", "code"}}`, whatever goes wrong."""

import http
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import (
    CapacityError,
    DeclinedError,
    EngineDeadError,
    JaxserveError,
    RequestError,
    UnsupportedError,
)
from jaxserve.serve.paths import methods_of, route_path
from jaxserve.serve.sse import encode_json

logger = logging.getLogger("jaxserve.serve")

RETRY_AFTER_S = 1.0
"""What a client is told when the engine does not know when there will be room."""
INTERNAL = "The server failed to answer this request; its log says why."
MAX_SHOWN = 100
"""Most characters of a refused value to repeat in a message."""

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class GenerationFailedError(Exception):
    """The engine gave up on a completion; its message is for the log, not for the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a client is told.

    Attributes:
        status: HTTP status.
        message: What was found, what was expected, what to do.
        param: The request field to blame.
        headers: Further headers of the answer.
        reason: Why a scheduler declined the request, if it did.
    """

    status: int
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    reason: str | None = None

    def body(self) -> dict[str, Any]:
        """Return the JSON object that is sent."""
        kind = TYPES.get(self.status)
        if kind is None:
            phrase = http.HTTPStatus(self.status).phrase if 100 <= self.status < 600 else "Error"
            kind = phrase.title().replace(" ", "") + "Error"
        details: dict[str, Any] = {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.status,
        }
        if self.reason is not None:
            details["reason"] = self.reason
        return {"error": details}

    def response(self) -> Response:
        """Return the answer."""
        return Response(
            encode_json(self.body()),
            status_code=self.status,
            headers=dict(self.headers),
            media_type="application/json",
        )


def problem_of(error: BaseException) -> Problem:
    """Translate an exception into what a client is told; nothing internal leaks."""
    match error:
        case RequestError():
            return Problem(status=error.status, message=str(error), param=error.param)
        case CapacityError():
            seconds = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
            headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
            declined = error if isinstance(error, DeclinedError) else None
            return Problem(
                status=503,
                message=str(error),
                headers=headers,
                param=declined and f"slo.{declined.objective}",
                reason=declined and declined.reason,
            )
        case UnsupportedError():
            return Problem(status=501, message=str(error))
        case EngineDeadError():
            return Problem(status=500, message="The engine has stopped; restart the server.")
        case RequestValidationError():
            return _problem_of_validation(error.errors())
        case HTTPException():
            return _problem_of_http(error)
        case _:
            return Problem(status=500, message=INTERNAL)


def _problem_of_http(error: HTTPException) -> Problem:
    message = str(error.detail)
    if error.status_code == 404 and message == "Not Found":
        message = "There is no such path; GET /openapi.json lists them all."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        message = f"This path does not take this method; use {allowed}."
    return Problem(status=error.status_code, message=message, headers=error.headers or {})


def _problem_of_validation(errors: Sequence[Any]) -> Problem:
    """Name the first wrong field; a field that may have several types fails once per type."""
    first = errors[0]
    where = list(first["loc"][1:])  # behind "body", "query" or "path"
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "it ends too early")
        message = f"The body is not valid JSON: {detail} (at character {first['loc'][-1]})."
        return Problem(status=400, message=message)
    if not where:
        message = "The body must be a JSON object, sent with `Content-Type: application/json`."
        return Problem(status=400, message=message)
    name = where[0]
    same = [error for error in errors if error["loc"][1:2] == first["loc"][1:2]]
    messages = dict.fromkeys(str(error["msg"]) for error in same)
    if len(same) == 1:
        name += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:])
    found = ""
    if first["type"] != "missing":
        shown = repr(first.get("input"))
        found = f", got {shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '...'}"
    message = f"{name}: {'; '.join(messages)}{found}."
    return Problem(status=400, message=message, param=str(name))


def log_failure(what: str, error: BaseException) -> None:
    """Write what went wrong on our side, with a traceback unless the engine wrote it already."""
    if isinstance(error, GenerationFailedError):
        logger.error("%s failed: %s", what, error)
    else:
        logger.error("%s failed", what, exc_info=error)


def _with_all_methods(error: HTTPException, request: Request) -> HTTPException:
    """Name every method that the path takes; the router knows those of one route only."""
    named = {word.strip() for word in (error.headers or {}).get("Allow", "").split(",")} - {""}
    methods = named | methods_of(request.app, route_path(request.scope))
    return HTTPException(405, headers={"Allow": ", ".join(sorted(methods))})


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        error = _with_all_methods(error, request)
    problem = problem_of(error)
    if problem.status == 500 and isinstance(error, _OURS):
        log_failure(request.url.path, error)  # of others uvicorn prints the traceback
    return problem.response()


_OURS = (JaxserveError, GenerationFailedError)


def install(app: FastAPI) -> None:
    """Make `app` answer every exception with an error body."""
    for kind in (*_OURS, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
