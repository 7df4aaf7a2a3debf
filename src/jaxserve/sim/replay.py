"""Runs policies again on the views of a decision log, and compares what they decide."""

from dataclasses import dataclass, fields
from pathlib import Path

from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.plan import RoutePlan, ScalePlan, StepPlan
from jaxserve.core.protocols import QueueingRouter, Scaler
from jaxserve.scheduling.decision_log import Decision, LogReader, Observation
from jaxserve.scheduling.fleet_log import FleetCall, FleetLogReader, is_fleet_log
from jaxserve.scheduling.policies import make_policy
from jaxserve.scheduling.routing import make_router

MOST_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay found.

    Attributes:
        policy: Name of the policy, or of a fleet's router.
        plans: Views that it answered.
        observations: Steps that were timed between them, or what a router was told.
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
        path: The log of an engine or of a fleet.

    Raises:
        ConfigError: If it cannot be read.
    """
    if is_fleet_log(path):
        return _replay_fleet(FleetLogReader(path))
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


def _replay_fleet(log: FleetLogReader) -> Replay:
    router, scaler = make_router(log.head.router, log.head.cost, log.head.settings)
    plans = told = 0
    shown: list[str] = []
    differences = 0
    for call in log:
        if call.call in ("ended", "refused", "drift"):
            told += 1
            _tell(router, scaler, call)
            continue
        plans += 1
        then = call.scale if call.call == "scale" else call.route
        now = _ask(router, scaler, call)
        if now != then:
            differences += 1
            if len(shown) < MOST_SHOWN:
                shown.append(f"line {call.line}: {then!r} then, {now!r} now")
    return Replay(
        policy=log.head.router,
        plans=plans,
        observations=told,
        differences=differences,
        shown=tuple(shown),
    )


def _tell(router: QueueingRouter, scaler: Scaler | None, call: FleetCall) -> None:
    if call.call == "ended" and call.sequence is not None:
        router.observe(call.sequence)
    elif call.call == "drift":
        router.drifted(call.ratio)
    elif call.call == "refused" and scaler is not None:
        scaler.refused(call.tier)


def _ask(
    router: QueueingRouter, scaler: Scaler | None, call: FleetCall
) -> RoutePlan | ScalePlan | None:
    if call.fleet is None:
        return None
    if call.call == "scale":
        return None if scaler is None else scaler.plan(call.fleet)
    if call.call == "home" and call.waits is not None:
        return router.send_home(call.fleet, call.waits)
    return None if call.sequence is None else router.plan(call.sequence, call.fleet)
