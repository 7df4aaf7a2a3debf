"""How many requests could keep their objectives at best, if the whole future were known."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array

from jaxserve.core.cost import CostModel, LinearCost, StepLoad
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.polyserve.router import tier_of
from jaxserve.sim.fleet import FleetSpec, FleetTrace
from jaxserve.sim.request import SimRequest

_PER_SECOND = 1000
_SLACK = 1e-9
_WHOLE = 200
"""Stretches from the beginning that are looked at."""
_LIKE = 4
"""Parts by length of prompt, and parts of each of them, in which requests count as alike."""
_WINDOWS_S = np.geomspace(0.1, 100.0, 28)
_APART = 8
"""Stretches of a length of which one begins before another has passed by that part of it."""


def least_work(cost: LinearCost, request: SimRequest, *, count: int | None = None) -> float:
    """Return the seconds of server time that a request takes at the very least.

    Its tokens and their contexts are counted, and nothing of what a step costs whoever is in it.

    Args:
        cost: The model.
        request: The request.
        count: Tokens behind the first one that are counted; None counts all.

    Raises:
        ConfigError: If the model has several planes, whose parts do not add up.
    """
    if len(cost.planes) != 1:
        raise ConfigError(
            f"a bound needs a cost model with one plane, got {len(cost.planes)}; use a five-term "
            "model."
        )
    base = cost.step_time(StepLoad())
    left = request.prompt_len - request.cached_len
    work = cost.step_time(StepLoad().with_chunk(left, request.cached_len)) - base
    count = request.output_len - 1 if count is None else count
    context = count * request.prompt_len + count * (count + 1) // 2
    decodes = cost.step_time(StepLoad(decodes=count, context=context)) - base
    return work + max(0.0, decodes)


def clairvoyant_share(
    requests: Sequence[SimRequest],
    cost: LinearCost,
    *,
    capacity: int | None = None,
    seats: int | None = None,
    knows_outputs: bool = True,
) -> float:
    """Return an upper bound of the share of requests that can keep their objectives.

    Work is a fluid, any part of a request can be served, and only that must hold: of what arrives
    within a stretch of time, the tokens that are due in it take no longer than the stretch. Early
    tokens make up for late ones, so that the bound is one for every reading of the time per token.

    Args:
        requests: In order of arrival, each with objectives of the time to the first token and per
            token.
        cost: A model with one plane.
        capacity: Tokens that the cache holds: a step's decodes attend to no more, which tells how
            many steps there are at least, and what these take whoever is in them. None forgets
            what a step takes by itself.
        seats: Most sequences of a step, likewise.
        knows_outputs: Whether the lengths of outputs are known as well. Without them whoever is
            chosen asks for what requests with like prompts and the same target per token do in the
            mean, which bounds every policy that sees lengths only as tokens come and gives up
            nobody whom it has begun to serve.

    Returns:
        The bound, between 0 and 1.

    Raises:
        ConfigError: If a request has no such objectives, or the model has several planes.

    Source: ours; a relaxation of preemptive earliest-deadline scheduling.
    """
    known = _Demands(requests, cost, capacity=capacity, seats=seats, knows_outputs=knows_outputs)
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    limits: list[float] = []

    def constrain(start: float, end: float) -> None:
        first, amounts_of = known.due(start, end)
        for amounts in amounts_of:
            if float(amounts.sum()) > end - start:
                places = np.flatnonzero(amounts)
                rows.append(np.full(len(places), len(limits)))
                columns.append(first + places)
                values.append(amounts[places])
                limits.append(end - start)

    begin, end = float(known.arrivals[0]), float(known.lasts.max())
    for window in _WINDOWS_S:
        start = -np.inf
        for arrival in known.arrivals:
            if arrival >= start + window / _APART:
                start = float(arrival)
                constrain(start, start + window)
    for due in np.linspace(begin, end, _WHOLE)[1:]:
        constrain(begin, float(due))
    for due in np.unique(np.quantile(known.firsts, np.linspace(0, 1, _WHOLE))):
        constrain(begin, float(due))
    if not limits:
        return 1.0
    shape = (len(limits), len(requests))
    matrix = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape
    )
    found = linprog(
        -np.ones(len(requests)), A_ub=matrix.tocsr(), b_ub=np.array(limits), bounds=(0, 1),
        method="highs",
    )  # fmt: skip
    if not found.success:
        raise ConfigError(f"the linear programme has no answer: {found.message}")
    return min(1.0, -float(found.fun) / len(requests))


class _Demands:
    """Seconds of server time that requests ask for, by when they are due."""

    def __init__(
        self,
        requests: Sequence[SimRequest],
        cost: LinearCost,
        *,
        capacity: int | None,
        seats: int | None,
        knows_outputs: bool,
    ) -> None:
        for request in requests:
            slo = request.slo
            if slo is None or slo.ttft_ms is None or slo.tpot_ms is None:
                raise ConfigError(
                    f"request {request.request_id} has no objectives of the first token and per "
                    "token; leave it out."
                )
        base = cost.step_time(StepLoad())
        self.prefills = np.array([least_work(cost, r, count=0) for r in requests])
        self.arrivals = np.array([r.arrival for r in requests])
        slos = np.array([(r.slo.ttft_ms, r.slo.tpot_ms) for r in requests if r.slo], np.float64)
        self.firsts = self.arrivals + slos[:, 0] / _PER_SECOND
        self._pace = slos[:, 1] / _PER_SECOND
        self._prompts = np.array([r.prompt_len for r in requests], np.float64)
        self._further = np.array([r.output_len - 1 for r in requests], np.float64)
        self._outputs = (
            None if knows_outputs else _Outputs(self._further, self._prompts, slos[:, 1])
        )
        longest = self._further if self._outputs is None else self._further.max()
        self.lasts = self.firsts + longest * self._pace
        plane = cost.planes[0]
        per_token, per_context = plane.token + plane.request, plane.context
        self._prices = [
            (per_token + (base / seats if seats else 0.0), per_context),
            (per_token, per_context + (base / capacity if capacity else 0.0)),
        ]
        """Per token and per token of context: steps are as many as sequences ask for, or memory."""

    def due(self, start: float, end: float) -> tuple[int, list[np.ndarray]]:
        """Return what must be done within a stretch of time.

        Returns:
            The first request that arrives in it, and seconds of it and of those after it.
        """
        first, last = np.searchsorted(self.arrivals, [start, end])
        here = slice(first, last)
        due = self.firsts[here]
        count = np.maximum(np.floor((end - due) / self._pace[here] + _SLACK), 0.0)
        if self._outputs is None:
            count = np.minimum(count, self._further[here])
            grown = count * (count + 1) / 2
        else:
            count, grown = self._outputs.until(here, count)
        prefill = np.where(due <= end, self.prefills[here], 0.0)
        context = count * self._prompts[here] + grown
        return first, [prefill + per * count + read * context for per, read in self._prices]


class _Outputs:
    """What is known of the lengths of outputs: those of requests with like prompts.

    Args:
        further: Tokens behind the first one, `[requests]`.
        prompts: Tokens of prompts, `[requests]`.
        targets: What is asked for per token; requests with different ones are not alike.
    """

    def __init__(self, further: np.ndarray, prompts: np.ndarray, targets: np.ndarray) -> None:
        label = np.unique(targets, return_inverse=True)[1]
        self._label = _bucket(label, prompts, prompts, _LIKE)
        self._spacing = further.max() + 1
        order = np.lexsort((further, self._label))
        self._ordered = self._label[order] * self._spacing + further[order]
        tokens = further[order]
        self._tokens = np.concatenate([[0.0], np.cumsum(tokens)])
        self._grown = np.concatenate([[0.0], np.cumsum(tokens * (tokens + 1) / 2)])
        self._ends = np.cumsum(np.bincount(self._label))
        self._sizes = np.bincount(self._label)

    def until(self, here: slice, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return means of min(tokens, count), and of the sum of 1 to that, both `[here]`."""
        label = self._label[here]
        count = np.minimum(count, self._spacing - 1)
        end, size = self._ends[label], self._sizes[label]
        place = np.searchsorted(self._ordered, label * self._spacing + count, side="right")
        begin, longer = end - size, end - place
        tokens = self._tokens[place] - self._tokens[begin] + longer * count
        grown = self._grown[place] - self._grown[begin] + longer * count * (count + 1) / 2
        return tokens / size, grown / size


