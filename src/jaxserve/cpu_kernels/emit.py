"""A thin layer over llvmlite's builder: loops, vectors, and what the kernels share."""

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any, Literal, cast

import numpy as np
from llvmlite import ir

Value = Any
"""A value of the program being built; llvmlite has no types for these."""

WeightType = Literal["float32", "bfloat16", "int8", "float8_e4m3fn"]
"""Element types that kernels read from memory; arithmetic is always float32."""

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
_STORED = {"float32": F32, "bfloat16": I16, "int8": I8, "float8_e4m3fn": I8}


def weight_type(dtype: np.dtype) -> WeightType:
    """Check that kernels can read elements of this type.

    Raises:
        ValueError: If they cannot.
    """
    if dtype.name not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {dtype.name}.")
    return cast(WeightType, dtype.name)


def const(value: int) -> Value:
    """Return a 64-bit constant."""
    return ir.Constant(I64, value)


class Emitter:
    """Appends instructions to one function.

    Args:
        function: The function.
        width: Lanes of a vector register of float32.
    """

    def __init__(self, function: ir.Function, width: int) -> None:
        """Start at a new entry block."""
        self.function = function
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.width = width
        self.vector = ir.VectorType(F32, width)

    # Memory -----------------------------------------------------------------------------------

    def variable(self, kind: Value, value: Value) -> Value:
        """Make a local variable; LLVM keeps it in a register."""
        with self.b.goto_entry_block():
            place = self.b.alloca(kind)
        self.b.store(value, place)
        return place

    def array(self, kind: Value, count: int) -> Value:
        """Make a local array."""
        with self.b.goto_entry_block():
            place = self.b.alloca(kind, const(count))
            cast(Any, place).align = 64
            # The builder knows an allocation only as a pointer to its element type.
            return self.b.inttoptr(self.b.ptrtoint(place, I64), POINTER)

    def at(self, base: Value, index: Value, item_bytes: int) -> Value:
        """Return the address of element `index`."""
        offset = self.b.mul(index, const(item_bytes))
        return self.b.gep(base, [offset], inbounds=True, source_etype=ir.IntType(8))

    def word(self, base: Value, byte: int, kind: Value = I64) -> Value:
        """Load a field at a fixed offset of a structure."""
        return self.b.load(self.field(base, byte), typ=kind)

    def field(self, base: Value, byte: int) -> Value:
        """Return the address of a field at a fixed offset of a structure."""
        return self.b.gep(base, [const(byte)], inbounds=True, source_etype=ir.IntType(8))

    def load(self, place: Value, kind: WeightType, *, mask: Value | None = None) -> Value:
        """Load a vector and widen it to float32.

        Args:
            place: Address of the first element; needs no alignment.
            kind: Element type in memory.
            mask: Lanes to load; the others read as zero.
        """
        lanes = ir.VectorType(_STORED[kind], self.width)
        if mask is None:
            raw = self.b.load(place, align=ITEM_BYTES[kind], typ=lanes)
        else:
            raw = self.intrinsic(
                "llvm.masked.load",
                [lanes, POINTER],
                lanes,
                [place, ir.Constant(I32, ITEM_BYTES[kind]), mask, ir.Constant(lanes, None)],
            )
        return raw if kind == "float32" else self.widen(raw, kind)

    def widen(self, raw: Value, kind: WeightType) -> Value:
        """Turn the bits of a narrower type into float32, exactly."""
        b, wide = self.b, ir.VectorType(I32, self.width)
        if kind == "int8":
            return b.sitofp(b.sext(raw, wide), self.vector)
        if kind == "float8_e4m3fn":
            return self._widen_float8(raw)
        shift = ir.Constant(wide, [16] * self.width)  # bfloat16 is the upper half
        return b.bitcast(b.shl(b.zext(raw, wide), shift), self.vector)

    def _widen_float8(self, raw: Value) -> Value:
        """Lay the bits of a float8 into a float16, whose exponent counts from 15 instead of 7.

        Numbers below the normal ones come out right too: processors never flush those of float16.
        """
        b, half = self.b, ir.VectorType(I16, self.width)
        shift, sign = (ir.Constant(half, [number] * self.width) for number in (7, 0xBFFF))
        bits = b.and_(b.shl(b.sext(raw, half), shift), sign)
        small = b.fpext(b.bitcast(bits, ir.VectorType(F16, self.width)), self.vector)
        return b.fmul(small, self.splat_const(2.0**8))

    def store(self, value: Value, place: Value, *, mask: Value | None = None) -> None:
        """Store a float32 vector; no alignment needed."""
        if mask is None:
            self.b.store(value, place, align=4)
            return
        arguments = [value, place, ir.Constant(I32, 4), mask]
        self.intrinsic("llvm.masked.store", [self.vector, POINTER], VOID, arguments)

    def store_as(self, value: Value, place: Value, kind: WeightType) -> None:
        """Store a float32 vector as another type, rounded to the nearest, ties to even."""
        if kind == "float32":
            self.store(value, place)
            return
        b, wide = self.b, ir.VectorType(I32, self.width)
        bits = b.bitcast(value, wide)
        half, one, shift = (ir.Constant(wide, [number] * self.width) for number in (0x7FFF, 1, 16))
        odd = b.and_(b.lshr(bits, shift), one)
        rounded = b.lshr(b.add(bits, b.add(half, odd)), shift)
        b.store(b.trunc(rounded, ir.VectorType(I16, self.width)), place, align=2)

    def prefetch(self, place: Value) -> None:
        """Ask for a line of memory that will be read soon; an address out of range does no harm."""
        hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]
        self.intrinsic("llvm.prefetch", [POINTER], VOID, [place, *hints])

    # Arithmetic -------------------------------------------------------------------------------

    def intrinsic(
        self, name: str, kinds: Sequence[Value], result: Value, arguments: Sequence[Value]
    ) -> Value:
        """Call an LLVM intrinsic that is overloaded by `kinds`."""
        suffix = "".join(f".{_mangle(kind)}" for kind in kinds)
        module = self.function.module
        full = name + suffix
        callee = module.globals.get(full)
        if callee is None:
            kind = ir.FunctionType(result, [argument.type for argument in arguments])
            callee = ir.Function(module, kind, full)
        return self.b.call(callee, list(arguments))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Return a * b + c, rounded once."""
        return self.intrinsic("llvm.fma", [a.type], a.type, [a, b, c])

    def splat(self, value: Value) -> Value:
        """Repeat a scalar in every lane."""
        kind = ir.VectorType(value.type, self.width)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def splat_const(self, value: float) -> Value:
        """Repeat a constant in every lane."""
        return ir.Constant(self.vector, [value] * self.width)

    def lanes_below(self, count: Value) -> Value:
        """Return a mask of the lanes whose index is below `count`."""
        kind = ir.VectorType(I64, self.width)
        index = ir.Constant(kind, list(range(self.width)))
        return self.b.icmp_signed("<", index, self.splat(count))

    def shuffle(self, a: Value, b: Value, order: Sequence[int]) -> Value:
        """Pick lanes from the concatenation of two vectors."""
        picked = ir.Constant(ir.VectorType(I32, len(order)), list(order))
        return self.b.shuffle_vector(a, b, picked)

    def sum_lanes(self, value: Value) -> Value:
        """Add the lanes of a vector, in a tree of fixed order."""
        width = self.width
        while width > 1:
            width //= 2
            low = self.shuffle(value, value, range(width))
            high = self.shuffle(value, value, range(width, 2 * width))
            value = self.b.fadd(low, high)
        return self.b.extract_element(value, ir.Constant(I32, 0))

    def larger(self, a: Value, b: Value) -> Value:
        """Return the larger number of each lane."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def max_lanes(self, value: Value) -> Value:
        """Return the largest lane of a vector."""
        width = self.width
        while width > 1:
            width //= 2
            low = self.shuffle(value, value, range(width))
            high = self.shuffle(value, value, range(width, 2 * width))
            value = self.larger(low, high)
        return self.b.extract_element(value, ir.Constant(I32, 0))

    def add_pairs(self, a: Value, b: Value, count: int) -> Value:
        """Add lanes of two vectors so that repeated use sums whole vectors up.

        Args:
            a: Its lanes hold `count / 2` values in equally long runs of parts yet to be added.
            b: The same for the values that follow.
            count: Values that the result holds.

        Returns:
            A vector with runs half as long, the values of `a` before those of `b`.
        """
        run = 2 * self.width // count
        half = run // 2
        firsts: list[int] = []
        seconds: list[int] = []
        for lane in range(count * half):
            value, part = divmod(lane, half)
            firsts.append(value * run + part)
            seconds.append(value * run + half + part)
        return self.b.fadd(self.shuffle(a, b, firsts), self.shuffle(a, b, seconds))

    def sum_vectors(self, vectors: Sequence[Value]) -> Value:
        """Add up the lanes of each of at most `width` vectors; lane i holds the sum of vector i.

        Every sum is taken in the same order, wherever its vector stands.
        """
        rows = [*vectors, *[self.splat_const(0.0)] * (self.width - len(vectors))]
        count = 1
        while len(rows) > 1:
            count *= 2
            rows = [self.add_pairs(rows[i], rows[i + 1], count) for i in range(0, len(rows), 2)]
        return rows[0]

    def transpose(self, square: Sequence[Value]) -> list[Value]:
        """Transpose `width` vectors."""
        lines, run = list(square), 1
        while run < self.width:
            turned = list(lines)
            for i in range(self.width):
                if i & run:
                    continue
                a, c = lines[i], lines[i + run]
                low = [j if not j & run else self.width + j - run for j in range(self.width)]
                high = [j + run if not j & run else self.width + j for j in range(self.width)]
                turned[i], turned[i + run] = self.shuffle(a, c, low), self.shuffle(a, c, high)
            lines, run = turned, run * 2
        return lines

    def exp(self, x: Value) -> Value:
        """Return e to the power of each lane, for lanes that are not positive.

        The whole part of x / ln 2 goes into the exponent bits, the rest through the Taylor series;
        the error stays within two units of the last place. Below -87 the result is about 1e-38.
        """
        b = self.b
        scaled = b.fmul(x, self.splat_const(math.log2(math.e)))
        scaled = self.larger(scaled, self.splat_const(-126.0))
        whole = self.intrinsic("llvm.roundeven", [self.vector], self.vector, [scaled])
        rest = b.fsub(scaled, whole)
        series = [math.log(2) ** n / math.factorial(n) for n in range(8)]
        total = self.splat_const(series[-1])
        for factor in reversed(series[:-1]):
            total = self.fma(total, rest, self.splat_const(factor))
        wide = ir.VectorType(I32, self.width)
        exponent = b.add(b.fptosi(whole, wide), ir.Constant(wide, [127] * self.width))
        power = b.bitcast(b.shl(exponent, ir.Constant(wide, [23] * self.width)), self.vector)
        return b.fmul(total, power)

    def minimum(self, a: Value, b: Value) -> Value:
        """Return the smaller of two whole numbers."""
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """Return the larger of two whole numbers."""
        return self.b.select(self.b.icmp_signed(">", a, b), a, b)

    # Control ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: Value) -> Generator[Value]:
        """Repeat a block for `start`, `start + step`, ... below `stop`."""
        b = self.b
        counter = self.variable(I64, start)
        head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.load(counter, typ=I64)
        b.cbranch(b.icmp_signed("<", index, stop), body, end)
        b.position_at_end(body)
        yield index
        b.store(b.add(index, step), counter)
        b.branch(head)
        b.position_at_end(end)


def _mangle(kind: Value) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{cast(Any, kind).count}{_mangle(cast(Any, kind).element)}"
    if isinstance(kind, ir.PointerType):
        return "p0"
    return {"float": "f32"}.get(str(kind), str(kind))
