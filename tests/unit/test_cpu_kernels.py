"""Kernels compiled by LLVM against plain float64 arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import cpu_kernels

pytestmark = pytest.mark.skipif(not cpu_kernels.is_available(), reason="llvmlite is not installed")

KINDS = st.sampled_from(["float32", "bfloat16"])
WEIGHTS = ["float32", "bfloat16", "int8", "float8_e4m3fn"]
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=8, deadline=None)


def draw(rng: np.random.Generator, shape: tuple[int, ...], kind: str = "float32") -> jax.Array:
    if kind == "int8":
        return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    return jnp.asarray(rng.standard_normal(shape), jnp.dtype(kind))


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def assert_product(found: jax.Array, x: np.ndarray, weight: np.ndarray) -> None:
    """Allow what rounding each term and each sum to float32 can amount to."""
    room = (x.shape[1] + 1) * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(weight))
    assert (np.abs(found - x @ weight) <= room).all()


@few
@given(
    rows=st.sampled_from([1, 3, 8, 19]),
    depth=st.integers(1, 90),
    sizes=st.lists(st.integers(1, 210), min_size=1, max_size=3),
    kind=st.sampled_from(WEIGHTS),
    seed=SEEDS,
)
def test_products_agree_with_float64(rows, depth, sizes, kind, seed):
    rng = np.random.default_rng(seed)
    x = draw(rng, (rows, depth))
    weights = [draw(rng, (depth, n), kind) for n in sizes]
    outs = jax.jit(cpu_kernels.multiply)(x, weights)
    for out, weight in zip(outs, weights, strict=True):
        assert_product(out, wide(x), wide(weight))


@few
@given(
    rows=st.sampled_from([1, 6, 35, 450]),
    depth=st.integers(1, 1300),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    kind=st.sampled_from(WEIGHTS),
    seed=SEEDS,
)
def test_products_of_many_rows_agree_with_float64_and_with_those_of_few(
    rows, depth, sizes, kind, seed
):
    from jaxserve.cpu_kernels.block_matmul import multiply_many

    rng = np.random.default_rng(seed)
    x = draw(rng, (rows, depth))
    weights = [draw(rng, (depth, n), kind) for n in sizes]
    outs = jax.jit(multiply_many)(x, weights)
    some = cpu_kernels.multiply(x[:4], weights)
    for out, first, weight in zip(outs, some, weights, strict=True):
        assert_product(out, wide(x), wide(weight))
        np.testing.assert_array_equal(out[:4], first)


@few
@given(
    rows=st.sampled_from([1, 3, 8, 19]),
    depth=st.integers(1, 90),
    size=st.integers(1, 400),
    kind=st.sampled_from(WEIGHTS),
    seed=SEEDS,
)
def test_transposed_products_agree_with_float64(rows, depth, size, kind, seed):
    rng = np.random.default_rng(seed)
    x, weight = draw(rng, (rows, depth)), draw(rng, (size, depth), kind)
    out = jax.jit(cpu_kernels.multiply_transposed)(x, weight)
    assert_product(out, wide(x), wide(weight).T)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_every_narrow_number_is_read_exactly(kind):
    codes = np.arange(256, dtype=np.uint8).view(np.dtype(jnp.dtype(kind)))
    codes = codes[np.isfinite(codes.astype(np.float32))]
    numbers = codes.astype(np.float32)[None]
    one = jnp.ones((1, 1))
    (out,) = cpu_kernels.multiply(one, [jnp.asarray(codes[None])])
    np.testing.assert_array_equal(out, numbers)
    out = cpu_kernels.multiply_transposed(one, jnp.asarray(codes[:, None]))
    np.testing.assert_array_equal(out, numbers)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("product", ["multiply", "multiply_transposed"])
def test_a_row_does_not_depend_on_its_neighbours(product, kind):
    rng = np.random.default_rng(0)
    x = draw(rng, (16, 200))
    weight = draw(rng, (200, 300) if product == "multiply" else (300, 200), kind)

    def apply(x: jax.Array) -> np.ndarray:
        if product == "multiply":
            return np.asarray(cpu_kernels.multiply(x, [weight])[0])
        return np.asarray(cpu_kernels.multiply_transposed(x, weight))

    together = apply(x)
    for rows in (1, 2, 3, 5, 8):
        np.testing.assert_array_equal(apply(x[:rows]), together[:rows])
    np.testing.assert_array_equal(apply(x[::-1]), together[::-1])


def attend_plainly(q, keys, values, position, scale):
    """Attend from one token's heads to the first `position + 1` keys, in float64."""
    group = q.shape[0] // keys.shape[0]
    outs = []
    for head in range(q.shape[0]):
        scores = keys[head // group, : position + 1] @ q[head] * scale
        weights = np.exp(scores - scores.max())
        outs.append(weights @ values[head // group, : position + 1] / weights.sum())
    return np.stack(outs)


HEADS = st.sampled_from([(9, 3), (4, 4), (8, 1), (14, 2)])


@few
@given(
    heads=HEADS,
    head_dim=st.sampled_from([16, 64, 128]),
    positions=st.lists(st.integers(-1, 190), min_size=1, max_size=5),
    kind=KINDS,
    seed=SEEDS,
)
def test_decode_appends_and_attends(heads, head_dim, positions, kind, seed):
    rng = np.random.default_rng(seed)
    rows, (q_heads, kv_heads) = len(positions), heads
    q = 2 * draw(rng, (rows, q_heads, head_dim))
    k, v = (draw(rng, (rows, kv_heads, head_dim)) for _ in range(2))
    slots = (rows + 1, kv_heads, 192, head_dim)
    keys, values = draw(rng, slots, kind), draw(rng, slots, kind)
    expected_keys, expected_values = np.array(keys), np.array(values)
    call = jax.jit(cpu_kernels.decode, static_argnames="scale")
    position = jnp.asarray(positions, jnp.int32)
    out, new_keys, new_values = call(q, k, v, keys, values, position, scale=0.125)
    for row, at in enumerate(positions):
        if at < 0:
            np.testing.assert_array_equal(out[row], 0)
            continue
        expected_keys[row, :, at] = np.asarray(k[row].astype(kind))
        expected_values[row, :, at] = np.asarray(v[row].astype(kind))
        expected = attend_plainly(
            wide(q[row]),
            expected_keys[row].astype(np.float64),
            expected_values[row].astype(np.float64),
            at,
            0.125,
        )
        np.testing.assert_allclose(out[row], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new_keys, expected_keys)
    np.testing.assert_array_equal(new_values, expected_values)


@few
@given(
    heads=HEADS,
    head_dim=st.sampled_from([16, 64, 128]),
    chunks=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 64)), min_size=1, max_size=4),
    kind=KINDS,
    seed=SEEDS,
)
def test_prefill_appends_and_attends(heads, head_dim, chunks, kind, seed):
    rng = np.random.default_rng(seed)
    q_heads, kv_heads = heads
    slots = (len(chunks) + 1, kv_heads, 384, head_dim)
    table, start = [], 0
    for slot, (position, length) in enumerate(chunks):
        table.append((start, slot, position, length))
        start += length
    table.append((0, 0, 0, 0))  # an unused block
    q = 2 * draw(rng, (start + 3, q_heads, head_dim))
    k, v = (draw(rng, (start + 3, kv_heads, head_dim)) for _ in range(2))
    keys, values = draw(rng, slots, kind), draw(rng, slots, kind)
    expected_keys, expected_values = np.array(keys), np.array(values)

    @jax.jit
    def call(q, k, v, keys, values, blocks):
        keys, values = cpu_kernels.append(k, v, keys, values, blocks)
        out = cpu_kernels.prefill(q, keys, values, blocks, q_block=64, scale=0.125)
        return out, keys, values

    out, new_keys, new_values = call(q, k, v, keys, values, jnp.asarray(table, jnp.int32))
    for first, slot, position, length in table:
        for i in range(length):
            expected_keys[slot, :, position + i] = np.asarray(k[first + i].astype(kind))
            expected_values[slot, :, position + i] = np.asarray(v[first + i].astype(kind))
        for i in range(length):
            expected = attend_plainly(
                wide(q[first + i]),
                expected_keys[slot].astype(np.float64),
                expected_values[slot].astype(np.float64),
                position + i,
                0.125,
            )
            np.testing.assert_allclose(out[first + i], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new_keys, expected_keys)
    np.testing.assert_array_equal(new_values, expected_values)


