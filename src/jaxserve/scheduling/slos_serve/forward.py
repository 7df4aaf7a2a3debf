"""The rule by which batches are formed, and the proof by simulation that a promise can be kept.

One rule serves both: `form` chooses the next batch, and `certify` applies it until every promised
prompt is done, and looks at the decodes that then remain. With an exact cost model what is
certified is what happens, unless somebody else is promised something, which is certified in turn.

The rule: a batch ends when the next token is due, at the latest. It holds the decodes whose token
would be late if they were left out, prompts by deadline, and then whoever else decodes.

Source: ours, after the batch formation of SLOs-Serve (arXiv 2504.08784).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxserve.core.cost import CostModel, StepLoad
from jaxserve.core.plan import DeclineReason
from jaxserve.scheduling.slos_serve.config import Pace

_TINY = 1e-9
"""Seconds that rounding may cost."""


class Prefill(NamedTuple):
    """A promised prompt that is not done. A tuple, because many are made.

    Attributes:
        deadline: Clock time of its first token in seconds.
        left: Tokens to compute.
        past: Tokens computed.
        tau: Seconds per token afterwards.
        output: Output tokens to reckon with.
    """

    deadline: float
    left: int
    past: int
    tau: float
    output: int


class Decodes(NamedTuple):
    """Promised decodes, one entry per request.

    Attributes:
        due: Clock times at which the next tokens are due in seconds.
        tau: Seconds per token.
        context: Tokens attended to.
        left: Output tokens to reckon with.
    """

    due: np.ndarray
    tau: np.ndarray
    context: np.ndarray
    left: np.ndarray


NO_DECODES = Decodes(np.empty(0), np.empty(0), np.empty(0), np.empty(0))


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that the rule forms.

    Attributes:
        is_in: Which decodes it holds.
        chunks: Tokens of each prompt, in order of deadline; prompts beyond get none.
        load: Its counts.
        horizon: Seconds within which it must end.
        is_late: Whether the decodes that must be in it take longer than that.
    """

    is_in: np.ndarray
    chunks: tuple[int, ...]
    load: StepLoad
    horizon: float
    is_late: bool


def form(
    now: float,
    decodes: Decodes,
    prefills: list[Prefill],
    cost: CostModel,
    *,
    pace_s: float,
    max_step_s: float,
    max_tokens: int,
) -> Batch:
    """Form the next batch of what has been promised.

    Args:
        now: Clock time in seconds.
        decodes: Promised decodes.
        prefills: Promised prompts, by deadline.
        cost: Times of steps, with their margin.
        pace_s: Tightest target per token; a batch is as long as that, if it may.
        max_step_s: Longest batch.
        max_tokens: Most tokens in a batch.
    """
    horizon = max_step_s
    if len(decodes.due):
        horizon = min(horizon, float(decodes.due.min()) - now - _TINY)
    is_in = decodes.due < now + horizon + min(pace_s, max_step_s)
    count = int(is_in.sum())
    load = StepLoad(decodes=count, context=round(float(decodes.context[is_in].sum())) + count)
    is_late = count > max_tokens or (count > 0 and cost.step_time(load) > horizon)
    if is_late:
        is_in, load = _urgent(decodes, is_in, cost, horizon, max_tokens)
        return Batch(is_in, (), load, horizon, is_late=True)
    chunks: list[int] = []
    room = max_tokens - count
    if prefills:
        first = prefills[0]
        limit = first.deadline - now - _TINY
        if cost.step_time(load.with_chunk(first.left, first.past)) <= limit:
            # It can be done in time by this batch, if nobody makes it longer.
            horizon = min(horizon, limit)
        elif count:
            # Perhaps before decodes, if these can still be on time in the batch after that.
            before = float(decodes.due.min()) - now - _TINY - cost.step_time(load)
            before = min(before, limit, max_step_s)
            if cost.step_time(StepLoad().with_chunk(first.left, first.past)) <= before:
                is_in, load = np.zeros(len(is_in), bool), StepLoad()
                horizon, room = before, max_tokens
        for one in prefills:
            tokens = one.left
            if tokens > room or cost.step_time(load.with_chunk(tokens, one.past)) > horizon:
                tokens = min(tokens, room, cost.prefill_within(horizon, load, one.past))
            if tokens <= 0:
                break
            chunks.append(tokens)
            room -= tokens
            load = load.with_chunk(tokens, one.past)
            if tokens < one.left:
                break
    if len(chunks) == len(prefills) and (not chunks or chunks[-1] == prefills[-1].left):
        is_in, load = _others(decodes, is_in, load, cost, horizon, max_tokens - load.tokens)
    return Batch(is_in, tuple(chunks), load, horizon, is_late=False)


def _urgent(
    decodes: Decodes, is_in: np.ndarray, cost: CostModel, horizon: float, max_tokens: int
) -> tuple[np.ndarray, StepLoad]:
    """Take the decodes that are due first, as many as fit into the time, at least one."""
    order = np.flatnonzero(is_in)
    order = order[np.argsort(decodes.due[order], kind="stable")]
    contexts = np.cumsum(decodes.context[order] + 1)

    def load_of(count: int) -> StepLoad:
        return StepLoad(decodes=count, context=round(float(contexts[count - 1])))

    low, high = 1, min(len(order), max_tokens) + 1
    while high - low > 1:
        middle = (low + high) // 2
        is_short = cost.step_time(load_of(middle)) <= horizon
        low, high = (middle, high) if is_short else (low, middle)
    chosen = np.zeros(len(is_in), bool)
    chosen[order[:low]] = True
    return chosen, load_of(low)


