"""Stored tensors of one linear -> codes, scales and zero points as `QuantWeight` has them.

Little-endian fields of b bits in 32-bit words are bytes with the lowest field first, and so is the public layout: the
codes of GPTQ and compressed-tensors need no unpacking, only their words in another order. Symmetric codes lose their
zero point 2^(b-1) by flipping the highest bit of every field.

Index glossary: N outputs, K contraction, G groups of a row, pf fields in a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import UnsupportedError
from ..formats import BLOCK, FORMATS, SCALE_DTYPES, WeightFormat, check_group_size
from .schemes import Scheme

__all__ = [
    "TENSORS",
    "Matrix",
    "concatenate",
    "decode",
    "fields",
    "finish",
    "kind",
    "plain",
    "reorder_rows",
    "required",
    "sort_columns",
]

Tensors = Mapping[str, torch.Tensor]
Describe = Callable[[str], str]

AWQ_FIELD = (0, 4, 1, 5, 2, 6, 3, 7)  # column 8i+j of AWQ is field AWQ_FIELD[j] of word i
WORD_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every field
TOP_BITS = {2: 0xAA, 4: 0x88, 8: 0x80}  # of every field in a byte


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One weight matrix [N, K], or several concatenated along N.

    Attributes:
        codes: [N, K / codes_per_byte]; as in `QuantWeight`.
        scales: "group" [N, K/group_size], "channel" [N, 1], "tensor" [], "block" [ceil(N/block[0]), ceil(K/block[1])];
            None if unquantized.
        zeros: [N, groups] in the dtype of scales, or None.
        g_idx: [K]; group of every column, if it is not k // group_size.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    format: WeightFormat
    scale_layout: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    g_idx: torch.Tensor | None = None

    @property
    def N(self) -> int:
        return self.codes.shape[0]

    @property
    def K(self) -> int:
        return self.codes.shape[1] * self.format.codes_per_byte


def fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., bytes] uint8, or [..., words] int32, contiguous -> [..., fields] uint8, lowest bits first."""
    octets = packed.view(torch.uint8)
    if bits == 8:
        return octets
    mask = (1 << bits) - 1
    out = torch.empty(*octets.shape, 8 // bits, dtype=torch.uint8)
    for j in range(8 // bits):
        torch.bitwise_and(octets >> (bits * j), mask, out=out[..., j])
    return out.flatten(-2)


# Every tensor that a linear of a packing may have, without bias and scales of activations.
TENSORS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "dense": ("weight", "weight_scale_inv", "weight_scale", "weight_zero_point"),
}


def required(scheme: Scheme | None) -> list[tuple[str, ...]]:
    """Tensors that a linear of a scheme (None: unquantized) has, the main one first; one of each tuple is enough."""
    if scheme is None:
        return [("weight",)]
    if scheme.packing in ("gptq", "awq"):
        return [("qweight",), ("qzeros",), ("scales",)]
    zeros = [("weight_zero_point",)] if FORMATS[scheme.format].asym else []
    if scheme.packing == "compressed":
        return [("weight_packed",), ("weight_scale",), ("weight_shape",), *zeros]
    return [("weight",), ("weight_scale_inv", "weight_scale"), *zeros]


def decode(scheme: Scheme, tensors: Tensors, describe: Describe = str) -> Matrix:
    """Decode the tensors of one linear.

        w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]        g = g_idx[k] or k // group_size

    Args:
        tensors: by their names without the module ("qweight", "weight_scale", ...).
        describe: such a name -> what to call it in messages.
    Raises: ValueError for shapes and dtypes that are not those of the scheme, naming the tensor.

    Vectorised over bytes; the largest temporary is a copy of the codes ([N, K] uint8 for AWQ).
    """
    readers = {"gptq": _gptq, "awq": _awq, "compressed": _compressed, "dense": _dense}
    return readers[scheme.packing](_Reader(scheme, tensors, describe))


def plain(weight: torch.Tensor, describe: str = "weight") -> Matrix:
    """An unquantized matrix [N, K] in bf16 or fp16."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if weight.ndim != 2 or weight.dtype not in names:
        raise ValueError(
            f"{describe} is {tuple(weight.shape)} {weight.dtype}; expected [N, K] in bf16 or fp16, which a "
            f'QuantWeight can hold. Pass convert=, for instance lambda w: quantize(w, "bf16"), to say what it becomes.'
        )
    return Matrix(weight, None, None, FORMATS[names[weight.dtype]], "none")


class _Reader:
    """Checked access to the tensors of one linear."""

    def __init__(self, scheme: Scheme, tensors: Tensors, describe: Describe) -> None:
        self.scheme, self.tensors, self.describe = scheme, tensors, describe
        self.format = FORMATS[scheme.format]
        self.per_word = 32 // self.format.bits

    def get(self, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A matrix of one of these dtypes, of this shape if one is given."""
        t = self.tensors.get(name)
        if t is None:
            raise ValueError(f"{self.describe(name)} is missing; {self.scheme.method} needs it.")
        if t.dtype not in dtypes or (t.ndim != 2 if shape is None else tuple(t.shape) != shape):
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            sizes = "a matrix" if shape is None else str(shape)
            raise ValueError(
                f"{self.describe(name)} is {tuple(t.shape)} {t.dtype}; expected {sizes} in {kinds} for "
                f"{self.scheme}. The quantization config does not describe this tensor."
            )
        return t

    def groups(self, name: str, k: int) -> int:
        """Groups in a row of K codes."""
        if self.scheme.scale_layout == "channel":
            return 1
        check_group_size(self.describe(name), self.format, k, self.scheme.group_size)
        return k // (self.scheme.group_size or k)

    def matrix(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None = None
    ) -> Matrix:
        s = self.scheme
        return Matrix(codes, scales, zeros, self.format, s.scale_layout, s.group_size, s.block, g_idx)

    def signed(self, codes: torch.Tensor) -> torch.Tensor:
        """Unsigned codes, less the zero point 2^(b-1) in a symmetric format."""
        return codes if self.format.asym else codes ^ TOP_BITS[self.format.bits]

    def zeros(self, stored: torch.Tensor, scales: torch.Tensor, name: str) -> torch.Tensor | None:
        """Fields [G, at least N] -> [N, G] in the dtype of scales; None in a symmetric format."""
        bits = self.format.bits
        zeros = stored[:, : scales.shape[0]].t()
        if self.scheme.zeros == "field-1":
            zeros = zeros.to(torch.int16) + 1
        if self.format.asym:
            return zeros.to(scales.dtype).contiguous()
        if not bool((zeros == 1 << (bits - 1)).all()):
            raise ValueError(
                f"{self.describe(name)} holds zero points from {int(zeros.min())} to {int(zeros.max())}; the config "
                f"says symmetric, which means {1 << (bits - 1)} everywhere. Set it to asymmetric there if the zero "
                f"points are meant."
            )
        return None

    def no_zeros(self, name: str) -> None:
        """Signed zero points of a symmetric scheme, which some writers store, are 0."""
        t = self.tensors.get(name)
        if t is not None and bool((t.float() != 0).any()):
            raise ValueError(
                f"{self.describe(name)} holds zero points other than 0; the config says symmetric. Set it to "
                f"asymmetric there if the zero points are meant."
            )

    def g_idx(self, name: str, k: int, groups: int) -> torch.Tensor | None:
        """Group of every column; None if there is no such tensor or it is k // group_size."""
        t = self.tensors.get(name)
        if t is None or self.scheme.scale_layout != "group":
            return None
        g_idx = self.get(name, (torch.int32, torch.int64), (k,)).long()
        if name == "weight_g_idx" and bool((g_idx == -1).all()):  # compressed-tensors: not in use
            return None
        size = k // groups
        if torch.equal(g_idx, torch.arange(k) // size):
            return None
        if bool(((g_idx < 0) | (g_idx >= groups)).any()):
            raise ValueError(
                f"{self.describe(name)} holds groups from {int(g_idx.min())} to {int(g_idx.max())}; expected 0 to "
                f"{groups - 1}, for K={k} and group_size={size}."
            )
        counts = torch.bincount(g_idx, minlength=groups)
        if bool((counts != size).any()):
            g = int((counts != size).nonzero()[0])
            raise ValueError(
                f"{self.describe(name)} puts {int(counts[g])} columns into group {g}; expected {size} in every group: "
                f"columns are sorted into consecutive groups of group_size. Quantize with static groups, or a K that "
                f"is a multiple of group_size."
            )
        return g_idx


def _gptq(r: _Reader) -> Matrix:
    words = r.get("qweight", (torch.int32,))
    k, n = words.shape[0] * r.per_word, words.shape[1]
    groups = r.groups("qweight", k)
    scales = r.get("scales", SCALE_DTYPES, (groups, n)).t().contiguous()
    stored = r.get("qzeros", (torch.int32,), (groups, -(-n // r.per_word))).contiguous()
    if r.scheme.zeros == "word-1":
        stored = stored + WORD_ONES[r.format.bits]  # int32 wraps
    zeros = r.zeros(fields(stored, r.format.bits), scales, "qzeros")
    codes = words.t().contiguous().view(torch.uint8)
    return r.matrix(r.signed(codes), scales, zeros, r.g_idx("g_idx", k, groups))


def _awq(r: _Reader) -> Matrix:
    words = r.get("qweight", (torch.int32,))
    k, n = words.shape[0], words.shape[1] * r.per_word
    groups = r.groups("qweight", k)
    scales = r.get("scales", SCALE_DTYPES, (groups, n)).t().contiguous()
    stored = r.get("qzeros", (torch.int32,), (groups, n // r.per_word))
    zeros = r.zeros(_awq_columns(stored).permute(1, 2, 0).flatten(1), scales, "qzeros")
    columns = _awq_columns(words)  # [8, K, N/8]
    pairs = columns[:, 0::2] | (columns[:, 1::2] << 4)
    return r.matrix(r.signed(pairs.permute(2, 0, 1).reshape(n, k // 2)), scales, zeros)


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """[rows, words] int32 -> [8, rows, words] uint8: column 8i+j of a row is [j, row, i]."""
    octets = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return torch.stack([(octets[..., field // 2] >> (4 * (field % 2))) & 15 for field in AWQ_FIELD])


def _compressed(r: _Reader) -> Matrix:
    words = r.get("weight_packed", (torch.int32,))
    shape = r.get("weight_shape", (torch.int64, torch.int32), (2,))
    n, k = (int(size) for size in shape)
    r.get("weight_packed", (torch.int32,), (n, -(-k // r.per_word)))
    if k % r.format.codes_per_byte:
        raise ValueError(
            f"{r.describe('weight_shape')}: K={k}; {r.format.name} needs a multiple of {r.format.codes_per_byte}."
        )
    groups = r.groups("weight_packed", k)
    scales = r.get("weight_scale", SCALE_DTYPES, (n, groups)).contiguous()
    zeros = None
    if not r.format.asym:
        r.no_zeros("weight_zero_point")
    else:
        packed = r.get("weight_zero_point", (torch.int32,), (-(-n // r.per_word), groups))
        zeros = r.zeros(fields(packed.t().contiguous(), r.format.bits), scales, "weight_zero_point")
    codes = words.contiguous().view(torch.uint8)[:, : r.format.packed_k(k)]
    return r.matrix(r.signed(codes), scales, zeros, r.g_idx("weight_g_idx", k, groups))


def _dense(r: _Reader) -> Matrix:
    integer = r.format.kind == "int"
    weight = r.get("weight", (torch.int8 if integer else r.format.storage,)).contiguous()
    n, k = weight.shape
    name = "weight_scale_inv" if "weight_scale_inv" in r.tensors else "weight_scale"
    scales = _dense_scales(r, name, n, k)
    if not r.format.asym:
        r.no_zeros("weight_zero_point")
        return r.matrix(weight.view(torch.uint8) if integer else weight, scales, None)
    stored = r.get("weight_zero_point", (torch.int8,), tuple(scales.shape))
    return r.matrix(weight.view(torch.uint8) ^ 0x80, scales, (stored.to(torch.int16) + 128).to(scales.dtype))


def _dense_scales(r: _Reader, name: str, n: int, k: int) -> torch.Tensor:
    """Scales of [N, K] in the shape that `Matrix` has for the scheme's layout."""
    s = r.scheme
    if s.scale_layout == "tensor":
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    elif s.block is not None:
        shapes = [(-(-n // s.block[0]), -(-k // s.block[1]))]
    else:
        groups = r.groups("weight", k)
        shapes = [(n, groups), (n * groups,)]
    t = r.tensors.get(name)
    shape = next((shape for shape in shapes if t is not None and tuple(t.shape) == shape), shapes[0])
    scales = r.get(name, (*SCALE_DTYPES, torch.float8_e8m0fnu), shape)
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.float()  # powers of two: exact
    return scales.reshape(shapes[0]).contiguous()


def concatenate(parts: Sequence[Matrix], names: Sequence[str]) -> Matrix:
    """Matrices of one K and one kind on top of each other; scales of whole matrices become scales of rows.

    Args:
        names: what to call each part in messages.
    Raises: ValueError if formats, groups or sizes differ; UnsupportedError if g_idx differ, since the matrices read
        the same input in one order.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part, name in zip(parts[1:], names[1:], strict=True):
        if kind(part) != kind(first):
            raise ValueError(
                f"{name} is {kind(part)}; expected {kind(first)}, as {names[0]} is, with which it is concatenated. "
                f"Quantize both alike."
            )
        a, b = first.g_idx, part.g_idx
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
            raise UnsupportedError(
                name,
                f"a g_idx other than that of {names[0]}, with which it is concatenated",
                {"checkpoints": "both multiply the same input in one order; quantize without desc_act"},
                answer="cannot read",
            )
    if first.scale_layout == "tensor":
        parts = [_tensor_to_channel(part) for part in parts]
    elif first.block is not None and any(part.N % first.block[0] for part in parts[:-1]):
        parts = [block_to_group(part, name) for part, name in zip(parts, names, strict=True)]

    def cat(field: str) -> torch.Tensor | None:
        tensors = [getattr(part, field) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    codes = cat("codes")
    assert codes is not None
    return dataclasses.replace(parts[0], codes=codes, scales=cat("scales"), zeros=cat("zeros"))


def kind(m: Matrix) -> str:
    """What matrices must have in common to be concatenated."""
    scales = "no scales" if m.scales is None else f"{m.scale_layout} scales in {m.scales.dtype}".replace("torch.", "")
    group = "" if m.group_size is None else f", group_size={m.group_size}"
    block = "" if m.block is None else f", block={m.block}"
    return f"{m.format.name}, K={m.K}, {scales}{group}{block}"


def reorder_rows(m: Matrix, rows: Callable[[torch.Tensor], torch.Tensor], describe: str) -> Matrix:
    """rows([N, ...]) of everything that has rows."""
    if m.block is not None:
        m = block_to_group(m, describe)
    by_row = {"codes": rows(m.codes.view(torch.uint8)).view(m.codes.dtype)}  # float8 cannot be indexed
    for name in ("scales", "zeros"):
        t = getattr(m, name)
        if t is not None and m.scale_layout != "tensor":
            by_row[name] = rows(t)
    for name, t in by_row.items():
        if t.shape != getattr(m, name).shape:
            raise ValueError(
                f"{describe}: rows() returned {tuple(t.shape)} for {tuple(getattr(m, name).shape)}; expected a "
                f"permutation of the first dimension."
            )
    return dataclasses.replace(m, **by_row)


def sort_columns(m: Matrix) -> tuple[Matrix, torch.Tensor | None]:
    """Columns in the order in which groups are consecutive, and that order: [K] int32, None if nothing moves.

    Exact: codes move, and no value changes. Stable, so that columns of a group keep their order.
    """
    if m.g_idx is None:
        return m, None
    order = torch.argsort(m.g_idx, stable=True)
    bits, count = m.format.bits, m.format.codes_per_byte
    columns = m.codes.t().contiguous()  # columns as rows: whole rows move several times faster than single bytes
    wide = torch.stack([(columns >> (bits * j)) & ((1 << bits) - 1) for j in range(count)], 1).flatten(0, 1)  # [K, N]
    moved = wide.index_select(0, order)
    codes = torch.zeros_like(columns)
    for j in range(count):
        codes |= moved[j::count] << (bits * j)
    codes = codes.t().contiguous()
    return dataclasses.replace(m, codes=codes, g_idx=None), order.to(torch.int32)


def finish(m: Matrix, describe: str) -> Matrix:
    """The same matrix with scales in a layout that `QuantWeight` has."""
    if m.block is None:
        return m
    if m.block != (BLOCK, BLOCK):
        return block_to_group(m, describe)
    return dataclasses.replace(m, scale_layout="block128", block=None)


def block_to_group(m: Matrix, describe: str) -> Matrix:
    """Scales of blocks of rows repeated for every row: the same weights, with groups of block[1]."""
    assert m.block is not None and m.scales is not None
    rows, size = m.block
    if m.K % size:
        raise UnsupportedError(
            describe,
            f"blocks of {rows} x {size} in a matrix [{m.N}, {m.K}]",
            {"checkpoints": f"scales are repeated row by row here, which needs K to be a multiple of {size}"},
            answer="cannot read",
        )
    scales = m.scales.repeat_interleave(rows, 0)[: m.N].contiguous()
    return dataclasses.replace(m, scales=scales, scale_layout="group", group_size=size, block=None)


def _tensor_to_channel(m: Matrix) -> Matrix:
    assert m.scales is not None
    return dataclasses.replace(m, scales=m.scales.expand(m.N, 1).contiguous(), scale_layout="channel")
