"""Safetensors directories, and the way of weights from any checkpoint onto the devices."""

import dataclasses
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from jaxserve.core.errors import CheckpointError, ModelNotFoundError, UnsupportedError, did_you_mean
from jaxserve.models.buffer import prepare_buffer
from jaxserve.models.config import ModelConfig
from jaxserve.models.expert_tensors import ExpertSlice
from jaxserve.models.fields import Fields
from jaxserve.models.files import AGAIN, cannot_open, describe_start, read_json
from jaxserve.models.fused import Slice, slices_of
from jaxserve.models.quantization import is_scale, quantize_rows, scale_path
from jaxserve.sharding.arrays import put

INDEX_FILE = "model.safetensors.index.json"
"""Says which file holds which tensor, where there are several."""
SINGLE_FILE = "model.safetensors"
"""The only file, where there is one."""
_READABLE = ("F64", "F32", "F16", "BF16")
_FOUR_BITS = ("U8",)
"""Type of weights and scales in mxfp4."""
_BUFFERS = ("rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints hold but that are computed, not learnt."""
_WEIGHTS = ("kernel", "embedding", "scale", "offset")
"""Parameters that Hugging Face calls `weight`; others have the same name there."""
_OUTPUT = "lm_head.weight"
_MOST_NAMED = 5
_MAX_THREADS = 4
"""Tensors read at a time; each needs host memory, and more threads do not read faster."""


@runtime_checkable
class TensorSource(Protocol):
    """What loading needs of a checkpoint."""

    path: Path

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by Hugging Face name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read one tensor."""
        ...


@runtime_checkable
class DeviceSource(Protocol):
    """A checkpoint that brings its own way of putting weights onto devices."""

    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Read every parameter, by path, with the dtype and sharding described."""
        ...


class SafetensorsFiles:
    """The safetensors files of a directory.

    Args:
        path: The directory.
        config: The decoder that they belong to; its fused tensors are taken apart. None leaves
            every tensor as it is stored.
        names: The files; None takes those that the index names, or all of them.

    Attributes:
        path: The directory.

    Raises:
        CheckpointError: If a file is damaged or missing, or a tensor is named in two files.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        """Read the header of every file, but no weights."""
        self.path = path
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._stored: dict[str, tuple[int, ...]] = {}
        index = _read_index(path) if names is None else {}
        for name in _shard_names(path, index) if names is None else names:
            self._open_shard(name)
        lost = [tensor for tensor in index if tensor not in self._file_of]
        if lost:
            raise CheckpointError(
                f"{path / INDEX_FILE}: names {some_names(lost)}, which no file holds; download the "
                "model again."
            )
        self._slices: Mapping[str, Slice | ExpertSlice] = (
            {name: Slice(source=name, shape=shape) for name, shape in self._stored.items()}
            if config is None
            else slices_of(config, self._stored, str(path))
        )

    def _open_shard(self, name: str) -> None:
        path = self.path / name
        try:
            shard = safe_open(path, framework="numpy")
        except OSError as error:
            raise cannot_open(path, error) from error
        except SafetensorError as error:
            with path.open("rb") as file:
                head = file.read(64)
            told = describe_start(head) if head[8:9] != b"{" else AGAIN
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); {told}"
            ) from error
        for tensor in shard.keys():  # noqa: SIM118  the object is no mapping
            if tensor in self._file_of:
                raise CheckpointError(
                    f"{path}: found tensor {tensor!r} a second time, first in "
                    f"{self._file_of[tensor]}; remove the files that do not belong to the model."
                )
            self._file_of[tensor] = name
            self._stored[tensor] = tuple(shard.get_slice(tensor).get_shape())
        self._files[name] = shard

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name, file by file."""
        return {name: part.shape for name, part in self._slices.items()}

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: Its name.

        Returns:
            The weights as stored.

        Raises:
            CheckpointError: If there is no such tensor.
            UnsupportedError: If its weights are neither float nor bfloat16 numbers.
        """
        part = self._slices.get(name)
        if part is None:
            hint = did_you_mean(name, self._slices)
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{hint}")
        if isinstance(part, ExpertSlice):
            kinds = _READABLE if part.scales is None else (*_READABLE, *_FOUR_BITS)
            return part.read(lambda source: self._stored_tensor(name, source, kinds))
        if part.start is None:
            return self._stored_tensor(name, part.source, _READABLE)
        return self._slice_of(name, part.source, _READABLE)[part.start : part.start + part.shape[0]]

    def _stored_tensor(self, name: str, source: str, kinds: Sequence[str]) -> np.ndarray:
        self._slice_of(name, source, kinds)
        return self._files[self._file_of[source]].get_tensor(source)

    def _slice_of(self, name: str, source: str, kinds: Sequence[str]) -> Any:  # noqa: ANN401  no type of safetensors is public
        """Return a view of a stored tensor, whose type is checked."""
        stored = self._files[self._file_of[source]].get_slice(source)
        kind = stored.get_dtype()
        if kind not in kinds:
            raise UnsupportedError(
                f"{self.path / self._file_of[source]}: found tensor {name!r} of type {kind}, "
                f"expected one of {', '.join(_READABLE)}; quantised safetensors are not supported, "
                "get the original model or a GGUF file."
            )
        return stored

    def close(self) -> None:
        """Give the files back."""
        self._files.clear()


def read_generation_config(
    folder: Path, config: ModelConfig
) -> tuple[ModelConfig, dict[str, object]]:
    """Read the sampling defaults beside a model.

    Args:
        folder: Where `generation_config.json` may lie.
        config: The model's configuration.

    Returns:
        The configuration with the end-of-sequence tokens of both files, and the contents of
        `generation_config.json`, empty if there is none.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = folder / "generation_config.json"
    try:
        found = dict(read_json(path))
    except ModelNotFoundError:
        return config, {}
    more = Fields(found, where=str(path)).token_ids("eos_token_id")
    eos = tuple(dict.fromkeys((*config.eos_token_ids, *more)))
    return dataclasses.replace(config, eos_token_ids=eos), found


class SafetensorsCheckpoint(SafetensorsFiles):
    """A Hugging Face directory: `config.json` and one or more safetensors files.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        config: The model's configuration; its end-of-sequence tokens include those of
            `generation_config.json`.
        is_quantized: False; quantised safetensors are refused.
        generation_config: Contents of `generation_config.json`, empty if there is none.

    Raises:
        ModelNotFoundError: If there is no `config.json`.
        CheckpointError: If a file is damaged or missing, or a tensor is named in two files.
        UnsupportedError: If the model is of another family, or a variation that would not be
            computed right.
    """

    is_quantized = False

    def __init__(self, path: Path) -> None:
        """Read the configuration and the header of every file, but no weights."""
        config = ModelConfig.from_hf(read_json(path / "config.json"))
        self.config, self.generation_config = read_generation_config(path, config)
        super().__init__(path, self.config)


def _read_index(path: Path) -> Mapping[str, str]:
    """Return tensor -> file, empty if the directory has no index."""
    try:
        fields = Fields(read_json(path / INDEX_FILE), where=str(path / INDEX_FILE))
    except ModelNotFoundError:
        return {}
    index: dict[str, str] = {}
    for tensor, file in (fields.table("weight_map") or {}).items():
        # A name with a folder in it would lead out of the checkpoint.
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise CheckpointError(
                f"{path / INDEX_FILE}: found {file!r} as the file of tensor {tensor!r}, expected "
                "the name of a file beside it; download the model again."
            )
        index[tensor] = file
    return index


def _shard_names(path: Path, index: Mapping[str, str]) -> list[str]:
    if index:
        names = sorted(set(index.values()))
        lost = [name for name in names if not (path / name).is_file()]
        if lost:
            raise CheckpointError(
                f"{path}: {INDEX_FILE} names {some_names(lost)}, found no such file; download the "
                "model again."
            )
        return names
    if (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        there = sorted(file.name for file in path.glob("*.bin")) or ["no weights"]
        raise CheckpointError(
            f"{path}: found {some_names(there)}, expected *.safetensors files; get the model as "
            "safetensors or GGUF."
        )
    return names


def some_names(names: Iterable[str]) -> str:
    """List the first few names and count the others."""
    listed = list(names)
    shown = ", ".join(listed[:_MOST_NAMED])
    return shown if len(listed) <= _MOST_NAMED else f"{shown} and {len(listed) - _MOST_NAMED} more"


def hf_name(path: str) -> str:
    """Translate the path of a parameter into its Hugging Face name.

    Args:
        path: Path in a model of this package.

    Returns:
        The name that checkpoints use.

    >>> hf_name("layers.0.mlp.up_proj.kernel"), hf_name("lm_head.kernel")
    ('model.layers.0.mlp.up_proj.weight', 'lm_head.weight')
    """
    stem, _, kind = path.rpartition(".")
    name = f"{stem}.{'weight' if kind in _WEIGHTS else kind}"
    return name if stem == "lm_head" else f"model.{name}"


def is_kernel(path: str) -> bool:
    """Tell whether a parameter is a matrix, or a stack, which Hugging Face stores transposed."""
    return path.endswith(".kernel")


def turned_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a matrix, or of a stack of them, whose two last axes are exchanged.

    >>> turned_shape((2, 3)), turned_shape((8, 2, 3))
    ((3, 2), (8, 3, 2))
    """
    return (*shape[:-2], shape[-1], shape[-2])


def check_tensors(source: TensorSource, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Check that a checkpoint holds the parameters of a model, and nothing else.

    Args:
        source: The checkpoint.
        abstract: Parameters by path.

    Raises:
        CheckpointError: If a tensor is missing, extra or of a wrong shape; names it.
    """
    found = source.tensor_shapes()
    expected = {
        hf_name(path): turned_shape(spec.shape) if is_kernel(path) else tuple(spec.shape)
        for path, spec in abstract.items()
        if not is_scale(path)
    }
    found = {name: shape for name, shape in found.items() if not name.endswith(_BUFFERS)}
    # An output projection beside a tied embedding is a copy of it.
    report_mismatch(str(source.path), "tensors", found, expected, ignored={_OUTPUT})


def report_mismatch(
    where: str,
    kind: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignored: Container[str] = (),
) -> None:
    """Compare the shapes that a checkpoint holds with those that a model needs.

    Args:
        where: The checkpoint, for the error message.
        kind: What its entries are called there.
        found: Shapes by name in the checkpoint.
        expected: Shapes by name in the model.
        ignored: Names that may be there without a place in the model.

    Raises:
        CheckpointError: If one is missing, extra or of a wrong shape; names it.
    """
    extra = [name for name in found if name not in expected and name not in ignored]
    missing = [name for name in expected if name not in found]
    shapes = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{what}: {some_names(names)}"
        for what, names in (
            ("missing", missing),
            ("without a place in the model", extra),
            ("of a wrong shape", shapes),
        )
        if names
    ]
    if problems:
        listed = f"; {kind} ".join(problems)
        raise CheckpointError(
            f"{where}: the {kind} do not fit the configuration. {kind.capitalize()} {listed}. "
            "Check that configuration and weights belong to the same model, or download it again."
        )


def load_params(
    checkpoint: TensorSource,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: DTypeLike | None = None,
    progress: bool = False,
) -> dict[str, jax.Array]:
    """Read every parameter of a model onto its devices, quantised where it has scales there.

    A few tensors are on their way at a time, so the host never holds a second copy of the model.
    On a CPU the arrays are the memory they were read into.

    Args:
        checkpoint: Where the weights are.
        abstract: Shape, dtype and, optionally, sharding of each parameter, by path.
        dtype: Element type of all parameters that are not quantised; None takes that of
            `abstract`.
        progress: Show a progress bar on stderr.

    Returns:
        The parameters by path, in the order of `abstract`.

    Raises:
        CheckpointError: If a tensor is missing, extra, of a wrong shape, or damaged, or cannot be
            quantised; names it.
    """
    if dtype is not None:
        abstract = {
            path: spec
            if is_scale(path) or scale_path(path) in abstract
            else jax.ShapeDtypeStruct(spec.shape, dtype, sharding=spec.sharding)
            for path, spec in abstract.items()
        }
    if isinstance(checkpoint, DeviceSource):
        return checkpoint.load(abstract)
    check_tensors(checkpoint, abstract)
    order = {name: place for place, name in enumerate(checkpoint.tensor_shapes())}
    weights = [path for path in abstract if not is_scale(path)]
    paths = sorted(weights, key=lambda path: order[hf_name(path)])

    def load(path: str) -> dict[str, jax.Array]:
        value = checkpoint.read(hf_name(path))
        parts = {path: value}
        if scale_path(path) in abstract:
            try:
                parts[path], parts[scale_path(path)] = quantize_rows(value, abstract[path].dtype)
            except ValueError as error:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {hf_name(path)!r}: {error}, so it cannot be "
                    f"quantised; {AGAIN}"
                ) from error
        return {name: _place(name, part, abstract[name]) for name, part in parts.items()}

    with (
        ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "load") as pool,
        tqdm(total=len(paths), desc="Loading weights", unit="tensor", disable=not progress) as bar,
    ):
        loaded: dict[str, jax.Array] = {}
        try:
            for arrays in pool.map(load, paths):
                loaded |= arrays
                bar.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {path: loaded[path] for path in abstract}


def _place(path: str, value: np.ndarray, spec: jax.ShapeDtypeStruct) -> jax.Array:
    buffer = prepare_buffer(value, spec.dtype, transpose=is_kernel(path))
    # Blocks, so that buffers of running transfers do not pile up.
    return put(buffer, spec.sharding).block_until_ready()
