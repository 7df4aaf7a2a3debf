"""Would a server keep everybody's objectives if it took one request more? Three checks.

Waiting matters for the first two tokens only; from the third on a request is in step with the
others on its server. So the first token's check follows the prompts chunk by chunk through the
steps to come (continuous prediction of chunked prefill), the second token's looks at the step after
that, and that of the later tokens at the fullest moment of the batch.

Source: PolyServe (arXiv 2507.17769). Chunks follow from the slack of who decodes, as `chunk` says.
"""

import numpy as np

from jaxserve.core.compiled import inlined, lean
from jaxserve.scheduling.polyserve.state import (
    BINS,
    DECODE,
    IDLE,
    NOBODY,
    PREFILL,
    STEPPING,
    WHOLE,
    Records,
    Rules,
    Servers,
)
from jaxserve.scheduling.step_times import StepTimes, longest_chunk, step_seconds

TAKES, FIRST, SECOND, LATER, MEMORY, SEATS = range(6)
"""Verdicts: it can be taken; or which token would be late, the request's own or somebody else's; or
what there is too little of."""
EPS = 1e-9
"""Seconds by which sums may be rounded."""
_FIRST_BIT, _SECOND_BIT, _LATER_BIT = 1, 2, 4
_LEAST_LEFT = 0.25
"""Share of its tier's mean output that a request is taken to have left at least."""


@lean
def slack_of(rules: Rules, sv: Servers, s: int, begin: float) -> float:
    """Return how long a step that begins now may take, so that no decode on the server is late.

    Infinite without decodes. Where every gap counts, early tokens make no difference.
    """
    slack = np.inf
    for k in range(rules.means.size):
        if sv.min_due[s, k] < np.inf:
            due = sv.min_due[s, k] + rules.means.tau[k] * (sv.one.steps[s] + 1)
            slack = min(slack, due - begin)
            if rules.is_gap:
                slack = min(slack, rules.means.tau[k])
    return slack


@lean
def chunk(
    times: StepTimes,
    rules: Rules,
    limit: float,
    prefill: int,
    pairs: float,
    prefills: int,
    before: int,
    decodes: int,
    context: int,
    past: int,
    left: int,
) -> int:
    """Return the tokens that a prompt gets in a step (dynamic chunking).

    As many as end within `limit` seconds; never nothing on a server that has nothing else to do.
    """
    most = min(left, rules.max_tokens - decodes - prefill)
    if most <= 0:
        return 0
    got = longest_chunk(
        times, limit, prefill, pairs, prefills, before, decodes, context, past, most
    )
    if got == 0 and decodes == 0 and prefill == 0:
        return min(most, 64)
    return got


@lean
def tier_seconds(rules: Rules, sv: Servers, s: int, tier: int) -> float:
    """Return the shortest seconds per token of a server's label, its decodes and a tier."""
    tau = rules.means.tau[tier]
    if sv.one.label[s] >= 0:
        tau = min(tau, rules.means.tau[sv.one.label[s]])
    for k in range(rules.means.size):
        if sv.min_due[s, k] < np.inf:
            tau = min(tau, rules.means.tau[k])
            break
    return tau


@lean
def steady_seconds(
    times: StepTimes, rules: Rules, tier: int, many: int, context: int, share: float
) -> float:
    """Return the seconds of a step of many decodes, with the prompts that follow them.

    Whoever leaves after a tier's mean output is replaced by somebody with a mean prompt, so that in
    the long run a step holds the share `prompt / output` of a token of prompt for every decode.

    Args:
        times: Times of steps.
        rules: Means of prompts and outputs.
        tier: Whose.
        many: Sequences that decode.
        context: Tokens that they attend to.
        share: How much of those prompts counts.
    """
    tokens = 0
    if share > 0:
        tokens = int(share * many * rules.means.prompt[tier] / rules.means.output[tier])
    if tokens == 0:
        return step_seconds(times, 0, 0.0, 0, 0, many, context)
    pairs = tokens * rules.means.prompt[tier] / 2
    return step_seconds(times, tokens, pairs, 1, 0, many, context)


