"""Runs a policy again on the views of a decision log, and compares what it decides."""

from dataclasses import dataclass, fields
from pathlib import Path

from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.plan import StepPlan
from jaxserve.scheduling.decision_log import Decision, LogReader, Observation
from jaxserve.scheduling.policies import make_policy

MOST_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay found.

    Attributes:
        policy: Name of the policy.
        plans: Views that it answered.
        observations: Steps that were timed between them.
        differences: How many answers were others.
        shown: What differed first, a line each.
    """

    policy: str
    plans: int
    observations: int
    differences: int
    shown: tuple[str, ...]


def replay(path: Path) -> Replay:
    """Run the policy of a log on its views.

    Args:
        path: The log.

    Raises:
        ConfigError: If it cannot be read.
    """
    log = LogReader(path)
    cost = log.head.cost
    learned = LearnedCost(cost) if cost is not None and log.head.learns else None
    policy = make_policy(log.head.policy, learned or cost, log.head.settings)
    plans = observations = differences = 0
    shown: list[str] = []
    for entry in log:
        if isinstance(entry, Observation):
            observations += 1
            if learned is not None:
                learned.observe(entry.load, entry.seconds, entry.now)
            continue
        plans += 1
        plan: StepPlan | None = None
        error: str | None = None
        try:
            plan = policy.plan(entry.view)
        except Exception as raised:  # noqa: BLE001  compared with what was raised then
            error = type(raised).__name__
        if (plan, error) != (entry.plan, entry.error):
            differences += 1
            if len(shown) < MOST_SHOWN:
                shown.append(_difference(entry, plan, error))
    return Replay(
        policy=log.head.policy,
        plans=plans,
        observations=observations,
        differences=differences,
        shown=tuple(shown),
    )


def _difference(entry: Decision, plan: StepPlan | None, error: str | None) -> str:
    where = f"line {entry.line}"
    if plan is None or entry.plan is None:
        return f"{where}: {entry.error or 'a plan'} then, {error or 'a plan'} now"
    parts = [
        f"{spec.name} {getattr(entry.plan, spec.name)!r} then, {getattr(plan, spec.name)!r} now"
        for spec in fields(StepPlan)
        if getattr(entry.plan, spec.name) != getattr(plan, spec.name)
    ]
    return f"{where}: {'; '.join(parts)}"
