"""The token planner in the simulator: what it promises it keeps, and nobody is lost."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, StepLoad, zero_load_time
from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import Route
from jaxserve.core.request import Slo
from jaxserve.core.view import FleetView, ReplicaView, SequenceView
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.scheduling.slos_serve import HandOffRouter, SlosServeConfig, SlosServeScheduler
from jaxserve.scheduling.slos_serve.forward import Decodes, Prefill, certify, form
from jaxserve.scheduling.slos_serve.handoff import RoundRobinRouter
from jaxserve.scheduling.slos_serve.promise import OutputLengths, Standing
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import READINGS, attainment, is_attained
from jaxserve.sim.request import SimRequest

COST = PUBLISHED_COSTS["7b-a100"]
SPEC = ReplicaSpec(num_pages=6000, max_num_seqs=128)


class Witness:
    """Passes plans through, and remembers whose promise stands, and how many passed to others."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.promised = set()
        self.num_passed = 0
        self.config = scheduler.config

    def plan(self, view):
        before = {s.seq_id: s for s in (*view.running, *view.waiting)}
        plan = self.scheduler.plan(view)
        records = self.scheduler._records
        now = {i for i, r in records.items() if r.standing is Standing.PROMISED}
        gone = (self.promised & before.keys()) - now
        for seq_id in gone:
            one = before[seq_id]
            assert self.config.revises
            assert one.slo.on_decline != "reject"
            assert not one.is_running, "whoever runs keeps the promise"
        assert len(gone) <= len(now - self.promised), "each one that goes makes room for another"
        self.num_passed += len(gone)
        self.promised = (self.promised - gone) | now
        return plan


def stream(seed, count, *, rate, bursts=False, on_decline="best_effort", max_output=None):
    rng = random.Random(seed)
    now, found = 0.0, []
    for i in range(count):
        if not (bursts and rng.random() < 0.8):
            now += rng.expovariate(rate)
        prompt = min(6000, max(1, round(rng.lognormvariate(6.3, 1.0))))
        tau = rng.choice([0.05, 0.1])
        slow = rng.uniform(2.0, 6.0)
        found.append(
            SimRequest(
                request_id=i, arrival=now, prompt_len=prompt,
                output_len=max(1, round(rng.lognormvariate(4.0, 1.0))), max_output=max_output,
                slo=Slo(
                    ttft_ms=slow * 1000 * zero_load_time(COST, prompt), tpot_ms=tau * 1000,
                    tier=f"{tau}", on_decline=on_decline,
                ),
            )
        )  # fmt: skip
    return found


def serve(requests, scheduler, spec=SPEC, **options):
    replica = Replica(spec, scheduler, COST, **options)
    done = simulate(requests, [replica], keep_times=True)
    assert replica.free_pages == spec.num_pages
    assert sorted(c.request.request_id for c in done) == [r.request_id for r in requests]
    return done


@pytest.mark.parametrize("pace", READINGS)
@pytest.mark.parametrize("on_decline", ["reject", "best_effort"])
@pytest.mark.parametrize(("rate", "bursts"), [(4.0, False), (12.0, False), (5.0, True)])
def test_with_an_exact_model_every_promise_is_kept(pace, on_decline, rate, bursts):
    """Overload included; lengths are known, and no margin is needed.

    Of those who would have been refused none gives way; of others some do, to shorter ones.
    """
    witness = Witness(SlosServeScheduler(COST, SlosServeConfig(pace=pace, margin=0.0)))
    requests = stream(1, 100, rate=rate, bursts=bursts, on_decline=on_decline)
    done = serve(requests, witness)
    broken = [
        one for one in done
        if one.request.request_id in witness.promised and not is_attained(one, pace)
    ]  # fmt: skip
    assert broken == []
    assert witness.scheduler.num_fallbacks == 0
    assert len(witness.promised) > 0.3 * len(requests)
    if on_decline == "reject":
        assert witness.num_passed == 0


