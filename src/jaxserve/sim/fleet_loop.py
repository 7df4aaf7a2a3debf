"""The compiled loop of a simulated fleet.

Everybody who decodes on a server gets a token in each of its steps. Steps of decodes alone are
therefore done when somebody looks (decode jumping): an event is due no later than the step in which
the next sequence ends, and until then a server's state follows from its last one.

Events are ordered by time; at one time steps end, then requests arrive, then steps begin; servers
by number. `fleet.py` is the way in.
"""

from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import compiled, inlined
from jaxserve.scheduling.polyserve.admission import EPS, TAKES, admits, chunk, slack_of
from jaxserve.scheduling.polyserve.packing import (
    LEAST_REQUESTS,
    POLYSERVE,
    STATIC,
    Gradient,
    label,
    leave,
    load_of,
    move,
    rival,
    route,
)
from jaxserve.scheduling.polyserve.scaling import Watch, resize_pool, scale_down
from jaxserve.scheduling.polyserve.state import (
    BETWEEN,
    DECODE,
    DRAINING,
    IDLE,
    NEVER,
    NOBODY,
    OFF,
    POOLED,
    PREFILL,
    SERVING,
    STARTING,
    STEPPING,
    WHOLE,
    Records,
    Rules,
    Servers,
)
from jaxserve.scheduling.step_times import StepTimes, step_seconds

LATE_FIRST, LATE_TOKEN, LATE_GAP, DECLINED = 1, 2, 4, 8
"""Bits of what a request missed: its first token's deadline, a later one's, a gap, everything."""
_ROUNDING = 1 - 1e-9
_ASKED = 4
"""Waiting requests that a server is asked about in vain before it goes on."""


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

LINE = np.dtype([("queue", "i8"), ("waiting", "i8")])
"""A queue of the router: the first in it, or `NOBODY`, and its length."""


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


@compiled
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


@compiled
def _set_event(bd: Board, s: int, time: float) -> None:
    bd.desk.key[s] = time
    if bd.desk.spot[s] == NOBODY:
        bd.desk.heap[bd.whole[SIZE]] = s
        bd.desk.spot[s] = bd.whole[SIZE]
        bd.whole[SIZE] += 1
    _sift(bd, bd.desk.spot[s])


@inlined
def _drop_event(bd: Board, s: int) -> None:
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


@compiled
def _end_request(rules: Rules, rq: Records, bd: Board, out: Records, r: int, t: float) -> None:
    """Note down the end of a request that got all of its tokens."""
    out.finish[r] = t
    bd.whole[DONE] += 1
    k = rq.tier[r]
    rules.means.finished[k] += 1
    rules.means.output[k] += (rq.output[r] - rules.means.output[k]) / rules.means.finished[k]


@compiled
def _decline(bd: Board, out: Records, r: int, t: float) -> None:
    out.missed[r] |= DECLINED
    out.finish[r] = t
    bd.whole[DONE] += 1


@compiled
def _seat(rules: Rules, rq: Records, sv: Servers, s: int, r: int, now: float) -> None:
    """Let a request decode on a server from its next step on."""
    i = sv.one.decodes[s]
    steps, k = sv.one.steps[s], rq.tier[r]
    sv.slots.request[s, i] = r
    sv.slots.context[s, i] = rq.total[r] - steps
    sv.slots.emitted[s, i] = rq.emitted[r] - steps
    sv.slots.finish[s, i] = steps + rq.output[r] - rq.emitted[r]
    due = rq.due[r] + rules.means.tau[k] * rq.emitted[r]
    if due < now:  # late already: from now on at the pace of its tier
        due = now + rules.means.tau[k]
    sv.slots.due[s, i] = due - rules.means.tau[k] * (steps + 1)
    sv.min_due[s, k] = min(sv.min_due[s, k], sv.slots.due[s, i])
    sv.one.next_finish[s] = min(sv.one.next_finish[s], sv.slots.finish[s, i])
    sv.one.decodes[s] += 1
    sv.one.context[s] += rq.total[r]


