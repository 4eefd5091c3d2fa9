"""Which rows belong to which expert: offsets, permutations and tile schedules, in plain torch without a host sync.

Glossary: T tokens, S = T * top_k slots, r rows (slots sorted by expert), E experts.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["TileSchedule", "TokenPlan", "check_tokens", "tile_schedule"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPlan:
    """S rows over E experts, on one device.

    Attributes:
        num_tokens_per_expert: [E]; int32; rows of each expert, as they are used (see `from_counts`).
        expert_offsets: [E+1]; int32; first row of each expert, then the end of the last; never above S.
        total_tokens: S. Rows from expert_offsets[E] on belong to no expert; results there are 0.
        row_to_slot, slot_to_row, row_to_token: [S]; int32; permutations `x_to_y[x] = y` if made from expert ids.
    """

    num_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor
    total_tokens: int
    row_to_slot: torch.Tensor | None = None
    slot_to_row: torch.Tensor | None = None
    row_to_token: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.num_tokens_per_expert.shape[0]

    @property
    def device(self) -> torch.device:
        return self.expert_offsets.device

    @classmethod
    def from_counts(cls, num_tokens_per_expert: torch.Tensor, total_tokens: int) -> TokenPlan:
        """Plan for rows that are already sorted by expert.

        Args:
            num_tokens_per_expert: [E]; int32 or int64.
            total_tokens: S, the rows of the activations.
        Raises: ValueError on the CPU if a count is negative or the sum is not S. On other devices nothing is read:
            negative counts count as 0, offsets are clamped to S (see `check_tokens`).

        No host synchronisation; safe in a CUDA graph.
        """
        counts = num_tokens_per_expert
        _check_counts("TokenPlan", counts)
        if total_tokens < 0:
            raise ValueError(f"TokenPlan: total_tokens is {total_tokens}; expected at least 0.")
        if counts.device.type == "cpu":
            _check_sum("TokenPlan", counts, total_tokens)
        ends = counts.clamp(0, total_tokens).cumsum(0, dtype=torch.int64).clamp_(max=total_tokens)
        offsets = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        return cls(offsets.diff(), offsets, total_tokens)

    @classmethod
    def from_expert_ids(cls, expert_ids: torch.Tensor, num_experts: int) -> TokenPlan:
        """Sort the slots of a routing result by expert; slots of one expert keep their order.

        Args:
            expert_ids: [T, top_k]; int32 or int64. Ids outside 0..num_experts-1 (sentinels of expert parallelism)
                are skipped: their slots become the last rows, which belong to no expert.
        Returns: a plan over S = T * top_k rows.

        No host synchronisation; safe in a CUDA graph.
        """
        if expert_ids.ndim != 2 or expert_ids.dtype not in (torch.int32, torch.int64) or expert_ids.shape[1] < 1:
            raise ValueError(
                f"TokenPlan: expert_ids is {tuple(expert_ids.shape)} {expert_ids.dtype}; expected [T, top_k] int32."
            )
        if num_experts < 1:
            raise ValueError(f"TokenPlan: num_experts is {num_experts}; expected at least 1.")
        ids = expert_ids.reshape(-1).long()
        ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        row_to_slot = ids.argsort(stable=True)
        slots = torch.arange(ids.shape[0], device=ids.device)
        slot_to_row = torch.empty_like(row_to_slot).scatter_(0, row_to_slot, slots)
        # scatter_add_ where bincount would read its result's length on the host
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
        counts = counts.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return cls(
            counts.to(torch.int32),
            offsets,
            ids.shape[0],
            row_to_slot.to(torch.int32),
            slot_to_row.to(torch.int32),
            (row_to_slot // expert_ids.shape[1]).to(torch.int32),
        )

    def row_expert(self) -> torch.Tensor:
        """Expert of each row: [S]; int64; E for rows that belong to no expert. No host sync."""
        rows = torch.arange(self.total_tokens, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.expert_offsets[1:], rows, right=True)

    def host_counts(self) -> list[int]:
        """Rows of each expert as Python integers. Synchronises."""
        return self.num_tokens_per_expert.tolist()


def _check_counts(where: str, counts: torch.Tensor) -> None:
    if not isinstance(counts, torch.Tensor):
        raise ValueError(f"{where}: num_tokens_per_expert is a {type(counts).__name__}; expected a tensor [E] int32.")
    if counts.ndim != 1 or counts.dtype not in (torch.int32, torch.int64) or counts.shape[0] < 1:
        raise ValueError(
            f"{where}: num_tokens_per_expert is {tuple(counts.shape)} {counts.dtype}; expected [E] int32, E >= 1."
        )


def check_tokens(num_tokens_per_expert: torch.Tensor, total_tokens: int) -> None:
    """Raise ValueError unless counts are non-negative and sum to total_tokens. Synchronises.

    Args:
        num_tokens_per_expert: [E]; int32 or int64; any device.
        total_tokens: rows of the activations.
    """
    _check_counts("check_tokens", num_tokens_per_expert)
    _check_sum("check_tokens", num_tokens_per_expert, total_tokens)


def _check_sum(where: str, num_tokens_per_expert: torch.Tensor, total_tokens: int) -> None:
    counts = num_tokens_per_expert.tolist()
    for expert, count in enumerate(counts):
        if count < 0:
            raise ValueError(f"{where}: num_tokens_per_expert[{expert}] is {count}; expected a count of at least 0.")
    if sum(counts) != total_tokens:
        raise ValueError(
            f"{where}: num_tokens_per_expert sums to {sum(counts)} over {len(counts)} experts; expected "
            f"{total_tokens}, the rows of the activations. Sort the rows by expert and count them anew."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TileSchedule:
    """Tiles of at most block_rows rows, none across two experts.

    Attributes:
        tile_expert, tile_row, tile_rows: [max_tiles]; int32; expert, first row and rows of each tile; worst-case
            length, padded with -1.
    """

    tile_expert: torch.Tensor
    tile_row: torch.Tensor
    tile_rows: torch.Tensor
    block_rows: int


def tile_schedule(plan: TokenPlan, block_rows: int) -> TileSchedule:
    """Cut the plan's rows into tiles, on the device of the plan. No host sync; safe in a CUDA graph."""
    if block_rows < 1:
        raise ValueError(f"tile_schedule: block_rows is {block_rows}; expected at least 1.")
    s, e = plan.total_tokens, plan.num_experts
    max_tiles = s // block_rows + min(e, s)
    counts, offsets = plan.num_tokens_per_expert.long(), plan.expert_offsets.long()
    ends = ((counts + block_rows - 1) // block_rows).cumsum(0)  # [E] tiles up to and with each expert
    tile = torch.arange(max_tiles, device=plan.device)
    expert = torch.searchsorted(ends, tile, right=True)
    used = expert < e
    expert = expert.clamp(max=e - 1)
    in_expert = tile - (ends[expert] - (counts[expert] + block_rows - 1) // block_rows)
    row = offsets[expert] + in_expert * block_rows
    rows = torch.minimum(offsets[expert + 1] - row, torch.full_like(row, block_rows))
    tile_expert, tile_row, tile_rows = (torch.where(used, t, -1).to(torch.int32) for t in (expert, row, rows))
    return TileSchedule(tile_expert, tile_row, tile_rows, block_rows)
