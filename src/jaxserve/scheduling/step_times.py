"""Times of steps for compiled loops: the cost models of `core`, as arrays and functions of them.

The numbers are those of the models, to the last bit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import lean
from jaxserve.core.cost import CostModel, LinearCost, StepLoad
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.cost_table import TableCost
from jaxserve.core.errors import ConfigError


class StepTimes(NamedTuple):
    """A cost model as arrays: either planes or a table.

    Attributes:
        planes: `[planes, 4]`: seconds per token, per sequence, per token of context, per step.
        axes: The axes of the table behind one another: sequences that decode, tokens that each
            attends to, prompt tokens, and tokens before those.
        batches: Values of the first axis.
        contexts: Values of the second.
        chunks: Values of the third.
        pasts: Values of the last.
        grid: Seconds of the table, flat; empty with planes.
        is_summed: 1 if prefill and decodes count as two steps in a row.
    """

    planes: np.ndarray
    axes: np.ndarray
    batches: int
    contexts: int
    chunks: int
    pasts: int
    grid: np.ndarray
    is_summed: int


def step_times(cost: CostModel, *, margin: float = 0.0) -> StepTimes:
    """Bring a cost model into the form that compiled loops read.

    Args:
        cost: A linear model, a table, or times of padded steps.
        margin: Share by which all times are raised.

    Raises:
        ConfigError: For another kind of model, or a margin below zero.
    """
    if not 0 <= margin < math.inf:
        raise ConfigError(f"a margin must be zero or more, got {margin}.")
    scale, none = 1 + margin, np.zeros(0)
    if isinstance(cost, LinearCost):
        rows = [(p.token, p.request, p.context, p.base) for p in cost.planes]
        return StepTimes(scale * np.array(rows), none, 0, 0, 0, 0, none, 0)
    if isinstance(cost, TableCost):
        axes = np.concatenate([np.array(axis) for axis in cost.axes])
        batches, contexts, chunks, pasts = map(len, cost.axes)
        grid = scale * cost.grid.ravel()
        is_summed = int(cost.composition == "summed")
        return StepTimes(np.zeros((0, 4)), axes, batches, contexts, chunks, pasts, grid, is_summed)
    if isinstance(cost, BucketCost):
        return _stairs(cost, scale)
    raise ConfigError(
        "compiled loops read a LinearCost, a TableCost or a BucketCost, got "
        f"{type(cost).__name__}; give the model that it was made from, and a margin."
    )


_FAR_CONTEXT = 4096.0
"""Second value of the axes along which the times of padded steps are straight lines."""


def _stairs(cost: BucketCost, scale: float) -> StepTimes:
    """Write times of padded steps as a table: each bucket has a cell at either end.

    Several prompts in a step count as one, whose pairs are those of a chord and never too few.
    """
    rows, tokens = cost.sizes
    batches, chunks = _ends(rows), _ends(tokens)
    # A prompt takes a row of its own.
    batches = sorted({*batches, *(size - 1 for size in rows)})
    far = (0.0, _FAR_CONTEXT)
    cells = [
        cost.step_time(
            StepLoad(
                prefill=chunk, pairs=chunk * past + chunk * chunk / 2, prefills=int(chunk > 0),
                past=int(past) if chunk else 0, decodes=batch, context=int(batch * mean),
            )
        )
        for batch in batches for mean in far for chunk in chunks for past in far
    ]  # fmt: skip
    axes = np.array([*batches, *far, *chunks, *far], float)
    grid = scale * np.array(cells)
    return StepTimes(
        np.zeros((0, 4)), axes, len(batches), len(far), len(chunks), len(far), grid, 0
    )  # fmt: skip


def _ends(sizes: Sequence[int]) -> list[int]:
    """Return zero, and the first and last size of each bucket; past the last they go on."""
    found = {0}
    below = 0
    for size in sizes:
        found |= {below + 1, size}
        below = size
    return sorted(found | {2 * below})


@lean
def step_seconds(
    times: StepTimes,
    prefill: int,
    pairs: float,
    prefills: int,
    past: int,
    decodes: int,
    context: int,
) -> float:
    """Return the seconds of a step; the counts are those of `StepLoad`, without drafts."""
    planes = times.planes
    if planes.shape[0]:
        tokens, requests, read = prefill + decodes, prefills + decodes, context + past
        longest = 0.0
        for i in range(planes.shape[0]):
            rest = planes[i, 1] * requests + planes[i, 3]
            seconds = planes[i, 0] * tokens + rest + planes[i, 2] * read
            longest = max(longest, seconds)
        return longest
    if prefill == 0:
        mean = context / decodes if decodes else 0.0
        return _corners(times, decodes, mean, 0.0, 0.0)
    before = (pairs - prefill * prefill / 2) / prefill
    if decodes == 0:
        return max(times.grid[0], _corners(times, 0.0, 0.0, prefill, before))
    mean = context / decodes
    decode = _corners(times, decodes, mean, 0.0, 0.0)
    if times.is_summed:
        return decode + _corners(times, 0.0, 0.0, prefill, before)
    return max(decode, _corners(times, decodes, mean, prefill, before))


@lean
def _cell(values: np.ndarray, start: int, size: int, value: float) -> tuple[int, float]:
    """Return the cell of an axis that holds a value, and how far the value is in it."""
    if size == 1:
        return 0, 0.0
    index = 0
    while index < size - 2 and value >= values[start + index + 1]:
        index += 1
    low = values[start + index]
    return index, (value - low) / (values[start + index + 1] - low)


@lean
def _corners(times: StepTimes, batch: float, mean: float, chunk: float, past: float) -> float:
    """Interpolate in the table, in the order in which `TableCost` does."""
    grid, axes = times.grid, times.axes
    at_b, part_b = _cell(axes, 0, times.batches, batch)
    start = times.batches
    at_k, part_k = _cell(axes, start, times.contexts, mean)
    start += times.contexts
    at_c, part_c = _cell(axes, start, times.chunks, chunk)
    start += times.chunks
    at_p, part_p = _cell(axes, start, times.pasts, past)
    part_k = max(part_k, 0.0)
    step_p = 1 if times.pasts > 1 else 0
    per_c = times.pasts
    step_c = per_c if times.chunks > 1 else 0
    per_k = per_c * times.chunks
    step_k = per_k if times.contexts > 1 else 0
    per_b = per_k * times.contexts
    step_b = per_b if times.batches > 1 else 0
    first = at_b * per_b + at_k * per_k + at_c * per_c + at_p
    found = 0.0
    for upper_b in range(2 if part_b else 1):
        value = 0.0
        for upper_k in range(2 if part_k else 1):
            at = first + upper_b * step_b + upper_k * step_k
            low = grid[at]
            if part_p:
                low += part_p * (grid[at + step_p] - low)
            if part_c:
                high = grid[at + step_c]
                if part_p:
                    high += part_p * (grid[at + step_c + step_p] - high)
                low += part_c * (high - low)
            value = low if upper_k == 0 else value + part_k * (low - value)
        found = value if upper_b == 0 else found + part_b * (value - found)
    return found


@lean
def longest_chunk(
    times: StepTimes,
    seconds: float,
    prefill: int,
    pairs: float,
    prefills: int,
    before: int,
    decodes: int,
    context: int,
    past: int,
    most: int,
) -> int:
    """Return the length of the longest chunk behind `past` tokens that fits into a step's time.

    Args:
        times: Times of steps, monotone.
        seconds: Time of the whole step.
        prefill: Prompt tokens that it holds already; this and the next five as in `StepLoad`.
        pairs: Their query-key pairs.
        prefills: Their sequences.
        before: Tokens before their chunks.
        decodes: Sequences that decode.
        context: Tokens that those attend to.
        past: Tokens before the chunk.
        most: Longest chunk to consider.
    """
    if times.planes.shape[0] == 1 and times.planes[0, 0] > 0:
        left = seconds - step_seconds(
            times, prefill, pairs, prefills + 1, before + past, decodes, context
        )
        guess = left / times.planes[0, 0]
        if guess < 0:
            return 0
        found = most if guess > most else int(guess)
        # Only rounding is left to be settled.
        while found > 0 and not _fits(
            times, seconds, prefill, pairs, prefills, before, decodes, context, past, found
        ):
            found -= 1
        while found < most and _fits(
            times, seconds, prefill, pairs, prefills, before, decodes, context, past, found + 1
        ):
            found += 1
        return found
    if most > 0 and _fits(
        times, seconds, prefill, pairs, prefills, before, decodes, context, past, most
    ):
        return most
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(times, seconds, prefill, pairs, prefills, before, decodes, context, past, middle):
            low = middle
        else:
            high = middle
    return low


@lean
def _fits(
    times: StepTimes,
    seconds: float,
    prefill: int,
    pairs: float,
    prefills: int,
    before: int,
    decodes: int,
    context: int,
    past: int,
    chunk: int,
) -> bool:
    more = chunk * past + chunk * chunk / 2
    return (
        step_seconds(
            times, prefill + chunk, pairs + more, prefills + 1, before + past, decodes, context
        )
        <= seconds
    )
