import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.attention.backends import Case, refusal
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.planner import SharedPrefix, make_plan
from jaxserve.pallas_kernels.variant import AttentionVariant
from tests.triton.attention_oracle import attend64, random_case
from tests.triton.checks import compile_all, examples, lower_for_cuda, shape, slow

EPSILON = {"float32": 5e-6, "float16": 2e-3}
SM_SCALE = 0.3


def make_spec(q_len, cache, q, table, **options):
    defaults = {"num_ctas": 3, "tile_kv": 16, "tile_q": 32, "item_cost": 4}
    return PlanSpec(
        q_heads=q.shape[1],
        kv_heads=cache.kv_heads,
        head_dim=cache.k.shape[3],
        v_head_dim=cache.v.shape[3],
        page_size=cache.page_size,
        q_dtype=q.dtype.name,
        kv_dtype=cache.k.dtype.name,
        max_requests=len(q_len) + 1,
        max_tokens=int(np.sum(q_len)) + 2,
        max_pages=table.indices.size + 3,
        **{**defaults, **options},
    )


def run(q, cache, table, q_len, spec, extra=None, shared=()):
    plan = make_plan(spec, np.asarray(q_len), table, shared=shared)
    on_device = Plan(buffer=jnp.asarray(plan.buffer), spec=spec)
    padded = jnp.pad(q, ((0, spec.max_tokens - q.shape[0]), (0, 0), (0, 0)))
    got = attention(
        padded,
        cache,
        on_device,
        sm_scale=SM_SCALE,
        extra={n: jnp.asarray(v) for n, v in (extra or {}).items()},
        return_lse=spec.variant.use_softmax,
        backend="triton",
    )
    o, lse = got if spec.variant.use_softmax else (got, jnp.full(got.shape[:2], -jnp.inf))
    o, lse = np.asarray(o, np.float64), np.asarray(lse, np.float64)
    count = q.shape[0]
    assert not o[count:].any()
    assert np.isneginf(lse[count:]).all()
    return o[:count], lse[:count]


def check(got, want, epsilon, *, use_softmax=True):
    np.testing.assert_allclose(got[0], want[0], rtol=epsilon, atol=epsilon)
    if use_softmax:
        np.testing.assert_allclose(got[1], want[1], rtol=1e-3, atol=1e-3)


@pytest.mark.interpreted
@examples(25)
@given(
    lengths=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 5, 17]), st.sampled_from([0, 0, 1, 15, 16, 17, 70])),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from([(4, 4), (4, 1), (10, 2), (7, 1), (32, 1)]),
    dims=st.sampled_from([(16, 16), (32, 24), (20, 16)]),
    page_size=st.sampled_from([1, 2, 8, 16, 64]),
    dtype=st.sampled_from(["float32", "float16"]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 9, 33]),
    split=st.sampled_from([{}, {"fixed_split_size": 16}, {"disable_split": True}]),
    seed=st.integers(0, 1 << 20),
)
def test_plans_are_carried_out(lengths, heads, dims, page_size, dtype, causal, window, split, seed):
    q_len, kv_len = zip(*((q, q + before) for q, before in lengths), strict=True)
    q, cache, table = random_case(
        np.random.default_rng(seed),
        q_len=q_len,
        kv_len=kv_len,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=dims[0],
        v_dim=dims[1],
        page_size=page_size,
        dtype=dtype,
    )
    spec = make_spec(q_len, cache, q, table, causal=causal, window=window, **split)
    got = run(q, cache, table, q_len, spec)
    want = attend64(q, cache, table, q_len, sm_scale=SM_SCALE, causal=causal, window=window)
    check(got, want, EPSILON[dtype])


@pytest.mark.interpreted
@pytest.mark.parametrize("scale_axes", [None, 0, 1, 2])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_narrow_caches(kv_dtype, scale_axes):
    q_len, kv_len = [1, 3, 1], [40, 17, 0]
    q, cache, table = random_case(
        np.random.default_rng(3),
        q_len=q_len,
        kv_len=[n or m for n, m in zip(kv_len, [0, 0, 1], strict=True)],
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        page_size=4,
        dtype="float16",
        kv_dtype=kv_dtype,
        scale_axes=scale_axes,
    )
    spec = make_spec(q_len, cache, q, table)
    got = run(q, cache, table, q_len, spec)
    check(got, attend64(q, cache, table, q_len, sm_scale=SM_SCALE), 3e-3)


