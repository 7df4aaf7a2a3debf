"""Both layouts and both backends against attention written out in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.attention.dense import attend
from jaxserve.attention.metadata import AttentionPlan, CausalPlan
from tests.cases import slow

ROWS, KV_HEADS, GROUP, DIM = 3, 2, 2, 4
LENGTH, PAGE, TILE, Q_BLOCK, PREFILL = 40, 4, 16, 8, 32
CAPACITY = 64  # a multiple of the tile, with a block behind the longest sequence
PAGES_PER_ROW = CAPACITY // PAGE
NUM_BLOCKS = PREFILL // Q_BLOCK + ROWS
SCALE = DIM**-0.5

run = jax.jit(
    functools.partial(attend, scale=SCALE), static_argnames=("scale", "window", "soft_cap")
)

RULES = [
    {},
    {"window": 1},
    {"window": 5},
    {"window": TILE + 3, "soft_cap": 2.0},
    {"window": 2 * LENGTH},
    {"soft_cap": 0.5, "scale": 1.5},
    {"sinks": np.array([0.5, -20.0, 2.0, 30.0], np.float32)},
    {"sinks": np.array([1.0, 3.0, -1.0, 0.0], np.float32), "window": 5},
]


def by_hand(q, keys, values, *, scale=SCALE, window=None, soft_cap=None, sinks=None):
    """Attend from one token to the last of the given keys `[length, kv_heads, dim]`."""
    out = np.zeros_like(q, np.float64)
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    for head in range(q.shape[0]):
        k, v = (x[:, head // GROUP].astype(np.float64) for x in (keys, values))
        scores = k @ q[head].astype(np.float64) * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        rest = 0.0 if sinks is None else np.exp(float(sinks[head]) - scores.max())
        out[head] = weights @ v / (weights.sum() + rest)
    return out


@st.composite
def steps(draw):
    """Per row: nothing, a decode, or a prefill chunk, each behind a history."""
    left = PREFILL
    work = []
    for _ in range(ROWS):
        kind = draw(st.sampled_from(["idle", "decode", "prefill"]))
        history = draw(st.integers(0, LENGTH - 2))
        count = {"idle": 0, "decode": 1}.get(kind)
        if count is None:
            count = draw(st.integers(0, min(left, LENGTH - history)))
            left -= count
            kind = "prefill" if count else "idle"
        work.append((kind, history, count))
    return work, draw(st.integers(0, 2**32)), draw(st.permutations(range(ROWS)))


def lay_out(work, order, *, pages, backend):
    num_tokens = ROWS + PREFILL
    token_row = np.full(num_tokens, -1, np.int32)
    position = np.zeros(num_tokens, np.int32)
    blocks = np.zeros((5, NUM_BLOCKS), np.int32)
    where = {}
    offset = block = num_context_blocks = 0
    for row in order:
        kind, history, count = work[row]
        if kind == "decode":
            token_row[row], position[row] = row, history
            where[row] = np.asarray([row])
        elif kind == "prefill":
            low = ROWS + offset
            token_row[low : low + count] = row
            position[low : low + count] = history + np.arange(count)
            where[row] = np.arange(low, low + count)
            for start in range(0, count, Q_BLOCK):
                size = min(Q_BLOCK, count - start)
                blocks[:, block] = offset + start, row, history + start, size, history
                block += 1
                num_context_blocks = block if history else num_context_blocks
            offset += count
    plan = AttentionPlan(
        token_row=jnp.asarray(token_row),
        token_position=jnp.asarray(position),
        num_blocks=jnp.int32(block),
        block_start=jnp.asarray(blocks[0]),
        block_row=jnp.asarray(blocks[1]),
        block_position=jnp.asarray(blocks[2]),
        block_len=jnp.asarray(blocks[3]),
        block_context=jnp.asarray(blocks[4]),
        num_context_blocks=jnp.int32(num_context_blocks),
        page_table=None if pages is None else jnp.asarray(pages),
        rows=ROWS,
        kv_tile=TILE,
        q_block=Q_BLOCK,
        backend=backend,
    )
    return plan, where


@pytest.mark.parametrize("backend", ["xla", slow("reference")])
@pytest.mark.parametrize("layout", [slow("slots"), "pages"])
@given(steps(), st.sampled_from(RULES))
@settings(max_examples=60)
def test_any_mixture_of_decodes_and_prefills_is_what_float64_gives(layout, backend, step, rule):
    work, seed, order = step
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    history = draw(2, ROWS, LENGTH, KV_HEADS, DIM)
    num_tokens = ROWS + PREFILL
    q = draw(num_tokens, KV_HEADS * GROUP, DIM)
    k, v = draw(num_tokens, KV_HEADS, DIM), draw(num_tokens, KV_HEADS, DIM)
    rubbish = 100 * draw(2, ROWS, KV_HEADS, CAPACITY, DIM)
    table = None
    if layout == "pages":
        table = 1 + random.permutation(ROWS * PAGES_PER_ROW).reshape(ROWS, -1).astype(np.int32)
    dense = rubbish.copy()
    for row, (_kind, length, _count) in enumerate(work):
        dense[:, row, :, :length] = history[:, row, :length].swapaxes(1, 2)
    cache = dense
    if table is not None:
        cache = 100 * draw(2, 1 + ROWS * PAGES_PER_ROW, KV_HEADS, PAGE, DIM)
        parts = dense.reshape(2, ROWS, KV_HEADS, PAGES_PER_ROW, PAGE, DIM)
        cache[:, table] = parts.transpose(0, 1, 3, 2, 4, 5)
    plan, where = lay_out(work, order, pages=table, backend=backend)
    out, after = run(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), tuple(map(jnp.asarray, cache)), plan, **rule
    )
    out, after = np.asarray(out), np.stack(after)
    if table is not None:
        after = after[:, table].transpose(0, 1, 3, 2, 4, 5).reshape(dense.shape)
    assert np.isfinite(out).all()
    for row, (kind, length, count) in enumerate(work):
        total = length + count
        known = after[:, row, :, :total].swapaxes(1, 2)
        np.testing.assert_array_equal(known[:, :length], history[:, row, :length])
        if kind == "idle":
            continue
        np.testing.assert_array_equal(known[0, length:], k[where[row]])
        np.testing.assert_array_equal(known[1, length:], v[where[row]])
        for i, token in enumerate(where[row]):
            seen = known[:, : length + i + 1]
            wanted = by_hand(q[token], seen[0], seen[1], **rule)
            np.testing.assert_allclose(out[token], wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("time", [1, slow(2), 17])
@pytest.mark.parametrize("rule", RULES)
def test_attention_without_a_cache_is_causal(backend, time, rule):
    random = np.random.default_rng(time)
    q = random.standard_normal((2, time, KV_HEADS * GROUP, DIM)).astype(np.float32)
    k, v = random.standard_normal((2, 2, time, KV_HEADS, DIM)).astype(np.float32)
    plan = CausalPlan(backend=backend)
    out, cache = run(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None, plan, **rule)
    assert cache is None
    for batch in range(2):
        for i in range(time):
            wanted = by_hand(q[batch, i], k[batch, : i + 1], v[batch, : i + 1], **rule)
            np.testing.assert_allclose(out[batch, i], wanted, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_attention_without_a_cache():
    random = np.random.default_rng(0)
    q = jnp.asarray(random.standard_normal((1, 6, KV_HEADS * GROUP, DIM)), jnp.float32)
    k, v = jnp.asarray(random.standard_normal((2, 1, 6, KV_HEADS, DIM)), jnp.float32)

    def total(q, k, v, backend):
        out, _ = attend(q, k, v, None, CausalPlan(backend=backend), scale=SCALE)
        return jnp.sum(out**2)

    grads = [jax.grad(total, argnums=(0, 1, 2))(q, k, v, b) for b in ("xla", "reference")]
    for one, two in zip(*grads, strict=True):
        assert float(jnp.abs(one).max()) > 0
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", ["slots", "pages"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_decoding_reads_no_tile_that_a_window_hides(layout, batch_invariant):
    """What lies in hidden tiles is no number at all; reading it would spoil the result."""
    lengths, window = (LENGTH + 20, TILE + 2, 3), 5
    random = np.random.default_rng(3)
    cache = random.standard_normal((2, ROWS, KV_HEADS, CAPACITY, DIM)).astype(np.float32)
    whole = cache.copy()
    for row, length in enumerate(lengths):
        first = max(0, length + 1 - window) // TILE * TILE
        cache[:, row, :, :first] = np.nan
        cache[:, row, :, -(-(length + 1) // TILE) * TILE :] = 0.0
    work = [("decode", length, 1) for length in lengths]
    table = None
    buffers = cache
    if layout == "pages":
        table = 1 + np.arange(ROWS * PAGES_PER_ROW).reshape(ROWS, -1).astype(np.int32)
        parts = cache.reshape(2, ROWS, KV_HEADS, PAGES_PER_ROW, PAGE, DIM)
        buffers = np.zeros((2, 1 + ROWS * PAGES_PER_ROW, KV_HEADS, PAGE, DIM), np.float32)
        buffers[:, table] = parts.transpose(0, 1, 3, 2, 4, 5)
    plan, _ = lay_out(work, range(ROWS), pages=table, backend="xla")
    plan = dataclasses.replace(plan, batch_invariant=batch_invariant)
    q = random.standard_normal((ROWS + PREFILL, KV_HEADS * GROUP, DIM)).astype(np.float32)
    k, v = random.standard_normal((2, ROWS + PREFILL, KV_HEADS, DIM)).astype(np.float32)
    out, _ = run(q, k, v, tuple(map(jnp.asarray, buffers)), plan, window=window)
    for row, length in enumerate(lengths):
        keys, values = whole[:, row, :, :length].swapaxes(1, 2)
        keys, values = (
            np.concatenate([old, new[row : row + 1]]) for old, new in ((keys, k), (values, v))
        )
        wanted = by_hand(q[row], keys, values, window=window)
        np.testing.assert_allclose(out[row], wanted, rtol=1e-4, atol=2e-5)


def test_large_scores_overflow_nothing():
    q = jnp.full((1, 5, KV_HEADS * GROUP, DIM), 1e4)
    k = jnp.full((1, 5, KV_HEADS, DIM), 1e4)
    out, _ = run(q, k, jnp.ones_like(k), None, CausalPlan())
    np.testing.assert_allclose(out, 1.0, rtol=1e-5)


def test_a_plan_for_a_cache_needs_one():
    plan, _ = lay_out([("idle", 0, 0)] * ROWS, range(ROWS), pages=None, backend="xla")
    q = jnp.zeros((ROWS + PREFILL, KV_HEADS * GROUP, DIM))
    k = jnp.zeros((ROWS + PREFILL, KV_HEADS, DIM))
    with pytest.raises(ValueError, match="needs a cache"):
        attend(q, k, k, None, plan, scale=SCALE)
