import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.sampler import MAX_BANNED
from jaxserve.engine.shapes import (
    FLAGS,
    FLOAT_FIELDS,
    PackedStep,
    ShapeTable,
    StepShape,
    packed_size,
    unpack,
)


def build(**settings):
    defaults = {
        "max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 1000, "page_size": 16,
        "use_pages": False, "q_block": 128, "kv_tile": 256, "batch_invariant": False,
    }  # fmt: skip
    return ShapeTable.build(**defaults | settings)


SIZES = {
    "max_num_seqs": st.integers(1, 300),
    "max_num_batched_tokens": st.integers(1, 9000),
    "use_pages": st.booleans(),
    "batch_invariant": st.booleans(),
    "min_rows": st.sampled_from([1, 4]),
}


@given(st.fixed_dictionaries(SIZES), st.data())
@settings(max_examples=200)
def test_every_step_fits_into_one_of_the_listed_shapes(sizes, data):
    table = build(**sizes)
    rows = data.draw(st.integers(1, sizes["max_num_seqs"]))
    prefill = data.draw(st.integers(0, sizes["max_num_batched_tokens"]))
    shape = table.shape(rows=rows, prefill=prefill)
    assert shape in table.all_shapes()
    assert shape.rows >= rows
    assert shape.prefill >= prefill
    assert (shape.prefill == 0) == (prefill == 0)
    assert shape.rows <= sizes["max_num_seqs"]
    assert shape.prefill <= sizes["max_num_batched_tokens"]
    fitting = [
        s for s in table.all_shapes()
        if s.rows >= rows and s.prefill >= prefill and bool(s.prefill) == bool(prefill)
    ]  # fmt: skip
    assert shape.num_tokens == min(s.num_tokens for s in fitting)


@given(st.fixed_dictionaries(SIZES))
def test_there_are_few_shapes_and_none_twice(sizes):
    shapes = build(**sizes).all_shapes()
    assert len(set(shapes)) == len(shapes)
    assert len(shapes) <= 45
    if sizes["batch_invariant"]:
        assert len(shapes) == 2


@given(st.fixed_dictionaries(SIZES), st.data())
def test_blocks_of_any_mixture_of_prefills_fit(sizes, data):
    table = build(**sizes)
    lengths: list[int] = []
    for _ in range(data.draw(st.integers(1, min(8, sizes["max_num_seqs"])))):
        left = sizes["max_num_batched_tokens"] - sum(lengths)
        if left:
            lengths.append(data.draw(st.integers(1, left)))
    shape = table.shape(rows=len(lengths), prefill=sum(lengths))
    assert sum(-(-length // shape.q_block) for length in lengths) <= shape.num_blocks


@pytest.mark.parametrize(("page_size", "kv_tile"), [(16, 256), (8, 128), (1, 7)])
def test_page_tables_are_whole_tiles_and_cover_the_longest_sequence(page_size, kv_tile):
    table = build(use_pages=True, page_size=page_size, kv_tile=kv_tile)
    assert table.pages_per_row * page_size >= 1000
    assert table.pages_per_row * page_size % kv_tile == 0
    assert build().pages_per_row == 0


def test_more_than_the_limits_is_a_mistake_of_the_engine():
    with pytest.raises(AssertionError, match="17 exceeds every bucket"):
        build().shape(rows=17, prefill=0)


@given(
    st.integers(1, 9),
    st.sampled_from([0, 1, 32, 200]),
    st.sampled_from([0, 3]),
    st.integers(0, 2**32),
)
@settings(max_examples=10)
def test_what_is_packed_is_unpacked(rows, prefill, pages_per_row, seed):
    shape = StepShape(rows=rows, prefill=prefill, q_block=128, pages_per_row=pages_per_row)
    packed = PackedStep(shape)
    assert packed.buffer.shape == (packed_size(shape),)
    random = np.random.default_rng(seed)
    wanted = {}
    for name, part in packed.fields.items():
        if name in FLOAT_FIELDS:
            part[...] = random.standard_normal(part.shape)
        elif name in FLAGS:
            part[...] = random.integers(0, 2, part.shape)
        else:
            part[...] = random.integers(-(2**31), 2**31, part.shape)
        wanted[name] = part.copy()
    got = unpack(jax.device_put(packed.buffer), shape)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        kinds = {"seed": value.view(np.uint32)} | dict.fromkeys(FLAGS, value.astype(bool))
        np.testing.assert_array_equal(got[name], kinds.get(name, value))
    assert got["banned"].shape == (rows, MAX_BANNED)
