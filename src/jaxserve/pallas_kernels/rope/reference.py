"""The oracle: every pair is a complex number that is turned by its angle, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rope(
    x: Float[Array, "tokens heads head_dim"],
    tables: tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]],
    *,
    interleaved: bool,
) -> Float[Array, "tokens heads head_dim"]:
    """Rotate the first `2 * pairs` numbers of every head."""
    cos, sin = (table.astype(jnp.float32)[:, None, :] for table in tables)
    pairs = cos.shape[-1]
    wide = x.astype(jnp.float32)
    turned, rest = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    new = (first * cos - second * sin, second * cos + first * sin)
    axis = -1 if interleaved else -2
    turned = jnp.stack(new, axis=axis).reshape(turned.shape)
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)
