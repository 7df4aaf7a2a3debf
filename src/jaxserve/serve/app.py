"""The ASGI application: routes, which translate and stream, nothing more."""

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.core.errors import RequestError
from jaxserve.engine.metrics import CONTENT_TYPE
from jaxserve.serve import admin, errors, lora_routes, pooling_routes
from jaxserve.serve.middleware import REQUEST_ID, ApiKeys, BodyLimit, RequestIds, RootPath
from jaxserve.serve.openai_api import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from jaxserve.serve.page import page_router
from jaxserve.serve.replies import Answer, TokenWriter, chat_reply, completion_reply
from jaxserve.serve.reply_models import (
    ERRORS,
    ChatReply,
    CompletionReply,
    Detokenized,
    Load,
    ModelCard,
    ModelList,
    Tokenized,
    Version,
    replies,
)
from jaxserve.serve.sse import (
    STATUS_CLIENT_GONE,
    ClientGoneError,
    EventStream,
    encode_json,
    until_disconnect,
)
from jaxserve.serve.state import ServerState
from jaxserve.serve.streams import begun, gather, stream
from jaxserve.serve.translate import (
    Job,
    answer_id,
    chat_job,
    completion_job,
    tokenize,
    tokenizer_of,
)

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncLLM

router = APIRouter()

_HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"description": "Requests are taken."},
    503: {"description": "They are not."},
    "4XX": ERRORS["4XX"],
}
_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **ERRORS,
}


def _state(request: Request) -> ServerState:
    return request.app.state.server


def _json(value: object, status: int = 200) -> Response:
    return Response(encode_json(value), status_code=status, media_type="application/json")


async def _generate(request: Request, job: Job) -> Response:
    """Run a job and answer with a stream or with one object."""
    state = _state(request)
    engine = state.ready_engine()
    answer = Answer(job=job, created=int(state.clock.unix()))
    writer = TokenWriter(engine.tokenizer, as_ids=job.tokens_as_ids)
    sources = await state.open(engine, job)
    if job.is_stream:
        if any(one.slo is not None for one in job.requests):
            try:
                await until_disconnect(request.receive, begun(sources))
            except ClientGoneError:
                return Response(status_code=STATUS_CLIENT_GONE)
        return EventStream(_counted(state, stream(answer, sources, writer)))
    with state.working():
        try:
            await until_disconnect(request.receive, gather(answer, sources))
        except ClientGoneError:
            return Response(status_code=STATUS_CLIENT_GONE)
    reply = chat_reply if job.role else completion_reply
    return _json(reply(answer, writer))


