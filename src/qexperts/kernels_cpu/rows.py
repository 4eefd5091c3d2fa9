"""Few rows of activations times a weight in the public order, whose rows are read one after the other.

    partial[m, s, n, i] = sum over the words of segment s that lie in lane i: code[n, k] * x[m, k]
    total[m, n] += (sum of partial over a group's lanes - zero[n] * sum of x) * scale[n]

Memory is read in its own order, which hardware fetches ahead, and no word is moved between registers; what panels give
by their order, sums of 16 rows in one register, comes from transposing sums. Sums are integers, exact in any order, so
the results are those of the other micro-kernels, bit for bit.

lane       one of the `lanes` words that a register holds, consecutive words of a row
segment    the registers of a group, or one register where it holds several groups
"""

from __future__ import annotations

from typing import Any

from .micro import MicroKernels
from .spec import PANEL, Arg
from .vectors import I32, Emitter, vector

__all__ = ["RowKernels"]

AHEAD = 4096  # bytes that are fetched before they are read


class RowKernels:
    """The micro-kernels of a kind with `row_lanes`."""

    def __init__(self, micro: MicroKernels) -> None:
        self._micro, self._k = micro, micro.k
        self._lanes, self._bytes = micro.k.isa.lanes, micro.bytes

    def _registers(self, e: Emitter, a: Any) -> tuple[Any, Any, Any]:
        """Of a row; of a segment; and how many segments there are."""
        b, lanes = e.builder, e.number(self._lanes)
        count = b.sdiv(e.add(e.field(a, Arg.WORDS), self._lanes - 1), lanes)
        size = b.sdiv(e.field(a, Arg.GROUP_WORDS), lanes) if self._k.row_lanes == self._lanes else e.number(1)
        return count, size, b.sdiv(e.add(count, e.add(size, -1)), size)

    def _first_word(self, e: Emitter, a: Any, register: Any) -> Any:
        """The last register of a row overlaps the one before it."""
        return e.least(e.mul(register, self._lanes), e.add(e.field(a, Arg.WORDS), -self._lanes))

    def arrange(self, e: Emitter, a: Any, row: Any, rows: Any, out: Any) -> None:
        """Packed rows of activations -> [rows, registers, operands, lanes]; 0 where a register overlaps another."""
        e.never_inline()
        b, lanes, operands = e.builder, self._lanes, self._k.operands
        count, _, _ = self._registers(e, a)
        numbers = e.constant(vector(I32, lanes), range(lanes))
        with e.loop(rows) as m, e.loop(count) as i:
            x = e.add(e.field(a, Arg.X), e.mul(e.add(row, m), e.field(a, Arg.X_STEP)))
            word = self._first_word(e, a, i)
            every = e.load(x, vector(I32, lanes * operands), e.mul(word, 4 * operands))
            seen = b.trunc(b.sub(e.mul(i, lanes), word), I32)
            new = b.icmp_signed(">=", numbers, e.splat(seen, lanes))
            place = e.mul(e.add(e.mul(m, count), i), operands * self._bytes)
            for o in range(operands):
                one = e.shuffle(every, every, range(o, lanes * operands, operands))
                e.store(b.select(new, one, e.zero(one.type)), out, e.add(place, o * self._bytes))

    def multiply(self, e: Emitter, a: Any, rows: Any, codes: Any, ahead: Any, first: Any, x: Any, partial: Any) -> None:
        """partial [rows, segments, lanes, lanes] of `lanes` rows of a block of the weight, from row `first` of it on.

        codes: of the block; ahead: of the one that comes next; x: as `arrange` leaves it.
        """
        e.never_inline()
        for m in range(1, self._k.isa.direct_rows + 1):
            with e.case(rows, m):
                self._multiply_rows(e, a, m, (codes, ahead, first), x, partial)

    def _multiply_rows(self, e: Emitter, a: Any, rows: int, weight: tuple[Any, Any, Any], x: Any, partial: Any) -> None:
        b, lanes, micro = e.builder, self._lanes, self._micro
        codes, ahead, first = weight
        count, size, segments = self._registers(e, a)
        step, block = e.field(a, Arg.CODES_STEP), e.number(self._k.panels * PANEL)
        distance = e.add(b.sdiv(e.number(AHEAD), e.mul(e.field(a, Arg.WORDS), 4)), 1)
        sums = [[e.variable(micro.words) for _ in range(micro.most_ways(rows))] for _ in range(rows)]
        with e.loop(e.number(lanes)) as r:
            n = e.add(first, r)
            w, later = e.add(codes, e.mul(step, n)), e.add(n, distance)
            inside = b.icmp_signed("<", later, block)
            fetched = e.add(b.select(inside, codes, b.sub(ahead, e.mul(step, block))), e.mul(step, later))
            with e.loop(segments) as s:
                for one in (one for ways in sums for one in ways):
                    one.set(e.zero(one.kind))
                start = e.mul(s, size)
                with e.loop(e.least(size, b.sub(count, start))) as i:
                    self._multiply_register(e, a, (w, fetched), e.add(start, i), x, sums)
                for m, ways in enumerate(sums):
                    place = e.mul(e.add(e.mul(e.add(e.mul(segments, m), s), lanes), r), self._bytes)
                    e.store(micro.together(e, [way.get() for way in ways]), partial, place)

    def _multiply_register(
        self, e: Emitter, a: Any, weight: tuple[Any, Any], register: Any, x: Any, sums: list[list[Any]]
    ) -> None:
        """One register of words of a row of the weight; the same of another row is fetched."""
        w, fetched = weight
        count, _, _ = self._registers(e, a)
        word, operands = e.mul(self._first_word(e, a, register), 4), self._k.operands
        e.prefetch(fetched, word)
        found = self._micro.operand_vectors(e, e.load(w, self._micro.words, word), ways=len(sums[0]))
        for o, operand in enumerate(found):
            for m, ways in enumerate(sums):
                place = e.mul(e.add(e.mul(count, m), register), operands * self._bytes)
                total = ways[o % len(ways)]
                value = e.load(x, total.kind, e.add(place, o * self._bytes))
                total.set(self._micro.dot(e, total.get(), operand, value))

    def add(self, e: Emitter, a: Any, rows: Any, partial: Any, row: Any, scales: Any, first: Any) -> None:
        """Total what `multiply` left of `lanes` rows of the weight; add it, scaled, to the totals behind the scales.

        row: the first of the activations; first: of the weight's, as for `multiply`.
        """
        e.never_inline()
        k, lanes, micro = self._k, self._lanes, self._micro
        _, _, segments = self._registers(e, a)
        line, at = k.parts * k.panels * 64, e.mul(first, 4)
        totals = e.add(scales, e.mul(e.field(a, Arg.GROUPS), line), at)
        with e.loop(rows) as m:
            place = e.mul(m, k.panels * 64)
            total = e.variable(micro.floats, e.load(totals, micro.floats, place))
            sums_of = e.add(e.field(a, Arg.SUMS), e.mul(e.add(row, m), e.field(a, Arg.SUMS_STEP)))
            with e.loop(segments) as s:
                of = e.add(partial, e.mul(e.add(e.mul(segments, m), s), lanes * self._bytes))
                rows_of = [e.load(of, micro.words, r * self._bytes) for r in range(lanes)]
                found = summed(e, rows_of, k.row_lanes)
                for i, value in enumerate(found):
                    g = e.add(e.mul(s, len(found)), i)
                    scales_of = e.add(scales, e.mul(g, line), at)
                    micro.add_group(e, total, value, scales_of, e.add(sums_of, e.mul(g, 8)), 0)
            e.store(total.get(), totals, place)


