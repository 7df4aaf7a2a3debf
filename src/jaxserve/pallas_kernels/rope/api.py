"""Rotary position embedding of queries or keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.core.errors import UnsupportedError
from jaxserve.pallas_kernels import backends
from jaxserve.pallas_kernels.backends import Backend
from jaxserve.pallas_kernels.rope import reference

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of queries and keys."""

RopeTables = tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]
"""Cosines and sines of the angle of each token and pair, in float32."""


def rope_tables(
    position: Int[Array, " tokens"], frequency: Float[Array, " pairs"], *, magnitude: float = 1.0
) -> RopeTables:
    """Compute cosines and sines once per step, for all layers and heads.

    Args:
        position: Position of each token.
        frequency: Angle per position of each pair, in radians. Whatever stretches contexts (linear,
            llama3, yarn, longrope) is a choice of frequencies.
        magnitude: Multiplies cosines and sines; 1 except under yarn and longrope.

    Returns:
        Tables in float32. Positions meet frequencies in float32: in bfloat16 angles are wrong past
        a few hundred tokens.
    """
    angle = position.astype(jnp.float32)[:, None] * frequency.astype(jnp.float32)[None, :]
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rope(
    x: Float[Array, "tokens heads head_dim"],
    tables: RopeTables,
    *,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Float[Array, "tokens heads head_dim"]:
    """Rotate the first `2 * pairs` numbers of every head; the rest stays as it is.

    Args:
        x: Queries or keys.
        tables: What `rope_tables` made.
        interleaved: Whether pairs are neighbours, (2 i, 2 i + 1), rather than (i, i + pairs).
        backend: "auto" leaves it to XLA, which fuses it with its neighbours.

    Raises:
        ValueError: If shapes do not fit.
        UnsupportedError: If the dtype is none of `DTYPES`, or the backend cannot run here.

    Source: RoFormer, arXiv 2104.09864 (neighbours); GPT-NeoX (halves, part of a head).
    """
    check_rope(x, tables)
    chosen = backends.choose(backend, prefers_triton=False)
    if chosen == "triton":
        from jaxserve.pallas_kernels.rope import triton  # noqa: PLC0415

        return triton.rope(x, tables, interleaved=interleaved)
    return reference.rope(x, tables, interleaved=interleaved)


def check_rope(x: Array, tables: RopeTables, *, name: str = "x") -> None:
    """Check queries or keys and their tables; see `rope`."""
    if x.ndim != 3:
        raise ValueError(f"{name} must be [tokens, heads, head_dim], got {x.shape}; reshape it.")
    cos, sin = tables
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] != x.shape[0]:
        raise ValueError(
            f"rope tables must be two arrays [tokens, pairs] with tokens = {x.shape[0]}, got "
            f"{cos.shape} and {sin.shape}; rope_tables makes them."
        )
    if not 0 < 2 * cos.shape[1] <= x.shape[2]:
        raise ValueError(
            f"rope tables of {cos.shape[1]} pairs turn {2 * cos.shape[1]} numbers, but a head of "
            f"{name} has {x.shape[2]}; pass at most {x.shape[2] // 2} pairs."
        )
    found = jnp.dtype(x.dtype).name
    if found not in DTYPES:
        raise UnsupportedError(
            f"{name} must have one of the dtypes {', '.join(DTYPES)}, got {found}; cast it."
        )
