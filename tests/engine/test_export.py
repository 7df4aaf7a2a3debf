"""Models written in the formats of the field: the same weights, tokens and texts come back."""

import json
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxserve
from jaxserve import LLM, SamplingParams
from jaxserve.cli.main import main
from jaxserve.core.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedError
from jaxserve.engine.export import export, load_params
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from tests.models.test_gguf import random_blocks, tiny_model
from tests.tiny import tiny_module, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "oracles" / "golden" / "models"
SCRIPT = ROOT / "tests" / "oracles" / "load_export.py"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = [
    "Hello world",
    "  two  spaces\n\nand 12345",
    "naïve café 🙂 日本",
    "<|im_start|>user\nx<|im_end|>",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def put_gguf(tmp_path_factory: pytest.TempPathFactory):
    """Write a small GGUF file with some metadata."""

    def write(metadata: dict, arch: str = "llama", **shape) -> Path:
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        path.write_bytes(tiny_model(arch, **shape, **metadata)[0])
        return path

    return write


def write_quantised(path: Path) -> Path:
    """Write a GGUF file whose embedding is packed."""
    blocks = random_blocks("Q8_0", 16)
    data, _ = tiny_model("llama", extra={"token_embd.weight": ("Q8_0", (16, 32), blocks)})
    path.write_bytes(data)
    return path


def tensors(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    try:
        return {name: checkpoint.read(name) for name in checkpoint.tensor_shapes()}
    finally:
        checkpoint.close()


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_nothing_is_lost(name: str, tmp_path: Path) -> None:
    """A directory that transformers wrote, to Orbax, and back to what transformers reads."""
    source = GOLDEN / name
    export(source, tmp_path / "orbax", to="orbax")
    export(tmp_path / "orbax", tmp_path / "hf", shard_size="20kB")
    assert_same(tensors(tmp_path / "hf"), tensors(source))
    config, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", source)
    )
    assert config == original
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / file).exists():
            found, expected = (
                json.loads((folder / file).read_text()) for folder in (tmp_path / "hf", source)
            )
            assert found == expected


def test_a_live_module_becomes_a_directory_and_gives_the_same(tmp_path: Path) -> None:
    module = tiny_module()
    prompt, sampling = [3, 5, 9, 2], SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    for to in ("hf", "orbax"):
        assert export(module, tmp_path / to, to=to) == tmp_path / to
        config, params = load_params(tmp_path / to)
        assert isinstance(config, ModelConfig)
        with LLM(module) as live, LLM((config, params)) as loaded:
            (expected,) = live.generate([prompt], sampling, use_tqdm=False)
            (found,) = loaded.generate([prompt], sampling, use_tqdm=False)
            tokens = jnp.asarray([prompt])
            logits = [llm.forward(tokens).logits for llm in (live, loaded)]
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        np.testing.assert_array_equal(*logits)


def test_a_served_model_is_exported_with_its_tokenizer(tiny: Path, tmp_path: Path) -> None:
    with LLM(tiny, max_model_len=256) as llm:
        model = (llm.model_config, llm.params)
        jaxserve.export(model, tmp_path / "out", dtype="bfloat16", tokenizer=llm.get_tokenizer())
    found, expected = tensors(tmp_path / "out"), tensors(tiny)
    assert_same(found, {k: v.astype(ml_dtypes.bfloat16) for k, v in expected.items()})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    ours, theirs = Tokenizer.from_path(tmp_path / "out"), Tokenizer.from_path(tiny)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.render_chat(CHAT) == theirs.render_chat(CHAT)
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.special_ids == theirs.special_ids


