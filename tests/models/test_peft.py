"""What an adapter's files may hold, and one clear message for everything else."""

import json
import shutil
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import CheckpointError, ConfigError, JaxserveError, LoRARequest, UnsupportedError
from jaxserve.models.config import ModelConfig
from jaxserve.models.lora import GROUPS, pack_layer, target_sizes
from jaxserve.models.peft import read_adapter
from tests.adapters import ALL, adapter_of, write_adapter
from tests.models.test_lora import GOLDEN as ADAPTERS
from tests.models.test_lora import MODELS
from tests.tiny import tiny_module

CONFIG = tiny_module().config
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def read(tensors, options, config=CONFIG, *, dtype="float32", max_rank=8):
    request = LoRARequest("one", 1, lora_tensors=tensors, peft_config=options)
    return read_adapter(request, config, dtype=np.dtype(dtype), max_rank=max_rank)


def refused(kind, tensors, options, **limits):
    with pytest.raises(JaxserveError) as caught:
        read(tensors, options, **limits)
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_arrays_and_files_mean_the_same(prefix, tmp_path):
    tensors, options = adapter_of(CONFIG, seed=1, rank=3, lora_alpha=6, prefix=prefix)
    folder = write_adapter(tmp_path / "one", tensors, options)
    request = LoRARequest("one", 1, str(folder))
    from_file = read_adapter(request, CONFIG, dtype=np.dtype("float32"), max_rank=8)
    from_arrays = read(tensors, options)
    assert from_file.key == from_arrays.key
    assert from_file.rank == 3
    first, second = from_file.layers[0]["self_attn.q_proj"]
    stem = f"{prefix}model.layers.0.self_attn.q_proj.lora_"
    np.testing.assert_array_equal(first, tensors[f"{stem}A.weight"].T)
    np.testing.assert_allclose(second, 2 * tensors[f"{stem}B.weight"].T, rtol=1e-6)


def test_keys_tell_content_and_names_apart():
    tensors, options = adapter_of(CONFIG, seed=1)
    keys = {read(tensors, options).key, read(tensors, options | {"lora_alpha": 5}).key}
    request = LoRARequest("two", 2, lora_tensors=tensors, peft_config=options)
    keys.add(read_adapter(request, CONFIG, dtype=np.dtype("float32"), max_rank=8).key)
    changed = dict(tensors)
    changed[f"{Q0}B.weight"] = changed[f"{Q0}B.weight"] + np.float32(1e-6)
    keys.add(read(changed, options).key)
    assert len(keys) == 4
    assert read(tensors, options).key in keys


def test_phi3_is_taken_apart_as_its_weights_are():
    folder = MODELS / "phi3_partial_tied"
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    request = LoRARequest("all", 1, str(ADAPTERS / "phi3_partial_tied" / "all"))
    adapter = read_adapter(request, config, dtype=np.dtype("float32"), max_rank=8)
    layer = adapter.layers[0]
    assert {name for group in GROUPS for name in group} == set(layer)
    for name, (first, second) in layer.items():
        assert (len(first), second.shape[1]) == target_sizes(config)[name]
    assert layer["self_attn.q_proj"][0] is layer["self_attn.v_proj"][0]


@given(st.integers(1, 6), st.sets(st.sampled_from(ALL), min_size=1), st.integers(0, 99))
@settings(max_examples=20)
def test_packing_pads_and_loses_nothing(rank, targets, seed):
    tensors, options = adapter_of(CONFIG, seed=seed, rank=rank, targets=tuple(sorted(targets)))
    layer = read(tensors, options).layers[0]
    packed = pack_layer(layer, CONFIG, rank=8, dtype=np.dtype("float32"))
    total = sum(np.square(a, dtype=float).sum() + np.square(b, dtype=float).sum()
                for a, b in layer.values())  # fmt: skip
    np.testing.assert_allclose(np.square(packed, dtype=float).sum(), total)
    assert np.count_nonzero(packed) == sum(a.size + b.size for a, b in layer.values())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias=all"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"target_modules": ["q_proj", "lm_head"]}, "output projection"),
        ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name(options, word):
    tensors, plain = adapter_of(CONFIG, seed=1)
    with pytest.raises(UnsupportedError, match=word):
        read(tensors, plain | options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"r": 0}, "found 0 for 'r'"),
        ({"r": "four"}, "found 'four' for 'r'"),
        ({"lora_alpha": None, "r": 4, "alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern holds .* no regular expression"),
        ({"target_modules": "("}, "target_modules holds .* no regular expression"),
        ({"target_modules": [1]}, "target_modules must be a word or a list of words"),
        ({"layers_to_transform": ["x"]}, "layers_to_transform must be"),
    ],
)
def test_a_damaged_configuration_is_named(options, word):
    tensors, plain = adapter_of(CONFIG, seed=1)
    with pytest.raises(CheckpointError, match=word):
        read(tensors, plain | options)


