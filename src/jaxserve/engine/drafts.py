"""What one sequence remembers for drafting: where its words stood before, and how drafts fared."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.core.event import SpecDecodeMetrics

MAX_CANDIDATES = 16
"""Earlier places of the same words that are compared, the latest first."""

FIRST_ACCEPTANCE = 0.7
"""Chance that a draft token is right, as long as nothing is known."""

_MEMORY = 0.1
"""Weight of the latest draft token in a request's acceptance."""


class NgramIndex:
    """Finds where the last words of a sequence stood before; grows with the sequence.

    Args:
        shortest: Fewest tokens that must agree.
        longest: Tokens after which no better agreement is looked for.

    One dictionary leads from every run of `shortest` tokens to its latest place, one list from
    each place to the one before; a lookup follows that list for a bounded number of places.

    Source: Saxena, Prompt Lookup Decoding; the chains are those of LZ77 compressors (deflate).
    """

    def __init__(self, shortest: int, longest: int) -> None:
        """Start empty."""
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = []

    def extend(self, tokens: Sequence[int], length: int | None = None) -> None:
        """Take in what a sequence has gained since the last call; it only ever grows.

        Args:
            tokens: The whole sequence.
            length: Take in only so many of them.
        """
        size, latest, earlier = self._shortest, self._latest, self._earlier
        for end in range(len(earlier), len(tokens) if length is None else length):
            if end + 1 < size:
                earlier.append(-1)
                continue
            words = tuple(tokens[end + 1 - size : end + 1])
            earlier.append(latest.get(words, -1))
            latest[words] = end

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Continue a sequence as it went on after the longest agreement, the latest of equals.

        Args:
            tokens: The whole sequence, as taken in by `extend`.
            count: Tokens wanted.

        Returns:
            As many tokens, or none. What repeats itself is continued over its own end.
        """
        if not tokens:
            return []
        end = len(tokens)
        best, best_size = -1, 0
        place = self._earlier[end - 1]
        for _ in range(MAX_CANDIDATES):
            if place < 0:
                break
            size = self._shortest
            limit = min(self._longest, place + 1)
            while size < limit and tokens[place - size] == tokens[end - 1 - size]:
                size += 1
            if size > best_size:
                best, best_size = place, size
                if size == self._longest:
                    break
            place = self._earlier[place]
        if best < 0:
            return []
        period = end - 1 - best
        return [tokens[best + 1 + i % period] for i in range(count)]


@dataclass(slots=True, eq=False)
class DraftState:
    """What is remembered about the drafts of one sequence.

    Attributes:
        index: Where its words stood before; None if a model drafts.
        acceptance: Chance that a draft token is right if all before it are: a mean that forgets.
        proposal: What came out of the latest lookup.
        proposal_len: Tokens that the sequence had then; -1 if there was none.
        totals: Its figures so far.
    """

    index: NgramIndex | None = None
    acceptance: float = FIRST_ACCEPTANCE
    proposal: list[int] = field(default_factory=list[int])
    proposal_len: int = -1
    totals: SpecDecodeMetrics = field(default_factory=SpecDecodeMetrics)

    def learn(self, *, hits: int, misses: int) -> None:
        """Take in how many draft tokens were right, and whether one was wrong."""
        for outcome in (*[1.0] * hits, *[0.0] * misses):
            self.acceptance += _MEMORY * (outcome - self.acceptance)
