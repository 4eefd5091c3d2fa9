"""Tile sizes: readable default rules, in one place, and the predicate that says which sizes are valid.

The rules were measured on an H100 with Triton 3.6 (`results/h100`). Over them stand measured tables (`tuning.py`),
which may change what is FREE: sizes that leave the order of every sum, and so every bit of a result, as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import triton.language as tl

from ..formats import FORMATS
from ..tuning import DTYPES, Case, Choice, bucket
from .operand import Operand, tl_dtype

__all__ = [
    "DecodeConfig",
    "PrefillConfig",
    "case_of",
    "decode_config",
    "prefill_config",
    "valid",
]


@dataclasses.dataclass(frozen=True)
class PrefillConfig(Choice):
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

    FREE: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "block_n": (64, 128, 256), "stages": (2, 3, 4, 5), "warps": (4, 8), "programs_per_sm": (1, 2, 3, 4),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Choice):
    """Sizes of `decode.py`: as `PrefillConfig`, and block_m rows at a time; parts of K side by side (1, 2 or 4);
    blocks of K loaded together; whether blocks are multiplied in halves (see `tile.py`)."""

    block_n: int
    block_k: int
    stages: int
    warps: int = 4
    block_m: int = 16
    parts: int = 1
    unroll: int = 1
    halves: bool = False

    # block_n of 256 with four warps would add the parts of K in another order
    FREE: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "block_n": (64, 128), "stages": (2, 3, 4, 5), "warps": (4, 8), "unroll": (1, 2), "halves": (False, True),
    }  # fmt: skip


def prefill_config(w: Operand, dtype: torch.dtype, nvidia: bool) -> PrefillConfig:
    """Sizes of a prefill with this weight and activations of this dtype.

    On NVIDIA two programs of 4 warps share a multiprocessor, one multiplies while the other dequantizes: 227 KiB of
    shared memory and 255 registers a thread. Blocks of 128 k fit in that only under 8 bits, with one scale of two bytes
    for each row of the block. One program of 8 warps took 10-30% longer, but spills less.
    """
    bits = FORMATS[w.format].bits
    if not nvidia or (w.layout == "strided" and w.strides[2] != 1):  # N is contiguous
        return PrefillConfig(64, 64, 3 if nvidia else 2)
    if w.layout == "strided":
        return PrefillConfig(128, 64, 3)
    one_scale = w.group == 128 or (w.group > 128 and w.layout != "public")
    if bits < 8 and w.K % 128 == 0 and one_scale and w.scale != tl.float32:
        return PrefillConfig(128, 128, 3)
    if (bits == 8 and w.scale != tl_dtype(dtype)) or (w.layout == "public" and w.K % 64 and 0 < w.group < 64):
        return PrefillConfig(128, 64, 4, warps=8, programs_per_sm=1)
    return PrefillConfig(128, 64, 4)


def decode_config(w: Operand, nvidia: bool, slots: int, processors: int) -> DecodeConfig:
    """Sizes of a decode; slots: active experts at most.

    Blocks of 128 rows of the weight need the fewest instructions a code, which is what bounds codes under 8 bits; 8-bit
    ones are bound by memory. Rows of public weights are read 128 bytes at a time where that can be: 64 at a time took
    up to 1.4 times as long. Where there are few programs, a block is made of parts of K rather than of rows.
    """
    if not nvidia:
        return DecodeConfig(64, 64, 2)
    bits, public = FORMATS[w.format].bits, w.layout == "public"
    one_scale = w.K % 128 == 0 and (w.group == 0 or w.group >= 128)
    block_k = 128 if bits < 8 and one_scale else 64
    unit, parts = 128 if w.layout == "tiles128" else block_k, 1  # a part is whole tiles
    while parts < 4 and -(-w.N * parts // 128) * slots < 2.5 * processors and _splits(w.K, w.group, 2 * parts, unit):
        parts *= 2
    if bits == 8 and public and one_scale and parts == 1:
        return DecodeConfig(128, 128, 3)
    if bits >= 8 and (parts == 1 or w.layout == "strided"):
        return DecodeConfig(64, 64, 4)
    if block_k == 64:
        return DecodeConfig(128, 64, 4, parts=parts)
    if bits == 4 and public and parts == 1:
        return DecodeConfig(128, 128, 3, unroll=2)
    return DecodeConfig(128, 128, 3 if parts > 1 else 4, parts=parts, halves=bits == 2)


def _splits(k: int, group: int, parts: int, unit: int) -> bool:
    """Whether K can be computed in that many parts side by side, each of at least two units and of whole groups."""
    return k % (parts * unit) == 0 and k >= 2 * parts * unit and (group == 0 or k // parts % group == 0)


def valid(config: PrefillConfig | DecodeConfig, nvidia: bool) -> str | None:
    """Why sizes cannot be used, or None."""
    for name in ("block_n", "block_k"):
        value = getattr(config, name)
        if value < 64 or value & (value - 1):
            return f"{name} is {value}; expected a power of two from 64"
    if nvidia and config.stages < 3:
        return f"stages is {config.stages}; expected at least 3: with fewer, operands are overwritten while in use"
    return None


def case_of(backend: str, phase: str, w: Operand, dtype: torch.dtype, experts: int, rows: int) -> Case:
    """What tables are asked for."""
    sizes = (w.group, w.N, w.K, experts, bucket(rows))
    return Case(backend, phase, w.format, DTYPES[dtype], str(w.scale), w.layout, *sizes)
