"""The oracle: everything in float32, rounded once at the end."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows hidden"],
    weight: Float[Array, " hidden"],
    *,
    epsilon: float,
    plus_one: bool,
) -> Float[Array, "*rows hidden"]:
    """Divide each row by its root mean square and scale it."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + epsilon)
    scale = weight.astype(jnp.float32) + (1.0 if plus_one else 0.0)
    return (normed * scale).astype(x.dtype)


def add_rms_norm(
    x: Float[Array, "*rows hidden"],
    residual: Float[Array, "*rows hidden"],
    weight: Float[Array, " hidden"],
    *,
    epsilon: float,
    plus_one: bool,
) -> tuple[Float[Array, "*rows hidden"], Float[Array, "*rows hidden"]]:
    """Add, and norm the sum before it is rounded."""
    total = x.astype(jnp.float32) + residual.astype(jnp.float32)
    normed = rms_norm(total, weight, epsilon=epsilon, plus_one=plus_one)
    return normed.astype(x.dtype), total.astype(residual.dtype)