@lean
def peak_kv(rules: Rules, rq: Records, sv: Servers, s: int, r: int, tokens: int, ahead: int) -> int:
    """Return the most tokens that will be in the cache at once if a request is taken.

    Residents grow by a token per step and leave at their tier's mean output. Time is cut into bins
    within which nobody leaves, so that the answer is never too small.

    Args:
        rules: Means of outputs.
        rq: Requests.
        sv: Servers.
        s: The server.
        r: The request, or `NOBODY`.
        tokens: Tokens of the request when it begins to decode.
        ahead: Steps that decodes are ahead of what is noted down.
    """
    horizon = 1.0
    for k in range(rules.means.size):
        horizon = max(horizon, rules.means.output[k])
    width = int(horizon / BINS) + 1
    for i in range(BINS + 1):
        sv.bins[0, i] = 0
        sv.bins[1, i] = 0
    steps = sv.one.steps[s] + ahead
    many, total = 0, 0
    for i in range(sv.one.decodes[s]):
        mean = rules.means.output[sv.slots.tier[s, i]]
        left = max(mean - (sv.slots.emitted[s, i] + steps), _LEAST_LEFT * mean)
        held = sv.slots.context[s, i] + steps
        at = min(BINS, int(left) // width + 1)
        sv.bins[0, at] += 1
        sv.bins[1, at] += held
        many += 1
        total += held
    for queued in (sv.one.head[s], sv.one.join_head[s]):
        q = queued
        while q != NOBODY:
            at = min(BINS, int(rules.means.output[rq.tier[q]]) // width + 1)
            sv.bins[0, at] += 1
            sv.bins[1, at] += rq.total[q]
            many += 1
            total += rq.total[q]
            q = rq.following[q]
    if r != NOBODY:
        at = min(BINS, int(rules.means.output[rq.tier[r]]) // width + 1)
        sv.bins[0, at] += 1
        sv.bins[1, at] += tokens
        many += 1
        total += tokens
    most = total
    for i in range(1, BINS + 1):  # at the end of bin i, before those leave who do so in it
        most = max(most, total + many * width * i)
        many -= sv.bins[0, i]
        total -= sv.bins[1, i]
    return most


@lean
def admits(
    times: StepTimes,
    rules: Rules,
    rq: Records,
    sv: Servers,
    s: int,
    r: int,
    now: float,
    guard: float,
) -> int:
    """Tell whether a server can take a request and let nobody miss an objective.

    Args:
        times: Times of steps, raised by the margin that is wanted.
        rules: The policy's.
        rq: Requests.
        sv: Servers.
        s: A server.
        r: A request that is not on it; decoding servers take those whose prompt is computed.
        now: Clock time in seconds.
        guard: Share of the server's pace that the later tokens may take.

    Returns:
        `TAKES`, or what stands against it.
    """
    if sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s] >= rules.seats:
        return SEATS
    checks = rules.checks
    tokens = rq.total[r]
    time, ahead = _roll(times, sv, s, now)
    if checks & _LATER_BIT and sv.one.stage[s] != PREFILL:
        peak = peak_kv(rules, rq, sv, s, r, tokens, ahead)
        if peak > rules.capacity:
            return MEMORY
        many = sv.one.decodes[s] + sv.one.pending[s] + sv.one.joining[s] + 1
        pace = guard * tier_seconds(rules, sv, s, rq.tier[r])
        share = rules.interference if sv.one.stage[s] == WHOLE else 0.0
        if steady_seconds(times, rules, rq.tier[r], many, peak, share) > pace:
            return LATER
    elif (
        sv.one.kv[s] + sv.one.joining_tokens[s] + sv.one.pending_tokens[s] + tokens > rules.capacity
    ):
        return MEMORY
    if not checks & (_FIRST_BIT | _SECOND_BIT):
        return TAKES
    return _walk(times, rules, rq, sv, s, r, now, time, ahead)


@inlined
def _roll(times: StepTimes, sv: Servers, s: int, now: float) -> tuple[float, int]:
    """Return when the step ends that a server is at, and how many steps that is ahead.

    Steps of decodes alone repeat the one that is noted down, so that they need not be.
    """
    time = max(now, sv.one.end[s])
    if sv.one.phase[s] != STEPPING:
        return time, 0
    decodes, context, ahead = sv.one.decodes[s], sv.one.context[s] + sv.one.decodes[s], 1
    time = sv.one.end[s]
    while time < now:
        time += step_seconds(times, 0, 0.0, 0, 0, decodes, context + decodes)
        context += decodes
        ahead += 1
    return time, ahead


@inlined
def _walk(  # noqa: C901  parts of it would hand a dozen numbers back and forth
    times: StepTimes,
    rules: Rules,
    rq: Records,
    sv: Servers,
    s: int,
    r: int,
    now: float,
    time: float,
    ahead: int,
) -> int:
    """Follow all prompts of a server, and the request's in its place, to their first tokens."""
    tiers = rules.means.size
    dues = sv.dues  # when each tier's next token is due
    decodes, steps = sv.one.decodes[s], sv.one.steps[s] + ahead
    context = sv.one.context[s] + ahead * decodes
    under_way = ahead > 0
    for k in range(tiers):
        dues[k] = np.inf
        if sv.min_due[s, k] < np.inf:
            dues[k] = sv.min_due[s, k] + rules.means.tau[k] * (steps + 1)
    # Prompts that end with the step under way join; who is on its way here is taken to be here.
    q = sv.one.head[s]
    while under_way and q != NOBODY:
        if (
            rq.grant[q]
            and rq.computed[q] + rq.grant[q] == rq.total[q]
            and sv.one.stage[s] != PREFILL
        ):
            decodes += 1
            context += rq.total[q]
            k = rq.tier[q]
            dues[k] = min(dues[k], rq.due[q] + rules.means.tau[k] * (rq.emitted[q] + 1))
        q = rq.following[q]
    q = sv.one.join_head[s]
    while q != NOBODY:
        decodes += 1
        context += rq.total[q]
        k = rq.tier[q]
        dues[k] = min(dues[k], rq.due[q] + rules.means.tau[k] * rq.emitted[q])
        q = rq.following[q]
    if sv.one.stage[s] == DECODE:
        k = rq.tier[r]
        arrives = now + rules.transfer_base + rules.transfer_token * rq.total[r]
        if decodes == 0 or sv.one.phase[s] == IDLE:
            time = max(time, arrives)
        while time < arrives:
            time += step_seconds(times, 0, 0.0, 0, 0, decodes, context + decodes)
            context += decodes
            for j in range(tiers):
                dues[j] += rules.means.tau[j]
        own = rq.due[r] + rules.means.tau[k] * rq.emitted[r]
        dues[k] = min(dues[k], max(own, time + rules.means.tau[k]) if own < time else own)
        return _next_step(times, rules, dues, decodes + 1, context + rq.total[r], time)
    is_in = False
    following = _unfinished(rq, sv.one.head[s], under_way)
    q, left, done = NOBODY, 0, 0
    for _ in range(rules.walk):
        slack = np.inf
        for k in range(tiers):
            slack = min(slack, dues[k] - time)
            if rules.is_gap and dues[k] < np.inf:
                slack = min(slack, rules.means.tau[k])
        limit = min(slack, rules.max_step)
        prefill, pairs, prefills, before = 0, 0.0, 0, 0
        must_end = np.inf
        joined, joined_context = 0, 0
        read = context + decodes
        while True:
            if left == 0:
                # The next prompt, by the time its first token is due; the new one in its place.
                if not is_in and (following == NOBODY or rq.due[r] < rq.due[following]):
                    is_in, q, done = True, r, rq.computed[r]
                elif following != NOBODY:
                    q = following
                    done = rq.computed[q] + (rq.grant[q] if under_way else 0)
                    following = _unfinished(rq, rq.following[q], under_way)
                else:
                    break
                left = rq.total[q] - done
            got = chunk(
                times, rules, limit, prefill, pairs, prefills, before, decodes, read, done, left
            )
            if got == 0:
                break
            prefill += got
            pairs += got * done + got * got / 2
            prefills += 1
            before += done
            left -= got
            done += got
            if left > 0:
                break
            if rq.emitted[q] == 0:
                must_end = min(must_end, rq.due[q])
            if sv.one.stage[s] != PREFILL:
                joined += 1
                joined_context += rq.total[q]
                k = rq.tier[q]
                # As if it had been due in this step, so that all dues move on together.
                dues[k] = min(dues[k], rq.due[q] + rules.means.tau[k] * rq.emitted[q])
        seconds = step_seconds(times, prefill, pairs, prefills, before, decodes, read)
        if seconds > slack + EPS and decodes > 0 and rules.checks & _FIRST_BIT:
            return SECOND
        time += seconds
        if time > must_end + EPS and rules.checks & _FIRST_BIT:
            return FIRST
        for k in range(tiers):
            dues[k] += rules.means.tau[k]
        context += decodes + joined_context
        decodes += joined
        if left == 0 and is_in and following == NOBODY:
            if sv.one.stage[s] == PREFILL:
                return TAKES
            return _next_step(times, rules, dues, decodes, context, time)
        if time > rq.due[r] and left > 0 and q == r and rules.checks & _FIRST_BIT:
            return FIRST
    return FIRST


@lean
def _unfinished(rq: Records, q: int, under_way: bool) -> int:  # noqa: FBT001  as compiled
    """Return the first prompt from `q` on that is not done with the step under way."""
    while under_way and q != NOBODY and rq.computed[q] + rq.grant[q] >= rq.total[q]:
        q = rq.following[q]
    return q


@lean
def _next_step(
    times: StepTimes, rules: Rules, dues: np.ndarray, decodes: int, context: int, time: float
) -> int:
    """Check the second token: the step in which the request decodes for the first time."""
    if not rules.checks & _SECOND_BIT:
        return TAKES
    end = time + step_seconds(times, 0, 0.0, 0, 0, decodes, context + decodes)
    for k in range(dues.size):
        if end > dues[k] + EPS or (
            rules.is_gap and dues[k] < np.inf and end - time > rules.means.tau[k]
        ):
            return SECOND
    return TAKES
