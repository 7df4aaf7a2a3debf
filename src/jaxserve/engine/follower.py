"""What processes other than the first do: make the launches that process 0 announces."""

import logging
from collections import deque
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.draft_runner import DraftedRunner
from jaxserve.engine.hosts import READY_TIMEOUT_S, Channel, join, leave_hosts
from jaxserve.engine.leader import CLOSED, KEPT_STEPS, WARM, meet_for_shape
from jaxserve.engine.message import Message
from jaxserve.engine.runner import Runner
from jaxserve.engine.setup import assemble
from jaxserve.engine.shapes import PackedStep

logger = logging.getLogger(__name__)


def follow(model: str | Path, *, config: EngineConfig | None = None, **settings: Any) -> None:  # noqa: ANN401  checked by EngineConfig
    """Load a model and follow process 0 until that closes its engine.

    Args:
        model: Name or path of the model; the same in all processes.
        config: Settings, the same in all processes but for `node_rank`; or give them one by one.
        **settings: Single settings, named as in `EngineConfig`.

    Raises:
        ConfigError: If this process is the first one, or alone.
        EngineDeadError: If a process is lost.
    """
    chosen = config or EngineConfig.from_settings(settings)
    hosts = join(chosen.parallel)
    if hosts is None or hosts.leads:
        raise ConfigError(
            "only processes behind the first follow; give dist_init_addr, nnodes and a node_rank "
            "of at least 1."
        )
    made = assemble(model, chosen, clock=WallClock())
    channel = made.channel
    if channel is None:
        raise AssertionError("an engine of several processes has no channel")
    logger.info("process %d of %d follows process 0", hosts.rank, hosts.size)
    follow_calls(made.engine.runner, channel)
    leave_hosts()


def follow_calls(runner: Runner, channel: Channel) -> None:
    """Make the launches that are announced, until the engine is closed.

    Args:
        runner: Of the same model and settings as that of process 0.
        channel: Where calls are announced.

    Raises:
        EngineDeadError: If a process is lost.
    """
    calls = _Calls(runner, channel)
    while True:
        message = channel.receive()
        if message.name == "close":
            runner.close()
            channel.meet(CLOSED, READY_TIMEOUT_S)
            return
        calls.make(message)


class _Calls:
    """Makes calls to a runner."""

    def __init__(self, runner: Runner, channel: Channel) -> None:
        self._runner, self._channel = runner, channel
        self._shapes = runner.spec.shapes.all_shapes()
        self._recent: deque[jax.Array] = deque(maxlen=KEPT_STEPS)

    def make(self, message: Message) -> None:
        values: Any = message.values
        arrays = message.arrays
        match message.name:
            case "run":
                packed = PackedStep(self._shapes[values["shape"]], self._runner.spec.groups)
                packed.buffer[:] = arrays["buffer"]
                packed.mask = arrays.get("mask")
                if values["is_new"]:
                    self._runner.prepare(packed.shape)
                    meet_for_shape(self._channel, values["shape"])
                self._recent.append(self._runner.run(packed).hidden)
            case "set_row":
                self._runner.set_row(values["row"], **arrays)
            case "move_row":
                self._runner.move_row(**values)
            case "place_experts":
                self._runner.place_experts(arrays["experts"])
            case "save_pages":
                self._runner.save_pages(_moves(arrays["moves"]))
            case "load_pages":
                self._runner.load_pages(_moves(arrays["moves"]))
            case "prompt_logprobs":
                self._runner.prompt_logprobs(self._hidden(values["age"]), arrays["targets"])
            case "pool":
                self._runner.pool(self._hidden(values["age"]), arrays["start"], arrays["count"])
            case "draft":
                cast(DraftedRunner, self._runner).draft(**values)
            case "warm_up":
                self._runner.warm_up()
                self._channel.meet(WARM, READY_TIMEOUT_S)
            case other:
                raise AssertionError(f"process 0 announced an unknown call {other!r}")

    def _hidden(self, age: int) -> jax.Array:
        return self._recent[-1 - age]


def _moves(array: np.ndarray) -> list[tuple[int, int, int]]:
    return [(int(row), int(block), int(page)) for row, block, page in array]
