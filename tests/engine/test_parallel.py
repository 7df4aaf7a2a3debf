"""Engines on several devices: the same tokens as on one, each device with its part only."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.cluster.options import ClusterOptions
from jaxserve.cluster.start import fleet_options, open_fleet
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.parallel import ParallelOptions
from jaxserve.engine.parallel import check_model, check_settings
from jaxserve.engine.source import load_model
from jaxserve.models.config import ModelConfig
from jaxserve.sharding import arrays
from jaxserve.sharding.mesh import engine_mesh
from tests.adapters import ALL, lora
from tests.cases import slow
from tests.tiny import write_tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / "oracles" / "golden" / "models"
DENSE, EXPERTS = "llama_gqa", "qwen3_moe_plain"
"""Four heads, two of keys and values; the second has eight experts."""
SMALL = {
    "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 8, "block_size": 8,
    "num_gpu_blocks_override": 32, "load_format": "safetensors",
}  # fmt: skip
PROMPTS = [[5, 9, 2, 17, 31, 8, 40, 41, 42, 43, 11, 12], [7, 7, 3]]
GREEDY = SamplingParams(
    max_tokens=5, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=2
)
EXPERT_PARALLEL = {
    "tensor_parallel_size": 2, "data_parallel_size": 4, "enable_expert_parallel": True,
}  # fmt: skip
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}


def run(name: str, **settings: object) -> tuple[list[list[int]], np.ndarray]:
    """Complete the prompts twice, in chunks and then from the prefix cache."""
    with LLM(GOLDEN / name, **SMALL | settings) as llm:
        outputs = [
            output for _ in range(2) for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        ]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 8, 0]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    scores = [
        entry[token].logprob
        for output, made in zip(outputs, tokens, strict=True)
        for token, entry in zip(made, output.outputs[0].logprobs, strict=True)
    ]
    return tokens, np.asarray(scores)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: run(name) for name in (DENSE, EXPERTS)}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        slow(DENSE, {"tensor_parallel_size": 2}),
        (DENSE, {"tensor_parallel_size": 4, "kv_layout": "pages"}),
        slow(DENSE, {"tensor_parallel_size": 4, **DRAFTS}),
        slow(DENSE, {"tensor_parallel_size": 2, "data_parallel_size": 4, "kv_layout": "pages"}),
        (DENSE, {"tensor_parallel_size": 4, "attention_backend": "pallas-xla"}),
        slow(DENSE, {"tensor_parallel_size": 2, "attention_backend": "pallas-reference"}),
        slow(EXPERTS, {"tensor_parallel_size": 4}),
        (EXPERTS, {"data_parallel_size": 8, "enable_expert_parallel": True}),
        (
            EXPERTS,
            {"tensor_parallel_size": 2, "data_parallel_size": 4, "enable_expert_parallel": True},
        ),
        slow(
            EXPERTS,
            {
                "tensor_parallel_size": 4, "data_parallel_size": 2,
                "enable_expert_parallel": True, "kv_layout": "pages", **DRAFTS,
            },
        ),
    ],
)  # fmt: skip
def test_any_mesh_gives_what_one_device_gives(alone, name: str, settings) -> None:
    tokens, scores = run(name, **settings)
    assert tokens == alone[name][0]
    np.testing.assert_allclose(scores, alone[name][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "what", "settings"),
    [
        (DENSE, {"adapter": ALL}, {"tensor_parallel_size": 4}),
        slow(EXPERTS, {"adapter": ALL[:4]}, EXPERT_PARALLEL),
        slow(DENSE, {"quantization": "int8"}, {"tensor_parallel_size": 4}),
        slow(DENSE, {"quantization": "fp8"}, {"tensor_parallel_size": 2}),
        (EXPERTS, {"quantization": "int8"}, EXPERT_PARALLEL),
        slow(
            DENSE,
            {"speculative_config": {
                "method": "draft_model", "model": str(GOLDEN / DENSE), "num_speculative_tokens": 2,
            }},
            {"tensor_parallel_size": 4},
        ),
    ],
)  # fmt: skip
def test_adapters_quantised_weights_and_drafts_work_on_meshes(name, what, settings) -> None:
    """The same tokens as on one device, and log-probabilities but for the last bits."""
    options = dict(what)
    targets = options.pop("adapter", None)
    adapter = lora(config_of(name), "a", 1, targets=targets, lora_alpha=16) if targets else None
    if adapter is not None:
        options |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}

    def complete(**more: object) -> tuple[list[list[int]], list[float]]:
        with LLM(GOLDEN / name, **SMALL | options | more) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=adapter)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        scores = [
            entry[token].logprob
            for output, made in zip(outputs, tokens, strict=True)
            for token, entry in zip(made, output.outputs[0].logprobs, strict=True)
        ]
        return tokens, scores

    tokens, scores = complete()
    found, close = complete(**settings)
    assert found == tokens
    np.testing.assert_allclose(close, scores, rtol=0, atol=1e-4)


def test_devices_hold_their_heads_and_their_experts(monkeypatch) -> None:
    """What is split never lies whole on a device, not even while it is loaded."""
    moved: list[tuple[tuple[int, ...], object]] = []
    parts: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    put, made = jax.device_put, jax.make_array_from_callback

    def spy_put(value: Any, where: Any = None, **options: Any) -> Any:
        moved.append((np.shape(value), where))
        return put(value, where, **options)

    def spy_made(shape: Any, sharding: Any, callback: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            piece = callback(index)
            parts.append((tuple(shape), piece.shape))
            return piece

        return made(shape, sharding, part)

    monkeypatch.setattr(arrays.jax, "device_put", spy_put)
    monkeypatch.setattr(arrays.jax, "make_array_from_callback", spy_made)
    config = EngineConfig.from_settings(
        {"tensor_parallel_size": 4, "data_parallel_size": 2, "enable_expert_parallel": True}
    )
    model = load_model(GOLDEN / EXPERTS, config)
    assert dict(model.mesh.shape) == {"data": 2, "tensor": 2, "copy": 2}
    number = [kind.has_experts for kind in model.config.kinds].index(True)
    layer = model.state["layers"][number]
    attention, experts = layer["self_attn"], layer["mlp"]["experts"]
    hidden, dim = model.config.hidden_size, model.config.head_dim
    up = experts["up_proj"]["kernel"].get_value()
    for leaf, part in (
        (attention["q_proj"]["kernel"].get_value(), (hidden, dim)),  # one head of four
        (attention["k_proj"]["kernel"].get_value(), (hidden, dim)),  # one head of two
        (attention["o_proj"]["kernel"].get_value(), (dim, hidden)),
        (up, (1, *up.shape[1:])),  # one expert of eight
    ):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {part}
    split = {whole for whole, piece in parts if piece != whole}
    assert tuple(up.shape) in split
    assert all(piece != whole for whole, piece in parts if whole in split)
    for shape, where in moved:
        assert getattr(where, "is_fully_replicated", True), f"{shape} was moved as a whole"


def test_a_cache_is_split_by_heads() -> None:
    with LLM(GOLDEN / DENSE, tensor_parallel_size=4, **SMALL) as llm:
        runner = llm.host.engine.runner
        for leaf in jax.tree.leaves((runner.slots, runner.pages)):
            assert {shard.data.shape[1] for shard in leaf.addressable_shards} == {1}


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            DENSE,
            {"tensor_parallel_size": 3},
            r"=3 does not divide attention heads \(4\), feed-forward width \(40\), heads of keys "
            r"and values \(2\) of this llama; use one of 1, 2, 4\.",
        ),
        (DENSE, {"enable_expert_parallel": True}, "needs a model with experts"),
        (
            EXPERTS,
            {"data_parallel_size": 3, "enable_expert_parallel": True},
            r"shares 8 experts among .* = 3 devices, .* make the product one of 1, 2, 4, 8\.",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(name, settings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_model(ParallelOptions(**settings), config_of(name))


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"=4 x data_parallel_size=4 needs as many devices, .*8"):
        engine_mesh(4, 4)
    with pytest.raises(ConfigError, match=r"=4 needs as many devices behind those of 2 other"):
        engine_mesh(4, replica=2)


class _Device:
    """Stands where a device of another host would."""

    platform = "gpu"

    def __init__(self, process_index: int, number: int) -> None:
        self.process_index, self.id = process_index, number


@pytest.mark.parametrize(
    ("per_host", "sizes", "words"),
    [
        ((4, 4), (4, 1), "and each must be used; take data_parallel_size=2"),
        ((6, 6), (4, 3), "share hosts of 6 devices with others"),
        ((4, 2), (2, 3), r"different numbers of devices: \[4, 2\]"),
    ],
)
def test_groups_lie_on_one_host_or_fill_several(monkeypatch, per_host, sizes, words) -> None:
    devices = [_Device(host, i) for host, count in enumerate(per_host) for i in range(count)]
    monkeypatch.setattr(jax, "process_count", lambda: len(per_host))
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ConfigError, match=words):
        engine_mesh(*sizes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"enable_lora": True}, "enable_lora: works on the devices of one process"),
        ({"sparse_attention": "p=0.9"}, "sparse_attention: works on"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(settings, words: str) -> None:
    config = EngineConfig.from_settings(
        {"dist_init_addr": "a:1", "nnodes": 2, "node_rank": 0} | settings
    )
    with pytest.raises(ConfigError, match=words):
        check_settings(config, is_live=False)


def test_groups_of_a_dense_model_are_replicas_with_devices_of_their_own(tmp_path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    config = EngineConfig.from_settings(
        {
            "tensor_parallel_size": 2, "data_parallel_size": 2, "max_model_len": 64,
            "max_num_seqs": 2, "max_num_batched_tokens": 8, "num_gpu_blocks_override": 32,
            "warmup": "lazy",
        }
    )  # fmt: skip
    options = fleet_options(ClusterOptions(routing_policy="round_robin"), config)
    assert options.replicas == 2
    llm = open_fleet(folder, options, config=config)
    try:
        roster = llm.host.fleet.roster
        used = [
            {device.id for device in slot.replica.host.engine.runner._everywhere.device_set}
            for slot in roster.slots
        ]
        assert used == [{0, 1}, {2, 3}]
        for slot in roster.slots:
            leaf = jax.tree.leaves(slot.replica.host.engine.runner.params)[0]
            ids = {device.id for device in leaf.sharding.device_set}
            assert ids == used[slot.index]
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({"replicas": 3}, {"data_parallel_size": 2}, "both say how many engines there are"),
        (
            {"replicas": 2},
            {"data_parallel_size": 2, "enable_expert_parallel": True},
            "one engine takes all devices",
        ),
    ],
)
def test_one_of_replicas_and_groups_is_given(options, settings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fleet_options(ClusterOptions(**options), EngineConfig.from_settings(settings))
