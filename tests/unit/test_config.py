import dataclasses

import pytest

from jaxserve.core.config import (
    CacheOptions,
    EngineConfig,
    ModelOptions,
    RunnerOptions,
    SchedulerOptions,
    iter_options,
)
from jaxserve.core.errors import ConfigError
from jaxserve.core.parallel import ParallelOptions


def test_defaults_pass_their_own_checks():
    config = EngineConfig()
    assert config.cache.block_size == 16
    assert config.cache.enable_prefix_caching
    assert config.scheduler.max_num_seqs is None


def test_flat_settings_find_the_part_that_holds_them():
    config = EngineConfig.from_settings(
        {"max_num_seqs": 4, "block_size": 8, "dtype": "float32", "max_logprobs": 5}
    )
    assert config.scheduler.max_num_seqs == 4
    assert config.cache.block_size == 8
    assert config.model.dtype == "float32"
    assert config.runner.max_logprobs == 5


def test_no_settings_give_the_defaults():
    assert EngineConfig.from_settings({}) == EngineConfig()


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_settings({"max_num_seq": 4})
    assert str(caught.value) == "unknown setting 'max_num_seq'. Did you mean 'max_num_seqs'?"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().cache.block_size = 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelOptions(max_model_len=1), "max_model_len must be at least 2, got 1"),
        (lambda: CacheOptions(block_size=0), "block_size must be at least 1, got 0"),
        (
            lambda: CacheOptions(gpu_memory_utilization=1.5),
            r"gpu_memory_utilization must be in \(0, 1\], got 1.5",
        ),
        (
            lambda: CacheOptions(gpu_memory_utilization=0),
            r"gpu_memory_utilization must be in \(0, 1\], got 0",
        ),
        (
            lambda: CacheOptions(num_gpu_blocks_override=0),
            "num_gpu_blocks_override must be at least 1, got 0",
        ),
        (lambda: SchedulerOptions(max_num_seqs=0), "max_num_seqs must be at least 1, got 0"),
        (
            lambda: SchedulerOptions(max_num_batched_tokens=-5),
            "max_num_batched_tokens must be at least 1, got -5",
        ),
        (
            lambda: ParallelOptions(tensor_parallel_size=0),
            "tensor_parallel_size must be at least 1",
        ),
        (lambda: RunnerOptions(max_logprobs=-2), "max_logprobs must be at least -1, got -2"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("part", "name", "value", "hint"),
    [
        (ModelOptions, "dtype", "bfloat", "bfloat16"),
        (ModelOptions, "load_format", "ggufs", "gguf"),
        (CacheOptions, "kv_layout", "page", "pages"),
        (SchedulerOptions, "scheduling_policy", "fcsf", "fcfs"),
        (RunnerOptions, "attention_backend", "ref", None),
        (RunnerOptions, "warmup", "fully", "full"),
        (RunnerOptions, "logprobs_mode", "raw_logprob", "raw_logprobs"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_nearest_one(part, name, value, hint):
    with pytest.raises(ConfigError) as caught:
        part(**{name: value})
    assert f"{name} must be one of " in str(caught.value)
    assert repr(value) in str(caught.value)
    if hint is not None:
        assert f"Did you mean {hint!r}?" in str(caught.value)


def test_every_setting_is_described_and_named_once():
    names = [spec.name for _, spec in iter_options()]
    assert len(names) == len(set(names))
    for part, spec in iter_options():
        assert part in {field.name for field in dataclasses.fields(EngineConfig)}
        assert spec.metadata["help"], spec.name
        assert spec.metadata["help"].endswith("."), spec.name


def test_no_alias_collides_with_another_flag():
    flags = []
    for _, spec in iter_options():
        flags += [spec.name.replace("_", "-"), *spec.metadata["aliases"]]
    assert len(flags) == len(set(flags))
