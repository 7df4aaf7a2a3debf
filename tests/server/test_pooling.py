"""Embeddings, scores and reranking over HTTP, from a tiny encoder and from a tiny decoder."""

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import numpy as np
import openai
import pytest
from hypothesis import strategies as st

from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.engine.encoder_host import EncoderHost
from jaxserve.serve.app import create_app
from jaxserve.serve.options import ServerConfig
from jaxserve.serve.state import ServerState
from tests.bert import BERT, golden, pooled, rows
from tests.cases import examples
from tests.server.conftest import Ask, asking
from tests.server.test_fuzz import ODD, TEXT, some

EMBEDDINGS, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"
MESSAGES = [{"role": "user", "content": "Tell me something."}]


@pytest.fixture(scope="session")
def encoder() -> Iterator[AsyncLLM]:
    made = AsyncLLM(BERT / "plain", warmup="lazy", max_num_queued_reqs=32)
    yield made
    made.close()


@pytest.fixture(scope="session")
def ask_encoder(encoder: AsyncLLM) -> Ask:
    return asking(encoder)


@pytest.fixture(scope="session")
def ask_cross() -> Iterator[Ask]:
    made = AsyncLLM(BERT / "cross", warmup="lazy")
    yield asking(made)
    made.close()


@pytest.fixture(params=["encoder", "decoder"])
def ask_any(request: pytest.FixtureRequest) -> Ask:
    return request.getfixturevalue("ask_encoder" if request.param == "encoder" else "ask")


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    return error


def vectors(reply: dict[str, Any]) -> np.ndarray:
    return np.asarray([entry["embedding"] for entry in reply["data"]], np.float32)


# Embeddings -----------------------------------------------------------------------------------


