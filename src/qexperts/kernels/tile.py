"""One output tile: acc[n, m] += dequantize(w)[n, k] * x[m, k] over a range of k.

The weights stand on the left, so that on NVIDIA they go from registers into the matrix instruction and never through
shared memory, and the number of rows (the width of the right operand) may be any multiple of 8.

Layouts of the weights, Kw = 32-bit words of a row of K codes, J = words of a lane in a block of 64 k:

    public    row n at n * stride_wn; block b of 64 k at 4 J b; lane q at J q; columns of x permuted by `slot_to_k`
    tiles     rows 16 i .. 16 i + 15 at 16 Kw i; in it block b at 64 J b; in it row n % 16 at 4 J (n % 16), lane q at
              J q; scales and zeros as words, see `layouts.py`
    tiles128  the same in pairs of blocks: pair c at 128 J c, in it row n % 16 at 8 J (n % 16), in it block b % 2 at
              4 J (b % 2)
    strided   elements at n * stride_wn + k * stride_wk (8-bit codes, bf16 and fp16 weights)

PARTS > 1 computes that many parts of K side by side, where an output tile has few rows of x: with R = BLOCK_N / PARTS
and T = BLOCK_M / PARTS, row p R + n of the tile is row n of the weight in part p, column p T + m is row m of x in part
p, and what counts are the PARTS blocks on the diagonal; `sum_parts` adds them.

On NVIDIA the matrix instructions of a block run on into the next round. Triton 3.6 lets them do so even while the next
left operand is written over theirs, unless the assembler puts a wait behind each. A use of the sums in each round ends
them there, and the assembler then lets those of a block follow each other without waits (prefill 5-15% faster).

Glossary: B blocks of 64 k in BLOCK_K, q lane of a fragment, J words of a lane in a block, s step of 16 k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequant import (
    code_bits,
    code_value,
    dequant_words,
    fast_exponent,
    fast_operands,
    fast_words,
    is_asym,
    round_to,
    scale_operand,
    zero_operand,
)

__all__ = ["accumulate", "sum_parts"]


@triton.constexpr_function
def _tile_blocks(layout: str) -> int:
    """Blocks of 64 k that stand together; 0 if the weight is not tiled."""
    return {"tiles": 1, "tiles128": 2}.get(layout, 0)


@triton.jit
def _word_offset(k, FORMAT: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where column k, a multiple of BLOCK_K, of the first row of a packed weight begins, in words."""
    J: tl.constexpr = code_bits(FORMAT) // 2
    if _tile_blocks(LAYOUT) == 2 and BLOCK_K == 64:
        offs = k // 128 * (128 * J) + k // 64 % 2 * (4 * J)
    elif _tile_blocks(LAYOUT) > 0:
        offs = k // 64 * (64 * J)
    else:
        offs = k // 64 * (4 * J)
    return offs


@triton.jit
def _group(k, GROUP: tl.constexpr):
    """The group of a row that k belongs to. GROUP: 0 for one group a row."""
    if GROUP == 0:
        g = k * 0
    else:
        g = k // GROUP
    return g


