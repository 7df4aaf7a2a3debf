"""From request bodies to what the engine understands."""

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.core.errors import RequestError
from jaxserve.core.lora import Adapter
from jaxserve.core.request import Request, RequestId, SamplingParams, new_request_id
from jaxserve.core.structured import StructuredOutputsParams
from jaxserve.parsers.reader import ReaderPlan
from jaxserve.serve.openai_api import (
    ChatBody,
    ChatMessage,
    ChatTemplateBody,
    CompletionBody,
    GenerationBody,
    TokenizeBody,
)
from jaxserve.serve.options import ApiOptions
from jaxserve.serve.structure import (
    check_template,
    choice_of,
    constraint_of,
    reading,
    template_kwargs,
)

if TYPE_CHECKING:
    from jaxserve.engine.abstract_host import Prompt
    from jaxserve.engine.async_engine import AsyncLLM
    from jaxserve.engine.tokenizer import Tokenizer

MAX_PROMPTS = 1024
MAX_ID_LEN = 128
MAX_SALT_LEN = 128
DEFAULT_COMPLETION_TOKENS = 16
LARGEST = {"top_k": 2**31 - 1, "repetition_penalty": 1e6}
"""Beyond these nothing changes any more, but the arrays that the device gets would overflow."""
LONG_TEXT = 8192
"""From this many characters on, rendering and tokenizing leave the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one HTTP request asks for, ready to run.

    Attributes:
        response_id: Id of the answer.
        model: Name to echo.
        requests: One per prompt.
        prefixes: Text to put in front of every completion of a prompt (echo), one per prompt.
        role: Role of the chat message; empty for completions.
        is_stream: Whether to answer with events.
        include_usage: Whether the stream ends with a usage chunk.
        continuous_usage: Whether every chunk carries usage.
        num_top: Candidates to list per token; None when no log-probabilities were asked for.
        echo: Whether completions repeat the prompt, log-probabilities included.
        echo_only: Whether nothing but the prompt is wanted (max_tokens 0).
        prompt_logprobs: Whether to report those of the prompt.
        return_token_ids: Whether to report ids of prompt and completion.
        return_weight_versions: Whether to report which weights produced which tokens.
        tokens_as_ids: Whether tokens are written as token_id:N.
        reader: How reasoning and tool calls are found in a chat's completions; None: not at all.
    """

    response_id: str
    model: str
    requests: tuple[Request, ...]
    prefixes: tuple[str, ...]
    role: str = ""
    is_stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    num_top: int | None = None
    echo: bool = False
    echo_only: bool = False
    prompt_logprobs: bool = False
    return_token_ids: bool = False
    return_weight_versions: bool = False
    tokens_as_ids: bool = False
    reader: ReaderPlan | None = None

    @property
    def n(self) -> int:
        """Completions per prompt."""
        return self.requests[0].sampling.n

    @property
    def num_choices(self) -> int:
        """Completions in all."""
        return self.n * len(self.requests)


def tokenizer_of(engine: "AsyncLLM") -> "Tokenizer":
    """Return the engine's tokenizer.

    Raises:
        RequestError: If there is none; the model then takes and gives token ids only.
    """
    if engine.tokenizer is None:
        raise RequestError(
            "this server has no tokenizer; send token ids to /v1/completions, or start it with "
            "--tokenizer."
        )
    return engine.tokenizer


def answer_id(prefix: str, header: str | None, field: str | None) -> str:
    """Choose the id of an answer: the header's, else the field's, else a new one.

    Raises:
        RequestError: If the field's id is empty, too long or not printable ASCII.
    """
    if header is not None and _is_good_id(header):
        return prefix + header
    if field is None:
        return prefix + new_request_id()
    if not _is_good_id(field):
        raise RequestError(
            f"request_id must be 1 to {MAX_ID_LEN} printable ASCII characters, got {field[:40]!r}.",
            param="request_id",
        )
    return prefix + field


def _is_good_id(text: str) -> bool:
    return 0 < len(text) <= MAX_ID_LEN and text.isascii() and text.isprintable()


