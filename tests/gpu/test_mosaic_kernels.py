"""The Mosaic attention kernels on the device, at sizes of real models, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention import mosaic_prefill
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.attention.backends import Case, present_device, refusal
from tests.kernels.mosaic_cases import Step, problem
from tests.kernels.request_oracle import Options

pytestmark = pytest.mark.gpu

DECODED = [1, 700, 4097, 64, 2000, 16384]
SLOPES = variants.alibi_slopes(32)


def real(**changes):
    sizes = {"q_heads": 32, "kv_heads": 8, "dim": 128, "dtype": "bfloat16"}
    plan = {"num_ctas": 132, "tile_kv": 128, **changes.pop("plan", {})}
    return Step(**{**sizes, **changes}, plan=plan)


def decode(**changes):
    kv_len = changes.pop("kv_len", DECODED)
    return real(q_len=[1] * len(kv_len), kv_len=kv_len, **changes)


def prefill(**changes):
    return real(**{"q_len": [577, 1, 128, 5], "kv_len": [577, 300, 900, 2049], **changes})


CAPPED = {"variant": variants.soft_cap(20.0), "options": Options(soft_cap=20.0)}
SLOPED = {
    "variant": variants.compose(variants.alibi(), variants.window(512, first=4)),
    "extra": {"slopes": SLOPES},
    "options": Options(slopes=SLOPES, window=512, first=4),
}
ROTATED = {"variant": variants.rope(), "options": Options(theta=10_000.0)}
FLOAT8 = {"kv_dtype": "float8_e4m3fn"}
DECODE = {
    "usual": decode(),
    "float16": decode(dtype="float16"),
    "pages of 8": decode(page_size=8),
    "pages of 128": decode(page_size=128),
    "group of 5": decode(q_heads=40),
    "group of 7": decode(q_heads=28, kv_heads=4),
    "no group": decode(q_heads=8),
    "drafts": real(q_len=[5, 1, 3], kv_len=[700, 4097, 2000]),
    "dim 64": decode(dim=64),
    "dim 256": decode(dim=256, q_heads=16, kv_heads=4),
    "window": decode(options=Options(window=1000)),
    "float8 per head": decode(**FLOAT8, scales="head"),
    "float8 per page": decode(**FLOAT8, scales="page"),
    "one split": decode(kv_len=[32768]),
    "capped": decode(**CAPPED),
    "sloped": decode(**SLOPED),
    "rotated": decode(**ROTATED),
}
PREFILL = {
    "usual": prefill(),
    "float16": prefill(dtype="float16"),
    "pages of 8": prefill(page_size=8),
    "pages of 128": prefill(page_size=128),
    "group of 5": prefill(q_heads=40),
    "group of 7": prefill(q_heads=28, kv_heads=4),
    "no group": prefill(q_heads=8),
    "group of 16": prefill(q_heads=32, kv_heads=2),
    "dim 64": prefill(dim=64),
    "window": prefill(options=Options(window=200)),
    "not causal": prefill(options=Options(causal=False)),
    "split": prefill(plan={"fixed_split_size": 256}),
    "float8 per head": prefill(**FLOAT8, scales="head"),
    "float8 per page": prefill(**FLOAT8, scales="page"),
    "capped": prefill(**CAPPED),
    "sloped": prefill(**SLOPED),
    "rotated": prefill(**ROTATED),
}
NARROW = ("pages of 8", "float8 per page", "rotated")
"""What two warpgroups have too few registers for."""


def proves(step, tile_q):
    given = problem(step, tile_q)
    platform, capability = present_device()
    case = Case(
        spec=given.plan.spec,
        variant=step.variant,
        platform=platform,
        capability=capability,
        k_scale=step.scales,
        v_scale=step.scales,
    )
    reason = refusal("mosaic", case)
    if reason is not None and "needs a GPU of compute capability" in reason:
        pytest.skip(reason)
    assert reason is None
    call = jax.jit(
        lambda q, kv, plan, extra: attention(
            q, kv, plan, extra=extra, sm_scale=given.scale, return_lse=True, backend="mosaic"
        )
    )
    o, lse = call(given.q, given.kv, given.plan, dict(step.extra))
    given.outcome(o.astype(jnp.float32), lse).check()
    again, _ = call(given.q, given.kv, given.plan, dict(step.extra))
    np.testing.assert_array_equal(np.asarray(o, np.float32), np.asarray(again, np.float32))


@pytest.mark.parametrize("name", DECODE)
def test_decoding_agrees_with_float64(name):
    step = DECODE[name]
    proves(step, max(step.q_len) * (step.q_heads // step.kv_heads))


@pytest.mark.parametrize(
    ("name", "warpgroups"),
    [
        *((name, 2) for name in PREFILL if name not in NARROW),
        *((name, 1) for name in ("usual", "float8 per head", *NARROW)),
    ],
)
def test_prefill_agrees_with_float64(name, warpgroups):
    step = PREFILL[name]
    tile_q = mosaic_prefill.tile_q(step.q_heads // step.kv_heads, warpgroups=warpgroups)
    proves(step, tile_q)
