"""Grouped GEMM over a tile schedule: y[r] = x[r] @ dequantize(w)[expert(r)].T

A program takes units of work, a tile of the schedule times a block of N, until none is left. A tile is at most 128
rows of one expert and is computed in the smallest of the classes 16, 32, 64, 128 that holds its rows; the blocks of N
of a tile are consecutive units, so that they share its rows of x in the cache. Reads the weights of active experts
once a tile; rows of y past the sum of the counts are zeroed by `schedule.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..plan import max_tiles
from .config import PrefillConfig
from .dequant import round_to
from .launcher import Launch, Launcher
from .operand import Operand
from .tile import accumulate

__all__ = ["bind", "launch", "prefill_kernel"]


@triton.jit
def _claim(schedule_ptr, back, units):
    """The next unit of work from the front (largest experts) or from the back (smallest), or -1 when all are taken.

    Large experts are bound by the tensor cores, small ones by reading weights: half of the programs start at either
    end, so that both are at work at any time.
    """
    ticket = tl.atomic_add(schedule_ptr + 1, 1, sem="relaxed")
    i = tl.atomic_add(schedule_ptr + 2 + back, 1, mask=ticket < units, sem="relaxed")
    return tl.where(ticket < units, tl.where(back == 1, units - 1 - i, i), -1)


@triton.jit
def _store(y_ptr, acc, row, rows, first_n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PATH: tl.constexpr):
    """acc: [BLOCK_N, BLOCK_M]."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + row.to(tl.int64) * N + offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_m < rows)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptrs, round_to(tl.trans(acc), y_ptr.dtype.element_ty, PATH), mask=mask)


@triton.jit
def _tile(
    y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, row, rows, first_n, N, K, stride_xm, stride_wn, stride_wk, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PATH: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = accumulate(
        acc, x_ptr + row.to(tl.int64) * stride_xm, w_ptr, s_ptr, z_ptr, rows, stride_xm, first_n,
        0, tl.cdiv(K, BLOCK_K) * BLOCK_K, N, K, stride_wn, stride_wk, stride_sn, stride_sg,
        FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, False, EVEN_K, BLOCK_K, STAGES, PATH, 1, 1, True,
    )  # fmt: skip
    _store(y_ptr, acc, row, rows, first_n, N, BLOCK_M, BLOCK_N, PATH)


@triton.jit(do_not_specialize=["E", "MAX_TILES"])
def prefill_kernel(
    y_ptr, x_ptr, w_ptr, s_ptr, z_ptr, schedule_ptr, E, N, K, MAX_TILES,
    stride_xm, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
    FORMAT: tl.constexpr, LAYOUT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    tile_expert_ptr = schedule_ptr + 4 + E + 1
    tile_row_ptr = tile_expert_ptr + MAX_TILES
    tile_rows_ptr = tile_row_ptr + MAX_TILES
    if LAYOUT != "strided":
        w_ptr = w_ptr.to(tl.pointer_type(tl.int32))
    blocks_n = tl.cdiv(N, BLOCK_N)
    units = tl.load(schedule_ptr) * blocks_n
    back = (tl.program_id(0) >= tl.num_programs(0) // 2).to(tl.int32)
    unit = _claim(schedule_ptr, back, units)
    while unit >= 0:
        following = _claim(schedule_ptr, back, units)  # ahead, so that the atomics' latency is hidden
        tile, first_n = unit // blocks_n, unit % blocks_n * BLOCK_N
        expert = tl.load(tile_expert_ptr + tile)
        row = tl.load(tile_row_ptr + tile)
        rows = tl.load(tile_rows_ptr + tile)
        e = expert.to(tl.int64)
        w, s, z = w_ptr + e * stride_we, s_ptr + e * stride_se, z_ptr + e * stride_se
        if rows > 64:
            _tile(
                y_ptr, x_ptr, w, s, z, row, rows, first_n, N, K, stride_xm, stride_wn, stride_wk, stride_sn, stride_sg,
                FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, EVEN_K, 128, BLOCK_N, BLOCK_K, STAGES, PATH,
            )  # fmt: skip
        elif rows > 32:
            _tile(
                y_ptr, x_ptr, w, s, z, row, rows, first_n, N, K, stride_xm, stride_wn, stride_wk, stride_sn, stride_sg,
                FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, EVEN_K, 64, BLOCK_N, BLOCK_K, STAGES, PATH,
            )  # fmt: skip
        elif rows > 16:
            _tile(
                y_ptr, x_ptr, w, s, z, row, rows, first_n, N, K, stride_xm, stride_wn, stride_wk, stride_sn, stride_sg,
                FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, EVEN_K, 32, BLOCK_N, BLOCK_K, STAGES, PATH,
            )  # fmt: skip
        else:
            _tile(
                y_ptr, x_ptr, w, s, z, row, rows, first_n, N, K, stride_xm, stride_wn, stride_wk, stride_sn, stride_sg,
                FORMAT, LAYOUT, SCALE, GROUP, SCALE_ROWS, EVEN_K, 16, BLOCK_N, BLOCK_K, STAGES, PATH,
            )  # fmt: skip
        unit = following


_LAUNCH = Launcher(prefill_kernel, "prefill")


def bind(
    y: torch.Tensor, x: torch.Tensor, w: Operand, E: int, config: PrefillConfig, programs: int, path: str
) -> Launch:
    """`launch` for tensors that differ from these in values alone: of y, x, w.w, w.s, w.z and a schedule."""
    tiles, stride = max_tiles(x.shape[0], E), x.stride(0)
    constants: dict[str, object] = {
        "FORMAT": w.format, "LAYOUT": w.layout, "SCALE": w.scale, "GROUP": w.group, "SCALE_ROWS": w.scale_rows,
        "EVEN_K": w.K % config.block_k == 0, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "STAGES": config.stages, "PATH": path,
    }  # fmt: skip
    return _LAUNCH.bind(
        (w.facts, x.dtype, y.dtype, stride, config, path),
        y.device,
        (min(programs, tiles * -(-w.N // config.block_n)), 1, 1),
        (E, w.N, w.K, tiles, stride, *w.strides),
        constants,
        config.warps,
        f"{w.format} (N={w.N}, K={w.K})",
    )


def launch(
    y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int, config: PrefillConfig, programs: int,
    path: str,
) -> None:  # fmt: skip
    """y: [S, N]; x: [S, K], permuted if w is public; schedule: of `schedule.py`."""
    bind(y, x, w, E, config, programs, path)(y, x, w.w, w.s, w.z, schedule)
