"""The sockets into which policies and mechanisms plug."""

from typing import Protocol, runtime_checkable

from jaxserve.core.plan import Rejection, Route, StepPlan
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


@runtime_checkable
class Doorkeeper(Protocol):
    """A scheduler that knows what nobody could promise."""

    def refusal(self, sequence: SequenceView) -> Rejection | None:
        """Tell which objective of a new request not even an idle engine could keep; None if none.

        Args:
            sequence: The request, as it would wait.
        """
        ...


class Router(Protocol):
    """Decides which engine of a fleet a new request goes to; no clock, no device."""

    def place(self, sequence: SequenceView, fleet: FleetView) -> Route:
        """Choose a replica for a request that has just arrived."""
        ...
