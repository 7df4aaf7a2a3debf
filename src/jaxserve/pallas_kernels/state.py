"""Attention states and how they merge: what was seen of a row's keys, in any order and any split.

The logarithm of the mass is in base 2 throughout: `lse = log2(sum(2 ** (score * log2(e))))`, since
the device's exponential is. `to_natural` converts at the edge.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LOG2_E = math.log2(math.e)
"""Turns natural logarithms into those in base 2."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionState:
    """Attention of rows to some set of keys.

    States over disjoint sets merge into the state over their union: `merge` is associative and
    commutative up to rounding, and `empty` is its identity.

    Attributes:
        o: Weighted mean of the values; zeros for a row that saw no key.
        lse: Logarithm, in base 2, of the sum of exponentials of the scores; minus infinity for a
            row that saw no key.
    """

    o: Float[Array, "*rows dim"]
    lse: Float[Array, "*rows"]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> "AttentionState":
        """Return the state of rows that have seen nothing; `shape` is that of `o`."""
        return cls(o=jnp.zeros(shape, dtype), lse=jnp.full(shape[:-1], -jnp.inf, dtype=jnp.float32))


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """Merge the states of the same rows over two disjoint sets of keys.

    The result has the dtype of `a.o`; arithmetic is in float32.

    Source: the online softmax (Milakov and Gimelshein 2018), with states as in FlashInfer
    (arXiv 2501.01005, section 2.2).
    """
    top = jnp.maximum(a.lse, b.lse)
    # Where both are minus infinity their difference would be NaN.
    base = jnp.where(jnp.isneginf(top), 0.0, top)
    left, right = jnp.exp2(a.lse - base), jnp.exp2(b.lse - base)
    mass = left + right
    some = jnp.where(mass == 0, 1.0, mass)  # NaN stays
    o = (left / some)[..., None] * a.o.astype(jnp.float32)
    o = o + (right / some)[..., None] * b.o.astype(jnp.float32)
    lse = jnp.where(mass == 0, -jnp.inf, base + jnp.log2(some))
    return AttentionState(o=o.astype(a.o.dtype), lse=lse)


def merge_states(states: Sequence[AttentionState]) -> AttentionState:
    """Merge any number of states of the same rows, from left to right.

    Raises:
        ValueError: If there is none.
    """
    if not states:
        raise ValueError("merge_states needs at least one state, got none.")
    return functools.reduce(merge, states)


def add_mass(
    state: AttentionState, score: Float[Array, "*rows"], mass: Float[Array, "*rows"] | float = 1.0
) -> AttentionState:
    """Merge with keys whose values are zero, such as an attention sink.

    Args:
        state: Rows so far.
        score: Score of the added key, natural, in the units of other scores after scaling.
        mass: How many of them; 0 leaves a row as it was.
    """
    count = jnp.broadcast_to(jnp.asarray(mass, jnp.float32), state.lse.shape)
    none = count <= 0
    lse = jnp.where(none, -jnp.inf, score * LOG2_E + jnp.log2(jnp.where(none, 1.0, count)))
    return merge(state, AttentionState(o=jnp.zeros_like(state.o), lse=lse))


def to_natural(lse: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Convert a logarithm in base 2 to the natural one."""
    return lse / LOG2_E
