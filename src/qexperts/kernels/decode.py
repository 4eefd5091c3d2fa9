"""Few rows per expert: y[r] = x[r] @ dequantize(w)[expert(r)].T, bound by reading the weights of the active experts.

Program (i, j, part) computes block i of N for the j-th active expert over one part of K, all rows of that expert,
BLOCK_M at a time. It finds its expert and its rows from the counts itself. With one part it writes the result; with
several, fp32 sums that `reduce_kernel` adds in a fixed order. Rows past the sum of the counts become 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import DecodeConfig
from .dequant import round_to
from .operand import Operand
from .tile import accumulate

__all__ = ["decode_kernel", "launch", "launch_reduce", "reduce_kernel"]


@triton.jit
def _offsets(counts_ptr, S, E, BLOCK_E: tl.constexpr):
    """First and end row of each expert: [BLOCK_E]; negative counts count as 0, nothing passes S."""
    offs_e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + offs_e, mask=offs_e < E, other=0)
    counts = tl.minimum(tl.maximum(counts, 0), S).to(tl.int64)
    sums = tl.cumsum(counts, 0)
    return tl.minimum(sums - counts, S).to(tl.int32), tl.minimum(sums, S).to(tl.int32)


@triton.jit
def _wanted(starts, ends, LIMIT, CONDITION: tl.constexpr):
    """CONDITION: 0 always; 1 if every expert has at most LIMIT rows; 2 if not."""
    if CONDITION == 0:
        wanted = True
    elif CONDITION == 1:
        wanted = tl.max(ends - starts, 0) <= LIMIT
    else:
        wanted = tl.max(ends - starts, 0) > LIMIT
    return wanted


@triton.jit(do_not_specialize=["S", "E", "LIMIT", "k_part"])
def decode_kernel(
    y_ptr, part_ptr, x_ptr, w_ptr, s_ptr, z_ptr, counts_ptr,
    S, E, N, K, k_part, LIMIT, stride_xm, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, CONDITION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PATH: tl.constexpr, AFTER: tl.constexpr = False,
):  # fmt: skip
    if LAYOUT != "strided":
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32))
    block_n, slot, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m, offs_n = tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < N)[:, None]
    starts, ends = _offsets(counts_ptr, S, E, BLOCK_E)
    offs_e = tl.arange(0, BLOCK_E)
    rank = tl.cumsum((ends > starts).to(tl.int32), 0)
    expert = tl.sum((rank <= slot).to(tl.int32), 0)  # the one whose rank is slot + 1
    if _wanted(starts, ends, LIMIT, CONDITION):
        if expert < E:
            row = tl.sum(tl.where(offs_e == expert, starts, 0), 0)
            stop = tl.sum(tl.where(offs_e == expert, ends, 0), 0)
            e = expert.to(tl.int64)
            k_start = part * k_part
            k_stop = tl.minimum(k_start + k_part, tl.cdiv(K, BLOCK_K) * BLOCK_K)
            for first in range(row, stop, BLOCK_M):
                r = first.to(tl.int64)
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                acc = accumulate(
                    acc, x_ptr + r * stride_xm, w_ptr + e * stride_we, s_ptr + e * stride_se, z_ptr + e * stride_se,
                    stop - first, stride_xm, block_n * BLOCK_N, k_start, k_stop, N, K,
                    stride_wn, stride_wk, stride_sn, stride_sg,
                    FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, AFTER, True, LAYOUT == "public", EVEN_K, BLOCK_K,
                    STAGES, PATH,
                )  # fmt: skip
                offs_y = r * N + offs_m[None, :] * N + offs_n[:, None]
                mask = (offs_m < stop - first)[None, :] & mask_n
                if SPLIT:
                    tl.store(part_ptr + part.to(tl.int64) * S * N + offs_y, acc, mask=mask)
                else:
                    tl.store(y_ptr + offs_y, round_to(acc, y_ptr.dtype.element_ty, PATH), mask=mask)
        if not SPLIT and slot == 0:
            zeros = tl.zeros((BLOCK_N, BLOCK_M), y_ptr.dtype.element_ty)
            for first in range(tl.max(ends, 0), S, BLOCK_M):
                offs_y = first.to(tl.int64) * N + offs_m[None, :] * N + offs_n[:, None]
                tl.store(y_ptr + offs_y, zeros, mask=(offs_m < S - first)[None, :] & mask_n)


@triton.jit(do_not_specialize=["S", "E", "LIMIT"])
def reduce_kernel(
    y_ptr, part_ptr, counts_ptr, S, E, N, LIMIT, PARTS: tl.constexpr, CONDITION: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """y[r, n] = sum of the parts, in order."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    starts, ends = _offsets(counts_ptr, S, E, BLOCK_E)
    if _wanted(starts, ends, LIMIT, CONDITION):
        mask = (offs_n < N) & (row < tl.max(ends, 0))
        acc = tl.zeros((BLOCK_N,), tl.float32)
        for part in tl.static_range(PARTS):
            acc += tl.load(part_ptr + (part * S + row) * N + offs_n, mask=mask, other=0.0)
        tl.store(y_ptr + row * N + offs_n, round_to(acc, y_ptr.dtype.element_ty, PATH), mask=offs_n < N)


def launch(
    y: torch.Tensor, part: torch.Tensor | None, x: torch.Tensor, w: Operand, counts: torch.Tensor, config: DecodeConfig,
    limit: int, condition: int, path: str,
) -> None:  # fmt: skip
    """y: [S, N]; part: [parts, S, N] fp32, or None for one part; x: [S, K]; counts: [E]; int32 or int64.

    limit, condition: run only if every expert has at most limit rows (condition 1), or only if not (2); 0 always.
    """
    s, experts = x.shape[0], counts.shape[0]
    parts = 1 if part is None else part.shape[0]
    k_blocks = triton.cdiv(w.K, config.block_k)
    decode_kernel[(triton.cdiv(w.N, config.block_n), min(s, experts), parts)](
        y, y if part is None else part, x, w.w, w.s, w.z, counts, s, experts, w.N, w.K,
        triton.cdiv(k_blocks, parts) * config.block_k, limit, x.stride(0), *w.strides,
        FORMAT=w.format, LAYOUT=w.layout, SCALE=w.scale, GROUP=w.group, SCALE_ROWS=w.scale_rows,
        EVEN_K=w.K % config.block_k == 0, SPLIT=parts > 1, CONDITION=condition,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, STAGES=config.stages, PATH=path, num_warps=config.warps,
    )  # fmt: skip


def launch_reduce(
    y: torch.Tensor, part: torch.Tensor, counts: torch.Tensor, limit: int, condition: int, path: str
) -> None:
    """y: [S, N] from part: [parts, S, N]; the rest as `launch`."""
    s, n = y.shape
    reduce_kernel[(s, triton.cdiv(n, 512))](
        y, part, counts, s, counts.shape[0], n, limit, PARTS=part.shape[0], CONDITION=condition,
        BLOCK_E=triton.next_power_of_2(counts.shape[0]), BLOCK_N=512, PATH=path,
    )  # fmt: skip
