"""One of several processes that run an engine together; `test_hosts` starts them.

    python tests/engine/host_process.py MODEL RANK SIZE PORT SETTINGS PLAN

The first one prints what it generates as a line of JSON for each round of the plan.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

DEVICES = 2
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Generate, or follow."""
    model, rank, size, port, settings, plan = sys.argv[1:]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    logging.basicConfig(level="INFO", stream=sys.stderr)
    options = json.loads(settings) | {
        "nnodes": int(size), "node_rank": int(rank), "dist_init_addr": f"127.0.0.1:{port}",
        "compilation_cache_dir": str(ROOT / ".cache" / "hosts" / rank),
    }  # fmt: skip
    if int(rank) == 0:
        lead(model, options, json.loads(plan))
    else:
        from jaxserve.engine.follower import follow

        print("following", flush=True)
        follow(model, **({"warmup": "lazy"} | options))
        print("done", flush=True)


def lead(model: str, options: dict[str, Any], plan: dict[str, Any]) -> None:
    """Generate what the plan says."""
    from jaxserve import LLM, SamplingParams
    from jaxserve.core.errors import JaxserveError

    llm = LLM(model, **options)
    for number in range(plan["rounds"]):
        # Prompts whose tokens are scored are not taken from the prefix cache.
        scored = {"prompt_logprobs": 1} if number == 0 else {}
        start = time.monotonic()
        try:
            outputs = llm.generate(
                plan["prompts"], SamplingParams(**plan["sampling"], **scored), use_tqdm=False
            )
            said: dict[str, Any] = {
                "tokens": [output.outputs[0].token_ids for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                "errors": [output.outputs[0].finish_reason == "error" for output in outputs],
            }
        except JaxserveError as error:
            said = {"error": str(error)}
        print(json.dumps(said | {"seconds": time.monotonic() - start}), flush=True)
        if plan.get("waits"):
            sys.stdin.readline()
    llm.close()
    print("done", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    main()
    sys.stdout.flush()
    os._exit(0)
