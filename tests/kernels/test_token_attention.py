from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.state import AttentionState, merge
from jaxserve.pallas_kernels.token_attention import TokenLists, token_attention
from jaxserve.pallas_kernels.variant import AttentionVariant
from tests.kernels.cases import Case, problem
from tests.kernels.request_oracle import Options
from tests.token_lists import random_lists
from tests.triton.attention_oracle import random_case


def arguments_of(q, cache, table, tokens):
    indptr, indices, kv_len = map(jnp.asarray, (table.indptr, table.indices, table.kv_len))
    return q, cache, indptr, indices, kv_len, tokens


CASES = {
    "plain": Case(),
    "capped": Case(
        kind=variants.compose(variants.soft_cap(3.0), variants.alibi(), variants.window(9)),
        options=Options(soft_cap=3.0, window=9),
        extras=("slopes",),
        scales="head",
        settings={"kv_dtype": "float8_e4m3fn"},
    ),
    "sigmoid": Case(
        kind=variants.sigmoid(-0.5),
        options=Options(sigmoid_bias=-0.5),
        scales="tensor",
        heads=(3, 3),
        settings={"v_head_dim": 8},
    ),
    "rope": Case(
        kind=variants.rope(50.0),
        options=Options(theta=50.0),
        scales="page",
        heads=(8, 2),
        settings={"kv_dtype": "int8"},
    ),
}


@partial(jax.jit, static_argnames="variant")
def attend(*arguments, variant, extra):
    return token_attention(*arguments, variant=variant, extra=extra)


@pytest.mark.parametrize("name", CASES)
def test_only_listed_tokens_are_read(name):
    case = CASES[name]
    spec = case.spec()

    @settings(max_examples=10)
    @given(
        kv_len=st.lists(st.integers(0, 60), min_size=3, max_size=3),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        seed=st.integers(0, 1 << 20),
    )
    def agrees(kv_len, share, seed):
        p = problem(case, [1, 1, 1], kv_len, seed=seed)
        rng = np.random.default_rng(seed)
        tokens, chosen = random_lists(rng, kv_len, spec.kv_heads, share)
        # As much room always, for one program.
        room = (0, 600 - tokens.positions.size)
        tokens = replace(tokens, positions=jnp.pad(tokens.positions, room, constant_values=-7))
        table = replace(p.table, indices=np.pad(p.table.indices, (0, 20 - p.table.indices.size)))
        got = attend(
            *arguments_of(jnp.asarray(p.q[:3]), p.kv, table, tokens),
            variant=case.kind,
            extra=p.extra,
        )
        masks = [np.zeros((spec.kv_heads, spec.group, 1, n), np.bool_) for n in kv_len]
        for (request, head), positions in chosen.items():
            masks[request][head, :, :, positions] = True
        masks = [mask.reshape(spec.q_heads, 1, -1) for mask in masks]
        o, lse = replace(p, q=p.q[:3], options=replace(p.options, masks=masks)).answer()
        np.testing.assert_allclose(got.o, o, rtol=1e-5, atol=1e-5)
        if case.kind.use_softmax:
            np.testing.assert_allclose(got.lse, lse, rtol=1e-4, atol=1e-4)

    agrees()


def make(kv_heads=2):
    q, cache, table = random_case(
        np.random.default_rng(0),
        q_len=[1, 1],
        kv_len=[20, 9],
        q_heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        page_size=4,
    )
    return q, cache, table


