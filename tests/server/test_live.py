"""A real server on the loopback interface: the official client, and clients that leave."""

import json
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from jaxserve.engine.async_engine import AsyncLLM

MESSAGES = [{"role": "user", "content": "Tell me something."}]
LONG = {"max_tokens": 900, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_openai_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, seed=1)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_openai_chat_stream(client: openai.OpenAI):
    shared = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "seed": 2}
    whole = client.chat.completions.create(**shared)
    parts, usage = [], None
    for chunk in client.chat.completions.create(
        **shared, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        parts += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_openai_stream_helper(client: openai.OpenAI, engine: AsyncLLM):
    end = {str(engine.tokenizer.eos_token_ids[0]): 100}
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, logit_bias=end, extra_body={"min_tokens": 5}
    ) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert "chunk" in kinds
    assert final.choices[0].message.role == "assistant"


def test_openai_logprobs_n_and_seed(client: openai.OpenAI):
    answers = [
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=4, n=2, seed=3, logprobs=True,
            top_logprobs=2, extra_body={"ignore_eos": True},
        )
        for _ in range(2)
    ]  # fmt: skip
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    entry = answers[0].choices[1].logprobs.content[3]
    assert len(entry.top_logprobs) == 2
    assert entry.logprob <= 0


def test_openai_completions(client: openai.OpenAI):
    answer = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.tokens) <= 3
    chunks = list(client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_openai_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "jaxserve"


def test_openai_errors_have_their_classes(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.type == "BadRequestError"


def raw_request(url: str, path: str, body: dict[str, object]) -> socket.socket:
    """Send a request and keep the connection, to leave whenever we like."""
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=20)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def test_leaving_a_stream_frees_its_pages_at_once(
    url: str, engine: AsyncLLM, wait_for: Callable[..., None]
):
    free = engine._host.engine.pool.num_pages
    aborted = engine.metrics.finished_by_reason["abort"]
    connection = raw_request(url, "/v1/completions", {"prompt": "x", "stream": True, **LONG})
    seen = b""
    while seen.count(b"data: ") < 5:
        seen += connection.recv(4096)
    tokens = engine.metrics.generation_tokens
    connection.close()
    wait_for(lambda: engine.num_unfinished == 0)
    wait_for(lambda: engine.num_free_pages == free)
    assert engine.metrics.finished_by_reason["abort"] == aborted + 1
    assert engine.metrics.generation_tokens - tokens < 300, "it went on after the client had left"


def test_leaving_while_waiting_for_a_whole_answer_aborts_it(
    url: str, engine: AsyncLLM, wait_for: Callable[..., None]
):
    aborted = engine.metrics.finished_by_reason["abort"]
    connection = raw_request(url, "/v1/completions", {"prompt": ["x", "y"], **LONG})
    wait_for(lambda: engine.num_unfinished == 2)
    connection.close()
    wait_for(lambda: engine.num_unfinished == 0)
    assert engine.metrics.finished_by_reason["abort"] == aborted + 2


def test_leaving_in_the_queue_aborts_too(url: str, engine: AsyncLLM, wait_for: Callable[..., None]):
    free = engine._host.engine.pool.num_pages
    connections = [
        raw_request(url, "/v1/completions", {"prompt": "x", "stream": True, **LONG})
        for _ in range(10)  # more than the engine has rows
    ]
    wait_for(lambda: engine.num_unfinished == 10)
    for connection in connections:
        connection.close()
    wait_for(lambda: engine.num_unfinished == 0)
    wait_for(lambda: engine.num_free_pages == free)


def test_tokens_arrive_while_the_model_still_works(url: str):
    body = {"prompt": "x", "stream": True, **LONG}
    start = time.monotonic()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        assert response.headers["x-accel-buffering"] == "no"
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        first = time.monotonic() - start
        last_line = ""
        for line in lines:
            last_line = line
    total = time.monotonic() - start
    assert last_line == "data: [DONE]"
    assert first < total / 2


def test_many_clients_at_once(url: str, engine: AsyncLLM):
    results: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"prompt": f"client {number % 4}", "max_tokens": 40, "temperature": 0}
        if number % 2:
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
            results[number] = answer["choices"][0]["text"]
        else:
            with httpx.stream(
                "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60
            ) as response:
                events = [line[6:] for line in response.iter_lines() if line]
            assert events.pop() == "[DONE]"
            results[number] = "".join(json.loads(e)["choices"][0]["text"] for e in events)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert all(results.values())
    assert engine.num_unfinished == 0
