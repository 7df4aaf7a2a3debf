"""Low-rank adapters on the device: stacked buffers of every layer, and what they add to a product.

Adapters lie beside each other in slots. Every token multiplies with all slots at once, and a mask
keeps its own: two dense products of width slots * rank, whatever mixture of adapters a step holds.
Slots are few and ranks small, so that is far less work than to gather weights per token.
"""

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models.config import ModelConfig
from jaxserve.sharding.rules import LogicalAxisRules

GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Projections that can be adapted; those of a group share their input."""

QKV, OUT, GATE_UP, DOWN = GROUPS

_AXES = MappingProxyType(
    {
        "self_attn.q_proj": ("hidden", "q_heads"),
        "self_attn.k_proj": ("hidden", "kv_heads"),
        "self_attn.v_proj": ("hidden", "kv_heads"),
        "self_attn.o_proj": ("q_heads", "hidden"),
        "mlp.gate_proj": ("hidden", "mlp"),
        "mlp.up_proj": ("hidden", "mlp"),
        "mlp.down_proj": ("mlp", "hidden"),
    }
)
"""Logical axes of the weights that are adapted; their factors are split in the same way."""

Factors = tuple[np.ndarray, np.ndarray]
"""`A` `[in, rank]` and `B` `[rank, out]`, the scale already in it: what is added is `x A B`."""


def target_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return input and output size of every projection that can be adapted, by name.

    Where feed-forwards are made of experts, none of them can be, nor the plain ones beside them.
    """
    sizes = {
        "hidden": config.hidden_size,
        "q_heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
    }
    return {
        name: (sizes[source], sizes[target])
        for name, (source, target) in _AXES.items()
        if config.experts is None or not name.startswith("mlp.")
    }


def _groups(names: Container[str]) -> list[tuple[str, ...]]:
    """Return the groups whose projections are among those that can be adapted."""
    return [group for group in GROUPS if group[0] in names]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraShape:
    """Sizes of the buffers.

    Attributes:
        slots: Adapters on the device at once.
        rank: Largest rank; smaller ones are padded with zeros.
    """

    slots: int
    rank: int

    def num_values(self, config: ModelConfig) -> int:
        """Count the numbers in the buffers of a whole model."""
        width = sum(source + target for source, target in target_sizes(config).values())
        return config.num_layers * self.slots * self.rank * width


