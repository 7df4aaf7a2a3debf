"""Adapters of a server: those loaded at the start, and the routes that load and unload others.

The routes are closed by default. Paths, fields and answers are vLLM's, those of SGLang beside them.
"""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from jaxserve.core.errors import ConfigError, ModelNotFoundError, RequestError, UnsupportedError
from jaxserve.core.lora import LoRARequest
from jaxserve.serve.admin import check_access
from jaxserve.serve.openai_api import Body
from jaxserve.serve.options import ApiOptions, lora_module
from jaxserve.serve.reply_models import ERRORS, Responses
from jaxserve.serve.sse import encode_json
from jaxserve.serve.state import ServerState

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncLLM


def load_modules(engine: "AsyncLLM", options: ApiOptions) -> None:
    """Load the adapters that the settings name; waits for each.

    Raises:
        ConfigError: If one cannot be loaded.
    """
    if not options.lora_modules:
        return
    try:
        store = engine.host.adapters
    except RequestError:
        raise ConfigError("lora_modules: an encoder takes no adapters; leave it out.") from None
    for module in map(lora_module, options.lora_modules):
        if module.name in options.served_model_name:
            raise ConfigError(f"lora_modules: {module.name!r} is the name of the model itself.")
        base = module.base_model_name
        store.add(LoRARequest(module.name, store.free_id(), module.path, base_model_name=base))


def _state(request: Request) -> ServerState:
    return request.app.state.server


async def _guard(request: Request) -> None:
    """Let only those in who may change the adapters.

    Raises:
        RequestError: With status 403, while the routes are closed.
        HTTPException: With status 401, for a wrong key.
    """
    is_open = _state(request).config.access.opens_loras
    check_access(request, is_open=is_open, flag="--allow-runtime-lora-updating")


router = APIRouter(dependencies=[Depends(_guard)], responses=ERRORS)

_TEXT: Responses = {
    200: {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


class LoadLoraBody(Body):
    """Which adapter to serve, and under which name."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1, description="Folder in PEFT's layout, or a hub name.")
    load_inplace: bool = Field(
        default=False, description="Whether to put it in the place of one of the same name."
    )
    base_model_name: str | None = None
    pinned: bool = Field(default=False, description="Whether to keep its slot on the device.")


class UnloadLoraBody(Body):
    """Which adapter to forget."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None


async def _load(body: LoadLoraBody, request: Request) -> ServerState:
    body.check_extra()
    state = _state(request)
    engine = state.ready_engine()
    name = body.lora_name
    if name in state.model_names:
        raise RequestError(
            f"{name!r} is the name of the model itself; choose another one for the adapter.",
            param="lora_name",
        )
    async with state.lora_lock:
        store = engine.host.adapters
        known = store.named(name)
        if known is not None and not body.load_inplace:
            raise RequestError(
                f"The lora adapter {name!r} has already been loaded. Set load_inplace to true to "
                "put the new one in its place.",
                param="lora_name",
            )
        wanted = LoRARequest(
            name,
            store.free_id() if known is None else known.lora_int_id,
            body.lora_path,
            base_model_name=body.base_model_name,
            load_inplace=body.load_inplace,
        )
        try:
            await engine.add_lora(wanted)
        except ModelNotFoundError as error:
            raise RequestError(str(error), status=404, param="lora_path") from error
        except (ConfigError, UnsupportedError) as error:
            raise RequestError(str(error), param="lora_path") from error
        if body.pinned:
            try:
                await engine.pin_lora(wanted.lora_int_id)
            except RequestError:
                if known is None:
                    await engine.remove_lora(wanted.lora_int_id)
                raise
    return state


async def _unload(body: UnloadLoraBody, request: Request) -> ServerState:
    body.check_extra()
    state = _state(request)
    engine = state.ready_engine()
    async with state.lora_lock:
        known = engine.host.adapters.named(body.lora_name)
        if known is None or body.lora_int_id not in (None, known.lora_int_id):
            raise RequestError(
                f"The lora adapter {body.lora_name!r} cannot be found; this server has "
                f"{', '.join(repr(one.lora_name) for one in state.lora_requests) or 'none'}.",
                status=404,
                param="lora_name",
            )
        await engine.remove_lora(known.lora_int_id)
    return state


@router.post("/v1/load_lora_adapter", responses=_TEXT)
async def load_lora_adapter(body: LoadLoraBody, request: Request) -> Response:
    """Load an adapter; requests then choose it by its name as their model."""
    await _load(body, request)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=_TEXT)
async def unload_lora_adapter(body: UnloadLoraBody, request: Request) -> Response:
    """Forget an adapter; requests that use it finish with it."""
    await _unload(body, request)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _loaded(state: ServerState) -> Response:
    adapters = {known.lora_name: known.lora_path for known in state.lora_requests}
    answer: dict[str, Any] = {"success": True, "loaded_adapters": adapters}
    return Response(encode_json(answer), media_type="application/json")


@router.post("/load_lora_adapter")
async def load_lora_adapter_sglang(body: LoadLoraBody, request: Request) -> Response:
    """Load an adapter, for clients of SGLang."""
    return _loaded(await _load(body, request))


@router.post("/unload_lora_adapter")
async def unload_lora_adapter_sglang(body: UnloadLoraBody, request: Request) -> Response:
    """Forget an adapter, for clients of SGLang."""
    return _loaded(await _unload(body, request))
