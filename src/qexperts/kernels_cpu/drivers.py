"""Drivers: what each thread of a call does.

    run     every thread of the one team of a call: what follows, and between them waits for the work that others took,
            never for a thread that has not come
    plan    the first thread: cut the rows of each expert into items (expert, first row, rows), many rows first
    pack    all threads: activations into the order of the operands, and the sums of their groups
    gemm    all threads: each takes the next unit, an item times a block of columns, until none is left

A hot expert is many items, so no thread waits for another longer than two units take. `a` is the address of a call's
record (`Arg`); results do not depend on which thread computes what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .micro import MicroKernels
from .packing import Packing
from .rows import RowKernels
from .spec import ITEM_ROWS, PANEL, X_SIZES, Arg, Kind
from .vectors import I32, I64, Emitter

__all__ = ["DRIVERS"]

PACK_ROWS = 4  # that a thread packs at once
LEVELS = 8  # items of 120 rows and more come first, then 60, 30, ...
_ITEM = 24  # bytes: expert, first row, rows


def _at(e: Emitter, a: Any, base: Arg, index: Any) -> Any:
    """The address of a row, or an expert, of what lies at a field; the field after it has the step."""
    return e.add(e.field(a, base), e.mul(index, e.field(a, base + 1)))


def _run(e: Emitter, a: Any, kind: Kind) -> None:
    """The same for every kind."""
    with e.when(e.fetch_add(a, Arg.CAME, 1), "==", 0):
        e.call(_plan, a)
        e.fetch_add(a, Arg.PLANNED, 1)
    pack = e.field(a, Arg.PACK)
    with e.when(pack, "!=", 0):
        e.call_address(pack, a)
        e.wait_for(a, Arg.PACKED, e.field(a, Arg.S))
    with e.when(e.field(a, Arg.WIDE), "==", 0):
        e.wait_for(a, Arg.PLANNED, e.number(1))
        e.call_address(e.field(a, Arg.GEMM), a)


def _plan(e: Emitter, a: Any) -> None:
    row, hottest = e.variable(I64), e.variable(I64)
    with e.loop(e.field(a, Arg.E)) as expert:
        count = _count(e, a, expert, row.get())
        hottest.set(e.most(hottest.get(), count))
        row.set(e.add(row.get(), count))
    e.set_field(a, Arg.END, row.get())
    e.set_field(a, Arg.ITEM_COUNT, e.number(0))
    most = ITEM_ROWS
    for level in range(LEVELS):
        least = (most + 1) // 2 if level < LEVELS - 1 else 1
        with e.when(hottest.get(), ">=", least):
            e.call(_plan_level, a, most, least)
        most = least - 1


def _plan_level(e: Emitter, a: Any, most: Any, least: Any) -> None:
    """Append the items of least to most rows."""
    row, made = e.variable(I64), e.variable(I64, e.field(a, Arg.ITEM_COUNT))
    with e.loop(e.field(a, Arg.E)) as expert:
        end = e.add(row.get(), _count(e, a, expert, row.get()))
        with e.forever() as leave_if:
            first = row.get()
            leave_if(first, ">=", end)
            rows = e.least(e.sub(end, first), ITEM_ROWS)
            with e.when(rows, ">=", least), e.when(rows, "<=", most):
                item = e.add(e.field(a, Arg.ITEMS), e.mul(made.get(), _ITEM))
                for place, value in enumerate((expert, first, rows)):
                    e.set_field(item, place, value)
                made.set(e.add(made.get(), 1))
            row.set(e.add(first, rows))
    e.set_field(a, Arg.ITEM_COUNT, made.get())


def _count(e: Emitter, a: Any, expert: Any, row: Any) -> Any:
    """Rows of an expert whose first is `row`."""
    counts, count = e.field(a, Arg.COUNTS), e.variable(I64)
    with e.when_else(e.field(a, Arg.COUNTS_WIDE), "!=", 0) as (wide, narrow):
        with wide:
            count.set(e.load(counts, I64, e.mul(expert, 8)))
        with narrow:
            count.set(e.builder.sext(e.load(counts, I32, e.mul(expert, 4)), I64))
    return e.most(e.least(count.get(), e.sub(e.field(a, Arg.S), row)), 0)


def _pack(e: Emitter, a: Any, kind: Kind) -> None:
    packing, rows = Packing(kind), e.field(a, Arg.S)
    with e.forever() as leave_if:
        first = e.fetch_add(a, Arg.PACK_NEXT, PACK_ROWS)
        leave_if(first, ">=", rows)
        count = e.least(e.sub(rows, first), PACK_ROWS)
        with e.loop(count) as i:
            row = e.add(first, i)
            e.call(packing.pack_row, a, *(_at(e, a, base, row) for base in (Arg.X_IN, Arg.X, Arg.SUMS)))
        e.fetch_add(a, Arg.PACKED, count)


def _gemm(e: Emitter, a: Any, kind: Kind) -> None:
    units = _Units(e, a, kind)
    thread = e.fetch_add(a, Arg.JOINED, 1)
    scratch = _at(e, a, Arg.SCRATCH, thread)
    count = e.mul(e.field(a, Arg.ITEM_COUNT), units.blocks)
    last_row, taken = e.variable(I64, e.number(-1)), e.variable(I64, e.fetch_add(a, Arg.NEXT, 1))
    with e.forever() as leave_if:
        u = taken.get()
        leave_if(u, ">=", count)
        # What is fetched ahead is of the unit that comes next. It is taken before this one is multiplied if each thread
        # has had one and more are left than one for each; else each other thread will have taken one, most likely.
        free, joined = e.field(a, Arg.NEXT), e.field(a, Arg.JOINED)
        guess = e.add(e.least(count, e.add(free, joined)), -1)
        early = e.builder.and_(e.compare(e.sub(count, free), ">", joined), e.compare(last_row.get(), ">=", 0))
        taken.set(e.number(-1))
        with e.builder.if_then(early):
            taken.set(e.fetch_add(a, Arg.NEXT, 1))
        next_u = e.builder.select(e.compare(taken.get(), "<", 0), guess, e.least(taken.get(), e.add(count, -1)))
        last_row.set(units.multiply(u, next_u, scratch, last_row.get()))
        with e.when(taken.get(), "<", 0):
            taken.set(e.fetch_add(a, Arg.NEXT, 1))


class _Units:
    """What a thread does with a unit."""

    def __init__(self, e: Emitter, a: Any, kind: Kind) -> None:
        self._e, self._a, self._k = e, a, kind
        self._micro = MicroKernels(kind)
        self._width, self._line = kind.panels * PANEL, kind.panels * 64  # columns of a block; bytes of its words
        self._groups, self._words = e.field(a, Arg.GROUPS), e.field(a, Arg.WORDS)
        n = e.field(a, Arg.N)
        self._last = e.add(n, -self._width)
        self.blocks = e.builder.sdiv(e.add(n, self._width - 1), e.number(self._width))

    def multiply(self, u: Any, next_u: Any, scratch: Any, last_row: Any) -> Any:
        """Returns the first row of the item, which this thread's unit before began with if it is last_row."""
        e, a, k = self._e, self._a, self._k
        (item, n), (next_item, next_n) = self._of(u), self._of(next_u)
        expert, row, rows = (e.field(item, i) for i in range(3))
        next_expert = e.field(next_item, 0)
        total = scratch
        if k.scale:
            total = e.add(scratch, e.mul(self._groups, k.parts * self._line))
            e.call(self._micro.scales, a, *self._scales(expert), n, scratch)
            if k.scale_access in ("vector", "strided"):
                e.call(self._micro.prefetch_scales, a, *self._scales(next_expert), next_n)
        self._micro.clear(e, a, rows, total)
        codes, ahead = self._codes(expert, n), self._codes(next_expert, next_n)
        with e.when_else(rows, "<=", k.isa.direct_rows) as (few, many):
            with few:
                if k.row_words:
                    self._few_of_rows((codes, ahead), row, rows, (scratch, total), last_row)
                else:
                    self._few_of_panels((codes, ahead), row, rows, (scratch, total))
            with many:
                self._many(codes, row, rows, (scratch, total))
        y = e.add(_at(e, a, Arg.Y, row), e.mul(n, X_SIZES[k.y]))
        e.call(self._micro.finish, a, rows, total, y)
        return row

    def _of(self, u: Any) -> tuple[Any, Any]:
        """The item of a unit and the first column of its block; the last block may overlap the one before it."""
        e = self._e
        index = e.builder.sdiv(u, self.blocks)
        block = e.sub(u, e.mul(index, self.blocks))
        return e.add(e.field(self._a, Arg.ITEMS), e.mul(index, _ITEM)), e.least(e.mul(block, self._width), self._last)

    def _scales(self, expert: Any) -> tuple[Any, Any]:
        """Of an expert, and its zeros."""
        e, a = self._e, self._a
        place = e.mul(expert, e.field(a, Arg.SCALES_E))
        zeros = e.add(e.field(a, Arg.ZEROS), place) if self._k.asym else e.number(0)
        return e.add(e.field(a, Arg.SCALES), place), zeros

    def _codes(self, expert: Any, n: Any) -> Any:
        """Of an expert, from a column on."""
        e, a, codes = self._e, self._a, _at(self._e, self._a, Arg.CODES, expert)
        if self._k.source == "panels":
            return e.add(codes, e.mul(n, e.mul(self._words, 64 // PANEL)))
        if self._k.source == "columns":
            return e.add(codes, e.mul(n, self._k.bits // 8))
        return e.add(codes, e.mul(n, e.field(a, Arg.CODES_STEP)))

    def _few_of_rows(self, codes: tuple[Any, Any], row: Any, rows: Any, sums: tuple[Any, Any], last_row: Any) -> None:
        """The rows of the weight as they lie. codes: of the block, of the next; sums: scales, totals."""
        e, a, few = self._e, self._a, RowKernels(self._micro)
        scales, total = sums
        x = e.add(total, ITEM_ROWS * self._line)
        partial = e.add(x, e.mul(rows, e.mul(self._words, self._k.x_words * 4)))
        with e.when(row, "!=", last_row):
            e.call(few.arrange, a, row, rows, x)
        with e.loop(e.number(self._width // self._k.part_rows)) as i:
            first = e.mul(i, self._k.part_rows)
            e.call(few.multiply, a, rows, *codes, first, x, partial)
            e.call(few.add, a, rows, partial, row, scales, first)

    def _few_of_panels(self, codes: tuple[Any, Any], row: Any, rows: Any, sums: tuple[Any, Any]) -> None:
        """A block of panels, or what is gathered into its order a chunk at a time."""
        e, a, micro, (here, ahead), (scales, total) = self._e, self._a, self._micro, codes, sums
        if self._k.source == "panels":
            panel = e.mul(self._words, 64)
            e.call(micro.multiply_packed, a, rows, here, panel, ahead, row, scales, 0, self._groups)
            return
        with self._chunks(Arg.CHUNK_GROUPS) as (first, count):
            w, panel = self._gathered(here, first, count, e.add(total, ITEM_ROWS * self._line))
            e.call(micro.multiply_packed, a, rows, w, panel, ahead, row, scales, first, count)

    def _many(self, codes: Any, row: Any, rows: Any, sums: tuple[Any, Any]) -> None:
        """Blocks of the weight, unpacked into the cache first."""
        e, a, (scales, total) = self._e, self._a, sums
        operands = e.add(total, ITEM_ROWS * self._line)
        block_words = e.mul(e.field(a, Arg.BLOCK_GROUPS), e.field(a, Arg.GROUP_WORDS))
        gathered = e.add(operands, e.mul(block_words, self._k.operands * self._line))
        with self._chunks(Arg.BLOCK_GROUPS) as (first, count):
            w, panel = codes, e.mul(self._words, 64)
            if self._k.source != "panels":
                w, panel = self._gathered(codes, first, count, gathered)
            e.call(self._micro.unpack, a, w, panel, scales, operands, first, count)
            self._multiply_block(operands, row, rows, sums, (first, count))

    def _chunks(self, size: Arg) -> Any:
        """All groups, so many at once: first, count."""
        return self._e.chunks(self._groups, self._e.field(self._a, size))

    def _gathered(self, codes: Any, first: Any, count: Any, out: Any) -> tuple[Any, Any]:
        """Gather some groups into panels: where word 0 would be, and bytes of a panel."""
        e, a, size = self._e, self._a, self._e.field(self._a, Arg.GROUP_WORDS)
        start = e.mul(first, size)
        some = e.least(e.mul(count, size), e.sub(self._words, start))
        columns = self._k.source == "columns"
        step = e.mul(e.field(a, Arg.CODES_STEP), self._k.per_word) if columns else e.number(4)
        e.call(self._micro.gather, a, e.add(codes, e.mul(start, step)), some, out)
        return e.sub(out, e.mul(start, 64)), e.mul(some, 64)

    def _multiply_block(
        self, operands: Any, row: Any, rows: Any, sums: tuple[Any, Any], groups: tuple[Any, Any]
    ) -> None:
        """As many rows at once as there are registers for; 7 rows are 4 and 3, not 6 and 1."""
        e, a, most, (scales, total) = self._e, self._a, self._k.isa.rows, sums
        tiles = e.builder.sdiv(e.add(rows, most - 1), e.number(most))
        done = e.variable(I64)
        with e.loop(tiles) as i:
            left, tiles_left = e.sub(rows, done.get()), e.sub(tiles, i)
            count = e.builder.sdiv(e.add(left, tiles_left, -1), tiles_left)
            here = e.add(row, done.get())
            x, x_sums = (_at(e, a, base, here) for base in (Arg.X, Arg.SUMS))
            out = e.add(total, e.mul(done.get(), self._line))
            e.call(self._micro.multiply_unpacked, a, count, operands, x, x_sums, scales, out, *groups)
            done.set(e.add(done.get(), count))


DRIVERS: dict[str, Callable[[Emitter, Any, Kind], None]] = {"run": _run, "pack": _pack, "gemm": _gemm}
