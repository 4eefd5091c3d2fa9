"""Grouped GEMM over a tile schedule on sm_90: y[r] = x[r] @ dequantize(w)[expert(r)].T

A program is one producer warp and four consumer warps. The producer takes units of work, a tile of the schedule times
128 rows of the weight, as in `prefill.py`, and keeps the copy engine busy across them: rows of x, words and scales of
the weight go to shared memory, several blocks ahead. The consumers dequantize words in registers, as left operands of
matrix instructions; those of one step of 32 k run while the next is dequantized. Two programs share a multiprocessor.

Slots of x hold 128 rows x 64 k, or up to 64 rows x 128 k. Slots of the weight hold 128 rows x 128 k.
No backend launches it yet. int4_sym, group size 128, bf16 activations and scales, "tiles" of 128 k; N and K are
multiples of 128. On an H100 (torch 2.11, Triton 3.6) bit-equal to `prefill.py`, recorded workload: 0.583 and 0.570 ms
(N=3072 and 1536, schedule included) where that takes 0.665 and 0.636.
Glossary: rep, warp, rh, lh a row's place in a matrix operand: 64 rep + 16 warp + 8 rh + lh; b block of 64 k, q lane of
a fragment, J words of a lane.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..plan import max_tiles
from .dequant import _fast, _fast_operands, fast_exponent
from .gluon_compat import reinterpret, thread_barrier, tma_load
from .operand import Operand

__all__ = ["REGISTERS", "arguments", "constants", "hopper_kernel", "launch"]

X_SLOTS, W_SLOTS = 5, 3  # 108 KiB: two programs share a multiprocessor
REGISTERS = 128  # of a thread at the start; the producer's go to the consumers, which then have 232

# words of a block, [panel, row, word] = [(rep, warp), (rh, lh), (b, q, J)]
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 8], [0, 8, 0], [4, 0, 0]],
        [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [2, 0, 0]],
        [],
        [8, 16, 16],
    )
)
# scales of a block, [(rep, warp, rh), lh]
SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[1, 0], [8, 0]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[2, 0], [4, 0]], [], [16, 8]
    )
)
INFOS = 4  # more than the units that the producer may be ahead


@gluon.jit
def _claim(schedule_ptr, back, units):
    """The next unit of work, or -1; a front counter and one from the back in the halves of 64 bits."""
    one = gl.where(back == 1, 1 << 32, 1).to(gl.int64)
    ticket = gl.atomic_add((schedule_ptr + 2).to(gl.pointer_type(gl.int64)), one, sem="relaxed")
    f = (ticket & 0x7FFFFFFF).to(gl.int32)
    b = (ticket >> 32).to(gl.int32)
    return gl.where(f + b < units, gl.where(back == 1, units - 1 - b, f), -1)


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
    slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
    return slot, phase


@gluon.jit
def _produce_unit(
    desc, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, panel, scale_row,
    N: gl.constexpr, FIRST: gl.constexpr, END: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """Blocks FIRST .. END - 1 of a unit."""
    BM: gl.constexpr = desc.block_shape[0]
    LX: gl.constexpr = desc.layout
    for k in range(FIRST, END):
        mbarrier.wait(w_empty.index(wi), wp ^ 1)
        mbarrier.expect(w_full.index(wi), 8192 + 512)
        tma_load(w_desc, [panel, k * 16, 0], w_full.index(wi), ws.index(wi))
        tma_load(s_desc, [scale_row + k * (N // 8), 0], w_full.index(wi), ss.index(wi))
        wi, wp = _next(wi, wp, WS)
        if BM == 128:
            for h in gl.static_range(2):
                mbarrier.wait(x_empty.index(xi), xp ^ 1)
                mbarrier.expect(x_full.index(xi), 16384)
                tma_load(
                    desc,
                    [row, k * 128 + 64 * h],
                    x_full.index(xi),
                    reinterpret(xs.index(xi), gl.bfloat16, [BM, 64], LX),
                )
                xi, xp = _next(xi, xp, XS)
        else:
            mbarrier.wait(x_empty.index(xi), xp ^ 1)
            mbarrier.expect(x_full.index(xi), BM * 256)
            both = reinterpret(xs.index(xi), gl.bfloat16, [128 // BM, BM, 64], LX)
            tma_load(desc, [row, k * 128], x_full.index(xi), both.index(0))
            tma_load(desc, [row, k * 128 + 64], x_full.index(xi), both.index(1))
            xi, xp = _next(xi, xp, XS)
    return xi, xp, wi, wp


@gluon.jit
def _produce(
    x128, x64, x32, x16, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows, panel,
    scale_row, N: gl.constexpr, FIRST: gl.constexpr, END: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    if rows > 64:
        xi, xp, wi, wp = _produce_unit(
            x128, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, panel, scale_row,
            N, FIRST, END, XS, WS,
        )  # fmt: skip
    elif rows > 32:
        xi, xp, wi, wp = _produce_unit(
            x64, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, panel, scale_row,
            N, FIRST, END, XS, WS,
        )  # fmt: skip
    elif rows > 16:
        xi, xp, wi, wp = _produce_unit(
            x32, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, panel, scale_row,
            N, FIRST, END, XS, WS,
        )  # fmt: skip
    else:
        xi, xp, wi, wp = _produce_unit(
            x16, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, panel, scale_row,
            N, FIRST, END, XS, WS,
        )  # fmt: skip
    return xi, xp, wi, wp


@gluon.jit
def _tile(tiles_ptr, unit, MAX_TILES, N: gl.constexpr):
    """Expert, row, rows, first n of a unit."""
    tile = gl.maximum(unit, 0) // (N // 128)
    e = gl.load(tiles_ptr + tile)
    row = gl.load(tiles_ptr + MAX_TILES + tile)
    rows = gl.load(tiles_ptr + 2 * MAX_TILES + tile)
    return e, row, rows, gl.maximum(unit, 0) % (N // 128) * 128


@gluon.jit
def _producer(
    x128, x64, x32, x16, w_desc, s_desc, schedule_ptr, tiles_ptr, MAX_TILES, xs, ws, ss, infos, x_full, x_empty, w_full,
    w_empty, info_full, N: gl.constexpr, K: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    NK: gl.constexpr = K // 128
    AHEAD: gl.constexpr = WS if NK > WS else NK  # blocks that need not wait long
    L: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    field = gl.arange(0, 4, L)
    units = gl.load(schedule_ptr) * (N // 128)
    back = (gl.program_id(0) >= gl.num_programs(0) // 2).to(gl.int32)
    unit = _claim(schedule_ptr, back, units)
    e, row, rows, first_n = _tile(tiles_ptr, unit, MAX_TILES, N)
    zero = unit * 0
    xi, xp, wi, wp, i = zero, zero, zero, zero, zero
    while unit >= 0:
        infos.index(i % INFOS).store(gl.where(field == 0, row, gl.where(field == 1, rows, first_n // 128)))
        mbarrier.arrive(info_full.index(i % INFOS), count=1)
        i += 1
        panel = e * (N // 16) + first_n // 16
        scale_row = e * (N // 8 * (K // 128)) + first_n // 8
        xi, xp, wi, wp = _produce(
            x128, x64, x32, x16, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row,
            rows, panel, scale_row, N, 0, AHEAD, XS, WS,
        )  # fmt: skip
        # the counter takes its time, and so do the tiles: now the slots are full
        unit = _claim(schedule_ptr, back, units)
        next_e, next_row, next_rows, next_n = _tile(tiles_ptr, unit, MAX_TILES, N)
        if AHEAD < NK:
            xi, xp, wi, wp = _produce(
                x128, x64, x32, x16, w_desc, s_desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row,
                rows, panel, scale_row, N, AHEAD, NK, XS, WS,
            )  # fmt: skip
        e, row, rows, first_n = next_e, next_row, next_rows, next_n
    infos.index(i % INFOS).store(gl.where(field == 1, 0, field * 0))
    mbarrier.arrive(info_full.index(i % INFOS), count=1)


@gluon.jit
def _operands(scale, FORMAT: gl.constexpr):
    """Scales [2, 4, 2, 8] -> operands of the dequantization."""
    ASM: gl.constexpr = _fast_operands(FORMAT)
    return gl.inline_asm_elementwise(ASM, "=r,=r,=r,r,r", [scale, scale], (gl.int32, gl.int32, gl.int32), True, 1)


@gluon.jit
def _dequant(w, a, b, c, FORMAT: gl.constexpr):
    """Words of 32 k [2, 4, 2, 8, 4] -> bf16 [2, 4, 2, 8, 4, 2, 2, 2]; the last of s, h, p."""
    ASM: gl.constexpr = _fast(FORMAT)
    o0, o1, o2, o3, o4, o5, o6, o7 = gl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
        [w, gl.expand_dims(a, 4), gl.expand_dims(b, 4), gl.expand_dims(c, 4)],
        (gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16), True, 1,
    )  # fmt: skip
    t = gl.join(gl.join(gl.join(o0, o4), gl.join(o2, o6)), gl.join(gl.join(o1, o5), gl.join(o3, o7)))
    return t.to(gl.bfloat16, bitcast=True)


@gluon.jit
def _multiply(acc, flying, w, a, b, c, block, QUARTER: gl.constexpr, FORMAT: gl.constexpr, A: gl.constexpr):
    """acc + dequantize(w) @ 32 k of a block of x [BM, 64].

    Returns acc and the operand that may still be read: until then the compiler must not write over its registers.
    """
    t = _dequant(w, a, b, c, FORMAT)
    if flying.shape[1] == 32:
        operand = gl.reshape(gl.permute(t, (0, 1, 2, 3, 5, 6, 4, 7)), (128, 32))  # q, s, h, p -> s, h, q, p
        operand = gl.convert_layout(operand, A, assert_trivial=True)
        acc = warpgroup_mma(operand, block.slice(32 * QUARTER, 32, 1).permute((1, 0)), acc, is_async=True)
        acc, flying = warpgroup_mma_wait(1, deps=(acc, flying))
        flying = operand
    else:  # registers are scarce
        first, second = gl.split(gl.permute(t, (0, 1, 2, 3, 6, 4, 7, 5)))
        first = gl.convert_layout(gl.reshape(first, (128, 16)), A, assert_trivial=True)
        second = gl.convert_layout(gl.reshape(second, (128, 16)), A, assert_trivial=True)
        acc = warpgroup_mma(first, block.slice(32 * QUARTER, 16, 1).permute((1, 0)), acc, is_async=True)
        acc, flying = warpgroup_mma_wait(1, deps=(acc, flying))
        acc = warpgroup_mma(second, block.slice(32 * QUARTER + 16, 16, 1).permute((1, 0)), acc, is_async=True)
        acc, first = warpgroup_mma_wait(1, deps=(acc, first))
        flying = second
    return acc, flying


@gluon.jit
def _words(ws, wi, HALF: gl.constexpr):
    """Words of a slot of the weight, of 32 k each, of its first or second 64 k: [2, 4, 2, 8, 4]."""
    w = gl.permute(gl.reshape(ws.index(wi).load(WORDS), (2, 4, 2, 8, 2, 4, 2)), (0, 1, 2, 3, 5, 6, 4))
    first, second = gl.split(w)
    if HALF == 0:
        w0, w1 = gl.split(first)
    else:
        w0, w1 = gl.split(second)
    return w0, w1


@gluon.jit
def _scales(ss, wi, LAYOUT: gl.constexpr):
    """Scales of a slot of the weight: [2, 4, 2, 8]."""
    s = gl.reshape(ss.index(wi).load(SCALES), (2, 4, 2, 8))
    return gl.convert_layout(s, gl.SliceLayout(4, LAYOUT), assert_trivial=True)


@gluon.jit
def _block(xs, xi, HALF: gl.constexpr, BM: gl.constexpr, LX: gl.constexpr):
    """64 k of a slot of x: [BM, 64]."""
    if BM == 128:
        block = reinterpret(xs.index(xi), gl.bfloat16, [BM, 64], LX)
    else:
        block = reinterpret(xs.index(xi), gl.bfloat16, [128 // BM, BM, 64], LX).index(HALF)
    return block


@gluon.jit
def _consume_unit(
    y_ptr, desc, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows, first_n,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    NK: gl.constexpr = K // 128
    BM: gl.constexpr = desc.block_shape[0]
    LX: gl.constexpr = desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    acc = gl.zeros((128, BM), gl.float32, MMA)
    flying = gl.zeros((128, 16 if BM == 128 else 32), gl.bfloat16, A)
    before = (
        xi + 0
    )  # the slot of x that is still read; with xi itself the front end does not carry it from round to round
    mbarrier.wait(w_full.index(wi), wp)
    w0, w1 = _words(ws, wi, 0)
    LW: gl.constexpr = w0.type.layout
    scale = _scales(ss, wi, LW)
    for k in range(NK):
        a, b, c = _operands(scale, FORMAT)
        mbarrier.wait(x_full.index(xi), xp)
        block = _block(xs, xi, 0, BM, LX)
        acc, flying = _multiply(acc, flying, w0, a, b, c, block, 0, FORMAT, A)
        w2, w3 = _words(ws, wi, 1)
        acc, flying = _multiply(acc, flying, w1, a, b, c, block, 1, FORMAT, A)
        thread_barrier()  # all words have been read, and the slot of x before
        mbarrier.arrive(w_empty.index(wi), count=1)
        mbarrier.arrive(x_empty.index(before), count=1, pred=k > 0)
        wi, wp = _next(wi, wp, WS)
        before = xi
        if BM == 128:
            xi, xp = _next(xi, xp, XS)
            mbarrier.wait(x_full.index(xi), xp)
        block = _block(xs, xi, 1, BM, LX)
        acc, flying = _multiply(acc, flying, w2, a, b, c, block, 0, FORMAT, A)
        if BM == 128:
            thread_barrier()
            mbarrier.arrive(x_empty.index(before), count=1)
            before = xi
        acc, flying = _multiply(acc, flying, w3, a, b, c, block, 1, FORMAT, A)
        mbarrier.wait(w_full.index(wi), wp, pred=k + 1 < NK)
        w0, w1 = _words(ws, wi, 0)  # after the last round not used
        scale = _scales(ss, wi, LW)
        xi, xp = _next(xi, xp, XS)
    acc, flying = warpgroup_mma_wait(0, deps=(acc, flying))
    thread_barrier()
    mbarrier.arrive(x_empty.index(before), count=1)
    # a warp stores what it has: 16 n, 32 bytes of a row
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, 4], [1, 0])
    out = gl.convert_layout(gl.permute((acc * 2.0 ** fast_exponent()).to(gl.bfloat16), (1, 0)), OUT)
    offs_m = gl.arange(0, BM, gl.SliceLayout(1, OUT))
    offs_n = gl.arange(0, 128, gl.SliceLayout(0, OUT))
    y_ptrs = y_ptr + row.to(gl.int64) * N + first_n
    gl.store(y_ptrs + offs_m[:, None] * N + offs_n[None, :], out, mask=(offs_m < rows)[:, None])
    return xi, xp, wi, wp


@gluon.jit
def _uniform(v):
    """The same value, known to the assembler to be that of the whole warp: it then uses uniform registers."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [v], gl.int32, True, 1)


