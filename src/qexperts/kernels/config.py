"""Tile sizes: readable default rules, in one place, and the predicate that says which sizes are valid.

The rules were measured on an H100 with Triton 3.6 (`results/h100`).
"""

from __future__ import annotations

import dataclasses

__all__ = ["DecodeConfig", "PrefillConfig", "decode_config", "prefill_config", "split_k", "valid"]


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Sizes of `prefill.py`.

    Attributes:
        block_n, block_k: of the weight, multiples of 64.
        stages: of the load pipeline. At least 3: with 2, Triton 3.6 overwrites operands that are still being read.
        warps: 4 a program.
        programs_per_sm: resident programs that each multiprocessor starts.
    """

    block_n: int
    block_k: int
    stages: int
    warps: int = 4
    programs_per_sm: int = 2


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Sizes of `decode.py`: as `PrefillConfig`, and block_m rows at a time."""

    block_n: int
    block_k: int
    stages: int
    warps: int = 4
    block_m: int = 16


def prefill_config(bits: int, k: int, strided: bool, nvidia: bool) -> PrefillConfig:
    """bits: of a code. Two programs must fit a multiprocessor: 113 KiB of shared memory and 255 registers each."""
    if not nvidia:
        return PrefillConfig(64, 64, 2)
    if strided or bits == 8 or k % 128:
        return PrefillConfig(128, 64, 3)
    return PrefillConfig(128, 128, 3)


def decode_config(bits: int, k: int, strided: bool, nvidia: bool) -> DecodeConfig:
    if not nvidia:
        return DecodeConfig(64, 64, 2)
    if strided or bits == 8 or k % 128:
        return DecodeConfig(64, 64, 4)
    return DecodeConfig(128, 128, 4)


def split_k(blocks: int, k_blocks: int, processors: int) -> int:
    """Parts of K, so that `blocks` programs times parts fill the multiprocessors; each part keeps 4 blocks of K."""
    if blocks >= processors:
        return 1
    return max(1, min(-(-processors // blocks), k_blocks // 4, 8))


def valid(config: PrefillConfig | DecodeConfig, nvidia: bool) -> str | None:
    """Why sizes cannot be used, or None."""
    for name in ("block_n", "block_k"):
        value = getattr(config, name)
        if value < 64 or value & (value - 1):
            return f"{name} is {value}; expected a power of two from 64"
    if nvidia and config.stages < 3:
        return f"stages is {config.stages}; expected at least 3: with fewer, operands are overwritten while in use"
    return None
