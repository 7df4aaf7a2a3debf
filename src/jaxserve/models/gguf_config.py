"""The meaning of a GGUF file's metadata: names of tensors, and the model's configuration.

Source: names of keys and tensors as llama.cpp's converter writes them; what a missing key means,
and which layers have windows or do not rotate, as llama.cpp's model files say.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.core.errors import CheckpointError, ConfigError, UnsupportedError, did_you_mean
from jaxserve.models.config import ModelConfig
from jaxserve.models.fields import Fields
from jaxserve.models.files import AGAIN
from jaxserve.models.positions import MOST_LAYERS, LayerKind, RopeScaling, stretched_length

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_NAMES = _LAYER_NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_NAMES = {"gemma2": _GEMMA_NAMES, "gemma3": _GEMMA_NAMES, "phi3": _PHI3_NAMES}

_FREQS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = (_FREQS, _LONG, _SHORT)
"""Tensors that hold divisors of rotary frequencies, no weights."""

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3")
_OTHER_MATHEMATICS = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
)
"""Keys below the architecture that would change what is computed."""
_UNDERSTOOD = {
    "gemma2": ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": ("attention.sliding_window", "final_logit_softcapping"),
    "phi3": ("attention.sliding_window",),
}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""The size whose attention scale comes from hidden size over heads; files do not say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensors:
    """What a configuration needs to know of a file's tensors.

    Attributes:
        shapes: Shape of each, by its name in the file.
        rope_factors: Contents of those that `ROPE_FACTORS` names.
        torch_dtype: Precision of the weights; None if they are quantised.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: Mapping[str, tuple[float, ...]]
    torch_dtype: str | None


def hf_name(name: str, arch: str) -> str:
    """Translate a tensor's name.

    Args:
        name: Its name in the file.
        arch: The architecture.

    Returns:
        The Hugging Face name; unknown ones stay as they are and are reported as extra.

    >>> hf_name("blk.3.ffn_norm.weight", "gemma2")
    'model.layers.3.pre_feedforward_layernorm.weight'
    """
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    names = _NAMES.get(arch, _LAYER_NAMES)
    match stem.split("."):
        case ["blk", layer, part] if part in names:
            return f"model.layers.{layer}.{names[part]}.{kind}"
        case _:
            return name


