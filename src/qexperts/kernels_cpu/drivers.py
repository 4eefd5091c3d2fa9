"""Drivers: what each thread of a call does, in plain Python that Numba compiles.

    run     every thread of the one team of a call: what follows, and between them waits for the work that others took,
            never for a thread that has not come
    plan    the first thread: cut the rows of each expert into items (expert, first row, rows), many rows first
    pack    all threads: activations into the order of the operands, and the sums of their groups
    gemm    all threads: each takes the next unit, an item times a block of columns, until none is left

A hot expert is many items, so no thread waits for another longer than one unit takes. `a` is the address of a call's
record (`Arg`); results do not depend on which thread computes what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from .micro import MicroKernels
from .packing import Packing
from .rows import RowKernels
from .spec import ITEM_ROWS, PANEL, X_SIZES, Arg, Kind
from .vectors import I32, I64, Emitter, call_function, device_function, fetch_add, wait_for

__all__ = ["compiled", "write_gemm", "write_pack", "write_run"]

PACK_ROWS = 4  # that a thread packs at once
LEVELS = 8  # items of 120 rows and more come first, then 60, 30, ...


def _load64(e: Emitter, address: Any) -> Any:
    return e.load(address, I64)


def _load32(e: Emitter, address: Any) -> Any:
    return e.builder.sext(e.load(address, I32), I64)


def _store64(e: Emitter, address: Any, value: Any) -> None:
    e.store(value, address)


load64, load32 = device_function(_load64, returns=True), device_function(_load32, returns=True)
store64 = device_function(_store64)

# No reference counts, no exceptions, no entry from Python: nothing but machine code is left.
_OPTIONS: dict[str, Any] = {
    "error_model": "numpy", "nogil": True, "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip
compiled: Any = njit(**_OPTIONS)
_NEXT, _JOINED = int(Arg.NEXT), int(Arg.JOINED)
_X_IN, _X_IN_STEP, _X, _X_STEP = int(Arg.X_IN), int(Arg.X_IN_STEP), int(Arg.X), int(Arg.X_STEP)
_SUMS, _SUMS_STEP = int(Arg.SUMS), int(Arg.SUMS_STEP)
_CODES, _CODES_E, _CODES_STEP = int(Arg.CODES), int(Arg.CODES_E), int(Arg.CODES_STEP)
_SCALES, _SCALES_E, _ZEROS = int(Arg.SCALES), int(Arg.SCALES_E), int(Arg.ZEROS)
_Y, _Y_STEP, _N, _WORDS, _GROUPS = int(Arg.Y), int(Arg.Y_STEP), int(Arg.N), int(Arg.WORDS), int(Arg.GROUPS)
_ITEMS, _ITEM_COUNT, _END = int(Arg.ITEMS), int(Arg.ITEM_COUNT), int(Arg.END)
_COUNTS, _COUNTS_WIDE, _E, _S = int(Arg.COUNTS), int(Arg.COUNTS_WIDE), int(Arg.E), int(Arg.S)
_SCRATCH, _SCRATCH_STEP = int(Arg.SCRATCH), int(Arg.SCRATCH_STEP)
_BLOCK_GROUPS, _CHUNK_GROUPS, _GROUP_WORDS = int(Arg.BLOCK_GROUPS), int(Arg.CHUNK_GROUPS), int(Arg.GROUP_WORDS)
_PACK, _GEMM, _CAME, _PLANNED = int(Arg.PACK), int(Arg.GEMM), 8 * int(Arg.CAME), 8 * int(Arg.PLANNED)
_PACK_NEXT, _PACKED, _WIDE = 8 * int(Arg.PACK_NEXT), 8 * int(Arg.PACKED), int(Arg.WIDE)


@compiled
def get(a, i):  # type: ignore[no-untyped-def]
    """The i-th integer of a record."""
    return load64(a + 8 * i)


@compiled
def put(a, i, value):  # type: ignore[no-untyped-def]
    store64(a + 8 * i, value)


@compiled
def _count(a, expert, row):  # type: ignore[no-untyped-def]
    """Rows of an expert whose first is `row`."""
    if get(a, _COUNTS_WIDE):
        count = get(get(a, _COUNTS), expert)
    else:
        count = load32(get(a, _COUNTS) + 4 * expert)
    return max(0, min(count, get(a, _S) - row))


@compiled
def _plan_level(a, most, least, made):  # type: ignore[no-untyped-def]
    """Append the items of least to most rows; returns how many there are now."""
    row = 0
    for expert in range(get(a, _E)):
        left = _count(a, expert, row)
        while left > 0:
            rows = min(left, ITEM_ROWS)
            if least <= rows <= most:
                item = get(a, _ITEMS) + 24 * made
                put(item, 0, expert)
                put(item, 1, row)
                put(item, 2, rows)
                made += 1
            row += rows
            left -= rows
    return made


@compiled
def _plan(a):  # type: ignore[no-untyped-def]
    row, hottest = 0, 0
    for expert in range(get(a, _E)):
        count = _count(a, expert, row)
        hottest = max(hottest, count)
        row += count
    put(a, _END, row)
    most, made = ITEM_ROWS, 0
    for level in range(LEVELS):
        least = (most + 1) // 2 if level < LEVELS - 1 else 1
        if least <= hottest:
            made = _plan_level(a, most, least, made)
        most = least - 1
    put(a, _ITEM_COUNT, made)


def write_run(kind: Kind) -> Callable[[int], None]:
    """The same for every kind."""

    def run(a):  # type: ignore[no-untyped-def]
        if fetch_add(a + _CAME, 1) == 0:
            _plan(a)
            fetch_add(a + _PLANNED, 1)
        if get(a, _PACK):
            call_function(get(a, _PACK), a)
            wait_for(a + _PACKED, get(a, _S))
            if get(a, _WIDE):
                return
        wait_for(a + _PLANNED, 1)
        call_function(get(a, _GEMM), a)

    return run


def write_pack(kind: Kind) -> Callable[[int], None]:
    pack_row = compiled(_wrap_pack_row(Packing(kind)))

    def pack(a):  # type: ignore[no-untyped-def]
        rows = get(a, _S)
        while True:
            first = fetch_add(a + _PACK_NEXT, PACK_ROWS)
            if first >= rows:
                break
            end = min(first + PACK_ROWS, rows)
            for r in range(first, end):
                x = get(a, _X_IN) + r * get(a, _X_IN_STEP)
                pack_row(a, x, get(a, _X) + r * get(a, _X_STEP), get(a, _SUMS) + r * get(a, _SUMS_STEP))
            fetch_add(a + _PACKED, end - first)

    return pack


def _wrap_pack_row(packing: Packing) -> Callable[..., None]:
    emit = device_function(packing.pack_row)

    def pack_row(a, x, out, sums):  # type: ignore[no-untyped-def]
        emit(a, x, out, sums)

    return pack_row


def write_gemm(kind: Kind) -> Callable[[int], None]:
    micro = MicroKernels(kind)
    multiply_item, codes_of = _multiply_item(kind, micro), _codes_of(kind)
    load_scales, prefetch_scales = _scales_of(kind, micro)
    clear, finish_block = device_function(micro.clear), compiled(_wrap_finish(micro))
    scale_bytes = kind.parts * kind.panels * 64 if kind.scale else 0
    width, y_size, scaled = kind.panels * PANEL, X_SIZES[kind.y], bool(kind.scale)

    @compiled
    def column_of(a, u, blocks):  # type: ignore[no-untyped-def]
        """The last block may overlap the one before it."""
        return min((u - u // blocks * blocks) * width, get(a, _N) - width)

    @compiled
    def unit(a, scratch, u, next_u, blocks, last_row):  # type: ignore[no-untyped-def]
        """Returns the first row of the item, which this thread's unit before began with if it is last_row."""
        item, next_item = get(a, _ITEMS) + u // blocks * 24, get(a, _ITEMS) + next_u // blocks * 24
        n, next_n = column_of(a, u, blocks), column_of(a, next_u, blocks)
        expert, row, rows = get(item, 0), get(item, 1), get(item, 2)
        total = scratch + get(a, _GROUPS) * scale_bytes
        if scaled:
            load_scales(a, expert, n, scratch)
            prefetch_scales(a, get(next_item, 0), next_n)
        clear(a, rows, total)
        codes, ahead = codes_of(a, expert, n), codes_of(a, get(next_item, 0), next_n)
        multiply_item(a, codes, ahead, row, rows, scratch, total, row == last_row)
        finish_block(a, rows, total, get(a, _Y) + row * get(a, _Y_STEP) + n * y_size)
        return row

    def gemm(a):  # type: ignore[no-untyped-def]
        thread = fetch_add(a + 8 * _JOINED, 1)
        scratch = get(a, _SCRATCH) + thread * get(a, _SCRATCH_STEP)
        blocks = (get(a, _N) + width - 1) // width
        units, row = get(a, _ITEM_COUNT) * blocks, -1
        while True:
            u = fetch_add(a + 8 * _NEXT, 1)
            if u >= units:
                break
            # each other thread will have taken one by then, most likely
            next_u = min(units, get(a, _NEXT) + get(a, _JOINED)) - 1
            row = unit(a, scratch, u, next_u, blocks, row)

    return gemm


