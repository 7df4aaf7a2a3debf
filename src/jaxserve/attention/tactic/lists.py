"""A selection as lists of positions: what kernels over pages read.

Pages keep their tokens where they are, so there the index alone says which tokens lie in a cluster.
The lists have any lengths, known on the device only; kernels find their work by the running sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxserve.attention.tactic.clustering import ClusterIndex
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.select import Selection, read_mask
from jaxserve.pallas_kernels.token_attention.lists import TokenLists


@partial(jax.jit, static_argnames=("config", "capacity"))
def token_lists(
    selection: Selection,
    index: ClusterIndex,
    length: Int[Array, " rows"],
    *,
    config: TacticConfig,
    capacity: int | None = None,
) -> TokenLists:
    """List the positions that each head reads, sinks and recent tokens included.

    Args:
        selection: What was selected.
        index: The index that it was selected from.
        length: Tokens of each row.
        config: Settings.
        capacity: Positions of all lists together; None has room for everything. What does not fit
            is cut off at the end, from the last rows first, so a smaller one must be known to do.

    Returns:
        One list per row and key-value head, in order of places.
    """
    mask = read_mask(selection, index, length, config=config)
    rows, kv_heads, places = mask.shape
    counts = jnp.cumsum(jnp.sum(mask, axis=-1, dtype=jnp.int32).reshape(-1), dtype=jnp.int32)
    size = rows * kv_heads * places if capacity is None else capacity
    (at,) = jnp.nonzero(mask.reshape(-1), size=size, fill_value=0)
    indptr = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.minimum(counts, size)])
    return TokenLists(indptr=indptr, positions=index.permutation.reshape(-1)[at].astype(jnp.int32))
