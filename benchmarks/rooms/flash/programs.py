"""From a matrix of bytes and an algorithm to what each GPU sends, in which order, over which GPUs.

Bytes of a pair of GPUs are cut into pieces. A piece has a way: the GPU that has it, perhaps another
of its server, on whose rail it crosses, perhaps another of the receiver's server, and the GPU that
it is for. Pieces that cross together, from one GPU to one other, make a message.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

from jaxserve.sharding.flash import CostModel, plan
from jaxserve.sharding.flash.rails import assign_rails
from jaxserve.sharding.flash.schedule import Schedule

type Algorithm = Literal["direct", "source rail", "balanced", "flash"]
MOST: Final = 32 * 1024
"""Bytes of a piece at most, so that it can be passed on while others come in."""


@dataclass
class Program:
    """What one GPU does.

    Attributes:
        inside: Pieces that it sends inside its server first, by number.
        messages: Pieces that it sends between servers, a message each, in order.
        in_flight: Messages under way at a time; 0: all.
        expected: Bytes that it gets in the end.
    """

    inside: list[int] = field(default_factory=list)
    messages: list[list[int]] = field(default_factory=list)
    in_flight: int = 0
    expected: int = 0


@dataclass
class Piece:
    """Some bytes of a pair of GPUs: where they are among them, and their way."""

    way: list[int]
    first: int
    count: int


class _Intervals:
    """Bytes of a rail between two servers that wait to be sent, in order."""

    def __init__(self) -> None:
        self.items: list[list[int]] = []  # GPU that has them, final GPU, first byte, bytes

    def take(self, count: int) -> list[list[int]]:
        taken: list[list[int]] = []
        while count and self.items:
            item = self.items[0]
            size = min(count, item[3], MOST)
            taken.append([item[0], item[1], item[2], size])
            item[2] += size
            item[3] -= size
            count -= size
            if not item[3]:
                self.items.pop(0)
        return taken


def compile_programs(
    traffic: np.ndarray, algorithm: Algorithm, cost: CostModel, *, in_flight: int = 2
) -> tuple[list[Piece], list[Program], Schedule | None]:
    """Return all pieces, what each GPU does, and the schedule, if it is FLASH's.

    Args:
        traffic: Bytes, `[n, m, n, m]`; those inside servers are left out, as all algorithms send
            them alike.
        algorithm: `direct` sends each piece to its final GPU; `source rail` crosses on the rail of
            the GPU that has it; `balanced` levels rails first; `flash` does, and sends in stages.
        cost: Links, for the plan.
        in_flight: Messages of a GPU under way at a time, for `flash`.
    """
    n, m = traffic.shape[:2]
    traffic = traffic.copy()
    traffic[np.arange(n), :, np.arange(n)] = 0
    pieces: list[Piece] = []
    programs = [Program() for _ in range(n * m)]
    for (_, _, j, final), count in np.ndenumerate(traffic):
        programs[j * m + final].expected += int(count)
    if algorithm in ("direct", "source rail"):
        for i, k, j, final in np.argwhere(traffic).tolist():
            landing = final if algorithm == "direct" else k
            _add(
                pieces,
                programs,
                _cut(i, k, j, landing, final, traffic),
                (i * m + k, j * m + landing),
            )
        _merge(programs, pieces)
        return pieces, programs, None
    schedule = plan(traffic, cost) if algorithm == "flash" else None
    rails = _level(traffic)
    if schedule is None:
        for (i, j, rail), waiting in rails.items():
            _emit(pieces, programs, waiting.take(1 << 60), (i, j, rail), m)
    else:
        left = {pair: sum(item[3] for item in waiting.items) for pair, waiting in rails.items()}
        remaining = schedule.to_matrix()
        for perm, rows in zip(schedule.perms, schedule.rows, strict=True):
            for i, (j, count) in enumerate(zip(perm.tolist(), rows.tolist(), strict=True)):
                if not count:
                    continue
                remaining[i, j] -= count
                for rail in range(m):
                    share = count // m + (rail < count % m)
                    size = left[i, j, rail] if not remaining[i, j] else min(share, left[i, j, rail])
                    left[i, j, rail] -= size
                    _emit(pieces, programs, rails[i, j, rail].take(size), (i, j, rail), m)
        for program in programs:
            program.in_flight = in_flight
    return pieces, programs, schedule


def _cut(i: int, k: int, j: int, landing: int, final: int, traffic: np.ndarray) -> list[Piece]:
    m, total = traffic.shape[1], int(traffic[i, k, j, final])
    way = [i * m + k, j * m + landing, *([j * m + final] if landing != final else [])]
    return [Piece(way, first, min(MOST, total - first)) for first in range(0, total, MOST)]


def _add(
    pieces: list[Piece], programs: list[Program], new: list[Piece], crossing: tuple[int, int]
) -> None:
    """Add pieces as a message of who crosses."""
    if not new:
        return
    numbers = list(range(len(pieces), len(pieces) + len(new)))
    pieces += new
    programs[crossing[0]].messages.append(numbers)
    for number, piece in zip(numbers, new, strict=True):
        if piece.way[0] != crossing[0]:
            programs[piece.way[0]].inside.append(number)


def _merge(programs: list[Program], pieces: list[Piece]) -> None:
    """Make one message of all that a GPU sends to one other, in turns between final GPUs."""
    for gpu, program in enumerate(programs):
        by_other: dict[int, list[int]] = {}
        for message in program.messages:
            by_other.setdefault(pieces[message[0]].way[1], []).extend(message)
        # Others begin elsewhere, so that not all send to the same one first.
        order = sorted(by_other, key=lambda other: (other - gpu) % len(programs))
        program.messages = [by_other[other] for other in order]


def _level(traffic: np.ndarray) -> dict[tuple[int, int, int], _Intervals]:
    """Return what waits on each rail between two servers, after the balance."""
    n, m = traffic.shape[:2]
    rails = {
        (i, j, rail): _Intervals()
        for i in range(n) for j in range(n) if i != j for rail in range(m)
    }  # fmt: skip
    left = traffic.copy()
    moved: list[tuple[tuple[int, int, int], list[int]]] = []
    for i, k, to, j, final, count in assign_rails(traffic).moves.tolist():
        left[i, k, j, final] -= count
        moved.append(((i, j, to), [i * m + k, j * m + final, int(left[i, k, j, final]), count]))
    for i, k, j, final in np.argwhere(left).tolist():
        rails[i, j, k].items.append([i * m + k, j * m + final, 0, int(left[i, k, j, final])])
    for pair, item in moved:  # last, as they have to come over first
        rails[pair].items.append(item)
    return rails


def _emit(
    pieces: list[Piece],
    programs: list[Program],
    taken: list[list[int]],
    pair: tuple[int, int, int],
    m: int,
) -> None:
    i, j, rail = pair
    new: list[Piece] = []
    for source, final, first, count in taken:
        way = [source, i * m + rail, j * m + rail, final]
        way = [hop for at, hop in enumerate(way) if not at or hop != way[at - 1]]
        new.append(Piece(way, first, count))
    _add(pieces, programs, new, (i * m + rail, j * m + rail))


def as_json(pieces: list[Piece], programs: list[Program]) -> dict[str, Any]:
    """Return both as JSON's values."""
    return {
        "pieces": [[piece.way, piece.first, piece.count] for piece in pieces],
        "programs": [asdict(program) for program in programs],
    }
