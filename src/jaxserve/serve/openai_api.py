"""Request bodies of the OpenAI API, with the extra fields that the field's engines share.

Unknown fields are kept aside, so that those which would change the answer can be refused by name
and the others be warned about once.
"""

import logging
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxserve.core.errors import RequestError
from jaxserve.core.request import MAX_N, MAX_STOP_STRINGS

logger = logging.getLogger("jaxserve.serve")

MAX_WARNED = 1000
"""Names to remember; a client that invents more is not worth a line each."""

SILENT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
"""Fields of the standard that change no answer of ours."""

_warned: set[str] = set()


def _is_set(value: object) -> bool:
    return value is not None


def _asks_for_tools(value: object) -> bool:
    return value not in (None, "none")


def _asks_for_sound(value: object) -> bool:
    return value not in (None, ["text"])


REFUSED = {
    "tools": (_is_set, "tools belong to /v1/chat/completions"),
    "tool_choice": (_asks_for_tools, "tools belong to /v1/chat/completions"),
    "functions": (_is_set, "use tools, which replaced it"),
    "function_call": (_asks_for_tools, "use tool_choice, which replaced it"),
    "guided_json": (_is_set, "use structured_outputs"),
    "guided_regex": (_is_set, "use structured_outputs"),
    "guided_choice": (_is_set, "use structured_outputs"),
    "guided_grammar": (_is_set, "use structured_outputs"),
    "suffix": (bool, "the model does not fill in the middle"),
    "use_beam_search": (bool, "beam search is not supported"),
    "bad_words": (bool, "use logit_bias to forbid tokens"),
    "prompt_embeds": (_is_set, "prompts must be text or token ids"),
    "modalities": (_asks_for_sound, "only text is supported"),
    "audio": (_is_set, "only text is supported"),
    "documents": (bool, "put the documents into a message"),
    "logprob_token_ids": (_is_set, "use logprobs"),
    "thinking_token_budget": (_is_set, "use max_tokens"),
    "repetition_detection": (_is_set, "use repetition_penalty"),
}
"""Fields that would change the answer, when they are in use, and what to say then."""


class Body(BaseModel):
    """A request body that tolerates unknown fields, but no value of another type.

    Numbers without a fraction are integers, however they are written, as JSON itself has it.
    """

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        given = cast("dict[str, object]", body)
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in given.items()
        }

    def check_extra(self) -> None:
        """Refuse what would change the answer; warn of the rest once per name.

        Raises:
            RequestError: If a field is used that this server cannot honour.
        """
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED:
                is_used, hint = REFUSED[name]
                if is_used(value):
                    raise RequestError(f"{name} cannot be used: {hint}.", param=name)
            elif name not in SILENT and name not in _warned and len(_warned) < MAX_WARNED:
                _warned.add(name)
                logger.warning("request field %.100r is unknown and ignored", name)


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SloBody(BaseModel):
    """Service-level objectives; at least one of the three times, in milliseconds.

    Unknown names are kept, to be refused by name: a misspelt objective must not be lost.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    tier: str | None = None
    on_decline: Literal["best_effort", "reject", "asap"] | None = None


def _shown(**bounds: object) -> Any:  # noqa: ANN401  pydantic's own idiom
    """Describe what the engine checks, whose messages are better, without checking it here."""
    return Field(default=None, json_schema_extra=cast("dict[str, Any]", bounds))


_INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}


class GenerationBody(Body):
    """Fields that both generating endpoints share; None is "the server's default"."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = _shown(minimum=1, maximum=MAX_N)
    temperature: float | None = _shown(minimum=0, maximum=2)
    top_p: float | None = _shown(exclusiveMinimum=0, maximum=1)
    top_k: int | None = _shown(minimum=-1)
    min_p: float | None = _shown(minimum=0, maximum=1)
    presence_penalty: float | None = _shown(minimum=-2, maximum=2)
    frequency_penalty: float | None = _shown(minimum=-2, maximum=2)
    repetition_penalty: float | None = _shown(exclusiveMinimum=0)
    seed: int | None = _shown(**_INT64)
    stop: str | list[str] | None = _shown(minLength=1, maxItems=MAX_STOP_STRINGS)
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, json_schema_extra={"minimum": 0})
    max_tokens: int | None = _shown(minimum=0)
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prompt_logprobs: int | None = _shown(minimum=-1)
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_weight_versions: bool | None = None
    output_token_ids: list[int] | None = Field(
        default=None,
        description="Output that an interrupted run of this very request has generated already. "
        "The completion goes on behind it as if never interrupted: seed, penalties, stop strings, "
        "min_tokens and max_tokens count from the first of them. The answer holds what is new.",
    )
    priority: int = Field(default=0, ge=-(2**63), lt=2**63)
    cache_salt: str | None = _shown(minLength=1, maxLength=128)
    request_id: str | None = _shown(minLength=1, maxLength=128, pattern="^[ -~]+$")
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    slo: SloBody | None = None
    attention_mass: float | None = Field(
        default=None,
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
        description="Share of the attention mass that decodes of a long context read; 1 reads "
        "everything. Needs a server with --sparse-attention.",
    )


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text or token ids of one prompt, or a list of either."
    )
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=-1)
    add_special_tokens: bool = True


class ChatMessage(BaseModel):
    """One message; fields besides these reach the chat template unchanged."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(min_length=1)
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatTemplateBody(Body):
    """Fields that say how messages become a prompt."""

    messages: list[ChatMessage] = Field(min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    tools: list[dict[str, Any]] | None = None


class ChatBody(ChatTemplateBody, GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=-1)
    echo: bool = False
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None


class TokenizeBody(ChatTemplateBody):
    """Body of `POST /tokenize`, with either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] = Field(default=[])
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False
