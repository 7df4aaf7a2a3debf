"""BERT checkpoints of Hugging Face, under the names of our own module."""

import re
from pathlib import Path

import numpy as np

from jaxserve.core.errors import CheckpointError, ModelNotFoundError
from jaxserve.models.bert_config import ENCODER_TYPES, BertConfig
from jaxserve.models.files import read_json
from jaxserve.models.loading import SafetensorsFiles

_PARTS = {
    "embeddings.word_embeddings": "model.embed_tokens",
    "embeddings.position_embeddings": "model.embed_positions",
    "embeddings.token_type_embeddings": "model.embed_segments",
    "embeddings.LayerNorm": "model.embed_norm",
    "pooler.dense": "model.pooler",
    "classifier": "model.classifier",
}
_LAYER_PARTS = {
    "attention.self.query": "q_proj",
    "attention.self.key": "k_proj",
    "attention.self.value": "v_proj",
    "attention.output.dense": "o_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up_proj",
    "output.dense": "down_proj",
    "output.LayerNorm": "norm",
}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
"""Endings of names; the Greek ones are of checkpoints that were converted from TensorFlow."""
_UNUSED = ("cls.", "embeddings.position_ids")
"""Heads of pretraining, and numbers that are computed."""


def is_encoder(path: Path) -> bool:
    """Tell whether a path is a directory with the checkpoint of an encoder.

    Args:
        path: Any path.

    Raises:
        CheckpointError: If its config.json is damaged.
    """
    try:
        raw = read_json(path / "config.json") if path.is_dir() else {}
    except ModelNotFoundError:
        return False
    return raw.get("model_type") in ENCODER_TYPES


def our_name(name: str) -> str:
    """Translate the name of a tensor in a checkpoint into the one that `load_params` asks for.

    Unknown names come back as they are, so that they are reported.

    >>> our_name("bert.encoder.layer.3.attention.self.query.weight")
    'model.layers.3.q_proj.weight'
    """
    stem, _, kind = name.removeprefix("bert.").rpartition(".")
    if kind not in _KINDS:
        return name
    part = _PARTS.get(stem)
    match = _LAYER.fullmatch(stem)
    if match and match[2] in _LAYER_PARTS:
        part = f"model.layers.{match[1]}.{_LAYER_PARTS[match[2]]}"
    return name if part is None else f"{part}.{_KINDS[kind]}"


class BertCheckpoint:
    """A Hugging Face directory with a BERT model: `config.json` and safetensors files.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        config: The model's configuration.

    Raises:
        ModelNotFoundError: If there is no `config.json`.
        CheckpointError: If a file is damaged or missing.
        UnsupportedError: If it is a variation that would not be computed right.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration and the header of every file, but no weights."""
        self.path = path
        self.config = BertConfig.from_hf(read_json(path / "config.json"))
        self._files = SafetensorsFiles(path)
        self._theirs: dict[str, str] = {}
        for name in self._files.tensor_shapes():
            ours = our_name(name)
            if self._is_unused(name, ours):
                continue
            if ours in self._theirs:
                raise CheckpointError(
                    f"{path}: found {name!r} and {self._theirs[ours]!r}, which are the same "
                    "tensor; remove the files that do not belong to the model."
                )
            self._theirs[ours] = name

    def _is_unused(self, name: str, ours: str) -> bool:
        # Most checkpoints carry the pooler of pretraining, which only a classifier reads.
        is_idle_pooler = ours.startswith("model.pooler.") and not self.config.num_labels
        return is_idle_pooler or name.removeprefix("bert.").startswith(_UNUSED)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that is used, by our name."""
        shapes = self._files.tensor_shapes()
        return {ours: shapes[theirs] for ours, theirs in self._theirs.items()}

    def read(self, name: str) -> np.ndarray:
        """Read one tensor by our name, as stored."""
        return self._files.read(self._theirs[name])

    def close(self) -> None:
        """Give the files back."""
        self._files.close()
