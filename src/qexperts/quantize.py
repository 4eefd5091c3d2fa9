"""Float <-> codes: quantizers, packing and dequantization in plain torch. The numerics of every format live here.

Index glossary: E experts, N outputs, K contraction, G group size, C codes per byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from .formats import (
    BLOCK,
    SCALE_DTYPES,
    SCALE_LAYOUTS,
    QuantWeight,
    WeightFormat,
    check_group_size,
    check_sizes,
    get_format,
    scales_shape,
)
from .layouts import restore
from .pages import use_huge_pages

__all__ = ["dequantize", "dequantize_into", "dequantize_steps", "pack", "quantize", "unpack"]

# Divisor of each quantizer: the code that the largest magnitude (sym, fp8) or the whole range (asym) maps to.
_FP8_LIMIT = {"fp8_e4m3": 464.0, "fp8_e5m2": 61440.0}  # the midpoint above the largest finite code
# Dequantization writes expert by expert chunk: temporaries stay bounded, and on a CPU inside the cache.
_CHUNK_BYTES = {"cpu": 2**23}
_CHUNK_BYTES_DEVICE = 2**28


def pack(values: torch.Tensor, format: str | WeightFormat) -> torch.Tensor:
    """Pack integer codes into bytes, lowest k in the lowest bits.

    Args:
        values: [..., K]; any integer dtype; inside the format's code range; K a multiple of the codes per byte.
    Returns: [..., K / codes_per_byte]; uint8.
    Raises: ValueError for a format without integer codes, or a K that leaves a byte half full.
    """
    fmt = _integer_format("pack", format)
    if values.ndim < 1 or values.shape[-1] % fmt.codes_per_byte or values.is_floating_point():
        raise ValueError(
            f"pack({fmt.name}): values is {tuple(values.shape)} {values.dtype}; expected integers [..., K] with K a "
            f"multiple of {fmt.codes_per_byte}."
        )
    c, mask = fmt.codes_per_byte, (1 << fmt.bits) - 1
    fields = (values & mask).to(torch.uint8).unflatten(-1, (-1, c))
    out = fields[..., 0].clone()
    for j in range(1, c):
        out |= fields[..., j] << (fmt.bits * j)
    return out


def unpack(codes: torch.Tensor, format: str | WeightFormat) -> torch.Tensor:
    """Inverse of `pack`: [..., K / codes_per_byte] uint8 -> [..., K] int16 inside the code range."""
    fmt = _integer_format("unpack", format)
    if codes.dtype != torch.uint8:
        raise ValueError(f"unpack({fmt.name}): codes is {codes.dtype}; expected torch.uint8.")
    fields = [_field_step(codes, fmt, j)[0]().to(torch.int16) for j in range(fmt.codes_per_byte)]
    return fields[0] if len(fields) == 1 else torch.stack(fields, -1).flatten(-2)


def _integer_format(where: str, format: str | WeightFormat) -> WeightFormat:
    fmt = get_format(format)
    if fmt.kind != "int":
        raise ValueError(f"{where}: {fmt.name} has no integer codes; expected an int8, int4 or int2 format.")
    return fmt


def _field_step(codes: torch.Tensor, fmt: WeightFormat, j: int) -> tuple[Callable[[], torch.Tensor], int]:
    """Code j of every byte as uint8 (asym) or sign-extended int8 (sym), and the operations it takes."""
    low, high = fmt.bits * j, fmt.bits * (j + 1)
    if fmt.bits == 8:
        view = codes if fmt.asym else codes.view(torch.int8)
        return lambda: view, 0
    if fmt.asym:
        mask = (1 << fmt.bits) - 1
        if high == 8:
            return lambda: codes >> low, 1
        return (lambda: codes & mask, 1) if low == 0 else (lambda: (codes >> low) & mask, 2)
    if high == 8:
        signed = codes.view(torch.int8)
        return lambda: signed >> low, 1
    return lambda: (codes << (8 - high)).view(torch.int8) >> (8 - fmt.bits), 2


@torch.no_grad()
def quantize(
    w: torch.Tensor,
    format: str | WeightFormat,
    *,
    group_size: int = 128,
    scale_layout: str = "group",
    scale_dtype: torch.dtype | None = None,
) -> QuantWeight:
    """Quantize E matrices by rounding to nearest.

        sym, fp8:  scale = max|w| / q                code = round(w / scale)
        asym:      scale = (max w - min w) / q       code = round(w / scale) + zero,  zero = round(-min w / scale)

    with q = 127, 7, 2 (int8, int4, int2 sym), 2^bits - 1 (asym, over a range widened to contain 0, so that groups
    of one sign keep their values), 448 and 57344 (fp8). Codes are computed from the scale as stored and saturate;
    a scale that underflows is raised to the smallest one that keeps the codes in range; an all-zero group stores
    scale 1 and codes 0.

    Args:
        w: [E, N, K]; fp32, bf16 or fp16; finite; any device.
        group_size: consecutive k that share a scale; divides K. Ignored unless scale_layout is "group".
        scale_layout: "group", "channel", "tensor" or "block128"; the last two for symmetric and fp8 formats.
        scale_dtype: fp16, bf16 or fp32; default the dtype of w.
    Returns: a `QuantWeight` in the public layout, on the device of w (on a CPU in huge pages if the system has them).
        "bf16" and "fp16" only cast.
    Raises: ValueError for sizes or options that do not fit, NaN or Inf (naming the expert), overflowing scales.

    Works expert by expert: the extra memory is a few fp32 copies of one [N, K] matrix. Synchronises.
    """
    fmt = get_format(format)
    where = f"quantize({fmt.name})"
    if w.ndim != 3 or w.dtype not in SCALE_DTYPES:
        raise ValueError(f"{where}: w is {tuple(w.shape)} {w.dtype}; expected [E, N, K] in fp32, bf16 or fp16.")
    e, n, k = w.shape
    check_sizes(where, fmt, n, k)
    codes = torch.empty((e, n, fmt.packed_k(k)), dtype=fmt.storage, device=w.device)
    use_huge_pages(codes)
    if not fmt.quantized:
        for i in range(e):
            codes[i] = _finite(where, _finite(where, w[i], i).to(fmt.storage), i)
        return QuantWeight(codes, None, None, fmt)
    group = {"group": group_size, "channel": k}.get(scale_layout)
    scale_dtype = w.dtype if scale_dtype is None else scale_dtype
    _check_options(where, fmt, k, group, scale_layout, scale_dtype)
    shape = scales_shape(scale_layout, e, n, k, group)
    scales = torch.empty(shape, dtype=scale_dtype, device=w.device)
    zeros = torch.empty_like(scales) if fmt.asym else None
    use_huge_pages(scales, zeros)
    for i in range(e):
        blocks = _to_blocks(_finite(where, w[i], i).float(), scale_layout, group)  # [n1, n2, k1, k2]
        code, scale, zero = _quantize_blocks(blocks, fmt, scale_dtype)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{where}: expert {i}: a scale overflows {scale_dtype}; pass scale_dtype=torch.float32.")
        code = code.flatten(2, 3).flatten(0, 1)[:n, :k]  # block128 pads ragged edges
        codes[i] = code if fmt.kind == "fp8" else pack(code, fmt)
        scales[i] = scale.view(shape[1:])
        if zeros is not None:
            zeros[i] = zero.view(shape[1:])
    return QuantWeight(codes, scales, zeros, fmt, group, scale_layout)


def _check_options(
    where: str, fmt: WeightFormat, k: int, group: int | None, scale_layout: str, scale_dtype: torch.dtype
) -> None:
    if scale_layout not in SCALE_LAYOUTS:
        raise ValueError(f"{where}: scale_layout is {scale_layout!r}; expected one of {', '.join(SCALE_LAYOUTS)}.")
    if fmt.asym and scale_layout not in ("group", "channel"):
        raise ValueError(f"{where}: scale_layout {scale_layout!r} has no zero points; use a symmetric format.")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"{where}: scale_dtype is {scale_dtype}; expected fp16, bf16 or fp32.")
    if group is not None:
        check_group_size(where, fmt, k, group)


def _finite(where: str, w: torch.Tensor, expert: int) -> torch.Tensor:
    if not bool(torch.isfinite(w).all()):
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{where}: expert {expert} has {bad} NaN or Inf weights as {w.dtype}; all must be finite.")
    return w


def _to_blocks(w: torch.Tensor, layout: str, group: int | None) -> torch.Tensor:
    """[N, K] -> [n1, n2, k1, k2]: block (n1, k1) of n2 x k2 weights shares a scale."""
    n, k = w.shape
    if layout == "block128":
        w = torch.nn.functional.pad(w, (0, -k % BLOCK, 0, -n % BLOCK))
        return w.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    if layout == "tensor":
        return w.view(1, n, 1, k)
    return w.view(n, 1, -1, group or k)


def _quantize_blocks(
    blocks: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n1, n2, k1, k2] fp32 -> codes of that shape, scale and zero [n1, 1, k1, 1]."""
    lo = blocks.amin((1, 3), keepdim=True).clamp_(max=0)
    hi = blocks.amax((1, 3), keepdim=True).clamp_(min=0)
    if fmt.kind == "fp8":
        q, limit = float(fmt.code_max), _FP8_LIMIT[fmt.name]
    else:
        q = float(fmt.code_max if fmt.asym or fmt.bits > 2 else -fmt.code_min)
        limit = q + 0.5
    top = torch.maximum(hi, -lo)

    def over(divisor: torch.Tensor) -> torch.Tensor:
        """What the codes must span, over a divisor; hi - lo itself may exceed fp32."""
        if not fmt.asym:
            return top / divisor
        return torch.where(torch.isfinite(hi - lo), (hi - lo) / divisor, hi / divisor - lo / divisor)

    # a tensor, since CUDA multiplies by the rounded inverse of a Python scalar and would differ from the CPU
    scale = over(torch.tensor(q, device=blocks.device)).to(dtype)
    successor = _successor(scale)  # enough: the scale is rounded to nearest, so the next one is above the exact value
    scale = torch.where(over(scale.float()) < limit, scale, successor)
    scale = torch.where(top == 0, torch.ones_like(scale), scale)
    exact = scale.float()
    if fmt.kind == "fp8":
        return (blocks / exact).clamp_(-q, q).to(fmt.storage), scale, exact
    # abs turns the -0 of a group without negative weights into 0, which clamp does on the CPU only
    zero = torch.round(-lo / exact).clamp_(fmt.code_min, fmt.code_max).abs_() if fmt.asym else torch.zeros_like(exact)
    code_min = -fmt.code_max if fmt.bits == 8 and not fmt.asym else fmt.code_min  # int8_sym stays within +-127
    code = (torch.round(blocks / exact) + zero).clamp_(code_min, fmt.code_max)
    return code.to(torch.int16), scale, zero


