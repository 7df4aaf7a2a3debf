"""Numbers in Triton kernels: narrow ones by arithmetic on bits that every device has, and angles.

Devices before Ada (compute capability 8.9) cannot convert to or from e4m3, and Triton refuses its
type there. So kernels take buffers of float8 as bytes, and these functions do the rest; where only
memory bounds a kernel they cost nothing.
"""

import triton
import triton.language as tl

ROUND_TO_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: adding it leaves float32 no bits for fractions, so the sum is rounded to even."""


@triton.jit
def as_bytes(pointer):
    """View a pointer to one-byte numbers as one to bytes."""
    return pointer.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def to_float8(x, mantissa: tl.constexpr, largest: tl.constexpr):
    """Round float32 to a byte with `mantissa` bits behind the point, ties to even, saturating.

    With three it is e4m3 (no infinities, NaN is 0x7F), with two it is e5m2.
    """
    bias: tl.constexpr = 7 if mantissa == 3 else 15
    dropped: tl.constexpr = 23 - mantissa
    is_nan = x != x
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), largest)
    bits = size.to(tl.uint32, bitcast=True)
    rounded = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    normal = (rounded >> dropped) - ((127 - bias) << mantissa)
    # Below the smallest normal number, steps are as wide as there: adding a number whose last
    # place is one step rounds, and leaves the count of steps in the last places of the sum.
    anchor: tl.constexpr = 2.0 ** (23 + 1 - bias - mantissa)
    sum_bits = (size + anchor).to(tl.uint32, bitcast=True)
    steps = sum_bits - tl.full(size.shape, anchor, tl.float32).to(tl.uint32, bitcast=True)
    is_small = size < 2.0 ** (1 - bias)
    byte = tl.where(is_small, steps, normal)
    byte = tl.where(is_nan, 0x7F, byte)
    return (byte | sign).to(tl.uint8)


@triton.jit
def from_float8(byte, mantissa: tl.constexpr):
    """Turn bytes, three bits behind the point for e4m3 or two for e5m2, into float16; exact."""
    wide = byte.to(tl.uint16)
    if mantissa == 2:
        return (wide << 8).to(tl.float16, bitcast=True)
    size = wide & 0x7F
    # The exponent of float16 is biased by eight more; multiplying also heals denormal numbers.
    bits = ((wide & 0x80) << 8) | (size << 7)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where(size == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def to_int8(x):
    """Round float32 to a byte between -127 and 127, ties to even; NaN becomes 0."""
    size = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -127.0), 127.0)
    return ((size + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int32).to(tl.int8)


@triton.jit
def sin_cos(x):
    """Return sine and cosine of float32, to about 2e-7 for angles up to 1e5.

    The library's functions take a slow way for large angles, whose code and stack every kernel with
    them would carry. Here the angle is reduced to an eighth of a turn by three constants whose
    products with a count of quarter turns are exact or nearly so.

    Source: Cody and Waite's reduction, and polynomials, as in Cephes (sinf, cosf).
    """
    count = tl.floor(x * 0.6366197723675814 + 0.5)
    rest = x - count * 1.5703125
    rest = rest - count * 4.837512969970703e-4
    rest = rest - count * 7.549789948768648e-8
    square = rest * rest
    sine = -1.9515295891e-4 * square + 8.3321608736e-3
    sine = (sine * square - 1.6666654611e-1) * square * rest + rest
    cosine = 2.443315711809948e-5 * square - 1.388731625493765e-3
    cosine = (cosine * square + 4.166664568298827e-2) * square * square - 0.5 * square + 1.0
    quarter = count.to(tl.int32) & 3
    is_odd = (quarter & 1) != 0
    new_sine = tl.where(is_odd, cosine, sine)
    new_cosine = tl.where(is_odd, sine, cosine)
    new_sine = tl.where(quarter >= 2, -new_sine, new_sine)
    new_cosine = tl.where((quarter == 1) | (quarter == 2), -new_cosine, new_cosine)
    return new_sine, new_cosine