class LoraBuffers(NamedTuple):
    """The adapters of one layer, stacked in the order in which products want them.

    Attributes:
        a: First factors, by the first name of a group: `[in, projections, slots, rank]`.
        b: Second factors, by name: `[slots, rank, out]`.
    """

    a: dict[str, Float[Array, "in_size projections slots rank"]]
    b: dict[str, Float[Array, "slots rank out_size"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerLora:
    """What one layer needs to know of adapters.

    Attributes:
        buffers: The layer's adapters.
        is_mine: Which slot each token uses; no slot for a token without an adapter.
        is_invariant: Whether a token's result may not depend on the slot of its adapter, not even
            in the last bit.
    """

    buffers: LoraBuffers
    is_mine: Bool[Array, "tokens slots"]
    is_invariant: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepLora:
    """What one step needs to know of adapters.

    Attributes:
        slot: Slot of each packed token's adapter, from 1 on; 0 is none.
        layers: The adapters, by layer.
        is_invariant: See `LayerLora`.
    """

    slot: Int[Array, " tokens"]
    layers: tuple[LoraBuffers, ...]
    is_invariant: bool = dataclasses.field(default=False, metadata={"static": True})

    def by_layer(self) -> list[LayerLora]:
        """Return what each layer needs."""
        slots = self.layers[0].b[OUT[0]].shape[0]
        is_mine = self.slot[:, None] == jnp.arange(1, slots + 1)
        return [
            LayerLora(buffers=layer, is_mine=is_mine, is_invariant=self.is_invariant)
            for layer in self.layers
        ]


def adapt(
    x: Float[Array, "*tokens in_size"],
    outputs: Sequence[Float[Array, "*tokens _"]],
    lora: LayerLora | None,
    group: tuple[str, ...],
) -> Sequence[Float[Array, "*tokens _"]]:
    """Add to a layer's products what each token's adapter adds.

    Args:
        x: What was multiplied; with adapters, packed `[tokens]`.
        outputs: The products, one per projection.
        lora: The adapters; None changes nothing, nor do those of a model in which these
            projections are not adapted.
        group: Names of the projections, one of `GROUPS`.

    Source: LoRA (Hu et al., 2021); adapters side by side in one batch: Punica, S-LoRA.
    """
    if lora is None or group[0] not in lora.buffers.a:
        return outputs
    with jax.named_scope("lora"):
        deltas = (_slot_by_slot if lora.is_invariant else _all_slots)(x, lora, group)
        return [y + delta.astype(y.dtype) for y, delta in zip(outputs, deltas, strict=True)]


def _all_slots(x: Array, lora: LayerLora, group: tuple[str, ...]) -> list[Array]:
    first = lora.buffers.a[group[0]]
    inner = _product(x, first.reshape(first.shape[0], -1)).reshape(-1, *first.shape[1:])
    mine = jnp.where(lora.is_mine[:, None, :, None], inner, 0).astype(x.dtype)
    deltas: list[Array] = []
    for place, name in enumerate(group):
        second = lora.buffers.b[name]
        left = mine[:, place].reshape(mine.shape[0], -1)
        deltas.append(_product(left, second.reshape(-1, second.shape[-1])))
    return deltas


def _slot_by_slot(x: Array, lora: LayerLora, group: tuple[str, ...]) -> list[Array]:
    """Multiply with each slot by itself, so that all of them are summed in the same order."""
    first = lora.buffers.a[group[0]]
    deltas: list[Array] = []
    for place, name in enumerate(group):
        second = lora.buffers.b[name]
        total = jnp.zeros((x.shape[0], second.shape[-1]), jnp.float32)
        for slot in range(second.shape[0]):
            inner = _product(x, first[:, place, slot]).astype(x.dtype)
            delta = _product(inner, second[slot])
            total = jnp.where(lora.is_mine[:, slot, None], delta, total)
        deltas.append(total)
    return deltas


def _product(x: Array, weight: Array) -> Array:
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


def allocate(
    config: ModelConfig,
    shape: LoraShape,
    dtype: jnp.dtype,
    *,
    mesh: jax.sharding.Mesh,
    rules: LogicalAxisRules,
) -> tuple[LoraBuffers, ...]:
    """Allocate empty slots for every layer, split over the mesh as the weights are.

    Args:
        config: The model.
        shape: Slots and largest rank.
        dtype: Element type; that of the weights.
        mesh: Devices.
        rules: Where logical axes lie on them.
    """
    sizes = target_sizes(config)

    def zeros(dims: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        sharding: NamedSharding = rules.sharding(axes, dims, mesh)
        return jnp.zeros(dims, dtype, device=sharding)

    def layer() -> LoraBuffers:
        return LoraBuffers(
            a={
                group[0]: zeros(
                    (sizes[group[0]][0], len(group), shape.slots, shape.rank),
                    (_AXES[group[0]][0], None, None, None),
                )
                for group in _groups(sizes)
            },
            b={
                name: zeros((shape.slots, shape.rank, out), (None, None, _AXES[name][1]))
                for name, (_, out) in sizes.items()
            },
        )

    return tuple(layer() for _ in range(config.num_layers))


def layer_size(config: ModelConfig, rank: int) -> int:
    """Count the numbers of one adapter in one layer, padded to a rank."""
    return rank * sum(source + target for source, target in target_sizes(config).values())


def pack_layer(
    factors: Mapping[str, Factors], config: ModelConfig, *, rank: int, dtype: np.dtype
) -> np.ndarray:
    """Lay the factors of one layer out in one buffer, padded with zeros; one transfer carries it.

    Args:
        factors: `A` and `B` of the projections that are adapted.
        config: The model.
        rank: The rank of the buffers.
        dtype: Element type of the buffers.
    """
    sizes = target_sizes(config)
    packed = np.zeros(layer_size(config, rank), dtype)
    start = 0
    for group in _groups(sizes):
        in_size = sizes[group[0]][0]
        stop = start + in_size * len(group) * rank
        whole = packed[start:stop].reshape(in_size, len(group), rank)
        start = stop
        for place, name in enumerate(group):
            if name in factors:
                first = factors[name][0]
                whole[:, place, : first.shape[1]] = first
    for name, (_, out_size) in sizes.items():
        stop = start + rank * out_size
        if name in factors:
            second = factors[name][1]
            packed[start:stop].reshape(rank, out_size)[: len(second)] = second
        start = stop
    return packed


def set_slot(
    buffers: LoraBuffers, slot: Int[Array, ""], packed: Float[Array, " values"]
) -> LoraBuffers:
    """Put one adapter into a layer's slot, counted from 0. Donate the buffers."""
    start = 0
    first: dict[str, Array] = {}
    second: dict[str, Array] = {}
    for group in _groups(buffers.a):
        old = buffers.a[group[0]]
        part = (*old.shape[:2], old.shape[3])
        stop = start + math.prod(part)
        first[group[0]] = old.at[:, :, slot].set(packed[start:stop].reshape(part))
        start = stop
    for name in (name for name in _AXES if name in buffers.b):
        old = buffers.b[name]
        stop = start + math.prod(old.shape[1:])
        second[name] = old.at[slot].set(packed[start:stop].reshape(old.shape[1:]))
        start = stop
    return LoraBuffers(a=first, b=second)