@compiled
def _unseat(rq: Records, sv: Servers, s: int, i: int) -> None:
    """Take the request of a slot away; the last slot's takes its place."""
    r = sv.slots.request[s, i]
    held = sv.slots.context[s, i] + sv.one.steps[s]
    sv.one.context[s] -= held
    sv.one.kv[s] -= held
    rq.emitted[r] = sv.slots.emitted[s, i] + sv.one.steps[s]
    last = sv.one.decodes[s] - 1
    k, due = rq.tier[r], sv.slots.due[s, i]
    if i != last:
        sv.slots.request[s, i] = sv.slots.request[s, last]
        sv.slots.context[s, i] = sv.slots.context[s, last]
        sv.slots.emitted[s, i] = sv.slots.emitted[s, last]
        sv.slots.due[s, i] = sv.slots.due[s, last]
        sv.slots.finish[s, i] = sv.slots.finish[s, last]
    sv.one.decodes[s] = last
    least = NEVER
    for j in range(last):
        least = min(least, sv.slots.finish[s, j])
    sv.one.next_finish[s] = least
    if due <= sv.min_due[s, k]:
        _refresh_due(rq, sv, s, k)


@compiled
def _refresh_due(rq: Records, sv: Servers, s: int, k: int) -> None:
    least = np.inf
    for j in range(sv.one.decodes[s]):
        if rq.tier[sv.slots.request[s, j]] == k:
            least = min(least, sv.slots.due[s, j])
    sv.min_due[s, k] = least


@inlined
def _judge(
    rules: Rules, rq: Records, sv: Servers, bd: Board, out: Records, s: int, t: float
) -> None:
    """Note down which decodes were late with the token that the step ending at `t` gave them."""
    steps = sv.one.steps[s]
    seconds = t - bd.desk.began[s]
    is_long, is_late = False, False
    for k in range(rules.means.size):
        if sv.min_due[s, k] < np.inf:
            is_long = is_long or seconds > rules.means.tau[k] + EPS
            is_late = is_late or t > sv.min_due[s, k] + rules.means.tau[k] * steps + EPS
    if not (is_long or is_late or bd.desk.fresh[s]):
        return
    for i in range(sv.one.decodes[s]):
        r = sv.slots.request[s, i]
        k = rq.tier[r]
        gap = seconds
        if bd.desk.fresh[s] and out.last[r] >= 0:
            gap = t - out.last[r]
            out.last[r] = -1.0
        if gap > rq.tpot[r] + EPS:
            out.missed[r] |= LATE_GAP
        if is_late:
            number = sv.slots.emitted[s, i] + steps - 1
            if t > rq.due[r] + number * rq.tpot[r] + EPS:
                out.missed[r] |= LATE_TOKEN
            if t > sv.slots.due[s, i] + rules.means.tau[k] * steps + EPS:
                sv.slots.due[s, i] = t - rules.means.tau[k] * steps
    bd.desk.fresh[s] = 0
    if is_late:
        for k in range(rules.means.size):
            _refresh_due(rq, sv, s, k)


@compiled
def _settle(
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    bd: Board,
    out: Records,
    s: int,
) -> bool:
    """End a server's step; returns whether somebody has ended, or has got some prompt computed."""
    t = sv.one.end[s]
    sv.one.steps[s] += 1
    steps = sv.one.steps[s]
    bd.whole[STEPS] += 1
    changed = False
    if sv.one.decodes[s]:
        sv.one.context[s] += sv.one.decodes[s]
        sv.one.kv[s] += sv.one.decodes[s]
        _judge(rules, rq, sv, bd, out, s, t)
        if steps >= sv.one.next_finish[s]:
            changed = True
            i = 0
            while i < sv.one.decodes[s]:
                if sv.slots.finish[s, i] == steps:
                    r = sv.slots.request[s, i]
                    _unseat(rq, sv, s, i)
                    out.server[r] = s
                    _end_request(rules, rq, bd, out, r, t)
                else:
                    i += 1
    before, r = NOBODY, sv.one.head[s]
    while r != NOBODY:
        following = rq.following[r]
        if rq.grant[r] == 0:
            if not rq.holds[r] and not su.by_deadline:
                break  # nobody behind has got anything
            before, r = r, following
            continue
        changed = True
        rq.computed[r] += rq.grant[r]
        sv.one.pending_tokens[s] -= rq.grant[r]
        rq.grant[r] = 0
        if rq.computed[r] < rq.total[r]:
            before, r = r, following
            continue
        if before == NOBODY:
            sv.one.head[s] = following
        else:
            rq.following[before] = following
        if following == NOBODY:
            bd.desk.tail[s] = before
        rq.following[r] = NOBODY
        rq.holds[r] = 0
        sv.one.pending[s] -= 1
        _first_token(rules, su, rq, sv, bd, out, s, r, t)
        r = following
    return changed


