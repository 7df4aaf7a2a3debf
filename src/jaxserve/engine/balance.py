"""Looks now and then whether experts should lie elsewhere, and has them moved between two steps."""

import logging
import time

import numpy as np

from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.runner import Runner
from jaxserve.sharding.eplb import LoadBalancer

logger = logging.getLogger(__name__)

_MEMORY = 0.5
"""Share of the past in what is expected of the next interval."""


class ExpertBalancer:
    """Moves experts of an engine between devices. Called by the engine's thread only.

    Args:
        runner: Counts, and moves.
        metrics: Told how balanced devices are.
        interval: Steps from one look to the next.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.4.1); see `sharding.eplb`.
    """

    def __init__(self, runner: Runner, metrics: EngineMetrics, *, interval: int) -> None:
        """Begin with what the runner has."""
        self._runner, self._metrics, self._interval = runner, metrics, interval
        slots = runner.experts
        if slots is None:
            raise AssertionError("experts of this runner stay where they are")
        self._layers = [LoadBalancer(slots.layout, memory=_MEMORY, period=1) for _ in slots.layers]
        self._num_steps = 0
        self._seen = np.zeros((len(slots.layers), slots.layout.num_experts), np.uint32)

    def forget(self) -> None:
        """Begin to count anew, as the runner does after a failure."""
        self._seen[:] = 0

    def committed(self) -> None:
        """Take note that a step has been taken."""
        self._num_steps += 1
        if self._num_steps % self._interval:
            return
        start = time.perf_counter()
        loads = self._runner.expert_loads()
        counts, self._seen = (loads - self._seen).astype(np.int64), loads
        held = [layer.placement for layer in self._layers]
        is_moved = [
            layer.observe(own) is not None
            for layer, own in zip(self._layers, counts, strict=True)
            if own.any()
        ]
        placed = [layer.placement for layer in self._layers]
        busy = [index for index, own in enumerate(counts) if own.any()]
        if not busy:
            return
        before, after = (
            float(np.mean([where[i].imbalance(counts[i].astype(np.float64)) for i in busy]))
            for where in (held, placed)
        )
        num_moved = sum(
            int((old.expert != new.expert).sum()) for old, new in zip(held, placed, strict=True)
        )
        if any(is_moved):
            self._runner.place_experts(np.stack([one.expert for one in placed]))
            logger.info(
                "%d slots hold other experts; the busiest device has %.2f times the mean instead "
                "of %.2f; %.1f ms",
                num_moved, after, before, 1e3 * (time.perf_counter() - start),
            )  # fmt: skip
        self._metrics.balanced(before=before, after=after, num_moved=num_moved)
