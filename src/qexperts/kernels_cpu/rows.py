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

AHEAD = 16384  # bytes that are fetched, into the second cache, before they are read
LINE = 64  # bytes of a cache line


class RowKernels:
    """The micro-kernels of a kind with `row_words`."""

    def __init__(self, micro: MicroKernels) -> None:
        self._micro, self._k = micro, micro.k
        self._lanes, self._bytes = micro.k.isa.lanes, micro.bytes
        self._size = max(1, micro.k.row_words // self._lanes)  # registers of a segment

    def _registers(self, e: Emitter, a: Any) -> Any:
        """Of a row."""
        return e.builder.sdiv(e.field(a, Arg.WORDS), e.number(self._lanes))

    def _segments(self, e: Emitter, a: Any) -> Any:
        return e.builder.sdiv(self._registers(e, a), e.number(self._size))

    def arrange(self, e: Emitter, a: Any, row: Any, rows: Any, out: Any) -> None:
        """Packed rows of activations -> [rows, registers, operands, lanes]."""
        lanes, operands, count = self._lanes, self._k.operands, self._registers(e, a)
        with e.loop(rows) as m, e.loop(count) as i:
            x = e.add(e.field(a, Arg.X), e.mul(e.add(row, m), e.field(a, Arg.X_STEP)))
            step = operands * self._bytes
            every = e.load(x, vector(I32, lanes * operands), e.mul(i, step))
            for o in range(operands):
                one = e.shuffle(every, every, range(o, lanes * operands, operands))
                e.store(one, out, e.add(e.mul(e.add(e.mul(m, count), i), step), o * self._bytes))

    def multiply(self, e: Emitter, a: Any, rows: Any, codes: Any, ahead: Any, first: Any, x: Any, partial: Any) -> None:
        """partial [rows, segments, lanes, lanes] of `lanes` rows of a block of the weight, from row `first` of it on.

        codes: of the block; ahead: of the one that comes next; x: as `arrange` leaves it.
        """
        for m in range(1, self._k.isa.direct_rows + 1):
            with e.when(rows, "==", m):
                self._multiply_rows(e, a, m, (codes, ahead, first), x, partial)

    def _multiply_rows(self, e: Emitter, a: Any, rows: int, weight: tuple[Any, Any, Any], x: Any, partial: Any) -> None:
        b, lanes = e.builder, self._lanes
        codes, ahead, first = weight
        step, block, segments = e.field(a, Arg.CODES_STEP), e.number(self._k.panels * PANEL), self._segments(e, a)
        distance = e.add(b.sdiv(e.number(AHEAD), e.mul(e.field(a, Arg.WORDS), 4)), 1)
        row_step = e.mul(e.field(a, Arg.WORDS), 4 * self._k.operands)
        x_rows = [e.add(x, e.mul(row_step, m)) for m in range(rows)]
        with e.loop(e.number(lanes)) as r:
            n = e.add(first, r)
            w, later = e.add(codes, e.mul(step, n)), e.add(n, distance)
            inside = b.icmp_signed("<", later, block)
            fetched = e.add(b.select(inside, codes, b.sub(ahead, e.mul(step, block))), e.mul(step, later))
            with e.loop(segments) as s:
                sums = self._multiply_segment(e, (w, fetched), s, x_rows)
                for m, total in enumerate(sums):
                    place = e.mul(e.add(e.mul(e.add(e.mul(segments, m), s), lanes), r), self._bytes)
                    e.store(total, partial, place)

    def _multiply_segment(self, e: Emitter, weight: tuple[Any, Any], s: Any, x_rows: list[Any]) -> list[Any]:
        """The sums of one segment of a row of the weight, for each row of activations; the same of another row of the
        weight is fetched."""
        w, fetched = weight
        micro, ways = self._micro, self._micro.most_ways(len(x_rows))
        sums = [[e.zero(micro.words)] * ways for _ in x_rows]
        for i in range(self._size):
            place = e.add(e.mul(s, self._size * self._bytes), i * self._bytes)
            if i * self._bytes % LINE == 0:
                e.prefetch(fetched, place, near=False)
            found = micro.operand_vectors(e, e.load(w, micro.words, place), ways=ways)
            for o, operand in enumerate(found):
                x_place = e.add(e.mul(place, self._k.operands), o * self._bytes)
                for x, of_row in zip(x_rows, sums, strict=True):
                    value = e.load(x, micro.words, x_place)
                    of_row[o % ways] = micro.dot(e, of_row[o % ways], operand, value)
        return [micro.together(e, of_row) for of_row in sums]

    def add(self, e: Emitter, a: Any, rows: Any, partial: Any, row: Any, scales: Any, first: Any) -> None:
        """Total what `multiply` left of `lanes` rows of the weight; add it, scaled, to the totals behind the scales.

        row: the first of the activations; first: of the weight's, as for `multiply`.
        """
        k, lanes, micro = self._k, self._lanes, self._micro
        segments = self._segments(e, a)
        line, at = k.parts * k.panels * 64, e.mul(first, 4)
        totals = e.add(scales, e.mul(e.field(a, Arg.GROUPS), line), at)
        with e.loop(rows) as m:
            place = e.mul(m, k.panels * 64)
            total = e.variable(micro.floats, e.load(totals, micro.floats, place))
            sums_of = e.add(e.field(a, Arg.SUMS), e.mul(e.add(row, m), e.field(a, Arg.SUMS_STEP)))
            with e.loop(segments) as s:
                of = e.add(partial, e.mul(e.add(e.mul(segments, m), s), lanes * self._bytes))
                rows_of = [e.load(of, micro.words, r * self._bytes) for r in range(lanes)]
                found = summed(e, rows_of, min(k.row_words, lanes))
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
