"""The simulator: conservation, determinism, agreement with queueing theory and with itself."""

import io
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, LinearCost, Plane, StepLoad, zero_load_time
from jaxserve.core.cost_drift import LearnedCost
from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import Route, StepPlan, Work
from jaxserve.core.request import Slo
from jaxserve.engine.slo import SloTracker
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.sim.capacity import CapacitySearch
from jaxserve.sim.learning import CostLearner
from jaxserve.sim.loop import StalledError, simulate
from jaxserve.sim.replica import PlanError, Replica, ReplicaSpec
from jaxserve.sim.report import READINGS, attainment, digest, is_attained, latencies, log_lines
from jaxserve.sim.request import SimRequest, judge
from jaxserve.sim.trace import TraceRecorder
from jaxserve.sim.workload import Shape, Workload, gamma_arrivals, interleave, lognormal_shapes

COST = PUBLISHED_COSTS["7b-a100"]
SMALL = ReplicaSpec(num_pages=60, page_size=4, max_num_seqs=5, max_num_batched_tokens=50)


@st.composite
def streams(draw, most=25):
    """Draw requests that fit into `SMALL`."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    rate = draw(st.sampled_from([0.5, 5.0, 50.0]))
    now, found = 0.0, []
    for i in range(draw(st.integers(1, most))):
        now += rng.choice([0.0, rng.expovariate(rate)])
        slo = Slo(ttft_ms=rng.uniform(20, 400), tpot_ms=rng.uniform(15, 60))
        found.append(
            SimRequest(
                request_id=i, arrival=now, prompt_len=rng.randint(1, 120),
                output_len=rng.randint(1, 60), slo=slo,
            )
        )  # fmt: skip
    return found


class Ledger:
    """An observer that does its own sums: nothing may be lost, made up or out of order."""

    def __init__(self):
        self.computed = {}
        self.last_end = 0.0
        self.busy = 0.0
        self.tokens = 0

    def step(self, replica, begin, ends, plan, load):
        assert begin >= self.last_end, "no step begins before the last one has ended"
        assert load.tokens == plan.num_tokens
        for end in ends:
            assert end > begin
            self.busy += end - begin
            begin = end
        self.last_end = ends[0]  # the others may be cut short


def serve(requests, spec=SMALL, scheduler=None, cost=COST, **options):
    replica = Replica(spec, scheduler or FcfsScheduler(), cost, **options)
    return simulate(requests, [replica], keep_times=True), replica


@given(streams())
@settings(max_examples=60)
def test_every_token_is_made_once_and_all_pages_come_back(requests):
    done, replica = serve(requests, observer=Ledger())
    assert sorted(one.request.request_id for one in done) == [r.request_id for r in requests]
    assert replica.free_pages == SMALL.num_pages
    assert not replica.is_busy
    for one in done:
        times = one.token_times
        assert len(times) == one.request.output_len
        assert all(b > a for a, b in itertools.pairwise(times))
        assert times[0] > one.request.arrival, "nothing comes before its cause"
        assert (one.first_token, one.finished) == (times[0], times[-1])
        assert times[0] - one.request.arrival >= zero_load_time(COST, 1)


@given(
    streams(),
    st.sampled_from([{}, {"noise": 0.1}, {"deviations": (0.9, 1.0, 1.3, 1.1, 0.95)}]),
    st.booleans(),
)
@settings(max_examples=60)
def test_jumps_and_live_views_change_nothing(requests, noise, frozen):
    spec = ReplicaSpec(
        num_pages=60, page_size=4, max_num_seqs=5, max_num_batched_tokens=50, **noise
    )
    plain, a = serve(requests, spec, jump=False)
    other, b = serve(requests, spec, jump=True, frozen_views=frozen)
    assert plain == other
    assert a.num_steps == b.num_steps


@given(streams(), st.booleans())
@settings(max_examples=60)
def test_jumps_change_nothing_where_steps_are_planned_ahead(requests, frozen):
    spec = ReplicaSpec(
        num_pages=60, page_size=4, max_num_seqs=5, max_num_batched_tokens=50, overlap=True
    )
    plain, a = serve(requests, spec, jump=False)
    other, b = serve(requests, spec, jump=True, frozen_views=frozen)
    assert plain == other
    assert a.num_steps == b.num_steps


@pytest.mark.parametrize("jump", [True, False])
def test_who_arrives_during_a_step_waits_for_the_next_one_if_that_is_planned(jump):
    cost = LinearCost(Plane(base=1.0))  # every step takes a second
    first = SimRequest(request_id=0, arrival=0.0, prompt_len=4, output_len=8)
    second = SimRequest(request_id=1, arrival=2.5, prompt_len=4, output_len=1)
    for overlap, expected in ((False, 4.0), (True, 5.0)):
        spec = ReplicaSpec(num_pages=60, page_size=4, overlap=overlap)
        done, _ = serve([first, second], spec, cost=cost, jump=jump)
        by_id = {one.request.request_id: one for one in done}
        assert by_id[1].first_token == expected
        assert by_id[0].token_times == tuple(float(i) for i in range(1, 9))


@pytest.mark.parametrize("jump", [True, False])
def test_recorded_deviations_are_gone_through_in_turn(jump):
    cost = LinearCost(Plane(base=1.0))
    request = SimRequest(request_id=0, arrival=0.0, prompt_len=4, output_len=9)
    recorded = (1.0, 2.0, 4.0)
    spec = ReplicaSpec(num_pages=60, page_size=4, deviations=recorded)
    starts = set()
    for seed in range(20):
        done, _ = serve([request], spec, cost=cost, jump=jump, seed=seed)
        took = tuple(np.diff(done[0].token_times, prepend=0.0))
        assert took[0] in recorded
        first = recorded.index(took[0])
        assert took == tuple(recorded[(first + i) % 3] for i in range(9))
        starts.add(first)
    assert starts == {0, 1, 2}


@given(streams())
def test_a_wrong_cost_model_learns_what_steps_take(requests):
    wrong = LearnedCost(COST.scaled(0.8, 0.0))
    serve(requests, ReplicaSpec(num_pages=60, page_size=4), observer=CostLearner(wrong))
    for ratio in wrong.drift().buckets.values():
        assert ratio == pytest.approx(1.25)


@given(streams())
@settings(max_examples=20)
def test_the_same_run_gives_the_same_bytes(requests):
    spec = ReplicaSpec(num_pages=60, page_size=4, max_num_batched_tokens=50, noise=0.1)
    logs = [log_lines(serve(requests, spec, seed=seed)[0]) for seed in (1, 1, 2)]
    assert logs[0].encode() == logs[1].encode()
    assert logs[0] != logs[2]
    assert digest(serve(requests, spec, seed=1)[0]) == digest(serve(requests, spec, seed=1)[0])


@given(streams())
@settings(max_examples=30)
def test_the_server_works_while_there_is_work(requests):
    """The time at which it first falls idle is the end of a busy period without gaps."""
    ledger = Ledger()
    at_once = [SimRequest(**{**_fields(r), "arrival": 0.0}) for r in requests]
    done, _ = serve(at_once, observer=ledger, jump=False)
    assert max(one.finished for one in done) == pytest.approx(ledger.busy)


def _fields(request):
    return {name: getattr(request, name) for name in request.__slots__}


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_at_a_time_with_equal_service_is_the_queue_of_theory(load):
    """M/D/1: the mean wait is load / (2 (1 - load)) services (Pollaczek and Khinchine)."""
    cost = LinearCost(Plane(token=0.001))
    arrivals = gamma_arrivals(15_000, seed=3)
    shape = Shape(prompt_len=100, output_len=1, ttft_slowdown=1, tpot_s=1, name="x")
    requests = Workload(name="md1", arrivals=arrivals, shapes=(shape,)).offer(
        load * 10, 15_000, cost
    )
    spec = ReplicaSpec(num_pages=1000, max_num_seqs=1)
    done, _ = serve(requests, spec, FcfsScheduler(mix=False), cost)
    waits = np.array([one.ttft - 0.1 for one in done])
    realised = 0.1 * 15_000 / (requests[-1].arrival - requests[0].arrival)
    expected = 0.1 * realised / (2 * (1 - realised))
    oracle = _lindley([r.arrival for r in requests], 0.1)
    assert waits.mean() == pytest.approx(oracle.mean(), rel=1e-9)
    assert waits.mean() == pytest.approx(expected, rel=0.08), "as near as so many arrivals come"


def _lindley(arrivals, service):
    waits, free = [], 0.0
    for arrival in arrivals:
        start = max(arrival, free)
        waits.append(start - arrival)
        free = start + service
    return np.array(waits)


@given(streams())
@settings(max_examples=40)
def test_objectives_are_judged_as_the_engine_judges_them(requests):
    for one in serve(requests)[0]:
        slo, arrival = one.request.slo, one.request.arrival
        tracker = SloTracker(slo, arrival)
        for time in one.token_times:
            tracker.token(time)
        assert one.outcome == tracker.outcome(finished=one.finished, is_whole=True)
        only = Slo(tpot_ms=slo.tpot_ms)
        tracker = SloTracker(only, arrival)
        for time in one.token_times:
            tracker.token(time)
        mine = judge(only, arrival, list(one.token_times), one.finished)
        assert mine == tracker.outcome(finished=one.finished, is_whole=True)
    assert not judge(slo, 0.0, [], 1.0).attained


class RoundRobin:
    def __init__(self):
        self.turn = -1

    def place(self, sequence, fleet):
        assert all(view.now >= fleet.now for view in fleet.replicas)
        self.turn = (self.turn + 1) % len(fleet.replicas)
        return Route(replica=self.turn)


@given(streams(), st.integers(1, 4), st.booleans())
@settings(max_examples=30)
def test_a_fleet_is_as_many_servers_as_it_has(requests, count, jump):
    def run(router, some, number):
        fleet = [Replica(SMALL, FcfsScheduler(), COST, index=i, jump=jump) for i in range(number)]
        return simulate(some, fleet, router=router, keep_times=True)

    fleet = run(RoundRobin(), requests, count)
    assert len(fleet) == len(requests)
    for index in range(count):
        alone = run(None, requests[index::count], 1)
        mine = [one for one in fleet if one.replica == index]
        assert [one.token_times for one in mine] == [one.token_times for one in alone]


def test_a_fleet_without_a_router_is_refused():
    replica = Replica(SMALL, FcfsScheduler(), COST)
    with pytest.raises(ConfigError, match="2 replicas need a router"):
        simulate([], [replica, replica])


REQUEST = SimRequest(request_id=7, arrival=0.0, prompt_len=10, output_len=4)


class Fixed:
    def __init__(self, plan):
        self._plan = plan

    def plan(self, view):
        return self._plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(work=(Work(seq_id=7, num_tokens=1),)), "gives work to sequence 7, which is not"),
        (StepPlan(work=(Work(seq_id=7, num_tokens=11),), admit=(7,)), "has 10 left"),
        (StepPlan(admit=(8,)), "admits sequence 8, which does not wait"),
        (StepPlan(preempt=(7,)), "preempts sequence 7, which does not run"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(plan, message):
    if plan.admit == (8,):
        plan = StepPlan(work=(Work(seq_id=8, num_tokens=1),), admit=(8,))
    with pytest.raises(PlanError, match=message):
        serve([REQUEST], scheduler=Fixed(plan))


def test_a_policy_that_does_nothing_is_noticed():
    with pytest.raises(StalledError, match="1 requests are left"):
        serve([REQUEST], scheduler=Fixed(StepPlan()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReplicaSpec(num_pages=0), "num_pages must be at least 1"),
        (lambda: ReplicaSpec(num_pages=1, noise=-1), "noise must be zero or more"),
        (lambda: ReplicaSpec(num_pages=1, deviations=(1.0, 0.0)), "above zero and without noise"),
        (lambda: ReplicaSpec(num_pages=1, noise=0.1, deviations=(1.0,)), "got noise=0.1 as well"),
        (lambda: serve([SimRequest(**{**_fields(REQUEST), "prompt_len": 999})]), "needs more than"),
        (
            lambda: serve([REQUEST, SimRequest(**{**_fields(REQUEST), "arrival": -1.0})]),
            "must be in order of arrival",
        ),
        (lambda: Workload(name="w", arrivals=(0.0,), shapes=()), "needs two arrivals"),
        (lambda: CapacitySearch(lambda rate: {}).find("x", guess=0), "must be above zero"),
    ],
)
def test_impossible_simulations_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_drafts_are_accepted_as_often_as_they_should_be():
    spec = ReplicaSpec(num_pages=9000, max_num_seqs=4, max_draft=3)
    requests = [
        SimRequest(request_id=i, arrival=0.0, prompt_len=4, output_len=2000, acceptance=0.7)
        for i in range(4)
    ]
    done, replica = serve(requests, spec, FcfsScheduler(draft_cost=0.0))
    expected = 1 + 0.7 + 0.7**2 + 0.7**3
    assert sum(len(one.token_times) for one in done) == 8000
    assert 2000 / replica.num_steps == pytest.approx(expected, rel=0.05)


def test_a_trace_opens_in_a_viewer(tmp_path):
    recorder = TraceRecorder()
    requests = [
        SimRequest(request_id=i, arrival=0.01 * i, prompt_len=20, output_len=5, name="chat")
        for i in range(3)
    ]
    done, replica = serve(requests, observer=recorder, jump=False)
    file = io.StringIO()
    recorder.write(file, done)
    events = json.loads(file.getvalue())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert len(steps) == replica.num_steps
    assert sum(e["args"]["prefill"] for e in steps) == 60
    begun = [e for e in events if e["ph"] == "b"]
    assert len(begun) == len([e for e in events if e["ph"] == "e"]) == 6
    assert {e["args"]["class"] for e in begun} == {"chat"}


def test_a_workload_keeps_its_bursts_at_every_rate():
    shapes = lognormal_shapes(
        50, prompt=(300, 0.8), output=(50, 0.5), ttft_slowdown=5, tpot_s=0.1, name="chat"
    )
    workload = Workload(name="w", arrivals=gamma_arrivals(500, cv=3.0), shapes=shapes)
    slow, fast = (workload.offer(rate, 500, COST, seed=1) for rate in (1.0, 4.0))
    assert [r.arrival for r in slow] == pytest.approx([4 * r.arrival for r in fast])
    assert [r.prompt_len for r in slow] == [r.prompt_len for r in fast]
    assert len(slow) / (slow[-1].arrival - slow[0].arrival) == pytest.approx(1.0, rel=0.02)
    again = workload.offer(1.0, 900, COST, seed=2)
    assert all(b.arrival >= a.arrival for a, b in itertools.pairwise(again))
    one = slow[0]
    assert one.slo.ttft_ms == pytest.approx(5000 * zero_load_time(COST, one.prompt_len))
    mixed = interleave("m", gamma_arrivals(9), shapes, shapes[:1])
    assert len(mixed.shapes) == 100


def test_capacity_is_where_attainment_falls_to_the_level():
    def run(rate):
        kept = np.zeros(4000)
        kept[: round(4000 * min(1.0, 1.9 - rate / 5))] = 1
        return {"x": kept, "y": np.ones(4000) * (rate < 2)}

    search = CapacitySearch(run)
    found = search.find("x", guess=1.0)
    assert found.rate == pytest.approx(5.0, rel=0.01)
    assert found.low < 5.0 < found.high
    assert found.high / found.low < 1.05
    assert found.is_monotone
    assert search.find("x", level=0.99, guess=20.0).rate == pytest.approx(4.55, rel=0.01)
    assert search.find("y").rate == pytest.approx(2.0, rel=0.04)


def test_shares_and_latencies_count_everybody_once():
    requests = [
        SimRequest(
            request_id=i, arrival=0.0, prompt_len=10, output_len=10,
            slo=Slo(ttft_ms=1 if i % 2 else 10_000, tpot_ms=100),
        ) for i in range(10)
    ]  # fmt: skip
    done, _ = serve(requests)
    assert [attainment(done, reading) for reading in READINGS] == [0.5, 0.5, 0.5]
    assert attainment(done, "tpot", skip=9) == 0.0
    assert attainment([], "tpot") == 1.0
    assert not is_attained(next(o for o in done if o.request.request_id == 1), "tpot")
    found = latencies(done)
    assert found["e2e_mean"] == pytest.approx(np.mean([one.finished for one in done]))
    assert found["tpot_p99"] > found["tpot_mean"] * 0.99
    assert StepLoad().tokens == 0
