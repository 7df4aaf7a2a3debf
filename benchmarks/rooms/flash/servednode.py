"""One server of GPUs of a jaxserve engine that runs on all of them; see `served`.

Process 0 turns the engines and answers; the others make the launches that it announces. Engines of
all ways live side by side, so that their runs can be interleaved.
"""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.rooms.flash.namespaces import address, settle

_PORT: Final = 5402


def sent_bytes() -> int:
    """Return what this server has sent over its link so far."""
    for line in Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "nic":
            return int(numbers.split()[8])
    raise RuntimeError("this process has no link named nic.")


class Engines:
    """Engines of one process, by way."""

    def __init__(self, rank: int, servers: int) -> None:
        """Start none yet."""
        self._rank, self._servers = rank, servers
        self._made: dict[str, Any] = {}

    def prepare(self, name: str, model: str, settings: dict[str, Any]) -> None:
        """Build the engine of one way; the first process also compiles what its prompts need."""
        from jaxserve.core.clock import WallClock
        from jaxserve.core.config import EngineConfig
        from jaxserve.engine.follower import follow_calls
        from jaxserve.engine.setup import assemble

        config = EngineConfig.from_settings(
            settings
            | {
                "nnodes": self._servers,
                "node_rank": self._rank,
                "dist_init_addr": f"{address(0)}:{_PORT}",
            }
        )
        made = self._made[name] = assemble(model, config, clock=WallClock())
        if self._rank:
            assert made.channel is not None
            threading.Thread(
                target=follow_calls, args=(made.engine.runner, made.channel), daemon=True
            ).start()

    def serve(self, name: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Serve prompts that come at once; for the first process."""
        import jax

        from jaxserve.core.event import TokenEvent
        from jaxserve.core.request import Request, RequestId, SamplingParams

        engine = self._made[name].engine
        tokens: list[list[int]] = [[] for _ in prompts]
        firsts: list[float] = []

        def submit(index: int, prompt: list[int]) -> None:
            def sink(event: TokenEvent) -> None:
                if event.error:
                    raise RuntimeError(event.error)
                if event.token_ids and not tokens[index]:
                    firsts.append(time.perf_counter())
                tokens[index].extend(event.token_ids)

            request = Request(
                request_id=RequestId(f"{start}-{index}"),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(
                    max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
                ),
                arrival=start,
            )
            engine.submit(request, sink)

        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            submit(index, prompt)
        while engine.has_work:
            engine.step()
        end = time.perf_counter()
        # Experts may still be on their way, and engines must not send at the same time.
        jax.block_until_ready(engine.runner._params)  # noqa: SLF001
        return {
            "seconds": end - start, "first": max(firsts) - start, "tokens": tokens,
            "imbalance": engine.metrics.imbalance, "moved": engine.metrics.num_moved_experts,
        }  # fmt: skip


def main() -> None:
    """Answer commands until they end; arguments are those of `Cluster`."""
    server, servers, _, mbit = int(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={os.environ['FLASH_GPUS']}"
    settle(server, 1, mbit)
    socket.sethostname(address(server))  # gloo listens where this leads to
    print("ready", flush=True)
    engines = Engines(server, servers)
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "prepare":
            engines.prepare(job["name"], job["model"], job["settings"])
            print("prepared", flush=True)
        elif job["do"] == "bytes":
            print("sent", sent_bytes(), flush=True)
        elif server == 0:
            found = engines.serve(job["name"], job["prompts"], job["max_tokens"])
            print("served", json.dumps(found), flush=True)
        else:
            print("served {}", flush=True)


if __name__ == "__main__":
    main()