def bias_table():
    def score_mod(s, ctx, q_pos, k_pos, head):
        return s + ctx.take("bias", head, jnp.abs(q_pos - k_pos) // 2)

    return AttentionVariant(score_mod=score_mod, extras={"bias": "array"})


def by_request():
    def mask_mod(ctx, q_pos, k_pos, head):
        return ((k_pos + head) % 3 != 0) | (k_pos >= ctx["keep"]) | (q_pos == ctx.kv_len - 1)

    return AttentionVariant(mask_mod=mask_mod, extras={"keep": "request"})


SLOPES = variants.alibi_slopes(4)
VARIANTS = {
    "soft_cap": (variants.soft_cap(2.0), {}),
    "alibi": (variants.alibi(), {"slopes": SLOPES}),
    "all_three": (
        variants.compose(variants.soft_cap(5.0), variants.alibi(), variants.window(7, first=2)),
        {"slopes": SLOPES},
    ),
    "window": (variants.window(9), {}),
    "sigmoid": (variants.sigmoid(-0.5), {}),
    "rope": (variants.rope(100.0), {}),
    "bias": (
        bias_table(),
        {"bias": np.random.default_rng(1).normal(size=(4, 40)).astype("float32")},
    ),
    "by_request": (by_request(), {"keep": np.array([5, 30, 2, 9], "int32")}),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_are_the_same_functions(name):
    variant, extra = VARIANTS[name]
    q_len, kv_len = [1, 20, 3], [60, 45, 3]
    q, cache, table = random_case(
        np.random.default_rng(7),
        q_len=q_len,
        kv_len=kv_len,
        q_heads=4,
        kv_heads=2,
        head_dim=32,
        page_size=8,
    )
    spec = make_spec(q_len, cache, q, table, variant=variant)
    got = run(q, cache, table, q_len, spec, extra)
    want = attend64(q, cache, table, q_len, sm_scale=SM_SCALE, variant=variant, extra=extra)
    check(got, want, 1e-5, use_softmax=variant.use_softmax)


@pytest.mark.interpreted
@pytest.mark.parametrize("per_head", [False, True])
def test_packed_masks(per_head):
    rng = np.random.default_rng(2)
    q_len, kv_len = [1, 18, 4], [50, 40, 4]
    q, cache, table = random_case(
        rng, q_len=q_len, kv_len=kv_len, q_heads=4, kv_heads=2, head_dim=16, page_size=8
    )
    lead = (4,) if per_head else ()
    masks = [rng.random((*lead, n, keys)) < 0.5 for n, keys in zip(q_len, kv_len, strict=True)]
    variant = variants.packed_mask(per_head=per_head)
    spec = make_spec(q_len, cache, q, table, variant=variant)
    got = run(q, cache, table, q_len, spec, {"mask": variants.pack_mask(masks)})
    want = attend64(q, cache, table, q_len, sm_scale=SM_SCALE, masks=masks)
    check(got, want, 1e-5)


@pytest.mark.interpreted
def test_shared_prefixes_are_read_once_and_change_nothing():
    rng = np.random.default_rng(9)
    q_len, kv_len = [1, 2, 1, 5], [40, 50, 30, 37]
    q, cache, table = random_case(
        rng, q_len=q_len, kv_len=kv_len, q_heads=4, kv_heads=2, head_dim=16, page_size=8
    )
    pages = table.indices.copy()
    for request in (1, 3):  # requests 0, 1 and 3 begin with the same three pages
        pages[table.indptr[request] : table.indptr[request] + 3] = pages[:3]
    table = type(table)(indptr=table.indptr, indices=pages, kv_len=table.kv_len)
    spec = make_spec(q_len, cache, q, table, cascade_levels=1)
    shared = [SharedPrefix(requests=(0, 1, 3), begin=0, end=24)]
    got = run(q, cache, table, q_len, spec, shared=shared)
    check(got, attend64(q, cache, table, q_len, sm_scale=SM_SCALE), 1e-5)


@pytest.mark.interpreted
def test_where_pages_lie_changes_no_bit():
    rng = np.random.default_rng(4)
    q_len, kv_len = [1, 9], [70, 33]
    q, cache, table = random_case(
        rng, q_len=q_len, kv_len=kv_len, q_heads=4, kv_heads=2, head_dim=16, page_size=4
    )
    spec = make_spec(q_len, cache, q, table)
    first = run(q, cache, table, q_len, spec)
    order = np.r_[0, 1 + rng.permutation(cache.num_pages - 1)]
    moved = PagedKV(k=cache.k[np.argsort(order)], v=cache.v[np.argsort(order)])
    table = type(table)(
        indptr=table.indptr, indices=order[table.indices].astype("int32"), kv_len=table.kv_len
    )
    second = run(q, moved, table, q_len, spec)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def abstract(spec, *, num_pages=1024, scale=False):
    pool = shape(num_pages, spec.kv_heads, spec.page_size, spec.head_dim, dtype=spec.kv_dtype)
    factor = shape(spec.kv_heads, dtype="float32") if scale else None
    return (
        shape(spec.max_tokens, spec.q_heads, spec.head_dim, dtype=spec.q_dtype),
        PagedKV(k=pool, v=pool, k_scale=factor, v_scale=factor),
        Plan(buffer=shape(spec.num_words, dtype="int32"), spec=spec),
    )


def model_spec(**options):
    defaults = {
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "page_size": 16,
        "max_requests": 64,
        "max_tokens": 256,
        "max_pages": 1024,
    }
    return PlanSpec(**{**defaults, **options})


CAPPED = variants.compose(variants.soft_cap(30.0), variants.alibi(), variants.window(1023, first=4))
COMPILED = {
    "plain": model_spec(),
    "decode": model_spec(tile_q=16, max_tokens=64),
    "wide": model_spec(tile_q=128),
    "narrow heads": model_spec(head_dim=64, page_size=1),
    "wide heads": model_spec(head_dim=256, q_heads=8, kv_heads=2),
    "float8": model_spec(kv_dtype="float8_e4m3fn", window=4096),
    "int8": model_spec(kv_dtype="int8", tile_q=16),
    "float32": model_spec(q_dtype="float32", kv_dtype="float32", head_dim=64),
    "variant": model_spec(variant=CAPPED, q_heads=40),
    "rope": model_spec(variant=variants.rope(), tile_q=16, max_tokens=64),
}


QUICK = ("plain", "float8")
"""What compiles most of both tiles, and the conversion that differs from device to device."""


@pytest.mark.compiled
@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in COMPILED])
def test_it_compiles_for_every_device(name):
    spec = COMPILED[name]
    # Each of the others takes seconds, and differs little from device to device.
    is_usual = name in ("plain", "decode", "float8", "wide heads")
    extra = {"slopes": shape(spec.q_heads, dtype="float32")} if spec.variant.extras else {}
    compile_all(
        lambda q, c, p, e: attention(q, c, p, extra=e, backend="triton"),
        *abstract(spec, scale=spec.kv_dtype in ("int8", "float8_e4m3fn")),
        extra,
        capabilities=(80, 89, 90) if is_usual else (90,),
    )


