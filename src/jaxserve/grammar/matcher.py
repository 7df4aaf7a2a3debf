"""Where in its grammar a sequence stands, and which tokens may come next.

An end-of-sequence token is never shown to the grammar engine, so that taking tokens back counts
the same everywhere.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import llguidance

MAX_MESSAGE = 1500
"""Most characters of a problem to repeat."""


def shown(problem: str) -> str:
    """Return what the grammar engine says, without the lines that say nothing."""
    lines = [line.rstrip() for line in problem.strip().splitlines()]
    return "\n".join(line for line in lines if line and line != "<non-verbose/>")[:MAX_MESSAGE]


class Matcher:
    """Follows one sequence through a grammar.

    Args:
        state: The grammar engine's state; nobody else uses it.
        eos_ids: Tokens that end a sequence.

    Attributes:
        num_tokens: Tokens taken, the one that ended the sequence included.
        has_ended: Whether an end-of-sequence token has been taken.
        error: Why no further token can be taken; empty while all is well.
    """

    __slots__ = ("_eos_ids", "_state", "error", "has_ended", "num_tokens")

    def __init__(self, state: "llguidance.LLMatcher", eos_ids: frozenset[int]) -> None:
        """Stand at the start."""
        self._state = state
        self._eos_ids = eos_ids
        self.num_tokens = 0
        self.has_ended = False
        self.error = ""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end-of-sequence token can follow."""
        return self.has_ended or self._state.is_stopped()

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far satisfies the grammar."""
        return self.has_ended or self._state.is_accepting()

    def take(self, token: int) -> bool:
        """Go one token on.

        Args:
            token: The token that was drawn.

        Returns:
            Whether the grammar allows it; if not, `error` says why and nothing follows any more.
        """
        if self.error or self.has_ended:
            return False
        self.num_tokens += 1
        if token in self._eos_ids and self._state.is_accepting():
            self.has_ended = True
            return True
        if self._state.consume_token(token):
            return True
        self.error = self._state.get_error() or f"the grammar does not allow token {token}"
        return False

    def follow(self, tokens: Sequence[int], start: int = 0) -> bool:
        """Go on to the end of a sequence of which a beginning has been taken already.

        Args:
            tokens: A list that holds the sequence.
            start: Where in that list the sequence begins.

        Returns:
            Whether the grammar allows all of it.
        """
        while start + self.num_tokens < len(tokens):
            if not self.take(tokens[start + self.num_tokens]):
                return False
        return not self.error

    def validate(self, tokens: Sequence[int]) -> int:
        """Count how many of several tokens the grammar allows one after the other.

        Args:
            tokens: Candidates, such as draft tokens; nothing is taken.
        """
        if self.error or self.has_ended:
            return 0
        ended = next((i for i, token in enumerate(tokens) if token in self._eos_ids), None)
        count = self._state.validate_tokens(list(tokens[:ended]))
        if ended is None or count < ended:
            return count
        probe = self._state.deep_copy()
        ok = not count or probe.consume_tokens(list(tokens[:count]))
        return count + int(ok and probe.is_accepting())

    def rollback(self, count: int) -> None:
        """Take the last tokens back.

        Args:
            count: How many; at most `num_tokens`.

        Raises:
            ValueError: If fewer have been taken, or the matcher has failed.
        """
        if self.error or not 0 <= count <= self.num_tokens:
            raise ValueError(
                f"cannot take {count} of {self.num_tokens} tokens back {self.error}".rstrip()
            )
        self.num_tokens -= count
        if count and self.has_ended:
            self.has_ended = False
            count -= 1
        if count:
            self._state.rollback(count)

    def copy(self) -> "Matcher":
        """Return an independent matcher at the same place."""
        twin = Matcher(self._state.deep_copy(), self._eos_ids)
        twin.num_tokens, twin.has_ended, twin.error = self.num_tokens, self.has_ended, self.error
        return twin


class MaskWriter:
    """Writes masks of many matchers at once, on as many threads as there are processors."""

    def __init__(self) -> None:
        """Start the threads when the first batch comes."""
        self._executor: llguidance.LLExecutor | None = None

    def write(self, entries: Sequence[tuple[Matcher, int]], masks: np.ndarray) -> None:
        """Write which tokens may come next.

        Args:
            entries: Matchers, each with the row that it gets. One that has ended or failed leaves
                its row as it is; one that fails meanwhile says so in `error`.
            masks: Packed bits, (rows, words) uint32, C order: bit i of word w is token 32 w + i.
        """
        live = [(m, row) for m, row in entries if not (m.error or m.has_ended)]
        bytes_per_row = masks.shape[1] * masks.itemsize
        if len(live) == 1:
            matcher, row = live[0]
            matcher._state.unsafe_compute_mask_ptr(masks[row].ctypes.data, bytes_per_row)  # noqa: SLF001
        elif live:
            if self._executor is None:
                from llguidance import LLExecutor  # noqa: PLC0415  where a grammar is used

                self._executor = LLExecutor()
            states = [(m._state, row) for m, row in live]  # noqa: SLF001
            self._executor.unsafe_compute_mask_ptr(
                states, masks.ctypes.data, bytes_per_row, masks.shape[0]
            )
        for matcher, _ in live:
            if matcher._state.is_error():  # noqa: SLF001
                matcher.error = matcher._state.get_error()  # noqa: SLF001

    def write_drafts(self, matcher: Matcher, drafts: Sequence[int], masks: np.ndarray) -> int:
        """Write the masks in front of, between and behind draft tokens.

        Args:
            matcher: Where the sequence stands; stays there.
            drafts: Tokens to be verified together.
            masks: One row more than there are drafts.

        Returns:
            How many drafts may be verified: the grammar allows them, and what may follow each has
            been written. Rows behind further drafts say nothing, since the grammar forbids these,
            or fails there.
        """
        probe = matcher.copy()
        for row in range(len(drafts) + 1):
            self.write([(probe, row)], masks)
            if probe.error:
                return max(0, row - 1)
            if row == len(drafts):
                return row
            if not probe.validate(drafts[row : row + 1]) or not probe.take(drafts[row]):
                return row
        raise AssertionError("the last row returns")