def class_rate(
    cost: CostModel,
    *,
    prompt: float,
    output: float,
    tau: float,
    capacity: int,
    seats: int,
    has_prompts: bool = True,
) -> float:
    """Return the best steady rate of a server that serves one class of requests only.

    Lengths are exactly the means, arrivals are smooth, and every step holds as many tokens of
    prompts as the decodes that end in it have had.

    Args:
        cost: Times of steps.
        prompt: Mean tokens of prompts.
        output: Mean output tokens.
        tau: Seconds per token.
        capacity: Tokens that the cache holds.
        seats: Most sequences.
        has_prompts: Whether prompts are computed on the same server.

    Returns:
        Requests per second; 0 if not even one sequence can be served at that pace.

    Source: the optimum that PolyServe (arXiv 2507.17769) compares with, in our words.
    """
    mean = prompt + output / 2
    best = 0.0
    for count in range(1, min(seats, int(capacity / mean)) + 1):
        load = StepLoad(decodes=count, context=round(count * mean))
        if has_prompts:
            chunk = prompt * count / output
            load = load._replace(prefill=round(chunk), pairs=chunk * prompt / 2, prefills=1)
        seconds = cost.step_time(load)
        if seconds > tau:
            break
        best = max(best, count / (output * seconds))
    return best