def test_states_of_disjoint_lists_merge_into_dense_attention():
    rng = np.random.default_rng(1)
    p = problem(Case(), [1, 1], [20, 9])
    parts = []
    orders = {(r, h): rng.permutation(n) for r, n in enumerate([20, 9]) for h in range(2)}
    for part in range(2):
        rows = [order[part::2] for order in orders.values()]
        lists = TokenLists(
            indptr=jnp.asarray(np.cumsum([0, *map(len, rows)]), jnp.int32),
            positions=jnp.asarray(np.resize(np.concatenate(rows), 40), jnp.int32),
        )
        arguments = arguments_of(jnp.asarray(p.q[:2]), p.kv, p.table, lists)
        parts.append(attend(*arguments, variant=variants.PLAIN, extra={}))
    merged = merge(*parts)
    o, lse = replace(p, q=p.q[:2]).answer()
    assert isinstance(merged, AttentionState)
    np.testing.assert_allclose(merged.o, o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged.lse, lse, rtol=1e-5, atol=1e-5)


def test_sinks_and_changes_of_the_output_come_last():
    variant = variants.compose(
        variants.sinks(), AttentionVariant(out_mod=lambda o, ctx, lse, q_pos, head: o * head + lse)
    )
    p = problem(Case(kind=variant, extras=("sinks",)), [1, 1], [20, 9])
    tokens, _ = random_lists(np.random.default_rng(3), [20, 9], 2, 1.0)
    arguments = arguments_of(jnp.asarray(p.q[:2]), p.kv, p.table, tokens)
    got = attend(*arguments, variant=variant, extra=p.extra)
    o, lse = replace(p, q=p.q[:2]).answer()
    o = o * np.arange(4)[:, None] + lse[..., None]
    np.testing.assert_allclose(got.o, o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.lse, lse, rtol=1e-5, atol=1e-5)


def test_lengths_of_lists_compile_nothing():
    q, cache, table = make()
    count = 0

    @jax.jit
    def step(*arguments):
        nonlocal count
        count += 1
        return token_attention(*arguments)

    for lengths in ([20, 9, 3, 1], [0, 0, 0, 0], [1, 2, 9, 9]):
        lists = TokenLists(
            indptr=jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
            positions=jnp.asarray(np.tile(np.arange(9), 5), jnp.int32),
        )
        assert np.isfinite(step(*arguments_of(q, cache, table, lists)).o).all()
    assert count == 1


def test_bad_input_is_named():
    q, cache, table = make()
    tokens, _ = random_lists(np.random.default_rng(3), [20, 9], 2, 0.5)
    good = arguments_of(q, cache, table, tokens)
    with pytest.raises(ValueError, match=r"a multiple of 2 heads, 8\] to fit .* got \(2, 3, 8\)"):
        token_attention(q[:, :3], *good[1:])
    with pytest.raises(UnsupportedError, match=r"q must have one of .* got int32; cast it"):
        token_attention(q.astype(int), *good[1:])
    short = TokenLists(indptr=tokens.indptr[1:], positions=tokens.positions)
    with pytest.raises(ValueError, match=r"requests \* kv_heads \+ 1 = 5 .* got \(4,\) and"):
        token_attention(*good[:-1], short)
    with pytest.raises(ValueError, match=r"2 requests need kv_indptr of 3 .* got \(3,\) and \(1,"):
        token_attention(*good[:4], good[4][:1], tokens)
    with pytest.raises(ValueError, match=r"chunk must be a power of 2 from 16, got 48; 32 is near"):
        token_attention(*good, chunk=48)
    with pytest.raises(UnsupportedError, match=r"take no packed mask; leave tokens out"):
        token_attention(*good, variant=variants.packed_mask())
    with pytest.raises(ValueError, match=r"reads the extras \['slopes'\], which were not passed"):
        token_attention(*good, variant=variants.alibi())
    wide = random_case(
        np.random.default_rng(0),
        q_len=[1],
        kv_len=[1],
        q_heads=1,
        kv_heads=1,
        head_dim=320,
        page_size=1,
    )
    lists, _ = random_lists(np.random.default_rng(0), [1], 1, 1.0)
    with (
        triton_launch.record_launches(),
        pytest.raises(UnsupportedError, match=r"heads of at most 256 numbers, got 320; use backe"),
    ):
        token_attention(*arguments_of(*wide, lists), backend="triton")