def test_a_rank_that_is_too_large_says_what_to_do():
    message = refused(ConfigError, *adapter_of(CONFIG, seed=1, rank=9))
    assert "has rank 9, but at most 8 can be served" in message
    assert "--max-lora-rank 9" in message
    pattern = adapter_of(CONFIG, seed=1, rank=9, r=4, rank_pattern={".*_proj": 9})
    assert "rank 9" in refused(ConfigError, *pattern)


def test_missing_and_extra_tensors_are_named():
    tensors, options = adapter_of(CONFIG, seed=1)
    del tensors[f"{Q0}B.weight"]
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)
    message = refused(CheckpointError, tensors, options)
    assert "missing: model.layers.0.self_attn.q_proj.lora_B.weight" in message
    assert "without a place in the model: base_model.model.lm_head.lora_A.weight" in message
    tensors, options = adapter_of(CONFIG, seed=1, targets=("q_proj",))
    options["target_modules"] = ["q_proj", "v_proj"]
    assert "missing: model.layers.0.self_attn.v_proj.lora_A" in refused(
        CheckpointError, tensors, options
    )
    options["target_modules"] = ["v_proj"]
    assert "without a place in the model: base_model.model.model.layers.0.self_attn.q_proj" in (
        refused(CheckpointError, tensors, options)
    )
    assert "lora_A" in refused(CheckpointError, {}, {"r": 4, "target_modules": []})


def test_an_adapter_of_another_model_is_refused_by_its_shapes():
    other = tiny_module(hidden_size=48, intermediate_size=64).config
    message = refused(CheckpointError, *adapter_of(other, seed=1))
    assert "down_proj.lora_B.weight of shape (48, 4), expected (32, 4)" in message
    deeper = tiny_module(num_hidden_layers=3).config
    assert "layers.2." in refused(CheckpointError, *adapter_of(deeper, seed=1))
    phi3 = tiny_module(model_type="phi3", pad_token_id=0).config
    assert "self_attn.qkv_proj" in refused(
        CheckpointError, *adapter_of(CONFIG, seed=1), config=phi3
    )


def test_the_rank_of_the_tensors_must_be_that_of_the_configuration():
    tensors, options = adapter_of(CONFIG, seed=1, r=5)
    assert "for rank 5" in refused(CheckpointError, tensors, options)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_numbers_must_be_finite_in_the_precision_of_the_model(value):
    tensors, options = adapter_of(CONFIG, seed=1)
    tensors[f"{Q0}A.weight"][0, 0] = value
    where = " in float16" if np.isfinite(value) else ""
    message = refused(CheckpointError, tensors, options, dtype="float16")
    assert f"q_proj.lora_A.weight holds infinite or undefined numbers{where};" in message
    if np.isfinite(value):
        read(tensors, options, dtype=ml_dtypes.bfloat16)


def test_what_is_no_array_is_named():
    tensors, options = adapter_of(CONFIG, seed=1)
    assert "no array of numbers" in refused(CheckpointError, tensors | {"x": "words"}, options)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    good = write_adapter(tmp_path / "good", *adapter_of(CONFIG, seed=1))

    def changed(change):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(ConfigError) as caught:
            read_adapter(
                LoRARequest("bad", 1, str(folder)), CONFIG, dtype=np.dtype("float32"), max_rank=8
            )
        return str(caught.value)

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    whole = (good / weights).read_bytes()
    assert "no such file" in changed(lambda f: (f / config).unlink())
    assert "not valid JSON" in changed(lambda f: (f / config).write_text("{"))
    assert f"found no {weights}" in changed(lambda f: (f / weights).unlink())
    assert "save it again as safetensors" in changed(
        lambda f: (f / weights).rename(f / "adapter_model.bin")
    )
    for content in (b"", whole[: len(whole) // 2], whole[:4], b"\0" * 100):
        assert "not a whole safetensors file" in changed(
            lambda f, content=content: (f / weights).write_bytes(content)
        )
    assert "no such folder" in changed(shutil.rmtree)


def test_unknown_options_are_warned_about(caplog):
    tensors, options = adapter_of(CONFIG, seed=1)
    read(tensors, options | {"new_thing": True, "old_thing": None})
    assert "['new_thing'] are unknown" in caplog.text
    assert "old_thing" not in caplog.text


def test_every_golden_adapter_is_read(caplog):
    start = time.perf_counter()
    for path in sorted(ADAPTERS.glob("*/*/adapter_config.json")):
        config = ModelConfig.from_hf(
            json.loads((MODELS / path.parent.parent.name / "config.json").read_text())
        )
        request = LoRARequest("one", 1, str(Path(path).parent))
        assert read_adapter(request, config, dtype=np.dtype("float32"), max_rank=8).num_bytes
    assert not caplog.messages
    assert time.perf_counter() - start < 5
