"""Drafts: where they come from, how many there are, and which are accepted."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.engine.drafts import MAX_CANDIDATES, NgramIndex
from jaxserve.engine.sampler import Drafts, accept, add_drafts
from jaxserve.engine.shapes import ShapeTable
from jaxserve.scheduling.fcfs import FcfsScheduler, pages_for

# Looking up --------------------------------------------------------------------------------------


def look_up(tokens, shortest, longest, count):
    """Compare every place, as the index does with the latest ones only."""
    end = len(tokens)
    best, best_size = None, 0
    for stop in range(end - 1, 0, -1):
        size = 0
        while size < min(longest, stop) and tokens[stop - 1 - size] == tokens[end - 1 - size]:
            size += 1
        if size >= shortest and size > best_size:
            best, best_size = stop, size
    if best is None:
        return []
    text = list(tokens)
    for i in range(count):
        text.append(text[best + i])
    return text[end:]


@given(
    st.lists(st.integers(0, 2), max_size=MAX_CANDIDATES),
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.integers(1, 5), max_size=6),
)
def test_lookup_finds_the_longest_and_latest_agreement(tokens, shortest, more, cuts):
    index = NgramIndex(shortest, shortest + more)
    for end in sorted({min(len(tokens), end) for end in itertools.accumulate(cuts)}):
        index.extend(tokens, end)
        expected = look_up(tokens[:end], shortest, shortest + more, 5)
        assert index.propose(tokens[:end], 5) == expected
    index.extend(tokens)
    assert index.propose(tokens, 5) == look_up(tokens, shortest, shortest + more, 5)


def test_lookup_costs_the_same_however_long_the_sequence():
    """A step must not search the sequence: count what is read, not seconds."""
    reads = 0

    class Counted(list):
        def __getitem__(self, key):
            nonlocal reads
            reads += 1
            return super().__getitem__(key)

    costs = []
    for length in (1_000, 20_000):
        tokens = Counted([7, 8, 9] * (length // 3))
        index = NgramIndex(2, 5)
        index.extend(tokens)
        reads = 0
        tokens.append(7)
        index.extend(tokens)
        index.propose(tokens, 5)
        costs.append(reads)
    assert costs[0] == costs[1] < 300


# Accepting ---------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=40)
def test_drafts_are_accepted_up_to_the_first_that_was_not_drawn(data):
    counts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    # Few lengths, as each is compiled.
    lengths = [length for length in (0, 3, 6, 12) if length >= sum(counts)]
    rows, padding = len(counts), data.draw(st.sampled_from(lengths)) - sum(counts)
    order = data.draw(st.permutations(range(rows)))
    tokens = st.integers(0, 1)
    places = [(row, i + 1) for row in order for i in range(counts[row])] + [(0, 0)] * padding
    drafts = data.draw(st.lists(tokens, min_size=len(places), max_size=len(places)))
    drawn = data.draw(st.lists(tokens, min_size=rows + len(places), max_size=rows + len(places)))
    made = Drafts(
        row=jnp.asarray([p[0] for p in places], jnp.int32),
        index=jnp.asarray([p[1] for p in places], jnp.int32),
        token=jnp.asarray(drafts, jnp.int32),
    )
    expected, last = [False] * len(places), [False] * len(places)
    for row in range(rows):
        before, latest = drawn[row], None
        for i, (owner, index) in enumerate(places):
            if owner == row and index:
                if before != drafts[i]:
                    break
                expected[i], latest, before = True, i, drawn[rows + i]
        if latest is not None:
            last[latest] = True
    accepted, is_last = accept(jnp.asarray(drawn, jnp.int32), made)
    assert accepted.tolist() == expected
    assert is_last.tolist() == last
    counted = np.asarray(add_drafts(jnp.zeros((rows + len(places), 2), jnp.int32), made))
    for i, (row, index) in enumerate(places):
        before = [drafts[j] for j, (r, k) in enumerate(places) if r == row and 0 < k <= index]
        if index:
            assert counted[rows + i].tolist() == [before.count(0), before.count(1)]
    assert not counted[:rows].any()


# How many ----------------------------------------------------------------------------------------


@st.composite
def decoding(draw, most=8):
    """Draw a state in which everybody decodes and something has been drafted."""
    page_size = draw(st.integers(1, 4))
    running = []
    for seq_id in range(draw(st.integers(1, 4))):
        num_tokens = draw(st.integers(1, 9))
        running.append(
            SequenceView(
                seq_id=seq_id,
                arrival=0.0,
                priority=0,
                prompt_len=1,
                num_tokens=num_tokens,
                num_computed=num_tokens - 1,
                max_total_len=40,
                num_pages=-(-(num_tokens - 1) // page_size),
                is_running=True,
                is_decoding=True,
                num_draft=draw(st.integers(0, 3)),
                draft_acceptance=draw(st.floats(0, 1)),
            )
        )
    return ReplicaView(
        now=0.0, running=tuple(running), waiting=(),
        num_free_pages=draw(st.integers(len(running), len(running) + most)), num_pages=99,
        page_size=page_size, max_num_seqs=8,
        max_num_batched_tokens=draw(st.integers(len(running), len(running) + most)),
        draft_sizes=draw(st.sampled_from([(), (1, 2, 3), (5, 12), (12,)])),
    )  # fmt: skip


def goodput(view, drafts, cost):
    output = sum(
        sum(s.draft_acceptance**i for i in range(n + 1))
        for s, n in zip(view.running, drafts, strict=True)
    )
    count = sum(drafts)
    padded = min((n for n in view.draft_sizes if n >= count), default=count) if count else 0
    return output / (1 + cost * padded)


@given(decoding(), st.floats(0.01, 0.5))
def test_drafts_fit_and_never_cost_tokens_per_time(view, cost):
    plan = FcfsScheduler(draft_cost=cost).plan(view)
    by_id = {work.seq_id: work for work in plan.work}
    drafts = [by_id[s.seq_id].num_draft for s in view.running]
    assert plan.num_tokens <= view.max_num_batched_tokens
    assert all(n <= s.num_draft for s, n in zip(view.running, drafts, strict=True))
    needed = [pages_for(view, s, 1 + n) for s, n in zip(view.running, drafts, strict=True)]
    assert sum(needed) <= view.num_free_pages
    assert not plan.preempt
    assert goodput(view, drafts, cost) >= goodput(view, [0] * len(drafts), cost) - 1e-9


@given(decoding(most=99), st.floats(0.01, 0.5))
def test_with_room_for_all_drafts_make_the_most_tokens_per_time(view, cost):
    plan = FcfsScheduler(draft_cost=cost).plan(view)
    by_id = {work.seq_id: work.num_draft for work in plan.work}
    drafts = [by_id[s.seq_id] for s in view.running]
    room = sum(s.num_draft for s in view.running)
    if view.num_free_pages < room + len(drafts):
        return
    if view.max_num_batched_tokens < room + len(drafts):
        return
    choices = itertools.product(*(range(s.num_draft + 1) for s in view.running))
    best = max(goodput(view, choice, cost) for choice in choices)
    assert math.isclose(goodput(view, drafts, cost), best, rel_tol=1e-9)


def test_hopeless_requests_do_not_draft_and_prefills_displace_drafts():
    def view(acceptance, waiting=()):
        one = SequenceView(
            seq_id=1, arrival=0.0, priority=0, prompt_len=4, num_tokens=9, num_computed=8,
            max_total_len=99, num_pages=2, is_running=True, is_decoding=True, num_draft=5,
            draft_acceptance=acceptance,
        )  # fmt: skip
        return ReplicaView(
            now=0.0, running=(one,), waiting=waiting, num_free_pages=50, num_pages=99,
            page_size=8, max_num_seqs=4, max_num_batched_tokens=64,
        )  # fmt: skip

    policy = FcfsScheduler(draft_cost=0.08)
    lengths = [policy.plan(view(a)).work[0].num_draft for a in (1.0, 0.7, 0.5, 0.05)]
    assert lengths[0] == 5
    assert sorted(lengths, reverse=True) == lengths
    assert lengths[-1] == 0
    new = SequenceView(
        seq_id=2, arrival=1.0, priority=0, prompt_len=4, num_tokens=4, num_computed=0,
        max_total_len=99, num_pages=0, is_running=False,
    )  # fmt: skip
    assert [work.num_draft for work in policy.plan(view(1.0, (new,))).work] == [0, 0]


# Shapes ------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 9), st.integers(10, 200))
def test_every_number_of_rows_and_drafts_has_a_shape(rows, count, budget):
    table = ShapeTable.build(
        max_num_seqs=rows, max_num_batched_tokens=max(budget, rows + count), max_model_len=64,
        page_size=8, use_pages=False, q_block=32, kv_tile=64, batch_invariant=False,
        num_draft=count,
    )  # fmt: skip
    known = set(table.all_shapes())
    for used in range(1, rows + 1):
        for drafts in range(1, min(used * count, table.max_draft) + 1):
            shape = table.shape(rows=used, prefill=0, drafts=drafts)
            assert shape in known
            assert shape.rows >= used
            assert shape.drafts >= drafts
            assert shape.num_drawn == shape.num_tokens == shape.rows + shape.drafts


# Settings ----------------------------------------------------------------------------------------


def settle(**config):
    return EngineConfig.from_settings({"speculative_config": config}).speculative.speculation


def test_settings_are_completed_as_elsewhere():
    made = settle(method="ngram", num_speculative_tokens=5)
    assert (made.prompt_lookup_min, made.prompt_lookup_max) == (5, 5)
    made = settle(method="ngram", num_speculative_tokens=5, prompt_lookup_max=3)
    assert (made.prompt_lookup_min, made.prompt_lookup_max) == (3, 3)
    assert settle(model="[ngram]", num_speculative_tokens=2).method == "ngram"
    assert settle(model="a/b", num_speculative_tokens=2).method == "draft_model"
    assert EngineConfig().speculative.speculation is None
    flags = EngineConfig.from_settings({"spec_method": "ngram", "spec_tokens": 3})
    assert flags.speculative.speculation.num_speculative_tokens == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs a method"),
        ({"method": "ngrams"}, r"one of ngram, draft_model, got 'ngrams'. Did you mean 'ngram'"),
        ({"method": "eagle3"}, "method 'eagle3' is not built in; use one of ngram, draft_model"),
        ({"method": "ngram"}, "needs num_speculative_tokens"),
        (
            {"method": "ngram", "num_speculative_token": 3},
            "no key 'num_speculative_token'. Did you mean 'num_speculative_tokens'",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": -1},
            "num_speculative_tokens must be a whole number from 1 to 64, got -1",
        ),
        ({"method": "ngram", "num_speculative_tokens": True}, "got True"),
        (
            {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_min": 4,
                "prompt_lookup_max": 2,
            },
            "prompt_lookup_min=4 exceeds prompt_lookup_max=2",
        ),
        ({"method": "draft_model", "num_speculative_tokens": 3}, "needs model"),
        (
            {"model": "m", "num_speculative_tokens": 3, "prompt_lookup_min": 2},
            "prompt_lookup_min belongs to method 'ngram', got method 'draft_model'",
        ),
        (
            {"model": "m", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"},
            "draft_sample_method can only be 'greedy' here, got 'probabilistic'",
        ),
    ],
)
def test_bad_settings_say_what_is_wrong(config, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        settle(**config)


def test_speculative_config_must_be_a_mapping():
    with pytest.raises(
        ConfigError, match=r"speculative_config must be a mapping such as .* 'ngram'"
    ):
        EngineConfig.from_settings({"speculative_config": "ngram"})
