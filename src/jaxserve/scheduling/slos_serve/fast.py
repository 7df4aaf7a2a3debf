"""Fast admission: new requests one after the other, each tested by one pass over the deadlines.

Source: SLOs-Serve (arXiv 2504.08784), the heuristic for many new requests.
Differs: the test is the chain of segments of the programme itself, so that whatever is accepted here
    the programme can serve as well; those that ask for the least work are tried first.
"""

from bisect import bisect, insort
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.core.plan import DeclineReason
from jaxserve.scheduling.slos_serve.programme import Item, order
from jaxserve.scheduling.slos_serve.segment import SegmentPlanner


@dataclass(frozen=True, slots=True, kw_only=True)
class FastChoice:
    """What fast admission answers.

    Attributes:
        accepted: Identities of the new requests to promise, in the order in which they were tried.
        declined: Why each of the others is not promised.
        is_feasible: Whether the forced ones alone can be served.
    """

    accepted: tuple[int, ...]
    declined: dict[int, DeclineReason]
    is_feasible: bool


def admit_greedily(
    items: Sequence[Item], planner: SegmentPlanner, *, free_pages: int, horizon_s: float = 1.0
) -> FastChoice:
    """Accept new requests while all deadlines hold.

    Args:
        items: All requests, promised and new.
        planner: Plans the batches between deadlines.
        free_pages: Pages for new requests.
        horizon_s: How long decodes alone must be sustainable.
    """
    chain = sorted((item for item in items if item.is_forced), key=order)
    new = [item for item in items if not item.is_forced]
    if not _serves(chain, planner, horizon_s):
        reason: DeclineReason = "compute"
        return FastChoice(
            accepted=(), declined=dict.fromkeys((i.key for i in new), reason), is_feasible=False
        )
    accepted: list[int] = []
    declined: dict[int, DeclineReason] = {}
    for item in sorted(new, key=lambda i: (i.prefill / max(i.value, 1e-9), i.deadline, i.key)):
        if item.pages > free_pages:
            declined[item.key] = "memory"
            continue
        place = bisect(chain, order(item), key=order)
        if _serves([*chain[:place], item, *chain[place:]], planner, horizon_s):
            insort(chain, item, key=order)
            accepted.append(item.key)
            free_pages -= item.pages
        else:
            declined[item.key] = "compute"
    return FastChoice(accepted=tuple(accepted), declined=declined, is_feasible=True)


def _serves(chain: Sequence[Item], planner: SegmentPlanner, horizon_s: float) -> bool:
    """Tell whether every deadline of a chain, which is in order, can be kept."""
    counts = [0] * len(planner.tiers)
    spare, end = 0, 0.0
    for item in chain:
        if item.deadline > end:
            segment = planner.plan(item.deadline - end, tuple(counts))
            if segment is None:
                return False
            spare += segment.budget
            end += segment.used
        spare -= item.prefill
        counts[item.tier] += 1
        if spare < 0:
            return False
    # Decodes only join along the chain, so that the last set is the hardest to sustain.
    return planner.plan(horizon_s, tuple(counts)) is not None
