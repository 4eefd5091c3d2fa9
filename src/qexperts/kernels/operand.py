"""What a kernel needs of a quantized weight: tensors, strides in the units of its pointers, compile-time facts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from ..formats import BLOCK, QuantWeight
from ..layouts import tile_k

__all__ = ["Operand", "operand", "tl_dtype"]

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    return _TL[dtype]


class Operand(NamedTuple):
    """A weight as kernel arguments.

    Attributes:
        w, s, z: codes, scales, zeros; s and z stand in for what a format does not have.
        strides: of an expert, a row and a k of w (32-bit words, or elements if strided); of an expert, a row and a
            group of s and z.
        layout, scale, group, scale_rows: see `tile.py`.
        facts: a number that stands for everything here but the tensors' memory.
    """

    w: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor
    strides: tuple[int, int, int, int, int, int]
    format: str
    layout: str
    scale: tl.dtype
    group: int
    scale_rows: int
    N: int
    K: int
    facts: int = -1


_FACTS: dict[tuple[object, ...], int] = {}


def operand(weight: QuantWeight) -> Operand:
    """Kernel arguments of a weight. A format without scales passes its codes in their place; they are not read."""
    if codes_misplaced(weight):
        raise ValueError(
            f"{weight}: the codes start at no multiple of 4 bytes, or lie apart in a prepared layout; the kernels read "
            f"whole words. Use codes.contiguous()."
        )
    scales, zeros = weight.scales, weight.zeros
    if scales is not None and zeros is not None and scales.stride() != zeros.stride():
        raise ValueError(
            f"{weight}: strides of the scales are {scales.stride()}, of the zeros {zeros.stride()}; the kernels read "
            f"both alike. Use scales.contiguous() and zeros.contiguous()."
        )
    w = _operand(weight)
    facts = (*w[3:-1], w.w.dtype, w.s.dtype, w.w.device)
    return w._replace(facts=_FACTS.setdefault(facts, len(_FACTS)))


def codes_misplaced(weight: QuantWeight) -> bool:
    """Whether the memory is not where strides and offsets say that words are."""
    if weight.weight_layout != "public":
        return not weight.codes.is_contiguous()
    return weight.format.bits < 8 and (weight.codes.data_ptr() % 4 > 0 or not weight.whole_words)


def _operand(weight: QuantWeight) -> Operand:
    codes, scales = weight.codes, weight.scales
    e, n, k = codes.stride()
    name, size = weight.format.name, (weight.N, weight.K)
    if scales is None:
        return Operand(codes, codes, codes, (e, n, k, 0, 0, 0), name, "strided", _TL[codes.dtype], 0, 1, *size)
    zeros = weight.zeros if weight.zeros is not None else scales
    if weight.weight_layout == "tiles":
        group = _group(weight)
        strides = (e // 4, n // 4, 1, scales.stride(0), 1, scales.stride(1))
        layout = "tiles" if tile_k(weight.format.bits, weight.K) == 64 else "tiles128"
        return Operand(codes, scales, zeros, strides, name, layout, _TL[weight.scale_dtype], group, 1, *size)
    if weight.scale_layout == "tensor":
        se, sn, sg = scales.stride(0), 0, 0
    else:
        se, sn, sg = scales.stride()
    rows = BLOCK if weight.scale_layout == "block128" else 1
    scale = _TL[scales.dtype]
    if not weight.whole_words:  # 8-bit codes; what has smaller ones is refused before
        return Operand(codes, scales, zeros, (e, n, k, se, sn, sg), name, "strided", scale, _group(weight), rows, *size)
    strides = (e // 4, n // 4, 1, se, sn, sg)
    return Operand(codes, scales, zeros, strides, name, "public", scale, _group(weight), rows, *size)


def _group(weight: QuantWeight) -> int:
    """Consecutive k that share a scale, 0 for a whole row."""
    if weight.scale_layout == "block128":
        return BLOCK
    return 0 if weight.group_size in (None, weight.K) else weight.group_size
