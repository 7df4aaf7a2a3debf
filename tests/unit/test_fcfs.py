import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.plan import StepPlan
from jaxserve.core.view import ReplicaView, SequenceView
from jaxserve.scheduling.fcfs import FcfsScheduler

SCHEDULERS = [
    FcfsScheduler(),
    FcfsScheduler(by_priority=True),
    FcfsScheduler(mix=False),
    FcfsScheduler(max_mixed_prefill=5),
    FcfsScheduler(by_priority=True, max_mixed_prefill=3, ageing_s=2.0),
]


def _pages(tokens, page_size):
    return -(-tokens // page_size)


@st.composite
def views(draw):
    """Draw states that an engine can be in: pages are never shared out twice."""
    page_size = draw(st.integers(1, 8))
    num_pages = draw(st.integers(4, 40))
    max_seqs = draw(st.integers(1, 6))
    free = num_pages
    running: list[SequenceView] = []
    waiting: list[SequenceView] = []
    for seq_id in range(draw(st.integers(0, 10))):
        room = num_pages * page_size
        prompt = draw(st.integers(1, min(room - 1, 40)))
        output = draw(st.integers(0, min(room - 1 - prompt, 20)))
        num_tokens = prompt + output
        computed = draw(st.integers(0, num_tokens))
        held = _pages(computed, page_size)
        if computed < prompt:
            held = _pages(num_tokens, page_size)  # an admitted prefill has all its pages
        is_running = len(running) < max_seqs and held <= free and draw(st.booleans())
        one = SequenceView(
            seq_id=seq_id,
            arrival=float(draw(st.integers(0, 3))),
            priority=draw(st.integers(0, 2)),
            prompt_len=prompt,
            num_tokens=num_tokens,
            num_computed=computed if is_running else 0,
            max_total_len=num_tokens + 5,
            num_pages=held if is_running else 0,
            is_running=is_running,
            is_decoding=is_running and prompt <= computed == num_tokens - 1 and draw(st.booleans()),
            num_cached=0
            if is_running
            else draw(st.integers(0, (num_tokens - 1) // page_size)) * page_size,
            adapter=draw(st.sampled_from(["", "a", "b", "c"])),
        )
        free -= one.num_pages
        (running if is_running else waiting).append(one)
    pinned = draw(st.frozensets(st.sampled_from("cd"), max_size=1))
    used = frozenset(s.adapter for s in running if s.adapter) | pinned
    return ReplicaView(
        now=draw(st.sampled_from([2.0, 9.0])),
        running=tuple(draw(st.permutations(running))),
        waiting=tuple(draw(st.permutations(waiting))),
        num_free_pages=free,
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=draw(st.integers(1, 64)),
        adapters=used,
        max_loras=max(len(used), draw(st.integers(1, 3))),
    )


def assert_fits(view: ReplicaView, plan: StepPlan):
    running = {s.seq_id: s for s in view.running}
    waiting = {s.seq_id: s for s in view.waiting}
    worked = [item.seq_id for item in plan.work]
    assert len(set(worked)) == len(worked)
    assert len(set(plan.preempt)) == len(plan.preempt)
    assert plan.num_tokens <= view.max_num_batched_tokens
    assert set(plan.preempt) <= set(running)
    assert set(plan.admit) <= set(waiting)
    assert set(plan.admit) <= set(worked), "admitted without work"
    assert set(worked) <= (set(running) - set(plan.preempt)) | set(plan.admit)
    adapters = {waiting[i].adapter for i in plan.admit} | set(view.adapters)
    assert len(adapters - {""}) <= view.max_loras
    stay = len(running) - len(plan.preempt) + len(plan.admit)
    assert stay <= view.max_num_seqs
    free = view.num_free_pages + sum(running[i].num_pages for i in plan.preempt)
    for item in plan.work:
        assert item.num_tokens > 0
        if item.seq_id in running:
            one = running[item.seq_id]
            assert item.num_tokens <= one.num_uncomputed
            end = one.num_computed + item.num_tokens
            free -= max(0, _pages(end, view.page_size) - one.num_pages)
        else:
            one = waiting[item.seq_id]
            assert item.num_tokens <= one.num_tokens - one.num_cached
            free -= _pages(one.num_tokens, view.page_size)
    assert free >= 0


def _rank(by_priority):
    return lambda s: (s.priority if by_priority else 0, s.arrival, s.seq_id)


@given(views(), st.sampled_from(SCHEDULERS))
@settings(max_examples=400)
def test_every_plan_fits(view, scheduler):
    assert_fits(view, scheduler.plan(view))


@given(views(), st.booleans())
@settings(max_examples=300)
def test_those_who_came_first_are_served_first(view, by_priority):
    rank = _rank(by_priority)
    plan = FcfsScheduler(by_priority=by_priority).plan(view)
    waiting = sorted(view.waiting, key=rank)
    admitted = [s for s in waiting if s.seq_id in plan.admit]
    assert list(plan.admit) == [s.seq_id for s in admitted]
    last = waiting.index(admitted[-1]) if admitted else 0
    overtaken = [s for s in waiting[:last] if s not in admitted]
    assert all(s.adapter and s.adapter not in view.adapters for s in overtaken)
    known = {s.seq_id: s for s in (*view.running, *view.waiting)}
    kinds = [
        [i.seq_id for i in plan.work
         if known[i.seq_id].is_running and known[i.seq_id].is_decoding == is_decode]
        for is_decode in (True, False)
    ]  # fmt: skip
    order = [item.seq_id for item in plan.work]
    assert order == [*kinds[0], *kinds[1], *plan.admit], "decodes, prefills, newcomers"
    for kind in kinds:
        assert kind == sorted(kind, key=lambda i: rank(known[i]))
    for victim in plan.preempt:
        later = [s for s in view.running if rank(s) > rank(known[victim])]
        assert all(s.seq_id in plan.preempt or s.seq_id in order for s in later)


@given(views())
def test_nobody_is_admitted_while_memory_is_short(view):
    plan = FcfsScheduler().plan(view)
    assert not (plan.preempt and plan.admit)


@given(view=views(), limit=st.integers(1, 10))
def test_a_long_prompt_gets_little_beside_many_decodes(view, limit):
    plan = FcfsScheduler(max_mixed_prefill=limit).plan(view)
    known = {s.seq_id: s for s in (*view.running, *view.waiting)}
    served = [known[item.seq_id] for item in plan.work]
    ready = [s for s in view.running if s.num_uncomputed > 0]
    num_decodes = sum(s.is_decoding for s in ready)
    has_decode = any(s.is_decoding for s in served)
    if has_decode and len(ready) - num_decodes + len(view.waiting) < num_decodes:
        prefill = [
            i.num_tokens for i, s in zip(plan.work, served, strict=True) if not s.is_decoding
        ]
        assert sum(prefill) <= limit


def test_waiting_long_enough_outweighs_priority():
    patient = SequenceView(
        seq_id=1, arrival=0.0, priority=5, prompt_len=4, num_tokens=4, num_computed=0,
        max_total_len=8, num_pages=0, is_running=False,
    )  # fmt: skip
    urgent = dataclasses.replace(patient, seq_id=2, arrival=90.0, priority=0)
    view = ReplicaView(
        now=100.0, running=(), waiting=(urgent, patient), num_free_pages=9, num_pages=9,
        page_size=4, max_num_seqs=1, max_num_batched_tokens=8,
    )  # fmt: skip
    assert FcfsScheduler(by_priority=True).plan(view).admit == (2,)
    assert FcfsScheduler(by_priority=True, ageing_s=1.0).plan(view).admit == (1,)


@given(views())
@settings(max_examples=200)
def test_without_mixing_a_step_holds_one_prefill_or_decodes_only(view):
    plan = FcfsScheduler(mix=False).plan(view)
    known = {s.seq_id: s for s in (*view.running, *view.waiting)}
    prefills = [
        item
        for item in plan.work
        if item.seq_id in plan.admit or not known[item.seq_id].is_decoding
    ]
    assert not prefills or len(plan.work) == 1


def simulate(
    scheduler, requests, *, page_size, num_pages, max_seqs, budget, adapters="", max_loras=1
):
    """Serve (prompt, output, priority) requests to the end and return the order of their ends.

    Request i uses the adapter that letter i of `adapters` names; "-" and no letter use none.
    """
    sequences = {
        i: SequenceView(
            seq_id=i, arrival=float(i), priority=priority, prompt_len=prompt, num_tokens=prompt,
            num_computed=0, max_total_len=prompt + output, num_pages=0, is_running=False,
            adapter=adapters[i : i + 1].strip("-"),
        )
        for i, (prompt, output, priority) in enumerate(requests)
    }  # fmt: skip
    ended: list[int] = []
    for step in range(20_000):
        if not sequences:
            return ended
        used = sum(s.num_pages for s in sequences.values())
        running = tuple(s for s in sequences.values() if s.is_running)
        view = ReplicaView(
            now=float(step),
            adapters=frozenset(s.adapter for s in running if s.adapter),
            max_loras=max_loras,
            running=running,
            waiting=tuple(s for s in sequences.values() if not s.is_running),
            num_free_pages=num_pages - used,
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_seqs,
            max_num_batched_tokens=budget,
        )
        plan = scheduler.plan(view)
        assert_fits(view, plan)
        assert plan.work or plan.preempt, "the engine stands still"
        for i in plan.preempt:
            sequences[i] = dataclasses.replace(
                sequences[i], is_running=False, is_decoding=False, num_computed=0, num_pages=0
            )
        for i in plan.admit:
            held = _pages(sequences[i].num_tokens, page_size)
            sequences[i] = dataclasses.replace(sequences[i], is_running=True, num_pages=held)
        for item in plan.work:
            one = sequences[item.seq_id]
            computed = one.num_computed + item.num_tokens
            total = one.num_tokens + (computed == one.num_tokens)
            if total == one.max_total_len:
                del sequences[item.seq_id]
                ended.append(item.seq_id)
                continue
            sequences[item.seq_id] = dataclasses.replace(
                one,
                num_computed=computed,
                num_tokens=total,
                is_decoding=total > one.num_tokens,
                num_pages=max(one.num_pages, _pages(computed, page_size)),
            )
    raise AssertionError(f"{len(sequences)} sequences starve")


REQUESTS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=12
)


@given(REQUESTS, st.sampled_from(SCHEDULERS), st.integers(1, 5), st.integers(1, 40), st.data())
@settings(max_examples=150)
def test_everybody_is_served_in_the_end(requests, scheduler, max_seqs, budget, data):
    page_size = data.draw(st.integers(1, 8))
    longest = max(prompt + output for prompt, output, _ in requests)
    num_pages = data.draw(st.integers(_pages(longest, page_size), 80))
    ended = simulate(
        scheduler, requests, page_size=page_size, num_pages=num_pages, max_seqs=max_seqs,
        budget=budget,
        adapters=data.draw(st.text("-abc", max_size=12)), max_loras=data.draw(st.integers(1, 2)),
    )  # fmt: skip
    assert sorted(ended) == list(range(len(requests)))


@pytest.mark.parametrize("mix", [True, False])
def test_urgent_requests_end_first(mix):
    requests = [(10, 10, 2), (10, 10, 1), (10, 10, 0)]
    settings = {"page_size": 4, "num_pages": 30, "max_seqs": 1, "budget": 16}
    urgent = FcfsScheduler(by_priority=True, mix=mix)
    assert simulate(urgent, requests, **settings) == [2, 1, 0]
    assert simulate(FcfsScheduler(mix=mix), requests, **settings) == [0, 1, 2]


def test_a_request_whose_adapter_finds_no_slot_is_overtaken_for_a_while_only():
    blocked = SequenceView(
        seq_id=1, arrival=0.0, priority=0, prompt_len=4, num_tokens=4, num_computed=0,
        max_total_len=8, num_pages=0, is_running=False, adapter="b",
    )  # fmt: skip
    same = dataclasses.replace(blocked, seq_id=2, arrival=0.5, adapter="a")
    plain = dataclasses.replace(blocked, seq_id=3, arrival=0.5, adapter="")
    view = ReplicaView(
        now=1.5, running=(), waiting=(blocked, same, plain), num_free_pages=90, num_pages=90,
        page_size=4, max_num_seqs=8, max_num_batched_tokens=99, adapters=frozenset("a"),
        max_loras=1,
    )  # fmt: skip
    assert FcfsScheduler(lora_drain_wait_s=2.0).plan(view).admit == (2, 3)
    assert FcfsScheduler(lora_drain_wait_s=1.0).plan(view).admit == (3,)
    more = dataclasses.replace(view, max_loras=2)
    assert FcfsScheduler().plan(more).admit == (1, 2, 3)


def test_an_idle_engine_has_nothing_to_do():
    view = ReplicaView(
        now=0.0, running=(), waiting=(), num_free_pages=3, num_pages=3, page_size=4,
        max_num_seqs=2, max_num_batched_tokens=8,
    )  # fmt: skip
    assert FcfsScheduler().plan(view) == StepPlan()
