"""How an engine is spread over devices: the mesh that a model gets, and what it cannot have."""

import jax

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.parallel import ParallelOptions
from jaxserve.engine.experts import expert_sharding
from jaxserve.models.config import ModelConfig
from jaxserve.sharding.mesh import engine_mesh
from jaxserve.sharding.rules import (
    DATA_AXIS,
    TENSOR_AXIS,
    LogicalAxisRules,
    expert_parallel_rules,
)


def rules_of(options: ParallelOptions) -> LogicalAxisRules:
    """Return where the logical axes of weights lie."""
    return expert_parallel_rules() if options.enable_expert_parallel else LogicalAxisRules()


def mesh_of(options: ParallelOptions, shape: ModelConfig, *, replica: int = 0) -> jax.sharding.Mesh:
    """Build the mesh for a model.

    Args:
        options: How many devices share it.
        shape: The model.
        replica: Which engine of this process it is for.

    Raises:
        ConfigError: If there are fewer devices, or their number does not divide the model.
    """
    check_model(options, shape)
    mesh = engine_mesh(
        options.tensor_parallel_size,
        options.data_parallel_size,
        kv_heads=shape.num_kv_heads,
        replica=replica,
    )
    # So that what is wrong is found before weights are read.
    expert_sharding(options, shape, mesh, groups=num_groups(options, mesh, has_draft=False))
    return mesh


def check_model(options: ParallelOptions, shape: ModelConfig) -> None:
    """Check that a model can be shared by so many devices.

    Raises:
        ConfigError: Names what does not divide, and the sizes that do.
    """
    tensor, kv_heads, experts = options.tensor_parallel_size, shape.num_kv_heads, shape.experts
    if options.enable_expert_parallel and experts is None:
        raise ConfigError(
            f"enable_expert_parallel needs a model with experts, and {shape.model_type} here has "
            "none; leave it out."
        )
    sizes = {"attention heads": shape.num_heads}
    if any(not kind.has_experts for kind in shape.kinds) or experts is None:
        sizes["feed-forward width"] = shape.intermediate_size
    if experts is not None and experts.shared_size:
        sizes["width of shared experts"] = experts.shared_size
    if experts is not None and not options.enable_expert_parallel:
        sizes["width of an expert"] = experts.inner_size
    odd = [f"{what} ({size})" for what, size in sizes.items() if size % tensor]
    if kv_heads % tensor and tensor % kv_heads:
        odd.append(f"heads of keys and values ({kv_heads})")
    if odd:
        good = [
            str(n)
            for n in range(1, shape.num_heads + 1)
            if all(size % n == 0 for size in sizes.values())
            and (kv_heads % n == 0 or n % kv_heads == 0)
        ]
        raise ConfigError(
            f"tensor_parallel_size={tensor} does not divide {', '.join(odd)} of this "
            f"{shape.model_type}; use one of {', '.join(good)}."
        )
    if experts is not None and options.enable_expert_parallel:
        _check_experts(options, experts.num_experts)


def _check_experts(options: ParallelOptions, num_experts: int) -> None:
    spare, devices = options.num_redundant_experts, options.num_devices
    if spare % devices:
        raise ConfigError(
            f"num_redundant_experts={spare} must be a multiple of the {devices} devices, each of "
            f"which has as many places as others; use {spare // devices * devices} or "
            f"{-(-spare // devices) * devices}."
        )
    if num_experts % options.num_devices == 0:
        return
    good = [str(n) for n in range(1, num_experts + 1) if num_experts % n == 0]
    raise ConfigError(
        f"enable_expert_parallel shares {num_experts} experts among tensor_parallel_size="
        f"{options.tensor_parallel_size} x data_parallel_size={options.data_parallel_size} = "
        f"{options.num_devices} devices, which do not divide them; make the product one of "
        f"{', '.join(good)}."
    )


def check_settings(config: EngineConfig, *, is_live: bool) -> None:
    """Check that other settings go with several hosts.

    Args:
        config: Settings.
        is_live: Whether the model is in memory already.

    Raises:
        ConfigError: Names the setting that does not.
    """
    if not config.parallel.is_multi_host:
        return
    refused = {
        "live parameters": is_live,
        "enable_lora": config.lora.enable_lora,
        "sparse_attention": config.sparse.sparse is not None,
    }
    for name, is_on in refused.items():
        if is_on:
            raise ConfigError(
                f"{name}: works on the devices of one process, and dist_init_addr joins several; "
                "leave one of them out."
            )


def check_encoder(options: ParallelOptions) -> None:
    """Check that an encoder can be shared as asked for.

    Raises:
        ConfigError: If it cannot.
    """
    if options.data_parallel_size > 1 or options.enable_expert_parallel or options.is_multi_host:
        raise ConfigError(
            "data_parallel_size, enable_expert_parallel and dist_init_addr are for decoders, and "
            "this model is an encoder; leave them out, and start several servers."
        )


def kv_axis(mesh: jax.sharding.Mesh, kv_heads: int) -> str | None:
    """Return the mesh axis along which a cache is split by heads; None where it is whole."""
    size = dict(mesh.shape).get(TENSOR_AXIS, 0)
    return TENSOR_AXIS if size and kv_heads % size == 0 else None


def num_cache_parts(mesh: jax.sharding.Mesh, kv_heads: int) -> int:
    """Count the devices that hold different parts of a cache; the others hold copies."""
    return dict(mesh.shape)[TENSOR_AXIS] if kv_axis(mesh, kv_heads) else 1


def num_groups(options: ParallelOptions, mesh: jax.sharding.Mesh, *, has_draft: bool) -> int:
    """Count the groups of devices of one engine that have tokens and a cache of their own.

    Args:
        options: Whether they are to have them.
        mesh: The devices.
        has_draft: Whether another model drafts, which then sees the tokens of all groups, as does
            the one that it drafts for.
    """
    if has_draft or not options.enable_dp_attention:
        return 1
    return dict(mesh.shape).get(DATA_AXIS, 1)
