"""Routes for those who run the server: weights, pauses, sleep, caches, profiles; closed by default.

Names, queries and answers are vLLM's, those of SGLang beside them.
"""

import asyncio
import dataclasses
import hashlib
import hmac
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic import Field
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.core.control import PauseMode, SleepTag, WeightUpdate
from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.serve.openai_api import Body
from jaxserve.serve.reply_models import ERRORS
from jaxserve.serve.sse import encode_json
from jaxserve.serve.state import ServerState

SECRET = {"api_key", "admin_api_key", "ssl_keyfile_password"}
"""Settings that no answer shows."""
SGLANG_MODES: dict[str, PauseMode] = {"abort": "abort", "in_place": "keep", "retract": "keep"}


def _state(request: Request) -> ServerState:
    return request.app.state.server


def _json(value: object) -> Response:
    return Response(encode_json(value), media_type="application/json")


async def _guard(request: Request) -> None:
    """Let only those in who may run the server.

    Raises:
        RequestError: With status 403, while the routes are closed.
        HTTPException: With status 401, for a wrong key.
    """
    check_access(request, is_open=_state(request).config.access.enable_admin_api)


def check_access(request: Request, *, is_open: bool, flag: str = "--enable-admin-api") -> None:
    """Let a request to an administrative route in only if the route is open and the key is right.

    Args:
        request: The request.
        is_open: Whether the route is open.
        flag: What opens it.

    Raises:
        RequestError: With status 403, while the route is closed.
        HTTPException: With status 401, for a wrong key.
    """
    access = _state(request).config.access
    if not is_open:
        raise RequestError(
            f"{request.url.path} is closed; start the server with {flag} to open it.", status=403
        )
    keys = (access.admin_api_key,) if access.admin_api_key is not None else access.api_key
    if not keys:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
    known = [hmac.compare_digest(digest, hashlib.sha256(k.encode()).digest()) for k in keys]
    if scheme.lower() != "bearer" or not any(known):
        raise HTTPException(
            401,
            "Got no key or a wrong one; send `Authorization: Bearer KEY` with the key of "
            "--admin-api-key, or of --api-key if there is none.",
            {"WWW-Authenticate": "Bearer"},
        )


router = APIRouter(dependencies=[Depends(_guard)], responses=ERRORS)


class ReleaseBody(Body):
    """Which memory to give back or take again; nothing is all of it."""

    tags: list[SleepTag] | None = None


class PauseBody(Body):
    """How to pause, in SGLang's words."""

    mode: Literal["abort", "in_place", "retract"] = "abort"


class AbortBody(Body):
    """Which requests to end; nothing is all of them."""

    request_ids: list[str] = Field(default_factory=list[str])
    rid: str | None = None
    abort_all: bool = False


class VersionBody(Body):
    """What to call the weights being served."""

    new_version: str = Field(min_length=1)
    abort_all_requests: bool = False


class UpdateInfo(Body):
    """Which weights to serve from now on."""

    model_path: str | None = Field(default=None, description="Directory, GGUF file or name.")
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    recompute: bool = Field(
        default=False, description="Whether running requests compute their keys and values anew."
    )


class UpdateBody(UpdateInfo):
    """The same, where clients of vLLM may put it one level lower."""

    update_info: UpdateInfo | None = None


# Pausing and sleeping --------------------------------------------------------------------------


@router.post("/pause")
async def pause(
    request: Request,
    mode: PauseMode = "abort",
    clear_cache: bool = True,  # noqa: FBT001, FBT002  a query parameter
) -> Response:
    """Pause generation; answers once nothing runs any more."""
    await _state(request).ready_engine().pause_generation(mode, clear_cache=clear_cache)
    return _json({"status": "paused"})


@router.post("/resume")
async def resume(request: Request) -> Response:
    """Go on after a pause."""
    await _state(request).ready_engine().resume_generation()
    return _json({"status": "resumed"})


