"""Safetensors directories, choosing a format, and the way of weights onto devices."""

import json
import struct
import threading
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.core.errors import (
    CheckpointError,
    ConfigError,
    JaxserveError,
    ModelNotFoundError,
    UnsupportedError,
)
from jaxserve.models.buffer import empty_buffer, prepare_buffer
from jaxserve.models.checkpoint import Checkpoint, open_checkpoint
from jaxserve.models.loading import SafetensorsCheckpoint, check_tensors, hf_name, load_params
from jaxserve.models.registry import abstract_model, path_name

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 12, 20, 4, 2, 6, 2

CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def weights_of(*, tied=False, dtype=np.float32):
    """Draw the weights of a two-layer model, by Hugging Face name."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def abstract_of(weights, dtype=jnp.float32, sharding=None):
    """Describe the parameters that these weights fill, written out by hand."""
    described = {}
    for name, value in weights.items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if stem == "embed_tokens":
            path, shape = f"{stem}.embedding", value.shape
        elif "norm" in stem:
            path, shape = f"{stem}.scale", value.shape
        else:
            path, shape = f"{stem}.kernel", value.shape[::-1]
        described[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return described


@pytest.fixture
def put(tmp_path):
    """Write a checkpoint: one file, or one per shard with an index."""

    def write(weights, *, config=CONFIG, shards=1, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        if shards == 1:
            save_file(weights, tmp_path / "model.safetensors")
            return tmp_path
        index, names = {}, list(weights)
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: weights[name] for name in names[shard::shards]}
            save_file(part, tmp_path / file)
            index |= dict.fromkeys(part, file)
        write_index(tmp_path, index)
        return tmp_path

    return write


def write_index(folder, weight_map):
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_read_as_it_was_written(put, shards, tied):
    weights = weights_of(tied=tied)
    config = {**CONFIG, "tie_word_embeddings": tied}
    checkpoint = open_checkpoint(put(weights, config=config, shards=shards))
    assert isinstance(checkpoint, Checkpoint)
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    shapes = checkpoint.tensor_shapes()
    assert shapes == {name: value.shape for name, value in weights.items()}
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, strict=True)
    assert not checkpoint.is_quantized
    assert checkpoint.config.tie_word_embeddings == tied
    checkpoint.close()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_keep_their_type(put, dtype):
    weights = weights_of(dtype=dtype)
    checkpoint = open_checkpoint(put(weights))
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, strict=True)


PHI3 = {**CONFIG, "model_type": "phi3"}


def fused(weights):
    """Put tensors together as Phi-3 stores them."""
    groups = {
        "self_attn.qkv_proj": [f"self_attn.{part}_proj" for part in "qkv"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    }
    stored = dict(weights)
    for layer in range(LAYERS):
        for name, parts in groups.items():
            names = [f"model.layers.{layer}.{part}.weight" for part in parts]
            whole = np.concatenate([stored.pop(part) for part in names])
            stored[f"model.layers.{layer}.{name}.weight"] = whole
    return stored


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fused_tensors_are_cut_apart(put, dtype):
    weights = weights_of(dtype=dtype)
    checkpoint = open_checkpoint(put(fused(weights), config=PHI3, shards=2))
    assert checkpoint.tensor_shapes() == {name: value.shape for name, value in weights.items()}
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, strict=True)


def test_fused_tensors_of_another_size_are_refused(put):
    path = put(fused(weights_of()), config={**PHI3, "num_key_value_heads": 1})
    words = (
        r"found 'model.layers.0.self_attn.qkv_proj.weight' of shape \(48, 12\), expected 36 rows"
    )
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_model_that_sees_is_read_alone(put, prefix):
    weights = weights_of(tied=True)
    stored = {prefix + name.removeprefix("model."): value for name, value in weights.items()}
    stored["model.vision_tower.blocks.0.weight"] = np.ones(3, np.float32)
    stored["multi_modal_projector.norm.weight"] = np.ones(3, np.float32)
    text = {**CONFIG, "model_type": "gemma3_text"}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    checkpoint = open_checkpoint(put(stored, config=config))
    assert checkpoint.tensor_shapes() == {name: value.shape for name, value in weights.items()}
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, strict=True)


def test_one_tensor_under_two_names_is_refused(put):
    weights = weights_of()
    weights["language_model.model.norm.weight"] = weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"found tensor 'model.norm.weight' twice, as"):
        open_checkpoint(put(weights))


def test_shards_without_an_index_are_all_read(put, tmp_path):
    path = put(weights_of(), shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert open_checkpoint(path).tensor_shapes().keys() == weights_of().keys()


def test_the_generation_config_adds_ends_of_text(put):
    generation = {"eos_token_id": [7, 2], "temperature": 0.5}
    checkpoint = open_checkpoint(put(weights_of(), generation=generation))
    assert checkpoint.config.eos_token_ids == (2, 7)
    assert checkpoint.generation_config == generation
    (checkpoint.path / "generation_config.json").unlink()
    assert open_checkpoint(checkpoint.path).generation_config == {}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("embed_tokens.embedding", "model.embed_tokens.weight"),
        ("layers.11.self_attn.q_proj.kernel", "model.layers.11.self_attn.q_proj.weight"),
        ("layers.11.self_attn.q_proj.bias", "model.layers.11.self_attn.q_proj.bias"),
        ("layers.0.input_layernorm.scale", "model.layers.0.input_layernorm.weight"),
        ("norm.scale", "model.norm.weight"),
        ("lm_head.kernel", "lm_head.weight"),
    ],
)
def test_paths_translate_into_hugging_face_names(path, name):
    assert hf_name(path) == name


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_of_this_package_are_filled(put, tied):
    """The names that the model itself has are those that loading understands."""
    config = {**CONFIG, "tie_word_embeddings": tied}
    checkpoint = open_checkpoint(put(weights_of(tied=tied), config=config))
    _, state = abstract_model(checkpoint.config, dtype=jnp.dtype("float32"))
    described = {
        path_name(path): jax.ShapeDtypeStruct(value.get_value().shape, value.get_value().dtype)
        for path, value in nnx.to_flat_state(state)
    }
    assert described == abstract_of(weights_of(tied=tied))
    assert load_params(checkpoint, described).keys() == described.keys()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, None])
def test_parameters_are_transposed_cast_and_placed(put, dtype):
    weights = weights_of()
    mesh = jax.make_mesh((1,), ("x",))
    place = jax.NamedSharding(mesh, jax.P())
    described = abstract_of(weights, jnp.float16, place)
    checkpoint = open_checkpoint(put(weights, shards=2))
    params = load_params(checkpoint, described, dtype=dtype)
    assert list(params) == list(described)
    for path, array in params.items():
        value = weights[hf_name(path)]
        expected = (value.T if path.endswith(".kernel") else value).astype(dtype or jnp.float16)
        np.testing.assert_array_equal(np.asarray(array), expected, strict=True)
        assert array.sharding == place


def test_parameters_do_not_change_with_the_file(put):
    """On a CPU the arrays are host memory; it must not be that of the file."""
    weights = weights_of()
    path = put(weights)
    checkpoint = open_checkpoint(path)
    params = load_params(checkpoint, abstract_of(weights))
    checkpoint.close()
    size = (path / "model.safetensors").stat().st_size
    with (path / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    for name, value in params.items():
        assert np.asarray(value).any(), name


class FakeSource:
    """A checkpoint that counts how many of its arrays are alive."""

    path = None

    def __init__(self, weights, fail_at=None):
        self.weights = weights
        self.fail_at = fail_at
        self.lock = threading.Lock()
        self.alive = self.most_alive = self.num_reads = 0

    def tensor_shapes(self):
        return {name: value.shape for name, value in self.weights.items()}

    def read(self, name):
        if name == self.fail_at:
            raise CheckpointError(f"damaged: {name}")
        value = self.weights[name].astype(np.float64)
        with self.lock:
            self.num_reads += 1
            self.alive += 1
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(value, self.drop)
        return value

    def drop(self):
        with self.lock:
            self.alive -= 1


def test_only_a_few_tensors_are_on_their_way_at_a_time():
    weights = weights_of()
    source = FakeSource(weights)
    load_params(source, abstract_of(weights))
    assert source.num_reads == len(weights)
    assert source.most_alive <= 5
    assert source.alive == 0


def test_a_damaged_tensor_stops_the_rest():
    weights = weights_of()
    source = FakeSource(weights, fail_at="model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=r"damaged: model.embed_tokens.weight"):
        load_params(source, abstract_of(weights), progress=True)
    assert source.num_reads < len(weights)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (64, 32), (65, 33), (1, 100)])
def test_buffers_have_the_right_values_and_alignment(shape, dtype, transpose):
    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = prepare_buffer(value, dtype, transpose=transpose)
    expected = (value.T if transpose else value).astype(dtype)
    np.testing.assert_array_equal(found, expected, strict=True)
    assert found.ctypes.data % 64 == 0
    assert found.flags.c_contiguous


def test_buffers_are_kept_only_if_they_are_nobody_elses():
    own = empty_buffer((4, 4), np.float32)
    assert prepare_buffer(own, np.float32, transpose=False) is own
    own.flags.writeable = False  # as are views of a file
    assert prepare_buffer(own, np.float32, transpose=False) is not own


# What does not fit.


def test_missing_extra_and_misshapen_tensors_are_all_named():
    weights = weights_of()
    described = abstract_of(weights)
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.experts.weight"] = np.zeros(1)
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((HIDDEN, INNER))
    with pytest.raises(CheckpointError) as caught:
        check_tensors(FakeSource(weights), described)
    message = str(caught.value)
    assert "missing: model.norm.weight;" in message
    assert "without a place in the model: model.layers.0.mlp.experts.weight;" in message
    assert "model.layers.1.mlp.up_proj.weight (12, 20) instead of (20, 12)." in message


def test_many_missing_tensors_are_counted():
    weights = weights_of()
    with pytest.raises(CheckpointError, match="and 16 more"):
        check_tensors(FakeSource({}), abstract_of(weights))


def test_computed_buffers_and_a_copy_of_the_tied_embedding_are_ignored():
    weights = weights_of(tied=True)
    described = abstract_of(weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3)
    assert load_params(FakeSource(weights), described).keys() == described.keys()


def test_an_untied_model_needs_its_output_projection():
    weights = weights_of()
    described = abstract_of(weights)
    del weights["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_params(FakeSource(weights), described)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 3}, "found 2 layers, expected 3"),
        ({"num_hidden_layers": 2**30}, "found 2 layers, expected 1073741824"),
        ({"vocab_size": 17}, r"found an embedding of \(16, 12\), expected \(17, 12\)"),
    ],
)
def test_configurations_of_another_model_are_noticed_before_anything_is_built(put, config, words):
    path = put(weights_of(), config={**CONFIG, **config})
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_a_checkpoint_without_embedding_is_refused(put):
    weights = weights_of()
    del weights["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"found no embedding \(model\.embed_tokens\.weight"):
        open_checkpoint(put(weights))


def test_missing_shards_are_named(put):
    path = put(weights_of(), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00003\.safetensors, found no"):
        open_checkpoint(path)


def test_an_index_is_checked(put):
    path = put(weights_of(), shards=2)
    file = "model-00001-of-00002.safetensors"
    write_index(path, {"model.embed_tokens.weight": file, "model.ghost.weight": file})
    with pytest.raises(CheckpointError, match=r"names model\.ghost\.weight, which no file holds"):
        open_checkpoint(path)
    for wrong in ("../../secret.safetensors", "", 3):
        write_index(path, {"model.norm.weight": wrong})
        with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
            open_checkpoint(path)
    write_index(path, [])
    with pytest.raises(CheckpointError, match="for 'weight_map', expected an object"):
        open_checkpoint(path)


def test_a_tensor_in_two_files_is_refused(put):
    path = put(weights_of(), shards=2)
    (path / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": np.zeros(HIDDEN)}, path / "model-3.safetensors")
    with pytest.raises(CheckpointError, match=r"found tensor 'model\.norm\.weight' a second time"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found an empty file; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
        (b"<html>", "found a web page"),
        (b"\0" * 40, "not a whole safetensors file"),
        (struct.pack("<Q", 2**60) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 2) + b"{}" + b"rest", "not a whole safetensors file"),
    ],
)
def test_files_that_are_no_safetensors_say_what_they_are(put, content, words):
    path = put(weights_of())
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert "model.safetensors" in str(caught.value)


def test_a_truncated_file_is_refused(put):
    path = put(weights_of())
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file.*download it again"):
        open_checkpoint(path)


def test_weights_that_are_no_floats_are_refused_when_read(put):
    weights = weights_of()
    weights["model.norm.weight"] = np.zeros(HIDDEN, np.int8)
    checkpoint = open_checkpoint(put(weights))
    with pytest.raises(
        UnsupportedError, match=r"'model\.norm\.weight' of type I8, expected one of"
    ):
        load_params(checkpoint, abstract_of(weights))
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.wait'. Did you mean"):
        checkpoint.read("model.norm.wait")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON.*found an empty file"),
        (b'{"model_type": "llama",', "not valid JSON"),
        (b"[]", "found list, expected a JSON object"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100000, "not valid JSON"),
        (b"{}", "found model_type None"),
    ],
)
def test_a_damaged_configuration_is_named(put, content, words):
    path = put(weights_of())
    (path / "config.json").write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedError), match=words) as caught:
        open_checkpoint(path)
    assert "config.json" in str(caught.value)


def test_directories_without_weights_say_what_is_there(put, tmp_path):
    path = put(weights_of())
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"found no weights, expected \*\.safetensors"):
        open_checkpoint(path)
    (path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin, expected"):
        open_checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json: no such file"):
        open_checkpoint(path)


# Which format.


def test_formats_are_told_apart(put, tmp_path):
    path = put(weights_of())
    wrong = path / "some.gguf"
    wrong.write_bytes(b"GGUF")
    assert isinstance(open_checkpoint(path), SafetensorsCheckpoint)
    assert isinstance(open_checkpoint(str(path), "safetensors"), SafetensorsCheckpoint)
    for place, load_format in ((wrong, "auto"), (wrong, "gguf"), (path, "gguf")):
        with pytest.raises(CheckpointError, match=r"some\.gguf: at byte 4: found 0 bytes"):
            open_checkpoint(place, load_format)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"some\.gguf: at byte 4"):
        open_checkpoint(path)
    (path / "other.gguf").touch()
    with pytest.raises(CheckpointError, match=r"found 2 GGUF files \(other\.gguf, some\.gguf\)"):
        open_checkpoint(path)


def test_what_cannot_be_opened_is_explained(put, tmp_path):
    path = put(weights_of())
    with pytest.raises(ModelNotFoundError, match="nowhere: no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        ConfigError, match="load_format must be auto, safetensors, gguf or orbax, got 'x'"
    ):
        open_checkpoint(path, "x")
    with pytest.raises(CheckpointError, match="found a file, expected a directory"):
        open_checkpoint(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"found no \*\.gguf file"):
        open_checkpoint(path, "gguf")


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights_of(), folder / "model.safetensors")
    return folder, (folder / "model.safetensors").read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_safetensors_give_an_error_of_ours_or_a_model(fuzz_folder, data):
    folder, good = fuzz_folder
    bad = bytearray(good[: data.draw(st.integers(0, len(good)))])
    header_len = 8 + struct.unpack_from("<Q", good)[0]
    if bad:
        places = st.integers(0, min(len(bad), header_len + 99) - 1)
        for place, mask in data.draw(st.lists(st.tuples(places, st.integers(1, 255)), max_size=3)):
            bad[place] ^= mask
    (folder / "model.safetensors").write_bytes(bad)
    message = None
    try:
        load_params(open_checkpoint(folder), abstract_of(weights_of()))
    except JaxserveError as error:
        message = str(error)
    assert len(bad) == len(good) if message is None else str(folder) in message
