"""Experts of an engine on several devices: how results travel, and how weights get elsewhere.

With balancing on, weights of experts lie in slots, whose contents change while serving. Everybody
outside a runner sees them in their order all the same.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.core.errors import ConfigError
from jaxserve.core.parallel import ParallelOptions
from jaxserve.engine.compiling import Programs
from jaxserve.models.config import ModelConfig
from jaxserve.sharding.arrays import put
from jaxserve.sharding.eplb import Layout, Placement, even_placement
from jaxserve.sharding.experts import SlotTable, as_servers, relocate
from jaxserve.sharding.flash.copies import slot_table
from jaxserve.sharding.flash.stages import MAX_BANK_SERVERS
from jaxserve.sharding.flash.transport import Wire, check_hosts, host_of, settle
from jaxserve.sharding.rules import (
    ExchangeBackend,
    ExpertSharding,
    ModelSharding,
    expert_parallel_rules,
)

_LEAF = re.compile(r"layers\.(\d+)\.mlp\.experts\..+")


# Settings ---------------------------------------------------------------------------------------


def expert_sharding(
    options: ParallelOptions, shape: ModelConfig, mesh: Mesh, *, groups: int
) -> ExpertSharding | None:
    """Say how whole experts lie on devices, and how tokens and results travel.

    Args:
        options: Settings.
        shape: The model.
        mesh: Its devices.
        groups: Groups of devices that have tokens of their own.

    Returns:
        None if experts are split like other weights, or lie in their order and are summed up.

    Raises:
        ConfigError: If settings do not go with the model or its devices.
    """
    named = options.all_to_all_backend
    could_send = groups > 1 and options.enable_expert_parallel and mesh.size > 1
    if shape.experts is None or not (
        options.enable_eplb
        or named not in ("auto", "allreduce")
        or (named == "auto" and could_send)
    ):
        return None
    if mesh.size == 1:
        raise ConfigError(
            f"all_to_all_backend={named} and enable_eplb share experts among devices, and there is "
            "one; raise data_parallel_size, or leave them out."
        )
    for what, count in (
        (f"{shape.experts.num_experts} experts", shape.experts.num_experts),
        ("num_redundant_experts", options.num_redundant_experts),
    ):
        if count % mesh.size:
            raise ConfigError(
                f"{what} must be a multiple of the {mesh.size} devices, got {count}; use other "
                "numbers of devices or of redundant experts."
            )
    axes = ModelSharding(mesh=mesh, rules=expert_parallel_rules()).expert_axes
    servers = count_servers(options, as_servers(mesh, axes, 1))
    if named == "auto":
        named = "rotation" if could_send and servers > 1 else "allreduce"
    if named == "allreduce" and not options.enable_eplb:
        return None
    made = ExpertSharding(
        servers=servers,
        num_slots=shape.experts.num_experts + options.num_redundant_experts,
        backend=None if named == "allreduce" else _backend(named, servers),
        dedup=options.all_to_all_dedup,
        is_balanced=options.enable_eplb,
    )
    layout_of(shape, made, mesh.size)
    if made.backend is not None:
        settle(Wire(backend=made.backend), as_servers(mesh, axes, servers), 0, None)
    return made


def _backend(named: str, servers: int) -> ExchangeBackend:
    if named == "dense":
        return "dense"
    if servers == 1:
        raise ConfigError(
            f"all_to_all_backend={named} sends between servers, and all devices here are of one; "
            "use allreduce, or say with devices_per_server which devices fast links join."
        )
    if named == "rotation":
        return "rotation"
    return "ppermute" if servers <= MAX_BANK_SERVERS else "ragged"


def count_servers(options: ParallelOptions, mesh: Mesh) -> int:
    """Return how many servers the devices of a mesh make.

    Raises:
        ConfigError: If devices are no whole servers, or those of one are on several hosts.
    """
    devices = mesh.devices.reshape(-1)
    first = host_of(devices[0])
    own = sum(host_of(device) == first for device in devices)
    per = options.devices_per_server or own
    if len(devices) % per:
        raise ConfigError(
            f"devices_per_server={per} does not divide the {len(devices)} devices of "
            f"tensor_parallel_size={options.tensor_parallel_size} x data_parallel_size="
            f"{options.data_parallel_size}; use a divisor."
        )
    check_hosts(devices.reshape(-1, per))
    return len(devices) // per


def layout_of(shape: ModelConfig, way: ExpertSharding, num_devices: int) -> Layout:
    """Return the devices among which experts of each layer are spread.

    Raises:
        ConfigError: If slots and devices do not divide.
    """
    if shape.experts is None:
        raise AssertionError("a model without experts has none to spread")
    return Layout(
        num_experts=shape.experts.num_experts,
        num_devices=num_devices,
        num_slots=way.num_slots,
        num_servers=way.servers,
        num_groups=shape.experts.num_groups,
    )


# Slots ------------------------------------------------------------------------------------------


class ExpertSlots:
    """Weights of experts in slots, the table that says where each expert is, and their loads.

    Args:
        config: The model's shape.
        sharding: How it lies on devices.
        paths: Of all weights, in their order.
        programs: Compiles what moves weights.

    Attributes:
        layers: Layers that have experts.
        layout: Devices and slots of each of them.
        placements: What lies where, per layer.
        table: The same on the devices, for all layers of the model.
        loads: `[layers, experts]`, uint32: tokens that have asked for each expert so far, modulo
            2**32.
    """

    def __init__(
        self,
        config: ModelConfig,
        sharding: ModelSharding,
        paths: Sequence[str],
        programs: Programs,
    ) -> None:
        """Begin with an even placement."""
        if sharding.experts is None:
            raise AssertionError("these experts lie in their order")
        self._sharding, self._programs = sharding, programs
        self._everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        self._num_layers = config.num_layers
        self.layout = layout_of(config, sharding.experts, sharding.mesh.size)
        found = [_LEAF.fullmatch(path) for path in paths]
        layers = [None if one is None else int(one[1]) for one in found]
        self.layers = tuple(sorted({layer for layer in layers if layer is not None}))
        self._layer_of = [None if one is None else self.layers.index(one) for one in layers]
        self._in_order = np.arange(self.layout.num_experts)
        self.placements = [even_placement(self.layout) for _ in self.layers]
        self._set_table()
        self.forget_loads()

    def _set_table(self) -> None:
        each = [slot_table(placement) for placement in self.placements]
        slots = np.zeros((self._num_layers, *each[0].slots.shape), np.int32)
        copies = np.zeros((self._num_layers, *each[0].copies.shape), np.int32)
        for layer, one in zip(self.layers, each, strict=True):
            slots[layer], copies[layer] = one.slots, one.copies
        self.table = SlotTable(put(slots, self._everywhere), put(copies, self._everywhere))

    def forget_loads(self) -> None:
        """Begin to count anew."""
        zeros = np.zeros((len(self.layers), self.layout.num_experts), np.uint32)
        self.loads = put(zeros, self._everywhere)

    def spread_leaf(self, index: int, leaf: jax.Array) -> jax.Array:
        """Put one weight, by its place among all, into slots; others stay as they are."""
        layer = self._layer_of[index]
        if layer is None:
            return leaf
        return self._relocate(leaf, self._in_order, self.placements[layer].expert)

    def fold(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """Return weights with experts in their order."""
        return [
            leaf
            if layer is None
            else self._relocate(leaf, self.placements[layer].expert, self._in_order)
            for layer, leaf in zip(self._layer_of, leaves, strict=True)
        ]

    def move(self, leaves: Sequence[jax.Array], experts: np.ndarray) -> list[jax.Array]:
        """Put experts elsewhere; nothing is compiled once `warm` has been called.

        Args:
            leaves: All weights, experts in slots.
            experts: `[layers, slots]`: the expert that each slot is to hold.
        """
        held = [placement.expert for placement in self.placements]
        moved = [
            leaf
            if layer is None or np.array_equal(held[layer], experts[layer])
            else self._relocate(leaf, held[layer], experts[layer])
            for layer, leaf in zip(self._layer_of, leaves, strict=True)
        ]
        self.placements = [
            Placement(layout=self.layout, expert=np.asarray(row, np.int64)) for row in experts
        ]
        self._set_table()
        return moved

    def warm(self, leaves: Sequence[jax.ShapeDtypeStruct]) -> list[Callable[[], object]]:
        """List what compiles the programs that move weights in slots.

        Args:
            leaves: Descriptions of all weights, experts in slots.
        """
        kinds = dict.fromkeys(
            (leaf.shape, leaf.dtype, leaf.sharding)
            for layer, leaf in zip(self._layer_of, leaves, strict=True)
            if layer is not None
        )
        return [
            functools.partial(
                self._program, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), count
            )
            for shape, dtype, sharding in kinds
            for count in (self.layout.num_slots, self.layout.num_experts)
        ]

    def _relocate(self, leaf: jax.Array, held: np.ndarray, wanted: np.ndarray) -> jax.Array:
        source = nearest(held, wanted, self.layout.num_devices)
        return self._program(leaf, len(wanted))(leaf, put(source, self._everywhere))

    def _program(self, leaf: Any, count: int) -> Callable[..., Any]:  # noqa: ANN401  array or description
        spec = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        number = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=self._everywhere)
        fn = functools.partial(relocate, mesh=self._sharding.mesh, axes=self._sharding.expert_axes)
        return self._programs.get(
            ("relocate", spec.shape, str(spec.dtype), count), fn, (), spec, number
        )


def nearest(held: np.ndarray, wanted: np.ndarray, num_devices: int) -> np.ndarray:
    """Choose the slot from which each new slot takes its expert, a few devices further at most.

    Args:
        held: Expert of each slot.
        wanted: Expert that each new slot is to hold.
        num_devices: Devices, each of which has as many slots as others.

    Returns:
        `[new_slots]`, int32.

    >>> nearest(np.array([0, 1, 2, 0]), np.array([0, 2, 2, 0]), 2)
    array([0, 2, 2, 3], dtype=int32)
    """
    home = np.arange(len(wanted)) // (len(wanted) // num_devices)
    there = np.arange(len(held)) // (len(held) // num_devices)
    away = (there[None, :] - home[:, None]) % num_devices
    away = np.where(held[None, :] == wanted[:, None], away, num_devices)
    return away.argmin(axis=1).astype(np.int32)
