"""GGUF files of families that store or name things in other ways than Llama does."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxserve.core.config import EngineConfig, ModelOptions
from jaxserve.core.errors import CheckpointError, UnsupportedError
from jaxserve.engine.scoring import forward
from jaxserve.engine.source import load_model
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.ggml import FORMATS, dequantize
from jaxserve.models.positions import LayerKind
from tests.models.test_gguf import (
    GGUF_NAMES,
    gguf_bytes,
    interleave,
    random_blocks,
    tiny_model,
)

GOLDEN = Path(__file__).resolve().parents[1] / "oracles" / "golden" / "models"
NAMES = ["gemma2_plain", "gemma3_plain", "phi3_partial_tied", "phi3_long", "smollm3_plain"]
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FUSED_NAMES = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}


def read_hf(name):
    """Return the raw configuration of a golden checkpoint and its weights as stored."""
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    return raw, safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")


def metadata_of(raw, arch):
    """Say of a model what llama.cpp's converter says."""
    rope = raw["rope_parameters"]
    rope = rope.get("full_attention", rope)
    share = rope.get("partial_rotary_factor", 1.0)
    values = {
        "vocab_size": raw["vocab_size"],
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(raw["head_dim"] * share),
        "attn_logit_softcapping": raw.get("attn_logit_softcapping"),
        "final_logit_softcapping": raw.get("final_logit_softcapping"),
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        ratio = raw["max_position_embeddings"] / original
        values["rope.scaling.original_context_length"] = original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(original))
    if arch.startswith("gemma"):
        values["attention.sliding_window"] = raw["sliding_window"]
    if arch == "gemma3":
        values["rope.freq_base_swa"] = raw["rope_parameters"]["sliding_attention"]["rope_theta"]
        values["attention.sliding_window_pattern"] = 3
    named = {f"{arch}.{key}": value for key, value in values.items() if value is not None}
    others = {"tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.eos_token_id": 2}
    return {"general.architecture": arch, **named, **others, "tokenizer.ggml.bos_token_id": 1}


def convert(name, *, fused_as=None, **changes):
    """Write a golden checkpoint as llama.cpp's converter would."""
    raw, weights = read_hf(name)
    arch = raw["model_type"].removesuffix("_text")
    names = GGUF_NAMES | FUSED_NAMES | (GEMMA_NAMES if arch.startswith("gemma") else {})
    tensors = {}
    for full, stored in weights.items():
        value = stored.astype(np.float32)
        if arch.startswith("gemma") and full.endswith("norm.weight"):
            value = value + 1
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if arch == "smollm3" and f".{part}_proj" in full:
                value = interleave(value, raw[heads])
        stem, _, kind = full.rpartition(".")
        target = names.get(stem)
        if target is None:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{names[part]}"
        tensors[f"{target}.{kind}"] = ("F32", value.shape, np.ascontiguousarray(value).tobytes())
    for length in ("long", "short"):
        factors = np.float32(raw["rope_parameters"].get(f"{length}_factor", ()))
        if len(factors):
            tensor = ("F32", factors.shape, factors.tobytes())
            tensors[f"rope_factors_{length}.weight"] = tensor
    metadata = metadata_of(raw, arch)
    for key, value in changes.items():
        metadata.pop(f"{arch}.{key}", None)
        if value is not None:
            metadata[f"{arch}.{key}"] = value
    return gguf_bytes(metadata, {**tensors, **(fused_as or {})})


@pytest.fixture
def put(tmp_path):
    """Write bytes to a file."""

    def write(data):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


def expected_config(name):
    """Say what a converted checkpoint must mean: the same, but for what the format lacks."""
    raw, _ = read_hf(name)
    config = ModelConfig.from_hf(raw)
    single = float(np.float32(config.rms_norm_eps))
    changes = {"rms_norm_eps": single}
    if config.norm_plus_one:  # the format derives the scale from the size of the heads
        changes["attention_scale"] = config.head_dim**-0.5
    if config.model_type == "smollm3":  # and takes every fourth layer
        changes["layer_kinds"] = (LayerKind(),) * 3
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        scaling = config.rope_scaling
        changes["rope_scaling"] = dataclasses.replace(
            scaling,
            attention_factor=float(np.float32(scaling.magnitude)),
            factors=tuple(np.float32(scaling.factors).tolist()),
            short_factors=tuple(np.float32(scaling.short_factors).tolist()),
        )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_files_mean_what_the_checkpoint_before_conversion_meant(put, name):
    original, converted = open_checkpoint(GOLDEN / name), open_checkpoint(put(convert(name)))
    assert dataclasses.replace(converted.config, layer_kinds=()) == dataclasses.replace(
        expected_config(name), layer_kinds=()
    )
    assert converted.config.kinds == expected_config(name).kinds
    assert converted.tensor_shapes() == original.tensor_shapes()
    for tensor in original.tensor_shapes():
        found, wanted = converted.read(tensor), original.read(tensor)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7)


