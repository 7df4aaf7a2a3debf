"""What a step costs: its load in counts, the protocol of cost models, and models linear in counts.

Every model has two inverses beside the time of a step: how many prompt tokens still fit into a time
(`prefill_within`), and how many sequences can decode at a pace (`max_decodes`).

Source: the batch-time models of SLOs-Serve (arXiv 2504.08784): the largest of a few planes over
    tokens and draft steps, and a plane over five counts. Both are `LinearCost`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from jaxserve.core.errors import ConfigError

_MOST_TOKENS = 1 << 22
"""No step is asked to hold more prompt tokens than this."""


class StepLoad(NamedTuple):
    """What one step computes, in counts. A tuple, because one is made for every step.

    Attributes:
        prefill: Prompt tokens.
        pairs: Query-key pairs of their attention: a chunk of n tokens behind s others has
            `n * s + n * n / 2`.
        prefills: Sequences with a chunk of prompt.
        past: Tokens before the chunks, summed.
        decodes: Sequences that decode.
        context: Tokens that those attend to, summed.
        drafts: Draft tokens verified besides.
        draft_steps: Steps of the draft model before the verification.
    """

    prefill: int = 0
    pairs: float = 0.0
    prefills: int = 0
    past: int = 0
    decodes: int = 0
    context: int = 0
    drafts: int = 0
    draft_steps: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.prefill + self.decodes + self.drafts

    def with_chunk(self, num_tokens: int, past: int = 0) -> "StepLoad":
        """Return the load with one more chunk of `num_tokens` behind `past` tokens."""
        prefill, pairs, prefills, before, decodes, context, drafts, draft_steps = self
        pairs += num_tokens * past + num_tokens * num_tokens / 2
        return StepLoad(
            prefill + num_tokens, pairs, prefills + 1, before + past,
            decodes, context, drafts, draft_steps,
        )  # fmt: skip


class CostModel(Protocol):
    """Predicts how long steps take; monotone in every count."""

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes."""
        ...

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last.

        The same numbers, to the last bit, as `step_time` of each step's load.
        """
        ...

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of the longest chunk that can be added within a time.

        Args:
            seconds: Time of the whole step.
            load: What the step holds already.
            past: Tokens before the chunk.

        Returns:
            Tokens; 0 if not even one fits.
        """
        ...


def zero_load_time(cost: CostModel, prompt_len: int, cached_len: int = 0) -> float:
    """Return the seconds to the first token of a prompt that is alone.

    Args:
        cost: Times of steps.
        prompt_len: Tokens of the prompt.
        cached_len: How many of them need not be computed.
    """
    return cost.step_time(StepLoad().with_chunk(prompt_len - cached_len, cached_len))