@router.get("/is_paused")
async def is_paused(request: Request) -> Response:
    """Tell whether generation is paused."""
    return _json({"is_paused": _state(request).ready_engine().is_paused()})


@router.post("/pause_generation")
async def pause_generation(request: Request, body: PauseBody | None = None) -> Response:
    """Pause generation, for clients of SGLang."""
    engine = _state(request).ready_engine()
    mode = "abort" if body is None else body.mode
    await engine.pause_generation(SGLANG_MODES[mode])
    if mode == "retract":
        await engine.reset_prefix_cache(reset_running_requests=True)
    return _json({"status": "ok", "message": "Generation paused successfully."})


@router.post("/continue_generation")
async def continue_generation(request: Request) -> Response:
    """Go on after a pause, for clients of SGLang."""
    await _state(request).ready_engine().resume_generation()
    return _json({"status": "ok", "message": "Generation continued successfully."})


@router.post("/sleep")
async def sleep(
    request: Request, level: Annotated[int, Query(ge=0, le=2)] = 1, mode: PauseMode = "abort"
) -> Response:
    """Pause, and give memory back: 0 none, 1 cache and weights (kept on the host), 2 both."""
    await _state(request).ready_engine().sleep(level, mode)
    return _json({"status": "sleeping"})


@router.post("/wake_up")
async def wake_up(
    request: Request,
    tags: Annotated[list[SleepTag] | None, Query()] = None,
) -> Response:
    """Undo sleep, wholly or in part."""
    is_awake = await _state(request).ready_engine().wake_up(tags or None)
    return _json({"status": "awake" if is_awake else "sleeping"})


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> Response:
    """Tell whether some part is asleep."""
    return _json({"is_sleeping": _state(request).ready_engine().is_sleeping()})


@router.post("/release_memory_occupation")
async def release_memory(request: Request, body: ReleaseBody | None = None) -> Response:
    """Give memory back, for clients of SGLang; all of it or nothing.

    Raises:
        RequestError: If only a part is asked for.
    """
    tags = set((body and body.tags) or ("weights", "kv_cache"))
    if not tags >= {"weights", "kv_cache"}:
        raise RequestError(
            "tags must hold weights and kv_cache, or be left out; they are given back together, "
            f"got {', '.join(sorted(tags))}.",
            param="tags",
        )
    await _state(request).ready_engine().sleep(1)
    return _json({"status": "sleeping"})


@router.post("/resume_memory_occupation")
async def resume_memory(request: Request, body: ReleaseBody | None = None) -> Response:
    """Take memory again, for clients of SGLang; generation goes on once all of it is there."""
    engine = _state(request).ready_engine()
    await engine.wake_up((body and body.tags) or ("weights", "kv_cache"))
    if engine.host.lifecycle.asleep == ("scheduling",):
        await engine.wake_up()
    return _json({"status": "sleeping" if engine.is_sleeping() else "awake"})


# Requests and caches ---------------------------------------------------------------------------


@router.post("/abort_requests")
@router.post("/abort_request", include_in_schema=False)
async def abort_requests(request: Request, body: AbortBody | None = None) -> Response:
    """End requests early, by the ids of their answers; none given is all of them."""
    state = _state(request)
    state.ready_engine()
    ids = set() if body is None else {*body.request_ids, *([body.rid] if body.rid else [])}
    count = await state.abort(None if not ids or (body and body.abort_all) else ids)
    return _json({"status": "aborted", "num_aborted": count})


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(
    request: Request,
    reset_running_requests: bool = False,  # noqa: FBT001, FBT002  a query parameter
) -> Response:
    """Empty the prefix cache."""
    engine = _state(request).ready_engine()
    done = await engine.reset_prefix_cache(reset_running_requests=reset_running_requests)
    return _json({"success": done})


