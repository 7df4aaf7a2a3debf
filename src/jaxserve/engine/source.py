"""Where a model comes from: a name, files, a module or parameters, brought into device memory."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.core.config import EngineConfig, ModelOptions
from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.engine.parallel import mesh_of, rules_of
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.files import read_json
from jaxserve.models.hub import resolve_model
from jaxserve.models.layers import CausalLM
from jaxserve.models.loading import load_params
from jaxserve.models.quantization import (
    KINDS,
    Quantization,
    narrow_paths,
    quantize_params,
    quantized_model,
    scheme_of,
)
from jaxserve.models.registry import (
    abstract_model,
    abstract_params,
    draw_params,
    fill,
    flatten_params,
)
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import ExpertSharding, LogicalAxisRules, ModelSharding

ModelSource = str | Path | CausalLM | tuple[ModelConfig | Mapping[str, object], object]
"""A name or path, a module of this package, or (configuration, parameters)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in device memory.

    Attributes:
        name: What to call it.
        config: Its shape.
        graph: Structure of the module.
        state: Its weights.
        mesh: Where they lie.
        path: Where it came from; None for live parameters.
        generation_config: Sampling defaults that came with it.
        rules: By which rules they lie there.
        experts: How whole experts lie there, if not in their order and summed up.
        groups: Groups of devices that have tokens, and a cache, of their own.
    """

    name: str
    config: ModelConfig
    graph: nnx.GraphDef[CausalLM]
    state: nnx.State
    mesh: jax.sharding.Mesh
    path: Path | None
    generation_config: Mapping[str, object]
    rules: LogicalAxisRules = field(default_factory=LogicalAxisRules)
    experts: ExpertSharding | None = None
    groups: int = 1

    @property
    def sharding(self) -> ModelSharding | None:
        """How it lies on several devices; None on one."""
        if self.mesh.devices.size == 1:
            return None
        return ModelSharding(
            mesh=self.mesh, rules=self.rules, experts=self.experts, groups=self.groups
        )


def load_model(
    source: ModelSource | LoadedModel,
    config: EngineConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
) -> LoadedModel:
    """Bring a model into device memory; live parameters stay where they are.

    Args:
        source: The model; one that has been loaded is returned as it is.
        config: Precision, format and parallelism.
        mesh: Devices; by default those of live parameters, else as many as `config` says.
        progress: Whether to show progress bars.

    Raises:
        ModelNotFoundError: If a name or path leads nowhere.
        CheckpointError: If files are damaged or do not fit together.
        ConfigError: If live parameters do not fit their configuration, or cannot be quantised as
            asked for.
    """
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, CausalLM):
        graph, state = nnx.split(source)
        return _quantize_live(_live(source.config, graph, state, mesh), config)
    if isinstance(source, tuple):
        raw, params = source
        shape = raw if isinstance(raw, ModelConfig) else ModelConfig.from_hf(raw)
        return _quantize_live(_live_params(shape, params, mesh), config)
    if config.model.load_format == "dummy":
        return _draw(Path(source), config, mesh)
    path = resolve_model(source, revision=config.model.revision, progress=progress)
    return _load(str(source), path, config, mesh, progress=progress)


def _live(
    config: ModelConfig,
    graph: nnx.GraphDef[CausalLM],
    state: nnx.State,
    mesh: jax.sharding.Mesh | None,
) -> LoadedModel:
    if mesh is None:
        sharding = jax.tree.leaves(state)[0].sharding
        is_named = isinstance(sharding, jax.sharding.NamedSharding)
        mesh = cast(jax.sharding.Mesh, sharding.mesh) if is_named else make_mesh()
    return LoadedModel(
        name=config.model_type, config=config, graph=graph, state=state,
        mesh=mesh, path=None, generation_config={},
    )  # fmt: skip


def _live_params(
    config: ModelConfig, params: object, mesh: jax.sharding.Mesh | None
) -> LoadedModel:
    arrays = flatten_params(params)
    table = arrays.get("embed_tokens.embedding")
    if table is None:
        raise ConfigError(
            "live parameters must hold 'embed_tokens.embedding', found: "
            f"{', '.join(sorted(arrays)[:5])}."
        )
    norm = arrays.get("norm.scale", arrays.get("norm.offset", table))
    graph, state = abstract_model(config, dtype=jnp.dtype(norm.dtype))
    scheme = scheme_of(arrays)
    if scheme is not None:
        graph, state = quantized_model(graph, state, KINDS[scheme], narrow_paths(arrays))
    return _live(config, graph, fill(state, arrays), mesh)


def _quantization(options: ModelOptions) -> Quantization | None:
    if options.quantization is None:
        return None
    return Quantization(scheme=options.quantization, ignore=options.unquantized_layers)


def _quantize_live(model: LoadedModel, config: EngineConfig) -> LoadedModel:
    """Quantise live parameters, which stay as they are, as do those that are not quantised."""
    model = dataclasses.replace(model, rules=rules_of(config.parallel))
    wanted = _quantization(config.model)
    if wanted is None:
        return model
    arrays = flatten_params(model.state)
    found = scheme_of(arrays)
    if found is not None:
        raise ConfigError(
            f"quantization {wanted.scheme!r} was asked for, found parameters that are quantised "
            f"already, to {found}; leave the setting out, or give plain parameters."
        )
    chosen = wanted.choose(arrays)
    graph, state = quantized_model(model.graph, model.state, KINDS[wanted.scheme], chosen)
    specs = abstract_params(state, mesh=model.mesh, rules=model.rules)
    made = fill(state, quantize_params(arrays, specs))
    return dataclasses.replace(model, graph=graph, state=made)


def _draw(path: Path, config: EngineConfig, mesh: jax.sharding.Mesh | None) -> LoadedModel:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"load_format dummy needs a config.json, found none at {path}.")
    shape = ModelConfig.from_hf(read_json(file))
    dtype = jnp.dtype(resolve_dtype(config.model, shape, is_quantized=False))
    graph, state = abstract_model(shape, dtype=dtype, quantization=_quantization(config.model))
    mesh, rules = mesh or mesh_of(config.parallel, shape), rules_of(config.parallel)
    described = abstract_params(state, mesh=mesh, rules=rules)
    arrays = draw_params(described, seed=config.model.seed)
    return LoadedModel(
        name=path.name, config=shape, graph=graph, state=fill(state, arrays), mesh=mesh,
        path=path, generation_config={}, rules=rules,
    )  # fmt: skip


def _load(
    name: str, path: Path, config: EngineConfig, mesh: jax.sharding.Mesh | None, *, progress: bool
) -> LoadedModel:
    checkpoint = open_checkpoint(path, config.model.load_format)
    try:
        shape = checkpoint.config
        dtype = jnp.dtype(resolve_dtype(config.model, shape, is_quantized=checkpoint.is_quantized))
        wanted = _quantization(config.model)
        graph, state = abstract_model(shape, dtype=dtype, quantization=wanted)
        mesh, rules = mesh or mesh_of(config.parallel, shape), rules_of(config.parallel)
        described = abstract_params(state, mesh=mesh, rules=rules)
        arrays = load_params(checkpoint, described, progress=progress)
        return LoadedModel(
            name=name, config=shape, graph=graph, state=fill(state, arrays), mesh=mesh,
            path=checkpoint.path, generation_config=dict(checkpoint.generation_config),
            rules=rules,
        )  # fmt: skip
    finally:
        checkpoint.close()


def resolve_dtype(options: ModelOptions, config: ModelConfig, *, is_quantized: bool) -> str:
    """Choose the precision: what was asked for, or what suits checkpoint and device.

    Args:
        options: May name a precision.
        config: May say the checkpoint's own.
        is_quantized: Whether the checkpoint holds quantised weights, which say nothing.
    """
    if options.dtype != "auto":
        return options.dtype
    own = None if is_quantized else config.torch_dtype
    if jax.default_backend() != "cpu":
        return own or "bfloat16"
    if own == "float32" or not _cpu_has_bfloat16():
        return "float32"
    return "bfloat16"


def _cpu_has_bfloat16() -> bool:
    """Tell whether the processor multiplies bfloat16; without, XLA emulates it very slowly."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text
