"""What carries rows between servers, on one rail: under `shard_map`, over the axis `server`.

Four ways that end with the same bits. All but `dense` follow stages, which are data. There is no
barrier between stages: a message waits for those before it on its own device only, and up to
`in_flight` of them are under way at a time.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxserve.core.errors import ConfigError, did_you_mean
from jaxserve.sharding.flash.errors import MeshError
from jaxserve.sharding.flash.stages import (
    MAX_BANK_SERVERS,
    Stages,
    follow,
    permutations,
    plan_on_device,
    rank_of,
    rotate,
    rotations,
)

type Backend = Literal["auto", "dense", "rotation", "ppermute", "ragged"]
BACKENDS: Final = get_args(Backend.__value__)
DIRECT_BYTES: Final = 1 << 20
"""Bytes of a GPU up to which `auto` sends at once."""
MAX_IN_FLIGHT: Final = 4
"""Most messages under way; each further one compiles every permutation once more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """How rows cross between servers.

    Attributes:
        backend: `dense` sends all places at once, full or not. `rotation` sends in n - 1 rotations,
            `ppermute` in the stages of a plan, through a bank of all permutations. `ragged` takes
            one operation per stage, for any permutation, on devices that have it.
        quantum: Rows of one message; `ragged` sends a stage as one.
        in_flight: Messages under way at a time.

    Raises:
        ConfigError: If one of them is impossible.
    """

    backend: Backend = "auto"
    quantum: int = 64
    in_flight: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}."
                + did_you_mean(self.backend, BACKENDS)
            )
        if self.quantum < 1:
            raise ConfigError(f"quantum must be at least 1 row, got {self.quantum}; leave it out.")
        if not 1 <= self.in_flight <= MAX_IN_FLIGHT:
            raise ConfigError(
                f"in_flight must be 1 to {MAX_IN_FLIGHT} messages, got {self.in_flight}; leave it "
                "out for 1."
            )


class Device(Protocol):
    """What is asked of a device of JAX."""

    @property
    def id(self) -> int:
        """Its number."""
        ...

    @property
    def process_index(self) -> int:
        """The process that it belongs to."""
        ...


def host_of(device: Device) -> int:
    """Return which host has a device; devices that fast links join count as on one."""
    # Processes may have a GPU each; slices are what fast links join, where JAX knows them. Of CPUs
    # it says that all are of one.
    if getattr(device, "platform", None) == "cpu":
        return device.process_index
    return getattr(device, "slice_index", device.process_index)


def make_mesh(gpus: int | None = None, *, devices: Sequence[Device] | None = None) -> Mesh:
    """Build a mesh of servers of GPUs, none of which spans hosts.

    Args:
        gpus: GPUs of a server; None: as many as a host has.
        devices: Which; None: all.

    Raises:
        MeshError: If hosts have other numbers of devices than whole servers.
    """
    found = sorted(devices or jax.devices(), key=lambda device: (host_of(device), device.id))
    sizes = Counter(map(host_of, found))
    gpus = min(sizes.values()) if gpus is None else gpus
    if gpus < 1 or any(size % gpus for size in sizes.values()):
        raise MeshError(
            f"every host must have a multiple of gpus={gpus} devices, got {dict(sizes)} by host; "
            "leave devices out, or take a divisor."
        )
    return Mesh(np.array(found).reshape(-1, gpus), ("server", "gpu"))


def check_mesh(mesh: Mesh) -> tuple[int, int]:
    """Return servers, and GPUs of each.

    Raises:
        MeshError: If axes are others, or the GPUs of a server are on several hosts.
    """
    if mesh.axis_names != ("server", "gpu"):
        raise MeshError(
            f"the mesh must have axes ('server', 'gpu'), got {mesh.axis_names}; make it of these."
        )
    check_hosts(mesh.devices)
    n, m = mesh.devices.shape
    return n, m


