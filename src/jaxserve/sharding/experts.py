"""Experts in slots: which slots hold copies of an expert, and how weights get from slot to slot."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotTable:
    """Where experts lie, as arrays whose shapes no placement of the same layout changes.

    Attributes:
        slots: `[*layers, experts, most]`, int32: slots of each expert, in order; -1 behind the
            last.
        copies: `[*layers, experts]`, int32: how many those are.
    """

    slots: jax.Array
    copies: jax.Array

    def of_layer(self, index: int) -> "SlotTable":
        """Return the table of one layer."""
        return SlotTable(self.slots[index], self.copies[index])


def as_servers(mesh: Mesh, axes: Sequence[str], servers: int) -> Mesh:
    """Return the devices of a mesh as servers of GPUs, in the order in which experts lie on them.

    Args:
        mesh: The devices.
        axes: All axes of the mesh, the outermost first.
        servers: Into how many servers to divide them.
    """
    order = [mesh.axis_names.index(name) for name in axes]
    return Mesh(mesh.devices.transpose(order).reshape(servers, -1), ("server", "gpu"))


def relocate(held: jax.Array, source: jax.Array, *, mesh: Mesh, axes: tuple[str, ...]) -> jax.Array:
    """Give every slot the weights that some slot holds.

    What each device holds goes round, as far as somebody needs it, and each takes what is its own:
    no device ever has more than two parts besides the new one.

    Args:
        held: `[slots, ...]`, the first axis sharded over all devices.
        source: `[new_slots]`, int32, the same on all devices: which slot each new one takes from.
        mesh: The devices.
        axes: The axes of the mesh over which slots are spread.

    Returns:
        `[new_slots, ...]`, sharded alike.
    """
    spread, everywhere = PartitionSpec(axes), PartitionSpec()
    size = int(np.prod([mesh.shape[name] for name in axes]))
    ring = [((i + 1) % size, i) for i in range(size)]

    def take(own: jax.Array, source: jax.Array) -> jax.Array:
        me, part = lax.axis_index(axes), len(own)
        by_device = source.reshape(size, -1)
        away = (by_device // part - jnp.arange(size)[:, None]) % size
        mine = by_device[me]

        def pick(turn: jax.Array | int, block: jax.Array, made: jax.Array) -> jax.Array:
            is_here = away[me] == turn
            shape = (-1,) + (1,) * (own.ndim - 1)
            return jnp.where(is_here.reshape(shape), block[mine % part], made)

        def go(turn: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            block = lax.ppermute(state[0], axes, ring)
            return block, pick(turn, block, state[1])

        made = pick(0, own, jnp.zeros((len(mine), *own.shape[1:]), own.dtype))
        return lax.fori_loop(1, away.max() + 1, go, (own, made))[1]

    return jax.shard_map(
        take, mesh=mesh, in_specs=(spread, everywhere), out_specs=spread, check_vma=False
    )(held, source)
