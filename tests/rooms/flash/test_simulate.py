"""Modelled times: by hand, against bounds, against solvers, and what the policy makes of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rooms.flash.matrices import MATRICES, MIB, make
from benchmarks.rooms.flash.optimum import fluid_optimum, scipy_stages, stepwise_optimum
from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash import CostModel, choose, lower_bound, plan, simulate
from jaxserve.sharding.flash.loads import measure_loads
from jaxserve.sharding.flash.policy import TOLERANCE
from jaxserve.sharding.flash.schedule import MODES
from jaxserve.sharding.flash.simulate import ALGORITHMS, stage_times
from tests.rooms.flash.cases import gpu_counts, largest_sum, links, off_diagonal, server_counts


def pairs(n, m, **rows):
    """Make traffic from names like `a0_b1`: from the first GPU of a to the second of b."""
    traffic = np.zeros((n, m, n, m), np.int64)
    for name, value in rows.items():
        i, k, _, j, final = name
        traffic["abc".index(i), int(k), "abc".index(j), int(final)] = value
    return traffic


# By hand -------------------------------------------------------------------------------------


def seconds(traffic, cost):
    return {name: simulate(traffic, cost, name).seconds for name in ALGORITHMS}


def test_one_pair_of_gpus():
    """Twelve rows from one GPU to another, two GPUs per server, four rows per second inside."""
    cost = links(2, up=4.0, latency=1.0)  # a step inside takes 0.25, one between servers 1
    found = seconds(pairs(2, 2, a0_b1=12), cost)
    assert found["direct"] == 12 + 1
    assert found["spread_out"] == 12 + 1
    assert found["source_rail"] == 12 + 1 + 0.25
    assert found["destination_rail"] == 12 + 1 + 0.25
    # Half moves to the other GPU, which is the final one; half is passed on behind the send.
    assert found["balanced"] == 0.25 + (6 + 1) + 0.25
    assert found["paper"] == found["flash"] == (6 / 4 + 0.25) + (6 + 1) + (6 / 4 + 0.25)
    assert simulate(pairs(2, 2, a0_b1=12), cost).bound == 6


def test_stages_overlap_with_what_goes_before_and_behind():
    cost = links(2, up=2.0, latency=1.0)
    traffic = pairs(3, 2, a0_b0=20, a0_c0=8)
    schedule = plan(traffic, cost)
    assert schedule.durations.tolist() == [20, 8]
    balance, sends, passed = stage_times(measure_loads(traffic, cost), cost, schedule)
    assert balance.tolist() == [10 / 2 + 0.25, 4 / 2 + 0.25]
    assert sends.tolist() == [10 + 1, 4 + 1]
    assert passed.tolist() == balance.tolist()  # half of the rows come back
    shown = 5.25 + max(11, 2.25) + max(5, 5.25) + 2.25
    assert simulate(traffic, cost, schedule=schedule).seconds == shown
    paper = (14 / 2 + 0.25) + 5 + max(11, 2.25) + 5.25  # ascending, balanced first
    assert simulate(traffic, cost, "paper").seconds == paper


def test_many_senders_to_one_port_cost_more():
    traffic = pairs(3, 2, a0_c0=8, a1_c0=8, b0_c0=8, b1_c0=8)
    for incast in (0.0, 0.5):
        found = seconds(traffic, links(2, up=1e9, incast=incast))
        assert found["direct"] == pytest.approx(32 * (1 + 2 * incast), rel=1e-6)  # of four
        assert found["source_rail"] == pytest.approx(16 * (1 + incast), rel=1e-6)  # of two, each
        assert found["balanced"] == pytest.approx(16 * (1 + incast), rel=1e-6)
        assert found["flash"] == pytest.approx(16, rel=1e-6)


def test_rows_that_stay_go_when_ports_idle():
    cost = links(2, up=4.0)
    inside = pairs(2, 2, a0_a1=40)
    assert all(value == 10 for value in seconds(inside, cost).values())
    both = inside + pairs(2, 2, a0_b0=8, a1_b1=8)
    assert all(value == 10 for name, value in seconds(both, cost).items() if name != "spread_out")


def test_nothing_takes_no_time():
    for n, m in ((1, 1), (3, 2)):
        assert set(seconds(np.zeros((n, m, n, m), np.int64), links(m)).values()) == {0.0}
        assert simulate(np.zeros((n, m, n, m), np.int64), links(m)).ratio == 1


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm must be one of .*got 'flush'.*'flash'"):
        simulate(np.zeros((2, 2), np.int64), links(1), "flush")
    with pytest.raises(ConfigError, match=r"must be 0 or more, got -1 at \(0, 1\)"):
        simulate(np.array([[0, -1], [1, 0]]), links(1))
    with pytest.raises(ConfigError, match=r"fewer than 2\*\*62 in sum, got about"):
        lower_bound(np.full((3, 3), 2**61), links(1))


# Bounds --------------------------------------------------------------------------------------


@given(traffic=gpu_counts(), up=st.sampled_from([1.0, 2.0, 9.0, 36.0]), latency=st.floats(0, 10))
@settings(max_examples=80, deadline=None)
def test_no_algorithm_beats_the_bound(traffic, up, latency):
    cost = links(traffic.shape[1], up=up, latency=latency)
    bound = lower_bound(traffic, cost)
    for name, value in seconds(traffic, cost).items():
        assert value >= bound * (1 - 1e-9), name
    schedules = {mode: plan(traffic, cost, mode) for mode in MODES}
    for mode, schedule in schedules.items():
        assert simulate(traffic, cost, schedule=schedule).seconds >= bound * (1 - 1e-9), mode


@given(counts=server_counts(max_servers=6))
@settings(max_examples=40, deadline=None)
def test_the_bound_of_servers_is_that_of_the_fullest_one(counts):
    cost = links(4, up=1e9)
    assert lower_bound(off_diagonal(counts), cost) == pytest.approx(largest_sum(counts) / 4)


@given(traffic=gpu_counts(), up=st.sampled_from([2.0, 9.0, 36.0]))
@settings(max_examples=80, deadline=None)
def test_stages_take_what_the_theory_allows(traffic, up):
    """At most t* (1 + 2 (m - 1) B2 / B1) and the fixed times, parts of a row rounded up."""
    n, m = traffic.shape[:2]
    for i in range(n):
        traffic[i, :, i, :] = 0
    cost = links(m, up=up)
    least = measure_loads(traffic, cost).bottleneck / m
    for mode in ("halving", "bottleneck", "any"):
        schedule = plan(traffic, cost, mode)
        rounding = schedule.num_stages * (1 + 2 * m / up)
        most = least * (1 + 2 * (m - 1) / up) + rounding
        assert simulate(traffic, cost, schedule=schedule).seconds <= most * (1 + 1e-9)


@given(traffic=gpu_counts(max_servers=3, max_gpus=3, most=50), up=st.sampled_from([1.0, 2.0, 9.0]))
@settings(max_examples=25, deadline=None)
def test_the_fluid_optimum_is_between_bound_and_every_algorithm(traffic, up):
    cost = links(traffic.shape[1], up=up)
    least = fluid_optimum(traffic, cost)
    assert lower_bound(traffic, cost) <= least * (1 + 1e-7) + 1e-9
    for name, value in seconds(traffic, cost).items():
        assert value >= least * (1 - 1e-7) - 1e-9, name


@pytest.mark.parametrize("name", ["zipf 0.8", "random", "moe", "hot row", "uniform"])
def test_the_bound_is_the_optimum_where_scale_up_is_fast(name):
    traffic = make(name, 3, 3, MIB, seed=1)
    for i in range(3):
        traffic[i, :, i, :] = 0
    cost = CostModel(gpus=3, up_latency=0, out_latency=0)
    assert fluid_optimum(traffic, cost) == pytest.approx(lower_bound(traffic, cost), rel=1e-6)


@pytest.mark.parametrize("size", [(2, 2), (3, 1)])
@pytest.mark.parametrize("latency", [0.0, 1.0])
def test_the_optimum_in_steps_is_between_bound_and_stages(size, latency):
    n, m = size
    for seed in range(4):
        counts = np.random.default_rng(seed).integers(0, 3, (n, n)) * m
        traffic = np.zeros((n, m, n, m), np.int64)
        traffic[:, 0, :, -1] = off_diagonal(counts)  # all from one GPU, for one GPU
        cost = links(m, up=9.0 * m, latency=latency)
        staged = min(
            simulate(traffic, cost, schedule=plan(traffic, cost, mode)).seconds for mode in MODES
        )
        steps = math.ceil(staged - 1e-9)
        least = stepwise_optimum(traffic, cost, max_steps=steps)
        assert lower_bound(traffic, cost) <= least <= steps
        if off_diagonal(counts).any():
            assert least >= math.ceil(lower_bound(traffic, cost) + latency)


def test_the_optimum_in_steps_uses_relays_that_stages_do_not():
    """One pair of three servers: its rows may go around."""
    traffic = pairs(3, 1, a0_b0=4)
    assert stepwise_optimum(traffic, links(1), max_steps=4) == 4  # one port is all the sender has
    assert fluid_optimum(traffic, links(1)) == pytest.approx(4)


# Policy --------------------------------------------------------------------------------------


@given(
    traffic=gpu_counts(most=10**5),
    incast=st.sampled_from([0.0, 0.1, 0.5]),
    latency=st.sampled_from([0.0, 1.0, 1000.0]),
    up=st.sampled_from([2.0, 9.0, 36.0]),
)
@settings(max_examples=80, deadline=None)
def test_the_policy_is_never_much_slower_than_the_best(traffic, incast, latency, up):
    cost = links(traffic.shape[1], up=up, incast=incast, latency=latency)
    choice = choose(traffic, cost)
    assert choice.seconds <= min(seconds(traffic, cost).values()) * (1 + TOLERANCE) + 1e-9
    again = simulate(traffic, cost, choice.algorithm, schedule=choice.schedule)
    assert choice.seconds == again.seconds
    assert (choice.schedule is not None) == (choice.algorithm == "flash")


def test_what_the_policy_chooses():
    skewed = make("zipf 1.2", 8, 8, 64 * MIB)
    costly, free = CostModel(out_rate=12.5e9, incast=0.2), CostModel(out_rate=12.5e9)
    assert choose(skewed, costly).algorithm == "flash"
    assert choose(skewed, free).algorithm == "balanced"
    assert choose(make("uniform", 8, 8, 1000), costly).algorithm == "direct"


# Matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_have_their_size_and_come_from_their_seed(name):
    first, second = make(name, 4, 3, MIB, seed=2), make(name, 4, 3, MIB, seed=2)
    assert np.array_equal(first, second)
    assert first.shape == (4, 3, 4, 3)
    assert first.dtype == np.int64
    assert first.min() >= 0
    total = 0 if name == "zero" else 12 * MIB
    assert first.sum() == pytest.approx(total, rel=1e-4)
    is_fixed = name in ("uniform", "zero")
    assert np.array_equal(first, make(name, 4, 3, MIB, seed=3)) == is_fixed


def test_an_expert_model_sends_as_much_from_every_gpu():
    traffic = make("moe", 4, 4, MIB)
    sent = traffic.sum(axis=(2, 3))
    assert sent.max() == pytest.approx(sent.min(), rel=1e-6)
    received = traffic.sum(axis=(0, 1))
    assert received.max() > 1.2 * received.min()


def test_scale_and_skew_widen_the_gap():
    """The order that the paper reports: rounds and direct sends, then rails, then stages."""
    cost = CostModel(up_rate=448e9, out_rate=12.5e9, incast=0.1)
    gaps = []
    for name in ("zipf 0.4", "zipf 0.8", "zipf 1.2"):
        found = seconds(make(name, 8, 8, 64 * MIB), cost)
        assert min(found["spread_out"], found["direct"]) >= found["source_rail"] > found["flash"]
        gaps.append(found["direct"] / found["flash"])
    assert gaps == sorted(gaps)
    slower = CostModel(up_rate=100e9, out_rate=12.5e9, incast=0.1)
    traffic = make("zipf 0.8", 8, 8, 64 * MIB)
    assert simulate(traffic, slower).ratio > simulate(traffic, cost).ratio


@given(counts=server_counts(max_servers=5, most=100))
@settings(max_examples=20, deadline=None)
def test_the_peer_decomposes_as_well(counts):
    partners = off_diagonal(counts) > 0
    fewest = max(partners.sum(axis=0).max(), partners.sum(axis=1).max())
    assert fewest <= scipy_stages(counts) <= len(counts) ** 2 - 2 * len(counts) + 2
