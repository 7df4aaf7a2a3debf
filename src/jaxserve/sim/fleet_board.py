"""What the loop of a simulated fleet keeps besides servers: settings, results, a heap of events."""

from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import inlined, lean
from jaxserve.scheduling.polyserve.state import NOBODY, Records, Rules

LATE_FIRST, LATE_TOKEN, LATE_GAP, DECLINED = 1, 2, 4, 8
"""Bits of what a request missed: its first token's deadline, a later one's, a gap, everything."""


class Setup(NamedTuple):
    """What stays as it is during a run.

    Attributes:
        kind: Which router; see `packing.py`.
        is_split: 1 if prompts and further tokens are computed on different servers.
        budget: Most tokens of a step; 0 follows slack.
        by_deadline: 1 if prompts are computed in the order in which they are due, else of arrival.
        sheds: 1 if prompts that can no longer be in time are dropped.
        promotes: 1 if tighter tiers may host looser ones' requests.
        jumps: 1 if steps of decodes are done at once.
        scales: 1 if servers are let drain, started and turned off.
        tick: Seconds between checks of the scaler.
        hold: Checks in a row at which it must hold that a server can be spared.
        cooldown: Seconds between two of a row's changes.
        most: Load that the survivors may have.
        share: Share of a row that may be let drain at once.
        reserve: Warm idle servers; servers are neither started nor turned off if this is below 0.
        start: Seconds that a server takes to start.
    """

    kind: int
    is_split: int
    budget: int
    by_deadline: int
    sheds: int
    promotes: int
    jumps: int
    scales: int
    tick: float
    hold: int
    cooldown: float
    most: float
    share: float
    reserve: int
    start: float


RESULT = np.dtype(
    [
        ("first", "f8"), ("finish", "f8"), ("last", "f8"), ("missed", "i8"), ("server", "i8"),
        ("preemptions", "i8"),
    ]
)  # fmt: skip
"""What became of a request.

* `first`: when the first token came; not a number without one; `finish`: when the last one came.
* `missed`: bits of what was missed.
* `server`: where the last token was made, or `NOBODY`.
* `last`: when the latest token came, where the next one's gap has to be looked at.
* `preemptions`: how often it lost its pages.
"""


DESK = np.dtype(
    [
        ("began", "f8"), ("key", "f8"), ("up_at", "f8"), ("on_since", "f8"), ("tail", "i8"),
        ("fresh", "i8"), ("heap", "i8"), ("spot", "i8"), ("scratch", "i8"),
    ]
)  # fmt: skip
"""What the loop keeps of a server.

* `began`: when the step under way began.
* `key`: when its event is due; `heap`: servers by that; `spot`: where it stands there, or `NOBODY`.
* `up_at`: when it is there, if it starts; `on_since`: since when it is paid for.
* `tail`: last request in the queue of its prompts.
* `fresh`: decodes whose next gap does not begin with its last step.
* `scratch`: for lists of servers.
"""


LINE = np.dtype([("queue", "i8"), ("waiting", "i8"), ("coming", "i8")])
"""A queue of the router: the first in it, or `NOBODY`, and its length; and how many requests of the
tier are with servers that compute prompts only."""


class Board(NamedTuple):
    """What the loop keeps besides.

    Attributes:
        desk: `[servers]` of `DESK`.
        lines: `[tiers + 1]` of `LINE`; the last is of prompts.
        seed: `[2]`: of random numbers, and whose turn it is.
        whole: `[9]`: counts, whose places are named below.
        real: `[2]`: seconds paid for, time of the last event.
    """

    desk: Records
    lines: Records
    seed: np.ndarray
    whole: np.ndarray
    real: np.ndarray


SIZE, STEPS, DONE, EVENTS, DRAINED, PROMOTED, STARTED, TICKS, HANDED = range(9)
"""Places of `Board.whole`: length of the heap, steps, requests done, events, servers let drain,
promotions, servers started, checks, and the first whose prompt has just been computed elsewhere."""


@lean
def _sift(bd: Board, at: int) -> None:
    """Move one server of the heap to where its key belongs."""
    heap, key, spot = bd.desk.heap, bd.desk.key, bd.desk.spot
    s = heap[at]
    while at > 0:
        above = (at - 1) >> 1
        other = heap[above]
        if key[other] < key[s] or (key[other] == key[s] and other < s):
            break
        heap[at] = other
        spot[other] = at
        at = above
    size = bd.whole[SIZE]
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        other = heap[below]
        if below + 1 < size:
            right = heap[below + 1]
            if key[right] < key[other] or (key[right] == key[other] and right < other):
                below, other = below + 1, right
        if key[s] < key[other] or (key[s] == key[other] and s < other):
            break
        heap[at] = other
        spot[other] = at
        at = below
    heap[at] = s
    spot[s] = at


@lean
def set_event(bd: Board, s: int, time: float) -> None:
    """Set the time of a server's next event."""
    bd.desk.key[s] = time
    if bd.desk.spot[s] == NOBODY:
        bd.desk.heap[bd.whole[SIZE]] = s
        bd.desk.spot[s] = bd.whole[SIZE]
        bd.whole[SIZE] += 1
    _sift(bd, bd.desk.spot[s])


@inlined
def drop_event(bd: Board, s: int) -> None:
    """Let a server wait for no event."""
    at = bd.desk.spot[s]
    if at == NOBODY:
        return
    bd.whole[SIZE] -= 1
    last = bd.desk.heap[bd.whole[SIZE]]
    bd.desk.spot[s] = NOBODY
    if last != s:
        bd.desk.heap[at] = last
        bd.desk.spot[last] = at
        _sift(bd, at)


@lean
def end_request(rules: Rules, rq: Records, bd: Board, out: Records, r: int, t: float) -> None:
    """Note down the end of a request that got all of its tokens."""
    out.finish[r] = t
    bd.whole[DONE] += 1
    k = rq.tier[r]
    rules.means.finished[k] += 1
    rules.means.output[k] += (rq.output[r] - rules.means.output[k]) / rules.means.finished[k]


@lean
def decline(bd: Board, out: Records, r: int, t: float) -> None:
    """Note down that a request was refused."""
    out.missed[r] |= DECLINED
    out.finish[r] = t
    bd.whole[DONE] += 1
