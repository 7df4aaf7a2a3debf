"""GGUF files: block formats, names, row order, metadata, and files that are damaged."""

import hashlib
import json
import math
import struct
import subprocess
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import (
    CheckpointError,
    JaxserveError,
    ModelNotFoundError,
    UnsupportedError,
)
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.ggml import FORMATS, OTHER_FORMATS, dequantize
from jaxserve.models.gguf import GgufCheckpoint, read_metadata
from jaxserve.models.positions import RopeScaling

NUMBER_OF = {kind.name: number for number, kind in FORMATS.items()}
QUANTIZED = [kind.name for kind in FORMATS.values() if kind.is_quantized]

# What the definition of each format says of one weight, in Python's double precision.


def half(block, at):
    return struct.unpack_from("<e", block, at)[0]


def signed(byte):
    return byte - 256 if byte > 127 else byte


def nibble(quants, i):
    """Of 32 weights, the first 16 are the low halves of 16 bytes."""
    return quants[i] & 15 if i < 16 else quants[i - 16] >> 4


def q4_0(block, i):
    return half(block, 0) * (nibble(block[2:], i) - 8)


def q4_1(block, i):
    return half(block, 0) * nibble(block[4:], i) + half(block, 2)


def q5_0(block, i):
    fifth = struct.unpack_from("<I", block, 2)[0] >> i & 1
    return half(block, 0) * ((nibble(block[6:], i) | fifth << 4) - 16)


def q5_1(block, i):
    fifth = struct.unpack_from("<I", block, 4)[0] >> i & 1
    return half(block, 0) * (nibble(block[8:], i) | fifth << 4) + half(block, 2)


def q8_0(block, i):
    return half(block, 0) * signed(block[2 + i])


def k_scale_and_low(packed, group):
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    return (
        packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
        packed[group + 4] >> 4 | packed[group] >> 6 << 4,
    )


