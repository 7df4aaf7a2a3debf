"""Service-level objectives: what may be asked for, and what counts as kept."""

import itertools
import math

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import RequestError
from jaxserve.core.event import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    SloOutcome,
    TokenEvent,
)
from jaxserve.core.request import Slo
from jaxserve.engine.metrics import MAX_TIERS, EngineMetrics
from jaxserve.engine.slo import SloTracker, missed


def test_one_objective_is_enough_and_the_rest_has_defaults():
    slo = Slo(tpot_ms=50)
    assert (slo.ttft_ms, slo.e2e_ms, slo.tier, slo.on_decline) == (
        None, None, "default", "best_effort",
    )  # fmt: skip
    assert Slo.from_mapping({"tpot_ms": 50, "tier": None, "e2e_ms": None}) == slo
    with pytest.raises(AttributeError):
        slo.tier = "other"


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms", "e2e_ms"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "5", True])
def test_times_are_finite_and_positive(name, value):
    with pytest.raises(RequestError, match=rf"slo.{name} must be a finite number of mill") as told:
        Slo(**{name: value})
    assert told.value.param == f"slo.{name}"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "slo", "slo must hold at least one of ttft_ms, tpot_ms, e2e_ms, got none"),
        ({"tier": "fast"}, "slo", "slo must hold at least one of"),
        (
            {"ttft_ms": 500, "e2e_ms": 400},
            "slo.e2e_ms",
            r"slo.e2e_ms must be at least slo.ttft_ms=500, got 400; the end cannot come before",
        ),
        ({"ttft_ms": 1, "tier": ""}, "slo.tier", "slo.tier must be 1 to 32 letters, .*got ''"),
        ({"ttft_ms": 1, "tier": "x" * 33}, "slo.tier", "slo.tier must be 1 to 32 letters"),
        ({"ttft_ms": 1, "tier": 'a"b'}, "slo.tier", "slo.tier must be 1 to 32 letters"),
        ({"ttft_ms": 1, "tier": "a\n"}, "slo.tier", "slo.tier must be 1 to 32 letters"),
        ({"ttft_ms": 1, "tier": 3}, "slo.tier", "slo.tier must be .* got 3"),
        (
            {"ttft_ms": 1, "on_decline": "best-effort"},
            "slo.on_decline",
            r"must be one of best_effort, reject, asap, got 'best-effort'. Did you mean 'best_eff",
        ),
        ({"ttft": 1}, "slo", r"slo must hold only ttft_ms, .* got 'ttft'. Did you mean 'ttft_ms'"),
    ],
)
def test_what_is_impossible_is_named(fields, param, message):
    with pytest.raises(RequestError, match=message) as told:
        Slo.from_mapping(fields)
    assert told.value.param == param


def judge(slo, times, *, finished=None, is_whole=True, arrival=100.0):
    """Judge tokens that came at these milliseconds after the arrival."""
    tracker = SloTracker(slo, arrival)
    for time in times:
        tracker.token(arrival + time / 1000)
    end = times[-1] if finished is None else finished
    return tracker.outcome(finished=arrival + end / 1000, is_whole=is_whole)


SLO = Slo(ttft_ms=100, tpot_ms=10, e2e_ms=150)


def test_everything_in_time():
    outcome = judge(SLO, [90, 99, 108])
    assert outcome == SloOutcome(ttft=True, tpot=True, tpot_gap=True, tpot_mean=True, e2e=True)
    assert outcome.attained


def test_the_three_readings_of_time_per_token_differ():
    """A stall that early tokens pay for, and one that the mean hides."""
    banked = judge(Slo(tpot_ms=10), [50, 51, 52, 53, 85])
    assert (banked.tpot, banked.tpot_gap, banked.tpot_mean) == (True, False, True)
    assert banked.attained
    late_once = judge(Slo(tpot_ms=10), [50, 75, 76, 77])
    assert (late_once.tpot, late_once.tpot_gap, late_once.tpot_mean) == (False, False, True)
    assert not late_once.attained
    slow = judge(Slo(tpot_ms=10), [50, 60.5, 71])
    assert (slow.tpot, slow.tpot_gap, slow.tpot_mean) == (False, False, False)


def test_an_early_first_token_gives_later_ones_time():
    """Deadlines count from when the first token is due, or without that from when it came."""
    assert judge(Slo(ttft_ms=100, tpot_ms=10), [10, 109]).tpot
    assert not judge(Slo(tpot_ms=10), [10, 109]).tpot
    late = judge(Slo(ttft_ms=100, tpot_ms=10), [105, 108])
    assert (late.ttft, late.tpot) == (False, True)


def test_a_single_token_has_no_pace():
    outcome = judge(Slo(tpot_ms=0.001), [500])
    assert (outcome.tpot, outcome.tpot_gap, outcome.tpot_mean) == (True, True, True)


def test_an_end_without_a_token_is_in_time_or_not():
    slo = Slo(ttft_ms=100, tpot_ms=10)
    assert judge(slo, [], finished=99).attained
    assert judge(slo, [], finished=101) == SloOutcome(
        ttft=False, tpot=True, tpot_gap=True, tpot_mean=True
    )
    assert judge(slo, [], finished=99, is_whole=False).ttft is False


