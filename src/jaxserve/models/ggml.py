"""Block formats of ggml: how weights are packed in a GGUF file, and how they become numbers.

A quantised format packs a fixed number of neighbouring weights into one block of bytes with a scale
(and sometimes a minimum). Each format below is one structured numpy dtype that spells out the
block, and one function that unpacks many blocks at once. All arithmetic is float32 in the order of
the reference implementation, so the results are the same to the last bit.

Source: the block structures of ggml (`ggml-common.h`, MIT), as documented there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int8, UInt8

from jaxserve.models.buffer import empty_buffer

Blocks = np.ndarray
"""A one-dimensional structured array, one element per block."""
Weights = Float32[np.ndarray, "blocks block_len"]

_CHUNK = 1 << 17
"""Weights unpacked at a time: the float32 result and its temporaries stay in the cache."""


@dataclass(frozen=True, slots=True)
class Format:
    """One tensor type of a GGUF file.

    Attributes:
        name: As the file's authors write it.
        block: Layout of one block in bytes.
        block_len: Weights per block.
        unpack: Turns blocks into float32 weights, in place; None for plain numbers.
    """

    name: str
    block: np.dtype
    block_len: int = 1
    unpack: Callable[[Blocks, Weights], None] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether weights share scales."""
        return self.unpack is not None


def dequantize(data: UInt8[np.ndarray, " bytes"], kind: Format) -> np.ndarray:
    """Turn the bytes of a tensor into numbers.

    Args:
        data: Whole blocks, one after another.
        kind: Their format.

    Returns:
        float32 for quantised formats; otherwise the numbers as stored, without a copy.

    Raises:
        ValueError: If a scale is not a finite number.
    """
    blocks = data.view(kind.block)
    if kind.unpack is None:
        return blocks
    for field in ("scale", "low"):
        if field in (kind.block.names or ()) and not np.isfinite(blocks[field]).all():
            raise ValueError(f"found a {field} that is not a finite number")
    weights = empty_buffer((len(blocks), kind.block_len), np.float32)
    step = max(1, _CHUNK // kind.block_len)
    for start in range(0, len(blocks), step):
        kind.unpack(blocks[start : start + step], weights[start : start + step])
    return weights.reshape(-1)


def _column(blocks: Blocks, field: str) -> Float32[np.ndarray, "blocks 1"]:
    return blocks[field].astype(np.float32)[:, None]


def _q4_0(blocks: Blocks, weights: Weights) -> None:
    quants = blocks["quants"]
    np.subtract(quants & 0x0F, np.float32(8), out=weights[:, :16])
    np.subtract(quants >> 4, np.float32(8), out=weights[:, 16:])
    weights *= _column(blocks, "scale")


def _q4_1(blocks: Blocks, weights: Weights) -> None:
    quants, scale = blocks["quants"], _column(blocks, "scale")
    np.multiply(quants & 0x0F, scale, out=weights[:, :16])
    np.multiply(quants >> 4, scale, out=weights[:, 16:])
    weights += _column(blocks, "low")


def _five_bits(blocks: Blocks) -> UInt8[np.ndarray, "blocks 32"]:
    fifth = np.unpackbits(blocks["high"], axis=1, bitorder="little") << 4
    fifth[:, :16] |= blocks["quants"] & 0x0F
    fifth[:, 16:] |= blocks["quants"] >> 4
    return fifth


def _q5_0(blocks: Blocks, weights: Weights) -> None:
    np.subtract(_five_bits(blocks), np.float32(16), out=weights)
    weights *= _column(blocks, "scale")


def _q5_1(blocks: Blocks, weights: Weights) -> None:
    np.multiply(_five_bits(blocks), _column(blocks, "scale"), out=weights)
    weights += _column(blocks, "low")


def _q8_0(blocks: Blocks, weights: Weights) -> None:
    np.multiply(blocks["quants"], _column(blocks, "scale"), out=weights)


def _scales_and_lows(
    blocks: Blocks,
) -> tuple[Float32[np.ndarray, "blocks 8 1"], Float32[np.ndarray, "blocks 8 1"]]:
    """Unpack the eight 6-bit scales and minimums of a K block; 12 bytes hold all sixteen."""
    packed = blocks["scales"]
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, third & 0x0F | (first >> 6) << 4], axis=1)
    lows = np.concatenate([second & 63, third >> 4 | (second >> 6) << 4], axis=1)
    return (
        (_column(blocks, "scale") * scales)[:, :, None],
        (_column(blocks, "low") * lows)[:, :, None],
    )


