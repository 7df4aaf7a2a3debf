"""GGUF files: metadata, tensors by their Hugging Face names, and the model's configuration.

The file is mapped into memory and nothing in it is trusted: every length is checked against what
is left of the file before it is used. Four things differ from a Hugging Face checkpoint and are
undone here: dimensions are listed in reverse, tensors have other names, files of the llama and
smollm3 architectures have the rows of query and key weights reordered for interleaved rotation, and
norms of gemma hold one more than their weight.

Source: the GGUF specification (versions 2 and 3) in the ggml repository; names of keys and tensors
as llama.cpp's converter writes them.
"""

import contextlib
import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.core.errors import CheckpointError, UnsupportedError, did_you_mean
from jaxserve.models.expert_tensors import ExpertSlice
from jaxserve.models.fields import Fields
from jaxserve.models.files import AGAIN, cannot_open, describe_start
from jaxserve.models.fused import slices_of
from jaxserve.models.ggml import FORMATS, OTHER_FORMATS, Format, dequantize
from jaxserve.models.gguf_config import ROPE_FACTORS, GgufTensors, hf_name, read_config

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_STORED_AS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Precision that a file's embedding tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor of a GGUF file lies.

    Attributes:
        name: Its name in the file.
        shape: Its shape, slowest axis first, as numpy counts.
        format: How its weights are packed.
        offset: Bytes from the start of the file.
        nbytes: Its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    nbytes: int


class _Cursor:
    """A place in a mapped file; every step is checked against its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.pos = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: at byte {self.pos}: {what}; {AGAIN}")

    def need(self, nbytes: int, what: str) -> None:
        left = len(self.data) - self.pos
        if nbytes > left:
            raise self.fail(f"found {left} bytes, expected {nbytes} more for {what}")

    def u32(self, what: str) -> int:
        self.need(4, what)
        (value,) = _U32.unpack_from(self.data, self.pos)
        self.pos += 4
        return value

    def u64(self, what: str) -> int:
        self.need(8, what)
        (value,) = _U64.unpack_from(self.data, self.pos)
        self.pos += 8
        return value

    def strings(self, count: int, what: str) -> list[str]:
        self.need(8 * count, what)  # so that a wrong count cannot start a giant loop
        data, pos, end, unpack = self.data, self.pos, len(self.data), _U64.unpack_from
        found: list[str] = []
        for _ in range(count):
            (length,) = unpack(data, pos) if pos + 8 <= end else (end,)
            start, pos = pos + 8, pos + 8 + length
            if pos > end:
                self.pos = start
                raise self.fail(f"found {max(0, end - start)} bytes, expected more for {what}")
            try:
                found.append(data[start:pos].decode())
            except UnicodeDecodeError as error:
                self.pos = start
                raise self.fail(f"found bytes that are not UTF-8, expected {what}") from error
        self.pos = pos
        return found

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def value(self, kind: int, what: str) -> object:
        """Read a metadata value; arrays of numbers become numpy arrays, of strings lists."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            kind, count = self.u32(what), self.u64(what)
            return self.strings(count, what) if kind == _STRING else self.numbers(kind, count, what)
        return self.numbers(kind, 1, what)[0].item()

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = np.dtype("u1") if kind == _BOOL else _NUMBERS.get(kind)
        if dtype is None:
            raise self.fail(
                f"found value type {kind} for {what}, expected a number, a string or an array"
            )
        nbytes = count * dtype.itemsize
        self.need(nbytes, what)
        found = np.frombuffer(self.data[self.pos : self.pos + nbytes], dtype)
        self.pos += nbytes
        return found != 0 if kind == _BOOL else found


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if head[:4] != _MAGIC:
                raise CheckpointError(
                    f"{path}: expected a GGUF file (beginning with {_MAGIC!r}), "
                    f"{describe_start(head)}"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise cannot_open(path, error) from error


def _read_header(cursor: _Cursor) -> tuple[dict[str, object], int]:
    """Return the metadata and the number of tensors; leave the cursor at the first one."""
    cursor.pos = len(_MAGIC)
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "a big-endian file" if swapped in _VERSIONS else f"version {version}"
        raise CheckpointError(
            f"{cursor.path}: found {what}, expected a little-endian GGUF file of version 2 or 3; "
            "convert it again with a current converter."
        )
    num_tensors, num_values = cursor.u64("the number of tensors"), cursor.u64("the metadata count")
    cursor.need(13 * num_values + 25 * num_tensors, f"{num_values} values, {num_tensors} tensors")
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"found the metadata key {key!r} twice")
        metadata[key] = cursor.value(cursor.u32("a value type"), f"metadata {key!r}")
    return metadata, num_tensors


