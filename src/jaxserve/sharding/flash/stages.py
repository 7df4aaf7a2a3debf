"""Stages as arrays: made on the device, made on the host, or rotations, and what is left of them.

In a stage each server sends to the one that a permutation names. All ways of sending take the same
two arrays, so a compiled program serves every schedule.
"""

import functools
import itertools
import math
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.schedule import Schedule, plan

MAX_BANK_SERVERS: Final = 5
"""Most servers of a bank of all permutations, n! - 1 of which are compiled: 119 for five."""


class Stages(NamedTuple):
    """A schedule.

    Attributes:
        perms: `[stages, n]`, int32: where each server sends; itself, to idle.
        rows: `[stages, n]`, int32: how many rows each sends on each rail.
    """

    perms: jax.Array
    rows: jax.Array

    def transposed(self) -> "Stages":
        """Return the way back: who received sends to whom it received from, as many rows."""
        back = jnp.argsort(self.perms, axis=1).astype(jnp.int32)
        return Stages(back, jnp.take_along_axis(self.rows, back, axis=1))


def permutations(n: int) -> np.ndarray:
    """Return all permutations of n servers, `[n!, n]`, int32, in order; the identity is first."""
    return np.array(list(itertools.permutations(range(n))), np.int32)


def rotations(n: int) -> np.ndarray:
    """Return the rotations of n servers, `[n, n]`, int32: by none, by one, and so on."""
    return ((np.arange(n)[None, :] + np.arange(n)[:, None]) % n).astype(np.int32)


def rank_of(perms: jax.Array) -> jax.Array:
    """Return the place of each permutation, `[stages, n]`, in `permutations`."""
    n = perms.shape[1]
    later = np.triu(np.ones((n, n), bool), 1)
    smaller = ((perms[:, None, :] < perms[:, :, None]) & later[None]).sum(axis=2)
    weight = np.array([math.factorial(n - 1 - i) for i in range(n)], np.int32)
    return (smaller * weight[None, :]).sum(axis=1).astype(jnp.int32)


def rotate(counts: jax.Array) -> Stages:
    """Return the n - 1 rotations that carry counts, `[n, n]`; the diagonal stays."""
    n = counts.shape[0]
    perms = jnp.asarray(rotations(n)[1:])
    return Stages(perms, counts[jnp.arange(n)[None, :], perms].astype(jnp.int32))


def plan_on_device(counts: jax.Array) -> Stages:
    """Decompose a matrix of few servers by looking at all permutations for each stage.

    Args:
        counts: `[n, n]`, int32, not negative, with an empty diagonal; sums fit int32.

    Returns:
        (n - 1)² + 1 stages, of which those at the end may be empty. Of all matchings each stage is
        one whose least entry is largest, as with `mode="bottleneck"` of `plan`.

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
        return (stuffed, real.at[each, perm].add(-sent)), (perm, sent)

    state = (_stuff(counts), counts)
    _, (perms, rows) = lax.scan(stage, state, None, length=(n - 1) ** 2 + 1)
    return Stages(perms, rows)


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


def stages_of(schedule: Schedule, most: int | None = None) -> Stages:
    """Return a schedule of the host as arrays that a compiled program takes.

    Args:
        schedule: What `plan` returned, for counts of rows.
        most: Stages of the arrays, so that several schedules have one shape; what is beyond is left
            out, and sent behind the others. None: as many as there are.
    """
    n, number = schedule.num_servers, schedule.num_stages if most is None else most
    perms = np.tile(np.arange(n, dtype=np.int32), (number, 1))
    rows = np.zeros((number, n), np.int32)
    perms[: schedule.num_stages] = schedule.perms[:number]
    rows[: schedule.num_stages] = -(-schedule.rows[:number] // schedule.gpus)
    return Stages(jnp.asarray(perms), jnp.asarray(rows))


def plan_on_host(counts: jax.Array, *, gpus: int, cost: CostModel, most: int) -> Stages:
    """Plan within a compiled program by asking the host, for any number of servers.

    The device waits for the answer. Counts of earlier steps, given to `plan` beforehand, need no
    waiting, and `follow` makes up for what has changed.

    Args:
        counts: `[n, n]`, int32: rows of pairs of servers, over all rails.
        gpus: GPUs of a server.
        cost: Links, for rows.
        most: Stages at most, the same for all counts.
    """
    n = counts.shape[0]
    if most < 1:
        raise ConfigError(f"most must be at least 1 stage, got {most}; n² - 2n + 2 are enough.")

    def ask(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = plan(np.asarray(counts, np.int64), cost, "auto")
        perms = np.tile(np.arange(n, dtype=np.int32), (most, 1))
        rows = np.zeros((most, n), np.int32)
        perms[: found.num_stages] = found.perms[:most]
        rows[: found.num_stages] = -(-found.rows[:most] // gpus)
        return perms, rows

    shape = jax.ShapeDtypeStruct((most, n), jnp.int32)
    return Stages(*jax.pure_callback(ask, (shape, shape), counts))


def follow(planned: Stages, counts: jax.Array) -> Stages:
    """Make a plan fit counts that it was perhaps not made for.

    Args:
        planned: Stages, of these counts or of others that are like them.
        counts: `[n, n]`, int32: rows of each rail.

    Returns:
        The same stages with no more rows than there are, and rotations for what they leave.
    """
    each = jnp.arange(counts.shape[0])
    counts = counts * (1 - jnp.eye(len(each), dtype=counts.dtype))

    def stage(left: jax.Array, wanted: Stages) -> tuple[jax.Array, jax.Array]:
        rows = jnp.minimum(left[each, wanted.perms], wanted.rows)
        return left.at[each, wanted.perms].add(-rows), rows

    left, rows = lax.scan(stage, counts.astype(jnp.int32), planned)
    rest = rotate(left)
    return Stages(
        jnp.concatenate([planned.perms.astype(jnp.int32), rest.perms]),
        jnp.concatenate([rows, rest.rows]),
    )


@functools.cache
def num_permutes(backend: str, n: int) -> int:
    """Return how many permutations a backend compiles for n servers, for one message in flight."""
    return {"rotation": n - 1, "ppermute": math.factorial(n) - 1}.get(backend, 0)