def q4_k(block, i):
    group, place = divmod(i, 32)
    byte = block[16 + group // 2 * 32 + place]
    scale, low = k_scale_and_low(block[4:16], group)
    quant = byte >> 4 if group % 2 else byte & 15
    return half(block, 0) * scale * quant - half(block, 2) * low


def q5_k(block, i):
    group, place = divmod(i, 32)
    byte = block[48 + group // 2 * 32 + place]
    scale, low = k_scale_and_low(block[4:16], group)
    quant = (byte >> 4 if group % 2 else byte & 15) | (block[16 + place] >> group & 1) << 4
    return half(block, 0) * scale * quant - half(block, 2) * low


def q6_k(block, i):
    part, rest = divmod(i, 128)
    row, place = divmod(rest, 32)
    byte = block[64 * part + 32 * (row % 2) + place]
    low = byte >> 4 if row > 1 else byte & 15
    high = block[128 + 32 * part + place] >> 2 * row & 3
    scale = signed(block[192 + 8 * part + 2 * row + place // 16])
    return half(block, 208) * scale * ((low | high << 4) - 32)


FORMULAS = {
    "Q4_0": (q4_0, 18, 32),
    "Q4_1": (q4_1, 20, 32),
    "Q5_0": (q5_0, 22, 32),
    "Q5_1": (q5_1, 24, 32),
    "Q8_0": (q8_0, 34, 32),
    "Q4_K": (q4_k, 144, 256),
    "Q5_K": (q5_k, 176, 256),
    "Q6_K": (q6_k, 210, 256),
}


def random_blocks(name, count, seed=0):
    """Make blocks of random bits with ordinary scales."""
    kind = FORMATS[NUMBER_OF[name]]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, count * kind.block.itemsize, dtype=np.uint8)
    blocks = data.view(kind.block)
    if not kind.is_quantized:
        blocks[...] = rng.normal(size=count)
    for field in ("scale", "low"):
        if field in (kind.block.names or ()):
            blocks[field] = rng.normal(size=count) * 10.0 ** rng.integers(-4, 3)
    return data


def test_the_formats_are_the_promised_ones():
    plain = {"F32", "F16", "BF16"}
    assert NUMBER_OF.keys() == FORMULAS.keys() | plain
    assert not FORMATS.keys() & OTHER_FORMATS.keys()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("count", [1, 7])
def test_every_weight_is_what_the_format_defines(name, count):
    formula, nbytes, block_len = FORMULAS[name]
    kind = FORMATS[NUMBER_OF[name]]
    assert (kind.block.itemsize, kind.block_len) == (nbytes, block_len)
    data = random_blocks(name, count, seed=count)
    expected = [
        formula(data[start : start + nbytes].tobytes(), i)
        for start in range(0, len(data), nbytes)
        for i in range(block_len)
    ]
    found = dequantize(data, kind)
    assert found.dtype == np.float32
    # Two roundings to float32, of numbers as large as the largest of the block's two terms.
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7 * np.abs(expected).max())


def test_more_blocks_than_one_chunk_are_all_unpacked():
    kind = FORMATS[NUMBER_OF["Q4_1"]]
    data = random_blocks("Q4_1", 9001)
    found = dequantize(data, kind)
    single = [dequantize(row, kind) for row in data.reshape(9001, -1)[::1000]]
    np.testing.assert_array_equal(found.reshape(9001, 32)[::1000], single)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_numbers_are_taken_as_they_are(name):
    data = random_blocks(name, 9)
    found = dequantize(data, FORMATS[NUMBER_OF[name]])
    assert found.tobytes() == data.tobytes()
    types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    assert found.dtype == types[name]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_scale_that_is_no_number_is_refused(name):
    kind = FORMATS[NUMBER_OF[name]]
    data = random_blocks(name, 3)
    data.view(kind.block)["scale"][1] = np.inf
    with pytest.raises(ValueError, match="found a scale that is not a finite number"):
        dequantize(data, kind)


# A writer of small files.


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(value):
    """Write a value with its type, as converters do: whole numbers u32, others f32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    inner = [field(item) for item in value]
    return (
        struct.pack("<I", 9)
        + inner[0][:4]
        + struct.pack("<Q", len(inner))
        + b"".join(item[4:] for item in inner)
    )


def pad(data, alignment):
    return data + bytes(-len(data) % alignment)


def gguf_bytes(metadata, tensors, *, version=3, alignment=32):
    """Write a file; `tensors` maps names to (format, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + field(value) for key, value in metadata.items())
    body = b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", kind if isinstance(kind, int) else NUMBER_OF[kind], len(body))
        body = pad(body + bytes(data), alignment)
    return pad(head, alignment) + body


HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, LAYERS = 32, 4, 2, 8, 64, 16, 2


def metadata_of(arch, **changes):
    values = {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 0.5,
        "rope.freq_base": 100000.0,
        "rope.dimension_count": HEAD_DIM,
    }
    found = {"general.architecture": arch}
    found |= {f"{arch}.{key}": value for key, value in values.items()}
    found |= {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
    for key, value in changes.items():
        full = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{arch}.{key}"
        found.pop(full, None)
        if value is not None:
            found[full] = value
    return found


def shapes_of(arch, *, tied=True, bias=False):
    """Return the shape of every tensor of a tiny model by its Hugging Face name."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        part = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (q, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, q),
            "mlp.gate_proj.weight": (INNER, HIDDEN),
            "mlp.up_proj.weight": (INNER, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INNER),
        }
        if arch == "qwen3":
            part |= {f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
        if arch == "qwen2" or bias:
            part |= {f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if bias:
            part["self_attn.o_proj.bias"] = (HIDDEN,)
            for name in ("gate_proj", "up_proj"):
                part[f"mlp.{name}.bias"] = (INNER,)
            part["mlp.down_proj.bias"] = (HIDDEN,)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in part.items()}
    return shapes


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def interleave(rows, heads):
    """Reorder rows as llama.cpp's converter does for the llama architecture."""
    split = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def tiny_model(arch, *, tied=True, bias=False, kind="F32", seed=0, extra=None, **changes):
    """Return a file's bytes, and the weights in it by Hugging Face name."""
    rng = np.random.default_rng(seed)
    weights, tensors = {}, {}
    dtype = FORMATS[NUMBER_OF[kind]].block
    for name, shape in shapes_of(arch, tied=tied, bias=bias).items():
        weights[name] = value = rng.normal(size=shape).astype(dtype)
        if arch == "llama" and ".q_proj" in name:
            value = interleave(value, HEADS)
        if arch == "llama" and ".k_proj" in name:
            value = interleave(value, KV_HEADS)
        tensors[gguf_name(name)] = (kind, shape, value.tobytes())
    return gguf_bytes(metadata_of(arch, **changes), {**tensors, **(extra or {})}), weights


@pytest.fixture
def put(tmp_path):
    """Write bytes to a file."""

    def write(data, name="model.gguf"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_comes_back_as_it_was_before_conversion(put, arch, kind, tied):
    data, weights = tiny_model(arch, kind=kind, tied=tied)
    checkpoint = open_checkpoint(put(data))
    assert checkpoint.tensor_shapes() == {name: value.shape for name, value in weights.items()}
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, strict=True)
    assert not checkpoint.is_quantized
    config = checkpoint.config
    assert config == ModelConfig(
        model_type=arch,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=0.5,
        rope_theta=100000.0,
        max_position=64,
        tie_word_embeddings=tied,
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        eos_token_ids=(2,),
        bos_token_id=1,
        torch_dtype={"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind],
    )
    checkpoint.close()


def test_biases_of_the_llama_architecture_are_reordered_too(put):
    data, weights = tiny_model("llama", bias=True)
    checkpoint = open_checkpoint(put(data))
    assert checkpoint.config.qkv_bias
    assert checkpoint.config.o_bias
    assert checkpoint.config.mlp_bias
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q5_0"])
def test_quantised_rows_are_reordered_as_a_whole(put, name):
    nbytes = FORMULAS[name][1]
    q_rows, rows = HEADS * HEAD_DIM, HEADS * HEAD_DIM * HIDDEN // 32
    data = random_blocks(name, rows)
    tensor = {"blk.0.attn_q.weight": (name, (q_rows, HIDDEN), data)}
    file, _ = tiny_model("llama", extra=tensor)
    checkpoint = open_checkpoint(put(file))
    stored = dequantize(data, FORMATS[NUMBER_OF[name]]).reshape(q_rows, HIDDEN)
    found = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(interleave(found, HEADS), stored)
    assert not np.array_equal(found, stored)
    assert checkpoint.is_quantized
    assert checkpoint.config.torch_dtype is None
    assert len(data) == rows * nbytes


def test_views_outlive_the_checkpoint(put):
    data, weights = tiny_model("qwen3")
    with_views = open_checkpoint(put(data))
    view = with_views.read("model.norm.weight")
    with_views.close()
    np.testing.assert_array_equal(view, weights["model.norm.weight"])


def test_metadata_alone_can_be_read(put):
    values = {
        "tokenizer.ggml.tokens": ["a", "", "é", "<|x|>"],
        "tokenizer.ggml.scores": [0.5, 1.5],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.flags": [True, False],
        "general.name": "tiny",
    }
    found = read_metadata(put(gguf_bytes(values, {}, version=2)))
    assert found["tokenizer.ggml.tokens"] == values["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["general.name"] == "tiny"
    assert found["tokenizer.ggml.scores"].tolist() == [0.5, 1.5]
    assert found["tokenizer.ggml.token_type"].tolist() == [1, 3]
    assert found["tokenizer.ggml.flags"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("kind", "layout", "value"),
    [
        (0, "B", 200),
        (1, "b", -3),
        (2, "H", 60000),
        (3, "h", -9),
        (4, "I", 4 * 10**9),
        (5, "i", -7),
        (6, "f", 0.25),
        (7, "?", True),
        (10, "Q", 2**60),
        (11, "q", -(2**60)),
        (12, "d", 0.1),
    ],
)
def test_numbers_of_every_width_are_read(put, kind, layout, value):
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + struct.pack("<I", kind)
    found = read_metadata(put(data + struct.pack(f"<{layout}", value)))["x"]
    assert found == value
    assert type(found) is type(value)


def test_recommended_sampling_is_handed_on(put):
    data, _ = tiny_model("qwen3", **{"general.sampling.temp": 0.5, "general.sampling.top_k": 20})
    found = open_checkpoint(put(data)).generation_config
    assert found == {"temperature": 0.5, "top_k": 20}


def test_all_ends_of_text_are_collected(put):
    data, _ = tiny_model(
        "llama", **{"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    )
    assert open_checkpoint(put(data)).config.eos_token_ids == (2, 5)


def test_settings_that_may_differ_by_layer_are_read_when_they_do_not(put):
    data, _ = tiny_model(
        "llama",
        **{"attention.head_count_kv": [KV_HEADS, KV_HEADS], "feed_forward_length": [64] * 2},
    )
    assert open_checkpoint(put(data)).config.num_kv_heads == KV_HEADS


def test_what_the_format_defines_as_default_is_taken(put):
    data, _ = tiny_model("llama", **{"rope.freq_base": None, "rope.dimension_count": None})
    config = open_checkpoint(put(data)).config
    assert (config.rope_theta, config.head_dim) == (10000.0, HIDDEN // HEADS)


def test_rope_factors_are_those_of_the_tensor(put):
    """Llama 3.x files hold the stretching as a tensor, computed by the converter like this."""
    scaling = RopeScaling(
        kind="llama3", factor=8.0, original_max_position=64, low_freq_factor=1, high_freq_factor=4
    )
    factors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 100000.0 ** (2 * pair / HEAD_DIM)
        if wavelength < 64 / 4:
            factors.append(1.0)
        elif wavelength > 64:
            factors.append(8.0)
        else:
            smooth = (64 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    tensor = {
        "rope_freqs.weight": ("F32", (len(factors),), np.asarray(factors, np.float32).tobytes())
    }
    data, weights = tiny_model("llama", extra=tensor)
    checkpoint = open_checkpoint(put(data))
    assert checkpoint.tensor_shapes().keys() == weights.keys()
    config = checkpoint.config
    assert config.rope_scaling is not None
    plain = {name: getattr(config, name) for name in config.__slots__ if name != "rope_scaling"}
    same = ModelConfig(**plain, rope_scaling=scaling)
    np.testing.assert_allclose(config.rope_frequencies()[0], same.rope_frequencies()[0], rtol=1e-6)


def test_factors_of_one_are_no_scaling(put):
    tensor = {"rope_freqs.weight": ("F32", (4,), np.ones(4, np.float32).tobytes())}
    data, _ = tiny_model("llama", extra=tensor)
    assert open_checkpoint(put(data)).config.rope_scaling is None


def test_linear_and_yarn_scaling_come_from_metadata(put):
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    data, _ = tiny_model("qwen2", **scaling)
    found = open_checkpoint(put(data)).config.rope_scaling
    assert found == RopeScaling(kind="linear", factor=4.0)
    scaling |= {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32}
    data, _ = tiny_model("qwen2", **scaling)
    config = open_checkpoint(put(data)).config
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position == 32
    assert config.max_position == 128
    assert config.rope_scaling.magnitude == pytest.approx(0.1 * math.log(4) + 1)


# Wrong files.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found an empty file"),
        (b"PK\x03\x04 not a model at all", r"begins with b'PK.*download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "found a web page"),
        (b"GGUF", "found 0 bytes, expected 4 more for the version"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "found version 1, expected .*2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "found a big-endian file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "expected 5995.* more for 46116"),
    ],
)
def test_files_that_are_no_gguf_say_what_they_are(put, content, words):
    path = put(content)
    for read in (read_metadata, open_checkpoint, GgufCheckpoint):
        if not content and read is open_checkpoint:
            continue
        with pytest.raises(CheckpointError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_missing_file_is_not_found(tmp_path):
    for read in (read_metadata, open_checkpoint, GgufCheckpoint):
        with pytest.raises(ModelNotFoundError, match=r"none\.gguf: no such file"):
            read(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"general.architecture": "mamba"}, UnsupportedError, "found the architecture 'mamba'"),
        ({"general.architecture": None}, UnsupportedError, "found the architecture None"),
        ({"expert_count": 8}, UnsupportedError, "found llama.expert_count 8, expected none"),
        ({"attention.sliding_window": 32}, UnsupportedError, "attention.sliding_window 32"),
        ({"rope.dimension_count": 4}, UnsupportedError, "found llama.rope.dimension_count 4"),
        ({"attention.value_length": 4}, UnsupportedError, "found llama.attention.value_length 4"),
        ({"feed_forward_length": [64, 32]}, UnsupportedError, "differs between layers"),
        ({"split.count": 3}, UnsupportedError, "one part of a split GGUF file.*--merge"),
        ({"rope.scaling.type": "longrope"}, UnsupportedError, "type 'longrope'"),
        ({"attention.layer_norm_rms_epsilon": None}, CheckpointError, "rms_epsilon'"),
        ({"context_length": None}, CheckpointError, "found nothing for 'llama.context_length'"),
        ({"embedding_length": "x"}, CheckpointError, "found 'x' for 'llama.embedding_length'"),
        (
            {"embedding_length": 64, "attention.key_length": HEAD_DIM},
            CheckpointError,
            r"embedding of \(16, 32\), expected \(16, 64\)",
        ),
        ({"block_count": 3}, CheckpointError, "found 2 layers, expected 3"),
        ({"block_count": 2**30}, CheckpointError, "found 2 layers, expected 1073741824"),
        ({"attention.head_count_kv": 3}, CheckpointError, "multiple of num_kv_heads"),
        ({"general.alignment": 33}, CheckpointError, "found general.alignment 33"),
        ({"tokenizer.ggml.eos_token_id": "x"}, CheckpointError, "expected a token id"),
    ],
)
def test_metadata_that_cannot_be_is_named(put, changes, error, words):
    data, _ = tiny_model("llama", **changes)
    with pytest.raises(error, match=words):
        open_checkpoint(put(data))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"t": (10, (1, 32), b"")}, "found tensor 't' in the format Q2_K, expected one of F32"),
        ({"t": (99, (1, 32), b"")}, "found tensor 't' in the format number 99"),
        ({"t": ("F32", (1, 1, 1, 1, 1), b"")}, "found 5 dimensions for tensor 't'"),
        ({"t": ("F32", (), b"")}, "found 0 dimensions for tensor 't'"),
        ({"t": ("F32", (3, 0), b"")}, "expected positive numbers"),
        ({"t": ("Q8_0", (2, 33), b"")}, r"found dimensions \[33, 2\].*a multiple of 32 \(Q8_0\)"),
        ({"t": ("F32", (2**40, 2**40), b"")}, "tensor 't' ends there"),
        ({"t": ("F32", (40,), b"1234")}, "tensor 't' ends there"),
    ],
)
def test_tensors_that_cannot_be_are_named(put, extra, words):
    data, _ = tiny_model("llama", extra=extra)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(put(data))


def test_tensors_do_not_overlap_and_are_aligned(put):
    data, _ = tiny_model("llama")
    name = text("output_norm.weight")
    at = data.index(name) + len(name) + 4 + 8 + 4
    for offset, words in ((0, "twice or inside another one"), (31, "expected a multiple of 32")):
        changed = data[:at] + struct.pack("<Q", offset) + data[at + 8 :]
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(put(changed))


def test_a_key_given_twice_is_refused(put):
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (text("x") + field(1)) * 2
    with pytest.raises(CheckpointError, match="found the metadata key 'x' twice"):
        read_metadata(put(data))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (struct.pack("<I", 13), "found value type 13 for metadata 'x'"),
        (struct.pack("<IIQ", 9, 9, 1), "found value type 9 for metadata 'x'"),
        (struct.pack("<IIQ", 9, 8, 2**61), "expected 18446744073709551616 more for metadata 'x'"),
        (struct.pack("<IIQ", 9, 4, 5), "found 0 bytes, expected 20 more for metadata 'x'"),
        (struct.pack("<IQ", 8, 3) + b"ab", "found 2 bytes, expected more for metadata 'x'"),
        (struct.pack("<IQ", 8, 2) + b"\xff\xfe", "not UTF-8, expected metadata 'x'"),
    ],
)
def test_values_that_cannot_be_are_named(put, value, words):
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + value
    with pytest.raises(CheckpointError, match=words):
        read_metadata(put(data))


