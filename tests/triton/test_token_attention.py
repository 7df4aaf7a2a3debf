import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.token_attention import TokenLists, token_attention
from tests.token_lists import random_lists
from tests.triton.attention_oracle import attend64, random_case
from tests.triton.checks import compile_all, examples, lower_for_cuda, shape, slow


@pytest.mark.interpreted
@examples(20)
@given(
    kv_len=st.lists(st.sampled_from([1, 5, 40, 90]), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 4), (4, 1), (14, 2)]),
    page_size=st.sampled_from([1, 2, 4, 16]),
    chunk=st.sampled_from([None, 16, 32]),
    name=st.sampled_from(["plain", "capped", "sigmoid", "rope", "sinks"]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1 << 20),
)
def test_only_listed_tokens_are_read(kv_len, heads, page_size, chunk, name, share, seed):
    rng = np.random.default_rng(seed)
    q, cache, table = random_case(
        rng,
        q_len=[1] * len(kv_len),
        kv_len=kv_len,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=32,
        page_size=page_size,
    )
    tokens, chosen = random_lists(rng, kv_len, heads[1], share)
    slopes = {"slopes": variants.alibi_slopes(heads[0])}
    variant, extra = {
        "plain": (variants.PLAIN, {}),
        "capped": (variants.compose(variants.soft_cap(3.0), variants.alibi()), slopes),
        "sigmoid": (variants.sigmoid(), {}),
        "rope": (variants.rope(50.0), {}),
        "sinks": (variants.sinks(), {"sinks": np.linspace(-1, 1, heads[0], dtype="float32")}),
    }[name]
    extra = {n: jnp.asarray(v) for n, v in extra.items()}
    arguments = (
        q,
        cache,
        jnp.asarray(table.indptr),
        jnp.asarray(table.indices),
        jnp.asarray(table.kv_len),
        tokens,
    )
    options = {"sm_scale": 0.3, "variant": variant, "extra": extra}
    got = jax.jit(lambda *a: token_attention(*a, **options, chunk=chunk, backend="triton"))(
        *arguments
    )
    if name == "sinks":
        want = token_attention(*arguments, **options, backend="reference")
        o, lse = np.asarray(want.o, np.float64), np.asarray(want.lse, np.float64)
    else:
        o, lse = attend64(
            q,
            cache,
            table,
            [1] * len(kv_len),
            sm_scale=0.3,
            variant=variant,
            extra=extra,
            chosen=chosen,
        )
    np.testing.assert_allclose(np.asarray(got.o), o, rtol=1e-5, atol=1e-5)
    if variant.use_softmax:
        np.testing.assert_allclose(np.asarray(got.lse), lse, rtol=1e-4, atol=1e-4)


def abstract(kv_dtype="bfloat16", *, head_dim=128, page_size=1, requests=16, capacity=1 << 20):
    pool = shape(1 << 16, 8, page_size, head_dim, dtype=kv_dtype)
    return (
        shape(requests, 32, head_dim, dtype="bfloat16"),
        PagedKV(k=pool, v=pool),
        shape(requests + 1, dtype="int32"),
        shape(1 << 16, dtype="int32"),
        shape(requests, dtype="int32"),
        TokenLists(
            indptr=shape(requests * 8 + 1, dtype="int32"),
            positions=shape(capacity, dtype="int32"),
        ),
    )


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("kv_dtype", "options"),
    [
        ("bfloat16", {}),
        slow("bfloat16", {"head_dim": 256, "page_size": 16}),
        slow("float8_e4m3fn", {"page_size": 4}),
        slow("bfloat16", {"head_dim": 64, "capacity": 4096}),
    ],
)
def test_it_compiles_for_every_device(kv_dtype, options):
    compile_all(lambda *a: token_attention(*a, backend="triton"), *abstract(kv_dtype, **options))


@pytest.mark.compiled
def test_launches_become_part_of_a_program(monkeypatch):
    text = lower_for_cuda(
        monkeypatch, lambda *a: token_attention(*a, backend="triton"), *abstract()
    )
    assert text.count("triton_kernel_call") == 2
