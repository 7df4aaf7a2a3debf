"""Admission programme, segments, fast admission and speculation lengths against oracles."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, StepLoad
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.slos_serve.config import SlosServeConfig
from jaxserve.scheduling.slos_serve.fast import admit_greedily
from jaxserve.scheduling.slos_serve.programme import Item, choose
from jaxserve.scheduling.slos_serve.reference import choose_exhaustively, serve_chain
from jaxserve.scheduling.slos_serve.segment import SegmentPlanner
from jaxserve.scheduling.slos_serve.speculation import (
    expected_tokens,
    level_length,
    plan_rounds,
)  # fmt: skip

COST = PUBLISHED_COSTS["7b-a100"]
TIERS = (0.05, 0.1)


def planner(tiers=TIERS, context=1000.0):
    return SegmentPlanner(COST, tiers, mean_context=context)


@st.composite
def problems(draw, most=8, forced=8, values=(1.0,)):
    """Draw promised requests that can be served, and new ones among which to choose."""
    rng = random.Random(draw(st.integers(0, 10**9)))
    items = []
    for key in range(rng.randint(0, forced)):
        decodes = rng.random() < 0.7
        items.append(
            Item(
                key=key, deadline=0.0 if decodes else rng.uniform(0.1, 2.0),
                prefill=0 if decodes else rng.randint(1, 1500), pages=0, tier=rng.randrange(2),
                is_forced=True,
            )
        )  # fmt: skip
    for key in range(100, 100 + rng.randint(1, most)):
        items.append(  # noqa: PERF401
            Item(
                key=key, deadline=rng.uniform(0.02, 2.0), prefill=rng.randint(1, 9000),
                pages=rng.randint(1, 60), tier=rng.randrange(2), value=rng.choice(values),
            )
        )  # fmt: skip
    return items, rng.randint(0, 300)


@given(problems(), st.sampled_from([10.0, 1000.0, 9000.0]))
@settings(max_examples=120)
def test_the_programme_finds_what_trying_every_subset_finds(problem, context):
    assert_best(*problem, context)


@pytest.mark.slow
@given(problems(values=(1.0, 2.0, 5.0)), st.sampled_from([10.0, 1000.0, 9000.0]))
@settings(max_examples=1500)
def test_the_programme_finds_the_best_subset_of_any_values(problem, context):
    assert_best(*problem, context)


def assert_best(items, free, context):
    plan = planner(context=context)
    found = choose(items, plan, free_pages=free)
    best = choose_exhaustively(items, plan, free_pages=free)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    assert found.value == best.value
    kept = [item for item in items if item.is_forced or item.key in found.accepted]
    assert serve_chain(kept, plan, free_pages=free) is not None, "what it answers can be served"
    assert sum(i.value for i in kept if not i.is_forced) == found.value


@given(problems(most=5), st.integers(1, 200), st.floats(0.01, 1.0))
@settings(max_examples=50)
def test_more_pages_and_later_deadlines_never_lower_the_value(problem, pages, seconds):
    items, free = problem
    plan = planner()
    found = choose(items, plan, free_pages=free)
    if found is None:
        return
    more = choose(items, plan, free_pages=free + pages)
    assert more is not None
    assert more.value >= found.value
    last = max((i for i in items if not i.is_forced), key=lambda i: i.deadline)
    later = [
        i if i is not last else Item(**{**_fields(i), "deadline": i.deadline + seconds})
        for i in items
    ]
    relaxed = choose(later, plan, free_pages=free)
    assert relaxed is not None
    assert relaxed.value >= found.value


def _fields(item):
    return {name: getattr(item, name) for name in item.__slots__}


@given(problems(most=30, values=(1.0, 3.0)))
@settings(max_examples=60)
def test_fast_admission_accepts_only_what_the_chain_can_serve(problem):
    items, free = problem
    plan = planner()
    fast = admit_greedily(items, plan, free_pages=free)
    kept = [item for item in items if item.is_forced or item.key in fast.accepted]
    served = serve_chain(kept, plan, free_pages=free) is not None
    assert served is fast.is_feasible or not fast.accepted
    assert fast.is_feasible is (
        serve_chain([i for i in items if i.is_forced], plan, free_pages=free) is not None
    )
    new = {item.key for item in items if not item.is_forced}
    assert set(fast.accepted) | set(fast.declined) == new
    assert not set(fast.accepted) & set(fast.declined)


def test_fast_admission_finds_nearly_the_value_of_the_programme():
    rng = random.Random(5)
    fast_value = best_value = 0.0
    for _ in range(60):
        items = [
            Item(
                key=key, deadline=rng.uniform(0.05, 2.0), prefill=rng.randint(1, 6000),
                pages=rng.randint(1, 60), tier=rng.randrange(2),
            ) for key in range(rng.randint(2, 10))
        ]  # fmt: skip
        plan = planner()
        best = choose(items, plan, free_pages=200)
        fast_value += len(admit_greedily(items, plan, free_pages=200).accepted)
        best_value += best.value
    assert 0.95 * best_value <= fast_value <= best_value


@given(st.integers(0, 100), st.floats(0.06, 3.0))
def test_with_one_tier_batches_are_equal_and_have_a_closed_form(count, seconds):
    tau = 0.1
    slots = planner((tau,)).slots(seconds, (count,))
    load = StepLoad(decodes=count, context=1000 * count)
    if COST.step_time(load) > tau:
        assert slots is None or seconds < tau
        return
    if not count:
        assert len(slots) == 1
        assert slots[0].room == COST.prefill_within(seconds, StepLoad())
        return
    whole = int(seconds / tau + 1e-9)
    assert len(slots) in (whole, whole + 1)
    assert {slot.decodes for slot in slots} == {count}
    rooms = [slot.room for slot in slots[:whole]]
    assert all(abs(room - COST.prefill_within(tau, load)) <= 1 for room in rooms)


@given(st.integers(0, 40), st.integers(0, 60), st.floats(0.3, 3.0))
def test_a_loose_tier_costs_no_more_than_if_it_were_tight(tight, loose, seconds):
    plan = planner()
    as_tight = plan.plan(seconds, (tight + loose, 0))
    if as_tight is None or not tight:
        return
    mixed = plan.plan(seconds, (tight, loose))
    assert mixed is not None
    # Ends of segments differ by the last batch at most.
    assert mixed.budget >= as_tight.budget - COST.prefill_within(0.05, StepLoad())


@given(
    st.integers(0, 60), st.integers(0, 60), st.floats(0.05, 2.0),
    st.sampled_from([(0.05, 0.1), (0.03, 0.1), (0.05, 0.08)]), st.sampled_from([0.04, 10.0]),
)  # fmt: skip
def test_every_token_of_every_tier_is_in_time(tight, loose, seconds, tiers, max_step_s):
    plan = SegmentPlanner(COST, tiers, mean_context=1000, max_step_s=max_step_s)
    slots, segment = plan.slots(seconds, (tight, loose)), plan.plan(seconds, (tight, loose))
    if slots is None:
        assert segment is None
        return
    now, made = 0.0, [0.0, 0.0]
    for slot in slots:
        now += slot.seconds
        load = StepLoad(decodes=slot.decodes, context=1000 * slot.decodes)
        assert COST.step_time(load.with_chunk(slot.room) if slot.room else load) <= slot.seconds + (
            1 if not slot.room + slot.decodes else 1e-9
        )
        assert slot.seconds <= max_step_s + 1e-9
        subsets = {0: (0, 0), tight: (1, 0), loose: (0, 1), tight + loose: (1, 1)}
        if tight and loose and tight != loose:
            served = subsets[slot.decodes]
            for tier in (0, 1):
                made[tier] += served[tier]
                # Every period that is over has had its token.
                assert made[tier] + 1e-6 >= int(now / tiers[tier] + 1e-6)
    assert segment.used == pytest.approx(now)
    assert segment.used <= seconds + 1e-9
    assert segment.budget == sum(slot.room for slot in slots)


def test_a_draft_yields_as_many_tokens_as_a_simulation():
    rng = random.Random(1)
    for alpha in (0.2, 0.7, 0.9):
        for length in (1, 3, 6):
            total = 0
            for _ in range(20_000):
                right = 0
                while right < length - 1 and rng.random() < alpha:
                    right += 1
                total += 1 + right
            assert total / 20_000 == pytest.approx(expected_tokens(alpha, length), rel=0.02)
    assert expected_tokens(1.0, 4) == 4


DRAFTED = PUBLISHED_COSTS["opt-13b+125m-2xa100"]


def test_a_hopeless_draft_is_not_made():
    rounds = plan_rounds(1.0, (10, 10), TIERS, DRAFTED, alpha=0.0, mean_context=100, max_length=6)
    assert max(rounds.lengths) == 1


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.1, 0.47))
def test_better_drafts_never_leave_less_room_for_prompts(tight, loose, alpha):
    if not tight + loose:
        return
    some, more = (
        plan_rounds(1000.0, (tight, loose), TIERS, DRAFTED, alpha=a, mean_context=100, max_length=6)
        for a in (alpha, 2 * alpha)
    )
    if some is not None:
        assert more is not None
        # Rounds are whole, so that the last one may be missing from either.
        assert more.budget >= some.budget - some.room - more.room


@given(st.floats(0.1, 0.9), st.floats(0.02, 0.2), st.floats(0.02, 0.2), st.integers(1, 6))
def test_lengths_keep_every_tier_level_and_are_the_shortest(alpha, tau, pacing, length):
    found = level_length(alpha, tau, pacing, length)
    if found > 1000:
        assert expected_tokens(alpha, 1000) * tau <= expected_tokens(alpha, length) * pacing + 1e-9
        return
    needed = expected_tokens(alpha, length) * pacing
    assert expected_tokens(alpha, found) * tau >= needed * (1 - 1e-6)
    if found > 1:
        assert expected_tokens(alpha, found - 1) * tau < needed * (1 + 1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("margin", -0.1), ("max_step_s", 0.0), ("pace", "fast"), ("best_effort_share", 0.9)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        SlosServeConfig(**{field: value})
