"""The shape of a BERT encoder: `BertConfig`, read from a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxserve.core.errors import CheckpointError, ConfigError, UnsupportedError
from jaxserve.models.fields import Fields

ENCODER_TYPES = ("bert",)
"""Hugging Face `model_type`s of encoders; `ModelConfig` knows those of decoders."""

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_HF_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
_CLASSIFIER = "BertForSequenceClassification"
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_position",
    "type_vocab_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """Everything that fixes the mathematics of a BERT encoder; hashable.

    Attributes:
        vocab_size: Rows of the token embedding.
        hidden_size: Width of the residual stream; a multiple of `num_heads`.
        intermediate_size: Width inside the feed-forward.
        num_layers: Layers.
        num_heads: Attention heads.
        max_position: Most tokens of a text, special ones included.
        type_vocab_size: Kinds of segments.
        layer_norm_eps: Added to the variance in every norm.
        hidden_act: Activation of the feed-forward; "gelu" is the exact one.
        num_labels: Outputs of the classification head; 0 without a head.
        applies_sigmoid: Whether a single output of the head passes a sigmoid to become a score.
        torch_dtype: Name of the checkpoint's own precision, if it says.

    Raises:
        ConfigError: If the numbers cannot belong together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: Activation = "gelu"
    num_labels: int = 0
    applies_sigmoid: bool = True
    torch_dtype: str | None = None

    def __post_init__(self) -> None:
        """Check that the numbers fit together."""
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and "
                f"{self.num_heads}."
            )
        if not self.layer_norm_eps > 0:
            raise ConfigError(f"layer_norm_eps must be positive, got {self.layer_norm_eps}.")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, raw: Mapping[str, object]) -> "BertConfig":
        """Read the contents of a Hugging Face `config.json`.

        Args:
            raw: The parsed file.

        Returns:
            The same model in our words.

        Raises:
            UnsupportedError: For a variation that would not be computed right.
            CheckpointError: For a missing or impossible value; names the key.

        Source: transformers' `BertConfig` (keys and defaults); sentence-transformers'
            `CrossEncoder` (which heads pass a sigmoid).
        """
        values = Fields(raw, _HF_DEFAULTS)
        _refuse_variations(values, raw.get("model_type"))
        try:
            return cls(
                vocab_size=values.count("vocab_size"),
                hidden_size=values.count("hidden_size"),
                intermediate_size=values.count("intermediate_size"),
                num_layers=values.count("num_hidden_layers"),
                num_heads=values.count("num_attention_heads"),
                max_position=values.count("max_position_embeddings"),
                type_vocab_size=values.count("type_vocab_size"),
                layer_norm_eps=values.number("layer_norm_eps"),
                hidden_act=_ACTIVATIONS[str(values.get("hidden_act", "gelu"))],
                num_labels=_num_labels(values),
                applies_sigmoid=_applies_sigmoid(values),
                torch_dtype=values.word("dtype") or values.word("torch_dtype"),
            )
        except CheckpointError:
            raise
        except ConfigError as error:
            raise CheckpointError(f"config.json: {error}") from error


def _refuse_variations(values: Fields, model_type: object) -> None:
    def refuse(found: str, expected: str) -> None:
        raise UnsupportedError(
            f"config.json: found {found}, expected {expected}; this variation of bert is not "
            "supported."
        )

    if model_type not in ENCODER_TYPES:
        refuse(f"model_type {model_type!r}", f"one of {', '.join(ENCODER_TYPES)}")
    act = values.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        refuse(f"hidden_act {act!r}", f"one of {', '.join(_ACTIVATIONS)}")
    position = values.get("position_embedding_type", "absolute")
    if position != "absolute":
        refuse(f"position_embedding_type {position!r}", "'absolute'")
    for name in ("is_decoder", "add_cross_attention"):
        if values.flag(name):
            refuse(f"{name} true", "false (an encoder)")
    if values.get("quantization_config") is not None:
        refuse("quantization_config", "unquantised safetensors")


def _num_labels(values: Fields) -> int:
    architectures = values.get("architectures", ())
    if not isinstance(architectures, list | tuple) or _CLASSIFIER not in architectures:
        return 0
    labels = values.table("id2label")
    return len(labels) if labels else values.count("num_labels", 2)


def _applies_sigmoid(values: Fields) -> bool:
    newer = values.table("sentence_transformers") or {}
    name = newer.get("activation_fn") or values.get("sbert_ce_default_activation_function")
    kind = str(name or "Sigmoid").rpartition(".")[2]
    if kind not in {"Sigmoid", "Identity"}:
        raise UnsupportedError(
            f"config.json: found the score activation {name!r}, expected Sigmoid or Identity; this "
            "cross-encoder is not supported."
        )
    return kind == "Sigmoid"
