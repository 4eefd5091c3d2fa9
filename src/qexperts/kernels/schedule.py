"""Offsets and the tile schedule of a prefill, on the device: one small kernel, no host sync.

Program e writes expert e's first row and its tiles, program E the number of tiles and the padding; together they zero
the rows of the result past the sum of the counts. A tile is at most 128 rows of one expert. What remains of an expert
after tiles of 128 is covered by tiles of 16, 32, 64 or 128 rows, split into two of them where that saves padding. In
`prefill.py` a tile costs about its class, but no less than one of 32 rows, since its weights are dequantized all the
same; in `hopper_prefill.py` those of 16 and 32 rows cost 0.6 of one of 128 and those of 64 rows 0.7: nothing is split.

    16-row units that remain   1     2     3     4     5        6        7     8
    classes, split             16    32    64    64    64, 16   64, 32   128   128
    classes, not split         16    32    64    64    128      128      128   128

Everything is in one int32 buffer: the number of tiles, three counters of `prefill.py` (0), expert_offsets [E+1],
tile_expert, tile_row and tile_rows [max_tiles]. Experts come in descending order of their rows, each with its tiles in
descending classes: tiles that are computed at about the same time share weights in the cache, large experts are bound
by arithmetic and small ones by memory (`prefill.py` takes both ends at once).
Index glossary: u 16-row units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..plan import max_tiles
from .launcher import Launch, Launcher

__all__ = ["bind", "launch", "size"]


@triton.jit
def _classes(n, SPLIT: tl.constexpr):
    """Tiles of 128, 64, 32 and 16 rows for n rows of one expert; SPLIT: what remains may be two tiles."""
    u = (n % 128 + 15) // 16
    LAST: tl.constexpr = 6 if SPLIT else 4
    n128 = n // 128 + (u > LAST).to(tl.int32)
    n64 = ((u >= 3) & (u <= LAST)).to(tl.int32)
    n32 = ((u == 2) | ((u == 6) & SPLIT)).to(tl.int32)
    n16 = ((u == 1) | ((u == 5) & SPLIT)).to(tl.int32)
    return n128, n64, n32, n16


@triton.jit
def _put(tiles_ptr, MAX_TILES, tile, expert, row, rows, mask):
    tl.store(tiles_ptr + tile, expert, mask=mask)
    tl.store(tiles_ptr + MAX_TILES + tile, row, mask=mask)
    tl.store(tiles_ptr + 2 * MAX_TILES + tile, rows, mask=mask)


@triton.jit
def _put_tiles(tiles_ptr, MAX_TILES, first, expert, start, n, SPLIT: tl.constexpr):
    """The tiles of one expert, from tile `first` on."""
    n128, n64, n32, n16 = _classes(n, SPLIT)
    for i in range(0, n128, 128):
        j = i + tl.arange(0, 128)
        _put(tiles_ptr, MAX_TILES, first + j, expert, start + 128 * j, tl.minimum(n - 128 * j, 128), j < n128)
    first += n128
    row = start + n // 128 * 128
    left = n % 128
    _put(tiles_ptr, MAX_TILES, first, expert, row, tl.minimum(left, 64), n64 > 0)
    _put(tiles_ptr, MAX_TILES, first + n64, expert, row + 64 * n64, left - 64 * n64, n32 + n16 > 0)


@triton.jit(do_not_specialize=["S", "E", "LIMIT", "MAX_TILES"])
def schedule_kernel(
    schedule_ptr, y_ptr, counts_ptr, S, E, N, LIMIT, MAX_TILES, CONDITION: tl.constexpr, BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    offsets_ptr = schedule_ptr + 4
    tiles_ptr = offsets_ptr + E + 1
    program = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + offs_e, mask=offs_e < E, other=0)
    counts = tl.minimum(tl.maximum(counts, 0), S).to(tl.int64)
    sums = tl.cumsum(counts, 0)
    ends = tl.minimum(sums, S).to(tl.int32)
    starts = tl.minimum(sums - counts, S).to(tl.int32)
    rows = ends - starts
    n128, n64, n32, n16 = _classes(rows, SPLIT)
    tiles = n128 + n64 + n32 + n16
    end = tl.max(ends, 0)
    wanted = end >= 0
    if CONDITION == 2:
        wanted = tl.max(rows, 0) > LIMIT
    if program < E:
        mine = offs_e == program
        start = tl.sum(tl.where(mine, starts, 0), 0)
        n = tl.sum(tl.where(mine, rows, 0), 0)
        before = (rows > n) | ((rows == n) & (offs_e < program))
        tl.store(offsets_ptr + program, start)
        _put_tiles(tiles_ptr, MAX_TILES, tl.sum(tl.where(before, tiles, 0), 0), program, start, n, SPLIT)
    else:
        total = tl.sum(tiles, 0)
        number = total
        if CONDITION == 2:
            number = tl.where(wanted, total, 0)
        tl.store(schedule_ptr, number)
        for i in range(1, 4):
            tl.store(schedule_ptr + i, 0)  # the counters of `prefill.py`
        tl.store(offsets_ptr + E, end)
        for i in range(total, MAX_TILES, 1024):
            t = i + tl.arange(0, 1024)
            _put(tiles_ptr, MAX_TILES, t, -1, -1, -1, t < MAX_TILES)
    if wanted:
        for r in range(end + program, S, E + 1):
            for i in range(0, N, 1024):
                offs_n = i + tl.arange(0, 1024)
                y_ptrs = y_ptr + tl.cast(r, tl.int64) * N + offs_n
                tl.store(y_ptrs, tl.zeros((1024,), y_ptr.dtype.element_ty), mask=offs_n < N)


def size(total_tokens: int, num_experts: int) -> int:
    """int32 elements of the buffer."""
    return 4 + num_experts + 1 + 3 * max_tiles(total_tokens, num_experts)


_LAUNCH = Launcher(schedule_kernel, "schedule")


def bind(y: torch.Tensor, counts: torch.Tensor, limit: int = 0, condition: int = 0, split: bool = True) -> Launch:
    """`launch` for tensors that differ from these in values alone: of a schedule, y and counts."""
    (s, n), experts = y.shape, counts.shape[0]
    return _LAUNCH.bind(
        (y.dtype, counts.dtype, n, experts, condition, split),
        y.device,
        (experts + 1, 1, 1),
        (s, experts, n, limit, max_tiles(s, experts)),
        {"CONDITION": condition, "BLOCK_E": triton.next_power_of_2(experts), "SPLIT": split},
        4,
        f"{experts} experts (N={n})",
    )


def launch(
    schedule: torch.Tensor,
    y: torch.Tensor,
    counts: torch.Tensor,
    limit: int = 0,
    condition: int = 0,
    split: bool = True,
) -> None:
    """schedule: [size]; int32. y: [S, N], the result. counts: [E]; int32 or int64.

    limit, condition: with condition 2, no tiles and nothing zeroed if no expert has more than limit rows.
    """
    bind(y, counts, limit, condition, split)(schedule, y, counts)
