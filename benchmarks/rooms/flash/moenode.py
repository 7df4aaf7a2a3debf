"""One server of GPUs that computes a model whose experts are spread over all of them.

In `namespaces.Cluster` a process is a server, whose devices share its link; alone, one process is
all servers, and nothing bounds what goes between them.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.rooms.flash.namespaces import address, settle

_PORT: Final = 5401


class Worker:
    """Compiles forward passes of one model over a mesh, and runs them."""

    def __init__(self, servers: int, gpus: int, job: dict[str, Any]) -> None:
        """Draw prompts, and look at what the model as it is makes of them."""
        import jax
        import jax.numpy as jnp
        from flax import nnx
        from jax.sharding import NamedSharding

        from benchmarks.rooms.flash import expert_parallel as model
        from jaxserve.sharding.flash.transport import make_mesh

        self._model = model
        self.mesh = make_mesh(gpus)
        assert self.mesh.devices.shape == (servers, gpus)
        ids = model.prompts(
            servers * gpus, job["sequences"], job["length"], job["skew"], job["seed"]
        )
        self.num_tokens = ids.size
        self.chosen = model.choices(ids)
        self.placed = model.placements(self.chosen, servers, gpus)
        graph, state = nnx.split(model.build())
        plain = jax.jit(model.forward, static_argnums=0)
        self._wanted = np.asarray(plain(graph, state, jnp.asarray(ids)))
        over = NamedSharding(self.mesh, model.OVER)
        self._ids = jax.make_array_from_callback(ids.shape, over, lambda index: ids[index])
        self._calls: dict[str, tuple[Callable[..., Any], Any]] = {}

    def facts(self) -> dict[str, Any]:
        """Return how uneven the work of GPUs is, and how many rows cross between servers."""
        servers, experts = self.mesh.devices.shape[0], self._model.EXPERTS
        plain, placed = [], []
        for one, placement in zip(self.chosen, self.placed, strict=True):
            loads = np.bincount(one.reshape(-1), minlength=experts).astype(float)
            per_gpu = loads.reshape(self.mesh.size, -1).sum(axis=1)
            plain.append(per_gpu.max() / per_gpu.mean())
            placed.append(placement.imbalance(loads))
        rows = {
            f"{'dedup' if dedup else 'all'}{' eplb' if is_placed else ''}": sum(
                self._model.wire_rows(
                    one, servers, dedup=dedup, placed=placement if is_placed else None
                )
                for one, placement in zip(self.chosen, self.placed, strict=True)
            )
            for dedup in (False, True)
            for is_placed in (False, True)
        }
        return {
            "tokens": self.num_tokens,
            "imbalance": round(float(np.mean(plain)), 3),
            "imbalance_eplb": round(float(np.mean(placed)), 3),
            "wire_rows": rows,
        }

    def prepare(self, name: str, options: dict[str, Any]) -> None:
        """Compile a forward pass."""
        import jax

        placed = self.placed if options.pop("eplb") else None
        graph, state = self._model.spread(self.mesh, placed, options)
        call = jax.jit(self._model.forward, static_argnums=0)
        self._calls[name] = (call.lower(graph, state, self._ids).compile(), state)

    def run(self, name: str) -> Any:  # noqa: ANN401  an array of JAX
        """Compute, and wait for the end."""
        import jax

        call, state = self._calls[name]
        return jax.block_until_ready(call(state, self._ids))

    def error(self, name: str) -> float:
        """Return the largest difference to the model as it is, over the largest of its numbers."""
        found = self.run(name).addressable_shards
        worst = max(float(np.abs(np.asarray(s.data) - self._wanted[s.index]).max()) for s in found)
        return worst / float(np.abs(self._wanted).max())


def answer(servers: int, gpus: int) -> None:
    """Answer commands until they end."""
    worker: Worker | None = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "job":
            worker = Worker(servers, gpus, json.loads(rest))
            print("facts", json.dumps(worker.facts()), flush=True)
        elif worker is None:
            raise RuntimeError(f"{word} came before a job.")
        elif word == "prepare":
            options = json.loads(rest)
            name = options.pop("name")
            worker.prepare(name, options)
            print("prepared", worker.error(name), flush=True)
        elif word == "go":
            name, _, start = rest.rpartition(" ")
            time.sleep(max(0.0, float(start) - time.monotonic()))
            worker.run(name)
            print("done", time.monotonic(), flush=True)


def main() -> None:
    """Set up the surroundings; arguments are those of `Cluster`, and the devices of a process."""
    server, servers, _, mbit = int(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4])
    gpus = int(os.environ["FLASH_GPUS"])
    is_alone = servers == 1
    devices = gpus * (int(os.environ["FLASH_SERVERS"]) if is_alone else 1)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if not is_alone:
        settle(server, 1, mbit)
        socket.sethostname(address(server))
        print("ready", flush=True)
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"{address(0)}:{_PORT}", servers, server)
    answer(int(os.environ["FLASH_SERVERS"]), gpus)


if __name__ == "__main__":
    main()
