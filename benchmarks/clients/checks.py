"""Judges the facts that a client's worker tells; whatever is wrong raises `WrongAnswerError`."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
import numpy as np

from benchmarks.clients import cases

Facts = dict[str, Any]
Ask = Callable[..., Facts]
"""Calls a method of the worker by its name."""


class WrongAnswerError(AssertionError):
    """A client got something that it should not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What plain HTTP requests were answered with; greedy, so every client must get the same.

    Attributes:
        text: Text of the conversation `cases.CHAT`.
        finish_reason: Why it ended.
        num_prompt: Tokens of its prompt.
        num_output: Tokens of its answer.
        vectors: Vectors of `cases.TEXTS`.
    """

    text: str
    finish_reason: str
    num_prompt: int
    num_output: int
    vectors: list[list[float]]


def require(condition: object, message: str) -> None:
    """Raise unless the condition holds.

    Raises:
        WrongAnswerError: With the message.
    """
    if not condition:
        raise WrongAnswerError(message)


def check_chat(facts: Facts, reference: Reference) -> None:
    """The text, the reason and the counts are those of the plain request."""
    wanted = {
        "text": reference.text,
        "finish_reason": reference.finish_reason,
        "prompt_tokens": reference.num_prompt,
        "completion_tokens": reference.num_output,
    }
    for name, value in wanted.items():
        require(facts[name] == value, f"{name} is {facts[name]!r}, not {value!r}")


def check_stream(facts: Facts, reference: Reference) -> None:
    """Deltas, joined, are the text of the plain request, and there are many of them."""
    text = "".join(facts["pieces"])
    require(text == reference.text, f"joined deltas are {text!r}, not {reference.text!r}")
    least = reference.num_output // 2
    require(len(facts["pieces"]) >= least, f"{len(facts['pieces'])} pieces, at least {least} due")
    reason = facts["finish_reason"]
    require(reason == reference.finish_reason, f"finish_reason is {reason!r}")


def check_calls(facts: Facts, *, name: str | None = None, city: str | None = None) -> None:
    """There is a call of a tool that exists, with arguments that satisfy its schema.

    Args:
        facts: What the worker told.
        name: The tool that must be called; None is any.
        city: What the argument of that name must be.
    """
    calls = [{"name": c["name"], "arguments": _parsed(c["arguments"])} for c in facts["calls"]]
    require(calls, f"no tool was called; text {facts.get('text')!r}")
    _validate(calls, cases.ANY_CALL)
    if name is not None:
        wrong = [call["name"] for call in calls if call["name"] != name]
        require(not wrong, f"called {wrong} instead of {name!r}")
    if city is not None:
        found = calls[0]["arguments"].get("city")
        require(found == city, f"the model was asked about {city!r} and called with {found!r}")


def check_json(facts: Facts) -> None:
    """The text is JSON that an independent validator accepts."""
    _validate(_parsed(facts["text"]), cases.SCHEMA)


def check_logprobs(facts: Facts, reference: Reference) -> None:
    """Every token has its log-probability, and greedy tokens are the most likely ones."""
    entries = facts["entries"]
    require(facts["text"] == reference.text, f"the text is {facts['text']!r}")
    require(
        len(entries) == reference.num_output,
        f"{len(entries)} entries for {reference.num_output} tokens",
    )
    joined = "".join(token for token, _, _ in entries)
    require(joined.startswith(reference.text), f"the tokens say {joined!r}")
    for token, logprob, top in entries:
        ok = math.isfinite(logprob) and logprob <= 0
        require(ok, f"the log-probability of {token!r} is {logprob}")
        require(len(top) == cases.TOP, f"{len(top)} candidates instead of {cases.TOP}")
        ok = all(math.isfinite(t) and t <= 0 for t in top) and max(top) == logprob
        require(ok, f"candidates {top} of the greedy token {token!r} with {logprob}")
        total = sum(math.exp(t) for t in top)
        require(total <= 1 + 1e-4, f"candidates {top} are more than certain")


def check_embeddings(facts: Facts, reference: Reference) -> None:
    """Vectors are those of the plain request; equal texts agree, others do not."""
    vectors = np.asarray(facts["vectors"], np.float64)
    wanted = np.asarray(reference.vectors, np.float64)
    require(vectors.shape == wanted.shape, f"shape {vectors.shape} instead of {wanted.shape}")
    require(np.isfinite(vectors).all(), "a vector is not finite")
    norms = np.linalg.norm(vectors, axis=1)
    require(np.allclose(norms, 1, atol=1e-4), f"vectors have lengths {norms}")
    cosines = vectors @ vectors.T
    require(cosines[0, -1] > 1 - 1e-4, f"equal texts differ: cosine {cosines[0, -1]:.6f}")
    require(cosines[0, 1] < 0.999, f"different texts agree: cosine {cosines[0, 1]:.6f}")
    gap = float(np.abs(vectors - wanted).max())
    require(gap < 1e-3, f"vectors differ by {gap} from those of the plain request")


def _parsed(text: str | None) -> Any:  # noqa: ANN401  a JSON value
    try:
        return json.loads(text or "")
    except ValueError as error:
        raise WrongAnswerError(f"{text!r} is no JSON: {error}") from None


def _validate(value: Any, schema: Facts) -> None:  # noqa: ANN401  a JSON value
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError as error:
        raise WrongAnswerError(f"{value!r} does not satisfy the schema: {error.message}") from None


def _call_check(
    method: str, choice: str | Facts, **wanted: str
) -> Callable[[Ask, Reference], None]:
    def check(ask: Ask, _: Reference) -> None:
        messages = cases.weather_question()
        check_calls(ask(method, messages=messages, tools=cases.TOOLS, choice=choice), **wanted)

    return check


def _chat(ask: Ask, reference: Reference) -> None:
    check_chat(ask("chat", messages=cases.CHAT, max_tokens=cases.CHAT_TOKENS), reference)


def _stream(ask: Ask, reference: Reference) -> None:
    check_stream(ask("stream", messages=cases.CHAT, max_tokens=cases.CHAT_TOKENS), reference)


def _json(ask: Ask, _: Reference) -> None:
    check_json(ask("json_schema", messages=cases.PERSON, schema=cases.SCHEMA))


def _logprobs(ask: Ask, reference: Reference) -> None:
    fields = {"messages": cases.CHAT, "max_tokens": cases.CHAT_TOKENS, "top": cases.TOP}
    check_logprobs(ask("logprobs", **fields), reference)


def _embeddings(ask: Ask, reference: Reference) -> None:
    check_embeddings(ask("embeddings", texts=cases.TEXTS), reference)


_FREE = {"name": cases.TOOL_NAME, "city": cases.CITY}
_NAMED = {"name": cases.TOOL_NAME}
CHECKS: dict[str, Callable[[Ask, Reference], None]] = {
    "chat": _chat,
    "stream": _stream,
    "tools auto": _call_check("tools", "auto", **_FREE),
    "tools required": _call_check("tools", "required"),
    "tools named": _call_check("tools", cases.named(), **_NAMED),
    "tools auto, stream": _call_check("stream_tools", "auto", **_FREE),
    "tools required, stream": _call_check("stream_tools", "required"),
    "tools named, stream": _call_check("stream_tools", cases.named(), **_NAMED),
    "JSON schema": _json,
    "logprobs": _logprobs,
    "embeddings": _embeddings,
}
"""What every client must do, by name."""

NOTES: dict[str, dict[str, str]] = {
    "instructor": {
        "chat": "response_model=None",
        "stream": "response_model=None",
        "tools auto": "response_model=None, as a response model forces its own tool",
        "tools required": "response_model=None",
        "tools named": "a response model in Mode.TOOLS",
        "tools named, stream": "create_partial",
        "JSON schema": "a response model in Mode.JSON_SCHEMA, with extra='forbid'",
        "logprobs": "response_model=None",
        "embeddings": "no call of its own: the openai client that it wraps",
    },
    "litellm": {"chat": "model openai/NAME with api_base"},
    "langchain-openai": {
        "JSON schema": "with_structured_output(method='json_schema')",
        "embeddings": "check_embedding_ctx_length=False, as its tokenizer is that of other models",
    },
}
"""Where a client's users do something else than call the feature by its name."""


def failures(results: dict[str, dict[str, str]]) -> Sequence[str]:
    """Return one line per check that failed."""
    return [
        f"{client}: {check}: {problem}"
        for client, found in results.items()
        for check, problem in found.items()
        if problem
    ]
