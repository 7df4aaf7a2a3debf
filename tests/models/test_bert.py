"""BERT encoders agree with transformers: hidden states, pooling, heads, real weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxserve import LLM
from jaxserve.attention.metadata import PaddedPlan
from jaxserve.core.errors import (
    CheckpointError,
    ConfigError,
    JaxserveError,
    RequestError,
    UnsupportedError,
)
from jaxserve.models.bert import Bert, abstract_bert
from jaxserve.models.bert_checkpoint import BertCheckpoint, is_encoder, our_name
from jaxserve.models.bert_config import BertConfig
from jaxserve.models.hub import resolve_model
from jaxserve.models.loading import load_params
from jaxserve.models.registry import abstract_params, fill
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import LogicalAxisRules
from tests.bert import BERT, GOLDEN, copy_of, golden, pooled, rows
from tests.cases import slow

NAMES = sorted(path.parent.name for path in BERT.glob("*/golden.npz"))
ENCODERS = [name for name in NAMES if name != "cross"]
TOLERANCE = 1e-5


def load(path: Path) -> Bert:
    checkpoint = BertCheckpoint(path)
    graph, state = abstract_bert(checkpoint.config, dtype=jnp.dtype("float32"))
    described = abstract_params(state, mesh=make_mesh(), rules=LogicalAxisRules())
    model = nnx.merge(graph, fill(state, load_params(checkpoint, described)))
    checkpoint.close()
    return model


def embed(path: Path, texts: object, **settings: object) -> np.ndarray:
    with LLM(path, **settings) as llm:
        outputs = llm.embed(texts, use_tqdm=False)
    return np.stack([output.outputs.vector for output in outputs])


def test_the_golden_files_name_their_makers() -> None:
    meta = json.loads((BERT / "meta.json").read_text())
    assert set(meta["cases"]) == set(NAMES)
    assert meta["transformers"]
    assert meta["torch"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_hidden_states_agree(name: str, backend: str) -> None:
    case, model = golden(name), load(BERT / name)
    lengths = jnp.asarray(case["lengths"])
    with jax.default_matmul_precision("highest"):
        plan = PaddedPlan(lengths=lengths, backend=backend)
        hidden = model(jnp.asarray(case["tokens"]), jnp.asarray(case["segments"]), plan)
    own = np.arange(hidden.shape[1])[None] < case["lengths"][:, None]
    found = np.where(own[..., None], hidden, 0)
    np.testing.assert_allclose(found, case["hidden"], rtol=0, atol=TOLERANCE)
    if "logits" in case:
        np.testing.assert_allclose(model.classify(hidden), case["logits"], rtol=0, atol=TOLERANCE)
    else:
        with pytest.raises(ValueError, match="has no classification head"):
            model.classify(hidden)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("how", ["mean", "cls", slow("max"), slow("last")])
def test_embeddings_agree(name: str, how: str) -> None:
    case = golden(name)
    found = embed(BERT / name, rows(case), pooler_config={"pooling_type": how.upper()})
    np.testing.assert_allclose(found, pooled(case, how), rtol=0, atol=TOLERANCE)


def test_vectors_may_be_left_as_they_are() -> None:
    case = golden("plain")
    expected = pooled(case, "mean", normalize=False)
    found = embed(BERT / "plain", rows(case), pooler_config={"normalize": False})
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    with LLM(BERT / "plain", pooler_config={"use_activation": False}) as llm:
        (output,) = llm.embed(rows(case)[3], normalize=True, use_tqdm=False)
        assert np.linalg.norm(output.outputs.vector) == pytest.approx(1)
        assert output.outputs.hidden_size == len(output.outputs.embedding) == 24


@pytest.mark.parametrize(("activation", "apply"), [(None, True), ("torch.nn.Identity", False)])
def test_a_cross_encoder_scores_pairs(tmp_path: Path, activation: str | None, apply: bool) -> None:
    case = golden("cross")
    folder = copy_of("cross", tmp_path / "cross")
    change_config(folder, sbert_ce_default_activation_function=activation)
    left, right = case["pair_texts"].T.tolist()
    with LLM(folder) as llm:
        scores = [output.outputs.score for output in llm.score(left, right, use_tqdm=False)]
        one = llm.score(left[0], right[:2], use_tqdm=False)
        with pytest.raises(RequestError, match="cross-encoder, which scores pairs"):
            llm.embed("a")
    logits = case["pair_logits"][:, 0].astype(np.float64)
    expected = 1 / (1 + np.exp(-logits)) if apply else logits
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    assert [output.outputs.score for output in one] == pytest.approx(scores[:2], abs=TOLERANCE)


def test_a_live_module_embeds() -> None:
    case, model = golden("plain"), load(BERT / "plain")
    expected = pooled(case, "mean")
    for source in (model, (model.config, nnx.state(model))):
        np.testing.assert_allclose(embed(source, rows(case)), expected, rtol=0, atol=TOLERANCE)


def test_several_labels_have_no_score() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
        max_position=16, num_labels=3,
    )  # fmt: skip
    llm = LLM(Bert(config, rngs=nnx.Rngs(0)))
    with llm, pytest.raises(RequestError, match="classifier with 3 outputs"):
        llm.score("a", "b")


def test_dummy_weights_need_a_configuration_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((BERT / "plain" / "config.json").read_text())
    assert embed(tmp_path, [[5, 6]], load_format="dummy").shape == (1, 24)


def test_half_precision_is_close() -> None:
    case = golden("plain")
    found = embed(BERT / "plain", rows(case), dtype="bfloat16")
    np.testing.assert_allclose(found, pooled(case, "mean"), rtol=0, atol=0.05)


# Files ----------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"position_embedding_type": "relative_key"}, UnsupportedError, "position_embedding_type"),
        ({"is_decoder": True}, UnsupportedError, "is_decoder true, expected false"),
        ({"hidden_act": "mish"}, UnsupportedError, "hidden_act 'mish', expected one of gelu"),
        ({"quantization_config": {}}, UnsupportedError, "quantization_config"),
        ({"hidden_size": 25}, CheckpointError, "hidden_size must be a multiple of num_heads"),
        ({"vocab_size": 0}, CheckpointError, "'vocab_size', expected a whole number"),
        ({"vocab_size": 70}, CheckpointError, r"embed_tokens.weight \(64, 24\) instead of"),
        ({"num_hidden_layers": 3}, CheckpointError, "missing: model.layers.2"),
        ({"num_hidden_layers": 1}, CheckpointError, "without a place in the model: model.layers.1"),
        (
            {"architectures": ["BertForSequenceClassification"], "num_labels": 2},
            CheckpointError,
            "missing: model.classifier",
        ),
        ({"sbert_ce_default_activation_function": "x.Softmax"}, UnsupportedError, "x.Softmax"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, changes: dict, error: type[JaxserveError], words: str
) -> None:
    folder = copy_of("plain", tmp_path / "model")
    change_config(folder, **changes)
    with pytest.raises(error, match=words):
        LLM(folder)


def test_old_names_are_understood(tmp_path: Path) -> None:
    folder = copy_of("plain", tmp_path / "model")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    renamed = {}
    for name, value in weights.items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + old.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    renamed["bert.embeddings.position_ids"] = np.arange(48)[None]
    safetensors.numpy.save_file(renamed, folder / "model.safetensors")
    case = golden("plain")
    found = embed(folder, rows(case))
    np.testing.assert_allclose(found, pooled(case, "mean"), rtol=0, atol=TOLERANCE)
    both = weights | {"bert.embeddings.LayerNorm.beta": weights["embeddings.LayerNorm.bias"]}
    safetensors.numpy.save_file(both, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="which are the same tensor"):
        LLM(folder)


def test_unknown_tensors_keep_their_names() -> None:
    assert our_name("bert.encoder.layer.1.crossattention.self.query.weight").startswith("bert.")
    assert our_name("rotary.inv_freq") == "rotary.inv_freq"


def test_an_encoder_is_known_by_its_configuration(tmp_path: Path) -> None:
    assert is_encoder(BERT / "plain")
    assert not is_encoder(BERT / "plain" / "config.json")
    assert not is_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_encoder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"runner": "generate"}, "is an encoder, which embeds and scores but does not generate"),
        ({"runner": "draft"}, "runner must be one of auto, generate, pooling"),
        ({"max_model_len": 49}, "max_model_len=49 exceeds the model's 48 positions"),
        ({"load_format": "gguf"}, "read from safetensors"),
        ({"pooler_config": {"pooling": "mean"}}, "unknown key 'pooling'.*'pooling_type'"),
        ({"pooler_config": {"pooling_type": "sum"}}, "one of mean, last, cls, max, got 'sum'"),
        ({"pooler_config": {"normalize": 1}}, "normalize must be true or false, got 1"),
    ],
)
def test_settings_that_do_not_fit_an_encoder(settings: dict, words: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=words):
        LLM(BERT / "plain", **settings)


# The real model -------------------------------------------------------------------------------


@pytest.mark.weights
def test_minilm_agrees() -> None:
    try:
        folder = resolve_model("all-minilm-l6-v2", progress=False)
    except JaxserveError as error:
        pytest.skip(f"the model cannot be had: {error}")
    with np.load(GOLDEN / "minilm.npz") as data:
        texts, tokens, lengths, vectors = (
            data[name] for name in ("texts", "tokens", "lengths", "vectors")
        )
    with LLM(folder) as llm:
        assert llm.config.model.max_model_len == 256
        outputs = llm.embed(texts.tolist(), use_tqdm=False, truncate_prompt_tokens=-1)
        alone = llm.embed(texts[0].item(), use_tqdm=False)
    for output, ids, length in zip(outputs, tokens, lengths, strict=True):
        assert output.prompt_token_ids == ids[:length].tolist()
    found = np.stack([output.outputs.vector for output in outputs])
    np.testing.assert_allclose(found, vectors, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(alone[0].outputs.vector, vectors[0], rtol=0, atol=TOLERANCE)
