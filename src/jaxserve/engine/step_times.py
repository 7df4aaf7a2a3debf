"""How long the engine's steps take: measured, compared with a cost model, and foretold."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from jaxserve.core.cost import StepLoad
from jaxserve.core.cost_drift import ALARM_AFTER_S, LearnedCost
from jaxserve.core.protocols import Clock
from jaxserve.engine.batcher import Item
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.shapes import StepShape

logger = logging.getLogger(__name__)

MOST_IDLE_S = 5.0
"""A step that took so much longer than foretold was held up, and says nothing about steps."""


class StepSink(Protocol):
    """Is told how long each step took."""

    def __call__(self, load: StepLoad, shape: StepShape, seconds: float, now: float) -> None:
        """Take note of one step.

        Args:
            load: What it held.
            shape: What it was padded to.
            seconds: Its time.
            now: Clock time of its end.
        """
        ...


class StepTimes:
    """Times steps from plan to tokens; under overlap, from one step's tokens to the next one's.

    A policy plans the step behind the one on the device, so that its view is as of when that ends.
    With a cost model this is foretold, and the model learns by how much it is wrong.

    Args:
        clock: Where time comes from.
        metrics: Told about the drift.
        cost: Predicts and learns; None measures only.
        sink: Told about every step, such as a decision log.
    """

    def __init__(
        self,
        clock: Clock,
        metrics: EngineMetrics,
        cost: LearnedCost | None = None,
        *,
        observed: Callable[[StepLoad, float, float], None] | None = None,
    ) -> None:
        """Start with nothing on the device."""
        self.sink: StepSink | None = None
        self.cost = cost
        self._clock = clock
        self._metrics = metrics
        self._observed = observed
        self._planned = 0.0
        self._ended = 0.0
        self._end = 0.0
        self._load: StepLoad | None = None
        self._is_alarming = False
        self._compiled = self._compiling = 0
        """Programs compiled when the step before the latest one was planned, and that one."""

    def plan_time(self) -> float:
        """Return the clock time as of which the next step is planned, in seconds.

        It is when the step on the device will have ended, as far as that can be foretold.
        """
        now = self._clock.now()
        self._planned = now
        self._compiled, self._compiling = self._compiling, self._metrics.num_compilations
        return max(now, self._end) if self._load is not None else now

    def launched(self, items: Sequence[Item]) -> StepLoad:
        """Take note of a step that has been launched.

        Args:
            items: Its work, before sequences have been advanced.

        Returns:
            Its counts, for `committed`.
        """
        load = load_of(items)
        if self.cost is not None:
            self._end = max(self._planned, self._end) + self.cost.step_time(load)
            self._load = load
        return load

    def committed(self, load: StepLoad, shape: StepShape, planned: float) -> None:
        """Take note that the tokens of a step are there.

        Args:
            load: What `launched` returned.
            shape: What the step was padded to.
            planned: Clock time at which it was planned.
        """
        now = self._clock.now()
        begin = max(planned, self._ended)
        seconds, self._ended = now - begin, now
        if self._load is load:
            self._load, self._end = None, now
        elif self._load is not None and self.cost is not None:
            self._end = now + self.cost.step_time(self._load)
        if self.sink is not None:
            self.sink(load, shape, seconds, now)
        self._learn(load, seconds, now)

    @property
    def planned(self) -> float:
        """Clock time at which the latest step was planned."""
        return self._planned

    def forget(self) -> None:
        """Take note that whatever was on the device is lost."""
        self._load = None

    def _learn(self, load: StepLoad, seconds: float, now: float) -> None:
        cost = self.cost
        if self._metrics.num_compilations != self._compiled:
            return  # it waited for the compiler, not for the device
        if cost is None or not 0 < seconds < MOST_IDLE_S + 10 * cost.step_time(load):
            return
        cost.observe(load, seconds, now)
        if self._observed is not None:
            self._observed(load, seconds, now)
        alarm = cost.is_alarming
        self._metrics.drifted(cost.ratio, is_alarming=alarm)
        if alarm and not self._is_alarming:
            logger.warning(
                "steps have taken %.2f times as long as the cost model says for %g s; promises may "
                "be broken. Measure again with `jaxserve profile`.",
                cost.ratio,
                ALARM_AFTER_S,
            )
        self._is_alarming = alarm


def load_of(items: Sequence[Item]) -> StepLoad:
    """Count what a step holds, as cost models count.

    Args:
        items: Its work, before sequences have been advanced.
    """
    prefill = prefills = past = decodes = context = drafts = draft_steps = 0
    pairs = 0.0
    for item in items:
        count, start = item.num_tokens, item.start
        if item.prefill_start >= 0:
            prefill += count
            pairs += count * start + count * count / 2
            prefills += 1
            past += start
            continue
        decodes += 1
        context += start + count
        if item.drafts:
            drafts += len(item.drafts)
            draft_steps = max(draft_steps, len(item.drafts))
    return StepLoad(prefill, pairs, prefills, past, decodes, context, drafts, draft_steps)
