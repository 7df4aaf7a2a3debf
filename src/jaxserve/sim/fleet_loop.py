"""The compiled loop of a simulated fleet.

Everybody who decodes on a server gets a token in each of its steps. Steps of decodes alone are
therefore done when somebody looks (decode jumping): an event is due no later than the step in which
the next sequence ends, and until then a server's state follows from its last one.

Events are ordered by time; at one time steps end, then requests arrive, then steps begin; servers
by number. `fleet.py` is the way in.
"""

from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import compiled
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
    RequestArrays,
    Rules,
    ServerArrays,
)
from jaxserve.scheduling.step_times import StepTimes, step_seconds

LATE_FIRST, LATE_TOKEN, LATE_GAP, DECLINED = 1, 2, 4, 8
"""Bits of what a request missed: its first token's deadline, a later one's, a gap, everything."""
_ROUNDING = 1 - 1e-9


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


class Results(NamedTuple):
    """What became of requests, `[requests]`.

    Attributes:
        first: When the first token came; not a number without one.
        finish: When the last one came.
        missed: Bits of what was missed.
        server: Where the last token was made, or `NOBODY`.
        last: When the latest token came, where the next one's gap has to be looked at.
        preemptions: How often it lost its pages.
    """

    first: np.ndarray
    finish: np.ndarray
    missed: np.ndarray
    server: np.ndarray
    last: np.ndarray
    preemptions: np.ndarray


class Board(NamedTuple):
    """What the loop keeps besides.

    Attributes:
        began: `[servers]`: when the step under way began.
        tail: `[servers]`: last request in the queue of prompts.
        fresh: `[servers]`: decodes whose next gap does not begin with this server's last step.
        queue: `[tiers + 1]`: first request of each router queue; the last is of prompts.
        waiting: `[tiers + 1]`: their lengths.
        key: `[servers]`: when each one's event is due.
        heap: `[servers]`: servers by `key`.
        spot: `[servers]`: where each stands in the heap, or `NOBODY`.
        up_at: `[servers]`: when a server that starts is there.
        on_since: `[servers]`: since when it is paid for.
        seed: `[2]`: of random numbers, and whose turn it is.
        whole: `[9]`: heap size, steps, requests done, events, drained, promotions, started, ticks, and
            the first of those whose prompts have just been computed elsewhere.
        real: `[2]`: seconds paid for, time of the last event.
        scratch: `[servers]`: for lists of servers.
    """

    began: np.ndarray
    tail: np.ndarray
    fresh: np.ndarray
    queue: np.ndarray
    waiting: np.ndarray
    key: np.ndarray
    heap: np.ndarray
    spot: np.ndarray
    up_at: np.ndarray
    on_since: np.ndarray
    seed: np.ndarray
    whole: np.ndarray
    real: np.ndarray
    scratch: np.ndarray


SIZE, STEPS, DONE, EVENTS, DRAINED, PROMOTED, STARTED, TICKS, HANDED = range(9)


@compiled
def _sift(bd: Board, at: int) -> None:
    """Move one server of the heap to where its key belongs."""
    heap, key, spot = bd.heap, bd.key, bd.spot
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
    bd.key[s] = time
    if bd.spot[s] == NOBODY:
        bd.heap[bd.whole[SIZE]] = s
        bd.spot[s] = bd.whole[SIZE]
        bd.whole[SIZE] += 1
    _sift(bd, bd.spot[s])


@compiled
def _drop_event(bd: Board, s: int) -> None:
    at = bd.spot[s]
    if at == NOBODY:
        return
    bd.whole[SIZE] -= 1
    last = bd.heap[bd.whole[SIZE]]
    bd.spot[s] = NOBODY
    if last != s:
        bd.heap[at] = last
        bd.spot[last] = at
        _sift(bd, at)


@compiled
def _end_request(
    rules: Rules, rq: RequestArrays, bd: Board, out: Results, r: int, t: float
) -> None:
    """Note down the end of a request that got all of its tokens."""
    out.finish[r] = t
    bd.whole[DONE] += 1
    k = rq.tier[r]
    rules.finished[k] += 1
    rules.outputs[k] += (rq.output[r] - rules.outputs[k]) / rules.finished[k]


@compiled
def _decline(bd: Board, out: Results, r: int, t: float) -> None:
    out.missed[r] |= DECLINED
    out.finish[r] = t
    bd.whole[DONE] += 1