def fleet_bound(
    trace: FleetTrace,
    spec: FleetSpec,
    tiers: tuple[float, ...],
    *,
    level: float = 1.0,
    is_banked: bool = False,
    buckets: int = 6,
) -> float:
    """Return an upper bound of the rate at which a share of a fleet's requests keep objectives.

    A linear programme: servers are divisible and each runs at one pace; requests of a tier and of
    like lengths are a class, whose requests may go to servers at any pace that they allow. Time,
    cache and seats of the servers must be enough. Arrivals are as smooth as can be.

    Args:
        trace: The requests; only how their lengths, tiers and objectives are distributed counts.
        spec: The servers; their cost model has one plane.
        tiers: Seconds per token, ascending.
        level: Share of requests that must keep their objectives. The programme chooses which.
        is_banked: Whether a request may be served more slowly than its tier, by what its first
            token can come earlier than it is due. Only that bounds the reading as deadlines;
            without it the answer is the optimum G* that others compare with.
        buckets: Classes by output length of a tier, and of each of those by prompt length.

    Returns:
        Requests per second that may arrive.

    Raises:
        ConfigError: For a cost model with several planes, or an empty trace.
    """
    if not isinstance(spec.cost, LinearCost) or len(spec.cost.planes) != 1 or not len(trace):
        raise ConfigError("a bound needs requests, and a linear cost model with one plane.")
    if not 0 < level <= 1:
        raise ConfigError(f"level must be above 0 and at most 1, got {level}.")
    plane = spec.cost.planes[0]
    tier = tier_of(trace.tpot, tiers)
    steps = trace.output - 1.0
    context = steps * trace.prompt + steps * (steps + 1) / 2
    decode = steps * (plane.token + plane.request) + plane.context * context
    prefill = plane.token * trace.prompt + plane.request
    spare = trace.ttft - prefill - plane.base
    longest = np.array(tiers)[tier]
    if is_banked:
        longest = trace.tpot + np.maximum(0.0, spare) / np.maximum(steps, 1.0)
    label = _bucket(tier, trace.output, trace.prompt, buckets)
    paces = np.unique(np.append(np.geomspace(tiers[0], tiers[-1] * 2, 48), tiers))
    return _solve_fleet(
        spec, plane.base, paces, level,
        _Classes(
            weight=_per_class(label, np.ones(len(trace))) / len(trace),
            decode=_mean(label, decode), prefill=_mean(label, prefill),
            steps=_mean(label, steps), context=_mean(label, context),
            whole_steps=_mean(label, trace.prompt / spec.max_tokens),
            longest=np.array([longest[label == c].max() for c in range(label.max() + 1)]),
        ),
    )  # fmt: skip


