"""Answers as streams of events, and the same events gathered into one answer."""

import abc
import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from jaxserve.core.errors import DeclinedError, RequestError
from jaxserve.core.event import TokenEvent, TokenLogprobs
from jaxserve.parsers.base import Delta
from jaxserve.parsers.reader import ReaderPlan
from jaxserve.serve.errors import log_failure, problem_of
from jaxserve.serve.replies import (
    FINGERPRINT,
    Answer,
    TokenWriter,
    check_event,
    prompt_fields,
)
from jaxserve.serve.source import EventSource
from jaxserve.serve.sse import DONE, close_all, frame, merge, text_framer

_SLOT = "\0text"
"""Where the text goes in a prepared event; no id or model name can contain it."""


async def gather(answer: Answer, sources: Sequence[EventSource]) -> None:
    """Read every event into `answer`.

    Args:
        answer: Receives them.
        sources: Events of each of the job's requests; closed at the end.

    Raises:
        RequestError: If a completion cannot go on because of what was asked for.
        DeclinedError: If the scheduler could not promise a request its objectives.
        GenerationFailedError: If the engine gave up on a completion.
    """
    try:
        async with contextlib.aclosing(merge(sources)) as events:
            async for position, event in events:
                check_event(event)
                answer.add(position, event)
    finally:
        await close_all(sources)


async def begun(sources: Sequence[EventSource]) -> None:
    """Wait until every request has begun, so that a refusal can still be the answer's status.

    Args:
        sources: Events of each of the job's requests; closed if one of them is refused.

    Raises:
        RequestError: If a completion cannot begin because of what was asked for.
        DeclinedError: If the scheduler could not promise a request its objectives.
        GenerationFailedError: If the engine gave up on a completion.
    """
    tasks = [asyncio.ensure_future(source.peek()) for source in sources]
    try:
        for first in asyncio.as_completed(tasks):
            check_event(await first)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_all(sources)
        raise


async def stream(
    answer: Answer, sources: Sequence[EventSource], writer: TokenWriter
) -> AsyncGenerator[bytes]:
    """Yield an answer as server-sent events, the closing `[DONE]` included.

    Args:
        answer: Keeps the counts.
        sources: Events of each of the job's requests; closed at the end.
        writer: Writes log-probabilities.

    Yields:
        Finished events. An error is one event too; the headers are long gone by then.
    """
    chunks = _ChatChunks(answer, writer) if answer.job.role else _TextChunks(answer, writer)
    try:
        for chunk in chunks.opening():
            yield chunk
        async with contextlib.aclosing(merge(sources)) as events:
            async for position, event in events:
                check_event(event)
                chunk = chunks.chunk(position, event)
                if chunk is not None:
                    yield chunk
        if answer.job.include_usage:
            yield chunks.usage()
    except Exception as error:  # noqa: BLE001  told to the client, whatever it is
        if not isinstance(error, RequestError | DeclinedError):
            log_failure(f"stream {answer.job.response_id}", error)
        yield frame(problem_of(error).body())
    finally:
        await close_all(sources)
    yield DONE


class _Chunks(abc.ABC):
    """What chat and completion chunks share."""

    kind: str

    def __init__(self, answer: Answer, writer: TokenWriter) -> None:
        self.answer = answer
        self.job = answer.job
        self.writer = writer
        self.plain: dict[int, Callable[[str], bytes]] = {}
        # nothing but the text changes from chunk to chunk, unless one of these is wanted
        self.is_plain = (
            self.job.num_top is None
            and not self.job.return_token_ids
            and not self.job.continuous_usage
        )

    @abc.abstractmethod
    def opening(self) -> list[bytes]:
        """Return what is sent before the first token."""

    @abc.abstractmethod
    def chunk(self, position: int, event: TokenEvent) -> bytes | None:
        """Return the chunk of one event; None if it has nothing to tell."""

    @abc.abstractmethod
    def choice(self, index: int, text: str) -> dict[str, Any]:
        """Return a choice that is not finished."""

    def write(self, choice: dict[str, Any], **fields: object) -> bytes:
        """Write one chunk around a choice."""
        chunk = {**self.answer.head(self.kind), "choices": [choice], **fields}
        if choice["finish_reason"] is not None:
            chunk |= self.answer.metrics_fields()
        if self.job.continuous_usage:
            chunk["usage"] = self.answer.usage.to_json()
        return frame(chunk)

    def write_plain(self, index: int, text: str) -> bytes:
        """Write a chunk that tells nothing but text."""
        framer = self.plain.get(index)
        if framer is None:
            chunk = {**self.answer.head(self.kind), "choices": [self.choice(index, _SLOT)]}
            framer = self.plain[index] = text_framer(chunk, _SLOT)
        return framer(text)

    def usage(self) -> bytes:
        """Return the chunk after the last one."""
        return frame(
            {
                **self.answer.head(self.kind),
                "choices": [],
                "usage": self.answer.usage.to_json(),
                "system_fingerprint": FINGERPRINT,
            }
        )