def test_a_promise_passes_to_a_shorter_one_in_time():
    """The promises of a burst pass on, and those that stand in the end are kept."""
    witness = Witness(SlosServeScheduler(COST, SlosServeConfig(margin=0.0)))
    done = serve(stream(2, 400, rate=9.0, bursts=True), witness)
    kept = {one.request.request_id for one in done if is_attained(one, "tpot")}
    assert witness.num_passed > 0
    assert witness.promised <= kept


def test_a_burst_of_long_prompts_does_not_keep_short_ones_out():
    requests = [
        dataclasses.replace(one, prompt_len=length, slo=dataclasses.replace(one.slo, ttft_ms=ttft))
        for one, (length, ttft) in zip(
            stream(2, 100, rate=5.0, bursts=True),
            itertools.cycle([(4000, 2500), (300, 400), (300, 400)]),
            strict=False,
        )
    ]
    kept = {
        revises: attainment(
            serve(requests, SlosServeScheduler(COST, SlosServeConfig(revises=revises))), "tpot"
        )
        for revises in (False, True)
    }
    assert kept[True] > kept[False] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pace", READINGS)
def test_ten_thousand_requests_and_not_one_broken_promise(pace):
    for seed, rate, bursts in ((1, 6.0, False), (2, 9.0, True), (3, 20.0, False)):
        witness = Witness(SlosServeScheduler(COST, SlosServeConfig(pace=pace, margin=0.0)))
        done = serve(stream(seed, 1200, rate=rate, bursts=bursts), witness)
        kept = {one.request.request_id for one in done if is_attained(one, pace)}
        assert witness.promised <= kept


@given(st.integers(0, 10**6), st.sampled_from(READINGS), st.sampled_from([2.0, 30.0]))
@settings(max_examples=4)
def test_jumps_and_live_views_change_nothing(seed, pace, rate):
    requests = stream(seed, 25, rate=rate)
    config = SlosServeConfig(pace=pace)
    plain = serve(requests, SlosServeScheduler(COST, config), jump=False)
    assert plain == serve(requests, SlosServeScheduler(COST, config), jump=True)
    assert plain == serve(requests, SlosServeScheduler(COST, config), frozen_views=True)


@given(st.integers(0, 10**6), st.integers(60, 500), st.integers(1, 12))
@settings(max_examples=10)
def test_everybody_is_served_however_short_memory_is(seed, num_pages, max_num_seqs):
    """Pages for one request and little more, lengths unknown, steps of at most 256 tokens."""
    spec = ReplicaSpec(
        num_pages=num_pages, max_num_seqs=max_num_seqs, max_num_batched_tokens=256, noise=0.1
    )
    room = num_pages * spec.page_size
    requests = [
        dataclasses.replace(
            one, prompt_len=min(one.prompt_len, room - 300), output_len=min(one.output_len, 120)
        )
        for one in stream(seed, 12, rate=10.0, max_output=4096)
    ]
    serve(requests, SlosServeScheduler(COST), spec)


def test_it_keeps_more_objectives_than_first_come_first_served():
    requests = stream(4, 120, rate=8.0)
    for reading in READINGS:
        config = SlosServeConfig(pace=reading)
        mine = attainment(serve(requests, SlosServeScheduler(COST, config)), reading)
        theirs = attainment(serve(requests, FcfsScheduler()), reading)
        assert mine > theirs + 0.05


def test_those_who_ask_for_it_are_refused_with_a_reason():
    requests = stream(5, 150, rate=40.0, on_decline="reject")
    done = serve(requests, SlosServeScheduler(COST))
    refused = [one for one in done if one.rejection is not None]
    assert 20 < len(refused) < 150
    assert {one.rejection.reason for one in refused} <= {"compute", "memory", "expired"}
    assert all(one.finished == pytest.approx(one.request.arrival, abs=0.3) for one in refused)
    assert "an idle server needs" in refused[0].rejection.detail
    others = [one for one in done if one.rejection is None]
    assert all(is_attained(one, "tpot") for one in others)


