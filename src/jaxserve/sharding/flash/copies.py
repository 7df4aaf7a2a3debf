"""Which copy of an expert a token goes to, on the device: `eplb.choose_slots` within a program."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sharding.eplb import Placement
from jaxserve.sharding.experts import SlotTable

_MIX_LOW, _MIX_HIGH = np.uint32(0x7F4A7C15), np.uint32(0x9E3779B9)


def slot_table(placement: Placement) -> SlotTable:
    """Return a placement as arrays."""
    layout = placement.layout
    most = min(layout.num_slots - layout.num_experts + 1, layout.num_devices)
    most = max(most, placement.slots.shape[1])
    table = np.full((layout.num_experts, most), -1, np.int32)
    table[:, : placement.slots.shape[1]] = placement.slots
    return SlotTable(jnp.asarray(table), jnp.asarray(placement.copies.astype(np.int32)))


def mixed(numbers: jax.Array) -> jax.Array:
    """Return bits 33 to 63 of products with an odd number of 64 bits, without such integers."""
    number = numbers.astype(jnp.uint32)
    low, high = number & 0xFFFF, number >> 16
    of_low, of_high = _MIX_LOW & np.uint32(0xFFFF), _MIX_LOW >> np.uint32(16)
    # The upper half of number * _MIX_LOW, from products of halves.
    middle = (low * of_low >> 16) + (low * of_high & 0xFFFF) + (high * of_low & 0xFFFF)
    upper = high * of_high + (low * of_high >> 16) + (high * of_low >> 16) + (middle >> 16)
    return (upper + number * _MIX_HIGH) >> 1


def choose_copies(
    table: SlotTable, experts: jax.Array, tokens: jax.Array, *, slots_per_server: int, servers: int
) -> jax.Array:
    """Choose which copy of each expert a token goes to, as `eplb.choose_slots` does.

    Args:
        table: Where experts lie.
        experts: `[tokens, top_k]`, int32; below 0 for none.
        tokens: `[tokens]`, a number of each, of 0 to 2**32 - 1.
        slots_per_server: Slots of a server.
        servers: Servers.

    Returns:
        `[tokens, top_k]`, int32: slots; -1 where no expert is.
    """
    is_one = experts >= 0
    slots, copies = table.slots[experts], table.copies[experts]
    chosen = jnp.where((copies == 1) & is_one, slots[..., 0], -1)
    each = jnp.arange(servers)
    visited = ((chosen[..., None] // slots_per_server == each) & (chosen[..., None] >= 0)).any(1)
    number = mixed(tokens)
    columns: list[jax.Array] = []
    for column in range(experts.shape[1]):
        options = slots[:, column]
        is_option = options >= 0
        server = jnp.maximum(options, 0) // slots_per_server
        is_near = is_option & jnp.take_along_axis(visited, server, axis=1)
        is_open = jnp.where(is_near.any(axis=1, keepdims=True), is_near, is_option)
        rank = jnp.cumsum(is_open, axis=1) - 1
        count = jnp.maximum(rank[:, -1:] + 1, 1).astype(jnp.uint32)
        wanted = (number[:, None] % count).astype(jnp.int32)
        at = jnp.argmax(is_open & (rank == wanted), axis=1)
        picked = jnp.take_along_axis(options, at[:, None], axis=1)[:, 0]
        done = jnp.where(chosen[:, column] >= 0, chosen[:, column], picked)
        done = jnp.where(is_one[:, column], done, -1)
        visited |= (done[:, None] // slots_per_server == each) & (done[:, None] >= 0)
        columns.append(done)
    return jnp.stack(columns, axis=1).astype(jnp.int32)
