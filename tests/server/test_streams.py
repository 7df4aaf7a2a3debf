"""Streamed answers: their form, and that they say the same as whole ones."""

from typing import Any

import pytest

from jaxserve.engine.async_engine import AsyncLLM

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me something."}]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def stream(ask, events_of):
    """Ask for a stream; return its objects."""

    def run(path: str, **body: Any) -> list[dict[str, Any]]:
        response = ask(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events_of(response.text)

    return run


def whole(ask, path: str, **body: Any) -> dict[str, Any]:
    response = ask(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    """Put the text of one completion together."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for choice in choices
        if choice["index"] == index
    )


def test_chat_stream_has_the_expected_form(stream):
    events = stream(CHAT, messages=MESSAGES, max_tokens=6, **GREEDY)
    first, last = events[0], events[-1]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["stop_reason"] is None
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert all("role" not in event["choices"][0]["delta"] for event in events[1:])


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_equals_whole_text(ask, stream, seed: int):
    # random bytes: half characters, broken ones and control characters all occur
    sampling = {"temperature": 1.5, "seed": seed, "max_tokens": 120, "ignore_eos": True}
    text = whole(ask, CHAT, messages=MESSAGES, **sampling)["choices"][0]["message"]["content"]
    assert joined(stream(CHAT, messages=MESSAGES, **sampling)) == text
    text = whole(ask, COMPLETIONS, prompt="Hello", **sampling)["choices"][0]["text"]
    events = stream(COMPLETIONS, prompt="Hello", **sampling)
    assert joined(events) == text
    assert len(events) > 20


def test_finish_rides_on_the_last_content_chunk(ask, stream):
    events = stream(COMPLETIONS, prompt="x", logit_bias={"10": 100}, max_tokens=3, **GREEDY)
    assert len(events) == 3, "one chunk per token, none besides"
    assert events[-1]["choices"][0]["text"] != ""
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_characters_of_several_tokens_come_whole(ask, stream):
    # the model may say nothing but the four bytes of an emoji, in any order
    ids = whole(ask, "/tokenize", prompt="🎉")["tokens"]
    assert len(ids) == 4
    sampling = {"allowed_token_ids": ids, "temperature": 1, "seed": 0, "max_tokens": 200}
    text = whole(ask, COMPLETIONS, prompt="x", **sampling)["choices"][0]["text"]
    events = stream(COMPLETIONS, prompt="x", **sampling)
    assert joined(events) == text
    assert all(event["choices"][0]["text"] or event is events[-1] for event in events)


def test_usage_only_when_asked_for(ask, stream):
    body = {"messages": MESSAGES, "max_tokens": 4, **GREEDY}
    expected = whole(ask, CHAT, **body)["usage"]
    events = stream(CHAT, **body, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    usage = events[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        expected["prompt_tokens"], 4, expected["total_tokens"],
    )  # fmt: skip
    assert all("usage" not in event for event in events[:-1])


def test_continuous_usage_grows(stream):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(COMPLETIONS, prompt="x", max_tokens=4, stream_options=options, **GREEDY)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-2:] == [4, 4]
    alone = {"include_usage": False, "continuous_usage_stats": True}
    events = stream(COMPLETIONS, prompt="x", max_tokens=4, stream_options=alone, **GREEDY)
    assert all("usage" not in event for event in events)


def test_usage_can_be_forced_by_the_server(ask, events_of):
    body = {"prompt": "x", "max_tokens": 2, "stream": True, **GREEDY}
    response = ask(COMPLETIONS, body, settings={"enable_force_include_usage": True})
    assert all("usage" in event for event in events_of(response.text))


def test_several_completions_are_interleaved_by_index(ask, stream):
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 1, "seed": 4, "n": 3}
    events = stream(CHAT, **body)
    roles = [e["choices"][0]["index"] for e in events if "role" in e["choices"][0]["delta"]]
    assert roles == [0, 1, 2]
    expected = whole(ask, CHAT, **body)["choices"]
    for choice in expected:
        assert joined(events, choice["index"]) == choice["message"]["content"]
    finished = [e["choices"][0]["index"] for e in events if e["choices"][0]["finish_reason"]]
    assert sorted(finished) == [0, 1, 2]


def test_several_prompts_in_one_stream(ask, stream):
    body = {"prompt": ["Hello", "World", "again"], "max_tokens": 9, **GREEDY}
    events = stream(COMPLETIONS, **body)
    for choice in whole(ask, COMPLETIONS, **body)["choices"]:
        assert joined(events, choice["index"]) == choice["text"]


def test_chat_logprobs_arrive_with_every_token(ask, stream):
    body = {"messages": MESSAGES, "max_tokens": 10, "logprobs": True, "top_logprobs": 2, **GREEDY}
    events = stream(CHAT, **body)
    content = [
        entry
        for event in events
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    expected = whole(ask, CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [entry["bytes"] for entry in expected]
    assert len(content) == 10


@pytest.mark.parametrize("echo", [False, True])
def test_completion_logprobs_add_up(ask, stream, echo: bool):
    body = {"prompt": "Hello", "max_tokens": 6, "logprobs": 1, "echo": echo, **GREEDY}
    expected = whole(ask, COMPLETIONS, **body)["choices"][0]
    events = stream(COMPLETIONS, **body)
    assert joined(events) == expected["text"]
    for name in ("tokens", "text_offset"):
        parts = [part for e in events for part in e["choices"][0]["logprobs"][name]]
        assert parts == expected["logprobs"][name]
    scores = [part for e in events for part in e["choices"][0]["logprobs"]["token_logprobs"]]
    assert scores == pytest.approx(expected["logprobs"]["token_logprobs"], abs=1e-4)


def test_every_completion_of_an_echoed_prompt_scores_it(ask, stream):
    body = {"prompt": "Hello, this prompt is longer than one page", "echo": True, "logprobs": 0,
            "n": 3, "seed": 1, "max_tokens": 2}  # fmt: skip
    expected = whole(ask, COMPLETIONS, **body)["choices"]
    events = stream(COMPLETIONS, **body)
    for choice in expected:
        assert choice["logprobs"]["tokens"][:5] == list("Hello")
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert [t for c in mine for t in c["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]


def test_echo_is_joined_to_the_first_chunk(ask, stream):
    events = stream(COMPLETIONS, prompt="Hello", echo=True, max_tokens=3, **GREEDY)
    assert events[0]["choices"][0]["text"].startswith("Hello")
    only = stream(COMPLETIONS, prompt="Hello", echo=True, max_tokens=0, **GREEDY)
    assert joined(only) == "Hello"
    assert only[-1]["choices"][0]["finish_reason"] == "length"


def test_token_ids_in_a_stream(ask, stream):
    body = {"prompt": "Hello", "max_tokens": 7, "return_token_ids": True, **GREEDY}
    expected = whole(ask, COMPLETIONS, **body)["choices"][0]
    events = stream(COMPLETIONS, **body)
    assert events[0]["choices"][0]["prompt_token_ids"] == expected["prompt_token_ids"]
    assert all("prompt_token_ids" not in event["choices"][0] for event in events[1:])
    ids = [token for event in events for token in event["choices"][0]["token_ids"]]
    assert ids == expected["token_ids"]
    chat = stream(CHAT, messages=MESSAGES, max_tokens=3, return_token_ids=True, **GREEDY)
    assert len(chat[0]["prompt_token_ids"]) > 10
    assert sum(len(event["choices"][0].get("token_ids", ())) for event in chat) == 3


def test_stop_strings_never_leak(ask, stream):
    token = whole(ask, "/tokenize", prompt="z")["tokens"][0]
    body = {"prompt": "x", "allowed_token_ids": [token], "max_tokens": 50, "temperature": 0}
    events = stream(COMPLETIONS, **body, stop=["zzzz"])
    assert joined(events) == ""
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"][0]["stop_reason"] == "zzzz"


def test_refusals_come_before_the_stream(ask):
    response = ask(COMPLETIONS, {"prompt": "x", "stream": True, "temperature": -1})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    long = ask(CHAT, {"messages": [{"role": "user", "content": "x" * 5000}], "stream": True})
    assert long.status_code == 400
    full = ask(COMPLETIONS, {"prompt": ["x"] * 40, "stream": True})
    assert full.status_code == 503


def test_a_failing_step_ends_streams_with_an_error_and_the_server_goes_on(
    ask, engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
):
    runner = engine._host.engine.runner
    run = runner.run
    steps = []

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("the device fell over in /secret/place")
        return run(*args, **kwargs)

    monkeypatch.setattr(runner, "run", fail_once)
    response = ask(COMPLETIONS, {"prompt": "x", "max_tokens": 50, "stream": True, **GREEDY})
    assert response.status_code == 200
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert '"error":{' in frames[-3]
    assert '"code":500' in frames[-3]
    assert "secret" not in response.text
    again = whole(ask, COMPLETIONS, prompt="x", max_tokens=2, **GREEDY)
    assert again["choices"][0]["finish_reason"] == "length"


def test_a_failing_step_is_500_for_a_whole_answer(
    ask, engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
):
    runner = engine._host.engine.runner
    run = runner.run
    broken = iter([True])

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if next(broken, False):
            raise RuntimeError("the device fell over in /secret/place")
        return run(*args, **kwargs)

    monkeypatch.setattr(runner, "run", fail_once)
    response = ask(COMPLETIONS, {"prompt": "x", **GREEDY})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "InternalServerError"
    assert "secret" not in response.text
    assert ask("/health").status_code == 200
