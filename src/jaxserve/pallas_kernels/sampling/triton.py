"""One program per row. Every step is one pass over the row's logits, which stay in the L2 cache.

Weights are computed from logits anew in each pass, with the same operations and so the same bits:
they are exponentials whose largest is 1. A row takes one pass for its maximum, one for its mass,
and two per draw, of which one or two are usual.
"""

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from jaxserve.pallas_kernels.sampling.random import PARITY
from jaxserve.pallas_kernels.triton_launch import launch

_MAX_BLOCK = 4096
"""Logits of a step of a pass; of sixteen bytes per thread and load there are four."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_PARITY = tl.constexpr(PARITY)
_NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def _mix(left, right, rotation: tl.constexpr):
    left = left + right
    right = (right << rotation) | (right >> (32 - rotation))
    return left, right ^ left


@triton.jit
def uniform(key0, key1, count):
    """Draw the number that `random.uniform` draws."""
    key2 = key0 ^ key1 ^ _PARITY
    left = count + key0
    right = key1
    left, right = _mix(left, right, 13)
    left, right = _mix(left, right, 15)
    left, right = _mix(left, right, 26)
    left, right = _mix(left, right, 6)
    left += key1
    right += key2 + 1
    left, right = _mix(left, right, 17)
    left, right = _mix(left, right, 29)
    left, right = _mix(left, right, 16)
    left, right = _mix(left, right, 24)
    left += key2
    right += key0 + 2
    left, right = _mix(left, right, 13)
    left, right = _mix(left, right, 15)
    left, right = _mix(left, right, 26)
    left, right = _mix(left, right, 6)
    left += key0
    right += key1 + 3
    left, right = _mix(left, right, 17)
    left, right = _mix(left, right, 29)
    left, right = _mix(left, right, 16)
    left, right = _mix(left, right, 24)
    left += key1
    right += key2 + 4
    left, right = _mix(left, right, 13)
    left, right = _mix(left, right, 15)
    left, right = _mix(left, right, 26)
    left, right = _mix(left, right, 6)
    left += key2
    return (left >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2 ** -24


@triton.jit
def load_weights(row_ptr, low, top, slope, vocab: tl.constexpr, block: tl.constexpr):
    """Load a block of logits as weights; behind the end of the row they are less than any."""
    at = low + tl.arange(0, block)
    logit = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    weight = tl.exp2((logit - top) * slope)
    return tl.where(at < vocab, weight, -2.0)


@triton.jit
def heavier(row_ptr, top, slope, first, second, vocab: tl.constexpr, block: tl.constexpr):
    """Count and add up what is heavier than each of two pivots, in one pass."""
    first_count = tl.zeros((block,), tl.int32)
    second_count = tl.zeros((block,), tl.int32)
    first_mass = tl.zeros((block,), tl.float32)
    second_mass = tl.zeros((block,), tl.float32)
    for low in range(0, vocab, block):
        weight = load_weights(row_ptr, low, top, slope, vocab, block)
        first_count += (weight > first).to(tl.int32)
        second_count += (weight > second).to(tl.int32)
        first_mass += tl.where(weight > first, weight, 0.0)
        second_mass += tl.where(weight > second, weight, 0.0)
    return (
        tl.sum(first_count, axis=0),
        tl.sum(first_mass, axis=0),
        tl.sum(second_count, axis=0),
        tl.sum(second_mass, axis=0),
    )


@triton.jit
def draw(row_ptr, top, slope, floor, target, vocab: tl.constexpr, block: tl.constexpr):
    """Find the token at which the running sum of weights above the floor passes the target.

    Rounding may leave the target at or behind the last sum: then the last token above the floor is
    drawn.

    Returns:
        The token, and its weight.
    """
    before = target * 0.0
    token = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    low = tl.full((), 0, tl.int32)
    while (low < vocab) & (token < 0):
        weight = load_weights(row_ptr, low, top, slope, vocab, block)
        at = low + tl.arange(0, block)
        weight = tl.where(weight > floor, weight, 0.0)
        inside = tl.sum(weight, axis=0)
        is_there = weight > 0
        last = tl.maximum(last, tl.max(tl.where(is_there, at, 0), axis=0))
        if before + inside > target:
            passed = is_there & (before + tl.cumsum(weight, axis=0) > target)
            found = tl.min(tl.where(passed, at, _NO_INDEX), axis=0)
            token = tl.where(found == _NO_INDEX, last, found)
        before += inside
        low += block
    token = tl.where(token < 0, last, token)
    logit = tl.load(row_ptr + token).to(tl.float32)
    return token, tl.exp2((logit - top) * slope)


@triton.jit
def as_bits(x):
    """Return the bits of a float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """Return the float32 of some bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def just_below(x):
    """Return the number before x, so that "at least x" is "more than" it; -1 before 0."""
    return tl.where(x > 0, as_float(as_bits(x) - 1), -1.0)


@triton.jit
def mass_of_top_k(row_ptr, top, slope, limit, floor, vocab: tl.constexpr, block: tl.constexpr):
    """Add up the heaviest `limit` tokens, and what weighs as much as the last of them.

    Cuts the range in which the weight of the last one lies into three, as a pattern of bits, until
    one number is left. More than `limit` tokens must be heavier than the floor.
    """
    least = as_bits(tl.maximum(floor, 0.0))
    most = as_bits(floor * 0.0 + 1.0)
    mass = floor * 0.0
    while least < most:
        third = (most - least) // 3
        first = least + third
        second = most - third - 1
        first_count, _, second_count, _ = heavier(
            row_ptr, top, slope, as_float(first), as_float(second), vocab, block
        )
        # The smallest number that is enough: fewer than `limit` tokens are heavier.
        if first_count < limit:
            most = first
        elif second_count < limit:
            least = first + 1
            most = second
        else:
            least = second + 1
    _, mass, _, _ = heavier(row_ptr, top, slope, just_below(as_float(least)), 2.0, vocab, block)
    return mass


@triton.jit
def sample_kernel(
    logits_ptr,
    key_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    token_ptr,
    vocab: tl.constexpr,
    block: tl.constexpr,
):
    """Draw the token of one row; one program per row."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * vocab
    temperature = tl.load(temperature_ptr + row)

    best = tl.full((block,), float("-inf"), tl.float32)
    best_at = tl.zeros((block,), tl.int32)
    for low in range(0, vocab, block):
        at = low + tl.arange(0, block)
        logit = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        best_at = tl.where(logit > best, at, best_at)
        best = tl.maximum(best, logit)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, best_at, _NO_INDEX), axis=0)

    if temperature > 0:
        slope = _LOG2_E / temperature
        key0 = tl.load(key_ptr + 2 * row)
        key1 = tl.load(key_ptr + 2 * row + 1)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        limit = tl.where(top_k > 0, top_k, vocab)
        floor = just_below(tl.load(min_p_ptr + row))
        count, total, _, _ = heavier(row_ptr, top, slope, floor, 2.0, vocab, block)
        bound = float("inf") + top_p * 0.0
        if top_p < 1:
            mass = total
            if count > limit:
                mass = mass_of_top_k(row_ptr, top, slope, limit, floor, vocab, block)
            bound = top_p * mass
        ceiling = top_p * 0.0 + 1.0
        turn = row * 0
        is_drawn = row * 0
        while is_drawn == 0:
            number = uniform(key0, key1, turn.to(tl.uint32))
            token, first = draw(row_ptr, top, slope, floor, number * total, vocab, block)
            second = 0.5 * (first + ceiling)
            first_count, first_mass, second_count, second_mass = heavier(
                row_ptr, top, slope, first, second, vocab, block
            )
            first_ok = ((first_count < limit) & (first_mass < bound)) | (first_count == 0)
            second_ok = ((second_count < limit) & (second_mass < bound)) | (second_count == 0)
            is_drawn = first_ok.to(tl.int32)
            # Nothing as light as what was refused is kept; all as heavy as what is fine is.
            floor = tl.where(second_ok, first, second)
            total = tl.where(second_ok, first_mass, second_mass)
            ceiling = tl.where(second_ok, second, ceiling)
            turn += 1
    tl.store(token_ptr + row, token)


def sample(
    logits: Array,
    key: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
) -> Array:
    """Draw tokens; arguments are those of the public function, checked."""
    rows, vocab = logits.shape
    block = min(_MAX_BLOCK, triton.next_power_of_2(vocab))
    (token,) = launch(
        sample_kernel,
        logits,
        key,
        temperature.astype("float32"),
        top_k.astype("int32"),
        top_p.astype("float32"),
        min_p.astype("float32"),
        grid=(rows,),
        outputs=(jax.ShapeDtypeStruct((rows,), "int32"),),
        constants={"vocab": vocab, "block": block},
        num_warps=max(1, min(16, block // 256)),
    )
    return token
