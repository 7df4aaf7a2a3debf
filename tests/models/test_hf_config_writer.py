"""Configurations written as config.json mean the same model to every reader."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import UnsupportedError
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config_writer import write_hf_config
from jaxserve.models.positions import LayerKind, RopeScaling

GOLDEN = Path(__file__).resolve().parents[1] / "oracles" / "golden" / "models"
PLAIN = ModelConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_position=131072,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=(2, 5),
    bos_token_id=1,
    torch_dtype=None,
)


def back(config: ModelConfig, dtype: str = "float32") -> ModelConfig:
    """Write, read as a file would be, and return what was understood."""
    return ModelConfig.from_hf(json.loads(json.dumps(write_hf_config(config, dtype=dtype))))


@pytest.mark.parametrize("folder", sorted(p.parent for p in GOLDEN.glob("*/config.json")), ids=str)
def test_what_transformers_wrote_survives(folder: Path) -> None:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    dtype, scaling = config.torch_dtype or "float32", config.rope_scaling
    if scaling is not None and scaling.kind == "yarn":  # written outright
        scaling = dataclasses.replace(scaling, attention_factor=scaling.magnitude)
    expected = dataclasses.replace(config, torch_dtype=dtype, rope_scaling=scaling)
    assert back(config, dtype) == expected


@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    factor=st.floats(1, 64),
    tied=st.booleans(),
    family=st.sampled_from(["llama", "qwen2", "qwen3"]),
    bias=st.booleans(),
    eos=st.lists(st.integers(0, 63), unique=True, max_size=3),
)
def test_every_model_survives(kind, factor, tied, family, bias, eos) -> None:
    scaling = RopeScaling(
        kind=kind, factor=factor, original_max_position=0 if kind == "linear" else 4096
    )
    config = dataclasses.replace(
        PLAIN,
        model_type=family,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
        eos_token_ids=tuple(eos),
        max_position=max(131072, round(factor * 4096)),
    )
    found = back(config)
    assert dataclasses.replace(found, rope_scaling=None, torch_dtype=None) == dataclasses.replace(
        config, rope_scaling=None
    )
    for ours, theirs in zip(config.rope_frequencies(), found.rope_frequencies(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


SEES_8, NEAR, FIXED = LayerKind(window=8), LayerKind(window=8, rope="local"), LayerKind(rope="none")
GEMMA = {
    "hidden_act": "gelu_tanh",
    "norm_plus_one": True,
    "embedding_scale": 24**0.5,
    "attention_scale": 8**-0.5,
    "final_soft_cap": 30.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"model_type": "mistral", "layer_kinds": (SEES_8,) * 2},
        {"model_type": "mistral", "layer_kinds": (SEES_8, LayerKind())},
        {"model_type": "qwen2", "qkv_bias": True, "layer_kinds": (LayerKind(), SEES_8)},
        {"model_type": "qwen3", "qk_norm": True, "layer_kinds": (SEES_8, SEES_8)},
        {"model_type": "qwen3", "qk_norm": True, "layer_kinds": (SEES_8, LayerKind())},
        {"model_type": "smollm3", "layer_kinds": (FIXED, LayerKind())},
        {"model_type": "smollm3", "layer_kinds": (LayerKind(window=8, rope="none"), LayerKind())},
        {"model_type": "phi3", "layer_kinds": (SEES_8, SEES_8), "rotary_dim": 4},
        {"model_type": "gemma2", "attention_soft_cap": 50.0, "layer_kinds": (SEES_8, LayerKind())}
        | GEMMA,
        {"model_type": "gemma2", "final_soft_cap": None} | GEMMA,
        {
            "model_type": "gemma3",
            "qk_norm": True,
            "local_rope_theta": 10000.0,
            "layer_kinds": (NEAR, LayerKind()),
            "rope_scaling": RopeScaling(kind="linear", factor=8.0),
        }
        | GEMMA,
        {
            "model_type": "gemma3",
            "qk_norm": True,
            "local_rope_theta": 10000.0,
            "layer_kinds": (LayerKind(rope="local"), LayerKind()),
        }
        | GEMMA,
        {
            "model_type": "phi3",
            "rope_scaling": RopeScaling(
                kind="longrope",
                factor=32.0,
                original_max_position=4096,
                factors=(1.0, 2.0, 3.0, 4.0),
                short_factors=(1.0, 1.0, 1.0, 2.0),
            ),
        },
    ],
)
def test_windows_and_caps_survive(changes) -> None:
    config = dataclasses.replace(PLAIN, **changes)
    assert back(config) == dataclasses.replace(config, torch_dtype="float32")


def test_windows_of_several_lengths_are_refused() -> None:
    config = dataclasses.replace(
        PLAIN, model_type="mistral", layer_kinds=(SEES_8, LayerKind(window=9))
    )
    with pytest.raises(UnsupportedError, match=r"several lengths \(\[8, 9\]\)"):
        write_hf_config(config, dtype="float32")


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (4.0, 16384)])
def test_divisors_of_a_gguf_file_get_their_name_back(factor: float, context: int) -> None:
    named = dataclasses.replace(
        PLAIN,
        rope_scaling=RopeScaling(
            kind="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=context,
        ),
        head_dim=64,
    )
    plain, _ = dataclasses.replace(named, rope_scaling=None).rope_frequencies()
    stretched, _ = named.rope_frequencies()
    divisors = tuple((plain / stretched).tolist())
    config = dataclasses.replace(named, rope_scaling=RopeScaling(kind="factors", factors=divisors))
    assert back(config) == dataclasses.replace(named, torch_dtype="float32")


def test_divisors_without_a_rule_are_refused() -> None:
    factors = RopeScaling(kind="factors", factors=(1.0, 3.0, 2.0, 8.0))
    with pytest.raises(UnsupportedError, match=r"follow no rule which config.json can name"):
        write_hf_config(dataclasses.replace(PLAIN, rope_scaling=factors), dtype="float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True}, "no words for o_bias False in the family 'llama'"),
        ({"qk_norm": True}, "no words for qk_norm True in the family 'llama'"),
        ({"model_type": "qwen2", "o_bias": True, "qkv_bias": True}, "no words for o_bias True"),
    ],
)
def test_what_the_format_cannot_say_is_refused(changes, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        write_hf_config(dataclasses.replace(PLAIN, **changes), dtype="float32")


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'mamba' cannot be described as a config.json"):
        write_hf_config(dataclasses.replace(PLAIN, model_type="mamba"), dtype="float32")
