"""The configured policy of an engine: made by name, guarded, timed and written down."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.core.config import SchedulerOptions
from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.cost_file import CostFile, read_cost
from jaxserve.core.protocols import Clock, Scheduler
from jaxserve.engine.measure import describe
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.step_times import StepTimes
from jaxserve.scheduling.decision_log import LoggedScheduler, LogHead, LogWriter
from jaxserve.scheduling.guard import GuardedScheduler
from jaxserve.scheduling.policies import NEED_COST, PLAIN, PolicySettings, make_policy

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

logger = logging.getLogger(__name__)


class EnginePolicy:
    """Makes the scheduler that an engine's settings name.

    Args:
        options: Name the policy, its cost model, budget and log.
        settings: What policies may want to know.
        clock: Where time comes from.
        metrics: Told about plans, failures and drift.

    Raises:
        ConfigError: If the file of the cost model cannot be read or holds bad values.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        settings: PolicySettings,
        *,
        clock: Clock,
        metrics: EngineMetrics,
    ) -> None:
        """Read the cost model, if there is a file of one."""
        self._options = options
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._log: LogWriter | None = None
        self._made: CostFile | None = None
        if options.cost_model is not None:
            self._made = read_cost(Path(options.cost_model))

    @property
    def needs_times(self) -> bool:
        """Whether steps must be measured before the policy can be installed."""
        return self._made is None and self._options.scheduling_policy in NEED_COST

    def stand_in(self) -> Scheduler:
        """Return what plans steps until the policy is installed, and where it fails."""
        name = self._options.scheduling_policy
        return make_policy(name if name in PLAIN else "fcfs", None, self._settings)

    def install(self, engine: "Engine", measured: CostFile | None = None) -> None:
        """Let an engine be planned by the policy from its next step on.

        Args:
            engine: The engine; nothing is on its device.
            measured: Times of its steps, where there is no file of them.

        Raises:
            ConfigError: If times are needed and there are none, or the log cannot be written.
        """
        made = self._made or measured
        name = self._options.scheduling_policy
        settings = self._settings if made is None else replace(self._settings, margin=made.margin)
        learned = None if made is None else LearnedCost(made.cost)
        if made is not None:
            _check_measured_here(made, engine)
        policy = make_policy(name, learned, settings)
        if self._options.decision_log is not None:
            head = LogHead(
                policy=name,
                settings=settings,
                cost=None if made is None else made.cost,
                learns=learned is not None,
            )
            self.close()
            self._log = LogWriter(Path(self._options.decision_log), head)
            policy = LoggedScheduler(policy, self._log)
        if name not in PLAIN:
            policy = GuardedScheduler(
                policy,
                self.stand_in(),
                budget_s=self._options.policy_budget_ms / 1000,
                timer=time.thread_time,
                on_failure=self._metrics.policy_failed,
            )
        engine.scheduler = policy
        engine.times = StepTimes(
            self._clock,
            self._metrics,
            learned,
            observed=None if self._log is None else self._log.observed,
        )

    def flush(self) -> None:
        """Write out what the decision log buffers."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Close the decision log."""
        if self._log is not None:
            self._log.close()
            self._log = None


def _check_measured_here(made: CostFile, engine: "Engine") -> None:
    """Warn if a cost model was measured on an engine of other sizes."""
    known = made.facts.get("engine")
    if not isinstance(known, dict):
        return
    sizes = describe(engine)
    other = {key: (known.get(key), now) for key, now in sizes.items() if known.get(key) != now}
    if other:
        told = ", ".join(f"{key} {was!r} instead of {now!r}" for key, (was, now) in other.items())
        logger.warning(
            "the cost model was measured on another engine (%s); promises may be broken until the "
            "times have been learned. Measure again with `jaxserve profile`.", told,
        )  # fmt: skip
