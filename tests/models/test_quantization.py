"""Quantised weights: error bounds in float64, every way of loading, logits of every family."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, SamplingParams, dequantize, export, load_params
from jaxserve.core.config import EngineConfig, ModelOptions
from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.engine.source import load_model
from jaxserve.models.ggml import FORMATS
from jaxserve.models.quantization import (
    KINDS,
    Quantization,
    is_scale,
    narrow_paths,
    quantize_array,
    quantize_rows,
    scale_path,
    summed_axis,
)
from jaxserve.models.registry import flatten_params
from tests.cases import quick
from tests.models.test_gguf import NUMBER_OF, gguf_name, shapes_of, tiny_model
from tests.tiny import write_tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / "oracles" / "golden" / "models"
SCHEMES = sorted(KINDS)
FAMILIES = [
    ("llama_llama3_rope", "int8"),
    ("qwen2_plain", "fp8"),
    ("qwen3_plain", "int8"),
    ("mistral_window", "fp8"),
    ("gemma2_plain", "int8"),
    ("gemma3_plain", "fp8"),
    ("phi3_window", "int8"),
    ("smollm3_window_bias", "fp8"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def error_bound(weight: np.ndarray, scheme: str) -> np.ndarray:
    """Return how far a stored weight may be from its original, in float64; one row per channel."""
    wide = np.abs(weight.astype(np.float64))
    unit = wide.max(axis=1, keepdims=True) / (127 if scheme == "int8" else 448)
    if scheme == "int8":
        bound = np.broadcast_to(unit / 2, wide.shape)  # half a step
    else:
        # Half a step: a sixteenth of what three digits after the first tell, or of the smallest.
        bound = np.maximum(wide / 16, unit * 2.0**-10)
    return bound * (1 + 1e-5) + np.finfo(np.float32).tiny * 448  # such channels become zeros


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = 10.0 ** rng.uniform(-42, 37, (rows, 1)) if draw(st.booleans()) else 1.0
    weight = rng.standard_normal((rows, columns)) * sizes
    weight[rng.random(rows) < 0.2] = 0  # channels of zeros
    weight[rng.random(weight.shape) < 0.1] *= 1e-3  # numbers below the normal float8 ones
    kind = draw(st.sampled_from([np.float32, np.float16, jnp.bfloat16]))
    most = 6e4 if kind is np.float16 else 1e38
    return np.clip(weight, -most, most).astype(kind)


@settings(max_examples=40, deadline=None)
@given(weight=weights())
@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_stay_within_half_a_step(scheme: str, weight: np.ndarray) -> None:
    stored, scale = quantize_rows(weight, KINDS[scheme])
    assert stored.dtype == KINDS[scheme]
    assert scale.dtype == np.float32
    back = stored.astype(np.float64) * scale.astype(np.float64)[:, None]
    assert (np.abs(back - weight.astype(np.float64)) <= error_bound(weight, scheme)).all()
    assert (scale[~weight.astype(bool).any(axis=1)] == 0).all()


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_devices_and_hosts_agree_to_the_last_bit(scheme: str, axis: int) -> None:
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((37, 131)) * 10.0 ** rng.uniform(-6, 3, (37, 1))).astype(
        "float32"
    )
    weight[5] = 0
    stored, scale = quantize_rows(weight, KINDS[scheme])
    (device,) = jax.devices()[:1]
    place = jax.sharding.SingleDeviceSharding(device)
    shape = weight.shape if axis == -1 else weight.shape[::-1]
    found, found_scale = quantize_array(
        jnp.asarray(weight),
        jax.ShapeDtypeStruct(shape, KINDS[scheme], sharding=place),
        jax.ShapeDtypeStruct(scale.shape, np.float32, sharding=place),
        axis,
        turn=axis == -2,
    )
    np.testing.assert_array_equal(found_scale, scale)
    narrow = np.asarray(found if axis == -1 else found.T)
    np.testing.assert_array_equal(narrow.view(np.uint8), stored.view(np.uint8))


# Loading ------------------------------------------------------------------------------------------


def arrays_of(llm: LLM) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in flatten_params(llm.params).items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(found[path].view(np.uint8), value.view(np.uint8), path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_source_gives_the_same_weights(scheme: str, tiny: Path, tmp_path: Path) -> None:
    source = safetensors.numpy.load_file(tiny / "model.safetensors")
    with LLM(tiny, quantization=scheme, max_model_len=64) as llm:
        expected = arrays_of(llm)
        served = (llm.model_config, llm.params)
    up = "layers.1.mlp.up_proj.kernel"
    stored, scale = quantize_rows(source["model.layers.1.mlp.up_proj.weight"], KINDS[scheme])
    np.testing.assert_array_equal(expected[up].view(np.uint8), stored.T.view(np.uint8))
    np.testing.assert_array_equal(expected[scale_path(up)], scale)
    assert expected["embed_tokens.embedding"].dtype == np.float32, "it is no output projection"
    assert len(narrow_paths(expected)) == 15  # seven per layer, and the output projection
    export(tiny, tmp_path / "orbax", to="orbax")
    live = load_params(tiny)
    for model, setting in ((tmp_path / "orbax", scheme), (live, scheme), (served, None)):
        with LLM(model, quantization=setting, max_model_len=64) as llm:
            assert_equal(arrays_of(llm), expected)
            assert llm.config.model.quantization == scheme
            assert llm.config.model.dtype == "float32"
    with LLM(tiny, quantization=scheme, max_model_len=64, tensor_parallel_size=2) as llm:
        assert_equal(arrays_of(llm), expected)
        split = flatten_params(llm.params)
        for path, width in ((up, 32), (scale_path(up), 32), ("layers.1.mlp.down_proj.kernel", 32)):
            shape = split[path].addressable_shards[0].data.shape
            assert shape[0 if "scale" in path or "down" in path else 1] == width


def test_weights_are_drawn_in_quantised_form(tiny: Path) -> None:
    with LLM(tiny, load_format="dummy", quantization="int8", max_model_len=64) as llm:
        arrays = arrays_of(llm)
    assert np.abs(arrays["layers.0.mlp.up_proj.kernel"]).max() == 127
    assert (arrays["layers.0.mlp.up_proj.kernel_scale"] > 0).all()


def test_layers_can_keep_their_precision(tiny: Path) -> None:
    names = ["lm_head", "model.layers.0.self_attn.q_proj", r"re:.*layers\.1\.mlp"]
    settings = {"quantization": "int8", "quantization_config": {"ignore": names}}
    with LLM(tiny, max_model_len=64, **settings) as llm:
        narrow = narrow_paths(arrays_of(llm))
        tokens = jnp.asarray([[5, 6, 7, 8]])
        mixed = llm.generate([[5, 6, 7, 8]], use_tqdm=False)[0].outputs[0]
        assert mixed.token_ids
        plain = llm.forward(tokens, params=dequantize(llm.params)).logits
        np.testing.assert_allclose(llm.forward(tokens).logits, plain, atol=1e-4)
    assert "lm_head.kernel" not in narrow
    assert "layers.0.self_attn.q_proj.kernel" not in narrow
    assert "layers.0.self_attn.k_proj.kernel" in narrow
    assert not any(path.startswith("layers.1.mlp") for path in narrow)


# Logits -------------------------------------------------------------------------------------------


def own_dequantized(params: dict[str, np.ndarray], scheme: str, narrow: frozenset[str]) -> dict:
    """Quantise and widen by the textbook, in float64."""
    made = {}
    for path, value in params.items():
        if path not in narrow:
            made[path] = value
            continue
        rows = np.asarray(value, np.float64)
        rows = rows.T if summed_axis(path) == -2 else rows
        largest = 127.0 if scheme == "int8" else 448.0
        unit = np.abs(rows).max(axis=1, keepdims=True) / largest
        ratio = rows / np.where(unit == 0, 1, unit)
        grid = np.arange(256, dtype=np.uint8).view(KINDS[scheme]).astype(np.float64)
        grid = np.unique(grid[np.isfinite(grid) & (np.abs(grid) <= largest)])
        near = grid[np.abs(ratio[..., None] - grid).argmin(axis=-1)]
        made[path] = (near * unit if summed_axis(path) == -1 else (near * unit).T).astype(
            np.float32
        )
    return made


@pytest.mark.parametrize(
    ("name", "scheme"),
    quick(FAMILIES, ("llama_llama3_rope", "int8")),
)
def test_logits_are_as_near_to_transformers_as_the_bound_allows(name: str, scheme: str) -> None:
    with np.load(GOLDEN / name / "golden.npz") as data:
        tokens = jnp.asarray(data["tokens_0"])[None]
        golden = np.concatenate([data["prefill_0"], data["decode_0"]])
    config, state = load_params(GOLDEN / name, dtype="float32")
    plain = {path: np.asarray(value) for path, value in flatten_params(state).items()}
    with LLM((config, state), quantization=scheme, max_model_len=64) as llm:
        narrow = narrow_paths(flatten_params(llm.params))
        found = np.asarray(llm.forward(tokens).logits[0])
        # As near to a model of the rounded weights as float32 is to transformers.
        rounded = jax.tree.map(jnp.asarray, own_dequantized(plain, scheme, narrow))
        with LLM((config, rounded), max_model_len=64) as exact:
            expected = np.asarray(exact.forward(tokens).logits[0])
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * max(1.0, scale))

        # To first order a logit moves by no more than its gradient times the bound of each weight.
        def logit(params: object) -> jax.Array:
            return llm.forward(tokens, params=params).logits[0, -1, 7]

        slopes = flatten_params(jax.grad(logit)(state))
    room = 0.0
    for path in narrow:
        slope = np.abs(np.asarray(slopes[path], np.float64))
        weight, slope = (
            (plain[path].T, slope.T) if summed_axis(path) == -2 else (plain[path], slope)
        )
        room += (slope * error_bound(weight, scheme)).sum()
    assert abs(found[-1, 7] - golden[-1, 7]) <= 1.1 * room
    assert np.abs(found - golden).max() > 1e-6, "nothing was quantised"


def write_packed(path: Path, arch: str, kind: str) -> Path:
    """Write a GGUF file whose matrices are packed, as far as its blocks fit into rows."""
    packed = FORMATS[NUMBER_OF[kind]]
    rng = np.random.default_rng(4)
    extra = {}
    for name, shape in shapes_of(arch).items():
        if len(shape) == 2 and shape[1] % packed.block_len == 0:
            count = shape[0] * shape[1] // packed.block_len
            blocks = rng.integers(0, 256, count * packed.block.itemsize, dtype=np.uint8)
            blocks = blocks.view(packed.block)
            blocks["scale"] = rng.uniform(0.003, 0.01, count)
            if "low" in blocks.dtype.names:
                blocks["scale"], blocks["low"] = blocks["scale"] * 8, -0.4
            extra[gguf_name(name)] = (kind, shape, blocks.tobytes())
    assert extra
    path.write_bytes(tiny_model(arch, extra=extra)[0])
    return path


@pytest.mark.parametrize(
    ("arch", "scheme", "kind"),
    quick(
        [("llama", "int8", "Q8_0"), ("qwen3", "fp8", "Q4_1"), ("qwen2", "fp8", "Q5_0")],
        ("llama", "int8", "Q8_0"),
    ),
)
def test_packed_gguf_files_are_quantised_from_what_their_blocks_stand_for(
    arch: str, scheme: str, kind: str, tmp_path: Path
) -> None:
    """As near to the plain load as the scheme promises; tokens are those of the numbers kept."""
    path = write_packed(tmp_path / "model.gguf", arch, kind)
    loaded = load_model(
        path, EngineConfig(model=ModelOptions(dtype="float32", quantization=scheme))
    )
    arrays = flatten_params(loaded.state)
    narrow = narrow_paths(arrays)
    assert {np.dtype(arrays[name].dtype) for name in narrow} == {KINDS[scheme]}
    found = {p: np.asarray(v) for p, v in flatten_params(dequantize(loaded.state)).items()}
    config, state = load_params(path, dtype="float32")
    plain = {name: np.asarray(value) for name, value in flatten_params(state).items()}
    for name, value in found.items():
        weight, kept = (plain[name].T, value.T) if summed_axis(name) == -2 else (plain[name], value)
        bound = error_bound(weight, scheme) if name in narrow else 0.0
        assert (np.abs(kept.astype(np.float64) - weight) <= bound).all(), name
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    tokens = []
    for params in (loaded.state, jax.tree.map(jnp.asarray, found)):
        with LLM((config, params), max_model_len=32, max_num_seqs=2) as llm:
            (output,) = llm.generate([[5, 9, 3, 1]], sampling, use_tqdm=False)
            tokens.append(output.outputs[0].token_ids)
    assert tokens[0] == tokens[1]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "int-8"}, "must be one of int8, fp8, got 'int-8'. Did you mean 'int8'"),
        ({"quantization": "awq"}, "'awq' reads checkpoints that were quantised before"),
        ({"quantization_config": {}}, "quantization_config needs quantization, found none"),
        (
            {"quantization": "int8", "quantization_config": {"ignored": []}},
            "no key 'ignored'. Did you mean 'ignore'",
        ),
        (
            {"quantization": "int8", "quantization_config": {"ignore": "lm_head"}},
            "must be a list of names of layers, got 'lm_head'",
        ),
        (
            {"quantization": "int8", "quantization_config": {"ignore": ["lm_haed"]}},
            "found 'lm_haed', which fits no layer.*Did you mean 'lm_head'",
        ),
        (
            {"quantization": "int8", "quantization_config": {"ignore": ["re:.*"]}},
            "leaves no layer to quantise",
        ),
        (
            {"quantization": "int8", "quantization_config": {"ignore": ["re:("]}},
            "'re:\\(' is no regular expression",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict, words: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(tiny, **options)


@pytest.mark.parametrize("form", ["safetensors", "orbax", "live"])
def test_weights_that_are_not_finite_are_named(form: str, tiny: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = safetensors.numpy.load_file(tiny / "model.safetensors")
    tensors[name][3, 4] = np.nan if form != "orbax" else np.inf
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    model: object = folder
    if form == "orbax":
        model = export(folder, tmp_path / "orbax", to="orbax")
    if form == "live":
        model = load_params(folder)
    error = ConfigError if form == "live" else CheckpointError
    with pytest.raises(error, match=r"layers\.1\.mlp\.down_proj.*"):
        LLM(model, quantization="int8")


def test_parameters_are_not_quantised_twice(tiny: Path) -> None:
    with LLM(tiny, quantization="int8", max_model_len=64) as llm:
        served = (llm.model_config, llm.params)
    with pytest.raises(ConfigError, match=r"'fp8' was asked for, found .* already, to int8"):
        LLM(served, quantization="fp8")


def test_a_tied_embedding_is_called_lm_head() -> None:
    paths = ["embed_tokens.embedding", "layers.0.mlp.up_proj.kernel", "norm.scale"]
    assert Quantization(scheme="int8").choose(paths) == frozenset(paths[:2])
    kept = Quantization(scheme="int8", ignore=("lm_head",)).choose(paths)
    assert kept == frozenset(paths[1:2])
    assert not any(map(is_scale, paths))
