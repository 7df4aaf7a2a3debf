"""Model families by their Hugging Face `model_type`, and how to describe, draw and fill them."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.core.errors import ConfigError
from jaxserve.core.registry import Registry
from jaxserve.models.config import ModelConfig
from jaxserve.models.deepseek_v2 import DeepseekV2
from jaxserve.models.deepseek_v3 import DeepseekV3
from jaxserve.models.gemma2 import Gemma2
from jaxserve.models.gemma3 import Gemma3
from jaxserve.models.gpt_oss import GptOss
from jaxserve.models.layers import CausalLM
from jaxserve.models.llama import Llama
from jaxserve.models.mistral import Mistral
from jaxserve.models.mixtral import Mixtral
from jaxserve.models.olmoe import Olmoe
from jaxserve.models.phi3 import Phi3
from jaxserve.models.quantization import (
    KINDS,
    Quantization,
    is_scale,
    quantize_array,
    quantized_model,
    scale_path,
    summed_axis,
)
from jaxserve.models.qwen2 import Qwen2
from jaxserve.models.qwen3 import Qwen3
from jaxserve.models.qwen3_moe import Qwen3Moe
from jaxserve.models.smollm3 import SmolLM3
from jaxserve.sharding.explain import NamedWeight
from jaxserve.sharding.rules import LogicalAxisRules

FAMILIES: Registry[type[CausalLM]] = Registry("model family")
FAMILIES.register("llama")(Llama)
FAMILIES.register("qwen2")(Qwen2)
FAMILIES.register("qwen3")(Qwen3)
FAMILIES.register("mistral")(Mistral)
FAMILIES.register("gemma2")(Gemma2)
FAMILIES.register("gemma3")(Gemma3)
FAMILIES.register("phi3")(Phi3)
FAMILIES.register("smollm3")(SmolLM3)
FAMILIES.register("qwen3_moe")(Qwen3Moe)
FAMILIES.register("mixtral")(Mixtral)
FAMILIES.register("olmoe")(Olmoe)
FAMILIES.register("gpt_oss")(GptOss)
FAMILIES.register("deepseek_v2")(DeepseekV2)
FAMILIES.register("deepseek_v3")(DeepseekV3)

_DEVIATIONS: Mapping[str, float] = {
    "embedding": 0.02,
    "scale": 0.0,
    "offset": 0.0,
    "bias": 0.0,
    "e_score_correction_bias": 0.0,
    "sinks": 1.0,
}
"""How far drawn parameters spread, by kind; the others are matrices."""


def path_name(path: tuple[object, ...]) -> str:
    """Write the path of a parameter with dots, as in `layers.0.mlp.up_proj.kernel`."""
    return ".".join(str(part) for part in path)


def abstract_model(
    config: ModelConfig, *, dtype: jnp.dtype, quantization: Quantization | None = None
) -> tuple[nnx.GraphDef[CausalLM], nnx.State]:
    """Describe a model without allocating it: its structure, and shapes for weights.

    Args:
        config: Its shape.
        dtype: Precision of weights and activations.
        quantization: Which weights are narrower.

    Raises:
        ConfigError: If the quantisation ignores a layer that the model does not have.
    """
    cls = FAMILIES[config.model_type]
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, dtype=dtype, rngs=nnx.Rngs(0))))
    if quantization is None:
        return graph, state
    chosen = quantization.choose(flatten_params(state))
    return quantized_model(graph, state, KINDS[quantization.scheme], chosen)


def abstract_params(
    state: nnx.State, *, mesh: jax.sharding.Mesh, rules: LogicalAxisRules
) -> dict[str, jax.ShapeDtypeStruct]:
    """List every parameter by path with its shape, dtype and sharding on `mesh`."""
    described: dict[str, jax.ShapeDtypeStruct] = {}
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        axes = variable.get_metadata("axes")
        sharding = rules.sharding(axes, leaf.shape, mesh)
        described[path_name(path)] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return described


def named_weights(state: nnx.State) -> list[NamedWeight]:
    """List every parameter by path with the names of its axes."""
    return [
        NamedWeight(
            path=path_name(path),
            shape=tuple(variable.get_value().shape),
            axes=tuple(variable.get_metadata("axes")),
            itemsize=variable.get_value().dtype.itemsize,
        )
        for path, variable in nnx.to_flat_state(state)
    ]


def flatten_params(params: object) -> dict[str, Any]:
    """List live parameters, or what stands in their places, by dotted path.

    Args:
        params: An `nnx.State`, a nested mapping, or a flat mapping by dotted path.
    """
    flat, _ = jax.tree.flatten_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    arrays: dict[str, Any] = {}
    for path, leaf in flat:
        parts = [
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
        ]
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        arrays[".".join(part for part in parts if part)] = value
    return arrays


def fill(state: nnx.State, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """Put arrays, by path, in the place of a state's values; nothing is copied.

    Raises:
        ConfigError: If a parameter is missing, unknown or of another shape; it is named.
    """
    flat = nnx.to_flat_state(state)
    known = {path_name(path) for path, _ in flat}
    extra = sorted(set(arrays) - known)
    missing = sorted(known - set(arrays))
    if extra or missing:
        raise ConfigError(
            f"parameters do not match the model: missing {missing[:5]}, unknown {extra[:5]} "
            f"({len(missing)} missing, {len(extra)} unknown in all)."
        )
    filled: list[tuple[Any, nnx.Variable[jax.Array]]] = []
    for path, variable in flat:
        name = path_name(path)
        value, expected = arrays[name], variable.get_value().shape
        if tuple(value.shape) != tuple(expected):
            raise ConfigError(
                f"parameter {name} has shape {tuple(value.shape)}, expected {tuple(expected)}."
            )
        filled.append((path, variable.replace(value)))
    return nnx.from_flat_state(filled)


def draw_params(
    described: Mapping[str, jax.ShapeDtypeStruct], *, seed: int
) -> dict[str, jax.Array]:
    """Draw random weights straight onto the devices, for measurements without a checkpoint.

    Args:
        described: Names, shapes, dtypes and shardings, from `abstract_params`.
        seed: Seed of the draw.

    Returns:
        Norm scales of one, biases and norm offsets of zero, everything else normal with a
        deviation that keeps activations near one.
    """
    key = jax.random.key(seed)
    drawn: dict[str, jax.Array] = {}
    for index, (name, spec) in enumerate(described.items()):
        if is_scale(name):
            continue
        kind = name.rpartition(".")[2]
        scale_spec = described.get(scale_path(name))
        deviation = _DEVIATIONS.get(kind)
        if deviation is None:
            deviation = 1 / math.sqrt(spec.shape[-2])
        # One small program per distinct shape: a single program over all weights of a deep model
        # takes half a minute to compile.
        dtype = spec.dtype if scale_spec is None else jnp.dtype("float32")
        draw = _draw_program(spec.shape, dtype, spec.sharding)
        mean = 1.0 if kind == "scale" else 0.0
        value = draw(jax.random.fold_in(key, index), mean, deviation)
        if scale_spec is None:
            drawn[name] = value
        else:
            drawn[name], drawn[scale_path(name)] = quantize_array(
                value, spec, scale_spec, summed_axis(name)
            )
    return drawn


@functools.lru_cache(maxsize=64)
def _draw_program(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding
) -> Callable[[jax.Array, float, float], jax.Array]:
    def draw(key: jax.Array, mean: float | jax.Array, deviation: float | jax.Array) -> jax.Array:
        return (mean + deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
