"""Settings of the token planner."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxserve.core.errors import ConfigError

Pace = Literal["tpot", "tpot_gap", "tpot_mean"]
"""How the target per token is read: as deadlines that early tokens bank for, as a bound of every
gap, or as a bound of the mean gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlosServeConfig:
    """How the planner promises and keeps.

    Attributes:
        pace: How the target per token is read.
        margin: Share by which predicted times are raised before anything is promised.
        overhead_s: Seconds of the host per step, added to predicted times.
        max_step_s: Longest step in seconds; whoever arrives waits for the step under way. None
            follows the targets of the first token.
        step_share: Without `max_step_s`: longest step as a share of a short target of the first
            token, that of the shortest fifth of the latest requests, and twice that where every gap
            counts. What a step takes with next to nothing in it comes on top.
        horizon_s: How long decodes alone must be sustainable, in the programme (the paper's H).
        max_candidates: New requests up to which the programme chooses; beyond, fast admission.
        max_tiers: Distinct targets per token up to which the programme chooses.
        max_draft: Longest speculation, in draft tokens per step (the paper's S, less one).
        initial_acceptance: Chance that a draft token is right, before anything is known (alpha).
        output_quantile: Which quantile of the lengths seen in a tier counts as a request's output.
        initial_output: Output tokens to reckon with before lengths have been seen.
        watermark: Share of the pages that promises leave free.
        best_effort_share: Least share of tokens that those without a promise get over 10 seconds.
        price_gain: How fast the price of server time follows demand; 0 admits whatever fits. While
            requests find no room, those that ask for many times the mean work are not promised
            anything, because each would cost several others their promise.
        price_floor: Least multiple of the mean work that this comes to.
        shortage_s: How long after a request has found no room promises count as short, in seconds:
            the price holds, and those without a promise do not make the steps of promised requests
            much longer, so that these end sooner; 0 leaves both out.
        revises: Whether the promise of a request that waits may pass to one with less work, unless
            the first asked to be refused rather than to go without.

    Raises:
        ConfigError: If a value is out of its range.
    """

    pace: Pace = "tpot"
    margin: float = 0.05
    overhead_s: float = 0.0
    max_step_s: float | None = None
    step_share: float = 0.5
    horizon_s: float = 1.0
    max_candidates: int = 16
    max_tiers: int = 3
    max_draft: int = 5
    initial_acceptance: float = 0.7
    output_quantile: float = 0.8
    initial_output: int = 256
    watermark: float = 0.02
    best_effort_share: float = 0.02
    price_gain: float = 0.02
    price_floor: float = 4.0
    shortage_s: float = 60.0
    revises: bool = True

    def __post_init__(self) -> None:
        """Check every value."""
        for name, low, high in (
            ("margin", 0.0, 1.0),
            ("overhead_s", 0.0, 10.0),
            ("step_share", 0.01, 10.0),
            ("horizon_s", 1e-3, 100.0),
            ("max_candidates", 1, 64),
            ("max_tiers", 1, 8),
            ("max_draft", 0, 64),
            ("initial_acceptance", 0.05, 0.95),
            ("output_quantile", 0.0, 1.0),
            ("initial_output", 1, 1 << 20),
            ("watermark", 0.0, 0.5),
            ("best_effort_share", 0.0, 0.5),
            ("price_gain", 0.0, 1.0),
            ("price_floor", 1.0, 1e6),
            ("shortage_s", 0.0, 1e6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be between {low} and {high}, got {value}.")
        if self.max_step_s is not None and not 0 < self.max_step_s < math.inf:
            raise ConfigError(f"max_step_s must be above zero, got {self.max_step_s}.")
        if self.pace not in ("tpot", "tpot_gap", "tpot_mean"):
            raise ConfigError(
                f"pace must be one of tpot, tpot_gap and tpot_mean, got {self.pace!r}."
            )
