"""What attention to chosen places of dense slots is made of: reading them, and walking along runs.

Places come as a list of where their keys and values lie, so that short runs cost no more than long
ones and what comes next can be asked for ahead of time.

Source: the running softmax of FlashAttention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from jaxserve.cpu_kernels.emit import F32, I32, I64, ITEM_BYTES, Emitter, Value, WeightType, const
from jaxserve.cpu_kernels.heads import KEY_BLOCK, LOWEST, Heads, soften

PIECE = 512
"""Places that are listed at a time; a multiple of `KEY_BLOCK`."""
_LINE = 64
"""Bytes of a cache line."""
_MOST_SUMS = 12
"""Vectors of sums that stay in registers beside what they are added up from."""


def load_int(e: Emitter, base: Value, i: Value) -> Value:
    """Load the i-th of some 32-bit numbers."""
    return e.b.sext(e.b.load(e.at(base, i, 4), typ=I32), I64)


def load_float(e: Emitter, base: Value, i: Value) -> Value:
    """Load the i-th of some floats."""
    return e.b.load(e.at(base, i, 4), typ=F32)


def store_word(e: Emitter, value: Value, base: Value, i: Value) -> None:
    """Store a float, or a number in 32 bits, as the i-th."""
    if value.type == I64:
        value = e.b.trunc(value, I32)
    e.b.store(value, e.at(base, i, 4))


def scale_add(
    e: Emitter,
    sums: Sequence[Sequence[Value]],
    weights: Sequence[Value],
    count: Value,
    row: Callable[[Value], Value],
    kind: WeightType,
    ahead: Callable[[Value], Value] | None = None,
) -> None:
    """Add weighted rows to sums, as many parts of rows at a time as registers hold sums.

    Args:
        e: Where instructions go.
        sums: Variables of each member of a group: the parts of its sum.
        weights: Arrays, each with a weight of a member for every row.
        count: Rows.
        row: Gives the address of a row.
        kind: Element type of rows.
        ahead: Gives the address of a row to be asked for while the i-th is read.
    """
    b, parts = e.b, len(sums[0])
    at_once = max(1, _MOST_SUMS // len(sums))
    for low in range(0, parts, at_once):
        chosen = range(low, min(low + at_once, parts))
        with e.loop(const(0), count, const(1)) as i:
            first = row(i)
            if ahead is not None and not low:
                _prefetch_row(e, ahead(i), parts, kind)
            loaded = [
                e.load(e.at(first, const(part * e.width), ITEM_BYTES[kind]), kind)
                for part in chosen
            ]
            for own, weight in zip(sums, weights, strict=True):
                factor = e.splat(b.load(e.at(weight, i, 4), typ=F32))
                for part, value in zip(chosen, loaded, strict=True):
                    b.store(e.fma(factor, value, b.load(own[part], typ=e.vector)), own[part])


def _prefetch_row(e: Emitter, place: Value, parts: int, kind: WeightType) -> None:
    for byte in range(0, parts * e.width * ITEM_BYTES[kind], _LINE):
        e.prefetch(e.at(place, const(byte), 1))


def dot_rows(
    e: Emitter, queries: Sequence[Sequence[Value]], row: Callable[[int], Value], kind: WeightType
) -> list[Value]:
    """Multiply `width` rows with the queries of a group; lane i of a result is that of row i.

    Products are added up as they come, so that few are held at a time.

    Args:
        e: Where instructions go.
        queries: The parts of each member of the group.
        row: Gives the address of the i-th row.
        kind: Element type of rows.
    """
    b = e.b

    def one(lane: int) -> list[Value]:
        totals: list[Value] = [None] * len(queries)
        place = row(lane)
        for part in range(len(queries[0])):
            value = e.load(e.at(place, const(part * e.width), ITEM_BYTES[kind]), kind)
            for g, own in enumerate(queries):
                known = totals[g]
                totals[g] = (
                    b.fmul(own[part], value) if known is None else e.fma(own[part], value, known)
                )
        return totals

    def several(low: int, count: int) -> list[Value]:
        if count == 1:
            return one(low)
        half = count // 2
        first, second = several(low, half), several(low + half, half)
        return [e.add_pairs(x, y, count) for x, y in zip(first, second, strict=True)]

    return several(0, e.width)


def load_queries(e: Emitter, q: Value, group: int, dim: int) -> list[list[Value]]:
    """Load the queries of a group, in parts that fill vectors."""
    return [
        [e.load(e.at(q, const(g * dim + part), 4), "float32") for part in range(0, dim, e.width)]
        for g in range(group)
    ]


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Addresses of the states of a group: sums, largest scores, and masses."""

    out: Value
    top: Value
    mass: Value


class PlaceReader:
    """Emits attention of one group to lists of places, with a running softmax.

    Args:
        e: Where instructions go.
        shape: Heads and sizes.
        q: The queries of the group.
        keys: The head's slot.
        values: Likewise.
    """

    def __init__(self, e: Emitter, shape: Heads, q: Value, keys: Value, values: Value) -> None:
        """Start with a state that has seen nothing."""
        self.e, self.shape, self.q, self.keys, self.values = e, shape, q, keys, values
        group, self.parts = shape.group, shape.head_dim // e.width
        zero = e.splat_const(0.0)
        self.bytes = e.array(I64, PIECE + KEY_BLOCK)
        self.scores = [e.array(F32, KEY_BLOCK) for _ in range(group)]
        self.top = [e.variable(F32, ir.Constant(F32, LOWEST)) for _ in range(group)]
        self.mass = [e.variable(e.vector, zero) for _ in range(group)]
        self.sums = [[e.variable(e.vector, zero) for _ in range(self.parts)] for _ in range(group)]
        # Behind the end of a list lies what was there before, which may be read but never counts.
        with e.loop(const(0), const(PIECE + KEY_BLOCK), const(1)) as i:
            e.b.store(const(0), e.at(self.bytes, i, 8))

    def put(self, place: Value, i: Value) -> None:
        """Make a place the i-th of the list."""
        e = self.e
        row = const(self.shape.head_dim * ITEM_BYTES[self.shape.kind])
        e.b.store(e.b.mul(place, row), e.at(self.bytes, i, 8))

    def _row(self, slot: Value, i: Value) -> Value:
        return self.e.at(slot, self.e.b.load(self.e.at(self.bytes, i, 8), typ=I64), 1)

    def read(self, count: Value) -> None:
        """Attend to the places that are listed."""
        e, b, shape = self.e, self.e.b, self.shape
        with e.loop(const(0), count, const(KEY_BLOCK)) as start:
            own = e.minimum(b.sub(count, start), const(KEY_BLOCK))
            queries = load_queries(e, self.q, shape.group, shape.head_dim)
            with e.loop(const(0), own, const(e.width)) as i:
                self._score(queries, b.add(start, i), i, own)
            for g in range(shape.group):
                soften(self.e, self.scores[g], own, self.top[g], self.mass[g], self.sums[g])
            scale_add(
                e,
                self.sums,
                self.scores,
                own,
                lambda i, start=start: self._row(self.values, b.add(start, i)),
                shape.kind,
                lambda i, start=start: self._row(
                    self.values, b.add(start, b.add(i, const(KEY_BLOCK)))
                ),
            )

    def _score(self, queries: list[list[Value]], first: Value, i: Value, count: Value) -> None:
        """Score one vector of keys; those behind the last one get the lowest score."""
        e, b = self.e, self.e.b

        def row(lane: int) -> Value:
            at = b.add(first, const(lane))
            later = self._row(self.keys, b.add(at, const(KEY_BLOCK)))
            _prefetch_row(e, later, self.parts, self.shape.kind)
            return self._row(self.keys, at)

        found = dot_rows(e, queries, row, self.shape.kind)
        mask = e.lanes_below(b.sub(count, i))
        for g, scores in enumerate(found):
            kept = b.select(mask, scores, e.splat_const(LOWEST))
            e.store(kept, e.at(self.scores[g], i, 4))

    def write(self, to: StatePlace) -> None:
        """Store the state."""
        e, b = self.e, self.e.b
        for g in range(self.shape.group):
            b.store(b.load(self.top[g], typ=F32), e.at(to.top, const(g), 4))
            total = e.sum_lanes(b.load(self.mass[g], typ=e.vector))
            b.store(total, e.at(to.mass, const(g), 4))
            for part in range(self.parts):
                at = const(g * self.shape.head_dim + part * e.width)
                e.store(b.load(self.sums[g][part], typ=e.vector), e.at(to.out, at, 4))


class RunWalk:
    """Emits a walk along runs of places.

    Args:
        e: Where instructions go.
        begin: First places of the runs.
        size: Places of each; those that are walked along are not empty.
        run: Where the walk begins.
        offset: At which place of that run.
        last: The last run that may be looked at.
    """

    def __init__(
        self, e: Emitter, begin: Value, size: Value, *, run: Value, offset: Value, last: Value
    ) -> None:
        """Stand at the first place."""
        self.e, self.begin, self.size, self.last = e, begin, size, last
        self.run, self.offset = e.variable(I64, run), e.variable(I64, offset)

    def list(self, count: Value, visit: Callable[[Value, Value], None]) -> None:
        """Visit the next places: each with its number in this call."""
        e, b = self.e, self.e.b
        with e.loop(const(0), count, const(1)) as i:
            run, offset = b.load(self.run, typ=I64), b.load(self.offset, typ=I64)
            visit(b.add(load_int(e, self.begin, run), offset), i)
            after = b.add(offset, const(1))
            ends = b.icmp_signed(">=", after, load_int(e, self.size, run))
            b.store(b.select(ends, const(0), after), self.offset)
            following = e.minimum(b.add(run, const(1)), self.last)
            b.store(b.select(ends, following, run), self.run)
