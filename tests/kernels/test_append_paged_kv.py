import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels.append_paged_kv import (
    append_paged_kv,
    kv_scale,
    rope_append_paged_kv,
    token_slots,
)
from jaxserve.pallas_kernels.append_paged_kv.reference import narrow
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.rope import rope, rope_tables

PAGE = 4


def make_cache(dtype="float32", pages=6, heads=2, dim=8, v_dim=6, **scales):
    k = jnp.zeros((pages, heads, PAGE, dim), dtype)
    return PagedKV(k=k, v=jnp.zeros((pages, heads, PAGE, v_dim), dtype), **scales)


def new_tokens(count, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(count, 2, 8)), rng.normal(size=(count, 2, 6))
    return jnp.asarray(k, dtype), jnp.asarray(v, dtype)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    before=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_a_request_read_through_its_pages_is_what_was_appended(lengths, before, seed):
    rng = np.random.default_rng(seed)
    used = [-(-(before + n) // PAGE) for n in lengths]
    pages = 1 + rng.permutation(sum(used))
    rows = np.zeros((len(lengths), max(used) or 1), np.int32)
    for row, at, n in zip(rows, np.cumsum([0, *used]), used, strict=False):
        row[:n] = pages[at : at + n]
    table = PageTable.from_rows(rows, np.array(lengths) + before, PAGE)
    request = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([before + np.arange(n) for n in lengths])
    # As much room always, for one program.
    padded = np.full(40, -1, np.int32)
    padded[: request.size] = request
    indptr = np.pad(table.indptr, (0, 5 - table.indptr.size), mode="edge")
    slots = token_slots(
        jnp.asarray(padded),
        jnp.asarray(np.pad(position, (0, 40 - position.size), constant_values=3), jnp.int32),
        jnp.asarray(indptr),
        jnp.asarray(np.pad(table.indices, (0, 21 - table.indices.size))),
        page_size=PAGE,
    )
    cache = make_cache(pages=21)
    k, v = new_tokens(len(padded), seed)
    got = append_paged_kv(cache, k, v, slots, backend="xla")
    for pool, new in ((got.k, k), (got.v, v)):
        for index, n in enumerate(lengths):
            mine = np.asarray(pool)[rows[index]].swapaxes(1, 2)
            mine = mine.reshape(-1, *mine.shape[2:])[before : before + n]
            np.testing.assert_array_equal(mine, np.asarray(new)[padded == index])
        assert not np.asarray(pool)[0].any()  # padding wrote nowhere


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_narrow_caches_lose_no_more_than_their_step(dtype):
    k, v = new_tokens(12, seed=3)
    cache = make_cache(dtype, k_scale=kv_scale(k, dtype), v_scale=kv_scale(v, dtype, headroom=2.0))
    got = append_paged_kv(cache, k, v, jnp.arange(12, dtype=jnp.int32))
    step = {"float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3, "int8": 0.0}[dtype]
    for pool, scale, new in ((got.k, cache.k_scale, k), (got.v, cache.v_scale, v)):
        stored = np.asarray(pool[:3]).astype(np.float64).swapaxes(1, 2).reshape(12, 2, -1)
        back = stored * np.asarray(scale)[None, :, None]
        least = np.asarray(scale)[None, :, None] * (0.50001 if dtype == "int8" else 2.0**-9)
        assert np.all(np.abs(back - np.asarray(new)) <= step * np.abs(np.asarray(new)) + least)


def test_numbers_that_are_too_large_become_the_largest():
    x = jnp.asarray([1e6, -1e6, 447.0, jnp.nan, 0.0])
    assert narrow(x, "float8_e4m3fn").astype("float32").tolist()[:3] == [448.0, -448.0, 448.0]
    assert jnp.isnan(narrow(x, "float8_e4m3fn")[3])
    assert narrow(x, "int8").tolist() == [127, -127, 127, 0, 0]
    assert narrow(x, "float32") is not None


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_append_are_the_two_after_each_other(interleaved):
    k, v = new_tokens(5)
    q = jnp.concatenate([k, k], axis=1)
    tables = rope_tables(jnp.arange(5), jnp.asarray([1.0, 0.1, 0.01]))
    slots = jnp.asarray([3, 9, -1, 0, 1], jnp.int32)
    turned, got = rope_append_paged_kv(
        make_cache(), q, k, v, slots, tables, interleaved=interleaved
    )
    want = append_paged_kv(make_cache(), rope(k, tables, interleaved=interleaved), v, slots)
    np.testing.assert_allclose(turned, rope(q, tables, interleaved=interleaved), atol=1e-6)
    np.testing.assert_allclose(got.k, want.k, atol=1e-6)
    np.testing.assert_array_equal(got.v, want.v)


def test_rotation_is_multiplication_with_complex_numbers():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 3, 10)).astype(np.float32)
    frequency, position = rng.random(4).astype(np.float32), np.array([0, 1, 70_000, 9])
    tables = rope_tables(jnp.asarray(position), jnp.asarray(frequency), magnitude=1.5)
    angle = np.float64(position.astype(np.float32)[:, None] * frequency)
    turn = 1.5 * np.exp(1j * angle)[:, None, :]
    halves = rope(jnp.asarray(x), tables)
    want = (x[..., :4] + 1j * x[..., 4:8]) * turn
    np.testing.assert_allclose(halves[..., :4], want.real, atol=2e-5)
    np.testing.assert_allclose(halves[..., 4:8], want.imag, atol=2e-5)
    neighbours = rope(jnp.asarray(x), tables, interleaved=True)
    want = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * turn
    np.testing.assert_allclose(neighbours[..., 0:8:2], want.real, atol=2e-5)
    np.testing.assert_allclose(neighbours[..., 1:8:2], want.imag, atol=2e-5)
    np.testing.assert_array_equal(halves[..., 8:], x[..., 8:])


def test_bad_input_is_named():
    cache, (k, v) = make_cache(), new_tokens(3)
    slots = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"k must be \[tokens, 2, 8\] .* got \(3, 2, 7\) beside"):
        append_paged_kv(cache, k[..., :7], v, slots)
    with pytest.raises(ValueError, match=r"v must be \[tokens, 2, 6\] .* got \(2, 2, 6\) beside"):
        append_paged_kv(cache, k, v[:2], slots)
    with pytest.raises(ValueError, match=r"one integer per token, \[3\], got float32 \(3,\); tok"):
        append_paged_kv(cache, k, v, slots.astype("float32"))
    with pytest.raises(UnsupportedError, match=r"v must have one of .* got int8; cast it"):
        append_paged_kv(cache, k, v.astype("int8"), slots)
    with pytest.raises(UnsupportedError, match=r"k_scale must be float32, got int32; cast it"):
        append_paged_kv(dataclasses.replace(cache, k_scale=jnp.int32(1)), k, v, slots)
    with pytest.raises(ValueError, match=r"only float8_e4m3fn, .* got 'float32'; leave them out"):
        kv_scale(k, "float32")
    with pytest.raises(ValueError, match=r"headroom must be greater than 0, got 0"):
        kv_scale(k, "int8", headroom=0)
    tables = rope_tables(jnp.arange(3), jnp.ones(5))
    with pytest.raises(ValueError, match=r"5 pairs turn 10 numbers, but a head of q has 8; .* 4"):
        rope_append_paged_kv(cache, k, k, v, slots, tables)
    with pytest.raises(ValueError, match=r"with tokens = 3, got \(2, 4\) and \(2, 4\); rope_table"):
        rope(k, rope_tables(jnp.arange(2), jnp.ones(4)))