@inlined
def _first_token(
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    bd: Board,
    out: Records,
    s: int,
    r: int,
    t: float,
) -> None:
    """Give a request the token that its computed prompt yields, and let it go on from there."""
    number = rq.emitted[r]
    rq.emitted[r] += 1
    if number == 0:
        out.first[r] = t
        if t > rq.due[r] + EPS:
            out.missed[r] |= LATE_FIRST
    else:
        if t > rq.due[r] + number * rq.tpot[r] + EPS:
            out.missed[r] |= LATE_TOKEN
        if t - out.last[r] > rq.tpot[r] + EPS:
            out.missed[r] |= LATE_GAP
        out.last[r] = -1.0
    out.server[r] = s
    if rq.emitted[r] == rq.output[r]:
        sv.one.kv[s] -= rq.total[r]
        _end_request(rules, rq, bd, out, r, t)
    elif su.is_split and sv.one.stage[s] == PREFILL:
        sv.one.kv[s] -= rq.total[r]
        out.last[r] = t
        rq.following[r] = bd.whole[HANDED]
        bd.whole[HANDED] = r
    else:
        _seat(rules, rq, sv, s, r, t)


@compiled
def _enqueue(rq: Records, bd: Board, row: int, r: int) -> None:
    """Let a request wait at the router; whoever is due first is first."""
    before, q = NOBODY, bd.lines.queue[row]
    while q != NOBODY and rq.due[q] <= rq.due[r]:
        before, q = q, rq.following[q]
    rq.following[r] = q
    if before == NOBODY:
        bd.lines.queue[row] = r
    else:
        rq.following[before] = r
    bd.lines.waiting[row] += 1


@compiled
def _offer(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    r: int,
    now: float,
    stage: int,
) -> bool:
    """Ask the router for a place; tells whether there was one."""
    if su.kind == POLYSERVE:
        s = route(times, rules, rq, sv, gr, r, now, stage, su.promotes == 1)
    else:
        s = rival(su.kind, times, rules, rq, sv, r, now, stage, bd.seed)
    if s == NOBODY:
        return False
    if su.kind == POLYSERVE and stage != PREFILL and sv.one.label[s] != rq.tier[r]:
        bd.whole[PROMOTED] += 1
    _put(times, rules, su, rq, sv, gr, bd, out, s, r, now)
    return True


@compiled
def _put(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    s: int,
    r: int,
    now: float,
) -> None:
    """Put a request on a server."""
    _advance(times, rules, su, rq, sv, bd, out, s, now)
    rq.following[r] = NOBODY
    if su.is_split and sv.one.stage[s] == DECODE:
        rq.total[r] = rq.prompt[r] + rq.emitted[r] - 1
        rq.ready[r] = now + rules.transfer_base + rules.transfer_token * rq.total[r]
        rq.following[r] = sv.one.join_head[s]
        sv.one.join_head[s] = r
        sv.one.joining[s] += 1
        sv.one.joining_tokens[s] += rq.total[r]
    else:
        _append(su, rq, sv, bd, s, r)
    if sv.one.phase[s] == IDLE:
        sv.one.phase[s] = BETWEEN
        sv.one.end[s] = now
        _set_event(bd, s, now)
    else:  # the end of the step under way, or now
        _set_event(bd, s, sv.one.end[s])
    _reload(times, rules, sv, gr, s)


@inlined
def _append(su: Setup, rq: Records, sv: Servers, bd: Board, s: int, r: int) -> None:
    """Put a prompt into a server's queue, by its deadline or behind the others."""
    sv.one.pending[s] += 1
    sv.one.pending_tokens[s] += rq.total[r] - rq.computed[r]
    before, q = bd.desk.tail[s], NOBODY
    if su.by_deadline:
        before, q = NOBODY, sv.one.head[s]
        while q != NOBODY and rq.due[q] <= rq.due[r]:
            before, q = q, rq.following[q]
    rq.following[r] = q
    if before == NOBODY:
        sv.one.head[s] = r
    else:
        rq.following[before] = r
    if q == NOBODY:
        bd.desk.tail[s] = r


