"""Which server a request goes to: tier bins, packed so that load falls from server to server.

Source: PolyServe (arXiv 2507.17769): fullest server first, then one from the pool, then tighter
tiers (lazy promotion).
"""

from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import lean
from jaxserve.scheduling.polyserve.admission import TAKES, admits, steady_seconds
from jaxserve.scheduling.polyserve.state import (
    DECODE,
    DRAINING,
    NOBODY,
    POOLED,
    PREFILL,
    SERVING,
    WHOLE,
    Records,
    Rules,
    Servers,
)
from jaxserve.scheduling.step_times import StepTimes, step_seconds


class Gradient(NamedTuple):
    """The servers of every tier, fullest first.

    Attributes:
        order: `[tiers + 1, servers]`: the last row has those that compute prompts only.
        filled: `[tiers + 1]`: how many of a row are in use.
    """

    order: np.ndarray
    filled: np.ndarray


def empty_gradient(servers: int, tiers: int) -> Gradient:
    """Return a gradient without servers."""
    return Gradient(np.full((tiers + 1, servers), NOBODY), np.zeros(tiers + 1, np.int64))


@lean
def load_of(times: StepTimes, rules: Rules, sv: Servers, s: int) -> float:
    """Return how full a server is: the largest of its shares of pace, cache and seats.

    A prompt that is not computed counts as a sequence that decodes, and its tokens as read; the
    share of pace is that of what an empty step leaves, and holds the prompts that come with as many
    decodes in the long run.
    """
    many = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s]
    if sv.one.stage[s] == PREFILL:
        return sv.one.pending_tokens[s] / rules.max_tokens
    context = sv.one.known[s] + sv.one.pending_tokens[s] + sv.one.joining_tokens[s]
    if many == 0:
        return 0.0
    tier = sv.one.label[s] if sv.one.label[s] >= 0 else rules.means.size - 1
    share = 1.0 if sv.one.stage[s] == WHOLE else 0.0
    empty = step_seconds(times, 0, 0.0, 0, 0, 0, 0)
    used = steady_seconds(times, rules, tier, many, context, share) - empty
    load = used / max(rules.means.tau[tier] - empty, 1e-6)
    return max(load, context / rules.capacity, many / rules.seats)


@lean
def enter(gr: Gradient, sv: Servers, s: int, row: int) -> None:
    """Put a server into a row, behind those that are as full."""
    sv.one.row[s] = row
    sv.one.place[s] = gr.filled[row]
    gr.order[row, gr.filled[row]] = s
    gr.filled[row] += 1
    move(gr, sv, s)


@lean
def leave(gr: Gradient, sv: Servers, s: int) -> None:
    """Take a server out of its row."""
    row = sv.one.row[s]
    if row == NOBODY:
        return
    for i in range(sv.one.place[s], gr.filled[row] - 1):
        other = gr.order[row, i + 1]
        gr.order[row, i] = other
        sv.one.place[other] = i
    gr.filled[row] -= 1
    sv.one.row[s] = NOBODY


@lean
def move(gr: Gradient, sv: Servers, s: int) -> None:
    """Move a server to where its load belongs; loads change little at a time."""
    row = sv.one.row[s]
    if row == NOBODY:
        return
    i, load = sv.one.place[s], sv.one.load[s]
    while i > 0 and sv.one.load[gr.order[row, i - 1]] < load:
        other = gr.order[row, i - 1]
        gr.order[row, i] = other
        sv.one.place[other] = i
        i -= 1
    while i < gr.filled[row] - 1 and sv.one.load[gr.order[row, i + 1]] > load:
        other = gr.order[row, i + 1]
        gr.order[row, i] = other
        sv.one.place[other] = i
        i += 1
    gr.order[row, i] = s
    sv.one.place[s] = i


@lean
def label(gr: Gradient, sv: Servers, s: int, row: int, tiers: int) -> None:
    """Take a server out of the pool for a tier, or for prompts."""
    sv.one.state[s] = SERVING
    sv.one.label[s] = row if row < tiers else NOBODY
    enter(gr, sv, s, row)


@lean
def probe(
    times: StepTimes,
    rules: Rules,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    row: int,
    r: int,
    now: float,
    guard: float,
) -> int:
    """Return the fullest server of a row that takes a request, or `NOBODY`.

    Whoever has no room for one more decode is passed over at the cost of a multiplication. The next
    `max_probes` are asked in turn; further down steps grow, and the last is always asked.
    """
    count = gr.filled[row]
    asked, i, stride = 0, 0, 1
    pace = np.inf if row >= rules.means.size else guard * rules.means.tau[row]
    while i < count:
        s = gr.order[row, i if rules.packs else count - 1 - i]
        many = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s] + 1
        context = sv.one.known[s] + sv.one.pending_tokens[s] + rq.total[r]
        if many <= rules.seats and (
            pace == np.inf or step_seconds(times, 0, 0.0, 0, 0, many, context) <= pace
        ):
            if admits(times, rules, rq, sv, s, r, now, guard) == TAKES:
                return s
            asked += 1
            if asked > rules.max_probes:
                stride += stride // 2 + 1
            if i < count - 1:
                i = min(i + stride, count - 1)
                continue
        i += 1
    return NOBODY


