"""Times of steps of an engine whose shapes are fixed: every step is padded to a bucket."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxserve.core.cost import StepLoad
from jaxserve.core.errors import ConfigError

_NAMED = 5
"""Most cells that a message names one by one."""
_MOST_TOKENS = 1 << 22

Cells = Sequence[tuple[int, int, float]]
"""Rows, prompt or draft tokens, and seconds of each bucket."""


@dataclass(frozen=True, slots=True)
class _Grid:
    """Seconds by rows and tokens, both padded up to the next size."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def time(self, rows: int, tokens: int) -> float:
        """Return the seconds of a bucket; past the last one they grow in a straight line."""
        at, column = bisect_left(self.rows, rows), bisect_left(self.tokens, tokens)
        scale = 1.0
        if at == len(self.rows):
            at -= 1
            scale = rows / self.rows[at]
        if column == len(self.tokens):
            column -= 1
            scale *= tokens / self.tokens[column]
        seconds = self.seconds[at][column]
        return seconds if scale == 1.0 else seconds * scale


class BucketCost:
    """A time for each step shape, and straight lines for what attention reads in it.

    Args:
        decode: Steps of decodes: rows, 0, seconds.
        mixed: Steps with prompts: rows, prompt tokens, seconds; every size of one with every size
            of the other.
        drafted: Steps with drafts: rows, draft tokens, seconds. Empty takes each draft token for
            one more decode.
        context: Seconds per token that decodes attend to.
        pair: Seconds per query-key pair of prompts.
        draft_step: Seconds per step of a draft model.
        name: What to call the table in messages.

    Attributes:
        enveloped: Buckets that were quicker than a smaller one, as text; they were raised to its
            time, so that times are monotone.

    Raises:
        ConfigError: For a cell that is missing, or a time that is not a number above zero.
    """

    def __init__(
        self,
        *,
        decode: Cells,
        mixed: Cells,
        drafted: Cells = (),
        context: float = 0.0,
        pair: float = 0.0,
        draft_step: float = 0.0,
        name: str = "cost table",
    ) -> None:
        """Check every cell and make the grids monotone."""
        for what, slope in (("context", context), ("pair", pair), ("draft_step", draft_step)):
            if not (math.isfinite(slope) and slope >= 0):
                raise ConfigError(
                    f"{what} of {name} must be a number of seconds, zero or more, got {slope!r}; "
                    "measure again."
                )
        found = [*_cells("decode", decode, name), *_cells("mixed", mixed, name)]
        found += _cells("drafted", drafted, name)
        bad = [
            f"{cell} = {seconds * 1000:g} ms" for cell, seconds in found if not _is_time(seconds)
        ]
        if bad:
            raise ConfigError(
                f"times must be finite and above zero, but {name} has {_list(bad)}; measure again."
            )
        raised: list[str] = []
        self._decode = _grid("decode", decode, None, raised, name)
        self._mixed = _grid("mixed", mixed, self._decode, raised, name)
        self._drafted = _grid("drafted", drafted, self._decode, raised, name) if drafted else None
        self._decode_rows = self._decode.rows
        self._decode_seconds = tuple(line[0] for line in self._decode.seconds)
        self.enveloped = tuple(raised)
        self._context = context
        self._pair = pair
        self._draft_step = draft_step

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers of rows, and of prompt tokens, to which steps are padded."""
        rows = sorted({*self._decode.rows, *self._mixed.rows})
        return tuple(rows), tuple(size for size in self._mixed.tokens if size)

    def to_json(self) -> dict[str, object]:
        """Return the arguments that make this model, for a file."""
        return {
            "decode": _flat(self._decode),
            "mixed": _flat(self._mixed),
            "drafted": [] if self._drafted is None else _flat(self._drafted),
            "context": self._context,
            "pair": self._pair,
            "draft_step": self._draft_step,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, object], name: str = "cost table") -> "BucketCost":
        """Return the model of what `to_json` has returned.

        Raises:
            ConfigError: If a field is missing, unknown or of another form.
        """
        known = {"decode", "mixed", "drafted", "context", "pair", "draft_step"}
        if set(fields) != known:
            raise ConfigError(
                f"{name} must have exactly the fields {', '.join(sorted(known))}, got "
                f"{', '.join(sorted(fields)) or 'none'}; write it with `jaxserve profile`."
            )
        given = cast("dict[str, Any]", dict(fields))
        try:
            decode, mixed, drafted = (
                [(int(rows), int(tokens), float(seconds)) for rows, tokens, seconds in given[part]]
                for part in ("decode", "mixed", "drafted")
            )
            context, pair, step = (float(given[k]) for k in ("context", "pair", "draft_step"))
        except (TypeError, ValueError):
            raise ConfigError(
                f"{name} must hold lists of [rows, tokens, seconds] and numbers; write it with "
                "`jaxserve profile`."
            ) from None
        return cls(
            decode=decode,
            mixed=mixed,
            drafted=drafted,
            context=context,
            pair=pair,
            draft_step=step,
            name=name,
        )

    def bucket(self, load: StepLoad) -> tuple[str, int, int]:
        """Name the bucket that a step is padded to: its kind, rows and tokens."""
        if load.prefill:
            grid, rows, tokens = self._mixed, load.decodes + load.prefills, load.prefill
            kind = "mixed"
        elif load.drafts and self._drafted is not None:
            grid, rows, tokens, kind = self._drafted, load.decodes, load.drafts, "drafted"
        else:
            grid, rows, tokens, kind = self._decode, load.decodes + load.drafts, 0, "decode"
        at = min(bisect_left(grid.rows, rows), len(grid.rows) - 1)
        column = min(bisect_left(grid.tokens, tokens), len(grid.tokens) - 1)
        return kind, grid.rows[at], grid.tokens[column]

    def _base(self, load: StepLoad) -> float:
        prefill, _, prefills, _, decodes, _, drafts, draft_steps = load
        if prefill:
            seconds = self._mixed.time(decodes + prefills, prefill)
        elif drafts and self._drafted is not None:
            seconds = self._drafted.time(decodes, drafts)
        else:
            seconds = self._decode.time(decodes + drafts, 0)
        return seconds + self._draft_step * draft_steps if draft_steps else seconds

    def step_time(self, load: StepLoad) -> float:
        """Return the seconds that a step takes."""
        prefill, pairs, prefills, _, decodes, context, drafts, draft_steps = load
        if not (prefill or drafts):
            rows, table = self._decode_rows, self._decode_seconds
            at = bisect_left(rows, decodes)
            base = table[at] if at < len(table) else self._decode.time(decodes, 0)
        elif prefill and not draft_steps:
            grid = self._mixed
            at = bisect_left(grid.rows, decodes + prefills)
            column = bisect_left(grid.tokens, prefill)
            if at < len(grid.rows) and column < len(grid.tokens):
                base = grid.seconds[at][column]
            else:
                base = grid.time(decodes + prefills, prefill)
        else:
            base = self._base(load)
        return base + self._pair * pairs + self._context * context

    def decode_times(self, load: StepLoad, count: int) -> Sequence[float]:
        """Return the seconds of `count` steps of decodes, each a token longer than the last."""
        fixed = self._base(load) + self._pair * load.pairs
        decodes, context, slope = load.decodes, load.context, self._context
        return [fixed + slope * (context + i * decodes) for i in range(count)]

    def prefill_within(self, seconds: float, load: StepLoad, past: int = 0) -> int:
        """Return the length of the longest chunk that can be added within a time."""
        grid, before = self._mixed, load.prefill
        rows = load.decodes + load.prefills + 1
        fixed = self._pair * load.pairs + self._context * load.context
        fixed += self._draft_step * load.draft_steps
        last = grid.tokens[-1]
        base = grid.time(rows, last)
        # Past the last bucket the time grows with every token, in it and below by pairs alone.
        slope, least = base / last, max(1, last - before + 1)
        most = self._solve(seconds - fixed - base + slope * (last - before), slope, past)
        if most >= least:
            return self._settle(seconds, load, past, most, least)
        at = bisect_left(grid.rows, rows)
        if at < len(grid.rows):
            times = grid.seconds[at]
        else:
            times = tuple(grid.time(rows, size) for size in grid.tokens)
        for column in range(bisect_right(times, seconds - fixed) - 1, -1, -1):
            size = grid.tokens[column]
            least = 1 if column == 0 else max(1, grid.tokens[column - 1] - before + 1)
            if size - before < least:
                continue
            most = min(size - before, self._solve(seconds - fixed - times[column], 0.0, past))
            if most >= least:
                found = self._settle(seconds, load, past, most, least)
                if found:
                    return found
        return 0

    def _solve(self, left: float, slope: float, past: int) -> int:
        """Return the largest n whose attention, and n times `slope`, take at most `left`."""
        if left < 0:
            return 0
        square, line = self._pair / 2, self._pair * past + slope
        if square:
            n = (math.sqrt(line * line + 4 * square * left) - line) / (2 * square)
        elif line:
            n = left / line
        else:
            return _MOST_TOKENS
        return min(_MOST_TOKENS, int(n))

    def _settle(self, seconds: float, load: StepLoad, past: int, most: int, least: int) -> int:
        """Undo what rounding has done; 0 if not even the shortest chunk of the bucket fits."""
        while most >= least and self.step_time(load.with_chunk(most, past)) > seconds:
            most -= 1
        if most < least:
            return 0
        while most < _MOST_TOKENS and self.step_time(load.with_chunk(most + 1, past)) <= seconds:
            most += 1
        return most


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0


def _cells(kind: str, cells: Cells, name: str) -> list[tuple[str, float]]:
    if not cells and kind != "drafted":
        raise ConfigError(f"{name} has no {kind} steps; measure the whole grid.")
    return [(_cell(kind, rows, tokens), seconds) for rows, tokens, seconds in cells]


def _cell(kind: str, rows: int, tokens: int) -> str:
    return f"({kind}, {rows} rows, {tokens} tokens)"


def _list(cells: Sequence[str]) -> str:
    more = f" and {len(cells) - _NAMED} more cells" if len(cells) > _NAMED else ""
    return ", ".join(cells[:_NAMED]) + more


def _grid(kind: str, cells: Cells, floor: _Grid | None, raised: list[str], name: str) -> _Grid:
    """Bring cells into a grid whose times never fall with more rows or tokens."""
    rows, tokens = sorted({r for r, _, _ in cells}), sorted({t for _, t, _ in cells})
    known = {(r, t): seconds for r, t, seconds in cells}
    ragged = kind == "drafted"
    missing = [_cell(kind, r, t) for r in rows for t in tokens if (r, t) not in known]
    if missing and not ragged:
        raise ConfigError(f"{name} has no value for {_list(missing)}; measure the whole grid.")
    grid: list[tuple[float, ...]] = []
    for at, row in enumerate(rows):
        line: list[float] = []
        for column, size in enumerate(tokens):
            below = [grid[at - 1][column]] if at else []
            below += [line[-1]] if line else []
            if floor is not None and not column:
                below.append(floor.time(row, 0))
            least = max(below, default=0.0)
            seconds = known.get((row, size))
            if seconds is None:  # rows draft in steps of their own sizes; the next one is padded to
                more = [known[row, t] for t in tokens[column:] if (row, t) in known]
                seconds = more[0] if more else least
            elif seconds < least:
                raised.append(_cell(kind, row, size))
            line.append(max(seconds, least))
        grid.append(tuple(line))
    return _Grid(tuple(rows), tuple(tokens), tuple(grid))


def _flat(grid: _Grid) -> list[list[float]]:
    return [
        [row, size, grid.seconds[at][column]]
        for at, row in enumerate(grid.rows)
        for column, size in enumerate(grid.tokens)
    ]
