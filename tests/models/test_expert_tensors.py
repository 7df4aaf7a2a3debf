"""Experts come from checkpoints as they are stored, go back as they came, and can be narrow."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxserve import LLM, LoRARequest, export
from jaxserve.attention.metadata import CausalPlan
from jaxserve.core.errors import CheckpointError, UnsupportedError
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.expert_tensors import widen_mxfp4
from jaxserve.models.fused import fuse
from jaxserve.models.loading import check_tensors, hf_name, load_params
from jaxserve.models.peft import read_adapter
from jaxserve.models.quantization import Quantization, dequantized, scale_path
from jaxserve.models.registry import (
    abstract_model,
    abstract_params,
    draw_params,
    fill,
    flatten_params,
)
from jaxserve.sharding.mesh import host_mesh
from jaxserve.sharding.rules import LogicalAxisRules
from tests.cases import slow
from tests.models.test_moe import WITH_EXPERTS
from tests.models.test_parity import GOLDEN


def stored(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def copied(source: Path, target: Path, tensors: dict[str, np.ndarray], **changes: object) -> Path:
    """Write a checkpoint with the configuration of another one."""
    config = json.loads((source / "config.json").read_text()) | changes
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, target / "model.safetensors"
    )
    return target


def describe(folder: Path, quantization: Quantization | None = None) -> dict:
    checkpoint = open_checkpoint(folder)
    _, state = abstract_model(
        checkpoint.config, dtype=jnp.dtype("float32"), quantization=quantization
    )
    checkpoint.close()
    return abstract_params(state, mesh=host_mesh(), rules=LogicalAxisRules())


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_tensors_go_back_as_they_came(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    check_tensors(checkpoint, describe(GOLDEN / name))
    ours = ((tensor, checkpoint.read(tensor)) for tensor in checkpoint.tensor_shapes())
    written = dict(fuse(checkpoint.config, ours))
    expected = stored(GOLDEN / name)
    assert written.keys() == expected.keys()
    for tensor, value in written.items():
        np.testing.assert_array_equal(value, expected[tensor], strict=True)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    source = GOLDEN / "mixtral_plain"
    tensors = stored(source)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    folder = copied(source, tmp_path / "model", tensors)
    with pytest.raises(CheckpointError, match=r"found 3 experts in .*up_proj.*expected 4"):
        open_checkpoint(folder)


def test_experts_of_several_shapes_are_refused(tmp_path: Path) -> None:
    source = GOLDEN / "olmoe_plain"
    tensors = stored(source)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    tensors[name] = tensors[name][:-1]
    with pytest.raises(CheckpointError, match="have several shapes"):
        open_checkpoint(copied(source, tmp_path / "model", tensors))


def test_layers_that_draft_are_left_out(tmp_path: Path) -> None:
    source = GOLDEN / "deepseek_v3_plain"
    tensors = stored(source)
    extra = {
        name.replace("layers.2.", "layers.3."): value
        for name, value in tensors.items()
        if ".layers.2." in name
    }
    extra["model.layers.3.eh_proj.weight"] = np.ones((24, 48), np.float32)
    folder = copied(source, tmp_path / "model", tensors | extra, num_nextn_predict_layers=1)
    checkpoint = open_checkpoint(folder)
    check_tensors(checkpoint, describe(folder))
    assert not any(".layers.3." in name for name in checkpoint.tensor_shapes())


# Four bits ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4))
def test_four_bits_mean_what_the_format_says(seed: int, rows: int, num_blocks: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, num_blocks, 32), np.uint8)
    scales = rng.integers(100, 150, (rows, num_blocks), np.uint8)
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    found = widen_mxfp4(codes[..., ::2] | codes[..., 1::2] << 4, scales)
    assert found.dtype == ml_dtypes.bfloat16
    expected = (numbers * factors[..., None]).reshape(rows, -1)
    np.testing.assert_array_equal(found.astype(np.float64), expected)


def narrow_gpt_oss(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a gpt-oss with experts of four bits; also return what these mean."""
    rng = np.random.default_rng(4)
    experts, hidden, inner = 3, 32, 64
    config = json.loads((GOLDEN / "gpt_oss_plain" / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_local_experts": experts,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    folder.mkdir()
    plain, tensors = {}, {}
    for path, spec in _described(config).items():
        if ".experts." not in path:
            shape = spec.shape[::-1] if path.endswith("kernel") else spec.shape
            tensors[hf_name(path).replace("mlp.gate.", "mlp.router.")] = rng.standard_normal(
                shape
            ).astype(np.float32)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
            scales = rng.integers(118, 124, (experts, rows, columns // 32), np.uint8)
            tensors[f"{prefix}{name}_blocks"], tensors[f"{prefix}{name}_scales"] = blocks, scales
            tensors[f"{prefix}{name}_bias"] = rng.standard_normal((experts, rows)).astype(
                np.float32
            )
            plain[f"{prefix}{name}"] = widen_mxfp4(blocks, scales).astype(np.float32)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder, plain


def _described(config: dict) -> dict:

    _, state = abstract_model(ModelConfig.from_hf(config), dtype=jnp.dtype("float32"))
    return abstract_params(state, mesh=host_mesh(), rules=LogicalAxisRules())


def test_published_files_of_gpt_oss_are_read(tmp_path: Path) -> None:
    folder, plain = narrow_gpt_oss(tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    loaded = load_params(checkpoint, describe(folder))
    for layer in range(2):
        both = plain[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = plain[f"model.layers.{layer}.mlp.experts.down_proj"]
        for name, rows in (("gate_proj", both[:, ::2]), ("up_proj", both[:, 1::2])):
            kernel = loaded[f"layers.{layer}.mlp.experts.{name}.kernel"]
            np.testing.assert_array_equal(kernel, rows.swapaxes(1, 2))
        kernel = loaded[f"layers.{layer}.mlp.experts.down_proj.kernel"]
        np.testing.assert_array_equal(kernel, down.swapaxes(1, 2))


def test_published_files_of_gpt_oss_are_written_wide(tmp_path: Path) -> None:
    folder, plain = narrow_gpt_oss(tmp_path / "model")
    wide = export(folder, tmp_path / "wide", tokenizer="none")
    assert "quantization_config" not in json.loads((wide / "config.json").read_text())
    found = stored(wide)["model.layers.0.mlp.experts.down_proj"]
    expected = plain["model.layers.0.mlp.experts.down_proj"].swapaxes(1, 2)
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    before, after = (load_params(open_checkpoint(f), describe(f)) for f in (folder, wide))
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])


def test_bytes_elsewhere_are_refused(tmp_path: Path) -> None:
    source = GOLDEN / "gpt_oss_plain"
    tensors = stored(source)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name].astype(np.uint8)
    folder = copied(source, tmp_path / "model", tensors)
    with pytest.raises(UnsupportedError, match="of type U8"):
        load_params(open_checkpoint(folder), describe(folder))


# Narrow weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        slow("qwen3_moe_plain", "int8"),
        slow("qwen3_moe_plain", "fp8"),
        slow("gpt_oss_plain", "int8"),
        ("gpt_oss_plain", "fp8"),
        ("deepseek_v3_plain", "int8"),
        slow("deepseek_v3_plain", "fp8"),
    ],
)
def test_narrow_experts_compute_with_the_numbers_that_they_stand_for(name, scheme) -> None:
    quantization = Quantization(scheme=scheme)
    checkpoint = open_checkpoint(GOLDEN / name)
    specs = describe(GOLDEN / name, quantization)
    narrow = load_params(checkpoint, specs)
    assert scale_path("layers.1.mlp.experts.up_proj.kernel") in narrow or name == "qwen3_moe_plain"
    assert not any(".mlp.gate." in path and path.endswith("_scale") for path in narrow)
    config = checkpoint.config
    wide = {path: jnp.asarray(value) for path, value in dequantized(narrow)}
    models = []
    for arrays, chosen in ((narrow, quantization), (wide, None)):
        graph, state = abstract_model(config, dtype=jnp.dtype("float32"), quantization=chosen)
        models.append(nnx.merge(graph, fill(state, arrays)))
    ids = jnp.arange(6)[None]
    caches = (None,) * config.num_layers
    with jax.default_matmul_precision("highest"):
        found, expected = (m(ids, ids, caches, CausalPlan())[0] for m in models)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    for path, spec in specs.items():
        if path.endswith("experts.down_proj.kernel_scale"):
            kernel = np.asarray(wide[path.removesuffix("_scale")], np.float64)
            largest = 127 if scheme == "int8" else 448
            expected_scale = np.abs(kernel).max(axis=-2) / largest
            assert spec.shape == expected_scale.shape
            np.testing.assert_allclose(narrow[path], expected_scale, rtol=1e-5)


def test_weights_are_drawn_for_experts_too() -> None:
    specs = describe(GOLDEN / "deepseek_v3_plain", Quantization(scheme="int8"))
    drawn = draw_params(specs, seed=1)
    assert {path: value.shape for path, value in drawn.items()} == {
        path: spec.shape for path, spec in specs.items()
    }
    plain = dict(dequantized(drawn))
    kernel = np.asarray(plain["layers.1.mlp.experts.up_proj.kernel"])
    assert kernel.std() == pytest.approx(kernel.shape[1] ** -0.5, rel=0.1)
    assert flatten_params(drawn).keys() == drawn.keys()


# Adapters -----------------------------------------------------------------------------------------


def adapter(module: str, in_size: int, out_size: int) -> LoRARequest:
    prefix = f"base_model.model.model.layers.0.{module}"
    return LoRARequest(
        "a",
        1,
        lora_tensors={
            f"{prefix}.lora_A.weight": np.ones((2, in_size), np.float32),
            f"{prefix}.lora_B.weight": np.ones((out_size, 2), np.float32),
        },
        peft_config={"r": 2, "target_modules": [module], "layers_to_transform": [0]},
    )


def test_adapters_of_experts_are_refused_by_name() -> None:
    config = open_checkpoint(GOLDEN / "qwen3_moe_plain").config
    attention = adapter("self_attn.q_proj", 24, 32)
    read = functools.partial(read_adapter, config=config, dtype=np.dtype("float32"), max_rank=4)
    assert list(read(attention).layers[0]) == ["self_attn.q_proj"]
    with pytest.raises(UnsupportedError, match=r"experts\.0\.up_proj.* not adapted.*q_proj"):
        read(adapter("mlp.experts.0.up_proj", 24, 20))


def test_latent_attention_has_no_adapters() -> None:
    with pytest.raises(UnsupportedError, match=r"enable_lora: .*latent attention"):
        LLM(GOLDEN / "deepseek_v2_greedy", enable_lora=True)
