"""The sockets into which policies and mechanisms plug."""

from typing import Protocol

from jaxserve.core.plan import StepPlan
from jaxserve.core.view import ReplicaView


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Return seconds since an arbitrary fixed instant."""
        ...

    def unix(self) -> float:
        """Return seconds since 1970."""
        ...


class Scheduler(Protocol):
    """Decides which tokens one engine computes next; pure, no clock, no device."""

    def plan(self, view: ReplicaView) -> StepPlan:
        """Answer one snapshot with one plan.

        The plan must fit: at most `max_num_batched_tokens` tokens, at most `max_num_seqs` running
        sequences, and pages for every token once the preempted sequences have given up theirs.
        Running sequences use at most `max_loras` different adapters; whoever is admitted beyond
        that goes on waiting.
        """
        ...