@compiled
def _reload(times: StepTimes, rules: Rules, sv: Servers, gr: Gradient, s: int) -> None:
    sv.one.known[s], sv.one.known_kv[s] = sv.one.context[s], sv.one.kv[s]
    if sv.one.row[s] != NOBODY:
        sv.one.load[s] = load_of(times, rules, sv, s)
        move(gr, sv, s)


@compiled
def _advance(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    bd: Board,
    out: Records,
    s: int,
    now: float,
) -> bool:
    """Bring a server up to a time; a step that ends just then is followed by none yet."""
    changed = False
    while sv.one.phase[s] == STEPPING and sv.one.end[s] <= now:
        changed = _settle(rules, su, rq, sv, bd, out, s) or changed
        sv.one.phase[s] = BETWEEN
        if sv.one.end[s] < now:
            _begin(times, rules, su, rq, sv, bd, out, s, sv.one.end[s])
    return changed


@inlined
def _join(rules: Rules, rq: Records, sv: Servers, bd: Board, s: int, t: float) -> None:
    """Let those decode whose keys and values have come."""
    before, r = NOBODY, sv.one.join_head[s]
    while r != NOBODY:
        following = rq.following[r]
        fits = sv.one.kv[s] + rq.total[r] <= rules.capacity and sv.one.decodes[s] < rules.seats
        if rq.ready[r] <= t and fits:
            if before == NOBODY:
                sv.one.join_head[s] = following
            else:
                rq.following[before] = following
            rq.following[r] = NOBODY
            sv.one.joining[s] -= 1
            sv.one.joining_tokens[s] -= rq.total[r]
            sv.one.kv[s] += rq.total[r]
            _seat(rules, rq, sv, s, r, t)
            bd.desk.fresh[s] += 1
        else:
            before = r
        r = following


@inlined
def _preempt(
    su: Setup, rules: Rules, rq: Records, sv: Servers, bd: Board, out: Records, s: int
) -> None:
    """Take the cache of whoever came last, until there is room for a token each."""
    while sv.one.kv[s] + sv.one.decodes[s] > rules.capacity and sv.one.decodes[s] > 1:
        last = 0
        for i in range(1, sv.one.decodes[s]):
            r, other = sv.slots.request[s, i], sv.slots.request[s, last]
            if (rq.arrival[r], r) > (rq.arrival[other], other):
                last = i
        r = sv.slots.request[s, last]
        _unseat(rq, sv, s, last)
        out.preemptions[r] += 1
        out.last[r] = sv.one.end[s]
        rq.total[r] = rq.prompt[r] + rq.emitted[r]
        rq.computed[r] = 0
        if su.is_split:  # computed anew where it is; the servers of prompts are not asked again
            rq.ready[r] = sv.one.end[s] + rules.transfer_base + rules.transfer_token * rq.total[r]
            rq.total[r] -= 1
            rq.following[r] = sv.one.join_head[s]
            sv.one.join_head[s] = r
            sv.one.joining[s] += 1
            sv.one.joining_tokens[s] += rq.total[r]
            continue
        sv.one.pending[s] += 1
        sv.one.pending_tokens[s] += rq.total[r]
        rq.following[r] = sv.one.head[s]
        if sv.one.head[s] == NOBODY:
            bd.desk.tail[s] = r
        sv.one.head[s] = r


