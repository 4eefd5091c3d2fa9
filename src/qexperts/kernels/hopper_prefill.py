"""Grouped GEMM over a tile schedule on sm_90: y[r] = x[r] @ dequantize(w)[expert(r)].T

A program is one producer warp and four consumer warps. The producer takes units of work, a tile of the schedule times
128 rows of the weight, as in `prefill.py`, and keeps the copy engine busy across them: rows of x, words and scales of
the weight go to shared memory, several blocks ahead. The consumers dequantize words in registers, as left operands of
matrix instructions; those of one step run while the next is dequantized. Two programs share a multiprocessor.

Blocks are 128 k. Slots of x hold up to 128 rows x 64 k, or up to 64 rows x 128 k; slots of the weight 128 rows x
128 k, with the scales of their groups. A tile is computed in the smallest of the classes 16, 32, 64, 96, 128 that holds
its rows. That of 96 is two boxes of x, of 64 and 32 rows: tensors have powers of two. They share each left operand.
The first words of a block are loaded during the block before, those of a unit during the unit before: the producer ends
with a block without words. Results have the bits of `prefill.py`.

Of 128 rows of the weight, row 32 warp + 16 lh1 + 8 lh2 + 4 lh0 + 2 rep + rh is row 64 rep + 16 warp + 8 rh + lh of the
operand. So the results that a thread has of a row of x are neighbours and are stored as they are, its scales are one
load, and the copy engine can put rows that differ in rep and rh far apart: lanes then read words from other banks.
Glossary: rep, warp, rh, lh (lh0, lh1, lh2 its bits) as above; m row of x, n of the weight; b block of 64 k, q lane of a
fragment, J words of a lane; s, h, p of a code as in `dequant.py`; chunk 32 k; descs a class, the descriptors of its
boxes; boxes those of 64 k in shared memory; sums one of each.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..formats import QuantWeight
from ..plan import max_tiles
from .dequant import code_bits
from .gluon_compat import reinterpret, thread_barrier, tma_load
from .hopper_pairs import groups_of, operands_of, pairs_exponent, pairs_of, scale_rows, scales_of
from .hopper_work import advance, announce, barriers, below, claim, described, heard, rows_of, tile
from .hopper_work import bind as bind_views
from .launcher import Launch, Launcher
from .operand import Operand, tl_dtype

__all__ = ["REGISTERS", "arguments", "bind", "constants", "describe", "hopper_kernel", "launch"]

REGISTERS = 128  # of a thread at the start; the producer's go to the consumers, which then have 232
PROGRAMS_PER_SM = 2
SLOTS = {2: (6, 3), 4: (5, 3), 8: (4, 2)}  # of x, at most, and of the weight, by bits of a code
SHARED = 112 * 1024  # for slots: with 1 KiB for barriers half a processor's
INFOS = 4  # more than the units that the producer may be ahead: than slots of the weight


@triton.constexpr_function
def _words_layout(bits):  # type: ignore[no-untyped-def]
    """Words of a block, [(rep, rh), 1, (warp, lh1), (lh2, lh0), (b, q, J)]; 8 bits: [.., b, .., .., (q, J)]."""
    if bits == 8:
        registers, q, shape = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 1, 0, 0, 0]], 4, [4, 2, 8, 4, 16]
    elif bits == 4:
        registers, q, shape = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 8]], 2, [4, 1, 8, 4, 16]
    else:
        registers, q, shape = [[0, 0, 0, 0, 4]], 1, [4, 1, 8, 4, 8]
    lanes = [[0, 0, 0, 0, q], [0, 0, 0, 0, 2 * q], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 2, 0]]
    warps = [[0, 0, 2, 0, 0], [0, 0, 4, 0, 0]]
    return gl.DistributedLinearLayout([*registers, [1, 0, 0, 0, 0], [2, 0, 0, 0, 0]], lanes, warps, [], shape)


@triton.constexpr_function
def _result_layout(rows):  # type: ignore[no-untyped-def]
    """The sums as threads have them, [(m / 8, m % 2), (m / 2 % 4, n)]: the first in registers alone."""
    registers = [[m, 0] for m in (1, 2, 4, 8, 16) if m < rows // 4]
    lanes = [[0, 128], [0, 256], [0, 4], [0, 16], [0, 8]]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], *registers], lanes, [[0, 32], [0, 64]], [], [rows // 4, 512]
    )  # fmt: skip


@gluon.jit
def _box(desc, xs, xi, ROW: gl.constexpr):
    """Rows from ROW on of a slot of x: [BM, 64]."""
    BM: gl.constexpr = desc.block_shape[0]
    LX: gl.constexpr = desc.layout
    return reinterpret(xs.index(xi), desc.dtype, [128 // BM, BM, 64], LX).index(ROW // BM)


@gluon.jit
def _boxes(descs, xs, xi, HALF: gl.constexpr):
    """Half a block of x in a slot, [BM, 64] for each of descs; more than 64 rows take a slot for each half."""
    ROW: gl.constexpr = 64 * HALF if rows_of(descs) <= 64 else 0
    boxes = ()
    for i in gl.static_range(len(descs)):
        boxes += (_box(descs[i], xs, xi, ROW + i * descs[0].block_shape[0]),)
    return boxes


@gluon.jit
def _produce_unit(
    descs, w_desc, s_descs, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, panel, scale_row,
    N: gl.constexpr, GROUP: gl.constexpr, FIRST: gl.constexpr, END: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """Blocks FIRST .. END - 1 of a unit."""
    ROWS: gl.constexpr = rows_of(descs)
    HALVES: gl.constexpr = w_desc.block_shape[1]  # of a block: places of a row's words
    GROUPS: gl.constexpr = groups_of(GROUP)
    PARTS: gl.constexpr = ss.shape[0] // (WS * GROUPS)  # scales and, if these lie apart, zero points
    for k in range(FIRST, END):
        mbarrier.wait(w_empty.index(wi), wp ^ 1)
        mbarrier.expect(w_full.index(wi), 512 * (HALVES * w_desc.block_shape[4] + PARTS * GROUPS))
        tma_load(w_desc, [0, k * HALVES, panel, 0, 0], w_full.index(wi), ws.index(wi))
        for g in gl.static_range(GROUPS):
            group = k // (GROUP // 128) if GROUPS == 1 else k * GROUPS + g
            for part in gl.static_range(PARTS):
                to = ss.index((wi * PARTS + part) * GROUPS + g)
                tma_load(s_descs[part], [scale_row + group * (N // 8), 0], w_full.index(wi), to)
        wi, wp = advance(wi, wp, WS)
        for h in gl.static_range(2):
            if h == 0 or ROWS > 64:
                mbarrier.wait(x_empty.index(xi), xp ^ 1)
                mbarrier.expect(x_full.index(xi), ROWS * (128 if ROWS > 64 else 256))
            boxes = _boxes(descs, xs, xi, h)
            for i in gl.static_range(len(descs)):
                first = row + i * descs[0].block_shape[0]
                tma_load(descs[i], [first, k * 128 + 64 * h], x_full.index(xi), boxes[i])
            if h == 1 or ROWS > 64:
                xi, xp = advance(xi, xp, XS)
    return xi, xp, wi, wp


@gluon.jit
def _produce(
    classes, w_desc, s_descs, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows, panel, scale_row,
    N: gl.constexpr, GROUP: gl.constexpr, FIRST: gl.constexpr, END: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """Blocks of a unit in the smallest class that holds its rows. classes: the largest first."""
    if len(classes) == 1 or rows > below(classes):
        xi, xp, wi, wp = _produce_unit(
            classes[0], w_desc, s_descs, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, panel,
            scale_row, N, GROUP, FIRST, END, XS, WS,
        )  # fmt: skip
    else:
        xi, xp, wi, wp = _produce(
            classes[1:], w_desc, s_descs, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows,
            panel, scale_row, N, GROUP, FIRST, END, XS, WS,
        )  # fmt: skip
    return xi, xp, wi, wp


@gluon.jit
def _producer(
    classes, w_desc, s_descs, schedule_ptr, tiles_ptr, MAX_TILES, xs, ws, ss, infos, x_full, x_empty,
    w_full, w_empty, info_full, N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr,
    XS: gl.constexpr, WS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    NK: gl.constexpr = K // 128
    AHEAD: gl.constexpr = WS if NK > WS else NK  # blocks that need not wait long
    units = gl.load(schedule_ptr) * (N // 128)
    back = (gl.program_id(0) >= gl.num_programs(0) // 2).to(gl.int32)
    unit = claim(schedule_ptr, back, units)
    e, row, rows, block_n = tile(tiles_ptr, unit, MAX_TILES, N // 128)
    zero = unit * 0
    xi, xp, wi, wp, i = zero, zero, zero, zero, zero
    while unit >= 0:
        announce(infos, info_full, i, row, rows, block_n, INFOS)
        i += 1
        panel = e * (N // 16) + block_n * 8
        scale_row = e * (N // 8 * (K // GROUP)) + block_n * 16
        xi, xp, wi, wp = _produce(
            classes, w_desc, s_descs, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row,
            rows, panel, scale_row, N, GROUP, 0, AHEAD, XS, WS,
        )  # fmt: skip
        # the counter takes its time, and so do the tiles: now the slots are full
        unit = claim(schedule_ptr, back, units)
        next_e, next_row, next_rows, next_n = tile(tiles_ptr, unit, MAX_TILES, N // 128)
        if AHEAD < NK:
            xi, xp, wi, wp = _produce(
                classes, w_desc, s_descs, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row,
                rows, panel, scale_row, N, GROUP, AHEAD, NK, XS, WS,
            )  # fmt: skip
        e, row, rows, block_n = next_e, next_row, next_rows, next_n
    mbarrier.wait(w_empty.index(wi), wp ^ 1)
    mbarrier.arrive(w_full.index(wi), count=1)
    announce(infos, info_full, i, zero, zero, zero, INFOS)


@gluon.jit
def _words(ws, wi, HALF: gl.constexpr, FORMAT: gl.constexpr):
    """The first or second 64 k of a slot of the weight: [2, 4, 2, 8, 4] and, but for 2 bits, J."""
    BITS: gl.constexpr = code_bits(FORMAT)
    LAYOUT: gl.constexpr = _words_layout(BITS)
    w = ws.index(wi).load(LAYOUT)
    if BITS == 8:
        w = gl.permute(gl.reshape(w, (2, 2, 2, 4, 2, 2, 2, 4, 4)), (0, 3, 1, 5, 4, 6, 7, 8, 2))
        w = gl.reshape(w, (2, 4, 2, 8, 4, 4, 2))
    elif BITS == 4:
        w = gl.permute(gl.reshape(w, (2, 2, 4, 2, 2, 2, 2, 4, 2)), (0, 2, 1, 4, 3, 5, 7, 8, 6))
        w = gl.reshape(w, (2, 4, 2, 8, 4, 2, 2))
    else:
        w = gl.permute(gl.reshape(w, (2, 2, 4, 2, 2, 2, 2, 4)), (0, 2, 1, 4, 3, 5, 7, 6))
        w = gl.reshape(w, (2, 4, 2, 8, 4, 2))
    first, second = gl.split(w)
    if HALF == 0:
        w = first
    else:
        w = second
    return w


@gluon.jit
def _step_words(w, FORMAT: gl.constexpr):
    """Words of each step of 16 k of 64 k: four of [2, 4, 2, 8, 4]; under 8 bits steps share them."""
    BITS: gl.constexpr = code_bits(FORMAT)
    if BITS == 8:
        first, second = gl.split(gl.permute(gl.reshape(w, (2, 4, 2, 8, 4, 2, 2)), (0, 1, 2, 3, 4, 6, 5)))
        w0, w1 = gl.split(first)
        w2, w3 = gl.split(second)
    elif BITS == 4:
        w0, w2 = gl.split(w)
        w1, w3 = w0, w2
    else:
        w0, w1, w2, w3 = w, w, w, w
    return w0, w1, w2, w3


@triton.constexpr_function
def _mma(rows):  # type: ignore[no-untyped-def]
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, rows, 16])


@gluon.jit
def _zeros(desc):
    BM: gl.constexpr = desc.block_shape[0]
    return gl.zeros((128, BM), gl.float32, _mma(BM))


@gluon.jit
def _issue(sums, operand, boxes, K0: gl.constexpr):
    """sums + operand @ its k of boxes, from K0 on: a group of instructions for each."""
    issued = ()
    for i in gl.static_range(len(sums)):
        box = boxes[i].slice(K0, operand.shape[1], 1).permute((1, 0))
        issued += (warpgroup_mma(operand, box, sums[i], is_async=True),)
    return issued


@gluon.jit
def _wait(sums, operands, NEWEST: gl.constexpr):
    """Until only so many of the newest operands are read; the compiler must not write over these operands before."""
    return warpgroup_mma_wait(NEWEST * len(sums), deps=sums + operands)[: len(sums)]


@gluon.jit
def _multiply(sums, flying, t, boxes, CHUNK: gl.constexpr, A: gl.constexpr):
    """sums + a chunk of 128 k of the weight @ that of its half of a block of x; sums, and the operand that may still be
    read."""
    K0: gl.constexpr = 32 * (CHUNK % 2)
    if flying.shape[1] == 32:
        operand = gl.reshape(gl.permute(t, (0, 1, 2, 3, 6, 7, 4, 5)), (128, 32))
        operand = gl.convert_layout(operand, A, assert_trivial=True)
        sums = _issue(sums, operand, boxes, K0)
        if CHUNK == 3:  # registers of one that flies from round to round are taken from the loops of all classes
            sums = _wait(sums, (flying, operand), 0)
        elif CHUNK > 0:
            sums = _wait(sums, (flying,), 1)
        flying = operand
    else:  # two operands of 32 k would take more registers than there are beside the sums
        first, second = gl.split(gl.permute(t, (0, 1, 2, 3, 7, 4, 5, 6)))
        first = gl.convert_layout(gl.reshape(first, (128, 16)), A, assert_trivial=True)
        second = gl.convert_layout(gl.reshape(second, (128, 16)), A, assert_trivial=True)
        sums = _wait(_issue(sums, first, boxes, K0), (flying,), 1)
        sums = _wait(_issue(sums, second, boxes, K0 + 16), (first,), 1)
        flying = second
    return sums, flying


@gluon.jit
def _store(y_ptr, acc, row, rows, first_n, N: gl.constexpr):
    """A thread's four sums of a row of x lie side by side, and a warp's are 64 bytes."""
    BM: gl.constexpr = acc.shape[1]
    OUT: gl.constexpr = _result_layout(BM)
    out = gl.reshape(acc.to(y_ptr.dtype.element_ty), (2, 4, 2, 2, 2, 2, BM // 8, 4, 2))
    out = gl.reshape(gl.permute(out, (6, 8, 7, 1, 4, 3, 5, 0, 2)), (BM // 4, 512))
    i = gl.arange(0, BM // 4, gl.SliceLayout(1, OUT))
    j = gl.arange(0, 512, gl.SliceLayout(0, OUT))
    i, m = i // 2 * 8 + i % 2, j // 128 * 2  # the row is their sum: i is known to the compiler, and an address is one
    y_ptrs = y_ptr + row.to(gl.int64) * N + first_n + (m * N + j % 128)
    mask = i[:, None] < (rows - m)[None, :]
    gl.store(y_ptrs[None, :] + i[:, None] * N, gl.convert_layout(out, OUT), mask=mask)


@gluon.jit
def _consume_unit(
    y_ptr, descs, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, w, row, rows, first_n,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, XS: gl.constexpr,
    WS: gl.constexpr,
):  # fmt: skip
    """w: the first words of this unit; returned: of the next one."""
    GROUPS: gl.constexpr = groups_of(GROUP)
    WIDE: gl.constexpr = rows_of(descs) > 64
    DTYPE: gl.constexpr = descs[0].dtype
    A: gl.constexpr = gl.DotOperandLayout(0, _mma(descs[0].block_shape[0]), 2)
    sums = [_zeros(desc) for desc in descs]
    flying = gl.zeros((128, 16 if WIDE else 32), DTYPE, A)
    before = xi + 0  # the slot of x still read; xi itself the front end would not carry from round to round
    for k in range(K // 128):
        w0, w1, w2, w3 = _step_words(w, FORMAT)
        operands = operands_of(scales_of(ss, wi, w0, 0, GROUPS, WS), GROUPS, FORMAT, SCALE, DTYPE)
        t = pairs_of(w0, w1, operands, GROUPS, FORMAT, SCALE, 0, DTYPE)
        mbarrier.wait(x_full.index(xi), xp)
        boxes = _boxes(descs, xs, xi, 0)
        sums, flying = _multiply(sums, flying, t, boxes, 0, A)
        w4, w5, w6, w7 = _step_words(_words(ws, wi, 1, FORMAT), FORMAT)
        if GROUPS > 2:
            operands = operands_of(scales_of(ss, wi, w0, 1, GROUPS, WS), GROUPS, FORMAT, SCALE, DTYPE)
        t = pairs_of(w2, w3, operands, GROUPS, FORMAT, SCALE, 1, DTYPE)
        sums, flying = _multiply(sums, flying, t, boxes, 1, A)
        if GROUPS > 1:
            s2 = scales_of(ss, wi, w0, 2, GROUPS, WS)
            s3 = scales_of(ss, wi, w0, 3, GROUPS, WS)
        fence_async_shared()  # loads may still be under way, and a barrier does not hold back the copy engine's writes
        thread_barrier()
        mbarrier.arrive(w_empty.index(wi), count=1)  # all words have been read, and the slot of x before
        mbarrier.arrive(x_empty.index(before), count=1, pred=k > 0)
        wi, wp = advance(wi, wp, WS)
        before = xi
        if GROUPS > 1:
            operands = operands_of(s2, GROUPS, FORMAT, SCALE, DTYPE)
        t = pairs_of(w4, w5, operands, GROUPS, FORMAT, SCALE, 0, DTYPE)
        if WIDE:
            xi, xp = advance(xi, xp, XS)
            mbarrier.wait(x_full.index(xi), xp)
        boxes = _boxes(descs, xs, xi, 1)
        sums, flying = _multiply(sums, flying, t, boxes, 2, A)
        if WIDE:
            mbarrier.arrive(x_empty.index(before), count=1)
            before = xi
        mbarrier.wait(w_full.index(wi), wp)  # after the last block: of the next unit
        w = _words(ws, wi, 0, FORMAT)
        if GROUPS > 2:
            operands = operands_of(s3, GROUPS, FORMAT, SCALE, DTYPE)
        t = pairs_of(w6, w7, operands, GROUPS, FORMAT, SCALE, 1, DTYPE)
        sums, flying = _multiply(sums, flying, t, boxes, 3, A)
        xi, xp = advance(xi, xp, XS)
    if WIDE:
        sums = _wait(sums, (flying,), 0)
    thread_barrier()
    mbarrier.arrive(x_empty.index(before), count=1)
    for i in gl.static_range(len(descs)):
        acc, first = sums[i] * 2.0 ** pairs_exponent(FORMAT, SCALE, DTYPE), i * descs[0].block_shape[0]
        _store(y_ptr, acc, row + first, rows - first, first_n, N)
    return xi, xp, wi, wp, w


@gluon.jit
def _consume(
    y_ptr, classes, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, w, row, rows, first_n,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, XS: gl.constexpr,
    WS: gl.constexpr,
):  # fmt: skip
    """A unit in the smallest class that holds its rows; none if there are no rows."""
    if rows > below(classes):
        xi, xp, wi, wp, w = _consume_unit(
            y_ptr, classes[0], xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, w, row, rows, first_n,
            N, K, FORMAT, SCALE, GROUP, XS, WS,
        )  # fmt: skip
    elif len(classes) > 1:
        xi, xp, wi, wp, w = _consume(
            y_ptr, classes[1:], xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, w, row, rows, first_n,
            N, K, FORMAT, SCALE, GROUP, XS, WS,
        )  # fmt: skip
    return xi, xp, wi, wp, w


@gluon.jit
def _consumer(
    y_ptr, classes, xs, ws, ss, infos, x_full, x_empty, w_full, w_empty, info_full,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, XS: gl.constexpr,
    WS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    zero = gl.program_id(0) * 0
    xi, xp, wi, wp, i = zero, zero, zero, zero, zero
    rows = zero + 1
    mbarrier.wait(w_full.index(0), 0)
    w = _words(ws, 0, 0, FORMAT)
    while rows > 0:
        row, rows, block_n = heard(infos, info_full, i, INFOS)
        first_n = block_n * 128
        i += 1
        xi, xp, wi, wp, w = _consume(
            y_ptr, classes, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, w, row, rows, first_n,
            N, K, FORMAT, SCALE, GROUP, XS, WS,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["E", "MAX_TILES"])
def hopper_kernel(
    y_ptr, x128, x64, x32, x16, w_desc, s_desc, z_desc, schedule_ptr, E, MAX_TILES,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr, XS: gl.constexpr,
    WS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(x128.dtype, [XS, 128, 64], x128.layout)
    ws = gl.allocate_shared_memory(gl.int32, [WS, 4, w_desc.block_shape[1], 8, 4, w_desc.block_shape[4]], w_desc.layout)
    ss = gl.allocate_shared_memory(gl.int32, [WS * scale_rows(FORMAT, SCALE, GROUP), 16, 8], s_desc.layout)
    infos = gl.allocate_shared_memory(gl.int32, [INFOS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    x_full, x_empty = barriers(XS), barriers(XS)
    w_full, w_empty = barriers(WS), barriers(WS)
    info_full = barriers(INFOS)
    fence_async_shared()
    tiles_ptr = schedule_ptr + 4 + E + 1
    classes = ((x128,), (x64, x32), (x64,), (x32,), (x16,))
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    y_ptr, classes, xs, ws, ss, infos, x_full, x_empty, w_full, w_empty, info_full,
                    N, K, FORMAT, SCALE, GROUP, XS, WS, INFOS,
                ),
            ),
            (
                _producer,
                (
                    classes, w_desc, (s_desc, z_desc), schedule_ptr, tiles_ptr, MAX_TILES, xs, ws, ss,
                    infos, x_full, x_empty, w_full, w_empty, info_full, N, K, FORMAT, GROUP, XS, WS, INFOS,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


def arguments(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int) -> tuple[object, ...]:
    """The kernel's arguments before its constants."""

    bits = code_bits(w.format)
    # a row's words in a block: in so many places, so many each
    halves, columns = {2: (1, 8), 4: (1, 16), 8: (2, 16)}[bits]
    panels, blocks = E * w.N // 16, w.K // 128
    words, groups = 16 * columns * halves * blocks, w.K // (w.group or w.K)
    return (
        y,
        *(described(x, x.shape, x.stride(), [m, 64], 128) for m in (128, 64, 32, 16)),
        described(
            w.w.view(torch.int32),
            [4, halves * blocks, panels, 4, columns],
            [columns, 16 * columns, words, 4 * columns, 1],
            [4, halves, 8, 4, columns],
            4 * columns,
        ),
        *(described(t.view(torch.int32), [2 * panels * groups, 8], [8, 1], [16, 8], 32) for t in (w.s, w.z)),
        schedule,
        E,
        max_tiles(x.shape[0], E),
    )


