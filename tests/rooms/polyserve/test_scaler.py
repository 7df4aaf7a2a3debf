"""The scaler: the tail is the signal, survivors are tested again, nothing goes back and forth."""

import numpy as np
import pytest

from jaxserve.core.cost import PUBLISHED_COSTS
from jaxserve.core.errors import ConfigError
from jaxserve.core.view import FleetView, ReplicaRole
from jaxserve.scheduling.polyserve import PolyServeConfig, TierScaler
from jaxserve.sim.fleet import FleetSpec, FleetTrace, simulate_fleet
from tests.rooms.polyserve.test_router import replica

COST = PUBLISHED_COSTS["7b-a100"]
CONFIG = PolyServeConfig(tiers=(0.05, 0.1), initial_output=50, initial_prompt=200)


def watch(members, checks, config=CONFIG, *, refusing=()):
    """Ask a scaler about the same fleet at several checks; returns the actions of each."""
    scaler = TierScaler(COST, config)
    found = []
    for check in range(checks):
        if check in refusing:
            scaler.refused(0.1)
        roles = tuple(
            ReplicaRole(state="pooled") if tier is None else ReplicaRole(tier=tier)
            for _, tier in members
        )
        now = 10.0 + check * config.check_s
        view = FleetView(now=now, replicas=tuple(r for r, _ in members), roles=roles)
        found.append([(a.replica, a.state) for a in scaler.plan(view).actions])
    return found


POOL = (replica(), None)


def test_the_tail_drains_once_it_has_been_dispensable_for_three_checks():
    members = [(replica(12), 0.1), (replica(9), 0.1), (replica(1), 0.1), POOL]
    assert watch(members, 3) == [[], [], [(2, "draining")]]
    assert watch(members, 4, refusing=[1]) == [[], [], [], []], "queueing counts"


def test_survivors_are_tested_with_the_load_that_they_would_have():
    # The tail's one request has a place elsewhere; but two shares of what comes make one too many.
    full = [(replica(250), 0.1), (replica(240), 0.1), (replica(225), 0.1), POOL]
    assert all(not actions for actions in watch(full, 5))
    assert watch([(replica(225), 0.1), (replica(1), 0.1), POOL], 3)[-1] == [(1, "draining")]


def test_the_last_server_of_a_tier_stays():
    assert watch([(replica(0), 0.1), (replica(0), 0.05), POOL], 6) == [[]] * 6


def test_the_pool_is_kept_at_its_reserve():
    many = [(replica(3), 0.1), POOL, POOL, POOL]
    assert watch(many, 3) == [[], [], [(3, "off"), (2, "off")]]
    config = PolyServeConfig(tiers=(0.1,))
    scaler = TierScaler(COST, config)
    roles = (ReplicaRole(tier=0.1), ReplicaRole(state="off"), ReplicaRole(state="off"))
    view = FleetView(now=0.0, replicas=(replica(3), replica(), replica()), roles=roles)
    (action,) = scaler.plan(view).actions
    assert (action.replica, action.state) == (1, "starting")
    with pytest.raises(ConfigError, match=r"no tier of 0\.3 sec"):
        scaler.refused(0.3)


def regular(rate, seconds):
    """Return requests that come like clockwork, all alike."""
    count = int(rate * seconds)
    return FleetTrace(
        arrival=np.arange(count) / rate, prompt=np.full(count, 600), output=np.full(count, 80),
        ttft=np.full(count, 1.0), tpot=np.array([0.05, 0.1])[np.arange(count) % 2],
    )  # fmt: skip


@pytest.mark.parametrize("rate", [5.0, 18.0, 31.0])
def test_a_constant_load_gets_a_constant_fleet(rate):
    """No oscillation for thirty minutes after a warm-up, at small numbers of servers."""
    spec = FleetSpec(servers=12, cost=COST, capacity=352_000)
    report = simulate_fleet(regular(rate, 2100), spec, CONFIG, elastic=True, initial=6)
    settled = report.timeline[(report.timeline[:, 0] > 300) & (report.timeline[:, 0] < 2100)]
    serving = settled[:, 1:3]
    assert (serving == serving[0]).all()
    assert (settled[:, report.columns.index("starting")] == 0).all()
    assert report.attainment() > 0.99


def test_a_fleet_follows_its_load_down_and_up_again():
    rate = np.repeat([30.0, 6.0, 30.0], 300)
    arrivals = np.concatenate([s + np.arange(int(r)) / r for s, r in enumerate(rate)])
    count = len(arrivals)
    trace = FleetTrace(
        arrival=arrivals, prompt=np.full(count, 600), output=np.full(count, 80),
        ttft=np.full(count, 1.0), tpot=np.full(count, 0.1),
    )  # fmt: skip
    spec = FleetSpec(servers=12, cost=COST, capacity=352_000)
    report = simulate_fleet(trace, spec, CONFIG, elastic=True, initial=6)
    on = report.timeline[:, 1:-1].sum(axis=1)
    at = np.searchsorted(report.timeline[:, 0], [280, 580, 880])
    assert on[at[1]] < on[at[0]]
    assert on[at[2]] > on[at[1]]
    assert report.server_seconds < 0.9 * on.max() * 900
    assert report.attainment() > 0.9


def test_servers_of_tokens_follow_the_mix_and_prompts_wait_for_them():
    """Whoever came first has the servers; tiers that are short of them get theirs within a minute.

    All tight requests come first. Prompts that nobody could go on with are not computed.
    """
    rate, seconds, rng = 60.0, 120.0, np.random.default_rng(0)
    count = int(rate * seconds)
    arrival = np.arange(count) / rate
    share = np.where(arrival < 20, 0.95, 0.3)
    trace = FleetTrace(
        arrival=arrival, prompt=np.full(count, 300), output=np.full(count, 200),
        ttft=np.full(count, 1.0), tpot=np.where(rng.random(count) < share, 0.05, 0.1),
    )  # fmt: skip
    spec = FleetSpec(servers=10, cost=COST, capacity=352_000, prefill_servers=4)
    report = simulate_fleet(trace, spec, CONFIG)
    tight = report.timeline[:, 1]
    assert tight[np.searchsorted(report.timeline[:, 0], 110.0)] < tight.max()
    late = report.trace.arrival > 60
    kept = report.attained()
    assert kept[late].mean() > 0.9
    waste = np.isfinite(report.first) & ~kept & late
    assert waste.mean() < 0.05, "prompts are computed for those who can be served"
