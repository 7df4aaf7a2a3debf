"""One GPU of `namespaces.Cluster` that sends by JAX, over gloo: a process with one device.

What is timed is the exchange between servers, on each rail, of rows that are level already. So each
way has the best case of its balance: places are as many as the largest part has rows, which a
compiled program would have to know.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from benchmarks.rooms.flash.namespaces import address, settle

WIDTH: Final = 256  # float32: rows of 1 KiB
_PORT: Final = 5301


class Exchanges:
    """Compiled exchanges of one matrix, by name."""

    def __init__(self, servers: int, gpus: int, job: dict[str, Any]) -> None:
        """Compile them, and make rows that say where they are from."""
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        self._mesh = Mesh(np.array(jax.devices()).reshape(servers, gpus), ("server", "gpu"))
        self._over = NamedSharding(self._mesh, PartitionSpec(("server", "gpu")))
        self._parts = np.array(job["parts"], np.int32)  # rows of pairs of servers on a rail
        self._pairs = np.array(job["pairs"], np.int32)  # rows of pairs of GPUs
        self._servers, self._gpus = servers, gpus
        self._arguments: dict[str, Any] = {}
        self._calls: dict[str, Callable[..., Any]] = {}
        for name, options in job["ways"].items():
            self._compile(name, options)

    def _rows(self, count: int, places: int) -> Any:  # noqa: ANN401  an array of JAX
        import jax
        import numpy as np

        me, size = jax.process_index(), self._servers * self._gpus
        own = np.empty((1, count, places, WIDTH), np.float32)
        own[0] = me * 1e6 + np.arange(count)[:, None, None] * 1e4 + np.arange(places)[:, None]
        return jax.make_array_from_single_device_arrays(
            (size, count, places, WIDTH),
            self._over,
            [jax.device_put(own, jax.local_devices()[0])],
        )

    def _compile(self, name: str, options: dict[str, Any]) -> None:
        import jax
        from jax import lax
        from jax.sharding import PartitionSpec

        from jaxserve.sharding.flash.transport import Wire, carry, stages_for

        is_flat = options.pop("flat", False)
        if is_flat:
            x = self._rows(self._servers * self._gpus, int(self._pairs.max()))
        else:
            x = self._rows(self._servers, int(self._parts.max()))
        parts = self._parts

        def exchange(own: jax.Array, counts: jax.Array) -> jax.Array:
            if is_flat:
                return lax.all_to_all(own[0], ("server", "gpu"), 0, 0)[None]
            wire = Wire(**options)
            return carry(own[0], wire, stages_for(wire, counts, None))[None]

        spec = PartitionSpec(("server", "gpu"))
        call = jax.jit(
            jax.shard_map(
                exchange, mesh=self._mesh, in_specs=(spec, PartitionSpec()), out_specs=spec,
                check_vma=False,
            )
        )  # fmt: skip
        self._arguments[name] = (x, parts)
        self._calls[name] = call.lower(x, parts).compile()

    def run(self, name: str) -> Any:  # noqa: ANN401  an array of JAX
        """Exchange, and wait for the end."""
        import jax

        return jax.block_until_ready(self._calls[name](*self._arguments[name]))

    def is_right(self, out: Any) -> bool:  # noqa: ANN401  an array of JAX
        """Compare with what others have sent."""
        import jax
        import numpy as np

        me, found = jax.process_index(), np.asarray(out.addressable_shards[0].data)[0]
        server, gpu = divmod(me, self._gpus)
        is_flat = len(found) == self._servers * self._gpus
        for other in range(len(found)):
            source, place = (other, me) if is_flat else (other * self._gpus + gpu, server)
            count = self._pairs[other, me] if is_flat else self._parts[other, server]
            if not is_flat and other == server:
                continue
            wanted = source * 1e6 + place * 1e4 + np.arange(count)
            if not np.array_equal(found[other, :count, 0], wanted.astype(np.float32)):
                return False
        return True


def main() -> None:
    """Answer commands until they end."""
    gpu, servers, gpus, mbit = int(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4])
    settle(gpu, gpus, mbit)
    socket.sethostname(address(gpu))  # gloo looks its own address up by it
    print("ready", flush=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("XLA_FLAGS", None)  # one device each
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    found: Exchanges | None = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "connect":
            jax.distributed.initialize(f"{address(0)}:{_PORT}", servers * gpus, gpu)
            print("connected", jax.device_count(), flush=True)
        elif word == "matrix":
            found = Exchanges(servers, gpus, json.loads(rest))
            print("prepared", flush=True)
        elif word == "check":
            assert found is not None
            print("checked", found.is_right(found.run(rest)), flush=True)
        elif word == "go":
            assert found is not None
            name, _, start = rest.rpartition(" ")
            time.sleep(max(0.0, float(start) - time.monotonic()))
            found.run(name)
            print("done", time.monotonic(), flush=True)


if __name__ == "__main__":
    main()