def read_config(fields: Fields, tensors: GgufTensors) -> ModelConfig:
    """Read a model's configuration.

    Args:
        fields: The metadata.
        tensors: What is known of the tensors.

    Raises:
        UnsupportedError: For another architecture, or a variation that would not be computed right.
        CheckpointError: For a missing or impossible value; names the key.
    """
    arch = fields.word("general.architecture")
    if arch not in _ARCHITECTURES:
        hint = did_you_mean(str(arch), _ARCHITECTURES)
        raise UnsupportedError(
            f"{fields.where}: found the architecture {arch!r}, expected one of "
            f"{', '.join(_ARCHITECTURES)}; this model family is not supported.{hint}"
        )
    shapes = tensors.shapes
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{fields.where}: no tensor 'token_embd.weight', expected the embedding; {AGAIN}"
        )
    _refuse_variations(fields, arch)
    num_heads = _same_in_all_layers(fields, f"{arch}.attention.head_count")
    hidden_size = fields.count(f"{arch}.embedding_length")
    num_layers = fields.count(f"{arch}.block_count")
    head_dim = fields.count(f"{arch}.attention.key_length", hidden_size // num_heads or 1)
    max_position = fields.count(f"{arch}.context_length")
    eos_keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    eos = [i for key in eos_keys for i in fields.token_ids(f"tokenizer.ggml.{key}")]
    try:
        scaling = _read_rope_scaling(fields, arch, max_position, tensors.rope_factors)
        return ModelConfig(
            model_type=arch,
            vocab_size=embedding[0],
            hidden_size=hidden_size,
            intermediate_size=_same_in_all_layers(fields, f"{arch}.feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_same_in_all_layers(fields, f"{arch}.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
            # The format's meaning of a missing base; converters leave out the Llama 2 value.
            rope_theta=fields.number(f"{arch}.rope.freq_base", 10000.0),
            rope_scaling=scaling,
            rotary_dim=_read_rotary_dim(fields, arch, head_dim),
            max_position=stretched_length(max_position, scaling),
            layer_kinds=_read_layer_kinds(fields, arch, num_layers, max_position),
            tie_word_embeddings="output.weight" not in shapes,
            qkv_bias="blk.0.attn_q.bias" in shapes,
            o_bias="blk.0.attn_output.bias" in shapes,
            mlp_bias="blk.0.ffn_gate.bias" in shapes,
            qk_norm=arch in {"qwen3", "gemma3"},
            eos_token_ids=tuple(dict.fromkeys(eos)),
            bos_token_id=next(iter(fields.token_ids("tokenizer.ggml.bos_token_id")), None),
            torch_dtype=tensors.torch_dtype,
            **_read_gemma(fields, arch, hidden_size, num_heads, head_dim),
        )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error


def _refuse_variations(fields: Fields, arch: str) -> None:
    for key in _OTHER_MATHEMATICS:
        found = fields.get(f"{arch}.{key}")
        if key not in _UNDERSTOOD.get(arch, ()) and found is not None and np.any(np.asarray(found)):
            raise UnsupportedError(
                f"{fields.where}: found {arch}.{key} {found}, expected none; this variation of "
                f"{arch} is not supported."
            )


def _read_gemma(
    fields: Fields, arch: str, hidden_size: int, num_heads: int, head_dim: int
) -> dict[str, Any]:
    if arch not in {"gemma2", "gemma3"}:
        return {}

    def cap(key: str, default: float) -> float | None:
        return fields.number(f"{arch}.{key}", default) or None

    is_27b = fields.count(f"{arch}.block_count") == _LAYERS_OF_27B[arch]
    scalar = hidden_size // num_heads if is_27b else head_dim
    gemma2 = arch == "gemma2"
    return {
        "hidden_act": "gelu_tanh",
        "local_rope_theta": None
        if gemma2
        else fields.number(f"{arch}.rope.freq_base_swa", 10000.0),
        "attention_scale": scalar**-0.5,
        "attention_soft_cap": cap("attn_logit_softcapping", 50.0) if gemma2 else None,
        "final_soft_cap": cap("final_logit_softcapping", 30.0 if gemma2 else 0.0),
        "embedding_scale": hidden_size**0.5,
        "norm_plus_one": True,
    }


def _read_rotary_dim(fields: Fields, arch: str, head_dim: int) -> int | None:
    """Return how much of each head is rotated; None is all."""
    value_length = fields.count(f"{arch}.attention.value_length", head_dim)
    rotary = fields.count(f"{arch}.rope.dimension_count", head_dim)
    key, found = "attention.value_length", value_length
    if value_length == head_dim:
        if rotary == head_dim:
            return None
        if arch == "phi3":
            return rotary
        key, found = "rope.dimension_count", rotary
    raise UnsupportedError(
        f"{fields.where}: found {arch}.{key} {found}, expected the head size {head_dim}; this "
        f"variation of {arch} is not supported."
    )


def _read_layer_kinds(
    fields: Fields, arch: str, num_layers: int, max_position: int
) -> tuple[LayerKind, ...]:
    """Return the kind of each layer; nothing if all are of the ordinary kind."""
    if arch not in {"gemma2", "gemma3", "phi3", "smollm3"}:
        return ()
    if num_layers > MOST_LAYERS:
        raise CheckpointError(
            f"{fields.where}: found {num_layers} layers, expected at most {MOST_LAYERS}; {AGAIN}"
        )
    if arch == "smollm3":
        every_fourth = [(i + 1) % 4 == 0 for i in range(num_layers)]
        return tuple(LayerKind(rope="none" if skips else "global") for skips in every_fourth)
    window = fields.number(f"{arch}.attention.sliding_window", 4096 if arch == "gemma2" else 0)
    if not window:
        return ()
    near = "local" if arch == "gemma3" else "global"
    # A window as long as the longest context hides nothing.
    shown = int(window) if window < max_position else None
    kinds = tuple(
        LayerKind(window=shown, rope=near) if slides else LayerKind()
        for slides in _read_sliding(fields, arch, num_layers)
    )
    return () if all(kind == LayerKind() for kind in kinds) else kinds


def _read_sliding(fields: Fields, arch: str, num_layers: int) -> list[bool]:
    """Tell which layers see a window only."""
    key = f"{arch}.attention.sliding_window_pattern"
    found = fields.get(key)
    if isinstance(found, np.ndarray):
        if len(found) != num_layers or found.dtype.kind not in "biu":
            raise CheckpointError(
                f"{fields.where}: found {len(found)} values for {key!r}, expected one for each of "
                f"the {num_layers} layers; {AGAIN}"
            )
        return [bool(item) for item in found]
    if arch == "phi3":
        return [True] * num_layers
    period = fields.count(key, 2 if arch == "gemma2" else 6)
    return [(i + 1) % period != 0 for i in range(num_layers)]


def _same_in_all_layers(fields: Fields, key: str, default: int | None = None) -> int:
    """Return a number that may be given once, or once per layer."""
    found = fields.get(key)
    if not isinstance(found, np.ndarray):
        return fields.count(key, default)
    if len(found) == 0 or (found != found[0]).any() or found.dtype.kind not in "iu":
        raise UnsupportedError(
            f"{fields.where}: found {key} that differs between layers, expected one number; such "
            "models are not supported."
        )
    return Fields({key: found[0].item()}, where=fields.where).count(key)


def _read_rope_scaling(
    fields: Fields, arch: str, max_position: int, tensors: Mapping[str, tuple[float, ...]]
) -> RopeScaling | None:
    prefix = f"{arch}.rope.scaling."
    kind = fields.word(f"{prefix}type") or "none"
    factors = tensors.get(_FREQS, ())
    if arch == "phi3" and kind in {"none", "longrope"} and (_LONG in tensors or _SHORT in tensors):
        original = fields.count(f"{prefix}original_context_length", max_position)
        return RopeScaling(
            kind="longrope",
            factor=max_position / original,
            original_max_position=original,
            attention_factor=fields.number(f"{prefix}attn_factor", 1.0),
            factors=tensors.get(_LONG, ()),
            short_factors=tensors.get(_SHORT, ()),
        )
    if kind not in {"none", "linear", "yarn"} or (tensors and kind != "none"):
        beside = f" beside {next(iter(tensors))}" if tensors else ""
        raise UnsupportedError(
            f"{fields.where}: found {prefix}type {kind!r}{beside}, expected none, linear or yarn; "
            "this model is not supported."
        )
    if tensors and not factors:
        raise UnsupportedError(
            f"{fields.where}: found {next(iter(tensors))}, expected it in files of the phi3 "
            "architecture only; this model is not supported."
        )
    if factors:
        is_plain = all(factor == 1 for factor in factors)
        return None if is_plain else RopeScaling(kind="factors", factors=factors)
    if kind == "none":
        return None
    factor = fields.number(f"{prefix}factor")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    magnitude = fields.number(f"{prefix}yarn_attn_factor", 1.0) * fields.number(
        f"{prefix}attn_factor", 1.0
    )
    scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=fields.count(f"{prefix}original_context_length", max_position),
        beta_fast=fields.number(f"{prefix}yarn_beta_fast", 32.0),
        beta_slow=fields.number(f"{prefix}yarn_beta_slow", 1.0),
    )
    return dataclasses.replace(scaling, attention_factor=magnitude * scaling.magnitude)