@router.post("/flush_cache")
@router.get("/flush_cache")
async def flush_cache(request: Request) -> Response:
    """Empty the prefix cache, for clients of SGLang."""
    done = await _state(request).ready_engine().reset_prefix_cache()
    return _json({"success": done, "message": "Cache flushed."})


# Weights ---------------------------------------------------------------------------------------


@router.get("/weight_info")
async def weight_info(request: Request) -> Response:
    """Tell the version of the weights."""
    engine = _state(request).ready_engine()
    return _json(
        {
            "weight_version": engine.get_weight_version(),
            "num_updates": engine.host.lifecycle.num_updates,
        }
    )


@router.post("/update_weight_version")
async def update_weight_version(body: VersionBody, request: Request) -> Response:
    """Call the weights being served something else.

    Raises:
        RequestError: If the version is no good; nothing is aborted then.
    """
    engine = _state(request).ready_engine()
    try:
        await engine.update_weight_version(
            body.new_version, abort_all_requests=body.abort_all_requests
        )
    except RequestError as error:
        raise RequestError(str(error), param="new_version") from error
    return _json(
        {
            "success": True,
            "message": f"Weight version updated to {body.new_version}",
            "new_version": body.new_version,
        }
    )


@router.post("/update_weights")
@router.post("/update_weights_from_disk")
async def update_weights(body: UpdateBody, request: Request) -> Response:
    """Read a checkpoint of the same model while serving goes on, then serve it.

    Raises:
        RequestError: If it is damaged, missing, or of another model; the old weights stay.
    """
    engine = _state(request).ready_engine()
    info: UpdateInfo = body.update_info or body
    if info.model_path is None:
        raise RequestError(
            "model_path must say where the new weights are: a safetensors directory, a GGUF file "
            "or a name.",
            param="model_path",
        )
    try:
        done: WeightUpdate = await engine.update_weights_from_disk(
            info.model_path,
            version=info.weight_version,
            flush_cache=info.flush_cache,
            recompute=info.recompute,
            abort_all_requests=info.abort_all_requests,
        )
    except ConfigError as error:
        raise RequestError(str(error), param="model_path") from error
    return _json(
        {
            "success": True,
            "message": "Weights updated.",
            "weight_version": done.version,
            "seconds": done.seconds,
            "num_paused_requests": 0,
        }
    )


# What is going on ------------------------------------------------------------------------------


@router.get("/server_info")
@router.get("/get_server_info", include_in_schema=False)
async def server_info(
    request: Request, config_format: Literal["text", "json"] = "text"
) -> Response:
    """Tell settings and state; keys and passwords are left out."""
    state = _state(request)
    engine = state.ready_engine()
    config = {
        part: {
            name: value
            for name, value in dataclasses.asdict(getattr(source, part)).items()
            if name not in SECRET
        }
        for source in (engine.config, state.config)
        for part in (field.name for field in dataclasses.fields(source))
    }
    shown: Any = config
    if config_format == "text":
        pairs = [f"{k}={v!r}" for part in config.values() for k, v in part.items()]
        shown = ", ".join(pairs)
    return _json(
        {
            "version": __version__,
            "model": engine.model_name,
            "config": shown,
            "weight_version": engine.get_weight_version(),
            "is_paused": engine.is_paused(),
            "asleep": engine.host.lifecycle.asleep,
            "num_unfinished": engine.num_unfinished,
            "replicas": [dataclasses.asdict(one) for one in engine.replicas],
        }
    )


@router.post("/start_profile")
async def start_profile(request: Request) -> Response:
    """Begin a trace of host and device in the folder of --profiler-dir."""
    state = _state(request)
    engine = state.ready_engine()
    folder = await engine.start_profile(state.config.access.profiler_dir)
    return _json({"status": "started", "folder": str(folder)})


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    """End the trace and write it."""
    # Once begun it is written, even if the client has gone.
    folder = await asyncio.shield(_state(request).ready_engine().stop_profile())
    return _json({"status": "stopped", "folder": str(folder)})