@lean
def is_backed_up(
    rules: Rules, rq: Records, sv: Servers, gr: Gradient, r: int, now: float, ahead: np.ndarray
) -> bool:
    """Tell whether servers of further tokens will have no room for a request when it comes there.

    For fleets in which others compute the prompts. By then those have ended who are about to; what
    servers are short of is taken to be in proportion to how many they serve.

    Args:
        rules: The policy's.
        rq: Requests.
        sv: Servers.
        gr: The gradient.
        r: A request whose prompt is not computed.
        now: Clock time in seconds.
        ahead: `[tiers]`: requests that will be there earlier.
    """
    tier = rq.tier[r]
    if gr.filled[tier] == 0 or take_pooled(sv, DECODE) != NOBODY:
        return False
    room, wanted = 0.0, 1
    for row in range(tier + 1):  # tighter ones may host it, but for those of their own
        many, load = 0, 0.0
        for i in range(gr.filled[row]):
            s = gr.order[row, i]
            many += sv.one.decodes[s] + sv.one.joining[s]
            load += sv.one.load[s]
        if row == tier and many == 0:
            return False
        wanted += ahead[row]
        seconds = rules.means.output[row] * rules.means.tau[row]
        room += many * max(0.0, rq.due[r] - now) / seconds
        if load > 0:
            share = 1.0 if row == tier else rules.guard
            room += (share * gr.filled[row] - load) * many / load
    return wanted > room


@lean
def take_pooled(sv: Servers, stage: int) -> int:
    """Return an idle warm server of a stage, or `NOBODY`."""
    for s in range(sv.one.state.size):
        if sv.one.state[s] == POOLED and sv.one.stage[s] == stage:
            return s
    return NOBODY


@lean
def take_spare(sv: Servers, gr: Gradient, row: int, stage: int) -> int:
    """Return a server that can be had at once, or `NOBODY`; it is not in any row.

    From the pool; or one that the row itself lets drain; or one without work from another row, if
    that row keeps another.
    """
    s = take_pooled(sv, stage)
    if s != NOBODY:
        return s
    for i in range(sv.one.state.size):
        if sv.one.state[i] == DRAINING and sv.one.stage[i] == stage and sv.one.label[i] == row:
            return i
    for other in range(gr.filled.size):
        count = gr.filled[other]
        if other != row and count > 1:
            s = gr.order[other, count - 1]
            is_free = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s] == 0
            if is_free and sv.one.stage[s] == stage:
                leave(gr, sv, s)
                return s
    return NOBODY


@lean
def route(
    times: StepTimes,
    rules: Rules,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    r: int,
    now: float,
    stage: int,
    promotes: bool,  # noqa: FBT001  compiled functions have no keywords
) -> int:
    """Place a request, or let it wait.

    Args:
        times: Times of steps, raised by the margin that is wanted.
        rules: The policy's.
        rq: Requests.
        sv: Servers; one that is taken from the pool gets its label.
        gr: The gradient.
        r: The request.
        now: Clock time in seconds.
        stage: Which servers are wanted.
        promotes: Whether tighter tiers are asked once the own one is full and the pool is empty.

    A tier that has no server, and none tighter than itself, takes one over from looser ones if it
    can keep the new pace. Nobody is shut out by that, since looser requests may stay and be hosted;
    without it a fleet of fewer servers than tiers would never serve its tightest requests.

    Returns:
        The server, or `NOBODY` if none takes it now.
    """
    tiers = rules.means.size
    row = tiers if stage == PREFILL else rq.tier[r]
    s = probe(times, rules, rq, sv, gr, row, r, now, 1.0)
    if s != NOBODY:
        return s
    s = take_spare(sv, gr, row, stage)
    if s != NOBODY:
        label(gr, sv, s, row, tiers)
        if admits(times, rules, rq, sv, s, r, now, 1.0) == TAKES:
            return s
        return NOBODY
    if promotes and stage != PREFILL:
        for tighter in range(row - 1, -1, -1):
            s = probe(times, rules, rq, sv, gr, tighter, r, now, rules.guard)
            if s != NOBODY:
                return s
    return _take_over(times, rules, rq, sv, gr, r, now, row)