async def completion_job(
    engine: "AsyncLLM",
    body: CompletionBody,
    *,
    response_id: str,
    model: str,
    options: ApiOptions,
    adapter: Adapter | None = None,
) -> Job:
    """Translate the body of `POST /v1/completions`.

    Raises:
        RequestError: If the request cannot be carried out.
    """
    body.check_extra()
    _check_stream(body)
    prompts = _prompts(body.prompt)
    echo = bool(body.echo)
    if body.output_token_ids and (echo or len(prompts) != 1):
        raise RequestError(
            "output_token_ids continue the completion of one prompt, without echo, got "
            f"{len(prompts)} prompts{' and echo' if echo else ''}.",
            param="output_token_ids",
        )
    echo_only = echo and body.max_tokens == 0
    max_tokens = 1 if echo_only else body.max_tokens
    prompt_logprobs = body.prompt_logprobs
    if echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
        if -1 in (body.logprobs, body.prompt_logprobs):
            prompt_logprobs = -1
    sampling = _sampling(
        body,
        engine.default_sampling,
        max_tokens=DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
        structure=constraint_of(body),
    )
    requests: list[Request] = []
    prefixes: list[str] = []
    for number, prompt in enumerate(prompts):
        tokens = await _encode(engine, prompt, add_special_tokens=body.add_special_tokens)
        text = prompt if isinstance(prompt, str) else None
        tokens = _truncated(engine, tokens, body)
        known = tokens if text is None else {"prompt_token_ids": tokens, "prompt": text}
        name = f"{response_id}-{number}"
        requests.append(_request(engine, body, known, sampling, name, adapter))
        if not echo:
            prefixes.append("")
        elif text is None or body.truncate_prompt_tokens is not None:
            special = body.skip_special_tokens
            prefixes.append(tokenizer_of(engine).decode(tokens, skip_special_tokens=special))
        else:
            prefixes.append(text)
    return Job(
        response_id=response_id,
        model=model,
        requests=tuple(requests),
        prefixes=tuple(prefixes),
        num_top=body.logprobs,
        echo=echo,
        echo_only=echo_only,
        **_shared(body, options),
    )


async def chat_job(
    engine: "AsyncLLM",
    body: ChatBody,
    *,
    response_id: str,
    model: str,
    options: ApiOptions,
    adapter: Adapter | None = None,
) -> Job:
    """Translate the body of `POST /v1/chat/completions`.

    Raises:
        RequestError: If the request cannot be carried out.
    """
    body.check_extra()
    _check_stream(body)
    top = body.top_logprobs or 0
    if top != 0 and not body.logprobs:
        raise RequestError(
            f"top_logprobs needs logprobs to be true, got top_logprobs={top} without it.",
            param="top_logprobs",
        )
    num_top = top if body.logprobs else None
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
    choice = choice_of(body, options)
    check_template(engine, body, choice, options)
    prompt = await encode_chat(engine, body, options, tools=choice.mode != "none")
    tokens = _truncated(engine, prompt, body)
    reader, structure, keep_special = reading(engine, body, choice, tokens, options)
    sampling = _sampling(
        body,
        engine.default_sampling,
        max_tokens=max_tokens,
        logprobs=num_top,
        prompt_logprobs=body.prompt_logprobs,
        structure=structure,
        keep_special=keep_special,
    )
    request = _request(engine, body, tokens, sampling, response_id, adapter)
    last = body.messages[-1]
    role = last.role if body.continue_final_message else options.response_role
    prefix = _plain(last) if body.echo and last.role == role else ""
    return Job(
        response_id=response_id,
        model=model,
        requests=(request,),
        prefixes=(prefix,),
        role=role,
        num_top=num_top,
        reader=reader,
        **_shared(body, options),
    )


def _shared(body: GenerationBody, options: ApiOptions) -> dict[str, Any]:
    stream = body.stream_options
    force = options.enable_force_include_usage
    include_usage = force or (stream is not None and stream.include_usage)
    continuous = force or (stream is not None and stream.continuous_usage_stats)
    as_ids = body.return_tokens_as_token_ids
    return {
        "is_stream": bool(body.stream),
        "include_usage": include_usage,
        "continuous_usage": include_usage and continuous,
        "prompt_logprobs": body.prompt_logprobs is not None,
        "return_token_ids": bool(body.return_token_ids),
        "return_weight_versions": bool(body.return_weight_versions),
        "tokens_as_ids": options.return_tokens_as_token_ids if as_ids is None else as_ids,
    }


def _check_stream(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options needs stream to be true; leave it out otherwise.",
            param="stream_options",
        )
    if body.stream and body.prompt_logprobs not in (None, 0):
        raise RequestError(
            "prompt_logprobs cannot be streamed; set stream to false.", param="prompt_logprobs"
        )


