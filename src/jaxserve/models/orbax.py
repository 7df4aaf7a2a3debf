"""Orbax checkpoints: parameters as a tree of arrays, with the model's configuration beside them.

The layout written here is a Hugging Face directory with the folder `params` in the place of the
safetensors files: the pure dictionary of the module's state. Read are also trees that training code
has saved by itself (`nnx.State`, flat names, a `params` branch of a larger tree), through Orbax's
current and its former functions, as long as a `config.json` lies in the folder or beside it.
"""

import contextlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.core.errors import CheckpointError, ModelNotFoundError, did_you_mean
from jaxserve.models.config import ModelConfig
from jaxserve.models.files import AGAIN, read_json
from jaxserve.models.loading import (
    hf_name,
    is_kernel,
    read_generation_config,
    report_mismatch,
    turned_shape,
)
from jaxserve.models.quantization import (
    is_finite,
    is_scale,
    quantize_array,
    scale_path,
    summed_axis,
)
from jaxserve.sharding.mesh import host_mesh

PARAMS_FOLDER = "params"
"""Where the weights lie in a directory that this module has written."""
_MARKS = ("_CHECKPOINT_METADATA", "_METADATA", "orbax.checkpoint")
"""Files of which an Orbax checkpoint has at least one."""
_GROUP_BYTES = 1 << 30
"""Bytes under way at a time; more would be a second copy of the model on the host."""
_OUTPUT = "lm_head.kernel"


def find_orbax(path: Path) -> Path | None:
    """Return the Orbax checkpoint that a directory is or holds, or None."""
    for folder in (path / PARAMS_FOLDER, path):
        if any((folder / mark).is_file() for mark in _MARKS):
            return folder
    return None


