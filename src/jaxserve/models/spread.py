"""Experts on several devices: each device works on what it has of them.

Every device sees all tokens, because attention is repeated in every group, so nothing has to be
sent to an expert. What is left is to bring results together, in one of two ways:

* a sum over all devices, of one row per token from each, whatever the router chose;
* an exchange: a device owns every N-th token. Results of its tokens come to it from the servers
  that have some, and then all devices get all sums. Padding asks for no expert and is not sent.
"""

from typing import Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.sharding.experts import SlotTable, as_servers
from jaxserve.sharding.flash.copies import choose_copies
from jaxserve.sharding.flash.moe import moe_combine, moe_place
from jaxserve.sharding.rules import ExpertSharding, ModelSharding, names_of

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
        x: The tokens.
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
    everywhere = PartitionSpec()

    def own(state: nnx.State, x: Array, expert: Array, weight: Array) -> Array:
        here = nnx.merge(graph, state)
        bias = here.down_proj.bias
        if bias is not None and within:  # is added once, where the first part of an expert is
            is_first = lax.axis_index(within) == 0
            bias[...] = jnp.where(is_first, bias[...], 0)
        count = here.gate_proj.kernel.shape[0]
        local = expert - (lax.axis_index(by_expert) * count if by_expert else 0)
        local = jnp.where((local >= 0) & (local < count), local, count)
        total = here.of_own(x, (local, weight))
        return lax.psum(total, (*by_expert, *within)) if by_expert or within else total

    shared = jax.shard_map(
        own,
        mesh=sharding.mesh,
        in_specs=(specs, everywhere, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    return shared(state, x, *choice)


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
    tokens, size = len(x), mesh.size
    pad = -tokens % size
    number = way.num_slots if table is None else table.copies.shape[0]

    def dealt(array: Array, rest: float) -> Array:
        """Give every device each N-th token, so that padding at the end falls to all alike."""
        whole = jnp.pad(array, ((0, pad), (0, 0)), constant_values=rest)
        return whole.reshape(-1, size, array.shape[1]).swapaxes(0, 1).reshape(whole.shape)

    state = moe_place(
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
    home = lax.with_sharding_constraint(home, NamedSharding(sharding.mesh, PartitionSpec()))
    return home.reshape(size, -1, x.shape[1]).swapaxes(0, 1).reshape(-1, x.shape[1])[:tokens]


def _specs(state: nnx.State, sharding: ModelSharding) -> nnx.State:
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(path, leaf.replace(_spec_of(leaf, sharding))) for path, leaf in flat]
    )


def _spec_of(leaf: nnx.Variable[Array], sharding: ModelSharding) -> PartitionSpec:
    return sharding.spec(leaf.get_metadata("axes"), leaf.get_value().shape)
