"""Random adapters for tiny models, in PEFT's form: as arrays, and as folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from jaxserve import LoRARequest
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import CausalLM
from jaxserve.models.lora import target_sizes

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_of(
    config: ModelConfig,
    *,
    seed: int,
    rank: int = 4,
    targets: tuple[str, ...] = ALL,
    prefix: str = "base_model.model.",
    **options: object,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Draw tensors, and write the configuration that goes with them."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config.num_layers):
        for name, (in_size, out_size) in target_sizes(config).items():
            if name.rpartition(".")[2] in targets:
                stem = f"{prefix}model.layers.{layer}.{name}.lora_"
                first = random.standard_normal((rank, in_size)) / in_size**0.5
                second = random.standard_normal((out_size, rank)) / rank**0.5
                tensors[f"{stem}A.weight"] = first.astype(np.float32)
                tensors[f"{stem}B.weight"] = second.astype(np.float32)
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    return tensors, plain | options


def lora(config: ModelConfig, name: str, number: int, **drawn: Any) -> LoRARequest:
    """Draw an adapter and name it; its number is its seed, if no other is given."""
    load_inplace = drawn.pop("load_inplace", False)
    tensors, options = adapter_of(config, **({"seed": number} | drawn))
    return LoRARequest(
        name, number, lora_tensors=tensors, peft_config=options, load_inplace=load_inplace
    )


def write_adapter(
    folder: Path, tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]
) -> Path:
    """Write a folder as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(options))
    safetensors.numpy.save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def merged(module: CausalLM, request: LoRARequest) -> CausalLM:
    """Return the model with an adapter of scale 1 added to its weights, computed in float64."""
    graph, state = nnx.split(module)
    copy = nnx.merge(graph, state)
    tensors = request.lora_tensors
    for layer, block in enumerate(copy.layers):
        for name in target_sizes(module.config):
            part, projection = name.split(".")
            stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
            if f"{stem}A.weight" in tensors:
                linear = getattr(getattr(block, part), projection)
                wide = np.asarray(linear.kernel[...], np.float64)
                first = tensors[f"{stem}A.weight"].astype(np.float64)
                second = tensors[f"{stem}B.weight"].astype(np.float64)
                linear.kernel = nnx.Param(jnp.asarray(wide + (second @ first).T, jnp.float32))
    return copy
