"""Grouped GEMM of unquantized weights over a tile schedule on sm_90: y[r] = x[r] @ w[expert(r)].T

A program is one producer warp and eight consumer warps, as in `hopper_prefill.py`, and has a multiprocessor to itself.
A unit is a tile of the schedule times 256 rows of the weight: 128 rows, in two programs, read x twice as often. Both
operands go to shared memory by the copy engine, 64 k at a time, and are multiplied there. What lies outside of a weight
is read as zeros. Results have the bits of `prefill.py`.
"""

from __future__ import annotations

import torch
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
from .gluon_compat import reinterpret, tma_load
from .hopper_work import advance, announce, barriers, below, claim, described, heard, tile
from .hopper_work import bind as bind_views
from .launcher import Launch, Launcher
from .operand import Operand

__all__ = ["REGISTERS", "WARPS", "arguments", "bind", "constants", "dense_kernel", "describe", "launch"]

BLOCK_N = 256
SLOTS = 4  # 64 k of both operands: 48 KiB
INFOS = 8  # more than SLOTS: than units that the producer may be ahead, of one slot each where K is 64
WARPS = 8  # of consumers
REGISTERS = 168  # of a thread at the start; the producer's go to the consumers, which then have 240
PROGRAMS_PER_SM = 1


@gluon.jit
def _produce(
    desc, w_desc, xs, ws, full, empty, i, phase, row, e, first_n,
    FIRST: gl.constexpr, END: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Blocks FIRST .. END - 1 of a unit."""
    BM: gl.constexpr = desc.block_shape[0]
    BN: gl.constexpr = w_desc.block_shape[1]
    LX: gl.constexpr = desc.layout
    for k in range(FIRST, END):
        mbarrier.wait(empty.index(i), phase ^ 1)
        mbarrier.expect(full.index(i), (BN + BM) * 128)
        tma_load(w_desc, [e, first_n, k * 64], full.index(i), ws.index(i))
        block = reinterpret(xs.index(i), desc.dtype, [BM, 64], LX)
        tma_load(desc, [row, k * 64], full.index(i), block)
        i, phase = advance(i, phase, SLOTS)
    return i, phase


@gluon.jit
def _produce_class(
    classes, w_desc, xs, ws, full, empty, i, phase, row, rows, e, first_n,
    FIRST: gl.constexpr, END: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Blocks of a unit in the smallest class that holds its rows. classes: the largest first."""
    if len(classes) == 1 or rows > below(classes):
        i, phase = _produce(classes[0][0], w_desc, xs, ws, full, empty, i, phase, row, e, first_n, FIRST, END, SLOTS)
    else:
        i, phase = _produce_class(
            classes[1:], w_desc, xs, ws, full, empty, i, phase, row, rows, e, first_n, FIRST, END, SLOTS
        )
    return i, phase


@gluon.jit
def _producer(
    classes, w_desc, schedule_ptr, tiles_ptr, MAX_TILES, xs, ws, infos, full, empty, info_full,
    N: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = w_desc.block_shape[1]
    NK: gl.constexpr = (K + 63) // 64
    AHEAD: gl.constexpr = SLOTS if NK > SLOTS else NK  # blocks that need not wait long
    BLOCKS_N: gl.constexpr = (N + BN - 1) // BN
    units = gl.load(schedule_ptr) * BLOCKS_N
    back = (gl.program_id(0) % 4 == 0).to(gl.int32)  # half of them took 5% longer on the recorded workload
    unit = claim(schedule_ptr, back, units)
    e, row, rows, block_n = tile(tiles_ptr, unit, MAX_TILES, BLOCKS_N)
    zero = unit * 0
    i, phase, n = zero, zero, zero
    while unit >= 0:
        announce(infos, info_full, n, row, rows, block_n, INFOS)
        n += 1
        i, phase = _produce_class(
            classes, w_desc, xs, ws, full, empty, i, phase, row, rows, e, block_n * BN, 0, AHEAD, SLOTS
        )
        # the counter takes its time, and so do the tiles: now the slots are full
        unit = claim(schedule_ptr, back, units)
        next_e, next_row, next_rows, next_n = tile(tiles_ptr, unit, MAX_TILES, BLOCKS_N)
        if AHEAD < NK:
            i, phase = _produce_class(
                classes, w_desc, xs, ws, full, empty, i, phase, row, rows, e, block_n * BN, AHEAD, NK, SLOTS
            )
        e, row, rows, block_n = next_e, next_row, next_rows, next_n
    announce(infos, info_full, n, zero, zero, zero, INFOS)


@gluon.jit
def _store(y_ptr, acc, row, rows, first_n, N: gl.constexpr):
    """acc: [n, m], of warps above each other; a warp stores what it has: 16 n, 32 bytes of a row."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, gl.num_warps()], [1, 0])
    out = gl.convert_layout(gl.permute(acc.to(y_ptr.dtype.element_ty), (1, 0)), OUT)
    offs_m = gl.arange(0, out.shape[0], gl.SliceLayout(1, OUT))
    offs_n = gl.arange(0, out.shape[1], gl.SliceLayout(0, OUT))
    y_ptrs = y_ptr + row.to(gl.int64) * N + first_n
    mask = (offs_m < rows)[:, None]
    if N % out.shape[1]:
        mask = mask & (offs_n < N - first_n)[None, :]
    gl.store(y_ptrs + offs_m[:, None] * N + offs_n[None, :], out, mask=mask)


@gluon.jit
def _consume(
    y_ptr, desc, w_desc, xs, ws, full, empty, i, phase, row, rows, first_n,
    N: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = desc.block_shape[0]
    BN: gl.constexpr = w_desc.block_shape[1]
    LX: gl.constexpr = desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BM, 16]
    )
    acc = gl.zeros((BN, BM), gl.float32, MMA)
    before = i + 0  # the slot still read; i itself the front end would not carry from round to round
    for k in range((K + 63) // 64):
        mbarrier.wait(full.index(i), phase)
        w = reinterpret(ws.index(i), desc.dtype, [BN, 64], LX)
        x = reinterpret(xs.index(i), desc.dtype, [BM, 64], LX)
        acc = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
        before = i
        i, phase = advance(i, phase, SLOTS)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    _store(y_ptr, acc, row, rows, first_n, N)
    return i, phase


@gluon.jit
def _consume_class(
    y_ptr, classes, w_desc, xs, ws, full, empty, i, phase, row, rows, first_n,
    N: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A unit in the smallest class that holds its rows; none if there are no rows."""
    if rows > below(classes):
        i, phase = _consume(
            y_ptr, classes[0][0], w_desc, xs, ws, full, empty, i, phase, row, rows, first_n, N, K, SLOTS
        )  # fmt: skip
    elif len(classes) > 1:
        i, phase = _consume_class(
            y_ptr, classes[1:], w_desc, xs, ws, full, empty, i, phase, row, rows, first_n, N, K, SLOTS
        )  # fmt: skip
    return i, phase


@gluon.jit
def _consumer(
    y_ptr, classes, w_desc, xs, ws, infos, full, empty, info_full,
    N: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = w_desc.block_shape[1]
    zero = gl.program_id(0) * 0
    i, phase, n = zero, zero, zero
    rows = zero + 1
    while rows > 0:
        row, rows, block_n = heard(infos, info_full, n, INFOS)
        first_n = block_n * BN
        n += 1
        i, phase = _consume_class(
            y_ptr, classes, w_desc, xs, ws, full, empty, i, phase, row, rows, first_n, N, K, SLOTS
        )  # fmt: skip


@gluon.jit(do_not_specialize=["E", "MAX_TILES"])
def dense_kernel(
    y_ptr, x128, x64, x32, x16, w_desc, schedule_ptr, E, MAX_TILES,
    N: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(x128.dtype, [SLOTS, 128, 64], x128.layout)
    ws = gl.allocate_shared_memory(x128.dtype, [SLOTS, 1, w_desc.block_shape[1], 64], w_desc.layout)
    infos = gl.allocate_shared_memory(gl.int32, [INFOS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = barriers(SLOTS), barriers(SLOTS)
    info_full = barriers(INFOS)
    fence_async_shared()
    tiles_ptr = schedule_ptr + 4 + E + 1
    classes = ((x128,), (x64,), (x32,), (x16,))
    gl.warp_specialize(
        [
            (
                _consumer,
                (y_ptr, classes, w_desc, xs, ws, infos, full, empty, info_full, N, K, SLOTS, INFOS),
            ),
            (
                _producer,
                (
                    classes, w_desc, schedule_ptr, tiles_ptr, MAX_TILES, xs, ws, infos, full, empty, info_full,
                    N, K, SLOTS, INFOS,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


def arguments(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int) -> tuple[object, ...]:
    """The kernel's arguments before its constants."""
    return (
        y,
        *(described(x, x.shape, x.stride(), [m, 64], 128) for m in (128, 64, 32, 16)),
        described(w.w, [E, w.N, w.K], w.strides[:3], [1, BLOCK_N, 64], 128),
        schedule,
        E,
        max_tiles(x.shape[0], E),
    )


def constants(w: Operand) -> dict[str, object]:
    return {"N": w.N, "K": w.K, "SLOTS": SLOTS, "INFOS": INFOS}


_LAUNCH = Launcher(dense_kernel, "Gluon prefill")


def bind(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int, processors: int) -> Launch:
    """A launch for tensors that differ from these in values alone: of y, x, w.w, w.s, w.z and a schedule.

    All lie on multiples of 16 bytes, and so do the rows of x and w.
    """
    return bind_views(
        _LAUNCH, (w.facts, x.dtype), (y, x, w.w, w.s, w.z, schedule), arguments(y, x, w, schedule, E),
        PROGRAMS_PER_SM * processors, constants(w), WARPS, REGISTERS, f"{w.format} (N={w.N}, K={w.K})",
    )  # fmt: skip


def launch(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int, processors: int) -> None:
    """y: [S, N]; x: [S, K], of the weight's dtype; schedule: of `schedule.py`, not split, fresh: the counters are used
    up. k is contiguous in w; N and K are multiples of 8."""
    bind(y, x, w, schedule, E, processors)(y, x, w.w, w.s, w.z, schedule)


def describe(weight: QuantWeight) -> str:
    """What is as the tile sizes of `config.py` are to `prefill.py`."""
    return f"Gluon(slots={SLOTS})"