def _prompts(prompt: str | Sequence[Any]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError(
            "prompt must not be empty, got []; send text, token ids, or a list of either.",
            param="prompt",
        )
    if isinstance(prompt[0], int):
        return [list(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(prompt)}; send several "
            "requests.",
            param="prompt",
        )
    return [item if isinstance(item, str) else list(item) for item in prompt]


def _sampling(
    body: GenerationBody,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    structure: StructuredOutputsParams | None = None,
    keep_special: bool = False,
) -> SamplingParams:
    cap = defaults.get("max_tokens")
    if cap is not None:
        max_tokens = cap if max_tokens is None else min(cap, max_tokens)
    chosen = {name: defaults[name] for name in _DEFAULTED if name in defaults}
    for name in _OPTIONAL:
        value = getattr(body, name)
        if value is not None:
            chosen[name] = value
    for name, largest in LARGEST.items():
        if name in chosen and -math.inf < chosen[name] < math.inf:
            chosen[name] = min(chosen[name], largest)
    return SamplingParams(
        **chosen,
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=body.skip_special_tokens and not keep_special,
        structured_outputs=structure,
        spaces_between_special_tokens=body.spaces_between_special_tokens,
    )


_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's own generation settings may decide."""
_OPTIONAL = (
    *_DEFAULTED, "n", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids",
    "logit_bias", "allowed_token_ids", "attention_mass",
)  # fmt: skip
"""What a request decides where it is present and not null."""


def _request(
    engine: "AsyncLLM",
    body: GenerationBody,
    prompt: "Prompt",
    sampling: SamplingParams,
    name: str,
    adapter: Adapter | None,
) -> Request:
    _check_salt(body.cache_salt)
    unique = RequestId(f"{name}-{new_request_id()[:8]}")  # clients may repeat their ids
    request = engine.make_request(
        prompt,
        sampling,
        request_id=unique,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        output_token_ids=body.output_token_ids or (),
        slo=None if body.slo is None else body.slo.model_dump(exclude_unset=True),
        lora_request=adapter,
    )
    left = engine.max_model_len - len(request.prompt_token_ids)
    wanted = request.sampling.max_tokens
    if wanted is not None and wanted > left > 0:
        fewer = min(request.sampling.min_tokens, left)
        clamped = request.sampling.replace(max_tokens=left, min_tokens=fewer)
        request = dataclasses.replace(request, sampling=clamped)
    return request


def _check_salt(salt: str | None) -> None:
    if salt is None:
        return
    bad = sorted(c for c in set(salt) if c in "@/\\\0" or "\ud800" <= c <= "\udfff")
    if not 0 < len(salt) <= MAX_SALT_LEN or bad:
        raise RequestError(
            f"cache_salt must be 1 to {MAX_SALT_LEN} characters without @, /, \\ and NUL, "
            f"got {len(salt)} characters{f' with {bad[0]!r}' if bad else ''}.",
            param="cache_salt",
        )


async def _encode(
    engine: "AsyncLLM", prompt: str | list[int], *, add_special_tokens: bool
) -> list[int]:
    if isinstance(prompt, list):
        return prompt

    def encode() -> list[int]:
        return tokenizer_of(engine).encode(prompt, add_special_tokens=add_special_tokens)

    return await asyncio.to_thread(encode) if len(prompt) > LONG_TEXT else encode()


def _truncated(engine: "AsyncLLM", tokens: list[int], body: GenerationBody) -> list[int]:
    keep = body.truncate_prompt_tokens
    if keep is None:
        return tokens
    if keep == 0:
        raise RequestError(
            "truncate_prompt_tokens must be at least 1, or -1 for the context length, got 0.",
            param="truncate_prompt_tokens",
        )
    if keep == -1:
        keep = engine.max_model_len - 1  # room for one token of output
    return tokens[:keep] if body.truncation_side == "right" else tokens[-keep:]


async def encode_chat(
    engine: "AsyncLLM", body: ChatTemplateBody, options: ApiOptions, *, tools: bool = True
) -> list[int]:
    """Turn messages into the ids of the prompt that the chat template makes of them.

    Args:
        engine: Whose tokenizer and template count.
        body: The messages.
        options: Settings of the server.
        tools: Whether the model is told about the tools.

    Raises:
        RequestError: If the template is not trusted or refuses the messages.
    """
    if body.chat_template is not None and not options.trust_request_chat_template:
        raise RequestError(
            "chat_template is refused: a template is a program. Start the server with "
            "--trust-request-chat-template to allow it.",
            param="chat_template",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; set one.",
            param="continue_final_message",
        )
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    generate = not body.continue_final_message and body.add_generation_prompt is not False

    def render() -> list[int]:
        shared: dict[str, Any] = {
            "add_generation_prompt": generate,
            "continue_final_message": body.continue_final_message,
            "chat_template": body.chat_template,
            "kwargs": template_kwargs(body, options),
            "tools": body.tools if tools else None,
            "content_format": options.chat_template_content_format,
        }
        if not body.add_special_tokens:
            return tokenizer_of(engine).encode_chat(messages, **shared)
        text = tokenizer_of(engine).render_chat(messages, **shared)
        return tokenizer_of(engine).encode(text, add_special_tokens=True)

    size = sum(len(_plain(message)) for message in body.messages)
    return await asyncio.to_thread(render) if size > LONG_TEXT else render()


def _plain(message: ChatMessage) -> str:
    content = message.content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


async def tokenize(engine: "AsyncLLM", body: TokenizeBody, options: ApiOptions) -> dict[str, Any]:
    """Answer `POST /tokenize`.

    Raises:
        RequestError: If there is neither prompt nor messages, or the chat template refuses them.
    """
    body.check_extra()
    if (body.prompt is None) == (not body.messages):
        raise RequestError("/tokenize needs either prompt or messages, not both.", param="prompt")
    if body.prompt is None:
        tokens = await encode_chat(engine, body, options)
    else:
        special = body.add_special_tokens is not False
        tokens = await _encode(engine, body.prompt, add_special_tokens=special)
    strings = (
        [tokenizer_of(engine).token_text(t) for t in tokens] if body.return_token_strs else None
    )
    return {
        "count": len(tokens),
        "max_model_len": engine.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }
