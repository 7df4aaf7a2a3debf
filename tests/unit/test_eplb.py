"""Placement of experts: laws over random loads, against brute force where it is small."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.eplb import (
    Layout,
    LoadBalancer,
    Placement,
    aligned,
    choose_slots,
    count_copies,
    even_placement,
    pack,
    place,
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    servers = draw(st.sampled_from([1, 2, 4]))
    devices = servers * draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 4]))
    per_device = draw(st.integers(1, 6))
    slots = devices * per_device
    most = slots // groups
    least = max(1, -(-slots // (devices * groups)))
    if most < least:
        groups, most, least = 1, slots, max(1, per_device)
    experts = groups * draw(st.integers(least, most))
    return Layout(
        num_experts=experts,
        num_devices=devices,
        num_slots=slots,
        num_servers=servers,
        num_groups=groups,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, np.ndarray]:
    layout = draw(layouts())
    loads = draw(
        st.lists(st.integers(0, 1000), min_size=layout.num_experts, max_size=layout.num_experts)
    )
    return layout, np.array(loads, np.float64)


@given(cases())
def test_every_expert_has_a_place_and_every_slot_an_expert(case) -> None:
    layout, loads = case
    placement = place(loads, layout)
    assert placement.expert.shape == (layout.num_slots,)
    assert placement.copies.min() >= 1
    assert placement.copies.max() <= layout.num_devices
    assert placement.device_loads(loads).sum() == pytest.approx(loads.sum())
    assert placement.imbalance(loads) >= 1 - 1e-12
    for expert in range(layout.num_experts):
        found = placement.slots[expert]
        assert (placement.expert[found[found >= 0]] == expert).all()
        assert (found >= 0).sum() == placement.copies[expert]


@given(cases())
def test_groups_stay_on_one_server(case) -> None:
    layout, loads = case
    placement = place(loads, layout)
    if not layout.keeps_groups:
        return
    group = placement.expert // (layout.num_experts // layout.num_groups)
    server = placement.server_of(np.arange(layout.num_slots))
    for number in range(layout.num_groups):
        assert len(set(server[group == number])) == 1


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 4), st.integers(2, 4))
def test_copies_make_the_largest_share_as_small_as_it_can_be(loads, spare, most) -> None:
    slots = min(len(loads) + spare, len(loads) * most)
    found = count_copies(np.array(loads, np.float64), slots, most=most)
    assert found.sum() == slots
    assert found.min() >= 1
    assert found.max() <= most
    best = min(
        max(load / count for load, count in zip(loads, counts, strict=True))
        for counts in itertools.product(range(1, most + 1), repeat=len(loads))
        if sum(counts) == slots
    )
    assert (np.array(loads) / found).max() == pytest.approx(best)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=8), st.integers(1, 3))
def test_bins_hold_equally_many_and_nearly_equal_weight(weights, bins) -> None:
    weights = np.array(weights[: max(bins, len(weights) // bins * bins)], np.float64)
    weights = np.resize(weights, -(-len(weights) // bins) * bins)
    found, room = pack(weights, bins), len(weights) // bins
    assert sorted(i for held in found for i in held) == list(range(len(weights)))
    assert {len(held) for held in found} == {room}
    best = min(
        max(weights[list(order[i * room : (i + 1) * room])].sum() for i in range(bins))
        for order in _splits(tuple(range(len(weights))), room)
    )
    heaviest = max(weights[held].sum() for held in found)
    assert best <= heaviest <= 4 / 3 * best


def _splits(items: tuple[int, ...], room: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to fill bins, one order of each."""
    if not items:
        yield ()
        return
    for rest in itertools.combinations(items[1:], room - 1):
        held = (items[0], *rest)
        for more in _splits(tuple(i for i in items if i not in held), room):
            yield held + more


def test_two_copies_halve_the_load_of_a_hot_expert() -> None:
    layout = Layout(num_experts=4, num_devices=2, num_slots=6)
    placement = place(np.array([60.0, 20, 10, 10]), layout)
    assert placement.copies.tolist() == [2, 2, 1, 1]
    np.testing.assert_allclose(placement.device_loads(np.array([60.0, 20, 10, 10])), [50, 50])
    for device in placement.expert.reshape(2, 3):
        assert len(set(device)) == 3


def test_redundant_experts_lower_the_skew_of_zipf_loads() -> None:
    rng = np.random.default_rng(5)
    loads = rng.permutation(1 / np.arange(1, 129) ** 1.2)
    plain = Layout(num_experts=128, num_devices=16, num_slots=128)
    spare = Layout(num_experts=128, num_devices=16, num_slots=160)
    in_order = Placement(layout=plain, expert=np.arange(128))
    packed, copied = place(loads, plain), place(loads, spare)
    assert packed.imbalance(loads) < in_order.imbalance(loads)
    assert copied.imbalance(loads) < 1.05 < packed.imbalance(loads)


