"""Weight layouts besides the public one: exact permutations of it, in plain torch.

"tiles", for the kernels of backend `triton`. Codes: 16 rows x `tile_k` k stand together, row by row; each 64 k of a
row are its matrix-fragment lanes q = 0..3, 16 codes each, in the order in which `kernels/dequant.py` extracts them;
bytes and shape stay as they are. Scales and zeros: one 32-bit value a row and group, N contiguous. 16-bit scales take
the low half; the high half holds the zero, or else the scale once more. fp32 scales and zeros are two tensors.

"panels", for the kernels of backend `cpu`. Codes: 16 rows stand together; of each in turn 32 bits of codes, then the
next 32 bits of each. Scales and zeros: their own dtype, one value a row and group, N contiguous.
"""

from __future__ import annotations

import torch

from .formats import BLOCK, QuantWeight, WeightFormat
from .pages import use_huge_pages

__all__ = ["no_panels", "no_tiles", "restore", "tile_k", "to_layout"]

TILE_N, TILE_K = 16, 64
PANEL_N, PANEL_K = 16, 16


def tile_k(bits: int, k: int) -> int:
    """k of a tile: 128 for codes of less than 8 bits where K allows it, so that threads read whole cache lines."""
    return 2 * TILE_K if bits < 8 and k % (2 * TILE_K) == 0 else TILE_K


def no_tiles(weight: QuantWeight) -> str | None:
    """Why a public weight has no "tiles" layout, or None."""
    return _stays_public(weight, TILE_K)


def no_panels(weight: QuantWeight) -> str | None:
    """Why a public weight has no "panels" layout, or None."""
    return _stays_public(weight, PANEL_K)


def _stays_public(weight: QuantWeight, unit: int) -> str | None:
    """Why a public weight has no layout made of pieces of unit k, or None."""
    if not weight.format.quantized:
        return f"{weight.format.name} weights are read as they are"
    if weight.K % unit:
        return f"K={weight.K} is not a multiple of {unit}"
    return None if weight.codes.is_contiguous() else "the codes are a strided view"


def to_layout(weight: QuantWeight, layout: str) -> QuantWeight:
    """A public weight in another layout; the codes are permuted in place, expert by expert."""
    if layout == "public":
        return weight
    permute = to_tiles if layout == "tiles" else to_panels
    for expert in range(weight.E):
        weight.codes[expert] = permute(weight.codes[expert], weight.format)
    if layout == "tiles":
        scales, zeros = _to_words(weight)
    else:
        scales, zeros = (_rows(t, weight) for t in (weight.scales, weight.zeros))
    return QuantWeight(
        weight.codes, scales, zeros, weight.format, weight.group_size, weight.scale_layout, layout, weight.scale_dtype
    )


def restore(weight: QuantWeight) -> QuantWeight:
    """Inverse of `to_layout`, into new tensors.

    Raises: ValueError for a weight whose memory another has taken over (`QuantWeight.release`).
    """
    weight.check_alive("QuantWeight")
    if weight.weight_layout == "public":
        return weight
    codes = torch.empty_like(weight.codes)
    use_huge_pages(codes)
    permute = from_tiles if weight.weight_layout == "tiles" else from_panels
    for expert in range(weight.E):
        codes[expert] = permute(weight.codes[expert], weight.format)
    scales, zeros = _from_rows(weight)
    return QuantWeight(codes, scales, zeros, weight.format, weight.group_size, weight.scale_layout)


def _fields(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes -> raw codes, lowest bits first: [..., B] uint8 -> [..., B * 8 / bits] uint8."""
    if bits == 8:
        return codes
    mask = (1 << bits) - 1
    return torch.stack([(codes >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(-2)


def _bytes(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `_fields`."""
    if bits == 8:
        return fields.contiguous()
    parts = fields.unflatten(-1, (-1, 8 // bits))
    out = parts[..., 0].clone()
    for i in range(1, 8 // bits):
        out |= parts[..., i] << (bits * i)
    return out


def to_tiles(codes: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Codes of one expert, public -> tiles: [N, K / codes_per_byte]; storage dtype of the format; a new tensor."""
    raw, inner = codes.view(torch.uint8), 8 // fmt.bits  # steps of 16 k in a word
    blocks = tile_k(fmt.bits, codes.shape[1] * fmt.codes_per_byte) // TILE_K
    t = _fields(raw, fmt.bits).view(len(raw) // TILE_N, TILE_N, -1, blocks, 4 // inner, inner, 2, 4, 2)
    t = t.permute(0, 2, 1, 3, 7, 4, 8, 5, 6).flatten(2)  # n, r, c, b, j, s, h, q, p -> n, c, then r, b, q, j, p, s, h
    return _bytes(t, fmt.bits).view(codes.shape).view(codes.dtype)


def from_tiles(codes: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Inverse of `to_tiles`."""
    raw, inner = codes.view(torch.uint8), 8 // fmt.bits
    blocks = tile_k(fmt.bits, codes.shape[1] * fmt.codes_per_byte) // TILE_K
    t = _fields(raw.view(len(raw) // TILE_N, -1, TILE_N * blocks * TILE_K * fmt.bits // 8), fmt.bits)
    t = t.unflatten(2, (TILE_N, blocks, 4, 4 // inner, 2, inner, 2)).permute(0, 2, 1, 3, 5, 7, 8, 4, 6)
    return _bytes(t.reshape(len(raw), -1), fmt.bits).view(codes.shape).view(codes.dtype)


def to_panels(codes: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Codes of one expert, public -> panels: [N, K / codes_per_byte]; storage dtype of the format; a new tensor."""
    words = codes.view(torch.uint8).view(torch.int32)  # a move of 4 bytes, whatever the format
    return _as_codes(words.unflatten(0, (-1, PANEL_N)).mT, codes)


def from_panels(codes: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Inverse of `to_panels`."""
    words = codes.view(torch.uint8).view(torch.int32)
    return _as_codes(words.view(len(words) // PANEL_N, -1, PANEL_N).mT, codes)


def _as_codes(words: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return words.contiguous().flatten().view(torch.uint8).view(like.dtype).view(like.shape)


def _to_words(weight: QuantWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    scales, zeros = (_rows(t, weight) for t in (weight.scales, weight.zeros))
    assert scales is not None
    if scales.dtype == torch.float32:
        return scales, zeros
    pairs = torch.stack([scales, scales if zeros is None else zeros], -1).flatten()
    return pairs.view(torch.int32).view(scales.shape), None


def _from_rows(weight: QuantWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zeros of a prepared weight in the public shape."""
    assert weight.scales is not None and weight.scale_dtype is not None
    scales, zeros = weight.scales, weight.zeros
    if scales.dtype == torch.int32:
        pairs = scales.contiguous().view(weight.scale_dtype).unflatten(2, (-1, 2))  # [E, groups, N, 2]
        scales, zeros = pairs[..., 0], pairs[..., 1] if weight.format.asym else None
    if weight.scale_layout == "tensor":
        return scales[:, 0, 0].contiguous(), None
    if weight.scale_layout == "block128":
        scales = scales[..., ::BLOCK]
    return scales.mT.contiguous(), None if zeros is None else zeros.mT.contiguous()


def _rows(t: torch.Tensor | None, weight: QuantWeight) -> torch.Tensor | None:
    """[E, groups, N] contiguous, whatever the scale layout."""
    if t is None:
        return None
    if weight.scale_layout == "tensor":
        return t[:, None, None].expand(-1, 1, weight.N).contiguous()
    if weight.scale_layout == "block128":
        t = t.repeat_interleave(BLOCK, 1)[:, : weight.N]
    return t.mT.contiguous()
