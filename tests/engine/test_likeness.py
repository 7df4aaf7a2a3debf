"""The simulator is the engine's likeness: the same policy, the same plans, the same token times.

The real engine runs its steps, on a clock that moves only when a step ends, and then by the time
that the cost model gives it. So nothing is left that could make the two differ but their logic.
"""

import random

import pytest

from jaxserve.core.clock import VirtualClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.cost import LinearCost, Plane
from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.request import Request, RequestId, SamplingParams, Slo
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.setup import assemble
from jaxserve.engine.step_times import StepTimes
from jaxserve.scheduling.policies import PolicySettings, make_policy
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.request import SimRequest
from tests.tiny import tiny_module

COST = LinearCost(Plane(token=0.001, request=0.0005, context=1e-6, base=0.01))
ROWS, TOKENS, PAGES, SIZE = 8, 64, 512, 8


class _ModelledTimes(StepTimes):
    """Steps end when the cost model says."""

    def committed(self, load, shape, planned):
        begin = max(planned, self._ended)
        self._clock.advance(begin + COST.step_time(load) - self._clock.now())
        super().committed(load, shape, planned)


@pytest.fixture(scope="module")
def engine():
    clock = VirtualClock(1.0)
    settings = {
        "max_model_len": 256, "max_num_seqs": ROWS, "max_num_batched_tokens": TOKENS,
        "block_size": SIZE, "num_gpu_blocks_override": PAGES, "enable_prefix_caching": False,
    }  # fmt: skip
    made = assemble(tiny_module(), EngineConfig.from_settings(settings), clock=clock)
    return made.engine, clock


def stream(seed, count, rate):
    rng = random.Random(seed)
    now, found = 0.0, []
    for number in range(count):
        now += rng.expovariate(rate)
        slo = Slo(
            ttft_ms=rng.uniform(150, 900), tpot_ms=rng.choice([25, 60]),
            tier="t", on_decline=rng.choice(["reject", "best_effort"]),
        )  # fmt: skip
        found.append(
            SimRequest(
                request_id=number, arrival=now, prompt_len=rng.randint(4, 100),
                output_len=rng.randint(1, 30), slo=slo,
            )
        )  # fmt: skip
    return found


def serve(engine, clock, policy, requests, *, overlap):
    """Serve requests on the virtual clock; return when each got its tokens, by number."""
    engine.metrics = EngineMetrics()
    engine._overlap = overlap
    engine.scheduler = make_policy(policy, LearnedCost(COST), PolicySettings())
    engine.times = _ModelledTimes(clock, engine.metrics, LearnedCost(COST))
    start = clock.now() + 1.0
    found, left = {}, list(requests)

    def sink(event):
        if event.finish_reason is not None:
            found[int(event.request_id)] = event

    while left or engine.has_work:
        while left and start + left[0].arrival <= clock.now():
            one = left.pop(0)
            sampling = SamplingParams(temperature=0, max_tokens=one.output_len, ignore_eos=True)
            prompt = tuple(3 + (one.request_id + i) % 200 for i in range(one.prompt_len))
            request = Request(
                request_id=RequestId(str(one.request_id)), slo=one.slo, sampling=sampling,
                prompt_token_ids=prompt, arrival=start + one.arrival,
            )  # fmt: skip
            engine.submit(request, sink)
        if engine.has_work:
            before = engine.metrics.num_steps
            engine.step()
            is_stuck = engine.metrics.num_steps == before and not engine.is_busy
            if not (is_stuck and engine.has_work and left):
                continue
        clock.advance(max(0.0, start + left[0].arrival - clock.now()))
    assert engine.num_unfinished == 0
    return {
        number: (
            None if event.rejection is None else event.rejection.reason,
            None if event.metrics.first_token_time is None
            else event.metrics.first_token_time - start,
            event.metrics.finished_time - start,
        )
        for number, event in found.items()
    }  # fmt: skip


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turns"])
@pytest.mark.parametrize("policy", ["fcfs", "edf", "deadline_hybrid", "slo"])
def test_the_simulator_and_the_engine_agree_on_every_token_time(engine, policy, overlap):
    engine, clock = engine
    spec = ReplicaSpec(
        num_pages=PAGES, page_size=SIZE, max_num_seqs=ROWS, max_num_batched_tokens=TOKENS,
        overlap=overlap,
    )  # fmt: skip
    for seed, rate in ((1, 2.0), (2, 5.0)):
        requests = stream(seed, 25, rate)
        scheduler = make_policy(policy, LearnedCost(COST), PolicySettings())
        simulated = {
            one.request.request_id: (
                None if one.rejection is None else one.rejection.reason,
                one.first_token,
                one.finished,
            )
            for one in simulate(requests, [Replica(spec, scheduler, COST)])
        }
        real = serve(engine, clock, policy, requests, overlap=overlap)
        assert real.keys() == simulated.keys()
        for number, (reason, first, end) in simulated.items():
            assert real[number][0] == reason, number
            if reason is None:
                assert real[number][1:] == pytest.approx((first, end), abs=1e-6), number