@lean
def _take_over(
    times: StepTimes,
    rules: Rules,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    r: int,
    now: float,
    row: int,
) -> int:
    """Give a looser server to a tier that nobody can serve; returns it, or `NOBODY`."""
    tiers = rules.means.size
    if row >= tiers - 1:
        return NOBODY
    for tighter in range(row + 1):
        if gr.filled[tighter] > 0:
            return NOBODY
    for looser in range(row + 1, tiers):
        s = probe(times, rules, rq, sv, gr, looser, r, now, 1.0)
        if s != NOBODY:
            leave(gr, sv, s)
            label(gr, sv, s, row, tiers)
            return s
    return NOBODY


# Rivals: one number per server, the least wins. All of them place at once.
(RANDOM, ROUND_ROBIN, LEAST_REQUESTS, LEAST_KV, POWER_OF_TWO, HEADROOM, STATIC, FREENESS) = range(8)
POLYSERVE = 8


@lean
def draw(seed: np.ndarray) -> int:
    """Draw a number of 23 bits (a linear congruential generator of 31)."""
    seed[0] = (seed[0] * 1103515245 + 12345) & 0x7FFFFFFF
    return seed[0] >> 8


@lean
def rival(  # noqa: C901  a line or two for each rule
    kind: int,
    times: StepTimes,
    rules: Rules,
    rq: Records,
    sv: Servers,
    r: int,
    now: float,
    stage: int,
    seed: np.ndarray,
) -> int:
    """Place a request by one of the rules that others use; `NOBODY` if no server is there.

    Args:
        kind: `RANDOM` to `FREENESS`. `STATIC` takes the server with the fewest requests among
            those with the label of the request's tier.
        times: Times of steps.
        rules: Sizes and tiers.
        rq: Requests.
        sv: Servers.
        r: The request.
        now: Clock time in seconds.
        stage: Which servers are wanted.
        seed: `[2]`: state of the random numbers, and whose turn it is.
    """
    count = sv.one.state.size
    if kind in (RANDOM, POWER_OF_TWO):
        here = 0
        for s in range(count):
            here += sv.one.state[s] == SERVING and sv.one.stage[s] == stage
        if here == 0:
            return NOBODY
        first = _nth(sv, stage, draw(seed) % here)
        if kind == RANDOM:
            return first
        second = _nth(sv, stage, draw(seed) % here)
        return first if _requests(sv, first) <= _requests(sv, second) else second
    if kind == ROUND_ROBIN:
        for i in range(1, count + 1):
            s = (seed[1] + i) % count
            if sv.one.state[s] == SERVING and sv.one.stage[s] == stage:
                seed[1] = s
                return s
        return NOBODY
    best, least = NOBODY, np.inf
    for s in range(count):
        if sv.one.state[s] != SERVING or sv.one.stage[s] != stage:
            continue
        if kind == STATIC and stage != PREFILL and sv.one.label[s] != rq.tier[r]:
            continue
        if kind in (LEAST_REQUESTS, STATIC):
            value = float(_requests(sv, s))
            if stage == PREFILL:
                value = float(sv.one.pending_tokens[s])
        elif kind == LEAST_KV:
            value = float(sv.one.known_kv[s] + sv.one.pending_tokens[s] + sv.one.joining_tokens[s])
        elif kind == FREENESS:
            free = (
                rules.capacity
                - sv.one.known_kv[s]
                - sv.one.pending_tokens[s]
                - sv.one.joining_tokens[s]
            )
            value = -free / (1 + _requests(sv, s))
        else:
            value = -_headroom(times, rq, sv, s, r, now)
        if value < least:
            best, least = s, value
    return best


@lean
def _requests(sv: Servers, s: int) -> int:
    return sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s]


@lean
def _nth(sv: Servers, stage: int, n: int) -> int:
    for s in range(sv.one.state.size):
        if sv.one.state[s] == SERVING and sv.one.stage[s] == stage:
            if n == 0:
                return s
            n -= 1
    return NOBODY


@lean
def _headroom(
    times: StepTimes,
    rq: Records,
    sv: Servers,
    s: int,
    r: int,
    now: float,
) -> float:
    """Return 0.8 of the share of its TTFT that a request would have left, and 0.2 of its TPOT's.

    Source: the weights with which llm-d combines predicted latencies.
    """
    waiting = sv.one.pending_tokens[s] + rq.total[r]
    first = now + step_seconds(
        times,
        waiting,
        waiting * waiting / 2,
        sv.one.pending[s] + 1,
        0,
        sv.one.decodes[s],
        sv.one.known[s],
    )
    many = _requests(sv, s) + 1
    gap = step_seconds(
        times, 0, 0.0, 0, 0, many, sv.one.known[s] + waiting + sv.one.joining_tokens[s]
    )
    return 0.8 * (rq.due[r] - first) / (rq.due[r] - rq.arrival[r]) + 0.2 * (1 - gap / rq.tpot[r])


STAGE_OF_PROMPT = (WHOLE, PREFILL)
"""Where prompts go in a shared fleet and in a split one."""
STAGE_OF_TOKENS = (WHOLE, DECODE)
"""Where the tokens after the first are made."""