def test_what_an_idle_server_cannot_do_is_said_so():
    slo = Slo(ttft_ms=20, tpot_ms=50, on_decline="reject")
    request = SimRequest(request_id=0, arrival=0.0, prompt_len=5000, output_len=5, slo=slo)
    (one,) = serve([request], SlosServeScheduler(COST))
    assert one.rejection.reason == "idle_server"
    assert "20 ms to the first token were asked for; an idle server needs" in one.rejection.detail


def test_requests_without_objectives_get_what_is_left_over():
    plain = [
        SimRequest(request_id=1000 + i, arrival=0.0, prompt_len=400, output_len=100)
        for i in range(30)
    ]
    wanted = stream(6, 80, rate=3.0)
    alone = attainment(serve(wanted, SlosServeScheduler(COST)), "tpot")
    merged = sorted([*plain, *wanted], key=lambda r: (r.arrival, r.request_id))
    replica = Replica(SPEC, SlosServeScheduler(COST), COST)
    done = simulate(merged, [replica])
    both = attainment([one for one in done if one.request.slo is not None], "tpot")
    assert both >= alone - 0.02
    ends = [one.finished for one in done if one.request.slo is None]
    assert max(ends) < 60.0


def view_of(*sequences, now=0.0, num_pages=5000):
    held = sum(s.num_pages for s in sequences)
    return ReplicaView(
        now=now, running=tuple(s for s in sequences if s.is_running),
        waiting=tuple(s for s in sequences if not s.is_running), num_free_pages=num_pages - held,
        num_pages=num_pages, page_size=16, max_num_seqs=64, max_num_batched_tokens=8192,
    )  # fmt: skip


def waiting(seq_id, prompt_len, *, ttft_ms=500.0, tpot_ms=100.0, **others):
    values = {
        "arrival": 0.0, "priority": 0, "num_tokens": prompt_len, "num_computed": 0,
        "max_total_len": prompt_len + 50, "num_pages": 0, "is_running": False,
        "slo": Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
    }  # fmt: skip
    return SequenceView(seq_id=seq_id, prompt_len=prompt_len, **{**values, **others})


def test_an_idle_engine_has_nothing_to_do():
    plan = SlosServeScheduler(COST).plan(view_of())
    assert not plan.work
    assert not plan.admit


def test_more_small_requests_are_promised_than_one_large_one():
    """All of them arrive at once, and there is time for the large one or for the small ones."""
    large = waiting(1, 8000, ttft_ms=500)
    small = [waiting(2 + i, 2000, ttft_ms=500) for i in range(4)]
    scheduler = SlosServeScheduler(COST, SlosServeConfig(margin=0.0))
    plan = scheduler.plan(view_of(large, *small))
    assert {item.seq_id for item in plan.work} <= {2, 3, 4, 5}
    assert scheduler.declined == {1: "compute"}


def test_memory_is_a_reason():
    scheduler = SlosServeScheduler(COST)
    scheduler.plan(view_of(waiting(1, 2000, ttft_ms=5000), num_pages=100))
    assert scheduler.declined == {1: "memory"}


def test_a_router_can_ask_without_leaving_a_trace():
    scheduler = SlosServeScheduler(COST)
    here = waiting(1, 3000, ttft_ms=300)
    scheduler.plan(view_of(here))
    asked = waiting(9, 3000, ttft_ms=200)
    before = dict(scheduler._records)
    running = dataclasses.replace(here, is_running=True, num_pages=188, num_computed=0)
    assert scheduler.would_admit(view_of(running), asked) == "compute"
    assert scheduler.would_admit(view_of(running), waiting(9, 100, ttft_ms=2000)) is None
    assert scheduler.would_admit(view_of(running), dataclasses.replace(asked, slo=None)) is None
    assert scheduler._records == before


