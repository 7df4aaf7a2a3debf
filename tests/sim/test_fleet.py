"""Simulated fleets: as replica by replica, with nothing lost, and the same every time."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, LinearCost, Plane
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Slo
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.scheduling.polyserve import PolyServeConfig
from jaxserve.sim.bounds import class_rate, fleet_bound
from jaxserve.sim.fleet import RIVALS, FleetRival, FleetSpec, FleetTrace, simulate_fleet
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import READINGS, is_attained
from jaxserve.sim.request import SimRequest

COST = PUBLISHED_COSTS["7b-a100"]
TIERS = (0.02, 0.03, 0.05, 0.1)


def draw(count, rate, seed, *, longest=3000, mix=(0.1, 0.2, 0.3, 0.4), output=60):
    rng = np.random.default_rng(seed)
    prompt = np.clip(np.exp(rng.normal(6, 1, count)), 1, longest).astype(np.int64)
    return FleetTrace(
        arrival=np.cumsum(rng.exponential(1 / rate, count)),
        prompt=prompt,
        output=rng.geometric(1 / output, count),
        ttft=np.maximum(rng.choice([0.3, 0.5, 1.0], count), 0.05 + prompt * 1.5e-4),
        tpot=rng.choice(TIERS, count, p=mix),
    )


def spec(servers, **sizes):
    return FleetSpec(servers=servers, cost=COST, **{"capacity": 60_000, **sizes})


def policies():
    found = [PolyServeConfig(), PolyServeConfig(pace="tpot_gap", interference=0.5)]
    for name in RIVALS:
        split = (1, 1, 1, 2) if name == "static_tiers" else ()
        found.append(FleetRival(name=name, split=split, budget=512, sheds=True))
    return found


@given(
    st.integers(0, 10**6), st.sampled_from([2.0, 6.0, 12.0]), st.sampled_from([300, 1024, 4000]),
    st.integers(2, 60),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_one_server_is_the_replica_of_the_other_simulator(seed, rate, budget, seats):
    """To the last bit: times of first and last tokens, and all readings of what was kept."""
    trace = draw(80, rate, seed)
    requests = [
        SimRequest(
            request_id=i, arrival=float(trace.arrival[i]), prompt_len=int(trace.prompt[i]),
            output_len=int(trace.output[i]),
            slo=Slo(ttft_ms=float(trace.ttft[i]) * 1000, tpot_ms=float(trace.tpot[i]) * 1000),
        ) for i in range(len(trace))
    ]  # fmt: skip
    sizes = ReplicaSpec(
        num_pages=10**6, page_size=1, max_num_seqs=seats, max_num_batched_tokens=budget
    )
    done = simulate(requests, [Replica(sizes, FcfsScheduler(), COST)])
    done.sort(key=lambda one: one.request.request_id)
    report = simulate_fleet(
        FleetTrace.of(requests), spec(1, capacity=10**6, seats=seats, max_tokens=budget),
        FleetRival(name="round_robin", budget=budget),
    )  # fmt: skip
    assert report.first.tolist() == [one.first_token for one in done]
    assert report.finish.tolist() == [one.finished for one in done]
    for reading in READINGS:
        assert report.attained(reading).tolist() == [is_attained(one, reading) for one in done]


@pytest.mark.parametrize("policy", policies(), ids=str)
@pytest.mark.parametrize("prefill_servers", [0, 3])
def test_jumps_change_nothing_and_runs_repeat(policy, prefill_servers):
    sizes = spec(5 + prefill_servers, prefill_servers=prefill_servers, transfer_token_s=1e-5)
    trace = draw(400, 15.0, 3)
    runs = [simulate_fleet(trace, sizes, policy, jumps=jumps) for jumps in (True, False, True)]
    assert runs[0].log() == runs[1].log() == runs[2].log()
    assert runs[0].steps == runs[1].steps
    assert runs[0].events < runs[1].events


@given(st.integers(0, 10**6), st.sampled_from([1500, 4000, 60_000]), st.sampled_from([0, 2]))
@settings(max_examples=25, deadline=None)
def test_nothing_is_lost_or_made_up(seed, capacity, prefill_servers):
    """Everybody ends or is declined; tokens come after their cause; a full cache is survived."""
    rng = random.Random(seed)
    policy = rng.choice(policies())
    if isinstance(policy, FleetRival) and policy.name == "static_tiers":
        policy = FleetRival(name="least_kv", budget=512)
    trace = draw(120, 20.0, seed, longest=700)
    sizes = spec(
        4, capacity=capacity, seats=8, prefill_servers=prefill_servers, transfer_token_s=1e-5
    )
    report = simulate_fleet(trace, sizes, policy)
    ended = ~report.declined()
    assert np.isfinite(report.finish).all()
    alone = COST.planes[0].base + COST.planes[0].token * trace.prompt
    assert (report.first[ended] >= (trace.arrival + alone)[ended]).all()
    longer = trace.output > 1
    spent = report.finish - report.first
    assert (spent[ended & longer] >= ((trace.output - 1) * 0.014)[ended & longer]).all()
    assert (spent[ended & ~longer] == 0).all()
    assert (report.server[ended] >= 0).all()
    assert not report.attained()[~ended].any()


def test_idle_fleets_and_nobody_at_all():
    nobody = draw(0, 1.0, 0)
    report = simulate_fleet(nobody, spec(3), PolyServeConfig())
    assert report.attainment() == 1.0
    one = draw(1, 1.0, 0)
    assert simulate_fleet(one, spec(3), PolyServeConfig()).attainment() == 1.0


def test_polyserve_keeps_what_it_takes():
    """With times known exactly, hardly anybody who is taken misses a token's deadline."""
    trace = draw(3000, 120.0, 1, output=120)
    report = simulate_fleet(trace, spec(8, capacity=300_000), PolyServeConfig())
    taken = ~report.declined()
    assert report.attained()[taken].mean() > 0.98
    assert 0.3 < taken.mean() < 1.0, "so many that some have to be declined"


