"""The compiled loop of a simulated fleet: arrivals, the router and the scaler over time.

Events are ordered by time; at one time steps end, then requests arrive, then steps begin; servers
by number. `fleet.py` is the way in.
"""

import numpy as np

from jaxserve.core.compiled import inlined, lean
from jaxserve.scheduling.polyserve.admission import TAKES, admits
from jaxserve.scheduling.polyserve.packing import (
    LEAST_REQUESTS,
    POLYSERVE,
    STATIC,
    Gradient,
    is_backed_up,
    label,
    leave,
    rival,
    route,
)
from jaxserve.scheduling.polyserve.scaling import Watch, rebalance, resize_pool, scale_down
from jaxserve.scheduling.polyserve.state import (
    BETWEEN,
    DECODE,
    DRAINING,
    IDLE,
    NOBODY,
    OFF,
    POOLED,
    PREFILL,
    SERVING,
    STARTING,
    WHOLE,
    Records,
    Rules,
    Servers,
)
from jaxserve.scheduling.step_times import StepTimes
from jaxserve.sim.fleet_board import (
    DONE,
    DRAINED,
    EVENTS,
    HANDED,
    PROMOTED,
    SIZE,
    STARTED,
    TICKS,
    Board,
    Setup,
    decline,
    set_event,
)
from jaxserve.sim.fleet_server import (
    advance,
    begin_step,
    is_hopeless,
    queue_prompt,
    set_next_event,
    update_load,
)

_ASKED = 4
"""Waiting requests that a server is asked about in vain before it goes on."""


@lean
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


@lean
def _must_wait(
    rules: Rules, rq: Records, sv: Servers, gr: Gradient, bd: Board, r: int, now: float
) -> bool:
    """Tell whether a prompt would be computed for nobody who could go on with it."""
    ahead = sv.ahead
    for k in range(rules.means.size):
        ahead[k] = bd.lines.coming[k] + bd.lines.waiting[k]
    return is_backed_up(rules, rq, sv, gr, r, now, ahead)


@lean
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
        if stage == PREFILL and _must_wait(rules, rq, sv, gr, bd, r, now):
            return False
        s = route(times, rules, rq, sv, gr, r, now, stage, su.promotes == 1)
    else:
        s = rival(su.kind, times, rules, rq, sv, r, now, stage, bd.seed)
    if s == NOBODY:
        return False
    if su.kind == POLYSERVE and stage != PREFILL and sv.one.label[s] != rq.tier[r]:
        bd.whole[PROMOTED] += 1
    _put(times, rules, su, rq, sv, gr, bd, out, s, r, now)
    return True


@lean
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
    advance(times, rules, su, rq, sv, bd, out, s, now)
    rq.following[r] = NOBODY
    if su.is_split and sv.one.stage[s] == DECODE:
        rq.total[r] = rq.prompt[r] + rq.emitted[r] - 1
        rq.ready[r] = now + rules.transfer_base + rules.transfer_token * rq.total[r]
        rq.following[r] = sv.one.join_head[s]
        sv.one.join_head[s] = r
        sv.one.joining[s] += 1
        sv.one.joining_tokens[s] += rq.total[r]
    else:
        bd.lines.coming[rq.tier[r]] += su.is_split
        queue_prompt(su, rq, sv, bd, s, r)
    if sv.one.phase[s] == IDLE:
        sv.one.phase[s] = BETWEEN
        sv.one.end[s] = now
        set_event(bd, s, now)
    else:  # the end of the step under way, or now
        set_event(bd, s, sv.one.end[s])
    update_load(times, rules, sv, gr, s)


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
    held = 0  # tiers whose prompts have to wait
    for row in range(own, tiers if own < tiers else tiers + 1):
        if row != own and not su.promotes:
            break
        guard = 1.0 if row == own else rules.guard
        before, r = NOBODY, bd.lines.queue[row]
        while r != NOBODY and asked < _ASKED:
            following = rq.following[r]
            is_lost = rq.emitted[r] == 0 and is_hopeless(times, rq, r, now)
            if not is_lost and row == tiers:
                bit = 1 << rq.tier[r]
                if not held & bit and _must_wait(rules, rq, sv, gr, bd, r, now):
                    held |= bit
                if held & bit:
                    before, r = r, following
                    continue
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
                decline(bd, out, r, now)
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
    changed = advance(times, rules, su, rq, sv, bd, out, s, now)
    if sv.one.phase[s] == BETWEEN:
        if changed:
            update_load(times, rules, sv, gr, s)
            if su.kind == POLYSERVE:
                _pull(times, rules, su, rq, sv, gr, bd, out, s, now)
        begin_step(times, rules, su, rq, sv, bd, out, s, now)
        is_empty = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s] == 0
        if sv.one.state[s] == DRAINING and is_empty:
            sv.one.state[s] = POOLED
            sv.one.label[s] = NOBODY
    set_next_event(su, rq, sv, bd, s)


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
            if rq.emitted[r] == 0 and is_hopeless(times, rq, r, now):
                decline(bd, out, r, now)
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
        if su.is_split:
            rebalance(times, rules, sv, gr, watch, su.share)
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


@lean
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
    watch: Watch,
    now: float,
) -> None:
    """Place those whose prompts have just been computed with servers of further tokens."""
    while bd.whole[HANDED] != NOBODY:
        r = bd.whole[HANDED]
        bd.whole[HANDED] = rq.following[r]
        if not _offer(times, rules, su, rq, sv, gr, bd, out, r, now, DECODE):
            watch.refused[rq.tier[r]] += 1
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
    if is_hopeless(times, rq, r, now):  # not even an idle server could
        decline(bd, out, r, now)
        return
    stage, row = (PREFILL, tiers) if su.is_split else (WHOLE, k)
    # Whoever waits has been asked about; somebody shorter may find room where it does not.
    if _offer(times, rules, su, rq, sv, gr, bd, out, r, now, stage):
        return
    watch.refused[row] += 1
    _enqueue(rq, bd, row, r)


@lean
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
                _hand_over(times, rules, su, rq, sv, gr, bd, out, watch, event)
        else:
            _arrive(times, rules, su, rq, sv, gr, bd, out, watch, arrived)
            bd.real[1] = arrival
            arrived += 1
            if bd.whole[HANDED] != NOBODY:
                _hand_over(times, rules, su, rq, sv, gr, bd, out, watch, arrival)
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
