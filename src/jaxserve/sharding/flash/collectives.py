"""The all-to-all itself, under `shard_map`: its schedule is data, so that one program serves all.

Rows of a pair of servers are numbered by the GPU that has them, then by the final GPU; rail r
carries the r-th of m equal parts. So every device knows from the counts alone which rows it sends
and where those go that it gets. Stages are planned on the device, from counts that all devices
have: they all take the same turns of the same loops.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.sharding.flash.errors import CountsError, RowsError, TrafficError
from jaxserve.sharding.flash.stages import Stages
from jaxserve.sharding.flash.transport import Backend, Wire, carry, check_mesh, settle, stages_for

OVER_GPUS = PartitionSpec(("server", "gpu"))
"""How arrays are sharded whose first axis is one of GPUs."""
EVERYWHERE = PartitionSpec()


class Exchanged(NamedTuple):
    """What an all-to-all returns.

    Attributes:
        rows: `[N, N, capacity, ...]`: what each GPU got from each; zeros behind the counts.
        counts: `[N, N]`, int32: how many rows each GPU got from each.
        overflow: Whether a count was above the capacity; then rows are missing, and the counts say
            how many there are.
        agreed: Whether all devices had the same counts, none of them negative; looked at with
            `debug` only, else true.
    """

    rows: jax.Array
    counts: jax.Array
    overflow: jax.Array
    agreed: jax.Array

    def check(self) -> "Exchanged":
        """Return the same once its flags are looked at, which waits for the device.

        Raises:
            CountsError: If devices disagreed on counts.
            RowsError: If rows are missing.
        """
        if not self.agreed:
            raise CountsError(
                "devices disagree on the counts, or counts are negative; rows went by the largest "
                "of each. Gather counts from all devices, or sum them up, before they are used."
            )
        if self.overflow:
            capacity = self.rows.shape[2]
            raise RowsError(
                f"{int(self.counts.max())} rows of one pair of GPUs exceed the capacity of "
                f"{capacity}, and some were left out; repeat the exchange with more places."
            )
        return self


def flash_all_to_all(
    x: jax.Array,
    counts: jax.Array,
    *,
    mesh: Mesh,
    backend: Backend = "auto",
    quantum: int = 64,
    in_flight: int = 1,
    stages: Stages | None = None,
    debug: bool = False,
) -> Exchanged:
    """Send rows from every GPU to every GPU.

    All backends return the same bits. `dense` sends all places at once, full or not. The others
    level rows between the GPUs of each server, send on all rails in one-to-one stages, and spread
    them at the receiver: `ppermute` in the stages that `plan_on_device` makes of the counts,
    `rotation` in n - 1 rotations, `ragged` in either, by operations that know how many rows there
    are. They send as many rows as there are, in whole quanta.

    Args:
        x: `[N, N, capacity, ...]`, of N GPUs: rows that each has for each. The first axis is
            sharded over `server` and `gpu`, as is that of the result.
        counts: `[N, N]`, whole numbers: how many of them count. All devices have it.
        mesh: With axes `server` and `gpu`, in this order, and no others.
        backend: How; `auto`: `dense` within one server and for few bytes, `ppermute` for up to
            five servers, else `rotation`, or `ragged` to follow given stages.
        quantum: Rows of one message.
        in_flight: Messages under way at a time.
        stages: A plan made elsewhere, as by `stages_of`. If it was made for other counts, rotations
            carry what it leaves. None: stages are planned here.
        debug: Compare the counts of all devices, which costs two small collectives, and go by the
            largest, so that devices that disagree do not wait for each other forever.

    Raises:
        MeshError: If the mesh has other axes, or a server spans hosts.
        TrafficError: If a shape does not fit.
        ConfigError: If the backend is unknown or cannot serve, or another number is impossible.

    Source: FLASH, arXiv 2505.09764.
    Differs: What moves inside servers is gathered by all their GPUs, also by those that do not
        need it.
    """
    wire = Wire(backend=backend, quantum=quantum, in_flight=in_flight)
    n, m = check_mesh(mesh)
    _check(x, counts, n, m)
    wire = settle(wire, mesh, x.size // len(x) * x.dtype.itemsize, stages)
    capacity = x.shape[2]

    def exchange(
        own: jax.Array, counts: jax.Array, stages: Stages | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        agreed = jnp.ones((), bool)
        if debug:
            axes = ("server", "gpu")
            least, counts = lax.pmin(counts, axes), lax.pmax(counts, axes)
            agreed = ((least == counts) & (least >= 0)).all()
            counts = jnp.maximum(counts, 0)
        rows = own[0].reshape(n * m, capacity, -1)
        sent = jnp.minimum(counts, capacity)
        if wire.backend == "dense" or n == 1:
            me = lax.axis_index(("server", "gpu"))
            got = lax.all_to_all(rows, ("server", "gpu"), 0, 0)
            got = _keep(got, sent[:, me])
        else:
            got = _exchange_staged(rows, sent.reshape(n, m, n, m), wire, stages)
        return got.reshape(own.shape), counts, agreed

    rows, counts, agreed = jax.shard_map(
        exchange,
        mesh=mesh,
        in_specs=(OVER_GPUS, EVERYWHERE, EVERYWHERE),
        out_specs=(OVER_GPUS, EVERYWHERE, EVERYWHERE),
        check_vma=False,
    )(x, counts.astype(jnp.int32), stages)
    return Exchanged(rows, counts.T, (counts > capacity).any(), agreed)


def _check(x: jax.Array, counts: jax.Array, n: int, m: int) -> None:
    if counts.shape != (n * m, n * m) or x.shape[:2] != counts.shape or x.ndim < 3:
        raise TrafficError(
            f"x must be [{n * m}, {n * m}, capacity, ...] and counts [{n * m}, {n * m}] on {n} "
            f"servers of {m} GPUs, got {x.shape} and {counts.shape}; add what is missing as zeros."
        )
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TrafficError(f"counts must be whole numbers, got dtype {counts.dtype}; count rows.")
    if isinstance(counts, np.ndarray) and counts.size and counts.min() < 0:
        place = tuple(int(i) for i in np.argwhere(counts < 0)[0])
        raise TrafficError(
            f"numbers of rows must be 0 or more, got {counts[place]} at {place}; count what is "
            "sent."
        )


def _keep(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Return rows, `[pairs, places, width]`, with zeros behind the counts, `[pairs]`."""
    is_row = jnp.arange(rows.shape[1])[None, :] < counts[:, None]
    return jnp.where(is_row[:, :, None], rows, jnp.zeros((), rows.dtype))