@pytest.mark.compiled
def test_launches_become_part_of_a_program(monkeypatch):
    spec = model_spec()
    text = lower_for_cuda(
        monkeypatch,
        lambda q, c, p: attention(q, c, p, backend="triton"),
        *abstract(spec),
    )
    assert text.count("triton_kernel_call") == 2


def reason(spec, capability="9.0"):
    return refusal(
        "triton", Case(spec=spec, variant=spec.variant, platform="gpu", capability=capability)
    )


@pytest.mark.compiled
def test_what_kernels_cannot_do_is_named(monkeypatch):
    from jaxserve.pallas_kernels import triton_launch

    assert "needs an NVIDIA GPU, and JAX runs on cpu here" in reason(model_spec())
    monkeypatch.setattr(triton_launch, "unavailable", lambda: None)
    assert reason(model_spec()) is None
    assert "compute capability 7.5; the kernels need 8.0" in reason(model_spec(), "7.5")
    assert "heads of 512 numbers; the kernels hold at most 256" in reason(model_spec(head_dim=512))
    assert "heads of 16; they need at least 32" in reason(
        model_spec(head_dim=16, variant=variants.rope())
    )

    def cumulative(s, ctx, q_pos, k_pos, head):
        return jnp.cumsum(s, axis=1)

    held = np.arange(32.0)

    def closed(s, ctx, q_pos, k_pos, head):
        return s + held[None, :]

    extras = {f"x{i}": "scalar" for i in range(5)}
    for variant, part in (
        (AttentionVariant(score_mod=cumulative), "score_mod uses 'cumsum', which Triton"),
        (AttentionVariant(score_mod=closed), "closes over an array of shape (1, 32), which"),
        (AttentionVariant(extras=extras), "a variant with 5 arrays; the kernels read 4"),
    ):
        assert part in reason(model_spec(variant=variant))
    with pytest.raises(UnsupportedError, match=r"'triton' cannot do this: .*'cumsum'"):
        compile_all(
            lambda q, c, p: attention(q, c, p, backend="triton"),
            *abstract(model_spec(variant=AttentionVariant(score_mod=cumulative))),
        )


@pytest.mark.compiled
def test_tiles_that_triton_cannot_have_are_refused():
    from jaxserve.pallas_kernels.attention.triton import TritonTiles

    with pytest.raises(ValueError, match=r"block_kv must be a power of 2, got 48"):
        TritonTiles(wide_rows=64, block_kv=48, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match=r"wide_rows must be 0 or a power of 2 from 16, got 8"):
        TritonTiles(wide_rows=8, block_kv=64, num_warps=4, num_stages=2)
