import dataclasses
import heapq
import importlib.util
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core import compiled
from jaxserve.pallas_kernels import (
    planner,
    planner_items,
    planner_loops,
    planner_words,
    variant,
)
from jaxserve.pallas_kernels.paged import PageTable
from jaxserve.pallas_kernels.plan import Item, ItemFlag, Plan, PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.prefixes import SharedPrefix, find_shared_prefixes
from tests.kernels.plans import items_of, lengths, loads, page_table, seen, spec_for, visits

MODES = ({}, {"fixed_split_size": 128}, {"disable_split": True})


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Compile the planner's loops, or it looks as if examples were slow to draw."""
    spec = spec_for([1], [5])
    make_plan(spec, np.array([1]), page_table([5], 16)[0])


@st.composite
def plans(draw, *, cascade: bool = False):
    page_size = draw(st.sampled_from([1, 2, 8, 16, 64, 128]))
    q_len, kv_len = draw(lengths(page_size=page_size, most=8))
    shared = draw(prefixes(q_len, kv_len, page_size)) if cascade else []
    group, kv_heads = draw(st.sampled_from([(1, 3), (4, 2), (5, 1), (7, 2), (128, 1)]))
    spec = spec_for(
        q_len,
        kv_len,
        page_size=page_size,
        q_heads=group * kv_heads,
        kv_heads=kv_heads,
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 17, 64, 1000])),
        tile_q=draw(st.sampled_from([16, 64, 128])),
        tile_kv=draw(st.sampled_from([64, 128])),
        num_ctas=draw(st.sampled_from([1, 3, 16, 132])),
        item_cost=draw(st.sampled_from([0, 64, 128])),
        decode_tokens=draw(st.sampled_from([0, 1, 16])),
        cascade_levels=3 if cascade else 0,
        **draw(st.sampled_from(MODES)),
    )
    table, _ = page_table(kv_len, page_size, shared=shared, seed=draw(st.integers(0, 9)))
    return make_plan(spec, np.array(q_len), table, shared=shared)