@pytest.mark.parametrize("policy", policies(), ids=str)
@pytest.mark.parametrize("rate", [20.0, 80.0])
def test_nobody_is_above_the_bound(policy, rate):
    trace = draw(2500, rate, 5, output=100)
    sizes = spec(5, capacity=300_000)
    report = simulate_fleet(trace, sizes, policy)
    kept = report.attainment()
    if kept > 0.05:
        span = trace.arrival[-1] - trace.arrival[0] + 5.0  # the last ones are served after that
        bound = fleet_bound(trace, sizes, TIERS, level=kept, is_banked=True)
        assert len(trace) / span <= bound


def test_bounds_are_exact_where_the_answer_is_known():
    """One class: the programme and the search over batches agree with paper and pencil."""
    cost = LinearCost(Plane(token=0.001, base=0.01))
    trace = FleetTrace(
        arrival=np.arange(10.0), prompt=np.full(10, 100), output=np.full(10, 101),
        ttft=np.full(10, 1.0), tpot=np.full(10, 0.05),
    )  # fmt: skip
    sizes = FleetSpec(servers=3, cost=cost, capacity=10**6, seats=1000)
    # 0.04 s of a step of 0.05 s are for tokens, and a request has 100 of prompt and 100 of output.
    assert fleet_bound(trace, sizes, (0.05,)) == pytest.approx(3 * (0.04 / 0.05) / 0.2)
    assert fleet_bound(trace, sizes, (0.05,), level=0.5) == pytest.approx(6 * 0.8 / 0.2)
    assert fleet_bound(trace, sizes, (0.05,), is_banked=True) > 3 * 0.8 / 0.2
    rate = class_rate(cost, prompt=100, output=100, tau=0.05, capacity=10**6, seats=1000)
    assert rate == pytest.approx(0.8 / 0.2)
    split = FleetSpec(servers=3, cost=cost, capacity=10**6, seats=1000, prefill_servers=1)
    first = 1 / (0.1 + 0.01 * 100 / 8192)
    assert fleet_bound(trace, split, (0.05,)) == pytest.approx(min(first, 2 * 0.8 / 0.1))


def test_memory_and_seats_bound_as_well():
    trace = draw(500, 10.0, 0)
    wide = fleet_bound(trace, spec(2, capacity=10**7), TIERS)
    assert fleet_bound(trace, spec(2, capacity=8000), TIERS) < 0.9 * wide
    assert fleet_bound(trace, spec(2, capacity=10**7, seats=4), TIERS) < 0.9 * wide


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival": np.array([1.0, 0.5])}, "must not decrease"),
        (
            {"ttft": np.array([1.0, np.nan])},
            "ttft must be a finite number above zero, but request 1",
        ),
        ({"prompt": np.array([0, 5])}, "prompt must be a finite number above zero, but request 0"),
        ({"tpot": np.array([0.1])}, "tpot has 1 values for 2 requests"),
    ],
)
def test_impossible_requests_are_refused(change, message):
    fields = {
        "arrival": np.array([0.0, 1.0]), "prompt": np.array([5, 5]), "output": np.array([5, 5]),
        "ttft": np.ones(2), "tpot": np.full(2, 0.1),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        FleetTrace(**{**fields, **change})


def test_impossible_fleets_are_refused():
    with pytest.raises(ConfigError, match="servers must be at least 1, got 0"):
        spec(0)
    with pytest.raises(ConfigError, match="leave some of the 3 servers"):
        spec(3, prefill_servers=3)
    with pytest.raises(ConfigError, match="name must be one of random"):
        FleetRival(name="psychic")
    trace = draw(5, 1.0, 0)
    with pytest.raises(ConfigError, match=r"at least one each and 4 together, got \(1, 1\)"):
        simulate_fleet(trace, spec(4), FleetRival(name="static_tiers", split=(1, 1)))
    with pytest.raises(ConfigError, match="more than the 10 of a server"):
        simulate_fleet(trace, spec(4, capacity=10), PolyServeConfig())
    with pytest.raises(ConfigError, match="the tightest tier is 50 ms"):
        simulate_fleet(trace, spec(4), PolyServeConfig(tiers=(0.05, 0.1)))
    plain = SimRequest(request_id=7, arrival=0.0, prompt_len=1, output_len=1)
    with pytest.raises(ConfigError, match="request 7 has no objectives"):
        FleetTrace.of([plain])
    with pytest.raises(ConfigError, match="linear cost model with one plane"):
        fleet_bound(draw(0, 1.0, 0), spec(1), TIERS)
