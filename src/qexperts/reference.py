"""The oracle: a slow grouped GEMM on the exact weights. Shares no arithmetic with the dequantizers it judges."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .formats import BLOCK, QuantWeight
from .layouts import restore
from .quantize import unpack

__all__ = ["exact_weight", "grouped_gemm_reference"]


def exact_weight(weight: QuantWeight, expert: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(code - zero) * scale of one expert, element by element: [N, K]; unrounded in fp64.

    In fp32 it is exact for fp16 and bf16 scales (at most 9 + 11 bits), and rounded once for fp32 scales.
    """
    fmt, codes = weight.format, weight.codes[expert]
    if not fmt.quantized:
        return codes.to(dtype)
    if weight.weight_layout != "public":
        return exact_weight(restore(weight.experts(expert, expert + 1)), 0, dtype)
    assert weight.scales is not None
    values = codes.to(dtype) if fmt.kind == "fp8" else unpack(codes, fmt).to(dtype)
    if weight.zeros is not None:
        values = values - _spread(weight.zeros[expert], weight, dtype)
    return values * _spread(weight.scales[expert], weight, dtype)


def _spread(t: torch.Tensor, weight: QuantWeight, dtype: torch.dtype) -> torch.Tensor:
    """One expert's scales or zeros, one value per weight: [N, K]."""
    n, k = weight.N, weight.K
    rows, cols = torch.arange(n, device=t.device), torch.arange(k, device=t.device)
    if weight.scale_layout == "tensor":
        return t.to(dtype).expand(n, k)
    if weight.scale_layout == "block128":
        return t.to(dtype)[(rows // BLOCK)[:, None], (cols // BLOCK)[None, :]]
    return t.to(dtype)[rows[:, None], (cols // (weight.group_size or k))[None, :]]


def grouped_gemm_reference(
    x: torch.Tensor, weight: QuantWeight, counts: Sequence[int], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """y[r] = x[r] @ w[e(r)].T with exact weights.

    Args:
        x: [S, K]; any floating dtype.
        counts: rows of each expert; rows past their sum give 0.
        dtype: of the arithmetic and the result; default fp64 on the CPU, fp32 elsewhere.
    Returns: [S, N].
    """
    if dtype is None:
        dtype = torch.float64 if x.device.type == "cpu" else torch.float32
    out = torch.zeros(x.shape[0], weight.N, dtype=dtype, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            out[rows] = x[rows].to(dtype) @ exact_weight(weight, expert, dtype).T
        start += count
    return out
