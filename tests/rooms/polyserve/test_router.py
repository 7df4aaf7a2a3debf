"""The router over views: packing, the pool, lazy promotion with its guard, and who waits."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, StepLoad
from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import RoutePlan
from jaxserve.core.request import Slo
from jaxserve.core.view import FleetView, ReplicaRole, ReplicaView, SequenceView
from jaxserve.scheduling.fcfs import FcfsScheduler
from jaxserve.scheduling.polyserve import PolyServeConfig, TierRouter
from jaxserve.sim.loop import simulate
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.report import attainment
from jaxserve.sim.request import SimRequest

COST = PUBLISHED_COSTS["7b-a100"]
TIERS = (0.02, 0.05, 0.1)
CONFIG = PolyServeConfig(tiers=TIERS)
IDS = itertools.count()


def sequence(*, prompt=200, emitted=0, tpot=0.1, ttft=1.0, arrival=10.0):
    decodes = emitted > 0
    return SequenceView(
        seq_id=next(IDS), arrival=arrival, priority=0, prompt_len=prompt,
        num_tokens=prompt + emitted, num_computed=prompt + emitted - 1 if decodes else 0,
        max_total_len=prompt + 500, num_pages=20, is_running=decodes, is_decoding=decodes,
        slo=Slo(ttft_ms=ttft * 1000, tpot_ms=tpot * 1000),
    )  # fmt: skip


def replica(decodes=0, *, tpot=0.1, waiting=0, prompt=200, now=10.0, pages=20_000):
    # Each decode is in step with its deadlines, and half a period early.
    running = tuple(
        sequence(prompt=prompt, emitted=20, tpot=tpot, arrival=now - 1.0 - 19.5 * tpot)
        for _ in range(decodes)
    )
    return ReplicaView(
        now=now, running=running, waiting=tuple(sequence(prompt=prompt) for _ in range(waiting)),
        num_free_pages=pages, num_pages=pages, page_size=16, max_num_seqs=256,
        max_num_batched_tokens=8192,
    )  # fmt: skip


def fleet(*members):
    """Make a view of pairs of a replica and its tier; None is in the pool."""
    roles = tuple(
        ReplicaRole(state="pooled") if tier is None else ReplicaRole(state="serving", tier=tier)
        for _, tier in members
    )
    return FleetView(now=10.0, replicas=tuple(one for one, _ in members), roles=roles)


def plan(view, config=CONFIG, **wanted):
    return TierRouter(COST, config).plan(sequence(**wanted), view)


def test_the_fullest_server_that_takes_it_is_filled_first():
    view = fleet((replica(2), 0.1), (replica(9), 0.1), (replica(5), 0.1))
    assert plan(view).route.replica == 1
    assert plan(view, PolyServeConfig(tiers=TIERS, packs=False)).route.replica == 0


def test_a_request_goes_to_the_loosest_tier_that_is_no_looser():
    view = fleet((replica(1, tpot=0.02), 0.02), (replica(1, tpot=0.05), 0.05), (replica(1), 0.1))
    for tpot, wanted in ((0.02, 0), (0.03, 0), (0.05, 1), (0.099, 1), (0.1, 2), (5.0, 2)):
        assert plan(view, tpot=tpot).route.replica == wanted, tpot


FULL = {"decodes": 70, "tpot": 0.02, "prompt": 400}
"""A server of the tightest tier that has no room left."""


def test_the_pool_comes_before_promotion():
    tight, full = (replica(1, tpot=0.02), 0.02), (replica(256), 0.1)
    taken = plan(fleet(tight, full, (replica(), None)))
    assert taken.route.replica == 2
    (action,) = taken.actions
    assert (action.replica, action.state, action.tier) == (2, "serving", 0.1)
    crowded = fleet(tight, full)
    assert plan(crowded).route.replica == 0, "lazy promotion"
    assert plan(crowded, PolyServeConfig(tiers=TIERS, promotes=False)).route is None


@given(st.integers(0, 60), st.integers(0, 256), st.integers(0, 256))
@settings(max_examples=40, deadline=None)
def test_nobody_is_promoted_while_a_server_of_the_own_tier_takes_it(tight, middle, loose):
    view = fleet(
        (replica(tight, tpot=0.02), 0.02), (replica(middle, tpot=0.05), 0.05),
        (replica(loose), 0.1),
    )  # fmt: skip
    found = plan(view)
    alone = plan(fleet((view.replicas[2], 0.1)))
    if alone.route is not None:
        assert found.route.replica == 2
    elif found.route is not None:
        assert found.route.replica < 2
        nearest = plan(fleet((view.replicas[1], 0.05)), tpot=0.05)
        if found.route.replica == 0 and nearest.route is not None:
            # The guard is what turned it away there.
            guarded = PolyServeConfig(tiers=TIERS, guard=1.0)
            assert plan(view, guarded).route.replica == 1


def test_looser_servers_never_take_tighter_requests():
    view = fleet((replica(**FULL), 0.02), (replica(0), 0.05), (replica(0), 0.1))
    waits = plan(view, tpot=0.02)
    # An empty server of another tier may change its tier, if that one has another; these have not.
    assert waits.route is None
    assert waits.reason == "compute"


def test_an_empty_server_may_change_its_tier():
    view = fleet((replica(**FULL), 0.02), (replica(3), 0.1), (replica(0), 0.1))
    moved = plan(view, tpot=0.02)
    assert moved.route.replica == 2
    assert [(a.replica, a.state, a.tier) for a in moved.actions] == [(2, "serving", 0.02)]


def test_a_tier_without_servers_takes_over_a_looser_one_that_keeps_its_pace():
    """Otherwise a fleet of fewer servers than tiers would never serve its tightest requests."""
    view = fleet((replica(3), 0.1), (replica(2), 0.05))
    taken = plan(view, tpot=0.02)
    assert taken.route.replica == 1, "the nearest looser tier gives its server"
    assert [(a.replica, a.state, a.tier) for a in taken.actions] == [(1, "serving", 0.02)]
    busy = fleet((replica(120, prompt=400), 0.1))
    assert plan(busy, tpot=0.02).route is None, "it could not keep the pace"
    # Whoever is there is hosted by what has become tighter.
    assert plan(fleet((replica(3), 0.02)), tpot=0.1).route.replica == 0


def test_what_an_idle_server_could_not_do_is_refused_at_the_door():
    view = fleet((replica(), 0.1))
    assert plan(view, prompt=4000, ttft=0.1).reason == "idle_server"
    assert plan(view, tpot=0.015).reason == "idle_server"
    late = plan(view, arrival=9.5, ttft=0.505)
    assert (late.route, late.reason) == (None, "expired")
    small = fleet((replica(0, pages=10), 0.1))
    assert plan(small, prompt=159).reason == "memory"


def test_times_follow_what_steps_take_of_late():
    router = TierRouter(COST, CONFIG)
    view = fleet((replica(), 0.1))
    alone = COST.step_time(StepLoad().with_chunk(2000))
    wanted = sequence(prompt=2000, ttft=1.2 * alone)
    assert router.plan(wanted, view).route is not None
    router.drifted(1.3)
    assert router.plan(wanted, view).reason == "idle_server"
    slower = router.times.planes
    router.drifted(9.0)
    assert (router.times.planes > slower).all()
    assert router.times.planes == pytest.approx(1.5 / 1.3 * slower), "not beyond 1.5"
    router.drifted(1.0)
    assert router.plan(wanted, view).route is not None


def test_whoever_must_not_wait_goes_where_least_is_left():
    router = TierRouter(COST, CONFIG)
    view = fleet((replica(9, waiting=3), 0.1), (replica(20), 0.1), (replica(), None))
    waits = RoutePlan(route=None, reason="expired")
    sent = router.send_home(view, waits)
    assert (sent.route.replica, sent.route.is_promised, sent.route.reason) == (2, False, "expired")
    assert [(a.replica, a.state, a.tier) for a in sent.actions] == [(2, "serving", 0.1)]
    gone = FleetView(now=0.0, replicas=(replica(),), roles=(ReplicaRole(state="off"),))
    assert router.send_home(gone, waits).route is None
    with pytest.raises(ConfigError, match="no replica of the fleet serves"):
        router.place(sequence(), gone)


def test_permuting_servers_does_not_change_what_is_chosen():
    members = [(replica(n), 0.1) for n in (3, 30, 12, 7)]
    for order in itertools.permutations(range(4)):
        chosen = plan(fleet(*(members[i] for i in order))).route.replica
        assert order[chosen] == 1


def test_views_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="a fleet needs replicas, got none"):
        plan(FleetView(now=0.0, replicas=()))
    with pytest.raises(ConfigError, match=r"serves the tier 0.07, and the router knows 0.02, 0.05"):
        plan(fleet((replica(), 0.07)))
    odd = FleetView(now=0.0, replicas=(replica(),), roles=(ReplicaRole(), ReplicaRole()))
    with pytest.raises(ConfigError, match="1 replicas and 2 roles"):
        plan(odd)


def test_what_has_been_learned_survives_as_json():
    router = TierRouter(COST, CONFIG)
    for _ in range(200):
        router.observe(sequence(prompt=50, emitted=7, tpot=0.05))
    other = TierRouter(COST, CONFIG)
    other.restore(json.loads(json.dumps(router.dump())))
    assert other.dump() == router.dump()
    assert router.dump()["output"][1] < 60 < router.dump()["output"][0]


def test_it_places_requests_of_the_simulator_of_single_replicas():
    """The same object behind the protocol that real fleets use, with engines of another kind."""
    requests = [
        SimRequest(
            request_id=i, arrival=0.05 * i, prompt_len=300, output_len=20,
            slo=Slo(ttft_ms=600, tpot_ms=100),
        ) for i in range(150)
    ]  # fmt: skip
    sizes = ReplicaSpec(num_pages=20_000, max_num_batched_tokens=512)
    replicas = [Replica(sizes, FcfsScheduler(), COST, index=i) for i in range(4)]
    done = simulate(requests, replicas, router=TierRouter(COST, PolyServeConfig(tiers=(0.1,))))
    assert attainment(done, "tpot") == 1.0
    assert len({one.replica for one in done}) < 4, "packed, not spread"
