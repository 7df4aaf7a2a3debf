"""Tokens to experts and back on eight devices of a CPU, against float64 and a count by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.core.errors import CapacityError, ConfigError
from jaxserve.sharding.eplb import Layout, choose_slots, even_placement, place
from jaxserve.sharding.flash import CostModel, plan
from jaxserve.sharding.flash.copies import choose_copies, mixed, slot_table
from jaxserve.sharding.flash.errors import RowsError
from jaxserve.sharding.flash.moe import moe_combine, moe_dispatch, moe_place
from jaxserve.sharding.flash.stages import num_permutes, plan_on_host, stages_of

TOKENS, HIDDEN, EXPERTS, TOP_K = 6, 4, 16, 3
RULES = {  # of each way: what is given to moe_dispatch
    "dense": {"backend": "dense"},
    "rotation": {"backend": "rotation", "quantum": 2},
    "ppermute": {"backend": "ppermute", "quantum": 3},
    "in flight": {"backend": "ppermute", "quantum": 2, "in_flight": 2},
}


@functools.cache
def make_mesh(n, m):
    return Mesh(np.array(jax.devices()[: n * m]).reshape(n, m), ("server", "gpu"))


@functools.cache
def compiled(n, m, way, dtype="float32", *, table=False, is_everywhere=False, **options):
    """Compile a dispatch, a product of each expert, and a combine.

    If tokens are everywhere, nothing is dispatched.
    """
    mesh = make_mesh(n, m)
    over = NamedSharding(mesh, PartitionSpec(("server", "gpu")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    options = {**RULES[way], **options}
    num_slots = 24 if table else EXPERTS

    def call(x, experts, weights, kernels, stages, placement):
        shared = {"mesh": mesh, "num_experts": EXPERTS, "num_slots": num_slots} | options
        if is_everywhere:
            state = moe_place(x, experts, weights, placement=placement, **shared)
        else:
            state = moe_dispatch(x, experts, weights, stages=stages, placement=placement, **shared)

        def apply(rows, sizes, kernels):
            return jax.lax.ragged_dot(rows, kernels, sizes[0], preferred_element_type=jnp.float32)

        spec = PartitionSpec(("server", "gpu"))
        y = jax.shard_map(apply, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(
            state.rows.astype(jnp.float32), state.group_sizes, kernels
        )
        return moe_combine(y.astype(x.dtype), state), state

    tokens = everywhere if is_everywhere else over
    over_all = (tokens, tokens, tokens, over, everywhere, everywhere)
    return jax.jit(call, in_shardings=over_all)


def routing(seed, kind, size):
    rng = np.random.default_rng(seed)
    count = size * TOKENS
    scores = rng.random((count, EXPERTS))
    if kind == "hot":
        scores[:, 5] += 1
        scores[:, 6] += rng.random(count)
    elif kind == "one server":
        scores[:, : TOP_K + 1] += 2
    experts = np.argsort(-scores, axis=1)[:, :TOP_K].astype(np.int32)
    if kind == "padding":
        experts[rng.random(count) < 0.4] = -1
    elif kind == "none":
        experts[:] = -1
    x = rng.normal(size=(count, HIDDEN)).astype(np.float32)
    weights = rng.random((count, TOP_K)).astype(np.float32)
    kernels = rng.normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype(np.float32)
    return x, experts, weights, kernels


def expected(x, experts, weights, kernels):
    found = np.zeros(x.shape)
    for t, k in np.argwhere(experts >= 0):
        row = x[t].astype(np.float64) @ kernels[experts[t, k]].astype(np.float64)
        found[t] += row * np.float64(weights[t, k])
    return found


def rows_on_wire(experts, n, m, *, dedup):
    """Count by hand."""
    found = np.zeros((n, n), int)
    for t, row in enumerate(experts):
        homes = [e // (EXPERTS // n) for e in row if e >= 0]
        for j in set(homes) if dedup else homes:
            found[t // (TOKENS * m), j] += 1
    return found


KINDS = st.sampled_from(["any", "hot", "one server", "padding", "none"])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("n", "m", "way", "dedup"),
    [
        (4, 2, "dense", True),
        (4, 2, "rotation", True),
        (4, 2, "ppermute", True),
        (4, 2, "ppermute", False),
        pytest.param(4, 2, "dense", False, marks=SLOW),
        pytest.param(4, 2, "rotation", False, marks=SLOW),
        pytest.param(2, 4, "in flight", True, marks=SLOW),
        pytest.param(2, 4, "in flight", False, marks=SLOW),
        pytest.param(8, 1, "rotation", True, marks=SLOW),
        pytest.param(8, 1, "rotation", False, marks=SLOW),
    ],
)
@given(seed=st.integers(0, 2**31), kind=KINDS)
@settings(max_examples=8)
def test_experts_get_their_rows_and_tokens_the_sum(n, m, way, dedup, seed, kind):
    arguments = routing(seed, kind, n * m)
    x, experts = arguments[:2]
    y, state = compiled(n, m, way, dedup=dedup)(*arguments, None, None)
    assert not state.overflow
    assert np.array_equal(state.wire_rows, rows_on_wire(experts, n, m, dedup=dedup))
    per_gpu = EXPERTS // (n * m)
    sizes = np.asarray(state.group_sizes)
    assert np.array_equal(sizes.reshape(-1), np.bincount(experts[experts >= 0], minlength=EXPERTS))
    rows = np.asarray(state.rows).reshape(n * m, -1, HIDDEN)
    for gpu in range(n * m):
        ends = np.cumsum(sizes[gpu])
        for slot, (low, high) in enumerate(zip(ends - sizes[gpu], ends, strict=True)):
            wanted = x[(experts == gpu * per_gpu + slot).any(axis=1)]
            assert sorted(map(bytes, rows[gpu, low:high])) == sorted(map(bytes, wanted))
        assert not rows[gpu, ends[-1] :].any()
    # Products of four, and sums of three, of numbers of about one, in float32.
    np.testing.assert_allclose(y, expected(*arguments), rtol=2e-5, atol=2e-5)


@given(seed=st.integers(0, 2**31), kind=KINDS)
@settings(max_examples=8)
def test_all_ways_return_the_same_bits(seed, kind):
    arguments = routing(seed, kind, 8)
    dense, state = compiled(4, 2, "dense")(*arguments, None, None)
    cost = CostModel(gpus=2)
    exact = plan(np.asarray(state.wire_rows, np.int64), cost)
    stale = plan(np.random.default_rng(seed).integers(0, 9, (4, 4)), cost)
    for way in ("rotation", "ppermute"):
        y, _ = compiled(4, 2, way)(*arguments, None, None)
        assert np.array_equal(np.asarray(y).view(np.uint32), np.asarray(dense).view(np.uint32))
    for planned in (exact, stale):
        y, _ = compiled(4, 2, "ppermute")(*arguments, stages_of(planned, 12), None)
        assert np.array_equal(np.asarray(y).view(np.uint32), np.asarray(dense).view(np.uint32))


@pytest.mark.parametrize(
    ("way", "dedup", "table"),
    [
        ("ppermute", True, True),
        pytest.param("dense", True, False, marks=SLOW),
        pytest.param("rotation", False, True, marks=SLOW),
    ],
)
@given(seed=st.integers(0, 2**31), kind=KINDS)
@settings(max_examples=6)
def test_tokens_that_are_everywhere_are_where_they_would_be_sent(way, dedup, table, seed, kind):
    x, experts, weights, kernels = routing(seed, kind, 8)
    placed = None
    if table:
        layout = Layout(num_experts=EXPERTS, num_devices=8, num_slots=24, num_servers=4)
        where = place(np.bincount(experts[experts >= 0], minlength=EXPERTS).astype(float), layout)
        placed, kernels = slot_table(where), kernels[where.expert]
    found, wanted = (
        compiled(4, 2, way, table=table, dedup=dedup, is_everywhere=is_everywhere)(
            x, experts, weights, kernels, None, placed
        )
        for is_everywhere in (True, False)
    )
    assert np.array_equal(
        np.asarray(found[0]).view(np.uint32), np.asarray(wanted[0]).view(np.uint32)
    )
    assert not found[1].overflow
    for name in ("rows", "group_sizes", "wire_rows", "place", "number"):
        assert np.array_equal(getattr(found[1], name), getattr(wanted[1], name)), name


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=SLOW)])
def test_short_numbers_travel_as_they_are(dtype):
    x, experts, weights, kernels = routing(3, "any", 8)
    short = jnp.asarray(x, dtype)
    arguments = (short, experts, weights, kernels)
    y, state = compiled(4, 2, "ppermute", dtype)(*arguments, None, None)
    assert y.dtype == state.rows.dtype == jnp.dtype(dtype)
    wanted = expected(np.asarray(short, np.float32), experts, weights, kernels)
    # Results, and sums of servers, are rounded to eight bits at least.
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=3e-2, atol=6e-2)
    other, _ = compiled(4, 2, "dense", dtype)(*arguments, None, None)
    assert np.array_equal(np.asarray(other).view(np.uint16), np.asarray(y).view(np.uint16))


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["any", "hot", "padding"]))
@settings(max_examples=8)
def test_copies_of_experts_share_the_work(seed, kind):
    x, experts, weights, kernels = routing(seed, kind, 8)
    layout = Layout(num_experts=EXPERTS, num_devices=8, num_slots=24, num_servers=4)
    loads = np.bincount(experts[experts >= 0], minlength=EXPERTS).astype(float)
    where = place(loads, layout)
    numbers = np.arange(len(x))
    slots = np.asarray(
        choose_copies(
            slot_table(where), jnp.asarray(experts), jnp.asarray(numbers), slots_per_server=6,
            servers=4,
        )
    )  # fmt: skip
    is_one = experts[:, 0] >= 0
    assert np.array_equal(slots[is_one], choose_slots(where, experts[is_one], numbers[is_one]))
    assert (slots[~is_one] == -1).all()
    y, state = compiled(4, 2, "ppermute", table=True)(
        x, experts, weights, kernels[where.expert], None, slot_table(where)
    )
    assert np.array_equal(
        np.asarray(state.group_sizes).reshape(-1), np.bincount(slots[slots >= 0], minlength=24)
    )
    wanted = expected(x, experts, weights, kernels)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5)


def test_products_of_the_hash_are_exact():
    numbers = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint64)
    wanted = numbers * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(33)
    assert np.array_equal(mixed(jnp.asarray(numbers.astype(np.uint32))), wanted)


def test_shapes_of_a_table_do_not_depend_on_loads():
    layout = Layout(num_experts=EXPERTS, num_devices=8, num_slots=24, num_servers=4)
    skewed = slot_table(place(np.arange(EXPERTS) ** 3.0, layout))
    assert skewed.slots.shape == slot_table(even_placement(layout)).slots.shape


@pytest.mark.parametrize("kind", ["hot", "one server"])
def test_too_many_rows_are_told_and_the_dense_way_has_room(kind):
    arguments = routing(1, kind, 8)
    _, state = compiled(4, 2, "ppermute", capacity_factor=1.0)(*arguments, None, None)
    assert state.overflow
    with pytest.raises(RowsError, match=r"more than the \d+ places of a rail or the \d+ of a GPU"):
        state.check()
    with pytest.raises(CapacityError, match="raise capacity_factor, or set it to None"):
        state.check()
    y, state = compiled(4, 2, "dense")(*arguments, None, None)
    np.testing.assert_allclose(y, expected(*arguments), rtol=2e-5, atol=2e-5)
    assert state.check() is state


@given(seed=st.integers(0, 2**31), kind=KINDS)
@settings(max_examples=8)
def test_nothing_is_missing_where_nothing_is_told(seed, kind):
    arguments = routing(seed, kind, 8)
    y, state = compiled(4, 2, "ppermute", capacity_factor=1.0)(*arguments, None, None)
    rows = np.asarray(state.wire_rows)
    experts = arguments[1]
    per_gpu = np.bincount(experts[experts >= 0] // 2, minlength=8)
    is_over = (-(-rows // 2) > state.places.wire).any() or per_gpu.max() > state.places.rows
    assert bool(state.overflow) == is_over
    if not state.overflow:
        np.testing.assert_allclose(y, expected(*arguments), rtol=2e-5, atol=2e-5)


def collectives_of(jaxpr):
    """Walk a jaxpr: name, axes, and shape and dtype of each collective's result."""
    for equation in jaxpr.eqns:
        axes = equation.params.get("axis_name", equation.params.get("axes"))
        name = equation.primitive.name
        if axes is not None and name != "axis_index":
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            yield name, axes, equation.outvars[0].aval
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from collectives_of(inner)