def _read_tensor_infos(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    places: list[tuple[str, tuple[int, ...], Format, int]] = []
    for _ in range(count):
        name = cursor.string("a tensor name")
        num_dims = cursor.u32(f"tensor {name!r}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise cursor.fail(f"found {num_dims} dimensions for tensor {name!r}, expected 1 to 4")
        reversed_shape = [cursor.u64(f"tensor {name!r}") for _ in range(num_dims)]
        kind = _format(cursor, name, cursor.u32(f"tensor {name!r}"))
        if min(reversed_shape) < 1 or reversed_shape[0] % kind.block_len:
            raise cursor.fail(
                f"found dimensions {reversed_shape} for tensor {name!r}, expected positive numbers "
                f"and the first a multiple of {kind.block_len} ({kind.name})"
            )
        offset = cursor.u64(f"tensor {name!r}")
        if offset % alignment:
            raise cursor.fail(
                f"found offset {offset} for tensor {name!r}, expected a multiple of {alignment}"
            )
        places.append((name, tuple(reversed_shape[::-1]), kind, offset))
    begin = -(-cursor.pos // alignment) * alignment
    infos: dict[str, TensorInfo] = {}
    end_of_last = begin
    for name, shape, kind, offset in sorted(places, key=lambda place: place[3]):
        nbytes = math.prod(shape) // kind.block_len * kind.block.itemsize
        start = begin + offset
        if name in infos or start < end_of_last:
            raise cursor.fail(f"found tensor {name!r} twice or inside another one")
        end_of_last = start + nbytes
        if end_of_last > len(cursor.data):
            raise CheckpointError(
                f"{cursor.path}: found {len(cursor.data)} bytes, expected at least {end_of_last} "
                f"(tensor {name!r} ends there); {AGAIN}"
            )
        infos[name] = TensorInfo(name=name, shape=shape, format=kind, offset=start, nbytes=nbytes)
    return infos


def _format(cursor: _Cursor, name: str, number: int) -> Format:
    if number in FORMATS:
        return FORMATS[number]
    known = ", ".join(kind.name for kind in FORMATS.values())
    raise CheckpointError(
        f"{cursor.path}: found tensor {name!r} in the format "
        f"{OTHER_FORMATS.get(number, f'number {number}')}, expected one of {known}; get the model "
        "in one of these (Q8_0 and Q4_K_M files are common)."
    )


def read_metadata(path: Path) -> dict[str, object]:
    """Read the metadata of a GGUF file, such as its tokenizer, and none of its tensors.

    Args:
        path: The file.

    Returns:
        Key -> number, bool, string, list of strings, or numpy array of numbers.

    Raises:
        ModelNotFoundError: If there is no such file.
        CheckpointError: If it is not a whole GGUF file.
    """
    with _map_file(path) as data:
        return _read_header(_Cursor(data, path))[0]


class GgufCheckpoint:
    """A model in one GGUF file; tensors are dequantised as they are read.

    Args:
        path: The file.

    Attributes:
        path: The file.
        metadata: As `read_metadata` returns it.
        config: The model's configuration.
        is_quantized: Whether any weights are quantised.
        generation_config: Sampling defaults that the file recommends, if any.

    Raises:
        ModelNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged or holds an unknown format.
        UnsupportedError: If the model is of another architecture, or a variation that would not be
            computed right.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and check everything but the weights themselves."""
        self.path = path
        self._data = _map_file(path)
        try:
            cursor = _Cursor(self._data, path)
            self.metadata, num_tensors = _read_header(cursor)
            where = str(path)
            _refuse_splits(Fields(self.metadata, where=where))
            infos = _read_tensor_infos(cursor, num_tensors, _alignment(cursor, self.metadata))
            fields = Fields(self.metadata, where=where)
            embedding = infos.get("token_embd.weight")
            self.is_quantized = any(info.format.is_quantized for info in infos.values())
            tensors = GgufTensors(
                shapes={name: info.shape for name, info in infos.items()},
                rope_factors={
                    name: tuple(self._numbers(infos[name]).reshape(-1).tolist())
                    for name in ROPE_FACTORS
                    if name in infos
                },
                torch_dtype=None
                if embedding is None or self.is_quantized
                else _STORED_AS.get(embedding.format.name),
            )
            self.config = read_config(fields, tensors)
            self._tensors = self._name_tensors(infos)
        except BaseException:
            self.close()
            raise
        prefix = "general.sampling."
        self.generation_config: dict[str, object] = {
            ours: self.metadata[prefix + theirs]
            for theirs, ours in _SAMPLING_KEYS.items()
            if prefix + theirs in self.metadata
        }

    def _name_tensors(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Give tensors the names of Hugging Face, and cut those apart that are stored as one."""
        arch = self.config.model_type
        named = {hf_name(name, arch): name for name in infos if name not in ROPE_FACTORS}
        shapes = {ours: infos[name].shape for ours, name in named.items()}
        tensors: dict[str, TensorInfo] = {}
        for ours, part in slices_of(self.config, shapes, str(self.path)).items():
            if isinstance(part, ExpertSlice):
                raise UnsupportedError(f"{self.path}: experts are not read from GGUF files.")
            info = infos[named[part.source]]
            if part.start is not None:
                # Rows are packed one behind the other.
                row = info.nbytes // info.shape[0]
                info = dataclasses.replace(
                    info,
                    shape=part.shape,
                    offset=info.offset + part.start * row,
                    nbytes=part.shape[0] * row,
                )
            tensors[ours] = info
        return tensors

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by Hugging Face name where it has one."""
        return {name: info.shape for name, info in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: Its Hugging Face name.

        Returns:
            The weights in Hugging Face's orientation and order of rows: float32 for quantised
            formats, otherwise as stored. It may be a read-only view of the file.

        Raises:
            CheckpointError: If there is no such tensor, or it holds damaged values.
        """
        info = self._tensors.get(name)
        if info is None:
            hint = did_you_mean(name, self._tensors)
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{hint}")
        heads = 0
        if self.config.model_type in {"llama", "smollm3"}:
            if ".q_proj." in name:
                heads = self.config.num_heads
            elif ".k_proj." in name:
                heads = self.config.num_kv_heads
        value = self._numbers(info, heads)
        if self.config.norm_plus_one and name.endswith("norm.weight"):
            return value.astype(np.float32) - np.float32(1)
        return value

    def _numbers(self, info: TensorInfo, heads: int = 0) -> np.ndarray:
        raw = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        if heads:
            raw = self._half_split(raw, info, heads)
        try:
            return dequantize(raw, info.format).reshape(info.shape)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {info.name!r}: {error}; {AGAIN}") from error

    def _half_split(self, raw: np.ndarray, info: TensorInfo, heads: int) -> np.ndarray:
        """Reorder rows from interleaved (0, 1, 2, ...) to half-split (0, 2, ..., 1, 3, ...).

        Rows are moved while they are still packed, as whole blocks lie along the other axis.
        """
        if info.shape[0] != heads * self.config.head_dim:
            raise CheckpointError(
                f"{self.path}: found {info.shape[0]} rows in tensor {info.name!r}, expected "
                f"{heads} heads of {self.config.head_dim}; {AGAIN}"
            )
        rows = raw.reshape(heads, self.config.head_dim // 2, 2, -1)
        return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)

    def close(self) -> None:
        """Give the file back; views that `read` returned keep it until they are gone."""
        with contextlib.suppress(BufferError):  # in use; the mapping goes with the last view
            self._data.close()


def _alignment(cursor: _Cursor, metadata: Mapping[str, object]) -> int:
    found = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(found, int) or not 1 <= found <= _MAX_ALIGNMENT or found & (found - 1):
        raise cursor.fail(f"found general.alignment {found!r}, expected a power of two")
    return found


def _refuse_splits(fields: Fields) -> None:
    if "split.count" in fields and fields.count("split.count") > 1:
        raise UnsupportedError(
            f"{fields.where}: found one part of a split GGUF file, expected a whole one; join the "
            "parts with llama.cpp's `llama-gguf-split --merge`."
        )
