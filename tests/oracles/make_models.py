"""Write tiny random checkpoints of transformers, with the logits it computes from them.

Run in the oracle environment (torch and transformers; jaxserve is not imported):

    python tests/oracles/make_models.py                    # every case -> golden/models/<name>/
    python tests/oracles/make_models.py --cases NAME...    # some of them
    python tests/oracles/make_models.py --random SEED --out DIR   # one fresh random case -> DIR

Each directory holds an ordinary Hugging Face checkpoint (config.json, safetensors, tokenizer) and
`golden.npz`: for sequence i the ids `tokens_i` (a random prompt and its greedy continuation), the
logits `prefill_i` of the prompt in one forward pass, and the logits `decode_i` of the continuation,
fed one token at a time through the cache. Where there are experts, `routing_i` says which ones each
layer that has some chose for the prompt, `[layers, tokens, top_k]`, sorted.
Everything is float32 on the CPU with eager attention. `golden/models/meta.json` names the versions
and seeds.
"""

import argparse
import copy
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "models"
SEED = 20260101
PREFILL_LENGTHS = (3, 9, 24)
NUM_DECODE = 6
MIN_GAP = 1e-2
NOT_OF_THE_MODEL = ("family", "max_shard_size", "stored_dtype", "prefill_lengths")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""Common shape; head_dim times heads differs from hidden_size on purpose."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5, 2.0, 6.0, 8.0],
    "short_factor": [1.0, 1.1, 1.3, 2.0],
}

DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, dict] = {
    "llama_plain": {"family": "llama", "head_dim": 6},
    "llama_gqa": {"family": "llama", "num_key_value_heads": 2, "max_shard_size": "20KB"},
    "llama_tied": {"family": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama_llama3_rope": {
        "family": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "llama_linear_rope": {
        "family": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama_bias": {
        "family": "llama",
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2_plain": {
        "family": "qwen2",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2_tied_bfloat16": {
        "family": "qwen2",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "stored_dtype": "bfloat16",
    },
    "qwen3_plain": {
        "family": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
    },
    "qwen3_tied_bias": {
        "family": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "qwen2_window": {
        "family": "qwen2",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "mistral_window": {"family": "mistral", "num_key_value_heads": 2, "sliding_window": 7},
    "ministral_mixed": {
        "family": "ministral",
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma2_plain": {
        "family": "gemma2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 5,
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
    "gemma3_plain": {
        "family": "gemma3_text",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 5,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        "tie_word_embeddings": True,
    },
    "phi3_window": {"family": "phi3", "hidden_size": 32, "sliding_window": 6},
    "phi3_partial_tied": {
        "family": "phi3",
        "hidden_size": 32,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": True,
    },
    "phi3_long": {
        "family": "phi3",
        "hidden_size": 32,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 16,
        "rope_parameters": LONGROPE,
        "prefill_lengths": [17, 30],
    },
    "phi3_short": {
        "family": "phi3",
        "hidden_size": 32,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 64,
        "rope_parameters": LONGROPE,
    },
    "smollm3_plain": {
        "family": "smollm3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "no_rope_layer_interval": 2,
        "tie_word_embeddings": True,
    },
    "smollm3_window_bias": {
        "family": "smollm3",
        "num_key_value_heads": 2,
        "no_rope_layers": [0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3_moe_plain": {
        "family": "qwen3_moe",
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe_raw_weights": {
        "family": "qwen3_moe",
        "num_key_value_heads": 1,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "mixtral_plain": {
        "family": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral_window": {
        "family": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "sliding_window": 6,
        "max_shard_size": "40KB",
    },
    "olmoe_plain": {
        "family": "olmoe",
        "head_dim": 6,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 12,
    },
    "olmoe_clipped": {
        "family": "olmoe",
        "head_dim": 6,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "norm_topk_prob": True,
        "clip_qkv": 0.8,
        "attention_bias": True,
    },
    "gpt_oss_plain": {
        "family": "gpt_oss",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "intermediate_size": 16,
    },
    "gpt_oss_plain_rope": {
        "family": "gpt_oss",
        "num_key_value_heads": 1,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "swiglu_limit": 0.5,
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
    },
    "deepseek_v2_greedy": {
        "family": "deepseek_v2",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 12,
        "q_lora_rank": None,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "deepseek_v2_groups": {
        "family": "deepseek_v2",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 3.0,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 6,
        "rope_parameters": DEEPSEEK_YARN,
    },
    "deepseek_v3_plain": {
        "family": "deepseek_v3",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 12,
        "q_lora_rank": 12,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,  # what is rotated of it, in this family
        "attention_bias": True,
        "rope_parameters": DEEPSEEK_YARN,
    },
}

FAMILIES = {
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "ministral": (transformers.MinistralConfig, transformers.MinistralForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3")


def random_experts(family: str, rng: random.Random) -> dict:
    """Draw what only families with experts have."""
    groups, group = rng.choice([1, 2, 4]), rng.choice([2, 3, 4])
    experts, top_groups = groups * group, rng.randrange(1, groups + 1)
    case = {"num_experts_per_tok": rng.randrange(1, min(top_groups * group, 5) + 1)}
    if not family.startswith("deepseek"):
        case["num_local_experts" if family in ("mixtral", "gpt_oss") else "num_experts"] = experts
        if family in ("qwen3_moe", "olmoe"):
            case["norm_topk_prob"] = rng.random() < 0.5
        if family == "qwen3_moe":
            case["moe_intermediate_size"] = rng.randrange(4, 40, 4)
            case["decoder_sparse_step"] = rng.choice([1, 2])
        if family == "gpt_oss":
            case["swiglu_limit"] = rng.choice([0.5, 7.0])
            case["rope_parameters"] = rng.choice(
                [DEEPSEEK_YARN, {"rope_type": "default", "rope_theta": 1e5}]
            )
        return case
    case |= {
        "n_routed_experts": experts,
        "n_shared_experts": rng.choice([1, 2]),
        "n_group": groups,
        "topk_group": top_groups,
        "first_k_dense_replace": rng.choice([0, 1]),
        "moe_intermediate_size": rng.randrange(4, 40, 4),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "q_lora_rank": rng.choice([None, 12]),
        "kv_lora_rank": rng.randrange(4, 24, 2),
        "qk_nope_head_dim": rng.choice([3, 8, 16]),
        "qk_rope_head_dim": rng.choice([2, 4, 8]),
        "v_head_dim": rng.choice([4, 7, 16]),
        "rope_parameters": rng.choice([DEEPSEEK_YARN, {"rope_type": "default", "rope_theta": 1e5}]),
        "num_key_value_heads": None,
    }
    case["head_dim"] = case["qk_rope_head_dim"]
    if family == "deepseek_v2":
        case["topk_method"] = rng.choice(["greedy", "group_limited_greedy"])
    else:
        case["rope_interleave"] = rng.random() < 0.7
    return case


def random_gemma(family: str, rng: random.Random) -> dict:
    """Draw what only Gemma has."""
    case = {
        "query_pre_attn_scalar": rng.randrange(2, 40),
        "final_logit_softcapping": rng.choice([None, 3.0, 30.0]),
    }
    if family == "gemma2":
        case["attn_logit_softcapping"] = rng.choice([None, 1.0, 50.0])
        return case
    case["rope_parameters"] = {
        "full_attention": rng.choice(
            [
                {"rope_type": "default", "rope_theta": 1e6},
                {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            ]
        ),
        "sliding_attention": {"rope_type": "default", "rope_theta": rng.choice([500.0, 1e4])},
    }
    return case


def random_case(seed: int) -> dict:
    """Draw a configuration that none of the committed cases has."""
    rng = random.Random(seed)
    family = rng.choice(sorted(FAMILIES))
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    head_dim = rng.choice([4, 8, 16, 32])
    case = {
        "family": family,
        "vocab_size": rng.randrange(40, 300),
        "intermediate_size": rng.randrange(8, 96, 4),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "head_dim": head_dim,
        "hidden_size": kv_heads * group * rng.randrange(4, 12),  # a multiple of the heads
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.5,
    }
    if family in ("qwen2", "olmoe", "phi3"):  # these families have no head_dim of their own
        case["hidden_size"] = kv_heads * group * head_dim
    if family != "qwen2":
        case["attention_bias"] = rng.random() < 0.5
    if family in ("phi3", "mistral", "ministral", "mixtral"):
        del case["attention_bias"]
    if family in EXPERTS:
        case |= random_experts(family, rng)
    if family == "phi3":
        case["partial_rotary_factor"] = rng.choice([0.5, 1.0])
    types = rng.choices(["full_attention", "sliding_attention"], k=case["num_hidden_layers"])
    if family not in ("llama", "qwen2", "qwen3", "olmoe", "deepseek_v2", "deepseek_v3"):
        # Not 1: the cache of transformers then keeps every token, and its decode contradicts its
        # own forward pass over the whole sequence.
        case["sliding_window"] = rng.choice([2, 3, 5, 8, 13, 200])
    if family == "qwen3_moe":
        case["use_sliding_window"] = rng.random() < 0.5
    if family in ("gemma2", "gemma3_text", "ministral", "smollm3", "gpt_oss"):
        case["layer_types"] = types
    if family == "smollm3":
        case["use_sliding_window"] = True
        case["no_rope_layers"] = [rng.randrange(2) for _ in types]
    if family.startswith("gemma"):
        case |= random_gemma(family, rng)
    if family == "llama":
        case["mlp_bias"] = rng.random() < 0.5
        case["rope_parameters"] = rng.choice(
            [LLAMA3_ROPE, {"rope_type": "default", "rope_theta": rng.choice([500.0, 5e5])}]
        )
    return case


def build(case: dict, seed: int) -> transformers.PreTrainedModel:
    """Make the model of a case, with every weight, norm and bias drawn at random."""
    fields = {k: copy.deepcopy(v) for k, v in case.items() if k not in NOT_OF_THE_MODEL}
    make_config, make_model = FAMILIES[case["family"]]
    config = make_config(**{**SMALL, **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = make_model(config).eval().to(torch.float32)
    norm = 0.0 if case["family"].startswith("gemma") else 1.0  # what a norm's weight is near
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if "norm" in name:
                parameter.copy_(norm + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise * (0.3 if case.get("tie_word_embeddings") else 1.0))
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape))
        if case.get("stored_dtype"):
            for parameter in model.parameters():
                stored = parameter.to(getattr(torch, case["stored_dtype"]))
                parameter.copy_(stored.to(torch.float32))
    model.tie_weights()
    return model


def logits_of(
    model: transformers.PreTrainedModel, seed: int, lengths: Sequence[int] = PREFILL_LENGTHS
) -> dict[str, np.ndarray] | None:
    """Compute the logits of a few sequences: prefill at once, then greedy steps with the cache.

    Returns:
        The arrays; None where the two best tokens of a step nearly tie, so that another
        implementation could rightly take the other one.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    out: dict[str, np.ndarray] = {}
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    for i, length in enumerate(lengths):
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        with torch.no_grad():
            chosen.clear()
            result = model(ids, use_cache=True)
            if chosen:
                routing = torch.stack(chosen).sort(dim=-1).values
                out[f"routing_{i}"] = routing.numpy().astype(np.int32)
            prefill, cache, steps = result.logits[0], result.past_key_values, []
            last = prefill[-1]
            for _ in range(NUM_DECODE):
                best = last.topk(2)
                if best.values[0] - best.values[1] < MIN_GAP:
                    return None
                token = best.indices[:1][None]
                ids = torch.cat([ids, token], dim=1)
                last = model(token, past_key_values=cache, use_cache=True).logits[0, -1]
                steps.append(last)
        out[f"tokens_{i}"] = ids[0].numpy().astype(np.int32)
        out[f"prefill_{i}"] = prefill.numpy().astype(np.float32)
        out[f"decode_{i}"] = torch.stack(steps).numpy().astype(np.float32)
    return out


def word_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """Make a tokenizer whose words are `t0`, `t1`, ...: a checkpoint has one."""
    words = {f"t{index}": index for index in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def write(case: dict, seed: int, folder: Path) -> int:
    """Write the checkpoint of a case and what it computes; answer with the seed used."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lengths = case.get("prefill_lengths", PREFILL_LENGTHS)
    while (golden := logits_of(model := build(case, seed), seed, lengths)) is None:
        seed += 1000
    if case.get("stored_dtype"):
        model = model.to(getattr(torch, case["stored_dtype"]))
    model.save_pretrained(folder, max_shard_size=case.get("max_shard_size", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    word_tokenizer(model.config.vocab_size).save(str(folder / "tokenizer.json"))
    np.savez_compressed(folder / "golden.npz", **golden)
    return seed


def main() -> None:
    """Read the command line and write one random case, or all committed ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, metavar="SEED", help="one fresh random case")
    parser.add_argument("--out", type=Path, help="where the random case goes")
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="names of cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.random is not None:
        if args.out is None:
            parser.error("--random needs --out DIR")
        case = random_case(args.random)
        write(case, args.random, args.out)
        print(json.dumps(case))
        return
    seeds: dict[str, int] = {}
    if set(args.cases) != set(CASES):
        seeds = json.loads((GOLDEN / "meta.json").read_text())["seeds"]
    for number, (name, case) in enumerate(CASES.items()):
        if name not in args.cases:
            continue
        seeds[name] = write(case, SEED + number, GOLDEN / name)
        size = sum(path.stat().st_size for path in (GOLDEN / name).iterdir())
        print(f"{name}: {size / 1000:.0f} kB")
    meta = {
        "generator": "tests/oracles/make_models.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "dtype": "float32, eager attention, CPU",
        "seeds": seeds,
        "cases": CASES,
    }
    (GOLDEN / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main()