def _eight_groups(quants: UInt8[np.ndarray, "blocks 128"]) -> UInt8[np.ndarray, "blocks 8 32"]:
    """Split nibbles: bytes come in four groups of 32, each two groups of 32 weights."""
    pairs = quants.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None]
    return (pairs & 0x0F).reshape(-1, 8, 32)


def _q4_k(blocks: Blocks, weights: Weights) -> None:
    scales, lows = _scales_and_lows(blocks)
    out = weights.reshape(-1, 8, 32)
    np.multiply(_eight_groups(blocks["quants"]), scales, out=out)
    out -= lows


def _q5_k(blocks: Blocks, weights: Weights) -> None:
    scales, lows = _scales_and_lows(blocks)
    fifth = blocks["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    out = weights.reshape(-1, 8, 32)
    np.multiply(_eight_groups(blocks["quants"]) | fifth << 4, scales, out=out)
    out -= lows


def _q6_k(blocks: Blocks, weights: Weights) -> None:
    shifts = np.array([0, 4], np.uint8)[:, None, None]
    low = blocks["quants"].reshape(-1, 2, 1, 2, 32) >> shifts & 0x0F
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks["high"].reshape(-1, 2, 1, 32) >> shifts & 3
    quants = low.reshape(-1, 16, 16) | high.reshape(-1, 16, 16) << 4
    centred: Int8[np.ndarray, "blocks 16 16"] = quants.view(np.int8) - np.int8(32)
    scales = _column(blocks, "scale") * blocks["scales"]
    np.multiply(centred, scales[:, :, None], out=weights.reshape(-1, 16, 16))


_HALF = np.dtype("<f2")
_BYTE = np.dtype("u1")

FORMATS: dict[int, Format] = {
    0: Format("F32", np.dtype("<f4")),
    1: Format("F16", _HALF),
    2: Format("Q4_0", np.dtype([("scale", _HALF), ("quants", _BYTE, 16)]), 32, _q4_0),
    3: Format(
        "Q4_1", np.dtype([("scale", _HALF), ("low", _HALF), ("quants", _BYTE, 16)]), 32, _q4_1
    ),
    6: Format(
        "Q5_0", np.dtype([("scale", _HALF), ("high", _BYTE, 4), ("quants", _BYTE, 16)]), 32, _q5_0
    ),
    7: Format(
        "Q5_1",
        np.dtype([("scale", _HALF), ("low", _HALF), ("high", _BYTE, 4), ("quants", _BYTE, 16)]),
        32,
        _q5_1,
    ),
    8: Format("Q8_0", np.dtype([("scale", _HALF), ("quants", "i1", 32)]), 32, _q8_0),
    12: Format(
        "Q4_K",
        np.dtype([("scale", _HALF), ("low", _HALF), ("scales", _BYTE, 12), ("quants", _BYTE, 128)]),
        256,
        _q4_k,
    ),
    13: Format(
        "Q5_K",
        np.dtype(
            [
                ("scale", _HALF),
                ("low", _HALF),
                ("scales", _BYTE, 12),
                ("high", _BYTE, 32),
                ("quants", _BYTE, 128),
            ]
        ),
        256,
        _q5_k,
    ),
    14: Format(
        "Q6_K",
        np.dtype(
            [("quants", _BYTE, 128), ("high", _BYTE, 64), ("scales", "i1", 16), ("scale", _HALF)]
        ),
        256,
        _q6_k,
    ),
    30: Format("BF16", np.dtype(ml_dtypes.bfloat16)),
}
"""Type number in the file -> format."""

OTHER_FORMATS: dict[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
"""Formats that exist but are not read, for error messages."""
