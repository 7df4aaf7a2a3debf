"""Formats, tools and reasoning over HTTP."""

import json

import jsonschema
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.serve.options import ServerConfig

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g"}},
]
HERMES = {"tool_call_parser": "hermes"}
CALL = '<tool_call>\\n\\{"name": "g", "arguments": \\{"k": [0-9]\\}\\}\\n</tool_call>'


def chat(ask, settings=HERMES, **fields):
    body = {"messages": MESSAGES, "max_tokens": 300, "seed": 3, **fields}
    return ask("/v1/chat/completions", body, settings=settings)


def joined(chunks):
    """Put the deltas of a stream together, as a client does."""
    message = {"content": "", "reasoning": "", "calls": []}
    reason = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["type"] == "function"
                    assert call["index"] == len(message["calls"])
                    message["calls"].append([call["function"]["name"], ""])
                else:
                    assert set(call) == {"index", "function"}
                message["calls"][call["index"]][1] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return message, reason


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA},
            }
        },
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
def test_formats_hold_on_both_endpoints(ask, fields):
    reply = chat(ask, **fields).json()
    jsonschema.validate(json.loads(reply["choices"][0]["message"]["content"]), SCHEMA)
    body = {"prompt": "hi", "max_tokens": 300, **fields}
    reply = ask("/v1/completions", body).json()
    jsonschema.validate(json.loads(reply["choices"][0]["text"]), SCHEMA)


def test_other_constraints(ask):
    for fields, pattern in [
        ({"structured_outputs": {"choice": ["yes"]}}, "yes"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"'}}, "ab"),
        ({"structured_outputs": {"regex": "ab"}, "response_format": {"type": "text"}}, "ab"),
    ]:
        assert chat(ask, **fields).json()["choices"][0]["message"]["content"] == pattern


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_does_not_compile_is_400_before_the_stream(ask, stream):
    reply = chat(ask, structured_outputs={"regex": "(?=a)"}, stream=stream)
    assert reply.status_code == 400
    assert "look-around" in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "structured_outputs"


@pytest.mark.parametrize("parser", ["hermes", "mistral", "pythonic"])
def test_a_required_call_is_made(ask, events_of, parser):
    settings = {"tool_call_parser": parser}
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    choice = chat(ask, settings, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("chatcmpl-tool-")
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "f":
        jsonschema.validate(arguments, SCHEMA)
    else:
        assert arguments == {}
    streamed, reason = joined(events_of(chat(ask, settings, stream=True, **fields).text))
    assert reason == "tool_calls"
    assert streamed["calls"] == [list(call["function"].values())]
    assert streamed["content"] == ""


def test_a_named_call_is_made_and_ends_with_stop(ask, events_of):
    fields = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}
    choice = chat(ask, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "f"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    streamed, reason = joined(events_of(chat(ask, stream=True, **fields).text))
    assert streamed["calls"] == [["f", call["function"]["arguments"]]]
    assert reason == "stop"


def test_a_free_call_is_found(ask, events_of):
    fields = {"tools": TOOLS, "structured_outputs": {"regex": f"So\\.\\n{CALL}"}}
    choice = chat(ask, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So."
    (call,) = choice["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"k"}
    chunks = events_of(chat(ask, stream=True, logprobs=True, n=2, **fields).text)
    for index in range(2):
        own = [
            {"choices": [c for c in chunk["choices"] if c["index"] == index]} for chunk in chunks
        ]
        streamed, reason = joined(own)
        assert streamed["content"] == "So."
        assert streamed["calls"][0][0] == "g"
        assert reason == "tool_calls"
    assert sum(bool(c["logprobs"]) for chunk in chunks for c in chunk["choices"]) > 40


def test_a_cut_call_ends_with_length(ask):
    fields = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 3}
    assert chat(ask, **fields).json()["choices"][0]["finish_reason"] == "length"


def test_only_the_first_call_counts_without_parallel_calls(ask):
    fields = {"tools": TOOLS, "structured_outputs": {"regex": CALL * 2}}
    both = chat(ask, **fields).json()["choices"][0]["message"]["tool_calls"]
    one = chat(ask, parallel_tool_calls=False, **fields).json()["choices"][0]["message"]
    assert len(both) == 2
    assert len(one["tool_calls"]) == 1


def test_tools_without_a_parser_are_refused_unless_unused(ask):
    reply = chat(ask, {}, tools=TOOLS)
    assert reply.status_code == 400
    assert "--tool-call-parser" in reply.json()["error"]["message"]
    assert chat(ask, {}, tools=TOOLS, tool_choice="none", max_tokens=2).status_code == 200
    reply = chat(ask, {"tool_call_parser": "mistral"}, tools=TOOLS)
    assert "does not tell the model about tools" in reply.json()["error"]["message"]


def test_tools_and_a_format_exclude_each_other(ask):
    fields = {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}
    assert chat(ask, **fields).json()["error"]["param"] == "tool_choice"


def test_a_tool_that_cannot_be_constrained_is_400(ask):
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"type": "odd"}}}]
    assert chat(ask, tools=bad, tool_choice="required").status_code == 400
    assert chat(ask, tools=bad, max_tokens=2).status_code == 200