def test_embeddings_have_the_form_of_the_standard(ask_any: Ask) -> None:
    reply = ok(ask_any(EMBEDDINGS, {"model": "alias", "input": ["a cat", "rain"]}))
    assert reply["object"] == "list"
    assert reply["model"] == "alias"
    assert reply["id"].startswith("embd-")
    assert [entry["index"] for entry in reply["data"]] == [0, 1]
    assert {entry["object"] for entry in reply["data"]} == {"embedding"}
    assert np.linalg.norm(vectors(reply), axis=1) == pytest.approx(1, abs=1e-5)
    usage = reply["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] > 0


def test_every_form_of_input_gives_the_same(ask_any: Ask) -> None:
    tokens = ok(ask_any("/tokenize", {"prompt": "a cat"}))["tokens"]
    found = [
        vectors(ok(ask_any(EMBEDDINGS, {"input": form})))
        for form in ("a cat", ["a cat"], tokens, [tokens], ["a cat", "rain"])
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other[0], found[0][0], atol=1e-5)


def test_vectors_agree_with_the_oracle(ask_encoder: Ask) -> None:
    case = golden("plain")
    reply = ok(ask_encoder(EMBEDDINGS, {"input": rows(case)}))
    np.testing.assert_allclose(vectors(reply), pooled(case, "mean"), atol=1e-5)
    assert reply["usage"]["prompt_tokens"] == case["lengths"].sum()


def test_base64_holds_the_same_numbers(ask_any: Ask) -> None:
    plain = vectors(ok(ask_any(EMBEDDINGS, {"input": "a cat"})))[0]
    reply = ok(ask_any(EMBEDDINGS, {"input": "a cat", "encoding_format": "base64"}))
    found = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_vectors_may_be_left_as_they_are(ask_any: Ask) -> None:
    raw = vectors(ok(ask_any(EMBEDDINGS, {"input": "a cat", "normalize": False})))[0]
    unit = vectors(ok(ask_any(EMBEDDINGS, {"input": "a cat", "use_activation": True})))[0]
    # The encoder has normalised on the device already, as its files say.
    np.testing.assert_allclose(raw / np.linalg.norm(raw), unit, atol=1e-5)


def test_messages_are_embedded_through_the_template(ask: Ask, ask_encoder: Ask) -> None:
    prompt = ok(ask("/tokenize", {"messages": MESSAGES}))["tokens"]
    by_ids = vectors(ok(ask(EMBEDDINGS, {"input": prompt})))
    by_messages = ok(ask(EMBEDDINGS, {"messages": MESSAGES}))
    np.testing.assert_allclose(vectors(by_messages), by_ids, atol=1e-5)
    assert by_messages["usage"]["prompt_tokens"] == len(prompt)
    assert "template" in refusal(ask_encoder(EMBEDDINGS, {"messages": MESSAGES}))["message"]


def test_texts_are_cut_when_asked(ask_encoder: Ask) -> None:
    long = {"input": "abcdefgh " * 20}
    error = refusal(ask_encoder(EMBEDDINGS, long))
    assert "maximum context length is 48 tokens, but a text of input has 162" in error["message"]
    cut = ok(ask_encoder(EMBEDDINGS, {**long, "truncate_prompt_tokens": -1}))
    assert cut["usage"]["prompt_tokens"] == 48
    start, end = (
        vectors(
            ok(
                ask_encoder(
                    EMBEDDINGS,
                    {"input": "abcdef", "truncate_prompt_tokens": 4, "truncation_side": side},
                )
            )
        )
        for side in ("right", "left")
    )
    assert np.abs(start - end).max() > 1e-3


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({"input": ""}, "empty string: it has no embedding", "input"),
        ({"input": []}, "1 to 4096 texts, got 0", "input"),
        ({"input": ["a", ""]}, "empty string", "input"),
        ({"input": [[]]}, "without tokens", "input"),
        ({"input": ["a"] * 4097}, "got 4097; send several requests", "input"),
        ({"input": [10**9]}, "token ids must be in [0,", "input"),
        ({"input": [-1]}, "got -1", "input"),
        ({"input": 5}, "input: Input should be a valid string", "input"),
        ({"input": ["a", 5]}, "input:", "input"),
        ({"input": None}, "needs input, or messages in its place; got neither", "input"),
        ({"input": "a", "messages": MESSAGES}, "got both", "input"),
        ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'", "encoding_format"),
        ({"input": "a", "dimensions": 5}, "no matryoshka model", "dimensions"),
        ({"input": "a", "dimensions": 0}, "greater than or equal to 1", "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "from 1 to", "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "or equal to -1", "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 5000}, "got 5000", "truncate_prompt_tokens"),
        ({"input": "\ud800"}, "surrogate", None),
        ({"input": "a", "request_id": ""}, "request_id must be 1 to", "request_id"),
    ],
)
def test_bad_embeddings_are_refused(
    ask_any: Ask, body: dict[str, Any], words: str, param: str | None
) -> None:
    error = refusal(ask_any(EMBEDDINGS, body))
    assert words in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("path", [EMBEDDINGS, SCORE, RERANK])
def test_an_unknown_model_is_404(ask_any: Ask, path: str) -> None:
    bodies = {"input": "a", "text_1": "a", "text_2": "b", "query": "a", "documents": ["b"]}
    if path == SCORE:
        bodies.pop("query"), bodies.pop("documents")
    error = refusal(ask_any(path, {**bodies, "model": "tiiny"}), 404)
    assert error["param"] == "model"


def test_models_cut_to_the_lengths_they_are_made_for(tmp_path: Path) -> None:
    for file in (BERT / "plain").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"matryoshka_dimensions": [8, 16]}))
    llm = AsyncLLM(tmp_path, warmup="lazy")
    try:
        asked = asking(llm)
        whole = vectors(ok(asked(EMBEDDINGS, {"input": "a cat"})))[0]
        part = vectors(ok(asked(EMBEDDINGS, {"input": "a cat", "dimensions": 8})))[0]
        np.testing.assert_allclose(part, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-5)
        error = refusal(asked(EMBEDDINGS, {"input": "a cat", "dimensions": 9}))
        assert "dimensions must be 8, 16 for this model, got 9" in error["message"]
    finally:
        llm.close()


# Scores and reranking -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("query", "items")]
)
def test_scores(ask_any: Ask, path: str, names: tuple[str, str]) -> None:
    texts = ["the cat", "rain", "a cat"]
    reply = ok(ask_any(path, {names[0]: "a cat", names[1]: texts}))
    assert reply["object"] == "list"
    assert [entry["index"] for entry in reply["data"]] == [0, 1, 2]
    assert {entry["object"] for entry in reply["data"]} == {"score"}
    scores = [entry["score"] for entry in reply["data"]]
    found = vectors(ok(ask_any(EMBEDDINGS, {"input": ["a cat", *texts]})))
    assert scores == pytest.approx((found[1:] @ found[0]).tolist(), abs=1e-4)
    assert scores[2] == pytest.approx(1, abs=1e-5)
    assert reply["usage"]["prompt_tokens"] > 0


