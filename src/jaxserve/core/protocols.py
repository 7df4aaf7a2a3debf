"""The sockets into which policies and mechanisms plug."""

from typing import Protocol

from jaxserve.core.plan import Route, StepPlan
from jaxserve.core.view import FleetView, ReplicaView, SequenceView


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


class Router(Protocol):
    """Decides which engine of a fleet a new request goes to; no clock, no device."""

    def place(self, sequence: SequenceView, fleet: FleetView) -> Route:
        """Choose a replica for a request that has just arrived."""
        ...