@compiled
def _seat(rules: Rules, rq: RequestArrays, sv: ServerArrays, s: int, r: int, now: float) -> None:
    """Let a request decode on a server from its next step on."""
    i = sv.decodes[s]
    steps, k = sv.steps[s], rq.tier[r]
    sv.slot_request[s, i] = r
    sv.slot_context[s, i] = rq.total[r] - steps
    sv.slot_emitted[s, i] = rq.emitted[r] - steps
    sv.slot_finish[s, i] = steps + rq.output[r] - rq.emitted[r]
    due = rq.due[r] + rules.tau[k] * rq.emitted[r]
    if due < now:  # late already: from now on at the pace of its tier
        due = now + rules.tau[k]
    sv.slot_due[s, i] = due - rules.tau[k] * (steps + 1)
    sv.min_due[s, k] = min(sv.min_due[s, k], sv.slot_due[s, i])
    sv.next_finish[s] = min(sv.next_finish[s], sv.slot_finish[s, i])
    sv.decodes[s] += 1
    sv.context[s] += rq.total[r]


@compiled
def _unseat(rules: Rules, rq: RequestArrays, sv: ServerArrays, s: int, i: int) -> None:
    """Take the request of a slot away; the last slot's takes its place."""
    r = sv.slot_request[s, i]
    held = sv.slot_context[s, i] + sv.steps[s]
    sv.context[s] -= held
    sv.kv[s] -= held
    rq.emitted[r] = sv.slot_emitted[s, i] + sv.steps[s]
    last = sv.decodes[s] - 1
    k, due = rq.tier[r], sv.slot_due[s, i]
    if i != last:
        sv.slot_request[s, i] = sv.slot_request[s, last]
        sv.slot_context[s, i] = sv.slot_context[s, last]
        sv.slot_emitted[s, i] = sv.slot_emitted[s, last]
        sv.slot_due[s, i] = sv.slot_due[s, last]
        sv.slot_finish[s, i] = sv.slot_finish[s, last]
    sv.decodes[s] = last
    least = NEVER
    for j in range(last):
        least = min(least, sv.slot_finish[s, j])
    sv.next_finish[s] = least
    if due <= sv.min_due[s, k]:
        _refresh_due(rq, sv, s, k)


@compiled
def _refresh_due(rq: RequestArrays, sv: ServerArrays, s: int, k: int) -> None:
    least = np.inf
    for j in range(sv.decodes[s]):
        if rq.tier[sv.slot_request[s, j]] == k:
            least = min(least, sv.slot_due[s, j])
    sv.min_due[s, k] = least


@compiled
def _judge(
    rules: Rules, rq: RequestArrays, sv: ServerArrays, bd: Board, out: Results, s: int, t: float
) -> None:
    """Note down which decodes were late with the token that the step ending at `t` gave them."""
    steps = sv.steps[s]
    seconds = t - bd.began[s]
    is_long, is_late = False, False
    for k in range(rules.tau.size):
        if sv.min_due[s, k] < np.inf:
            is_long = is_long or seconds > rules.tau[k] + EPS
            is_late = is_late or t > sv.min_due[s, k] + rules.tau[k] * steps + EPS
    if not (is_long or is_late or bd.fresh[s]):
        return
    for i in range(sv.decodes[s]):
        r = sv.slot_request[s, i]
        k = rq.tier[r]
        gap = seconds
        if bd.fresh[s] and out.last[r] >= 0:
            gap = t - out.last[r]
            out.last[r] = -1.0
        if gap > rq.tpot[r] + EPS:
            out.missed[r] |= LATE_GAP
        if is_late:
            number = sv.slot_emitted[s, i] + steps - 1
            if t > rq.due[r] + number * rq.tpot[r] + EPS:
                out.missed[r] |= LATE_TOKEN
            if t > sv.slot_due[s, i] + rules.tau[k] * steps + EPS:
                sv.slot_due[s, i] = t - rules.tau[k] * steps
    bd.fresh[s] = 0
    if is_late:
        for k in range(rules.tau.size):
            _refresh_due(rq, sv, s, k)


