"""Fleets of tiny engines, in this process."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.start import open_fleet
from jaxserve.core.cost import LinearCost, Plane
from jaxserve.core.cost_file import CostFile, write_cost
from jaxserve.core.request import SamplingParams
from jaxserve.engine.async_engine import AsyncLLM
from tests.tiny import write_tiny_model

SMALL = {
    "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 8,
    "num_gpu_blocks_override": 128, "warmup": "lazy",
}  # fmt: skip
PROMPT = [*range(40, 71)]
LONG = SamplingParams(max_tokens=60, temperature=1.0, seed=7, ignore_eos=True)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for something that happens on another thread."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of a tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def cost_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Times of steps of an engine that takes a millisecond per prompt token."""
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    write_cost(path, CostFile(cost=LinearCost(Plane(token=1e-3, base=2e-3)), margin=0.0))
    return str(path)


@pytest.fixture
def start(tiny_folder: Path) -> Iterator[Callable[..., AsyncLLM]]:
    """Start a fleet; it is closed at the end of the test."""
    made: list[AsyncLLM] = []

    def begin(replicas: int = 2, *, engine: dict | None = None, **options: object) -> AsyncLLM:
        settings = SMALL | (engine or {})
        found = open_fleet(
            tiny_folder, ClusterOptions(replicas=replicas, **options), **settings
        )  # fmt: skip
        made.append(found)
        return found

    yield begin
    for fleet in made:
        fleet.close()


async def collect(llm: AsyncLLM, prompt: list[int], sampling: SamplingParams, **how: object):
    """Return the events of one request."""
    request = llm.make_request(prompt, sampling, **how)
    return [event async for event in llm.events(request)]


def run(coroutine):
    """Run to the end, on an event loop of its own."""
    return asyncio.run(coroutine)


def tokens_of(events) -> list[int]:
    """Return the ids of all events, of the first completion."""
    return [token for event in events if event.index == 0 for token in event.token_ids]


def kill(llm: AsyncLLM, index: int, message: str = "cut for a test") -> None:
    """Have the loop of a replica's engine end with an error that it does not expect."""
    replica = llm.host.fleet.roster.slots[index].replica
    engine = replica.host.engine

    def fail() -> None:
        raise SystemExit(message)

    engine.step = fail
    replica.host.thread.call(lambda: None)  # so that an idle one takes a step
