"""The kernels' launchers, called as the backend calls them, on tensors whose surroundings are poisoned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qexperts import FORMATS, QuantWeight
from qexperts.kernels import config, decode, permute, prefill, schedule
from qexperts.kernels.operand import Operand, operand
from qexperts.layouts import to_layout
from qexperts.reference import grouped_gemm_reference
from qexperts.testing import Inputs, assert_no_worse, peer_gemm

PATH = "interpreter"
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
DTYPES = [torch.bfloat16, torch.float16]
GUARD = 512  # bytes before and after


def framed(t: torch.Tensor) -> torch.Tensor:
    """The same values between bytes of 0xFF: NaN in every float dtype, no code, -1 as an integer."""
    size = t.numel() * t.element_size()
    raw = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8)
    raw[GUARD : GUARD + size] = t.contiguous().flatten().view(torch.uint8)
    return raw[GUARD : GUARD + size].view(t.dtype).view(t.shape)


def guards_hold(t: torch.Tensor) -> bool:
    """Whether nobody wrote around a framed tensor."""
    raw = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    return bool((raw[:GUARD] == 0xFF).all() and (raw[-GUARD:] == 0xFF).all())


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A framed output, NaN wherever nobody wrote."""
    return framed(torch.full(shape, float("nan"), dtype=dtype))


def in_layout(weight: QuantWeight, layout: str) -> QuantWeight:
    """A copy of a public weight in a layout, framed. "strided": codes with k not contiguous."""
    own = weight.with_tensors(*(framed(t) for t in weight.tensors))
    if layout == "strided":
        codes = framed(weight.codes.view(torch.uint8).mT.contiguous()).mT.view(weight.codes.dtype)
        return own.with_tensors(codes, *own.tensors[1:])
    prepared = to_layout(own, layout)
    return prepared.with_tensors(*(framed(t) for t in prepared.tensors))


def permuted(x: torch.Tensor, w: Operand) -> torch.Tensor:
    """x as the kernels read it for this weight."""
    if w.layout != "public":
        return x
    target = unwritten(x.shape[0], -(-w.K // 64) * 64, dtype=x.dtype)
    permute.launch(target, x, w.format)
    assert guards_hold(target)
    return target


def multiply(
    x: torch.Tensor,
    weight: QuantWeight,
    counts: torch.Tensor,
    phase: str,
    *,
    nvidia: bool = False,
    many: bool = False,
    parts: int | None = None,
    limit: int = 4,
    condition: int = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [S, K] times a weight, through the launchers of a phase; NaN where nothing was written.

    nvidia: the tile sizes of NVIDIA GPUs; many: those of a decode with many blocks. parts: of K, in a decode.
    dtype: of the result, by default that of x.
    """
    s = x.shape[0]
    y = unwritten(s, weight.N, dtype=dtype or x.dtype)
    w = operand(weight)
    if phase == "decode":
        c = config.decode_config(w, nvidia, slots=100 if many else 1, processors=10)
        c = dataclasses.replace(c, parts=parts or c.parts)
        decode.launch(y, permuted(x, w), w, counts, c, limit, condition, PATH)
    else:
        p = config.prefill_config(w, x.dtype, nvidia)
        tiles = framed(torch.full((schedule.size(s, weight.E),), -7, dtype=torch.int32))
        schedule.launch(tiles, y, counts, limit, condition)
        assert guards_hold(tiles)
        prefill.launch(y, permuted(x, w), w, tiles, weight.E, p, 4, PATH)
    assert guards_hold(y)
    return y


def check(inputs: Inputs, layout: str, phase: str, **options: object) -> None:
    """The error rule on one multiplication."""
    y = multiply(framed(inputs.x), in_layout(inputs.weight, layout), inputs.counts, phase, **options)  # type: ignore[arg-type]
    assert_no_worse(y, inputs.oracle, inputs.peer)


def used_rows(counts: Sequence[int], total: int) -> list[int]:
    """Rows of each expert as kernels must use counts that nobody checked: none negative, none past the total."""
    used, left = [], total
    for count in counts:
        used.append(min(max(count, 0), left))
        left -= used[-1]
    return used


def check_unchecked(x: torch.Tensor, weight: QuantWeight, counts: Sequence[int], y: torch.Tensor) -> None:
    """The error rule for counts that need not add up: rows past their sum are 0."""
    used = used_rows(counts, x.shape[0])
    assert_no_worse(y, grouped_gemm_reference(x, weight, used), peer_gemm(x, weight, used))
    assert not y[sum(used) :].count_nonzero()
