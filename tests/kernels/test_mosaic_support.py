"""What the Mosaic kernels refuse, with which words, and what their small parts compute."""

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention import mosaic, mosaic_decode, mosaic_prefill
from jaxserve.pallas_kernels.attention.backends import Case, refusal
from jaxserve.pallas_kernels.attention.mosaic_math import tanh, with_fast_math, within_turn
from jaxserve.pallas_kernels.attention.mosaic_tile import SHARED_MEMORY_LIMIT
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.variant import PLAIN

SPEC = PlanSpec(
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    page_size=16,
    max_requests=4,
    max_tokens=4,
    max_pages=64,
    tile_q=4,
)


def spec(**changes):
    return dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 96}, "head_dim must be one of {dims}, got 96"),
        ({"v_head_dim": 512}, "v_head_dim must be one of {dims}, got 512"),
        ({"page_size": 4}, "page_size must be one of 8, 16, 32, 64, 128, got 4"),
        ({"q_dtype": "float32"}, "q_dtype must be one of bfloat16, float16, got float32"),
        (
            {"kv_dtype": "int8"},
            "kv_dtype must be one of bfloat16, float16, float8_e4m3fn, got int8",
        ),
        ({"kv_dtype": "float16"}, "q_dtype must be kv_dtype = float16, got bfloat16"),
        ({"tile_kv": 32}, "tile_kv must be a multiple of 64, got 32"),
    ],
)
@pytest.mark.parametrize("module", [mosaic_decode, mosaic_prefill])
def test_what_no_kernel_can_do_is_named_with_the_nearest_that_it_can(module, changes, words):
    dims = ", ".join(map(str, module.HEAD_DIMS))
    assert module.why_not(spec(**changes), PLAIN) == words.format(dims=dims)


@pytest.mark.parametrize(
    ("module", "changes", "words"),
    [
        (
            mosaic_decode,
            {"tile_q": 68},
            "an item has 136 rows (17 tokens of 8), more than 64; set tile_q to 8 tokens",
        ),
        (
            mosaic_decode,
            {"head_dim": 256, "tile_q": 16},
            "head_dim 256 with 32 rows exceeds registers",
        ),
        (
            mosaic_decode,
            {"cascade_levels": 1},
            "shared prefixes have more rows than a decode tile; the prefill kernel takes them",
        ),
        (
            mosaic_prefill,
            {"tile_q": 132},
            "tile_q must be 128 or less for tiles of 4 heads, got 132",
        ),
        (
            mosaic_prefill,
            {"q_heads": 128, "kv_heads": 1, "tile_q": 128},
            "tiles have 128 heads, more than 64; lower tile_q",
        ),
    ],
)
def test_what_one_kernel_cannot_do_is_named(module, changes, words):
    assert module.why_not(spec(**changes), PLAIN) == words


def test_keys_that_registers_cannot_change_are_refused():
    wide = spec(head_dim=128, v_head_dim=128, tile_q=128)
    words = "two warpgroups that change keys exceed registers; set tile_q to 64 or less"
    assert mosaic_prefill.why_not(wide, variants.rope()) == words
    one = dataclasses.replace(wide, tile_q=64)
    assert mosaic_prefill.why_not(one, variants.rope()) is None
    narrow = dataclasses.replace(one, kv_dtype="float8_e4m3fn")
    words = "changing 8-bit keys of head_dim 128 exceeds registers; keep them as bfloat16"
    assert mosaic_prefill.why_not(narrow, variants.rope()) == words
    assert mosaic_prefill.why_not(narrow, PLAIN) is None
    small = dataclasses.replace(wide, page_size=8)
    words = "two warpgroups with pages of 8 and head_dim 128 exceed registers; set tile_q to 64"
    assert mosaic_prefill.why_not(small, PLAIN) == words + " or less"
    assert mosaic_prefill.why_not(dataclasses.replace(small, tile_q=64), PLAIN) is None
    words = "two warpgroups with scales per page and head_dim 128 exceed registers; set tile_q to"
    scaled = dataclasses.replace(wide, kv_dtype="float8_e4m3fn")
    case = Case(
        spec=scaled, variant=PLAIN, platform="gpu", capability="9.0", k_scale="page", v_scale="page"
    )
    assert refusal("mosaic", case) == words + " 64 or less"
    assert refusal("mosaic", dataclasses.replace(case, k_scale="head", v_scale="head")) is None


