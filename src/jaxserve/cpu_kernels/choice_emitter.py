"""Emits the choice of one row and one key-value head: order, samples, count, and runs to read."""

from collections.abc import Callable, Sequence

from llvmlite import ir

from jaxserve.cpu_kernels.cluster_tables import CLUSTER_BLOCK, Sampling, Table, Workspace
from jaxserve.cpu_kernels.emit import F32, I32, I64, ITEM_BYTES, Emitter, Value, const
from jaxserve.cpu_kernels.heads import LOWEST, Heads
from jaxserve.cpu_kernels.places import (
    PIECE,
    dot_rows,
    load_float,
    load_int,
    load_queries,
    store_word,
)

_AHEAD = 64
"""Clusters by which means are asked for before they are multiplied."""
_HIGHEST = 60.0
"""Most that a weight may exceed its level, in the exponent."""


class Choice:
    """Emits the choice of one row and one key-value head.

    Args:
        e: Where instructions go.
        shape: Heads and sizes.
        sampling: How samples are used.
        table: The clusters.
        space: What is written.
        q: Scaled queries of the group.
        keys: The head's slot.
        limits: Share of the mass, and share of the tokens beyond which all are read.
        edges: Where ranges of ranks begin.
        ranks: Samples.
        where: Says at which place of the slot a token lies; None if places are that.
    """

    def __init__(
        self,
        e: Emitter,
        shape: Heads,
        sampling: Sampling,
        table: Table,
        space: Workspace,
        *,
        q: Value,
        keys: Value,
        limits: Value,
        edges: Value,
        ranks: Value,
        where: Callable[[Value], Value] | None = None,
    ) -> None:
        self.e, self.shape, self.sampling, self.table, self.space = e, shape, sampling, table, space
        self.q, self.keys, self.limits, self.edges, self.ranks = q, keys, limits, edges, ranks
        self.where, self.group = where, shape.group

    # Small things ----------------------------------------------------------------------------

    def _int(self, base: Value, i: Value) -> Value:
        return load_int(self.e, base, i)

    def _float(self, base: Value, i: Value) -> Value:
        return load_float(self.e, base, i)

    def _put(self, value: Value, base: Value, i: Value) -> None:
        store_word(self.e, value, base, i)

    def _number(self, value: Value) -> Value:
        return self.e.b.sitofp(value, F32)

    def _larger(self, a: Value, c: Value) -> Value:
        return self.e.b.select(self.e.b.fcmp_ordered(">", a, c), a, c)

    def _exp(self, value: Value) -> Value:
        e = self.e
        return e.b.extract_element(e.exp(e.splat(value)), ir.Constant(I32, 0))

    def _add_to(self, variable: Value, value: Value) -> None:
        b = self.e.b
        b.store(b.fadd(b.load(variable, typ=F32), value), variable)

    def _while(self, condition: Callable[[], Value], body: Callable[[], None]) -> None:
        b = self.e.b
        head, inside, end = (b.append_basic_block(name) for name in ("while", "do", "over"))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(condition(), inside, end)
        b.position_at_end(inside)
        body()
        b.branch(head)
        b.position_at_end(end)

    # The steps -------------------------------------------------------------------------------

    def predict(self, block: Value, used: Value) -> None:
        """Write the logarithms of the weights of one block of clusters, and the best of them.

        Args:
            block: Its number.
            used: Clusters that the head has; a multiple of a vector.
        """
        e, b, group, space, table = self.e, self.e.b, self.group, self.space, self.table
        first = b.mul(block, const(CLUSTER_BLOCK))
        stop = e.minimum(b.add(first, const(CLUSTER_BLOCK)), used)
        best = [e.variable(e.vector, e.splat_const(LOWEST)) for _ in range(group)]
        wide = ir.VectorType(I32, e.width)
        row_bytes = const(self.shape.head_dim * ITEM_BYTES[table.kind])
        # Half the square of each query, which variances are multiplied with.
        halves: list[Value] = []
        for each in load_queries(e, self.q, group, self.shape.head_dim):
            square = e.splat_const(0.0)
            for part in each:
                square = e.fma(part, part, square)
            halves.append(e.splat(b.fmul(e.sum_lanes(square), ir.Constant(F32, 0.5))))
        with e.loop(first, stop, const(e.width)) as start:
            queries = load_queries(e, self.q, group, self.shape.head_dim)
            row = table.row(e, start)

            def place(lane: int, row: Value = row) -> Value:
                return e.at(table.centroids, b.mul(b.add(row, const(lane)), row_bytes), 1)

            # The next entry may lie anywhere.
            later = e.minimum(b.add(start, const(_AHEAD)), b.sub(stop, const(e.width)))
            after = e.at(table.centroids, b.mul(table.row(e, later), row_bytes), 1)
            for byte in range(0, e.width * self.shape.head_dim * ITEM_BYTES[table.kind], 64):
                e.prefetch(e.at(after, const(byte), 1))
            scores = dot_rows(e, queries, place, table.kind)
            if self.sampling.uses_spread:
                variance = e.load(e.at(table.spread, row, 4), "float32")
                scores = [
                    e.fma(half, variance, score) for half, score in zip(halves, scores, strict=True)
                ]
            size = b.load(e.at(table.sizes, row, 4), align=4, typ=wide)
            b.store(size, e.at(space.size, start, 4), align=4)
            segment = b.udiv(start, const(table.per_entry))
            shift = e.splat(b.trunc(b.mul(segment, const(table.segment_len)), I32))
            begin = b.load(e.at(table.begin, row, 4), align=4, typ=wide)
            b.store(b.add(begin, shift), e.at(space.begin, start, 4), align=4)
            there = b.icmp_signed(">", size, ir.Constant(wide, [0] * e.width))
            for g in range(group):
                score = b.select(there, scores[g], e.splat_const(LOWEST))
                e.store(score, e.at(space.weight[g], start, 4))
                b.store(e.larger(b.load(best[g], typ=e.vector), score), best[g])
        for g in range(group):
            self._put(e.max_lanes(b.load(best[g], typ=e.vector)), space.best[g], block)

    def choose(self, used: Value, tops: Sequence[Value], masses: Sequence[Value]) -> None:
        """Choose, when all weights have been predicted.

        Args:
            used: Clusters that the head has; a multiple of a vector.
            tops: Of each query head, what the mass is relative to that is read anyway.
            masses: These masses.
        """
        e, b, space = self.e, self.e.b, self.space
        blocks = b.udiv(b.add(used, const(CLUSTER_BLOCK - 1)), const(CLUSTER_BLOCK))
        levels: list[Value] = []
        kept: list[Value] = []
        for g in range(self.group):
            best = e.variable(F32, tops[g])
            with e.loop(const(0), blocks, const(1)) as block:
                b.store(
                    self._larger(b.load(best, typ=F32), self._float(space.best[g], block)), best
                )
            level = b.load(best, typ=F32)
            self._put(level, space.level, const(g))
            levels.append(level)
            kept.append(b.fmul(masses[g], self._exp(b.fsub(tops[g], level))))
        self.used = used
        self._sort(levels, kept)
        self.num_tokens = self._rank()
        self._sample(levels)
        self._total()
        wanted = self._find(kept)
        self._take(wanted, kept)

    def _sort(self, levels: list[Value], kept: list[Value]) -> None:
        """Turn scores into weights; write the order, and sizes and modelled masses by it."""
        e, b, group, settings, space = self.e, self.e.b, self.group, self.sampling, self.space
        wide = ir.VectorType(I32, e.width)
        none = ir.Constant(wide, [0] * e.width)

        def whole(value: int) -> Value:
            return ir.Constant(wide, [value] * e.width)

        totals = [e.variable(e.vector, e.splat_const(0.0)) for _ in range(group)]
        with e.loop(const(0), self.used, const(e.width)) as start:
            raw = b.load(e.at(space.size, start, 4), align=4, typ=wide)
            size, there = b.sitofp(raw, e.vector), b.icmp_signed(">", raw, none)
            for g in range(group):
                place = e.at(space.weight[g], start, 4)
                weight = e.exp(b.fsub(e.load(place, "float32"), e.splat(levels[g])))
                weight = b.select(there, weight, e.splat_const(0.0))
                e.store(weight, place)
                b.store(e.fma(weight, size, b.load(totals[g], typ=e.vector)), totals[g])
        inverse = [
            b.fdiv(ir.Constant(F32, 1.0), b.fadd(k, e.sum_lanes(b.load(total, typ=e.vector))))
            for k, total in zip(kept, totals, strict=True)
        ]
        buckets = settings.num_buckets
        counts = e.array(I32, buckets + 2)
        with e.loop(const(0), const(buckets + 2), const(1)) as i:
            self._put(const(0), counts, i)
        # Numbers of buckets wait where ranks will be.
        with e.loop(const(0), self.used, const(e.width)) as start:
            share = e.splat_const(0.0)
            for g in range(group):
                weight = e.load(e.at(space.weight[g], start, 4), "float32")
                share = e.larger(share, b.fmul(weight, e.splat(inverse[g])))
            bits = b.ashr(b.bitcast(share, wide), whole(settings.bucket_shift))
            bucket = b.sub(whole(settings.highest_bucket), bits)
            bucket = b.select(b.icmp_signed(">", bucket, none), bucket, none)
            last = whole(buckets - 1)
            bucket = b.select(b.icmp_signed("<", bucket, last), bucket, last)
            raw = b.load(e.at(space.size, start, 4), align=4, typ=wide)
            bucket = b.select(b.icmp_signed(">", raw, none), bucket, whole(buckets))
            b.store(bucket, e.at(space.rank, start, 4), align=4)
        # Counted one place further on, so that the running sum is where a bucket begins.
        with e.loop(const(0), self.used, const(1)) as c:
            after = b.add(self._int(space.rank, c), const(1))
            self._put(b.add(self._int(counts, after), const(1)), counts, after)
        so_far = e.variable(I64, const(0))
        with e.loop(const(1), const(buckets + 1), const(1)) as i:
            total = b.add(b.load(so_far, typ=I64), self._int(counts, i))
            b.store(total, so_far)
            self._put(total, counts, i)
        with e.loop(const(0), self.used, const(1)) as c:
            bucket, size = self._int(space.rank, c), self._int(space.size, c)
            at = self._int(counts, bucket)
            self._put(c, space.order, at)
            self._put(size, space.ordered_size, at)
            number = self._number(size)
            for g in range(group):
                model = number
                if settings.uses_ratio:
                    model = b.fmul(self._float(space.weight[g], c), number)
                self._put(model, space.model[g], at)
            self._put(b.add(at, const(1)), counts, bucket)

    def _rank(self) -> Value:
        """Write ranks and where ranges of ranks begin; return all tokens."""
        e, b, settings, space = self.e, self.e.b, self.sampling, self.space
        strata = settings.num_strata
        self.bounds = e.array(I64, strata + 2)
        b.store(const(0), self.bounds)
        first, stratum = e.variable(I64, const(0)), e.variable(I64, const(0))
        with e.loop(const(0), self.used, const(1)) as i:
            size = self._int(space.ordered_size, i)
            rank = b.load(first, typ=I64)
            self._put(rank, space.rank, i)
            middle = b.add(rank, b.lshr(size, const(1)))

            def is_behind(middle: Value = middle) -> Value:
                s = b.load(stratum, typ=I64)
                edge = self._int(self.edges, b.add(s, const(1)))
                is_last = b.icmp_signed(">=", s, const(strata))
                return b.and_(b.icmp_signed(">=", middle, edge), b.not_(is_last))

            def advance(i: Value = i) -> None:
                s = b.add(b.load(stratum, typ=I64), const(1))
                b.store(s, stratum)
                b.store(i, e.at(self.bounds, s, 8))

            self._while(is_behind, advance)
            b.store(b.add(rank, size), first)
        behind = b.add(b.load(stratum, typ=I64), const(1))
        with e.loop(behind, const(strata + 2), const(1)) as s:
            b.store(self.used, e.at(self.bounds, s, 8))
        return b.load(first, typ=I64)

    def _sample(self, levels: list[Value]) -> None:
        """Look at the samples: ratios of each range, and squares of what they leave."""
        e, b, group, settings, space = self.e, self.e.b, self.group, self.sampling, self.space
        samples = -(-settings.num_samples // e.width) * e.width
        places = e.array(I64, samples)
        # Vectors may reach beyond the end.
        expected = [e.array(F32, samples + e.width) for _ in range(group)]
        weights = [e.array(F32, samples + e.width) for _ in range(group)]
        positions = e.array(I64, settings.num_samples)
        with e.loop(const(0), const(samples), const(1)) as i:
            b.store(const(0), e.at(places, i, 8))
        with e.loop(const(0), const(samples + e.width), const(e.width)) as i:
            for array in (*expected, *weights):
                e.store(e.splat_const(0.0), e.at(array, i, 4))
        last = b.sub(self.used, const(1))
        at = e.variable(I64, const(0))
        row_bytes = const(self.shape.head_dim * ITEM_BYTES[self.shape.kind])
        with e.loop(const(0), const(settings.num_samples), const(1)) as i:
            rank = self._int(self.ranks, i)

            def is_behind(rank: Value = rank) -> Value:
                here = b.load(at, typ=I64)
                end = b.add(self._int(space.rank, here), self._int(space.ordered_size, here))
                is_last = b.icmp_signed(">=", here, last)
                return b.and_(b.icmp_signed(">=", rank, end), b.not_(is_last))

            def advance() -> None:
                b.store(b.add(b.load(at, typ=I64), const(1)), at)

            self._while(is_behind, advance)
            here = b.load(at, typ=I64)
            cluster = self._int(space.order, here)
            inside = b.sub(rank, self._int(space.rank, here))
            place = b.add(self._int(space.begin, cluster), inside)
            if self.where is not None:
                place = self.where(place)
            place = b.mul(place, row_bytes)
            b.store(place, e.at(places, i, 8))
            for byte in range(0, self.shape.head_dim * ITEM_BYTES[self.shape.kind], 64):
                e.prefetch(e.at(self.keys, b.add(place, const(byte)), 1))
            b.store(here, e.at(positions, i, 8))
            # A context shorter than the head is its own head, each token once.
            n, length = self.num_tokens, const(settings.head_len)
            counts = b.or_(b.icmp_signed("<", i, n), b.icmp_signed(">=", n, length))
            for g in range(group):
                value = ir.Constant(F32, 1.0)
                if settings.uses_ratio:
                    value = self._float(space.weight[g], cluster)
                self._put(b.select(counts, value, ir.Constant(F32, 0.0)), expected[g], i)
        self._weigh(places, expected, weights, levels, samples)
        self._fit_head(positions, expected, weights)
        strata = settings.num_strata + 1
        self.ratios = [e.array(F32, strata) for _ in range(group)]
        self.squares = [e.array(F32, strata) for _ in range(group)]
        with e.loop(const(0), const(strata), const(1)) as s:
            is_head = b.icmp_signed("==", s, const(0))
            behind = b.add(
                const(settings.head_len), b.mul(b.sub(s, const(1)), const(settings.drawn))
            )
            low = b.select(is_head, const(0), behind)
            high = b.add(low, b.select(is_head, const(settings.head_len), const(settings.drawn)))
            for g in range(group):
                self._fit(g, s, low, high, expected[g], weights[g])

    def _weigh(
        self,
        places: Value,
        expected: list[Value],
        weights: list[Value],
        levels: list[Value],
        samples: int,
    ) -> None:
        """Compute the weights of the keys at some places."""
        e, b, group = self.e, self.e.b, self.group
        with e.loop(const(0), const(samples), const(e.width)) as start:
            queries = load_queries(e, self.q, group, self.shape.head_dim)

            def row(lane: int, start: Value = start) -> Value:
                place = b.load(e.at(places, b.add(start, const(lane)), 8), typ=I64)
                return e.at(self.keys, place, 1)

            scores = dot_rows(e, queries, row, self.shape.kind)
            for g in range(group):
                score = b.fsub(scores[g], e.splat(levels[g]))
                most = e.splat_const(_HIGHEST)
                score = b.select(b.fcmp_ordered("<", score, most), score, most)
                known = e.load(e.at(expected[g], start, 4), "float32")
                used = b.fcmp_ordered(">", known, e.splat_const(0.0))
                weight = b.select(used, e.exp(score), e.splat_const(0.0))
                e.store(weight, e.at(weights[g], start, 4))

    def _fit_head(self, positions: Value, expected: list[Value], weights: list[Value]) -> None:
        """Give the clusters that the head looks into ratios of their own.

        These are the first of the order: each token moves on by a cluster at most. Those that are
        not looked into after all, as nobody expects weight there, have no mass either.
        """
        e, b, length = self.e, self.e.b, self.sampling.head_len
        zero = ir.Constant(F32, 0.0)
        known = [e.array(F32, length) for _ in range(self.group)]
        self.own = [e.array(F32, length) for _ in range(self.group)]
        with e.loop(const(0), const(length), const(1)) as i:
            for array in (*known, *self.own):
                self._put(zero, array, i)
        last = e.variable(I64, const(0))
        with e.loop(const(0), const(length), const(1)) as i:
            at = e.minimum(b.load(e.at(positions, i, 8), typ=I64), const(length - 1))
            b.store(at, last)
            for g in range(self.group):
                for array, part in ((known[g], expected[g]), (self.own[g], weights[g])):
                    self._put(b.fadd(self._float(array, at), self._float(part, i)), array, at)
        with e.loop(const(0), const(length), const(1)) as i:
            for g in range(self.group):
                least = self._larger(self._float(known[g], i), ir.Constant(F32, 1e-30))
                self._put(b.fdiv(self._float(self.own[g], i), least), self.own[g], i)
        self.num_head = e.minimum(b.add(b.load(last, typ=I64), const(1)), self.used)

    def _fit(
        self, g: int, s: Value, low: Value, high: Value, expected: Value, weights: Value
    ) -> None:
        """Find one range's ratio, and the squares of what it leaves."""
        e, b = self.e, self.e.b
        zero = e.splat_const(0.0)
        found, known, rest = (e.variable(e.vector, zero) for _ in range(3))

        def both(i: Value) -> list[Value]:
            mask = e.lanes_below(b.sub(high, i))
            loaded = (e.load(e.at(array, i, 4), "float32") for array in (weights, expected))
            return [b.select(mask, x, zero) for x in loaded]

        with e.loop(low, high, const(e.width)) as i:
            for total, part in zip((found, known), both(i), strict=True):
                b.store(b.fadd(b.load(total, typ=e.vector), part), total)
        sums = [e.sum_lanes(b.load(total, typ=e.vector)) for total in (found, known)]
        ratio = b.fdiv(sums[0], self._larger(sums[1], ir.Constant(F32, 1e-30)))
        self._put(ratio, self.ratios[g], s)
        with e.loop(low, high, const(e.width)) as i:
            weight, model = both(i)
            left = b.fsub(weight, b.fmul(e.splat(ratio), model))
            b.store(e.fma(left, left, b.load(rest, typ=e.vector)), rest)
        self._put(e.sum_lanes(b.load(rest, typ=e.vector)), self.squares[g], s)

    def _range(self, s: Value) -> tuple[Value, Value]:
        """Return the clusters of one range of ranks, without those that have their own ratios."""
        e, b = self.e, self.e.b
        low, high = (b.load(e.at(self.bounds, b.add(s, const(i)), 8), typ=I64) for i in range(2))
        return e.maximum(low, self.num_head), high

    def _total(self) -> None:
        """Add up the masses of all clusters, and what each range adds to the doubt about them."""
        e, b, group, settings, space = self.e, self.e.b, self.group, self.sampling, self.space
        zero, one = ir.Constant(F32, 0.0), ir.Constant(F32, 1.0)
        drawn = float(settings.drawn)
        self.total = [e.variable(F32, zero) for _ in range(group)]
        self.noise = [e.variable(F32, zero) for _ in range(group)]
        with e.loop(const(0), self.num_head, const(1)) as i:
            for g in range(group):
                mass = b.fmul(self._float(space.model[g], i), self._float(self.own[g], i))
                self._add_to(self.total[g], mass)
        with e.loop(const(0), const(settings.num_strata + 1), const(1)) as s:
            low, high = self._range(s)
            width = b.sub(self._int(self.edges, b.add(s, const(1))), self._int(self.edges, s))
            unread = b.fsub(
                one, b.fdiv(ir.Constant(F32, drawn), self._number(e.maximum(width, const(1))))
            )
            unread = b.select(b.icmp_signed("==", s, const(0)), zero, self._larger(unread, zero))
            real = self._number(width)
            scale = b.fmul(b.fmul(real, real), unread)
            scale = b.fdiv(scale, ir.Constant(F32, drawn * (drawn - 1)))
            sums = [e.variable(e.vector, e.splat_const(0.0)) for _ in range(group)]
            for g in range(group):
                with e.loop(low, high, const(e.width)) as i:
                    mask = e.lanes_below(b.sub(high, i))
                    part = e.load(e.at(space.model[g], i, 4), "float32", mask=mask)
                    b.store(b.fadd(b.load(sums[g], typ=e.vector), part), sums[g])
                known = e.sum_lanes(b.load(sums[g], typ=e.vector))
                self._add_to(self.total[g], b.fmul(known, self._float(self.ratios[g], s)))
                # Only ranges that hold clusters have an error.
                variance = b.fmul(scale, self._float(self.squares[g], s))
                variance = b.select(b.fcmp_ordered(">", known, zero), variance, zero)
                self._add_to(self.noise[g], variance)
                each = b.fdiv(variance, self._larger(known, ir.Constant(F32, 1e-30)))
                self._put(each, self.squares[g], s)

    def _find(self, kept: list[Value]) -> Value:
        """Return how many tokens of the order are needed."""
        e, b, group, settings, space = self.e, self.e.b, self.group, self.sampling, self.space
        flag = ir.IntType(1)
        zero, one = ir.Constant(F32, 0.0), ir.Constant(F32, 1.0)
        p, share = self._float(self.limits, const(0)), self._float(self.limits, const(1))
        rest = b.fsub(one, p)
        rest_square, p_square = b.fmul(rest, rest), b.fmul(p, p)
        z_square = ir.Constant(F32, settings.z**2)
        target: list[Value] = []
        noise: list[Value] = []
        for g in range(group):
            mass = b.load(self.total[g], typ=F32)
            self._put(mass, space.mass, const(g))
            target.append(b.fsub(b.fmul(p, b.fadd(kept[g], mass)), kept[g]))
            noise.append(b.load(self.noise[g], typ=F32))
        reached = [e.variable(F32, zero) for _ in range(group)]
        below = [e.variable(F32, zero) for _ in range(group)]
        met = [e.variable(flag, b.fcmp_ordered("<=", target[g], zero)) for g in range(group)]
        wanted, i = e.variable(I64, const(0)), e.variable(I64, const(0))

        def all_met() -> Value:
            found = b.load(met[0], typ=flag)
            for each in met[1:]:
                found = b.and_(found, b.load(each, typ=flag))
            return found

        def look(ratio: Callable[[int, Value], Value], noises: Sequence[Value]) -> None:
            at = b.load(i, typ=I64)
            for g in range(group):
                model = self._float(space.model[g], at)
                mass = b.fmul(model, ratio(g, at))
                after = b.fadd(b.load(reached[g], typ=F32), mass)
                b.store(after, reached[g])
                inside = b.fadd(b.load(below[g], typ=F32), b.fmul(model, noises[g]))
                b.store(inside, below[g])
                outside = self._larger(b.fsub(noise[g], inside), zero)
                # Target and reached mass share the error of what lies below.
                error = b.fadd(b.fmul(rest_square, inside), b.fmul(p_square, outside))
                error = b.fmul(z_square, error)
                ahead = b.fsub(after, target[g])
                safe = b.fcmp_ordered(">=", b.fmul(ahead, ahead), error)
                enough = b.and_(safe, b.fcmp_ordered(">=", ahead, zero))
                known = b.load(met[g], typ=flag)
                with b.if_then(b.and_(enough, b.not_(known))):
                    # Up to the end of the cluster where it is enough, or as far as it goes.
                    deviation = e.intrinsic("llvm.sqrt", [F32], F32, [error])
                    missing = b.fdiv(
                        b.fsub(ahead, deviation), self._larger(mass, ir.Constant(F32, 1e-30))
                    )
                    missing = b.select(b.fcmp_ordered("<", missing, one), missing, one)
                    size = self._int(space.ordered_size, at)
                    taken = b.fmul(b.fsub(one, missing), self._number(size))
                    taken = b.fptosi(e.intrinsic("llvm.ceil", [F32], F32, [taken]), I64)
                    need = b.add(self._int(space.rank, at), taken)
                    b.store(e.maximum(b.load(wanted, typ=I64), need), wanted)
                b.store(b.or_(known, enough), met[g])
            b.store(b.add(at, const(1)), i)

        def until(high: Value) -> Callable[[], Value]:
            def goes_on() -> Value:
                inside = b.icmp_signed("<", b.load(i, typ=I64), high)
                return b.and_(inside, b.not_(all_met()))

            return goes_on

        self._while(
            until(self.num_head),
            lambda: look(lambda g, at: self._float(self.own[g], at), [zero] * group),
        )
        with e.loop(const(0), const(settings.num_strata + 1), const(1)) as s:
            ratios = [self._float(self.ratios[g], s) for g in range(group)]
            noises = [self._float(self.squares[g], s) for g in range(group)]
            _, high = self._range(s)
            self._while(until(high), lambda: look(lambda g, _at: ratios[g], noises))
        n = self.num_tokens
        want = b.select(all_met(), b.load(wanted, typ=I64), n)
        most = b.fmul(share, self._number(n))
        is_diffuse = b.or_(
            b.fcmp_ordered(">", self._number(want), most), b.fcmp_ordered(">=", p, one)
        )
        return b.select(is_diffuse, n, want)

    def _take(self, wanted: Value, kept: list[Value]) -> None:
        """List the runs that are read, the best first, and turn models into masses that are not."""
        e, b, group, settings, space = self.e, self.e.b, self.group, self.sampling, self.space
        zero = ir.Constant(F32, 0.0)
        i, tokens, piece = (e.variable(I64, const(0)) for _ in range(3))

        def is_read() -> Value:
            # An index behind the last is not looked up.
            at = e.minimum(b.load(i, typ=I64), b.sub(self.used, const(1)))
            inside = b.icmp_signed("<", b.load(i, typ=I64), self.used)
            return b.and_(inside, b.icmp_signed("<", self._int(space.rank, at), wanted))

        def read() -> None:
            at = b.load(i, typ=I64)
            size = self._int(space.ordered_size, at)
            left = b.sub(wanted, self._int(space.rank, at))
            # The last cluster is finished, or as much of a large one.
            units = b.udiv(b.add(left, const(settings.most - 1)), const(settings.most))
            taken = e.minimum(b.mul(units, const(settings.most)), size)
            rest = b.fdiv(self._number(b.sub(size, taken)), self._number(size))
            for g in range(group):
                self._put(b.fmul(self._float(space.model[g], at), rest), space.model[g], at)
            begin = self._int(space.begin, self._int(space.order, at))
            self._put(begin, space.run_begin, at)
            self._put(taken, space.run_size, at)
            before = b.load(tokens, typ=I64)
            after = b.add(before, taken)
            if space.pieces is not None:
                self._note_pieces(space.pieces, piece, at, before, after)
            b.store(after, tokens)
            b.store(b.add(at, const(1)), i)

        self._while(is_read, read)
        self.num_runs = b.load(i, typ=I64)
        self._put(b.load(tokens, typ=I64), space.num_tokens, const(0))
        for g in range(group):
            sums = e.variable(e.vector, e.splat_const(0.0))
            model = space.model[g]
            own = self.own[g]
            self._scale(model, const(0), self.num_head, sums, lambda at, own=own: e.at(own, at, 4))
            with e.loop(const(0), const(settings.num_strata + 1), const(1)) as s:
                low, high = self._range(s)
                self._scale(model, low, high, sums, e.splat(self._float(self.ratios[g], s)))
            tail = e.sum_lanes(b.load(sums, typ=e.vector))
            if space.tail is not None:
                self._put(tail, space.tail, const(g))
            if space.share is not None:
                whole = b.fadd(kept[g], b.load(self.total[g], typ=F32))
                lost = b.fdiv(tail, self._larger(whole, ir.Constant(F32, 1e-30)))
                lost = b.select(b.fcmp_ordered(">", lost, zero), lost, zero)
                self._put(b.fsub(ir.Constant(F32, 1.0), lost), space.share, const(g))

    def _note_pieces(
        self, pieces: Value, piece: Value, run: Value, before: Value, after: Value
    ) -> None:
        """Note where pieces begin that begin in a run, of tokens `before` to `after`."""
        b = self.e.b

        def begins() -> Value:
            return b.icmp_signed("<", b.mul(b.load(piece, typ=I64), const(PIECE)), after)

        def note() -> None:
            number = b.load(piece, typ=I64)
            low = b.mul(number, const(2))
            self._put(run, pieces, low)
            self._put(b.sub(b.mul(number, const(PIECE)), before), pieces, b.add(low, const(1)))
            b.store(b.add(number, const(1)), piece)

        self._while(begins, note)

    def _scale(
        self,
        model: Value,
        low: Value,
        high: Value,
        sums: Value,
        ratio: Value | Callable[[Value], Value],
    ) -> None:
        """Multiply some masses with a ratio, or with the ratios at some addresses; add them up."""
        e, b = self.e, self.e.b
        with e.loop(low, high, const(e.width)) as i:
            mask = e.lanes_below(b.sub(high, i))
            factor = e.load(ratio(i), "float32", mask=mask) if callable(ratio) else ratio
            place = e.at(model, i, 4)
            mass = b.fmul(e.load(place, "float32", mask=mask), factor)
            e.store(mass, place, mask=mask)
            b.store(b.fadd(b.load(sums, typ=e.vector), mass), sums)

    def scatter_tail(self) -> None:
        """Write masses that are not read by number of the cluster, where weights were."""
        with self.e.loop(const(0), self.used, const(1)) as i:
            cluster = self._int(self.space.order, i)
            for model, weight in zip(self.space.model, self.space.weight, strict=True):
                self._put(self._float(model, i), weight, cluster)

    def clear_runs(self, clusters: Value) -> None:
        """Make all other runs empty."""
        with self.e.loop(self.num_runs, clusters, const(1)) as i:
            self._put(const(0), self.space.run_begin, i)
            self._put(const(0), self.space.run_size, i)
