"""Times of padded steps, their fits and files, and the commands that make and use them."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxserve.cli import main as cli
from jaxserve.core.cost import LinearCost, Plane, StepLoad
from jaxserve.core.cost_buckets import BucketCost
from jaxserve.core.cost_file import CostFile, read_cost, write_cost
from jaxserve.core.cost_table import TableCost
from jaxserve.core.errors import ConfigError
from jaxserve.core.plan import Rejection, StepPlan, Work
from jaxserve.core.request import Slo
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.scheduling.cost_fit import Bucket, fit_buckets, judge_fit
from jaxserve.scheduling.decision_log import LoggedScheduler, LogHead, LogWriter
from jaxserve.scheduling.policies import PolicySettings, make_policy
from jaxserve.sim.replay import replay

ROWS, MIXED, SIZES = (1, 2, 4, 8), (1, 8), (32, 64, 128)
DECODE = [(r, 0, 0.010 + 0.001 * r) for r in ROWS]
MIX = [(r, p, 0.012 + 0.001 * r + 2e-4 * p) for r in MIXED for p in SIZES]
COST = BucketCost(decode=DECODE, mixed=MIX, context=1e-7, pair=1e-8, draft_step=1e-3)
FLAT = BucketCost(decode=DECODE, mixed=MIX)


@st.composite
def loads(draw):
    decodes, mean = draw(st.integers(0, 20)), draw(st.integers(1, 3000))
    load = StepLoad(decodes=decodes, context=decodes * mean)
    for _ in range(draw(st.integers(0, 3))):
        load = load.with_chunk(draw(st.integers(1, 300)), draw(st.integers(0, 2000)))
    return load


def test_a_step_takes_the_time_of_the_bucket_that_it_is_padded_to():
    assert FLAT.step_time(StepLoad(decodes=3, context=9)) == pytest.approx(0.014)
    assert FLAT.step_time(StepLoad(decodes=2).with_chunk(33)) == pytest.approx(0.02 + 2e-4 * 64)
    assert FLAT.step_time(StepLoad(decodes=16)) == pytest.approx(2 * 0.018)  # past the last bucket
    assert FLAT.bucket(StepLoad(decodes=2).with_chunk(33)) == ("mixed", 8, 64)
    assert COST.step_time(StepLoad(decodes=1, context=1000)) == pytest.approx(0.011 + 1e-4)


@given(st.sampled_from([COST, FLAT]), loads(), st.integers(0, 2000), st.floats(0.001, 2.0))
@settings(max_examples=400)
def test_the_longest_chunk_fits_and_the_next_one_does_not(cost, load, past, seconds):
    most = cost.prefill_within(seconds, load, past)
    if most:
        assert cost.step_time(load.with_chunk(most, past)) <= seconds
    if most < 1 << 22:
        assert cost.step_time(load.with_chunk(most + 1, past)) > seconds


@given(loads(), st.integers(1, 9))
def test_times_grow_with_every_count(load, more):
    at = COST.step_time(load)
    assert COST.step_time(load.with_chunk(more, 10)) >= at
    grown = load._replace(decodes=load.decodes + more, context=load.context + 50 * more)
    assert COST.step_time(grown) >= at
    assert COST.step_time(load._replace(drafts=load.decodes)) >= at or load.prefill


@given(loads(), st.integers(1, 30))
def test_steps_in_a_row_take_the_times_of_each(load, count):
    assume(not load.prefill and load.decodes)
    each = [
        COST.step_time(load._replace(context=load.context + i * load.decodes)) for i in range(count)
    ]
    assert list(COST.decode_times(load, count)) == each


def test_buckets_that_were_quicker_than_smaller_ones_are_raised_and_named():
    cells = [(1, 0, 0.02), (2, 0, 0.01), (4, 0, 0.03)]
    cost = BucketCost(decode=cells, mixed=[(4, 32, 0.01), (4, 64, 0.05)])
    assert cost.enveloped == ("(decode, 2 rows, 0 tokens)", "(mixed, 4 rows, 32 tokens)")
    assert cost.step_time(StepLoad(decodes=2)) == 0.02
    assert cost.step_time(StepLoad().with_chunk(1)) == 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": [(1, 0, math.nan)]}, r"has \(decode, 1 rows, 0 tokens\) = nan ms"),
        ({"mixed": [(1, 32, -0.001)]}, r"\(mixed, 1 rows, 32 tokens\) = -1 ms"),
        ({"mixed": [(1, 32, 0.1), (8, 64, 0.1)]}, r"no value for \(mixed, 1 rows, 64 tokens\)"),
        ({"decode": []}, "has no decode steps"),
        ({"pair": -1.0}, "pair of the file must be a number of seconds"),
        ({"context": math.inf}, "context of the file must be"),
    ],
)
def test_bad_tables_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        BucketCost(**{"decode": DECODE, "mixed": MIX, "name": "the file"} | change)


def test_a_fit_finds_what_made_the_times():
    rng = np.random.default_rng(3)
    buckets, measured, seconds = [], [], []
    for rows, size in [*((r, 0) for r in ROWS), *itertools.product(MIXED, SIZES)]:
        for length in (50, 400, 1500):
            decodes = rows if not size else rows - 1
            load = StepLoad(decodes=decodes, context=decodes * length)
            load = load.with_chunk(size, length) if size else load
            for _ in range(5):
                buckets.append(Bucket(rows, size))
                measured.append(load)
                seconds.append(COST.step_time(load) * rng.lognormal(0, 0.01))
    seconds[0] *= 40  # a repeat that was held up counts for nothing
    cost = fit_buckets(buckets, measured, seconds)
    for load in measured:
        assert cost.step_time(load) == pytest.approx(COST.step_time(load), rel=0.05)
    report = judge_fit(cost, measured[1:], seconds[1:])
    assert report.mean_error < 0.03
    assert report.margin < 0.1
    with pytest.raises(ConfigError, match="above zero"):
        fit_buckets(buckets[:1], measured[:1], [0.0])


@pytest.mark.parametrize(
    "cost",
    [
        COST,
        LinearCost(Plane(token=1e-4, base=0.01), Plane(request=1e-3, context=1e-7)),
        TableCost([(0, 0, 64, 0, 0.02), (1, 128, 0, 0, 0.01), (1, 128, 64, 0, 0.03)]),
    ],
)
def test_models_survive_a_file(tmp_path, cost):
    path = tmp_path / "cost.json"
    write_cost(path, CostFile(cost=cost, margin=0.25, facts={"model": "m"}))
    again = read_cost(path)
    assert (again.margin, again.facts) == (0.25, {"model": "m"})
    for load in (StepLoad(decodes=1, context=100), StepLoad(decodes=1, context=9).with_chunk(40)):
        assert again.cost.step_time(load) == cost.step_time(load)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "c.json is not JSON"),
        ("[1]", "c.json is no cost model; write one with `jaxserve profile"),
        ({"format": "x"}, "is no cost model"),
        ({"version": 9}, "must be of version 1, got 9"),
        ({"margin": -0.1}, "the margin of c.json must be a number from 0 to 1, got -0.1"),
        ({"cost": 3}, "the cost of c.json must be an object, got int"),
        ({"cost": {"kind": "guess"}}, "must be of kind buckets, linear or table, got 'guess'"),
        ({"cost": {"kind": "linear", "planes": [{"slope": 1}]}}, "the planes of c.json must be"),
        ({"cost": {"kind": "table", "rows": [1]}}, "the rows of c.json must be"),
        ({"cost": {"kind": "buckets", "decode": []}}, "c.json must have exactly the fields"),
        (
            {"cost": {"kind": "buckets", **COST.to_json(), "decode": [[1, 2]]}},
            "c.json must hold lists of",
        ),
        (
            {"cost": {"kind": "buckets", **COST.to_json(), "decode": [[1, 0, math.nan]]}},
            "c.json has .decode, 1 rows, 0 tokens. = nan ms",
        ),
    ],
)
def test_files_that_are_no_good_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "c.json"
    write_cost(path, CostFile(cost=COST))
    whole = json.loads(path.read_text())
    path.write_text(text if isinstance(text, str) else json.dumps(whole | text))
    with pytest.raises(ConfigError, match=message):
        read_cost(path)


# The log, and the command that replays it ---------------------------------------------------------


def a_view(now, count=64, new=8):
    def one(i, running):
        made = 1 + i if running else 0
        return SequenceView(
            seq_id=i, arrival=0.5, priority=0, prompt_len=100 + i, num_tokens=100 + i + made,
            num_computed=99 + i + made if running else 0, max_total_len=1000, num_pages=8 * running,
            is_running=running, is_decoding=running,
            slo=Slo(ttft_ms=4000, tpot_ms=100 + 50 * (i % 2), tier="t"),
            first_token_time=now if running else None,
        )  # fmt: skip

    return ReplicaView(
        now=now, running=tuple(one(i, running=True) for i in range(count)),
        waiting=tuple(one(1000 + i, running=False) for i in range(new)), num_free_pages=9000,
        num_pages=10_000, page_size=16, max_num_seqs=256, max_num_batched_tokens=2048,
    )  # fmt: skip


def test_the_command_replays_a_log_and_fails_where_it_differs(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    head = LogHead(policy="slo", settings=PolicySettings(), cost=COST, learns=True)
    with LogWriter(path, head) as log:
        policy = LoggedScheduler(make_policy("slo", COST, PolicySettings()), log)
        for number in range(5):
            policy.plan(a_view(1.0 + 0.05 * number, new=number))
    assert cli.main(["sim", "replay", str(path)]) == 0
    assert "slo: 5 plans and 0 timed steps replayed, 0 differences" in capsys.readouterr().out
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace('"now":1.0', '"now":100.0') + "".join(lines[2:]))
    assert cli.main(["sim", "replay", str(path)]) == 1
    assert "line 2: " in capsys.readouterr().out
    assert cli.main(["sim", "replay", str(tmp_path / "none")]) == 1
    assert "none cannot be read" in capsys.readouterr().err


def test_what_a_policy_raised_is_compared_too(tmp_path):
    class Broken:
        def plan(self, view):
            raise ZeroDivisionError

    path = tmp_path / "log.jsonl"
    head = LogHead(policy="fcfs", settings=PolicySettings(), cost=None, learns=False)
    with LogWriter(path, head) as log, pytest.raises(ZeroDivisionError):
        LoggedScheduler(Broken(), log).plan(a_view(1.0))
    found = replay(path)
    assert found.differences == 1
    assert found.shown == ("line 2: ZeroDivisionError then, a plan now",)


def test_plans_survive_the_log_to_the_last_bit(tmp_path):
    path = tmp_path / "log.jsonl"
    note = Rejection(seq_id=1001, reason="memory", objective="e2e_ms", detail="no")
    plan = StepPlan(
        work=(Work(seq_id=3, num_tokens=1, num_draft=2), Work(seq_id=1000, num_tokens=17)),
        admit=(1000,), preempt=(5,), reject=(note,), unpromised=(note,), holds_until=0.1 + 0.2,
    )  # fmt: skip
    head = LogHead(policy="fcfs", settings=PolicySettings(), cost=None, learns=False)
    views = [a_view(1 / 3), a_view(2 / 3, new=0)]
    with LogWriter(path, head) as log:
        for view in views:
            log.planned(view, plan, None)
    from jaxserve.scheduling.decision_log import LogReader

    found = list(LogReader(path))
    assert [entry.view for entry in found] == views
    assert [entry.plan for entry in found] == [plan, plan]


def test_a_log_ends_when_it_has_become_too_long(tmp_path):
    path = tmp_path / "log.jsonl"
    head = LogHead(policy="edf", settings=PolicySettings(), cost=None, learns=False)
    with LogWriter(path, head, most_bytes=20_000) as log:
        policy = LoggedScheduler(make_policy("edf", None, PolicySettings()), log)
        for number in range(50):
            policy.plan(a_view(float(number)))
    assert path.stat().st_size < 20_100
    assert 1 <= replay(path).plans < 50


def test_a_line_of_the_log_costs_less_than_a_millisecond(tmp_path):
    head = LogHead(policy="edf", settings=PolicySettings(), cost=None, learns=False)
    with LogWriter(tmp_path / "log.jsonl", head) as log:
        view, plan = (
            a_view(1.0),
            StepPlan(work=tuple(Work(seq_id=i, num_tokens=1) for i in range(64))),
        )
        log.planned(view, plan, None)
        start = time.thread_time()
        for _ in range(50):
            log.planned(view, plan, None)
        assert (time.thread_time() - start) / 50 < 1e-3
