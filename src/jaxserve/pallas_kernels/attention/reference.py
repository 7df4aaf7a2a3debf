"""The oracle: every token against every key of every request, in float32, with no tricks."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.attention.backends import Case
from jaxserve.pallas_kernels.attention.context import context, is_seen, modified
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.plan import Plan
from jaxserve.pallas_kernels.state import LOG2_E, AttentionState
from jaxserve.pallas_kernels.variant import AttentionVariant


def supports(case: Case) -> str | None:
    """Return None: the reference can do everything, everywhere."""
    del case
    return None


def run(
    q: Float[Array, "tokens q_heads head_dim"],
    kv: PagedKV,
    plan: Plan,
    *,
    variant: AttentionVariant,
    extra: dict[str, Array],
    sm_scale: float,
) -> AttentionState:
    """Attend; see `backends.Backend.run`."""
    spec = plan.spec
    # Whose page each entry of the table is, and which positions its slots have.
    entry = jnp.arange(plan.kv_indices.shape[0])
    owner = jnp.searchsorted(plan.kv_indptr, entry, side="right") - 1
    owner = jnp.minimum(owner, spec.max_requests - 1)
    position = (entry - plan.kv_indptr[owner])[:, None] * spec.page_size
    position = (position + jnp.arange(spec.page_size)).reshape(-1)
    owner = jnp.repeat(owner, spec.page_size)
    is_there = position < plan.kv_len[owner]
    is_there &= jnp.repeat(entry < plan.kv_indptr[spec.max_requests], spec.page_size)

    k = _gathered(kv.k, kv.k_scale, plan)
    v = jnp.where(is_there[:, None, None], _gathered(kv.v, kv.v_scale, plan), 0.0)
    kv_head = jnp.arange(spec.kv_heads)[None, :, None]
    at_key = context(plan, variant, extra, sm_scale, request=owner[:, None, None], head=kv_head)
    k = modified(k, variant, at_key, position[:, None, None], is_key=True)

    head = jnp.arange(spec.q_heads)[None, :, None]
    ctx = context(
        plan, variant, extra, sm_scale, request=plan.token_request[:, None, None], head=head
    )
    q_pos, k_pos = plan.token_position[:, None, None], position[None, None, :]
    queries = modified(q.astype(jnp.float32), variant, ctx, q_pos, is_key=False)

    k, v = (jnp.repeat(part, spec.group, axis=1) for part in (k, v))
    # Products with a weight of zero would carry what is not finite from one request to others.
    is_bad = ~jnp.isfinite(v).all(axis=-1)
    v = jnp.where(is_bad[..., None], 0.0, v)
    scores = jnp.einsum("thd,khd->thk", queries, k, precision="highest") * sm_scale
    if variant.score_mod is not None:
        scores = variant.score_mod(scores, ctx, q_pos, k_pos, head)
    seen = is_seen(plan, variant, extra, ctx, q_pos, k_pos)
    seen &= is_there & (plan.token_request[:, None, None] == owner)
    spoilt = jnp.any(seen & is_bad.T[None], axis=-1)[..., None]
    if not variant.use_softmax:
        o = jnp.einsum("thk,khd->thd", jnp.where(seen, scores, 0.0), v, precision="highest")
        o = jnp.where(spoilt, jnp.nan, o)
        return AttentionState(o=o.astype(q.dtype), lse=jnp.zeros(o.shape[:2]))
    scores = jnp.where(seen, scores * LOG2_E, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.where(seen, jnp.exp2(scores - jnp.where(jnp.isneginf(top), 0.0, top)), 0.0)
    mass = jnp.sum(weights, axis=-1)
    o = jnp.einsum("thk,khd->thd", weights, v, precision="highest")
    some = jnp.where(mass == 0, 1.0, mass)
    o = jnp.where(spoilt, jnp.nan, o / some[..., None])
    lse = jnp.where(mass == 0, -jnp.inf, top[..., 0] + jnp.log2(some))
    return AttentionState(o=o.astype(q.dtype), lse=lse)


def _gathered(pool: Array, scale: Array | None, plan: Plan) -> Float[Array, "slots kv_heads dim"]:
    """Gather all pages of the table and undo quantisation."""
    pages = pool[plan.kv_indices].astype(jnp.float32)
    if scale is not None:
        scale = jnp.asarray(scale, jnp.float32)
        scale = (
            scale[plan.kv_indices]
            if scale.ndim == 2
            else jnp.broadcast_to(scale, (1, pool.shape[1]))
        )
        pages = pages * scale[:, :, None, None]
    return jnp.swapaxes(pages, 1, 2).reshape(-1, pool.shape[1], pool.shape[3])