def test_prefill_does_not_depend_on_how_a_prompt_is_cut():
    rng = np.random.default_rng(1)
    q, k, v = (draw(rng, (150, heads, 64)) for heads in (6, 2, 2))
    slots = jnp.zeros((1, 2, 256, 64))

    def run(cuts: list[int]) -> np.ndarray:
        keys, values, outs = slots, slots, []
        for low, high in zip([0, *cuts], [*cuts, 150], strict=True):
            blocks = jnp.asarray([[0, 0, low, high - low]], jnp.int32)
            keys, values = cpu_kernels.append(k[low:high], v[low:high], keys, values, blocks)
            outs.append(
                cpu_kernels.prefill(q[low:high], keys, values, blocks, q_block=150, scale=0.125)
            )
        return np.concatenate(outs)

    whole = run([])
    for cuts in ([75], [1, 2, 149], [32, 64, 96, 128]):
        np.testing.assert_array_equal(run(cuts), whole)


def test_far_apart_scores_neither_overflow_nor_vanish():
    q = jnp.full((1, 1, 64), 100.0)
    keys = jnp.linspace(-1, 1, 128)[None, None, :, None] * jnp.ones((1, 1, 128, 64))
    values = jnp.broadcast_to(jnp.arange(128.0)[None, None, :, None], (1, 1, 128, 64))
    k, v = keys[:, :, 127], values[:, :, 127]
    out, _, _ = cpu_kernels.decode(q, k, v, keys, values, jnp.asarray([127], jnp.int32), scale=1.0)
    np.testing.assert_allclose(out, 127.0, rtol=1e-6)


