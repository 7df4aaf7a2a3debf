"""A `ModelConfig` written as the `config.json` that transformers and other engines read."""

import dataclasses

import numpy as np

from jaxserve.core.errors import UnsupportedError
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_parts_writer import latent_scale_fields, write_parts
from jaxserve.models.positions import RopeScaling

_NAMES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmoe": ("olmoe", "OlmoeForCausalLM"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
}
"""Family -> its Hugging Face `model_type` and class."""
_MIXED_MISTRAL = ("ministral", "MinistralForCausalLM")
"""The Mistral whose layers differ."""
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
_NULLABLE = frozenset(
    {
        "pad_token_id",
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "q_lora_rank",
    }
)
"""Keys whose absence means a default of the class, and null that there is none."""
_LLAMA3_CONTEXTS = tuple(2**power for power in range(11, 18))
"""Lengths of pretraining to try when only the frequencies' divisors are known."""
_SAME = 1e-5
"""Relative difference of frequencies that float32 rounding explains."""


def write_hf_config(config: ModelConfig, *, dtype: str) -> dict[str, object]:
    """Describe a model as a Hugging Face `config.json`, in the spelling that old readers know too.

    Args:
        config: The model.
        dtype: Precision of the weights beside it.

    Returns:
        The content of the file; `ModelConfig.from_hf` reads the same model from it.

    Raises:
        UnsupportedError: If that format has no words for the model.
    """
    if config.model_type not in _NAMES:
        raise UnsupportedError(
            f"a model of the family {config.model_type!r} cannot be described as a config.json, "
            f"expected one of {', '.join(_NAMES)}; convert from the original directory."
        )
    is_mixed = config.model_type == "mistral" and len(set(config.kinds)) > 1
    model_type, architecture = _MIXED_MISTRAL if is_mixed else _NAMES[config.model_type]
    is_gemma = config.model_type in {"gemma2", "gemma3"}
    raw: dict[str, object] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation" if is_gemma else "hidden_act": _ACTIVATIONS[config.hidden_act],
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.local_rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "pad_token_id": None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": one_or_many(config.eos_token_ids),
        "torch_dtype": dtype,
    }
    raw |= _gemma_fields(config) if is_gemma else {}
    raw |= _layer_fields(config) | write_parts(config)
    expected = dataclasses.replace(config, torch_dtype=dtype)
    if config.rope_scaling is not None:
        scaling = _named_scaling(config)
        raw["rope_scaling"] = _rope_table(config, scaling) | latent_scale_fields(config)
        expected = dataclasses.replace(expected, rope_scaling=scaling)
    elif config.model_type == "gpt_oss":  # which has yarn where nothing is said
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.model_type == "phi3":
        raw |= _phi3_fields(config)
    raw = {key: value for key, value in raw.items() if value is not None or key in _NULLABLE}
    _check_round_trip(raw, expected)
    return raw


def one_or_many(ids: tuple[int, ...]) -> int | list[int] | None:
    """Write token ids as these files do: one, a list, or nothing.

    >>> one_or_many((2,)), one_or_many((2, 7)), one_or_many(())
    (2, [2, 7], None)
    """
    if len(ids) == 1:
        return ids[0]
    return list(ids) or None


def _gemma_fields(config: ModelConfig) -> dict[str, object]:
    scale = config.attention_scale or config.head_dim**-0.5
    fields: dict[str, object] = {
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": config.final_soft_cap,
    }
    if config.model_type == "gemma2":
        fields["attn_logit_softcapping"] = config.attention_soft_cap
    return fields


def _phi3_fields(config: ModelConfig) -> dict[str, object]:
    scaling, rotary = config.rope_scaling, config.rotary_dim
    original = config.max_position if scaling is None else scaling.original_max_position
    return {
        "original_max_position_embeddings": original or config.max_position,
        "partial_rotary_factor": 1.0 if rotary is None else rotary / config.head_dim,
    }


