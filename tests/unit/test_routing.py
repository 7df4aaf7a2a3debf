"""Routers by name: plain rules over views, and the log of a fleet."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS
from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import RoutePlan
from jaxserve.core.request import Slo
from jaxserve.core.view import FleetView, ReplicaRole, ReplicaView, SequenceView
from jaxserve.scheduling.fleet_log import (
    FleetLogHead,
    FleetLogReader,
    FleetLogWriter,
    is_fleet_log,
)
from jaxserve.scheduling.routing import (
    ROUTERS,
    PrefixAwareConfig,
    PrefixAwareRouter,
    RouterSettings,
    make_router,
)
from jaxserve.sim.replay import replay


def sequence(number=1, *, running=False, prompt_len=100):
    return SequenceView(
        seq_id=number, arrival=1.0, priority=0, prompt_len=prompt_len,
        num_tokens=prompt_len + running, num_computed=prompt_len if running else 0,
        max_total_len=200, num_pages=1, is_running=running, is_decoding=running,
        slo=Slo(ttft_ms=100, tpot_ms=50),
    )  # fmt: skip


def replica(running=0, waiting=0):
    return ReplicaView(
        now=1.0, running=tuple(sequence(i + 10, running=True) for i in range(running)),
        waiting=tuple(sequence(i + 500) for i in range(waiting)), num_free_pages=90, num_pages=90,
        page_size=16, max_num_seqs=32, max_num_batched_tokens=512,
    )  # fmt: skip


def fleet(*loads, states=(), cached=()):
    roles = tuple(ReplicaRole(state=s) for s in states) or (ReplicaRole(),) * len(loads)
    return FleetView(
        now=1.0, replicas=tuple(replica(*load) for load in loads), roles=roles, cached=cached
    )  # fmt: skip


def route(router, view):
    found = router.plan(sequence(), view).route
    return None if found is None else found.replica


def test_turns_are_taken_and_skip_who_does_not_serve():
    router, scaler = make_router("round_robin", None, RouterSettings())
    view = fleet((5, 0), (0, 0), (0, 0), states=("serving", "off", "serving"))
    assert [route(router, view) for _ in range(5)] == [0, 2, 0, 2, 0]
    assert scaler is None
    nobody = fleet((0, 0), states=("starting",))
    plan = router.plan(sequence(), nobody)
    assert plan == RoutePlan(route=None, reason="compute")
    assert router.send_home(nobody, plan) is plan
    assert router.tier_of(sequence()) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_fewest_requests_win(loads):
    router, _ = make_router("least_loaded", None, RouterSettings())
    best = min(range(len(loads)), key=lambda i: (sum(loads[i]), i))
    assert route(router, fleet(*loads)) == best


def test_a_prefix_decides_while_loads_are_alike():
    router = PrefixAwareRouter(PrefixAwareConfig(min_share=0.2, max_lead=3))
    assert route(router, fleet((2, 1), (0, 0), cached=(64, 0))) == 0
    assert route(router, fleet((2, 2), (0, 0), cached=(64, 0))) == 1, "four requests more"
    assert route(router, fleet((1, 0), (0, 0), cached=(16, 0))) == 1, "too short a prefix"
    assert route(router, fleet((1, 0), (0, 0), cached=(64, 64))) == 1, "the less busy of two"
    off = fleet((0, 0), (3, 0), cached=(96, 0), states=("off", "serving"))
    assert route(router, off) == 1
    for bad in ({"min_share": 2}, {"max_lead": -1}):
        with pytest.raises(ConfigError, match="must be"):
            PrefixAwareConfig(**bad)


def test_names_and_times_are_checked():
    assert list(ROUTERS) == ["round_robin", "least_loaded", "prefix_aware", "polyserve"]
    with pytest.raises(ConfigError, match="Did you mean 'polyserve'"):
        make_router("polyserv", None, RouterSettings())
    with pytest.raises(ConfigError, match="polyserve needs times of steps"):
        make_router("polyserve", None, RouterSettings())
    with pytest.raises(ConfigError, match="the settings of a router are wrong"):
        RouterSettings.from_json({"polyserve": {}})


@pytest.mark.parametrize("name", list(ROUTERS))
def test_a_log_is_decided_again_and_a_changed_one_is_noticed(name, tmp_path):
    cost, path = PUBLISHED_COSTS["7b-a100"], tmp_path / "fleet.log"
    chosen = RouterSettings()
    router, scaler = make_router(name, cost, chosen)
    head = FleetLogHead(router=name, settings=chosen, cost=cost)
    log = FleetLogWriter(path, head)
    views = [fleet((i, 0), (2, i % 3), (0, 1), cached=(32, 0, 16)) for i in range(6)]
    for number, view in enumerate(views):
        plan = router.plan(sequence(number), view)
        log.routed(sequence(number), view, plan)
        waits = RoutePlan(route=None, reason="expired")
        log.sent_home(view, waits, router.send_home(view, waits))
        router.observe(sequence(number, running=True))
        log.ended(sequence(number, running=True))
        router.drifted(1.0 + 0.2 * number)
        log.drifted(1.0 + 0.2 * number)
        if scaler is not None:
            scaler.refused(0.1)
            log.refused(0.1)
            log.scaled(view, scaler.plan(view))
    log.close()
    assert is_fleet_log(path)
    found = replay(path)
    assert (found.policy, found.differences) == (name, 0)
    assert found.plans == (18 if scaler is not None else 12)
    calls = list(FleetLogReader(path))
    assert calls[0].fleet == views[0]
    assert calls[0].sequence == sequence(0)
    lines = path.read_text().splitlines()
    changed = json.loads(lines[1])
    changed["plan"] = {"route": [2, False, "memory"]}
    path.write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]) + "\n")
    found = replay(path)
    assert found.differences == 1
    assert found.shown[0].startswith("line 2: ")


def test_what_is_no_fleet_log_is_refused(tmp_path):
    path = tmp_path / "x.log"
    assert not is_fleet_log(path)
    path.write_text('{"format":"other"}\n')
    with pytest.raises(ConfigError, match="is no fleet's log"):
        FleetLogReader(path)
    path.write_text('{"format":"jaxserve fleet log","version":9}\n')
    with pytest.raises(ConfigError, match="must be of version 1, got 9"):
        FleetLogReader(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        FleetLogWriter(
            tmp_path / "none" / "x",
            FleetLogHead(router="round_robin", settings=RouterSettings(), cost=None),
        )
