"""The all-to-all itself, under `shard_map`: its schedule is data, so that one program serves all.

Rows of a pair of servers are numbered by the GPU that has them, then by the final GPU; rail r
carries the r-th of m equal parts. So every device knows from the counts alone which rows it sends
and where those go that it gets. Stages are planned on the device, from counts that all devices
have: they all take the same turns of the same loops.
"""

import itertools
import math
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.core.errors import ConfigError, did_you_mean

type Backend = Literal["auto", "dense", "rotation", "ppermute"]
BACKENDS: Final = get_args(Backend.__value__)

MAX_BANK_SERVERS: Final = 5
"""Most servers of `ppermute`, which compiles n! - 1 permutations: 119 for five, 719 for six."""
DIRECT_BYTES: Final = 1 << 20
"""Bytes of a GPU up to which `auto` sends at once."""


class Exchanged(NamedTuple):
    """What an all-to-all returns.

    Attributes:
        rows: `[N, N, capacity, ...]`: what each GPU got from each; zeros behind the counts.
        counts: `[N, N]`, int32: how many rows each GPU got from each.
        overflow: Whether a count was above the capacity; then rows are missing, and the counts say
            how many there are.
    """

    rows: jax.Array
    counts: jax.Array
    overflow: jax.Array


def flash_all_to_all(
    x: jax.Array,
    counts: jax.Array,
    *,
    mesh: Mesh,
    backend: Backend = "auto",
    quantum: int = 64,
) -> Exchanged:
    """Send rows from every GPU to every GPU.

    All backends return the same bits. `dense` sends all places at once, full or not. The others
    level rows between the GPUs of each server, send on all rails in one-to-one stages, and spread
    them at the receiver: `ppermute` in the stages that `plan_on_device` makes of the counts,
    `rotation` in n - 1 rotations. They send as many rows as there are, in whole quanta.

    Args:
        x: `[N, N, capacity, ...]`, of N GPUs: rows that each has for each. The first axis is
            sharded over `server` and `gpu`, as is that of the result.
        counts: `[N, N]`, whole numbers: how many of them count. All devices have it.
        mesh: With axes `server` and `gpu`, in this order, and no others.
        backend: How; `auto`: `dense` within one server and for few bytes, `ppermute` for up to
            five servers, else `rotation`.
        quantum: Rows of one message.

    Raises:
        ConfigError: If the mesh has other axes, a shape does not fit, the backend is unknown or
            cannot serve so many servers, or `quantum` is below 1.

    Source: FLASH, arXiv 2505.09764.
    Differs: What moves inside servers is gathered by all their GPUs, also by those that do not
        need it.
    """
    n, m = _check(x, counts, mesh, backend, quantum)
    if backend == "auto":
        few = n == 1 or x.size // len(x) * x.dtype.itemsize <= DIRECT_BYTES
        backend = "dense" if few else "ppermute" if n <= MAX_BANK_SERVERS else "rotation"
    capacity = x.shape[2]
    counts = counts.astype(jnp.int32)

    def exchange(own: jax.Array, counts: jax.Array) -> jax.Array:
        rows = own[0].reshape(n * m, capacity, -1)
        sent = jnp.minimum(counts, capacity)
        if backend == "dense" or n == 1:
            me = lax.axis_index(("server", "gpu"))
            got = lax.all_to_all(rows, ("server", "gpu"), 0, 0)
            got = _keep(got, sent[:, me])
        else:
            got = _exchange_staged(rows, sent.reshape(n, m, n, m), backend, quantum)
        return got.reshape(own.shape)

    over_gpus, everywhere = PartitionSpec(("server", "gpu")), PartitionSpec()
    rows = jax.shard_map(
        exchange, mesh=mesh, in_specs=(over_gpus, everywhere), out_specs=over_gpus, check_vma=False
    )(x, counts)
    return Exchanged(rows, counts.T, (counts > capacity).any())


