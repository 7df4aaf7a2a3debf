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
    """One batch, from one deadline to the next.

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
        self._rhythms: dict[tuple[int, ...], _Rhythm] = {}
        self.rooms: dict[tuple[float, int], int] = {}
        """Answers of `room`."""

    def plan(self, seconds: float, counts: tuple[int, ...]) -> Segment | None:
        """Plan one segment.

        Args:
            seconds: Its length.
            counts: Decodes per tier; the first token of each is due one period after the start.

        Returns:
            Its room; None if the decodes alone cannot be served in time.
        """
        pattern = self._patterns.get(counts)
        return (pattern or self._pattern(counts)).segment(seconds)

    def slots(self, seconds: float, counts: tuple[int, ...]) -> list[Slot] | None:
        """Return the batches of a segment one by one; None if it cannot be served."""
        return self._pattern(counts).slots(seconds)

    def _pattern(self, counts: tuple[int, ...]) -> "_Pattern":
        pattern = self._patterns.get(counts)
        if pattern is None:
            occupied = tuple([tier for tier, count in enumerate(counts) if count])
            rhythm = self._rhythms.get(occupied)
            if rhythm is None:
                rhythm = self._rhythms[occupied] = _Rhythm(self, occupied)
            pattern = self._patterns[counts] = _Pattern(self, counts, rhythm)
        return pattern

    def room(self, horizon: float, decodes: int) -> int:
        """Return the prompt tokens of a batch of at most `horizon` seconds; -1 if it is late."""
        key = (horizon, decodes)
        room = self.rooms.get(key)
        if room is None:
            room = self.rooms[key] = self._room(horizon, decodes)
        return room

    def _room(self, horizon: float, decodes: int) -> int:
        if decodes > self._max_tokens:
            return -1
        load = StepLoad(0, 0.0, 0, 0, decodes, round(decodes * self._mean_context))
        room = min(self._cost.prefill_within(horizon, load), self._max_tokens - decodes)
        # Where there is room for a prompt there is for the decodes.
        is_late = not room and decodes and self._cost.step_time(load) > horizon
        return -1 if is_late else room

    @property
    def max_step_s(self) -> float:
        """Longest batch in seconds."""
        return self._max_step_s


class _Place(NamedTuple):
    """Where a time is in a rhythm.

    Attributes:
        turns: Whole periods before it.
        slots: Whole slots after those.
        used: Seconds up to there.
        left: Seconds of the slot that the time cuts short; 0 if it is at a slot's end.
        begun: Tiers with a token in that slot.
        needed: Slots on which all of this depends.
    """

    turns: int
    slots: int
    used: float
    left: float
    begun: tuple[int, ...]
    needed: int


class _Rhythm:
    """When slots end and which tiers decode in them: the same for all counts of the same tiers."""

    def __init__(self, planner: SegmentPlanner, occupied: tuple[int, ...]) -> None:
        self._planner = planner
        self.occupied = occupied
        self.ends: list[float] = [0.0]
        self.begun: list[tuple[int, ...]] = []
        """Tiers with a token in each slot."""
        self.dues: list[tuple[float, ...]] = [planner.tiers]
        """Deadlines before each slot."""
        self.places: dict[float, _Place] = {}
        """What has been asked for."""
        self._period: float | None = None

    def find(self, seconds: float) -> _Place:
        """Return where a time is."""
        turns, rest, ends = 0, seconds, self.ends
        while self._period is None and ends[-1] < seconds:
            if len(self.begun) >= _MOST_SLOTS or not self._extend():
                break
        if self._period is not None and seconds >= self._period:
            turns = math.floor(seconds / self._period + _SAME)
            rest = max(0.0, seconds - turns * self._period)
        slots = bisect_right(ends, rest + _SAME) - 1
        needed = len(self.begun) if turns else slots
        used = turns * ends[-1] + ends[slots]
        left, begun = rest - ends[slots], ()
        if left <= _SAME:
            left = 0.0
        else:
            begun = self.begun_by(slots, ends[slots] + left)
        place = self.places[seconds] = _Place(turns, slots, used, left, begun, needed)
        return place

    def begun_by(self, slot: int, end: float) -> tuple[int, ...]:
        """Return the tiers whose period has begun in a slot that ends at a time."""
        due, tiers, limit = self.dues[slot], self._planner.tiers, end - _SAME
        return tuple([tier for tier in self.occupied if due[tier] - tiers[tier] < limit])

    def _extend(self) -> bool:
        """Add the next slot; tell whether there is one."""
        tiers, due = self._planner.tiers, self.dues[-1]
        end = self.ends[-1] + self._planner.max_step_s
        for tier in self.occupied:
            end = min(end, due[tier])
        if end == math.inf:
            return False
        begun = self.begun_by(len(self.begun), end)
        after = list(due)
        for tier in begun:
            after[tier] += tiers[tier]
        self.begun.append(begun)
        self.ends.append(end)
        self.dues.append(tuple(after))
        if all(-_SAME < after[tier] - tiers[tier] - end < _SAME for tier in self.occupied):
            self._period = end
        return True


class _Pattern:
    """What the slots of a rhythm have room for with one set of decodes, as far as was asked."""

    def __init__(self, planner: SegmentPlanner, counts: tuple[int, ...], rhythm: _Rhythm) -> None:
        self._planner = planner
        self._rhythm = rhythm
        self._counts = counts
        self._total = sum(counts)
        self._num_occupied = len(rhythm.occupied)
        self._rooms: list[int] = []
        self._budgets: list[int] = [0]
        """Prompt tokens before each slot."""
        self._is_infeasible = False

    def segment(self, seconds: float) -> Segment | None:
        # Most of the time that admission takes is spent here; `_reach` covers every case.
        place = self._rhythm.places.get(seconds)
        if place is None or len(self._rooms) < place.needed:
            place = self._reach(seconds)
            if place is None:
                return None
        turns, slots, used, left, begun, needed = place
        budget = self._budgets[slots]
        if turns:
            budget += turns * self._budgets[needed]
        if left:
            is_whole = len(begun) == self._num_occupied
            decodes = self._total if is_whole else self._decodes(begun)
            room = self._planner.rooms.get((left, decodes))
            if room is None:
                room = self._planner.room(left, decodes)
            if room >= 0:
                budget += room
                used += left
        return Segment(budget, used)

    def slots(self, seconds: float) -> list[Slot] | None:
        place = self._reach(seconds)
        if place is None:
            return None
        rhythm = self._rhythm
        found = [
            Slot(rhythm.ends[at + 1] - rhythm.ends[at], self._decodes(rhythm.begun[at]), room)
            for at, room in enumerate(self._rooms[: place.needed])
        ]
        found = [*found * place.turns, *found[: place.slots]]
        if place.left:
            decodes = self._decodes(place.begun)
            room = self._planner.room(place.left, decodes)
            found += [Slot(place.left, decodes, room)] if room >= 0 else []
        return found

    def _reach(self, seconds: float) -> _Place | None:
        """Return where a time is; None if a token before it is late."""
        rhythm = self._rhythm
        place = rhythm.places.get(seconds) or rhythm.find(seconds)
        if len(self._rooms) >= place.needed or self._fill(place.needed):
            return place
        at = len(self._rooms)
        due, start = rhythm.dues[at], rhythm.ends[at]
        if min([due[tier] for tier in rhythm.occupied]) <= seconds + _SAME:
            return None
        return _Place(0, at, start, seconds - start, rhythm.begun_by(at, seconds), at)

    def _fill(self, needed: int) -> bool:
        """Fill as many slots; tell whether the decodes of all of them are in time."""
        rhythm = self._rhythm
        while len(self._rooms) < needed and not self._is_infeasible:
            at = len(self._rooms)
            seconds = rhythm.ends[at + 1] - rhythm.ends[at]
            room = self._planner.room(seconds, self._decodes(rhythm.begun[at]))
            if room < 0:
                self._is_infeasible = True
                break
            self._rooms.append(room)
            self._budgets.append(self._budgets[-1] + room)
        return not self._is_infeasible

    def _decodes(self, begun: tuple[int, ...]) -> int:
        if len(begun) == self._num_occupied:
            return self._total
        return sum([self._counts[tier] for tier in begun])