@triton.jit
def _step_groups(k, s, K, FORMAT: tl.constexpr, PUBLIC: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Group of step s of each word, where a block of weights has several: [1, B, 1 or 4, 1 or J]."""
    STEPS: tl.constexpr = 8 // code_bits(FORMAT)  # in a word
    k += 64 * tl.arange(0, BLOCK_K // 64)[None, :, None, None]
    if GROUP < 64:
        if PUBLIC:  # lane q has 16 consecutive k
            k += 16 * tl.arange(0, 4)[None, None, :, None]
        else:
            if STEPS < 4:
                k += (16 * STEPS) * tl.arange(0, 4 // STEPS)[None, None, None, :]
            k += 16 * s
    return tl.minimum(k, K - 1) // GROUP  # a tail of K is not a whole block


@triton.jit
def _operands(
    s_ptr, z_ptr, offs, FORMAT: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr,
    PATH: tl.constexpr,
):  # fmt: skip
    """Scale and zero operands at offsets of any shape."""
    ASYM: tl.constexpr = is_asym(FORMAT)
    word = tl.load(s_ptr + offs)
    if not TILES or tl.float32 == SCALE:
        s = scale_operand(word, DTYPE, PATH)
        z = s
        if ASYM:
            z = zero_operand(tl.load(z_ptr + offs), FORMAT, DTYPE, PATH)
    else:  # low half the scale; high half the zero, or the scale again
        if PATH != "ptx" or SCALE != DTYPE:
            s = scale_operand((word & 0xFFFF).to(tl.int16).to(SCALE, bitcast=True), DTYPE, PATH)
        elif ASYM:
            s = (word & 0xFFFF) | (word << 16)
        else:
            s = word
        z = s
        if ASYM:
            z = zero_operand((word >> 16).to(tl.int16).to(SCALE, bitcast=True), FORMAT, DTYPE, PATH)
    return s, z


@triton.jit
def _step_operands(
    s_ptr, z_ptr, rows, k, K, stride_sg, FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr,
    GROUP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """Scale and zero operands of the steps in a word, where a block of weights has several groups."""
    TILES: tl.constexpr = _tile_blocks(LAYOUT) > 0
    BITS: tl.constexpr = code_bits(FORMAT)
    rows = rows[:, None, None, None]
    offs = rows + _step_groups(k, 0, K, FORMAT, not TILES, GROUP, BLOCK_K) * stride_sg
    s0, z0 = _operands(s_ptr, z_ptr, offs, FORMAT, TILES, SCALE, DTYPE, PATH)
    s1, s2, s3, z1, z2, z3 = s0, s0, s0, z0, z0, z0
    if TILES and GROUP == 16 and BITS < 8:
        offs = rows + _step_groups(k, 1, K, FORMAT, False, GROUP, BLOCK_K) * stride_sg
        s1, z1 = _operands(s_ptr, z_ptr, offs, FORMAT, TILES, SCALE, DTYPE, PATH)
    if TILES and GROUP < 64 and BITS == 2:
        offs = rows + _step_groups(k, 2, K, FORMAT, False, GROUP, BLOCK_K) * stride_sg
        s2, z2 = _operands(s_ptr, z_ptr, offs, FORMAT, TILES, SCALE, DTYPE, PATH)
        s3, z3 = s2, z2
        if GROUP == 16:
            offs = rows + _step_groups(k, 3, K, FORMAT, False, GROUP, BLOCK_K) * stride_sg
            s3, z3 = _operands(s_ptr, z_ptr, offs, FORMAT, TILES, SCALE, DTYPE, PATH)
    return s0, s1, s2, s3, z0, z1, z2, z3


@triton.jit
def _weight_offsets(
    offs_n, K, stride_wn, stride_wk, FORMAT: tl.constexpr, LAYOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Offsets of a block of weights at k = 0: [BLOCK_N, BLOCK_K / 64 * 4 J] words, or [BLOCK_N, BLOCK_K] elements."""
    J: tl.constexpr = code_bits(FORMAT) // 2
    if LAYOUT == "strided":
        offs = offs_n[:, None] * stride_wn + tl.arange(0, BLOCK_K)[None, :] * stride_wk
    else:
        offs_w = tl.arange(0, BLOCK_K // 64 * 4 * J)
        Kw = K // 64 * (4 * J) if EVEN_K else K * code_bits(FORMAT) // 32
        if _tile_blocks(LAYOUT) > 0:
            W: tl.constexpr = 4 * J * _tile_blocks(LAYOUT)  # words of a row in a tile
            offs = (offs_n // 16 * (16 * Kw) + offs_n % 16 * W)[:, None]
            offs += (offs_w // W * (16 * W) + offs_w % W)[None, :]
        else:
            offs = (offs_n * stride_wn)[:, None] + offs_w[None, :]
    return offs


@triton.jit
def _load_words(w_ptrs, k, K, FORMAT: tl.constexpr, LAYOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of packed weights: [BLOCK_N, B, 4, J]."""
    J: tl.constexpr = code_bits(FORMAT) // 2
    B: tl.constexpr = BLOCK_K // 64
    w_ptrs += _word_offset(k, FORMAT, LAYOUT, BLOCK_K)
    if _tile_blocks(LAYOUT) > 0 or EVEN_K:
        w = tl.load(w_ptrs)
    else:
        words = k // 64 * (4 * J) + tl.arange(0, B * 4 * J)
        w = tl.load(w_ptrs, mask=(words < K * code_bits(FORMAT) // 32)[None, :], other=0)
    return tl.reshape(w, (w.shape[0], B, 4, J))


@triton.jit
def _load_strided(
    w_ptrs, s_ptr, z_ptr, rows, k, K, stride_wk, stride_sg, FORMAT: tl.constexpr, SCALE: tl.constexpr,
    GROUP: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """A block of unquantized weights or strided 8-bit codes as the matrix operand."""
    offs_k = k + tl.arange(0, BLOCK_K)
    if EVEN_K:
        a = tl.load(w_ptrs + k * stride_wk)
    else:
        a = tl.load(w_ptrs + k * stride_wk, mask=(offs_k < K)[None, :], other=0.0)
    if FORMAT != "bf16" and FORMAT != "fp16":
        word = a.to(tl.uint8, bitcast=True).to(tl.int32)
        offs = rows[:, None] + _group(tl.minimum(offs_k, K - 1), GROUP)[None, :] * stride_sg
        s, z = _operands(s_ptr, z_ptr, offs, FORMAT, False, SCALE, DTYPE, "portable")
        a = round_to(code_value(word, z, 0, FORMAT) * s, DTYPE, PATH)
    return a


@triton.jit
def _dot(a, x, acc, PATH: tl.constexpr):
    """acc + a @ x; fp32. The interpreter multiplies bf16 as if it were integers, so there the operands are widened."""
    if PATH == "interpreter":
        acc = tl.dot(a.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, x, acc)
    return acc


@triton.jit
def _load_x(x_ptr, k, offs_x, mask, width_x, EVEN_K: tl.constexpr, MASK_X: tl.constexpr):
    """Columns k .. of the tile's rows of x: [COLUMNS, BLOCK_M]; mask: [1, BLOCK_M]."""
    if EVEN_K and not MASK_X:
        x = tl.load(x_ptr + k + offs_x)
    elif EVEN_K:
        x = tl.load(x_ptr + k + offs_x, mask=mask, other=0.0)
    else:
        x = tl.load(x_ptr + k + offs_x, mask=mask & (k + tl.arange(0, offs_x.shape[0]) < width_x)[:, None], other=0.0)
    return x


@triton.constexpr_function
def _one_group(layout: str, group: int, block_k: int) -> bool:
    """Whether each row of a block of packed weights has one scale."""
    return layout != "strided" and (group == 0 or group >= block_k)


@triton.constexpr_function
def _is_fast(layout: str, group: int, block_k: int, path: str, dtype: tl.dtype, scale: tl.dtype) -> bool:
    """Whether `fast_words` dequantizes."""
    return _one_group(layout, group, block_k) and path == "ptx" and dtype == scale == tl.bfloat16


@triton.jit
def _offsets(
    first_n, rows_x, N, K, stride_xm, stride_wn, stride_wk, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, MASK_X: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Offsets at k = 0, 32 bits wide (half the registers of pointers): of x [COLUMNS, BLOCK_M] and which of its columns
    are rows of the tile [1, BLOCK_M], of a block of weights, of the scales [BLOCK_N]."""
    row, m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    columns = tl.arange(0, COLUMNS)[:, None]
    if PARTS > 1:
        part, part_m = row // (BLOCK_N // PARTS), m // (BLOCK_M // PARTS)
        row, m = row % (BLOCK_N // PARTS), m % (BLOCK_M // PARTS)
        blocks = K // (PARTS * BLOCK_K)  # times BLOCK_K last: the compiler must see what it is a multiple of
        columns += (part_m * (blocks * BLOCK_K))[None, :]
    offs_n = tl.minimum(first_n + row, N - 1)
    offs_x = columns + (m if MASK_X else tl.minimum(m, rows_x - 1))[None, :] * stride_xm
    offs_s = offs_n // SCALE_ROWS * stride_sn
    offs_w = _weight_offsets(offs_n, K, stride_wn, stride_wk, FORMAT, LAYOUT, EVEN_K, BLOCK_K)
    if PARTS > 1:
        if LAYOUT == "strided":
            offs_w += (part * (blocks * BLOCK_K))[:, None] * stride_wk
        else:
            offs_w += _word_offset(part * (blocks * BLOCK_K), FORMAT, LAYOUT, BLOCK_K)[:, None]
        if GROUP > 0:
            offs_s += part * (blocks * BLOCK_K // GROUP) * stride_sg
    return offs_x, (m < rows_x)[None, :], offs_w, offs_s


@triton.jit
def _dequant(
    w, scale, zero, s_ptr, z_ptr, rows, k, K, stride_sg, FORMAT: tl.constexpr, LAYOUT: tl.constexpr,
    SCALE: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """A block of packed weights as the matrix operand. scale, zero: [BLOCK_N] if each row has one, else not used."""
    if _is_fast(LAYOUT, GROUP, BLOCK_K, PATH, DTYPE, SCALE):
        a, b, c = fast_operands(scale, zero, FORMAT)
        a = fast_words(w, a[:, None, None, None], b[:, None, None, None], c[:, None, None, None], FORMAT)
    else:
        if _one_group(LAYOUT, GROUP, BLOCK_K):
            s0, z0 = scale[:, None, None, None], zero[:, None, None, None]
            s1, s2, s3, z1, z2, z3 = s0, s0, s0, z0, z0, z0
        else:
            s0, s1, s2, s3, z0, z1, z2, z3 = _step_operands(
                s_ptr, z_ptr, rows, k, K, stride_sg, FORMAT, LAYOUT, SCALE, GROUP, DTYPE, BLOCK_K, PATH
            )
        a = dequant_words(w, s0, s1, s2, s3, z0, z1, z2, z3, FORMAT, DTYPE, PATH, SCALE != DTYPE)
    return a


@triton.jit
def _row_operands(
    s_ptr, z_ptr, rows, next_s, next_z, k, k_stop, stride_sg, FORMAT: tl.constexpr, TILES: tl.constexpr,
    SCALE: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr,
    ONE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Scale and zero operands of the block at k and, AHEAD, of the next one; [BLOCK_N], where each row has ONE."""
    s, z = rows, rows  # not used
    if AHEAD:
        s, z = next_s, next_z
        if GROUP > 0:
            offs = rows + _group(tl.minimum(k + BLOCK_K, k_stop - BLOCK_K), GROUP) * stride_sg
            next_s, next_z = _operands(s_ptr, z_ptr, offs, FORMAT, TILES, SCALE, DTYPE, PATH)
    elif ONE:
        s, z = _operands(s_ptr, z_ptr, rows + _group(k, GROUP) * stride_sg, FORMAT, TILES, SCALE, DTYPE, PATH)
    return s, z, next_s, next_z


@triton.jit
def _left_operands(
    w, s, z, s_ptr, z_ptr, rows, k, K, stride_sg, FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr,
    GROUP: tl.constexpr, DTYPE: tl.constexpr, STEP: tl.constexpr, PATH: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """A block of packed weights as one matrix operand or as TWO, of 64 k each."""
    if TWO:
        w, second = tl.split(tl.permute(w, (0, 2, 3, 1)))
        w, second = tl.expand_dims(w, 1), tl.expand_dims(second, 1)
    a = _dequant(w, s, z, s_ptr, z_ptr, rows, k, K, stride_sg, FORMAT, LAYOUT, SCALE, GROUP, DTYPE, STEP, PATH)
    b = a
    if TWO:
        b = _dequant(second, s, z, s_ptr, z_ptr, rows, k, K, stride_sg, FORMAT, LAYOUT, SCALE, GROUP, DTYPE, STEP, PATH)
    return a, b


@triton.jit
def accumulate(
    acc, x_ptr, w_ptr, s_ptr, z_ptr, rows_x, stride_xm, first_n, k_start, k_stop, N, K,
    stride_wn, stride_wk, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    MASK_X: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PATH: tl.constexpr,
    UNROLL: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """acc: [BLOCK_N, BLOCK_M]; f32; of zeros when given.

    Args:
        x_ptr: first row of the tile. w_ptr, s_ptr, z_ptr: the expert's.
        rows_x: rows of the tile; MASK_X: load no others, instead of the last one again.
        first_n: first row of the weight.
        k_start, k_stop: multiples of BLOCK_K (k_stop may pass K; with not EVEN_K what lies beyond is masked).
        SCALE: dtype of the scales. GROUP: 0: one a row. SCALE_ROWS: consecutive n that share a scale.
        PARTS: K / PARTS is a multiple of BLOCK_K, of GROUP and of a tile's k; k_start and k_stop are of a part.
        HALVES: packed blocks of 128 k with one scale a row are multiplied in halves, beside dequantizing the other.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TILES: tl.constexpr = _tile_blocks(LAYOUT) > 0
    ONE: tl.constexpr = _one_group(LAYOUT, GROUP, BLOCK_K)
    AHEAD: tl.constexpr = ONE and (GROUP == 0 or not TILES)  # 2-byte scales are too narrow for asynchronous copies
    TWO: tl.constexpr = HALVES and ONE and BLOCK_K == 128
    STEP: tl.constexpr = BLOCK_K // 2 if TWO else BLOCK_K
    offs_x, mask_m, offs_w, rows = _offsets(
        first_n, rows_x, N, K, stride_xm, stride_wn, stride_wk, stride_sn, stride_sg, FORMAT, LAYOUT, GROUP, SCALE_ROWS,
        MASK_X, EVEN_K, acc.shape[1], acc.shape[0], BLOCK_K, STEP, PARTS,
    )  # fmt: skip
    w_ptrs = w_ptr + offs_w
    width_x = tl.cdiv(K, 64) * 64 if LAYOUT == "public" else K  # x has been permuted and padded
    next_s, next_z = rows, rows  # not used
    if AHEAD:
        first = rows + _group(k_start, GROUP) * stride_sg
        next_s, next_z = _operands(s_ptr, z_ptr, first, FORMAT, TILES, SCALE, DTYPE, PATH)
    for k in tl.range(k_start, k_stop, BLOCK_K, num_stages=STAGES, loop_unroll_factor=UNROLL):
        x = _load_x(x_ptr, k, offs_x, mask_m, width_x, EVEN_K, MASK_X)
        if TWO:
            x_second = _load_x(x_ptr, k + STEP, offs_x, mask_m, width_x, EVEN_K, MASK_X)
        if LAYOUT == "strided":
            a = _load_strided(
                w_ptrs, s_ptr, z_ptr, rows, k, K, stride_wk, stride_sg, FORMAT, SCALE, GROUP, DTYPE, EVEN_K, BLOCK_K,
                PATH,
            )  # fmt: skip
        else:
            w = _load_words(w_ptrs, k, K, FORMAT, LAYOUT, EVEN_K, BLOCK_K)
            s, z, next_s, next_z = _row_operands(
                s_ptr, z_ptr, rows, next_s, next_z, k, k_stop, stride_sg, FORMAT, TILES, SCALE, GROUP, DTYPE, BLOCK_K,
                PATH, ONE, AHEAD,
            )  # fmt: skip
            a, a_second = _left_operands(
                w, s, z, s_ptr, z_ptr, rows, k, K, stride_sg, FORMAT, LAYOUT, SCALE, GROUP, DTYPE, STEP, PATH, TWO
            )
        acc = _dot(a, x, acc, PATH)
        if TWO:
            acc = _dot(a_second, x_second, acc, PATH)
        if PATH == "ptx" and FORMAT != "bf16" and FORMAT != "fp16":
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], tl.float32, True, 1)  # a use of the sums
    if _is_fast(LAYOUT, GROUP, BLOCK_K, PATH, DTYPE, SCALE):
        acc *= 2.0 ** fast_exponent()
    return acc


@triton.jit
def sum_parts(acc, PARTS: tl.constexpr):
    """Sums over the parts of K of what `accumulate` returns: [BLOCK_N / PARTS, BLOCK_M / PARTS]."""
    ROWS: tl.constexpr = acc.shape[0] // PARTS
    COLUMNS: tl.constexpr = acc.shape[1] // PARTS
    if PARTS > 1:
        part = tl.arange(0, PARTS)
        same = part[:, None, None, None] == part[None, None, :, None]
        acc = tl.sum(tl.where(same, tl.reshape(acc, (PARTS, ROWS, PARTS, COLUMNS)), 0.0), 2)
        acc = tl.sum(acc, 0)
    return acc
