"""Micro-kernels: the loops that run, written for any `Kind` of kernel.

    total[m, n] += (sum over k of the group: code[n, k] * x[m, k]  -  zero[n] * sum of x[m, k]) * scale[n]

for each group in order; the order of additions is the same whichever function does it.
Each function takes the record of the call (`Arg`) and addresses; all are 64-bit integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from .spec import PANEL, X_SIZES, Arg, Kind
from .vectors import F32, I8, I16, I32, Emitter, bf16_bits, vector

__all__ = ["MicroKernels", "quarters_transposed"]

Multiply = Callable[[Any, "_Products"], None]  # a group; its sums


def _fp8_value(name: str, code: int) -> float:
    """What a code of 7 bits, without its sign, stands for."""
    bits, bias = (3, 7) if name == "fp8_e4m3" else (2, 15)
    exponent, mantissa = code >> bits, code & ((1 << bits) - 1)
    if name == "fp8_e4m3" and code == 0x7F:
        return float("nan")
    if name == "fp8_e5m2" and exponent == 31:
        return float("nan") if mantissa else float("inf")
    return (mantissa + (1 << bits) * (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias - bits)


def _integer(value: int, bits: int, asym: bool) -> int:
    value &= (1 << bits) - 1
    return value if asym or value < 1 << (bits - 1) else value - (1 << bits)


class MicroKernels:
    """The micro-kernels of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.k = kind
        isa = kind.isa
        self.words = vector(I32, isa.lanes)
        self.floats = vector(F32, isa.lanes)
        self.sums = self.words if kind.whole else self.floats
        self.registers = kind.registers
        self.bytes = 4 * isa.lanes  # of a register

    # ---- weights

    def operand_vectors(self, e: Emitter, word: Any, zeros: Any = None, ways: int = 1) -> list[Any]:
        """A register of words -> its operands, as registers of 32-bit values.

        ways: codes of less than 8 bits, as 16-bit operands: the i-th is 2^(bits * (i % ways)) times as large, which
        saves shifts.
        """
        if self.k.dot == "fp32":
            values = [self._one_fp32(e, word, i) for i in range(self.k.per_word)]
            return values if zeros is None else [e.builder.fadd(value, zeros) for value in values]
        if self.k.dot == "int16":
            return self._as_int16(e, word, ways)
        return self._as_bf16(e, word) if self.k.dot == "bf16" else self._as_bytes(e, word)

    def _as_bf16(self, e: Emitter, word: Any) -> list[Any]:
        k = self.k
        if k.format == "bf16":
            return [word]
        if k.bits < 8:
            # one more operation than 128 + code (a code in the mantissa of 128) needs, but no sum of x
            tables = [
                [bf16_bits(float(_integer(i >> low, k.bits, k.asym))) for i in range(32)] for low in range(0, 4, k.bits)
            ]  # a table sees 5 bits, two codes of 2
            shifts = [e.bits(word, "lshr", i) if i else word for i in range(0, 16, 4)]
            return [e.lookup_16(table, shifted) for shifted in shifts for table in tables]
        low, high = self._bytes_of_bf16(e, word)
        b = e.builder
        even = b.or_(e.bits(low, "and_", 0x00FF00FF), self._shift_16(e, high, "shl"))
        odd = b.or_(self._shift_16(e, low, "lshr"), e.bits(high, "and_", -0x00FF0100))
        return [even, odd]

    @staticmethod
    def _shift_16(e: Emitter, value: Any, direction: str) -> Any:
        shifted = e.bits(e.cast(value, vector(I16, 2 * value.type.count)), direction, 8)
        return e.cast(shifted, value.type)

    def _bytes_of_bf16(self, e: Emitter, word: Any) -> tuple[Any, Any]:
        """Low and high bytes of the bf16 that each byte of codes stands for; tables give them without the sign."""
        k, b = self.k, e.builder
        if k.format.startswith("fp8"):
            values = [_fp8_value(k.format, i) for i in range(128)]
            magnitude, sign = word, word
        else:
            if k.asym:
                word = e.bits(word, "xor", -0x7F7F7F80)  # less 128
            values = [float(i) for i in range(128)]
            codes = e.cast(word, vector(I8, 4 * word.type.count))
            negative = b.icmp_signed("<", codes, e.zero(codes.type))
            magnitude, sign = e.cast(b.select(negative, b.neg(codes), codes), word.type), word
        table = [bf16_bits(v) for v in values]
        low = e.lookup_8([v & 255 for v in table], magnitude)
        high = b.or_(e.lookup_8([v >> 8 for v in table], magnitude), e.bits(sign, "and_", -0x7F7F7F80))
        if k.format.startswith("int8"):  # -128 is the one magnitude that the tables lack; its low byte is 0 too
            bytes_kind = vector(I8, 4 * word.type.count)
            least = b.icmp_signed("==", e.cast(word, bytes_kind), e.constant(bytes_kind, -128))
            high = e.cast(b.select(least, e.constant(bytes_kind, -0x3D), e.cast(high, bytes_kind)), word.type)
        return low, high

    def _one_fp32(self, e: Emitter, word: Any, i: int) -> Any:
        k = self.k
        top = 32 - k.bits * (i + 1)
        high = e.bits(word, "shl", top) if top else word  # the code in the highest bits
        if k.format.startswith("int"):
            return e.float_of_int(e.bits(high, "lshr" if k.asym else "ashr", 32 - k.bits))
        if k.format == "bf16":
            return e.cast(high if i == 0 else e.bits(high, "and_", -0x10000), self.floats)
        if k.format == "fp16":
            magnitude = e.bits(e.bits(high, "lshr", 3), "and_", 0x0FFFE000)
            return e.float_of_small(magnitude, high, 112, 0x7C00 << 13)
        mantissa, bias, special = (3, 120, 0x7F) if k.format == "fp8_e4m3" else (2, 112, 0x7C)
        magnitude = e.bits(e.bits(e.bits(high, "lshr", 24), "and_", 0x7F), "shl", 23 - mantissa)
        return e.float_of_small(magnitude, high, bias, special << (23 - mantissa))

    def _as_bytes(self, e: Emitter, word: Any) -> list[Any]:
        k = self.k
        mask = {8: -1, 4: 0x0F0F0F0F, 2: 0x03030303}[k.bits]
        flip = {128: -0x7F7F7F80, 8: 0x08080808, 2: 0x02020202, 0: 0}[k.offset]
        shifts = (e.bits(word, "lshr", k.bits * i) if i else word for i in range(k.operands))
        return [e.bits(e.bits(shifted, "and_", mask), "xor", flip) for shifted in shifts]

    def _as_int16(self, e: Emitter, word: Any, ways: int) -> list[Any]:
        k = self.k
        if k.format == "int8_sym":
            halves = e.cast(word, vector(I16, 2 * word.type.count))
            return [e.cast(e.bits(one, "ashr", 8), word.type) for one in (e.bits(halves, "shl", 8), halves)]
        if k.offset:  # at once: AVX-512's mask and flip in one instruction takes as long as a product on Zen 4
            word = e.bits(word, "xor", _integer(sum(k.offset << i for i in range(0, 32, k.bits)), 32, False))
        found = []
        for i in range(k.operands):
            left = k.bits * (i % ways) if k.bits < 8 else 0
            right = k.bits * i - left
            shifted = e.bits(word, "lshr", right) if right else word
            found.append(e.bits(shifted, "and_", 0x10001 * ((1 << k.bits) - 1) << left))
        return found

    def most_ways(self, registers: int) -> int:
        """How many sums of the same are kept, where each takes so many registers: few sums do not hide the time of an
        addition, and see `operand_vectors`. Integers give the same whatever the order is."""
        if self.k.dot != "int16":
            return 1
        most = 4 if self.k.bits == 2 else 2
        return next((ways for ways in (4, 2) if ways <= most and ways * registers <= self.room), 1)

    @property
    def room(self) -> int:
        """Registers for sums."""
        return 8 if self.k.isa.lanes < 16 else 16

    def together(self, e: Emitter, ways: list[Any]) -> Any:
        """The sum of what `ways` sums hold."""
        shifted = (
            ways if self.k.bits == 8 else [e.bits(v, "ashr", self.k.bits * i) if i else v for i, v in enumerate(ways)]
        )
        return functools.reduce(e.plus, shifted)

    def gather(self, e: Emitter, a: Any, codes: Any, words: Any, out: Any) -> None:
        """Some words of a block of a weight in the public order -> panels [panels, words, 16]."""
        step = e.field(a, Arg.CODES_STEP)
        for p in range(self.k.panels):
            target = e.add(out, e.mul(words, 64 * p))
            if self.k.source == "columns":
                self._gather_columns(e, e.add(codes, p * PANEL * self.k.bits // 8), step, words, target)
            else:
                self._gather_rows(e, e.add(codes, e.mul(step, p * PANEL)), step, words, target)

    def _gather_columns(self, e: Emitter, codes: Any, step: Any, words: Any, out: Any) -> None:
        """n is contiguous: a word takes one element of each of `per_word` rows."""
        k, b = self.k, e.builder
        narrow, wide = vector(ir.IntType(k.bits), PANEL), vector(I32, PANEL)
        with e.loop(words) as t:
            word = None
            for j in range(k.per_word):
                element = e.load(codes, narrow, e.mul(e.add(e.mul(t, k.per_word), j), step))
                part = e.bits(b.zext(element, wide), "shl", k.bits * j)
                word = part if word is None else b.or_(word, part)
            e.store(word, out, e.mul(t, 64))

    def _gather_rows(self, e: Emitter, codes: Any, step: Any, words: Any, out: Any) -> None:
        """k is contiguous: squares of words are transposed; the last one overlaps the one before it."""
        b, lanes = e.builder, self.k.isa.lanes
        squares = b.sdiv(e.add(words, lanes - 1), e.number(lanes))
        last = e.add(words, -lanes)
        small = b.icmp_signed("<", last, e.number(0))
        with b.if_else(small) as (one_by_one, in_squares):
            with one_by_one, e.loop(words) as t:
                for row in range(PANEL):
                    word = e.load(codes, I32, e.add(e.mul(step, row), e.mul(t, 4)))
                    e.store(word, out, e.add(e.mul(t, 64), 4 * row))
            with in_squares, e.loop(squares) as s:
                start = e.mul(s, lanes)
                start = b.select(b.icmp_signed("<", start, last), start, last)
                for first in range(0, PANEL, lanes):
                    rows = [e.load(codes, self.words, e.add(e.mul(step, first + r), e.mul(start, 4)))
                            for r in range(lanes)]  # fmt: skip
                    for t, column in enumerate(transposed(e, rows)):
                        e.store(column, out, e.add(e.mul(start, 64), 64 * t + 4 * first))

    def unpack(
        self, e: Emitter, a: Any, w: Any, panel: Any, scales: Any, out: Any, first_group: Any, groups: Any
    ) -> None:
        """Panels -> operands [words, operands, panels, 16] of some groups.

        w: where word 0 is or would be; panel: bytes from one panel to the next.
        """
        size = self.k.operands * self.registers * self.bytes
        first = e.mul(first_group, e.field(a, Arg.GROUP_WORDS))
        with e.loop(groups) as i:
            g = e.add(first_group, i)
            start, count = self._words_of(e, a, g)
            zeros = self._zeros(e, scales, g)
            with e.loop(count) as t:
                place = e.add(start, t)
                target = e.mul(e.builder.sub(place, first), size)
                for j in range(self.registers):
                    word = e.load(w, self.words, self._word_place(e, panel, place, j))
                    for o, operand in enumerate(self.operand_vectors(e, word, zeros[j])):
                        e.store(operand, out, e.add(target, (o * self.registers + j) * self.bytes))

    def _zeros(self, e: Emitter, scales: Any, g: Any) -> list[Any]:
        """Of a group, their sign turned; None in each place where they are not subtracted from codes."""
        if not self.k.subtracts:
            return [None] * self.registers
        place = e.add(e.mul(g, self.k.parts * self.k.panels * 64), self.k.panels * 64)
        return [e.load(scales, self.floats, e.add(place, j * self.bytes)) for j in range(self.registers)]

    def _words_of(self, e: Emitter, a: Any, g: Any) -> tuple[Any, Any]:
        """The first word of a group and how many it has: fewer at the end of K."""
        words, size = e.field(a, Arg.WORDS), e.field(a, Arg.GROUP_WORDS)
        start = e.mul(g, size)
        return start, e.least(size, e.builder.sub(words, start))

    def _word_place(self, e: Emitter, panel: Any, t: Any, j: int) -> Any:
        per_panel = PANEL // self.k.isa.lanes
        return e.add(e.mul(panel, j // per_panel), e.mul(t, 64), j % per_panel * self.bytes)

    def scales(self, e: Emitter, a: Any, scales: Any, zeros: Any, n: Any, out: Any) -> None:
        """Scales, and zeros with their sign turned, of a block of columns from n on: fp32 [groups, parts, panels, 16].

        scales, zeros: of the expert.
        """
        k, lanes = self.k, self.k.isa.lanes
        if k.scale_access != "strided":
            self._scales_by_group(e, a, scales, zeros, n, out)
            return
        b, size = e.builder, X_SIZES[k.scale]
        near = b.icmp_signed("==", e.field(a, Arg.SCALES_G), e.number(size))
        many = b.icmp_signed(">=", e.field(a, Arg.GROUPS), e.number(lanes))
        with b.if_else(b.and_(near, many)) as (in_squares, one_by_one):
            with in_squares:
                self._scales_in_squares(e, a, scales, zeros, n, out)
            with one_by_one:
                self._scales_by_group(e, a, scales, zeros, n, out)

    def _scales_by_group(self, e: Emitter, a: Any, scales: Any, zeros: Any, n: Any, out: Any) -> None:
        k, step = self.k, e.field(a, Arg.SCALES_G)
        with e.loop(e.field(a, Arg.GROUPS)) as g:
            for p in range(k.panels):
                place = e.add(self._scale_place(e, a, e.add(n, PANEL * p)), e.mul(g, step))
                target = e.add(e.mul(g, k.parts * k.panels * 64), 64 * p)
                e.store(self._read_scales(e, a, scales, place), out, target)
                if k.parts > 1:
                    zero = self._read_scales(e, a, zeros, place) if k.asym else None
                    e.store(self._shift(e, zero, PANEL), out, e.add(target, 64 * k.panels))

    def _scales_in_squares(self, e: Emitter, a: Any, scales: Any, zeros: Any, n: Any, out: Any) -> None:
        """Groups are contiguous: squares are transposed; the last one overlaps the one before it."""
        k, lanes, size = self.k, self.k.isa.lanes, X_SIZES[self.k.scale]
        groups, step = e.field(a, Arg.GROUPS), e.field(a, Arg.SCALES_N)
        last, line = e.add(groups, -lanes), k.parts * k.panels * 64
        element = vector(F32 if k.scale == "fp32" else I16, lanes)
        blocks, squares = e.number(k.panels * PANEL // lanes), e.builder.sdiv(e.add(groups, lanes - 1), e.number(lanes))
        with e.loop(blocks) as j, e.loop(squares) as i:
            start = e.least(e.mul(i, lanes), last)
            place = e.add(e.mul(e.add(n, e.mul(j, lanes)), step), e.mul(start, size))
            target = e.add(out, e.mul(start, line), e.mul(j, self.bytes))

            def square(base: Any, place: Any = place) -> list[Any]:
                rows = [e.load(base, element, e.add(place, e.mul(step, r))) for r in range(lanes)]
                return transposed(e, [e.float_of(row, k.scale) for row in rows])

            for t, column in enumerate(square(scales)):
                e.store(column, target, t * line)
            shifts = square(zeros) if k.asym else [None] * lanes
            for t, column in enumerate(shifts if k.parts > 1 else []):
                e.store(self._shift(e, column, lanes), target, t * line + 64 * k.panels)

    def _shift(self, e: Emitter, zero: Any, lanes: int) -> Any:
        """Zeros with their sign turned, as the dot product sees codes."""
        shift = e.constant(vector(F32, lanes), float(-self.k.offset))
        return shift if zero is None else e.builder.fsub(shift, zero)

    def prefetch_scales(self, e: Emitter, a: Any, scales: Any, zeros: Any, n: Any) -> None:
        """Have the scales (and zeros) of a block of columns fetched."""
        k = self.k
        count = e.field(a, Arg.GROUPS) if k.scale_access == "vector" else e.number(k.panels * PANEL)
        step = e.field(a, Arg.SCALES_G if k.scale_access == "vector" else Arg.SCALES_N)
        lines = range(0, k.panels * PANEL * X_SIZES[k.scale], 64) if k.scale_access == "vector" else [0]
        with e.loop(count) as i:
            place = e.add(e.mul(n, e.field(a, Arg.SCALES_N)), e.mul(i, step))
            for line in lines:
                for base in (scales, zeros) if k.asym else (scales,):
                    e.prefetch(base, e.add(place, line))

    def _scale_place(self, e: Emitter, a: Any, n: Any) -> Any:
        if self.k.scale_access == "block128":
            n = e.builder.ashr(n, e.number(7))
        return e.mul(n, e.field(a, Arg.SCALES_N))

    def _read_scales(self, e: Emitter, a: Any, base: Any, place: Any) -> Any:
        k = self.k
        element: ir.Type = F32 if k.scale == "fp32" else I16
        if k.scale_access == "vector":
            return e.float_of(e.load(base, vector(element, PANEL), place), k.scale)
        if k.scale_access == "strided":
            step = e.field(a, Arg.SCALES_N)
            raw = e.zero(vector(element, PANEL))
            for i in range(PANEL):
                one = e.load(base, element, e.add(place, e.mul(step, i)))
                raw = e.builder.insert_element(raw, one, ir.Constant(I32, i))
            return e.float_of(raw, k.scale)
        return e.float_of(e.splat(e.load(base, element, place), PANEL), k.scale)

    # ---- products

    def multiply_packed(
        self, e: Emitter, a: Any, rows: Any, w: Any, panel: Any, ahead: Any, row: Any, scales: Any, first_group: Any,
        groups: Any,
    ) -> None:  # fmt: skip
        """At most `direct_rows` rows times some groups of a block of panels; every word is unpacked in registers.

        w, panel: as for `unpack`; ahead: the block that comes next, in the order of the source; scales: the totals
        follow.
        """
        k = self.k
        x = e.add(e.field(a, Arg.X), e.mul(row, e.field(a, Arg.X_STEP)))
        sums = e.add(e.field(a, Arg.SUMS), e.mul(row, e.field(a, Arg.SUMS_STEP)))
        total = e.add(scales, e.mul(e.field(a, Arg.GROUPS), k.parts * k.panels * 64)) if k.scale else scales

        def multiply(g: Any, products: _Products) -> None:
            start, count = self._words_of(e, a, g)
            zeros = self._zeros(e, scales, g)
            with e.loop(count) as t:
                place = e.add(start, t)
                words = [e.load(w, self.words, self._word_place(e, panel, place, j)) for j in range(self.registers)]
                self._prefetch(e, a, w, panel, ahead, place)
                found = [self.operand_vectors(e, *pair, products.ways) for pair in zip(words, zeros, strict=True)]
                for o in range(self.k.operands):
                    products.add([one[o] for one in found], e.mul(place, 4 * self.k.operands), 4 * o)

        self._multiply(e, a, (rows, self.k.isa.direct_rows), multiply, (x, sums, scales, total), (first_group, groups))

    def _prefetch(self, e: Emitter, a: Any, w: Any, panel: Any, ahead: Any, place: Any) -> None:
        """Have as much fetched as a step of `multiply_packed` reads: what it will read so many words later, at the end
        of a panel what comes next; for rows, which are gathered from many places at once, the next block, line by line
        as it lies."""
        k, b = self.k, e.builder
        if k.source == "panels":
            distance = 64 if k.isa.near else 32 if k.panels > 1 else 96  # words of each panel
            words, later = e.field(a, Arg.WORDS), e.add(place, distance)
            inside = b.icmp_signed("<", later, words)
            base = b.select(inside, w, b.sub(ahead, e.mul(words, 64)))
            for p in range(k.panels):
                e.prefetch(base, e.add(e.mul(panel, p), e.mul(later, 64)), near=k.isa.near)
        elif k.source == "rows":
            for p in range(k.panels):
                e.prefetch(ahead, e.add(e.mul(place, 64 * k.panels), 64 * p), near=False)

    def multiply_unpacked(
        self, e: Emitter, a: Any, rows: Any, w: Any, x: Any, sums: Any, scales: Any, total: Any, first_group: Any,
        groups: Any,
    ) -> None:  # fmt: skip
        """At most `isa.rows` rows times the operands of some groups of a block."""
        kind = self.floats if self.k.dot == "fp32" else self.words
        first = e.mul(first_group, e.mul(e.field(a, Arg.GROUP_WORDS), self.k.operands))

        def multiply(g: Any, products: _Products) -> None:
            start, count = (e.mul(words, self.k.operands) for words in self._words_of(e, a, g))
            with e.loop(count) as o:
                place = e.add(start, o)
                source = e.mul(e.builder.sub(place, first), self.registers * self.bytes)
                operand = [e.load(w, kind, e.add(source, j * self.bytes)) for j in range(self.registers)]
                products.add(operand, e.mul(place, 4), 0)

        self._multiply(e, a, (rows, self.k.isa.rows), multiply, (x, sums, scales, total), (first_group, groups))

    def _multiply(
        self, e: Emitter, a: Any, rows: tuple[Any, int], multiply: Multiply, places: tuple[Any, Any, Any, Any],
        groups: tuple[Any, Any],
    ) -> None:  # fmt: skip
        """A version for each number of rows, with registers of its own."""
        count, most = rows
        for m in range(1, most + 1):
            with e.when(count, "==", m):
                self._multiply_rows(e, a, m, multiply, places, groups)

    def _multiply_rows(
        self, e: Emitter, a: Any, rows: int, multiply: Multiply, places: tuple[Any, Any, Any, Any],
        groups: tuple[Any, Any],
    ) -> None:  # fmt: skip
        x, _, _, total = places
        first, count = groups
        width = self.registers * self.bytes
        products = _Products(self, e, a, rows, x)
        totals = {(m, j): e.variable(self.floats, e.load(total, self.floats, m * width + j * self.bytes))
                  for m, j in products.ones}  # fmt: skip
        with e.loop(count) as i:
            g = e.add(first, i)
            products.clear()
            multiply(g, products)
            self._add_products(e, a, totals, products, g, places)
        for (m, j), value in totals.items():
            e.store(value.get(), total, m * width + j * self.bytes)

    def _add_products(
        self, e: Emitter, a: Any, totals: dict[Any, Any], products: _Products, g: Any, places: tuple[Any, Any, Any, Any]
    ) -> None:
        k, (_, sums, scales, _) = self.k, places
        scales_of = e.add(scales, e.mul(g, k.parts * k.panels * 64))
        for m, j in products.ones:
            sums_of = e.add(sums, e.mul(e.field(a, Arg.SUMS_STEP), m), e.mul(g, 8)) if k.sums else None
            self.add_group(e, totals[m, j], products.total((m, j)), scales_of, sums_of, j * self.bytes)

    def terms(self, e: Emitter, a: Any) -> list[Any]:
        """Where in a packed row its terms are."""
        return [e.number(0), e.field(a, Arg.X_TERM)][: self.k.terms]

    def dot(self, e: Emitter, total: Any, w: Any, x: Any) -> Any:
        if self.k.dot == "bf16":
            return e.dot_bf16(total, w, x)
        if self.k.dot == "int16":
            return e.dot_int16(total, w, x, fused="int8" in self.k.isa.dots)
        return e.dot_int8(total, w, x) if self.k.dot == "int8" else e.fma(w, e.cast(x, self.floats), total)

    def add_group(self, e: Emitter, total: Any, value: Any, scales: Any, sums: Any, place: int) -> None:
        """total += (a group's sums, less zeros * sum of x) * scales"""
        k, b, lanes = self.k, e.builder, self.k.isa.lanes
        if k.whole:
            value = e.float_of_int(value)
        if not k.scale:
            total.set(b.fadd(total.get(), value))
            return
        if k.shifted:
            shift = e.load(scales, self.floats, 64 * k.panels + place)
            value = e.fma(shift, e.splat(e.load(sums, F32), lanes), value)
        scale = e.load(scales, self.floats, place)
        if k.steps:
            scale = b.fmul(scale, e.splat(e.load(sums, F32, 4), lanes))
        total.set(e.fma(value, scale, total.get()))

    # ---- results

    def clear(self, e: Emitter, a: Any, rows: Any, total: Any) -> None:
        """total[m, n] = 0"""
        with e.loop(e.mul(rows, self.k.panels)) as i:
            e.store(e.zero(vector(F32, PANEL)), total, e.mul(i, 64))

    def finish(self, e: Emitter, a: Any, rows: Any, total: Any, y: Any) -> None:
        """y[m, n] = total[m, n], rounded to the dtype of y"""
        k, step = self.k, e.field(a, Arg.Y_STEP)
        with e.loop(rows) as m:
            for p in range(k.panels):
                value = e.load(total, vector(F32, PANEL), e.add(e.mul(m, 64 * k.panels), 64 * p))
                if k.y != "fp32":
                    value = e.bf16_of_float(value) if k.y == "bf16" else e.half_of_float(value)
                e.store(value, y, e.add(e.mul(m, step), PANEL * X_SIZES[k.y] * p))


class _Products:
    """The sums of a group for some rows and all columns of a block, one register each."""

    def __init__(self, micro: MicroKernels, e: Emitter, a: Any, rows: int, x: Any) -> None:
        self._micro, self._e = micro, e
        step = e.field(a, Arg.X_STEP)
        self._x = [e.add(x, e.mul(step, m)) for m in range(rows)]
        self._terms = micro.terms(e, a)
        self.ones = [(m, j) for m in range(rows) for j in range(micro.registers)]
        self.ways, self._added = micro.most_ways(rows * micro.registers), 0
        self._sums = {one: [e.variable(micro.sums) for _ in range(self.ways)] for one in self.ones}

    def clear(self) -> None:
        for total in (total for ways in self._sums.values() for total in ways):
            total.set(self._e.zero(total.kind))

    def total(self, one: tuple[int, int]) -> Any:
        return self._micro.together(self._e, [way.get() for way in self._sums[one]])

    def add(self, w: list[Any], place: Any, offset: int) -> None:
        """sums[m, j] += w[j] * x[m], x at a place of each row"""
        e, way = self._e, self._added % self.ways
        self._added += 1
        for term in self._terms:
            for m, x in enumerate(self._x):
                value = e.splat(e.load(x, I32, e.add(place, term, offset)), self._micro.k.isa.lanes)
                for j, one in enumerate(w):
                    total = self._sums[m, j][way]
                    total.set(self._micro.dot(e, total.get(), one, value))


def transposed(e: Emitter, rows: list[Any]) -> list[Any]:
    """A square of 32-bit values: as many registers as a register has lanes.

    First 4 x 4 squares inside 128 bits, by interleaving; then the 128-bit quarters themselves.
    """
    lanes = len(rows)
    quarters = range(0, lanes, 4)

    def interleave(a: Any, b: Any, size: int, high: int) -> Any:
        order = [q + high * 2 + first + source + i for q in quarters for first in range(0, 2, size)
                 for source in (0, lanes) for i in range(size)]  # fmt: skip
        return e.shuffle(a, b, order)

    squares: list[list[Any]] = []  # [rows / 4][word of a quarter]
    for r in range(0, lanes, 4):
        pairs = [interleave(rows[r + i], rows[r + i + 1], 1, high) for i in (0, 2) for high in (0, 1)]
        squares.append([interleave(pairs[high], pairs[2 + high], 2, half) for high in (0, 1) for half in (0, 1)])
    words = [quarters_transposed(e, [square[word] for square in squares]) for word in range(4)]
    return [one for of_quarter in zip(*words, strict=True) for one in of_quarter]


def quarters_transposed(e: Emitter, rows: list[Any]) -> list[Any]:
    """A square of 128-bit quarters of registers: as many registers as a register has quarters."""

    def choose(a: Any, b: Any, *quarters: int) -> Any:
        return e.shuffle(a, b, [4 * q + i for q in quarters for i in range(4)])

    if len(rows) == 1:
        return rows
    if len(rows) == 2:
        a, b = rows
        return [choose(a, b, 0, 2), choose(a, b, 1, 3)]
    halves = [[choose(rows[r], rows[r + 1], h, h + 1, h + 4, h + 5) for r in (0, 2)] for h in (0, 2)]
    return [choose(*halves[q // 2], q % 2, 2 + q % 2, 4 + q % 2, 6 + q % 2) for q in range(4)]