class _ChatChunks(_Chunks):
    kind = "chat.completion.chunk"

    def opening(self) -> list[bytes]:
        extra = prompt_fields(self.answer, self.writer, 0)
        chunks: list[bytes] = []
        for index in range(self.job.num_choices):
            choice = self.choice(index, "")
            choice["delta"] = {"role": self.job.role, "content": ""}
            chunks.append(self.write(choice, **extra))
            if self.job.prefixes[0]:
                chunks.append(self.write(self.choice(index, self.job.prefixes[0])))
        return chunks

    def choice(self, index: int, text: str) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": text} if text else {},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunk(self, position: int, event: TokenEvent) -> bytes | None:
        if self.job.reader is not None:
            return self._read_chunk(position, event, self.job.reader)
        self.answer.count(position, event)
        if self.is_plain and event.finish_reason is None:
            return self.write_plain(event.index, event.text) if event.text else None
        choice = self.choice(event.index, event.text)
        if self.job.num_top is not None and event.logprobs:
            content = self.writer.chat(event.logprobs, self.job.num_top)
            choice["logprobs"] = {"content": content}
        if self.job.return_token_ids:
            choice["token_ids"] = event.token_ids
        if event.finish_reason is not None:
            choice["finish_reason"] = event.finish_reason.value
            choice["stop_reason"] = event.stop_reason
            choice |= self.answer.version_fields(event.index)
        elif not event.text and not event.token_ids:
            return None
        return self.write(choice)

    def _read_chunk(self, position: int, event: TokenEvent, plan: ReaderPlan) -> bytes | None:
        """Write the chunks of an event whose text may be reasoning, answer or a call."""
        state = self.answer.choices[event.index]
        deltas = _deltas(state.read(event))
        self.answer.count(position, event)
        details: dict[str, Any] = {}
        if self.job.num_top is not None and event.logprobs:
            content = self.writer.chat(event.logprobs, self.job.num_top)
            details["logprobs"] = {"content": content}
        if self.job.return_token_ids:
            details["token_ids"] = event.token_ids
        if not deltas and (event.finish_reason is not None or details):
            deltas = [{}]
        choices = [{**self.choice(event.index, ""), "delta": delta} for delta in deltas]
        if not choices:
            return None
        choices[0] |= details
        if event.finish_reason is not None:
            choices[-1]["finish_reason"] = state.ending(event, is_named=plan.is_named)
            choices[-1]["stop_reason"] = event.stop_reason
            choices[-1] |= self.answer.version_fields(event.index)
        return b"".join(map(self.write, choices))


def _deltas(news: Delta) -> list[dict[str, Any]]:
    """Write what a piece of text has told as deltas of the chat schema, in order."""
    deltas: list[dict[str, Any]] = []
    if news.reasoning:
        deltas.append({"reasoning": news.reasoning})
    if news.content:
        deltas.append({"content": news.content})
    for call in news.calls:
        entry: dict[str, Any] = {"index": call.index}
        if call.name is not None:
            entry |= {"id": call.id, "type": "function"}
            entry["function"] = {"name": call.name, "arguments": call.arguments}
        else:
            entry["function"] = {"arguments": call.arguments}
        deltas.append({"tool_calls": [entry]})
    return deltas


class _TextChunks(_Chunks):
    kind = "text_completion"

    def __init__(self, answer: Answer, writer: TokenWriter) -> None:
        super().__init__(answer, writer)
        self.started: set[int] = set()
        self.offsets = [0] * self.job.num_choices

    def opening(self) -> list[bytes]:
        return []

    def choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def chunk(self, position: int, event: TokenEvent) -> bytes | None:
        self.answer.count(position, event)
        index = position * self.job.n + event.index
        text = "" if self.job.echo_only else event.text
        is_first = index not in self.started
        if is_first:
            text = self.job.prefixes[position] + text
        if self.is_plain and event.finish_reason is None:
            if not text:
                return None
            self.started.add(index)
            return self.write_plain(index, text)
        if event.finish_reason is None and not text and not event.token_ids:
            return None
        self.started.add(index)
        choice = self.choice(index, text)
        if self.job.num_top is not None:
            choice["logprobs"] = self._logprobs(position, index, event, is_first=is_first)
        if self.job.return_token_ids:
            choice["token_ids"] = () if self.job.echo_only else event.token_ids
            if is_first:
                choice |= prompt_fields(self.answer, self.writer, position)
        if event.finish_reason is not None:
            choice["finish_reason"] = event.finish_reason.value
            choice["stop_reason"] = event.stop_reason
            choice |= self.answer.version_fields(index)
        return self.write(choice)

    def _logprobs(
        self, position: int, index: int, event: TokenEvent, *, is_first: bool
    ) -> dict[str, list[Any]]:
        ids: list[int] = []
        entries: list[TokenLogprobs | None] = []
        if is_first and self.job.echo:
            ids += self.job.requests[position].prompt_token_ids
            entries += self.answer.prompt_logprobs.get(position, ())
        if not self.job.echo_only:
            ids += event.token_ids
            entries += event.logprobs or ()
        lists = self.writer.completion(ids, entries, self.job.num_top or 0, self.offsets[index])
        self.offsets[index] += sum(map(len, lists["tokens"]))
        return lists