def test_pairs_are_scored_one_by_one(ask_cross: Ask) -> None:
    case = golden("cross")
    left, right = case["pair_texts"].T.tolist()
    reply = ok(ask_cross(SCORE, {"text_1": left, "text_2": right}))
    expected = 1 / (1 + np.exp(-case["pair_logits"][:, 0].astype(np.float64)))
    assert [e["score"] for e in reply["data"]] == pytest.approx(expected.tolist(), abs=1e-5)
    error = refusal(ask_cross(EMBEDDINGS, {"input": "a"}))
    assert "cross-encoder" in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "a score needs one of text_1, queries, query, data_1, got none of them"),
        ({"text_1": "a"}, "needs one of text_2"),
        ({"text_1": "a", "query": "b", "text_2": "c"}, "got text_1 and query"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "got 2 and 3"),
        ({"text_1": "", "text_2": "b"}, "text_1 must not hold an empty string"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2 must not hold an empty string"),
        ({"text_1": "a", "text_2": []}, "text_2 must hold 1 to 4096 texts"),
        ({"text_1": 5, "text_2": "b"}, "text_1:"),
        ({"query": "a", "items": ["b"], "label_token_ids": [1]}, "label_token_ids cannot be used"),
    ],
)
def test_bad_scores_are_refused(ask_any: Ask, body: dict[str, Any], words: str) -> None:
    assert words in refusal(ask_any(SCORE, body))["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_sorts(ask_any: Ask, path: str) -> None:
    texts = ["rain", {"text": "a cat", "id": 7}, "the cat"]
    body = {"query": "a cat", "documents": texts}
    reply = ok(ask_any(path, body))
    assert reply["id"].startswith("rerank-")
    results = reply["results"]
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert results[0]["document"] == {"text": "a cat", "id": 7}
    assert reply["usage"]["total_tokens"] > 0
    assert reply["meta"]["billed_units"] == {"search_units": 1}
    best = ok(ask_any(path, {**body, "top_n": 1, "return_documents": False}))["results"]
    assert [set(result) for result in best] == [{"index", "relevance_score"}]
    assert len(ok(ask_any(path, {**body, "top_n": 50}))["results"]) == 3


def test_long_documents_are_cut_when_asked(ask_encoder: Ask, ask_cross: Ask) -> None:
    body = {"query": "a cat", "documents": ["abcdefgh " * 20]}
    for ask in (ask_encoder, ask_cross):
        assert "maximum context length" in refusal(ask(RERANK, body))["message"]
        for cut in ({"truncate_prompt_tokens": -1}, {"max_tokens_per_doc": 4096}):
            assert len(ok(ask(RERANK, {**body, **cut}))["results"]) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a", "documents": [""]}, "documents"),
        ({"query": "a", "documents": [{"text": ""}]}, "documents"),
        ({"query": "a", "documents": [{"title": "b"}]}, "documents"),
        ({"query": "a", "documents": "b"}, "documents"),
        ({"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
    ],
)
def test_bad_reranking_is_refused(ask_any: Ask, body: dict[str, Any], param: str) -> None:
    assert (refusal(ask_any(RERANK, body))["param"] or "").startswith(param)


# The server around it -------------------------------------------------------------------------


def test_an_encoder_answers_everything_else(ask_encoder: Ask) -> None:
    (card, _) = ok(ask_encoder("/v1/models"))["data"]
    assert card["max_model_len"] == 48
    tokens = ok(ask_encoder("/tokenize", {"prompt": "a cat"}))["tokens"]
    text = ok(ask_encoder("/detokenize", {"tokens": tokens, "skip_special_tokens": True}))
    assert text["prompt"] == "a cat"
    assert ask_encoder("/health").status_code == 200
    page = ask_encoder("/metrics").text
    assert 'jaxserve:pooled_texts_total{engine="0",model_name="tiny"}' in page
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
    ):
        assert "does not generate here" in refusal(ask_encoder(path, body))["message"]


