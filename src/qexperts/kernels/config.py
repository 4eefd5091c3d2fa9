"""Tile sizes: readable default rules, in one place, and the predicate that says which sizes are valid.

The rules were measured on an H100 with Triton 3.6 (`results/h100`).
"""

from __future__ import annotations

import dataclasses

import triton

__all__ = ["DecodeConfig", "PrefillConfig", "decode_config", "prefill_config", "split_k", "valid"]


OPERAND_SLICES_OF_64 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Sizes of `prefill.py`.

    Attributes:
        block_n, block_k: of the weight, multiples of 64.
        stages: of the load pipeline. At least 3: with 2, Triton 3.6 overwrites operands that are still being read.
        warps: of a program, 4 or 8.
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


def prefill_config(bits: int, k: int, layout: str, nvidia: bool, group: int = 128) -> PrefillConfig:
    """bits: of a code; layout: of the weight, "transposed" for a strided one with N contiguous; group: 0 for a row.

    On NVIDIA two programs of 4 warps share a multiprocessor: 113 KiB of shared memory and 255 registers a thread each.
    Since 3.7, Triton keeps 64 instead of 16 k of the left operand in registers, which is too much for that: there one
    program of 8 warps runs alone, without spilling. With Triton 3.6, where both were measured, that is 5-9% slower for
    4-bit codes and 42-47% for 8-bit ones.
    """
    if not nvidia or layout == "transposed":
        return PrefillConfig(64, 64, 3 if nvidia else 2)
    if bits == 16 or layout == "strided":
        return PrefillConfig(128, 64, 3)
    if OPERAND_SLICES_OF_64:
        if bits == 8 or k % 128 or 0 < group < 128:
            return PrefillConfig(128, 64, 4, warps=8, programs_per_sm=1)
        return PrefillConfig(256, 128, 3, warps=8, programs_per_sm=1)
    if k % 128 == 0 and (bits == 2 or (bits == 4 and layout == "public")):
        return PrefillConfig(128, 128, 3)
    return PrefillConfig(128, 64, 4)


def decode_config(bits: int, k: int, layout: str, nvidia: bool, blocks: int, processors: int) -> DecodeConfig:
    """blocks: of 128 outputs over all active experts. Codes under 8 bits are bound by instructions, of which blocks of
    128 rows need fewer; with few blocks, loading more k ahead counts more."""
    if not nvidia:
        return DecodeConfig(64, 64, 2)
    if bits >= 8:
        return DecodeConfig(64, 64, 4)
    if blocks < 4 * processors and k % 128 == 0:
        return DecodeConfig(64, 128, 4)
    return DecodeConfig(128, 64, 4)


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
