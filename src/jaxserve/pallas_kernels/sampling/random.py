"""Random numbers that depend on nothing but a key and a count: Threefry with 20 rounds.

All backends draw the same numbers, so that they draw the same tokens.

Source: Salmon and others, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""How far words are rotated, in turns of four rounds."""

PARITY = 0x1BD11BDA
"""Makes the third word of the key differ from the others even if they are zero."""


def threefry(
    key: UInt32[Array, "rows 2"], count: UInt32[Array, " rows"]
) -> tuple[UInt32[Array, " rows"], UInt32[Array, " rows"]]:
    """Encrypt (count, 0) with each row's key."""
    words = (key[:, 0], key[:, 1], key[:, 0] ^ key[:, 1] ^ jnp.uint32(PARITY))
    left, right = count + words[0], words[1] + jnp.uint32(0)
    for turn in range(5):
        for rotation in ROTATIONS[turn % 2]:
            left = left + right
            right = (right << rotation) | (right >> (32 - rotation))
            right = right ^ left
        left = left + words[(turn + 1) % 3]
        right = right + words[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return left, right


def uniform(
    key: UInt32[Array, "rows 2"], count: Int[Array, " rows"] | int
) -> Float[Array, " rows"]:
    """Draw one number in [0, 1) per row, a multiple of 2 ** -24."""
    counts = jnp.broadcast_to(jnp.asarray(count, jnp.uint32), key.shape[:1])
    bits, _ = threefry(key.astype(jnp.uint32), counts)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
