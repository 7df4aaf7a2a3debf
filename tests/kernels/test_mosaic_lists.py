"""The Mosaic kernel over lists of tokens: interpreted without races, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention import mosaic_pages
from jaxserve.pallas_kernels.attention.mosaic_tile import SHARED_MEMORY_LIMIT
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.token_attention import TokenLists, api, mosaic, token_attention
from jaxserve.pallas_kernels.variant import PLAIN
from tests.kernels.list_cases import Lists, run
from tests.kernels.mosaic_cases import Without

slow = pytest.mark.slow
mosaic_mark = pytest.mark.mosaic
race = pytest.mark.race

CASES = {
    "one_list_of_two_ctas": Lists(kv_len=[90], listed=[[70]]),
    "one_token": Lists(kv_len=[20, 9], listed=[[1], [1]], ctas=1),
    "empty_lists_between": Lists(kv_len=[140, 40], listed=[[130, 0, 0, 3], [0, 40, 1, 0]], ctas=3),
    "all_empty": Lists(kv_len=[20], listed=[[0, 0]]),
    "orders_of_magnitude": Lists(kv_len=[400, 400], listed=[[400, 3], [1, 40]], ctas=3),
    "more_ctas_than_tiles": Lists(kv_len=[100], listed=[[100, 20]], ctas=5),
    "longer_than_the_ring": Lists(kv_len=[330], listed=[[320]], ctas=1),
    "no_group": Lists(kv_len=[70], listed=[[66, 5]], group=1),
    "group_of_8": Lists(kv_len=[70], listed=[[66, 5]], group=8),
    "group_of_5": Lists(kv_len=[70], listed=[[66, 5]], group=5),
    "page_8": Lists(kv_len=[70], listed=[[66]], page_size=8),
    "page_128": Lists(kv_len=[200], listed=[[66]], page_size=128),
    "dim_128": Lists(kv_len=[70], listed=[[66]], dim=128),
    "dim_256": Lists(kv_len=[70], listed=[[66]], dim=256),
    "bfloat16": Lists(kv_len=[70], listed=[[66]], dtype="bfloat16"),
    "in_order": Lists(kv_len=[100], listed=[[70, 17]], in_order=True),
    "in_order_of_small_pages": Lists(kv_len=[70], listed=[[66]], in_order=True, page_size=8),
    "stages": Lists(kv_len=[300], listed=[[300]], ctas=1, stages=3),
}
QUICK = ("one_list_of_two_ctas", "in_order")


@mosaic_mark
@race
@pytest.mark.parametrize(
    "step",
    [pytest.param(c, id=n, marks=() if n in QUICK else slow) for n, c in CASES.items()],
)
def test_lists_equal_the_answer_in_float64_without_races(step):
    outcome = run(step)
    outcome.check()
    assert outcome.races_found is False


@mosaic_mark
@race
@slow
@settings(max_examples=8, deadline=None)
@given(
    kv_len=st.integers(1, 150),
    shares=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.9, 1.0]), min_size=3, max_size=3),
    group=st.integers(1, 8),
    ctas=st.integers(1, 4),
    page_size=st.sampled_from([8, 64]),
    in_order=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_lists_equal_the_answer_in_float64(shares, kv_len, seed, **sizes):
    listed = [[int(np.ceil(share * kv_len)) for share in shares]]
    step = Lists(kv_len=[kv_len], listed=listed, **sizes)
    outcome = run(step, seed=seed)
    outcome.check()
    assert outcome.races_found is False


SHORT = Lists(kv_len=[20], listed=[[5]], ctas=1)
LONG = Lists(kv_len=[150], listed=[[140]], ctas=1)
MANY = Lists(kv_len=[9], listed=[[5, 6, 7]], ctas=1)


@mosaic_mark
@race
@pytest.mark.parametrize(
    ("module", "call", "words", "step"),
    [
        (mosaic, "barrier_wait", "ring.full", SHORT),
        pytest.param(mosaic, "barrier_wait", "refs.q_full", SHORT, marks=slow),
        pytest.param(mosaic, "barrier_wait", "refs.q_empty", MANY, marks=slow),
        pytest.param(mosaic, "barrier_wait", "ring.empty", LONG, marks=slow),
        pytest.param(mosaic, "commit_smem", "", SHORT, marks=slow),
    ],
)
def test_what_is_left_out_is_reported(monkeypatch, module, call, words, step):
    assert is_reported_without(monkeypatch, module, call, words, step) is True


@mosaic_mark
@race
@slow
def test_last_phases_that_nobody_waits_for_are_reported_where_somebody_must(monkeypatch):
    """JAX 0.12 lets go of them where no further barrier is allocated, as here."""
    found = is_reported_without(monkeypatch, mosaic_pages, "barrier_wait", "", LONG)
    assert found is (jax.__version_info__ < (0, 12))


def is_reported_without(monkeypatch, module, call, words, step):
    """Tell whether leaving some calls out is found: a race, or a phase that nobody has seen."""
    crippled = Without(module.plgpu, call, words)
    monkeypatch.setattr(module, "plgpu", crippled)
    try:
        found = run(step).races_found
    except jax.errors.JaxRuntimeError as error:
        found = "phase" in str(error)
    assert crippled.is_met
    return found


share = jax.jit(mosaic.share, static_argnums=2)


@pytest.mark.parametrize("num_ctas", [1, 3, 132])
def test_shares_of_tiles_are_equal_and_cover_all(num_ctas):
    @given(total=st.integers(0, 10_000))
    def holds(total):
        first, last = map(np.asarray, share(total, np.arange(num_ctas, dtype=np.int32), num_ctas))
        assert first[0] == 0
        assert last[-1] == total
        np.testing.assert_array_equal(first[1:], last[:-1])
        assert np.ptp(last - first) <= 1

    holds()


def state_of(scores, values):
    """Return the state of some tokens: output and base-2 logarithm of mass."""
    weights = np.exp2(scores)
    return weights @ values / weights.sum(axis=-1, keepdims=True), np.log2(weights.sum(axis=-1))


merge = jax.jit(mosaic._merge, static_argnums=0)


@settings(max_examples=40, deadline=None)
@given(
    tiles=st.lists(st.sampled_from([0, 0, 1, 2, 7, 90]), min_size=6, max_size=6),
    num_ctas=st.sampled_from([1, 4, 11]),
    seed=st.integers(0, 1000),
)
def test_partial_states_merge_into_whole_lists(tiles, num_ctas, seed):
    """One token stands for each tile; what the kernel would write is put where it would be."""
    rng = np.random.default_rng(seed)
    rows, group, dim = len(tiles), 2, 4
    kernel = mosaic._Kernel(
        config=mosaic.TuningConfig(),
        num_ctas=num_ctas,
        rows=rows,
        kv_heads=1,
        group=group,
        head_dim=dim,
        page_size=16,
        sm_scale=1.0,
        dtype=jnp.dtype("float32"),
    )
    ends = np.cumsum(tiles).astype(np.int32)
    lists = list(zip(ends - tiles, ends, strict=True))
    scores, values = rng.normal(size=(group, ends[-1])) * 4, rng.normal(size=(ends[-1], dim))
    o, part = (np.full((n, group, dim), np.nan, np.float32) for n in (rows, 2 * num_ctas))
    lse, part_lse = (np.full((n, group), np.nan, np.float32) for n in (rows, 2 * num_ctas))
    bounds = share(ends[-1], np.arange(num_ctas, dtype=np.int32), num_ctas)
    for cta, (first, last) in enumerate(zip(*map(np.asarray, bounds), strict=True)):
        for row, (begin, end) in enumerate(lists):
            start, stop = max(begin, first), min(end, last)
            if start >= stop:
                continue
            state = state_of(scores[:, start:stop], values[start:stop])
            if (start, stop) == (begin, end):
                o[row], lse[row] = state
            else:
                slot = 2 * cta + (start == begin)
                assert np.isnan(part_lse[slot]).all()
                part[slot], part_lse[slot] = state
    found = merge(kernel, ends, o, lse, part, part_lse)
    for row, (begin, end) in enumerate(lists):
        want = np.zeros((group, dim)), np.full(group, -np.inf)
        if begin < end:
            want = state_of(scores[:, begin:end], values[begin:end])
        for got, expected in zip(found, want, strict=True):
            np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-5)


def arguments(dtype="bfloat16", q_dtype=None, group=4, dim=128, v_dim=None, page_size=16, **scales):
    array = jax.ShapeDtypeStruct
    pool, q = (9, 2, page_size), (3, 2 * group, dim)
    cache = PagedKV(
        k=array((*pool, dim), jnp.dtype(dtype)),
        v=array((*pool, v_dim or dim), jnp.dtype(dtype)),
        **scales,
    )
    return array(q, jnp.dtype(q_dtype or dtype)), cache


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 96}, "head_dim must be one of 64, 128, 256, got 96"),
        ({"v_dim": 64}, "v_head_dim must be 128, got 64"),
        ({"page_size": 4}, "page_size must be one of 8, 16, 32, 64, 128, got 4"),
        ({"dtype": "float32"}, "the cache's dtype must be one of bfloat16, float16, got float32"),
        ({"q_dtype": "float16"}, "q's dtype must be bfloat16, got float16"),
        ({"group": 9}, "a group must have 8 query heads or fewer, got 9"),
        ({"k_scale": 1.0}, "it multiplies with no scales of keys or values; store them unscaled"),
    ],
)
def test_what_the_kernel_cannot_do_is_named_with_the_nearest(changes, words):
    assert mosaic.why_not(*arguments(), PLAIN) is None
    assert mosaic.why_not(*arguments(**changes), PLAIN) == words


def test_variants_that_change_scores_are_refused_and_others_are_not():
    words = "it computes plain softmax attention, and the variant has "
    assert mosaic.why_not(*arguments(), variants.soft_cap(3.0)) == words + "score_mod"
    assert mosaic.why_not(*arguments(), variants.window(9)) == words + "mask_mod"
    sigmoid = mosaic.why_not(*arguments(), variants.sigmoid(-1.0))
    assert sigmoid == words + "score_mod, use_softmax=False"
    assert mosaic.why_not(*arguments(), variants.sinks()) is None


@pytest.mark.parametrize("settings_", [{"stages": 1}, {"ctas": 3}])
def test_impossible_sizes_are_refused(settings_):
    (name,) = settings_
    with pytest.raises(ValueError, match=f"{name} must be"):
        mosaic.TuningConfig(**settings_)


def test_every_configuration_of_the_table_fits_shared_memory():
    table = mosaic.tuning_table()
    assert {key.dim for key in table} == set(mosaic.HEAD_DIMS)
    for key, candidates in table.items():
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            assert key.shared_memory(config) <= SHARED_MEMORY_LIMIT / config.ctas
        assert mosaic.choose(key.dim) == candidates[0]


def test_auto_takes_mosaic_on_hopper_and_falls_to_triton(monkeypatch):
    q, cache = arguments()
    assert api.choose("auto", q, cache) == "xla"
    with pytest.raises(UnsupportedError, match=r"capability 9\.0, found cpu; use backend='auto'"):
        api.choose("mosaic", q, cache)
    with pytest.raises(ValueError, match=r"got 'mosaik'\. Did you mean 'mosaic'"):
        api.choose("mosaik", q, cache)
    monkeypatch.setattr(api, "present_device", lambda: ("gpu", "9.0"))
    monkeypatch.setattr(api.triton_launch, "unavailable", lambda: None)
    assert api.choose("auto", q, cache) == "mosaic"
    assert api.choose("auto", q, cache, variants.soft_cap(3.0)) == "triton"
    assert api.choose("auto", *arguments(page_size=1)) == "triton"
    assert api.choose("auto", *arguments(dim=320, page_size=1)) == "xla"
    with pytest.raises(
        UnsupportedError, match=r"page_size must be one of .* got 1; use backend='a"
    ):
        api.choose("mosaic", *arguments(page_size=1))
    monkeypatch.setattr(api, "present_device", lambda: ("gpu", "10.0"))
    assert api.choose("auto", q, cache) == "triton"


def test_a_refusal_is_raised_before_anything_is_traced():
    q, cache = arguments(page_size=4)
    with pytest.raises(UnsupportedError, match=r"page_size must be one of .*'triton' or 'xla'"):
        mosaic.token_attention(q, cache, None, None, None, sm_scale=1.0, variant=PLAIN)


def test_the_public_function_takes_the_kernel(monkeypatch):
    asked = []

    def spy(*args, **options):
        asked.append(options["variant"])
        return jax.tree.map(
            lambda x: x,
            api.reference.token_attention(
                args[0], args[1], args[2], args[3], jnp.asarray([5]), args[4], **options, extra={}
            ),
        )

    monkeypatch.setattr(api, "present_device", lambda: ("gpu", "9.0"))
    monkeypatch.setattr(mosaic, "token_attention", spy)
    rng = np.random.default_rng(0)
    pool = jnp.asarray(rng.normal(size=(2, 1, 8, 64)), jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(1, 2, 64)), jnp.bfloat16)
    lists = TokenLists(indptr=jnp.asarray([0, 3]), positions=jnp.asarray([4, 0, 2]))
    rest = (PagedKV(k=pool, v=pool), jnp.asarray([0, 1]), jnp.asarray([1]), jnp.asarray([5]), lists)
    got = token_attention(q, *rest)
    want = token_attention(q, *rest, backend="xla")
    assert asked == [PLAIN]
    np.testing.assert_array_equal(np.asarray(got.o), np.asarray(want.o))
