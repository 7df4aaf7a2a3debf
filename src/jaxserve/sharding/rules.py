"""Logical axis rules: words such as `heads` -> mesh axes -> partition specs.

Models name what an axis is; only this file knows which mesh axis carries it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.core.errors import ConfigError

TENSOR_AXIS = "tensor"
"""Mesh axis along which the heads and the feed-forward are split."""
EXPERT_AXIS = "expert"
"""Mesh axis along which experts are split: a device has some of them, or its part of those."""

_DEFAULT = MappingProxyType(
    {
        "vocab": TENSOR_AXIS,
        "hidden": None,
        "q_heads": TENSOR_AXIS,
        "kv_heads": TENSOR_AXIS,
        "head_dim": None,
        "mlp": TENSOR_AXIS,
        "expert": EXPERT_AXIS,
        "latent": None,
        "position": None,
        "segment": None,
        "label": None,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalAxisRules:
    """Which mesh axis each logical axis lies on; None is replicated.

    Attributes:
        mesh_axis: Logical axis -> mesh axis. The default splits heads, feed-forward and
            vocabulary (tensor parallelism), and on meshes that have such an axis experts.
    """

    mesh_axis: Mapping[str, str | None] = field(default_factory=lambda: _DEFAULT)

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Turn logical axis names into a partition spec.

        Args:
            axes: One name (or None) per array axis.

        Raises:
            ConfigError: If a name is unknown, or one mesh axis would be used twice.
        """
        chosen: list[str | None] = []
        for name in axes:
            if name is not None and name not in self.mesh_axis:
                raise ConfigError(
                    f"unknown logical axis {name!r}; known: {', '.join(sorted(self.mesh_axis))}"
                )
            chosen.append(None if name is None else self.mesh_axis[name])
        used = [axis for axis in chosen if axis is not None]
        if len(used) != len(set(used)):
            raise ConfigError(f"logical axes {tuple(axes)} use one mesh axis twice: {chosen}")
        return PartitionSpec(*chosen)

    def sharding(
        self, axes: Sequence[str | None], shape: Sequence[int], mesh: jax.sharding.Mesh
    ) -> NamedSharding:
        """Turn logical axis names into a sharding on `mesh`.

        An axis whose size the mesh axis does not divide is replicated, as are axes that the mesh
        does not have; small models then still run on many devices.
        """
        wanted = self.spec(axes)
        sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
        fitted = [
            axis if axis in sizes and size % sizes[axis] == 0 else None
            for axis, size in zip(wanted, shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fitted))