@compiled
def _settle(
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    bd: Board,
    out: Results,
    s: int,
) -> bool:
    """End a server's step; returns whether somebody has ended, or has got some prompt computed."""
    t = sv.end[s]
    sv.steps[s] += 1
    steps = sv.steps[s]
    bd.whole[STEPS] += 1
    changed = False
    if sv.decodes[s]:
        sv.context[s] += sv.decodes[s]
        sv.kv[s] += sv.decodes[s]
        _judge(rules, rq, sv, bd, out, s, t)
        if steps >= sv.next_finish[s]:
            changed = True
            i = 0
            while i < sv.decodes[s]:
                if sv.slot_finish[s, i] == steps:
                    r = sv.slot_request[s, i]
                    _unseat(rules, rq, sv, s, i)
                    out.server[r] = s
                    _end_request(rules, rq, bd, out, r, t)
                else:
                    i += 1
    before, r = NOBODY, sv.head[s]
    while r != NOBODY:
        following = rq.following[r]
        if rq.grant[r] == 0:
            if not rq.holds[r] and not su.by_deadline:
                break  # nobody behind has got anything
            before, r = r, following
            continue
        changed = True
        rq.computed[r] += rq.grant[r]
        sv.pending_tokens[s] -= rq.grant[r]
        rq.grant[r] = 0
        if rq.computed[r] < rq.total[r]:
            before, r = r, following
            continue
        if before == NOBODY:
            sv.head[s] = following
        else:
            rq.following[before] = following
        if following == NOBODY:
            bd.tail[s] = before
        rq.following[r] = NOBODY
        rq.holds[r] = 0
        sv.pending[s] -= 1
        _first_token(rules, su, rq, sv, bd, out, s, r, t)
        r = following
    return changed