@gluon.jit
def _consumer(
    y_ptr, x128, x64, x32, x16, xs, ws, ss, infos, x_full, x_empty, w_full, w_empty, info_full,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    field = gl.arange(0, 4, L)
    zero = gl.program_id(0) * 0
    xi, xp, wi, wp, i = zero, zero, zero, zero, zero
    rows = zero + 1
    while rows > 0:
        mbarrier.wait(info_full.index(i % INFOS), i // INFOS & 1)
        info = infos.index(i % INFOS).load(L)
        row = _uniform(gl.sum(gl.where(field == 0, info, 0), 0))
        rows = _uniform(gl.sum(gl.where(field == 1, info, 0), 0))
        first_n = _uniform(gl.sum(gl.where(field == 2, info, 0), 0)) * 128
        i += 1
        if rows > 64:
            xi, xp, wi, wp = _consume_unit(
                y_ptr, x128, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows, first_n,
                N, K, FORMAT, XS, WS,
            )  # fmt: skip
        elif rows > 32:
            xi, xp, wi, wp = _consume_unit(
                y_ptr, x64, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows, first_n,
                N, K, FORMAT, XS, WS,
            )  # fmt: skip
        elif rows > 16:
            xi, xp, wi, wp = _consume_unit(
                y_ptr, x32, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows, first_n,
                N, K, FORMAT, XS, WS,
            )  # fmt: skip
        elif rows > 0:
            xi, xp, wi, wp = _consume_unit(
                y_ptr, x16, xs, ws, ss, x_full, x_empty, w_full, w_empty, xi, xp, wi, wp, row, rows, first_n,
                N, K, FORMAT, XS, WS,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["E", "MAX_TILES"])
def hopper_kernel(
    y_ptr, x128, x64, x32, x16, w_desc, s_desc, schedule_ptr, E, MAX_TILES,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, XS: gl.constexpr, WS: gl.constexpr, INFOS: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(gl.bfloat16, [XS, 128, 64], x128.layout)
    ws = gl.allocate_shared_memory(gl.int32, [WS, 8, 16, 16], w_desc.layout)
    ss = gl.allocate_shared_memory(gl.int32, [WS, 16, 8], s_desc.layout)
    infos = gl.allocate_shared_memory(gl.int32, [INFOS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    x_full = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    info_full = gl.allocate_shared_memory(gl.int64, [INFOS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(XS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    for i in gl.static_range(WS):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=1)
    for i in gl.static_range(INFOS):
        mbarrier.init(info_full.index(i), count=1)
    fence_async_shared()
    tiles_ptr = schedule_ptr + 4 + E + 1
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    y_ptr, x128, x64, x32, x16, xs, ws, ss, infos, x_full, x_empty, w_full, w_empty, info_full,
                    N, K, FORMAT, XS, WS, INFOS,
                ),
            ),
            (
                _producer,
                (
                    x128, x64, x32, x16, w_desc, s_desc, schedule_ptr, tiles_ptr, MAX_TILES, xs, ws, ss, infos, x_full,
                    x_empty, w_full, w_empty, info_full, N, K, XS, WS, INFOS,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


def arguments(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int) -> tuple[object, ...]:
    """The kernel's arguments before its constants."""

    def of(t: torch.Tensor, shape: list[int], strides: list[int], block: list[int], swizzle: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(swizzle, 8 * t.element_size(), len(block))
        return TensorDescriptor(t, shape, strides, block, layout)

    panels = E * w.N // 16
    return (
        y,
        *(of(x, list(x.shape), list(x.stride()), [rows, 64], 128) for rows in (128, 64, 32, 16)),
        of(w.w.view(torch.int32), [panels, w.K // 8, 16], [2 * w.K, 16, 1], [8, 16, 16], 64),
        of(w.s, [panels * w.K // 64, 8], [8, 1], [16, 8], 32),
        schedule,
        E,
        max_tiles(x.shape[0], E),
    )


def constants(w: Operand) -> dict[str, object]:
    return {"N": w.N, "K": w.K, "FORMAT": w.format, "XS": X_SLOTS, "WS": W_SLOTS, "INFOS": INFOS}


def launch(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int, processors: int) -> None:
    """y: [S, N]; x: [S, K]; schedule: of `schedule.py`, fresh: the counters in it are used up."""
    hopper_kernel[(2 * processors,)](*arguments(y, x, w, schedule, E), **constants(w), num_warps=4, maxnreg=REGISTERS)