def test_a_prompt_may_go_before_decodes_that_can_wait_for_it():
    count = 60
    decodes = Decodes(
        np.full(count, 0.1), np.full(count, 0.1), np.full(count, 2000.0), np.full(count, 50.0)
    )
    together = COST.step_time(StepLoad(decodes=count, context=count * 2001).with_chunk(300))
    alone = COST.step_time(StepLoad().with_chunk(300))
    rule = {"max_step_s": 0.1, "max_tokens": 8192}
    for deadline, is_alone in ((together + 1e-3, False), (together - 1e-3, True)):
        prompt = Prefill(deadline, 300, 0, 0.1, 10)
        batch = form(0.0, decodes, [prompt], COST, pace_s=0.1, **rule)
        assert batch.chunks == (300,)
        assert COST.step_time(batch.load) <= deadline
        assert batch.is_in.all() != is_alone
        assert certify(0.0, decodes, [prompt], COST, pace="tpot_gap", **rule) is None
    # Not if the decodes would be late after it, nor for a prompt that is late by itself.
    hurried = decodes._replace(due=np.full(count, together - 1e-3))
    assert form(0.0, hurried, [prompt], COST, pace_s=0.1, **rule).is_in.all()
    hopeless = Prefill(0.9 * alone, 300, 0, 0.1, 10)
    assert form(0.0, decodes, [hopeless], COST, pace_s=0.1, **rule).is_in.all()


