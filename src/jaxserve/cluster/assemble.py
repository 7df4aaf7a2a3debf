"""Puts a fleet around its first replicas, wherever they run."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.cluster.fleet import Fleet, FleetParts
from jaxserve.cluster.host import DiskUpdate, Facts, FleetHost, WeightPreparer
from jaxserve.cluster.metrics import FleetMetrics
from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.replica import Replica, ReplicaMaker
from jaxserve.cluster.roster import Roster
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.cost_file import CostFile
from jaxserve.core.errors import ConfigError
from jaxserve.core.protocols import Clock, QueueingRouter, Scaler
from jaxserve.core.view import SequenceView
from jaxserve.engine.adapters import AdapterStore
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.engine.constraints import make_constraints
from jaxserve.engine.intake import Intake
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.traced import RunnerSpec
from jaxserve.scheduling.fleet_log import FleetLogHead, FleetLogWriter
from jaxserve.scheduling.polyserve import PolyServeConfig
from jaxserve.scheduling.routing import RouterSettings, make_router, polyserve_config

logger = logging.getLogger(__name__)

MOST_MARGIN = 0.1
"""Largest share by which the router raises measured times of its own accord."""


def replica_config(config: EngineConfig) -> EngineConfig:
    """Return settings of a single replica: without the log that all would write to.

    Raises:
        ConfigError: If there is one.
    """
    if config.scheduler.decision_log is not None:
        raise ConfigError(
            "decision_log would be written by every replica; use fleet_log, or a single engine."
        )
    return config


def router_settings(options: ClusterOptions, file: CostFile | None) -> RouterSettings:
    """Return what the router goes by.

    Args:
        options: Settings of the fleet.
        file: Times of steps. Their margin counts up to a tenth, unless the settings have another:
            it is for the slowest steps, and deadlines are kept over many.

    Raises:
        ConfigError: For an unknown or impossible setting of polyserve.
    """
    fields: Mapping[str, Any] = options.polyserve_config or {}
    if file is not None and "margin" not in fields:
        fields = {**fields, "margin": min(file.margin, MOST_MARGIN)}
    polyserve: PolyServeConfig = polyserve_config(fields)
    return RouterSettings(polyserve=polyserve, elastic=options.is_elastic)


def _rehearse(roster: Roster, router: QueueingRouter, scaler: Scaler | None) -> None:
    """Have a router and a scaler decide about nobody, to no effect."""
    fleet = roster.view(roster.present)
    sequence = SequenceView(
        seq_id=0, arrival=fleet.now, priority=0, prompt_len=1, num_tokens=1, num_computed=0,
        max_total_len=2, num_pages=0, is_running=False,
    )  # fmt: skip
    router.plan(sequence, fleet)
    router.observe(sequence)
    if scaler is not None:
        scaler.plan(fleet)


def assemble_fleet(
    options: ClusterOptions,
    facts: Facts,
    *,
    spec: RunnerSpec,
    eos_ids: Sequence[int],
    first: Sequence[Replica],
    make: ReplicaMaker,
    adapters: AdapterStore,
    prepare: WeightPreparer | None = None,
    on_disk_update: DiskUpdate | None = None,
    on_death: Callable[[Replica], None] = lambda _: None,
    on_close: Callable[[], None] = lambda: None,
) -> tuple[AsyncLLM, Roster]:
    """Put a fleet around its first replicas.

    Args:
        options: Settings of the fleet.
        facts: What is known of the model.
        spec: What each engine can run.
        eos_ids: Tokens that end a completion.
        first: Replicas that are ready.
        make: Starts another one.
        adapters: Low-rank adapters.
        prepare: Brings new weights into form; None where replicas are in other processes.
        on_disk_update: Told about checkpoints that replicas have read by themselves.
        on_death: Told about replicas that have died.
        on_close: Called at the very end.

    Returns:
        The face of the fleet, and its replicas.

    Raises:
        ConfigError: If the router's settings are wrong, or its log cannot be written.
    """
    clock: Clock = WallClock()
    settings = router_settings(options, facts.cost_file)
    cost = None if facts.cost_file is None else facts.cost_file.cost
    router, scaler = make_router(options.routing_policy, cost, settings)
    log = None
    if options.fleet_log is not None:
        head = FleetLogHead(router=options.routing_policy, settings=settings, cost=cost)
        log = FleetLogWriter(Path(options.fleet_log), head)
    lock = threading.RLock()
    fleets: list[Fleet] = []

    def on_change() -> None:
        for fleet in fleets:
            fleet.news()

    roster = Roster(
        options.replicas, make, clock=clock, lock=lock,
        idle="serving" if scaler is None else "pooled",
        max_restarts=options.max_replica_restarts,
        min_on=options.min_replicas or options.replicas, on_change=on_change,
    )  # fmt: skip
    roster.on_death = on_death

    def engines() -> dict[int, EngineMetrics]:
        there = [(slot.index, slot.replica) for slot in roster.slots]
        return {index: replica.metrics for index, replica in there if replica is not None}

    metrics = FleetMetrics(
        engines=engines, statuses=roster.statuses, max_model_len=facts.max_model_len
    )
    roster.metrics = metrics
    roster.fill(first)
    constraints = make_constraints(
        facts.config.structured, facts.tokenizer, vocab_size=facts.model_config.vocab_size,
        eos_ids=eos_ids, metrics=metrics,
    )  # fmt: skip
    intake = Intake(
        spec, tokenizer=facts.tokenizer, eos_token_ids=eos_ids,
        max_logprobs=facts.config.runner.max_logprobs, seed=facts.config.model.seed,
        constraints=constraints,
    )  # fmt: skip
    parts = FleetParts(
        router=router, scaler=scaler, check_s=settings.polyserve.check_s, log=log,
        check=intake.check, page_size=spec.page_size, max_model_len=facts.max_model_len,
        max_moves=options.max_request_moves,
        max_queued=facts.config.scheduler.max_num_queued_reqs, seed=facts.config.model.seed,
    )  # fmt: skip
    if scaler is not None:
        # Loops are compiled at their first call, which no client should wait for.
        warm_router, warm_scaler = make_router(options.routing_policy, cost, settings)
        _rehearse(roster, warm_router, warm_scaler)
    fleet = Fleet(roster, parts, clock=clock, lock=lock, metrics=metrics)
    fleets.append(fleet)
    host = FleetHost(
        fleet, facts, clock=clock, constraints=constraints, adapters=adapters, prepare=prepare,
        on_disk_update=on_disk_update, on_close=on_close,
    )  # fmt: skip
    if facts.config.pooling.pooler_config or facts.config.pooling.runner == "pooling":
        _ = host.pooling  # so that a wrong setting is found now
    logger.info(
        "%d replicas behind %s%s", len(first), options.routing_policy,
        f", {options.replicas} at most" if options.is_elastic else "",
    )  # fmt: skip
    return AsyncLLM.over(host), roster
