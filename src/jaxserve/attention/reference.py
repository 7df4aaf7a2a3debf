"""The oracle: every token attends to its whole row, in float32, with no tricks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.attention.metadata import AttentionPlan, ScoreRule


def softmax_attend(
    q: Float[Array, "*batch q_len q_heads head_dim"],
    k: Float[Array, "*batch kv_len kv_heads head_dim"],
    v: Float[Array, "*batch kv_len kv_heads head_dim"],
    mask: Array,
    *,
    rule: ScoreRule,
    sinks: Float[Array, " q_heads"] | None = None,
) -> Float[Array, "*batch q_len q_heads head_dim"]:
    """Attend where `mask[*batch, q_len, kv_len]` is true; rows without any key give zeros.

    A sink is one more key, with a score of its own and the value zero.
    """
    group = q.shape[-2] // k.shape[-2]
    k = jnp.repeat(k, group, axis=-2).astype(jnp.float32)
    v = jnp.repeat(v, group, axis=-2).astype(jnp.float32)
    scores = rule.scores(jnp.einsum("...qhd,...shd->...hqs", q.astype(jnp.float32), k))
    scores = jnp.where(mask[..., None, :, :], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jnp.nan_to_num(jax.nn.softmax(scores, axis=-1))[..., : k.shape[-3]]
    return jnp.einsum("...hqs,...shd->...qhd", weights, v).astype(q.dtype)


def paged_attend(
    q: Float[Array, "tokens q_heads head_dim"],
    k_rows: Float[Array, "rows kv_heads length head_dim"],
    v_rows: Float[Array, "rows kv_heads length head_dim"],
    plan: AttentionPlan,
    *,
    rule: ScoreRule,
    sinks: Float[Array, " q_heads"] | None = None,
) -> Float[Array, "tokens q_heads head_dim"]:
    """Attend from every packed token to the keys of its row that it may see."""
    row = jnp.maximum(plan.token_row, 0)
    k = jnp.swapaxes(k_rows[row], 1, 2)
    v = jnp.swapaxes(v_rows[row], 1, 2)
    key_position = jnp.arange(k.shape[1])[None, None, :]
    position = plan.token_position[:, None, None]
    mask = (key_position <= position) & (plan.token_row[:, None, None] >= 0)
    mask &= rule.in_window(position, key_position)
    return softmax_attend(q[:, None], k, v, mask, rule=rule, sinks=sinks)[:, 0]
