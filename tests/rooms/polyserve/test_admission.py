"""Admission in three parts, against a slow version that follows the server step by step."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost import PUBLISHED_COSTS, LinearCost, Plane, StepLoad
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.polyserve import PolyServeConfig
from jaxserve.scheduling.polyserve.admission import (
    FIRST,
    LATER,
    MEMORY,
    SEATS,
    SECOND,
    TAKES,
    admits,
    peak_kv,
)
from jaxserve.scheduling.polyserve.reference import Member, follow, peak_tokens
from jaxserve.scheduling.polyserve.router import rules_for, tier_of
from jaxserve.scheduling.polyserve.state import (
    BETWEEN,
    NEVER,
    NOBODY,
    empty_requests,
    empty_servers,
)
from jaxserve.scheduling.step_times import step_times

COST = PUBLISHED_COSTS["7b-a100"]
TIMES = step_times(COST)
TIERS = (0.02, 0.03, 0.05, 0.1)


def build(members, config, now=1.0, **sizes):
    """Put members on one server: those with tokens decode, others wait; the last is new."""
    sizes = {"capacity": 10**6, "seats": 64, "max_tokens": 4096, **sizes}
    rules = rules_for(config, **sizes)
    rq, sv = empty_requests(len(members)), empty_servers(1, sizes["seats"], len(config.tiers))
    sv.one.phase[0], sv.one.end[0] = BETWEEN, now
    waiting = []
    for r, one in enumerate(members):
        rq.total[r], rq.computed[r], rq.emitted[r] = one.total, one.computed, one.emitted
        rq.due[r], rq.tpot[r] = one.due, one.tau
        k = rq.tier[r] = config.tiers.index(one.tau)
        if r == len(members) - 1:
            break
        if not one.emitted:
            waiting.append(r)
            continue
        i = sv.one.decodes[0]
        sv.slots.request[0, i], sv.slots.context[0, i] = r, one.computed
        sv.slots.emitted[0, i], sv.slots.finish[0, i] = one.emitted, NEVER
        sv.slots.due[0, i] = one.next_due - one.tau
        sv.min_due[0, k] = min(sv.min_due[0, k], sv.slots.due[0, i])
        sv.one.decodes[0] += 1
        sv.one.context[0] += one.computed
    waiting.sort(key=lambda r: (rq.due[r], r))
    for r, following in zip(waiting, [*waiting[1:], NOBODY], strict=False):
        rq.following[r] = following
        sv.one.pending_tokens[0] += rq.total[r] - rq.computed[r]
    sv.one.pending[0] = len(waiting)
    sv.one.head[0] = waiting[0] if waiting else NOBODY
    return rules, rq, sv


@st.composite
def servers(draw):
    rng = random.Random(draw(st.integers(0, 10**9)))
    pressure = draw(st.sampled_from([0.3, 1.0, 3.0]))

    def member(*, decodes):
        prompt, tau = rng.randint(1, 2500), rng.choice(TIERS)
        if not decodes:
            due = 1.0 + rng.uniform(0.05, 1.5) / pressure
            done = rng.choice([0, 0, rng.randrange(prompt)])
            return Member(total=prompt, computed=done, emitted=0, due=due, tau=tau)
        emitted = rng.randint(1, 300)
        due = 1.0 - emitted * tau + rng.uniform(0.5, 6) * tau / pressure
        total = prompt + emitted
        return Member(total=total, computed=total - 1, emitted=emitted, due=due, tau=tau)

    found = [member(decodes=True) for _ in range(rng.randint(0, int(12 * pressure)))]
    found += [member(decodes=False) for _ in range(rng.randint(0, 3))]
    new = member(decodes=False)
    return [*found, Member(total=new.total, computed=0, emitted=0, due=new.due, tau=new.tau)]


@given(servers(), st.sampled_from([0.02, 0.1]))
@settings(max_examples=300, deadline=None)
def test_chunks_are_predicted_as_they_come(members, max_step):
    """The first and second checks see what a server would do, chunk by chunk."""
    config = PolyServeConfig(check_later=False, max_step_s=max_step)
    rules, rq, sv = build(members, config)
    got = admits(TIMES, rules, rq, sv, 0, len(members) - 1, 1.0, 1.0)
    decoding = [one for one in members if one.emitted]
    prompts = sorted((o for o in members if not o.emitted), key=lambda one: one.due)
    wanted = follow(
        COST, decoding, prompts, now=1.0, max_step=max_step, max_tokens=4096
    )  # fmt: skip
    assert (got == TAKES) == (wanted == "takes")
    assert got in (TAKES, FIRST, SECOND)


@given(servers())
@settings(max_examples=100, deadline=None)
def test_the_peak_is_never_underestimated(members):
    config = PolyServeConfig(initial_output=150.0)
    rules, rq, sv = build(members, config)
    got = peak_kv(rules, rq, sv, 0, len(members) - 1, members[-1].total, 0)

    def left(one):
        return int(max(150.0 - one.emitted, 0.25 * 150.0)) if one.emitted else 150

    held = [(one.computed if one.emitted else one.total, left(one)) for one in members]
    exact = peak_tokens(held)
    assert exact <= got <= exact + len(members) * (150 // 16 + 2) * 2


def decode(tau, *, emitted=10, slack=1.0, context=100):
    return Member(
        total=context + 1, computed=context, emitted=emitted, due=1.0 + slack - emitted * tau,
        tau=tau,
    )  # fmt: skip


def prompt(tokens, *, ttft=1.0, tau=0.1):
    return Member(total=tokens, computed=0, emitted=0, due=1.0 + ttft, tau=tau)


def verdict(members, guard=1.0, **settings_):
    sizes = {k: settings_.pop(k) for k in ("capacity", "seats") if k in settings_}
    rules, rq, sv = build(members, PolyServeConfig(**settings_), **sizes)
    return admits(TIMES, rules, rq, sv, 0, len(members) - 1, 1.0, guard)


def test_each_part_has_its_say():
    assert verdict([prompt(1000)]) == TAKES
    alone = COST.step_time(StepLoad().with_chunk(1000))
    assert verdict([prompt(1000, ttft=alone * 1.001)]) == TAKES
    assert verdict([prompt(1000, ttft=alone * 0.99)]) == FIRST
    assert verdict([prompt(1000, ttft=alone * 0.99)], check_first=False) == TAKES
    # Somebody's next token is due before a step can end.
    assert verdict([decode(0.05, slack=0.01), prompt(100)]) == SECOND
    # So many decodes do not keep a pace of 20 ms, however much has been banked.
    many = [decode(0.02, slack=30.0) for _ in range(90)]
    assert verdict([*many, prompt(100, tau=0.02)], seats=128) == LATER
    assert verdict([*many, prompt(100, tau=0.02)], seats=128, check_later=False) == TAKES
    assert verdict([decode(0.1), prompt(500)], capacity=700) == MEMORY
    assert verdict([decode(0.1), prompt(500)], seats=1) == SEATS


def test_a_guard_leaves_headroom_to_the_host():
    members = [*(decode(0.02, slack=5.0) for _ in range(45)), prompt(100, tau=0.1)]
    share = COST.step_time(StepLoad(decodes=46, context=46 * 220)) / 0.02
    assert verdict(members, guard=1.0) == TAKES, share
    assert verdict(members, guard=0.8) == LATER


def test_prompts_to_come_count_if_wanted():
    many = [decode(0.1, slack=30.0) for _ in range(60)]
    loose = {"initial_output": 10.0, "initial_prompt": 500.0}
    assert verdict([*many, prompt(100)], **loose) == TAKES
    assert verdict([*many, prompt(100)], interference=1.0, **loose) == LATER


def test_tiers_are_the_loosest_that_is_no_looser():
    found = tier_of(np.array([0.02, 0.025, 0.03, 0.2]), TIERS)
    assert found.tolist() == [0, 0, 1, 3]
    with pytest.raises(ConfigError, match=r"request 1 wants a token every 10 ms.*is 20 ms; add"):
        tier_of(np.array([0.05, 0.01]), TIERS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tiers": ()}, "tiers must be seconds per token"),
        ({"tiers": (0.1, 0.05)}, "ascending"),
        ({"tiers": (float("nan"),)}, "above zero and ascending"),
        ({"guard": 0.0}, "guard must be between"),
        ({"pace": "fast"}, "pace must be tpot or tpot_gap"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        PolyServeConfig(**values)


def test_costs_that_loops_cannot_read_are_refused():
    class Odd:
        pass

    with pytest.raises(ConfigError, match="a TableCost or a BucketCost, got Odd"):
        step_times(Odd())
    with pytest.raises(ConfigError, match="margin must be zero or more, got -1"):
        step_times(COST, margin=-1)
    with pytest.raises(ConfigError, match="cost per token must be a number"):
        LinearCost(Plane(token=float("nan"), base=1.0))
