import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.append_paged_kv import append_paged_kv, reference, rope_append_paged_kv
from jaxserve.pallas_kernels.paged import KV_DTYPES, PagedKV
from jaxserve.pallas_kernels.rope import rope, rope_tables
from tests.triton.checks import compile_all, examples, lower_for_cuda, shape, slow

EPSILON = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@st.composite
def appends(draw, dtypes=KV_DTYPES):
    """A cache full of noise, new tokens, and distinct slots for them, some of which are padding."""
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    pages, kv_heads = draw(st.integers(2, 6)), draw(st.sampled_from([1, 2, 3, 7]))
    dim, v_dim = draw(st.sampled_from([(8, 8), (16, 24), (20, 6)]))
    tokens = draw(st.integers(0, min(7, pages * page_size)))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    kv_dtype = draw(st.sampled_from(dtypes))
    axes = draw(st.sampled_from(["none", "one", "head", "page"]))
    shapes = {"one": (), "head": (kv_heads,), "page": (pages, kv_heads)}

    def scale():
        if axes == "none":
            return None
        return jnp.asarray(np.exp(rng.normal(size=shapes[axes])), jnp.float32)

    def pool(width):
        noise = rng.integers(-100, 100, size=(pages, kv_heads, page_size, width))
        return jnp.asarray(noise).astype(kv_dtype)

    cache = PagedKV(k=pool(dim), v=pool(v_dim), k_scale=scale(), v_scale=scale())
    dtype = draw(st.sampled_from(sorted(EPSILON)))
    size = draw(st.sampled_from([1.0, 300.0]))
    k = jnp.asarray(rng.normal(size=(tokens, kv_heads, dim)) * size, dtype)
    v = jnp.asarray(rng.normal(size=(tokens, kv_heads, v_dim)) * size, dtype)
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int32)
    slots[rng.random(tokens) < 0.2] = -1
    return cache, k, v, jnp.asarray(slots)


def expected_pool(pool, new, slots, scale):
    """Write one token after another, in float64, with numpy's conversions."""
    want = np.array(pool)
    page_size = want.shape[2]
    for token, slot in enumerate(np.asarray(slots)):
        if slot < 0:
            continue
        page, offset = divmod(int(slot), page_size)
        row = np.asarray(new[token], np.float32)
        if scale is not None:
            per_page = np.asarray(scale)
            per_head = per_page[page] if per_page.ndim == 2 else per_page
            row = row / np.broadcast_to(per_head, row.shape[:1])[:, None]
        largest = reference.LARGEST.get(want.dtype.name, np.inf)
        row = np.clip(row, -largest, largest)
        want[page, :, offset] = (np.round(row) if want.dtype == np.int8 else row).astype(want.dtype)
    return want


def assert_same(got, want):
    got = np.asarray(got)
    if got.dtype == jnp.bfloat16:  # the interpreter cuts digits off where devices round
        got, want = got.astype(np.float32), want.astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=0)
    else:
        np.testing.assert_array_equal(got, want)


STEP = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3, "float8_e4m3fn": 0.13, "int8": 0.0}
STEP["float8_e5m2"] = 0.26
LEAST = {"int8": 1.0, "float8_e4m3fn": 2.0**-9, "float8_e5m2": 2.0**-16}


def assert_near(got, want):
    """Numbers on two sides of a tie may round to neighbours, now and then."""
    name = np.asarray(got).dtype.name
    got, want = (np.asarray(a).astype(np.float64) for a in (got, want))
    assert np.all(np.abs(got - want) <= STEP[name] * np.abs(want) + LEAST.get(name, 1e-4))
    if name in LEAST and got.size:
        assert np.mean(got == want) > 0.9


@pytest.mark.interpreted
@examples(24)
@given(case=appends())
def test_pages_hold_exactly_what_was_appended(case):
    cache, k, v, slots = case
    got = jax.jit(lambda *a: append_paged_kv(*a, backend="triton"))(cache, k, v, slots)
    for pool, new, scale, after in (
        (cache.k, k, cache.k_scale, got.k),
        (cache.v, v, cache.v_scale, got.v),
    ):
        assert_same(after, expected_pool(pool, new, slots, scale))
    same = append_paged_kv(cache, k, v, slots, backend="reference")
    assert_near(got.k, same.k)
    assert_near(got.v, same.v)


