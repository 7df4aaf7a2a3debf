"""Reasoning in front of the answer."""

import abc
from typing import ClassVar

from jaxserve.core.structured import ReasoningSpan
from jaxserve.parsers.base import Delta, held

_SPACE = " \t\r\n"


class ReasoningParser(abc.ABC):
    """Splits the text of one completion into reasoning and answer.

    White space at the border is dropped. A text that ends within reasoning has no answer.

    Args:
        prompt: End of the prompt, which may have opened or closed the reasoning already.
    """

    needs_special_tokens: ClassVar[bool] = False
    """Whether the marks are special tokens, which must then be kept in the text."""
    start: ClassVar[str]
    end: ClassVar[str]

    def __init__(self, prompt: str = "") -> None:
        """Stand at the beginning of a text."""
        self._prompt = prompt.rstrip()

    @property
    @abc.abstractmethod
    def is_reasoning(self) -> bool:
        """Whether the text at hand is reasoning."""

    @abc.abstractmethod
    def push(self, text: str) -> Delta:
        """Take the next piece of text; return what has become certain."""

    @abc.abstractmethod
    def finish(self) -> Delta:
        """End the text; return the rest."""

    def span(self) -> ReasoningSpan | None:
        """Return what may stand in front of a constrained answer; None if nothing."""
        return None


class ThinkParser(ReasoningParser):
    """Reasoning between two marks, in front of the answer.

    Whether the first mark is needed depends on the model: some prompts contain it.
    """

    start: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"
    is_implicit: ClassVar[bool] = False
    """Whether a text is reasoning although nothing has opened it."""

    def __init__(self, prompt: str = "") -> None:
        """Stand at the beginning of a text, with what the prompt says about it."""
        super().__init__(prompt)
        self._rest = ""
        self._blank = ""
        self._state = "start"
        if self._prompt.endswith(self.end):
            self._state = "answer"
        self._may_be_bare = self._prompt.endswith(self.start) or self.is_implicit

    @property
    def is_reasoning(self) -> bool:
        """Whether the text at hand is reasoning."""
        return self._state in ("opened", "reasoning") or (
            self._state == "start" and self._may_be_bare
        )

    def span(self) -> ReasoningSpan | None:
        """Return the marks, unless the prompt has closed the reasoning."""
        if self._state == "answer":
            return None
        is_open = self._prompt.endswith(self.start)
        return ReasoningSpan(start=self.start, end=self.end, is_open=is_open)

    def push(self, text: str) -> Delta:
        """Take the next piece of text."""
        return self._drain(text, final=False)

    def finish(self) -> Delta:
        """End the text."""
        return self._drain("", final=True)

    def _drain(self, text: str, *, final: bool) -> Delta:
        delta = Delta()
        self._rest += text
        while self._rest and self._advance(delta, final=final):
            pass
        if final and self._state == "reasoning":
            delta.reasoning += self._blank
        return delta

    def _advance(self, delta: Delta, *, final: bool) -> bool:
        if self._state == "answer":
            delta.content += self._rest
            self._rest = ""
            return False
        text = self._rest.lstrip(_SPACE)
        if self._state == "border":
            self._rest = text
            self._state = "answer" if text else "border"
            return bool(text)
        if self._state == "start":
            if not final and text != self.start and self.start.startswith(text):
                return False
            if text.startswith(self.start):
                self._rest = text[len(self.start) :]
                self._state = "opened"
            else:
                self._state = "opened" if self._may_be_bare else "answer"
            return True
        if self._state == "opened":
            self._rest = text
            self._state = "reasoning" if text else "opened"
            return bool(text)
        return self._reason(delta, final=final)

    def _reason(self, delta: Delta, *, final: bool) -> bool:
        at = self._rest.find(self.end)
        cut = at if at >= 0 else len(self._rest) - (0 if final else held(self._rest, [self.end]))
        text = self._blank + self._rest[:cut]
        kept = text.rstrip(_SPACE)
        delta.reasoning += kept
        self._blank = text[len(kept) :]
        self._rest = self._rest[cut + (len(self.end) if at >= 0 else 0) :]
        if at >= 0:
            self._blank = ""
            self._state = "border"
        return at >= 0


class ImplicitThinkParser(ThinkParser):
    """As `ThinkParser`, for models that reason before every answer and may omit the first mark."""

    is_implicit: ClassVar[bool] = True


class MistralReasoning(ThinkParser):
    """Magistral: the marks are special tokens."""

    start: ClassVar[str] = "[THINK]"
    end: ClassVar[str] = "[/THINK]"
    needs_special_tokens: ClassVar[bool] = True


class SeedReasoning(ThinkParser):
    """Seed-OSS."""

    start: ClassVar[str] = "<seed:think>"
    end: ClassVar[str] = "</seed:think>"


class KimiReasoning(ThinkParser):
    """Kimi-VL and the first Kimi thinking models."""

    start: ClassVar[str] = "◁think▷"
    end: ClassVar[str] = "◁/think▷"
