"""Routes that embed, score and rerank."""

import base64
import dataclasses
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.core.errors import RequestError
from jaxserve.serve.middleware import REQUEST_ID
from jaxserve.serve.pooling_api import (
    MAX_TEXTS,
    Document,
    EmbeddingBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
)
from jaxserve.serve.reply_models import EmbeddingReply, RerankReply, ScoreReply, replies
from jaxserve.serve.sse import (
    STATUS_CLIENT_GONE,
    ClientGoneError,
    encode_json,
    until_disconnect,
)
from jaxserve.serve.translate import answer_id, encode_chat

if TYPE_CHECKING:
    from jaxserve.core.pooling import EmbeddingRequestOutput, ScoringRequestOutput
    from jaxserve.engine.async_engine import AsyncLLM
    from jaxserve.engine.pooling import Truncation
    from jaxserve.serve.state import ServerState

router = APIRouter()


def _state(request: Request) -> "ServerState":
    return request.app.state.server


async def _answer(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """Do the work, unless the client goes away first."""
    state = _state(request)
    with state.working():
        try:
            reply = await until_disconnect(request.receive, state.call(work))
        except ClientGoneError:
            return Response(status_code=STATUS_CLIENT_GONE)
    return Response(encode_json(reply), media_type="application/json")


def _truncation(body: PoolingBody) -> "Truncation":
    from jaxserve.engine.pooling import Truncation  # noqa: PLC0415  loads the tokenizers

    return Truncation(limit=body.truncate_prompt_tokens, keeps_end=body.truncation_side == "left")


def _check_count(texts: Sequence[object], param: str) -> None:
    if not 0 < len(texts) <= MAX_TEXTS:
        raise RequestError(
            f"{param} must hold 1 to {MAX_TEXTS} texts, got {len(texts)}"
            f"{'; send several requests' if texts else ''}.",
            param=param,
        )


def _usage(num_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


def _head(state: "ServerState", request: Request, body: PoolingBody, prefix: str) -> dict[str, Any]:
    return {
        "id": answer_id(prefix, request.headers.get(REQUEST_ID), body.request_id),
        "object": "list",
        "created": int(state.clock.unix()),
        "model": state.checked_model(body.model),
    }


@router.post("/v1/embeddings", responses=replies(EmbeddingReply))
async def embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Turn texts into vectors."""
    state = _state(request)
    engine = state.ready_engine("pooling")
    head = _head(state, request, body, "embd-")
    body.check_extra()
    prompts, special = await _embedding_prompts(engine, body, state)

    async def work() -> dict[str, Any]:
        outputs = await engine.embed(
            prompts,
            dimensions=body.dimensions,
            normalize=body.use_activation if body.normalize is None else body.normalize,
            truncation=_truncation(body),
            add_special_tokens=special,
            priority=body.priority,
            lora_request=await state.adapter(engine, head["model"]),
        )
        return _embedding_reply(head, outputs, as_base64=body.encoding_format == "base64")

    return await _answer(request, work())


async def _embedding_prompts(
    engine: "AsyncLLM", body: EmbeddingBody, state: "ServerState"
) -> tuple[list[str | list[int]], bool]:
    """Return the inputs, and whether special tokens are put around texts."""
    if (body.input is None) == (not body.messages):
        raise RequestError(
            "an embedding needs input, or messages in its place; got "
            f"{'neither' if body.input is None else 'both'}.",
            param="input",
        )
    if body.input is None:
        return [await encode_chat(engine, body, state.config.api)], False
    special = body.add_special_tokens is not False
    if isinstance(body.input, str):
        return [body.input], special
    if body.input and isinstance(body.input[0], int):
        return [[token for token in body.input if isinstance(token, int)]], special
    _check_count(body.input, "input")
    return [item if isinstance(item, str) else _ids(item) for item in body.input], special


def _ids(item: object) -> list[int]:
    return list(item) if isinstance(item, list) else []


def _embedding_reply(
    head: dict[str, Any], outputs: "Sequence[EmbeddingRequestOutput]", *, as_base64: bool
) -> dict[str, Any]:
    def written(vector: np.ndarray) -> str | list[float]:
        if not as_base64:
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [
        {"index": index, "object": "embedding", "embedding": written(output.outputs.vector)}
        for index, output in enumerate(outputs)
    ]
    used = sum(len(output.prompt_token_ids) for output in outputs)
    return {**head, "data": data, "usage": _usage(used)}


@router.post("/v1/score", responses=replies(ScoreReply))
@router.post("/score", include_in_schema=False)
async def score(body: ScoreBody, request: Request) -> Response:
    """Say how well pairs of texts go together."""
    state = _state(request)
    engine = state.ready_engine("pooling")
    head = _head(state, request, body, "score-")
    body.check_extra()
    if body.label_token_ids is not None:
        raise RequestError(
            "label_token_ids cannot be used: ask /v1/completions for logprobs with "
            "allowed_token_ids instead.",
            param="label_token_ids",
        )
    first = _one_of(body, ("text_1", "queries", "query", "data_1"))
    second = _one_of(body, ("text_2", "documents", "items", "data_2"))

    async def work() -> dict[str, Any]:
        outputs = await engine.score(
            first,
            second,
            truncation=_truncation(body),
            priority=body.priority,
            lora_request=await state.adapter(engine, head["model"]),
        )
        data = [
            {"index": index, "object": "score", "score": output.outputs.score}
            for index, output in enumerate(outputs)
        ]
        return {**head, "data": data, "usage": _usage(_used(outputs))}

    return await _answer(request, work())


def _one_of(body: ScoreBody, names: Sequence[str]) -> list[str]:
    """Return the texts of the one field that is given among those with the same meaning."""
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise RequestError(f"a score needs one of {', '.join(names)}, got {found}.", param=names[0])
    value = getattr(body, given[0])
    texts = [value] if isinstance(value, str) else value
    _check_count(texts, given[0])
    _check_not_empty(texts, given[0])
    return texts


def _check_not_empty(texts: Sequence[str], param: str) -> None:
    if "" in texts:
        raise RequestError(
            f"{param} must not hold an empty string: nothing can be compared with it.", param=param
        )


def _used(outputs: "Sequence[ScoringRequestOutput]") -> int:
    return sum(len(output.prompt_token_ids) for output in outputs)


@router.post("/v1/rerank", responses=replies(RerankReply))
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(body: RerankBody, request: Request) -> Response:
    """Order documents by how well they answer a query."""
    state = _state(request)
    engine = state.ready_engine("pooling")
    head = _head(state, request, body, "rerank-")
    body.check_extra()
    texts = [doc.text if isinstance(doc, Document) else doc for doc in body.documents]
    _check_count(texts, "documents")
    _check_not_empty(texts, "documents")
    _check_not_empty([body.query], "query")
    truncation = _truncation(body)
    if truncation.limit is None and body.max_tokens_per_doc is not None:
        longest = engine.pooling.pooler.max_length
        truncation = dataclasses.replace(truncation, limit=min(longest, body.max_tokens_per_doc))

    async def work() -> dict[str, Any]:
        outputs = await engine.score(
            body.query,
            texts,
            truncation=truncation,
            priority=body.priority,
            lora_request=await state.adapter(engine, head["model"]),
        )
        scores = [output.outputs.score for output in outputs]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        results = [_result(body, i, scores[i]) for i in order[: body.top_n or None]]
        used = _used(outputs)
        return {
            "id": head["id"],
            "model": head["model"],
            "usage": {"prompt_tokens": used, "total_tokens": used},
            "results": results,
            "meta": {"billed_units": {"search_units": 1}},
        }

    return await _answer(request, work())


def _result(body: RerankBody, index: int, score: float) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "relevance_score": score}
    if body.return_documents is not False:
        document = body.documents[index]
        is_text = isinstance(document, str)
        result["document"] = {"text": document} if is_text else document.model_dump()
    return result