@compiled
def _begin(  # noqa: C901  parts of it would hand a dozen numbers back and forth
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    bd: Board,
    out: Records,
    s: int,
    t: float,
) -> None:
    """Begin a server's next step, or let it idle if there is nothing to do."""
    if sv.one.joining[s]:
        _join(rules, rq, sv, bd, s, t)
    if sv.one.kv[s] + sv.one.decodes[s] > rules.capacity:
        _preempt(su, rules, rq, sv, bd, out, s)
    decodes = sv.one.decodes[s]
    read = sv.one.context[s] + decodes
    prefill, pairs, prefills, before_chunks = 0, 0.0, 0, 0
    if sv.one.pending[s]:
        limit = min(slack_of(rules, sv, s, t), rules.max_step)
        budget = (su.budget or rules.max_tokens) - decodes
        holders, r = 0, sv.one.head[s]
        while r != NOBODY and (rq.holds[r] or su.by_deadline):
            holders += rq.holds[r]
            r = rq.following[r]
        before, r = NOBODY, sv.one.head[s]
        while r != NOBODY and prefill < budget:
            following = rq.following[r]
            if not rq.holds[r]:
                if su.sheds and rq.emitted[r] == 0 and _is_lost(times, rq, r, t):
                    sv.one.pending[s] -= 1
                    sv.one.pending_tokens[s] -= rq.total[r]
                    if before == NOBODY:
                        sv.one.head[s] = following
                    else:
                        rq.following[before] = following
                    if following == NOBODY:
                        bd.desk.tail[s] = before
                    _decline(bd, out, r, t)
                    r = following
                    continue
                is_full = decodes + holders >= rules.seats
                if is_full or sv.one.kv[s] + rq.total[r] + decodes > rules.capacity:
                    break
            left, past = rq.total[r] - rq.computed[r], rq.computed[r]
            if su.budget:
                got = min(left, budget - prefill)
            else:
                got = chunk(
                    times, rules, limit, prefill, pairs, prefills, before_chunks, decodes, read,
                    past, left,
                )  # fmt: skip
            if got == 0:
                break
            if not rq.holds[r]:
                rq.holds[r] = 1
                sv.one.kv[s] += rq.total[r]
                holders += 1
            rq.grant[r] = got
            prefill += got
            pairs += got * past + got * got / 2
            prefills += 1
            before_chunks += past
            before, r = r, following
    if decodes == 0 and prefill == 0:
        sv.one.phase[s] = IDLE
        return
    bd.desk.began[s] = t
    sv.one.end[s] = t + step_seconds(times, prefill, pairs, prefills, before_chunks, decodes, read)
    sv.one.phase[s] = STEPPING


@compiled
def _is_lost(times: StepTimes, rq: Records, r: int, now: float) -> bool:
    """Tell whether a prompt's first token would be late even if nobody else were there."""
    left = rq.total[r]
    return now + step_seconds(times, left, left * left / 2, 1, 0, 0, 0) > rq.due[r] + EPS


@inlined
def _schedule(su: Setup, rq: Records, sv: Servers, bd: Board, s: int) -> None:
    """Set a server's next event: the end of its step, or a time before which nobody ends."""
    if sv.one.phase[s] == IDLE:
        if sv.one.joining[s] == 0:
            _drop_event(bd, s)
            return
        soonest, r = np.inf, sv.one.join_head[s]
        while r != NOBODY:
            soonest = min(soonest, rq.ready[r])
            r = rq.following[r]
        sv.one.phase[s] = BETWEEN
        sv.one.end[s] = max(soonest, sv.one.end[s])
        _set_event(bd, s, sv.one.end[s])
        return
    time = sv.one.end[s]
    steps = sv.one.next_finish[s] - sv.one.steps[s]
    if su.jumps and steps > 1 and sv.one.pending[s] == 0 and sv.one.joining[s] == 0:
        # Steps only grow longer while nobody comes or goes.
        time += (steps - 1) * (time - bd.desk.began[s]) * _ROUNDING
    _set_event(bd, s, time)


@inlined
def _pull(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    s: int,
    now: float,
) -> None:
    """Let a server that has got room take from the router's queues: its own tier's, then looser."""
    tiers = rules.means.size
    if sv.one.state[s] != SERVING:
        return
    own = tiers if sv.one.stage[s] == PREFILL else sv.one.label[s]
    asked = 0
    for row in range(own, tiers if own < tiers else tiers + 1):
        if row != own and not su.promotes:
            break
        guard = 1.0 if row == own else rules.guard
        before, r = NOBODY, bd.lines.queue[row]
        while r != NOBODY and asked < _ASKED:
            following = rq.following[r]
            is_lost = rq.emitted[r] == 0 and _is_lost(times, rq, r, now)
            if not is_lost and admits(times, rules, rq, sv, s, r, now, guard) != TAKES:
                asked += 1
                before, r = r, following
                continue
            if before == NOBODY:
                bd.lines.queue[row] = following
            else:
                rq.following[before] = following
            bd.lines.waiting[row] -= 1
            if is_lost:
                _decline(bd, out, r, now)
            else:
                bd.whole[PROMOTED] += row != own
                _put(times, rules, su, rq, sv, gr, bd, out, s, r, now)
            r = following


