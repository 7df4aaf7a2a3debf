"""Times of steps from a table of measurements."""

import csv
import gzip
import io
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxserve.core.cost import StepLoad, longest_chunk
from jaxserve.core.errors import ConfigError

COLUMNS = ("decode_batch", "mean_kv_len", "prefill_chunk", "prefill_past", "iter_ms")
_NAMED = 5
"""Most cells that a message names one by one."""

Composition = Literal["mixed", "summed"]
"""How a step with prefill and decode is read: as measured together, or as two steps in a row."""


class TableCost:
    """Interpolates between measured steps, linearly in each of four axes.

    The axes are sequences that decode, tokens that each of them attends to, prompt tokens, and
    tokens before those. Past the last value of an axis times grow in a straight line. Several
    chunks in one step count as one that is as long as all together and stands where its attention
    has as many query-key pairs as theirs.

    Args:
        rows: `(decodes, mean context, chunk, past, seconds)` in any order; a full grid, but for
            cells without chunk or without decodes, which are given once.
        composition: `mixed` reads steps of both kinds from the table, `summed` adds up the time of
            the prefill and that of the decodes.
        name: What to call the table in messages.

    Attributes:
        enveloped: Cells that were smaller than a cell with less work, as text. They were raised to
            that cell's time, so that times are monotone.

    Raises:
        ConfigError: For a cell that is missing, given twice, not a number or not above zero.
    """

    def __init__(
        self,
        rows: Sequence[tuple[float, float, float, float, float]],
        *,
        composition: Composition = "mixed",
        name: str = "cost table",
    ) -> None:
        """Check every cell and make the grid monotone."""
        cells = _cells(rows, name)
        axes = [sorted({key[axis] for key in cells}) for axis in range(4)]
        lens = [length for length in axes[1] if length > 0] or [0.0]
        axes[1] = lens
        grid = np.empty([len(axis) for axis in axes])
        missing: list[str] = []
        for index in np.ndindex(*grid.shape):
            batch, length, chunk, past = (axes[a][i] for a, i in enumerate(index))
            key = _key(batch, length, chunk, past)
            found = cells.get(key)
            if found is None and not batch and not chunk:
                found = min(cells.values())  # an empty step, which only interpolation asks for
            if found is None:
                missing.append(_cell_name(key))
                continue
            grid[index] = found
        if missing:
            raise ConfigError(
                f"{name} has no value for {_list(missing)}; measure the whole grid, or leave out "
                "the values of the axes that were not measured."
            )
        raised = grid.copy()
        for axis in range(4):
            raised = np.maximum.accumulate(raised, axis=axis)
        places = (tuple(axes[a][i] for a, i in enumerate(at)) for at in np.argwhere(raised > grid))
        self.enveloped = tuple(dict.fromkeys(_cell_name(_key(*place)) for place in places))
        self._composition: Composition = composition
        self._axes = [[float(value) for value in axis] for axis in axes]
        self._flat: list[float] = raised.ravel().tolist()
        shape = raised.shape
        self._strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
        self._seconds_per_token = max(1e-9, _slope(axes[2], raised[0, 0, :, 0]))
        self._base = float(raised[0, 0, 0, 0])

    @classmethod
    def read(cls, path: Path, *, composition: Composition = "mixed") -> "TableCost":
        """Read a CSV file, gzipped or not, with the columns `COLUMNS`, times in milliseconds.

        Raises:
            ConfigError: For other columns, text that is not a number, or bad cells.
        """
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        lines = list(csv.reader(io.StringIO(text)))
        header = tuple(lines[0]) if lines else ()
        if header != COLUMNS:
            raise ConfigError(
                f"{path.name} must have the columns {', '.join(COLUMNS)}, got "
                f"{', '.join(header) or 'none'}."
            )
        rows: list[tuple[float, float, float, float, float]] = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                batch, length, chunk, past, ms = map(float, line)
            except ValueError:
                raise ConfigError(
                    f"line {number} of {path.name} must hold five numbers, got {','.join(line)!r}."
                ) from None
            rows.append((batch, length, chunk, past, ms / 1000))
        return cls(rows, composition=composition, name=path.name)

    @property
    def axes(self) -> tuple[tuple[float, ...], ...]:
        """Values of the four axes."""
        return tuple(map(tuple, self._axes))

    @property
    def grid(self) -> np.ndarray:
        """Seconds of every cell after the envelope; the axes in their order."""
        return np.array(self._flat).reshape([len(axis) for axis in self._axes])

    @property
    def composition(self) -> Composition:
        """How a step with prefill and decode is read."""
        return self._composition

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes."""
        prefill, pairs = load.prefill, load.pairs
        rows = load.decodes + load.drafts
        if not prefill:
            mean = load.context / load.decodes if load.decodes else 0.0
            return self._decode(rows, mean)
        past = (pairs - prefill * prefill / 2) / prefill
        if not rows:
            return max(self._base, self._prefill(prefill, past))
        mean = load.context / load.decodes
        decode = self._decode(rows, mean)
        if self._composition == "summed":
            return decode + self._prefill(prefill, past)
        return max(decode, self._mixed(rows, mean, prefill, past))

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last."""
        decodes, context = load.decodes, load.context
        if load.prefill or not decodes:
            grown = (load._replace(context=context + i * decodes) for i in range(count))
            return [self.step_time(one) for one in grown]
        rows = decodes + load.drafts
        return [self._decode(rows, (context + i * decodes) / decodes) for i in range(count)]

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of the longest chunk that can be added within a time."""
        if self.step_time(load.with_chunk(1, past)) > seconds:
            return 0
        guess = int((seconds - self.step_time(load)) / self._seconds_per_token)
        return longest_chunk(self, seconds, load, past, guess)

    def _place(self, axis: int, value: float) -> tuple[int, float]:
        """Return the offset of the cell below a value, and how far the value is in that cell."""
        values = self._axes[axis]
        if len(values) == 1:
            return 0, 0.0
        index = min(max(bisect_right(values, value) - 1, 0), len(values) - 2)
        low = values[index]
        return index * self._strides[axis], (value - low) / (values[index + 1] - low)

    def _decode(self, rows: int, mean: float) -> float:
        flat, step_b, step_k = self._flat, self._strides[0], self._strides[1]
        at_b, part_b = self._place(0, rows)
        at_k, part_k = self._place(1, mean)
        part_k = max(part_k, 0.0)
        at = at_b + at_k
        if len(self._axes[1]) == 1:
            step_k = 0
        if len(self._axes[0]) == 1:
            step_b = 0
        first = flat[at] + part_k * (flat[at + step_k] - flat[at])
        second = flat[at + step_b] + part_k * (flat[at + step_b + step_k] - flat[at + step_b])
        return first + part_b * (second - first)

    def _prefill(self, chunk: int, past: float) -> float:
        return self._corners((0,), 0.0, chunk, past)

    def _mixed(self, rows: int, mean: float, chunk: int, past: float) -> float:
        at_b, part_b = self._place(0, rows)
        at_k, part_k = self._place(1, mean)
        part_k = max(part_k, 0.0)
        step_b = self._strides[0] if len(self._axes[0]) > 1 else 0
        step_k = self._strides[1] if len(self._axes[1]) > 1 else 0
        at = at_b + at_k
        first = self._corners((at, at + step_k), part_k, chunk, past)
        if not part_b:
            return first
        second = self._corners((at + step_b, at + step_b + step_k), part_k, chunk, past)
        return first + part_b * (second - first)

    def _corners(self, ats: Sequence[int], part: float, chunk: int, past: float) -> float:
        """Interpolate over chunk and past at one or two places of the other axes."""
        flat = self._flat
        at_c, part_c = self._place(2, chunk)
        at_p, part_p = self._place(3, past)
        step_c = self._strides[2] if len(self._axes[2]) > 1 else 0
        step_p = 1 if len(self._axes[3]) > 1 else 0
        values: list[float] = []
        for start in ats:
            at = start + at_c + at_p
            low = flat[at] + part_p * (flat[at + step_p] - flat[at])
            next_at = at + step_c
            high = flat[next_at] + part_p * (flat[next_at + step_p] - flat[next_at])
            values.append(low + part_c * (high - low))
        if len(values) == 1:
            return values[0]
        return values[0] + part * (values[1] - values[0])


def _key(
    batch: float, length: float, chunk: float, past: float
) -> tuple[float, float, float, float]:
    """Name a cell by what matters: nobody's context, and what is before no chunk, do not."""
    return (
        float(batch),
        float(length) if batch else 0.0,
        float(chunk),
        float(past) if chunk else 0.0,
    )


