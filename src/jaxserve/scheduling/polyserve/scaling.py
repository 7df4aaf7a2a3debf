"""How many servers each tier needs: the tail of its gradient is the signal.

Up: a request that its tier has no room for takes a server from the pool, and a pool that runs low
is filled up. Where servers make further tokens only, and none is in the pool, tiers that have more
room give servers to those that have none. Down: the tail of a tier is let drain if the others have
room for whom it serves and for its share of what is still to come, and if that has been so for some
checks in a row.

Source: PolyServe (arXiv 2507.17769) for the idea; numbers are ours.
"""

from typing import NamedTuple

import numpy as np

from jaxserve.core.compiled import lean
from jaxserve.scheduling.polyserve.admission import steady_seconds
from jaxserve.scheduling.polyserve.packing import Gradient, label, leave, load_of
from jaxserve.scheduling.polyserve.state import (
    DRAINING,
    NOBODY,
    OFF,
    POOLED,
    PREFILL,
    SERVING,
    STARTING,
    WHOLE,
    Rules,
    Servers,
)
from jaxserve.scheduling.step_times import StepTimes

_CLEARLY = 0.98
"""Share of a load below which another one is clearly less."""


class Watch(NamedTuple):
    """What the scaler remembers between checks.

    Attributes:
        held: `[rows + 1]`: checks in a row at which a server could be spared; the last is the pool.
        changed: `[rows]`: when the row last let a server drain.
        refused: `[rows]`: requests that found no room in their row since the last check.
        trend: `[2]`: servers with a label at the last check, and how many more there have been of
            late: the sum over about as long as a server takes to start.
    """

    held: np.ndarray
    changed: np.ndarray
    refused: np.ndarray
    trend: np.ndarray


def empty_watch(tiers: int) -> Watch:
    """Return the memory of a scaler that has seen nothing."""
    return Watch(
        np.zeros(tiers + 2, np.int64), np.full(tiers + 1, -np.inf), np.zeros(tiers + 1, np.int64),
        np.array([-1.0, 0.0]),
    )  # fmt: skip


@lean
def spares_tail(
    times: StepTimes, rules: Rules, sv: Servers, gr: Gradient, row: int, most: float
) -> bool:
    """Tell whether the others of a row can do without its last server.

    Two things must hold. Whoever is on the last server finds a place on the others now. And with
    N servers, the load that each will carry when it is shared by N - 1 stays below `most`; without
    that check a fleet goes back and forth between sizes.

    Args:
        times: Times of steps.
        rules: The policy's.
        sv: Servers.
        gr: The gradient.
        row: Which row.
        most: Load of the survivors, between 0 and 1.
    """
    count = gr.filled[row]
    if count < 2:
        return False
    tail = gr.order[row, count - 1]
    total = 0.0
    for i in range(count):
        total += load_of(times, rules, sv, gr.order[row, i])
    if total / (count - 1) > most:
        return False
    moving = sv.one.decodes[tail] + sv.one.pending[tail] + sv.one.joining[tail]
    if sv.one.stage[tail] == PREFILL:
        return True
    if moving == 0:
        return True
    tokens = (
        sv.one.known[tail] + sv.one.pending_tokens[tail] + sv.one.joining_tokens[tail]
    ) // moving
    share = 1.0 if sv.one.stage[tail] == WHOLE else 0.0
    tau = rules.means.tau[row]
    for i in range(count - 1):
        s = gr.order[row, i]
        many = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s]
        context = sv.one.known[s] + sv.one.pending_tokens[s] + sv.one.joining_tokens[s]
        while moving > 0 and many < rules.seats and context + tokens <= rules.capacity:
            many += 1
            context += tokens
            if steady_seconds(times, rules, row, many, context, share) > most * tau:
                break
            moving -= 1
        if moving == 0:
            return True
    return False


@lean
def scale_down(
    times: StepTimes,
    rules: Rules,
    sv: Servers,
    gr: Gradient,
    watch: Watch,
    now: float,
    hold: int,
    cooldown: float,
    most: float,
    share: float,
) -> int:
    """Let servers drain that their rows can do without; called at every check.

    Args:
        times: Times of steps.
        rules: The policy's.
        sv: Servers; those that are let drain change their state and leave their row.
        gr: The gradient.
        watch: The scaler's memory.
        now: Clock time in seconds.
        hold: Checks in a row at which it must hold.
        cooldown: Seconds between two of these changes in a row.
        most: Load that survivors may have.
        share: Share of a row's servers that may be let drain at once; at least one.

    Returns:
        How many were.
    """
    drained = 0
    for row in range(gr.filled.size):
        is_calm = watch.refused[row] == 0
        watch.refused[row] = 0
        if not (is_calm and spares_tail(times, rules, sv, gr, row, most)):
            watch.held[row] = 0
            continue
        watch.held[row] += 1
        if watch.held[row] < hold or now - watch.changed[row] < cooldown:
            continue
        allowed = max(1, int(share * gr.filled[row]))
        while allowed > 0 and spares_tail(times, rules, sv, gr, row, most):
            tail = gr.order[row, gr.filled[row] - 1]
            leave(gr, sv, tail)
            sv.one.state[tail] = DRAINING
            drained += 1
            allowed -= 1
        watch.held[row] = 0
        watch.changed[row] = now
    return drained


