"""Experts on several devices: each device works on what it has of them.

Tokens get to their experts, and results come together, in one of two ways:

* a sum over all devices, of one row per token from each, whatever the router chose. Groups that
  have tokens of their own first tell each other all of them, and get the sums of their own only;
* an exchange: tokens are dealt out to devices, go to the servers that have experts of theirs, and
  results come back. Padding asks for no expert and is not sent. If all devices have all tokens,
  only results travel.
"""

from typing import Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.sharding.experts import SlotTable, as_servers
from jaxserve.sharding.flash.copies import choose_copies
from jaxserve.sharding.flash.moe import (
    moe_combine,
    moe_dispatch,
    moe_place,
    numbers_of,
    words_of,
)
from jaxserve.sharding.rules import DATA_AXIS, ExpertSharding, ModelSharding, names_of

QUANTUM: Final = 32
"""Rows of one message between servers at most: stages of few rows would else be mostly padding."""

Choice = tuple[Int[Array, "tokens top_k"], Float[Array, "tokens top_k"]]


@runtime_checkable
class Projection(Protocol):
    """One projection of experts."""

    kernel: nnx.Param
    bias: nnx.Param | None


@runtime_checkable
class SpreadExperts(Protocol):
    """What is asked of experts, of all or of those of one device."""

    @property
    def gate_proj(self) -> Projection:
        """The gate's projection."""
        ...

    @property
    def down_proj(self) -> Projection:
        """The projection back."""
        ...

    def of_own(self, x: Array, choice: Choice) -> Array:
        """Add up the results of the experts that are here, in float32."""
        ...

    def of_sorted(self, rows: Array, owner: Array, sizes: Array) -> Array:
        """Pass rows that are sorted by expert through it."""
        ...


def over_devices(
    module: SpreadExperts,
    x: Float[Array, "tokens hidden"],
    choice: Choice,
    sharding: ModelSharding,
    table: SlotTable | None = None,
) -> Float[Array, "tokens hidden"]:
    """Apply experts that lie on several devices.

    Args:
        module: All experts; their weights are those of slots, if there is a table.
        x: The tokens, those of one group behind those of the other.
        choice: Their experts and weights; experts beyond the last one are none.
        sharding: How the model lies on devices.
        table: Where experts lie; None: in their order.
    """
    way = sharding.experts
    if way is not None and way.backend is not None:
        return _exchange(module, x, choice, sharding, way, table)
    if way is not None and table is not None:
        choice = _slots_of(choice, table, way), choice[1]
    graph, state = nnx.split(module)
    specs = _specs(state, sharding)
    down = _spec_of(module.down_proj.kernel, sharding)
    by_expert, within = names_of(down[0]), names_of(down[1])
    crosses = sharding.groups > 1 and DATA_AXIS in by_expert
    others = tuple(name for name in (*by_expert, *within) if name != DATA_AXIS or not crosses)

    def own(state: nnx.State, x: Array, expert: Array, weight: Array) -> Array:
        if crosses:
            x, expert, weight = _gathered(x, expert, weight)
        here = nnx.merge(graph, state)
        bias = here.down_proj.bias
        if bias is not None and within:  # is added once, where the first part of an expert is
            is_first = lax.axis_index(within) == 0
            bias[...] = jnp.where(is_first, bias[...], 0)
        count = here.gate_proj.kernel.shape[0]
        local = expert - (lax.axis_index(by_expert) * count if by_expert else 0)
        local = jnp.where((local >= 0) & (local < count), local, count)
        total = here.of_own(x, (local, weight))
        if crosses:
            total = lax.psum_scatter(total, DATA_AXIS, scatter_dimension=0, tiled=True)
        return lax.psum(total, others) if others else total

    tokens = sharding.by_group
    shared = jax.shard_map(
        own,
        mesh=sharding.mesh,
        in_specs=(specs, tokens, tokens, tokens),
        out_specs=tokens,
        check_vma=False,
    )
    return shared(state, x, *choice)


def _gathered(x: Array, expert: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return the tokens of all groups, with their experts and weights, by one exchange."""
    word = jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")
    parts = x, expert.astype(jnp.int32), weight.astype(jnp.float32)
    own = [words_of(part, word) for part in parts]
    whole = lax.all_gather(jnp.concatenate(own, axis=1), DATA_AXIS, tiled=True)
    ends = np.cumsum([part.shape[1] for part in own])[:-1]
    x, expert, weight = (
        numbers_of(found, part.dtype)
        for found, part in zip(jnp.split(whole, ends, axis=1), parts, strict=True)
    )
    return x, expert, weight


def _slots_of(choice: Choice, table: SlotTable, way: ExpertSharding) -> Int[Array, "tokens top_k"]:
    """Choose copies; what asks for no expert asks for no slot."""
    expert = jnp.where(choice[0] < table.copies.shape[0], choice[0], -1)
    slots = choose_copies(
        table, expert, jnp.arange(len(expert)),
        slots_per_server=way.num_slots // way.servers, servers=way.servers,
    )  # fmt: skip
    return jnp.where(slots < 0, way.num_slots, slots)


def _exchange(
    module: SpreadExperts,
    x: Float[Array, "tokens hidden"],
    choice: Choice,
    sharding: ModelSharding,
    way: ExpertSharding,
    table: SlotTable | None,
) -> Float[Array, "tokens hidden"]:
    mesh = as_servers(sharding.mesh, sharding.expert_axes, way.servers)
    groups = sharding.groups
    each, size = len(x) // groups, mesh.size // groups
    pad = -each % size
    number = way.num_slots if table is None else table.copies.shape[0]

    def dealt(array: Array, rest: float) -> Array:
        """Give every device of a group each N-th token, so that padding falls to all alike."""
        own = array.reshape(groups, each, -1)
        own = jnp.pad(own, ((0, 0), (0, pad), (0, 0)), constant_values=rest)
        own = own.reshape(groups, -1, size, array.shape[1]).swapaxes(1, 2)
        return own.reshape(-1, array.shape[1])

    bring = moe_place if groups == 1 else moe_dispatch
    state = bring(
        dealt(x, 0),
        dealt(choice[0], number),
        dealt(choice[1], 0),
        mesh=mesh,
        num_experts=number,
        num_slots=way.num_slots,
        placement=table,
        dedup=way.dedup,
        backend=way.backend or "dense",
        quantum=QUANTUM,
    )
    graph, weights = nnx.split(module)
    over = PartitionSpec(("server", "gpu"))

    def apply(weights: nnx.State, rows: Array, sizes: Array) -> Array:
        ends = jnp.cumsum(sizes[0])
        owner = jnp.searchsorted(ends, jnp.arange(len(rows)), side="right")
        return nnx.merge(graph, weights).of_sorted(rows, owner.astype(jnp.int32), sizes[0])

    y = jax.shard_map(
        apply, mesh=mesh, in_specs=(over, over, over), out_specs=over, check_vma=False
    )(weights, state.rows, state.group_sizes)
    home = moe_combine(y, state)
    home = lax.with_sharding_constraint(home, NamedSharding(sharding.mesh, sharding.by_group))
    home = home.reshape(groups, size, -1, x.shape[1]).swapaxes(1, 2)
    return home.reshape(groups, -1, x.shape[1])[:, :each].reshape(x.shape)


def _specs(state: nnx.State, sharding: ModelSharding) -> nnx.State:
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(path, leaf.replace(_spec_of(leaf, sharding))) for path, leaf in flat]
    )


def _spec_of(leaf: nnx.Variable[Array], sharding: ModelSharding) -> PartitionSpec:
    return sharding.spec(leaf.get_metadata("axes"), leaf.get_value().shape)
