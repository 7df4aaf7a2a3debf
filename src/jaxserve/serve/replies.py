"""Pieces of answers: log-probabilities in both schemas, usage, finished choices."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxserve import __version__
from jaxserve.core.errors import DeclinedError, RequestError
from jaxserve.core.event import (
    FinishReason,
    Logprob,
    SloOutcome,
    TokenEvent,
    TokenLogprobs,
    WeightSpan,
    extend_spans,
    failure_of,
)
from jaxserve.parsers.base import Delta
from jaxserve.parsers.reader import OutputReader
from jaxserve.serve.errors import GenerationFailedError
from jaxserve.serve.translate import Job

if TYPE_CHECKING:
    from jaxserve.engine.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""What minus infinity becomes; JSON has no infinity."""
FINGERPRINT = f"jaxserve-{__version__}"


@dataclass(slots=True)
class Usage:
    """Token counts of an answer, as they grow.

    Attributes:
        prompt: Tokens of all prompts.
        cached: Those found in the prefix cache.
        completion: Tokens of all completions.
        reasoning: Those of them that are reasoning; None without a reasoning parser.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that clients know."""
        details: dict[str, Any] = {}
        if self.reasoning is not None:
            details["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            **details,
        }


@dataclass(slots=True)
class Choice:
    """One completion, gathered from its events.

    Attributes:
        index: Position among all completions of the answer.
        text: Pieces of its text.
        token_ids: Its tokens.
        logprobs: Per token, if asked for.
        finish_reason: Why it ended.
        stop_reason: The stop string or id that ended it.
        reader: Finds reasoning and tool calls; None where the text is the answer.
        reasoning: Pieces of its reasoning.
        calls: Its tool calls, as the schema wants them.
    """

    index: int
    text: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reader: OutputReader | None = None
    reasoning: list[str] = field(default_factory=list[str])
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def read(self, event: TokenEvent) -> Delta:
        """Sort the text of one event into reasoning, answer and calls."""
        if self.reader is None:
            return Delta(content=event.text)
        delta = self.reader.push(event.text, len(event.token_ids))
        if event.finish_reason is not None:
            last = self.reader.finish()
            delta.reasoning += last.reasoning
            delta.content += last.content
            delta.calls += last.calls
        return delta

    def ending(self, event: TokenEvent, *, is_named: bool) -> str | None:
        """Return the finish reason to report: calls count unless the end came from outside."""
        if event.finish_reason is None:
            return None
        has_calls = self.reader is not None and self.reader.num_calls > 0
        if event.finish_reason is FinishReason.STOP and has_calls and not is_named:
            return "tool_calls"
        return event.finish_reason.value

    def add(self, event: TokenEvent, *, is_named: bool = False) -> None:
        """Take in the news of one event."""
        delta = self.read(event)
        self.text.append(delta.content)
        self.reasoning.append(delta.reasoning)
        for call in delta.calls:
            if call.name is not None:
                function = {"name": call.name, "arguments": call.arguments}
                self.calls.append({"id": call.id, "type": "function", "function": function})
            else:
                self.calls[call.index]["function"]["arguments"] += call.arguments
        self.token_ids.extend(event.token_ids)
        if event.logprobs is not None:
            self.logprobs.extend(event.logprobs)
        if event.finish_reason is not None:
            self.finish_reason = self.ending(event, is_named=is_named)
            self.stop_reason = event.stop_reason


def check_event(event: TokenEvent) -> None:
    """Turn a failure into an exception.

    Raises:
        RequestError: If the event reports one for which the request is to blame.
        DeclinedError: If the scheduler could not promise the request its objectives.
        GenerationFailedError: If it reports one of the engine's own.
    """
    match failure_of(event):
        case None:
            return
        case RequestError() | DeclinedError() as error:
            raise error
        case error:
            raise GenerationFailedError(str(error))