def sequence_of(seq_id, prompt, slo, *, arrival=0.0, made=None):
    """A sequence that waits or, with tokens of its own, decodes."""
    return SequenceView(
        seq_id=seq_id, arrival=arrival, priority=0, prompt_len=prompt,
        num_tokens=prompt + (made or 0), num_computed=prompt + made - 1 if made else 0,
        max_total_len=prompt + 200, num_pages=-(-(prompt + (made or 0)) // 16) if made else 0,
        is_running=bool(made), is_decoding=bool(made), slo=slo,
        first_token_time=arrival + 0.01 if made else None,
    )  # fmt: skip


def state_of(now, running, waiting=(), num_pages=6000):
    used = sum(one.num_pages for one in running)
    return ReplicaView(
        now=now, running=tuple(running), waiting=tuple(waiting), num_free_pages=num_pages - used,
        num_pages=num_pages, page_size=16, max_num_seqs=256, max_num_batched_tokens=8192,
    )  # fmt: skip


EASY = Slo(ttft_ms=400, tpot_ms=100)


def test_while_promises_are_short_others_make_steps_only_modestly_longer():
    scheduler = SlosServeScheduler(COST, SlosServeConfig(shortage_s=5.0, price_gain=0.0))
    others = [sequence_of(100 + i, 6000, None, made=2) for i in range(150)]

    def state(now, waiting=()):
        promised = [sequence_of(i, 500, EASY, made=1 + round(10 * now)) for i in range(8)]
        return state_of(now, [*promised, *others], waiting, num_pages=80_000)

    def step(now, waiting=()):
        work = [item.seq_id for item in scheduler.plan(state(now, waiting)).work]
        assert set(range(8)) <= set(work)
        return len(work) - 8

    scheduler.adopt(state(0.05))
    full = step(0.1)
    assert full > 100
    step(0.2, [sequence_of(500 + i, 8000, EASY, arrival=0.2) for i in range(4)])
    assert scheduler.declined
    modest = step(0.3)
    load = StepLoad(decodes=8 + modest, context=8 * 500 + modest * 6000)
    assert 0.04 < COST.step_time(load) <= 0.05
    assert step(5.1) == modest
    assert step(5.3) == full


def test_those_who_ask_for_much_are_not_promised_anything_while_promises_are_short():
    scheduler = SlosServeScheduler(COST, SlosServeConfig(shortage_s=5.0))
    wide = Slo(ttft_ms=5000, tpot_ms=100)

    def is_promised(seq_id, now, prompt, slo=wide):
        scheduler.plan(state_of(now, [], [sequence_of(seq_id, prompt, slo, arrival=now)]))
        return scheduler._records[seq_id].standing is Standing.PROMISED

    for i in range(200):
        assert is_promised(i, 0.01 * i, 100)
    assert is_promised(1000, 2.1, 8000)  # there is room
    tight = Slo(ttft_ms=10, tpot_ms=100)
    for i in range(300, 400):
        assert not is_promised(i, 2.2 + 0.001 * i, 100, tight)
    assert not is_promised(1001, 3.0, 8000)
    assert is_promised(1002, 3.1, 100)
    assert is_promised(1003, 9.0, 8000)


def test_speculation_is_faster_where_drafts_are_good():
    spec = ReplicaSpec(num_pages=6000, max_num_seqs=128, max_draft=5)
    draft_cost = PUBLISHED_COSTS["opt-6.7b+125m-a100"]
    slo = Slo(ttft_ms=1000, tpot_ms=100)

    def end(acceptance):
        requests = [
            SimRequest(
                request_id=i, arrival=0.0, prompt_len=50, output_len=200, slo=slo,
                acceptance=acceptance,
            ) for i in range(4)
        ]  # fmt: skip
        replica = Replica(spec, SlosServeScheduler(draft_cost), draft_cost)
        return max(one.finished for one in simulate(requests, [replica]))

    assert end(0.9) < 0.5 * end(0.05)


def test_lengths_are_guessed_from_those_that_ended():
    lengths = OutputLengths(0.8, 256)
    assert lengths.guess("a", 0, 1000) == 256
    assert lengths.guess("a", 0, 100) == 100
    assert lengths.guess("a", 400, 1000) == 501
    for length in range(1, 101):
        lengths.observe("a", length)
    assert lengths.guess("a", 0, 1000) == 80
    assert 85 <= lengths.guess("a", 50, 1000) <= 95
    assert lengths.guess("a", 50, 60) == 60
    assert lengths.guess("a", 200, 1000) == 251
    for _ in range(600):
        lengths.observe("a", 7)
    assert lengths.guess("a", 0, 1000) == 7
    assert lengths.guess("b", 0, 1000) == 256


def fleet_of(requests, count, router_of, jump=True):
    schedulers = [SlosServeScheduler(COST) for _ in range(count)]
    fleet = [
        Replica(SPEC, scheduler, COST, index=i, jump=jump) for i, scheduler in enumerate(schedulers)
    ]
    done = simulate(requests, fleet, router=router_of(schedulers), keep_times=True)
    assert sorted(one.request.request_id for one in done) == [r.request_id for r in requests]
    return done


def test_a_fleet_of_one_is_a_single_server():
    requests = stream(8, 60, rate=9.0)
    alone = serve(requests, SlosServeScheduler(COST))
    assert fleet_of(requests, 1, HandOffRouter) == alone
    assert fleet_of(requests, 1, HandOffRouter, jump=False) == alone


def test_hand_offs_by_load_keep_no_fewer_objectives_than_turns():
    kept = np.array(
        [
            [
                attainment(fleet_of(requests, 3, router_of), "tpot")
                for router_of in (
                    lambda _: RoundRobinRouter(),
                    HandOffRouter,
                    lambda s: HandOffRouter(s, least_first=True),
                )
            ]
            for requests in (stream(seed, 200, rate=12.0, bursts=True) for seed in range(4))
        ]
    )
    turns, handed, least = kept.mean(axis=0)
    assert least >= turns
    assert handed > turns - 0.03


def test_a_router_says_whether_and_why_not():
    schedulers = [SlosServeScheduler(COST), SlosServeScheduler(COST)]
    router = HandOffRouter(schedulers)
    fleet = FleetView(now=0.0, replicas=(view_of(), view_of()))
    assert router.place(waiting(1, 500), fleet) == Route(replica=0)
    assert router.place(waiting(2, 500), fleet) == Route(replica=1)
    hopeless = router.place(waiting(3, 5000, ttft_ms=50), fleet)
    assert (hopeless.is_promised, hopeless.reason) == (False, "compute")
    with pytest.raises(ConfigError, match="there are 2 replicas and 1 planners"):
        HandOffRouter(schedulers[:1]).place(waiting(4, 5), fleet)
    with pytest.raises(ConfigError, match="needs planners and at least one hop"):
        HandOffRouter(schedulers, max_hops=0)
