"""Grouped GEMM over a tile schedule on sm_90: y[r] = x[r] @ dequantize(w)[expert(r)].T

As `prefill.py`, with what Triton does not offer: the copy engine brings the rows of x (no instructions, no registers),
words of the weights go from global memory straight into the registers that want them, matrix instructions of one step
of 32 k run while the next is dequantized, and a unit of work begins to load before the one before it is stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .dequant import _fast, _fast_operands, fast_exponent
from .gluon_compat import reinterpret, tma_load

__all__ = ["hopper_kernel"]

# rep, warp, rh, lh, q, J: the words of a thread in a block of 128 rows and 64 k
W = gl.constexpr(
    gl.BlockedLayout([1, 1, 1, 1, 1, 2], [1, 1, 1, 8, 4, 1], [1, 4, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0])
)
WJ = gl.constexpr(gl.SliceLayout(5, W.value))
R = gl.constexpr(gl.SliceLayout(4, WJ.value))
T1 = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _claim(schedule_ptr, back):
    """Asks for a unit; what comes back lies in one thread, and nobody waits for it before `_claimed`."""
    thread = gl.arange(0, 128, T1)
    ptrs = (schedule_ptr + 2).to(gl.pointer_type(gl.int64)) + thread * 0
    step = gl.where(back == 1, gl.full((128,), 1, gl.int64, T1) << 32, gl.full((128,), 1, gl.int64, T1))
    return gl.atomic_add(ptrs, step, mask=thread == 0, sem="relaxed")


@gluon.jit
def _claimed(ticket, back, units):
    """The unit of `_claim`, or -1."""
    thread = gl.arange(0, 128, T1)
    f = (ticket & 0x7FFFFFFF).to(gl.int32)
    b = (ticket >> 32).to(gl.int32)
    unit = gl.where(f + b < units, gl.where(back == 1, units - 1 - b, f), -1)
    return gl.max(gl.where(thread == 0, unit, -1), 0)


@gluon.jit
def _unit(tiles_ptr, unit, MAX_TILES, N: gl.constexpr):
    """Expert, row, rows and first n of a unit."""
    tile = gl.maximum(unit, 0) // (N // 128)
    e = gl.load(tiles_ptr + tile)
    row = gl.load(tiles_ptr + MAX_TILES + tile)
    rows = gl.load(tiles_ptr + 2 * MAX_TILES + tile)
    return e, row, rows, gl.maximum(unit, 0) % (N // 128) * 128


@gluon.jit
def _rows():
    rep = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, R))))[:, None, None, None]
    warp = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, R))))[None, :, None, None]
    rh = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, R))))[None, None, :, None]
    lh = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, R))))[None, None, None, :]
    return rep, warp, rh, lh


@gluon.jit
def _offs_r():
    """[2, 4, 2, 8]"""
    rep, warp, rh, lh = _rows()
    return rep * 64 + warp * 16 + rh * 8 + lh


@gluon.jit
def _offs_w(K: gl.constexpr):
    """[2, 4, 2, 8, 4, 2] words"""
    rep, warp, rh, lh = _rows()
    q = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WJ)))))
    j = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, W))))))
    offs_w = gl.expand_dims(gl.expand_dims(rep * (8 * K) + warp * (2 * K) + rh * 128 + lh * 16, 4), 5)
    return offs_w + q[None, None, None, None, :, None] * 2 + j[None, None, None, None, None, :]


@gluon.jit
def _operands4(s, FORMAT: gl.constexpr):
    """Scales [2, 4, 2, 8] -> operands of the dequantization."""
    ASM: gl.constexpr = _fast_operands(FORMAT)
    a, b, c = gl.inline_asm_elementwise(ASM, "=r,=r,=r,r,r", [s, s], (gl.int32, gl.int32, gl.int32), True, 1)
    return a, b, c


@gluon.jit
def _dequant(w, a, b, c, FORMAT: gl.constexpr, A: gl.constexpr):
    """Words of 32 k [2, 4, 2, 8, 4] -> the left operand [128, 32]."""
    ASM: gl.constexpr = _fast(FORMAT)
    o0, o1, o2, o3, o4, o5, o6, o7 = gl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
        [w, gl.expand_dims(a, 4), gl.expand_dims(b, 4), gl.expand_dims(c, 4)],
        (gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16), True, 1,
    )  # fmt: skip
    t = gl.join(gl.join(gl.join(o0, o4), gl.join(o2, o6)), gl.join(gl.join(o1, o5), gl.join(o3, o7)))
    t = gl.permute(t, (0, 1, 2, 3, 5, 6, 4, 7))  # rows, then q, s, h, p -> s, h, q, p
    t = gl.reshape(t.to(gl.bfloat16, bitcast=True), (128, 32))
    return gl.convert_layout(t, A, assert_trivial=True)


@gluon.jit
def _x(xs, slot, HALF: gl.constexpr, QUARTER: gl.constexpr, BM: gl.constexpr, LX: gl.constexpr):
    """32 k of a slot as the right operand: [32, BM]."""
    return reinterpret(xs.index(2 * slot + HALF), gl.bfloat16, [BM, 64], LX).slice(32 * QUARTER, 32, 1).permute((1, 0))


@gluon.jit
def _load_x(desc, row, k, xs, bars, slot, pred):
    BM: gl.constexpr = desc.block_shape[0]
    LX: gl.constexpr = desc.layout
    mbarrier.expect(bars.index(slot), BM * 256, pred=pred)
    tma_load(desc, [row, k * 128], bars.index(slot), reinterpret(xs.index(2 * slot), gl.bfloat16, [BM, 64], LX), pred=pred)
    tma_load(desc, [row, k * 128 + 64], bars.index(slot), reinterpret(xs.index(2 * slot + 1), gl.bfloat16, [BM, 64], LX), pred=pred)


@gluon.jit
def _add(slot, i, SLOTS: gl.constexpr):
    at = slot + i
    return gl.where(at >= SLOTS, at - SLOTS, at)


@gluon.jit
def _start(x128, x64, x32, x16, row, rows, xs, bars, slot, FIRST: gl.constexpr, LAST: gl.constexpr, SLOTS: gl.constexpr):
    """Begins to load blocks FIRST .. LAST - 1 of a unit; rows: 0 for none."""
    if rows > 64:
        for i in gl.static_range(FIRST, LAST):
            _load_x(x128, row, i, xs, bars, _add(slot, i, SLOTS), True)
    elif rows > 32:
        for i in gl.static_range(FIRST, LAST):
            _load_x(x64, row, i, xs, bars, _add(slot, i, SLOTS), True)
    elif rows > 16:
        for i in gl.static_range(FIRST, LAST):
            _load_x(x32, row, i, xs, bars, _add(slot, i, SLOTS), True)
    elif rows > 0:
        for i in gl.static_range(FIRST, LAST):
            _load_x(x16, row, i, xs, bars, _add(slot, i, SLOTS), True)


@gluon.jit
def _prefetch(w, s, N: gl.constexpr, K: gl.constexpr):
    """Weights [128, K] of the next unit into the second-level cache."""
    thread = gl.arange(0, 128, T1)
    for i in gl.static_range(K // 256):
        at = (w + (thread + 128 * i) * 32).to(gl.int64)
        gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], gl.int32, False, 1)
    if K // 128 * 4 <= 128:
        at = (s + gl.minimum(thread // 4, K // 128 - 1) * N + thread % 4 * 32).to(gl.int64)
        gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], gl.int32, False, 1)


@gluon.jit
def _tile(
    y_ptr, desc, x128, x64, x32, x16, w, s, next_w, next_s, xs, bars, slot, phase, w0, w1, scale,
    row, rows, first_n, next_row, next_rows,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SLOTS: gl.constexpr, PREFETCH: gl.constexpr,
):  # fmt: skip
    NK: gl.constexpr = K // 128
    BM: gl.constexpr = desc.block_shape[0]
    LX: gl.constexpr = desc.layout
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    offs_w, offs_r = _offs_w(K), _offs_r()
    if PREFETCH:
        _prefetch(next_w, next_s, N, K)
    acc = gl.zeros((128, BM), gl.float32, MMA)
    flying = gl.zeros((128, 32), gl.bfloat16, A)  # the operand of the step before, which may still be read
    for k in range(NK):
        more = k + 1 < NK
        ahead_w = gl.where(more, w + (k + 1) * 256, next_w)
        ahead_s = gl.where(more, s + (k + 1) * N, next_s)
        a, b, c = _operands4(scale, FORMAT)
        scale = gl.load(ahead_s + offs_r)
        first, second = gl.split(w0)
        operand = _dequant(first, a, b, c, FORMAT, A)
        mbarrier.wait(bars.index(slot), phase)
        acc = warpgroup_mma(operand, _x(xs, slot, 0, 0, BM, LX), acc, is_async=True)
        acc, flying = warpgroup_mma_wait(1, deps=(acc, flying))
        flying = operand
        _load_x(desc, row, k + SLOTS - 1, xs, bars, _add(slot, SLOTS - 1, SLOTS), (k > 0) & (k + SLOTS - 1 < NK))
        operand = _dequant(second, a, b, c, FORMAT, A)
        w0 = gl.load(ahead_w + offs_w)
        acc = warpgroup_mma(operand, _x(xs, slot, 0, 1, BM, LX), acc, is_async=True)
        acc, flying = warpgroup_mma_wait(1, deps=(acc, flying))
        flying = operand
        first, second = gl.split(w1)
        operand = _dequant(first, a, b, c, FORMAT, A)
        acc = warpgroup_mma(operand, _x(xs, slot, 1, 0, BM, LX), acc, is_async=True)
        acc, flying = warpgroup_mma_wait(1, deps=(acc, flying))
        flying = operand
        operand = _dequant(second, a, b, c, FORMAT, A)
        w1 = gl.load(ahead_w + offs_w + 8)
        acc = warpgroup_mma(operand, _x(xs, slot, 1, 1, BM, LX), acc, is_async=True)
        acc, flying = warpgroup_mma_wait(1, deps=(acc, flying))
        flying = operand
        phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
        slot = _add(slot, 1, SLOTS)
    acc, flying = warpgroup_mma_wait(0, deps=(acc, flying))
    _start(x128, x64, x32, x16, next_row, next_rows, xs, bars, slot, 0, SLOTS - 1, SLOTS)
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    LY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, 128], gl.bfloat16)
    out = (acc * 2.0 ** fast_exponent()).to(gl.bfloat16)
    ys = reinterpret(xs, gl.bfloat16, [SLOTS, 128, 128], LY).index(_add(slot, SLOTS - 1, SLOTS)).slice(0, BM, 0)
    ys.store(gl.permute(out, (1, 0)))
    out = ys.load(OUT)
    offs_m = gl.arange(0, BM, gl.SliceLayout(1, OUT))
    offs_n = gl.arange(0, 128, gl.SliceLayout(0, OUT))
    y_ptrs = y_ptr + row.to(gl.int64) * N + first_n
    gl.store(y_ptrs + offs_m[:, None] * N + offs_n[None, :], out, mask=(offs_m < rows)[:, None])
    fence_async_shared()
    _start(x128, x64, x32, x16, next_row, next_rows, xs, bars, slot, SLOTS - 1, SLOTS, SLOTS)
    return slot, phase, w0, w1, scale


@gluon.jit(do_not_specialize=["E", "MAX_TILES"])
def hopper_kernel(
    y_ptr, x128, x64, x32, x16, w_ptr, s_ptr, schedule_ptr, E, MAX_TILES,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SLOTS: gl.constexpr, PREFETCH: gl.constexpr, ENDS: gl.constexpr,
):  # fmt: skip
    EN: gl.constexpr = N * K // 8
    ES: gl.constexpr = N * K // 128
    tiles_ptr = schedule_ptr + 4 + E + 1
    xs = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, 128, 64], x128.layout)
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    units = gl.load(schedule_ptr) * (N // 128)
    back = (gl.program_id(0) >= gl.num_programs(0) // 2).to(gl.int32) * (ENDS - 1)
    unit = _claimed(_claim(schedule_ptr, back), back, units)
    following = _claimed(_claim(schedule_ptr, back), back, units)
    offs_w, offs_r = _offs_w(K), _offs_r()
    e, row, rows, first_n = _unit(tiles_ptr, unit, MAX_TILES, N)
    e = gl.maximum(e, 0).to(gl.int64)
    w, s = w_ptr + (e * EN + first_n * (K // 8)), s_ptr + (e * ES + first_n)
    w0, w1, scale = gl.load(w + offs_w), gl.load(w + offs_w + 8), gl.load(s + offs_r)
    slot = unit * 0
    phase = unit * 0
    _start(x128, x64, x32, x16, row, gl.where(unit >= 0, rows, 0), xs, bars, slot, 0, SLOTS, SLOTS)
    while unit >= 0:
        ticket = _claim(schedule_ptr, back)
        next_e, next_row, next_rows, next_n = _unit(tiles_ptr, following, MAX_TILES, N)
        next_rows = gl.where(following >= 0, next_rows, 0)
        next_e = gl.maximum(next_e, 0).to(gl.int64)
        next_w, next_s = w_ptr + (next_e * EN + next_n * (K // 8)), s_ptr + (next_e * ES + next_n)
        if rows > 64:
            slot, phase, w0, w1, scale = _tile(
                y_ptr, x128, x128, x64, x32, x16, w, s, next_w, next_s, xs, bars, slot, phase, w0, w1, scale,
                row, rows, first_n, next_row, next_rows, N, K, FORMAT, SLOTS, PREFETCH,
            )
        elif rows > 32:
            slot, phase, w0, w1, scale = _tile(
                y_ptr, x64, x128, x64, x32, x16, w, s, next_w, next_s, xs, bars, slot, phase, w0, w1, scale,
                row, rows, first_n, next_row, next_rows, N, K, FORMAT, SLOTS, PREFETCH,
            )
        elif rows > 16:
            slot, phase, w0, w1, scale = _tile(
                y_ptr, x32, x128, x64, x32, x16, w, s, next_w, next_s, xs, bars, slot, phase, w0, w1, scale,
                row, rows, first_n, next_row, next_rows, N, K, FORMAT, SLOTS, PREFETCH,
            )
        else:
            slot, phase, w0, w1, scale = _tile(
                y_ptr, x16, x128, x64, x32, x16, w, s, next_w, next_s, xs, bars, slot, phase, w0, w1, scale,
                row, rows, first_n, next_row, next_rows, N, K, FORMAT, SLOTS, PREFETCH,
            )
        unit = following
        following = _claimed(ticket, back, units)
        w, s, row, rows, first_n = next_w, next_s, next_row, next_rows, next_n
