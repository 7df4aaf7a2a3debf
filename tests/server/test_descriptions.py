"""Bodies and answers are what openapi.json says."""

import asyncio
from typing import Any

import httpx
import pytest

from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.serve import reply_models as models
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
EVERYTHING = {
    "max_tokens": 4, "ignore_eos": True, "prompt_logprobs": 1, "return_token_ids": True,
    "return_weight_versions": True, "slo": {"ttft_ms": 1e6, "tpot_ms": 1e6, "e2e_ms": 2e6},
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 2}, models.CompletionReply),
        (COMPLETIONS, {"prompt": "a", "logprobs": 2, "echo": True, **EVERYTHING},
         models.CompletionReply),
        (CHAT, {"messages": MESSAGES, "max_tokens": 2}, models.ChatReply),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **EVERYTHING},
         models.ChatReply),
        (CHAT, {"messages": MESSAGES, "tools": [TOOL], "max_tokens": 40,
                "tool_choice": "required"}, models.ChatReply),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, models.Tokenized),
        ("/detokenize", {"tokens": [97]}, models.Detokenized),
        ("/v1/embeddings", {"input": ["a", "b"]}, models.EmbeddingReply),
        ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, models.EmbeddingReply),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c"]}, models.ScoreReply),
        ("/v1/rerank", {"query": "a", "documents": ["b", {"text": "c", "more": 1}]},
         models.RerankReply),
        ("/v1/models", None, models.ModelList),
        ("/v1/models/tiny", None, models.ModelCard),
        ("/version", None, models.Version),
        ("/load", None, models.Load),
        ("/pages/live", None, models.Live),
    ],
)  # fmt: skip
def test_answers_hold_what_is_described_and_nothing_else(ask, path: str, body: Any, model: Any):
    settings = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    response = ask(path, body, settings=settings)
    assert response.status_code == 200, response.text
    model.model_validate_json(response.content, strict=True)
    models.ErrorReply.model_validate_json(ask(path, {"model": 5}).content, strict=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"), ("max_tokens", "3"), ("max_tokens", True), ("stream", 1),
        ("stream", "true"), ("echo", 0), ("stop_token_ids", ["1"]), ("seed", "7"),
        ("stream_options", {"include_usage": "yes"}), ("slo", {"ttft_ms": "5"}),
        ("logit_bias", {"1": "5"}), ("max_tokens", 3.5), ("prompt", [True, False]),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(ask, field: str, value: Any):
    response = ask(COMPLETIONS, {"prompt": "a", field: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].split(".")[0].split("[")[0] == field


def test_whole_numbers_are_integers_however_they_are_written(ask):
    body = {"prompt": "a", "max_tokens": 2.0, "temperature": 1, "logit_bias": {"97": 1}}
    assert ask(COMPLETIONS, body).status_code == 200


@pytest.mark.parametrize("n", [33, 16384])
def test_more_completions_than_are_ever_accepted_are_no_matter_of_waiting(ask, n: int):
    response = ask(COMPLETIONS, {"prompt": "a", "n": n, "temperature": 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"


# Grammars that fail on the way -----------------------------------------------------------------

MANY = {"type": "object", "properties": {f"key{i}": {} for i in range(1_200)}}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_grammar_that_outgrows_its_limits_is_the_requests_fault(ask, events_of, path: str):
    body = {"prompt": "a", "messages": MESSAGES, "structured_outputs": {"json": MANY}}
    body.pop("messages" if path == COMPLETIONS else "prompt")
    response = ask(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "structured_outputs")
    assert "cannot be followed beyond" in error["message"]
    last = events_of(ask(path, body | {"stream": True}).text)[-1]
    assert last["error"]["code"] == 400


@pytest.mark.parametrize("stream", [False, True])
def test_resumed_output_that_breaks_the_grammar_is_refused(ask, engine: AsyncLLM, stream: bool):
    good, bad = (engine.tokenizer.encode(text) for text in ("abc", "abx"))
    body = {"prompt": "a", "structured_outputs": {"regex": "[a-c]{9}"}, "stream": stream}
    response = ask(COMPLETIONS, body | {"output_token_ids": bad})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "output_token_ids")
    assert f"does not allow token {bad[2]} at position 2" in error["message"]
    assert ask(COMPLETIONS, body | {"output_token_ids": good}).status_code == 200


# Objectives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_answers_tell_which_objectives_were_kept(ask, events_of, path: str):
    body = {"prompt": "a", "messages": MESSAGES, "max_tokens": 4, "n": 2, "ignore_eos": True}
    body |= {"temperature": 1, "slo": {"ttft_ms": 1e-6, "e2e_ms": 1e9}}
    body.pop("messages" if path == COMPLETIONS else "prompt")
    kept = {"slo": {"attained": False, "ttft": False, "e2e": True}}
    assert ask(path, body).json()["metrics"] == kept
    chunks = events_of(ask(path, body | {"stream": True}).text)
    assert [c["metrics"] for c in chunks if "metrics" in c] == [kept]
    assert chunks[-1]["metrics"] == kept
    del body["slo"]
    assert "metrics" not in ask(path, body).json()


# Stopping --------------------------------------------------------------------------------------


def test_embeddings_that_outlast_the_drain_are_told_to_go_elsewhere(engine: AsyncLLM):
    state = ServerState(ServerConfig.from_settings({}), model="tiny", engine=engine)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"input": [[1 + i % 200] * 900 for i in range(300)]}
            call = asyncio.create_task(client.post("/v1/embeddings", json=body, timeout=60))
            while not engine.num_unfinished:  # noqa: ASYNC110  the engine sets no event
                await asyncio.sleep(0.001)
            state.is_draining = True
            assert not await state.idle(0)
            await state.give_up_calls()
            assert await state.idle(10)
            return await call

    response = asyncio.run(run())
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "stopping" in response.json()["error"]["message"]
