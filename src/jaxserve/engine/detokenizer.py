"""Text of a sequence that is still being generated, and the stop strings that end it."""

from collections.abc import Sequence
from typing import Protocol

from jaxserve.engine.token_text import TokenText


class HasTokenTable(Protocol):
    """What a detokenizer needs of a tokenizer."""

    @property
    def token_table(self) -> TokenText:
        """The text of every token."""
        ...


class StopMatcher:
    """Looks for the first of several strings in a text that arrives in pieces.

    First means: complete first, as if the text came one character at a time; of several that
    end with the same character the longest counts. So the answer does not depend on how the text
    was cut. Text that may be the beginning of a stop string is held back, and nothing else is.

    Args:
        stops: The strings to look for; none of them empty.
        include_stop: Keep the stop string itself in the text.

    Source: Knuth, Morris and Pratt, "Fast pattern matching in strings" (1977), one automaton per
    string.
    """

    __slots__ = ("_held", "_include", "_links", "_states", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """Prepare the automata."""
        self._stops = tuple(stops)
        self._links = [_failure_links(stop) for stop in stops]
        self._states = [0] * len(self._stops)
        self._include = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_match: bool = True) -> str:
        """Take the next piece of text.

        Args:
            text: The piece.
            may_match: Off lets stop strings that end in this piece pass.

        Returns:
            Text that may be shown: all of it up to the beginning of a possible stop string. Once a
            string has matched (see `matched`), what precedes it, and after that nothing.
        """
        if self.matched is not None:
            return ""
        ends = [self._advance(place, text, may_match) for place in range(len(self._stops))]
        found = [
            (end, -len(stop), stop) for end, stop in zip(ends, self._stops, strict=True) if end >= 0
        ]
        joined = self._held + text
        if found:
            end, _, self.matched = min(found)
            cut = len(self._held) + end - (0 if self._include else len(self.matched))
            self._held = ""
            return joined[:cut]
        cut = len(joined) - max(self._states, default=0)
        self._held = joined[cut:]
        return joined[:cut]

    def flush(self) -> str:
        """Return what was held back; no more text will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, place: int, text: str, may_match: bool) -> int:  # noqa: FBT001
        """Run one automaton over `text`; return where its string ends first, or -1."""
        stop, links, state = self._stops[place], self._links[place], self._states[place]
        at, size = 0, len(text)
        while at < size:
            if not state:  # nothing begun: jump to the next place where the string could begin
                at = text.find(stop[0], at)
                if at < 0:
                    break
            char = text[at]
            at += 1
            while state and stop[state] != char:
                state = links[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if may_match:
                    return at
                state = links[state - 1]
        self._states[place] = state
        return -1


def _failure_links(stop: str) -> list[int]:
    """Return, for every prefix, the length of its longest proper suffix that begins `stop`."""
    links = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = links[length - 1]
        if stop[place] == stop[length]:
            length += 1
        links[place] = length
    return links


class Detokenizer:
    """Turns the ids of one completion into text as they come.

    The pieces returned by `push` and `finish`, joined, are the text of the whole completion up to
    its stop string; they do not depend on how the ids were cut. No piece ends within a character
    or shows the beginning of a stop string.

    Args:
        tokenizer: Whose ids these are.
        prompt_ids: The ids in front of the completion. With a prompt that has text, the
            completion keeps the space that the first token of a text would lose.
        skip_special_tokens: Leave special tokens out of the text.
        stop: Strings that end the text.
        include_stop: Keep the stop string in the text.
        min_tokens: Let stop strings pass that are complete within this many tokens.

    Attributes:
        matched_stop: The stop string that ended the text, as soon as it is complete.
        num_tokens: Ids taken so far; those behind the one that completed a stop string are not.
    """

    __slots__ = ("_decoder", "_matcher", "_min_tokens", "matched_stop", "num_tokens")

    def __init__(
        self,
        tokenizer: HasTokenTable,
        *,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Start in front of the first id."""
        self._decoder = tokenizer.token_table.decoder(
            skip_special_tokens=skip_special_tokens, context=prompt_ids
        )
        self._matcher = StopMatcher(stop, include_stop=include_stop) if stop else None
        self._min_tokens = min_tokens
        self.matched_stop: str | None = None
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next ids.

        Args:
            token_ids: Any number of them. Ids that the tokenizer does not know have no text.

        Returns:
            New text that may be shown; often empty. Nothing once a stop string has matched.
        """
        matcher = self._matcher
        if matcher is None:
            self.num_tokens += len(token_ids)
            return self._decoder.feed(token_ids)
        shown: list[str] = []
        for token_id in token_ids:
            if self.matched_stop is not None:
                break
            self.num_tokens += 1
            if text := self._decoder.feed((token_id,)):
                shown.append(matcher.push(text, may_match=self.num_tokens > self._min_tokens))
                self.matched_stop = matcher.matched
        return "".join(shown)

    def finish(self) -> str:
        """End the completion.

        Returns:
            The text that was held back: a last broken character as U+FFFD, and what might have
            become a stop string. Empty if a stop string has matched.
        """
        rest = self._decoder.finish()
        matcher = self._matcher
        if matcher is None:
            return rest
        shown = matcher.push(rest, may_match=self.num_tokens > self._min_tokens)
        self.matched_stop = matcher.matched
        return shown + matcher.flush()
