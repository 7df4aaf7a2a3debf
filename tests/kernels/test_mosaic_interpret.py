"""The Mosaic attention kernels, interpreted: numbers equal the oracle's, and nothing races."""

import jax
import numpy as np
import pytest

from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention import mosaic_decode, mosaic_pages, mosaic_prefill
from tests.kernels.mosaic_cases import Step, Without, run
from tests.kernels.request_oracle import Options

pytestmark = [pytest.mark.mosaic, pytest.mark.race]

SLOPES = variants.alibi_slopes(8)


def tree_mask(q_len, kv_len, heads=None, seed=3):
    """Random masks in which every token sees its own key."""
    rng = np.random.default_rng(seed)
    masks = []
    for count, length in zip(q_len, kv_len, strict=True):
        shape = (count, length) if heads is None else (heads, count, length)
        mask = rng.random(shape) < 0.6
        for token in range(count):
            mask[..., token, length - count + token] = True
        masks.append(mask)
    return masks


MASKS = tree_mask([3, 2], [45, 70])
HEAD_MASKS = tree_mask([3, 2], [45, 70], heads=4)

DECODE = {
    "plain": Step(q_len=[1, 1, 1], kv_len=[70, 1, 16]),
    "no_keys": Step(q_len=[1, 1], kv_len=[65, 1], plan={"max_tokens": 2}),
    "split": Step(q_len=[1, 1], kv_len=[150, 20], plan={"fixed_split_size": 64}),
    "balanced": Step(q_len=[1, 1], kv_len=[200, 3], plan={"num_ctas": 3}),
    "group_of_5_drafts": Step(q_len=[2, 1], kv_len=[70, 9], q_heads=10, kv_heads=2),
    "group_of_7": Step(q_len=[1], kv_len=[66], q_heads=7),
    "group_of_16": Step(q_len=[1], kv_len=[66], q_heads=16),
    "no_group": Step(q_len=[1, 1], kv_len=[66, 5], q_heads=2, kv_heads=2),
    "page_8": Step(q_len=[1], kv_len=[75], page_size=8),
    "page_128": Step(q_len=[1], kv_len=[150], page_size=128),
    "dim_128": Step(q_len=[1], kv_len=[70], dim=128),
    "dim_256": Step(q_len=[1], kv_len=[70], dim=256),
    "bfloat16": Step(q_len=[1], kv_len=[70], dtype="bfloat16"),
    "window": Step(q_len=[1, 2], kv_len=[140, 30], options=Options(window=20)),
    "fp8_heads": Step(
        q_len=[1], kv_len=[70], q_heads=4, kv_heads=2, kv_dtype="float8_e4m3fn", scales="head"
    ),
    "fp8_pages": Step(
        q_len=[1], kv_len=[70], q_heads=4, kv_heads=2, kv_dtype="float8_e4m3fn", scales="page"
    ),
    "scale_of_all": Step(q_len=[1], kv_len=[70], scales="tensor"),
    "soft_cap": Step(
        q_len=[1],
        kv_len=[70],
        variant=variants.soft_cap(2.0),
        options=Options(soft_cap=2.0),
    ),
    "alibi_and_window": Step(
        q_len=[2, 1],
        kv_len=[70, 9],
        q_heads=8,
        kv_heads=2,
        variant=variants.compose(variants.alibi(), variants.window(30, first=3)),
        extra={"slopes": SLOPES},
        options=Options(slopes=SLOPES, window=30, first=3),
    ),
    "sigmoid": Step(
        q_len=[1],
        kv_len=[70],
        variant=variants.sigmoid(-2.0),
        options=Options(sigmoid_bias=-2.0),
    ),
    "sigmoid_split": Step(
        q_len=[1],
        kv_len=[150],
        variant=variants.sigmoid(-2.0),
        options=Options(sigmoid_bias=-2.0),
        plan={"fixed_split_size": 64},
    ),
    "mask": Step(
        q_len=[3, 2],
        kv_len=[45, 70],
        variant=variants.packed_mask(),
        extra={"mask": variants.pack_mask(MASKS)},
        options=Options(masks=MASKS),
    ),
    "mask_per_head": Step(
        q_len=[3, 2],
        kv_len=[45, 70],
        variant=variants.packed_mask(per_head=True),
        extra={"mask": variants.pack_mask(HEAD_MASKS)},
        options=Options(masks=HEAD_MASKS),
    ),
}
QUICK_DECODE = ("plain", "split", "group_of_5_drafts")

