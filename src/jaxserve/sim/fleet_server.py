"""The steps of one server of a simulated fleet: who decodes, what a step takes, who is late.

Everybody who decodes on a server gets a token in each of its steps. Steps of decodes alone are
therefore done when somebody looks (decode jumping): an event is due no later than the step in which
the next sequence ends, and until then a server's state follows from its last one.
"""

import numpy as np

from jaxserve.core.compiled import inlined, lean
from jaxserve.scheduling.polyserve.admission import EPS, chunk, slack_of
from jaxserve.scheduling.polyserve.packing import Gradient, load_of, move
from jaxserve.scheduling.polyserve.state import (
    BETWEEN,
    IDLE,
    NEVER,
    NOBODY,
    PREFILL,
    STEPPING,
    Records,
    Rules,
    Servers,
)
from jaxserve.scheduling.step_times import StepTimes, step_seconds
from jaxserve.sim.fleet_board import (
    HANDED,
    LATE_FIRST,
    LATE_GAP,
    LATE_TOKEN,
    STEPS,
    Board,
    Setup,
    decline,
    drop_event,
    end_request,
    set_event,
)

_ROUNDING = 1 - 1e-9


@lean
def _seat(rules: Rules, rq: Records, sv: Servers, s: int, r: int, now: float) -> None:
    """Let a request decode on a server from its next step on."""
    i = sv.one.decodes[s]
    steps, k = sv.one.steps[s], rq.tier[r]
    sv.slots.request[s, i] = r
    sv.slots.tier[s, i] = k
    sv.slots.tpot[s, i] = rq.tpot[r]
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


@lean
def _unseat(rq: Records, sv: Servers, s: int, i: int) -> None:
    """Take the request of a slot away; the last slot's takes its place."""
    r = sv.slots.request[s, i]
    held = sv.slots.context[s, i] + sv.one.steps[s]
    sv.one.context[s] -= held
    sv.one.kv[s] -= held
    rq.emitted[r] = sv.slots.emitted[s, i] + sv.one.steps[s]
    last = sv.one.decodes[s] - 1
    k, due = sv.slots.tier[s, i], sv.slots.due[s, i]
    if i != last:
        sv.slots.request[s, i] = sv.slots.request[s, last]
        sv.slots.tier[s, i] = sv.slots.tier[s, last]
        sv.slots.tpot[s, i] = sv.slots.tpot[s, last]
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
        _refresh_due(sv, s, k)


@lean
def _refresh_due(sv: Servers, s: int, k: int) -> None:
    least = np.inf
    for j in range(sv.one.decodes[s]):
        if sv.slots.tier[s, j] == k:
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
        k = sv.slots.tier[s, i]
        gap = seconds
        if bd.desk.fresh[s] and out.last[r] >= 0:
            gap = t - out.last[r]
            out.last[r] = -1.0
        if gap > sv.slots.tpot[s, i] + EPS:
            out.missed[r] |= LATE_GAP
        if is_late:
            number = sv.slots.emitted[s, i] + steps - 1
            if t > rq.due[r] + number * sv.slots.tpot[s, i] + EPS:
                out.missed[r] |= LATE_TOKEN
            if t > sv.slots.due[s, i] + rules.means.tau[k] * steps + EPS:
                sv.slots.due[s, i] = t - rules.means.tau[k] * steps
    bd.desk.fresh[s] = 0
    if is_late:
        for k in range(rules.means.size):
            _refresh_due(sv, s, k)


@lean
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
                    end_request(rules, rq, bd, out, r, t)
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
    if su.is_split and sv.one.stage[s] == PREFILL:
        bd.lines.coming[rq.tier[r]] -= 1
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
        end_request(rules, rq, bd, out, r, t)
    elif su.is_split and sv.one.stage[s] == PREFILL:
        sv.one.kv[s] -= rq.total[r]
        out.last[r] = t
        rq.following[r] = bd.whole[HANDED]
        bd.whole[HANDED] = r
    else:
        _seat(rules, rq, sv, s, r, t)


@inlined
def queue_prompt(su: Setup, rq: Records, sv: Servers, bd: Board, s: int, r: int) -> None:
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


@lean
def update_load(times: StepTimes, rules: Rules, sv: Servers, gr: Gradient, s: int) -> None:
    """Note down what is known of a server, and move it to where its load belongs."""
    sv.one.known[s], sv.one.known_kv[s] = sv.one.context[s], sv.one.kv[s]
    if sv.one.row[s] != NOBODY:
        sv.one.load[s] = load_of(times, rules, sv, s)
        move(gr, sv, s)


@lean
def advance(
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
            begin_step(times, rules, su, rq, sv, bd, out, s, sv.one.end[s])
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


@lean
def begin_step(  # noqa: C901  parts of it would hand a dozen numbers back and forth
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
                if su.sheds and rq.emitted[r] == 0 and is_hopeless(times, rq, r, t):
                    sv.one.pending[s] -= 1
                    sv.one.pending_tokens[s] -= rq.total[r]
                    if before == NOBODY:
                        sv.one.head[s] = following
                    else:
                        rq.following[before] = following
                    if following == NOBODY:
                        bd.desk.tail[s] = before
                    if su.is_split:
                        bd.lines.coming[rq.tier[r]] -= 1
                    decline(bd, out, r, t)
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


@lean
def is_hopeless(times: StepTimes, rq: Records, r: int, now: float) -> bool:
    """Tell whether a prompt's first token would be late even if nobody else were there."""
    left = rq.total[r]
    return now + step_seconds(times, left, left * left / 2, 1, 0, 0, 0) > rq.due[r] + EPS


@inlined
def set_next_event(su: Setup, rq: Records, sv: Servers, bd: Board, s: int) -> None:
    """Set a server's next event: the end of its step, or a time before which nobody ends."""
    if sv.one.phase[s] == IDLE:
        if sv.one.joining[s] == 0:
            drop_event(bd, s)
            return
        soonest, r = np.inf, sv.one.join_head[s]
        while r != NOBODY:
            soonest = min(soonest, rq.ready[r])
            r = rq.following[r]
        sv.one.phase[s] = BETWEEN
        sv.one.end[s] = max(soonest, sv.one.end[s])
        set_event(bd, s, sv.one.end[s])
        return
    time = sv.one.end[s]
    steps = sv.one.next_finish[s] - sv.one.steps[s]
    if su.jumps and steps > 1 and sv.one.pending[s] == 0 and sv.one.joining[s] == 0:
        # Steps only grow longer while nobody comes or goes.
        time += (steps - 1) * (time - bd.desk.began[s]) * _ROUNDING
    set_event(bd, s, time)