@lean
def rebalance(
    times: StepTimes, rules: Rules, sv: Servers, gr: Gradient, watch: Watch, share: float
) -> int:
    """Give servers to tiers that found no room, from tiers that have more of it.

    Without spare servers, who came first has the most: a tier can be short of servers while another
    could do with less. So the last server of the tier that would then be the least loaded changes
    its label, if even then that tier is less loaded than the one in need. Whoever is on it stays.

    Args:
        times: Times of steps.
        rules: The policy's.
        sv: Servers; those that change have another label and row.
        gr: The gradient.
        watch: The scaler's memory; only read.
        share: Share of a tier's servers that may change at once; at least one.

    Returns:
        How many changed.
    """
    tiers = gr.filled.size - 1
    for s in range(sv.one.state.size):
        if sv.one.state[s] == POOLED and sv.one.stage[s] != PREFILL:
            return 0
    total = sv.dues
    for row in range(tiers):
        total[row] = 0.0
        for i in range(gr.filled[row]):
            total[row] += load_of(times, rules, sv, gr.order[row, i])
    changed = 0
    for needy in range(tiers):
        if watch.refused[needy] == 0 or gr.filled[needy] == 0:
            continue
        allowed = max(1, int(share * gr.filled[needy]))
        for _ in range(allowed):
            giver, least = NOBODY, _CLEARLY * total[needy] / gr.filled[needy]
            for row in range(tiers):
                if row == needy or gr.filled[row] < 2:
                    continue
                after = total[row] / (gr.filled[row] - 1)
                if after < least:
                    giver, least = row, after
            if giver == NOBODY:
                break
            s = gr.order[giver, gr.filled[giver] - 1]
            total[giver] -= load_of(times, rules, sv, s)
            leave(gr, sv, s)
            sv.one.label[s] = needy
            sv.one.load[s] = load_of(times, rules, sv, s)
            total[needy] += sv.one.load[s]
            label(gr, sv, s, needy, tiers)
            changed += 1
    return changed


@lean
def resize_pool(
    sv: Servers, watch: Watch, reserve: int, hold: int, keep: float, change: np.ndarray
) -> int:
    """Choose servers to start, or to turn off, so that enough are warm and idle.

    Enough are `reserve`, and as many as have been needed of late while one takes to start.

    Args:
        sv: Servers; states are left as they are.
        watch: The scaler's memory.
        reserve: Servers that the pool should hold.
        hold: Checks in a row at which there must be too many before any is turned off.
        keep: Share of the recent growth that still counts at the next check.
        change: `[servers]`: written with the servers that change.

    Returns:
        How many are to start; or less than zero, how many are to be turned off.
    """
    pooled, coming, absent, serving = 0, 0, 0, 0
    for s in range(sv.one.state.size):
        pooled += sv.one.state[s] == POOLED
        coming += sv.one.state[s] == STARTING
        absent += sv.one.state[s] == OFF
        serving += sv.one.state[s] == SERVING
    growth = max(0.0, serving - watch.trend[0]) if watch.trend[0] >= 0 else 0.0
    watch.trend[0] = serving
    watch.trend[1] = keep * watch.trend[1] + growth
    reserve += int(watch.trend[1])
    last = watch.held.size - 1
    wanted = min(absent, reserve - pooled - coming)
    if wanted > 0:
        watch.held[last] = 0
        return _collect(sv, OFF, wanted, change)
    if pooled <= reserve:
        watch.held[last] = 0
        return 0
    watch.held[last] += 1
    if watch.held[last] < hold:
        return 0
    return -_collect(sv, POOLED, pooled - reserve, change)


@lean
def _collect(sv: Servers, state: int, count: int, change: np.ndarray) -> int:
    found = 0
    for i in range(sv.one.state.size):
        s = i if state == OFF else sv.one.state.size - 1 - i
        if found < count and sv.one.state[s] == state:
            change[found] = s
            found += 1
    return found