def test_reading_names_damaged_and_unknown_tensors(put):
    blocks = random_blocks("Q8_0", INNER)
    blocks[:2] = 255
    tensor = {"blk.1.ffn_up.weight": ("Q8_0", (INNER, HIDDEN), blocks)}
    checkpoint = open_checkpoint(put(tiny_model("llama", extra=tensor)[0]))
    with pytest.raises(CheckpointError, match=r"'blk.1.ffn_up.weight': found a scale that is not"):
        checkpoint.read("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.wait'. Did you mean"):
        checkpoint.read("model.norm.wait")
    wrong = {"blk.0.attn_q.weight": ("F32", (3, HIDDEN), bytes(3 * 4 * HIDDEN))}
    checkpoint = open_checkpoint(put(tiny_model("llama", extra=wrong)[0]))
    with pytest.raises(CheckpointError, match=r"found 3 rows in tensor 'blk.0.attn_q.weight'"):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight")


def test_an_embedding_is_needed(put):
    with pytest.raises(CheckpointError, match=r"no tensor 'token_embd.weight'"):
        open_checkpoint(put(gguf_bytes(metadata_of("llama"), {})))


FUZZED = tiny_model(
    "llama",
    extra={
        "blk.0.ffn_up.weight": ("Q4_1", (INNER, HIDDEN), random_blocks("Q4_1", INNER)),
        "rope_freqs.weight": ("F32", (4,), np.ones(4, np.float32).tobytes()),
    },
    **{"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [1.0, 2.0]},
)[0]
HEADER_LEN = FUZZED.index(b"rope_freqs.weight")


def load_all(path):
    """Load a file completely, or fail with one of our errors; never take much memory."""
    message = None
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensor_shapes():
            checkpoint.read(name)
    except JaxserveError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message is None or str(path) in message
    assert peak < 20 * len(FUZZED) + 4e6


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzz.gguf"


@settings(max_examples=150)
@given(length=st.integers(0, len(FUZZED) - 32))  # the last bytes are padding
def test_a_truncated_file_never_loads(fuzz_path, length):
    fuzz_path.write_bytes(FUZZED[:length])
    with pytest.raises(CheckpointError):
        open_checkpoint(fuzz_path)


@settings(max_examples=250)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, HEADER_LEN + 300), st.integers(1, 255)), min_size=1, max_size=4
    )
)
def test_flipped_bits_give_an_error_of_ours_or_a_model(fuzz_path, flips):
    data = bytearray(FUZZED)
    for place, mask in flips:
        data[place] ^= mask
    fuzz_path.write_bytes(data)
    load_all(fuzz_path)


