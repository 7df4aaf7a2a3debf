"""What policies answer."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxserve.core.view import ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tokens that one sequence gets in a step.

    Attributes:
        seq_id: The sequence.
        num_tokens: Tokens to compute: 1 for a decode, more for a chunk of a prefill.
        num_draft: Draft tokens to verify besides, at most as many as the view offers. Only decodes
            have drafts, and only steps without prefill.
    """

    seq_id: int
    num_tokens: int
    num_draft: int = 0


DeclineReason = Literal["compute", "memory", "idle_server", "expired"]
"""Why objectives cannot be promised: others need the time, or the pages; not even an idle server
could keep them; or they have been missed already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A waiting sequence whose objectives cannot be promised.

    Attributes:
        seq_id: The sequence.
        reason: What stands against it.
        objective: The objective that would be missed, such as "ttft_ms".
        detail: One sentence with figures.
    """

    seq_id: int
    reason: DeclineReason
    objective: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One turn of the engine.

    Attributes:
        work: What runs, running sequences and newly admitted ones alike.
        admit: Waiting sequences that get a row, in this order; each also appears in `work`.
        preempt: Running sequences that lose row and pages and wait to be recomputed.
        reject: Waiting sequences that are refused, as they asked to be.
        unpromised: Sequences that from now on are served without a promise; for the record.
        holds_until: Clock time in seconds up to which every step that begins would get the same
            plan, unless somebody arrives, leaves or ends, or pages run out. The default is never.
    """

    work: tuple[Work, ...] = ()
    admit: tuple[int, ...] = ()
    preempt: tuple[int, ...] = ()
    reject: tuple[Rejection, ...] = ()
    holds_until: float = -math.inf
    unpromised: tuple[Rejection, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, drafts included."""
        return sum(item.num_tokens + item.num_draft for item in self.work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes.

    Attributes:
        replica: Position in the fleet's view.
        is_promised: Whether that replica can keep its objectives, as far as the router knows.
        reason: Why no replica can, if none can.
    """

    replica: int
    is_promised: bool = True
    reason: DeclineReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleAction:
    """A replica that gets another role.

    Attributes:
        replica: Position in the fleet's view.
        state: What it becomes: `serving` takes it out of the pool, `draining` lets it finish,
            `pooled` gives it back, `starting` brings one up, and `off` turns it off.
        tier: Seconds per token of the tier that it serves from now on; None for none.
        reason: Why, in a few words.
    """

    replica: int
    state: ReplicaState
    tier: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    """What a scaler answers: the roles that change, in this order."""

    actions: tuple[ScaleAction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """What a router with a queue of its own answers about one request.

    Attributes:
        route: Where it goes; None lets it wait at the router, to be asked about again after the
            next event of a replica.
        actions: Roles that change before it goes there.
        reason: Why it waits, if it does; `idle_server` means that waiting will not help.
    """

    route: Route | None
    actions: tuple[ScaleAction, ...] = ()
    reason: DeclineReason | None = None
