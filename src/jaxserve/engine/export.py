"""Models from any source into a directory of a common format, and parameters out of one."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from jaxserve.core.config import Dtype, EngineConfig, ModelOptions
from jaxserve.core.errors import ConfigError, UnsupportedError, did_you_mean
from jaxserve.core.units import parse_bytes
from jaxserve.engine.source import ModelSource, load_model
from jaxserve.engine.tokenizer import Tokenizer
from jaxserve.engine.tokenizer_files import copy_tokenizer, save_tokenizer
from jaxserve.models.buffer import prepare_buffer
from jaxserve.models.checkpoint import Checkpoint, open_checkpoint
from jaxserve.models.config import ModelConfig
from jaxserve.models.files import read_json
from jaxserve.models.folders import new_folder
from jaxserve.models.fused import fuse
from jaxserve.models.gguf import GgufCheckpoint
from jaxserve.models.hf_config_writer import one_or_many, write_hf_config
from jaxserve.models.hub import resolve_model
from jaxserve.models.loading import check_tensors, hf_name, is_kernel
from jaxserve.models.loading import load_params as read_params
from jaxserve.models.orbax import OrbaxCheckpoint, save_orbax
from jaxserve.models.quantization import dequantized, is_scale, scheme_of
from jaxserve.models.registry import abstract_model, abstract_params, flatten_params
from jaxserve.models.saving import save_safetensors
from jaxserve.sharding.mesh import host_mesh
from jaxserve.sharding.rules import LogicalAxisRules

ExportFormat = Literal["hf", "orbax"]
FORMATS: tuple[str, ...] = get_args(ExportFormat)
NO_TOKENIZER = "none"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def load_params(
    model: ModelSource,
    *,
    dtype: Dtype = "auto",
    mesh: jax.sharding.Mesh | None = None,
    load_format: str = "auto",
    revision: str | None = None,
    progress: bool = False,
) -> tuple[ModelConfig, nnx.State]:
    """Read the parameters of a model onto devices, without an engine.

    Args:
        model: A name, a Hugging Face directory, a GGUF file, an Orbax checkpoint; whatever `LLM`
            takes.
        dtype: Precision of all parameters; "auto" is what `LLM` would choose.
        mesh: Devices to share the weights among; by default the first local one.
        load_format: Format of the files, if it shall not be found out.
        revision: Branch, tag or commit on the model hub.
        progress: Whether to show progress bars.

    Returns:
        The model's shape, and its weights: the state of its `flax.nnx` module. Together they are a
        model that `LLM` and `export` take.

    Raises:
        ModelNotFoundError: If a name or path leads nowhere.
        CheckpointError: If files are damaged or do not fit together.
        UnsupportedError: If the model is of a family that is not known.
    """
    settings = {"dtype": dtype, "load_format": load_format, "revision": revision}
    config = EngineConfig.from_settings(settings)
    loaded = load_model(model, config, mesh=mesh, progress=progress)
    return loaded.config, loaded.state


def export(
    model: ModelSource,
    target: str | Path,
    *,
    to: ExportFormat = "hf",
    dtype: Dtype = "auto",
    shard_size: int | str = "5GB",
    tokenizer: Tokenizer | str | Path | None = None,
    load_format: str = "auto",
    revision: str | None = None,
    progress: bool = False,
) -> Path:
    """Write a model into a new directory that is there whole or not at all.

    Files are read and written piece by piece; on their way to "hf", no more than one file of the
    target is in memory.

    Args:
        model: A name, a Hugging Face directory, a GGUF file, an Orbax checkpoint, an `nnx` module,
            or (configuration, parameters), such as `(llm.model_config, llm.params)`.
        target: The directory; it must not exist, or be empty.
        to: "hf" for safetensors files as transformers writes them, "orbax" for an Orbax checkpoint
            in the folder `params`. Beside either lie `config.json`, `generation_config.json` and
            the tokenizer's files; `LLM`, the server and `load_params` take both.
        dtype: Precision of the weights; "auto" loses nothing: it keeps that of the source, and
            makes float32 of quantised weights.
        shard_size: Most bytes per safetensors file: a number, or a text such as "500MB".
        tokenizer: A tokenizer, a name or path of one, or "none". By default the source's own.
        load_format: Format of the source, if it shall not be found out.
        revision: Branch, tag or commit of the source on the model hub.
        progress: Whether to show progress bars.

    Returns:
        The directory.

    Raises:
        ConfigError: If the target exists, or a setting is wrong.
        CapacityError: If the disk is full.
        ModelNotFoundError: If the source leads nowhere.
        CheckpointError: If the source is damaged or does not fit together; names the tensors.
        UnsupportedError: If the target's format has no words for the model.
    """
    if to not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"to must be one of {known}, got {to!r}.{did_you_mean(to, FORMATS)}")
    options = ModelOptions(dtype=dtype)
    shard_bytes = parse_bytes(shard_size)
    origin: _Origin
    if isinstance(model, str | Path):
        path = resolve_model(model, revision=revision, progress=progress)
        origin = _Stored(open_checkpoint(path, load_format), progress=progress)
    else:
        origin = _Live(model)
    try:
        chosen = origin.own_dtype() if options.dtype == "auto" else options.dtype
        config_json = origin.config_json(chosen)
        num_bytes = origin.num_params() * jnp.dtype(chosen).itemsize
        with new_folder(Path(target), num_bytes=num_bytes) as folder:
            _write_json(folder / "config.json", config_json)
            made = _place_tokenizer(folder, origin, tokenizer, revision)
            _write_json(folder / "generation_config.json", origin.generation_json(made))
            if to == "orbax":
                save_orbax(origin.params(chosen), folder)
            else:
                kind = None if options.dtype == "auto" else jnp.dtype(chosen)
                tensors = fuse(origin.config, origin.tensors())
                save_safetensors(tensors, folder, dtype=kind, shard_bytes=shard_bytes)
    finally:
        origin.close()
    return Path(target)


class _Origin(ABC):
    """What a model is written from."""

    config: ModelConfig
    home: Path | None = None
    """Where a tokenizer may lie."""

    @abstractmethod
    def own_dtype(self) -> str:
        """Return the precision in which nothing is lost."""

    @abstractmethod
    def num_params(self) -> int:
        """Count the weights."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every tensor by Hugging Face name, in its orientation."""

    @abstractmethod
    def params(self, dtype: str) -> dict[str, jax.Array]:
        """Return every parameter by path."""

    def config_json(self, dtype: str) -> Mapping[str, object]:
        """Return the content of `config.json`."""
        return write_hf_config(self.config, dtype=dtype)

    def generation_json(self, tokenizer: Tokenizer | None) -> Mapping[str, object]:
        """Return the content of `generation_config.json`.

        Args:
            tokenizer: The tokenizer that was written, if it was not copied.
        """
        more = () if tokenizer is None else tokenizer.eos_token_ids
        eos = tuple(dict.fromkeys((*self.config.eos_token_ids, *more)))
        ids = {"bos_token_id": self.config.bos_token_id, "eos_token_id": one_or_many(eos)}
        return {key: value for key, value in ids.items() if value is not None}

    @abstractmethod
    def close(self) -> None:
        """Give files back."""


