"""Programs in which each group of devices works on rows and pages of its own.

Rows are numbered through all groups, pages within each. A call that concerns one group leaves the
others as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxserve.cache.buffers import KvBuffers
from jaxserve.engine.pooled import Pooled, pool_chunks
from jaxserve.engine.sampler import RowState, Sampled
from jaxserve.engine.traced import move_row, set_row
from jaxserve.sharding.rules import DATA_AXIS

_OWN = PartitionSpec(DATA_AXIS)
_ALL = PartitionSpec()


def _in_groups(
    body: Callable[..., Any],
    mesh: Mesh,
    takes: tuple[PartitionSpec, ...],
    gives: Any,  # noqa: ANN401
) -> Callable[..., Any]:
    return jax.shard_map(body, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False)


def draw_in_groups(
    mesh: Mesh,
    draw: Callable[..., tuple[Sampled, RowState]],
    logits: Array,
    rows: RowState,
    packed: Array,
    mask: Array,
) -> tuple[Sampled, RowState]:
    """Draw the tokens of a step. Donates `rows`.

    Args:
        mesh: The devices.
        draw: Draws those of one group.
        logits: `[groups * places, vocab]`.
        rows: What is known of the rows.
        packed: `[groups, words]`: the sampler's part of the step.
        mask: `[groups * places, words]`: tokens that may be drawn.

    Returns:
        What is drawn, the same on all devices, and the rows.
    """

    def body(logits: Array, rows: RowState, packed: Array, mask: Array) -> tuple[Sampled, RowState]:
        sampled, rows = draw(logits, rows, packed[0], mask)
        return _told(sampled), rows

    return _in_groups(body, mesh, (_OWN,) * 4, (_ALL, _OWN))(logits, rows, packed, mask)


def _told(sampled: Sampled) -> Sampled:
    """Return what all groups have drawn, by one exchange."""
    leaves, tree = jax.tree.flatten(sampled)
    own = [lax.bitcast_convert_type(leaf, jnp.int32).reshape(len(leaf), -1) for leaf in leaves]
    whole = lax.all_gather(jnp.concatenate(own, axis=1), DATA_AXIS, tiled=True)
    ends = np.cumsum([part.shape[1] for part in own])[:-1]
    found = [
        lax.bitcast_convert_type(part, leaf.dtype).reshape(-1, *leaf.shape[1:])
        for part, leaf in zip(jnp.split(whole, ends, axis=1), leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, found)


def set_row_in_group(
    mesh: Mesh, rows: RowState, row: Array, counts: Array, prompt_seen: Array, bias: Array
) -> RowState:
    """Set what is known of a row. Donates `rows`."""

    def body(rows: RowState, row: Array, *known: Array) -> RowState:
        local, is_here = _local(row, len(rows.last_token))
        return set_row(rows, jnp.where(is_here, local, len(rows.last_token)), *known)

    call = _in_groups(body, mesh, (_OWN, *(_ALL,) * 4), _OWN)
    return call(rows, row, counts, prompt_seen, bias)


def move_row_in_group(
    mesh: Mesh,
    cache: PartitionSpec,
    slots: KvBuffers,
    rows: RowState,
    source: Array,
    target: Array,
    length: Array,
) -> tuple[KvBuffers, RowState]:
    """Move a row to another of the same group. Donates `slots` and `rows`.

    Args:
        mesh: The devices.
        cache: How the cache is split.
        slots: Slots of the rows, if there are any.
        rows: What is known of the rows.
        source: Row to move.
        target: Where to.
        length: Tokens that its slot holds.
    """

    def body(
        slots: KvBuffers, rows: RowState, source: Array, target: Array, length: Array
    ) -> tuple[KvBuffers, RowState]:
        size = len(rows.last_token)
        old, is_here = _local(source, size)
        new = jnp.where(is_here, target % size, size)
        return move_row(slots, rows, old, new, jnp.where(is_here, length, 0))

    call = _in_groups(body, mesh, (cache, _OWN, *(_ALL,) * 3), (cache, _OWN))
    return call(slots, rows, source, target, length)


def move_pages_in_group(
    move: Callable[..., KvBuffers],
    slots_at: int,
    mesh: Mesh,
    cache: PartitionSpec,
    *arrays: Any,  # noqa: ANN401  two caches, then numbers
) -> KvBuffers:
    """Copy pages of one row out of its slot or into it.

    Args:
        move: `buffers.save_pages` or `buffers.load_pages`.
        slots_at: Which of its two caches are the slots, 0 or 1.
        mesh: The devices.
        cache: How caches are split.
        *arrays: What it takes; the first cache is donated.
    """

    def body(*arrays: Any) -> KvBuffers:  # noqa: ANN401
        *caches, count, row, block, page = arrays
        local, is_here = _local(row[0], caches[slots_at][0][0].shape[0])
        return move(*caches, jnp.where(is_here, count, 0), jnp.full_like(row, local), block, page)

    return _in_groups(body, mesh, (cache, cache, *(_ALL,) * 4), cache)(*arrays)


def _local(row: Array, per_group: int) -> tuple[Array, Array]:
    """Return the number of a row within its group, and whether this device is of that group."""
    return row % per_group, row // per_group == lax.axis_index(DATA_AXIS)


def pool_in_groups(mesh: Mesh, hidden: Array, start: Array, count: Array) -> Pooled:
    """Sum runs of hidden states, as `pool_chunks`; all devices get all sums."""
    pooled = pool_chunks(hidden, start, count)
    return lax.with_sharding_constraint(pooled, NamedSharding(mesh, _ALL))