def _check(
    x: jax.Array, counts: jax.Array, mesh: Mesh, backend: str, quantum: int
) -> tuple[int, int]:
    if mesh.axis_names != ("server", "gpu"):
        raise ConfigError(
            f"the mesh must have axes ('server', 'gpu'), got {mesh.axis_names}; make it of these."
        )
    n, m = mesh.devices.shape
    if counts.shape != (n * m, n * m) or x.shape[:2] != counts.shape or x.ndim < 3:
        raise ConfigError(
            f"x must be [{n * m}, {n * m}, capacity, ...] and counts [{n * m}, {n * m}] on {n} "
            f"servers of {m} GPUs, got {x.shape} and {counts.shape}; add what is missing as zeros."
        )
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}."
            + did_you_mean(backend, BACKENDS)
        )
    if backend == "ppermute" and n > MAX_BANK_SERVERS:
        raise ConfigError(
            f"backend='ppermute' serves at most {MAX_BANK_SERVERS} servers, got {n}; use "
            "'rotation'."
        )
    if quantum < 1:
        raise ConfigError(f"quantum must be at least 1 row, got {quantum}; leave it out.")
    return n, m


def _keep(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Return rows, `[pairs, places, width]`, with zeros behind the counts, `[pairs]`."""
    is_row = jnp.arange(rows.shape[1])[None, :] < counts[:, None]
    return jnp.where(is_row[:, :, None], rows, jnp.zeros((), rows.dtype))


def _exchange_staged(rows: jax.Array, counts: jax.Array, backend: str, quantum: int) -> jax.Array:
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

    carry = {"rotation": _send_rotations, "ppermute": _send_stages}[backend]
    got = carry(rail, parts, quantum)

    far = lax.all_gather(got, "gpu")  # [m, n, places, width]
    first = starts[:, server].reshape(n, m, m)[:, :, gpu]  # by server and GPU of the sender
    number = first[:, :, None] + jnp.arange(capacity)[None, None, :]
    part = jnp.maximum(parts[:, server], 1)[:, None, None]
    sender = jnp.arange(n)[:, None, None]
    passed = far[jnp.minimum(number // part, m - 1), sender, number % part]
    stayed = near[jnp.arange(m)[:, None], server * m + gpu, jnp.arange(capacity)[None, :]]
    passed = jnp.where((jnp.arange(n) == server)[:, None, None, None], stayed[None], passed)
    return _keep(passed.reshape(n * m, capacity, width), counts[:, :, server, gpu].reshape(-1))


def _permute(rows: jax.Array, perm: np.ndarray) -> jax.Array:
    """Send rows from each server to the one that a permutation names; no server to itself."""
    return lax.ppermute(rows, "server", [(i, int(j)) for i, j in enumerate(perm) if i != j])


def _send_quanta(
    out: jax.Array,
    rows: jax.Array,
    quantum: int,
    turns: jax.Array,
    to: jax.Array,
    origin: jax.Array,
    at: tuple[jax.Array, jax.Array],
    count: jax.Array,
    permute: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Send rows to one server and write those of another, quantum by quantum.

    Args:
        out: `[n, places + quantum, width]`.
        rows: The same shape.
        quantum: Rows of a message.
        turns: Messages, the same on all devices.
        to: Server that is sent to.
        origin: Server that is received from.
        at: First place of the rows that are sent, and of those that are received.
        count: How many are received.
        permute: What carries a message.
    """
    width = rows.shape[2]

    def turn(k: jax.Array, out: jax.Array) -> jax.Array:
        message = lax.dynamic_slice(rows, (to, at[0] + k * quantum, 0), (1, quantum, width))[0]
        got = permute(message)
        place = (origin, at[1] + k * quantum, 0)
        is_row = jnp.arange(quantum) < count - k * quantum
        kept = lax.dynamic_slice(out, place, (1, quantum, width))[0]
        new = jnp.where(is_row[:, None], got, kept)
        return lax.dynamic_update_slice(out, new[None], place)

    return lax.fori_loop(0, turns, turn, out)


def _send_rotations(rows: jax.Array, counts: jax.Array, quantum: int) -> jax.Array:
    """Send rows `[n, places, width]` by counts `[n, n]`, in n - 1 rotations."""
    n, places = rows.shape[:2]
    me, each = lax.axis_index("server"), np.arange(n)
    rows = jnp.pad(rows, ((0, 0), (0, quantum), (0, 0)))
    out, zero = jnp.zeros_like(rows), jnp.zeros((), jnp.int32)
    for r in range(1, n):
        perm = (each + r) % n
        to, origin = (me + r) % n, (me - r) % n
        turns = -(-counts[each, perm].max() // quantum)
        out = _send_quanta(
            out, rows, quantum, turns, to, origin, (zero, zero), counts[origin, me],
            lambda x, perm=perm: _permute(x, perm),
        )  # fmt: skip
    return out[:, :places]


def permutations(n: int) -> np.ndarray:
    """Return all permutations of n servers, `[n!, n]`, int32, the identity first."""
    return np.array(list(itertools.permutations(range(n))), np.int32)


def plan_on_device(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decompose a matrix of few servers by looking at all permutations for each stage.

    Args:
        counts: `[n, n]`, int32, not negative, with an empty diagonal; sums fit int32.

    Returns:
        The permutation of each stage, `[(n - 1)² + 1]`, by its place in `permutations`, and the
        rows that each server sends in it, `[(n - 1)² + 1, n]`. Stages at the end may be empty. Of
        all matchings each stage is one whose least entry is largest, as with `mode="bottleneck"`
        of `plan`.

    Source: ours.
    """
    n = counts.shape[0]
    table, each = jnp.asarray(permutations(n)), jnp.arange(n)

    def stage(
        state: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        stuffed, real = state
        least = stuffed[each[None, :], table].min(axis=1)
        best = jnp.argmax(least)
        perm, amount = table[best], least[best]
        sent = jnp.where(perm == each, 0, jnp.minimum(real[each, perm], amount))
        stuffed = stuffed.at[each, perm].add(-amount)
        return (stuffed, real.at[each, perm].add(-sent)), (best, sent)

    state = (_stuff(counts), counts)
    _, (stages, rows) = lax.scan(stage, state, None, length=(n - 1) ** 2 + 1)
    return stages, rows


def _stuff(counts: jax.Array) -> jax.Array:
    """Return a matrix that is nowhere less and whose rows and columns have one sum."""
    n = counts.shape[0]
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    largest = jnp.maximum(rows.max(), columns.max())
    rows, columns = largest - rows, largest - columns
    idle = jnp.minimum(rows, columns)
    rows, columns = rows - idle, columns - idle
    # The north-west corner rule: what two stretches of one line have in common.
    row_end, column_end = jnp.cumsum(rows), jnp.cumsum(columns)
    low = jnp.maximum((row_end - rows)[:, None], (column_end - columns)[None, :])
    more = jnp.maximum(jnp.minimum(row_end[:, None], column_end[None, :]) - low, 0)
    return counts + more + idle[:, None] * jnp.eye(n, dtype=counts.dtype)


def _send_stages(rows: jax.Array, counts: jax.Array, quantum: int) -> jax.Array:
    """Send rows `[n, places, width]` by counts `[n, n]`, in the stages of a plan."""
    n, places = rows.shape[:2]
    me, table = lax.axis_index("server"), permutations(n)
    inverse = jnp.asarray(np.argsort(table, axis=1).astype(np.int32))
    forward = jnp.asarray(table)
    stages, sends = plan_on_device(counts)
    number = len(sends)
    bank = [
        (lambda x: x) if k == 0 else (lambda x, perm=perm: _permute(x, perm))
        for k, perm in enumerate(table)
    ]
    rows = jnp.pad(rows, ((0, 0), (0, quantum), (0, 0)))
    start = jnp.zeros(n, jnp.int32)

    def go_on(state: tuple[jax.Array, ...]) -> jax.Array:
        stage = state[0]
        return (stage < number) & (sends[jnp.minimum(stage, number - 1)].sum() > 0)

    def send(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        stage, sent, received, out = state
        which = stages[stage]
        to, origin = forward[which, me], inverse[which, me]
        out_rows = sends[stage, me]
        in_rows = jnp.where(origin == me, 0, sends[stage, origin])
        out = _send_quanta(
            out, rows, quantum, -(-sends[stage].max() // quantum), to, origin,
            (sent[to], received[origin]), in_rows,
            lambda x: lax.switch(which, bank, x),
        )  # fmt: skip
        return stage + 1, sent.at[to].add(out_rows), received.at[origin].add(in_rows), out

    state = (jnp.zeros((), jnp.int32), start, start, jnp.zeros_like(rows))
    return lax.while_loop(go_on, send, state)[3][:, :places]


def num_permutes(backend: Backend, n: int) -> int:
    """Return how many permutations a backend compiles for n servers."""
    return {"rotation": n - 1, "ppermute": math.factorial(n) - 1}.get(backend, 0)
