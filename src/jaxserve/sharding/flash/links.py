"""Measures the links between the devices at hand, for the cost model."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxserve.core.errors import ConfigError
from jaxserve.sharding.flash.calibration import Burst, fit_cost
from jaxserve.sharding.flash.collectives import OVER_GPUS
from jaxserve.sharding.flash.cost import CostModel
from jaxserve.sharding.flash.transport import check_mesh

SIZES: Final = (1 << 14, 1 << 24)
"""Bytes of a small and of a large message."""
_WORD: Final = 4
_CHAIN: Final = 4
"""Messages of one timed program, each of which waits for the one before."""


def calibrate(
    mesh: Mesh,
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """Measure fixed times, rates and incast between the devices of a mesh.

    Chains of messages are timed: to the next GPU of a server, to the next server, and from all
    other servers to the first one, at once and in turn. Start-up of a program is timed alone, and
    taken off.

    Args:
        mesh: With axes `server` and `gpu`, in this order, and no others; in a cluster every process
            calls this alike.
        sizes: Bytes of a message, at least two.
        repeats: Runs of each program, of which the median counts.
        clock: Tells seconds.

    Returns:
        The links, per byte. An axis of one device, which has none, gets the numbers of the other
        axis; of a server with three others or more, incast is that of all of them.

    Raises:
        MeshError: If the mesh has other axes, or a server spans hosts.
        ConfigError: If there is one device only, or measurements do not suffice.
    """
    n, m = check_mesh(mesh)
    if n * m == 1:
        raise ConfigError("links are between devices, got 1 device; give a mesh of two or more.")
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {repeats}; leave it out for 9.")
    timed = _Timed(mesh, repeats, clock)
    inside = timed.messages("gpu", sizes) if m > 1 else []
    across = timed.messages("server", sizes) if n > 1 else []
    bursts = [timed.burst(max(sizes))] if n > 2 else []
    return fit_cost(m, inside or across, across or inside, bursts)


class _Timed:
    """Times programs on one mesh."""

    def __init__(self, mesh: Mesh, repeats: int, clock: Callable[[], float]) -> None:
        self._mesh, self._repeats, self._clock = mesh, repeats, clock
        self._start_up = self._median(lambda x: x, 1)

    def _median(self, body: Callable[[jax.Array], jax.Array], size: int) -> float:
        """Return the seconds of a program whose devices have so many bytes each."""
        count = max(1, size // _WORD)
        over = NamedSharding(self._mesh, OVER_GPUS)

        def call(x: jax.Array) -> jax.Array:
            return jax.shard_map(
                body, mesh=self._mesh, in_specs=OVER_GPUS, out_specs=OVER_GPUS, check_vma=False
            )(x)

        x = jax.jit(lambda: jnp.ones(count * self._mesh.size, jnp.float32), out_shardings=over)()
        run = jax.jit(call)
        jax.block_until_ready(run(x))
        times: list[float] = []
        for _ in range(self._repeats):
            start = self._clock()
            jax.block_until_ready(run(x))
            times.append(self._clock() - start)
        return statistics.median(times)

    def _take_off(self, seconds: float) -> float:
        # What is left must be above 0, and is at least a share of what was timed.
        return max(seconds - self._start_up, seconds / 10)

    def messages(self, axis: str, sizes: Sequence[int]) -> list[tuple[float, float]]:
        """Time a message to the next device of an axis, all devices sending."""
        length = self._mesh.shape[axis]
        ring = [(i, (i + 1) % length) for i in range(length)]

        def chain(x: jax.Array) -> jax.Array:
            for _ in range(_CHAIN):
                x = lax.ppermute(x, axis, ring)
            return x

        return [(size, self._take_off(self._median(chain, size)) / _CHAIN) for size in sizes]

    def burst(self, size: int) -> Burst:
        """Time messages of all other servers to the first, at once and in turn."""
        senders = self._mesh.shape["server"] - 1

        def at_once(x: jax.Array) -> jax.Array:
            parts = [lax.ppermute(x, "server", [(i + 1, 0)]) for i in range(senders)]
            return x + sum(parts)

        def in_turn(x: jax.Array) -> jax.Array:
            for i in range(senders):
                # Zeros that the compiler does not know to be some: each waits for the one before.
                x += 0 * lax.ppermute(x, "server", [(i + 1, 0)])
            return x

        return Burst(
            senders,
            self._take_off(self._median(at_once, size)),
            self._take_off(self._median(in_turn, size)),
        )
