"""Checkpoints of any format: what they have in common, and how to open one."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from jaxserve.core.errors import CheckpointError, ConfigError, ModelNotFoundError
from jaxserve.models.config import ModelConfig
from jaxserve.models.gguf import GgufCheckpoint
from jaxserve.models.loading import SafetensorsCheckpoint
from jaxserve.models.orbax import OrbaxCheckpoint, find_orbax

_FORMATS = ("auto", "safetensors", "gguf", "orbax")


@runtime_checkable
class Checkpoint(Protocol):
    """Weights on disk, described in the words of Hugging Face.

    Attributes:
        path: Directory or file.
        config: The model's configuration.
        is_quantized: Whether reading dequantises.
        generation_config: Sampling defaults that come with the model.
    """

    path: Path
    config: ModelConfig
    is_quantized: bool
    generation_config: dict[str, object]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by Hugging Face name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, oriented `[out, in]`; it may be a read-only view of the file."""
        ...

    def close(self) -> None:
        """Give the files back."""
        ...


def open_checkpoint(path: Path | str, load_format: str = "auto") -> Checkpoint:
    """Open a checkpoint and check everything but the weights themselves.

    Args:
        path: A GGUF file, a Hugging Face directory, an Orbax checkpoint with its `config.json`, or
            a directory with one GGUF file.
        load_format: "safetensors", "gguf", "orbax", or "auto" to look.

    Returns:
        The checkpoint; close it after use.

    Raises:
        ModelNotFoundError: If there is nothing at `path`.
        CheckpointError: If what is there is damaged or is no checkpoint.
        UnsupportedError: If the model is not supported.
        ConfigError: If `load_format` is unknown.
    """
    if load_format not in _FORMATS:
        known = f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise ConfigError(f"load_format must be {known}, got {load_format!r}.")
    place = Path(path)
    if not place.exists():
        raise ModelNotFoundError(f"{place}: no such file or directory; check the path.")
    if load_format == "orbax" or (load_format == "auto" and _is_orbax(place)):
        return _checked(OrbaxCheckpoint(place))
    if load_format != "safetensors":
        file = _gguf_file(place, load_format)
        if file is not None:
            return _checked(GgufCheckpoint(file))
    if place.is_file():
        raise CheckpointError(
            f"{place}: found a file, expected a directory with config.json and *.safetensors; pass "
            "the directory."
        )
    return _checked(SafetensorsCheckpoint(place))


def _is_orbax(place: Path) -> bool:
    """Tell whether the weights of a directory are an Orbax checkpoint and not files beside it."""
    return find_orbax(place) is not None and not any(place.glob("*.safetensors"))


def _gguf_file(place: Path, load_format: str) -> Path | None:
    """Return the GGUF file meant by a path, or None for a Hugging Face directory."""
    if place.is_file():
        return None if place.suffix == ".safetensors" and load_format == "auto" else place
    has_config = (place / "config.json").is_file()
    if load_format == "auto" and has_config and any(place.glob("*.safetensors")):
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(
            f"{place}: found {len(files)} GGUF files ({', '.join(f.name for f in files)}), "
            "expected one; pass the path of a file."
        )
    if load_format == "gguf":
        raise CheckpointError(f"{place}: found no *.gguf file; pass the path of one.")
    return None


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Check the sizes from which a model is built, before anything of these sizes is built."""
    config, shapes = checkpoint.config, checkpoint.tensor_shapes()
    num_layers = sum(name.endswith(".input_layernorm.weight") for name in shapes)
    embedding = shapes.get("model.embed_tokens.weight")
    problem = None
    if embedding is None:
        problem = "found no embedding (model.embed_tokens.weight), expected one"
    elif embedding != (config.vocab_size, config.hidden_size):
        problem = (
            f"found an embedding of {embedding}, expected ({config.vocab_size}, "
            f"{config.hidden_size}) from the configuration"
        )
    elif num_layers != config.num_layers:
        problem = f"found {num_layers} layers, expected {config.num_layers} from the configuration"
    if problem:
        checkpoint.close()
        raise CheckpointError(
            f"{checkpoint.path}: {problem}; check that configuration and weights belong to the "
            "same model, or download it again."
        )
    return checkpoint
