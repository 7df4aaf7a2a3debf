"""Plans: nothing is lost, stages are one-to-one, and what the theory promises holds exactly."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash import CostModel, Schedule, plan
from jaxserve.sharding.flash.decomposition import stuff
from jaxserve.sharding.flash.schedule import MODES
from jaxserve.sharding.flash.traffic import split_gpus
from tests.rooms.flash.cases import COST, gpu_counts, largest_sum, off_diagonal, server_counts

FULL = ("halving", "bottleneck", "any", "paper")


def heavy(n, seed=0):
    return (np.random.default_rng(seed).pareto(1.1, (n, n)) * 1e6).astype(np.int64)


@pytest.mark.parametrize("mode", MODES)
@given(counts=server_counts())
@settings(max_examples=60, deadline=None)
def test_stages_carry_the_matrix_exactly_one_to_one(mode, counts):
    found, n = plan(counts, COST, mode), len(counts)
    assert np.array_equal(found.to_matrix(), off_diagonal(counts))
    assert np.array_equal(np.sort(found.perms, axis=1), np.tile(np.arange(n), (len(found.rows), 1)))
    assert (found.rows >= 0).all()
    assert not found.rows[found.perms == np.arange(n)].any()  # nobody sends to itself
    assert (found.durations > 0).all()  # no stage is empty
    order = -found.durations if mode != "paper" else found.durations
    assert (np.diff(order) >= 0).all()
    assert (found.bottleneck, found.total) == (largest_sum(counts), off_diagonal(counts).sum())
    assert found.perms.dtype == np.int32
    assert found.rows.dtype == np.int64


@pytest.mark.parametrize("mode", FULL)
@given(counts=server_counts())
@settings(max_examples=60, deadline=None)
def test_a_whole_decomposition_is_as_long_as_the_fullest_server(mode, counts):
    found, n = plan(counts, COST, mode), len(counts)
    assert found.durations.sum() == largest_sum(counts)
    partners = off_diagonal(counts) > 0
    fewest = max(partners.sum(axis=0).max(), partners.sum(axis=1).max())
    assert fewest <= found.num_stages <= max(n * n - 2 * n + 2, 1)
    assert found.num_rotations == 0


@given(counts=server_counts())
@settings(max_examples=100, deadline=None)
def test_stuffing_makes_all_sums_equal_and_adds_little(counts):
    stuffed, real = stuff(counts), off_diagonal(counts)
    assert (stuffed >= real).all()
    assert (stuffed.sum(axis=0) == largest_sum(counts)).all()
    assert (stuffed.sum(axis=1) == largest_sum(counts)).all()
    added = off_diagonal((stuffed > real).astype(np.int64))
    assert added.sum() <= 2 * len(counts) - 1


@given(counts=server_counts(max_servers=7))
@settings(max_examples=60, deadline=None)
def test_the_first_stage_of_bottleneck_mode_is_the_best_matching_there_is(counts):
    """SciPy finds the largest threshold above which there is a perfect matching."""
    if not off_diagonal(counts).any():
        return
    stuffed = stuff(counts)
    best = max(
        value
        for value in np.unique(stuffed[stuffed > 0])
        if (maximum_bipartite_matching(csr_array(stuffed >= value)) >= 0).all()
    )
    # Durations are of real rows; the fullest server's are all real, so that they are the amounts.
    assert plan(counts, COST, "bottleneck").durations[0] == best


@given(counts=server_counts(max_servers=6))
@settings(max_examples=40, deadline=None)
def test_every_stage_of_bottleneck_mode_takes_all_that_a_matching_allows(counts):
    left = stuff(counts)
    for duration in plan(counts, COST, "bottleneck").durations:
        assert (maximum_bipartite_matching(csr_array(left >= duration)) >= 0).all()
        rows, columns = linear_sum_assignment(left >= duration, maximize=True)
        assert left[rows, columns].min() >= duration
        break
    assert left.sum() == largest_sum(counts) * len(counts)


@given(counts=server_counts(), latency=st.sampled_from([0.0, 1e-6, 1e-4, 1.0]))
@settings(max_examples=60, deadline=None)
def test_truncation_is_never_worse_than_the_whole_or_rotations_alone(counts, latency):
    cost = CostModel(out_rate=12.5e3, out_latency=latency)
    times = {mode: plan(counts, cost, mode).seconds for mode in ("auto", "halving", "rotation")}
    assert times["auto"] <= min(times.values()) * (1 + 1e-12)


@pytest.mark.parametrize("mode", MODES)
@given(counts=server_counts(max_servers=6))
@settings(max_examples=20, deadline=None)
def test_the_seconds_of_a_plan_are_those_of_its_stages(mode, counts):
    found = plan(counts, COST, mode)
    assert found.seconds == pytest.approx(
        found.durations.sum() / (8 * 12.5e9) + found.num_stages * 10e-6, rel=1e-9
    )


def test_small_messages_go_in_rotations_and_large_ones_in_many_stages():
    counts = heavy(16)
    small, large = plan(counts // 10**6, COST), plan(counts * 10**6, COST)
    assert small.num_stages <= 15
    assert large.num_stages > 100
    assert large.durations.sum() < 1.01 * large.bottleneck
    assert plan(counts, CostModel(out_latency=1.0)).num_stages <= 15


def test_fewer_stages_by_thresholds():
    counts = heavy(32, seed=3)
    any_, halving, exact = (
        plan(counts, COST, m).num_stages for m in ("any", "halving", "bottleneck")
    )
    assert exact < halving < any_ / 2


@given(counts=server_counts(), limit=st.integers(1, 80))
@settings(max_examples=80, deadline=None)
def test_stages_are_limited_or_the_limit_is_refused(counts, limit):
    try:
        found = plan(counts, COST, "auto", limit)
    except ConfigError as error:
        would_do = int(str(error).split("; ")[1].split(" would")[0])
        assert would_do > limit
        assert plan(counts, COST, "auto", would_do).num_stages <= would_do
    else:
        assert found.num_stages <= limit
        assert np.array_equal(found.to_matrix(), off_diagonal(counts))


@pytest.mark.parametrize("n", [61, 62, 63, 64, 125, 130])
def test_sets_of_servers_may_take_several_words(n):
    counts = heavy(n, seed=n)
    for mode in ("auto", "halving"):
        assert np.array_equal(plan(counts, COST, mode).to_matrix(), off_diagonal(counts))
    assert plan(counts, COST, "halving").durations.sum() == largest_sum(counts)


@pytest.mark.parametrize("mode", MODES)
def test_special_matrices(mode):
    for n in (1, 2, 5):
        assert plan(np.zeros((n, n), np.int64), COST, mode).num_stages == 0
        assert plan(np.eye(n, dtype=np.int64), COST, mode).num_stages == 0
    column = np.zeros((5, 5), np.int64)
    column[1:, 0] = [7, 1, 9, 3]
    found = plan(column, COST, mode)
    assert found.num_stages == 4
    assert found.durations.sum() == 20
    cycle = np.roll(np.eye(6, dtype=np.int64), 1, axis=1) * 50
    assert plan(cycle, COST, mode).num_stages == 1
    huge = np.array([[0, 2**62], [2**62 - 1, 0]])
    assert np.array_equal(plan(huge, COST, mode).to_matrix(), huge)


@given(counts=server_counts())
@settings(max_examples=30, deadline=None)
def test_equal_inputs_give_equal_plans_whatever_their_layout(counts):
    first = plan(counts, COST)
    assert first == plan(counts.copy(), COST)
    assert first == plan(np.asfortranarray(counts), COST)
    assert first == plan(counts.astype(np.float64), COST)
    assert first == plan(counts.astype(np.uint32), COST)
    assert hash(first) == hash(plan(counts, COST))
    assert first != plan(counts + 1 - np.eye(len(counts), dtype=np.int64), COST) or len(counts) == 1


@given(traffic=gpu_counts(max_servers=3, max_gpus=3))
@settings(max_examples=30, deadline=None)
def test_a_schedule_survives_being_written(traffic):
    found = plan(traffic, CostModel(gpus=traffic.shape[1]))
    assert Schedule.from_json(found.to_json()) == found


def test_a_text_that_is_no_schedule_is_refused():
    for text in ("{}", "nothing", '{"servers": 2}', "[1]"):
        with pytest.raises(ConfigError, match=r"this is no schedule .*; expected what Schedule.to"):
            Schedule.from_json(text)


def test_servers_of_a_matrix_of_gpus():
    traffic = np.random.default_rng(0).integers(0, 99, (12, 12))
    found = plan(split_gpus(traffic, 4), CostModel(gpus=4))
    servers = traffic.reshape(3, 4, 3, 4).sum(axis=(1, 3))
    assert np.array_equal(found.to_matrix(), off_diagonal(servers))
    assert len(found.moves)
    assert not len(plan(servers, CostModel(gpus=4)).moves)


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        (np.zeros((2, 3), np.int64), r"must be square, .* got shape \(2, 3\); use split_gpus"),
        (np.zeros(4, np.int64), r"must be square, .* got shape \(4,\)"),
        (np.zeros((0, 0), np.int64), r"not empty, got shape \(0, 0\)"),
        (np.zeros((2, 8, 3, 8), np.int64), "must be square"),
        (np.zeros((2, 4, 2, 4), np.int64), "has 4 GPUs per server and the cost model has 8; make"),
        (np.array([[0, -3], [1, 0]]), "must be 0 or more, got -3 from 0 to 1; count what is sent"),
        (np.array([[0, 1.5], [1, 0]]), r"whole numbers, got 1.5 at \(0, 1\); count rows or bytes"),
        (np.array([[0, np.nan], [1, 0]]), "whole numbers, got nan"),
        (np.array([[0, np.inf], [1, 0]]), "whole numbers, got inf"),
        (np.array([[0, 1e30], [1, 0]]), r"must be less than 2\*\*63, got 1e\+30; count in larger"),
        (np.array([[0, 2**63], [1, 0]], np.uint64), r"must be less than 2\*\*63"),
        (np.array([["a", "b"], ["c", "d"]]), "whole numbers, got dtype <U1"),
        (np.array([[False, True], [True, False]]), "whole numbers, got dtype bool"),
        (np.full((3, 3), 2**62), r"must be fewer than 2\*\*63 in sum, .* count in larger units"),
    ],
)
def test_what_is_no_traffic_is_refused(traffic, message):
    with pytest.raises(ConfigError, match=message):
        plan(traffic, COST)


def test_other_arguments_that_are_refused():
    counts = heavy(4)
    with pytest.raises(ConfigError, match=r"mode must be one of .*got 'halvin'.*'halving'"):
        plan(counts, COST, "halvin")
    with pytest.raises(ConfigError, match="max_stages must be at least 1, got 0; leave it out"):
        plan(counts, COST, max_stages=0)
    with pytest.raises(ConfigError, match="max_stages=2 is too few for this matrix; 3 would do"):
        plan(counts, COST, max_stages=2)
    with pytest.raises(ConfigError, match=r"multiple of gpus=3 rows, got shape \(8, 8\); add rows"):
        split_gpus(np.zeros((8, 8)), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "gpus must be a whole number of at least 1, got 0; give the GPUs"),
        ({"gpus": 2.5}, "gpus must be a whole number"),
        ({"gpus": True}, "gpus must be a whole number"),
        ({"up_rate": 0}, "up_rate must be finite and above 0, in bytes per second, got 0"),
        ({"out_rate": -1.0}, "out_rate must be finite and above 0"),
        ({"out_rate": float("nan")}, "out_rate must be finite"),
        ({"up_latency": -1e-6}, "up_latency must be finite and 0 or more, got -1e-06; measure it"),
        ({"out_latency": float("inf")}, "out_latency must be finite and 0 or more"),
        ({"incast": -0.1}, "incast must be finite and 0 or more, got -0.1"),
    ],
)
def test_links_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CostModel(**settings)


def test_rates_per_row():
    assert CostModel(up_rate=9e6, out_rate=3e6).per_row(1000) == CostModel(
        up_rate=9e3, out_rate=3e3
    )
    with pytest.raises(ConfigError, match="row_bytes must be at least 1, got 0; count all bytes"):
        COST.per_row(0)


def test_the_host_part_imports_no_jax():
    code = "import sys; import jaxserve.sharding.flash; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_loops_are_right_without_numba():
    code = """
import numpy as np
from jaxserve.sharding.flash import CostModel, plan
rng = np.random.default_rng(0)
for n in (2, 5, 9, 64):
    counts = (rng.pareto(1.1, (n, n)) * 1000).astype(np.int64)
    for mode in ("auto", "halving", "bottleneck", "any") if n < 64 else ("auto",):
        found = plan(counts, CostModel(out_rate=1e6), mode)
        assert np.array_equal(found.to_matrix(), counts * (1 - np.eye(n, dtype=np.int64)))
"""
    env = {"NUMBA_DISABLE_JIT": "1"}
    import os

    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=os.environ | env)