async def _counted(state: ServerState, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    with state.working():
        async with contextlib.aclosing(events):
            async for event in events:
                yield event


@router.post("/v1/chat/completions", responses=replies(ChatReply, is_streamed=True))
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    state = _state(request)
    engine = state.ready_engine("generate")
    model = state.checked_model(body.model)
    job = await chat_job(
        engine,
        body,
        response_id=answer_id("chatcmpl-", request.headers.get(REQUEST_ID), body.request_id),
        model=model,
        adapter=await state.adapter(engine, model),
        options=state.config.api,
    )
    return await _generate(request, job)


@router.post("/v1/completions", responses=replies(CompletionReply, is_streamed=True))
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue one or more prompts."""
    state = _state(request)
    engine = state.ready_engine("generate")
    model = state.checked_model(body.model)
    job = await completion_job(
        engine,
        body,
        response_id=answer_id("cmpl-", request.headers.get(REQUEST_ID), body.request_id),
        model=model,
        adapter=await state.adapter(engine, model),
        options=state.config.api,
    )
    return await _generate(request, job)


def _card(state: ServerState, engine: "AsyncLLM", name: str) -> dict[str, Any]:
    root, parent = engine.model_name, None
    if name not in state.model_names:
        adapter = next(known for known in state.lora_requests if known.lora_name == name)
        root, parent = adapter.lora_path, adapter.base_model_name or state.model_names[0]
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "jaxserve",
        "root": root,
        "parent": parent,
        "max_model_len": engine.max_model_len,
    }


@router.get("/v1/models", responses=replies(ModelList))
async def models(request: Request) -> Response:
    """List the names under which the model and its adapters are served."""
    state = _state(request)
    engine = state.ready_engine()
    names = [*state.model_names, *(known.lora_name for known in state.lora_requests)]
    return _json({"object": "list", "data": [_card(state, engine, name) for name in names]})


@router.get("/v1/models/{name:path}", responses=replies(ModelCard))
async def model(name: str, request: Request) -> Response:
    """Describe the model of one name."""
    state = _state(request)
    engine = state.ready_engine()
    return _json(_card(state, engine, state.checked_model(name)))


@router.post("/tokenize", responses=replies(Tokenized))
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize_text(body: TokenizeBody, request: Request) -> Response:
    """Turn a prompt, or messages, into token ids."""
    state = _state(request)
    engine = state.ready_engine()
    state.checked_model(body.model)
    return _json(await tokenize(engine, body, state.config.api))


@router.post("/detokenize", responses=replies(Detokenized))
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Turn token ids into text."""
    state = _state(request)
    engine = state.ready_engine()
    state.checked_model(body.model)
    body.check_extra()
    bad = next((t for t in body.tokens if not 0 <= t < engine.vocab_size), None)
    if bad is not None:
        raise RequestError(
            f"tokens must be ids below {engine.vocab_size}, got {str(bad)[:40]}.", param="tokens"
        )
    text = tokenizer_of(engine).decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return _json({"prompt": text})


@router.get("/health", response_class=Response, responses=_HEALTH)
async def health(request: Request) -> Response:
    """Answer 200 when requests are taken: the model is warm and the server is not stopping.

    With several replicas the body tells how each stands; one that lives is enough for 200.
    """
    state = _state(request)
    status = 200 if state.is_healthy() else 503
    found = () if state.engine is None else state.engine.replicas
    if not found:
        return Response(status_code=status)
    replicas = [
        {
            "index": one.index,
            "state": one.state,
            "tier_ms": None if one.tier is None else 1000 * one.tier,
            "open_completions": one.num_open,
            "deaths": one.deaths,
        }
        for one in found
    ]
    is_whole = not any(one.state in ("starting", "removed") for one in found)
    word = ("ok" if is_whole else "degraded") if status == 200 else "unavailable"
    return _json({"status": word, "replicas": replicas}, status)


@router.get("/ping", response_class=Response, responses=_HEALTH)
async def ping(request: Request) -> Response:
    """Answer like `GET /health`."""
    return await health(request)


@router.post("/ping", response_class=Response, responses=_HEALTH)
async def ping_post(request: Request) -> Response:
    """Answer like `GET /health`, for platforms that probe with POST."""
    return await health(request)


@router.get("/version", responses=replies(Version))
async def version() -> Response:
    """Tell the server's version."""
    return _json({"version": __version__})


@router.get("/load", responses=replies(Load))
async def load(request: Request) -> Response:
    """Tell how many generating requests are being answered."""
    return _json({"server_load": _state(request).load})


@router.get("/metrics", response_class=Response, responses=_METRICS)
async def metrics(request: Request) -> Response:
    """Tell everything that Prometheus scrapes."""
    state = _state(request)
    engine = state.engine
    page = ""
    if engine is not None:
        aliases = state.config.api.metrics_alias
        page = engine.metrics.render(state.model_names[0], aliases=aliases)
    return Response(page, headers={"Content-Type": CONTENT_TYPE})


def create_app(state: ServerState) -> FastAPI:
    """Build the application.

    Args:
        state: What all requests share; its engine may still be missing.

    Returns:
        An ASGI application.
    """
    config = state.config
    hide_docs: dict[str, Any] = {}
    if config.api.disable_fastapi_docs:
        hide_docs = {"openapi_url": None, "docs_url": None, "redoc_url": None}
    app = FastAPI(title="jaxserve", version=__version__, **hide_docs)
    app.state.server = state
    app.include_router(router)
    app.include_router(admin.router, include_in_schema=config.access.enable_admin_api)
    app.include_router(lora_routes.router, include_in_schema=config.access.opens_loras)
    if not config.api.disable_page:
        app.include_router(page_router(state))
    app.include_router(pooling_routes.router)
    errors.install(app)
    # the last one added sees a request first
    app.add_middleware(BodyLimit, max_bytes=config.listen.max_request_body_bytes)
    if config.access.api_key:
        app.add_middleware(ApiKeys, keys=config.access.api_key)
    if config.access.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.access.allowed_origins),
            allow_methods=list(config.access.allowed_methods),
            allow_headers=list(config.access.allowed_headers),
            allow_credentials=config.access.allow_credentials,
        )
    app.add_middleware(RequestIds)
    if config.listen.root_path:
        app.add_middleware(RootPath, path=config.listen.root_path.rstrip("/"))
    return app
