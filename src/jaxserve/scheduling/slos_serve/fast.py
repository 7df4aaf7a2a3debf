"""Fast admission: new requests one after the other, each tested by one pass over the deadlines.

Source: SLOs-Serve (arXiv 2504.08784), the heuristic for many new requests.
Differs: the test is the chain of segments of the programme itself, so that whatever is accepted
    here the programme can serve as well; those that ask for the least work are tried first.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    start = _Link((0,) * len(planner.tiers), 0, 0.0)
    links = _follow(start, chain, planner, horizon_s)
    if links is None:
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
        if any(link.spare < item.prefill for link in links[place:]):
            declined[item.key] = "compute"  # who joins only takes room from those behind
            continue
        before = links[place - 1] if place else start
        # What comes before in the chain is not changed by what comes after.
        after = _follow(before, [item, *chain[place:]], planner, horizon_s)
        if after is None:
            declined[item.key] = "compute"
            continue
        links[place:] = after
        chain.insert(place, item)
        accepted.append(item.key)
        free_pages -= item.pages
    return FastChoice(accepted=tuple(accepted), declined=declined, is_feasible=True)


class _Link(NamedTuple):
    """What is known after a part of a chain.

    Attributes:
        counts: Decodes per tier.
        spare: Prompt tokens that are left over.
        end: Seconds planned.
    """

    counts: tuple[int, ...]
    spare: int
    end: float


def _follow(
    link: _Link, chain: Sequence[Item], planner: SegmentPlanner, horizon_s: float
) -> list[_Link] | None:
    """Return what is known after each item of a chain; None if a deadline cannot be kept."""
    counts, spare, end = link
    links: list[_Link] = []
    for item in chain:
        if item.deadline > end:
            segment = planner.plan(item.deadline - end, counts)
            if segment is None:
                return None
            spare += segment.budget
            end += segment.used
        spare -= item.prefill
        if spare < 0:
            return None
        counts = (*counts[: item.tier], counts[item.tier] + 1, *counts[item.tier + 1 :])
        links.append(_Link(counts, spare, end))
    # Decodes only join along the chain, so that the last set is the hardest to sustain.
    return None if planner.plan(horizon_s, counts) is None else links