def _others(
    decodes: Decodes,
    is_in: np.ndarray,
    load: StepLoad,
    cost: CostModel,
    horizon: float,
    room: int,
) -> tuple[np.ndarray, StepLoad]:
    """Let those decode, too, whose token is due later, so that they are ahead when it is tight."""
    order = np.flatnonzero(~is_in)
    if not len(order) or room <= 0:
        return is_in, load
    order = order[np.argsort(decodes.due[order], kind="stable")][:room]
    contexts = np.cumsum(decodes.context[order] + 1)

    def load_of(count: int) -> StepLoad:
        context = load.context + round(float(contexts[count - 1]))
        return load._replace(decodes=load.decodes + count, context=context)

    low, high = 0, len(order) + 1
    if cost.step_time(load_of(len(order))) <= horizon:
        low = len(order)
    while high - low > 1:
        middle = (low + high) // 2
        is_short = cost.step_time(load_of(middle)) <= horizon
        low, high = (middle, high) if is_short else (low, middle)
    if not low:
        return is_in, load
    is_in = is_in.copy()
    is_in[order[:low]] = True
    return is_in, load_of(low)


def certify(
    now: float,
    decodes: Decodes,
    prefills: list[Prefill],
    cost: CostModel,
    *,
    pace: Pace,
    max_step_s: float,
    max_tokens: int,
) -> DeclineReason | None:
    """Tell whether every deadline can be kept, by forming the batches until all prompts are done.

    Args:
        now: Clock time in seconds.
        decodes: Promised decodes.
        prefills: Promised prompts and new ones.
        cost: Times of steps, with their margin.
        pace: How the target per token is read.
        max_step_s: Longest batch.
        max_tokens: Most tokens in a batch.

    Returns:
        None if all are kept; otherwise what is short.
    """
    due, tau, context, left = (np.array(part, float) for part in decodes)
    waiting = sorted(prefills)
    pace_s = pace_of(tau, waiting)
    if _is_hopeless(now, waiting, cost):
        return "compute"
    while waiting:
        state = Decodes(due, tau, context, left)
        batch = form(
            now, state, waiting, cost, pace_s=pace_s, max_step_s=max_step_s, max_tokens=max_tokens
        )
        if batch.is_late or not batch.load.tokens:
            return "compute"
        now += cost.step_time(batch.load)
        is_in = batch.is_in
        due[is_in] = (now + tau[is_in]) if pace == "tpot_gap" else (due[is_in] + tau[is_in])
        context[is_in] += 1
        left[is_in] -= 1
        done = 0
        new: list[tuple[float, float, float, float]] = []
        for place, tokens in enumerate(batch.chunks):
            one = waiting[place]
            if tokens < one.left:
                waiting[place] = one._replace(left=one.left - tokens, past=one.past + tokens)
                continue
            done += 1
            if now > one.deadline:
                return "compute"
            begin = one.deadline if pace == "tpot" else now
            new.append((begin + one.tau, one.tau, one.past + one.left, one.output - 1))
        if done:
            waiting = waiting[done:]
            columns = np.array(new).T
            due, tau, context, left = (
                np.concatenate([old, more])
                for old, more in zip((due, tau, context, left), columns, strict=True)
            )
        if waiting and now > waiting[0].deadline:
            return "compute"
    return _sustain(Decodes(due, tau, context, left), cost, pace_s, max_tokens)


def pace_of(tau: np.ndarray, prefills: list[Prefill]) -> float:
    """Return the tightest target per token."""
    tightest = float(tau.min()) if len(tau) else math.inf
    return min([tightest, *(one.tau for one in prefills)])


def _is_hopeless(now: float, prefills: list[Prefill], cost: CostModel) -> bool:
    """Tell whether some prompt is late even if nobody decodes and no batch is ever cut short."""
    load = StepLoad()
    for one in prefills:
        load = load.with_chunk(one.left, one.past)
        if now + cost.step_time(load) > one.deadline:
            return True
    return False


def _sustain(
    decodes: Decodes, cost: CostModel, pace_s: float, max_tokens: int
) -> DeclineReason | None:
    """Tell whether decodes alone keep their pace until they end, though their contexts grow.

    In a batch as long as the tightest target each tier decodes a share of its requests. The number
    of requests only falls, so that only those times matter at which the contexts together are
    longer than ever before; they grow until somebody ends.
    """
    count = len(decodes.due)
    if not count:
        return None
    share = pace_s / decodes.tau
    end = np.maximum(decodes.left, 0) * decodes.tau
    order = np.argsort(end, kind="stable")
    share, end, tau, context = share[order], end[order], decodes.tau[order], decodes.context[order]
    # Before the end of request i, requests i and later are there; each has grown by end[i] / tau.
    remaining = np.cumsum((share)[::-1])[::-1]
    start = np.cumsum((share * context)[::-1])[::-1]
    speed = np.cumsum((share / tau)[::-1])[::-1]
    contexts = start + speed * end
    peaks = contexts > np.concatenate([[-1.0], np.maximum.accumulate(contexts)[:-1]])
    for batch, total in zip(remaining[peaks], contexts[peaks], strict=True):
        rows = math.ceil(float(batch) - _TINY)
        load = StepLoad(decodes=rows, context=round(float(total)) + rows)
        if rows > max_tokens or cost.step_time(load) > pace_s:
            return "compute"
    return None
