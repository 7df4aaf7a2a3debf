"""The oracle: in float32, rounded once at the end."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["silu", "gelu_tanh", "gelu"]
"""Which activation; `gelu_tanh` is the approximation that most checkpoints are trained with."""


def gated(x: Float[Array, "*rows two_hidden"], *, kind: Kind) -> Float[Array, "*rows hidden"]:
    """Multiply the activation of the first half of each row with the second half."""
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    active = jax.nn.silu(gate) if kind == "silu" else jax.nn.gelu(gate, approximate=kind != "gelu")
    return (active * up).astype(x.dtype)
