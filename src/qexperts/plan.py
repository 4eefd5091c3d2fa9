"""Which rows belong to which expert: offsets, permutations and tile schedules, in plain torch without a host sync.

Glossary: T tokens, S = T * top_k slots, r rows (slots sorted by expert), E experts.
"""

from __future__ import annotations

import dataclasses

import torch

from .workspace import is_capturing

__all__ = ["TILE_CLASSES", "TileSchedule", "TokenPlan", "check_tokens", "max_tiles", "tile_schedule"]


class TokenPlan:
    """S rows over E experts, on one device.

    Attributes:
        counts: [E]; int32 or int64; rows of each expert as they were given; kernels read these.
        total_tokens: S. Rows from expert_offsets[E] on belong to no expert; results there are 0.
        row_to_slot, slot_to_row, row_to_token: [S]; int32; permutations `x_to_y[x] = y` if made from expert ids.
    """

    def __init__(
        self,
        counts: torch.Tensor,
        total_tokens: int,
        row_to_slot: torch.Tensor | None = None,
        slot_to_row: torch.Tensor | None = None,
        row_to_token: torch.Tensor | None = None,
    ) -> None:
        self.counts = counts
        self.total_tokens = total_tokens
        self.row_to_slot, self.slot_to_row, self.row_to_token = row_to_slot, slot_to_row, row_to_token
        self._offsets: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def expert_offsets(self) -> torch.Tensor:
        """[E+1]; int32; first row of each expert, then the end of the last; never above S. Computed when first asked
        for, since kernels on packed weights work from the counts. No host sync."""
        if self._offsets is not None:
            return self._offsets
        ends = self.counts.clamp(0, self.total_tokens).cumsum(0, dtype=torch.int64).clamp_(max=self.total_tokens)
        offsets = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        # a graph's tensors hold nothing before it is replayed
        if not torch.compiler.is_compiling() and not is_capturing(self.device):
            self._offsets = offsets
        return offsets

    @property
    def num_tokens_per_expert(self) -> torch.Tensor:
        """[E]; int32; rows of each expert, as they are used: negative counts as 0, none past S."""
        return self.expert_offsets.diff()

    @classmethod
    def from_counts(cls, num_tokens_per_expert: torch.Tensor, total_tokens: int) -> TokenPlan:
        """Plan for rows that are already sorted by expert.

        Args:
            num_tokens_per_expert: [E]; int32 or int64.
            total_tokens: S, the rows of the activations.
        Raises: ValueError on the CPU if a count is negative or the sum is not S, unless the call is traced. On other
            devices nothing is read: negative counts count as 0, offsets are clamped to S (see `check_tokens`).

        No host synchronisation; safe in a CUDA graph.
        """
        counts = num_tokens_per_expert
        _check_counts("TokenPlan", counts)
        if total_tokens < 0:
            raise ValueError(f"TokenPlan: total_tokens is {total_tokens}; expected at least 0.")
        if counts.device.type == "cpu" and not torch.compiler.is_compiling():  # a traced call reads no values
            _check_sum("TokenPlan", counts, total_tokens)
        return cls(counts, total_tokens)

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
        return cls(
            counts.to(torch.int32),
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
    """Tiles of at most 128 rows, none across two experts; experts with more rows come first.

    Attributes:
        tile_expert, tile_row, tile_rows: [max_tiles]; int32; expert, first row and rows of each tile; worst-case
            length, padded with -1.
    """

    tile_expert: torch.Tensor
    tile_row: torch.Tensor
    tile_rows: torch.Tensor


TILE_ROWS = 128
TILE_CLASSES = (128, 64, 32, 16)
# Classes that cover what remains of an expert after tiles of 128, by 16-row units: two where that saves padding. A
# tile costs about its class, but no less than one of 32 rows: its weights are dequantized all the same.
_REMAINDER = ((), (16,), (32,), (64,), (64,), (64, 16), (64, 32), (128,), (128,))


def max_tiles(total_tokens: int, num_experts: int) -> int:
    """Tiles that S rows over E experts can need at most: the remainders of at most min(E, S) experts take two each."""
    return total_tokens // TILE_ROWS + 2 * min(num_experts, total_tokens)


def tile_schedule(plan: TokenPlan) -> TileSchedule:
    """Cut the plan's rows into tiles of the classes 16, 32, 64 and 128, on the device of the plan.

    A tile's class is the smallest that holds its rows. The kernel `kernels/schedule.py` builds the same schedule.
    No host sync; safe in a CUDA graph.
    """
    s, e, device = plan.total_tokens, plan.num_experts, plan.device
    offsets = plan.expert_offsets.long()
    counts = offsets.diff()
    units = (counts % TILE_ROWS + 15) // 16
    remain = [[u for u, classes in enumerate(_REMAINDER) if c in classes] for c in TILE_CLASSES]
    per_class = [torch.stack([units == u for u in of]).sum(0) for of in remain]
    tiles = torch.stack(per_class)  # [4, E] tiles of each class
    tiles[0] += counts // TILE_ROWS
    order = counts.argsort(descending=True, stable=True)
    ends = tiles[:, order].T.flatten().cumsum(0)  # [4 E]
    tile = torch.arange(max_tiles(s, e), device=device)
    slot = torch.searchsorted(ends, tile, right=True)
    used = slot < 4 * e
    slot = slot.clamp(max=4 * e - 1)
    kind, expert = slot % 4, order[slot // 4]
    in_slot = tile - torch.nn.functional.pad(ends, (1, 0))[slot]
    remainder = offsets[expert] + counts[expert] // TILE_ROWS * TILE_ROWS
    second = torch.where(kind > 1, tiles[1, expert] * 64, 0)  # a tile of 32 or 16 rows comes after one of 64
    row = torch.where(kind == 0, offsets[expert] + in_slot * TILE_ROWS, remainder + second)
    rows = torch.minimum(offsets[expert + 1] - row, TILE_ROWS >> kind)
    return TileSchedule(*(torch.where(used, t, -1).to(torch.int32) for t in (expert, row, rows)))
