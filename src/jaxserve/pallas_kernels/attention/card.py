"""The card of attention."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.attention.api import Q_DTYPES, attention
from jaxserve.pallas_kernels.attention.backends import BACKENDS, Case, present_device, refusal
from jaxserve.pallas_kernels.card import Axis, KernelCard, Sizes, Tensor, Tolerance
from jaxserve.pallas_kernels.paged import KV_DTYPES, PagedKV, PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.variant import PLAIN


def spec_of(sizes: Sizes, dtype: str) -> PlanSpec:
    """Return the spec of a batch of equal requests."""
    requests, size = sizes["requests"], sizes["page_size"]
    return PlanSpec(
        q_heads=sizes["q_heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        page_size=size,
        q_dtype=dtype,
        kv_dtype=dtype,
        max_requests=requests,
        max_tokens=requests * sizes["q_len"],
        max_pages=requests * -(-sizes["kv_len"] // size),
        tile_kv=64 if 64 % size == 0 else size,
    )


def make(sizes: Sizes, dtype: str, seed: int) -> Mapping[str, Any]:
    """Draw a batch of equal requests, their pages in random order."""
    spec, kind = spec_of(sizes, dtype), jnp.dtype(dtype)
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (spec.max_pages + 1, spec.kv_heads, spec.page_size, spec.head_dim)
    k, v = (jax.random.normal(key, shape).astype(kind) for key in keys[:2])
    q = jax.random.normal(keys[2], (spec.max_tokens, spec.q_heads, spec.head_dim)).astype(kind)
    used = spec.max_pages // spec.max_requests
    pages = 1 + np.random.default_rng(seed).permutation(spec.max_pages).astype(np.int32)
    table = PageTable(
        indptr=np.arange(spec.max_requests + 1, dtype=np.int32) * used,
        indices=pages,
        kv_len=np.full(spec.max_requests, sizes["kv_len"], np.int32),
    )
    plan = make_plan(spec, np.full(spec.max_requests, sizes["q_len"]), table)
    return {"q": q, "kv": PagedKV(k=k, v=v), "plan": plan}


def supports(backend: str, sizes: Sizes, dtype: str) -> str | None:
    """Return why a backend cannot do this on the present device; None if it can."""
    platform, capability = present_device()
    spec = spec_of(sizes, dtype)
    return refusal(
        backend, Case(spec=spec, variant=PLAIN, platform=platform, capability=capability)
    )


def num_bytes(sizes: Sizes, dtype: str) -> int:
    """Count queries, outputs, and the keys and values that some query sees."""
    item = jnp.dtype(dtype).itemsize
    tokens = sizes["requests"] * sizes["q_len"]
    keys = sizes["requests"] * sizes["kv_len"]
    heads = tokens * sizes["q_heads"] + keys * sizes["kv_heads"]
    return 2 * item * sizes["head_dim"] * heads


def num_flops(sizes: Sizes) -> int:
    """Count the two products, over the pairs that causality leaves."""
    q_len, kv_len = sizes["q_len"], sizes["kv_len"]
    pairs = q_len * kv_len - q_len * (q_len - 1) // 2
    return 4 * sizes["requests"] * sizes["q_heads"] * sizes["head_dim"] * pairs


CARD = KernelCard(
    name="attention",
    summary="Softmax attention, or a variant of it, from packed tokens to paged keys and values.",
    axes={
        "requests": Axis(sizes=(2, 16, 256), varies=True, meaning="requests of a step"),
        "q_len": Axis(sizes=(1, 5, 512), varies=True, meaning="query tokens of a request"),
        "kv_len": Axis(sizes=(70, 1024, 32768), varies=True, meaning="keys of a request"),
        "q_heads": Axis(sizes=(4, 32, 64), varies=False, meaning="heads of queries"),
        "kv_heads": Axis(sizes=(2, 8, 4), varies=False, meaning="heads of keys and values"),
        "head_dim": Axis(sizes=(64, 128, 256), varies=False, meaning="dimension of a head"),
        "page_size": Axis(sizes=(16, 64, 128), varies=False, meaning="tokens of a page"),
        "tokens": Axis(sizes=(), varies=True, meaning="query tokens of a step"),
        "pages": Axis(sizes=(), varies=False, meaning="pages of the pool"),
    },
    inputs={
        "q": Tensor(axes=("tokens", "q_heads", "head_dim"), dtypes=Q_DTYPES, meaning="queries"),
        "k": Tensor(
            axes=("pages", "kv_heads", "page_size", "head_dim"), dtypes=KV_DTYPES, meaning="keys"
        ),
        "v": Tensor(
            axes=("pages", "kv_heads", "page_size", "head_dim"), dtypes=KV_DTYPES, meaning="values"
        ),
        "k_scale": Tensor(
            axes=("pages", "kv_heads"),
            dtypes=("float32",),
            meaning="what keys are multiplied with; also one per head, or one for all",
            optional=True,
        ),
        "v_scale": Tensor(
            axes=("pages", "kv_heads"),
            dtypes=("float32",),
            meaning="what values are multiplied with; also one per head, or one for all",
            optional=True,
        ),
    },
    outputs={
        "o": Tensor(axes=("tokens", "q_heads", "head_dim"), dtypes=Q_DTYPES, meaning="outputs"),
        "lse": Tensor(
            axes=("tokens", "q_heads"),
            dtypes=("float32",),
            meaning="logarithm of the mass, base 2",
            optional=True,
        ),
    },
    make=make,
    run=attention,
    reference=functools.partial(attention, backend="reference"),
    tolerances={
        "bfloat16": Tolerance(rtol=1e-2, atol=1e-2, reason="weights and outputs of 8 bits"),
        "float16": Tolerance(rtol=1e-3, atol=1e-3, reason="weights and outputs of 11 bits"),
        "float32": Tolerance(rtol=2e-5, atol=2e-5, reason="sums in another order"),
    },
    backends=BACKENDS,
    supports=supports,
    num_bytes=num_bytes,
    num_flops=num_flops,
    source="FlashInfer (arXiv 2501.01005); FlashAttention-2 and -3 for the running softmax",
)
