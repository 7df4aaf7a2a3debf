"""How many requests could keep their objectives at best, if the whole future were known."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from jaxserve.core.cost import LinearCost, StepLoad
from jaxserve.core.errors import ConfigError
from jaxserve.sim.request import SimRequest

_PER_SECOND = 1000
_WINDOWS_S = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)


def least_work(cost: LinearCost, request: SimRequest) -> float:
    """Return the seconds of server time that a request takes at the very least.

    Its tokens and their contexts are counted, and nothing of what a step costs whoever is in it.

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
    count = request.output_len - 1
    context = count * request.prompt_len + count * (count + 1) // 2
    decodes = cost.step_time(StepLoad(decodes=count, context=context)) - base
    return work + max(0.0, decodes)


def clairvoyant_share(requests: Sequence[SimRequest], cost: LinearCost) -> float:
    """Return an upper bound of the share of requests that can keep their objectives.

    Work is a fluid, any part of a request can be served, and only that must hold: whatever arrives
    and is due within a stretch of time takes no longer than the stretch. A request is due when its
    last token is, with early tokens making up for late ones, so that the bound is one for every
    reading of the time per token.

    Args:
        requests: In order of arrival, each with objectives of the time to the first token and per
            token.
        cost: A model with one plane.

    Returns:
        The bound, between 0 and 1.

    Raises:
        ConfigError: If a request has no such objectives.

    Source: ours; a relaxation of preemptive earliest-deadline scheduling.
    """
    work = np.array([least_work(cost, request) for request in requests])
    arrivals = np.array([request.arrival for request in requests])
    firsts, dues = np.empty(len(requests)), np.empty(len(requests))
    for place, request in enumerate(requests):
        slo = request.slo
        if slo is None or slo.ttft_ms is None or slo.tpot_ms is None:
            raise ConfigError(
                f"request {request.request_id} has no objectives of the first token and per token; "
                "leave it out."
            )
        firsts[place] = request.arrival + slo.ttft_ms / _PER_SECOND
        dues[place] = firsts[place] + (request.output_len - 1) * slo.tpot_ms / _PER_SECOND
    prefills = np.array([_prefill_work(cost, request) for request in requests])
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    limits: list[float] = []

    def constrain(which: np.ndarray, amounts: np.ndarray, seconds: float) -> None:
        if float(amounts[which].sum()) > seconds:
            places = np.flatnonzero(which)
            rows.append(np.full(len(places), len(limits)))
            columns.append(places)
            values.append(amounts[places])
            limits.append(seconds)

    end = float(dues.max())
    for window in (*_WINDOWS_S, end - float(arrivals[0])):
        for start in np.arange(float(arrivals[0]), end, window / 2):
            inside = arrivals >= start
            constrain(inside & (dues <= start + window), work, window)
            constrain(inside & (firsts <= start + window), prefills, window)
    for due in np.unique(np.quantile(dues, np.linspace(0, 1, 200))):
        constrain(dues <= due, work, float(due - arrivals[0]))
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


def _prefill_work(cost: LinearCost, request: SimRequest) -> float:
    left = request.prompt_len - request.cached_len
    whole = cost.step_time(StepLoad().with_chunk(left, request.cached_len))
    return whole - cost.step_time(StepLoad())