def max_decodes(cost: CostModel, seconds: float, mean_context: float, *, limit: int = 4096) -> int:
    """Return how many sequences can decode together within a time per step.

    Args:
        cost: Times of steps.
        seconds: Time per step.
        mean_context: Tokens that each attends to.
        limit: Most sequences to consider.

    Returns:
        Sequences; 0 if one alone takes longer.
    """

    def fits(count: int) -> bool:
        context = round(count * mean_context)
        return cost.step_time(StepLoad(decodes=count, context=context)) <= seconds

    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_chunk(cost: CostModel, seconds: float, load: StepLoad, past: int, guess: int) -> int:
    """Find the longest chunk within a time by secants, galloping, then halving.

    Args:
        cost: Times of steps, monotone in the length of a chunk.
        seconds: Time of the whole step.
        load: What the step holds already.
        past: Tokens before the chunk.
        guess: Where to begin; only speed depends on it.
    """

    def time(num_tokens: int) -> float:
        return cost.step_time(load.with_chunk(num_tokens, past))

    def fits(num_tokens: int) -> bool:
        return time(num_tokens) <= seconds

    # Times are almost straight lines, so that a few secants come near the answer.
    near, reach = 1, 1
    guess = max(1, min(guess, _MOST_TOKENS))
    time_near = time(near)
    for _ in range(3):
        time_guess = time(guess)
        if guess == near or time_guess == time_near:
            break
        slope = (time_guess - time_near) / (guess - near)
        near, time_near = guess, time_guess
        guess = max(1, min(int(near + (seconds - time_near) / slope), _MOST_TOKENS))
    if fits(guess):
        low, high = guess, guess + reach
        while high < _MOST_TOKENS and fits(high):
            low, reach = high, 2 * reach
            high = low + reach
    else:
        low, high = max(0, guess - reach), guess
        while low > 0 and not fits(low):
            high, reach = low, 2 * reach
            low = max(0, high - reach)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, _MOST_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Seconds per count; a step on this plane takes the sum.

    Attributes:
        token: Per token that goes through the model.
        request: Per sequence.
        context: Per token of context that is read.
        draft_step: Per step of the draft model.
        base: Per step.
    """

    token: float = 0.0
    request: float = 0.0
    context: float = 0.0
    draft_step: float = 0.0
    base: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is not a time."""
        for name in ("token", "request", "context", "draft_step", "base"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"a cost per {name} must be a number of seconds, zero or more, got {value!r}; "
                    "fit the model again with non-negative coefficients."
                )


class LinearCost:
    """The largest of a few planes over the counts of a step.

    Args:
        planes: At least one. The first often stands for reading weights and so has no slope.

    Raises:
        ConfigError: Without planes, or if all of them are zero.
    """

    def __init__(self, *planes: Plane) -> None:
        """Keep the coefficients as tuples, which are quicker to read than fields."""
        if not planes or not any(p.base or p.token or p.request for p in planes):
            raise ConfigError(
                "a linear cost needs a plane with a base, a cost per token or per request; "
                f"got {planes!r}."
            )
        self.planes = planes
        self._rows = tuple((p.token, p.request, p.context, p.draft_step, p.base) for p in planes)

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes."""
        prefill, _, prefills, past, decodes, context, drafts, draft_steps = load
        tokens, requests = prefill + decodes + drafts, prefills + decodes
        read = context + past
        longest = 0.0
        for token, request, per_read, draft_step, base in self._rows:
            rest = request * requests + draft_step * draft_steps + base
            time = token * tokens + rest + per_read * read
            if time > longest:
                longest = time
        return longest

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last."""
        prefill, _, prefills, past, decodes, context, drafts, draft_steps = load
        tokens, requests = prefill + decodes + drafts, prefills + decodes
        read = context + past
        reads = range(read, read + count * decodes, decodes) if decodes else [read] * count
        columns: list[list[float]] = []
        for token, request, per_read, draft_step, base in self._rows:
            rest = request * requests + draft_step * draft_steps + base
            rest = token * tokens + rest
            columns.append([rest + per_read * read for read in reads])
        if len(columns) == 1:
            return columns[0]
        return [max(0.0, *times) for times in zip(*columns, strict=True)]

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of the longest chunk that can be added within a time."""
        prefill, _, prefills, before, decodes, context, drafts, draft_steps = load
        tokens, requests = prefill + decodes + drafts, prefills + decodes + 1
        read = context + before + past
        most = _MOST_TOKENS
        for token, request, per_read, draft_step, base in self._rows:
            rest = request * requests + draft_step * draft_steps + base
            more = per_read * read
            left = seconds - (token * tokens + rest + more)
            if left < 0:
                least = 0
            elif token > 0:
                least = min(_MOST_TOKENS, int(left / token))
            else:
                continue
            # Rounding may put the quotient one off in either direction; sums are in the order of
            # `step_time`, so that both round alike.
            while least and token * (tokens + least) + rest + more > seconds:
                least -= 1
            while least < most and token * (tokens + least + 1) + rest + more <= seconds:
                least += 1
            most = min(most, least)
        return most

    def scaled(self, scale: float, more: float) -> "LinearCost":
        """Return a model whose times are `scale` times as long, and `more` seconds more."""
        return LinearCost(
            *(
                Plane(
                    token=scale * plane.token,
                    request=scale * plane.request,
                    context=scale * plane.context,
                    draft_step=scale * plane.draft_step,
                    base=scale * plane.base + more,
                )
                for plane in self.planes
            )
        )


def safe_cost(cost: CostModel, *, margin: float, overhead: float = 0.0) -> CostModel:
    """Return another model's times, stretched so that few steps take longer than predicted.

    Args:
        cost: The model.
        margin: Share by which each time is raised.
        overhead: Seconds of the host per step.

    Raises:
        ConfigError: For a negative margin or overhead.
    """
    safe = SafeCost(cost, margin=margin, overhead=overhead)
    return cost.scaled(1 + margin, overhead) if isinstance(cost, LinearCost) else safe


class SafeCost:
    """Another model's times, stretched so that few steps take longer than predicted.

    Args:
        cost: The model.
        margin: Share by which each time is raised.
        overhead: Seconds of the host per step.

    Raises:
        ConfigError: For a negative margin or overhead.
    """

    def __init__(self, cost: CostModel, *, margin: float = 0.05, overhead: float = 0.0) -> None:
        """Keep both."""
        if not (0 <= margin < math.inf and 0 <= overhead < math.inf):
            raise ConfigError(
                f"margin and overhead must be zero or more, got {margin=} and {overhead=}."
            )
        self._cost = cost
        self._scale = 1 + margin
        self._overhead = overhead

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes at most, in all likelihood."""
        return self._cost.step_time(load) * self._scale + self._overhead

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last."""
        times = self._cost.decode_times(load, count)
        return [time * self._scale + self._overhead for time in times]

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of the longest chunk that can be added within a time."""
        most = self._cost.prefill_within((seconds - self._overhead) / self._scale, load, past)
        while most > 0 and self.step_time(load.with_chunk(most, past)) > seconds:
            most -= 1
        while most < _MOST_TOKENS and self.step_time(load.with_chunk(most + 1, past)) <= seconds:
            most += 1
        return most


