"""From settings to a fleet that serves."""

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.cluster.fleet import Fleet, FleetParts
from jaxserve.cluster.host import Facts, FleetHost
from jaxserve.cluster.local import LocalFactory, LocalReplica
from jaxserve.cluster.metrics import FleetMetrics
from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.replica import Replica, ReplicaMaker
from jaxserve.cluster.roster import Roster
from jaxserve.core.clock import WallClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.cost_file import CostFile, read_cost
from jaxserve.core.errors import ConfigError
from jaxserve.core.protocols import Clock, QueueingRouter, Scaler
from jaxserve.core.view import SequenceView
from jaxserve.engine.adapters import AdapterStore, make_reader
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.engine.constraints import make_constraints
from jaxserve.engine.encoder_host import is_encoder_source
from jaxserve.engine.host import Progress, progress_bar
from jaxserve.engine.intake import Intake
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.runner import RunnerSpec
from jaxserve.engine.setup import ModelSource, load_model
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.weights import NewWeights
from jaxserve.scheduling.fleet_log import FleetLogHead, FleetLogWriter
from jaxserve.scheduling.polyserve import PolyServeConfig
from jaxserve.scheduling.routing import NEED_TIMES, RouterSettings, make_router, polyserve_config

logger = logging.getLogger(__name__)


def open_fleet(
    source: ModelSource,
    options: ClusterOptions,
    *,
    config: EngineConfig | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
    **settings: Any,  # noqa: ANN401  checked by EngineConfig
) -> AsyncLLM:
    """Start several engines for one model, and return them behind one face.

    Args:
        source: The model; for replicas in other processes, a name or a path that they can read.
        options: How many replicas, where they run, and who decides what goes where.
        config: Settings of each engine; or give them one by one.
        tokenizer: Used instead of the model's own.
        progress: Whether to show progress bars on stderr.
        **settings: Single settings, named as in `EngineConfig`.

    Raises:
        ConfigError: If settings, name, files or parameters are wrong.
        CapacityError: If the caches do not fit into memory.
        MissingExtraError: If replicas are to be Ray actors and Ray is not installed.
    """
    chosen = config or EngineConfig.from_settings(settings)
    if is_encoder_source(source, chosen):
        raise ConfigError(
            "replicas serve decoders only, and this model is an encoder; leave --replicas out, and "
            "start several servers."
        )
    known = None
    if chosen.scheduler.cost_model is not None:
        known = read_cost(Path(chosen.scheduler.cost_model))
    if options.cluster == "ray":
        from jaxserve.cluster.remote import open_ray_fleet  # noqa: PLC0415  Ray is optional

        return open_ray_fleet(source, options, chosen, tokenizer=tokenizer, known=known)
    return _open_local(source, options, chosen, tokenizer=tokenizer, known=known, progress=progress)


def _open_local(
    source: ModelSource,
    options: ClusterOptions,
    config: EngineConfig,
    *,
    tokenizer: Tokenizer | None,
    known: CostFile | None,
    progress: bool,
) -> AsyncLLM:
    model = load_model(source, config, progress=progress)
    roster_of: list[Roster] = []

    def alive() -> list[LocalReplica]:
        slots = roster_of[0].living if roster_of else ()
        found = [slot.replica for slot in slots]
        return [one for one in found if isinstance(one, LocalReplica)]

    factory = LocalFactory(
        model, replica_config(config), tokenizer=tokenizer, count=options.replicas, living=alive,
        file=known,
    )  # fmt: skip
    del model
    number = options.min_replicas or options.replicas
    needs_times = options.routing_policy in NEED_TIMES and known is None
    bar: Progress | None = progress_bar() if progress else None
    living = factory.make_first(number, measure=needs_times, on_warm_up=bar)
    try:
        host = living[0].host
        facts = Facts(
            name=host.name, path=host.path, tokenizer=host.tokenizer,
            model_config=host.model_config, config=host.config,
            default_sampling=host.default_sampling, max_model_len=host.max_model_len,
            max_num_seqs=host.max_num_seqs, cost_file=factory.file,
        )  # fmt: skip
        lora = host.config.lora
        adapters = AdapterStore(
            make_reader(host.engine.runner, host.name),
            max_cpu_loras=lora.max_cpu_loras or lora.max_loras,
        )

        def prepare(params: object, names: Any, *, partial: bool, donate: bool) -> NewWeights:  # noqa: ANN401
            return _prepared(alive(), params, names, partial=partial, donate=donate)

        return assemble_fleet(
            options,
            facts,
            spec=host.engine.runner.spec,
            eos_ids=host.engine.eos_token_ids,
            file=factory.file,
            first=living,
            make=factory.make,
            adapters=adapters,
            prepare=prepare,
            on_death=factory.bury,
            roster_of=roster_of,
        )
    except BaseException:
        for replica in living:
            replica.close()
        raise


def _prepared(
    living: Sequence[LocalReplica],
    params: object,
    names: Any,  # noqa: ANN401
    *,
    partial: bool,
    donate: bool,
) -> NewWeights:
    """Bring weights into the form of those that are served, from a checkpoint or from memory."""
    if not living:
        raise ConfigError("no replica lives that the weights could be compared with.")
    host = living[0].host
    if names == "disk":
        return host.read_weights(params if isinstance(params, Path) else str(params))
    return host.prepare_weights(params, names, partial=partial, donate=donate)


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
        file: Times of steps, whose margin counts unless the settings have another.

    Raises:
        ConfigError: For an unknown or impossible setting of polyserve.
    """
    fields: Mapping[str, Any] = options.polyserve_config or {}
    if file is not None and "margin" not in fields:
        fields = {**fields, "margin": file.margin}
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
    file: CostFile | None,
    first: Sequence[Replica],
    make: ReplicaMaker,
    adapters: AdapterStore,
    prepare: Any,  # noqa: ANN401  see WeightPreparer
    on_death: Any,  # noqa: ANN401
    roster_of: list[Roster],
    on_close: Any = lambda: None,  # noqa: ANN401
) -> AsyncLLM:
    """Put a fleet around its first replicas.

    Args:
        options: Settings of the fleet.
        facts: What is known of the model.
        spec: What each engine can run.
        eos_ids: Tokens that end a completion.
        file: Times of steps; None if no router needs them.
        first: Replicas that are ready.
        make: Starts another one.
        adapters: Low-rank adapters.
        prepare: Brings new weights into form, or None.
        on_death: Told about replicas that have died.
        roster_of: Gets the roster.
        on_close: Called at the very end.
    """
    clock: Clock = WallClock()
    settings = router_settings(options, file)
    cost = None if file is None else file.cost
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
    roster_of.append(roster)
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
        on_close=on_close,
    )  # fmt: skip
    if facts.config.pooling.pooler_config or facts.config.pooling.runner == "pooling":
        _ = host.pooling  # so that a wrong setting is found now
    logger.info(
        "%d replicas behind %s%s", len(first), options.routing_policy,
        f", {options.replicas} at most" if options.is_elastic else "",
    )  # fmt: skip
    return AsyncLLM.over(host)
