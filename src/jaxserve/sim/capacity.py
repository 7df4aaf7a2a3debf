"""The largest rate at which a policy keeps enough objectives, and how sure that is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.core.errors import ConfigError

STEP = 1.04
"""Ratio of neighbouring rates that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A crossing of the attainment curve.

    Attributes:
        rate: Requests per second; interpolated between the rates that were tried.
        low: Lower end of the 95 % interval.
        high: Upper end.
        tried: Rates and their attainment.
        is_monotone: Whether no higher rate that was tried had clearly more attainment.
    """

    rate: float
    low: float
    high: float
    tried: tuple[tuple[float, float], ...]
    is_monotone: bool


@dataclass(slots=True)
class CapacitySearch:
    """Finds crossings on one grid of rates, so that several objectives can share their runs.

    Attributes:
        run: Simulates a rate and returns, for each objective by name, who kept it (1 or 0 per
            request). A run may stop early; the requests that it left out then count as 0.
        runs: What has been tried so far, by position on the grid.
    """

    run: Callable[[float], dict[str, np.ndarray]]
    runs: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    def find(self, objective: str, *, level: float = 0.9, guess: float = 1.0) -> Capacity:
        """Return the lowest rate at which attainment falls to `level`.

        Args:
            objective: Which of those that `run` returns.
            level: Share of requests.
            guess: A rate to begin at, above zero.

        Raises:
            ConfigError: For a guess that is not above zero.
        """
        if not guess > 0:
            raise ConfigError(f"a guess of the capacity must be above zero, got {guess}.")
        low = high = round(math.log(guess) / math.log(STEP))
        reach = 4
        if self._at(low, objective) >= level:
            while self._at(high, objective) >= level:
                low, high, reach = high, high + reach, 2 * reach
        else:
            while self._at(low, objective) < level and low > -300:
                low, high, reach = low - reach, low, 2 * reach
        while high - low > 1:
            middle = (low + high) // 2
            is_kept = self._at(middle, objective) >= level
            low, high = (middle, high) if is_kept else (low, middle)
        return self._crossing(objective, level, low)

    def _at(self, place: int, objective: str) -> float:
        if place not in self.runs:
            self.runs[place] = self.run(STEP**place)
        return float(self.runs[place][objective].mean())

    def _crossing(self, objective: str, level: float, low: int) -> Capacity:
        """Interpolate, and draw the requests of every run anew for the interval."""
        places = sorted(place for place in self.runs if abs(place - low) <= 12)
        rates = np.array([STEP**place for place in places])
        flags = [self.runs[place][objective] for place in places]
        means = np.array([flag.mean() for flag in flags])
        rng = np.random.default_rng(0)
        counts = np.array([len(flag) for flag in flags])
        drawn = rng.binomial(counts, means, size=(1000, len(means))) / counts
        crossings = np.array([_cross(rates, row, level) for row in drawn])
        highest_later = np.maximum.accumulate(means[::-1])[::-1]
        noise = 2 * np.sqrt(0.25 / counts.min())
        return Capacity(
            rate=_cross(rates, means, level),
            low=float(np.quantile(crossings, 0.025)),
            high=float(np.quantile(crossings, 0.975)),
            tried=tuple(zip(map(float, rates), map(float, means), strict=True)),
            is_monotone=bool((highest_later <= means + noise).all()),
        )


def _cross(rates: np.ndarray, means: np.ndarray, level: float) -> float:
    """Return where the curve first falls to a level; the ends of the rates where it does not."""
    below = np.flatnonzero(means < level)
    if not len(below):
        return float(rates[-1])
    index = int(below[0])
    if index == 0:
        return float(rates[0])
    share = (means[index - 1] - level) / (means[index - 1] - means[index])
    return float(rates[index - 1] + share * (rates[index] - rates[index - 1]))


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers.

    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    return math.exp(math.fsum(map(math.log, values)) / len(values))