class OrbaxCheckpoint:
    """A model whose weights are an Orbax checkpoint.

    Args:
        path: A directory with `config.json` and `params`, or an Orbax checkpoint with `config.json`
            in it or in its parent.

    Attributes:
        path: The directory of `config.json`; the tokenizer's files lie there too.
        config: The model's configuration.
        is_quantized: False.
        generation_config: Contents of `generation_config.json`, empty if there is none.

    Raises:
        ModelNotFoundError: If there is no checkpoint, or no `config.json`.
        CheckpointError: If a file is damaged.
        UnsupportedError: If the model is of another family.
    """

    is_quantized = False

    def __init__(self, path: Path) -> None:
        """Read the configuration and the description of the tree, but no weights."""
        folder = find_orbax(path)
        if folder is None:
            raise ModelNotFoundError(
                f"{path}: found no Orbax checkpoint, expected a folder with one of "
                f"{', '.join(_MARKS)}, or {PARAMS_FOLDER}/ that is one; check the path."
            )
        homes = dict.fromkeys((path, folder, folder.parent))
        home = next((home for home in homes if (home / "config.json").is_file()), None)
        if home is None:
            raise ModelNotFoundError(
                f"{folder}: found no config.json in it or beside it, expected the model's "
                "configuration; put the config.json of the Hugging Face model there."
            )
        self.path = home
        self._folder = folder
        config = ModelConfig.from_hf(read_json(home / "config.json"))
        self.config, self.generation_config = read_generation_config(home, config)
        self._leaves, self._tree = _read_tree(folder)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by Hugging Face name and in its orientation."""
        return {
            hf_name(name): turned_shape(leaf.shape) if is_kernel(name) else leaf.shape
            for name, (_, leaf) in self._leaves.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Read one tensor; `tensors` is faster for many.

        Args:
            name: Its Hugging Face name.

        Returns:
            The weights as stored, in Hugging Face's orientation.

        Raises:
            CheckpointError: If there is no such tensor, or it cannot be read.
        """
        return next(self.tensors([name]))[1]

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Read several tensors, in groups of bounded size.

        Args:
            names: Their Hugging Face names.

        Yields:
            Names and weights, as `read` returns them, in order.

        Raises:
            CheckpointError: If there is no such tensor, or one cannot be read.
        """
        paths = {hf_name(path): path for path in self._leaves}
        for name in names:
            if name not in paths:
                hint = did_you_mean(name, paths)
                raise CheckpointError(f"{self._folder}: no tensor {name!r}.{hint}")
        host = NamedSharding(host_mesh(), PartitionSpec())
        for group in self._groups([paths[name] for name in names]):
            wanted = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
                for path, leaf in ((path, self._leaves[path][1]) for path in group)
            }
            for path, array in self._read(wanted).items():
                value = np.asarray(array)
                yield hf_name(path), np.swapaxes(value, -1, -2) if is_kernel(path) else value

    def _groups(self, paths: Sequence[str]) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0
        for path in paths:
            leaf = self._leaves[path][1]
            num_bytes = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
            if group and size + num_bytes > _GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(path)
            size += num_bytes
        if group:
            yield group

    def load(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Read every parameter straight onto its devices; each host reads only its own shards.

        Args:
            abstract: Shape, dtype and sharding of each parameter, by path; weights that have scales
                beside them are quantised, a group at a time.

        Returns:
            The parameters by path, in the order of `abstract`.

        Raises:
            CheckpointError: If a leaf is missing, extra or of a wrong shape, or cannot be read;
                names it.
        """
        report_mismatch(
            str(self._folder),
            "leaves",
            {name: tuple(leaf.shape) for name, (_, leaf) in self._leaves.items()},
            {name: tuple(spec.shape) for name, spec in abstract.items() if not is_scale(name)},
            ignored={_OUTPUT},
        )
        if any(map(is_scale, abstract)):
            loaded = self._quantized(abstract)
            return {name: loaded[name] for name in abstract}
        return self._read(abstract)

    def _quantized(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        loaded: dict[str, jax.Array] = {}
        for group in self._groups([name for name in abstract if not is_scale(name)]):
            wanted = {name: self._as_read(name, abstract) for name in group}
            for name, array in self._read(wanted).items():
                if scale_path(name) not in abstract:
                    loaded[name] = array
                    continue
                scale_spec = abstract[scale_path(name)]
                stored, scale = quantize_array(array, abstract[name], scale_spec, summed_axis(name))
                if not is_finite(scale):
                    raise CheckpointError(
                        f"{self._folder}: leaf {name!r}: found a value that is not a finite "
                        f"number, so it cannot be quantised; {AGAIN}"
                    )
                loaded[name], loaded[scale_path(name)] = stored, scale
        return loaded

    def _as_read(
        self, name: str, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> jax.ShapeDtypeStruct:
        """Describe a leaf as it comes from the files: what is quantised comes as it was stored."""
        spec = abstract[name]
        if scale_path(name) not in abstract:
            return spec
        stored = self._leaves[name][1].dtype
        return jax.ShapeDtypeStruct(spec.shape, stored, sharding=spec.sharding)

    def _read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        from orbax.checkpoint import v1 as ocp  # noqa: PLC0415  takes a second to import

        by_key = {self._leaves[name][0]: spec for name, spec in wanted.items()}
        tree = jax.tree.map_with_path(
            lambda key, _: by_key.get(jax.tree_util.keystr(key), ocp.PLACEHOLDER),
            self._tree,
            is_leaf=_is_described,
        )
        largest = max(int(np.prod(s.shape)) * max(4, s.dtype.itemsize) for s in wanted.values())
        room = ocp.options.MemoryOptions(read_concurrent_bytes=max(_GROUP_BYTES, 4 * largest))
        with self._explained(), ocp.Context(memory_options=room):
            found = ocp.load(str(self._folder), tree)
            flat = {
                jax.tree_util.keystr(key): leaf
                for key, leaf in jax.tree_util.tree_flatten_with_path(found)[0]
            }
            return {name: jax.block_until_ready(flat[self._leaves[name][0]]) for name in wanted}

    @contextlib.contextmanager
    def _explained(self) -> Generator[None]:
        with _quiet():
            try:
                yield
            except (jax.errors.JaxRuntimeError, MemoryError):
                raise  # not the file's fault
            except Exception as error:  # Orbax raises nothing narrower
                raise _damaged(self._folder, error) from error

    def close(self) -> None:
        """Do nothing; no file stays open."""


def save_orbax(params: Mapping[str, jax.Array], folder: Path) -> int:
    """Write parameters as an Orbax checkpoint, a tree of nested dictionaries.

    Args:
        params: Arrays by dotted path.
        folder: Where; `params` is made in it.

    Returns:
        Bytes of all arrays.
    """
    from orbax.checkpoint import v1 as ocp  # noqa: PLC0415  takes a second to import

    tree: dict[str, Any] = {}
    for path, value in params.items():
        *branches, leaf = path.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = value
    largest = max(value.nbytes for value in params.values())
    room = ocp.options.MemoryOptions(
        write_concurrent_bytes=max(_GROUP_BYTES, 4 * largest),
        transfer_concurrent_bytes=max(_GROUP_BYTES, 4 * largest),
        deepcopy_host_arrays=False,  # nothing changes them meanwhile
    )
    with _quiet(), ocp.Context(memory_options=room):
        ocp.save(str(folder / PARAMS_FOLDER), tree)
    return sum(value.nbytes for value in params.values())


def _is_described(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _read_tree(folder: Path) -> tuple[dict[str, tuple[str, Any]], Any]:
    """Return the leaves by path, each with its key in Orbax's tree, and that tree."""
    from orbax.checkpoint import v1 as ocp  # noqa: PLC0415  takes a second to import

    try:
        with _quiet():
            tree = ocp.metadata(str(folder)).metadata
    except Exception as error:  # Orbax raises nothing narrower
        raise _damaged(folder, error) from error
    if tree is None:  # what Orbax says of all that it cannot read
        raise _damaged(folder, ValueError("the description of its tree is lost or damaged"))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_described)
    leaves = {_path_of(key): (jax.tree_util.keystr(key), leaf) for key, leaf in flat}
    for name, (_, leaf) in leaves.items():
        if not _is_described(leaf) or leaf.shape is None:
            raise CheckpointError(
                f"{folder}: found {type(leaf).__name__} at {name!r}, expected arrays only; save "
                "the model's parameters by themselves, or under the key 'params'."
            )
    if not any(name.startswith("embed_tokens.") for name in leaves):
        branch = f"{PARAMS_FOLDER}."
        leaves = {
            name.removeprefix(branch): leaf
            for name, leaf in leaves.items()
            if name.startswith(branch)
        } or leaves
    return leaves, tree


def _path_of(key: tuple[Any, ...]) -> str:
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key]
    if len(parts) > 1 and parts[-1] == "value":  # the variable that held the array
        parts.pop()
    return ".".join(parts)


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    said = " ".join(str(first).split())[:300] or type(first).__name__
    return CheckpointError(f"{folder}: Orbax cannot read it whole ({said}); {AGAIN}")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep Orbax's own reports off the log; what fails is raised anyway."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