@pytest.mark.interpreted
@examples(14)
@given(
    case=appends(dtypes=("float32", "bfloat16", "float8_e4m3fn", "int8")),
    q_heads=st.sampled_from([1, 3, 14]),
    interleaved=st.booleans(),
    share=st.sampled_from([0.25, 0.5, 1.0]),
    seed=st.integers(0, 1 << 20),
)
def test_rotation_and_append_in_one_launch(case, q_heads, interleaved, share, seed):
    cache, k, v, slots = case
    rng = np.random.default_rng(seed)
    tokens, _, dim = k.shape
    pairs = max(1, int(dim * share) // 2)
    q = jnp.asarray(rng.normal(size=(tokens, q_heads, dim)), k.dtype)
    position = jnp.asarray(rng.integers(0, 100_000, tokens))
    tables = rope_tables(position, jnp.asarray(10_000.0 ** -(np.arange(pairs) / pairs), "float32"))
    turned, got = jax.jit(
        lambda *a: rope_append_paged_kv(*a, interleaved=interleaved, backend="triton")
    )(cache, q, k, v, slots, tables)

    def rotate64(x):
        cos, sin = (np.asarray(t, np.float64)[:, None, :] for t in tables)
        out = np.array(x, np.float64)
        low, high = (
            (np.s_[..., 0 : 2 * pairs : 2], np.s_[..., 1 : 2 * pairs : 2])
            if interleaved
            else (np.s_[..., :pairs], np.s_[..., pairs : 2 * pairs])
        )
        first, second = out[low].copy(), out[high].copy()
        out[low], out[high] = first * cos - second * sin, second * cos + first * sin
        return out

    near = EPSILON[q.dtype.name]
    np.testing.assert_allclose(np.asarray(turned, np.float64), rotate64(q), rtol=near, atol=near)
    assert_near(got.k, expected_pool(cache.k, rotate64(k), slots, cache.k_scale))
    assert_same(got.v, expected_pool(cache.v, v, slots, cache.v_scale))


@pytest.mark.interpreted
@examples(12)
@given(
    tokens=st.integers(0, 3),
    heads=st.sampled_from([1, 5, 8]),
    dim=st.sampled_from([2, 16, 20]),
    interleaved=st.booleans(),
    dtype=st.sampled_from(sorted(EPSILON)),
    seed=st.integers(0, 1 << 20),
)
def test_rope_alone(tokens, heads, dim, interleaved, dtype, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(tokens, heads, dim)), dtype)
    pairs = int(rng.integers(1, dim // 2 + 1))
    frequency = jnp.asarray(rng.random(pairs), "float32")
    position = jnp.asarray(rng.integers(0, 5000, tokens))
    tables = rope_tables(position, frequency, magnitude=1.3)
    got = rope(x, tables, interleaved=interleaved, backend="triton")
    want = rope(x, tables, interleaved=interleaved, backend="reference")
    near = EPSILON[dtype]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=near, atol=near
    )
    assert got.dtype == x.dtype


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("kv_dtype", "dim"),
    [
        ("bfloat16", 128),
        ("float8_e4m3fn", 128),
        slow("float16", 64),
        slow("float32", 256),
        slow("int8", 80),
    ],
)
def test_they_compile_for_every_device(kv_dtype, dim):
    pool = shape(100, 8, 16, dim, dtype=kv_dtype)
    scale = shape(8, dtype="float32")
    cache = PagedKV(k=pool, v=pool, k_scale=scale, v_scale=scale)
    q, k = (shape(4, heads, dim, dtype="bfloat16") for heads in (40, 8))
    slots, table = shape(4, dtype="int32"), shape(4, dim // 4, dtype="float32")
    compile_all(lambda *a: append_paged_kv(*a, backend="triton"), cache, k, k, slots)
    compile_all(
        lambda *a: rope_append_paged_kv(*a, backend="triton"),
        cache,
        q,
        k,
        k,
        slots,
        (table, table),
    )
    if kv_dtype == "bfloat16":
        compile_all(lambda *a: rope(*a, interleaved=True, backend="triton"), q, (table, table))


@pytest.mark.compiled
def test_a_donated_cache_is_updated_in_place(monkeypatch):
    pool = shape(100, 8, 16, 128, dtype="float8_e4m3fn")
    cache = PagedKV(k=pool, v=pool)
    k, slots = shape(4, 8, 128, dtype="bfloat16"), shape(4, dtype="int32")

    def step(cache, k, slots):
        return append_paged_kv(cache, k * 2, k, slots, backend="triton")

    text = lower_for_cuda(monkeypatch, step, cache, k, slots, donate_argnums=0)
    assert text.count("triton_kernel_call") == 1
    assert text.count("tf.aliasing_output") == 2
    assert text.count("output_operand_alias<") == 2
