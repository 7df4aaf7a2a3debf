"""Rejection sampling in plain JAX: the same steps as the Triton kernel's, for all rows at once."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jaxserve.pallas_kernels.sampling import reference
from jaxserve.pallas_kernels.sampling.random import uniform

_BLOCK = 512
"""Tokens that are added up at once; a draw finds its block first, then its place in it."""


def sample(
    logits: Float[Array, "rows vocab"],
    key: UInt32[Array, "rows 2"],
    *,
    temperature: Float[Array, " rows"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
) -> Int[Array, " rows"]:
    """Draw from the whole distribution until what was drawn is kept; see the public function."""
    vocab = logits.shape[1]
    logits = logits.astype(jnp.float32)
    weight = reference.weights(logits, temperature)
    limit = jnp.where(top_k > 0, top_k, vocab)
    low = _just_below(min_p)
    count, total = _heavier(weight, low)
    wants_mass = (top_p < 1) & (count > limit) & (temperature > 0)
    bound = lax.cond(
        jnp.any(wants_mass),
        lambda: jnp.where(wants_mass, _mass_of_top_k(weight, limit, low, wants_mass), total),
        lambda: total,
    )
    bound = jnp.where(top_p < 1, top_p * bound, jnp.inf)

    def is_ok(heavier: tuple[Array, Array]) -> Array:
        number, mass = heavier
        return ((number < limit) & (mass < bound)) | (number == 0)

    def draw(state: tuple[Array, ...]) -> tuple[Array, ...]:
        done, token, low, high, total, turn = state
        found = draw_by_inversion(
            jnp.where(weight > low[:, None], weight, 0.0), uniform(key, turn), total
        )
        first = jnp.take_along_axis(weight, found[:, None], axis=-1)[:, 0]
        second = 0.5 * (first + high)
        heavier_first, heavier_second = _heavier(weight, first), _heavier(weight, second)
        first_ok, second_ok = is_ok(heavier_first), is_ok(heavier_second)
        # Nothing as light as what was refused is kept; everything as heavy as what is fine is.
        new_low = jnp.where(second_ok, first, second)
        new_total = jnp.where(second_ok, heavier_first[1], heavier_second[1])
        return (
            done | first_ok,
            jnp.where(done, token, found),
            jnp.where(done, low, new_low),
            jnp.where(done | ~second_ok, high, second),
            jnp.where(done, total, new_total),
            turn + 1,
        )

    start = (
        temperature <= 0,
        jnp.argmax(logits, axis=-1).astype(jnp.int32),
        low,
        jnp.ones_like(low),
        total,
        jnp.int32(0),
    )
    return lax.while_loop(lambda state: ~jnp.all(state[0]), draw, start)[1]


def draw_by_inversion(
    weight: Float[Array, "rows vocab"],
    number: Float[Array, " rows"],
    total: Float[Array, " rows"],
) -> Int[Array, " rows"]:
    """Draw from each row by inverting its cumulative distribution, block first, place second."""
    rows, vocab = weight.shape
    padded = jnp.pad(weight, ((0, 0), (0, -vocab % _BLOCK)))
    blocks = padded.reshape(rows, -1, _BLOCK)
    ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = number * jnp.minimum(total, ends[:, -1])
    block = jnp.minimum(jnp.sum(ends <= target[:, None], axis=-1), ends.shape[1] - 1)
    before = jnp.where(
        block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0
    )
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    passed = (before[:, None] + jnp.cumsum(inside, axis=-1) > target[:, None]) & (inside > 0)
    index = block * _BLOCK + jnp.argmax(passed, axis=-1)
    # Rounding may leave the target at or behind the last end: then the last token counts.
    last = jnp.max(jnp.where(weight > 0, jnp.arange(vocab), 0), axis=-1)
    return jnp.where(jnp.any(passed, axis=-1), index, last).astype(jnp.int32)


def _heavier(weight: Array, pivot: Array) -> tuple[Array, Array]:
    """Count what is heavier than a pivot, and add it up."""
    is_heavier = weight > pivot[:, None]
    mass = jnp.sum(jnp.where(is_heavier, weight, 0.0), axis=-1)
    return jnp.sum(is_heavier, axis=-1, dtype=jnp.int32), mass


def _just_below(x: Array) -> Array:
    """Return the number before each, so that "at least x" is "more than" it; -1 before 0."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(x > 0, lax.bitcast_convert_type(bits - 1, jnp.float32), -1.0)


def _mass_of_top_k(weight: Array, limit: Array, low: Array, wanted: Array) -> Array:
    """Add up the heaviest `limit` of each row, and what weighs as much as the last of them.

    Halves the range in which the weight of the last one lies, as a pattern of bits.
    """

    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(jnp.maximum(x, 0.0), jnp.int32)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        least, most = bounds
        middle = least + (most - least) // 2
        number, _ = _heavier(weight, lax.bitcast_convert_type(middle, jnp.float32))
        is_enough = number < limit
        return jnp.where(is_enough, least, middle + 1), jnp.where(is_enough, middle, most)

    start = (bits(low), jnp.where(wanted, bits(jnp.ones_like(low)), bits(low)))
    least, _ = lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, start)
    last = lax.bitcast_convert_type(least, jnp.float32)
    return _heavier(weight, _just_below(last))[1]
