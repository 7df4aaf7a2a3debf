"""The batches between two prefill deadlines, when only the number of decodes per tier counts.

Sizes of batches are free: each is as large as the next token deadline allows. A loose tier is left
out of batches in which its current period has not begun, so that tight and loose requests share a
server without all of them running at the tightest pace.

Source: SLOs-Serve (arXiv 2504.08784), batch formation without speculation.
Differs: the requests of a tier share one phase, and each attends to the mean context. So a segment
    depends on counts only, and the programme may forget everything else about what it accepted.
"""

import math
from dataclasses import dataclass

from jaxserve.core.cost import CostModel, StepLoad

_TICKS_PER_SECOND = 10_000
"""Lengths of segments are rounded down to this fraction of a second, so that they repeat."""
_MOST_BATCHES = 10_000


@dataclass(frozen=True, slots=True)
class Segment:
    """Batches of a stretch of time.

    Attributes:
        budget: Prompt tokens that they have room for.
        used: Seconds that they take.
        batches: For each its seconds, its decodes and its room for prompt tokens.
    """

    budget: int
    used: float
    batches: tuple[tuple[float, int, int], ...]


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
        self._known: dict[tuple[int, tuple[int, ...]], Segment | None] = {}

    def plan(self, seconds: float, counts: tuple[int, ...]) -> Segment | None:
        """Plan one segment.

        Args:
            seconds: Its length.
            counts: Decodes per tier; the first token of each is due one period after the start.

        Returns:
            The batches; None if the decodes alone cannot be served in time.
        """
        ticks = math.floor(seconds * _TICKS_PER_SECOND)
        key = (ticks, counts)
        if key not in self._known:
            self._known[key] = self._plan(ticks / _TICKS_PER_SECOND, counts)
        return self._known[key]

    def _plan(self, seconds: float, counts: tuple[int, ...]) -> Segment | None:
        due = list(self.tiers)
        occupied = [tier for tier, count in enumerate(counts) if count]
        now, budget = 0.0, 0
        batches: list[tuple[float, int, int]] = []
        while now < seconds and len(batches) < _MOST_BATCHES:
            nearest = min((due[tier] for tier in occupied), default=math.inf)
            horizon = min(seconds, nearest, now + self._max_step_s) - now
            begun = [tier for tier in occupied if due[tier] - self.tiers[tier] < now + horizon]
            taken = sum(counts[tier] for tier in begun)
            load = StepLoad(decodes=taken, context=round(taken * self._mean_context))
            least = self._cost.step_time(load)
            if taken > self._max_tokens:
                return None
            if least > horizon:
                if nearest > seconds:
                    break  # the last batch would not end in time, but nothing is due in it
                return None
            room = self._cost.prefill_within(horizon, load)
            room = min(room, self._max_tokens - taken)
            if not room and not taken:
                break
            time = self._cost.step_time(load.with_chunk(room)) if room else least
            if now + time <= now:
                break
            now += time
            for tier in begun:
                due[tier] += self.tiers[tier]
            budget += room
            batches.append((time, taken, room))
        return Segment(budget, now, tuple(batches))