def check_hosts(devices: np.ndarray) -> None:
    """Refuse devices, `[servers, gpus]`, of which a row is not on one host.

    Raises:
        MeshError: If a row spans hosts.
    """
    for server, row in enumerate(devices):
        hosts = {host_of(device) for device in row}
        if len(hosts) > 1:
            raise MeshError(
                f"the GPUs of a server must be on one host, got hosts {sorted(hosts)} for server "
                f"{server}; order devices by host before reshaping them to [servers, gpus], and "
                "take as many GPUs per server as a host has, or a divisor of that."
            )


def settle(wire: Wire, mesh: Mesh, size: int, stages: Stages | None) -> Wire:
    """Choose the backend, and refuse one that cannot serve.

    Args:
        wire: What was asked for.
        mesh: The devices.
        size: Bytes that a GPU may send.
        stages: A plan, if there is one.

    Raises:
        ConfigError: If there are too many servers for the backend, or devices without it, or if it
            cannot follow the plan.
    """
    n = mesh.devices.shape[0]
    backend, platform = wire.backend, mesh.devices.flat[0].platform
    if backend == "auto":
        few = stages is None and size <= DIRECT_BYTES
        if n == 1 or few:
            backend = "dense"
        elif n <= MAX_BANK_SERVERS:
            backend = "ppermute"
        else:
            backend = "ragged" if stages is not None else "rotation"
    if backend == "ppermute" and n > MAX_BANK_SERVERS:
        raise ConfigError(
            f"backend='ppermute' serves at most {MAX_BANK_SERVERS} servers, got {n}; use "
            "'rotation', or 'ragged' on GPUs."
        )
    if backend == "ragged" and platform == "cpu":
        raise ConfigError(
            "backend='ragged' needs devices for which XLA has a ragged all-to-all, and CPUs are "
            f"none; use 'rotation'{', or ' + repr('ppermute') if n <= MAX_BANK_SERVERS else ''}."
        )
    if stages is not None and backend in ("dense", "rotation") and n > 1:
        raise ConfigError(
            f"backend={backend!r} has stages of its own, and was given others; use 'ppermute' for "
            f"up to {MAX_BANK_SERVERS} servers or 'ragged', or leave the stages out."
        )
    return Wire(backend=backend, quantum=wire.quantum, in_flight=wire.in_flight)


def stages_for(wire: Wire, counts: jax.Array, planned: Stages | None) -> Stages | None:
    """Return the stages for counts, `[n, n]`, int32, of each rail; None if the backend has none."""
    n = counts.shape[0]
    if wire.backend == "dense" or n == 1:
        return None
    counts = counts * (1 - jnp.eye(n, dtype=counts.dtype))
    if planned is not None:
        return follow(planned, counts)
    is_small = wire.backend == "ppermute" or (wire.backend == "ragged" and n <= MAX_BANK_SERVERS)
    return plan_on_device(counts) if is_small else rotate(counts)


def carry(rows: jax.Array, wire: Wire, stages: Stages | None) -> jax.Array:
    """Send rows between the servers of a rail.

    Args:
        rows: `[n, places, width]`, by server of destination.
        wire: How; not `auto`.
        stages: What `stages_for` returned.

    Returns:
        `[n, places, width]`, by server that they came from. Behind the counts anything may stand;
        a server's own rows stay.
    """
    me = lax.axis_index("server")
    if rows.shape[0] == 1:
        return rows
    if stages is None:
        return lax.all_to_all(rows, "server", 0, 0)
    got = _send_ragged(rows, stages) if wire.backend == "ragged" else _send(rows, wire, stages)
    return got.at[me].set(rows[me])


class _Own:
    """The stages of this server: to whom, from whom, how many rows, from which place on."""

    def __init__(self, stages: Stages) -> None:
        me, n = lax.axis_index("server"), stages.perms.shape[1]
        inverse = jnp.argsort(stages.perms, axis=1).astype(jnp.int32)
        self.to, self.origin = stages.perms[:, me], inverse[:, me]
        self.sent = jnp.where(self.to == me, 0, stages.rows[:, me])
        got = jnp.take_along_axis(stages.rows, self.origin[:, None], axis=1)[:, 0]
        self.got = jnp.where(self.origin == me, 0, got)
        self.sent_from = _before(self.to, self.sent, n)
        self.got_from = _before(self.origin, self.got, n)


