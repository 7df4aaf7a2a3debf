"""The official client."""

from typing import Any

import openai

from benchmarks.clients import openai_answers as facts
from benchmarks.clients.cases import Messages, versions
from benchmarks.peers import protocol


class OpenAIWorker:
    """`openai.OpenAI`."""

    def load(self, base_url: str, model: str) -> dict[str, Any]:
        """Set the client up."""
        self._client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
        self._model = model
        return {"versions": versions("openai")}

    def _create(self, messages: Messages, **fields: Any) -> Any:  # noqa: ANN401
        return self._client.chat.completions.create(
            model=self._model, messages=messages, temperature=0, **fields
        )

    def chat(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Answer a conversation."""
        return facts.chat_facts(self._create(messages, max_completion_tokens=max_tokens))

    def stream(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Do the same as a stream."""
        chunks = self._create(messages, max_completion_tokens=max_tokens, stream=True)
        return facts.stream_facts(chunks)

    def tools(self, messages: Messages, tools: list, choice: str | dict) -> dict[str, Any]:
        """Let the model call tools."""
        fields = {"tools": tools, "tool_choice": choice, "max_tokens": facts.CALL_TOKENS}
        return facts.call_facts(self._create(messages, **fields))

    def stream_tools(self, messages: Messages, tools: list, choice: str | dict) -> dict[str, Any]:
        """Do the same as a stream."""
        fields = {"tools": tools, "tool_choice": choice, "max_tokens": facts.CALL_TOKENS}
        return facts.streamed_call_facts(self._create(messages, stream=True, **fields))

    def json_schema(self, messages: Messages, schema: dict[str, Any]) -> dict[str, Any]:
        """Answer with JSON under a schema."""
        form = facts.response_format(schema)
        answer = self._create(messages, response_format=form, max_tokens=facts.JSON_TOKENS)
        return facts.chat_facts(answer)

    def logprobs(self, messages: Messages, max_tokens: int, top: int) -> dict[str, Any]:
        """Answer with log-probabilities."""
        fields = {"logprobs": True, "top_logprobs": top, "max_tokens": max_tokens}
        return facts.logprob_facts(self._create(messages, **fields))

    def embeddings(self, texts: list[str]) -> dict[str, Any]:
        """Embed texts; the client asks for base64 by itself."""
        answer = self._client.embeddings.create(model=self._model, input=texts)
        return {"vectors": [item.embedding for item in answer.data]}


if __name__ == "__main__":
    protocol.serve(OpenAIWorker())