def test_quantised_rows_of_fused_tensors_are_cut_between_blocks(put):
    raw, _ = read_hf("phi3_long")
    rows, kind = (4 + 2) * 8, next(kind for kind in FORMATS.values() if kind.name == "Q8_0")
    blocks = random_blocks("Q8_0", rows * raw["hidden_size"] // 32)
    tensor = {"blk.0.attn_qkv.weight": ("Q8_0", (rows, raw["hidden_size"]), blocks)}
    checkpoint = open_checkpoint(put(convert("phi3_long", fused_as=tensor)))
    parts = [
        checkpoint.read(f"model.layers.0.self_attn.{part}_proj.weight") for part in ("q", "k", "v")
    ]
    assert [len(part) for part in parts] == [32, 8, 8]
    np.testing.assert_array_equal(
        np.concatenate(parts), dequantize(blocks, kind).reshape(rows, raw["hidden_size"])
    )


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, [7, 7, None]),
        ({"attention.sliding_window_pattern": 2}, [7, None, 7]),
        ({"attention.sliding_window_pattern": [False, True, False]}, [None, 7, None]),
        ({"attention.sliding_window_pattern": None}, [7, 7, 7]),
        ({"attention.sliding_window": None}, [None] * 3),
        ({"attention.sliding_window": 128}, [None] * 3),
    ],
)
def test_layers_with_windows_are_those_of_the_pattern(put, changes, windows):
    config = open_checkpoint(put(convert("gemma3_plain", **changes))).config
    assert [kind.window for kind in config.kinds] == windows
    if changes.get("attention.sliding_window", 0) is not None:
        slides = [kind.rope == "local" for kind in config.kinds]
        assert slides == [window is not None for window in windows] or 128 in changes.values()


def test_every_fourth_layer_of_smollm3_does_not_rotate(put):
    data, weights = tiny_model("smollm3", **{"feed_forward_length": [64] * 2})
    config = open_checkpoint(put(data)).config
    assert [kind.rope for kind in config.kinds] == ["global", "global"]
    assert weights
    kinds = ModelConfig.from_hf(
        read_hf("smollm3_plain")[0]
        | {"num_hidden_layers": 8, "no_rope_layers": None, "layer_types": None}
        | {"no_rope_layer_interval": 4}
    ).kinds
    assert [kind.rope for kind in kinds] == (["global"] * 3 + ["none"]) * 2


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        ("gemma3_plain", {"attn_logit_softcapping": 50.0}, UnsupportedError, "attn_logit_softcapp"),
        ("smollm3_plain", {"attention.sliding_window": 8}, UnsupportedError, "sliding_window 8"),
        ("smollm3_plain", {"final_logit_softcapping": 8.0}, UnsupportedError, "final_logit_softc"),
        ("gemma2_plain", {"rope.dimension_count": 4}, UnsupportedError, "rope.dimension_count 4"),
        ("phi3_long", {"rope.dimension_count": 3}, CheckpointError, "rotary_dim must be even"),
        ("phi3_long", {"rope.dimension_count": 4}, CheckpointError, "expected rotary_dim / 2 = 2"),
        ("phi3_long", {"feed_forward_length": 41}, CheckpointError, r"expected 82 rows \(41 of"),
        ("gemma2_plain", {"block_count": 2**30}, CheckpointError, "found 1073741824 layers"),
        (
            "gemma3_plain",
            {"attention.sliding_window_pattern": [True]},
            CheckpointError,
            "found 1 values for 'gemma3.attention.sliding_window_pattern'",
        ),
    ],
)
def test_what_does_not_fit_is_named(put, name, changes, error, words):
    with pytest.raises(error, match=words):
        open_checkpoint(put(convert(name, **changes)))


@pytest.mark.live_oracle
@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_llama_cpp(put, tmp_path, oracle_python, name):
    path = put(convert(name))
    tokens = np.random.default_rng(0).integers(0, 64, 40)
    np.save(tmp_path / "tokens.npy", tokens)
    script = (
        "import sys, numpy as np, llama_cpp\n"
        "m = llama_cpp.Llama(sys.argv[1], n_ctx=128, logits_all=True, verbose=False, n_threads=1,\n"
        "                    type_k=0, type_v=0, flash_attn=False)\n"
        "m.eval(np.load(sys.argv[2]).tolist())\n"
        "np.save(sys.argv[3], m.scores[:m.n_tokens])"
    )
    subprocess.run(
        [oracle_python, "-c", script, path, tmp_path / "tokens.npy", tmp_path / "out.npy"],
        check=True,
        capture_output=True,
    )
    model = load_model(path, EngineConfig(model=ModelOptions(dtype="float32")))
    found = forward(model.graph, model.state, jnp.asarray(tokens, jnp.int32)[None]).logits[0]
    # llama.cpp looks its GELU and the products of its kernels up in half precision.
    np.testing.assert_allclose(found, np.load(tmp_path / "out.npy"), rtol=0, atol=0.03)
