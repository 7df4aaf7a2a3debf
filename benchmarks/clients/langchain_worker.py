"""LangChain's OpenAI integration."""

import json
from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from benchmarks.clients import openai_answers as facts
from benchmarks.clients.cases import Messages, versions
from benchmarks.peers import protocol


def _text(message: Any) -> str:  # noqa: ANN401  a message of the client
    return message.content if isinstance(message.content, str) else ""


def _calls(message: Any) -> dict[str, Any]:  # noqa: ANN401  as above
    calls = [{"name": c["name"], "arguments": json.dumps(c["args"])} for c in message.tool_calls]
    return {"calls": calls, "text": _text(message)}


class LangChainWorker:
    """`ChatOpenAI` and `OpenAIEmbeddings`."""

    def load(self, base_url: str, model: str) -> dict[str, Any]:
        """Set the client up."""
        shared = {"base_url": f"{base_url}/v1", "api_key": SecretStr("none"), "max_retries": 0}
        self._chat = ChatOpenAI(model=model, temperature=0, **shared)
        # Otherwise texts are cut with the tokenizer of OpenAI's own models, from the network.
        self._embed = OpenAIEmbeddings(model=model, check_embedding_ctx_length=False, **shared)
        return {"versions": versions("langchain-openai", "langchain-core", "openai")}

    def chat(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Answer a conversation."""
        message = self._chat.bind(max_tokens=max_tokens).invoke(messages)
        return {
            "text": _text(message),
            "finish_reason": message.response_metadata["finish_reason"],
            "prompt_tokens": message.usage_metadata["input_tokens"],
            "completion_tokens": message.usage_metadata["output_tokens"],
        }

    def stream(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """Do the same as a stream."""
        pieces, finish_reason = [], None
        for chunk in self._chat.bind(max_tokens=max_tokens).stream(messages):
            if _text(chunk):
                pieces.append(_text(chunk))
            finish_reason = chunk.response_metadata.get("finish_reason") or finish_reason
        return {"pieces": pieces, "finish_reason": finish_reason}

    def _with_tools(self, tools: list, choice: str | dict) -> Any:  # noqa: ANN401
        return self._chat.bind_tools(tools, tool_choice=choice, max_tokens=facts.CALL_TOKENS)

    def tools(self, messages: Messages, tools: list, choice: str | dict) -> dict[str, Any]:
        """Let the model call tools."""
        return _calls(self._with_tools(tools, choice).invoke(messages))

    def stream_tools(self, messages: Messages, tools: list, choice: str | dict) -> dict[str, Any]:
        """Do the same as a stream."""
        whole = None
        for chunk in self._with_tools(tools, choice).stream(messages):
            whole = chunk if whole is None else whole + chunk
        return _calls(whole)

    def json_schema(self, messages: Messages, schema: dict[str, Any]) -> dict[str, Any]:
        """Answer with JSON under a schema."""
        structured = self._chat.bind(max_tokens=facts.JSON_TOKENS).bound.with_structured_output(
            schema, method="json_schema", strict=True
        )
        return {"text": json.dumps(structured.invoke(messages))}

    def logprobs(self, messages: Messages, max_tokens: int, top: int) -> dict[str, Any]:
        """Answer with log-probabilities."""
        bound = self._chat.bind(logprobs=True, top_logprobs=top, max_tokens=max_tokens)
        message = bound.invoke(messages)
        entries = [
            [entry["token"], entry["logprob"], [one["logprob"] for one in entry["top_logprobs"]]]
            for entry in message.response_metadata["logprobs"]["content"]
        ]
        return {"text": _text(message), "entries": entries}

    def embeddings(self, texts: list[str]) -> dict[str, Any]:
        """Embed texts."""
        return {"vectors": self._embed.embed_documents(texts)}


if __name__ == "__main__":
    protocol.serve(LangChainWorker())
