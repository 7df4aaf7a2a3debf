"""Every Triton kernel on the device, at sizes of real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels import triton_launch
from jaxserve.pallas_kernels import variant as variants
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.cards import PLACES, card_of
from jaxserve.pallas_kernels.plan import Plan, PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from tests.triton.attention_oracle import attend64, random_case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_triton():
    reason = triton_launch.unavailable()
    if reason is not None:
        pytest.skip(f"Triton cannot run: {reason}")


def widen(array):
    return np.asarray(array.astype("float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", sorted(PLACES.keys() - {"attention"}))
def test_kernels_agree_with_their_references(name, dtype):
    card = card_of(name)
    sizes = card.usual()
    if "rows" in sizes:
        sizes["rows"] = 64
    inputs = card.make(sizes, dtype, 3)
    arrays = {n: v for n, v in inputs.items() if not isinstance(v, (bool, float))}
    options = {n: v for n, v in inputs.items() if n not in arrays}
    got = jax.jit(lambda a: card.run(**a, **options, backend="triton"))(arrays)
    want = jax.jit(lambda a: card.reference(**a, **options))(arrays)
    widened = (jax.tree.leaves(jax.tree.map(widen, tree)) for tree in (got, want))
    for left, right in zip(*widened, strict=True):
        if name == "sample":  # sums in another order may decide otherwise at the end of a token
            assert np.mean(left == right) > 0.95
        else:
            error = card.difference(left, right, dtype)
            assert error is None, error


CASES = {
    "decode": ({"q_len": [1] * 5, "kv_len": [1, 700, 4097, 64, 2000]}, {}),
    "prefill": ({"q_len": [577, 1, 128], "kv_len": [577, 300, 900]}, {}),
    "window": ({"q_len": [300, 1], "kv_len": [900, 700]}, {"window": 200}),
    "capped": (
        {"q_len": [40, 1], "kv_len": [640, 700]},
        {"variant": variants.compose(variants.soft_cap(20.0), variants.alibi())},
    ),
    "float8": ({"q_len": [40, 1], "kv_len": [640, 700], "kv_dtype": "float8_e4m3fn"}, {}),
    "int8": (
        {"q_len": [1, 1], "kv_len": [640, 700], "kv_dtype": "int8", "scale_axes": 1},
        {},
    ),
    "small pages": ({"q_len": [1, 9], "kv_len": [640, 700], "page_size": 1}, {}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_paged_attention_agrees_with_float64(name, dtype):
    case, options = CASES[name]
    case = {"page_size": 16, "q_heads": 16, "kv_heads": 4, "head_dim": 128, "dtype": dtype} | case
    q, cache, table = random_case(np.random.default_rng(1), **case)
    variant = options.get("variant", variants.PLAIN)
    extra = {"slopes": jnp.asarray(variants.alibi_slopes(16))} if variant.extras else {}
    spec = PlanSpec(
        q_heads=16,
        kv_heads=4,
        head_dim=128,
        page_size=case["page_size"],
        q_dtype=dtype,
        kv_dtype=cache.k.dtype.name,
        max_requests=8,
        max_tokens=q.shape[0] + 3,
        max_pages=table.indices.size + 5,
        **options,
    )
    plan = make_plan(spec, np.asarray(case["q_len"]), table)
    o, lse = attention(
        jnp.pad(q, ((0, 3), (0, 0), (0, 0))),
        cache,
        Plan(buffer=jnp.asarray(plan.buffer), spec=spec),
        extra=extra,
        return_lse=True,
        backend="triton",
    )
    want_o, want_lse = attend64(
        q,
        cache,
        table,
        case["q_len"],
        sm_scale=128**-0.5,
        window=options.get("window"),
        variant=variant,
        extra=extra,
    )
    near = 1e-2 if dtype == "bfloat16" else 2e-3
    o = np.asarray(o.astype("float32"))
    np.testing.assert_allclose(o[: q.shape[0]], want_o, rtol=near, atol=near)
    np.testing.assert_allclose(np.asarray(lse)[: q.shape[0]], want_lse, rtol=1e-3, atol=2e-3)
    assert not o[q.shape[0] :].any()
