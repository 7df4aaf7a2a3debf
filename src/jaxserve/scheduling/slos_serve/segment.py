"""The batches between two prefill deadlines, when only the number of decodes per tier counts.

Sizes of batches are free: each is as large as the next token deadline allows. A loose tier is left
out of batches in which its current period has not begun, so that tight and loose requests share a
server without all of them running at the tightest pace.

Source: SLOs-Serve (arXiv 2504.08784), batch formation without speculation.
Differs: the requests of a tier share one phase, and each attends to the mean context. So a segment
    depends on counts only, and the programme may forget everything else about what it accepted. A
    batch takes all of the time until the next deadline, so that batches repeat.
"""

import math
from bisect import bisect_right
from typing import NamedTuple

from jaxserve.core.cost import CostModel, StepLoad

_MOST_SLOTS = 4096
_SAME = 1e-9
"""Seconds within which two phases are the same."""


class Segment(NamedTuple):
    """What a stretch of time has room for. A tuple, because many are made.

    Attributes:
        budget: Prompt tokens.
        used: Seconds of the stretch that batches fill.
    """

    budget: int
    used: float


class Slot(NamedTuple):
    """One batch, from one deadline to the next. A tuple, because many are made.

    Attributes:
        seconds: Its time.
        decodes: Tokens of decodes in it.
        room: Prompt tokens that fit in besides.
    """

    seconds: float
    decodes: int
    room: int


class SegmentPlanner:
    """Plans segments for one set of tiers, and remembers them.

    Args:
        cost: Times of steps.
        tiers: Seconds per token of each tier, tightest first.
        mean_context: Tokens that a decode attends to.
        max_step_s: Longest batch in seconds.
        max_tokens: Most tokens in a batch.
    """

    def __init__(
        self,
        cost: CostModel,
        tiers: tuple[float, ...],
        *,
        mean_context: float,
        max_step_s: float = math.inf,
        max_tokens: int = 1 << 20,
    ) -> None:
        """Start with nothing planned."""
        self.tiers = tiers
        self._cost = cost
        self._mean_context = mean_context
        self._max_step_s = max_step_s
        self._max_tokens = max_tokens
        self._patterns: dict[tuple[int, ...], _Pattern] = {}
        self._slots: dict[tuple[float, int], Slot | None] = {}

    def plan(self, seconds: float, counts: tuple[int, ...]) -> Segment | None:
        """Plan one segment.

        Args:
            seconds: Its length.
            counts: Decodes per tier; the first token of each is due one period after the start.

        Returns:
            Its room; None if the decodes alone cannot be served in time.
        """
        return self._pattern(counts).segment(seconds)

    def slots(self, seconds: float, counts: tuple[int, ...]) -> list[Slot] | None:
        """Return the batches of a segment one by one; None if it cannot be served."""
        return self._pattern(counts).slots(seconds)

    def _pattern(self, counts: tuple[int, ...]) -> "_Pattern":
        pattern = self._patterns.get(counts)
        if pattern is None:
            pattern = self._patterns[counts] = _Pattern(self, counts)
        return pattern

    def slot(self, horizon: float, decodes: int) -> Slot | None:
        """Fill a batch of at most `horizon` seconds; None if its decodes do not fit in."""
        if decodes > self._max_tokens:
            return None
        key = (horizon, decodes)
        if key in self._slots:
            return self._slots[key]
        load = StepLoad(0, 0.0, 0, 0, decodes, round(decodes * self._mean_context))
        room = min(self._cost.prefill_within(horizon, load), self._max_tokens - decodes)
        # Where there is room for a prompt there is for the decodes.
        is_late = not room and decodes and self._cost.step_time(load) > horizon
        slot = self._slots[key] = None if is_late else Slot(horizon, decodes, room)
        return slot

    @property
    def max_step_s(self) -> float:
        """Longest batch in seconds."""
        return self._max_step_s


class _Pattern:
    """The batches of one set of decodes from a common start, as far as anybody has asked."""

    def __init__(self, planner: SegmentPlanner, counts: tuple[int, ...]) -> None:
        self._planner = planner
        self._counts = counts
        self._occupied = [tier for tier, count in enumerate(counts) if count]
        self._due = list(planner.tiers)
        self._ends: list[float] = [0.0]
        self._budgets: list[int] = [0]
        self._slots: list[Slot] = []
        self._before: list[tuple[float, ...]] = [tuple(self._due)]
        """Deadlines before each slot."""
        self._is_infeasible = False
        self._period: float | None = None
        self._last: dict[tuple[int, float], Slot | None] = {}

    def segment(self, seconds: float) -> Segment | None:
        found = self._reach(seconds)
        if found is None:
            return None
        turns, place, last = found
        budget = turns * self._budgets[-1] + self._budgets[place]
        used = turns * self._ends[-1] + self._ends[place]
        if last is None:
            return Segment(budget, used)
        return Segment(budget + last.room, used + last.seconds)

    def slots(self, seconds: float) -> list[Slot] | None:
        found = self._reach(seconds)
        if found is None:
            return None
        turns, place, last = found
        return [*self._slots * turns, *self._slots[:place], *([last] if last else [])]

    def _reach(self, seconds: float) -> tuple[int, int, Slot | None] | None:
        """Return whole turns, whole slots after them, and the slot that the end cuts short."""
        turns, rest = 0, seconds
        while self._period is None and self._ends[-1] < seconds and not self._is_infeasible:
            if len(self._slots) >= _MOST_SLOTS or not self._extend():
                break
        if self._period is not None and seconds >= self._period:
            turns = math.floor(seconds / self._period + _SAME)
            rest = max(0.0, seconds - turns * self._period)
        place = bisect_right(self._ends, rest + _SAME) - 1
        left = rest - self._ends[place]
        if left <= _SAME:
            return turns, place, None
        if place == len(self._slots) and self._is_infeasible:
            due = min(self._due[tier] for tier in self._occupied)
            if due <= rest + _SAME:
                return None
        key = (place, left)
        if key not in self._last:
            self._last[key] = self._cut(place, left)
        return turns, place, self._last[key]

    def _cut(self, place: int, left: float) -> Slot | None:
        """Fill the last slot, which is shorter; None if it has to stay empty."""
        due = self._before[place] if place < len(self._before) else tuple(self._due)
        limit, decodes = self._ends[place] + left - _SAME, 0
        for tier in self._occupied:
            if due[tier] - self._planner.tiers[tier] < limit:
                decodes += self._counts[tier]
        return self._planner.slot(left, decodes)

    def _extend(self) -> bool:
        """Add the next slot; tell whether there is one."""
        # Loops instead of expressions: this is where planning takes its time.
        now, tiers, due = self._ends[-1], self._planner.tiers, self._due
        end = now + self._planner.max_step_s
        for tier in self._occupied:
            if due[tier] < end:
                end = due[tier]
        if end == math.inf:
            return False
        begun: list[int] = []
        decodes, limit = 0, end - _SAME
        for tier in self._occupied:
            if due[tier] - tiers[tier] < limit:
                begun.append(tier)
                decodes += self._counts[tier]
        slot = self._planner.slot(end - now, decodes)
        if slot is None:
            self._is_infeasible = True
            return False
        for tier in begun:
            due[tier] += tiers[tier]
        self._slots.append(slot)
        self._ends.append(end)
        self._budgets.append(self._budgets[-1] + slot.room)
        self._before.append(tuple(due))
        for tier in self._occupied:
            if not -_SAME < due[tier] - tiers[tier] - end < _SAME:
                break
        else:
            self._period = end
        return True
