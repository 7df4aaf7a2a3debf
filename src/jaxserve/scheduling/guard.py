"""Keeps an engine going when its policy fails: that step is planned by another one."""

import logging
from collections.abc import Callable
from typing import Literal

from jaxserve.core.plan import Rejection, StepPlan
from jaxserve.core.protocols import Doorkeeper, Scheduler
from jaxserve.core.view import ReplicaView, SequenceView

logger = logging.getLogger(__name__)

Failure = Literal["error", "late", "invalid"]
"""What a policy did: raised, took too long, or answered with a plan that cannot be carried out."""
FAILURES: tuple[Failure, ...] = ("error", "late", "invalid")


class GuardedScheduler:
    """A policy, and a simple one that takes its place for a step in which it fails.

    Args:
        policy: Is asked first.
        fallback: Is asked where that fails; keeps no state of its own.
        budget_s: Seconds that the policy may take for one step. What comes later is thrown away.
        timer: Returns the seconds that the calling thread has worked.
        on_failure: Told how the policy failed, each time that it does.
    """

    def __init__(
        self,
        policy: Scheduler,
        fallback: Scheduler,
        *,
        budget_s: float,
        timer: Callable[[], float],
        on_failure: Callable[[Failure], None] = lambda _: None,
    ) -> None:
        """Keep both."""
        self.policy = policy
        self._fallback = fallback
        self._budget_s = budget_s
        self._timer = timer
        self._on_failure = on_failure
        self._told: set[str] = set()

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan."""
        began = self._timer()
        failure: Failure | None = None
        plan = StepPlan()
        try:
            plan = self.policy.plan(view)
        except Exception as error:  # noqa: BLE001  whatever a policy does, the engine goes on
            failure = "error"
            self._tell(f"{type(error).__name__}: {error}", error)
        seconds = self._timer() - began
        if failure is None and (problem := find_fault(plan, view)) is not None:
            failure = "invalid"
            self._tell(problem, None)
        if failure is None and seconds > self._budget_s:
            failure = "late"
        if failure is None:
            return plan
        self._on_failure(failure)
        return self._fallback.plan(view)

    def refusal(self, sequence: SequenceView) -> Rejection | None:
        """Tell which objective of a new request not even an idle engine could keep."""
        if not isinstance(self.policy, Doorkeeper):
            return None
        try:
            return self.policy.refusal(sequence)
        except Exception as error:  # noqa: BLE001  a request is not to blame for a policy
            self._tell(f"{type(error).__name__}: {error}", error)
            return None

    def _tell(self, problem: str, error: Exception | None) -> None:
        """Write about each problem once; counters tell how often it came."""
        kind = type(error).__name__ if error is not None else problem.partition(":")[0]
        if kind not in self._told:
            self._told.add(kind)
            logger.error("the policy failed, fcfs plans this step: %s", problem, exc_info=error)


def find_fault(plan: StepPlan, view: ReplicaView) -> str | None:
    """Say what an engine could not carry out in a plan; None if there is nothing.

    Args:
        plan: The plan.
        view: What it answers.
    """
    running = {sequence.seq_id for sequence in view.running}
    waiting = {sequence.seq_id for sequence in view.waiting}
    admitted, rejected = set(plan.admit), {one.seq_id for one in plan.reject}
    preempted = set(plan.preempt)
    for what, named, known in (
        ("admits", admitted, waiting),
        ("refuses", rejected, waiting),
        ("preempts", preempted, running),
    ):
        if not named <= known:
            return f"unknown sequence: the plan {what} {min(named - known)}, which is not there"
    if admitted & rejected:
        return f"contradiction: the plan admits and refuses {min(admitted & rejected)}"
    working = {item.seq_id for item in plan.work}
    able = (running - preempted) | admitted
    if not working <= able:
        return f"unknown sequence: the plan gives work to {min(working - able)}, which does not run"
    if len(working) != len(plan.work):
        return "repetition: the plan gives work to one sequence twice"
    if plan.num_tokens > view.max_num_batched_tokens:
        return (
            f"too many tokens: the plan has {plan.num_tokens}, and a step holds at most "
            f"{view.max_num_batched_tokens}"
        )
    return None