def _slots(fmt: str, scale: gl.dtype, group: int) -> tuple[int, int]:
    """Of x and of the weight, as many of x as there is room for."""
    bits = code_bits(fmt)
    x_slots, w_slots = SLOTS[bits]
    room = SHARED - w_slots * (2048 * bits + 512 * scale_rows(fmt, scale, group))
    return min(x_slots, room // 16384), w_slots


def constants(w: Operand) -> dict[str, object]:
    group = w.group or w.K
    x_slots, w_slots = _slots(w.format, w.scale, group)
    return {
        "N": w.N, "K": w.K, "FORMAT": w.format, "SCALE": w.scale, "GROUP": group, "XS": x_slots, "WS": w_slots,
        "INFOS": INFOS,
    }  # fmt: skip


_LAUNCH = Launcher(hopper_kernel, "Gluon prefill")


def bind(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int, processors: int) -> Launch:
    """A launch for tensors that differ from these in values alone: of y, x, w.w, w.s, w.z and a schedule.

    All lie on multiples of 16 bytes, and so do the rows of x.
    """
    return bind_views(
        _LAUNCH, (w.facts, x.dtype, y.dtype), (y, x, w.w, w.s, w.z, schedule), arguments(y, x, w, schedule, E),
        PROGRAMS_PER_SM * processors, constants(w), 4, REGISTERS, f"{w.format} (N={w.N}, K={w.K})",
    )  # fmt: skip


def launch(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int, processors: int) -> None:
    """y: [S, N]; x: [S, K]; schedule: of `schedule.py`, not split, fresh: the counters are used up.

    x and y in bf16 or in fp16; w in a "tiles" layout, its scales in any dtype; N and K are multiples of 128; groups of
    K, multiples of 128, 64, 32 or 16.
    """
    bind(y, x, w, schedule, E, processors)(y, x, w.w, w.s, w.z, schedule)


def describe(weight: QuantWeight) -> str:
    """What is as the tile sizes of `config.py` are to `prefill.py`."""
    assert weight.scale_dtype is not None
    slots = _slots(weight.format.name, tl_dtype(weight.scale_dtype), weight.group_size or weight.K)
    return "Gluon(x_slots={}, w_slots={})".format(*slots)
