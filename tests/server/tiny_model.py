"""A checkpoint of a few kilobytes with random weights and one token per byte."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 32, 2, 4, 2, 8, 64
MAX_LEN = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ prefix }}{% endif %}"
)


def write_tiny_model(folder: Path) -> Path:
    """Write config, weights and tokenizer into a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id("<|im_end|>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "add_bos_token": False})
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": vocab,
                "hidden_size": HIDDEN,
                "intermediate_size": MLP,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "head_dim": HEAD_DIM,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": MAX_LEN,
                "tie_word_embeddings": False,
                "hidden_act": "silu",
                "eos_token_id": end,
                "torch_dtype": "float32",
            }
        )
    )
    safetensors.numpy.save_file(_weights(vocab), folder / "model.safetensors")
    return folder


def _tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL])
    return made


def _weights(vocab: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)

    def draw(*shape: int, scale: float = 0.25) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": draw(vocab, HIDDEN, scale=1.0),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": draw(vocab, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": draw(MLP, HIDDEN),
            prefix + "mlp.up_proj.weight": draw(MLP, HIDDEN),
            prefix + "mlp.down_proj.weight": draw(HIDDEN, MLP),
        }
    return weights
