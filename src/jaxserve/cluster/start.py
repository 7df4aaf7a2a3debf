"""From settings to a fleet that serves."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jaxserve.cluster.assemble import assemble_fleet, replica_config
from jaxserve.cluster.host import DISK, Facts
from jaxserve.cluster.local import LocalFactory, LocalReplica
from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.remote import open_ray_fleet
from jaxserve.core.config import EngineConfig
from jaxserve.core.cost_file import CostFile, read_cost
from jaxserve.core.errors import ConfigError, EngineDeadError
from jaxserve.engine.adapters import AdapterStore, make_reader
from jaxserve.engine.async_engine import AsyncLLM
from jaxserve.engine.encoder_host import is_encoder_source
from jaxserve.engine.host import progress_bar
from jaxserve.engine.source import ModelSource, load_model
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.weights import Names, NewWeights
from jaxserve.scheduling.routing import NEED_TIMES


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
        return open_ray_fleet(
            source, options, own_devices(options, chosen)[0], tokenizer=tokenizer, known=known,
            needs_times=options.routing_policy in NEED_TIMES,
        )  # fmt: skip
    return _open_local(source, options, chosen, tokenizer=tokenizer, known=known, progress=progress)


def own_devices(options: ClusterOptions, config: EngineConfig) -> tuple[EngineConfig, bool]:
    """Say whether replicas have devices of their own, as `data_parallel_size` asks.

    Args:
        options: Settings of the fleet; there are as many replicas as groups of devices.
        config: Settings of all groups together.

    Returns:
        Settings of one replica, and whether each has its own devices.

    Raises:
        ConfigError: If the two numbers differ.
    """
    groups = config.parallel.data_parallel_size
    if groups == 1:
        return config, False
    if options.replicas != groups:
        raise ConfigError(
            f"replicas={options.replicas} and data_parallel_size={groups} both say how many "
            "engines there are; give one of them."
        )
    parallel = dataclasses.replace(config.parallel, data_parallel_size=1)
    return dataclasses.replace(config, parallel=parallel), True


def fleet_options(options: ClusterOptions, config: EngineConfig) -> ClusterOptions:
    """Return settings of a fleet with one replica for each group of devices.

    Args:
        options: As they were given.
        config: Settings of all groups together. Where experts are shared, or several processes
            run one engine, all groups belong to that engine.

    Raises:
        ConfigError: If there are to be both replicas and groups, or several of such engines.
    """
    parallel = config.parallel
    groups = parallel.data_parallel_size
    if groups == 1 or parallel.enable_expert_parallel or parallel.is_multi_host:
        if options.is_fleet and (groups > 1 or parallel.is_multi_host):
            raise ConfigError(
                "replicas each have an engine, and with enable_expert_parallel or dist_init_addr "
                "one engine takes all devices; leave replicas and cluster out."
            )
        return options
    if options.replicas > 1:
        own_devices(options, config)
        return options
    return dataclasses.replace(options, replicas=groups)


def _open_local(
    source: ModelSource,
    options: ClusterOptions,
    config: EngineConfig,
    *,
    tokenizer: Tokenizer | None,
    known: CostFile | None,
    progress: bool,
) -> AsyncLLM:
    config, spreads = own_devices(options, config)
    model = load_model(source, config, progress=progress)
    factory = LocalFactory(
        model, replica_config(config), tokenizer=tokenizer, count=options.replicas, file=known,
        spreads=spreads,
    )  # fmt: skip
    del model  # the factory lets the weights go once replicas have them
    needs_times = options.routing_policy in NEED_TIMES and known is None
    first = factory.make_first(
        options.min_replicas or options.replicas,
        measure=needs_times,
        on_warm_up=progress_bar() if progress else None,
    )
    host = first[0].host
    lora = host.config.lora

    def prepare(params: object, names: str, *, partial: bool, donate: bool) -> NewWeights:
        return _prepared(factory.living(), params, names, partial=partial, donate=donate)

    try:
        llm, roster = assemble_fleet(
            options,
            Facts(
                name=host.name, path=host.path, tokenizer=host.tokenizer,
                model_config=host.model_config, config=host.config,
                default_sampling=host.default_sampling, max_model_len=host.max_model_len,
                max_num_seqs=host.max_num_seqs, cost_file=factory.file,
            ),
            spec=host.engine.runner.spec,
            eos_ids=host.engine.eos_token_ids,
            first=first,
            make=factory.make,
            adapters=AdapterStore(
                make_reader(host.engine.runner, host.name),
                max_cpu_loras=lora.max_cpu_loras or lora.max_loras,
            ),
            # With devices of its own a replica reads new weights by itself.
            prepare=None if spreads else prepare,
            on_death=factory.bury,
        )  # fmt: skip
    except BaseException:
        for replica in first:
            replica.close()
        raise

    def living() -> list[LocalReplica]:
        found = [slot.replica for slot in roster.living]
        return [one for one in found if isinstance(one, LocalReplica)]

    factory.living = living
    return llm


def _prepared(
    living: Sequence[LocalReplica], params: object, names: str, *, partial: bool, donate: bool
) -> NewWeights:
    """Bring weights into the form of those that are served, from a checkpoint or from memory."""
    if not living:
        raise EngineDeadError("no replica lives; try again once one is up.")
    host = living[0].host
    if names == DISK:
        return host.read_weights(str(params))
    return host.prepare_weights(params, cast(Names, names), partial=partial, donate=donate)