@st.composite
def prefixes(draw, q_len, kv_len, page_size):
    """Share prefixes among some requests, and longer ones among some of those."""
    shared: list[SharedPrefix] = []
    members, begin = list(range(len(q_len))), 0
    for _ in range(draw(st.integers(0, 3))):
        members = [r for r in members if (kv_len[r] - q_len[r]) // page_size * page_size > begin]
        members = draw(st.lists(st.sampled_from(members), unique=True)) if members else []
        if len(members) < 2:
            break
        most = min(kv_len[r] - q_len[r] for r in members) // page_size
        end = draw(st.integers(begin // page_size + 1, most)) * page_size
        shared.append(SharedPrefix(requests=tuple(members), begin=begin, end=end))
        begin = end
    return shared


def check_covers(plan: Plan) -> None:
    count, mask = visits(plan), seen(plan)
    wanted = np.broadcast_to(mask[:, None, :], count.shape)
    assert (count[wanted] == 1).all(), "a key is visited twice or not at all"
    assert count.max(initial=0) <= 1, "a key that nobody sees is visited twice"
    full = visits(plan, only_full=True) > 0
    assert wanted[full].all(), "a key counts as seen by all rows but is not"


def check_merges(plan: Plan) -> None:
    spec, items = plan.spec, items_of(plan)
    count = np.zeros((spec.max_tokens, spec.num_blocks), np.int64)
    owner: dict[int, tuple[int, int]] = {}
    for item in items:
        block = int(item[Item.HEAD]) // spec.heads_per_tile
        for i in range(item[Item.Q_LEN]):
            target = (int(item[Item.Q_START]) + i, block)
            if item[Item.OUT_SLOT] < 0:
                count[target] += 1
            else:
                assert owner.setdefault(int(item[Item.OUT_SLOT]) + i, target) is target
    assert sorted(owner) == list(range(plan.num_units)), "units have gaps or are used twice"
    merged: list[int] = []
    most = 0
    for merge in range(plan.num_merges):
        low, high = plan.merge_indptr[merge : merge + 2]
        most = max(most, high - low)
        target = divmod(int(plan.merge_target[merge]), spec.num_blocks)
        count[target] += 1
        for unit in plan.merge_units[low:high]:
            assert owner[int(unit)] == target
            merged.append(int(unit))
    assert sorted(merged) == sorted(owner)
    assert most == plan.max_splits
    assert (plan.merge_target[plan.num_merges :] == spec.max_tokens * spec.num_blocks).all()
    is_real = plan.token_request >= 0
    assert (count[is_real] == 1).all(), "an output is written twice or not at all"
    assert not count[~is_real].any()


@given(plan=plans())
@settings(max_examples=150)
def test_every_key_is_visited_once_and_every_output_written_once(plan):
    check_covers(plan)
    check_merges(plan)


@given(plan=plans(cascade=True))
@settings(max_examples=100)
def test_shared_prefixes_are_read_once_and_all_outputs_are_written_once(plan):
    check_covers(plan)
    check_merges(plan)
    assert sorted(plan.token_order) == list(range(plan.spec.max_tokens))
    assert (plan.token_order[plan.token_place] == np.arange(plan.spec.max_tokens)).all()


@given(plan=plans())
@settings(max_examples=100)
def test_items_stay_within_their_tiles_and_requests(plan):
    spec, items = plan.spec, items_of(plan)
    assert (items[:, Item.Q_LEN] >= 1).all()
    assert (items[:, Item.Q_LEN] <= spec.tile_tokens).all()
    assert (items[:, Item.KV_BEGIN] % min(spec.tile_kv, spec.page_size) == 0).all()
    assert (items[:, Item.KV_BEGIN] <= items[:, Item.KV_END]).all()
    assert (items[:, Item.KV_END] <= items[:, Item.KV_LEN]).all()
    assert (items[:, Item.KV_HEAD] == items[:, Item.HEAD] // spec.group).all()
    request = items[:, Item.REQUEST]
    assert (items[:, Item.TABLE_BASE] == plan.kv_indptr[request]).all()
    assert (items[:, Item.Q_POS] == plan.token_position[items[:, Item.Q_START]]).all()
    is_decode = (items[:, Item.FLAGS] & ItemFlag.DECODE) != 0
    assert (is_decode == (plan.q_len[request] <= spec.decode_tokens)).all()
    assert plan.work_indptr[0] == 0
    assert plan.work_indptr[-1] == plan.num_items
    assert (np.diff(plan.work_indptr) >= 0).all()


@given(plan=plans())
@settings(max_examples=150)
def test_no_cta_has_much_more_to_do_than_the_others(plan):
    load, items = loads(plan), items_of(plan)
    if not len(items):
        return
    spec = plan.spec
    rows = items[:, Item.Q_LEN] * spec.heads_per_tile
    keys = items[:, Item.KV_END] - items[:, Item.KV_BEGIN]
    chunk = (-(-keys // spec.tile_kv) * spec.tile_kv + spec.item_cost + spec.row_cost * rows).max()
    bound = max(load.sum() / spec.num_ctas, chunk)
    assert load.max() <= 4 / 3 * bound + chunk


def test_long_work_is_spread_evenly():
    q_len, kv_len = [1] * 64, [32768, *[1000] * 63]
    spec = spec_for(q_len, kv_len, q_heads=32, kv_heads=8)
    plan = make_plan(spec, np.array(q_len), page_table(kv_len, 16)[0])
    load = loads(plan)
    assert load.max() <= 1.05 * load.sum() / spec.num_ctas
    assert plan.num_items <= 64 * 8 + spec.num_ctas - 1


@given(
    cost=st.lists(st.integers(1, 5000), min_size=1, max_size=100)
    | st.lists(st.sampled_from([192, 256, 640]), min_size=1, max_size=100),
    blocks=st.integers(1, 4),
    num_ctas=st.integers(1, 40),
)
def test_longest_first_is_what_a_heap_would_do(cost, blocks, num_ctas):
    found, begins = planner_items.assign_longest_first(np.array(cost), blocks, num_ctas)
    heap = [(0, cta) for cta in range(num_ctas)]
    chosen: list[list[int]] = [[] for _ in range(num_ctas)]
    costs = cost * blocks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, cta = heapq.heappop(heap)
        chosen[cta].append(index)
        heapq.heappush(heap, (load + costs[index], cta))
    bits = planner_words.BLOCK_BITS
    order = (found & ((1 << bits) - 1)) * len(cost) + (found >> bits)
    bounds = itertools.pairwise([0, *begins, len(costs)])
    assert [list(order[a:b]) for a, b in bounds] == chosen


@given(data=st.data())
@settings(max_examples=50)
def test_equal_inputs_give_equal_plans(data):
    q_len, kv_len = data.draw(lengths())
    table, _ = page_table(kv_len, 16)
    for mode in MODES:
        spec = spec_for(q_len, kv_len, **mode)
        first, second = (make_plan(spec, np.array(q_len), table) for _ in range(2))
        assert (first.buffer == second.buffer).all()


@given(data=st.data())
@settings(max_examples=60)
def test_fixed_splits_do_not_depend_on_other_requests(data):
    q_len, kv_len = data.draw(lengths(most=5))
    mode = data.draw(st.sampled_from(MODES[1:]))
    window = data.draw(st.sampled_from([None, 40]))
    chosen = data.draw(st.integers(0, len(q_len) - 1))

    def cuts(q_len, kv_len, request):
        spec = spec_for(q_len, kv_len, window=window, num_ctas=7, **mode)
        items = items_of(make_plan(spec, np.array(q_len), page_table(kv_len, 16)[0]))
        items = items[items[:, Item.REQUEST] == request]
        names = (Item.HEAD, Item.Q_POS, Item.Q_LEN, Item.KV_BEGIN, Item.KV_END)
        return sorted(map(tuple, items[:, names].tolist()))

    alone = cuts([q_len[chosen]], [kv_len[chosen]], 0)
    assert cuts(q_len, kv_len, chosen) == alone


@given(data=st.data())
@settings(max_examples=80)
def test_blocks_that_a_variant_hides_are_not_visited(data):
    q_len, kv_len = data.draw(lengths(longest=600))
    size, first = data.draw(st.sampled_from([(1, 0), (64, 4), (100, 0), (70, 130)]))
    kind = variant.window(size, first=first)
    mode = data.draw(st.sampled_from(MODES))
    spec = spec_for(q_len, kv_len, variant=kind, num_ctas=5, item_cost=0, **mode)
    plan = make_plan(spec, np.array(q_len), page_table(kv_len, 16)[0])
    count, mask = visits(plan), seen(plan)
    position = np.arange(mask.shape[1])[None, :]
    mask &= (position > plan.token_position[:, None] - size) | (position < first)
    assert (count[np.broadcast_to(mask[:, None], count.shape)] == 1).all()
    assert count.max(initial=0) <= 1
    full = visits(plan, only_full=True) > 0
    assert np.broadcast_to(mask[:, None], full.shape)[full].all()
    check_merges(plan)
    for item in items_of(plan):
        # No block lies wholly between the first keys and the window of the first query.
        low = np.arange(item[Item.KV_BEGIN], item[Item.KV_END], spec.tile_kv)
        high = np.minimum(low + spec.tile_kv, item[Item.KV_END])
        is_hidden = (low >= first) & (high - 1 <= item[Item.Q_POS] - size)
        assert not is_hidden.any()


def test_padding_is_empty_and_safe():
    spec = spec_for([1, 1], [5, 5], max_requests=8, max_tokens=8, max_pages=64)
    plan = make_plan(spec, np.array([1, 1]), page_table([5, 33], 16)[0])
    assert plan.num_requests == 2
    assert plan.num_tokens == 2
    assert (plan.token_request[2:] == -1).all()
    assert (plan.kv_len[2:] == 0).all()
    assert (plan.kv_indices[4:] == 0).all()
    assert len(plan.kv_indices) >= 64 + spec.tile_kv // spec.page_size


def load(name, file):
    source = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", MODES)
def test_without_a_compiler_plans_are_the_same(mode, monkeypatch, caplog):
    q_len, kv_len = np.array([1, 0, 30, 7]), [900, 5, 64, 400]
    shared = [SharedPrefix(requests=(0, 3), begin=0, end=128)]
    table, _ = page_table(kv_len, 16, shared=shared)
    spec = spec_for(q_len, kv_len, num_ctas=5, cascade_levels=1, **mode)
    wanted = make_plan(spec, q_len, table, shared=shared).buffer
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setitem(sys.modules, "jaxserve.core.compiled", load("door", compiled.__file__))
    plain, plain_items = (load("plain", each.__file__) for each in (planner_loops, planner_items))
    assert "install numba" in caplog.text
    monkeypatch.setattr(planner, "_loops", lambda: plain)
    monkeypatch.setattr(planner, "_item_loops", lambda: plain_items)
    assert (make_plan(spec, q_len, table, shared=shared).buffer == wanted).all()


def test_nothing_at_all_is_a_plan():
    spec = spec_for([], [], max_requests=4, max_tokens=4, max_pages=4)
    plan = make_plan(spec, np.zeros(0, int), page_table([], 16)[0])
    assert plan.num_items == 0
    assert not plan.work_indptr.any()


def test_tokens_may_stand_anywhere():
    spec = spec_for([1, 3], [9, 20], max_tokens=10)
    table, _ = page_table([9, 20], 16)
    plan = make_plan(spec, np.array([1, 3]), table, q_start=np.array([8, 2]))
    assert plan.token_request.tolist() == [-1, -1, 1, 1, 1, -1, -1, -1, 0, -1]
    assert plan.token_position.tolist() == [0, 0, 17, 18, 19, 0, 0, 0, 8, 0]
    check_covers(plan)
    check_merges(plan)


@given(data=st.data())
@settings(max_examples=60)
def test_single_tokens_may_stand_anywhere(data):
    kv_len = data.draw(st.lists(st.integers(1, 900), min_size=1, max_size=12))
    q_len = data.draw(st.lists(st.integers(0, 1), min_size=len(kv_len), max_size=len(kv_len)))
    window = data.draw(st.sampled_from([None, 70]))
    room = {"max_tokens": 20, "num_ctas": 7, "item_cost": data.draw(st.sampled_from([0, 64]))}
    spec = spec_for(q_len, kv_len, window=window, **room, **data.draw(st.sampled_from(MODES)))
    places = np.random.default_rng(len(kv_len)).permutation(20)[: len(kv_len)]
    table, _ = page_table(kv_len, 16)
    plan = make_plan(spec, np.array(q_len), table, q_start=places)
    check_covers(plan)
    check_merges(plan)
    for place, request in zip(places, range(len(q_len)), strict=True):
        assert plan.token_request[place] == (request if q_len[request] else -1)


def test_nothing_that_is_given_is_changed():
    spec = spec_for([1, 3], [9, 20], max_tokens=10, cascade_levels=1)
    q_len, q_start = np.array([1, 3]), np.array([8, 2])
    table, _ = page_table([9, 20], 16)
    first = make_plan(spec, q_len, table, q_start=q_start)
    assert q_start.tolist() == [8, 2]
    assert (make_plan(spec, q_len, table, q_start=q_start).buffer == first.buffer).all()


def test_plans_are_written_where_they_shall_be():
    spec = spec_for([1, 3], [9, 20])
    q_len, (table, _) = np.array([1, 3]), page_table([9, 20], 16)
    out = np.zeros(spec.num_words, np.int32)
    plan = make_plan(spec, q_len, table, out=out)
    assert plan.buffer is out
    assert (out == make_plan(spec, q_len, table).buffer).all()
    with pytest.raises(ValueError, match=rf"out must be int32 \[{spec.num_words}\] .* got int64"):
        make_plan(spec, q_len, table, out=np.zeros(spec.num_words, np.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_requests": 1}, "2 requests, but the spec has room for 1; raise max_requests"),
        ({"max_tokens": 2}, "4 query tokens, but the spec has room for 2; raise max_tokens"),
        ({"max_pages": 3}, "4 pages, but the spec has room for 3; raise max_pages"),
        ({"max_items": 1}, "work items, but the spec has room for 1; raise max_items"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    spec = spec_for([1, 3], [5, 40], **change)
    table, _ = page_table([5, 40], 16)
    with pytest.raises(ValueError, match=message):
        make_plan(spec, np.array([1, 3]), table)


def test_too_many_partial_states_are_refused():
    spec = spec_for([1], [4000], fixed_split_size=64, max_units=8)
    with pytest.raises(ValueError, match=r"126 units of partial state, but .* room for 8"):
        make_plan(spec, np.array([1]), page_table([4000], 16)[0])


def test_tables_that_do_not_fit_are_refused():
    spec = spec_for([1, 1], [5, 5])
    table, _ = page_table([5, 5], 16)
    with pytest.raises(ValueError, match="must speak of the same requests"):
        make_plan(spec, np.array([1]), table)
    long = PageTable(indptr=table.indptr, indices=table.indices, kv_len=np.array([5, 17]))
    with pytest.raises(ValueError, match="request 1 has 17 keys but 1 pages of 16; add pages"):
        make_plan(spec, np.array([1, 1]), long)
    with pytest.raises(ValueError, match="must not be negative"):
        make_plan(spec, np.array([1, -1]), table)
    with pytest.raises(ValueError, match="must not be negative"):
        make_plan(spec, np.array([1, 1]), dataclasses.replace(table, kv_len=np.array([5, -5])))
    with pytest.raises(ValueError, match="goes from 0 to 2, but there are 1 pages"):
        make_plan(spec, np.array([1, 1]), dataclasses.replace(table, indices=table.indices[:1]))
    with pytest.raises(ValueError, match=r"one index from 0 per request, \[2\], got \[0, -1\]"):
        make_plan(spec, np.array([1, 1]), table, q_start=np.array([0, -1]))
    for one in (spec, dataclasses.replace(spec, cascade_levels=1)):
        with pytest.raises(ValueError, match="in the same place; correct q_start"):
            make_plan(one, np.array([1, 1]), table, q_start=np.array([1, 1]))
    prefix = SharedPrefix(requests=(0, 1), begin=0, end=16)
    with pytest.raises(
        ValueError, match="nested 1 deep, but the spec has room for 0; raise cascade_levels"
    ):
        make_plan(spec, np.array([1, 1]), table, shared=[prefix])


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([((0,), 0, 16)], "at least two of 3 requests"),
        ([((0, 3), 0, 16)], "at least two of 3 requests"),
        ([((0, 1), 8, 16)], "must begin at a page and end behind it, got 8 to 16"),
        ([((0, 1), 0, 48)], "no more than the 33 keys .* got 48"),
        ([((0, 1), 0, 24)], "must end at a page .* got 24"),
        ([((0, 2), 0, 16)], r"requests \(0, 2\) do not have the same pages for keys 0 to 16"),
        ([((0, 1), 16, 32)], "begins at 16, but larger groups share"),
        ([((0, 1), 0, 16), ((0, 1), 0, 32)], "begins at 0, but larger groups share"),
    ],
)
def test_prefixes_that_are_none_are_refused(prefixes, message):
    kv_len, q_len = [34, 34, 34], np.array([1, 1, 1])
    pair = SharedPrefix(requests=(0, 1), begin=0, end=32)
    table, _ = page_table(kv_len, 16, shared=[pair])
    shared = [SharedPrefix(requests=r, begin=low, end=high) for r, low, high in prefixes]
    with pytest.raises(ValueError, match=message):
        make_plan(spec_for(q_len, kv_len, cascade_levels=2), q_len, table, shared=shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_heads": 6, "kv_heads": 4}, "multiple of kv_heads, got 6 and 4; the nearest is 8"),
        ({"page_size": 24}, "multiple or a divisor of page_size, got 64 and 24; .* is 72"),
        ({"item_cost": -1}, "item_cost must not be negative, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"num_ctas": 5000}, "num_ctas must be below 4096, got 5000"),
        ({"fixed_split_size": 100}, "multiple of tile_kv = 64, got 100; the nearest is 128"),
        ({"fixed_split_size": 64, "disable_split": True}, "exclude each other"),
        ({"cascade_levels": 1, "variant": variant.packed_mask()}, "set cascade_levels to 0"),
        ({"head_dim": 15, "variant": variant.rope()}, "head_dim is 15; pad it"),
    ],
)
def test_specs_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        spec_for([1], [1], **change)


def test_tables_are_made_from_rows():
    rows = np.array([[3, 4, 9], [5, 9, 9]])
    table = PageTable.from_rows(rows, np.array([17, 4]), 16)
    assert table.indptr.tolist() == [0, 2, 3]
    assert table.indices.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="request 0 with 49 tokens needs 4 pages of 16"):
        PageTable.from_rows(rows, np.array([49, 4]), 16)


def test_specs_are_equal_by_value():
    first, second = (spec_for([1], [1], variant=variant.soft_cap(3.0)) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert isinstance(first, PlanSpec)
    assert first != spec_for([1], [1], variant=variant.soft_cap(4.0))


def shared_tables(paths: list[list[int]]) -> PageTable:
    """Make a table out of pages by request, 16 tokens each, and one query token at the end."""
    rows = np.zeros((len(paths), max(map(len, paths)) + 1), np.int64)
    for i, path in enumerate(paths):
        rows[i, : len(path)] = path
        rows[i, len(path)] = 900 + i
    return PageTable.from_rows(rows, np.array([16 * len(p) + 1 for p in paths]), 16)


def found_in(paths: list[list[int]], **limits: int) -> list[tuple[tuple[int, ...], int, int]]:
    few = {"min_rows": 2, "min_keys": 16, "levels": 3, **limits}
    q_len = np.ones(len(paths), np.int64)
    found = find_shared_prefixes(q_len, shared_tables(paths), page_size=16, group=1, **few)
    return [(p.requests, p.begin, p.end) for p in found]


def test_shared_prefixes_are_found_in_page_tables():
    assert found_in([[1, 2, 3], [1, 2, 4], [5], [1, 2, 3, 6]]) == [
        ((0, 1, 3), 0, 32),
        ((0, 3), 32, 48),
    ]
    assert found_in([[1, 2], [3, 4]]) == []
    assert found_in([[1, 2], [1, 2]]) == [((0, 1), 0, 32)]


def test_only_what_pays_is_shared():
    paths = [[1, 2, 3], [1, 2, 4], [1], [1, 2, 3, 6]]
    # One page of all four is too little, two of three of them are not.
    assert found_in(paths, min_keys=32) == [((0, 1, 3), 0, 32)]
    assert found_in(paths, min_keys=48) == [((0, 3), 0, 48)]
    assert found_in(paths, min_rows=4) == [((0, 1, 2, 3), 0, 16)]
    assert found_in(paths, levels=1) == [((0, 1, 2, 3), 0, 16)]
    assert found_in(paths, min_keys=80) == []


@given(data=st.data())
@settings(max_examples=60)
def test_what_is_found_can_be_planned(data):
    num = data.draw(st.integers(1, 8))
    paths: list[list[int]] = []
    for request in range(num):
        head: list[int] = []
        if paths:
            other = data.draw(st.sampled_from(paths))
            head = other[: data.draw(st.integers(0, len(other)))]
        own = data.draw(st.integers(0, 3))
        paths.append([*head, *range(100 * request + 1, 100 * request + 1 + own)])
    q_len, table = np.ones(num, np.int64), shared_tables(paths)
    levels = data.draw(st.integers(0, 3))
    limits = {"min_rows": data.draw(st.integers(1, 4)), "min_keys": 16, "levels": levels}
    shared = find_shared_prefixes(q_len, table, page_size=16, group=1, **limits)
    spec = spec_for(q_len, table.kv_len, cascade_levels=max(levels, 1), kv_heads=4)
    plan = make_plan(spec, q_len, table, shared=shared)
    check_covers(plan)
    check_merges(plan)
    assert bool(shared) == bool(plan.num_prefixes)