def _codes_of(kind: Kind) -> Any:
    columns, panels, bits = kind.source == "columns", kind.source == "panels", kind.bits

    @compiled
    def codes_of(a, expert, n):  # type: ignore[no-untyped-def]
        codes = get(a, _CODES) + expert * get(a, _CODES_E)
        if panels:
            return codes + n // PANEL * get(a, _WORDS) * 64
        return codes + (n * bits // 8 if columns else n * get(a, _CODES_STEP))

    return codes_of


def _scales_of(kind: Kind, micro: MicroKernels) -> tuple[Any, Any]:
    load, prefetch, asym = device_function(micro.scales), device_function(micro.prefetch_scales), kind.asym
    fetched = kind.scale_access in ("vector", "strided")

    @compiled
    def load_scales(a, expert, n, out):  # type: ignore[no-untyped-def]
        zeros = get(a, _ZEROS) + expert * get(a, _SCALES_E) if asym else 0
        load(a, get(a, _SCALES) + expert * get(a, _SCALES_E), zeros, n, out)

    @compiled
    def prefetch_scales(a, expert, n):  # type: ignore[no-untyped-def]
        if fetched:
            zeros = get(a, _ZEROS) + expert * get(a, _SCALES_E) if asym else 0
            prefetch(a, get(a, _SCALES) + expert * get(a, _SCALES_E), zeros, n)

    return load_scales, prefetch_scales


def _wrap_finish(micro: MicroKernels) -> Callable[..., None]:
    emit = device_function(micro.finish)

    def finish(a, rows, total, y):  # type: ignore[no-untyped-def]
        emit(a, rows, total, y)

    return finish


def _multiply_item(kind: Kind, micro: MicroKernels) -> Any:
    """total += x @ w.T for the rows of an item and a block of panels.

    again: the thread's unit before was of the same item.
    """
    multiply_few = _multiply_few_of_rows(kind, micro) if kind.row_words else _multiply_few_of_panels(kind, micro)
    multiply_many, direct = _multiply_many(kind, micro), kind.isa.direct_rows

    @compiled
    def multiply_item(a, codes, ahead, row, rows, scales, total, again):  # type: ignore[no-untyped-def]
        if rows <= direct:
            multiply_few(a, codes, ahead, row, rows, scales, total, again)
        else:
            multiply_many(a, codes, row, rows, scales, total)

    return multiply_item


def _multiply_few_of_rows(kind: Kind, micro: MicroKernels) -> Any:
    """The rows of the weight as they lie."""
    few = RowKernels(micro)
    arrange, multiply, add = (device_function(one) for one in (few.arrange, few.multiply, few.add))
    lanes, width, word_bytes = kind.isa.lanes, kind.panels * PANEL, kind.operands * 4

    @compiled
    def arrange_rows(a, row, rows, out):  # type: ignore[no-untyped-def]
        arrange(a, row, rows, out)

    @compiled
    def multiply_rows(a, rows, codes, ahead, first, x, partial):  # type: ignore[no-untyped-def]
        multiply(a, rows, codes, ahead, first, x, partial)

    @compiled
    def add_rows(a, rows, partial, row, scales, first):  # type: ignore[no-untyped-def]
        add(a, rows, partial, row, scales, first)

    @compiled
    def multiply_few(a, codes, ahead, row, rows, scales, total, again):  # type: ignore[no-untyped-def]
        x = total + ITEM_ROWS * width * 4
        partial = x + rows * get(a, _WORDS) * word_bytes
        if not again:
            arrange_rows(a, row, rows, x)
        for first in range(0, width, lanes):
            multiply_rows(a, rows, codes, ahead, first, x, partial)
            add_rows(a, rows, partial, row, scales, first)

    return multiply_few


def _multiply_few_of_panels(kind: Kind, micro: MicroKernels) -> Any:
    """A block of panels, or what is gathered into its order a chunk at a time."""
    gathers, columns, line, per_word = (
        kind.source != "panels",
        kind.source == "columns",
        kind.panels * 64,
        kind.per_word,
    )
    packed, gather = device_function(micro.multiply_packed), _gather(micro)

    @compiled
    def multiply_packed(a, rows, w, panel, ahead, row, scales, first, groups):  # type: ignore[no-untyped-def]
        packed(a, rows, w, panel, ahead, row, scales, first, groups)

    @compiled
    def multiply_few(a, codes, ahead, row, rows, scales, total, again):  # type: ignore[no-untyped-def]
        groups, size, words, step = get(a, _GROUPS), get(a, _GROUP_WORDS), get(a, _WORDS), get(a, _CHUNK_GROUPS)
        if not gathers:
            multiply_packed(a, rows, codes, words * 64, ahead, row, scales, 0, groups)
            return
        gathered, word_step = total + ITEM_ROWS * line, per_word * get(a, _CODES_STEP) if columns else 4
        for first in range(0, groups, step):
            count, start = min(step, groups - first), first * size
            some = min(count * size, words - start)
            gather(a, codes + start * word_step, some, gathered)
            w, panel = gathered - start * 64, some * 64
            multiply_packed(a, rows, w, panel, ahead, row, scales, first, count)

    return multiply_few


def _gather(micro: MicroKernels) -> Any:
    gathered = device_function(micro.gather)

    @compiled
    def gather(a, codes, words, out):  # type: ignore[no-untyped-def]
        gathered(a, codes, words, out)

    return gather


def _multiply_many(kind: Kind, micro: MicroKernels) -> Any:
    """Blocks of the weight, unpacked into the cache first."""
    gathers, columns, line = kind.source != "panels", kind.source == "columns", kind.panels * 64
    per_word, kind_operands = kind.per_word, kind.operands
    gather, multiply_block = _gather(micro), _multiply_block(kind, micro)

    @compiled
    def multiply_many(a, codes, row, rows, scales, total):  # type: ignore[no-untyped-def]
        groups, size, words, step = get(a, _GROUPS), get(a, _GROUP_WORDS), get(a, _WORDS), get(a, _BLOCK_GROUPS)
        operands = total + ITEM_ROWS * line
        gathered = operands + step * size * kind_operands * line
        word_step = per_word * get(a, _CODES_STEP) if columns else 4
        w, panel = codes, words * 64
        for first in range(0, groups, step):
            count = min(step, groups - first)
            if gathers:
                start = first * size
                some = min(count * size, words - start)
                w, panel = gathered - start * 64, some * 64
                gather(a, codes + start * word_step, some, gathered)
            multiply_block(a, rows, w, panel, row, scales, total, operands, first, count)

    return multiply_many


def _multiply_block(kind: Kind, micro: MicroKernels) -> Any:
    unpacked, unpack = device_function(micro.multiply_unpacked), device_function(micro.unpack)
    most, row_bytes = kind.isa.rows, kind.panels * 64

    @compiled
    def unpack_groups(a, w, panel, scales, out, first, groups):  # type: ignore[no-untyped-def]
        unpack(a, w, panel, scales, out, first, groups)

    @compiled
    def multiply_unpacked(a, rows, w, x, sums, scales, total, first, groups):  # type: ignore[no-untyped-def]
        unpacked(a, rows, w, x, sums, scales, total, first, groups)

    @compiled
    def multiply_block(a, rows, w, panel, row, scales, total, operands, first, count):  # type: ignore[no-untyped-def]
        unpack_groups(a, w, panel, scales, operands, first, count)
        x = get(a, _X) + row * get(a, _X_STEP)
        sums = get(a, _SUMS) + row * get(a, _SUMS_STEP)
        r, tiles = 0, (rows + most - 1) // most
        while r < rows:
            m = (rows - r + tiles - 1) // tiles  # 7 rows are 4 and 3, not 6 and 1
            multiply_unpacked(
                a, m, operands, x + r * get(a, _X_STEP), sums + r * get(a, _SUMS_STEP), scales,
                total + r * row_bytes, first, count,
            )  # fmt: skip
            r += m
            tiles -= 1

    return multiply_block
