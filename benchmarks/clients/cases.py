"""What every client is asked to do, and the form of its answers; standard library only.

| method | answers with |
|---|---|
| `load` | `versions` of the packages that matter |
| `chat` | `text`, `finish_reason`, `prompt_tokens`, `completion_tokens` |
| `stream` | `pieces` of text in order, `finish_reason` |
| `tools` | `calls`, each with `name` and `arguments` (JSON text) |
| `stream_tools` | the same, put together from streamed deltas |
| `json_schema` | `text` |
| `logprobs` | `text`, `entries`: token, its log-probability, those of the most likely ones |
| `embeddings` | `vectors` |
"""

import importlib.metadata
import json
from typing import Any, Protocol

Messages = list[dict[str, Any]]

CHAT: Messages = [
    {"role": "user", "content": "Name three fruits and say what colour each one has."}
]
CHAT_TOKENS = 48
TOP = 3

TOOL_NAME = "get_weather"
CITY = "Paris"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
OTHER_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}


def _function(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _function(TOOL_NAME, "Tell the weather in a city.", PARAMETERS),
    _function("get_time", "Tell the time in a zone.", OTHER_PARAMETERS),
]
ANY_CALL = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool["function"]["name"]},
                               "arguments": tool["function"]["parameters"]},
                "required": ["name", "arguments"],
            }
            for tool in TOOLS
        ]
    },
}  # fmt: skip
"""What calls must look like once their arguments have been parsed."""

SCHEMA: dict[str, Any] = {
    "title": "Person",
    "description": "A person.",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"type": "string", "enum": ["author", "reader"]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}
PERSON: Messages = [{"role": "user", "content": "Describe the author Ann, aged 40, as JSON."}]

TEXTS = ["A cat sat on the mat.", "Stock prices fell sharply.", "A cat sat on the mat."]
"""The first and the last are equal."""


def weather_question() -> Messages:
    """Ask for the weather after three demonstrations; a small model then calls by itself."""
    messages: Messages = []
    for number, city in enumerate(("Rome", "Oslo", "Cairo")):
        arguments = json.dumps({"city": city, "unit": "celsius"})
        call = {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": TOOL_NAME, "arguments": arguments},
        }
        messages.append({"role": "user", "content": f"What is the weather in {city}?"})
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    return [*messages, {"role": "user", "content": f"What is the weather in {CITY}?"}]


def named() -> dict[str, Any]:
    """Return the choice of one tool by its name."""
    return {"type": "function", "function": {"name": TOOL_NAME}}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in packages}


class ClientWorker(Protocol):
    """A client that can be tried; see the head of this module for the answers."""

    def load(self, base_url: str, model: str) -> dict[str, Any]:
        """Set the client up for a server and a model."""
        ...

    def chat(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Answer a conversation, greedily."""
        ...

    def stream(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Do the same as a stream."""
        ...

    def tools(
        self, messages: Messages, tools: list[dict[str, Any]], choice: str | dict[str, Any]
    ) -> dict[str, Any]:
        """Let the model call tools."""
        ...

    def stream_tools(
        self, messages: Messages, tools: list[dict[str, Any]], choice: str | dict[str, Any]
    ) -> dict[str, Any]:
        """Do the same as a stream."""
        ...

    def json_schema(self, messages: Messages, schema: dict[str, Any]) -> dict[str, Any]:
        """Answer with JSON under a schema."""
        ...

    def logprobs(self, messages: Messages, max_tokens: int, top: int) -> dict[str, Any]:
        """Answer with log-probabilities."""
        ...

    def embeddings(self, texts: list[str]) -> dict[str, Any]:
        """Embed texts."""
        ...
