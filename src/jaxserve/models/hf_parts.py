"""Experts, compressed keys and values, and sinks, as a Hugging Face `config.json` describes them.

Source: transformers' configuration classes (keys and defaults).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxserve.core.errors import CheckpointError, ConfigError, UnsupportedError
from jaxserve.models.fields import Fields
from jaxserve.models.parts import ExpertsConfig, LatentConfig
from jaxserve.models.positions import RopeScaling, yarn_magnitude

MXFP4 = "mxfp4"
"""What Hugging Face calls the format in which gpt-oss is published."""
DEEPSEEK = ("deepseek_v2", "deepseek_v3")

_DEEPSEEK_DEFAULTS: Mapping[str, object] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
}
PARTS_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_local_experts": 128,
    },
    "olmoe": {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_local_experts": 64,
    },
    "gpt_oss": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
    "deepseek_v2": _DEEPSEEK_DEFAULTS
    | {
        "max_position_embeddings": 2048,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    "deepseek_v3": _DEEPSEEK_DEFAULTS
    | {
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
}
"""What a key means when a `config.json` leaves it out, for families with such parts."""


def layers_with_experts(values: Fields, family: str, num_layers: int) -> list[bool]:
    """Tell which layers have experts."""
    if family not in PARTS_DEFAULTS:
        return [False] * num_layers
    if family in DEEPSEEK:
        first = values.count("first_k_dense_replace", least=0)
        return [i >= first for i in range(num_layers)]
    if family != "qwen3_moe":
        return [True] * num_layers
    step = values.count("decoder_sparse_step")
    dense = values.get("mlp_only_layers", ())
    if not isinstance(dense, list | tuple):
        raise CheckpointError(
            f"{values.where}: found {dense!r} for 'mlp_only_layers', expected a list of layers; "
            "repair the file or download the model again."
        )
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]


def read_experts(values: Fields, family: str) -> dict[str, Any]:
    """Read how experts are chosen, and what they are.

    Returns:
        The argument `experts` of a `ModelConfig`, or nothing.

    Raises:
        UnsupportedError: For a variation that would not be computed right.
        CheckpointError: For a missing or impossible value; names the key.
    """
    if family not in PARTS_DEFAULTS:
        return {}
    try:
        return {"experts": _read_experts(values, family)}
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{values.where}: {error}") from error


def _read_experts(values: Fields, family: str) -> ExpertsConfig:
    if family in DEEPSEEK:
        return _read_deepseek_experts(values, family)
    top_k = values.count("num_experts_per_tok")
    if family == "gpt_oss" and "experts_per_token" in values:  # its first files
        top_k = values.count("experts_per_token")
    num_experts = values.count("num_experts", values.count("num_local_experts"))
    if family == "gpt_oss":
        return ExpertsConfig(
            num_experts=num_experts,
            top_k=top_k,
            inner_size=values.count("intermediate_size"),
            has_bias=True,
            swiglu_limit=values.number("swiglu_limit"),
            swiglu_alpha=values.number("swiglu_alpha"),
        )
    inner = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    return ExpertsConfig(
        num_experts=num_experts,
        top_k=top_k,
        inner_size=values.count(inner),
        normalize=family == "mixtral" or values.flag("norm_topk_prob"),
    )


def _read_deepseek_experts(values: Fields, family: str) -> ExpertsConfig:
    is_third = family == "deepseek_v3"
    _expect(values, "scoring_func", ["sigmoid" if is_third else "softmax"], family)
    _expect(values, "moe_layer_freq", [1, None], family)
    methods = ["noaux_tc"] if is_third else ["greedy", "group_limited_greedy"]
    _expect(values, "topk_method", methods, family)
    normalize = values.flag("norm_topk_prob")
    if normalize and not is_third:
        # Its authors' code and transformers' differ here; no published checkpoint has it.
        _refuse(values, "norm_topk_prob true", "false", family)
    inner = values.count("moe_intermediate_size")
    shared = values.count("n_shared_experts", 0, least=0) if "n_shared_experts" in values else 0
    is_grouped = is_third or values.get("topk_method") == "group_limited_greedy"
    return ExpertsConfig(
        num_experts=values.count("n_routed_experts"),
        top_k=values.count("num_experts_per_tok"),
        inner_size=inner,
        scoring="sigmoid" if is_third else "softmax",
        normalize=normalize,
        scale=values.number("routed_scaling_factor"),
        num_groups=values.count("n_group") if is_grouped else 1,
        top_groups=values.count("topk_group") if is_grouped else 1,
        group_score="top2" if is_third else "max",
        has_correction=is_third,
        shared_size=shared * inner,
    )


def _expect(values: Fields, key: str, allowed: Sequence[object], family: str) -> None:
    found = values.get(key)
    if found not in allowed:
        named = " or ".join(repr(word) for word in allowed if word is not None)
        _refuse(values, f"{key} {found!r}", named, family)


def _refuse(values: Fields, found: str, expected: str, family: str) -> NoReturn:
    raise UnsupportedError(
        f"{values.where}: found {found}, expected {expected}; this variation of {family} is not "
        "supported."
    )


def read_attention_parts(
    values: Fields, family: str, scaling: RopeScaling | None
) -> dict[str, Any]:
    """Read what is special about attention: sinks, clipping, compression.

    Args:
        values: The file.
        family: The model's family.
        scaling: How rotary frequencies are stretched.

    Returns:
        Arguments of a `ModelConfig`.
    """
    if family == "olmoe":
        clip = values.number("clip_qkv") if "clip_qkv" in values else None
        return {"qk_norm_per_head": False, "qkv_clip": clip}
    if family == "gpt_oss":
        return {"attention_sinks": True}
    if family not in DEEPSEEK:
        return {}
    try:
        latent = LatentConfig(
            rank=values.count("kv_lora_rank"),
            # An explicit null means that queries are projected directly.
            query_rank=values.count("q_lora_rank") if "q_lora_rank" in values else None,
            plain_dim=values.count("qk_nope_head_dim"),
            rotary_dim=values.count("qk_rope_head_dim"),
            value_dim=values.count("v_head_dim"),
            is_interleaved=family == "deepseek_v2" or values.flag("rope_interleave", default=True),
        )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{values.where}: {error}") from error
    return {
        "latent": latent,
        "num_kv_heads": 1,
        "head_dim": latent.cached_dim,
        "rotary_dim": latent.rotary_dim,
        "attention_scale": latent.query_dim**-0.5 * _latent_magnitude(values, scaling),
    }


def _latent_magnitude(values: Fields, scaling: RopeScaling | None) -> float:
    """Return what stretched frequencies multiply scores with, besides what rotation does."""
    if scaling is None:
        return 1.0
    table = values.table("rope_parameters") or values.table("rope_scaling") or {}
    scale = Fields(table, where=f"{values.where}, rope_scaling").number("mscale_all_dim", 0.0)
    return yarn_magnitude(scaling.factor, scale) ** 2 if scale else 1.0