def _before(server: jax.Array, rows: jax.Array, n: int) -> jax.Array:
    """Return the rows of the same server in stages before, `[stages]`."""
    each = jnp.where(server[:, None] == jnp.arange(n)[None, :], rows[:, None], 0)
    return jnp.take_along_axis(jnp.cumsum(each, axis=0) - each, server[:, None], axis=1)[:, 0]


def _bank(table: np.ndarray) -> list[Callable[[jax.Array], jax.Array]]:
    """Return what carries a message by each permutation of a table, of which the first is none."""

    def permute(rows: jax.Array, perm: np.ndarray) -> jax.Array:
        return lax.ppermute(rows, "server", [(i, int(j)) for i, j in enumerate(perm) if i != j])

    return [lambda x: x, *((lambda x, perm=perm: permute(x, perm)) for perm in table[1:])]


def _send(rows: jax.Array, wire: Wire, stages: Stages) -> jax.Array:
    """Send in messages of a quantum, one behind the other whatever stages they are of."""
    (n, places, width), quantum = rows.shape, wire.quantum
    own = _Own(stages)
    if wire.backend == "ppermute":
        bank, which = _bank(permutations(n)), rank_of(stages.perms)
    else:
        bank, which = _bank(rotations(n)), stages.perms[:, 0]
    turns = -(-stages.rows.max(axis=1) // quantum)
    ends = jnp.cumsum(turns)
    rows = jnp.pad(rows, ((0, 0), (0, quantum), (0, 0)))

    def turn(t: jax.Array, out: jax.Array) -> jax.Array:
        arrived: list[tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, int]]] = []
        for k in range(wire.in_flight):
            number = t * wire.in_flight + k
            at = jnp.searchsorted(ends, number, side="right")
            is_on, at = at < len(turns), jnp.minimum(at, len(turns) - 1)
            first = (number - ends[at] + turns[at]) * quantum
            place = (own.to[at], own.sent_from[at] + first, 0)
            message = lax.dynamic_slice(rows, place, (1, quantum, width))[0]
            got = lax.switch(jnp.where(is_on, which[at], 0), bank, message)
            count = jnp.where(is_on, own.got[at] - first, 0)
            arrived.append((got, count, (own.origin[at], own.got_from[at] + first, 0)))
        for got, count, place in arrived:
            is_row = jnp.arange(quantum) < count
            kept = lax.dynamic_slice(out, place, (1, quantum, width))[0]
            new = jnp.where(is_row[:, None], got, kept)
            out = lax.dynamic_update_slice(out, new[None], place)
        return out

    loops = -(-ends[-1] // wire.in_flight)
    return lax.fori_loop(0, loops, turn, jnp.zeros_like(rows))[:, :places]


def _send_ragged(rows: jax.Array, stages: Stages) -> jax.Array:
    """Send each stage by one operation, whose sizes are those of its one pair."""
    n, places, width = rows.shape
    own, each = _Own(stages), jnp.arange(n, dtype=jnp.int32)
    me = lax.axis_index("server")
    flat = rows.reshape(n * places, width)

    def send(k: jax.Array, out: jax.Array) -> jax.Array:
        is_to = each == own.to[k]
        # Rows of a pair stand in the same order at both ends: one number is the place at each.
        return lax.ragged_all_to_all(
            flat,
            out,
            each * places + jnp.where(is_to, own.sent_from[k], 0),
            jnp.where(is_to, own.sent[k], 0),
            jnp.where(is_to, me * places + own.sent_from[k], 0),
            jnp.where(each == own.origin[k], own.got[k], 0),
            axis_name="server",
        )

    used = (jnp.arange(len(stages.rows)) + 1) * (stages.rows.max(axis=1) > 0)
    return lax.fori_loop(0, used.max(), send, jnp.zeros_like(flat)).reshape(rows.shape)
