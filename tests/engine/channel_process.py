"""One of two processes that talk and part; `test_hosts` starts them.

    python tests/engine/channel_process.py RANK PORT TIMEOUT

The first one announces and then waits; the second one listens and is gone without a word.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

NUMBER = 300
LARGE = np.arange(800_000, dtype=np.int32)


def main() -> None:
    """Talk, then lose or be lost."""
    from jaxserve.core.errors import EngineDeadError
    from jaxserve.core.parallel import ParallelOptions
    from jaxserve.engine.hosts import join
    from jaxserve.engine.message import Message

    rank, port, timeout = (int(word) for word in sys.argv[1:])
    hosts = join(
        ParallelOptions(
            nnodes=2, node_rank=rank, dist_init_addr=f"127.0.0.1:{port}", host_timeout=timeout
        )
    )
    channel = hosts.open_channel()
    if rank == 1:
        for number in range(NUMBER):
            message = channel.receive()
            assert message.values == {"number": number}
            np.testing.assert_array_equal(message.arrays["array"], np.full(100, number))
        np.testing.assert_array_equal(channel.receive().arrays["large"], LARGE)
        channel.meet("end", 60)
        print("received", flush=True)
        os._exit(3)
    for number in range(NUMBER):
        array = np.full(100, number)
        channel.send(Message(name="count", values={"number": number}, arrays={"array": array}))
    channel.send(Message(name="large", arrays={"large": LARGE}))
    channel.meet("end", 60)
    start = time.monotonic()
    print(hosts.wait_for_loss(60), flush=True)
    print(time.monotonic() - start, flush=True)
    try:
        channel.send(Message(name="count"))
    except EngineDeadError as error:
        print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    main()
    sys.stdout.flush()
    os._exit(0)
