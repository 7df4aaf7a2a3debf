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
    links = _follow(start, chain, planner)
    if links is None or planner.plan(horizon_s, _last(links, start)) is None:
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
        # Decodes only join along the chain, so that its last set is the hardest to sustain.
        last = _joined(_last(links, start), item.tier)
        before = links[place - 1] if place else start
        after = None
        if planner.plan(horizon_s, last) is not None:
            # What comes before in the chain is not changed by what comes after.
            after = _follow(before, [item, *chain[place:]], planner)
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


def _last(links: Sequence[_Link], start: _Link) -> tuple[int, ...]:
    """Return who decodes after a whole chain."""
    return links[-1].counts if links else start.counts


def _joined(counts: tuple[int, ...], tier: int) -> tuple[int, ...]:
    """Return the decodes with one more of a tier."""
    return (*counts[:tier], counts[tier] + 1, *counts[tier + 1 :])


def _follow(link: _Link, chain: Sequence[Item], planner: SegmentPlanner) -> list[_Link] | None:
    """Return what is known after each item of a chain; None if a deadline cannot be kept."""
    counts, spare, end = link
    links: list[_Link] = []
    for item in chain:
        deadline = item.deadline
        if deadline > end:
            segment = planner.plan(deadline - end, counts)
            if segment is None:
                return None
            budget, used = segment
            spare += budget
            end += used
        spare -= item.prefill
        if spare < 0:
            return None
        tier = item.tier
        counts = (*counts[:tier], counts[tier] + 1, *counts[tier + 1 :])
        links.append(_Link(counts, spare, end))
    return links
