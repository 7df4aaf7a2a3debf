"""A cost model that learns, step by step, by how much another one is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.core.cost import CostModel, StepLoad, longest_chunk
from jaxserve.core.errors import ConfigError

HALF_LIFE = 200
"""Steps after which an observation counts half."""
LOWEST, HIGHEST = 0.7, 1.5
"""Corrections go no further than this: beyond, the model is not wrong but for another machine."""
ALARM_LOW, ALARM_HIGH = 0.8, 1.25
ALARM_AFTER_S = 30.0
_TRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How observed times compare with predicted ones.

    Attributes:
        ratio: Observed over predicted, as a mean over buckets weighted by what they have seen.
        buckets: The same by bucket, by name.
        observations: Steps seen.
        is_alarming: Whether the ratio has been outside 0.8 to 1.25 for the last 30 seconds.
    """

    ratio: float
    buckets: dict[str, float]
    observations: int
    is_alarming: bool


class LearnedCost:
    """Another model's times, corrected by an exponentially weighted ratio per kind of step.

    Steps are told apart by whether they hold prefill, and by the power of four of their tokens.

    Args:
        cost: The model to correct.
        half_life: Steps after which an observation counts half.

    Raises:
        ConfigError: If `half_life` is not above zero.

    Source: ours.
    """

    def __init__(self, cost: CostModel, *, half_life: float = HALF_LIFE) -> None:
        """Start without a correction."""
        if not half_life > 0:
            raise ConfigError(f"half_life must be above zero, got {half_life}.")
        self._cost = cost
        self._keep = 0.5 ** (1 / half_life)
        self._ratios: dict[int, float] = {}
        self._weights: dict[int, float] = {}
        self._seen = 0
        self._outside_since: float | None = None
        self._now = 0.0

    def observe(self, load: StepLoad, seconds: float, now: float = 0.0) -> None:
        """Take note of how long a step took.

        Args:
            load: What it held.
            seconds: Its time.
            now: Clock time in seconds, for the alarm.
        """
        predicted = self._cost.step_time(load)
        if predicted <= 0 or seconds <= 0:
            return
        bucket = _bucket(load)
        weight = self._weights.get(bucket, 0.0) * self._keep
        share = 1 / (1 + weight)
        old = self._ratios.get(bucket, 1.0)
        self._ratios[bucket] = old + share * (seconds / predicted - old)
        self._weights[bucket] = weight + 1
        self._seen += 1
        self._now = now
        if ALARM_LOW <= self._mean() <= ALARM_HIGH:
            self._outside_since = None
        elif self._outside_since is None:
            self._outside_since = now

    @property
    def ratio(self) -> float:
        """Observed over predicted, as a mean over buckets weighted by what they have seen."""
        return self._mean()

    @property
    def is_alarming(self) -> bool:
        """Whether the ratio has been outside 0.8 to 1.25 for the last 30 seconds."""
        since = self._outside_since
        return since is not None and self._now - since >= ALARM_AFTER_S

    def drift(self) -> Drift:
        """Return how far observations and predictions are apart."""
        return Drift(
            ratio=self._mean(),
            buckets={_name(bucket): ratio for bucket, ratio in sorted(self._ratios.items())},
            observations=self._seen,
            is_alarming=self.is_alarming,
        )

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes."""
        return self._cost.step_time(load) * self._correction(load)

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last."""
        correction = self._correction(load)
        return [time * correction for time in self._cost.decode_times(load, count)]

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of the longest chunk that can be added within a time.

        Corrections differ from bucket to bucket, so that a longer chunk may be predicted to take
        less time; then this is a length that fits and whose successor does not.
        """
        if self.step_time(load.with_chunk(1, past)) > seconds:
            return 0
        guess = found = 1
        for _ in range(_TRIES):
            correction = self._of_bucket(_number(load.tokens + guess, is_prefill=True))
            found = self._cost.prefill_within(seconds / correction, load, past)
            if found == guess or not found:
                break
            guess = found
        if guess == found and self.step_time(load.with_chunk(guess, past)) <= seconds:
            after = self.step_time(load.with_chunk(guess + 1, past))
            if after > seconds:
                return guess
        return longest_chunk(self, seconds, load, past, guess)

    def _correction(self, load: StepLoad) -> float:
        return self._of_bucket(_bucket(load))

    def _of_bucket(self, bucket: int) -> float:
        ratio = self._ratios.get(bucket, 1.0)
        return LOWEST if ratio < LOWEST else min(ratio, HIGHEST)

    def _mean(self) -> float:
        total = sum(self._weights.values())
        if not total:
            return 1.0
        return (
            sum(self._ratios[bucket] * weight for bucket, weight in self._weights.items()) / total
        )


def _bucket(load: StepLoad) -> int:
    """Number the kind of a step, as `_number` does."""
    prefill, _, _, _, decodes, _, drafts, _ = load
    return 2 * (((prefill + decodes + drafts).bit_length() + 1) // 2) + (prefill > 0)


def _number(tokens: int, *, is_prefill: bool) -> int:
    """Number the kind of a step: twice the power of four of its tokens, plus one with prefill."""
    return 2 * ((tokens.bit_length() + 1) // 2) + is_prefill


def _name(bucket: int) -> str:
    low = 4 ** max(0, bucket // 2 - 1)
    return f"{'prefill' if bucket % 2 else 'decode'}, {low} tokens and more"
