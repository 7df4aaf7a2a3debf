"""Attention on several devices: each attends with its own heads, and nothing is exchanged."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxserve.attention.metadata import AttentionPlan
from jaxserve.cache.buffers import KvLayer
from jaxserve.sharding.rules import DATA_AXIS, TENSOR_AXIS, ModelSharding, names_of

Attend = Callable[..., tuple[Array, KvLayer | None]]
"""What one device does: takes queries, keys, values, cache, plan and sinks."""


def head_axes(sharding: ModelSharding, q_heads: int, kv_heads: int) -> tuple[str, ...]:
    """Return the mesh axes along which heads of queries can be split together with their keys.

    Args:
        sharding: How the model lies on devices.
        q_heads: Heads of queries.
        kv_heads: Heads of keys and values, which are split along the first of these axes. Where
            there is a second one, a device has one such head, which others have as well.

    Returns:
        Names; empty if devices would need heads of keys that others have.
    """
    axes = names_of(sharding.spec(("q_heads",), (q_heads,))[0])
    sizes = dict(sharding.mesh.shape)
    if not axes or axes[0] != TENSOR_AXIS or kv_heads % sizes[TENSOR_AXIS]:
        return ()
    is_aligned = kv_heads == sizes[TENSOR_AXIS] or all(sizes[name] == 1 for name in axes[1:])
    return axes if is_aligned else ()


def own_heads(
    sharding: ModelSharding | None, q_heads: int, kv_heads: int
) -> tuple[int, int] | None:
    """Count the heads of queries, and of keys, with which a device attends.

    Args:
        sharding: How the model lies on devices; None on one.
        q_heads: Heads of queries in all.
        kv_heads: Heads of keys and values in all.

    Returns:
        The two numbers; None where devices do not attend by themselves.
    """
    if sharding is None:
        return q_heads, kv_heads
    axes = head_axes(sharding, q_heads, kv_heads)
    if not axes:
        return (q_heads, kv_heads) if sharding.groups > 1 else None
    sizes = dict(sharding.mesh.shape)
    parts = math.prod(sizes[name] for name in axes)
    return q_heads // parts, kv_heads // sizes[TENSOR_AXIS]


def attend_by_heads(
    attend: Attend,
    q: Array,
    k: Array,
    v: Array,
    cache: KvLayer,
    plan: AttentionPlan,
    *,
    sharding: ModelSharding,
    axes: tuple[str, ...],
    sinks: Array | None,
) -> tuple[Array, KvLayer | None]:
    """Attend on every device with its heads of queries, and of keys and values.

    Args:
        attend: Attention on one device.
        q: Queries of all heads.
        k: Keys of all heads.
        v: Values of all heads.
        cache: The layer's cache.
        plan: What each token sees.
        sharding: How the model lies on devices. Groups with tokens of their own attend to these.
        axes: From `head_axes`; without any, every device of a group has all heads.
        sinks: Score of a key without a value, per head.
    """
    # Where experts lie is nothing to attention; what a variant reads is the same in all groups.
    own = dataclasses.replace(plan, sharding=None, slot_table=None, extra={})
    group = DATA_AXIS if sharding.groups > 1 else None
    heads = TENSOR_AXIS if axes else None
    queries, keys = PartitionSpec(group, axes or None), PartitionSpec(group, heads)

    def body(
        q: Array, k: Array, v: Array, cache: KvLayer, plan: AttentionPlan,
        extra: Mapping[str, Array], sinks: Array | None,
    ) -> tuple[Array, KvLayer | None]:  # fmt: skip
        if group is not None:
            plan = jax.tree.map(lambda part: part[0], plan)
        return attend(q, k, v, cache, dataclasses.replace(plan, extra=extra), sinks=sinks)

    shared = jax.shard_map(
        body,
        mesh=sharding.mesh,
        in_specs=(
            queries, keys, keys, keys, sharding.by_group, PartitionSpec(),
            PartitionSpec(axes or None),
        ),
        out_specs=(queries, keys),
        check_vma=False,
    )  # fmt: skip
    return shared(q, k, v, cache, own, plan.extra, sinks)