def test_a_generating_server_may_refuse_to_embed(tiny_folder: Path) -> None:
    llm = AsyncLLM(tiny_folder, warmup="lazy", runner="generate", kv_cache_memory_bytes=32 << 20)
    try:
        for path, body in (
            (EMBEDDINGS, {"input": "a"}),
            (SCORE, {"text_1": "a", "text_2": "b"}),
            (RERANK, {"query": "a", "documents": ["b"]}),
        ):
            assert "does not embed or score" in refusal(asking(llm)(path, body))["message"]
    finally:
        llm.close()


def test_a_client_that_leaves_frees_its_texts(
    encoder: AsyncLLM, monkeypatch: pytest.MonkeyPatch, wait_for: Any
) -> None:
    host = encoder._loaded
    assert isinstance(host, EncoderHost)
    entered, opened = threading.Event(), threading.Event()
    run, ran = host.runner.run, []

    def held(texts: Any, shape: Any) -> Any:
        entered.set()
        assert opened.wait(20)
        ran.append(len(texts))
        return run(texts, shape)

    monkeypatch.setattr(host.runner, "run", held)
    state = ServerState(ServerConfig.from_settings({}), model="tiny", engine=encoder)
    app = create_app(state)

    async def leave() -> None:
        body = json.dumps({"input": [[5] * 40] * 200 + [[5]]}).encode()
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http", "method": "POST", "path": EMBEDDINGS, "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0"},
            "http_version": "1.1", "scheme": "http", "server": ("test", 80),
        }  # fmt: skip
        task = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.to_thread(entered.wait, 20)
        gone.set()
        await task

    asyncio.run(leave())
    opened.set()
    wait_for(lambda: encoder.num_unfinished == 0)
    wait_for(lambda: len(ran) == 1)
    assert state.load == 0


def test_many_clients_at_once_get_their_own(ask_encoder: Ask, encoder: AsyncLLM) -> None:
    case = golden("plain")
    texts, expected = rows(case), pooled(case, "mean")
    app = create_app(ServerState(ServerConfig.from_settings({}), model="t", engine=encoder))

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(
                *(client.post(EMBEDDINGS, json={"input": texts[i % 7]}) for i in range(28))
            )

    for index, response in enumerate(asyncio.run(run())):
        np.testing.assert_allclose(vectors(ok(response))[0], expected[index % 7], atol=1e-5)


def test_the_official_client(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        reply = client.embeddings.create(model="tiny", input=["a cat", "rain"])
        plain = client.embeddings.create(model="tiny", input="a cat", encoding_format="float")
        assert reply.usage.prompt_tokens == 9
        np.testing.assert_allclose(reply.data[0].embedding, plain.data[0].embedding, atol=1e-6)
        with pytest.raises(openai.BadRequestError, match="empty string"):
            client.embeddings.create(model="tiny", input="")


FIELDS = {
    "encoding_format": some(st.sampled_from(["float", "base64"])),
    "dimensions": some(st.integers(1, 24)),
    "truncate_prompt_tokens": some(st.integers(-1, 9)),
    "truncation_side": some(st.sampled_from(["left", "right"])),
    "normalize": some(st.booleans()),
    "priority": some(st.integers(-5, 5)),
    "top_n": some(st.integers(0, 3)),
    "max_tokens_per_doc": some(st.integers(1, 20)),
    "input": some(st.one_of(TEXT, st.lists(TEXT, max_size=3), st.lists(st.integers(0, 63)))),
    "text_1": some(TEXT),
    "text_2": some(st.lists(TEXT, max_size=3)),
    "query": some(TEXT),
    "documents": some(st.lists(st.one_of(TEXT, st.fixed_dictionaries({"text": TEXT, "x": ODD})))),
}


@pytest.mark.parametrize("path", [EMBEDDINGS, SCORE, RERANK])
@hypothesis.settings(
    max_examples=examples(25, 8),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(body=st.fixed_dictionaries({}, optional=FIELDS))
def test_no_body_breaks_it(ask_any: Ask, path: str, body: dict[str, Any]) -> None:
    response = ask_any(path, body)
    assert response.status_code in (200, 400), response.text