@compiled
def _first_token(
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    bd: Board,
    out: Results,
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
        sv.kv[s] -= rq.total[r]
        _end_request(rules, rq, bd, out, r, t)
    elif su.is_split and sv.stage[s] == PREFILL:
        sv.kv[s] -= rq.total[r]
        out.last[r] = t
        rq.following[r] = bd.whole[HANDED]
        bd.whole[HANDED] = r
    else:
        _seat(rules, rq, sv, s, r, t)


@compiled
def _enqueue(rq: RequestArrays, bd: Board, row: int, r: int) -> None:
    """Let a request wait at the router; whoever is due first is first."""
    before, q = NOBODY, bd.queue[row]
    while q != NOBODY and rq.due[q] <= rq.due[r]:
        before, q = q, rq.following[q]
    rq.following[r] = q
    if before == NOBODY:
        bd.queue[row] = r
    else:
        rq.following[before] = r
    bd.waiting[row] += 1


@compiled
def _offer(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
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
    if su.kind == POLYSERVE and stage != PREFILL and sv.label[s] != rq.tier[r]:
        bd.whole[PROMOTED] += 1
    _put(times, rules, su, rq, sv, gr, bd, out, s, r, now)
    return True


@compiled
def _put(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
    s: int,
    r: int,
    now: float,
) -> None:
    """Put a request on a server."""
    _advance(times, rules, su, rq, sv, bd, out, s, now)
    rq.following[r] = NOBODY
    if su.is_split and sv.stage[s] == DECODE:
        rq.total[r] = rq.prompt[r] + rq.emitted[r] - 1
        rq.ready[r] = now + rules.transfer_base + rules.transfer_token * rq.total[r]
        rq.following[r] = sv.join_head[s]
        sv.join_head[s] = r
        sv.joining[s] += 1
        sv.joining_tokens[s] += rq.total[r]
    else:
        _append(su, rq, sv, bd, s, r)
    if sv.phase[s] == IDLE:
        sv.phase[s] = BETWEEN
        sv.end[s] = now
        _set_event(bd, s, now)
    else:  # the end of the step under way, or now
        _set_event(bd, s, sv.end[s])
    _reload(times, rules, sv, gr, s)


@compiled
def _append(su: Setup, rq: RequestArrays, sv: ServerArrays, bd: Board, s: int, r: int) -> None:
    """Put a prompt into a server's queue, by its deadline or behind the others."""
    sv.pending[s] += 1
    sv.pending_tokens[s] += rq.total[r] - rq.computed[r]
    before, q = bd.tail[s], NOBODY
    if su.by_deadline:
        before, q = NOBODY, sv.head[s]
        while q != NOBODY and rq.due[q] <= rq.due[r]:
            before, q = q, rq.following[q]
    rq.following[r] = q
    if before == NOBODY:
        sv.head[s] = r
    else:
        rq.following[before] = r
    if q == NOBODY:
        bd.tail[s] = r


@compiled
def _reload(times: StepTimes, rules: Rules, sv: ServerArrays, gr: Gradient, s: int) -> None:
    if gr.row[s] != NOBODY:
        sv.load[s] = load_of(times, rules, sv, s)
        move(gr, sv, s)


@compiled
def _advance(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    bd: Board,
    out: Results,
    s: int,
    now: float,
) -> bool:
    """Bring a server up to a time; a step that ends just then is followed by none yet."""
    changed = False
    while sv.phase[s] == STEPPING and sv.end[s] <= now:
        changed = _settle(rules, su, rq, sv, bd, out, s) or changed
        sv.phase[s] = BETWEEN
        if sv.end[s] < now:
            _begin(times, rules, su, rq, sv, bd, out, s, sv.end[s])
    return changed


@compiled
def _join(rules: Rules, rq: RequestArrays, sv: ServerArrays, bd: Board, s: int, t: float) -> None:
    """Let those decode whose keys and values have come."""
    before, r = NOBODY, sv.join_head[s]
    while r != NOBODY:
        following = rq.following[r]
        fits = sv.kv[s] + rq.total[r] <= rules.capacity and sv.decodes[s] < rules.seats
        if rq.ready[r] <= t and fits:
            if before == NOBODY:
                sv.join_head[s] = following
            else:
                rq.following[before] = following
            rq.following[r] = NOBODY
            sv.joining[s] -= 1
            sv.joining_tokens[s] -= rq.total[r]
            sv.kv[s] += rq.total[r]
            _seat(rules, rq, sv, s, r, t)
            bd.fresh[s] += 1
        else:
            before = r
        r = following


@compiled
def _preempt(
    su: Setup, rules: Rules, rq: RequestArrays, sv: ServerArrays, bd: Board, out: Results, s: int
) -> None:
    """Take the cache of whoever came last, until there is room for a token each."""
    while sv.kv[s] + sv.decodes[s] > rules.capacity and sv.decodes[s] > 1:
        last = 0
        for i in range(1, sv.decodes[s]):
            r, other = sv.slot_request[s, i], sv.slot_request[s, last]
            if (rq.arrival[r], r) > (rq.arrival[other], other):
                last = i
        r = sv.slot_request[s, last]
        _unseat(rules, rq, sv, s, last)
        out.preemptions[r] += 1
        out.last[r] = sv.end[s]
        rq.total[r] = rq.prompt[r] + rq.emitted[r]
        rq.computed[r] = 0
        if su.is_split:  # computed anew where it is; the servers of prompts are not asked again
            rq.ready[r] = sv.end[s] + rules.transfer_base + rules.transfer_token * rq.total[r]
            rq.total[r] -= 1
            rq.following[r] = sv.join_head[s]
            sv.join_head[s] = r
            sv.joining[s] += 1
            sv.joining_tokens[s] += rq.total[r]
            continue
        sv.pending[s] += 1
        sv.pending_tokens[s] += rq.total[r]
        rq.following[r] = sv.head[s]
        if sv.head[s] == NOBODY:
            bd.tail[s] = r
        sv.head[s] = r


@compiled
def _begin(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    bd: Board,
    out: Results,
    s: int,
    t: float,
) -> None:
    """Begin a server's next step, or let it idle if there is nothing to do."""
    if sv.joining[s]:
        _join(rules, rq, sv, bd, s, t)
    if sv.kv[s] + sv.decodes[s] > rules.capacity:
        _preempt(su, rules, rq, sv, bd, out, s)
    decodes = sv.decodes[s]
    read = sv.context[s] + decodes
    prefill, pairs, prefills, before_chunks = 0, 0.0, 0, 0
    if sv.pending[s]:
        limit = min(slack_of(rules, sv, s, t), rules.max_step)
        budget = (su.budget or rules.max_tokens) - decodes
        holders, r = 0, sv.head[s]
        while r != NOBODY and (rq.holds[r] or su.by_deadline):
            holders += rq.holds[r]
            r = rq.following[r]
        before, r = NOBODY, sv.head[s]
        while r != NOBODY and prefill < budget:
            following = rq.following[r]
            if not rq.holds[r]:
                if su.sheds and rq.emitted[r] == 0 and _is_lost(times, rq, r, t):
                    sv.pending[s] -= 1
                    sv.pending_tokens[s] -= rq.total[r]
                    if before == NOBODY:
                        sv.head[s] = following
                    else:
                        rq.following[before] = following
                    if following == NOBODY:
                        bd.tail[s] = before
                    _decline(bd, out, r, t)
                    r = following
                    continue
                is_full = decodes + holders >= rules.seats
                if is_full or sv.kv[s] + rq.total[r] + decodes > rules.capacity:
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
                sv.kv[s] += rq.total[r]
                holders += 1
            rq.grant[r] = got
            prefill += got
            pairs += got * past + got * got / 2
            prefills += 1
            before_chunks += past
            before, r = r, following
    if decodes == 0 and prefill == 0:
        sv.phase[s] = IDLE
        return
    bd.began[s] = t
    sv.end[s] = t + step_seconds(times, prefill, pairs, prefills, before_chunks, decodes, read)
    sv.phase[s] = STEPPING


@compiled
def _is_lost(times: StepTimes, rq: RequestArrays, r: int, now: float) -> bool:
    """Tell whether a prompt's first token would be late even if nobody else were there."""
    left = rq.total[r]
    return now + step_seconds(times, left, left * left / 2, 1, 0, 0, 0) > rq.due[r] + EPS


@compiled
def _schedule(su: Setup, rq: RequestArrays, sv: ServerArrays, bd: Board, s: int) -> None:
    """Set a server's next event: the end of its step, or a time before which nobody ends."""
    if sv.phase[s] == IDLE:
        if sv.joining[s] == 0:
            _drop_event(bd, s)
            return
        soonest, r = np.inf, sv.join_head[s]
        while r != NOBODY:
            soonest = min(soonest, rq.ready[r])
            r = rq.following[r]
        sv.phase[s] = BETWEEN
        sv.end[s] = max(soonest, sv.end[s])
        _set_event(bd, s, sv.end[s])
        return
    time = sv.end[s]
    steps = sv.next_finish[s] - sv.steps[s]
    if su.jumps and steps > 1 and sv.pending[s] == 0 and sv.joining[s] == 0:
        # Steps only grow longer while nobody comes or goes.
        time += (steps - 1) * (time - bd.began[s]) * _ROUNDING
    _set_event(bd, s, time)


@compiled
def _pull(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
    s: int,
    now: float,
) -> None:
    """Let a server that has got room take from the router's queues: its own tier's, then looser."""
    tiers = rules.tau.size
    if sv.state[s] != SERVING:
        return
    own = tiers if sv.stage[s] == PREFILL else sv.label[s]
    for row in range(own, tiers if own < tiers else tiers + 1):
        if row != own and not su.promotes:
            break
        while bd.queue[row] != NOBODY:
            r = bd.queue[row]
            if rq.emitted[r] == 0 and _is_lost(times, rq, r, now):
                bd.queue[row] = rq.following[r]
                bd.waiting[row] -= 1
                _decline(bd, out, r, now)
                continue
            guard = 1.0 if row == own else rules.guard
            if admits(times, rules, rq, sv, s, r, now, guard) != TAKES:
                break
            bd.queue[row] = rq.following[r]
            bd.waiting[row] -= 1
            bd.whole[PROMOTED] += row != own
            _put(times, rules, su, rq, sv, gr, bd, out, s, r, now)


@compiled
def _event(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
    s: int,
) -> None:
    """Do what a server's event is about."""
    now = bd.key[s]
    bd.whole[EVENTS] += 1
    changed = _advance(times, rules, su, rq, sv, bd, out, s, now)
    if sv.phase[s] == BETWEEN:
        if changed:
            _reload(times, rules, sv, gr, s)
            if su.kind == POLYSERVE:
                _pull(times, rules, su, rq, sv, gr, bd, out, s, now)
        _begin(times, rules, su, rq, sv, bd, out, s, now)
        is_empty = sv.decodes[s] + sv.pending[s] + sv.joining[s] == 0
        if sv.state[s] == DRAINING and is_empty:
            sv.state[s] = POOLED
            sv.label[s] = NOBODY
    _schedule(su, rq, sv, bd, s)


@compiled
def _tick(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
    watch: Watch,
    now: float,
    timeline: np.ndarray,
) -> None:
    """Check queues and sizes, and note down what the fleet looks like."""
    tiers = rules.tau.size
    for s in range(sv.state.size):
        if sv.state[s] == STARTING and bd.up_at[s] <= now:
            sv.state[s] = POOLED
    for row in range(tiers + 1):
        while bd.queue[row] != NOBODY:
            r = bd.queue[row]
            bd.queue[row] = rq.following[r]
            bd.waiting[row] -= 1
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
    if su.scales:
        bd.whole[DRAINED] += scale_down(
            times, rules, sv, gr, watch, now, su.hold, su.cooldown, su.most, su.share
        )
        for s in range(sv.state.size):
            is_empty = sv.decodes[s] + sv.pending[s] + sv.joining[s] == 0
            if sv.state[s] == DRAINING and is_empty:
                sv.state[s] = POOLED
                sv.label[s] = NOBODY
        if su.reserve >= 0:
            _resize(su, sv, bd, watch, now)
    _sample(sv, gr, bd, now, timeline)


@compiled
def _force(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
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


@compiled
def _hand_over(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
    now: float,
) -> None:
    """Place those whose prompts have just been computed with servers of further tokens."""
    while bd.whole[HANDED] != NOBODY:
        r = bd.whole[HANDED]
        bd.whole[HANDED] = rq.following[r]
        if not _offer(times, rules, su, rq, sv, gr, bd, out, r, now, DECODE):
            _enqueue(rq, bd, rq.tier[r], r)


@compiled
def _resize(su: Setup, sv: ServerArrays, bd: Board, watch: Watch, now: float) -> None:
    count = resize_pool(sv, watch, su.reserve, su.hold, bd.scratch)
    for i in range(abs(count)):
        s = bd.scratch[i]
        if count > 0:
            sv.state[s] = STARTING
            bd.up_at[s] = now + su.start
            bd.on_since[s] = now
            bd.whole[STARTED] += 1
        else:
            sv.state[s] = OFF
            bd.real[0] += now - bd.on_since[s]


@compiled
def _sample(
    sv: ServerArrays, gr: Gradient, bd: Board, now: float, timeline: np.ndarray
) -> None:
    """Write a row of the timeline: time; servers per row, draining, pooled, starting; waiting."""
    at = bd.whole[TICKS]
    bd.whole[TICKS] += 1
    if at >= timeline.shape[0]:
        return
    rows = gr.count.size
    timeline[at, 0] = now
    for row in range(rows):
        timeline[at, 1 + row] = gr.count[row]
    for s in range(sv.state.size):
        state = sv.state[s]
        timeline[at, 1 + rows] += state == DRAINING
        timeline[at, 2 + rows] += state == POOLED
        timeline[at, 3 + rows] += state == STARTING
    for row in range(rows):
        timeline[at, 4 + rows] += bd.waiting[row]


@compiled
def _arrive(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
    watch: Watch,
    r: int,
) -> None:
    """Let a request in: it is refused, placed, or waits."""
    now, k = rq.arrival[r], rq.tier[r]
    rules.arrived[k] += 1
    rules.prompts[k] += (rq.prompt[r] - rules.prompts[k]) / rules.arrived[k]
    tiers = rules.tau.size
    if _is_lost(times, rq, r, now):  # not even an idle server could
        _decline(bd, out, r, now)
        return
    stage, row = (PREFILL, tiers) if su.is_split else (WHOLE, k)
    # Nobody overtakes those of its own queue.
    if bd.queue[row] == NOBODY or rq.due[r] < rq.due[bd.queue[row]]:
        if _offer(times, rules, su, rq, sv, gr, bd, out, r, now, stage):
            return
        watch.refused[row] += 1
    _enqueue(rq, bd, row, r)


@compiled
def run(
    times: StepTimes,
    rules: Rules,
    su: Setup,
    rq: RequestArrays,
    sv: ServerArrays,
    gr: Gradient,
    bd: Board,
    out: Results,
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
        event = bd.key[bd.heap[0]] if bd.whole[SIZE] else np.inf
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
            _event(times, rules, su, rq, sv, gr, bd, out, bd.heap[0])
            if bd.whole[HANDED] != NOBODY:
                _hand_over(times, rules, su, rq, sv, gr, bd, out, event)
        else:
            _arrive(times, rules, su, rq, sv, gr, bd, out, watch, arrived)
            bd.real[1] = arrival
            arrived += 1
            if bd.whole[HANDED] != NOBODY:
                _hand_over(times, rules, su, rq, sv, gr, bd, out, arrival)
    for s in range(sv.state.size):
        if sv.state[s] != OFF:
            bd.real[0] += bd.real[1] - bd.on_since[s]
    return count - bd.whole[DONE]


def start_rivals(sv: ServerArrays, gr: Gradient, labels: np.ndarray, tiers: int) -> None:
    """Put servers to work before anybody arrives.

    Args:
        sv: Servers.
        gr: The gradient.
        labels: `[servers]`: tier of each, `tiers` for prompts, or `NOBODY` for none.
        tiers: How many tiers there are.
    """
    for s in range(sv.state.size):
        if labels[s] == NOBODY:
            sv.state[s] = SERVING
        else:
            leave(gr, s)
            label(gr, sv, s, int(labels[s]), tiers)