class TokenWriter:
    """Writes tokens and their log-probabilities for one answer.

    Args:
        tokenizer: Gives text and bytes of a token; None where there is neither.
        as_ids: Whether to write `token_id:N` for the text.
    """

    def __init__(self, tokenizer: "Tokenizer | None", *, as_ids: bool) -> None:
        """Keep the tokenizer."""
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token: int, entry: Logprob | None = None) -> str:
        """Return the text of a token."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return self._tokenizer.token_text(token)

    def chat(self, tokens: Iterable[TokenLogprobs], num_top: int) -> list[dict[str, Any]]:
        """Return the list `logprobs.content` of the chat schema."""
        content: list[dict[str, Any]] = []
        for candidates in tokens:
            entries = [self._chat_entry(token, entry) for token, entry in candidates.items()]
            limit = len(entries) if num_top < 0 else num_top
            content.append({**entries[0], "top_logprobs": entries[:limit]})
        return content

    def _chat_entry(self, token: int, entry: Logprob) -> dict[str, Any]:
        tokenizer = self._tokenizer
        return {
            "token": self.text(token, entry),
            "logprob": clamp(entry.logprob),
            "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token)),
        }

    def completion(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        num_top: int,
        offset: int,
    ) -> dict[str, list[Any]]:
        """Return the four lists of the completions schema.

        Args:
            token_ids: The tokens.
            entries: Candidates of each; None where there are none (the first prompt token).
            num_top: Candidates to list besides the token itself; -1 is all.
            offset: Characters before the first token.
        """
        lists: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token, candidates in zip(token_ids, entries, strict=True):
            entry = None if candidates is None else candidates.get(token)
            text = self.text(token, entry)
            lists["tokens"].append(text)
            lists["text_offset"].append(offset)
            offset += len(text)
            lists["token_logprobs"].append(None if entry is None else clamp(entry.logprob))
            lists["top_logprobs"].append(self._top(candidates, num_top))
        return lists

    def _top(self, candidates: TokenLogprobs | None, num_top: int) -> dict[str, float] | None:
        if candidates is None:
            return None
        limit = len(candidates) if num_top < 0 else num_top + 1
        top: dict[str, float] = {}
        for token, entry in list(candidates.items())[:limit]:
            top.setdefault(self.text(token, entry), clamp(entry.logprob))
        return top

    def prompt(self, entries: Iterable[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """Return `prompt_logprobs`: null first, then candidates by token id."""
        return [
            None
            if candidates is None
            else {
                str(token): {
                    "logprob": clamp(entry.logprob),
                    "rank": entry.rank,
                    "decoded_token": self.text(token, entry),
                }
                for token, entry in candidates.items()
            }
            for candidates in entries
        ]


def clamp(logprob: float) -> float:
    """Return a log-probability that JSON can hold.

    >>> clamp(float("-inf"))
    -9999.0
    """
    return max(MIN_LOGPROB, logprob)


@dataclass(slots=True)
class Answer:
    """Everything that a job's events have told so far.

    Attributes:
        job: What was asked for.
        created: Seconds since 1970.
        choices: All completions, those of one prompt next to each other.
        usage: Token counts.
        prompt_logprobs: Those of each prompt, once known.
        weight_versions: Which weights produced which tokens, by completion; if asked for.
        slo: Which objectives the completions that have ended kept, all of them alike; None if
            there were none.
        num_open: Completions that have not ended.
    """

    job: Job
    created: int
    choices: list[Choice] = field(init=False)
    usage: Usage = field(init=False)
    prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = field(init=False)
    weight_versions: dict[int, list[WeightSpan]] = field(init=False)
    slo: SloOutcome | None = field(init=False, default=None)
    num_open: int = field(init=False)
    _cached: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Prepare one empty choice per completion."""
        plan = self.job.reader
        self.choices = [
            Choice(index, reader=None if plan is None else OutputReader(plan))
            for index in range(self.job.num_choices)
        ]
        self.usage = Usage(prompt=sum(len(r.prompt_token_ids) for r in self.job.requests))
        self.prompt_logprobs = {}
        self.weight_versions = {}
        self.num_open = self.job.num_choices
        self._cached = {}

    def add(self, position: int, event: TokenEvent) -> None:
        """Take in one event: its tokens for the usage, its text for its choice.

        Args:
            position: Which of the job's requests it belongs to.
            event: The news.
        """
        plan = self.job.reader
        choice = self.choices[position * self.job.n + event.index]
        choice.add(event, is_named=plan is not None and plan.is_named)
        self.count(position, event)

    def count(self, position: int, event: TokenEvent) -> None:
        """Add an event's tokens to the usage.

        Args:
            position: Which of the job's requests it belongs to.
            event: The news.
        """
        if not self.job.echo_only:
            self.usage.completion += len(event.token_ids)
        if self.job.return_weight_versions:
            spans = self.weight_versions.setdefault(position * self.job.n + event.index, [])
            extend_spans(spans, event.weight_version, len(event.token_ids))
        if event.num_cached_tokens > self._cached.get(position, 0):
            self.usage.cached += event.num_cached_tokens - self._cached.get(position, 0)
            self._cached[position] = event.num_cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs[position] = event.prompt_logprobs
        if event.finish_reason is not None:
            self.num_open -= 1
            outcome = None if event.metrics is None else event.metrics.slo
            if outcome is not None:
                self.slo = outcome if self.slo is None else self.slo.both(outcome)
        if self.job.reader is not None and self.job.reader.reasoning is not None:
            readers = [c.reader for c in self.choices if c.reader is not None]
            self.usage.reasoning = sum(reader.num_reasoning_tokens for reader in readers)

    def metrics_fields(self) -> dict[str, Any]:
        """Return how the objectives of the whole answer were kept, once that is known."""
        if self.slo is None or self.num_open:
            return {}
        return {"metrics": {"slo": {"attained": self.slo.attained, **self.slo.readings()}}}

    def version_fields(self, index: int) -> dict[str, Any]:
        """Return the spans of one completion, if they were asked for."""
        if not self.job.return_weight_versions:
            return {}
        spans = self.weight_versions.get(index, [])
        return {
            "weight_versions": [
                {"version": span.version, "start": span.start, "end": span.end} for span in spans
            ]
        }

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields with which every answer and chunk begins."""
        return {
            "id": self.job.response_id,
            "object": kind,
            "created": self.created,
            "model": self.job.model,
        }


def chat_reply(answer: Answer, writer: TokenWriter) -> dict[str, Any]:
    """Return the finished answer of `POST /v1/chat/completions`."""
    job = answer.job
    choices: list[dict[str, Any]] = []
    for choice in answer.choices:
        content = job.prefixes[0] + "".join(choice.text)
        entry: dict[str, Any] = {
            "index": choice.index,
            "message": _message(job, choice, content),
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if job.num_top is not None:
            entry["logprobs"] = {"content": writer.chat(choice.logprobs, job.num_top)}
        if job.return_token_ids:
            entry["token_ids"] = choice.token_ids
        choices.append({**entry, **answer.version_fields(choice.index)})
    reply = {
        **answer.head("chat.completion"),
        "choices": choices,
        "usage": answer.usage.to_json(),
        "system_fingerprint": FINGERPRINT,
    }
    return {**reply, **answer.metrics_fields(), **prompt_fields(answer, writer, 0)}


def _message(job: Job, choice: Choice, content: str) -> dict[str, Any]:
    """Return the message of a finished chat choice."""
    message: dict[str, Any] = {"role": job.role, "content": content, "refusal": None}
    if job.reader is None:
        return message
    reasoning = "".join(choice.reasoning)
    if not content and (choice.calls or reasoning):
        message["content"] = None
    if choice.calls:
        message["tool_calls"] = choice.calls
    if job.reader.reasoning is not None:
        message["reasoning"] = reasoning or None
    return message


def completion_reply(answer: Answer, writer: TokenWriter) -> dict[str, Any]:
    """Return the finished answer of `POST /v1/completions`."""
    job = answer.job
    choices: list[dict[str, Any]] = []
    for choice in answer.choices:
        position = choice.index // job.n
        text = "" if job.echo_only else "".join(choice.text)
        entry: dict[str, Any] = {
            "index": choice.index,
            "text": job.prefixes[position] + text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if job.num_top is not None:
            entry["logprobs"] = _echoed_logprobs(answer, choice, writer, job.num_top)
        if job.return_token_ids:
            entry["token_ids"] = [] if job.echo_only else choice.token_ids
        entry |= answer.version_fields(choice.index)
        choices.append({**entry, **prompt_fields(answer, writer, position)})
    return {
        **answer.head("text_completion"),
        "choices": choices,
        "usage": answer.usage.to_json(),
        "system_fingerprint": FINGERPRINT,
        **answer.metrics_fields(),
    }


def _echoed_logprobs(
    answer: Answer, choice: Choice, writer: TokenWriter, num_top: int
) -> dict[str, list[Any]]:
    job = answer.job
    ids: list[int] = [] if job.echo_only else choice.token_ids
    entries: list[TokenLogprobs | None] = [] if job.echo_only else [*choice.logprobs]
    if job.echo:
        position = choice.index // job.n
        ids = [*job.requests[position].prompt_token_ids, *ids]
        entries = [*answer.prompt_logprobs.get(position, ()), *entries]
    return writer.completion(ids, entries, num_top, 0)


def prompt_fields(answer: Answer, writer: TokenWriter, position: int) -> Mapping[str, Any]:
    """Return what was asked about one prompt: its ids, its log-probabilities."""
    job = answer.job
    fields: dict[str, Any] = {}
    if job.return_token_ids:
        fields["prompt_token_ids"] = job.requests[position].prompt_token_ids
    if job.prompt_logprobs:
        fields["prompt_logprobs"] = writer.prompt(answer.prompt_logprobs.get(position, ()))
    return fields
