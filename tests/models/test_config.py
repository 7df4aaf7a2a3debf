"""Configurations: what a config.json means, what is refused, and rotary frequencies."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import CheckpointError, ConfigError, JaxserveError, UnsupportedError
from jaxserve.models.config import ModelConfig
from jaxserve.models.positions import RopeScaling, stretched_length

TINY = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def read(**changes):
    return ModelConfig.from_hf({**TINY, **changes})


def test_llama_without_optional_keys_means_transformers_defaults():
    config = ModelConfig.from_hf(
        {k: v for k, v in TINY.items() if k not in {"rms_norm_eps", "max_position_embeddings"}}
    )
    assert config == ModelConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position=2048,
    )
    assert hash(config) == hash(read(rms_norm_eps=1e-6, max_position_embeddings=2048))


def test_an_explicit_null_is_a_missing_key():
    assert read(num_key_value_heads=None, head_dim=None, rope_scaling=None) == read()


@pytest.mark.parametrize(
    ("model_type", "qkv_bias", "o_bias", "qk_norm"),
    [("llama", False, False, False), ("qwen2", True, False, False), ("qwen3", False, False, True)],
)
def test_families_differ_in_biases_and_norms(model_type, qkv_bias, o_bias, qk_norm):
    config = read(model_type=model_type, num_key_value_heads=2)
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (qkv_bias, o_bias, qk_norm)
    assert config.model_type == model_type


def test_attention_bias_covers_all_four_projections_of_llama_and_qwen3_only():
    for model_type in ("llama", "qwen3"):
        config = read(model_type=model_type, attention_bias=True, num_key_value_heads=2)
        assert config.qkv_bias
        assert config.o_bias
    config = read(model_type="qwen2", attention_bias=True, num_key_value_heads=2)
    assert config.qkv_bias
    assert not config.o_bias
    assert read(mlp_bias=True).mlp_bias


def test_qwen3_heads_are_128_wide_unless_said_otherwise():
    assert read(model_type="qwen3", num_key_value_heads=2).head_dim == 128
    assert read(model_type="qwen3", num_key_value_heads=2, head_dim=8).head_dim == 8


def windows(**changes):
    return [kind.window for kind in read(**changes).kinds]


def test_mistral_is_llama_when_it_sees_the_whole_context():
    config = read(model_type="mistral", num_key_value_heads=2, sliding_window=None)
    assert config == dataclasses.replace(read(num_key_value_heads=2), model_type="mistral")
    assert config == read(model_type="mistral", num_key_value_heads=2, sliding_window=64)
    assert windows(model_type="mistral", num_key_value_heads=2, sliding_window=63) == [63, 63]
    long = {"model_type": "mistral", "num_key_value_heads": 2, "max_position_embeddings": 9999}
    assert windows(**long) == [4096, 4096]
    eight = read(model_type="mistral", num_attention_heads=16, sliding_window=None, head_dim=4)
    assert eight.num_kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gemma2", "sliding_window": 8}, [8, None, 8, None]),
        ({"model_type": "gemma3_text", "sliding_window": 8}, [8, 8, 8, 8]),
        (
            {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 3},
            [8, 8, None, 8],
        ),
        ({"model_type": "phi3", "sliding_window": 8}, [8, 8, 8, 8]),
        ({"model_type": "phi3"}, [None] * 4),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "max_window_layers": 2,
                "sliding_window": 9,
            },
            [None, None, 9, 9],
        ),
        ({"model_type": "qwen2", "sliding_window": 9}, [None] * 4),
        (
            {
                "model_type": "smollm3",
                "use_sliding_window": True,
                "sliding_window": 9,
                "no_rope_layer_interval": 2,
            },
            [None, 9, None, 9],
        ),
        (
            {
                "model_type": "ministral",
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            [None, 9, None, 9],
        ),
    ],
)
def test_layers_have_the_windows_of_their_family(changes, expected):
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2}
    assert windows(**sizes, **changes) == expected


def test_gemma_2_without_optional_keys_means_transformers_defaults():
    config = read(model_type="gemma2", num_attention_heads=8)
    assert (config.head_dim, config.num_kv_heads) == (256, 4)
    assert config.tie_word_embeddings
    assert (config.attention_soft_cap, config.final_soft_cap) == (50.0, 30.0)
    assert (config.attention_scale, config.embedding_scale) == (1 / 16, 4.0)
    assert (config.hidden_act, config.norm_plus_one) == ("gelu_tanh", True)
    assert read(model_type="gemma2", final_logit_softcapping=None).final_soft_cap is None


def test_the_old_spelling_of_gemma_3_stretches_its_global_layers_only():
    config = read(
        model_type="gemma3_text",
        num_hidden_layers=6,
        sliding_window=8,
        rope_theta=1e6,
        rope_local_base_freq=5e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert [kind.rope for kind in config.kinds] == ["local"] * 5 + ["global"]
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 5e3)
    dim = config.head_dim
    near, far = config.rope_frequencies("local")[0], config.rope_frequencies()[0]
    np.testing.assert_allclose(near, [5e3 ** (-2 * i / dim) for i in range(dim // 2)], rtol=1e-6)
    np.testing.assert_allclose(far, [1e6 ** (-2 * i / dim) / 8 for i in range(dim // 2)], rtol=1e-6)
    assert config.qk_norm


def test_the_language_model_of_a_gemma_3_that_sees_is_read():
    text = {k: v for k, v in TINY.items() if k not in {"model_type", "vocab_size"}}
    config = ModelConfig.from_hf(
        {
            "model_type": "gemma3",
            "text_config": {**text, "model_type": "gemma3_text"},
            "vision_config": {"hidden_size": 1152},
            "eos_token_id": [1, 106],
        }
    )
    assert (config.model_type, config.vocab_size) == ("gemma3", 262208)
    assert config.eos_token_ids == (1, 106)


def test_phi_3_rotates_a_part_and_chooses_its_factors_by_length():
    scaling = {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    config = read(
        model_type="phi3",
        head_dim=8,
        partial_rotary_factor=0.5,
        rope_scaling=scaling,
        original_max_position_embeddings=16,
    )
    assert config.rotary_dim == 4
    plain = np.float32([1.0, 10000.0**-0.5])
    for length, factors in ((16, [1, 2]), (17, [3, 4]), (64, [3, 4])):
        found, magnitude = config.for_length(length).rope_frequencies()
        np.testing.assert_allclose(found, plain / np.float32(factors), rtol=1e-6)
        assert magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    assert read().for_length(8) == read()


def test_token_ids_come_as_one_or_many():
    assert read(eos_token_id=2).eos_token_ids == (2,)
    assert read(eos_token_id=[5, 2, 5]).eos_token_ids == (5, 2)
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read(bos_token_id=1).bos_token_id == 1
    assert read().bos_token_id is None


def test_dtype_is_read_in_both_spellings():
    assert read(torch_dtype="bfloat16").torch_dtype == "bfloat16"
    assert read(dtype="float16", torch_dtype="bfloat16").torch_dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "found model_type 'lama'.*Did you mean 'llama'"),
        ({"model_type": None}, "found model_type None, expected one of llama"),
        ({"hidden_act": "gelu"}, "found hidden_act 'gelu', expected 'silu'"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quant_method 'awq', expected unquantised safetensors.*--quantization int8 or fp8",
        ),
        ({"partial_rotary_factor": 0.5}, "found partial_rotary_factor 0.5, expected 1.0"),
        ({"use_bidirectional_attention": True}, "found use_bidirectional_attention true"),
        (
            {"model_type": "gemma2", "hidden_activation": "gelu"},
            "found hidden_activation 'gelu', expected 'gelu_pytorch_tanh'",
        ),
        (
            {"model_type": "gemma3_text", "layer_types": ["chunked_attention"] * 2},
            "found layer_types chunked_attention, expected full_attention or sliding_attention",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"]},
            "sliding_attention beside use_sliding_window false",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            "sliding_attention: found rope_type 'linear', expected default",
        ),
        ({"use_sliding_window": True}, "found use_sliding_window true"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "found layer_types sliding_attention, expected full_attention in every layer",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "found rope_type 'dynamic'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "one entry per layer type",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "found partial_rotary_factor 0.5",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(changes, words):
    with pytest.raises(UnsupportedError, match=words):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "found nothing for 'hidden_size', expected a whole number"),
        ({"vocab_size": "32"}, "found '32' for 'vocab_size'"),
        ({"num_hidden_layers": 0}, "found 0 for 'num_hidden_layers'"),
        ({"num_hidden_layers": True}, "found True for 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": math.nan}, "found nan for 'rms_norm_eps'"),
        ({"rope_theta": 1.0}, "rope_theta must be greater than 1"),
        ({"tie_word_embeddings": "yes"}, "found 'yes' for 'tie_word_embeddings'"),
        ({"eos_token_id": [1, -2]}, "expected a token id"),
        ({"layer_types": ["full_attention"]}, "found 1 for 'layer_types'.*each of the 2 layers"),
        ({"model_type": "gemma2", "sliding_window": None}, "found nothing for 'sliding_window'"),
        ({"model_type": "gemma2", "num_hidden_layers": 2**30}, "expected at most 16384"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1.0}, "final_soft_cap must be posit"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"found \[1\] for 'no_rope_layers'"),
        ({"model_type": "gemma3"}, "found nothing for 'text_config'"),
        (
            {"model_type": "phi3", "head_dim": 6, "partial_rotary_factor": 0.5},
            "rotary_dim must be even and between 2 and head_dim 6, got 3",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}},
            "found nothing for 'long_factor', expected a list of numbers",
        ),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0, "x"]},
            },
            "found 'x' for '1', expected a number",
        ),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]},
            },
            "rope factors: found 1, expected head_dim / 2 = 2",
        ),
        ({"rope_scaling": [1]}, "for 'rope_scaling', expected an object"),
        ({"rope_scaling": {"type": 3}}, "for 'type', expected a word"),
        ({"rope_scaling": {"type": "linear"}}, "found nothing for 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                }
            },
            "0 < low_freq_factor < high_freq_factor",
        ),
    ],
)
def test_bad_values_are_named(changes, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read(**changes)
    assert str(caught.value).count("config.json") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "llama3", "factor": 2.0},
        {"kind": "yarn", "original_max_position": 8, "beta_slow": 64.0},
        {"kind": "factors", "factors": (1.0, -1.0)},
    ],
)
def test_impossible_scalings_are_refused(changes):
    with pytest.raises(ConfigError, match=r"rope (scaling|factors)"):
        RopeScaling(**changes)


def test_the_number_of_factors_must_fit_the_heads():
    raw = read()
    with pytest.raises(ConfigError, match="found 3, expected head_dim / 2 = 2"):
        ModelConfig(
            **{name: getattr(raw, name) for name in raw.__slots__ if name != "rope_scaling"},
            rope_scaling=RopeScaling(kind="factors", factors=(1.0, 1.0, 1.0)),
        )


def test_old_and_new_rope_spellings_mean_the_same():
    stretch = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **stretch})
    old = read(rope_scaling={"type": "llama3", **stretch}, rope_theta=5e5)
    assert new == old
    assert new.rope_theta == 5e5
    assert new.rope_scaling is not None
    assert new.rope_scaling.original_max_position == 16
    default = read(rope_parameters={"rope_type": "default", "rope_theta": 7e4})
    assert (default.rope_theta, default.rope_scaling) == (7e4, None)


def test_yarn_lengthens_the_stated_context():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read(rope_scaling=scaling).max_position == 256
    assert read(rope_scaling=scaling, max_position_embeddings=512).max_position == 512
    assert stretched_length(7, RopeScaling(kind="linear", factor=4.0)) == 7


# What the formulas say, pair by pair, in Python's double precision.


def plain_frequency(theta, dim, pair):
    return theta ** (-2 * pair / dim)


def llama3_frequency(theta, dim, pair, s):
    frequency = plain_frequency(theta, dim, pair)
    wavelength = 2 * math.pi / frequency
    old = s.original_max_position
    if wavelength < old / s.high_freq_factor:
        return frequency
    if wavelength > old / s.low_freq_factor:
        return frequency / s.factor
    smooth = (old / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def yarn_frequency(theta, dim, pair, s):
    def index(turns):
        return dim * math.log(s.original_max_position / (turns * 2 * math.pi)) / 2 / math.log(theta)

    low, high = max(math.floor(index(s.beta_fast)), 0), min(math.ceil(index(s.beta_slow)), dim - 1)
    mix = min(1.0, max(0.0, (pair - low) / (high - low if high > low else 0.001)))
    frequency = plain_frequency(theta, dim, pair)
    return mix * frequency / s.factor + (1 - mix) * frequency


@pytest.mark.parametrize(("theta", "dim"), [(10000.0, 8), (100000.0, 64), (500000.0, 128)])
@pytest.mark.parametrize(
    ("scaling", "formula"),
    [
        (None, lambda t, d, i, s: plain_frequency(t, d, i)),
        (
            RopeScaling(kind="linear", factor=4.0),
            lambda t, d, i, s: plain_frequency(t, d, i) / 4,
        ),
        (RopeScaling(kind="llama3", factor=8.0, original_max_position=8192), llama3_frequency),
        (
            RopeScaling(
                kind="llama3",
                factor=32.0,
                low_freq_factor=1.5,
                high_freq_factor=2.0,
                original_max_position=100,
            ),
            llama3_frequency,
        ),
        (RopeScaling(kind="yarn", factor=4.0, original_max_position=32768), yarn_frequency),
    ],
)
def test_frequencies_follow_the_formulas(theta, dim, scaling, formula):
    config = ModelConfig(
        model_type="llama",
        vocab_size=8,
        hidden_size=dim,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=dim,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=64,
    )
    found, magnitude = config.rope_frequencies()
    assert found.dtype == np.float32
    expected = [formula(theta, dim, pair, scaling) for pair in range(dim // 2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    is_yarn = scaling is not None and scaling.kind == "yarn"
    assert magnitude == pytest.approx(0.1 * math.log(4.0) + 1 if is_yarn else 1.0)


def test_factors_divide_the_frequencies_one_by_one():
    factors = RopeScaling(kind="factors", factors=(1.0, 4.0))
    config = read()
    stretched = ModelConfig(
        **{name: getattr(config, name) for name in config.__slots__ if name != "rope_scaling"},
        rope_scaling=factors,
    )
    plain, _ = config.rope_frequencies()
    found, magnitude = stretched.rope_frequencies()
    np.testing.assert_array_equal(found, plain / np.float32([1, 4]))
    assert magnitude == 1.0


@pytest.mark.parametrize(
    ("given", "magnitude"),
    [
        ({}, 0.1 * math.log(40) + 1),
        ({"attention_factor": 0.5}, 0.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {"mscale": 2.0, "mscale_all_dim": 1.0},
            (0.2 * math.log(40) + 1) / (0.1 * math.log(40) + 1),
        ),
    ],
)
def test_yarn_magnitude(given, magnitude):
    scaling = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}
    config = read(rope_scaling={**scaling, **given})
    assert config.rope_frequencies()[1] == pytest.approx(magnitude)


PARTS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "clip_qkv", "swiglu_limit"),
    *("n_routed_experts", "n_shared_experts", "n_group", "topk_group", "topk_method"),
    *("scoring_func", "routed_scaling_factor", "first_k_dense_replace", "quantization_config"),
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
"""Keys of families with experts."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *TINY,
                "num_key_value_heads",
                "head_dim",
                "rope_theta",
                "rope_scaling",
                "dtype",
                "rope_parameters",
                "eos_token_id",
                "layer_types",
                "sliding_window",
                "hidden_act",
                "layer_types",
                "no_rope_layers",
                "partial_rotary_factor",
                "rope_local_base_freq",
                "sliding_window_pattern",
                "text_config",
                "query_pre_attn_scalar",
                "final_logit_softcapping",
                *PARTS,
            ]
        ),
        json_values,
        max_size=5,
    ),
    st.sampled_from(
        [
            *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3"),
            *("smollm3", "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
        ]
    ),
)
def test_any_values_give_a_configuration_or_one_of_our_errors(changes, model_type):
    with contextlib.suppress(JaxserveError):
        read(**{"model_type": model_type, **changes})
