"""From a model and settings to a ready engine: loading, and every "auto" turned into a number."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.attention.custom import CustomAttention
from jaxserve.attention.sharded import own_heads
from jaxserve.core.config import EngineConfig, ModelOptions
from jaxserve.core.errors import UnsupportedError
from jaxserve.core.protocols import Clock, Scheduler
from jaxserve.core.units import format_bytes
from jaxserve.engine.agreement import agree
from jaxserve.engine.balance import ExpertBalancer
from jaxserve.engine.cache_size import Q_BLOCK, CachePlan, kv_tile, lora_shape, plan_cache
from jaxserve.engine.constraints import make_constraints
from jaxserve.engine.draft_runner import DraftedRunner, DraftModel
from jaxserve.engine.engine import Engine
from jaxserve.engine.experts import expert_sharding
from jaxserve.engine.hosts import Channel, join
from jaxserve.engine.kernel_choice import (
    check_custom,
    choose_backend,
    choose_kernels,
)
from jaxserve.engine.kernel_plans import KernelPlans
from jaxserve.engine.leader import LeadingDraftedRunner, LeadingRunner
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.parallel import (
    check_settings,
    num_groups,
)
from jaxserve.engine.policy import EnginePolicy
from jaxserve.engine.runner import Runner
from jaxserve.engine.shapes import ShapeTable
from jaxserve.engine.source import LoadedModel, ModelSource, load_model
from jaxserve.engine.sparse import check_sparse, sparse_spec
from jaxserve.engine.speculation import (
    check_draft_model,
    check_same_tokens,
    check_speculation,
    make_speculator,
)
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.traced import RunnerSpec
from jaxserve.models.hub import cache_dir, resolve_model
from jaxserve.models.quantization import (
    is_scale,
    narrow_paths,
    scheme_of,
)
from jaxserve.models.registry import (
    flatten_params,
)
from jaxserve.pallas_kernels.variant import compose, sinks, soft_cap
from jaxserve.scheduling.policies import PolicySettings

logger = logging.getLogger(__name__)

_CPU_DRAFT_COST, _GPU_DRAFT_COST = 0.1, 0.005
"""Time of one draft token, as a share of that of a step without drafts. Measured with SmolLM2-135M
on two cores: 0.02 to 0.11 in either precision; a guess on GPUs."""
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _load_draft(config: EngineConfig, model: LoadedModel, dtype: str) -> LoadedModel | None:
    """Load the model that drafts, in the precision of the other but never quantised.

    None if no model drafts.
    """
    speculation = config.speculative.speculation
    if speculation is None or speculation.model is None:
        return None
    load_format = "dummy" if config.model.load_format == "dummy" else "auto"
    options = dataclasses.replace(
        config.model,
        dtype=dtype,
        revision=speculation.revision,
        load_format=load_format,
        quantization=None,
        quantization_config=None,
    )
    own = dataclasses.replace(config, model=options)
    return load_model(speculation.model, own, mesh=model.mesh)


def _draft_cost(model: LoadedModel, draft: LoadedModel | None, *, on_cpu: bool) -> float:
    """Say what a draft token costs, as a share of a step of one sequence."""
    cost = _CPU_DRAFT_COST if on_cpu else _GPU_DRAFT_COST
    if draft is None:
        return cost
    small, large = (sum(leaf.size for leaf in jax.tree.leaves(one.state)) for one in (draft, model))
    return cost + small / large


def _fit_length(model: LoadedModel, max_model_len: int) -> LoadedModel:
    """Settle what depends on the longest context: the frequencies of longrope."""
    config = model.config.for_length(max_model_len)
    if config == model.config:
        return model
    module = nnx.merge(model.graph, model.state)
    module.config = config
    return dataclasses.replace(model, config=config, graph=nnx.split(module)[0])


@dataclass(slots=True, kw_only=True)
class Assembled:
    """A ready engine with what its faces need.

    Attributes:
        engine: The engine, not yet warm.
        tokenizer: Its tokenizer, if there is one.
        config: Settings with every "auto" resolved.
        model: The loaded model.
        default_sampling: Sampling defaults of the model.
        policy: The configured policy; not yet installed if it needs times of steps that have to be
            measured. None if a scheduler was given.
        channel: Where launches are announced to other processes, if some run the engine together.
    """

    engine: Engine
    tokenizer: Tokenizer | None
    config: EngineConfig
    model: LoadedModel
    default_sampling: dict[str, Any]
    policy: EnginePolicy | None = None
    channel: Channel | None = None


def _kernel_plans(
    config: EngineConfig,
    model: LoadedModel,
    dtype: str,
    plan: CachePlan,
    attention: CustomAttention | None,
    *,
    has_sparse: bool,
) -> KernelPlans | None:
    """Say what the paged kernels of a device plan with; which of them is not yet chosen.

    None if no device can attend by itself.
    """
    shape, parts = model.config, []
    heads = own_heads(model.sharding, shape.num_heads, shape.num_kv_heads)
    if heads is None or (attention is not None and model.sharding is not None):
        return None
    if shape.attention_soft_cap is not None:
        parts.append(soft_cap(shape.attention_soft_cap))
    if shape.attention_sinks:
        parts.append(sinks())
    if attention is not None:
        # A plan has room for few more items than tiles, and a block mask may cut tiles at will.
        parts.append(dataclasses.replace(attention.variant, block_mask=None))
    return KernelPlans(
        backend="",
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=shape.head_dim,
        page_size=config.cache.block_size,
        dtype=dtype,
        windows=tuple(dict.fromkeys(kind.window for kind in shape.kinds)),
        max_model_len=plan.max_model_len,
        batch_invariant=config.runner.batch_invariant,
        shares=config.cache.enable_prefix_caching,
        variant=compose(*parts),
        extra={} if attention is None else attention.arrays(shape.num_heads),
        has_sparse=has_sparse,
    )


def assemble(
    source: ModelSource | LoadedModel,
    config: EngineConfig,
    *,
    clock: Clock,
    tokenizer: Tokenizer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    scheduler: Scheduler | None = None,
    attention: CustomAttention | None = None,
    progress: bool = False,
) -> Assembled:
    """Load a model and build its engine.

    Args:
        source: The model.
        config: Settings.
        clock: Where time comes from.
        tokenizer: Used instead of the model's own.
        mesh: Devices.
        scheduler: Used instead of the configured policy.
        attention: How attention differs from the model's own.
        progress: Whether to show progress bars.

    Raises:
        ConfigError: If settings, name, files or parameters are wrong.
        CapacityError: If the cache does not fit into memory.
    """
    if attention is not None:
        check_custom(config)
    if config.runner.batch_invariant and config.cache.enable_prefix_caching:
        # Which part of a prompt is computed and which is found would depend on earlier requests.
        logger.info("batch_invariant: prefixes are not cached")
        cache = dataclasses.replace(config.cache, enable_prefix_caching=False)
        config = dataclasses.replace(config, cache=cache)
    check_settings(config, is_live=not isinstance(source, str | Path))
    hosts = join(config.parallel)
    if hosts is not None and config.runner.warmup == "background":
        # Which programs are ready at some time would differ between processes.
        config = dataclasses.replace(
            config, runner=dataclasses.replace(config.runner, warmup="full")
        )
    speculation = config.speculative.speculation
    model = load_model(source, config, mesh=mesh, progress=progress)
    groups = num_groups(
        config.parallel, model.mesh, has_draft=bool(speculation and speculation.model)
    )
    experts = expert_sharding(config.parallel, model.config, model.mesh, groups=groups)
    model = dataclasses.replace(model, experts=experts, groups=groups)
    check_sparse(config, model.mesh, has_own=attention is not None)
    if config.lora.enable_lora and model.config.latent is not None:
        raise UnsupportedError(
            f"enable_lora: adapters are not served with latent attention, which "
            f"{model.config.model_type} has; leave enable_lora out, and merge the adapter into the "
            "model."
        )
    dtype = str(jax.tree.leaves(cast(Any, model.state)["norm"])[0].dtype)
    arrays = flatten_params(model.state)
    scheme = scheme_of(arrays)
    if scheme is not None:
        _tell_quantization(scheme, arrays, dtype)
    on_cpu = model.mesh.devices.flat[0].platform == "cpu"
    options = config.scheduler
    max_num_seqs = options.max_num_seqs or groups * (16 if on_cpu else 256)
    budget = options.max_num_batched_tokens or (512 if on_cpu else 8192)
    mixed = options.max_mixed_prefill_tokens or (64 if on_cpu else 512)
    check_speculation(config, budget)
    num_draft = 0 if speculation is None else speculation.num_speculative_tokens
    draft = _load_draft(config, model, dtype)
    plan = plan_cache(config, model, dtype, max_num_seqs, draft)
    channel, agreed = agree(hosts, config, dataclasses.asdict(plan))
    plan = CachePlan(**cast(Any, agreed))
    model = _fit_length(model, plan.max_model_len)
    runner_options = config.runner
    kernels: KernelPlans | None = None
    sparse = sparse_spec(
        config, model.config, num_pages=plan.num_pages, max_model_len=plan.max_model_len
    )
    chosen = choose_kernels(
        config,
        model.mesh,
        _kernel_plans(config, model, dtype, plan, attention, has_sparse=sparse is not None),
        has_draft=draft is not None,
        use_pages=plan.use_pages,
    )
    if chosen is None:
        backend = choose_backend(runner_options.attention_backend, model.mesh)
    else:
        backend, kernels = chosen
    resolved = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, max_model_len=plan.max_model_len, dtype=dtype, quantization=scheme
        ),
        cache=dataclasses.replace(
            config.cache,
            kv_layout="pages" if plan.use_pages else "slots",
            num_gpu_blocks_override=plan.num_pages,
        ),
        scheduler=dataclasses.replace(
            options,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_mixed_prefill_tokens=mixed,
        ),
        runner=dataclasses.replace(runner_options, attention_backend=backend),
    )
    shapes = ShapeTable.build(
        max_num_seqs=-(-max_num_seqs // groups),
        max_num_batched_tokens=budget,
        max_model_len=plan.max_model_len,
        page_size=config.cache.block_size,
        use_pages=plan.use_pages,
        q_block=Q_BLOCK,
        kv_tile=kv_tile(config, on_cpu=on_cpu),
        batch_invariant=runner_options.batch_invariant,
        min_rows=4 if on_cpu and dtype == "bfloat16" else 1,
        num_draft=num_draft,
        has_lora=config.lora.enable_lora,
        kernels=kernels,
        num_segments=0 if sparse is None else sparse.num_segments,
    )
    max_logprobs = runner_options.max_logprobs
    vocab = model.config.vocab_size
    spec = RunnerSpec(
        config=model.config,
        dtype=dtype,
        shapes=shapes,
        max_num_seqs=max_num_seqs,
        num_pages=plan.num_pages,
        page_size=config.cache.block_size,
        max_model_len=plan.max_model_len,
        use_pages=plan.use_pages,
        keep_store=plan.keep_store,
        backend=backend,
        upcast=on_cpu,
        batch_invariant=runner_options.batch_invariant,
        logprobs_mode=runner_options.logprobs_mode,
        num_candidates=vocab if max_logprobs < 0 else max(1, min(max_logprobs, vocab)),
        matmul_precision="highest" if dtype == "float32" else "default",
        lora=lora_shape(config),
        sparse=sparse,
        sharding=model.sharding,
    )
    metrics = EngineMetrics(
        max_model_len=plan.max_model_len,
        num_speculative_tokens=num_draft,
        has_sparse=sparse is not None,
        has_balance=experts is not None and experts.is_balanced,
    )
    places: dict[str, Any] = {
        "mesh": model.mesh,
        "on_compile": metrics.compiled,
        "cache_dir": runner_options.compilation_cache_dir or default_compile_cache(),
        "forbid_late": runner_options.enforce_no_recompile,
        "frees": isinstance(source, str | Path),
    }
    if tokenizer is None:
        tokenizer = find_tokenizer(config.model, model.path)
    leads = hosts is not None and hosts.leads
    if draft is None:
        runner = (LeadingRunner if leads else Runner)(spec, model.graph, model.state, **places)
    else:
        check_draft_model(draft.config, model.config, plan.max_model_len)
        own = dataclasses.replace(config.model, tokenizer=None)
        check_same_tokens(find_tokenizer(own, draft.path), tokenizer, vocab)
        draft = _fit_length(draft, plan.max_model_len)
        small = DraftModel(config=draft.config, graph=draft.graph, state=draft.state, dtype=dtype)
        kind = LeadingDraftedRunner if leads else DraftedRunner
        runner = kind(spec, model.graph, model.state, draft=small, **places)
    if channel is not None and isinstance(runner, LeadingRunner | LeadingDraftedRunner):
        runner.begin(channel)
    metrics.set_cache_config(
        {
            "block_size": spec.page_size,
            "num_gpu_blocks": groups * spec.num_pages,
            "cache_dtype": dtype,
            "kv_layout": resolved.cache.kv_layout,
            "enable_prefix_caching": config.cache.enable_prefix_caching,
            "cache_bytes": runner.cache_bytes(),
        }
    )
    policy: EnginePolicy | None = None
    if scheduler is None:
        settings = PolicySettings(
            pace=options.slo_pace,
            max_draft=num_draft,
            mix=not runner_options.batch_invariant,
            max_mixed_prefill=mixed,
            ageing_s=options.priority_ageing_s,
            draft_cost=_draft_cost(model, draft, on_cpu=on_cpu),
            lora_drain_wait_s=config.lora.lora_drain_wait_threshold,
        )
        policy = EnginePolicy(options, settings, clock=clock, metrics=metrics)
        scheduler = policy.stand_in()
    eos_ids = _eos_ids(model, tokenizer)
    engine = Engine(
        runner,
        scheduler,
        tokenizer=tokenizer,
        clock=clock,
        metrics=metrics,
        eos_token_ids=eos_ids,
        max_num_batched_tokens=budget,
        max_num_queued_reqs=options.max_num_queued_reqs,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        overlap=options.async_scheduling,
        seed=config.model.seed,
        max_logprobs=max_logprobs,
        constraints=make_constraints(
            config.structured, tokenizer, vocab_size=vocab, eos_ids=eos_ids, metrics=metrics
        ),
        speculator=None if speculation is None else make_speculator(speculation, runner, metrics),
        balancer=None
        if runner.experts is None
        else ExpertBalancer(runner, metrics, interval=config.parallel.eplb_step_interval),
    )
    if policy is not None and not policy.needs_times:
        policy.install(engine)
    return Assembled(
        engine=engine,
        tokenizer=tokenizer,
        config=resolved,
        model=model,
        default_sampling=_default_sampling(config.model, model.generation_config),
        policy=policy,
        channel=channel,
    )


def _tell_quantization(scheme: str, arrays: Mapping[str, jax.Array], dtype: str) -> None:
    plain = sum(array.size for path, array in arrays.items() if not is_scale(path))
    logger.info(
        "quantization %s: weights take %s instead of %s in %s; %d of %d weights keep their "
        "precision",
        scheme,
        format_bytes(sum(array.nbytes for array in arrays.values())),
        format_bytes(plain * jnp.dtype(dtype).itemsize),
        dtype,
        sum(not is_scale(path) for path in arrays) - len(narrow_paths(arrays)),
        sum(not is_scale(path) for path in arrays),
    )


def default_compile_cache() -> str | None:
    """Return where compiled programs are kept; None if nothing can be written there."""
    directory = cache_dir() / "compile"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("compiled programs will not be kept: %s", error)
        return None
    return str(directory) if os.access(directory, os.W_OK) else None


def find_tokenizer(options: ModelOptions, path: Path | None) -> Tokenizer | None:
    """Read the tokenizer that was asked for, or that came with a model.

    Args:
        options: May name another one, and a chat template.
        path: The model's folder or file; None for live parameters.

    Returns:
        None if there is none, or weights are drawn.
    """
    if options.tokenizer is not None:
        place = resolve_model(options.tokenizer, revision=options.revision)
        return Tokenizer.from_path(place, chat_template=options.chat_template)
    if path is None or options.load_format == "dummy":
        return None
    return Tokenizer.from_path(path, chat_template=options.chat_template)


def _eos_ids(model: LoadedModel, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    ids = list(model.config.eos_token_ids)
    if tokenizer is not None:
        ids += tokenizer.eos_token_ids
    own = model.generation_config.get("eos_token_id")
    ids += own if isinstance(own, list) else [own] if isinstance(own, int) else []
    return tuple(dict.fromkeys(ids))


def _default_sampling(
    options: ModelOptions, generation_config: Mapping[str, object]
) -> dict[str, Any]:
    if options.generation_config in {"vllm", "none"}:
        return {}
    found = {
        name: generation_config[name]
        for name in _SAMPLING_DEFAULTS
        if generation_config.get(name) is not None
    }
    longest = generation_config.get("max_new_tokens")
    return found | ({"max_tokens": longest} if isinstance(longest, int) else {})
