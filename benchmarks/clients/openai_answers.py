"""From objects of OpenAI's schema, which three of the clients share, to plain facts."""

from collections.abc import Iterable
from typing import Any

JSON_TOKENS = 120
CALL_TOKENS = 120


def chat_facts(answer: Any) -> dict[str, Any]:  # noqa: ANN401  an object of the client
    """Describe a chat completion."""
    choice = answer.choices[0]
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }


def stream_facts(chunks: Iterable[Any]) -> dict[str, Any]:
    """Describe the text of a stream."""
    pieces, finish_reason = [], None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content:
                pieces.append(choice.delta.content)
            finish_reason = choice.finish_reason or finish_reason
    return {"pieces": pieces, "finish_reason": finish_reason}


def call_facts(answer: Any) -> dict[str, Any]:  # noqa: ANN401  an object of the client
    """Describe the tool calls of a chat completion."""
    calls = answer.choices[0].message.tool_calls or []
    return {
        "calls": [{"name": c.function.name, "arguments": c.function.arguments} for c in calls],
        "text": answer.choices[0].message.content,
        "finish_reason": answer.choices[0].finish_reason,
    }


def streamed_call_facts(chunks: Iterable[Any]) -> dict[str, Any]:
    """Put the tool calls of a stream together."""
    calls: dict[int, dict[str, str]] = {}
    finish_reason = None
    for chunk in chunks:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, {"name": "", "arguments": ""})
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
            finish_reason = choice.finish_reason or finish_reason
    return {"calls": [calls[i] for i in sorted(calls)], "finish_reason": finish_reason}


def logprob_facts(answer: Any) -> dict[str, Any]:  # noqa: ANN401  an object of the client
    """Describe the log-probabilities of a chat completion."""
    choice = answer.choices[0]
    entries = [
        [entry.token, entry.logprob, [top.logprob for top in entry.top_logprobs]]
        for entry in choice.logprobs.content
    ]
    return {"text": choice.message.content, "entries": entries}


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """Ask for JSON under a schema."""
    wrapper = {"name": schema["title"], "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": wrapper}
