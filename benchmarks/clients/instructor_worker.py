"""Instructor: an `openai` client whose answers are pydantic models.

It has no calls of its own for text, tokens and vectors: its users leave `response_model` out, or
use the client that it wraps.
"""

from typing import Any, Literal

import instructor
import openai
from pydantic import ConfigDict, Field, create_model

from benchmarks.clients import openai_answers as facts
from benchmarks.clients.cases import Messages, versions
from benchmarks.peers import protocol


def model_of(name: str, schema: dict[str, Any]) -> Any:  # noqa: ANN401  a class
    """Write a schema of strings, choices and integers as a pydantic model."""
    fields: dict[str, Any] = {}
    for key, value in schema["properties"].items():
        if "enum" in value:
            fields[key] = (Literal[tuple(value["enum"])], ...)
        elif value["type"] == "integer":
            limits = {"ge": value["minimum"], "le": value["maximum"]}
            fields[key] = (int, Field(**limits))
        else:
            fields[key] = (str, Field(max_length=value["maxLength"]))
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


class InstructorWorker:
    """`instructor.from_openai`, in the mode that fits each task."""

    def load(self, base_url: str, model: str) -> dict[str, Any]:
        """Set the client up."""
        self._openai = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
        self._tools = instructor.from_openai(self._openai, mode=instructor.Mode.TOOLS)
        self._json = instructor.from_openai(self._openai, mode=instructor.Mode.JSON_SCHEMA)
        self._model = model
        return {"versions": versions("instructor", "openai")}

    def _create(self, messages: Messages, **fields: Any) -> Any:  # noqa: ANN401
        return self._tools.chat.completions.create(
            model=self._model,
            messages=messages,
            temperature=0,
            response_model=None,
            max_retries=0,
            **fields,
        )

    def chat(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Answer a conversation, without a response model."""
        return facts.chat_facts(self._create(messages, max_tokens=max_tokens))

    def stream(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Do the same as a stream."""
        return facts.stream_facts(self._create(messages, max_tokens=max_tokens, stream=True))

    def tools(self, messages: Messages, tools: list, choice: str | dict) -> dict[str, Any]:
        """Let the model call tools: one by name through a response model, others without."""
        if isinstance(choice, dict):
            name = choice["function"]["name"]
            schema = next(t["function"] for t in tools if t["function"]["name"] == name)
            made = self._tools.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=0,
                max_tokens=facts.CALL_TOKENS,
                response_model=model_of(name, schema["parameters"]),
                max_retries=0,
            )
            return {"calls": [{"name": type(made).__name__, "arguments": made.model_dump_json()}]}
        fields = {"tools": tools, "tool_choice": choice, "max_tokens": facts.CALL_TOKENS}
        return facts.call_facts(self._create(messages, **fields))

    def stream_tools(self, messages: Messages, tools: list, choice: str | dict) -> dict[str, Any]:
        """Do the same as a stream: of partial models where the tool is named."""
        if not isinstance(choice, dict):
            fields = {"tools": tools, "tool_choice": choice, "max_tokens": facts.CALL_TOKENS}
            return facts.streamed_call_facts(self._create(messages, stream=True, **fields))
        name = choice["function"]["name"]
        schema = next(t["function"] for t in tools if t["function"]["name"] == name)
        made = None
        for made in self._tools.chat.completions.create_partial(  # noqa: B007  the last one counts
            model=self._model,
            messages=messages,
            temperature=0,
            max_tokens=facts.CALL_TOKENS,
            response_model=model_of(name, schema["parameters"]),
            max_retries=0,
        ):
            pass
        if made is None:
            return {"calls": []}
        return {"calls": [{"name": name, "arguments": made.model_dump_json()}]}

    def json_schema(self, messages: Messages, schema: dict[str, Any]) -> dict[str, Any]:
        """Answer with JSON under a schema, as a model."""
        made = self._json.chat.completions.create(
            model=self._model,
            messages=messages,
            temperature=0,
            max_tokens=facts.JSON_TOKENS,
            response_model=model_of(schema["title"], schema),
            max_retries=0,
        )
        return {"text": made.model_dump_json()}

    def logprobs(self, messages: Messages, max_tokens: int, top: int) -> dict[str, Any]:
        """Answer with log-probabilities, without a response model."""
        fields = {"logprobs": True, "top_logprobs": top, "max_tokens": max_tokens}
        return facts.logprob_facts(self._create(messages, **fields))

    def embeddings(self, texts: list[str]) -> dict[str, Any]:
        """Embed texts with the wrapped client."""
        answer = self._tools.client.embeddings.create(model=self._model, input=texts)
        return {"vectors": [item.embedding for item in answer.data]}


if __name__ == "__main__":
    protocol.serve(InstructorWorker())