@pytest.mark.parametrize(("n", "m", "way"), [(4, 2, "ppermute"), (4, 2, "rotation")])
def test_what_is_compiled(n, m, way):
    arguments = routing(0, "any", n * m)
    call = compiled(n, m, way)
    text = call.lower(*arguments, None, None).compile().as_text()
    permutes = re.findall(r" collective-permute(?:-start)?\(", text)
    assert len(permutes) == 2 * num_permutes(RULES[way]["backend"], n)  # there, and back
    assert not re.search(r" (ragged-)?all-to-all(-start)?\(", text)
    # Over servers go messages, and once n numbers of each.
    across = [
        (name, aval)
        for name, axes, aval in collectives_of(jax.make_jaxpr(call)(*arguments, None, None).jaxpr)
        if "server" in axes and name != "ppermute"
    ]
    assert ("all_gather", (n, n), "int32") in [(k, a.shape, str(a.dtype)) for k, a in across]
    assert all(a.size <= n * n and a.dtype != x.dtype for x in arguments[:1] for _, a in across)


def test_the_host_is_asked_for_a_plan():
    counts = np.random.default_rng(0).integers(0, 50, (4, 4))
    np.fill_diagonal(counts, 0)
    cost = CostModel(gpus=2)
    ask = jax.jit(functools.partial(plan_on_host, gpus=2, cost=cost, most=12))
    found, wanted = ask(jnp.asarray(counts, jnp.int32)), stages_of(plan(counts, cost), 12)
    assert np.array_equal(found.perms, wanted.perms)
    assert np.array_equal(found.rows, wanted.rows)
    with pytest.raises(ConfigError, match="most must be at least 1 stage, got 0"):
        plan_on_host(jnp.asarray(counts, jnp.int32), gpus=2, cost=cost, most=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": np.zeros((48, 2, 2), np.int32)}, r"experts and weights \[tokens, top_k\]"),
        ({"weights": np.zeros((48, 2), np.float32)}, r"as many weights as experts, got \(48, 3\)"),
        ({"num_experts": 12}, "num_slots must be a multiple of 8 GPUs and at least num_experts=12"),
        ({"num_slots": 24}, "24 slots for 16 experts need a placement; make one by"),
        ({"capacity_factor": -1.0}, "capacity_factor must be finite and above 0, got -1.0"),
        ({"in_flight": 9}, "in_flight must be 1 to 4 messages, got 9"),
        ({"backend": "ragged"}, "backend='ragged' needs devices for which XLA has a ragged"),
    ],
)
def test_what_is_refused(change, message):
    x, experts, weights, _ = routing(0, "any", 8)
    arguments = {"x": x, "experts": experts, "weights": weights, "num_experts": EXPERTS} | change
    x, experts, weights = (arguments.pop(name) for name in ("x", "experts", "weights"))
    with pytest.raises(ConfigError, match=message):
        moe_dispatch(x, experts, weights, mesh=make_mesh(4, 2), **arguments)


def test_results_that_do_not_fit_are_refused():
    arguments = routing(0, "any", 8)
    _, state = compiled(4, 2, "dense")(*arguments, None, None)
    with pytest.raises(ConfigError, match=r"one result for each of state.rows, got \(8, 4\)"):
        moe_combine(jnp.zeros((8, 4)), state)
