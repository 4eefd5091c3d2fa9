"""Few rows per expert: y[r] = x[r] @ dequantize(w)[expert(r)].T, bound by reading the weights of the active experts.

Program (i, j) computes block i of N for block j of rows: at most BLOCK_M / PARTS rows of one expert. It finds its
expert and its rows from the counts itself. Where N alone does not fill the machine, PARTS parts of K are computed side
by side in one tile (`tile.py`), whose columns would be empty otherwise, and added in a fixed order. Row blocks come
last to zero the rows past the sum of the counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import DecodeConfig
from .dequant import round_to
from .launcher import Launch, Launcher
from .operand import Operand
from .tile import accumulate, sum_parts

__all__ = ["bind", "decode_kernel", "launch"]


@triton.jit
def _rows(counts_ptr, S, E, WIDE_SUM: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows of each expert: [BLOCK_E]; negative counts count as 0, and none is above S. WIDE_SUM: 64 bits."""
    offs_e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + offs_e, mask=offs_e < E, other=0)
    rows = tl.minimum(tl.maximum(counts, 0), S)
    if WIDE_SUM:
        rows = rows.to(tl.int64)
    else:
        rows = rows.to(tl.int32)
    return rows


@triton.jit
def _most(counts, S):
    """Rows of the largest expert; rows past S do not count."""
    sums = tl.cumsum(counts, 0)
    return tl.max(tl.minimum(sums, S) - tl.minimum(sums - counts, S), 0)


@triton.jit
def _find(counts, slot, S, ROWS: tl.constexpr):
    """The expert of row block `slot`, its first row, and where the expert's rows end; the number of experts or an empty
    range if there is no such block."""
    offs_e = tl.arange(0, counts.shape[0])
    blocks = (counts + (ROWS - 1)) // ROWS
    before = tl.cumsum(blocks, 0) <= slot
    expert = tl.sum(before.to(tl.int32), 0)
    start = tl.sum(tl.where(before, counts, 0), 0)
    stop = tl.minimum(start + tl.sum(tl.where(offs_e == expert, counts, 0), 0), S).to(tl.int32)
    row = tl.minimum(start + (slot - tl.sum(tl.where(before, blocks, 0), 0)) * ROWS, S).to(tl.int32)
    return expert, row, stop


@triton.jit
def _block(
    y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, counts, slot, first_n, S, E, N, K,
    stride_xm, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr, PATH: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Outputs first_n .. of row block `slot`: BLOCK_N / PARTS of them for BLOCK_M / PARTS rows."""
    expert, row, stop = _find(counts, slot, S, BLOCK_M // PARTS)
    if (expert < E) & (row < stop):
        e, r = expert.to(tl.int64), row.to(tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        acc = accumulate(
            acc, x_ptr + r * stride_xm, w_ptr + e * stride_we, s_ptr + e * stride_se, z_ptr + e * stride_se,
            stop - row, stride_xm, first_n, 0, tl.cdiv(K, PARTS * BLOCK_K) * BLOCK_K, N, K,
            stride_wn, stride_wk, stride_sn, stride_sg,
            FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, True, EVEN_K, BLOCK_K, STAGES, PATH, UNROLL, PARTS, HALVES,
        )  # fmt: skip
        y = tl.trans(round_to(sum_parts(acc, PARTS), y_ptr.dtype.element_ty, PATH))
        offs_m, offs_n = tl.arange(0, y.shape[0]), first_n + tl.arange(0, y.shape[1])
        y_ptrs = y_ptr + r * N + offs_m[:, None] * N + offs_n[None, :]
        tl.store(y_ptrs, y, mask=(offs_m < stop - row)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["S", "E", "LIMIT"])
def decode_kernel(
    y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, counts_ptr,
    S, E, N, K, LIMIT, stride_xm, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr, CONDITION: tl.constexpr, WIDE_SUM: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr, PATH: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """CONDITION: 0 decode; 1 only if no expert has more than LIMIT rows; 2 if one has, do as a prefill does."""
    if LAYOUT != "strided":
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32))
    block_n, slot = tl.program_id(0), tl.program_id(1)
    counts = _rows(counts_ptr, S, E, WIDE_SUM, BLOCK_E)
    decode = True
    if CONDITION > 0:
        decode = _most(counts, S) <= LIMIT
    ROWS: tl.constexpr = BLOCK_N // PARTS
    if slot == tl.num_programs(1) - 1:
        if decode or CONDITION == 2:
            offs_m, offs_n = tl.arange(0, 16), block_n * ROWS + tl.arange(0, ROWS)
            zeros = tl.zeros((16, ROWS), y_ptr.dtype.element_ty)
            for first in range(tl.minimum(tl.sum(counts, 0), S).to(tl.int32), S, 16):
                y_ptrs = y_ptr + tl.cast(first, tl.int64) * N + offs_m[:, None] * N + offs_n[None, :]
                tl.store(y_ptrs, zeros, mask=(offs_m < S - first)[:, None] & (offs_n < N)[None, :])
    elif decode:
        _block(
            y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, counts, slot, block_n * ROWS, S, E, N, K,
            stride_xm, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
            FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, UNROLL, PATH,
            PARTS, HALVES,
        )  # fmt: skip
    elif CONDITION == 2 and block_n % PARTS == 0:  # a program computes as many outputs as PARTS do otherwise
        _block(
            y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, counts, slot, block_n * ROWS, S, E, N, K,
            stride_xm, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
            FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, UNROLL, PATH,
            1, HALVES,
        )  # fmt: skip


def _up(a: int, b: int) -> int:
    return -(-a // b)


_LAUNCH = Launcher(decode_kernel, "decode")


def bind(
    y: torch.Tensor, x: torch.Tensor, w: Operand, counts: torch.Tensor, config: DecodeConfig, limit: int,
    condition: int, path: str,
) -> Launch:  # fmt: skip
    """`launch` for tensors that differ from these in values alone: of y, x, w.w, w.s, w.z and counts."""
    s, experts, stride = x.shape[0], counts.shape[0], x.stride(0)
    wide, parts = s * experts >= 2**31, config.parts
    constants: dict[str, object] = {
        "FORMAT": w.format, "LAYOUT": w.layout, "SCALE": w.scale, "GROUP": w.group, "SCALE_ROWS": w.scale_rows,
        "EVEN_K": w.K % (parts * config.block_k) == 0, "CONDITION": condition, "WIDE_SUM": wide,
        "BLOCK_E": triton.next_power_of_2(experts), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "STAGES": config.stages, "UNROLL": config.unroll, "PATH": path, "PARTS": parts,
        "HALVES": config.halves,
    }  # fmt: skip
    blocks = min(s, experts + s // (config.block_m // parts))  # of rows, at most
    return _LAUNCH.bind(
        (w.facts, x.dtype, y.dtype, counts.dtype, stride, config, path, condition, experts, wide),
        y.device,
        (_up(w.N, config.block_n // parts), blocks + 1, 1),
        (s, experts, w.N, w.K, limit, stride, *w.strides),
        constants,
        config.warps,
        f"{w.format} (N={w.N}, K={w.K})",
    )


def launch(
    y: torch.Tensor, x: torch.Tensor, w: Operand, counts: torch.Tensor, config: DecodeConfig, limit: int,
    condition: int, path: str,
) -> None:  # fmt: skip
    """y: [S, N]; x: [S, K], permuted if w is public; counts: [E]; int32 or int64.

    limit, condition: 0 decode; 1 only if no expert has more than limit rows; 2 if one has, do as a prefill does.
    """
    bind(y, x, w, counts, config, limit, condition, path)(y, x, w.w, w.s, w.z, counts)
