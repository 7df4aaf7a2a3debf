"""Schedules of an all-to-all between servers, and how they are made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np

from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.sharding.flash import decomposition
from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.errors import TrafficError
from jaxserve.sharding.flash.rails import assign_rails, sum_servers
from jaxserve.sharding.flash.traffic import as_counts

type Mode = Literal["auto", "halving", "bottleneck", "any", "rotation", "paper"]

_MOST: Final = int(np.iinfo(np.int64).max)
_CUTS: Final = ((32, 0), (64, 16), (_MOST, 8))
"""Up to how many servers `auto` stops where; see `cut` of `decompose`. Of a hundred servers and
more a finer decomposition takes longer than what it would save."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Arguments of `decompose` that a mode stands for; see there."""

    policy: int
    order: int = decomposition.DESCENDING
    is_choosing: bool = False
    first: int = _MOST


_RECIPES: Final[dict[str, _Recipe]] = {
    "auto": _Recipe(decomposition.HALVING, is_choosing=True),
    "halving": _Recipe(decomposition.HALVING),
    "bottleneck": _Recipe(decomposition.BOTTLENECK),
    "any": _Recipe(decomposition.ANY),
    "rotation": _Recipe(decomposition.HALVING, is_choosing=True, first=0),
    "paper": _Recipe(decomposition.ANY, order=decomposition.ASCENDING),
}
MODES: Final = get_args(Mode.__value__)


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Stages in which each server sends to one server at most, and receives from one.

    Rail k of a stage carries the k-th of m almost equal parts of its rows. Arrays are not to be
    written to.

    Attributes:
        perms: `[stages, n]`, int32: where each server sends; a permutation.
        rows: `[stages, n]`, int64: how many rows it sends there, over all rails; 0 if it idles,
            and always where it would send to itself.
        gpus: GPUs of a server (m).
        mode: How the stages were made.
        bottleneck: The largest sum of a row or column of the matrix without its diagonal (R).
        total: Rows of all stages.
        num_rotations: How many stages are rotations behind a truncated decomposition.
        seconds: What the stages take between servers by the cost model.
        moves: `[moves, 6]`, int64: rows that change their rail before they are sent, as server,
            GPU from, GPU to, server of destination, GPU of destination, rows. Empty if the plan
            was made from a matrix of servers.
    """

    perms: np.ndarray
    rows: np.ndarray
    gpus: int
    mode: str
    bottleneck: int
    total: int
    num_rotations: int
    seconds: float
    moves: np.ndarray

    @property
    def num_servers(self) -> int:
        """Servers (n)."""
        return self.perms.shape[1]

    @property
    def num_stages(self) -> int:
        """Stages (K)."""
        return self.perms.shape[0]

    @property
    def durations(self) -> np.ndarray:
        """The longest send of each stage, in rows over all rails, `[stages]`, int64."""
        return self.rows.max(axis=1, initial=0)

    def to_matrix(self) -> np.ndarray:
        """Return the rows that all stages together carry, `[n, n]`, int64."""
        n = self.num_servers
        carried = np.zeros((n, n), np.int64)
        np.add.at(carried, (np.arange(n), self.perms), self.rows)
        return carried

    def to_json(self) -> str:
        """Return the schedule as text, from which `from_json` makes an equal one."""
        values = {name: getattr(self, name) for name in self.__slots__}
        arrays = {k: v.tolist() for k, v in values.items() if isinstance(v, np.ndarray)}
        return json.dumps({**values, **arrays, "servers": self.num_servers})

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """Read what `to_json` has written.

        Raises:
            ConfigError: If the text is something else.
        """
        try:
            values: Mapping[str, Any] = json.loads(text)
            shape = (-1, values["servers"])
            return cls(
                perms=np.array(values["perms"], np.int32).reshape(shape),
                rows=np.array(values["rows"], np.int64).reshape(shape),
                gpus=values["gpus"],
                mode=values["mode"],
                bottleneck=values["bottleneck"],
                total=values["total"],
                num_rotations=values["num_rotations"],
                seconds=values["seconds"],
                moves=np.array(values["moves"], np.int64).reshape(-1, 6),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"this is no schedule ({type(error).__name__}: {error}); expected what "
                "Schedule.to_json returns."
            ) from error

    def __eq__(self, other: object) -> bool:
        """Compare all fields, arrays by their entries."""
        if not isinstance(other, Schedule):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in self.__slots__
        )

    def __hash__(self) -> int:
        """Hash the stages."""
        return hash((self.perms.tobytes(), self.rows.tobytes(), self.mode))


_NO_MOVES: Final = np.empty((0, 6), np.int64)


def plan(
    traffic: np.ndarray,
    cost: CostModel,
    mode: Mode = "auto",
    max_stages: int | None = None,
) -> Schedule:
    """Plan an all-to-all between servers.

    Args:
        traffic: Rows that server i has for server j, `[n, n]`, the diagonal being ignored; or rows
            that each GPU has for each GPU, `[n, m, n, m]`, from which moves between rails are
            planned as well. Whole numbers; rows are bytes unless `cost` says otherwise
            (`CostModel.per_row`).
        cost: What links cost.
        mode: `auto`: a decomposition by falling thresholds, truncated where rotations for the rest
            are cheapest by the cost model. `halving`, `bottleneck`, `any`: a whole decomposition
            whose threshold is halved, falls as little as possible, or is 1. `rotation`: rotations
            only. `paper`: the published algorithm, whose matchings are any and whose stages ascend.
        max_stages: Stages at most; decompositions are then truncated as by `auto`.

    Returns:
        The schedule. Its stages carry the matrix exactly, none is empty, and equal inputs give
        equal schedules.

    Raises:
        TrafficError: If the matrix is not square, not whole, negative, or too large for int64.
        ConfigError: If the mode is unknown, or so few stages cannot be.

    Source: FLASH, arXiv 2505.09764, sections on intra-server balancing and on stages from
        Birkhoff's decomposition.
    Differs: Thresholds, truncation and the descending order are ours; `mode="paper"` has none of
        them. That the published stages ascend is our reading.

    >>> plan(np.array([[0, 4], [2, 0]]), CostModel()).rows.tolist()
    [[4, 2]]
    """
    recipe = _RECIPES.get(mode)
    if recipe is None:
        raise ConfigError(
            f"mode must be one of {', '.join(MODES)}, got {mode!r}." + did_you_mean(mode, MODES)
        )
    counts = traffic
    if not (
        type(counts) is np.ndarray
        and counts.dtype == np.int64
        and counts.ndim == 2
        and 0 < counts.shape[0] == counts.shape[1]
        and counts.flags.c_contiguous
    ):
        counts = as_counts(traffic, cost)
    moves = _NO_MOVES
    if counts.ndim == 4:
        moves = assign_rails(counts).moves
        counts = sum_servers(counts)
    is_choosing = recipe.is_choosing
    if max_stages is not None:
        if max_stages < 1:
            raise ConfigError(f"max_stages must be at least 1, got {max_stages}; leave it out.")
        is_choosing = True
    said, perms, rows, bottleneck, total, rotations, seconds = decomposition.decompose(
        counts,
        recipe.policy,
        recipe.order,
        is_choosing,
        recipe.first,
        next(cut for most, cut in _CUTS if len(counts) <= most) if mode == "auto" else 0,
        _MOST if max_stages is None else max_stages,
        1 / (cost.gpus * cost.out_rate),
        cost.out_latency,
    )
    if said:
        raise _error(said, counts, bottleneck, total, max_stages)
    return Schedule(perms, rows, cost.gpus, mode, bottleneck, total, rotations, seconds, moves)


def _error(
    said: int, counts: np.ndarray, first: int, second: int, max_stages: int | None
) -> ConfigError:
    if said == decomposition.NEGATIVE:
        return TrafficError(
            f"numbers of rows must be 0 or more, got {counts[first, second]} from {first} to "
            f"{second}; count what is sent."
        )
    if said == decomposition.TOO_LARGE:
        return TrafficError(
            f"the rows of all pairs must be fewer than 2**63 in sum, which {counts[first, second]} "
            f"from {first} to {second} exceeds; count in larger units."
        )
    return ConfigError(
        f"max_stages={max_stages} is too few for this matrix; {first} would do. Raise it, or "
        "leave it out."
    )
