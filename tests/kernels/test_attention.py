import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import variant
from jaxserve.pallas_kernels.attention import api, backends
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.attention.card import CARD
from jaxserve.pallas_kernels.card import Tensor
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.prefixes import SharedPrefix
from tests.kernels.cases import CASES, TOLERANCE, Case, Problem, problem, problems

PORTABLE = ("xla", "reference")


def run(p: Problem, backend: str) -> tuple[np.ndarray, np.ndarray | None]:
    has_lse = p.spec.variant.use_softmax
    got = attention(
        jnp.asarray(p.q),
        p.kv,
        p.plan(),
        extra=p.extra,
        sm_scale=p.scale,
        return_lse=has_lse,
        backend=backend,
    )
    o, lse = got if has_lse else (got, None)
    assert o.dtype == p.q.dtype
    return np.asarray(o).astype(np.float64), None if lse is None else np.asarray(lse)


def check(p: Problem, backend: str) -> None:
    o, lse = run(p, backend)
    want, want_lse = p.answer()
    limit = TOLERANCE[p.spec.q_dtype]
    np.testing.assert_allclose(o, want, atol=limit, rtol=limit)
    if lse is not None:
        np.testing.assert_allclose(lse, want_lse, atol=max(limit, 1e-4), rtol=limit)


QUICK = {
    "xla": (
        "plain",
        "wide group",
        "both directions",
        "cap, alibi, window, sinks",
        "sigmoid",
        "rope",
        "mask per head",
        "int8 per page",
        "shared prefixes",
    ),
    "reference": ("plain", "cap, alibi, window, sinks", "sigmoid", "mask per head"),
}
"""Cases that are tried each time; a program has to be compiled for each."""
BOTH = [(backend, name) for backend in PORTABLE for name in CASES]


@pytest.mark.parametrize(
    ("backend", "name"),
    [pytest.param(b, n, marks=[] if n in QUICK[b] else pytest.mark.slow) for b, n in BOTH],
)
def test_agrees_with_float64(backend, name):
    check_many(CASES[name], backend)


def check_many(case: Case, backend: str) -> None:
    """Draw lengths and contents; one program serves them all."""

    @given(p=problems(case))
    @settings(max_examples=10)
    def agrees(p):
        check(p, backend)

    agrees()


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("kv_len", [0, 1, 15, 16, 17, 127, 128, 129])
def test_edges_of_pages_and_tiles(backend, kv_len):
    few = min(kv_len, 5)
    check(problem(CASES["plain"], [few, min(kv_len, 1), 0], [kv_len, kv_len, kv_len]), backend)


def test_more_queries_than_keys_see_nothing_at_first():
    p = problem(CASES["plain"], [5], [3])
    o, lse = run(p, "xla")
    assert (o[:2] == 0).all()
    assert np.isneginf(lse[:2]).all()
    assert np.isfinite(lse[2:5]).all()
    check(p, "xla")
    check(p, "reference")


@pytest.mark.parametrize("backend", PORTABLE)
def test_physical_pages_do_not_matter_to_the_last_bit(backend):
    results = []
    for seed in range(2):
        p = problem(CASES["plain"], [1, 20, 3], [100, 77, 19], seed=5)
        order = np.random.default_rng(seed).permutation(p.kv.num_pages - 1) + 1
        place = np.concatenate([[0], order])
        k, v = (np.empty_like(part) for part in (p.kv.k, p.kv.v))
        k[place], v[place] = p.kv.k, p.kv.v
        moved = dataclasses.replace(
            p,
            kv=PagedKV(k=jnp.asarray(k), v=jnp.asarray(v)),
            table=dataclasses.replace(p.table, indices=place[p.table.indices].astype(np.int32)),
        )
        results.append(run(moved, backend))
    assert (results[0][0] == results[1][0]).all()
    assert (results[0][1] == results[1][1]).all()


