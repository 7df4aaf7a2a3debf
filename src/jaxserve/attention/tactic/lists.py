"""A selection as lists of positions: what kernels over pages read.

Pages keep their tokens where they are, so there the index alone says which tokens lie in a cluster.
How long the lists are is known on the device only: they are laid out there, by running sums, in
arrays that have room for everything, and kernels find their work by running sums too.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.attention.softmax import MASKED, State
from jaxserve.attention.tactic.attention import kept_spans
from jaxserve.attention.tactic.clustering import ClusterIndex
from jaxserve.attention.tactic.config import TacticConfig
from jaxserve.attention.tactic.select import Selection
from jaxserve.pallas_kernels.paged import PagedKV
from jaxserve.pallas_kernels.state import LOG2_E
from jaxserve.pallas_kernels.token_attention.api import ListBackend, token_attention
from jaxserve.pallas_kernels.token_attention.lists import TokenLists


@partial(jax.jit, static_argnames="capacity")
def run_lists(
    begin: Int[Array, "rows kv_heads runs"],
    size: Int[Array, "rows kv_heads runs"],
    where: Int[Array, "rows kv_heads places"],
    capacity: int,
) -> TokenLists:
    """List the positions of runs of places.

    Args:
        begin: First place of each run.
        size: Its places; runs may be empty.
        where: Position of the token of each place.
        capacity: Positions of all lists together. What does not fit is cut off at the end, from
            the last rows first, so a number that is too small must be known to do.

    Returns:
        One list per row and key-value head, runs in their order.
    """
    runs, places = begin.shape[2], where.shape[2]
    ends = jnp.cumsum(size.reshape(-1), dtype=jnp.int32)
    counts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[runs - 1 :: runs]])
    if not runs:
        counts = jnp.zeros((begin.shape[0] * begin.shape[1] + 1,), jnp.int32)
        return TokenLists(indptr=counts, positions=jnp.zeros((capacity,), jnp.int32))
    number = jnp.arange(ends.shape[0], dtype=jnp.int32)
    # Behind the last run the last one goes on; nobody reads that.
    run = jnp.repeat(number, size.reshape(-1), total_repeat_length=capacity)
    shift = begin.reshape(-1) - ends + size.reshape(-1)
    place = jnp.arange(capacity, dtype=jnp.int32) + shift[run]
    at = run // runs * places + jnp.clip(place, 0, places - 1)
    return TokenLists(
        indptr=jnp.minimum(counts, capacity),
        positions=where.reshape(-1)[at].astype(jnp.int32),
    )


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
        capacity: Positions of all lists together; None has room for everything. See `run_lists`.
    """
    kept = kept_spans(index.end, length, index.sizes.shape[1], config)
    begin, size = (
        jnp.concatenate(part, axis=-1)
        for part in zip(kept, (selection.begin, selection.size), strict=True)
    )
    return run_lists(begin, size, index.permutation, capacity or index.permutation.size)


def attend_lists(
    q: Float[Array, "rows q_heads head_dim"],
    cache: PagedKV,
    page_table: Int[Array, "rows pages_per_row"],
    length: Int[Array, " rows"],
    lists: TokenLists,
    *,
    scale: float,
    backend: ListBackend,
) -> State:
    """Attend to lists, and return the state of queries `[rows, kv_heads, group]`.

    Args:
        q: Queries, rotated, in the dtype that products are taken in.
        cache: Pages.
        page_table: Pages of each row.
        length: Tokens of each row.
        lists: Positions that each head reads.
        scale: Multiplies the scores.
        backend: What reads them.
    """
    rows, kv_heads = q.shape[0], cache.kv_heads
    pages = page_table.shape[1]
    state = token_attention(
        q,
        cache,
        jnp.arange(rows + 1, dtype=jnp.int32) * pages,
        page_table.reshape(-1),
        jnp.maximum(length, 1),
        lists,
        sm_scale=scale,
        backend=backend,
    )
    is_read = jnp.isfinite(state.lse)
    top = jnp.where(is_read, state.lse / LOG2_E, MASKED)
    heads = (rows, kv_heads, q.shape[1] // kv_heads)
    out = jnp.where(is_read[..., None], state.o, 0.0).astype(jnp.float32)
    return (
        out.reshape(*heads, -1),
        top.reshape(heads).astype(jnp.float32),
        is_read.astype(jnp.float32).reshape(heads),
    )
