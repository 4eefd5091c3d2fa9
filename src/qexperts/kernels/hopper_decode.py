"""Few rows per expert on sm_90: y[r] = x[r] @ dequantize(w)[expert(r)].T, bound by reading the weights.

The work is a list: for every block of at most 8 rows of one expert the panels of its weight, 16 rows x K each. Programs
take equal, consecutive shares of it, which they find from the counts themselves, so that every multiprocessor reads
from the start to the end; of a long list the last eighth is shared by programs that follow where one has ended. The
warps of a program share the K of a panel and add their parts in a fixed order.

A part of x stays in registers, as right operands of m16n8k16. Panels are copied to shared memory, one ahead. A code is
a matrix operand as it is:

    the lowest 8 bits of a bf16 (16 bits of an fp16, as far as its codes reach) count from 0 in steps of 2^-133 (2^-24)

so a field of a word needs a mask and no more. Where it starts above bit 0 of its byte, x is that much smaller instead,
and all of x is 2^64 times too large, to stay away from the end of the range: |x| < 2^63. A group's sum takes the scale,
and the zero point times the sum of x, which the same instructions make of codes that are all 1: fp32 throughout.

No backend launches it yet. On an H100 (torch 2.11, Triton 3.6), 192 experts, 134 of them active with 256 rows, group
size 128, beside `decode.py`, N=3072 and 1536: int2_sym 73.7 and 78.2 us (84.6 and 83.9), int4_sym 121.8 and 123.9
(120.2 and 121.3), int8_sym 230.0 and 231.6 (220.5 and 221.9); 8 active: int2_sym 11.3 and 11.4 (11.4 and 11.4),
int4_sym 14.3 and 14.5 (13.1 and 13.4).

Weights in "tiles" (`tile.py`). Glossary: q, lh lane 4 lh + q of a fragment: row lh and lh + 8 of a panel, columns 2 q
and 2 q + 1; J words of a lane in a block of 64 k; V words of a lane in a row of a tile; unit: k of a tile that share
a scale; s, h: see `dequant.py`. T threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..formats import FORMATS
from ..layouts import tile_k
from .config import HOPPER_DECODE_MAX_K, HopperDecodeConfig
from .dequant import code_bits, is_asym
from .gluon_compat import async_load, thread_barrier
from .launcher import Launch, Launcher
from .operand import Operand

__all__ = ["bind", "hopper_decode_kernel", "launch", "unfit"]


@triton.constexpr_function
def _is_fp8(fmt: str) -> bool:
    return fmt.startswith("fp8")


@triton.constexpr_function
def _offset(fmt: str) -> int:
    """What symmetric codes are stored above zero after a flip of their sign bit."""
    return 0 if is_asym(fmt) or _is_fp8(fmt) else 1 << (code_bits(fmt) - 1)


@triton.constexpr_function
def _above(fmt: str) -> float:
    """How often the sum of x is too much, if zero points count."""
    return 1.0 if is_asym(fmt) else float(_offset(fmt))


@triton.constexpr_function
def _ones(fmt: str) -> int:
    """A word of codes that are 1 above the lowest, as i32."""
    bits = code_bits(fmt)
    word = (1 ^ _offset(fmt)) * (0xFFFFFFFF // ((1 << bits) - 1))
    return word - (1 << 32) * (word >> 31)


@triton.constexpr_function
def _place(fmt: str, bf16: bool, field: int) -> int:
    """The bit of the operand at which field (s, h) of a word is left."""
    return code_bits(fmt) * field % 8 if bf16 and not _is_fp8(fmt) else 0


@triton.constexpr_function
def _exponent(fmt: str, bf16: bool) -> int:
    """Sums are this power of two too small."""
    if bf16:
        return {"fp8_e4m3": 120, "fp8_e5m2": 112}.get(fmt, 133) - 64
    return {"fp8_e4m3": 8, "fp8_e5m2": 0}.get(fmt, 24)


@triton.constexpr_function
def _extract(fmt: str, bf16: bool, field: int, source: str, out: str) -> str:
    """Field (s, h) of a word -> matrix operand."""
    bits = code_bits(fmt)
    if _is_fp8(fmt):
        shift, mask = {"fp8_e4m3": (4, 0x07F0), "fp8_e5m2": (3, 0x0FE0)}[fmt] if bf16 else (1, 0x3F80)
        lines = f"mov.b32 m, {source};" if field else f"shl.b32 m, {source}, 8;"
        if fmt == "fp8_e5m2" and not bf16:
            return lines + f"and.b32 {out}, m, 0xff00ff00;"
        lines += f"and.b32 r, m, 0x80008000; shr.u32 m, m, {shift};"
        return lines + f"lop3.b32 {out}, m, {mask * 0x10001:#x}, r, 0xea;"  # (a & b) | c
    low = _place(fmt, bf16, field)
    mask, flip = ((1 << bits) - 1) << low, _offset(fmt) << low
    return (
        f"shr.u32 m, {source}, {bits * field - low};"
        f"lop3.b32 {out}, m, {mask * 0x10001:#x}, {flip * 0x10001:#x}, 0x6a;"  # (a & b) ^ c
    )


@triton.constexpr_function
def _multiply_asm(fmt: str, bf16: bool, words: int, first: int, steps: int) -> str:
    """c + codes @ x over some steps of 16 k of a tile.

    $0..3 the sums; from $4: words of row lh, of row lh + 8, two registers of x a step, c.
    """
    per = 8 // code_bits(fmt)  # steps in a word
    x, c = 4 + 2 * words, 4 + 2 * words + 2 * steps
    kind = "bf16" if bf16 else "f16"
    chains = 1 if steps < 8 else 2  # an instruction waits for the one before on the same sums
    lines = [".reg .b32 m, r, a<4>; .reg .f32 d<8>;"]
    lines += [f"mov.b32 d{i}, ${c + i};" for i in range(4)] + [f"mov.b32 d{i}, 0;" for i in range(4, 4 * chains)]
    for i in range(steps):
        word, field = 4 + (first + i) // per, (first + i) % per * 2
        for h in range(2):
            lines += [_extract(fmt, bf16, field + h, f"${word + row * words}", f"a{2 * h + row}") for row in range(2)]
        d = "{" + ", ".join(f"d{i % chains * 4 + j}" for j in range(4)) + "}"
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {d}, {{a0, a1, a2, a3}}, "
            f"{{${x + 2 * i}, ${x + 2 * i + 1}}}, {d};"
        )
    lines += [f"add.f32 ${i}, d{i}, d{4 + i};" if chains == 2 else f"mov.b32 ${i}, d{i};" for i in range(4)]
    return "{" + "\n".join(lines) + "}"


@triton.constexpr_function
def _multiply_constraints(words: int, steps: int) -> str:
    return ",".join(["=f"] * 4 + ["r"] * (2 * words + 2 * steps) + ["f"] * 4)


@triton.constexpr_function
def _enlarge_asm(fmt: str, step: int, h: int) -> str:
    """A pair of bf16, smaller as the field is higher, times 2^64."""
    field = (16 * step + 8 * h) // 8 % (16 // code_bits(fmt))
    factor = (127 + 64 - _place(fmt, True, field)) << 7
    lines = f".reg .b32 f, none; mov.b32 f, {factor * 0x10001:#x}; mov.b32 none, 0x80008000;"
    return "{" + lines + "fma.rn.bf16x2 $0, $1, f, none;}"


@triton.constexpr_function
def _log2(n: int) -> int:
    return n.bit_length() - 1


@triton.constexpr_function
def _unit(group: int, tile_k: int) -> int:
    return tile_k if group == 0 or group > tile_k else group


@triton.constexpr_function
def _part_layout(parts: int) -> gl.DistributedLinearLayout:
    """[parts, 128] sums of a panel, the last as (lh, q, row / 8, column % 2): a warp has whole rows of the result."""
    register = [[1 << i, 0] for i in range(_log2(parts))]
    q, warp = [[0, 4], [0, 8]], [[0, 0]] * _log2(parts)
    warp[: len(q)] = q[: len(warp)]
    register += q[len(warp) :]
    return gl.DistributedLinearLayout(register, [[0, 16], [0, 32], [0, 64], [0, 2], [0, 1]], warp, [], [parts, 128])


@triton.constexpr_function
def _words_layout(parts: int, v: int, j: int) -> gl.DistributedLinearLayout:
    """[parts, 64 v] words of a tile, rows of 4 v: those of a lane."""
    register = [[0, 1 << i] for i in range(_log2(j))] + [[0, 4 * j]] * (v > j) + [[0, 32 * v]]
    lane = [[0, j], [0, 2 * j], [0, 4 * v], [0, 8 * v], [0, 16 * v]]
    return gl.DistributedLinearLayout(register, lane, [[1 << i, 0] for i in range(_log2(parts))], [], [parts, 64 * v])


@triton.constexpr_function
def _scales_layout(parts: int) -> gl.DistributedLinearLayout:
    """[parts, row, q]."""
    lane = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warp = [[1 << i, 0, 0] for i in range(_log2(parts))]
    return gl.DistributedLinearLayout([[0, 8, 0]], lane, warp, [], [parts, 16, 4])


@gluon.jit
def _add(a, b, c, d):
    return a + c, b + d


@gluon.jit
def _experts(counts_ptr, S, E, WIDE_SUM: gl.constexpr, BLOCK_E: gl.constexpr, LAYOUT: gl.constexpr):
    """First row of each expert, where its rows end, its blocks of 8 rows, and where these end: [BLOCK_E]; i32.

    Negative counts count as 0; rows at or past S do not count, nor do blocks of experts that begin there. WIDE_SUM:
    sums take 64 bits.
    """
    offs_e = gl.arange(0, BLOCK_E, LAYOUT)
    counts = gl.load(counts_ptr + offs_e, mask=offs_e < E, other=0)
    rows = gl.minimum(gl.maximum(counts, 0), S).to(gl.int64 if WIDE_SUM else gl.int32)
    blocks = (rows + 7) // 8
    stop, end = gl.associative_scan((rows, blocks), 0, _add)
    start = gl.minimum(stop - rows, S).to(gl.int32)
    end = gl.where(start < S, end, 0).to(gl.int32)
    return start, gl.minimum(stop, S).to(gl.int32), blocks.to(gl.int32), end


@gluon.jit
def _find(start, stop, blocks, end, block, LAYOUT: gl.constexpr):
    """The expert of a block of rows, its first row and number of rows."""
    offs_e = gl.arange(0, start.shape[0], LAYOUT)
    here = (end - blocks <= block) & (block < end)
    row = gl.sum(gl.where(here, start + (block - end + blocks) * 8, 0), 0)
    rows = gl.sum(gl.where(here, stop, 0), 0) - row
    return gl.sum(gl.where(here, offs_e, 0), 0), row, gl.minimum(rows, 8)


@gluon.jit
def _share(panels, program, programs):
    """First and last panel of a program, and no more than one apart from the others'."""
    first = program * (panels // programs) + gl.minimum(program, panels % programs)
    return first, first + panels // programs + (program < panels % programs).to(gl.int32)


@gluon.jit
def _copy(
    words, scales, zeros, w_ptrs, s_ptrs, z_ptrs, part, stage, panel, wanted,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, GROUP: gl.constexpr, TILE_K: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """Start to copy a panel; what lies past K, or all that is not wanted, becomes 0.

    Args:
        words: of each tile of a part [2, PARTS, 64 V]; apart, or the compiler puts barriers between the copies.
        scales, zeros: of each unit [2, PARTS, 16]; zeros: none if they are beside the scales.
        part: [PARTS, 1].
    """
    PARTS: gl.constexpr = words[0].shape[1]
    TILE: gl.constexpr = words[0].shape[2]
    UNIT: gl.constexpr = _unit(GROUP, TILE_K)
    UNITS: gl.constexpr = TILE_K // UNIT
    for tile in gl.static_range(TILES):
        mask = wanted
        if PARTS * TILES * TILE_K != K:
            mask = wanted & (part * TILES + tile < K // TILE_K)
        ptrs = w_ptrs + panel * (K // TILE_K * TILE) + tile * TILE
        async_load(words[tile].index(stage), ptrs, mask=mask)
        for unit in gl.static_range(UNITS):
            group = ((part * TILES + tile) * UNITS + unit) * UNIT // (GROUP if GROUP > 0 else K)
            offs = group * N + panel * 16
            async_load(scales[tile * UNITS + unit].index(stage), s_ptrs + offs, mask=mask)
            if len(zeros) > 0:
                async_load(zeros[tile * UNITS + unit].index(stage), z_ptrs + offs, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _load_words(words, J: gl.constexpr, LANES: gl.constexpr):
    """A tile in shared memory [PARTS, 64 V] -> V tensors [T] of row lh, then V of row lh + 8."""
    PARTS: gl.constexpr = words.shape[0]
    V: gl.constexpr = words.shape[1] // 64
    t = gl.reshape(words.load(_words_layout(PARTS, V, J)), (PARTS, 2, 8, V // J, 4, J))
    return _split(gl.reshape(gl.permute(t, (0, 2, 4, 1, 3, 5)), (32 * PARTS, 2 * V)), LANES)


@gluon.jit
def _load_pair(scales, LANES: gl.constexpr):
    """Scales of a unit in shared memory [PARTS, 16] -> [T] of row lh, of row lh + 8."""
    PARTS: gl.constexpr = scales.shape[0]
    L: gl.constexpr = _scales_layout(PARTS)
    t = gl.expand_dims(scales.load(gl.SliceLayout(2, L)), 2)
    t = gl.reshape(gl.broadcast(t, gl.zeros((PARTS, 16, 4), t.dtype, L))[0], (PARTS, 2, 32))
    return _split(gl.reshape(gl.permute(t, (0, 2, 1)), (32 * PARTS, 2)), LANES)


@gluon.jit
def _split(t, LANES: gl.constexpr):
    """[T, n] -> n tensors [T]; n a power of two."""
    parts = (t,)
    for i in gl.static_range(_log2(t.shape[1])):
        halves = ()
        for j in gl.static_range(1 << i):
            half = gl.reshape(parts[j], (t.shape[0], 2, parts[j].shape[1] // 2))
            halves = halves + gl.split(gl.permute(half, (0, 2, 1)))
        parts = halves
    columns = ()
    for j in gl.static_range(t.shape[1]):
        column = gl.reshape(parts[j], (t.shape[0],))
        columns = columns + (gl.convert_layout(column, LANES, assert_trivial=True),)
    return columns


@gluon.jit
def _scale(word, SCALE: gl.constexpr):
    """A loaded scale, or what stands beside it in a word shifted down: f32."""
    if gl.float32 == SCALE:
        v = word.to(gl.float32)
    elif gl.bfloat16 == SCALE:
        v = (word << 16).to(gl.float32, bitcast=True)
    else:
        v = word.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return v


@gluon.jit
def _zero(word, SCALE: gl.constexpr):
    """The zero point in the high half of a word: f32."""
    if gl.bfloat16 == SCALE:
        v = (word & -65536).to(gl.float32, bitcast=True)
    else:
        v = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return v


@gluon.jit
def _multiply(
    words, x, c, FORMAT: gl.constexpr, DTYPE: gl.constexpr, TILE_K: gl.constexpr, FIRST: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    V: gl.constexpr = TILE_K * code_bits(FORMAT) // 128
    ASM: gl.constexpr = _multiply_asm(FORMAT, gl.bfloat16 == DTYPE, V, FIRST, STEPS)
    CONSTRAINTS: gl.constexpr = _multiply_constraints(V, STEPS)
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, words + x + c, (gl.float32, gl.float32, gl.float32, gl.float32), True, 1
    )


@gluon.jit
def _load_x(
    x_ptrs, mask, part, K: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr, TILE_K: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """Right operands of a part: a tuple of two registers for each step of 16 k."""
    x = ()
    for tile in gl.static_range(TILES):
        wanted = mask
        if part.shape[0] // 32 * TILES * TILE_K != K:
            wanted = mask & (part * TILES + tile < K // TILE_K)
        for step in gl.static_range(TILE_K // 16):
            for h in gl.static_range(2):
                pair = gl.load(x_ptrs + (tile * TILE_K + 16 * step + 8 * h) // 2, mask=wanted, other=0)
                if gl.bfloat16 == DTYPE:
                    pair = gl.inline_asm_elementwise(_enlarge_asm(FORMAT, step, h), "=r,r", [pair], gl.int32, True, 1)
                x = x + (pair,)
    return x


@gluon.jit
def _sums(
    x, like, FORMAT: gl.constexpr, DTYPE: gl.constexpr, UNIT: gl.constexpr, TILE_K: gl.constexpr, TILES: gl.constexpr
):
    """-offset times the sums of x over each unit, or -1 times for asymmetric formats: two columns each."""
    STEPS: gl.constexpr = UNIT // 16
    sums = ()
    if not _is_fp8(FORMAT):
        zero = (like * 0).to(gl.float32)
        words = ()
        for _i in gl.static_range(TILE_K * code_bits(FORMAT) // 64):
            words = words + (like * 0 + _ones(FORMAT),)
        for unit in gl.static_range(TILES * TILE_K // UNIT):
            part = x[unit * 2 * STEPS : (unit + 1) * 2 * STEPS]
            a, b, _c, _d = _multiply(
                words, part, (zero, zero, zero, zero), FORMAT, DTYPE, TILE_K, unit % (TILE_K // UNIT) * STEPS, STEPS
            )
            sums = sums + (a * -_above(FORMAT), b * -_above(FORMAT))
    return sums


@gluon.jit
def _start(words, sums, FORMAT: gl.constexpr, SCALE: gl.constexpr):
    """What the zero points add to the sums of a unit. words: its scales of row lh and lh + 8, and zeros if apart."""
    if _is_fp8(FORMAT):
        zero = (words[0] * 0).to(gl.float32)
        c = (zero, zero, zero, zero)
    elif not is_asym(FORMAT):
        c = (sums[0], sums[1], sums[0], sums[1])
    else:
        if gl.float32 == SCALE:
            z0, z1 = words[2].to(gl.float32), words[3].to(gl.float32)
        else:
            z0, z1 = _zero(words[0], SCALE), _zero(words[1], SCALE)
        c = (z0 * sums[0], z0 * sums[1], z1 * sums[0], z1 * sums[1])
    return c


@gluon.jit
def _consume(
    acc, words, scales, zeros, stage, x, sums, FORMAT: gl.constexpr, DTYPE: gl.constexpr, SCALE: gl.constexpr,
    UNIT: gl.constexpr, TILE_K: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """acc + a tile's share of the panel; all arguments are of the tile."""
    STEPS: gl.constexpr = UNIT // 16
    UNITS: gl.constexpr = TILE_K // UNIT
    a0, a1, a2, a3 = acc
    codes = _load_words(words.index(stage), code_bits(FORMAT) // 2, LANES)
    for unit in gl.static_range(UNITS):
        pair = _load_pair(scales[unit].index(stage), LANES)
        if len(zeros) > 0:
            pair = pair + _load_pair(zeros[unit].index(stage), LANES)
        c = _start(pair, sums[2 * unit : 2 * unit + 2], FORMAT, SCALE)
        part = x[unit * 2 * STEPS : (unit + 1) * 2 * STEPS]
        d0, d1, d2, d3 = _multiply(codes, part, c, FORMAT, DTYPE, TILE_K, unit * STEPS, STEPS)
        s0, s1 = _scale(pair[0], SCALE), _scale(pair[1], SCALE)
        a0, a1, a2, a3 = a0 + s0 * d0, a1 + s0 * d1, a2 + s1 * d2, a3 + s1 * d3
    return a0, a1, a2, a3


@gluon.jit
def _add_parts(acc, memory):
    """Sums of the parts, in order: [128] in the layout of `_part_layout`. memory: [T, 4]."""
    PARTS: gl.constexpr = memory.shape[0] // 32
    a0, a1, a2, a3 = acc
    memory.store(gl.reshape(gl.join(gl.join(a0, a2), gl.join(a1, a3)), (32 * PARTS, 4)))
    return gl.sum(memory.reshape((PARTS, 128)).load(_part_layout(PARTS)), 0)


@gluon.jit
def _panels(
    y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, words, scales, zeros, memory, expert, row, rows, first, last, stride_xm,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr,
    TILE_K: gl.constexpr, TILES: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """Panels first .. last - 1 of an expert for at most 8 rows."""
    PARTS: gl.constexpr = words[0].shape[1]
    TILE: gl.constexpr = words[0].shape[2]
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    UNIT: gl.constexpr = _unit(GROUP, TILE_K)
    XS: gl.constexpr = TILE_K // 8
    UNITS: gl.constexpr = TILE_K // UNIT
    SUMS: gl.constexpr = 0 if _is_fp8(FORMAT) else 2 * UNITS
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [PARTS, 1], [1, 0])
    OUT: gl.constexpr = _part_layout(PARTS)
    e = expert.to(gl.int64)
    part = gl.arange(0, PARTS, gl.SliceLayout(1, COPY))[:, None]
    w_ptrs = w_ptr + e * (N * K * code_bits(FORMAT) // 32)
    w_ptrs = w_ptrs + (part * (TILES * TILE) + gl.arange(0, TILE, gl.SliceLayout(0, COPY))[None, :])
    offs_s = e * (N * K // (GROUP if GROUP > 0 else K)) + gl.arange(0, 16, gl.SliceLayout(0, COPY))[None, :]
    s_ptrs, z_ptrs = s_ptr + offs_s, z_ptr + offs_s
    _copy(
        words, scales, zeros, w_ptrs, s_ptrs, z_ptrs, part, 0, first, first < last, N, K, FORMAT, GROUP, TILE_K, TILES
    )
    thread = gl.arange(0, 32 * PARTS, LANES)
    lh, q = thread % 32 // 4, thread % 4
    x_ptrs = x_ptr.to(gl.pointer_type(gl.int32)) + (row + lh).to(gl.int64) * (stride_xm // 2)
    x_ptrs += thread // 32 * (TILES * TILE_K // 2) + q
    x = _load_x(x_ptrs, lh < rows, thread // 32, K, FORMAT, DTYPE, TILE_K, TILES)
    sums = _sums(x, thread, FORMAT, DTYPE, UNIT, TILE_K, TILES)

    place = gl.arange(0, 128, gl.SliceLayout(0, OUT))
    offs_n = place // 16 + place // 2 % 2 * 8
    offs_m = place // 4 % 4 * 2 + place % 2
    y_ptrs = y_ptr + row.to(gl.int64) * N + offs_m * N + offs_n
    zero = (thread * 0).to(gl.float32)
    thread_barrier()  # else the compiler puts one into the loop, between this copy and the first there
    for panel in range(first, last):
        stage = (panel - first) % 2
        _copy(
            words, scales, zeros, w_ptrs, s_ptrs, z_ptrs, part, 1 - stage, panel + 1, panel + 1 < last,
            N, K, FORMAT, GROUP, TILE_K, TILES,
        )  # fmt: skip
        async_copy.wait_group(1)
        acc = (zero, zero, zero, zero)
        for tile in gl.static_range(TILES):
            acc = _consume(
                acc, words[tile], scales[tile * UNITS : (tile + 1) * UNITS], zeros[tile * UNITS : (tile + 1) * UNITS],
                stage, x[tile * XS : (tile + 1) * XS], sums[tile * SUMS : (tile + 1) * SUMS],
                FORMAT, DTYPE, SCALE, UNIT, TILE_K, LANES,
            )  # fmt: skip
        total = _add_parts(acc, memory) * 2.0 ** _exponent(FORMAT, gl.bfloat16 == DTYPE)
        gl.store(y_ptrs + panel * 16, total.to(y_ptr.dtype.element_ty), mask=offs_m < rows)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["S", "E", "LIMIT", "RESIDENT"])
def hopper_decode_kernel(
    y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, counts_ptr, S, E, LIMIT, RESIDENT, stride_xm,
    N: gl.constexpr, K: gl.constexpr, FORMAT: gl.constexpr, SCALE: gl.constexpr, GROUP: gl.constexpr,
    TILE_K: gl.constexpr, CONDITION: gl.constexpr, WIDE_SUM: gl.constexpr, BLOCK_E: gl.constexpr,
    PARTS: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """CONDITION: 0 decode; 1 only if no expert has more than LIMIT rows."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [PARTS], [0])
    EXPERTS: gl.constexpr = gl.BlockedLayout([BLOCK_E // 32], [32], [PARTS], [0])  # every warp has all
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    UNITS: gl.constexpr = TILES * (TILE_K // _unit(GROUP, TILE_K))
    words, scales, zeros = (), (), ()
    for _tile in gl.static_range(TILES):
        words = words + (gl.allocate_shared_memory(gl.int32, [2, PARTS, TILE_K * code_bits(FORMAT) // 2], PLAIN),)
    for _u in gl.static_range(UNITS):
        scales = scales + (gl.allocate_shared_memory(s_ptr.dtype.element_ty, [2, PARTS, 16], PLAIN),)
        if gl.float32 == SCALE and is_asym(FORMAT):
            zeros = zeros + (gl.allocate_shared_memory(z_ptr.dtype.element_ty, [2, PARTS, 16], PLAIN),)
    memory = gl.allocate_shared_memory(gl.float32, [32 * PARTS, 4], PLAIN)
    w_ptr = w_ptr.to(gl.pointer_type(gl.int32))
    start, stop, blocks, ends = _experts(counts_ptr, S, E, WIDE_SUM, BLOCK_E, EXPERTS)
    panels = gl.max(ends, 0) * (N // 16)
    rows = gl.max(stop, 0)
    if CONDITION == 1:
        decode = gl.max(stop - start, 0) <= LIMIT
        panels = gl.where(decode, panels, 0)
        rows = gl.where(decode, rows, S)
    program, programs = gl.program_id(0), gl.num_programs(0)
    late = gl.where(programs > RESIDENT, panels // TAIL, 0)
    if program < RESIDENT:
        first, last = _share(panels - late, program, gl.minimum(programs, RESIDENT))
    else:
        first, last = _share(late, program - RESIDENT, programs - RESIDENT)
        first += panels - late
        last += panels - late
    expert, row, block_rows = _find(start, stop, blocks, ends, first // (N // 16), EXPERTS)
    while first < last:
        block = first // (N // 16)
        end = gl.minimum(last, (block + 1) * (N // 16))
        _panels(
            y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, words, scales, zeros, memory, expert, row, block_rows,
            first - block * (N // 16), end - block * (N // 16), stride_xm, N, K, FORMAT, SCALE, GROUP, TILE_K, TILES,
            LANES,
        )  # fmt: skip
        first = end
        if first < last:  # what was known of the experts would take registers until here
            start, stop, blocks, ends = _experts(counts_ptr, S, E, WIDE_SUM, BLOCK_E, EXPERTS)
            expert, row, block_rows = _find(start, stop, blocks, ends, first // (N // 16), EXPERTS)
    for r in range(rows + program, S, programs):
        for n in range(0, N, 32 * PARTS):
            offs_n = n + gl.arange(0, 32 * PARTS, LANES)
            blank = gl.zeros((32 * PARTS,), y_ptr.dtype.element_ty, LANES)
            gl.store(y_ptr + tl.cast(r, gl.int64) * N + offs_n, blank, mask=offs_n < N)


def unfit(w: Operand) -> str | None:
    """Why the kernel does not run on a weight, or None."""
    if w.layout not in ("tiles", "tiles128"):
        return f"needs prepared weights, these are {w.layout}"
    if w.K > HOPPER_DECODE_MAX_K:
        return f"K is {w.K}; at most {HOPPER_DECODE_MAX_K} fit"
    tile = tile_k(FORMATS[w.format].bits, w.K)
    if w.group and w.group % tile and tile % w.group:
        return f"group size {w.group} neither divides nor is a multiple of {tile}"
    return None


_LAUNCH = Launcher(hopper_decode_kernel, "hopper decode")


def bind(
    y: torch.Tensor, x: torch.Tensor, w: Operand, counts: torch.Tensor, c: HopperDecodeConfig, limit: int = 0,
    condition: int = 0,
) -> Launch:  # fmt: skip
    """`launch` for tensors that differ from these in values alone: of y, x, w.w, w.s, w.z and counts."""
    s, experts, stride = x.shape[0], counts.shape[0], x.stride(0)
    wide, sizes = s * experts >= 2**31, (c.parts, c.tiles, c.registers, c.tail)
    constants: dict[str, object] = {
        "N": w.N, "K": w.K, "FORMAT": w.format, "SCALE": w.scale, "GROUP": w.group,
        "TILE_K": tile_k(FORMATS[w.format].bits, w.K), "CONDITION": condition, "WIDE_SUM": wide,
        "BLOCK_E": max(32, triton.next_power_of_2(experts)), "PARTS": c.parts, "TILES": c.tiles, "TAIL": c.tail,
    }  # fmt: skip
    return _LAUNCH.bind(
        (w.facts, x.dtype, y.dtype, counts.dtype, stride, sizes, condition, experts, wide),
        y.device,
        (c.programs, 1, 1),
        (s, experts, limit, c.resident, stride),
        constants,
        c.parts,
        f"{w.format} (N={w.N}, K={w.K})",
        options={"maxnreg": c.registers},
    )


def launch(
    y: torch.Tensor, x: torch.Tensor, w: Operand, counts: torch.Tensor, c: HopperDecodeConfig, limit: int = 0,
    condition: int = 0,
) -> None:  # fmt: skip
    """y: [S, N]; x: [S, K], of an even stride, at a multiple of 4 bytes; w: that is not `unfit`; counts: [E];
    int32 or int64.

    limit, condition: 0 decode; 1 only if no expert has more than limit rows.
    """
    bind(y, x, w, counts, c, limit, condition)(y, x, w.w, w.s, w.z, counts)