def _exchange_staged(
    rows: jax.Array, counts: jax.Array, wire: Wire, planned: Stages | None
) -> jax.Array:
    """Level, send in stages, and spread: rows `[N, capacity, width]`, counts `[n, m, n, m]`."""
    n, m = counts.shape[:2]
    capacity, width = rows.shape[1:]
    server, gpu = lax.axis_index("server"), lax.axis_index("gpu")
    # The first number of each pair of GPUs among the rows of their servers, and how many those are.
    blocks = counts.transpose(0, 2, 1, 3).reshape(n, n, m * m)
    ends = jnp.cumsum(blocks, axis=2)
    starts, totals = ends - blocks, ends[:, :, -1]
    totals = totals * (1 - jnp.eye(n, dtype=totals.dtype))
    parts = -(-totals // m)

    near = lax.all_gather(rows, "gpu")  # [m, N, capacity, width]
    # What this rail carries to each server: the rows of its part, by number.
    places = m * capacity
    number = gpu * parts[server][:, None] + jnp.arange(places)[None, :]
    block = jax.vmap(lambda end, at: jnp.searchsorted(end, at, side="right"))(ends[server], number)
    block = jnp.minimum(block, m * m - 1)
    index = number - jnp.take_along_axis(starts[server], block, axis=1)
    final = jnp.arange(n)[:, None] * m + block % m
    rail = near[block // m, final, jnp.clip(index, 0, capacity - 1)]

    got = carry(rail, wire, stages_for(wire, parts, planned))

    far = lax.all_gather(got, "gpu")  # [m, n, places, width]
    first = starts[:, server].reshape(n, m, m)[:, :, gpu]  # by server and GPU of the sender
    number = first[:, :, None] + jnp.arange(capacity)[None, None, :]
    part = jnp.maximum(parts[:, server], 1)[:, None, None]
    sender = jnp.arange(n)[:, None, None]
    passed = far[jnp.minimum(number // part, m - 1), sender, number % part]
    stayed = near[jnp.arange(m)[:, None], server * m + gpu, jnp.arange(capacity)[None, :]]
    passed = jnp.where((jnp.arange(n) == server)[:, None, None, None], stayed[None], passed)
    return _keep(passed.reshape(n * m, capacity, width), counts[:, :, server, gpu].reshape(-1))
