"""Pooled states of a decoder: chunks of prompts are summed on the device, prompts on the host.

The engine's own prefill computes the states, so a pooled prompt shares steps, pages and limits with
generation, and a long one is computed in chunks between the decodes of others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.core.errors import RequestError
from jaxserve.core.request import Request
from jaxserve.engine.batcher import Item
from jaxserve.engine.sequence import SequenceState


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """Chunks of a step, one per sequence row.

    Attributes:
        total: Sum of the states of each row's chunk.
        last: State of its last token.
    """

    total: Float[Array, "rows hidden"]
    last: Float[Array, "rows hidden"]


def pool_chunks(
    hidden: Float[Array, "tokens hidden"], start: Int[Array, " rows"], count: Int[Array, " rows"]
) -> Pooled:
    """Sum runs of hidden states, in float32.

    Args:
        hidden: Hidden states of a step's prefill tokens.
        start: Where each row's run begins.
        count: Its length; 0 for a row without one, whose results are arbitrary but finite.
    """
    place = jnp.arange(hidden.shape[0])
    mine = (place >= start[:, None]) & (place < (start + count)[:, None])
    wide = hidden.astype(jnp.float32)
    # Padding holds arbitrary states; a product with zero must not be asked of an infinite one.
    wide = jnp.where(mine.any(axis=0)[:, None], wide, 0.0)
    total = jnp.matmul(mine.astype(jnp.float32), wide, precision=jax.lax.Precision.HIGHEST)
    return Pooled(total=total, last=wide[jnp.maximum(start + count - 1, 0)])


def chunk_bounds(items: Sequence[Item], rows: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Say where the chunks of pooled prompts lie among a step's prefill tokens.

    Args:
        items: Work of the step, laid out.
        rows: Sequence rows of the engine.

    Returns:
        Start and count per row; None if nothing is pooled.
    """
    start, count = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for item in items:
        if item.sequence.request.pooling is not None and item.prefill_start >= 0:
            start[item.row], count[item.row] = item.hidden_start, item.num_tokens
    return (start, count) if count.any() else None


def collect(sequence: SequenceState, item: Item, pooled: Pooled) -> None:
    """Add a chunk to what a sequence has gathered."""
    is_last = item.start + item.num_tokens == sequence.prompt_len
    if sequence.request.pooling == "mean":
        gathered = np.asarray(pooled.total)[item.row].copy()  # not a view that keeps all rows
        if sequence.pooled is not None:
            gathered += sequence.pooled
        sequence.pooled = gathered / np.float32(sequence.prompt_len) if is_last else gathered
    elif is_last:
        sequence.pooled = np.asarray(pooled.last)[item.row].copy()


def check_pooling(request: Request, limit: int) -> None:
    """Check the length of a prompt to pool, which needs no room for output.

    Args:
        request: The request.
        limit: Most tokens of a sequence.

    Raises:
        RequestError: If it is too long.
    """
    found = len(request.prompt_token_ids)
    if found > limit:
        raise RequestError(
            f"this engine's maximum context length is {limit} tokens, but the text has {found}. "
            "Shorten the text.",
            param="input",
        )