def _layer_fields(config: ModelConfig) -> dict[str, object]:
    """Say which layers slide, and which do not rotate."""
    kinds, family = config.kinds, config.model_type
    windows = {kind.window for kind in kinds if kind.window is not None}
    window = next(iter(windows), None)
    if len(windows) > 1:
        raise UnsupportedError(
            f"config.json has no words for windows of several lengths ({sorted(windows)}); "
            "convert from the original directory."
        )
    slides = [kind.window is not None for kind in kinds]
    if family == "gemma3":
        # Local layers are those that slide; a window as long as the context hides nothing.
        slides = [kind.rope == "local" for kind in kinds]
        window = window or config.max_position
    types = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    match family:
        case "llama" | "olmoe" | "deepseek_v2" | "deepseek_v3":
            return {}
        case "qwen3_moe":
            return {"use_sliding_window": any(slides), "sliding_window": window}
        case "mistral" | "phi3" | "mixtral" if all(slides) or not any(slides):
            return {"sliding_window": window}
        case "qwen2" | "qwen3":
            first = slides.index(True) if any(slides) else config.num_layers
            switch = {"use_sliding_window": any(slides), "max_window_layers": first}
            return {**switch, "sliding_window": window, "layer_types": types}
        case "smollm3":
            switch = {
                "use_sliding_window": any(slides),
                "no_rope_layers": [int(kind.rope != "none") for kind in kinds],
            }
            return {**switch, "sliding_window": window, "layer_types": types}
        case _:
            return {"sliding_window": window, "layer_types": types}


def _rope_table(config: ModelConfig, scaling: RopeScaling) -> dict[str, object]:
    table: dict[str, object] = {"rope_type": scaling.kind, "factor": scaling.factor}
    match scaling.kind:
        case "linear":
            return table
        case "llama3":
            more: dict[str, object] = {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        case "longrope":
            # Readers derive these two from the lengths of context, and some accept no others.
            if scaling.factor == config.max_position / scaling.original_max_position:
                del table["factor"]
            more = {"long_factor": [*scaling.factors], "short_factor": [*scaling.short_factors]}
            if scaling.attention_factor is not None:
                more["attention_factor"] = scaling.attention_factor
        case _:
            more = {
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.magnitude,
                "truncate": scaling.truncate,
            }
    return table | more | {"original_max_position_embeddings": scaling.original_max_position}


def _named_scaling(config: ModelConfig) -> RopeScaling:
    """Return a stretching that `config.json` can name."""
    scaling = config.rope_scaling
    if scaling is None:
        raise AssertionError("only called for stretched frequencies")
    if scaling.kind == "yarn":  # said outright, as readers derive it in different ways
        return dataclasses.replace(scaling, attention_factor=scaling.magnitude)
    return _llama3_of(config, scaling) if scaling.kind == "factors" else scaling


def _llama3_of(config: ModelConfig, scaling: RopeScaling) -> RopeScaling:
    """Find the llama3 settings from which a GGUF file's divisors were computed.

    Llama 3.1 to 3.3 all keep frequencies of more than 4 turns and divide those of less than 1.
    """
    factor = float(np.float32(max(scaling.factors)))
    expected, _ = config.rope_frequencies()
    for context in _LLAMA3_CONTEXTS:
        found = RopeScaling(
            kind="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=context,
        )
        frequencies, _ = dataclasses.replace(config, rope_scaling=found).rope_frequencies()
        if np.allclose(frequencies, expected, rtol=_SAME, atol=0):
            return found
    raise UnsupportedError(
        "the rotary frequencies of this model are divided by numbers that follow no rule which "
        "config.json can name (expected those of Llama 3); convert from the original directory."
    )


def _check_round_trip(raw: dict[str, object], expected: ModelConfig) -> None:
    """Make sure that what was written means the same model."""
    back = ModelConfig.from_hf(raw)
    lost = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if getattr(back, field.name) != getattr(expected, field.name)
    ]
    if lost:
        said = ", ".join(f"{name} {getattr(expected, name)!r}" for name in lost)
        raise UnsupportedError(
            f"config.json has no words for {said} in the family {expected.model_type!r}; convert "
            "from the original directory."
        )