@given(cases(), st.randoms(use_true_random=False))
def test_alignment_moves_fewer_and_changes_no_load(case, random) -> None:
    layout, loads = case
    old = place(np.array([random.random() for _ in loads]), layout)
    new = place(loads, layout)
    moved = aligned(new, old)
    assert sorted(moved.device_loads(loads)) == pytest.approx(sorted(new.device_loads(loads)))
    np.testing.assert_array_equal(moved.copies, new.copies)
    np.testing.assert_array_equal(aligned(old, old).expert, old.expert)
    assert (moved.expert != old.expert).sum() <= layout.num_slots
    per_server = layout.num_slots // layout.num_servers
    for first in range(0, layout.num_slots, per_server):
        part = slice(first, first + per_server)
        assert sorted(moved.expert[part]) == sorted(new.expert[part])


@given(cases(), st.integers(1, 4), st.integers(0, 2**31))
def test_tokens_go_to_copies_of_their_experts(case, top_k, seed) -> None:
    layout, loads = case
    placement, rng = place(loads, layout), np.random.default_rng(seed)
    top_k = min(top_k, layout.num_experts)
    experts = np.stack([rng.permutation(layout.num_experts)[:top_k] for _ in range(20)])
    tokens = rng.integers(0, 2**40, 20)
    slots = choose_slots(placement, experts, tokens)
    np.testing.assert_array_equal(placement.expert[slots], experts)
    alone = choose_slots(placement, experts[7:8], tokens[7:8])
    np.testing.assert_array_equal(alone[0], slots[7])
    fixed = placement.copies[experts] == 1
    servers = placement.server_of(slots)
    for token in range(20):
        sure = set(servers[token][fixed[token]])
        for column in np.flatnonzero(~fixed[token]):
            options = placement.slots[experts[token, column]]
            near = set(placement.server_of(options[options >= 0])) & sure
            if near:
                assert servers[token, column] in set(servers[token, :column]) | sure


def test_copies_share_tokens_evenly() -> None:
    layout = Layout(num_experts=2, num_devices=4, num_slots=4)
    placement = place(np.array([3.0, 1.0]), layout)
    assert placement.copies.tolist() == [3, 1]
    slots = choose_slots(placement, np.zeros((3000, 1), np.int64), np.arange(3000))
    counts = np.bincount(slots[:, 0], minlength=4)[placement.slots[0]]
    assert counts.min() > 900


def test_loads_are_a_mean_in_which_recent_steps_count_more() -> None:
    layout = Layout(num_experts=3, num_devices=1, num_slots=3)
    balancer = LoadBalancer(layout, memory=0.75)
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 50, (9, 3))
    for row in counts:
        balancer.observe(row)
    weights = 0.75 ** np.arange(9)[::-1]
    np.testing.assert_allclose(balancer.loads, weights @ counts / weights.sum())


def test_experts_move_when_it_pays_and_only_then() -> None:
    layout = Layout(num_experts=8, num_devices=4, num_slots=8)
    balancer = LoadBalancer(layout, memory=0.5, period=10, gain=0.05)
    even = np.full(8, 10)
    assert all(balancer.observe(even) is None for _ in range(30))
    first = balancer.placement
    pair = first.expert[:2]
    skewed = np.full(8, 10)
    skewed[pair] = 40
    answers = [balancer.observe(skewed) for _ in range(10)]
    assert all(answer is None for answer in answers[:9])
    assert answers[9] is balancer.placement
    assert answers[9].imbalance(balancer.loads) < first.imbalance(balancer.loads) * 0.95
    assert all(balancer.observe(skewed) is None for _ in range(20))


def test_the_first_placement_is_even() -> None:
    layout = Layout(num_experts=6, num_devices=2, num_slots=8)
    placement = even_placement(layout)
    assert placement.copies.tolist() == [2, 2, 1, 1, 1, 1]
    assert even_placement(layout).expert.tolist() == placement.expert.tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_slots": 4}, "4 slots cannot hold 8 experts; add 4 redundant"),
        ({"num_slots": 9}, "num_slots must be a multiple of num_devices"),
        ({"num_devices": 4, "num_servers": 3}, "num_devices must be a multiple of num_servers"),
        ({"num_groups": 3}, "num_experts must be a multiple of num_groups"),
        ({"num_slots": 32}, "take fewer redundant experts"),
        ({"num_devices": 0}, "num_devices must be at least 1"),
    ],
)
def test_layouts_that_cannot_be_are_named(changes, words) -> None:
    fields = {"num_experts": 8, "num_devices": 2, "num_slots": 8} | changes
    with pytest.raises(ConfigError, match=words):
        Layout(**fields)


@pytest.mark.parametrize("loads", [[1.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0]])
def test_loads_that_cannot_be_are_named(loads) -> None:
    layout = Layout(num_experts=2, num_devices=1, num_slots=2)
    with pytest.raises(ConfigError, match="loads"):
        place(np.array(loads), layout)


@pytest.mark.parametrize("changes", [{"memory": 1.0}, {"period": 0}, {"gain": -0.1}])
def test_settings_of_the_balancer_are_checked(changes) -> None:
    layout = Layout(num_experts=2, num_devices=1, num_slots=2)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        LoadBalancer(layout, **changes)