@inlined
def _event(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    s: int,
) -> None:
    """Do what a server's event is about."""
    now = bd.desk.key[s]
    bd.whole[EVENTS] += 1
    changed = _advance(times, rules, su, rq, sv, bd, out, s, now)
    if sv.one.phase[s] == BETWEEN:
        if changed:
            _reload(times, rules, sv, gr, s)
            if su.kind == POLYSERVE:
                _pull(times, rules, su, rq, sv, gr, bd, out, s, now)
        _begin(times, rules, su, rq, sv, bd, out, s, now)
        is_empty = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s] == 0
        if sv.one.state[s] == DRAINING and is_empty:
            sv.one.state[s] = POOLED
            sv.one.label[s] = NOBODY
    _schedule(su, rq, sv, bd, s)


@inlined
def _retry(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    now: float,
) -> None:
    """Offer those that wait at the router once more, first come in each queue."""
    tiers = rules.means.size
    for row in range(tiers + 1):
        while bd.lines.queue[row] != NOBODY:
            r = bd.lines.queue[row]
            bd.lines.queue[row] = rq.following[r]
            bd.lines.waiting[row] -= 1
            stage = WHOLE
            if su.is_split:
                stage = PREFILL if row == tiers else DECODE
            if rq.emitted[r] == 0 and _is_lost(times, rq, r, now):
                _decline(bd, out, r, now)
                continue
            if _offer(times, rules, su, rq, sv, gr, bd, out, r, now, stage):
                continue
            is_late = rq.emitted[r] and now > rq.due[r] + rq.emitted[r] * rq.tpot[r]
            if is_late and _force(times, rules, su, rq, sv, gr, bd, out, r, now):
                continue
            _enqueue(rq, bd, row, r)
            break


@inlined
def _tick(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    watch: Watch,
    now: float,
    timeline: np.ndarray,
) -> None:
    """Check queues and sizes, and note down what the fleet looks like."""
    for s in range(sv.one.state.size):
        if sv.one.state[s] == STARTING and bd.desk.up_at[s] <= now:
            sv.one.state[s] = POOLED
    _retry(times, rules, su, rq, sv, gr, bd, out, now)
    if su.scales:
        bd.whole[DRAINED] += scale_down(
            times, rules, sv, gr, watch, now, su.hold, su.cooldown, su.most, su.share
        )
        for s in range(sv.one.state.size):
            is_empty = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s] == 0
            if sv.one.state[s] == DRAINING and is_empty:
                sv.one.state[s] = POOLED
                sv.one.label[s] = NOBODY
        if su.reserve >= 0:
            _resize(su, sv, bd, watch, now)
    _sample(sv, gr, bd, now, timeline)


@compiled
def _force(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    r: int,
    now: float,
) -> bool:
    """Put a request that is late anyway on the least used server that makes further tokens."""
    s = rival(STATIC, times, rules, rq, sv, r, now, DECODE, bd.seed)
    if s == NOBODY:
        s = rival(LEAST_REQUESTS, times, rules, rq, sv, r, now, DECODE, bd.seed)
    if s == NOBODY:
        return False
    _put(times, rules, su, rq, sv, gr, bd, out, s, r, now)
    return True


@inlined
def _hand_over(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    now: float,
) -> None:
    """Place those whose prompts have just been computed with servers of further tokens."""
    while bd.whole[HANDED] != NOBODY:
        r = bd.whole[HANDED]
        bd.whole[HANDED] = rq.following[r]
        if not _offer(times, rules, su, rq, sv, gr, bd, out, r, now, DECODE):
            _enqueue(rq, bd, rq.tier[r], r)


@inlined
def _resize(su: Setup, sv: Servers, bd: Board, watch: Watch, now: float) -> None:
    keep = max(0.0, 1 - su.tick / max(su.start, su.tick))
    count = resize_pool(sv, watch, su.reserve, su.hold, keep, bd.desk.scratch)
    for i in range(abs(count)):
        s = bd.desk.scratch[i]
        if count > 0:
            sv.one.state[s] = STARTING
            bd.desk.up_at[s] = now + su.start
            bd.desk.on_since[s] = now
            bd.whole[STARTED] += 1
        else:
            sv.one.state[s] = OFF
            bd.real[0] += now - bd.desk.on_since[s]


