"""Few rows of activations times a weight in the public order, a set of its rows after the other.

    partial[m, s, set, i] = sum over the words of segment s that lie in lane i: code[n, k] * x[m, k]
    total[m, n] += (sum of partial over a row's and a group's lanes - zero[n] * sum of x) * scale[n]

Memory is read in its own order, which hardware fetches ahead. What panels give by their order, sums of 16 rows in one
register, comes from transposing sums. Sums of integers are exact in any order, so the results are those of the other
micro-kernels, bit for bit. Those of fp32 (fp8 weights) have an order of their own, the same for each row of activations
and of the weight whatever stands beside them.

set        one row, whose words lie in registers as in memory; with AVX-512 one row of each quarter of the block, read
           like four panels: quarters of their registers change places, two moves a register, so that a register holds
           four consecutive words of each, and fewer sums are left to transpose (with AVX2 that took longer)
segment    the registers of a group, or one register where it holds several groups of a row
part       rows whose sums are transposed together: those of the block; with AVX2 as many as a register has lanes
"""

from __future__ import annotations

from typing import Any

from .micro import MicroKernels, quarters_transposed
from .spec import PANEL, Arg
from .vectors import I32, Emitter, vector

__all__ = ["RowKernels"]

LINE = 64  # bytes of a cache line