def test_what_was_open_at_an_early_end_is_missed():
    assert judge(SLO, [90, 95], is_whole=False) == SloOutcome(
        ttft=True, tpot=False, tpot_gap=False, tpot_mean=False, e2e=False
    )
    assert missed(Slo(ttft_ms=5)) == SloOutcome(ttft=False)
    assert missed(SLO).readings() == dict.fromkeys(
        ("ttft", "tpot", "tpot_gap", "tpot_mean", "e2e"), False
    )


def plain(slo, times, end):
    """Write the definitions out over the whole list."""
    gaps = [b - a for a, b in itertools.pairwise(times)]
    start = times[0] if slo.ttft_ms is None else slo.ttft_ms
    tpot = slo.tpot_ms
    on_time = [t <= start + k * (tpot or 0) for k, t in enumerate(times) if k]
    return SloOutcome(
        ttft=None if slo.ttft_ms is None else times[0] <= slo.ttft_ms,
        tpot=None if tpot is None else all(on_time),
        tpot_gap=None if tpot is None else all(gap <= tpot for gap in gaps),
        tpot_mean=None if tpot is None else sum(gaps) <= tpot * len(gaps),
        e2e=None if slo.e2e_ms is None else end <= slo.e2e_ms,
    )


TICK = 1000 / 64
"""Milliseconds; whole multiples are exact in milliseconds and in seconds."""
TARGET = st.one_of(st.none(), st.integers(1, 30).map(lambda ticks: ticks * TICK))


@given(
    ttft=TARGET,
    tpot=TARGET,
    e2e=TARGET,
    steps=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    after=st.integers(0, 9),
)
def test_judging_token_by_token_is_judging_the_list(ttft, tpot, e2e, steps, after):
    hypothesis.assume((ttft, tpot, e2e) != (None, None, None))
    hypothesis.assume(ttft is None or e2e is None or e2e >= ttft)
    slo = Slo(ttft_ms=ttft, tpot_ms=tpot, e2e_ms=e2e)
    times = [total * TICK for total in itertools.accumulate(steps)]
    end = times[-1] + after * TICK
    assert judge(slo, times, finished=end, arrival=0.0) == plain(slo, times, end)


def event(index, outcome, reason=FinishReason.LENGTH):
    times = RequestMetrics(arrival_time=0.0, finished_time=1.0, slo=outcome)
    return TokenEvent(request_id="r", index=index, finish_reason=reason, metrics=times)


def test_an_output_keeps_what_all_its_completions_keep():
    output = RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=[1],
        outputs=[CompletionOutput(index=i) for i in range(2)],
    )  # fmt: skip
    assert output.slo is None
    output.apply(event(1, SloOutcome(ttft=True, e2e=False)))
    assert output.slo == SloOutcome(ttft=True, e2e=False)
    output.apply(event(0, SloOutcome(ttft=False, e2e=True)))
    assert output.slo == SloOutcome(ttft=False, e2e=False)


def samples(page, name):
    lines = [line for line in page.splitlines() if line.startswith(f"jaxserve:{name}{{")]
    found = {}
    for line in lines:
        labels, value = line.removeprefix(f"jaxserve:{name}{{").rsplit("} ", 1)
        fields = dict(part.split("=") for part in labels.split(","))
        found[fields["tier"].strip('"'), fields["objective"].strip('"')] = float(value)
    return found


def test_requests_are_counted_by_tier_and_objective():
    metrics = EngineMetrics()
    assert samples(metrics.render("m"), "slo_attained_total") == {}
    metrics.judged("fast", SloOutcome(ttft=True, tpot=True, tpot_gap=False, tpot_mean=True))
    metrics.judged("fast", SloOutcome(ttft=False))
    page = metrics.render("m")
    assert samples(page, "slo_attained_total") == {
        ("fast", "ttft"): 1, ("fast", "tpot"): 1, ("fast", "tpot_gap"): 0,
        ("fast", "tpot_mean"): 1, ("fast", "request"): 1,
    }  # fmt: skip
    assert samples(page, "slo_missed_total") == {
        ("fast", "ttft"): 1, ("fast", "tpot"): 0, ("fast", "tpot_gap"): 1,
        ("fast", "tpot_mean"): 0, ("fast", "request"): 1,
    }  # fmt: skip
    assert "# TYPE jaxserve:slo_attained_total counter" in page


def test_names_without_end_share_one():
    metrics = EngineMetrics()
    for number in range(10 * MAX_TIERS):
        metrics.judged(f"t{number}", SloOutcome(ttft=True))
    counted = samples(metrics.render("m"), "slo_attained_total")
    tiers = {tier for tier, _ in counted}
    assert len(tiers) == MAX_TIERS + 1
    assert counted["other", "request"] == 9 * MAX_TIERS
    assert sum(n for (_, kind), n in counted.items() if kind == "request") == 10 * MAX_TIERS