@pytest.mark.parametrize("mode", [{}, {"fixed_split_size": 64}, {"disable_split": True}])
def test_a_request_gets_the_same_bits_on_xla_in_any_company(mode):
    case = Case(settings=mode)
    alone = problem(case, [3], [150], seed=1)
    first, _ = run(alone, "xla")
    table, q = alone.table, alone.q
    others = np.array([[40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [50] * 10])
    rows = np.concatenate([others[:1], table.indices[None, :], others[1:]])
    company = dataclasses.replace(
        alone,
        kv=PagedKV(k=jnp.nan_to_num(alone.kv.k), v=jnp.nan_to_num(alone.kv.v)),
        table=PageTable.from_rows(rows, np.array([160, 150, 33]), 16),
        q=np.concatenate([q[10:30], q[:3], q[10:]])[: len(q)],
        q_len=[20, 3, 7],
    )
    second, _ = run(company, "xla")
    assert (first[:3] == second[20:23]).all()


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("mode", [{}, {"fixed_split_size": 64}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_request_gone_bad_harms_no_other(backend, mode, bad):
    p = problem(Case(settings=mode), [1, 2, 1, 9], [100, 77, 50, 30], seed=3)
    pages = p.table.indices[p.table.indptr[1] : p.table.indptr[2]]
    kv = dataclasses.replace(p.kv, k=p.kv.k.at[pages, 0].set(bad), v=p.kv.v.at[pages, 1].set(bad))
    o, lse = run(p, backend)
    spoilt, spoilt_lse = run(dataclasses.replace(p, kv=kv), backend)
    others = [0, *range(3, len(o))]
    assert (spoilt[others] == o[others]).all()
    assert (spoilt_lse[others] == lse[others]).all()
    # And it is not hidden from the request itself.
    assert not np.isfinite(spoilt[1:3]).all(axis=-1).any()
    assert np.isnan(spoilt_lse[1:3, :2]).all()


def test_nothing_compiles_when_lengths_change():
    case = CASES["plain"]
    run(problem(case, [1], [5]), "xla")
    compiled = api._attend._cache_size()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        kv_len = rng.integers(0, 260, size=rng.integers(1, 6))
        q_len = np.minimum(kv_len, rng.integers(0, 14, size=kv_len.size))
        run(problem(case, q_len.tolist(), kv_len.tolist(), seed=seed), "xla")
    assert api._attend._cache_size() == compiled


def test_variants_with_equal_code_share_a_program():
    def kind():
        return variant.compose(variant.soft_cap(5.0), variant.alibi(), variant.window(40))

    first, second = (problem(Case(kind=kind(), extras=("slopes",)), [2], [9]) for _ in range(2))
    run(first, "xla")
    compiled = api._attend._cache_size()
    run(second, "xla")
    assert api._attend._cache_size() == compiled


@pytest.mark.parametrize("backend", PORTABLE)
def test_a_variant_of_ones_own(backend):
    def score_mod(s, ctx, q_pos, k_pos, head):
        near = ctx["gain"] * jnp.exp2(-0.1 * (q_pos - k_pos).astype(jnp.float32))
        return s + near * ctx["strength"] + ctx.take("bias", head, k_pos % 4)

    def out_mod(o, ctx, lse, q_pos, head):
        return o * ctx["strength"] + jnp.where(lse > 0, 1.0, -1.0) * (head == 1)

    own = variant.AttentionVariant(
        score_mod=score_mod,
        mask_mod=lambda ctx, q_pos, k_pos, head: (k_pos % 3 != 1) | (k_pos == q_pos),
        out_mod=out_mod,
        extras={"gain": "request", "strength": "scalar", "bias": "array"},
    )
    p = problem(Case(kind=own), [4, 1, 9], [40, 7, 9], seed=2)
    rng = np.random.default_rng(0)
    bias = rng.normal(size=(4, 4)).astype(np.float32)
    gain = rng.normal(size=5).astype(np.float32)
    extra = {"gain": gain, "strength": np.float32(0.7), "bias": bias}
    o, lse = run(dataclasses.replace(p, extra=extra), backend)

    for r, (start, count, kv_len) in enumerate([(0, 4, 40), (4, 1, 7), (5, 9, 9)]):
        pages = p.table.indices[p.table.indptr[r] : p.table.indptr[r + 1]]
        k, v = (
            np.repeat(np.asarray(x)[pages].swapaxes(1, 2).reshape(-1, 2, 16)[:kv_len], 2, axis=1)
            for x in (p.kv.k, p.kv.v)
        )
        q_pos, k_pos = kv_len - count + np.arange(count)[:, None], np.arange(kv_len)[None, :]
        s = np.einsum("qhd,khd->hqk", p.q[start : start + count].astype(float), k) / 4
        s = s + 0.7 * gain[r] * 2.0 ** (-0.1 * (q_pos - k_pos)) + bias[:, None, k_pos[0] % 4]
        s[:, (k_pos > q_pos) | ((k_pos % 3 == 1) & (k_pos != q_pos))] = -np.inf
        w = np.exp(s)
        mass = np.log2(w.sum(2)).T
        want = np.einsum("hqk,khd->qhd", w / w.sum(2, keepdims=True), v) * 0.7
        want[:, 1] += np.where(mass[:, 1] > 0, 1.0, -1.0)[:, None]
        np.testing.assert_allclose(o[start : start + count], want, atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(lse[start : start + count], mass, atol=1e-4)


@pytest.mark.parametrize("backend", PORTABLE)
def test_nested_prefixes_change_nothing(backend):
    prefix = SharedPrefix(requests=(0, 2, 3), begin=0, end=64)
    inner = SharedPrefix(requests=(0, 3), begin=64, end=96)
    q_len, kv_len = [1, 4, 2, 1], [130, 50, 90, 100]
    case = CASES["shared prefixes"]
    check(problem(case, q_len, kv_len, shared=[prefix, inner], seed=3), backend)


def test_groups_of_one_are_flat():
    p = problem(CASES["shared prefixes"], [1, 3], [40, 70], seed=4)
    check(p, "xla")


def test_decode_and_prefill_plan_by_themselves():
    p = problem(CASES["plain"], [1, 1, 1], [100, 7, 33], seed=6)
    got = api.decode(jnp.asarray(p.q[:3]), p.kv, p.table)
    np.testing.assert_allclose(got, p.answer()[0][:3], atol=2e-5)
    p = problem(CASES["plain"], [9, 2], [100, 7], seed=6)
    got = api.prefill(jnp.asarray(p.q[:11]), p.kv, np.array([9, 2]), p.table)
    np.testing.assert_allclose(got, p.answer()[0][:11], atol=2e-5)


def test_works_inside_jit():
    p = problem(CASES["plain"], [2], [30])

    @jax.jit
    def step(q, kv, plan):
        return attention(q, kv, plan) * 2

    got = step(jnp.asarray(p.q), p.kv, p.plan())
    np.testing.assert_allclose(np.asarray(got)[:2], 2 * p.answer()[0][:2], atol=5e-5)


def test_the_other_layout_is_converted_at_the_door():
    k = np.arange(2 * 4 * 3 * 8, dtype=np.float32).reshape(2, 4, 3, 8)
    kv = PagedKV.from_nhd(jnp.asarray(k), jnp.asarray(k))
    assert kv.k.shape == (2, 3, 4, 8)
    assert (np.asarray(kv.k)[1, 2, 3] == k[1, 3, 2]).all()


def changed(**change):
    p = problem(CASES["plain"], [2], [30])
    arguments = {"q": jnp.asarray(p.q), "kv": p.kv, "plan": p.plan(), **change}
    return attention(arguments.pop("q"), arguments.pop("kv"), arguments.pop("plan"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((3, 4, 16))}, r"q must be .* = \(72, 4, 16\) .* got \(3, 4, 16\)"),
        (
            {"q": jnp.zeros((72, 4, 16), jnp.bfloat16)},
            "dtype of q is bfloat16, but the plan was made for float32",
        ),
        (
            {"kv": PagedKV(k=jnp.zeros((9, 2, 8, 16)), v=jnp.zeros((9, 2, 8, 16)))},
            "page_size is 8, but the plan was made for 16",
        ),
        (
            {"kv": PagedKV(k=jnp.zeros((9, 4, 16, 16)), v=jnp.zeros((9, 4, 16, 16)))},
            "kv_heads is 4, but the plan was made for 2",
        ),
        (
            {"kv": PagedKV(k=jnp.zeros((9, 2, 16, 16)), v=jnp.zeros((8, 2, 16, 16)))},
            "equal leading axes",
        ),
        (
            {
                "kv": PagedKV(
                    k=jnp.zeros((9, 2, 16, 16)),
                    v=jnp.zeros((9, 2, 16, 16)),
                    k_scale=jnp.zeros(3),
                )
            },
            r"k_scale must have shape \(\), \(kv_heads,\) = \(2,\) .* got \(3,\)",
        ),
        ({"extra": {"slope": 1}}, "unknown extra 'slope'. The variant reads: none"),
        ({"variant": variant.alibi()}, r"reads the extras \['slopes'\], which are missing"),
        (
            {"variant": variant.alibi(), "extra": {"slops": jnp.zeros(4)}},
            "unknown extra 'slops'. Did you mean 'slopes'",
        ),
        (
            {"variant": variant.alibi(), "extra": {"slopes": jnp.zeros(3)}},
            r"'slopes' is one per head, so of shape \(4,\), got \(3,\)",
        ),
        (
            {
                "variant": variant.alibi(),
                "extra": {"slopes": jnp.zeros(4), "mask": jnp.zeros(4, jnp.uint32)},
            },
            "unknown extra 'mask'. The variant reads: slopes",
        ),
        ({"variant": variant.packed_mask()}, "of which the plan knows nothing"),
        ({"variant": variant.sigmoid(), "return_lse": True}, "no lse without softmax"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        changed(**change)


def test_rotation_wants_heads_of_two_halves():
    p = problem(Case(settings={"head_dim": 15}), [2], [30])
    with pytest.raises(ValueError, match="head_dim is 15; pad it to 16"):
        attention(jnp.asarray(p.q), p.kv, p.plan(), variant=variant.rope())


def test_masks_of_the_wrong_form_are_refused():
    p = problem(CASES["mask"], [2], [30])
    with pytest.raises(ValueError, match=r"uint32 words \['words'\], got int32 \(7,\)"):
        run(dataclasses.replace(p, extra={"mask": np.zeros(7, np.int32)}), "xla")


def test_masks_and_pages_that_are_not_there_are_told():
    p = problem(CASES["mask"], [2], [40])
    short = dataclasses.replace(p, extra={"mask": p.extra["mask"][:3]})
    with pytest.raises(ValueError, match=r"the mask has 3 words, but .* need 4; pack_mask"):
        run(short, "xla")
    p = problem(CASES["plain"], [2], [30])
    few = PagedKV(k=p.kv.k[:2], v=p.kv.v[:2])
    with pytest.raises(ValueError, match="names pages 0 to 2, but the pool has 2: 0 to 1"):
        run(dataclasses.replace(p, kv=few), "xla")


def test_no_tokens_get_no_output():
    p = problem(CASES["plain"], [], [])
    assert api.decode(jnp.asarray(p.q[:0]), p.kv, p.table).shape == (0, 4, 16)


def test_a_plan_that_skips_serves_no_other_variant():
    p = problem(CASES["first and window"], [2], [30])
    with pytest.raises(ValueError, match="so it serves no other variant"):
        attention(jnp.asarray(p.q), p.kv, p.plan(), variant=variant.soft_cap(1.0))


def test_what_no_kernel_can_do_is_unsupported():
    with pytest.raises(UnsupportedError, match=r"share one dtype of .* got int32 and int32"):
        changed(kv=PagedKV(k=jnp.zeros((9, 2, 16, 16), int), v=jnp.zeros((9, 2, 16, 16), int)))
    with pytest.raises(UnsupportedError, match=r"unknown backend 'mosiac'. Did you mean 'mosaic'"):
        changed(backend="mosiac")


class Picky:
    """A backend that can do nothing."""

    @staticmethod
    def supports(case):
        return f"it wants pages of 7, got {case.spec.page_size}"


def test_backends_refuse_or_fall_back_but_never_silently(monkeypatch, caplog):
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda n: Picky if n == "triton" else load(n))
    message = "'triton' cannot do this: it wants pages of 7, got 16. Backends that can: xla, ref"
    with pytest.raises(UnsupportedError, match=message):
        changed(backend="triton")
    assert not caplog.records
    assert (changed(backend="triton", fallback=True) == changed(backend="xla")).all()
    assert "runs on 'xla'. mosaic: " in caplog.text
    assert "triton: it wants pages of 7, got 16" in caplog.text
    monkeypatch.setattr(backends, "load", lambda n: Picky)
    with pytest.raises(UnsupportedError, match=r"no backend can do this. mosaic: it wants"):
        changed()


def test_no_kernel_on_a_gpu_is_told_once(monkeypatch, caplog):
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda n: Picky if n in ("mosaic", "triton") else load(n))
    spec = Case(page_size=8).spec()
    for _ in range(2):
        case = backends.Case(spec=spec, variant=spec.variant, platform="gpu", capability="9.0")
        assert backends.choose(case) == "xla"
    (record,) = caplog.records
    assert "wants pages of 7, got 8" in record.getMessage()
    caplog.clear()
    assert backends.choose(dataclasses.replace(case, platform="cpu")) == "xla"
    assert not caplog.records


@pytest.mark.parametrize("names", [("soft_cap", "alibi"), ("alibi", "soft_cap")])
@given(data=st.data())
@settings(max_examples=1)
def test_composition_has_an_order(names, data):
    parts = {"soft_cap": variant.soft_cap(2.0), "alibi": variant.alibi()}
    both = variant.compose(*(parts[n] for n in names))
    p = problem(Case(kind=both, extras=("slopes",)), [1], [40], seed=1)
    o, _ = run(p, "xla")
    capped_first = problem(
        Case(
            kind=both,
            extras=("slopes",),
            options=dataclasses.replace(p.options, soft_cap=2.0),
        ),
        [1],
        [40],
        seed=1,
    ).answer()[0]
    agrees = np.allclose(o, capped_first, atol=1e-4)
    assert agrees == (names[0] == "soft_cap")


def test_plans_of_one_batch_serve_all_layers():
    p = problem(CASES["plain"], [2, 1], [30, 50])
    plan = make_plan(p.spec, np.array(p.q_len), p.table)
    q = jnp.asarray(p.q)
    first = attention(q, p.kv, plan)
    other = PagedKV(k=p.kv.v, v=p.kv.k)
    second = attention(q, other, plan)
    assert not jnp.allclose(first[:3], second[:3])


@pytest.mark.parametrize("dtype", CARD.tolerances)
def test_the_card_holds(dtype):
    sizes = CARD.tiny()
    for backend in CARD.backends:
        reason = CARD.supports(backend, sizes, dtype)
        if reason is None:
            inputs = CARD.make(sizes, dtype, 0)
            got, want = CARD.run(**inputs, backend=backend), CARD.reference(**inputs)
            assert CARD.difference(got, want, dtype) is None
            wrong = np.asarray(want).astype(np.float64)
            wrong[1, 2, 3] += 1
            assert "the worst, at (1, 2, 3)" in CARD.difference(wrong, want, dtype)
            wrong[1, 2, 3] = np.nan
            assert "1 of" in CARD.difference(wrong, want, dtype)
    assert CARD.difference(np.ones(2), np.ones(3), dtype) == "shape (2,), expected (3,)"


def test_the_card_counts_bytes_and_operations():
    sizes = {**CARD.tiny(), "requests": 1, "q_len": 3, "kv_len": 10}
    pairs = sum(10 - 3 + 1 + i for i in range(3))
    assert CARD.num_flops(sizes) == 4 * 4 * 64 * pairs
    assert CARD.num_bytes(sizes, "bfloat16") == 2 * 2 * 64 * (3 * 4 + 10 * 2)


def test_cards_are_written_in_their_own_axes():
    with pytest.raises(ValueError, match=r"q has unknown axes \['row'\], expected some of"):
        dataclasses.replace(
            CARD, inputs={"q": Tensor(axes=("row",), dtypes=("float32",), meaning="")}
        )
