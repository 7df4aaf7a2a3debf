"""Which new requests to promise: a dynamic programme over prefill deadlines.

The accepted requests form a chain in the order of their deadlines. On one machine whose token
rate between two deadlines depends only on who decodes, a set of prefills is feasible if and only if
it is in that order, and who decodes changes only at the links of the chain.

Source: SLOs-Serve (arXiv 2504.08784), the admission programme.
Differs: a larger spare budget dominates a smaller one, other things being equal; lists of states
    are bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.scheduling.slos_serve.segment import Segment, SegmentPlanner

MAX_STATES = 16
"""Most states kept per cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A request as the programme sees it.

    Attributes:
        key: Its identity.
        deadline: Seconds from now to when its prefill must be done; 0 for one that decodes.
        prefill: Prompt tokens that are left.
        pages: Pages that it takes if it is accepted; 0 for one that has them.
        tier: Its tier by position.
        value: What accepting it is worth.
        is_forced: Whether it must be kept, because it was promised.
    """

    key: int
    deadline: float
    prefill: int
    pages: int
    tier: int
    value: float = 1.0
    is_forced: bool = False


class _State(NamedTuple):
    """A chain of accepted requests. A tuple, because many are made."""

    value: float
    pages: int
    spare: int
    end: float
    parent: "_State | None"
    item: Item | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the programme answers.

    Attributes:
        accepted: Identities of the new requests to promise, by deadline.
        value: Their value.
        pages: Pages that they take.
        spare: Prompt tokens that remain unused.
    """

    accepted: tuple[int, ...]
    value: float
    pages: int
    spare: int


def choose(
    items: Sequence[Item], planner: SegmentPlanner, *, free_pages: int, horizon_s: float = 1.0
) -> Choice | None:
    """Find the set of new requests of the greatest value that can be served with the forced ones.

    Args:
        items: All requests, promised and new.
        planner: Plans the batches between deadlines.
        free_pages: Pages for new requests.
        horizon_s: How long decodes alone must be sustainable after each acceptance.

    Returns:
        The set; None if not even the forced ones can be served.
    """
    ordered = sorted((item for item in items if not _decodes(item)), key=order)
    first = count_tiers([item for item in items if _decodes(item)], planner)
    if planner.plan(horizon_s, first) is None:
        return None
    # cells[counts] holds the states whose last link is the item before; forced items end others.
    cells: dict[tuple[int, ...], list[_State]] = {first: [_State(0.0, 0, 0, 0.0, None, None)]}
    for item in ordered:
        grown: dict[tuple[int, ...], list[_State]] = {}
        for counts, states in cells.items():
            after = (*counts[: item.tier], counts[item.tier] + 1, *counts[item.tier + 1 :])
            if planner.plan(horizon_s, after) is None:
                continue
            links = _links(states, item, counts, planner, free_pages)
            if links:
                grown.setdefault(after, []).extend(links)
        if item.is_forced:
            cells = {counts: _best(states) for counts, states in grown.items()}
            continue
        for counts, states in grown.items():
            cells[counts] = _best([*cells.get(counts, ()), *states])
    final = [state for states in cells.values() for state in states]
    if not final:
        return None
    best = max(final, key=lambda s: (s.value, -s.pages, s.spare))
    accepted: list[int] = []
    state: _State | None = best
    while state is not None:
        if state.item is not None and not state.item.is_forced:
            accepted.append(state.item.key)
        state = state.parent
    return Choice(
        accepted=tuple(reversed(accepted)), value=best.value, pages=best.pages, spare=best.spare
    )


def count_tiers(items: Sequence[Item], planner: SegmentPlanner) -> tuple[int, ...]:
    """Count items by tier."""
    counts = [0] * len(planner.tiers)
    for item in items:
        counts[item.tier] += 1
    return tuple(counts)


def _decodes(item: Item) -> bool:
    """Tell whether an item is a promised request past its prefill, which begins every chain."""
    return item.is_forced and item.deadline <= 0 and not item.prefill


def order(item: Item) -> tuple[float, bool, int]:
    """Return the place of an item in the chain: by deadline, forced ones first."""
    return (item.deadline, not item.is_forced, item.key)


def _links(
    states: list[_State],
    item: Item,
    counts: tuple[int, ...],
    planner: SegmentPlanner,
    free_pages: int,
) -> list[_State]:
    """Append an item to chains, where its deadline and the pages allow it."""
    links: list[_State] = []
    segments: dict[float, Segment | None] = {}  # many chains have been planned up to one time
    more, value = (0, 0.0) if item.is_forced else (item.pages, item.value)
    for state in states:
        pages, spare, end = state.pages + more, state.spare, state.end
        if pages > free_pages:
            continue
        if item.deadline > end:
            if end not in segments:
                segments[end] = planner.plan(item.deadline - end, counts)
            segment = segments[end]
            if segment is None:
                continue
            spare += segment.budget
            end += segment.used
        spare -= item.prefill
        if spare >= 0:
            links.append(_State(state.value + value, pages, spare, end, state, item))
    return links


def _best(states: list[_State]) -> list[_State]:
    """Keep what no other state dominates, at most `MAX_STATES`."""
    states = sorted(states, key=lambda s: (-s.value, s.pages, -s.spare, s.end))
    kept: list[_State] = []
    for state in states:
        if not any(
            k.value >= state.value
            and k.pages <= state.pages
            and k.spare >= state.spare
            and k.end <= state.end
            for k in kept
        ):
            kept.append(state)
    return kept[:MAX_STATES]