def test_params_come_in_the_type_and_on_the_mesh_asked_for(tiny: Path) -> None:
    from jaxserve.sharding.mesh import make_mesh

    config, params = jaxserve.load_params(tiny, dtype="bfloat16", mesh=make_mesh(2))
    kernel = params["layers"][0]["mlp"]["up_proj"]["kernel"].get_value()
    assert config.num_layers == 2
    assert kernel.dtype == jnp.bfloat16
    assert len(kernel.sharding.device_set) == 2


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_the_command_writes_what_the_command_serves(tiny: Path, tmp_path: Path, to: str, capsys):
    target = tmp_path / "out"
    words = ["convert", str(tiny), str(target), "--to", to, "--dtype", "float16"]
    assert main([*words, "--shard-size", "30kB", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert target.joinpath("params").is_dir() == (to == "orbax")
    assert len(list(target.glob("model-*.safetensors"))) == (3 if to == "hf" else 0)
    with LLM(target, max_model_len=128) as llm:
        assert llm.config.model.dtype == "float16" or llm.model_config.torch_dtype == "float16"
        (out,) = llm.chat(CHAT, SamplingParams(max_tokens=4), use_tqdm=False)
        assert len(out.outputs[0].token_ids) >= 1
    assert main([*words, "--quiet"]) == 1
    assert "out exists already; remove it, or choose another target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "gguf"}, "to must be one of hf, orbax, got 'gguf'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"shard_size": "5 pounds"}, "expected a size such as 5GB, 500MB or 2GiB, got '5 pounds'"),
        ({"load_format": "zip"}, "load_format must be auto, safetensors, gguf or orbax"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_written(tiny, tmp_path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        export(tiny, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere' not found: expected a path"):
        export("nowhere", tmp_path / "out")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_damaged_source_leaves_nothing(tiny: Path, tmp_path: Path, to: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        export(source, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_of_another_shape_are_named(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    with pytest.raises(
        CheckpointError, match=r"wrong shape: .*gate_proj.weight \(64, 32\) instead"
    ):
        export(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_may_be_left_out_or_come_from_elsewhere(tiny: Path, tmp_path: Path) -> None:
    export(tiny, tmp_path / "without", tokenizer="none")
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    export(tmp_path / "without", tmp_path / "with", tokenizer=tiny)
    assert (tmp_path / "with" / "tokenizer.json").exists()


def test_a_tokenizer_of_an_unknown_kind_is_said(tmp_path: Path, put_gguf) -> None:
    source = put_gguf({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a", "b"]})
    with pytest.raises(UnsupportedError, match="Or convert without it: --tokenizer none"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "out", tokenizer="none")


def test_a_gguf_file_without_a_tokenizer_and_with_sampling(tmp_path: Path, put_gguf) -> None:
    source = put_gguf({"general.sampling.temp": 0.5, "general.sampling.top_k": 20})
    export(source, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {
        "bos_token_id": 1, "eos_token_id": 2, "temperature": 0.5, "top_k": 20, "do_sample": True,
    }  # fmt: skip
    assert_same(tensors(tmp_path / "out"), tensors(source))
    assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_files_of_every_family_become_directories(tmp_path, put_gguf, arch, kind) -> None:
    source = put_gguf({}, arch, kind=kind, tied=arch != "qwen2")
    export(source, tmp_path / "hf")
    export(source, tmp_path / "orbax", to="orbax")
    for folder in (tmp_path / "hf", tmp_path / "orbax"):
        assert_same(tensors(folder), tensors(source))
        assert open_checkpoint(folder).config == open_checkpoint(source).config


def test_quantised_weights_become_what_is_computed_with(tmp_path: Path) -> None:
    source = write_quantised(tmp_path / "source.gguf")
    export(source, tmp_path / "hf")
    assert_same(tensors(tmp_path / "hf"), tensors(source))
    assert open_checkpoint(tmp_path / "hf").config.torch_dtype == "float32"


# Against transformers, and with the real model


def ask_transformers(python: Path, folder: Path, work: Path, **cases) -> dict:
    cases = {"with_logits": True, "num_new": 0} | cases
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    subprocess.run(
        [python, SCRIPT, folder, work / "cases.json", work / "out.json"], check=True, timeout=600
    )
    return json.loads((work / "out.json").read_text(encoding="utf-8"))


@pytest.mark.live_oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_from_it(name, tmp_path, oracle_python: Path) -> None:
    """From live parameters, so that every file is this package's own."""
    config, params = load_params(GOLDEN / name, dtype="float32")
    export((config, params), tmp_path / "hf", shard_size="20kB")
    with np.load(GOLDEN / name / "golden.npz") as data:
        count = sum(key.startswith("tokens_") for key in data)
        sequences = [data[f"tokens_{i}"] for i in range(count)]
        logits = [np.concatenate([data[f"prefill_{i}"], data[f"decode_{i}"]]) for i in range(count)]
    lengths = [len(value) for value in logits]
    sequences = [s[:n].tolist() for s, n in zip(sequences, lengths, strict=True)]
    found = ask_transformers(oracle_python, tmp_path / "hf", tmp_path, sequences=sequences)
    assert found["problems"] == []
    assert found["dtype"] == "float32"
    for ours, theirs in zip(found["logits"], logits, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.live_oracle
@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_transformers_reads_how_frequencies_are_stretched(kind, tmp_path, oracle_python) -> None:
    scaling = {"rope_type": kind, "factor": 4.0}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = 16
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    module = tiny_module(rope_scaling=scaling, max_position_embeddings=64)
    export(module, tmp_path / "hf")
    sequences = [np.random.default_rng(0).integers(0, 300, 48).tolist()]
    found = ask_transformers(oracle_python, tmp_path / "hf", tmp_path, sequences=sequences)
    with LLM(module, max_model_len=64) as llm:
        logits = llm.forward(jnp.asarray(sequences)).logits[0]
    np.testing.assert_allclose(found["logits"][0], logits, rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def converted(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as a Hugging Face directory."""
    return export(default_model, tmp_path_factory.mktemp("default") / "hf", shard_size="200MB")


PROMPTS = ["The capital of France is", "def fibonacci(n):", "Water boils at"]


def greedy(model: Path, dtype: str = "float32") -> tuple[list, list]:
    sampling = SamplingParams(temperature=0, max_tokens=24)
    with LLM(model, dtype=dtype, max_model_len=512, max_num_seqs=4) as llm:
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        outputs += llm.chat(CHAT, sampling, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs], [o.outputs[0].text for o in outputs]


@pytest.mark.weights
@pytest.mark.slow
def test_the_default_model_says_the_same_from_either_format(default_model, converted, tmp_path):
    expected = greedy(default_model)
    assert greedy(converted) == expected
    export(converted, tmp_path / "orbax", to="orbax")
    assert greedy(tmp_path / "orbax") == expected
    ours, theirs = Tokenizer.from_path(converted), Tokenizer.from_path(default_model)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode_chat(CHAT) == theirs.encode_chat(CHAT)
    assert (ours.eos_token_ids, ours.bos_token_id) == (theirs.eos_token_ids, theirs.bos_token_id)
    assert ours.special_ids == theirs.special_ids


@pytest.mark.live_oracle
@pytest.mark.weights
@pytest.mark.slow
def test_transformers_says_the_same_from_the_converted_default_model(
    converted: Path, default_model: Path, tmp_path: Path, oracle_python: Path
) -> None:
    tokenizer = Tokenizer.from_path(default_model)
    sequences = [tokenizer.encode(text) for text in PROMPTS] + [tokenizer.encode_chat(CHAT)]
    found = ask_transformers(
        oracle_python, converted, tmp_path,
        sequences=sequences, num_new=24, with_logits=False, texts=TEXTS, chats=[CHAT],
    )  # fmt: skip
    assert found["problems"] == []
    assert found["greedy"] == greedy(default_model)[0]
    assert found["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert found["chats"] == [[tokenizer.render_chat(CHAT), tokenizer.encode_chat(CHAT)]]
