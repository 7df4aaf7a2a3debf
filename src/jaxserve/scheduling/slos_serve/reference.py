"""The slow, obvious version of the programme: every subset of the new requests is tried."""

from collections.abc import Sequence
from itertools import combinations

from jaxserve.scheduling.slos_serve.programme import Choice, Item, order
from jaxserve.scheduling.slos_serve.segment import SegmentPlanner


def serve_chain(
    items: Sequence[Item], planner: SegmentPlanner, *, free_pages: int, horizon_s: float = 1.0
) -> int | None:
    """Serve all items in the order of their deadlines.

    Returns:
        Prompt tokens to spare at the end; None if a deadline is missed or pages are short.
    """
    if sum(item.pages for item in items if not item.is_forced) > free_pages:
        return None
    counts = [0] * len(planner.tiers)
    spare, end = 0, 0.0
    for item in sorted(items, key=order):
        if item.deadline > end:
            segment = planner.plan(item.deadline - end, tuple(counts))
            if segment is None:
                return None
            spare += segment.budget
            end += segment.used
        spare -= item.prefill
        counts[item.tier] += 1
        if spare < 0 or planner.plan(horizon_s, tuple(counts)) is None:
            return None
    return spare


def choose_exhaustively(
    items: Sequence[Item], planner: SegmentPlanner, *, free_pages: int, horizon_s: float = 1.0
) -> Choice | None:
    """Answer as `programme.choose` does by trying every subset; exponential in new requests."""
    forced = [item for item in items if item.is_forced]
    new = sorted((item for item in items if not item.is_forced), key=order)
    best: Choice | None = None
    for count in range(len(new) + 1):
        for subset in combinations(new, count):
            spare = serve_chain(
                [*forced, *subset], planner, free_pages=free_pages, horizon_s=horizon_s
            )
            if spare is None:
                continue
            found = Choice(
                accepted=tuple(item.key for item in subset),
                value=float(sum(item.value for item in subset)),
                pages=sum(item.pages for item in subset),
                spare=spare,
            )
            if best is None or _rank(found) > _rank(best):
                best = found
    return best


def _rank(choice: Choice) -> tuple[float, int, int]:
    return (choice.value, -choice.pages, choice.spare)
