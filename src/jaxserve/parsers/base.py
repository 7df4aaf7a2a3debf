"""What parsers of outputs share.

A parser takes a text in pieces and says of each piece what has become certain. Joined, its answers
do not depend on how the text was cut: a whole text is parsed by one `push` and `finish`.
"""

import abc
import random
import string
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Tool = Mapping[str, Any]
"""A function that the model may call: `name`, `parameters` (a JSON schema), `description`."""


@dataclass(slots=True, kw_only=True)
class CallDelta:
    """News of one tool call.

    Attributes:
        index: Which call of the message.
        id: Its id; with the first news only.
        name: Name of the function; with the first news only.
        arguments: Further text of its arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True, kw_only=True)
class Delta:
    """What a piece of text has told.

    Attributes:
        reasoning: Further text of the model's reasoning.
        content: Further text of its answer.
        calls: News of its tool calls, in order.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list[CallDelta])

    def __bool__(self) -> bool:
        """Tell whether there is any news."""
        return bool(self.reasoning or self.content or self.calls)


def random_id() -> str:
    """Return a fresh id of a tool call."""
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def short_id() -> str:
    """Return a fresh id of nine letters and digits, as Mistral's templates want it."""
    return "".join(random.choices(string.ascii_letters + string.digits, k=9))  # noqa: S311


def held(text: str, marks: Sequence[str]) -> int:
    """Count the characters at the end of a text that may be the beginning of a mark.

    >>> held("so <tool", ["<tool_call>"])
    5
    """
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    for size in range(longest, 0, -1):
        tail = text[-size:]
        if any(len(mark) > size and mark.startswith(tail) for mark in marks):
            return size
    return 0


class ToolParser(abc.ABC):
    """Finds tool calls in the text of one completion.

    White space between text and a call, and between calls, is dropped, and text on both sides of
    calls is joined by a line break; what turns out to be no call is text.

    Args:
        tools: The functions that the model may call.
    """

    needs_special_tokens: ClassVar[bool] = False
    """Whether the marks are special tokens, which must then be kept in the text."""
    make_id = staticmethod(random_id)

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand at the beginning of a text."""
        self.tools = {str(tool.get("name")): tool for tool in tools}
        self.num_calls = 0
        self._rest = ""
        self._raw = ""
        self._delta = Delta()
        self._blank = ""
        self._is_after_call = False
        self._has_said = False
        self._has_arguments = True

    @classmethod
    def structure(cls, name: str) -> tuple[str, str] | None:
        """Return what stands before and behind the arguments of a call, if that is fixed text.

        Args:
            name: The function.
        """
        _ = name
        return None

    def push(self, text: str) -> Delta:
        """Take the next piece of text; return what has become certain."""
        return self._drain(text, final=False)

    def finish(self) -> Delta:
        """End the text; return the rest."""
        return self._drain("", final=True)

    def _drain(self, text: str, *, final: bool) -> Delta:
        self._delta = Delta()
        self._rest += text
        self._run(final=final)
        if final:
            self._say_raw()
            self._close_call()
            if not self._is_after_call:
                self._delta.content += self._blank
            self._blank = ""
        return self._delta

    def _run(self, *, final: bool) -> None:
        """Take what can be taken from `_rest`."""
        while self._rest and self._advance(final=final):
            pass

    @abc.abstractmethod
    def _advance(self, *, final: bool) -> bool:
        """Take something from `_rest`; False if more text is needed first.

        With `final` there is no more, and everything is taken in the end.
        """

    # For those who implement it --------------------------------------------------------------

    def _take(self, count: int) -> str:
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def _say(self, text: str) -> None:
        """Report text outside calls."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if kept:
            if self._is_after_call:
                kept = ("\n" if self._has_said else "") + kept.lstrip()
            self._delta.content += kept
            self._is_after_call = False
            self._has_said = True

    def _say_raw(self) -> None:
        """Report as text what looked like the beginning of a call, kept in `_raw` until then."""
        if self._raw:
            self._say(self._raw)
        self._raw = ""

    def _text_until(self, marks: Sequence[str], *, final: bool) -> str | None:
        """Report text up to the first mark, take that, and return it; None if there is none yet."""
        found = [(at, -len(m), m) for m in marks if (at := self._rest.find(m)) >= 0]
        if not found:
            keep = 0 if final else held(self._rest, marks)
            self._say(self._take(len(self._rest) - keep))
            return None
        at, _, mark = min(found)
        if not final and self._may_grow(at, mark, marks):
            self._say(self._take(at))
            return None
        self._say(self._take(at))
        return self._take(len(mark))

    def _may_grow(self, at: int, mark: str, marks: Sequence[str]) -> bool:
        """Tell whether a longer mark may begin where a shorter one has been found."""
        tail = self._rest[at:]
        return any(len(m) > len(tail) and m.startswith(tail) for m in marks if m != mark)

    def _begin_call(self, name: str) -> None:
        self._close_call()
        self._raw = ""
        self._blank = ""
        self._is_after_call = True
        self._has_arguments = False
        self._delta.calls.append(CallDelta(index=self.num_calls, id=self.make_id(), name=name))
        self.num_calls += 1

    def _add_arguments(self, text: str) -> None:
        if not text:
            return
        self._has_arguments = True
        calls = self._delta.calls
        if calls and calls[-1].index == self.num_calls - 1 and calls[-1].name is None:
            calls[-1].arguments += text
        else:
            calls.append(CallDelta(index=self.num_calls - 1, arguments=text))

    def _close_call(self) -> None:
        """Give a call that has ended without arguments empty ones."""
        if not self._has_arguments:
            self._add_arguments("{}")
