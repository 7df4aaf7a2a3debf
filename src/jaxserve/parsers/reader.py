"""Reads one completion: first its reasoning, then its tool calls."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.parsers.base import Delta, ToolParser
from jaxserve.parsers.reasoning import ReasoningParser


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderPlan:
    """How the completions of one request are read; every completion gets a reader of its own.

    Attributes:
        reasoning: Makes the parser of reasoning; None if there is none.
        tools: Makes the parser of tool calls; None if no tool may be called.
        parallel: Whether a message may hold several calls; otherwise only the first counts.
        include_reasoning: Whether reasoning is shown.
        is_named: Whether one function is forced by name.
    """

    reasoning: Callable[[], ReasoningParser] | None = None
    tools: Callable[[], ToolParser] | None = None
    parallel: bool = True
    include_reasoning: bool = True
    is_named: bool = False


class OutputReader:
    """Turns the text of one completion into reasoning, answer and calls.

    Args:
        plan: How to read.

    Attributes:
        num_calls: Calls reported so far.
        num_reasoning_tokens: Tokens of the reasoning so far.
    """

    def __init__(self, plan: ReaderPlan) -> None:
        """Stand at the beginning of the text."""
        self._plan = plan
        self._reasoning = None if plan.reasoning is None else plan.reasoning()
        self._tools = None if plan.tools is None else plan.tools()
        self.num_calls = 0
        self.num_reasoning_tokens = 0

    def push(self, text: str, num_tokens: int = 0) -> Delta:
        """Take the next piece of text.

        Args:
            text: The piece.
            num_tokens: Tokens that brought it.

        Returns:
            What has become certain.
        """
        if self._reasoning is None:
            return self._read_tools(Delta(content=text))
        before = self._reasoning.is_reasoning
        delta = self._reasoning.push(text)
        if before and self._reasoning.is_reasoning:
            self.num_reasoning_tokens += num_tokens
        return self._read_tools(delta)

    def finish(self) -> Delta:
        """End the text; return the rest."""
        delta = Delta() if self._reasoning is None else self._reasoning.finish()
        made = self._read_tools(delta)
        if self._tools is not None:
            last = self._kept(self._tools.finish())
            made.content += last.content
            made.calls += last.calls
        return made

    def _read_tools(self, delta: Delta) -> Delta:
        if not self._plan.include_reasoning:
            delta.reasoning = ""
        if self._tools is None or not delta.content:
            return delta
        made = self._kept(self._tools.push(delta.content))
        made.reasoning = delta.reasoning
        return made

    def _kept(self, delta: Delta) -> Delta:
        if not self._plan.parallel:
            delta.calls = [call for call in delta.calls if call.index == 0]
        self.num_calls = max([self.num_calls, *(call.index + 1 for call in delta.calls)])
        return delta
