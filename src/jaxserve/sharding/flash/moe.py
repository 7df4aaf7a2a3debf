"""Tokens to their experts and back: one copy per token and server, sums on the way home.

Rows of a pair of servers are numbered by the GPU that has them; rail r carries the r-th of m equal
parts. At the receiver every GPU of the server gets all rows, which is the multicast, and takes
those that its experts are asked for. On the way back each GPU weighs and adds what its experts made
of a row, the GPUs of a server add their sums, and one row per token and server goes home, by the
same stages transposed: nothing is planned or counted twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.experts import SlotTable
from jaxserve.sharding.flash.collectives import EVERYWHERE, OVER_GPUS
from jaxserve.sharding.flash.copies import choose_copies
from jaxserve.sharding.flash.errors import RowsError
from jaxserve.sharding.flash.stages import Stages
from jaxserve.sharding.flash.transport import Backend, Wire, carry, check_mesh, settle, stages_for

type _Sent = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, Stages | None
]
"""The arrays of a `DispatchState`, in its order."""


class Places(NamedTuple):
    """Static sizes.

    Attributes:
        slots: Slots of a GPU: experts, copies included.
        wire: Rows of a rail between two servers at most.
        rows: Rows for the experts of one GPU at most.
        copies: Rows per token that may go to one server: 1, or as many as a token has experts.
    """

    slots: int
    wire: int
    rows: int
    copies: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchState:
    """Tokens at their experts, and the way back. N GPUs, each with `P` places for rows.

    Attributes:
        rows: `[N * P, hidden]`: rows of each GPU, sorted by slot; zeros behind the last.
        group_sizes: `[N, slots]`, int32: how many rows each slot has.
        overflow: Whether rows were left out, for want of places. Results are then wrong, and the
            caller has to take another way, such as a dispatch with `capacity_factor=None`.
        wire_rows: `[n, n]`, int32: rows between servers, over all rails.
        place: `[N * landed, top_k]`: where each row that arrived is among `rows`.
        weight: `[N * landed, top_k]`, float32: what its results are multiplied with.
        number: `[N * units, n]`: of each row that was sent, its number at each server; -1 if none.
        stages: What it was sent by; None if all went at once.
        places: Sizes.
        mesh: The devices.
        wire: How rows cross between servers.
    """

    rows: jax.Array
    group_sizes: jax.Array
    overflow: jax.Array
    wire_rows: jax.Array
    place: jax.Array
    weight: jax.Array
    number: jax.Array
    stages: Stages | None
    places: Places = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})
    wire: Wire = field(metadata={"static": True})

    def check(self) -> "DispatchState":
        """Return the same once its flag is looked at, which waits for the device.

        Raises:
            RowsError: If rows were left out.
        """
        if self.overflow:
            raise RowsError(
                f"tokens need more than the {self.places.wire} places of a rail or the "
                f"{self.places.rows} of a GPU, and some were left out; raise capacity_factor, or "
                "set it to None for room that always suffices."
            )
        return self


def moe_dispatch(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    *,
    mesh: Mesh,
    num_experts: int,
    num_slots: int | None = None,
    placement: SlotTable | None = None,
    capacity_factor: float | None = None,
    dedup: bool = True,
    backend: Backend = "auto",
    quantum: int = 64,
    in_flight: int = 1,
    stages: Stages | None = None,
) -> DispatchState:
    """Send tokens to the GPUs of their experts.

    Args:
        x: `[tokens, hidden]`, the first axis sharded over `server` and `gpu`, as are the next two.
        experts: `[tokens, top_k]`, int32: different experts of each token; -1 for none.
        weights: `[tokens, top_k]`: what their results will be multiplied with.
        mesh: With axes `server` and `gpu`, in this order, and no others.
        num_experts: Experts.
        num_slots: Experts of all GPUs together, copies included; None: one of each.
        placement: Where experts lie; None: in their order.
        capacity_factor: Room for so many times the rows that evenly chosen experts would give,
            between servers and for experts; None: for the most that can be.
        dedup: Send a token once to a server, whatever number of its experts is there.
        backend: As for `flash_all_to_all`.
        quantum: Rows of one message at most.
        in_flight: Messages under way at a time.
        stages: A plan made elsewhere; None: stages are planned here.

    Returns:
        The rows that each GPU's experts are asked for, and what `moe_combine` needs.

    Raises:
        MeshError: If the mesh has other axes, or a server spans hosts.
        ConfigError: If shapes do not fit, numbers do not divide, or the backend cannot serve.

    Source: FLASH, arXiv 2505.09764, for the stages; one copy per server is as in DeepSeek-V3's
        dispatch (arXiv 2412.19437, section 3.2.2).
    """
    n, m = check_mesh(mesh)
    num_slots = num_experts if num_slots is None else num_slots
    _check(x, experts, weights, n * m, (num_experts, num_slots), placement, capacity_factor)
    tokens, top_k = experts.shape[0] // (n * m), experts.shape[1]
    places = size_places(
        tokens, top_k, (n, m), num_slots // (n * m), dedup=dedup, factor=capacity_factor
    )
    wire = Wire(backend=backend, quantum=min(quantum, places.wire), in_flight=in_flight)
    wire = settle(wire, mesh, n * places.wire * x.shape[1] * x.dtype.itemsize, stages)

    def dispatch(
        x: jax.Array, experts: jax.Array, weights: jax.Array, planned: Stages | None,
        table: SlotTable | None,
    ) -> _Sent:  # fmt: skip
        first = lax.axis_index(("server", "gpu")) * tokens
        experts = jnp.where((experts < 0) | (experts >= num_experts), -1, experts)
        if table is not None:
            experts = choose_copies(
                table, experts, first + jnp.arange(tokens),
                slots_per_server=places.slots * m, servers=n,
            )  # fmt: skip
        slots = experts.astype(jnp.int32)
        return _dispatch(x, slots, weights, places, wire, planned, fits=capacity_factor is None)

    out: _Sent = jax.shard_map(
        dispatch,
        mesh=mesh,
        in_specs=(OVER_GPUS, OVER_GPUS, OVER_GPUS, EVERYWHERE, EVERYWHERE),
        out_specs=(*(OVER_GPUS,) * 2, *(EVERYWHERE,) * 2, *(OVER_GPUS,) * 3, EVERYWHERE),
        check_vma=False,
    )(x, experts, weights, stages, placement)
    return DispatchState(*out, places=places, mesh=mesh, wire=wire)


def moe_place(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    *,
    mesh: Mesh,
    num_experts: int,
    num_slots: int | None = None,
    placement: SlotTable | None = None,
    dedup: bool = True,
    backend: Backend = "auto",
    quantum: int = 64,
) -> DispatchState:
    """Give experts their rows of tokens that all GPUs have: nothing is sent, nothing overflows.

    What `moe_dispatch` would bring to each GPU is there already; only results have to travel, which
    `moe_combine` sends to the GPU that a token belongs to.

    Args:
        x: `[tokens, hidden]`, the same on all GPUs. The first part of them belongs to the first
            GPU, and so on.
        experts: `[tokens, top_k]`, int32: different experts of each token; -1 for none.
        weights: `[tokens, top_k]`: what their results will be multiplied with.
        mesh: With axes `server` and `gpu`, in this order, and no others.
        num_experts: Experts.
        num_slots: Experts of all GPUs together, copies included; None: one of each.
        placement: Where experts lie; None: in their order.
        dedup: Bring one row of a token back from a server, and not one per expert.
        backend: As for `flash_all_to_all`, for the way back.
        quantum: Rows of one message at most.

    Raises:
        MeshError: If the mesh has other axes, or a server spans hosts.
        ConfigError: If shapes do not fit, numbers do not divide, or the backend cannot serve.

    Source: ours.
    """
    n, m = check_mesh(mesh)
    num_slots = num_experts if num_slots is None else num_slots
    _check(x, experts, weights, n * m, (num_experts, num_slots), placement, None)
    tokens, top_k = experts.shape[0] // (n * m), experts.shape[1]
    places = size_places(tokens, top_k, (n, m), num_slots // (n * m), dedup=dedup, factor=None)
    wire = Wire(backend=backend, quantum=min(quantum, places.wire))
    wire = settle(wire, mesh, n * places.wire * x.shape[1] * x.dtype.itemsize, None)

    def put(x: jax.Array, experts: jax.Array, weights: jax.Array, table: SlotTable | None) -> _Sent:
        experts = jnp.where((experts < 0) | (experts >= num_experts), -1, experts)
        if table is not None:
            experts = choose_copies(
                table, experts, jnp.arange(len(x)), slots_per_server=places.slots * m, servers=n
            )
        return _place(x, experts.astype(jnp.int32), weights, places, wire)

    out: _Sent = jax.shard_map(
        put,
        mesh=mesh,
        in_specs=(EVERYWHERE,) * 4,
        out_specs=(*(OVER_GPUS,) * 2, *(EVERYWHERE,) * 2, *(OVER_GPUS,) * 3, EVERYWHERE),
        check_vma=False,
    )(x, experts, weights, placement)
    return DispatchState(*out, places=places, mesh=mesh, wire=wire)


def size_places(
    tokens: int,
    top_k: int,
    shape: tuple[int, int],
    slots: int,
    *,
    dedup: bool,
    factor: float | None,
) -> Places:
    """Choose static sizes.

    Args:
        tokens: Tokens of a GPU.
        top_k: Experts of a token.
        shape: Servers, and GPUs of each.
        slots: Slots of a GPU.
        dedup: Whether a token goes once to a server.
        factor: Room over the mean of evenly chosen experts; None for the most that can be.

    >>> size_places(100, 2, (4, 2), 8, dedup=True, factor=1.0)
    Places(slots=8, wire=44, rows=200, copies=1)
    """
    n, m = shape
    copies = 1 if dedup else top_k
    most_wire, most_rows = tokens * copies, tokens * n * m * min(top_k, slots)
    if factor is None:
        return Places(slots, most_wire, most_rows, copies)
    share = 1 - (1 - 1 / n) ** top_k if dedup else top_k / n
    wire = min(most_wire, math.ceil(factor * tokens * share))
    return Places(slots, wire, min(most_rows, math.ceil(factor * tokens * top_k)), copies)


def _check(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    num_gpus: int,
    sizes: tuple[int, int],
    placement: SlotTable | None,
    factor: float | None,
) -> None:
    num_experts, num_slots = sizes
    if x.ndim != 2 or experts.ndim != 2 or not len(x) == len(experts) == len(weights):
        raise ConfigError(
            "x must be [tokens, hidden], experts and weights [tokens, top_k], got "
            f"{x.shape}, {experts.shape} and {weights.shape}."
        )
    if weights.shape != experts.shape or len(x) % num_gpus or not len(x):
        raise ConfigError(
            f"tokens must be a multiple of {num_gpus} GPUs, with as many weights as experts, got "
            f"{experts.shape} and {weights.shape}; fill up with experts of -1."
        )
    if num_slots % num_gpus or num_slots < num_experts or num_experts < 1:
        raise ConfigError(
            f"num_slots must be a multiple of {num_gpus} GPUs and at least "
            f"num_experts={num_experts}, got {num_slots}; add copies of experts."
        )
    if placement is None and num_slots != num_experts:
        raise ConfigError(
            f"{num_slots} slots for {num_experts} experts need a placement; make one by "
            "jaxserve.sharding.eplb.place, and give slot_table of it."
        )
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ConfigError(
            f"capacity_factor must be finite and above 0, got {factor}; None leaves room for all."
        )


def words_of(array: jax.Array, word: DTypeLike) -> jax.Array:
    """Return bits of `[rows, width]` as words that are no longer than its numbers."""
    return lax.bitcast_convert_type(array, word).reshape(len(array), -1)


def numbers_of(words: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return what `words_of` was given."""
    per = jnp.dtype(dtype).itemsize // words.dtype.itemsize
    shape = (len(words), -1) if per == 1 else (len(words), words.shape[1] // per, per)
    return lax.bitcast_convert_type(words.reshape(shape), dtype)


def _dispatch(
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    places: Places,
    wire: Wire,
    planned: Stages | None,
    *,
    fits: bool,
) -> _Sent:
    """Send from and to one device; what always fits need not be asked of all devices."""
    n, m = lax.axis_size("server"), lax.axis_size("gpu")
    server, gpu = lax.axis_index("server"), lax.axis_index("gpu")
    top_k = slots.shape[1] // places.copies
    slots, weights = slots.reshape(-1, top_k), weights.astype(jnp.float32).reshape(-1, top_k)
    units = len(slots)
    # Which rows this server has for each other, in the order of its GPUs and their tokens.
    home = jnp.where(slots < 0, -1, slots // (places.slots * m))
    visits = lax.all_gather((home[:, :, None] == jnp.arange(n)).any(axis=1), "gpu", tiled=True)
    rank = jnp.cumsum(visits, axis=0, dtype=jnp.int32) - visits
    counts = lax.all_gather(visits.sum(axis=0, dtype=jnp.int32), "server")
    parts = -(-counts // m)
    order = jnp.argsort(~visits, axis=0, stable=True).T  # [n, m * units]
    word = jnp.dtype(f"uint{8 * min(4, x.dtype.itemsize)}")
    own = jnp.concatenate([words_of(slots, word), words_of(weights, word)], axis=1)
    near, notes = (lax.all_gather(part, "gpu", tiled=True) for part in (words_of(x, word), own))

    at = jnp.arange(places.wire)
    number = gpu * parts[server][:, None] + at[None, :]
    unit = jnp.take_along_axis(order, jnp.minimum(number, m * units - 1), axis=1)
    rail = jnp.concatenate([near[unit // places.copies], notes[unit]], axis=2)
    stages = stages_for(wire, jnp.minimum(parts, places.wire), planned)
    got = carry(rail, wire, stages)
    landed = lax.all_gather(got, "gpu").reshape(m * n * places.wire, -1)

    number = jnp.arange(m)[:, None, None] * parts[:, server][:, None] + at
    is_row = (at < parts[:, server][:, None]) & (number < counts[:, server][:, None])
    tail = (landed.shape[1] - near.shape[1]) // 2
    arrived = numbers_of(landed[:, : near.shape[1]], x.dtype)
    asked = numbers_of(landed[:, near.shape[1] : near.shape[1] + tail], jnp.int32)
    weight = numbers_of(landed[:, near.shape[1] + tail :], jnp.float32)
    found = _sort(lambda chosen: arrived[chosen], is_row.reshape(-1), asked, weight, places)
    overflow = jnp.zeros((), bool)
    if not fits:
        is_full = lax.pmax(found.is_full.astype(jnp.int32), ("server", "gpu")) > 0
        overflow = is_full | (parts > places.wire).any()
    mine = lax.dynamic_slice_in_dim(jnp.where(visits, rank, -1), gpu * units, units)
    return (
        found.rows, found.sizes[None], overflow, counts,
        found.place, found.weight, mine, stages,
    )  # fmt: skip


def _place(x: jax.Array, slots: jax.Array, weights: jax.Array, places: Places, wire: Wire) -> _Sent:
    """Find what `_dispatch` would bring to a device among the tokens of all, which are here."""
    n, m = lax.axis_size("server"), lax.axis_size("gpu")
    server, gpu = lax.axis_index("server"), lax.axis_index("gpu")
    top_k = slots.shape[1] // places.copies
    slots, weights = slots.reshape(-1, top_k), weights.astype(jnp.float32).reshape(-1, top_k)
    each = len(slots) // n  # units of a server
    home = jnp.where(slots < 0, -1, slots // (places.slots * m)).reshape(n, each, top_k)
    visits = (home[..., None] == jnp.arange(n)).any(axis=2)
    rank = jnp.cumsum(visits, axis=1, dtype=jnp.int32) - visits
    counts = visits.sum(axis=1, dtype=jnp.int32)
    parts = -(-counts // m)
    order = jnp.argsort(~visits[:, :, server], axis=1, stable=True)  # [n, each]
    at = jnp.arange(places.wire)
    number = jnp.arange(m)[:, None, None] * parts[:, server][:, None] + at
    is_row = (at < parts[:, server][:, None]) & (number < counts[:, server][:, None])
    unit = jnp.take_along_axis(order[None], jnp.minimum(number, each - 1), axis=2)
    unit = (unit + jnp.arange(n)[:, None] * each).reshape(-1)
    found = _sort(
        lambda chosen: x[unit[chosen] // places.copies], is_row.reshape(-1), slots[unit],
        weights[unit], places,
    )  # fmt: skip
    mine = jnp.where(visits, rank, -1)[server]
    mine = lax.dynamic_slice_in_dim(mine, gpu * (each // m), each // m)
    stages = stages_for(wire, parts, None)
    return (
        found.rows, found.sizes[None], jnp.zeros((), bool), counts, found.place, found.weight, mine,
        stages,
    )  # fmt: skip


class _Sorted(NamedTuple):
    """Rows that are here, sorted by slot, and where each went."""

    rows: jax.Array
    sizes: jax.Array
    place: jax.Array
    weight: jax.Array
    is_full: jax.Array


def _sort(
    take: Callable[[jax.Array], jax.Array],
    is_row: jax.Array,
    asked: jax.Array,
    weight: jax.Array,
    places: Places,
) -> _Sorted:
    """Take the rows that the slots of this device are asked for.

    Args:
        take: Returns rows `[places, hidden]` by their numbers among those that are here.
        is_row: `[here]`: which of these count.
        asked: `[here, top_k]`, int32: slots that each asks for.
        weight: `[here, top_k]`: what their results will be multiplied with.
        places: Sizes.
    """
    server, gpu, top_k = lax.axis_index("server"), lax.axis_index("gpu"), asked.shape[1]
    local = asked - (server * lax.axis_size("gpu") + gpu) * places.slots
    is_mine = is_row[:, None] & (local >= 0) & (local < places.slots)
    owner = jnp.where(is_mine, local, places.slots).reshape(-1)
    ranks = jnp.argsort(owner, stable=True)
    sizes = jnp.zeros(places.slots, jnp.int32).at[owner].add(1, mode="drop")
    ends = jnp.minimum(jnp.cumsum(sizes), places.rows)
    chosen = ranks[: places.rows] // top_k
    rows = take(chosen)
    is_used = jnp.arange(len(chosen)) < ends[-1]
    rows = jnp.where(is_used[:, None], rows, jnp.zeros((), rows.dtype))
    rows = jnp.pad(rows, ((0, places.rows - len(rows)), (0, 0)))
    place = jnp.zeros_like(ranks).at[ranks].set(jnp.arange(len(ranks), dtype=ranks.dtype))
    place = jnp.where(is_mine, jnp.minimum(place.reshape(is_mine.shape), places.rows), places.rows)
    return _Sorted(
        rows, jnp.diff(ends, prepend=0), place.astype(jnp.int32), jnp.where(is_mine, weight, 0.0),
        sizes.sum() > places.rows,
    )  # fmt: skip


def moe_combine(y: jax.Array, state: DispatchState) -> jax.Array:
    """Bring results home, weighted and added up.

    Sums are in float32: of a GPU's experts in the order of a token's choices, of the GPUs of a
    server, and of servers in their order, so that every backend returns the same bits. Between
    servers rows have the dtype of `y`.

    Args:
        y: `[N * P, width]`: what became of `state.rows`.
        state: What the dispatch returned.

    Returns:
        `[tokens, width]`, in the dtype of `y`; zeros for tokens without experts.

    Raises:
        ConfigError: If there is not one result for each place.
    """
    if y.ndim != 2 or len(y) != len(state.rows):
        raise ConfigError(
            f"y must be [{len(state.rows)}, width], one result for each of state.rows, got "
            f"{y.shape}; keep the places behind the last row."
        )
    places, wire = state.places, state.wire

    def combine(
        y: jax.Array, place: jax.Array, weight: jax.Array, number: jax.Array, counts: jax.Array,
        stages: Stages | None,
    ) -> jax.Array:  # fmt: skip
        n, m = lax.axis_size("server"), lax.axis_size("gpu")
        server, width = lax.axis_index("server"), y.shape[1]
        y = jnp.pad(y, ((0, 1), (0, 0)))
        sums = jnp.zeros((len(place), width), jnp.float32)
        for choice in range(place.shape[1]):
            sums += y[place[:, choice]].astype(jnp.float32) * weight[:, choice, None]
        sums = sums.reshape(m, n, places.wire, width)
        own = lax.psum_scatter(sums, "gpu", scatter_dimension=0).astype(y.dtype)
        got = carry(own, wire, None if stages is None else stages.transposed())
        far = lax.all_gather(got, "gpu")  # [m, n, places, width]
        parts = jnp.maximum(-(-counts[server] // m), 1)
        home = jnp.zeros((len(number), width), jnp.float32)
        for other in range(n):
            rail, at = number[:, other] // parts[other], number[:, other] % parts[other]
            is_back = (number[:, other] >= 0) & (at < places.wire)
            piece = far[jnp.clip(rail, 0, m - 1), other, jnp.minimum(at, places.wire - 1)]
            home += jnp.where(is_back[:, None], piece.astype(jnp.float32), 0.0)
        home = home.reshape(-1, places.copies, width)
        total = home[:, 0]
        for copy in range(1, places.copies):
            total += home[:, copy]
        return total.astype(y.dtype)

    return jax.shard_map(
        combine,
        mesh=state.mesh,
        in_specs=(*(OVER_GPUS,) * 4, EVERYWHERE, EVERYWHERE),
        out_specs=OVER_GPUS,
        check_vma=False,
    )(y, state.place, state.weight, state.number, state.wire_rows, state.stages)
