"""The message format of gpt-oss: every message names its channel, and its recipient if any.

Source: the "harmony" response format of OpenAI's open models.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from jaxserve.parsers.base import Delta, Tool, ToolParser, held
from jaxserve.parsers.reasoning import ReasoningParser

CHANNEL, START, MESSAGE = "<|channel|>", "<|start|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class Segments:
    """Cuts a text into messages and reports their bodies piece by piece.

    Attributes:
        header: Header of the message that is being read; None between messages.
    """

    def __init__(self) -> None:
        """Stand in front of the first message."""
        self.header: str | None = None
        self._rest = ""

    def push(self, text: str, *, final: bool = False) -> list[tuple[str | None, str, bool]]:
        """Take text.

        Returns:
            Pieces: the header of a message, text of its body, whether it ends here. A header of
            None is text outside every message.
        """
        self._rest += text
        pieces: list[tuple[str | None, str, bool]] = []
        while self._rest and self._step(pieces, final=final):
            pass
        return pieces

    def _step(self, pieces: list[tuple[str | None, str, bool]], *, final: bool) -> bool:
        if self.header is None:
            return self._outside(pieces, final=final)
        found = [(at, mark) for mark in ENDS if (at := self._rest.find(mark)) >= 0]
        if not found:
            keep = 0 if final else held(self._rest, ENDS)
            cut = len(self._rest) - keep
            if cut:
                pieces.append((self.header, self._rest[:cut], False))
            self._rest = self._rest[cut:]
            return False
        at, mark = min(found)
        pieces.append((self.header, self._rest[:at], True))
        self._rest = self._rest[at + (0 if mark == START else len(mark)) :]
        self.header = None
        return True

    def _outside(self, pieces: list[tuple[str | None, str, bool]], *, final: bool) -> bool:
        found = [at for mark in (CHANNEL, START) if (at := self._rest.find(mark)) >= 0]
        if not found:
            cut = len(self._rest) - (0 if final else held(self._rest, (CHANNEL, START)))
            if cut:
                pieces.append((None, self._rest[:cut], False))
            self._rest = self._rest[cut:]
            return False
        at = min(found)
        if at:
            pieces.append((None, self._rest[:at], False))
            self._rest = self._rest[at:]
        end = self._rest.find(MESSAGE)
        if end < 0:
            if final:
                self._rest = ""  # half a header says nothing
            return False
        self.header = self._rest[:end]
        self._rest = self._rest[end + len(MESSAGE) :]
        pieces.append((self.header, "", False))
        return True


def recipient_of(header: str) -> str | None:
    """Return the function that a message is addressed to, if any."""
    found = _RECIPIENT.search(header)
    return found[1] if found else None


def channel_of(header: str) -> str:
    """Return the channel of a message.

    >>> channel_of("<|start|>assistant<|channel|>final")
    'final'
    """
    parts = header.partition(CHANNEL)[2].split()
    return parts[0].split("<")[0] if parts else ""


class HarmonyTools(ToolParser):
    """Calls are messages to `functions.name`; reasoning is not reported here."""

    needs_special_tokens: ClassVar[bool] = True

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """Stand in front of the first message."""
        super().__init__(tools)
        self._segments = Segments()

    def _advance(self, *, final: bool) -> bool:
        text, self._rest = self._rest, ""
        for header, body, is_end in self._segments.push(text, final=final):
            name = None if header is None else recipient_of(header)
            if name is not None:
                if not body and not is_end:
                    self._begin_call(name)
                self._add_arguments(body)
            elif header is None or channel_of(header) != "analysis":
                self._say(body)
        return False

    def _run(self, *, final: bool) -> None:
        self._advance(final=final)  # also with nothing new: the segments hold text back


class HarmonyReasoning(ReasoningParser):
    """The channel `analysis` is reasoning; calls pass unchanged, for the tool parser."""

    needs_special_tokens: ClassVar[bool] = True
    start: ClassVar[str] = ""
    end: ClassVar[str] = ""

    def __init__(self, prompt: str = "") -> None:
        """Stand in front of the first message."""
        super().__init__(prompt)
        self._segments = Segments()

    @property
    def is_reasoning(self) -> bool:
        """Whether the text at hand is reasoning."""
        header = self._segments.header
        return header is not None and _is_analysis(header)

    def push(self, text: str) -> Delta:
        """Take the next piece of text."""
        return self._sort(text, final=False)

    def finish(self) -> Delta:
        """End the text."""
        return self._sort("", final=True)

    def _sort(self, text: str, *, final: bool) -> Delta:
        delta = Delta()
        for header, body, is_end in self._segments.push(text, final=final):
            if header is not None and _is_analysis(header):
                delta.reasoning += body
            elif header is not None and recipient_of(header) is not None:
                opening = header + MESSAGE if not body and not is_end else ""
                delta.content += opening + body + ("<|call|>" if is_end else "")
            else:
                delta.content += body
        return delta


def _is_analysis(header: str) -> bool:
    return channel_of(header) == "analysis" and recipient_of(header) is None
