"""What answers look like, for the OpenAPI description; `replies` and the routes write them.

Fields with a default are left out of an answer unless they were asked for.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EVENTS = "Server-sent events, `data: {...}` each, the last one `data: [DONE]`; if `stream` is true."


class _Reply(BaseModel):
    """An object that holds what is named here and nothing else."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetails(_Reply):
    """What went wrong."""

    message: str = Field(description="What was found, what was expected, what to do.")
    type: str
    param: str | None = Field(description="The request field to blame.")
    code: int = Field(description="The HTTP status.")
    reason: str | None = Field(
        default=None,
        description="What stood against objectives that could not be promised: `compute`, "
        "`memory` or `expired`; only there if the request was declined.",
    )


class ErrorReply(_Reply):
    """The body of every answer with an error status."""

    error: ErrorDetails


# Generation ------------------------------------------------------------------------------------


class PromptDetails(_Reply):
    """More about the tokens of a prompt."""

    cached_tokens: int = Field(description="Tokens found in the prefix cache.")


class CompletionDetails(_Reply):
    """More about generated tokens."""

    reasoning_tokens: int


class Usage(_Reply):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails | None
    completion_tokens_details: CompletionDetails | None = None


class SloReport(_Reply):
    """Which objectives were kept; those that were not asked for are left out."""

    attained: bool = Field(description="Whether all of them were.")
    ttft: bool = True
    tpot: bool = True
    tpot_gap: bool = True
    tpot_mean: bool = True
    e2e: bool = True


class Metrics(_Reply):
    """How the request went; present if it had objectives (`slo`)."""

    slo: SloReport


class Span(_Reply):
    """Output tokens that one version of the weights produced."""

    version: str
    start: int
    end: int


class Candidate(_Reply):
    """A token with its log-probability."""

    token: str
    logprob: float = Field(le=0)
    bytes: list[int] | None


class ChatLogprob(Candidate):
    """A generated token and the most likely ones in its place."""

    top_logprobs: list[Candidate]


class ChatLogprobs(_Reply):
    """Log-probabilities of a message."""

    content: list[ChatLogprob]


class PromptLogprob(_Reply):
    """A candidate for a token of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(_Reply):
    """Which function with which arguments."""

    name: str
    arguments: str = Field(description="JSON text, unless the completion was cut off.")


class ToolCall(_Reply):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(_Reply):
    """A generated message."""

    role: str
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []
    reasoning: str | None = None


class ChatChoice(_Reply):
    """One completion of a conversation."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "tool_calls"]
    stop_reason: int | str | None
    token_ids: list[int] = []
    weight_versions: list[Span] = []


class ChatReply(_Reply):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    metrics: Metrics | None = None
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs = []


class TextLogprobs(_Reply):
    """Log-probabilities of a text; four lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Reply):
    """One completion of a prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | str | None
    token_ids: list[int] = []
    weight_versions: list[Span] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs = []


class CompletionReply(_Reply):
    """Answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str
    metrics: Metrics | None = None


# Tokens and models -----------------------------------------------------------------------------


class Tokenized(_Reply):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Reply):
    """Answer of `POST /detokenize`."""

    prompt: str


class ModelCard(_Reply):
    """One name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(_Reply):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


# Embeddings and scores -------------------------------------------------------------------------


class Embedding(_Reply):
    """One vector; base64 of little-endian float32 if that was asked for."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class _PoolingReply(_Reply):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class EmbeddingReply(_PoolingReply):
    """Answer of `POST /v1/embeddings`."""

    data: list[Embedding]


class Score(_Reply):
    """How well one pair goes together."""

    index: int
    object: Literal["score"]
    score: float


class ScoreReply(_PoolingReply):
    """Answer of `POST /v1/score`."""

    data: list[Score]


class RerankUsage(_Reply):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Ranked(_Reply):
    """A document with its score."""

    index: int
    relevance_score: float
    document: dict[str, Any] = {}


class RerankReply(_Reply):
    """Answer of `POST /v1/rerank`, best documents first."""

    id: str
    model: str
    usage: RerankUsage
    results: list[Ranked]
    meta: dict[str, Any]


# The server itself -----------------------------------------------------------------------------


class Version(_Reply):
    """Answer of `GET /version`."""

    version: str


class Load(_Reply):
    """Answer of `GET /load`."""

    server_load: int = Field(ge=0)


class Live(_Reply):
    """Answer of `GET /pages/live`; the numbers are missing while there is no engine."""

    status: Literal["ready", "loading", "paused", "sleeping", "stopping", "dead"]
    version: str
    model: str
    needs_key: bool
    time: float
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    finished: int = 0


Responses = dict[int | str, dict[str, Any]]

_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
ERRORS: Responses = {
    "4XX": {"model": ErrorReply, "description": "The request cannot be carried out."},
    503: {
        "model": ErrorReply,
        "description": "Not now: the server is loading its model, full, paused or stopping.",
        "headers": _RETRY_AFTER,
    },
}
"""What any route may answer with instead."""


def replies(model: type[BaseModel], *, is_streamed: bool = False) -> Responses:
    """Describe the answers of a route.

    Args:
        model: What it answers with when all goes well.
        is_streamed: Whether it can answer with events.
    """
    made: dict[str, Any] = {"model": model, "description": "Done."}
    if is_streamed:
        made["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        made["description"] = f"An object. {EVENTS}"
    return {200: made, **ERRORS}
