"""Where weights would lie on a mesh, and how much of them on each device; none is needed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.rules import LogicalAxisRules, MeshAxes, names_of

_MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWeight:
    """A weight that need not exist.

    Attributes:
        path: Its name.
        shape: Its shape.
        axes: Logical axis of each of its axes; None has no name and is never split.
        itemsize: Bytes per element.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    itemsize: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole weight."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How a weight lies on a mesh.

    Attributes:
        weight: The weight.
        spec: Mesh axes along which each of its axes is split, or None.
        device_bytes: Bytes of it on every device.
    """

    weight: NamedWeight
    spec: PartitionSpec
    device_bytes: int


def explain(
    weights: Iterable[NamedWeight], sizes: Mapping[str, int], rules: LogicalAxisRules | None = None
) -> list[Placement]:
    """Place weights on a mesh, strictly: what mesh axes do not divide is an error.

    `LogicalAxisRules.sharding` keeps such a weight whole on every device instead.

    Args:
        weights: The weights.
        sizes: Devices along each axis of the mesh; axes of one device split nothing.
        rules: Which mesh axes each logical axis lies on.

    Raises:
        ConfigError: If a size is impossible, a mesh axis of several devices splits nothing, or one
            does not divide what lies on it; the sizes that do are named.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"mesh axis {name!r} must have at least 1 device, got {size}.")
    rules = LogicalAxisRules() if rules is None else rules
    given = list(weights)
    several = [name for name, size in sizes.items() if size > 1]
    specs = [rules.spec(weight.axes, several) for weight in given]
    pairs = list(zip(given, specs, strict=True))
    used = {entry: names_of(entry) for spec in specs for entry in spec if entry is not None}
    for name in several:
        if not any(name in names for names in used.values()):
            raise ConfigError(
                f"mesh axis {name!r} of {sizes[name]} devices splits no weight of this model; make "
                "it 1."
            )
    for entry, names in used.items():
        _check_axes(entry, math.prod(sizes[name] for name in names), pairs)
    return [
        Placement(
            weight=weight,
            spec=spec,
            device_bytes=weight.num_bytes
            // math.prod(sizes[name] for entry in spec for name in names_of(entry)),
        )
        for weight, spec in pairs
    ]


def _check_axes(
    entry: MeshAxes, size: int, pairs: Sequence[tuple[NamedWeight, PartitionSpec]]
) -> None:
    on_axes = [
        (weight, weight.axes[place], weight.shape[place])
        for weight, spec in pairs
        for place, found in enumerate(spec)
        if found == entry
    ]
    odd = [f"{logical} of {weight.path} ({n})" for weight, logical, n in on_axes if n % size]
    if odd:
        common = math.gcd(*(n for _, _, n in on_axes))
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
        more = f" and {len(odd) - _MOST_NAMED} more" if len(odd) > _MOST_NAMED else ""
        named = " x ".join(repr(name) for name in names_of(entry))
        raise ConfigError(
            f"mesh axis {named} of {size} devices does not divide "
            f"{', '.join(odd[:_MOST_NAMED])}{more}; sizes that divide all that lies on it: "
            f"{', '.join(fitting)}."
        )