def _cells(
    rows: Sequence[tuple[float, float, float, float, float]], name: str
) -> dict[tuple[float, float, float, float], float]:
    cells: dict[tuple[float, float, float, float], float] = {}
    bad: list[str] = []
    for batch, length, chunk, past, seconds in rows:
        key = _key(batch, length, chunk, past)
        if not (0 < seconds < float("inf")):
            bad.append(f"{_cell_name(key)} = {seconds * 1000:g} ms")
        elif cells.setdefault(key, float(seconds)) != seconds:
            raise ConfigError(
                f"{name} gives {_cell_name(key)} twice, as {cells[key] * 1000:g} and "
                f"{seconds * 1000:g} ms; leave one of them out."
            )
    if bad:
        raise ConfigError(
            f"times must be finite and above zero, but {name} has {_list(bad)}; measure again."
        )
    if not cells:
        raise ConfigError(f"{name} is empty; it needs at least one cell.")
    return cells


def _cell_name(key: tuple[float, ...]) -> str:
    batch, length, chunk, past = key
    return f"({batch:g} decodes of {length:g}, chunk {chunk:g} after {past:g})"


def _list(cells: Sequence[str]) -> str:
    more = f" and {len(cells) - _NAMED} more cells" if len(cells) > _NAMED else ""
    return ", ".join(cells[:_NAMED]) + more


def _slope(values: Sequence[float], times: np.ndarray) -> float:
    """Return the seconds per unit between the ends of an axis."""
    if len(values) == 1:
        return 0.0
    return float(times[-1] - times[0]) / (values[-1] - values[0])
