"""A kernel that does nothing but read, to measure what reading alone can reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["readers"]


@triton.jit
def read_kernel(sum_ptr, x_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """sum[program] = sum of BLOCKS blocks of 32-bit words; a thread loads 16 bytes at a time, all of them in flight."""
    program = tl.program_id(0)
    offs = program.to(tl.int64) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(BLOCKS):  # pyright: ignore[reportGeneralTypeIssues]
        acc += tl.load(x_ptr + offs + i * BLOCK)
    tl.store(sum_ptr + program, tl.sum(acc, 0))


def readers(source: torch.Tensor) -> list[Callable[[], object]]:
    """Calls that read all of source, a uint8 buffer of a multiple of 512 KiB."""
    words = source.view(torch.int32)
    found = []
    launch: Any = read_kernel
    for block, blocks, warps in ((2048, 4, 4), (4096, 8, 8), (8192, 4, 8), (8192, 16, 16)):
        programs = words.numel() // (block * blocks)
        sums = torch.empty(programs, dtype=torch.int32, device=source.device)
        options = {"BLOCK": block, "BLOCKS": blocks, "num_warps": warps}
        found.append(functools.partial(launch[(programs,)], sums, words, **options))
    return found