class RowKernels:
    """The micro-kernels of a kind with `row_words`."""

    def __init__(self, micro: MicroKernels) -> None:
        self._micro, self._k = micro, micro.k
        self._lanes, self._bytes = micro.k.isa.lanes, micro.bytes
        self._set, self._words = micro.k.isa.set_rows, micro.k.set_words
        self._sets = micro.k.part_rows // self._set  # of a part
        self._size = max(1, micro.k.row_words // self._words)  # registers of a segment
        self._at_once = max(1, self._set // self._size)  # segments that are loaded together
        # What is read next is fetched: whole rows later, this many bytes and at most a row more; into which cache.
        self._near = micro.k.isa.near and self._set > 1
        self._ahead = 3072 if self._near else 4096 if self._set > 1 else 16384

    def _registers(self, e: Emitter, a: Any) -> Any:
        """Of a row."""
        return e.builder.sdiv(e.field(a, Arg.WORDS), e.number(self._lanes))

    def _segments(self, e: Emitter, a: Any) -> Any:
        return e.builder.sdiv(e.field(a, Arg.WORDS), e.number(self._size * self._words))

    def arrange(self, e: Emitter, a: Any, row: Any, rows: Any, out: Any) -> None:
        """Packed rows of activations -> [rows, registers, terms, operands, lanes]."""
        lanes, operands, count = self._lanes, self._k.operands, self._registers(e, a)
        terms, size = self._micro.terms(e, a), self._k.x_words * self._bytes
        with e.loop(rows) as m, e.loop(count) as i:
            x = e.add(e.field(a, Arg.X), e.mul(e.add(row, m), e.field(a, Arg.X_STEP)))
            place = e.mul(e.add(e.mul(m, count), i), size)
            for t, term in enumerate(terms):
                every = e.load(x, vector(I32, lanes * operands), e.add(e.mul(i, operands * self._bytes), term))
                for o in range(operands):
                    one = e.shuffle(every, every, range(o, lanes * operands, operands))
                    e.store(one, out, e.add(place, (t * operands + o) * self._bytes))

    def multiply(self, e: Emitter, a: Any, rows: Any, codes: Any, ahead: Any, first: Any, x: Any, partial: Any) -> None:
        """partial [rows, segments, sets, lanes] of a part of a block of the weight, from row `first` of it on.

        codes: of the block; ahead: of the one that comes next; x: as `arrange` leaves it.
        """
        for m in range(1, self._k.isa.direct_rows + 1):
            with e.when(rows, "==", m):
                self._multiply_rows(e, a, m, (codes, ahead, first), x, partial)

    def _multiply_rows(self, e: Emitter, a: Any, rows: int, weight: tuple[Any, Any, Any], x: Any, partial: Any) -> None:
        b, segments = e.builder, self._segments(e, a)
        codes, ahead, first = weight
        step, stream = e.field(a, Arg.CODES_STEP), self._k.panels * PANEL // self._set  # rows between those of a set
        distance = e.add(b.sdiv(e.number(self._ahead), e.mul(e.field(a, Arg.WORDS), 4)), 1)
        row_step = e.mul(e.field(a, Arg.WORDS), 4 * self._k.x_words)
        x_rows = [e.add(x, e.mul(row_step, m)) for m in range(rows)]
        with e.loop(e.number(self._sets)) as i:
            n = e.add(first, i)
            later = e.add(n, distance)
            base = b.select(e.compare(later, "<", stream), codes, e.sub(ahead, e.mul(step, stream)))
            w, fetched = e.add(codes, e.mul(step, n)), e.add(base, e.mul(step, later))
            with e.loop(b.sdiv(segments, e.number(self._at_once))) as s:
                sums = self._multiply_segments(e, e.mul(step, stream), (w, fetched), s, x_rows)
                for (m, j), total in sums.items():
                    segment = e.add(e.mul(segments, m), e.mul(s, self._at_once), j)
                    e.store(total, partial, e.mul(e.add(e.mul(segment, self._sets), i), self._bytes))

    def _multiply_segments(
        self, e: Emitter, step: Any, weight: tuple[Any, Any], s: Any, x_rows: list[Any]
    ) -> dict[tuple[int, int], Any]:
        """The sums of some segments of a set, for each row of activations and segment; the same of other rows of the
        weight is fetched."""
        (w, fetched), k = weight, self._k
        micro, ones = self._micro, [(m, j) for m in range(len(x_rows)) for j in range(self._at_once)]
        ways = self._ways(len(ones))
        sums = {one: [e.zero(micro.sums)] * ways for one in ones}
        lines = self._size * self._at_once // self._set
        for i in range(lines):
            place = e.mul(e.add(e.mul(s, lines), i), self._bytes)
            places = [e.add(e.mul(step, r), place) for r in range(self._set)]
            for one in places if i * self._bytes % LINE == 0 else []:
                e.prefetch(fetched, one, near=self._near)
            registers = quarters_transposed(e, [e.load(w, micro.words, one) for one in places])
            for r, words in enumerate(registers):
                j = (i * self._set + r) // self._size
                for o, operand in enumerate(micro.operand_vectors(e, words, ways=ways) * k.terms):
                    x_place = e.add(e.mul(place, k.x_words), o * self._bytes + r * 4 * self._words)
                    for m, x in enumerate(x_rows):
                        value = e.load(x, vector(I32, self._words), x_place)
                        value = e.shuffle(value, value, [*range(self._words)] * self._set)
                        sums[m, j][o % ways] = micro.dot(e, sums[m, j][o % ways], operand, value)
        return {one: micro.together(e, of_one) for one, of_one in sums.items()}

    def _ways(self, registers: int) -> int:
        """Of fp32 as many for one row of activations as there can be for most, so that each has the same bits."""
        k, micro = self._k, self._micro
        if k.whole:
            return micro.most_ways(registers)
        return 2 if 2 * k.isa.direct_rows * self._at_once <= micro.room else 1

    def add(self, e: Emitter, a: Any, rows: Any, partial: Any, row: Any, scales: Any, first: Any) -> None:
        """Total what `multiply` left of a part; add it, scaled, to the totals behind the scales.

        row: the first of the activations; first: of the weight's, as for `multiply`.
        """
        k, micro = self._k, self._micro
        segments, registers = self._segments(e, a), range(k.part_rows // self._lanes)
        line, at = k.parts * k.panels * 64, e.mul(first, 4)
        totals = e.add(scales, e.mul(e.field(a, Arg.GROUPS), line), at)
        with e.loop(rows) as m:
            place = e.mul(m, k.panels * 64)
            total = [e.variable(micro.floats, e.load(totals, micro.floats, e.add(place, j * self._bytes)))
                     for j in registers]  # fmt: skip
            sums_of = e.add(e.field(a, Arg.SUMS), e.mul(e.add(row, m), e.field(a, Arg.SUMS_STEP)))
            with e.loop(segments) as s:
                of = e.add(partial, e.mul(e.add(e.mul(segments, m), s), self._sets * self._bytes))
                sets = [e.load(of, micro.sums, i * self._bytes) for i in range(self._sets)]
                found = [summed(e, sets[j * self._words :][: self._words], min(k.row_words, self._words))
                         for j in registers]  # fmt: skip
                for i, of_group in enumerate(zip(*found, strict=True)):
                    g = e.add(e.mul(s, len(found[0])), i)
                    scales_of, x_sums = e.add(scales, e.mul(g, line), at), e.add(sums_of, e.mul(g, 8))
                    for j, value in enumerate(quarters_transposed(e, list(of_group))):
                        micro.add_group(e, total[j], value, scales_of, x_sums, j * self._bytes)
            for j in registers:
                e.store(total[j].get(), totals, e.add(place, j * self._bytes))


def summed(e: Emitter, rows: list[Any], lanes: int) -> list[Any]:
    """Sums of each `lanes` lanes, 4 or more, of registers of 32-bit numbers: 4, or as many as a register has lanes.
    In the order of the registers: of the first lanes of each, of those that follow, ...; whole registers."""
    count = rows[0].type.count

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
        rows = [e.plus(even, odd) for even, odd in pairs(rows, 1, 4)]
    lists, width = [rows], 4
    while len(lists[0]) > 1:
        if width < lanes:
            lists = [[e.plus(even, odd) for even, odd in pairs(one, 4, count)] for one in lists]
            width *= 2
        else:
            split = [pairs(one, 4, count) for one in lists]
            lists = [[pair[odd] for pair in one] for odd in (0, 1) for one in split]
    return [one[0] for one in lists]
