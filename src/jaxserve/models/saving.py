"""Weights to safetensors files, as transformers lays them out."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from jaxserve.core.errors import ConfigError
from jaxserve.models.buffer import prepare_buffer
from jaxserve.models.loading import INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES = 5 * 10**9
"""What transformers and the hub have used for years."""
_METADATA = {"format": "pt"}
"""Transformers refuses files that do not say which library's layout they follow."""
_UNNUMBERED = "part-{:05}.safetensors"
_NUMBERED = "model-{:05}-of-{:05}.safetensors"


def save_safetensors(
    tensors: Iterable[tuple[str, np.ndarray]],
    folder: Path,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> int:
    """Write tensors into one file, or into numbered files with an index.

    No more than one file's tensors are in memory at a time.

    Args:
        tensors: Names and values, in Hugging Face's words and orientation.
        folder: An empty folder.
        dtype: Element type of everything; None keeps what each tensor has.
        shard_bytes: Most bytes of tensors per file; a larger tensor has a file of its own.

    Returns:
        Bytes of all tensors.

    Raises:
        ConfigError: If `shard_bytes` is not positive.
    """
    if shard_bytes < 1:
        raise ConfigError(f"the shard size must be at least one byte, got {shard_bytes}.")
    held: dict[str, np.ndarray] = {}
    held_bytes = total = 0
    parts: list[list[str]] = []

    def flush() -> None:
        if held:
            save_file(held, folder / _UNNUMBERED.format(len(parts)), metadata=_METADATA)
            parts.append(list(held))
            held.clear()

    for name, value in tensors:
        kind = value.dtype if dtype is None else np.dtype(dtype)
        ready = prepare_buffer(value, kind, transpose=False)
        if held_bytes + ready.nbytes > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = ready
        held_bytes += ready.nbytes
        total += ready.nbytes
    flush()
    _name_files(folder, parts, total)
    return total


def _name_files(folder: Path, parts: list[list[str]], total: int) -> None:
    """Give the files their final names, now that their number is known."""
    if len(parts) == 1:
        (folder / _UNNUMBERED.format(0)).rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = _NUMBERED.format(number + 1, len(parts))
        (folder / _UNNUMBERED.format(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