def test_variants_that_look_things_up_are_refused():
    looks_up = variants.AttentionVariant(
        score_mod=lambda s, ctx, q, k, h: s + ctx.take("table", k), extras={"table": "array"}
    )
    words = "the variant looks up table, and registers cannot be indexed"
    assert mosaic_decode.why_not(SPEC, looks_up) == words
    assert mosaic_prefill.why_not(SPEC, looks_up) == words


@pytest.mark.parametrize("kernel", [mosaic_decode.decode, mosaic_prefill.prefill])
def test_a_refusal_is_raised_before_anything_is_traced(kernel):
    from jaxserve.pallas_kernels.plan import Plan

    plan = Plan(buffer=jnp.zeros(0, jnp.int32), spec=spec(page_size=4))
    with pytest.raises(UnsupportedError, match=r"page_size must be one of .*backend='xla'"):
        kernel(None, None, plan, variant=PLAIN, extra={}, sm_scale=1.0)


@pytest.mark.parametrize(
    ("module", "settings", "words"),
    [
        (mosaic_decode, {"tile_kv": 96}, "tile_kv must be 64 or 128"),
        (mosaic_decode, {"stages": 1}, "stages must be 2 or more"),
        (mosaic_prefill, {"tile_kv": 32}, "tile_kv must be 64 or 128"),
        (mosaic_prefill, {"stages": 1}, "stages must be 2 or more"),
        (mosaic_prefill, {"o_columns": 24}, "o_columns must be 16, 32 or 64, got 24"),
    ],
)
def test_impossible_tiles_are_refused(module, settings, words):
    with pytest.raises(ValueError, match=words):
        module.TuningConfig(**settings)


@pytest.mark.parametrize("module", [mosaic_decode, mosaic_prefill])
def test_every_configuration_of_the_tables_fits_shared_memory(module):
    table = module.tuning_table()
    assert len(table) > 20
    for key, candidates in table.items():
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            assert key.shared_memory(config) <= SHARED_MEMORY_LIMIT / getattr(config, "ctas", 1)


def test_the_backend_is_for_hopper_only():
    case = Case(spec=SPEC, variant=PLAIN, platform="gpu", capability="9.0")
    assert mosaic.supports(case) is None
    for platform, capability in (("cpu", ""), ("gpu", "8.9"), ("gpu", "10.0")):
        other = dataclasses.replace(case, platform=platform, capability=capability)
        assert "needs a GPU of compute capability 9.0, found" in mosaic.supports(other)


def test_few_rows_go_to_the_decode_kernel_and_many_to_the_other():
    assert mosaic.uses_decode(spec(tile_q=4), PLAIN)
    assert mosaic.uses_decode(spec(tile_q=32), PLAIN)
    assert not mosaic.uses_decode(spec(tile_q=64), PLAIN)
    assert not mosaic.uses_decode(spec(tile_q=4, cascade_levels=1), PLAIN)


@given(st.floats(-40.0, 40.0, width=32))
def test_the_fast_tanh_is_accurate(x):
    assert abs(float(tanh(jnp.float32(x))) - np.tanh(np.float64(x))) < 3e-7


@given(st.floats(-100_000.0, 100_000.0, width=32))
def test_whole_turns_are_subtracted_accurately(x):
    got = float(within_turn(jnp.float32(x)))
    assert abs(got) <= np.pi * 1.001
    assert abs(np.sin(got) - np.sin(np.float64(x))) < 2e-6


def test_functions_are_replaced_within_jitted_parts_as_well():
    def function(x, *, shift):
        return jnp.where(x > 0, jnp.tanh(x), jnp.cos(x * 1000.0)) + shift

    x = jnp.linspace(-3.0, 3.0, 64)
    got = with_fast_math(function)(x, shift=jnp.float32(1.0))
    want = np.where(x > 0, np.tanh(x), np.cos(np.asarray(x) * np.float32(1000.0))) + 1.0
    np.testing.assert_allclose(got, want, atol=1e-5)
