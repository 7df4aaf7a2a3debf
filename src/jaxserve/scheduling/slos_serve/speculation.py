"""How many draft tokens each tier gets per step.

Source: SLOs-Serve (arXiv 2504.08784), speculation lengths per tier: with the chance `alpha` that
    a draft token is right, a round that verifies s tokens in all yields
    `(1 - alpha**s) / (1 - alpha)` on average.
Differs: a round may last as long as its mean yield allows, not only as whole tokens do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.core.cost import CostModel, StepLoad

LOWEST, HIGHEST = 0.05, 0.95
"""Bounds of the chance that a draft token is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Rounds of speculation.

    Attributes:
        lengths: Tokens that each tier verifies per round; 1 is plain decoding, 0 an empty tier.
        unit: Seconds of a round that keep every tier on time.
        room: Prompt tokens per round.
        budget: Prompt tokens in the whole stretch of time.
    """

    lengths: tuple[int, ...]
    unit: float
    room: int
    budget: int


def expected_tokens(alpha: float, length: int) -> float:
    """Return how many tokens a round yields on average that verifies `length` in all.

    >>> expected_tokens(0.5, 1), expected_tokens(0.5, 2)
    (1.0, 1.5)
    """
    if alpha >= 1:
        return float(length)
    return (1 - alpha**length) / (1 - alpha)


def clamp(alpha: float) -> float:
    """Return a chance within the bounds of what can be reckoned with."""
    return min(max(alpha, LOWEST), HIGHEST)


def level_length(alpha: float, tau: float, pacing_tau: float, pacing_length: int) -> int:
    """Return the shortest length that keeps a tier level with the pacing tier.

    A round lasts as long as the pacing tier's yield allows, so that the other tier must yield as
    many tokens as it needs in that time.

    Args:
        alpha: Chance that a draft token is right.
        tau: Seconds per token of the tier.
        pacing_tau: Those of the pacing tier.
        pacing_length: Tokens that the pacing tier verifies per round.
    """
    left = ((tau - pacing_tau) + alpha**pacing_length * pacing_tau) / tau
    if left >= 1:
        return 1
    if left <= 0:
        return 1 << 30
    return max(1, math.ceil(math.log(left) / math.log(alpha) - 1e-9))


def plan_rounds(
    seconds: float,
    counts: Sequence[int],
    tiers: Sequence[float],
    cost: CostModel,
    *,
    alpha: float,
    mean_context: float,
    max_length: int,
) -> Rounds | None:
    """Choose lengths that leave the most room for prompts.

    Args:
        seconds: Stretch of time.
        counts: Decodes per tier.
        tiers: Seconds per token of each tier.
        cost: Times of steps.
        alpha: Chance that a draft token is right.
        mean_context: Tokens that a decode attends to.
        max_length: Longest round, the verified token included.

    Returns:
        The best rounds; None if no lengths keep everybody on time.
    """
    alpha = clamp(alpha)
    occupied = [tier for tier, count in enumerate(counts) if count]
    best: Rounds | None = None
    for pacing in occupied:
        for length in range(1, max_length + 1):
            lengths = [0] * len(tiers)
            for tier in occupied:
                lengths[tier] = (
                    length
                    if tier == pacing
                    else level_length(alpha, tiers[tier], tiers[pacing], length)
                )
            if max(lengths) > max_length:
                continue
            found = _rounds(
                seconds, counts, tiers, lengths, cost, alpha=alpha, mean_context=mean_context
            )
            if found is not None and (best is None or found.budget > best.budget):
                best = found
    return best


def _rounds(
    seconds: float,
    counts: Sequence[int],
    tiers: Sequence[float],
    lengths: Sequence[int],
    cost: CostModel,
    *,
    alpha: float,
    mean_context: float,
) -> Rounds | None:
    """Return the rounds that given lengths make; None if decodes alone are too slow."""
    occupied = [tier for tier, count in enumerate(counts) if count]
    unit = min(expected_tokens(alpha, lengths[tier]) * tiers[tier] for tier in occupied)
    decodes = sum(counts)
    drafts = sum(counts[tier] * (lengths[tier] - 1) for tier in occupied)
    load = StepLoad(
        decodes=decodes,
        context=round(decodes * mean_context),
        drafts=drafts,
        draft_steps=max(lengths) - 1,
    )
    if cost.step_time(load) > unit:
        return None
    room = cost.prefill_within(unit, load)
    return Rounds(
        lengths=tuple(lengths), unit=unit, room=room, budget=math.floor(seconds / unit) * room
    )