class _Live(_Origin):
    """Parameters in memory."""

    def __init__(self, model: ModelSource) -> None:
        loaded = load_model(model, EngineConfig())
        self.config = loaded.config
        self._arrays = flatten_params(loaded.state)

    def own_dtype(self) -> str:
        if scheme_of(self._arrays) is not None:
            return "float32"
        return str(self._arrays["embed_tokens.embedding"].dtype)

    def num_params(self) -> int:
        return sum(array.size for path, array in self._arrays.items() if not is_scale(path))

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for path, array in dequantized(self._arrays):
            value = np.asarray(array)
            yield hf_name(path), prepare_buffer(value, value.dtype, transpose=is_kernel(path))

    def params(self, dtype: str) -> dict[str, jax.Array]:
        return {path: array.astype(dtype) for path, array in dequantized(self._arrays)}

    def close(self) -> None:
        """Keep the parameters; they are the caller's."""


class _Stored(_Origin):
    """A checkpoint on disk."""

    def __init__(self, checkpoint: Checkpoint, *, progress: bool) -> None:
        self.checkpoint = checkpoint
        self._progress = progress
        self.config = checkpoint.config
        self.home = checkpoint.path
        try:
            self._abstract = self._describe("float32")
            check_tensors(checkpoint, self._abstract)
        except BaseException:
            checkpoint.close()
            raise

    def _describe(self, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Describe the parameters on the host: conversion needs no accelerator's memory."""
        _, state = abstract_model(self.config, dtype=jnp.dtype(dtype))
        return abstract_params(state, mesh=host_mesh(), rules=LogicalAxisRules())

    def own_dtype(self) -> str:
        if self.checkpoint.is_quantized:
            return "float32"
        stored = self.config.torch_dtype
        if stored is None:
            stored = str(self.checkpoint.read("model.embed_tokens.weight").dtype)
        return stored if stored in get_args(Dtype) else "float32"

    def num_params(self) -> int:
        return sum(int(np.prod(spec.shape)) for spec in self._abstract.values())

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        checkpoint = self.checkpoint
        wanted = {hf_name(path) for path in self._abstract}
        names = [name for name in checkpoint.tensor_shapes() if name in wanted]
        pairs = (
            checkpoint.tensors(names)
            if isinstance(checkpoint, OrbaxCheckpoint)
            else ((name, checkpoint.read(name)) for name in names)
        )
        bar = tqdm(
            pairs, total=len(names), desc="Converting", unit="tensor", disable=not self._progress
        )
        return iter(cast(Any, bar))

    def params(self, dtype: str) -> dict[str, jax.Array]:
        return read_params(self.checkpoint, self._describe(dtype), progress=self._progress)

    def config_json(self, dtype: str) -> Mapping[str, object]:
        if isinstance(self.checkpoint, GgufCheckpoint):
            return super().config_json(dtype)
        raw = dict(read_json(self.checkpoint.path / "config.json"))
        if "text_config" in raw:  # only the language model of one that also sees is written
            return super().config_json(dtype)
        raw.pop("quantization_config", None)  # what is narrow in the source is written wide
        key = "dtype" if "dtype" in raw else "torch_dtype"
        return raw | {key: dtype}

    def generation_json(self, tokenizer: Tokenizer | None) -> Mapping[str, object]:
        found = self.checkpoint.generation_config
        if not isinstance(self.checkpoint, GgufCheckpoint):
            return found or super().generation_json(tokenizer)
        sampling = {
            key: _plain_number(found[key]) for key in _SAMPLING if found.get(key) is not None
        }
        if sampling:
            sampling["do_sample"] = True  # transformers ignores the others without it
        return {**super().generation_json(tokenizer), **sampling}

    def close(self) -> None:
        self.checkpoint.close()


def _plain_number(value: object) -> object:
    """Turn numbers of the file's own types into those that JSON knows."""
    return value.item() if isinstance(value, np.generic) else value


def _place_tokenizer(
    folder: Path, origin: _Origin, tokenizer: Tokenizer | str | Path | None, revision: str | None
) -> Tokenizer | None:
    """Put a tokenizer into the folder, and return it if it was written and not copied."""
    if isinstance(tokenizer, Tokenizer):
        save_tokenizer(tokenizer, folder, max_len=origin.config.max_position)
        return tokenizer
    if tokenizer == NO_TOKENIZER:
        return None
    place = origin.home if tokenizer is None else resolve_model(tokenizer, revision=revision)
    if place is None:
        return None
    if place.is_dir() and (copy_tokenizer(place, folder) or tokenizer is None):
        return None
    if tokenizer is None and not _has_tokenizer(origin):
        return None
    try:
        made = Tokenizer.from_path(place)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error} Or convert without it: --tokenizer {NO_TOKENIZER}."
        ) from error
    save_tokenizer(made, folder, max_len=origin.config.max_position)
    return made


def _has_tokenizer(origin: _Origin) -> bool:
    """Tell whether a GGUF file has a vocabulary at all; some hold nothing but weights."""
    checkpoint = origin.checkpoint if isinstance(origin, _Stored) else None
    return not isinstance(checkpoint, GgufCheckpoint) or (
        "tokenizer.ggml.tokens" in checkpoint.metadata
    )


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