def _roofline(*planes: tuple[float, float, float]) -> LinearCost:
    return LinearCost(
        *(Plane(token=token, draft_step=step, base=base) for token, step, base in planes)
    )


def _five(token: float, request: float, context: float, base: float) -> LinearCost:
    return LinearCost(Plane(token=token, request=request, context=context, base=base))


PUBLISHED_COSTS: Mapping[str, LinearCost] = MappingProxyType({
    "opt-6.7b+125m-a100": _roofline((6.878e-5, 1.25e-6, 2.480e-2), (7.523e-5, 3.465e-3, 3.03e-3)),
    "opt-13b+125m-2xa100": _roofline((7.213e-5, 3.341e-3, 3.173e-2), (0.0, 3.014e-3, 1.2e-5)),
    "opt-13b-h100": _roofline((4.177e-5, 0.0, 2.743e-2)),
    "opt-30b+125m-4xa100": _roofline((9.314e-5, 2.797e-3, 3.788e-2), (0.0, 3.014e-3, 1.2e-5)),
    "toolllama-7b-a100": _roofline((6.572e-5, 0.0, 2.752e-2)),
    "qwen2.5-32b+0.5b-4xa100": _roofline((1.054e-4, 4.520e-3, 4.513e-2)),
    "7b-a100": _five(4.86e-5, 1.69e-5, 8.0e-8, 1.4e-2),
    "qwen2.5-7b": _five(5.1e-5, 1.69e-5, 8.0e-8, 1.4e-2),
    "gemma-3-27b": _five(7.69e-5, 5.82e-5, 4.4e-8, 1.9e-2),
})  # fmt: skip
"""Published coefficients: model, draft model and GPUs to the times of steps.

Source: SLOs-Serve (arXiv 2504.08784) and its authors' public code.
"""
