"""Whether kernels compute on this very device what they should: asked once, before they serve.

No list of devices, drivers and compilers says that as well as a small batch does.
"""

import functools
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.kernel_plans import KernelPlans
from jaxserve.pallas_kernels.attention.api import attention
from jaxserve.pallas_kernels.attention.card import CARD
from jaxserve.pallas_kernels.paged import PagedKV, PageTable
from jaxserve.pallas_kernels.plan import PlanSpec
from jaxserve.pallas_kernels.planner import make_plan
from jaxserve.pallas_kernels.token_attention import TokenLists, api

logger = logging.getLogger(__name__)

_LONGEST = 700
_CHUNK = 80
_PATIENCE_S = 120.0


def find_fault(plans: KernelPlans) -> str | None:
    """Compare kernels with the reference, for some decodes and for decodes beside a prefill.

    With sparse attention, the kernel that reads lists of tokens beside these is compared too.

    Args:
        plans: What is planned with, the backend among it.

    Returns:
        What is wrong with the kernels, an error of theirs included; None if nothing is.
    """
    # A kernel that waits for ever cannot be interrupted, but it can be named.
    watch = threading.Timer(_PATIENCE_S, _tell, [plans.backend])
    watch.daemon = True
    watch.start()
    try:
        for lengths in ((1, 1, 1, 1), (1, 1, _CHUNK, 1)):
            for spec in plans.specs(rows=4, tokens=sum(lengths), has_drafts=False, shares=False):
                fault = _compare(plans, spec, lengths)
                if fault is not None:
                    return fault
        return find_list_fault(plans) if plans.has_sparse else None
    except Exception as error:  # noqa: BLE001  compilers and drivers raise what they like
        return f"it fails on this device: {type(error).__name__}: {str(error).rstrip('.')}"
    finally:
        watch.cancel()


def _tell(backend: str) -> None:
    logger.warning(
        "the first attention of the %s kernels has not come back after %d s; if it never does, use "
        "attention_backend='xla', and report the versions that `jaxserve doctor` prints.",
        backend,
        _PATIENCE_S,
    )


def _compare(plans: KernelPlans, spec: PlanSpec, lengths: tuple[int, ...]) -> str | None:
    """Attend with both; requests have different lengths, and pages lie in no order."""
    rng = np.random.default_rng(0)
    longest = max(min(_LONGEST, plans.max_model_len), *lengths)
    kv_len = np.linspace(longest, max(lengths), len(lengths)).astype(np.int32)
    used = -(-kv_len // spec.page_size)
    indptr = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    indices = 1 + rng.permutation(int(indptr[-1])).astype(np.int32)
    table = PageTable(indptr=indptr, indices=indices, kv_len=kv_len)
    plan = make_plan(spec, np.array(lengths), table)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), spec.kv_dtype)

    pool = (indices.size + 1, spec.kv_heads, spec.page_size)
    kv = PagedKV(k=random(*pool, spec.head_dim), v=random(*pool, spec.v_dim))
    q = random(spec.max_tokens, spec.q_heads, spec.head_dim).astype(spec.q_dtype)
    # What every layer has of its own is not known to the plans.
    extra = {n: random(spec.q_heads) for n, kind in plans.variant.extras.items() if kind == "head"}
    extra |= {name: jnp.asarray(value) for name, value in plans.extra.items()}

    def attend(backend: str) -> np.ndarray:
        run = functools.partial(attention, variant=plans.variant, backend=backend)
        return np.asarray(jax.jit(run)(q, kv, plan, extra=extra), np.float32)

    return _difference(attend(plans.backend), attend("reference"), spec.q_dtype)


def find_list_fault(plans: KernelPlans) -> str | None:
    """Compare the kernel over lists of tokens with the reference; None if no kernel reads them."""
    rng = np.random.default_rng(0)
    pool = (-(-_LONGEST // plans.page_size) + 1, plans.kv_heads, plans.page_size, plans.head_dim)
    k, v = (jnp.asarray(rng.standard_normal(pool), plans.dtype) for _ in range(2))
    cache = PagedKV(k=k, v=v)
    q = jnp.asarray(rng.standard_normal((2, plans.q_heads, plans.head_dim)), plans.dtype)
    backend = api.kernel_for(plans.backend, q, cache)
    if backend is None:
        return None
    # From none to all tokens, some in order; both requests read the same pages.
    counts = np.linspace(0, _LONGEST, 2 * plans.kv_heads).astype(np.int32)
    rows = [rng.permutation(_LONGEST)[:n] if i % 2 else np.arange(n) for i, n in enumerate(counts)]
    lists = TokenLists(
        indptr=jnp.asarray(np.cumsum([0, *map(len, rows)]), jnp.int32),
        positions=jnp.asarray(np.concatenate(rows), jnp.int32),
    )
    pages = jnp.asarray(1 + rng.permutation(pool[0] - 1), jnp.int32)
    table = jnp.asarray([0, pages.size, 2 * pages.size], jnp.int32), jnp.tile(pages, 2)

    def attend(backend: api.ListBackend) -> np.ndarray:
        run = functools.partial(api.token_attention, backend=backend)
        length = jnp.full(2, _LONGEST, jnp.int32)
        return np.asarray(jax.jit(run)(q, cache, *table, length, lists).o, np.float32)

    return _difference(attend(backend), attend("reference"), plans.dtype)


def _difference(found: np.ndarray, wanted: np.ndarray, dtype: str) -> str | None:
    bound = CARD.tolerances[dtype]
    # Kernels and reference round in places of their own, so that each may be off by the bound.
    is_near = np.abs(found - wanted) <= 2 * (bound.atol + bound.rtol * np.abs(wanted))
    if is_near.all():
        return None
    worst = float(np.nanmax(np.abs(found - wanted), initial=0))
    return (
        f"it computes something else on this device: {np.size(is_near) - np.sum(is_near)} of "
        f"{np.size(is_near)} outputs differ from the reference, by up to {worst:.3g}"
    )
