"""The baselines: their plans fit, everybody is served, and each does what it is known for."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, StepLoad, zero_load_time
from jaxserve.core.request import Slo
from jaxserve.scheduling.baselines import (
    DeadlineHybridScheduler,
    DeadlineScheduler,
    PrefillFirstScheduler,
    SlackGreedyScheduler,
)  # fmt: skip
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import attainment
from jaxserve.sim.request import SimRequest

COST = PUBLISHED_COSTS["7b-a100"]
MAKERS = {
    "fcfs": PrefillFirstScheduler,
    "edf": DeadlineScheduler,
    "edf, small budget": lambda: DeadlineScheduler(budget=64),
    "hybrid": lambda: DeadlineHybridScheduler(COST),
    "hybrid, gaps": lambda: DeadlineHybridScheduler(COST, every_gap=True),
    "greedy": lambda: SlackGreedyScheduler(COST),
    "greedy, gaps": lambda: SlackGreedyScheduler(COST, every_gap=True),
}


def stream(seed, count, rate, *, prompt=400, slos=True):
    rng, now, found = random.Random(seed), 0.0, []
    for i in range(count):
        now += rng.expovariate(rate)
        length = rng.randint(1, prompt)
        slo = Slo(
            ttft_ms=rng.uniform(2, 6) * 1000 * zero_load_time(COST, length),
            tpot_ms=rng.choice([50, 100]),
        )
        found.append(
            SimRequest(
                request_id=i, arrival=now, prompt_len=length, output_len=rng.randint(1, 60),
                slo=slo if slos or rng.random() < 0.5 else None,
                cached_len=rng.choice([0, length // 2]),
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("name", MAKERS)
@given(
    st.integers(0, 10**6), st.integers(40, 300), st.integers(1, 9), st.sampled_from([64, 2000]),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=25)
def test_everybody_is_served_however_short_memory_is(name, seed, num_pages, rows, budget, slos):
    spec = ReplicaSpec(num_pages=num_pages, max_num_seqs=rows, max_num_batched_tokens=budget)
    requests = stream(seed, 20, 8.0, slos=slos)
    runs = []
    for jump in (True, False):
        replica = Replica(spec, MAKERS[name](), COST, jump=jump)
        runs.append(simulate(requests, [replica], keep_times=True))
        assert len(runs[-1]) == 20
        assert replica.free_pages == num_pages
    assert runs[0] == runs[1]


class Loads:
    def __init__(self):
        self.loads: list[StepLoad] = []

    def step(self, replica, begin, ends, plan, load):
        self.loads.append(load)


def loads_of(scheduler, requests, budget=8192):
    seen = Loads()
    spec = ReplicaSpec(num_pages=5000, max_num_batched_tokens=budget)
    replica = Replica(spec, scheduler, COST, observer=seen)
    return simulate(requests, [replica]), seen.loads


def test_prefill_first_never_mixes_and_never_cuts():
    _, loads = loads_of(PrefillFirstScheduler(), stream(1, 60, 10.0))
    assert all(not (load.prefill and load.decodes) for load in loads)
    assert sum(load.prefills for load in loads) == 60


def test_hybrid_chunks_end_when_the_next_token_is_due():
    done, loads = loads_of(
        DeadlineHybridScheduler(COST, every_gap=True), stream(2, 120, 9.0, prompt=4000)
    )
    mixed = [COST.step_time(load) for load in loads if load.prefill and load.decodes]
    assert max(mixed) <= 0.1
    assert max(load.prefill for load in loads) <= 2500
    assert attainment(done, "tpot_gap") > 0.5


def test_deadlines_come_before_arrivals():
    late = SimRequest(
        request_id=0, arrival=0.0, prompt_len=4000, output_len=2, slo=Slo(ttft_ms=9000)
    )
    soon = [
        SimRequest(request_id=i, arrival=0.01, prompt_len=4000, output_len=2, slo=Slo(ttft_ms=1000))
        for i in (1, 2)
    ]
    done, _ = loads_of(DeadlineScheduler(budget=1024), [late, *soon])
    firsts = {one.request.request_id: one.first_token for one in done}
    assert max(firsts[1], firsts[2]) < firsts[0]


def test_relegated_prompts_wait_for_those_that_can_be_saved():
    lost = SimRequest(request_id=0, arrival=0.0, prompt_len=6000, output_len=2, slo=Slo(ttft_ms=90))
    fine = SimRequest(
        request_id=1, arrival=0.0, prompt_len=2000, output_len=2, slo=Slo(ttft_ms=2000)
    )
    for scheduler in (DeadlineHybridScheduler(COST), SlackGreedyScheduler(COST)):
        done, _ = loads_of(scheduler, [lost, fine], budget=2048)
        assert done[0].request.request_id == 1
