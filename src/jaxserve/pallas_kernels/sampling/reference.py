"""The oracle: sort, keep, add up, draw."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxserve.pallas_kernels.sampling.random import uniform


def kept(
    logits: Float[Array, "rows vocab"],
    *,
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
) -> Bool[Array, "rows vocab"]:
    """Tell which tokens may be drawn; ties with the last one that is kept stay."""
    rows, vocab = logits.shape
    weight = weights(logits, temperature)
    order = jnp.argsort(-weight, axis=-1, stable=True)
    ranked = jnp.take_along_axis(weight, order, axis=-1)
    heavier_count = jnp.sum(ranked[:, :, None] < ranked[:, None, :], axis=-1)
    limit = jnp.where(top_k > 0, top_k, vocab)[:, None]
    in_k = (ranked >= min_p[:, None]) & (heavier_count < limit)
    mass = jnp.where(in_k, ranked, 0.0)
    heavier_mass = jnp.sum(
        jnp.where(ranked[:, :, None] < ranked[:, None, :], mass[:, None, :], 0.0), axis=-1
    )
    in_p = heavier_mass < top_p[:, None] * jnp.sum(mass, axis=-1, keepdims=True)
    is_kept = in_k & (in_p | (top_p >= 1)[:, None] | (heavier_count == 0))
    return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], order].set(is_kept)


def weights(
    logits: Float[Array, "rows vocab"], temperature: Float[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Return probabilities up to a factor, the largest being 1."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.exp((logits - top) / jnp.where(temperature > 0, temperature, 1.0)[:, None])


def sample(
    logits: Float[Array, "rows vocab"],
    key: UInt32[Array, "rows 2"],
    *,
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
) -> Int[Array, " rows"]:
    """Draw by inverting the cumulative distribution of what is kept."""
    logits = logits.astype(jnp.float32)
    mask = kept(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weight = jnp.where(mask, weights(logits, temperature), 0.0)
    ends = jnp.cumsum(weight, axis=-1)
    target = uniform(key, 0) * ends[:, -1]
    drawn = jax.vmap(lambda e, t: jnp.searchsorted(e, t, side="right"))(ends, target)
    last = jnp.max(jnp.where(weight > 0, jnp.arange(logits.shape[1]), 0), axis=-1)
    drawn = jnp.minimum(drawn, last)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
