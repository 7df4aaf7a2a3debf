"""Experts, compressed keys and values, and sinks, in the words of a Hugging Face `config.json`."""

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_parts import DEEPSEEK
from jaxserve.models.parts import ExpertsConfig
from jaxserve.models.positions import yarn_magnitude


def write_parts(config: ModelConfig) -> dict[str, object]:
    """Describe experts and special attention in the words that `read_experts` knows."""
    experts, latent, family = config.experts, config.latent, config.model_type
    if experts is None:
        return {}
    raw: dict[str, object] = {"num_experts_per_tok": experts.top_k}
    dense = [i for i, kind in enumerate(config.kinds) if not kind.has_experts]
    if family in DEEPSEEK:
        raw |= {
            "n_routed_experts": experts.num_experts,
            "moe_intermediate_size": experts.inner_size,
            "n_shared_experts": experts.shared_size // experts.inner_size,
            "routed_scaling_factor": experts.scale,
            "norm_topk_prob": experts.normalize,
            "n_group": experts.num_groups,
            "topk_group": experts.top_groups,
            "first_k_dense_replace": len(dense),
            "scoring_func": experts.scoring,
            "topk_method": "noaux_tc" if family == "deepseek_v3" else _v2_method(experts),
        }
    elif family == "qwen3_moe":
        raw |= {
            "num_experts": experts.num_experts,
            "moe_intermediate_size": experts.inner_size,
            "norm_topk_prob": experts.normalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }
    elif family == "gpt_oss":
        raw |= {
            "num_local_experts": experts.num_experts,
            "swiglu_limit": experts.swiglu_limit,
            "swiglu_alpha": experts.swiglu_alpha,
        }
    elif family == "olmoe":
        raw |= {
            "num_experts": experts.num_experts,
            "norm_topk_prob": experts.normalize,
            "clip_qkv": config.qkv_clip,
        }
    else:
        raw["num_local_experts"] = experts.num_experts
    if latent is not None:
        raw |= {
            "kv_lora_rank": latent.rank,
            "q_lora_rank": latent.query_rank,
            "qk_nope_head_dim": latent.plain_dim,
            "qk_rope_head_dim": latent.rotary_dim,
            "v_head_dim": latent.value_dim,
            "num_key_value_heads": config.num_heads,
            "head_dim": latent.rotary_dim,
        }
        if family == "deepseek_v3":
            raw["rope_interleave"] = latent.is_interleaved
    return raw


def _v2_method(experts: ExpertsConfig) -> str:
    return "group_limited_greedy" if experts.num_groups > 1 else "greedy"


def latent_scale_fields(config: ModelConfig) -> dict[str, object]:
    """Say in the table of a stretched rotation what it multiplies scores with."""
    latent, scaling = config.latent, config.rope_scaling
    if latent is None or scaling is None or config.attention_scale is None:
        return {}
    magnitude = (config.attention_scale * latent.query_dim**0.5) ** 0.5
    unit = yarn_magnitude(scaling.factor, 1.0) - 1.0
    if magnitude <= 1.0 or unit <= 0:
        return {}
    # Rounded to what somebody would have written, so that the same number is computed from it.
    return {"mscale_all_dim": round((magnitude - 1.0) / unit, 6)}