@pytest.mark.skipif(not cpu_kernels.has_lazy_zeros(), reason="not Linux")
@pytest.mark.parametrize("shape", [(3,), (2048, 2), (5000, 131), (3, 1 << 20)])
def test_zeros_are_zeros_whatever_lay_there_before(shape):
    dirty = jax.jit(lambda i: jnp.full(shape, i, jnp.float32))
    make = jax.jit(lambda: cpu_kernels.zeros(shape, jnp.dtype("float32")))
    for i in range(3):
        dirty(i + 1.0).block_until_ready()
        out = make()
        assert out.shape == shape
        assert not np.asarray(out).any()


@pytest.mark.skipif(not cpu_kernels.has_lazy_zeros(), reason="not Linux")
def test_zeros_take_no_memory_before_they_are_written_to():
    process = psutil.Process()
    make = jax.jit(lambda: cpu_kernels.zeros((1 << 26,), jnp.dtype("float32")))
    make.lower().compile()
    before = process.memory_info().rss
    out = make().block_until_ready()
    assert process.memory_info().rss - before < 32 << 20
    assert float(out[-1]) == 0.0


def test_stages_find_what_earlier_ones_have_written():
    from llvmlite import ir

    from jaxserve.cpu_kernels import ffi
    from jaxserve.cpu_kernels.emit import F32, const
    from jaxserve.cpu_kernels.places import load_float, store_word

    def square(e, buffers, sizes, index, parts):
        value = load_float(e, buffers[0], index)
        store_word(e, e.b.fmul(value, value), buffers[1], index)

    def total(e, buffers, sizes, index, parts):
        found = e.variable(F32, ir.Constant(F32, 0.0))
        with e.loop(const(0), sizes[0], const(1)) as i:
            e.b.store(e.b.fadd(e.b.load(found, typ=F32), load_float(e, buffers[1], i)), found)
        store_word(e, e.b.load(found, typ=F32), buffers[2], index)

    def number(e, buffers, sizes, index, parts):
        share = e.b.fdiv(load_float(e, buffers[2], index), e.b.sitofp(parts, F32))
        store_word(e, share, buffers[3], index)

    kernel = ffi.Kernel(
        name="test_stages", num_args=1, num_rets=3, dims=[(0, 0)],
        num_chunks=lambda e, sizes, threads: sizes[0], chunk=square,
        later=[
            ffi.Stage(num_chunks=lambda e, sizes, threads: const(3), chunk=total),
            ffi.Stage(num_chunks=lambda e, sizes, threads: const(2), chunk=number),
        ],
    )  # fmt: skip
    ffi.register("test_stages", lambda: kernel)
    for seed in range(30):
        x = np.random.default_rng(seed).integers(0, 9, 1 + 17 * seed).astype(np.float32)
        outs = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (len(x), 3, 2)]
        squares, totals, shares = jax.ffi.ffi_call("test_stages", outs)(x)
        np.testing.assert_array_equal(squares, x**2)
        np.testing.assert_array_equal(totals, [np.sum(x**2)] * 3)
        np.testing.assert_array_equal(shares, [np.sum(x**2) / 2] * 2)