@settings(max_examples=100)
@given(start=st.integers(4, HEADER_LEN), junk=st.binary(min_size=1, max_size=64))
def test_overwritten_parts_give_an_error_of_ours_or_a_model(fuzz_path, start, junk):
    fuzz_path.write_bytes(FUZZED[:start] + junk + FUZZED[start + len(junk) :])
    load_all(fuzz_path)


# The real file, and the programs of others.


@pytest.mark.weights
def test_the_default_model_is_what_its_authors_say(default_model):
    checkpoint = open_checkpoint(default_model)
    assert checkpoint.config == ModelConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=float(np.float32(1e-5)),
        rope_theta=100000.0,
        max_position=8192,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=1,
    )
    assert checkpoint.is_quantized
    shapes = checkpoint.tensor_shapes()
    assert len(shapes) == 2 + 30 * 9
    assert sum(math.prod(shape) for shape in shapes.values()) == 134515008


@pytest.mark.live_oracle
@pytest.mark.parametrize("name", list(NUMBER_OF))
def test_dequantisation_equals_that_of_the_gguf_package(tmp_path, oracle_python, name):
    data = random_blocks(name, 200)
    data.tofile(tmp_path / "blocks")
    script = (
        "import sys, gguf, numpy as np; from gguf import GGMLQuantizationType as T\n"
        "x = np.fromfile(sys.argv[1], np.uint8).reshape(1, -1)\n"
        "gguf.dequantize(x, T[sys.argv[2]]).astype(np.float32).tofile(sys.argv[3])"
    )
    subprocess.run(
        [oracle_python, "-c", script, tmp_path / "blocks", name, tmp_path / "out"], check=True
    )
    found = dequantize(data, FORMATS[NUMBER_OF[name]]).astype(np.float32)
    np.testing.assert_array_equal(found, np.fromfile(tmp_path / "out", np.float32))


@pytest.mark.live_oracle
@pytest.mark.weights
@pytest.mark.slow
def test_the_default_model_equals_what_transformers_loads(default_model, oracle_python):
    script = (
        "import sys, json, hashlib, pathlib, torch, transformers\n"
        "p = pathlib.Path(sys.argv[1])\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(\n"
        "    p.parent, gguf_file=p.name, dtype=torch.float32)\n"
        "print(json.dumps({k: hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()\n"
        "                  for k, v in m.state_dict().items()}))"
    )
    done = subprocess.run(
        [oracle_python, "-c", script, default_model], check=True, capture_output=True, text=True
    )
    expected = json.loads(done.stdout.splitlines()[-1])
    del expected["lm_head.weight"]  # the embedding again
    checkpoint = open_checkpoint(default_model)
    found = {
        name: hashlib.sha256(checkpoint.read(name).tobytes()).hexdigest()
        for name in checkpoint.tensor_shapes()
    }
    assert found == expected