def prompt_of(ask, messages, **fields):
    ids = ask("/tokenize", {"messages": messages, **fields}).json()["tokens"]
    return ask("/detokenize", {"tokens": ids}).json()["prompt"]


def test_a_template_without_tools_gets_them_described(ask):
    text = prompt_of(ask, MESSAGES, tools=TOOLS)
    assert text.startswith("<|im_start|>system\n")
    assert '"name": "f"' in text
    assert "<tool_call>" in text
    with_system = prompt_of(
        ask, [{"role": "system", "content": "Be brief."}, *MESSAGES], tools=TOOLS
    )
    assert "Be brief.\n\nYou may call" in with_system


def test_earlier_calls_and_results_reach_the_model(ask):
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "seven"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "eight"}]},
    ]
    text = prompt_of(ask, history)
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\nseven\n</tool_response>\n<tool_response>\neight" in text
    broken = [*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "1"}]}]
    assert ask("/v1/chat/completions", {"messages": broken}).status_code == 400


def test_reasoning_is_reported_apart(ask, events_of):
    settings = {"reasoning_parser": "deepseek_r1"}
    fields = {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
    reply = chat(ask, settings, **fields).json()
    message = reply["choices"][0]["message"]
    plain = chat(ask, {}, **fields).json()["choices"][0]["message"]["content"]
    assert message["content"] is None
    assert message["reasoning"] == plain.strip()
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}
    streamed, _ = joined(events_of(chat(ask, settings, stream=True, **fields).text))
    assert streamed["reasoning"] == message["reasoning"]
    silent = chat(ask, settings, include_reasoning=False, **fields).json()
    assert silent["choices"][0]["message"]["reasoning"] is None


def test_an_answer_is_constrained_behind_the_reasoning(ask):
    settings = {"reasoning_parser": "qwen3"}
    closed = {"chat_template_kwargs": {"prefix": "<think>\n\n</think>\n"}}
    fields = {"structured_outputs": {"choice": ["ab"]}, "temperature": 0}
    reply = chat(ask, settings, **fields, **closed).json()
    message = reply["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("ab", None)
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    opened = {"chat_template_kwargs": {"prefix": "<think>"}, "max_tokens": 20}
    message = chat(ask, settings, **fields | opened).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning"]


def test_wrong_parser_names_stop_the_server():
    with pytest.raises(ConfigError, match=r"unknown tool parser 'herms'.*Did you mean 'hermes'"):
        ServerConfig.from_settings({"tool_call_parser": "herms"})
    with pytest.raises(ConfigError, match="unknown reasoning parser"):
        ServerConfig.from_settings({"reasoning_parser": "x"})
    with pytest.raises(ConfigError, match="enable_auto_tool_choice needs tool_call_parser"):
        ServerConfig.from_settings({"enable_auto_tool_choice": True})
    with pytest.raises(ConfigError, match="chat_template_content_format must be one of"):
        ServerConfig.from_settings({"chat_template_content_format": "x"})