def _successor(scale: torch.Tensor) -> torch.Tensor:
    """The next larger value of the dtype, for scales >= 0."""
    return (scale.view(torch.int32 if scale.dtype == torch.float32 else torch.int16) + 1).view(scale.dtype)


def dequantize(weight: QuantWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weights a `QuantWeight` stands for, rounded once.

        w = (code - zero) * scale

    Args:
        dtype: fp16, bf16, fp32 or fp64 (exact); default the dtype of the scales, or of an unquantized weight.
    Returns: [E, N, K]; contiguous, or strided as the codes are. fp32 scales: the product is rounded to fp32 first.

    No host sync. A weight in a prepared layout is restored chunk by chunk.
    """
    if dtype is None:
        dtype = weight.scale_dtype if weight.scale_dtype is not None else weight.codes.dtype
    if dtype not in (*SCALE_DTYPES, torch.float64):
        raise ValueError(f"dequantize: dtype is {dtype}; expected fp16, bf16, fp32 or fp64.")
    e, n, k = weight.E, weight.N, weight.K
    if weight.n_is_contiguous:
        return dequantize_into(torch.empty(e, k, n, dtype=dtype, device=weight.device).mT, weight)
    return dequantize_into(torch.empty(e, n, k, dtype=dtype, device=weight.device), weight)


@torch.no_grad()
def dequantize_into(out: torch.Tensor, weight: QuantWeight) -> torch.Tensor:
    """`dequantize` into out: [E, N, K]; any floating dtype; every element is written. Returns out."""
    for run, _ in dequantize_steps(out, weight):
        run()
    return out


def dequantize_steps(out: torch.Tensor, weight: QuantWeight) -> list[tuple[Callable[[], object], int]]:
    """`dequantize_into` as calls over fixed tensors, each with the number of device operations it issues."""
    if weight.weight_layout != "public":

        def restored(start: int, stop: int) -> None:
            dequantize_into(out[start:stop], restore(weight.experts(start, stop)))

        return [(functools.partial(restored, *chunk), 1) for chunk in _chunks(weight)]
    if not weight.format.quantized:
        return [(lambda: out.copy_(weight.codes), 1)]
    steps: list[tuple[Callable[[], object], int]] = []
    for start, stop in _chunks(weight):
        steps += _chunk_steps(out[start:stop], weight.experts(start, stop))
    return steps


def _chunks(weight: QuantWeight) -> Iterator[tuple[int, int]]:
    limit = _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES_DEVICE)
    step = max(1, limit // max(1, weight.N * weight.K * 2))
    for start in range(0, weight.E, step):
        yield start, min(start + step, weight.E)


def _chunk_steps(out: torch.Tensor, weight: QuantWeight) -> list[tuple[Callable[[], object], int]]:
    fmt, c = weight.format, weight.format.codes_per_byte
    assert weight.scales is not None  # a quantized QuantWeight has scales
    scale, group, spread = _per_group(weight.scales, weight)  # [E, N, K/group, 1]
    grouped = out.unflatten(2, (-1, group))
    steps: list[tuple[Callable[[], object], int]] = []

    def rescale() -> None:
        grouped.mul_(scale())

    if fmt.kind == "fp8":
        return [(lambda: out.copy_(weight.codes), 1), (rescale, 1 + spread)]
    zero = _per_group(weight.zeros, weight)[0]() if weight.zeros is not None else None
    fuse = zero is None and weight.scale_layout != "block128"
    # int8 times a 16-bit scale would be rounded to 16 bits, whatever out is
    wide = torch.promote_types(weight.scales.dtype, out.dtype)
    for j in range(c):
        field, ops = _field_step(weight.codes, fmt, j)
        target = out[..., j::c]
        split = target.unflatten(2, (-1, group // c)) if group % c == 0 else target

        def fused(field=field, split=split) -> None:  # type: ignore[no-untyped-def]
            torch.mul(field().unflatten(2, (-1, group // c)), scale().to(wide), out=split)  # one rounding, one pass

        def shifted(field=field, split=split) -> None:  # type: ignore[no-untyped-def]
            assert zero is not None
            torch.sub(field().unflatten(2, (-1, group // c)), zero, out=split)  # at most 9 bits: exact in every dtype

        def plain(field=field, target=target) -> None:  # type: ignore[no-untyped-def]
            target.copy_(field())

        if fuse:
            steps.append((fused, ops + 1 + (wide != weight.scales.dtype)))
        else:
            steps.append((plain if zero is None else shifted, ops + 1))
    return steps if fuse else [*steps, (rescale, 1 + spread)]


def _per_group(t: torch.Tensor, weight: QuantWeight) -> tuple[Callable[[], torch.Tensor], int, int]:
    """How to get scales or zeros as [E, N or 1, K/group, 1], the group they hold for, and the operations it takes."""
    if weight.scale_layout == "tensor":
        view = t.view(-1, 1, 1, 1)
        return lambda: view, weight.K, 0
    if weight.scale_layout != "block128":
        view = t.unsqueeze(-1)
        return lambda: view, weight.group_size or weight.K, 0
    if weight.K % BLOCK == 0:
        return lambda: t.repeat_interleave(BLOCK, 1)[:, : weight.N].unsqueeze(-1), BLOCK, 1

    def by_element() -> torch.Tensor:
        return t.repeat_interleave(BLOCK, 1)[:, : weight.N].repeat_interleave(BLOCK, 2)[..., : weight.K].unsqueeze(-1)

    return by_element, 1, 2