PREFILL = {
    "ragged": Step(q_len=[17, 5], kv_len=[70, 5]),
    "dim_128": Step(q_len=[9], kv_len=[70], dim=128),
    "group_of_5": Step(q_len=[14, 2], kv_len=[70, 2], q_heads=5),
    "no_group": Step(q_len=[70], kv_len=[70], q_heads=1),
    "not_causal": Step(q_len=[9, 3], kv_len=[70, 3], options=Options(causal=False)),
    "split": Step(q_len=[17, 1], kv_len=[150, 70], plan={"fixed_split_size": 64}),
    "balanced": Step(q_len=[20, 1], kv_len=[200, 70], plan={"num_ctas": 3}),
    "window": Step(q_len=[20], kv_len=[150], options=Options(window=20)),
    "bfloat16": Step(q_len=[9], kv_len=[70], dtype="bfloat16"),
    "fp8_heads": Step(
        q_len=[9], kv_len=[70], q_heads=4, kv_heads=2, kv_dtype="float8_e4m3fn", scales="head"
    ),
    "fp8_pages": Step(
        q_len=[9], kv_len=[70], q_heads=4, kv_heads=2, kv_dtype="float8_e4m3fn", scales="page"
    ),
    "rope": Step(
        q_len=[9],
        kv_len=[70],
        variant=variants.rope(),
        options=Options(theta=10_000.0),
    ),
    "mask": Step(
        q_len=[3, 2],
        kv_len=[45, 70],
        variant=variants.packed_mask(),
        extra={"mask": variants.pack_mask(MASKS)},
        options=Options(masks=MASKS),
    ),
    "mask_per_head": Step(
        q_len=[3, 2],
        kv_len=[45, 70],
        variant=variants.packed_mask(per_head=True),
        extra={"mask": variants.pack_mask(HEAD_MASKS)},
        options=Options(masks=HEAD_MASKS),
    ),
    "sigmoid": Step(
        q_len=[9],
        kv_len=[70],
        variant=variants.sigmoid(-2.0),
        options=Options(sigmoid_bias=-2.0),
    ),
}
QUICK_PREFILL = ("ragged",)


def quick_or_slow(cases, quick):
    return [
        pytest.param(case, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, case in cases.items()
    ]


def proves(step, kernel):
    outcome = run(step, kernel=kernel)
    outcome.check()
    assert outcome.races_found is False


@pytest.mark.parametrize("step", quick_or_slow(DECODE, QUICK_DECODE))
def test_decoding_equals_the_oracle_without_races(step):
    proves(step, "decode")


@pytest.mark.parametrize("step", quick_or_slow(PREFILL, QUICK_PREFILL))
def test_prefill_equals_the_oracle_without_races(step):
    proves(step, "prefill")


# Two warpgroups have too few registers to change keys.
@pytest.mark.parametrize(
    "step", quick_or_slow({n: s for n, s in PREFILL.items() if n != "rope"}, ("split",))
)
def test_prefill_by_two_warpgroups_equals_the_oracle_without_races(step):
    proves(step, "prefill2")


def races_without(monkeypatch, module, call, words, step, kernel):
    """Tell what the interpreter finds if some calls are left out: races, or a phase nobody saw."""
    crippled = Without(module.plgpu, call, words)
    monkeypatch.setattr(module, "plgpu", crippled)
    try:
        found = run(step, kernel=kernel).races_found
    except jax.errors.JaxRuntimeError as error:
        found = "phase" in str(error)
    assert crippled.is_met
    return found


SHORT = Step(q_len=[1], kv_len=[20])
LONG = Step(q_len=[1], kv_len=[140], plan={"num_ctas": 1})
MANY = Step(q_len=[1] * 3, kv_len=[5] * 3, plan={"num_ctas": 1})
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ("refs.q_full", SHORT),
        ("refs.keys.full", SHORT),
        pytest.param("refs.values.full", SHORT, marks=slow),
        pytest.param("refs.values.full", LONG, marks=slow),
        pytest.param("refs.q_empty", MANY, marks=slow),
    ],
)
def test_a_wait_left_out_is_reported_as_a_race(monkeypatch, words, step):
    assert races_without(monkeypatch, mosaic_decode, "barrier_wait", words, step, "decode") is True


# `cleaned` is not among them: warpgroups that take turns are in order without it.
@pytest.mark.slow
@pytest.mark.parametrize("words", ["refs.keys.full", "refs.values.full"])
def test_a_wait_left_out_of_prefill_is_reported_as_a_race(monkeypatch, words):
    step = Step(q_len=[17], kv_len=[20])
    found = races_without(monkeypatch, mosaic_prefill, "barrier_wait", words, step, "prefill2")
    assert found is True


@pytest.mark.slow
def test_a_slot_that_is_filled_before_it_is_empty_is_reported_as_a_race(monkeypatch):
    assert races_without(monkeypatch, mosaic_pages, "barrier_wait", "", LONG, "decode") is True


def test_weights_that_are_not_committed_are_reported_as_a_race(monkeypatch):
    assert races_without(monkeypatch, mosaic_decode, "commit_smem", "", SHORT, "decode") is True
