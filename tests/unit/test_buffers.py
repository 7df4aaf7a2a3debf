import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cache import buffers

ROWS, HEADS, CAPACITY, PAGE, DIM, PAGES, LAYERS = 3, 2, 300, 8, 4, 12, 2
MOVES = 6

save = jax.jit(buffers.save_pages)
load = jax.jit(buffers.load_pages)
move = jax.jit(buffers.move_row)


def draw(seed, *shape):
    random = np.random.default_rng(seed)
    return tuple(
        tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(2))
        for _ in range(LAYERS)
    )


def slots(seed=0):
    return draw(seed, ROWS, HEADS, CAPACITY, DIM)


def pages(seed=1):
    return draw(seed, PAGES + 1, HEADS, PAGE, DIM)


def leaves(tree):
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(tree)]


def columns(moves):
    padded = np.zeros((3, MOVES), np.int32)
    padded[:, : len(moves)] = np.asarray(moves, np.int32).reshape(-1, 3).T
    return jnp.int32(len(moves)), *map(jnp.asarray, padded)


MOVE = st.tuples(
    st.integers(0, ROWS - 1), st.integers(0, CAPACITY // PAGE - 1), st.integers(1, PAGES)
)
MOVE_LISTS = st.lists(MOVE, max_size=MOVES)


@given(MOVE_LISTS)
@settings(max_examples=50)
def test_saving_copies_the_parts_and_nothing_else(moves):
    wanted = leaves(pages())
    for row, block, page in moves:
        for target, source in zip(wanted, leaves(slots()), strict=True):
            target[page] = source[row, :, block * PAGE : (block + 1) * PAGE]
    got = save(pages(), slots(), *columns(moves))
    for one, two in zip(leaves(got), wanted, strict=True):
        np.testing.assert_array_equal(one, two)


@given(MOVE_LISTS)
@settings(max_examples=50)
def test_loading_copies_the_parts_and_nothing_else(moves):
    wanted = leaves(slots())
    for row, block, page in moves:
        for target, source in zip(wanted, leaves(pages()), strict=True):
            target[row, :, block * PAGE : (block + 1) * PAGE] = source[page]
    got = load(slots(), pages(), *columns(moves))
    for one, two in zip(leaves(got), wanted, strict=True):
        np.testing.assert_array_equal(one, two)


@given(st.lists(MOVE, max_size=MOVES, unique_by=(lambda m: m[2], lambda m: m[:2])))
@settings(max_examples=30)
def test_what_is_saved_can_be_loaded_back(moves):
    store = save(pages(), slots(), *columns(moves))
    got = load(slots(seed=9), store, *columns(moves))
    for one, two in zip(leaves(got), leaves(slots()), strict=True):
        for row, block, _page in moves:
            part = np.s_[row, :, block * PAGE : (block + 1) * PAGE]
            np.testing.assert_array_equal(one[part], two[part])


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 256, 257, 299, 300])
def test_a_moved_row_keeps_its_tokens_and_leaves_the_others_alone(length):
    got = move(slots(), jnp.int32(2), jnp.int32(0), jnp.int32(length))
    for new, old in zip(leaves(got), leaves(slots()), strict=True):
        np.testing.assert_array_equal(new[0, :, :length], old[2, :, :length])
        np.testing.assert_array_equal(new[1:], old[1:])


def test_without_slots_there_is_nothing_to_move():
    assert buffers.move_row((), jnp.int32(0), jnp.int32(1), jnp.int32(5)) == ()


@given(st.integers(1, 5000), st.integers(1, 256), st.sampled_from([1, 16, 128, 256]))
def test_slots_have_room_for_a_block_behind_the_longest_sequence(length, q_block, kv_tile):
    capacity = buffers.slot_capacity(length, q_block, kv_tile)
    assert capacity % kv_tile == 0
    assert length + q_block + 1 <= capacity <= length + q_block + kv_tile


def test_fresh_buffers_are_zero_and_separate():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = buffers.allocate(LAYERS, (2, HEADS, 16, DIM), jnp.dtype("bfloat16"), sharding)
    assert len(made) == LAYERS
    found = jax.tree.leaves(made)
    assert all(leaf.dtype == jnp.bfloat16 and not leaf.any() for leaf in found)
    assert len({leaf.unsafe_buffer_pointer() for leaf in found}) == 2 * LAYERS
