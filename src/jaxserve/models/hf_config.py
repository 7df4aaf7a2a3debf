"""The meaning of a Hugging Face `config.json`, of old or new spelling.

Whatever would change the mathematics and is not supported is refused here, by name, so that no
model is ever run as if it were a slightly different one.

Source: transformers' configuration classes (keys and defaults).
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from jaxserve.core.errors import CheckpointError, ConfigError, UnsupportedError, did_you_mean
from jaxserve.models.fields import Fields
from jaxserve.models.hf_parts import (
    MXFP4,
    PARTS_DEFAULTS,
    layers_with_experts,
    read_attention_parts,
    read_experts,
)
from jaxserve.models.positions import (
    MOST_LAYERS,
    LayerKind,
    RopeScaling,
    stretched_length,
    yarn_magnitude,
)

_FAMILY_OF = {
    "llama": "llama",
    "mistral": "mistral",
    "ministral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "olmoe": "olmoe",
    "gpt_oss": "gpt_oss",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}
"""Hugging Face `model_type` -> our family."""

_MISTRAL: Mapping[str, object] = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_QWEN: Mapping[str, object] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: Mapping[str, object] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": 6,
}

_HF_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma2": _GEMMA
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    **PARTS_DEFAULTS,
}
"""What a key means when a `config.json` leaves it out; transformers' class defaults."""

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_hf_config(raw: Mapping[str, object]) -> dict[str, Any]:
    """Translate a `config.json` into our words.

    Args:
        raw: The parsed file.

    Returns:
        The arguments of a `ModelConfig`.

    Raises:
        UnsupportedError: For a model, or a variation of one, that would not be computed right.
        CheckpointError: For a missing or impossible value; names the key.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILY_OF:
        hint = did_you_mean(str(model_type), _FAMILY_OF)
        raise UnsupportedError(
            f"config.json: found model_type {model_type!r}, expected one of "
            f"{', '.join(_FAMILY_OF)}; this model family is not supported.{hint}"
        )
    if model_type == "gemma3":
        raw = _text_part(raw)
    values = Fields(raw, _HF_DEFAULTS[model_type])
    family = _FAMILY_OF[model_type]
    _refuse_variations(values, model_type)
    num_heads = values.count("num_attention_heads")
    hidden_size = values.count("hidden_size")
    num_layers = values.count("num_hidden_layers")
    head_dim = values.count("head_dim", hidden_size // num_heads)
    max_position = values.count("max_position_embeddings")
    theta, local_theta, scaling, rotary = _read_rope(values, model_type, max_position)
    return {
        "model_type": family,
        "vocab_size": values.count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": values.count("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": values.count("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": values.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "local_rope_theta": local_theta,
        "rope_scaling": scaling,
        "rotary_dim": None if rotary == 1.0 else int(head_dim * rotary),
        "max_position": stretched_length(max_position, scaling),
        "layer_kinds": _read_layer_kinds(values, model_type, num_layers, max_position),
        "tie_word_embeddings": values.flag("tie_word_embeddings"),
        "hidden_act": _ACTIVATIONS[str(_activation(values, family))],
        "eos_token_ids": values.token_ids("eos_token_id"),
        "bos_token_id": next(iter(values.token_ids("bos_token_id")), None),
        "torch_dtype": values.word("dtype") or values.word("torch_dtype"),
        **_read_biases(values, family),
        **_read_gemma(values, family, hidden_size),
        **read_experts(values, family),
        **read_attention_parts(values, family, scaling),
    }


def _text_part(raw: Mapping[str, object]) -> Mapping[str, object]:
    """Return the language model of a Gemma 3 that also sees; settings above it hold for it too."""
    text = Fields(raw).table("text_config")
    if text is None:
        raise CheckpointError(
            "config.json: found nothing for 'text_config', expected the language model's settings; "
            "repair the file or download the model again."
        )
    outer = ("quantization_config", "eos_token_id", "bos_token_id", "dtype", "torch_dtype")
    return {key: raw[key] for key in outer if key in raw} | dict(text)


def _activation(values: Fields, family: str) -> object:
    if family in {"gemma2", "gemma3"}:
        return values.get("hidden_activation", "gelu_pytorch_tanh")
    return values.get("hidden_act", "silu")


def _read_biases(values: Fields, family: str) -> dict[str, bool]:
    # mistral, mixtral and phi3 have no such switch; qwen2 always has biases on q, k and v, never on
    # o.
    has_switch = family not in {"mistral", "phi3", "qwen2", "mixtral"}
    attention_bias = has_switch and values.flag("attention_bias")
    return {
        "qkv_bias": attention_bias or family == "qwen2",
        "o_bias": attention_bias,
        "mlp_bias": family in {"llama", "smollm3"} and values.flag("mlp_bias"),
        "qk_norm": family in {"qwen3", "gemma3", "qwen3_moe", "olmoe"},
    }


def _read_gemma(values: Fields, family: str, hidden_size: int) -> dict[str, Any]:
    if family not in {"gemma2", "gemma3"}:
        return {}

    def cap(key: str) -> float | None:
        return values.number(key) if key in values else None

    return {
        "attention_scale": values.count("query_pre_attn_scalar") ** -0.5,
        # Gemma 3's own code has the setting but never caps attention.
        "attention_soft_cap": cap("attn_logit_softcapping") if family == "gemma2" else None,
        "final_soft_cap": cap("final_logit_softcapping"),
        "embedding_scale": hidden_size**0.5,
        "norm_plus_one": True,
    }


def _refuse(found: str, expected: str, model_type: str) -> NoReturn:
    raise UnsupportedError(
        f"config.json: found {found}, expected {expected}; this variation of {model_type} is "
        "not supported."
    )


def _refuse_variations(values: Fields, model_type: str) -> None:
    """Refuse what would be computed wrongly."""
    family = _FAMILY_OF[model_type]
    expected = "gelu_pytorch_tanh" if family in {"gemma2", "gemma3"} else "silu"
    act = _activation(values, family)
    if act != expected:
        name = "hidden_act" if expected == "silu" else "hidden_activation"
        _refuse(f"{name} {act!r}", repr(expected), model_type)
    method = (values.table("quantization_config") or {}).get("quant_method")
    # What gpt-oss is published in is read, and widened.
    is_readable = family == "gpt_oss" and method == MXFP4
    if values.get("quantization_config") is not None and not is_readable:
        raise UnsupportedError(
            f"config.json: found quantization_config with quant_method {method!r}, expected "
            "unquantised safetensors, or a GGUF file; get the original model, and quantise it as "
            "it is loaded with --quantization int8 or fp8."
        )
    if values.flag("use_bidirectional_attention"):
        _refuse("use_bidirectional_attention true", "false (causal attention)", model_type)
    if family == "llama" and values.flag("use_sliding_window"):
        found = "use_sliding_window true"
        _refuse(found, "false (attention over the whole context)", model_type)


# Layers -------------------------------------------------------------------------------------------


def _read_layer_kinds(
    values: Fields, model_type: str, num_layers: int, max_position: int
) -> tuple[LayerKind, ...]:
    """Return the kind of each layer; nothing if all are of the ordinary kind."""
    family = _FAMILY_OF[model_type]
    if family == "llama" and values.get("layer_types") is None:
        return ()
    if num_layers > MOST_LAYERS:
        raise CheckpointError(
            f"config.json: found {num_layers} for 'num_hidden_layers', expected at most "
            f"{MOST_LAYERS}; repair the file or download the model again."
        )
    experts = layers_with_experts(values, family, num_layers)
    rotates = _read_rope_layers(values, num_layers) if family == "smollm3" else [True] * num_layers
    slides = _read_sliding(values, family, num_layers, rotates)
    window: int | None = None
    if any(slides):
        if family == "llama":
            _refuse("layer_types sliding_attention", "full_attention in every layer", model_type)
        is_switched = family in {"qwen2", "qwen3", "qwen3_moe"}
        if is_switched and not values.flag("use_sliding_window"):
            found = "layer_types sliding_attention beside use_sliding_window false"
            _refuse(found, "full_attention in every layer", model_type)
        window = values.count("sliding_window")
    # A window as long as the longest context hides nothing.
    window = window if window is not None and window < max_position else None
    kinds = tuple(
        LayerKind(
            window=window if sliding else None,
            rope="none" if not rotated else "local" if sliding and family == "gemma3" else "global",
            has_experts=has_experts,
        )
        for sliding, rotated, has_experts in zip(slides, rotates, experts, strict=True)
    )
    return () if all(kind == LayerKind() for kind in kinds) else kinds


def _read_sliding(values: Fields, family: str, num_layers: int, rotates: list[bool]) -> list[bool]:
    """Tell which layers see a window only."""
    types = values.get("layer_types")
    if types is not None:
        return _read_layer_types(values, num_layers)
    has_window = "sliding_window" in values
    switched = has_window and values.flag("use_sliding_window")
    match family:
        case "mistral" | "phi3" | "mixtral":
            return [has_window] * num_layers
        case "qwen3_moe":
            return [switched] * num_layers
        case "qwen2" | "qwen3":
            first = values.number("max_window_layers")
            return [switched and i >= first for i in range(num_layers)]
        case "smollm3":
            return [switched and not rotated for rotated in rotates]
        case "gemma2" | "gpt_oss":
            return [i % 2 == 0 for i in range(num_layers)]
        case "gemma3":
            period = values.count("sliding_window_pattern")
            return [(i + 1) % period != 0 for i in range(num_layers)]
        case _:
            return [False] * num_layers


def _read_layer_types(values: Fields, num_layers: int) -> list[bool]:
    types = values.get("layer_types")
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list | tuple) or len(types) != num_layers:
        found = len(types) if isinstance(types, list | tuple) else types
        raise CheckpointError(
            f"config.json: found {found!r} for 'layer_types', expected a list with one word for "
            f"each of the {num_layers} layers; repair the file or download the model again."
        )
    other = sorted({str(kind) for kind in types} - known)
    if other:
        raise UnsupportedError(
            f"config.json: found layer_types {', '.join(other)}, expected full_attention or "
            "sliding_attention; such layers are not supported."
        )
    return [kind == "sliding_attention" for kind in types]


def _read_rope_layers(values: Fields, num_layers: int) -> list[bool]:
    """Tell which layers rotate queries and keys."""
    given = values.get("no_rope_layers")
    if given is None:
        interval = values.count("no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    is_list = isinstance(given, list | tuple)
    if not is_list or len(given) < num_layers or any(item not in (0, 1) for item in given):
        raise CheckpointError(
            f"config.json: found {given!r} for 'no_rope_layers', expected a list of 0 (does "
            f"not rotate) or 1 for each of the {num_layers} layers; repair the file or download "
            "the model again."
        )
    return [bool(item) for item in given[:num_layers]]


# Rotary frequencies -------------------------------------------------------------------------------


def _read_rope(
    values: Fields, model_type: str, max_position: int
) -> tuple[float, float | None, RopeScaling | None, float]:
    """Return the base of global and of local layers, the stretching, and the share rotated."""
    old = values.table("rope_scaling")
    table = values.table("rope_parameters") or old or {}
    where = "config.json, rope_parameters" if old is None else "config.json, rope_scaling"
    local: float | None = None
    if _FAMILY_OF[model_type] == "gemma3":
        local = values.number("rope_local_base_freq")
        if any(isinstance(item, Mapping) for item in table.values()):
            table, local = _split_rope(Fields(table, where=where), local)
    rope = Fields(table, where=where)
    theta = rope.number("rope_theta", values.number("rope_theta", 10000.0))
    rotary = rope.number("partial_rotary_factor", values.number("partial_rotary_factor", 1.0))
    if rotary != 1.0 and model_type != "phi3":
        raise UnsupportedError(
            f"{where}: found partial_rotary_factor {rotary}, expected 1.0; rotating a part of each "
            f"head is not supported for {model_type}."
        )
    kind = rope.word("rope_type") or rope.word("type") or "default"
    if model_type == "phi3" and kind in {"su", "yarn"}:  # what its first files call it
        kind = "longrope"
    if kind == "default":
        if any(isinstance(item, Mapping) for item in table.values()):
            raise UnsupportedError(
                f"{where}: found one entry per layer type ({', '.join(table)}), expected one for "
                "all layers; such models are not supported."
            )
        return theta, local, None, rotary
    return theta, local, _read_scaling(values, rope, kind, max_position), rotary


def _split_rope(rope: Fields, local: float) -> tuple[Mapping[str, object], float]:
    """Return the entry of the global layers and the base of the local ones."""
    whole, near = rope.table("full_attention") or {}, rope.table("sliding_attention") or {}
    fields = Fields(near, where=f"{rope.where}, sliding_attention")
    kind = fields.word("rope_type") or fields.word("type") or "default"
    if kind != "default":
        raise UnsupportedError(
            f"{fields.where}: found rope_type {kind!r}, expected default; stretched local layers "
            "are not supported."
        )
    return whole, fields.number("rope_theta", local)


def _read_scaling(values: Fields, rope: Fields, kind: str, max_position: int) -> RopeScaling:
    if kind not in {"linear", "llama3", "yarn", "longrope"}:
        raise UnsupportedError(
            f"{rope.where}: found rope_type {kind!r}, expected default, linear, llama3, yarn or "
            "longrope; remove the entry to use the model within its original context."
        )
    original = rope.count(
        "original_max_position_embeddings",
        values.count("original_max_position_embeddings", max_position),
    )
    is_ratio = kind in {"yarn", "longrope"}
    factor = rope.number("factor", max_position / original if is_ratio else None)
    try:
        match kind:
            case "linear":
                return RopeScaling(kind="linear", factor=factor)
            case "llama3":
                return RopeScaling(
                    kind="llama3",
                    factor=factor,
                    low_freq_factor=rope.number("low_freq_factor"),
                    high_freq_factor=rope.number("high_freq_factor"),
                    original_max_position=original,
                )
            case "longrope":
                given = "attention_factor" in rope
                return RopeScaling(
                    kind="longrope",
                    factor=factor,
                    original_max_position=original,
                    attention_factor=rope.number("attention_factor") if given else None,
                    factors=rope.numbers("long_factor"),
                    short_factors=rope.numbers("short_factor"),
                )
            case _:
                return RopeScaling(
                    kind="yarn",
                    factor=factor,
                    original_max_position=original,
                    beta_fast=rope.number("beta_fast", 32.0),
                    beta_slow=rope.number("beta_slow", 1.0),
                    attention_factor=_yarn_attention_factor(rope, factor),
                    truncate=rope.flag("truncate", default=True),
                )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{rope.where}: {error}") from error


def _yarn_attention_factor(rope: Fields, factor: float) -> float | None:
    given = rope.get("attention_factor")
    if given is not None:
        return rope.number("attention_factor")
    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return None