class _Classes(NamedTuple):
    """Classes of requests: share, and means of what they take; all `[classes]`.

    Attributes:
        weight: Share of all requests.
        decode: Seconds of their tokens after the first, without what a step costs.
        prefill: The same of prompts.
        steps: Steps in which they decode.
        context: Tokens in the cache, summed over those.
        whole_steps: Steps that a server of prompts takes for them at the least.
        longest: Slowest pace that any of them allows, in seconds.
    """

    weight: np.ndarray
    decode: np.ndarray
    prefill: np.ndarray
    steps: np.ndarray
    context: np.ndarray
    whole_steps: np.ndarray
    longest: np.ndarray


def _per_class(label: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(label, values)


def _mean(label: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(label, values) / np.bincount(label)


def _bucket(tier: np.ndarray, outer: np.ndarray, inner: np.ndarray, count: int) -> np.ndarray:
    """Number classes: tiers, cut by quantiles of one length, each cut by those of the other."""

    def cut(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
        found = np.zeros(len(groups), np.int64)
        for group in np.unique(groups):
            own = groups == group
            edges = np.quantile(values[own], np.linspace(0, 1, count + 1)[1:-1])
            found[own] = group * count + np.searchsorted(edges, values[own])
        return found

    return np.unique(cut(cut(tier, outer), inner), return_inverse=True)[1]


def _solve_fleet(
    spec: FleetSpec, base: float, paces: np.ndarray, level: float, classes: _Classes
) -> float:
    """Solve the programme: how much of each class at each pace, servers at each pace, the rate."""
    many, count = len(classes.weight), len(paces)
    is_split = spec.prefill_servers > 0
    # A pace counts as allowed if the next faster one is; the bound may only become looser.
    faster = np.concatenate([[0.0], paces[:-1]])
    allowed = (faster[:, None] < classes.longest) & (paces[:, None] > base)
    allowed[0] |= classes.longest >= paces[0]
    width = count * many + count + 1
    work = classes.decode if is_split else classes.decode + classes.prefill
    rows: list[np.ndarray] = []
    limits: list[float] = []
    for p, pace in enumerate(paces):
        for amounts, limit in (
            (work, (pace - base) / pace),
            (classes.context * pace, float(spec.capacity)),
            (classes.steps * pace, float(spec.seats)),
        ):
            row = np.zeros(width)
            row[p * many : (p + 1) * many] = amounts
            row[count * many + p] = -max(0.0, limit)
            rows.append(row)
            limits.append(0.0)
    row = np.zeros(width)
    row[count * many : -1] = 1.0
    rows.append(row)
    limits.append(float(spec.servers - spec.prefill_servers))
    shares = np.tile(np.eye(many), count)
    for c in range(many):
        rows.append(np.concatenate([shares[c], np.zeros(count), [-classes.weight[c]]]))
        limits.append(0.0)
    total = np.concatenate([np.ones(count * many), np.zeros(count)])
    rows.append(np.append(-total, level))
    limits.append(0.0)
    if is_split:
        seconds = classes.prefill + base * classes.whole_steps
        rows.append(np.concatenate([np.tile(seconds, count), np.zeros(count + 1)]))
        limits.append(float(spec.prefill_servers))
    goal = np.zeros(width)
    goal[-1] = -1.0
    bounds = [(0.0, None if ok else 0.0) for ok in allowed.ravel()] + [(0.0, None)] * (count + 1)
    found = linprog(
        goal, A_ub=csr_array(np.array(rows)), b_ub=np.array(limits), bounds=bounds, method="highs"
    )
    if not found.success:
        raise ConfigError(f"the linear programme has no answer: {found.message}")
    return float(found.x[-1])
