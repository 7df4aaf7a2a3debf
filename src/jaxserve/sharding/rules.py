"""Logical axis rules: words such as `heads` -> mesh axes -> partition specs.

Models name what an axis is; only this file knows which mesh axes carry it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.core.errors import ConfigError

DATA_AXIS = "data"
"""Mesh axis of groups of devices, each with all layers; experts may be shared by all groups."""
TENSOR_AXIS = "tensor"
"""Mesh axis along which the heads and the feed-forward are split."""
COPY_AXIS = "copy"
"""Mesh axis of devices that share layers but hold the same heads of keys and values.

There is one where more devices share layers than there are such heads.
"""
EXPERT_AXIS = "expert"
"""Mesh axis along which experts are split: a device has some of them, or its part of those."""

_WITHIN_LAYER = (TENSOR_AXIS, COPY_AXIS)

_DEFAULT = MappingProxyType(
    {
        "vocab": _WITHIN_LAYER,
        "hidden": None,
        "q_heads": _WITHIN_LAYER,
        "kv_heads": TENSOR_AXIS,
        "head_dim": None,
        "mlp": _WITHIN_LAYER,
        "expert": EXPERT_AXIS,
        "latent": None,
        "position": None,
        "segment": None,
        "label": None,
    }
)

MeshAxes = str | tuple[str, ...] | None
"""Where a logical axis lies: one mesh axis, several (the first is the outermost), or none."""


def names_of(axes: MeshAxes) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a partition spec or of a rule.

    >>> names_of(None), names_of("tensor"), names_of(("data", "tensor"))
    ((), ('tensor',), ('data', 'tensor'))
    """
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalAxisRules:
    """Which mesh axes each logical axis lies on; None is replicated.

    Attributes:
        mesh_axis: Logical axis -> mesh axes. The default splits heads, feed-forward and
            vocabulary (tensor parallelism), and on meshes that have such an axis experts.
    """

    mesh_axis: Mapping[str, MeshAxes] = field(default_factory=lambda: _DEFAULT, hash=False)

    def spec(
        self, axes: Sequence[str | None], present: Sequence[str] | None = None
    ) -> PartitionSpec:
        """Turn logical axis names into a partition spec.

        Args:
            axes: One name (or None) per array axis. What is split by expert over some mesh axes is
                not split within experts over the same ones.
            present: Axes of the mesh, of which others are left out; None leaves out nothing.

        Raises:
            ConfigError: If a name is unknown, or one mesh axis would be used twice.
        """
        chosen: list[MeshAxes] = []
        by_expert: tuple[str, ...] = ()
        for name in axes:
            if name is not None and name not in self.mesh_axis:
                raise ConfigError(
                    f"unknown logical axis {name!r}; known: {', '.join(sorted(self.mesh_axis))}"
                )
            wanted = () if name is None else names_of(self.mesh_axis[name])
            there = wanted if present is None else [axis for axis in wanted if axis in present]
            found = tuple(axis for axis in there if axis not in by_expert)
            by_expert = found if name == "expert" else by_expert
            chosen.append(found if len(found) > 1 else found[0] if found else None)
        used = [axis for entry in chosen for axis in names_of(entry)]
        if len(used) != len(set(used)):
            raise ConfigError(f"logical axes {tuple(axes)} use one mesh axis twice: {chosen}")
        return PartitionSpec(*chosen)

    def sharding(
        self, axes: Sequence[str | None], shape: Sequence[int], mesh: jax.sharding.Mesh
    ) -> NamedSharding:
        """Turn logical axis names into a sharding on `mesh`.

        An axis whose size the mesh axes do not divide is replicated, as are axes that the mesh
        does not have; small models then still run on many devices.
        """
        wanted = self.spec(axes, mesh.axis_names)
        sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
        fitted = [
            entry if _divides(names_of(entry), sizes, size) else None
            for entry, size in zip(wanted, shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fitted))


def _divides(names: Sequence[str], sizes: Mapping[str, int], size: int) -> bool:
    if any(name not in sizes for name in names):
        return False
    return size % math.prod(sizes[name] for name in names) == 0


_EXPERTS = MappingProxyType(
    {**_DEFAULT, "expert": (EXPERT_AXIS, DATA_AXIS, TENSOR_AXIS, COPY_AXIS)}
)


def expert_parallel_rules() -> LogicalAxisRules:
    """Return rules by which whole experts lie on all devices, whatever else these share."""
    return LogicalAxisRules(mesh_axis=_EXPERTS)


ExchangeBackend = Literal["dense", "rotation", "ppermute", "ragged"]
"""How rows cross between servers; `sharding.flash.transport` says what each is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSharding:
    """How whole experts lie on devices, and how their results travel.

    Attributes:
        servers: Servers, of equally many devices that follow each other.
        num_slots: Experts that all devices hold of a layer, copies included.
        backend: How results cross between servers; None sums over all devices instead.
        dedup: Whether one row of a token crosses from a server, and not one per expert.
        is_balanced: Whether places change while serving, so that loads are counted.
    """

    servers: int
    num_slots: int
    backend: ExchangeBackend | None = None
    dedup: bool = True
    is_balanced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSharding:
    """How a model lies on several devices; static, so that programs can be compiled for it.

    Attributes:
        mesh: The devices.
        rules: Which mesh axes each logical axis lies on.
        experts: How whole experts lie there; None if they are in their order, and summed up.
        groups: Groups along the data axis that have tokens, and a cache, of their own; 1 if all
            devices have the tokens of all.
    """

    mesh: jax.sharding.Mesh
    rules: LogicalAxisRules
    experts: ExpertSharding | None = None
    groups: int = 1

    @property
    def by_group(self) -> PartitionSpec:
        """How an axis is split of which each group has its part: tokens, sequence rows, pages."""
        return PartitionSpec(DATA_AXIS) if self.groups > 1 else PartitionSpec()

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Mesh axes over which whole experts are spread, the outermost first."""
        return names_of(self.rules.spec(("expert",), self.mesh.axis_names)[0])

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Return how an array with these logical axes is split."""
        return self.rules.sharding(axes, shape, self.mesh).spec