@inlined
def _sample(sv: Servers, gr: Gradient, bd: Board, now: float, timeline: np.ndarray) -> None:
    """Write a row of the timeline: time; servers per row, draining, pooled, starting; waiting."""
    at = bd.whole[TICKS]
    bd.whole[TICKS] += 1
    if at >= timeline.shape[0]:
        return
    rows = gr.filled.size
    timeline[at, 0] = now
    for row in range(rows):
        timeline[at, 1 + row] = gr.filled[row]
    for s in range(sv.one.state.size):
        state = sv.one.state[s]
        timeline[at, 1 + rows] += state == DRAINING
        timeline[at, 2 + rows] += state == POOLED
        timeline[at, 3 + rows] += state == STARTING
    for row in range(rows):
        timeline[at, 4 + rows] += bd.lines.waiting[row]


@inlined
def _arrive(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    watch: Watch,
    r: int,
) -> None:
    """Let a request in: it is refused, placed, or waits."""
    now, k = rq.arrival[r], rq.tier[r]
    rules.means.arrived[k] += 1
    rules.means.prompt[k] += (rq.prompt[r] - rules.means.prompt[k]) / rules.means.arrived[k]
    tiers = rules.means.size
    if _is_lost(times, rq, r, now):  # not even an idle server could
        _decline(bd, out, r, now)
        return
    stage, row = (PREFILL, tiers) if su.is_split else (WHOLE, k)
    # Whoever waits has been asked about; somebody shorter may find room where it does not.
    if _offer(times, rules, su, rq, sv, gr, bd, out, r, now, stage):
        return
    watch.refused[row] += 1
    _enqueue(rq, bd, row, r)


@compiled
def run(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: Records,
    sv: Servers,
    gr: Gradient,
    bd: Board,
    out: Records,
    watch: Watch,
    timeline: np.ndarray,
) -> int:
    """Serve all requests; returns how many are left for which nothing can be done.

    Args:
        times: How long steps take.
        rules: The policy's.
        su: What stays as it is.
        rq: Requests in order of arrival.
        sv: Servers.
        gr: The gradient.
        bd: What the loop keeps besides.
        out: Written with what becomes of requests.
        watch: The scaler's memory.
        timeline: `[ticks, 6 + tiers]`, zero; written, see `_sample`.
    """
    count = rq.arrival.size
    arrived = 0
    next_tick, idle_ticks, seen = 0.0, 0, 0
    while bd.whole[DONE] < count:
        arrival = rq.arrival[arrived] if arrived < count else np.inf
        event = bd.desk.key[bd.desk.heap[0]] if bd.whole[SIZE] else np.inf
        if next_tick <= min(arrival, event):
            _tick(times, rules, su, rq, sv, gr, bd, out, watch, next_tick, timeline)
            bd.real[1] = max(bd.real[1], next_tick)
            next_tick += su.tick
            if arrived == count and bd.whole[SIZE] == 0:
                idle_ticks = idle_ticks + 1 if bd.whole[DONE] == seen else 0
                seen = bd.whole[DONE]
                if idle_ticks > 1000:
                    break
        elif event < arrival:
            bd.real[1] = event
            _event(times, rules, su, rq, sv, gr, bd, out, bd.desk.heap[0])
            if bd.whole[HANDED] != NOBODY:
                _hand_over(times, rules, su, rq, sv, gr, bd, out, event)
        else:
            _arrive(times, rules, su, rq, sv, gr, bd, out, watch, arrived)
            bd.real[1] = arrival
            arrived += 1
            if bd.whole[HANDED] != NOBODY:
                _hand_over(times, rules, su, rq, sv, gr, bd, out, arrival)
    for s in range(sv.one.state.size):
        if sv.one.state[s] != OFF:
            bd.real[0] += bd.real[1] - bd.desk.on_since[s]
    return count - bd.whole[DONE]


def start_rivals(sv: Servers, gr: Gradient, labels: np.ndarray, tiers: int) -> None:
    """Put servers to work before anybody arrives.

    Args:
        sv: Servers.
        gr: The gradient.
        labels: `[servers]`: tier of each, `tiers` for prompts, or `NOBODY` for none.
        tiers: How many tiers there are.
    """
    for s in range(sv.one.state.size):
        if labels[s] == NOBODY:
            sv.one.state[s] = SERVING
        else:
            leave(gr, sv, s)
            label(gr, sv, s, int(labels[s]), tiers)
