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
from .launcher import Launch, Launcher
from .operand import Operand
from .tile import accumulate

__all__ = ["bind", "bind_reduce", "decode_kernel", "launch", "launch_reduce", "reduce_kernel"]


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
def _wanted(rows, S, LIMIT, CONDITION: tl.constexpr):
    """CONDITION: 0 always; 1 if every expert has at most LIMIT rows; 2 if not. Rows past S do not count."""
    if CONDITION == 0:
        wanted = True
    else:
        sums = tl.cumsum(rows, 0)
        most = tl.max(tl.minimum(sums, S) - tl.minimum(sums - rows, S), 0)
        if CONDITION == 1:
            wanted = most <= LIMIT
        else:
            wanted = most > LIMIT
    return wanted


@triton.jit(do_not_specialize=["S", "E", "LIMIT", "PART_BLOCKS"])
def decode_kernel(
    y_ptr, part_ptr, x_ptr, w_ptr, s_ptr, z_ptr, counts_ptr,
    S, E, N, K, PART_BLOCKS, LIMIT, stride_xm, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    GATHER_X: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr, CONDITION: tl.constexpr, WIDE_SUM: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PATH: tl.constexpr,
):  # fmt: skip
    if LAYOUT != "strided":
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32))
    block_n, slot, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m, offs_n = tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < N)[:, None]
    offs_e = tl.arange(0, BLOCK_E)
    counts = _rows(counts_ptr, S, E, WIDE_SUM, BLOCK_E)
    if _wanted(counts, S, LIMIT, CONDITION):
        rank = tl.cumsum((counts > 0).to(tl.int32), 0)
        expert = tl.sum((rank <= slot).to(tl.int32), 0)  # the one whose rank is slot + 1
        if expert < E:
            start = tl.sum(tl.where(offs_e < expert, counts, 0), 0)
            stop = tl.minimum(start + tl.sum(tl.where(offs_e == expert, counts, 0), 0), S).to(tl.int32)
            row = tl.minimum(start, S).to(tl.int32)
            e = expert.to(tl.int64)
            # multiplied by BLOCK_K last: the compiler must see the multiple of 16 to copy 16 bytes at once
            k_start = part * PART_BLOCKS * BLOCK_K
            k_stop = tl.minimum((part + 1) * PART_BLOCKS, tl.cdiv(K, BLOCK_K)) * BLOCK_K
            for first in range(row, stop, BLOCK_M):
                r = tl.cast(first, tl.int64)
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                acc = accumulate(
                    acc, x_ptr + r * stride_xm, w_ptr + e * stride_we, s_ptr + e * stride_se, z_ptr + e * stride_se,
                    stop - first, stride_xm, block_n * BLOCK_N, k_start, k_stop, N, K,
                    stride_wn, stride_wk, stride_sn, stride_sg,
                    FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, True, GATHER_X, EVEN_K, BLOCK_K,
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
            for first in range(tl.minimum(tl.sum(counts, 0), S).to(tl.int32), S, BLOCK_M):
                offs_y = tl.cast(first, tl.int64) * N + offs_m[None, :] * N + offs_n[:, None]
                tl.store(y_ptr + offs_y, zeros, mask=(offs_m < S - first)[None, :] & mask_n)


@triton.jit(do_not_specialize=["S", "E", "LIMIT"])
def reduce_kernel(
    y_ptr, part_ptr, counts_ptr, S, E, N, LIMIT, PARTS: tl.constexpr, CONDITION: tl.constexpr,
    WIDE_SUM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """y[r, n] = sum of the parts, in order."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    counts = _rows(counts_ptr, S, E, WIDE_SUM, BLOCK_E)
    if _wanted(counts, S, LIMIT, CONDITION):
        mask = offs_n < tl.where(row < tl.sum(counts, 0), N, 0)
        acc = tl.zeros((BLOCK_N,), tl.float32)
        for part in tl.static_range(PARTS):
            acc += tl.load(part_ptr + (part * S + row) * N + offs_n, mask=mask, other=0.0)
        tl.store(y_ptr + row * N + offs_n, round_to(acc, y_ptr.dtype.element_ty, PATH), mask=offs_n < N)


def _up(a: int, b: int) -> int:
    return -(-a // b)


_LAUNCH = Launcher(decode_kernel, "decode")
_REDUCE = Launcher(reduce_kernel, "reduce")


def bind(
    y: torch.Tensor, x: torch.Tensor, w: Operand, counts: torch.Tensor, config: DecodeConfig, parts: int,
    limit: int, condition: int, path: str, gather: bool = True,
) -> Launch:  # fmt: skip
    """`launch` for tensors that differ from these in values alone: of y, the parts (y for one), x, w.w, w.s, w.z and
    counts."""
    s, experts, stride = x.shape[0], counts.shape[0], x.stride(0)
    gather, wide = gather and w.layout == "public", s * experts >= 2**31
    constants: dict[str, object] = {
        "FORMAT": w.format, "LAYOUT": w.layout, "SCALE": w.scale, "GROUP": w.group, "SCALE_ROWS": w.scale_rows,
        "GATHER_X": gather, "EVEN_K": w.K % config.block_k == 0, "SPLIT": parts > 1, "CONDITION": condition,
        "WIDE_SUM": wide, "BLOCK_E": triton.next_power_of_2(experts), "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "STAGES": config.stages, "PATH": path,
    }  # fmt: skip
    return _LAUNCH.bind(
        (w.facts, x.dtype, y.dtype, counts.dtype, stride, config, path, gather, parts > 1, condition, experts, wide),
        y.device,
        (_up(w.N, config.block_n), min(s, experts), parts),
        (s, experts, w.N, w.K, _up(_up(w.K, config.block_k), parts), limit, stride, *w.strides),
        constants,
        config.warps,
        f"{w.format} (N={w.N}, K={w.K})",
    )


def launch(
    y: torch.Tensor, part: torch.Tensor | None, x: torch.Tensor, w: Operand, counts: torch.Tensor, config: DecodeConfig,
    limit: int, condition: int, path: str, gather: bool = True,
) -> None:  # fmt: skip
    """y: [S, N]; part: [parts, S, N] fp32, or None for one part; x: [S, K]; counts: [E]; int32 or int64.

    gather: for public weights, take the columns of x as the codes lie; if not, x has been permuted.

    limit, condition: run only if every expert has at most limit rows (condition 1), or only if not (2); 0 always.
    """
    parts = 1 if part is None else part.shape[0]
    bound = bind(y, x, w, counts, config, parts, limit, condition, path, gather)
    bound(y, y if part is None else part, x, w.w, w.s, w.z, counts)


def bind_reduce(y: torch.Tensor, counts: torch.Tensor, parts: int, limit: int, condition: int, path: str) -> Launch:
    """`launch_reduce` for tensors that differ from these in values alone: of y, the parts and counts."""
    (s, n), experts = y.shape, counts.shape[0]
    wide = s * experts >= 2**31
    constants: dict[str, object] = {
        "PARTS": parts, "CONDITION": condition, "WIDE_SUM": wide, "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_N": 512, "PATH": path,
    }  # fmt: skip
    return _REDUCE.bind(
        (y.dtype, counts.dtype, n, experts, parts, condition, wide, path),
        y.device,
        (s, _up(n, 512), 1),
        (s, experts, n, limit),
        constants,
        4,
        f"{parts} parts (N={n})",
    )


def launch_reduce(
    y: torch.Tensor, part: torch.Tensor, counts: torch.Tensor, limit: int, condition: int, path: str
) -> None:
    """y: [S, N] from part: [parts, S, N]; the rest as `launch`."""
    bind_reduce(y, counts, part.shape[0], limit, condition, path)(y, part, counts)
