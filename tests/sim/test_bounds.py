"""The clairvoyant bound: above every policy, and exact where the answer is known."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, LinearCost, Plane
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Slo
from jaxserve.scheduling.baselines import DeadlineHybridScheduler
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.scheduling.slos_serve import SlosServeConfig, SlosServeScheduler
from jaxserve.sim.bounds import clairvoyant_share, least_work
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import READINGS, attainment
from jaxserve.sim.request import SimRequest
from jaxserve.sim.workload import Workload, gamma_arrivals, lognormal_shapes

COST = PUBLISHED_COSTS["7b-a100"]


@given(st.sampled_from([5.0, 20.0, 60.0]), st.integers(0, 50), st.sampled_from(READINGS))
@settings(max_examples=6)
def test_no_policy_does_better(rate, seed, reading):
    shapes = lognormal_shapes(
        40, prompt=(500, 1.0), output=(20, 1.0), ttft_slowdown=3, tpot_s=0.1, name="x", seed=seed
    )
    workload = Workload(name="w", arrivals=gamma_arrivals(100, cv=2.0, seed=seed), shapes=shapes)
    requests = workload.offer(rate, 60, COST, seed=seed)
    bound = clairvoyant_share(requests, COST, capacity=9000 * 16, seats=256)
    assert bound <= clairvoyant_share(requests, COST) + 1e-9
    for scheduler in (
        FcfsScheduler(), DeadlineHybridScheduler(COST),
        SlosServeScheduler(COST, SlosServeConfig(pace=reading)),
    ):  # fmt: skip
        replica = Replica(ReplicaSpec(num_pages=9000), scheduler, COST)
        assert attainment(simulate(requests, [replica]), reading) <= bound + 1e-9


def alike(count, *, prompt, output, slo):
    """Return requests that come at once and want the same."""
    return [
        SimRequest(request_id=i, arrival=0.0, prompt_len=prompt, output_len=output, slo=slo)
        for i in range(count)
    ]


def test_equal_prompts_at_once_are_cut_off_where_time_is_up():
    cost = LinearCost(Plane(token=0.001))
    requests = alike(20, prompt=100, output=1, slo=Slo(ttft_ms=500, tpot_ms=100))
    assert least_work(cost, requests[0]) == pytest.approx(0.1)
    assert clairvoyant_share(requests, cost) == pytest.approx(5 / 20)
    assert clairvoyant_share(requests[:5], cost) == 1.0


def test_tokens_are_due_one_by_one():
    # Each second 20 tokens are due, which take two: half of the requests can have theirs.
    cost = LinearCost(Plane(token=0.1))
    requests = alike(20, prompt=1, output=30, slo=Slo(ttft_ms=1000, tpot_ms=1000))
    assert clairvoyant_share(requests, cost) == pytest.approx(0.5)


def test_without_knowledge_of_outputs_long_ones_cannot_be_avoided():
    # Every other request generates 30 tokens, which take 6 s together with the prompt; the others
    # one, which takes 0.2 s. Until the last token is due there are 39 s.
    cost = LinearCost(Plane(token=0.2))
    slo = Slo(ttft_ms=10_000, tpot_ms=1000)
    requests = [
        SimRequest(request_id=i, arrival=0.0, prompt_len=1, output_len=30 if i % 2 else 1, slo=slo)
        for i in range(20)
    ]
    assert clairvoyant_share(requests, cost) == pytest.approx((10 + 37 / 6) / 20)
    blind = clairvoyant_share(requests, cost, knows_outputs=False)
    assert blind == pytest.approx(39 / 3.1 / 20)


def test_steps_cost_what_they_cost_whoever_is_in_them():
    # Two sequences at a time, or 100 tokens of context: two times 0.5 s for every four tokens.
    cost = LinearCost(Plane(token=1e-6, base=0.5))
    requests = alike(8, prompt=49, output=2, slo=Slo(ttft_ms=500, tpot_ms=500))
    assert clairvoyant_share(requests, cost) == 1.0
    for bounds in ({"seats": 2}, {"capacity": 100}):
        assert clairvoyant_share(requests, cost, **bounds) == pytest.approx(0.5, rel=1e-3)


def test_what_has_no_bound_is_refused():
    plain = SimRequest(request_id=0, arrival=0.0, prompt_len=1, output_len=1)
    with pytest.raises(ConfigError, match="request 0 has no objectives"):
        clairvoyant_share([plain], COST)
    with pytest.raises(ConfigError, match="one plane, got 2"):
        least_work(PUBLISHED_COSTS["opt-6.7b+125m-a100"], plain)