def summed(e: Emitter, rows: list[Any], lanes: int) -> list[Any]:
    """Sums of each `lanes` lanes, 4 or more, of as many registers of 32-bit integers as a register has lanes: for the
    first lanes of all registers, for those that follow, ..., a register each."""
    count = len(rows)

    def halves(a: Any, b: Any, unit: int, size: int) -> tuple[Any, Any]:
        """The even and the odd units of both, inside each `size` lanes of a result."""
        found = []
        for odd in (0, 1):
            order = [q + source + u * unit + i for q in range(0, count, size) for source in (0, count)
                     for u in range(odd, size // unit, 2) for i in range(unit)]  # fmt: skip
            found.append(e.shuffle(a, b, order))
        return found[0], found[1]

    def pairs(of: list[Any], unit: int, size: int) -> list[tuple[Any, Any]]:
        return [halves(a, b, unit, size) for a, b in zip(of[::2], of[1::2], strict=True)]

    for _ in range(2):  # inside 4 lanes, which costs least
        rows = [e.builder.add(even, odd) for even, odd in pairs(rows, 1, 4)]
    lists, width = [rows], 4
    while len(lists[0]) > 1:
        if width < lanes:
            lists = [[e.builder.add(even, odd) for even, odd in pairs(one, 4, count)] for one in lists]
            width *= 2
        else:
            split = [pairs(one, 4, count) for one in lists]
            lists = [[pair[odd] for pair in one] for odd in (0, 1) for one in split]
    return [one[0] for one in lists]
