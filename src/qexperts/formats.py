"""Weight formats and the record of a quantized weight. Records only: no arithmetic on values lives here."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch

__all__ = ["FORMATS", "SCALE_DTYPES", "SCALE_LAYOUTS", "QuantWeight", "WeightFormat", "get_format"]

SCALE_LAYOUTS: tuple[str, ...] = ("group", "channel", "tensor", "block128")
SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
RELEASED = "released"
WEIGHT_LAYOUTS: tuple[str, ...] = ("public", "tiles", "panels")
BLOCK = 128  # of scale_layout "block128": 128 x 128 weights share a scale


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How the weights of one projection are stored; see `FORMATS`.

        w = (code - zero) * scale

    Attributes:
        name: key in `FORMATS`.
        kind: "float" (unquantized), "int" (packed integer codes) or "fp8".
        bits: bits of one code.
        asym: integer codes are unsigned and come with zero points.
        storage: dtype of `QuantWeight.codes`.
        code_min, code_max: range of integer codes; for fp8 the largest finite magnitude.
    """

    name: str
    kind: Literal["float", "int", "fp8"]
    bits: int
    asym: bool
    storage: torch.dtype
    code_min: int
    code_max: int

    @property
    def quantized(self) -> bool:
        return self.kind != "float"

    @property
    def codes_per_byte(self) -> int:
        """Integer codes in one stored element; 1 for every other format."""
        return 8 // self.bits if self.kind == "int" else 1

    def packed_k(self, k: int) -> int:
        """Stored elements along k."""
        return k // self.codes_per_byte


def _int(bits: int, asym: bool) -> WeightFormat:
    lo, hi = (0, 2**bits - 1) if asym else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return WeightFormat(f"int{bits}_{'asym' if asym else 'sym'}", "int", bits, asym, torch.uint8, lo, hi)


FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        f.name: f
        for f in (
            WeightFormat("bf16", "float", 16, False, torch.bfloat16, 0, 0),
            WeightFormat("fp16", "float", 16, False, torch.float16, 0, 0),
            *(_int(bits, asym) for bits in (8, 4, 2) for asym in (False, True)),
            WeightFormat("fp8_e4m3", "fp8", 8, False, torch.float8_e4m3fn, -448, 448),
            WeightFormat("fp8_e5m2", "fp8", 8, False, torch.float8_e5m2, -57344, 57344),
        )
    }
)


def get_format(name: str | WeightFormat) -> WeightFormat:
    """Look a format up; ValueError lists the known ones."""
    if isinstance(name, WeightFormat):
        return name
    if name not in FORMATS:
        raise ValueError(f"format: {name!r} is unknown; expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclasses.dataclass(frozen=True, eq=False)
class QuantWeight:
    """E matrices of logical shape [N, K], stored in one format.

    Attributes:
        codes: [E, N, K / codes_per_byte]; storage dtype of the format. int4: low nibble = lower k; int2: bits
            2j, 2j+1 = k 4i+j; int8_sym: the byte reinterpreted as int8. May be a strided view for
            scale_layout "tensor".
        scales: fp16, bf16 or fp32, independent of the activations; any sign, zero allowed; None if unquantized.
            "group" [E, N, K/group_size]; "channel" [E, N, 1]; "tensor" [E];
            "block128" [E, ceil(N/128), ceil(K/128)].
        zeros: integers 0..2^bits inclusive in the dtype and shape of scales; asym formats only, else None.
        format: the `WeightFormat`, or its name.
        group_size: consecutive k sharing a scale; K for "channel"; None for the layouts without groups.
        scale_layout: one of `SCALE_LAYOUTS`; "none" if unquantized.
        weight_layout: "public" (the shapes above), "tiles" or "panels" (see `layouts.py`): codes in another order;
            scales [E, groups, N], int32 or fp32 in "tiles", scale_dtype in "panels"; zeros like them, or inside the
            int32 words.
        scale_dtype: dtype of the scales a public weight has; to be given for any other layout.

    Raises: ValueError if shapes, dtypes, devices or options disagree. Values are not read: no host sync.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    format: WeightFormat
    group_size: int | None = None
    scale_layout: str = "group"
    weight_layout: str = "public"
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        if not self.format.quantized:
            object.__setattr__(self, "scale_layout", "none")
            object.__setattr__(self, "group_size", None)
        if self.scale_layout == "channel" and self.codes.ndim == 3:
            object.__setattr__(self, "group_size", self.K)
        if self.weight_layout == "public" and self.scales is not None:
            object.__setattr__(self, "scale_dtype", self.scales.dtype)
        _check(self)

    @property
    def E(self) -> int:
        return self.codes.shape[0]

    @property
    def N(self) -> int:
        return self.codes.shape[1]

    @property
    def K(self) -> int:
        return self.codes.shape[2] * self.format.codes_per_byte

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Codes, then scales and zeros as far as this weight has them; see `with_tensors`."""
        return tuple(t for t in (self.codes, self.scales, self.zeros) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def n_is_contiguous(self) -> bool:
        """Whether the codes lie as [E, K, N] in memory: a strided view, dequantized in that same order."""
        return self.codes.stride(-1) != 1 and self.codes.stride(-2) == 1

    @property
    def whole_words(self) -> bool:
        """Whether rows of codes are contiguous and start on multiples of 4 bytes."""
        *apart, k = self.codes.stride()
        size = self.codes.element_size()
        return k == 1 and all(step * size % 4 == 0 for step in (*apart, self.codes.storage_offset()))

    @property
    def code_order(self) -> str:
        """ "rows" if each row of codes is contiguous, "columns" if each column is, else "strided"."""
        if self.codes.stride(-1) == 1 or self.codes.shape[-1] == 1:
            return "rows"
        return "columns" if self.codes.stride(-2) == 1 else "strided"

    def check_alive(self, where: str) -> None:
        """Raise ValueError if another weight has taken the memory over (see `release`)."""
        if self.weight_layout == RELEASED:
            raise ValueError(
                f"{where}: this weight has been released by prepare(); use what prepare() returned, or "
                f"keep_source=True."
            )

    def release(self) -> None:
        """Give up the tensors, because another weight has taken their memory over. Using this weight then raises."""
        for name in ("codes", "scales", "zeros"):
            t = getattr(self, name)
            if t is not None:
                object.__setattr__(self, name, t.to("meta"))
        object.__setattr__(self, "weight_layout", RELEASED)

    def experts(self, start: int, stop: int) -> QuantWeight:
        """Experts start..stop-1 as a view of this weight."""
        return self._map(lambda t: t[start:stop])

    def select(self, experts: torch.Tensor) -> QuantWeight:
        """A copy of the listed experts (with repeats); experts: [B] int32 or int64 on the weight's device."""
        return self._map(lambda t: index_experts(t, experts))

    def with_tensors(self, *tensors: torch.Tensor) -> QuantWeight:
        """The same kind of weight over other tensors, in the order of `tensors`.

        Raises: ValueError if they do not fit each other.
        """
        it = iter(tensors)
        mapped = self._map(lambda t: next(it))
        if mapped.weight_layout == "public" and mapped.scales is not None:
            object.__setattr__(mapped, "scale_dtype", mapped.scales.dtype)
        _check(mapped)
        return mapped

    def to(self, device: torch.device | str) -> QuantWeight:
        """The same weight on another device; dtypes stay as they are."""
        if isinstance(device, torch.dtype):
            raise ValueError(f"QuantWeight.to: {device}; expected a device: casting codes would change the weight.")
        target = torch.device(device)
        return self._map(lambda t: t.to(target))

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> QuantWeight:
        """Apply fn to every tensor. The result has the same N and K, so it needs no second check."""
        new = object.__new__(QuantWeight)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(new, field.name, fn(value) if isinstance(value, torch.Tensor) else value)
        return new

    def __repr__(self) -> str:
        scales = "none" if self.scales is None else f"{str(self.scale_dtype).removeprefix('torch.')}"
        group = f", group_size={self.group_size}" if self.scale_layout == "group" else ""
        return (
            f"QuantWeight({self.format.name}, E={self.E}, N={self.N}, K={self.K}, scales={self.scale_layout} {scales}"
            f"{group}, layout={self.weight_layout}, device={self.device})"
        )


def weight_fields(
    w: QuantWeight,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, str, int | None, str, str, torch.dtype | None]:
    """The fields of a weight as an operator takes them: QuantWeight(*weight_fields(w)) is w."""
    return w.codes, w.scales, w.zeros, w.format.name, w.group_size, w.scale_layout, w.weight_layout, w.scale_dtype


def index_experts(t: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """index_select over dim 0 that also takes float8, which torch indexes on no device as such."""
    if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return t.view(torch.uint8).index_select(0, experts).view(t.dtype)
    return t.index_select(0, experts)


def scales_shape(layout: str, e: int, n: int, k: int, group_size: int | None) -> tuple[int, ...]:
    """Shape of scales (and zeros) for E matrices [N, K]."""
    if layout == "tensor":
        return (e,)
    if layout == "block128":
        return (e, -(-n // BLOCK), -(-k // BLOCK))
    return (e, n, 1 if layout == "channel" else k // (group_size or k))


def check_group_size(where: str, fmt: WeightFormat, k: int, group_size: int | None) -> None:
    """Raise ValueError unless group_size divides K into whole bytes of codes."""
    unit = fmt.codes_per_byte
    if not isinstance(group_size, numbers.Integral) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"{where}: group_size is {group_size!r}; expected a positive integer that divides K={k}.")
    if k % group_size:
        raise ValueError(f"{where}: K={k} is not a multiple of group_size={group_size}; use a divisor of K, or K.")
    if group_size % unit:
        raise ValueError(
            f"{where}: group_size={group_size}; {fmt.name} packs {unit} codes a byte, so a group must be a multiple "
            f"of {unit}."
        )


def check_sizes(where: str, fmt: WeightFormat, n: int, k: int) -> None:
    """Raise ValueError for N or K that no backend can take."""
    if n < 16 or n % 16:
        raise ValueError(f"{where}: N={n}; N must be a positive multiple of 16. Pad the weight's output rows.")
    if k < 1 or k % fmt.codes_per_byte:
        raise ValueError(f"{where}: K={k}; {fmt.name} needs a positive multiple of {fmt.codes_per_byte}.")


def _check(w: QuantWeight) -> None:
    where = f"QuantWeight({w.format.name})"
    if w.codes.ndim != 3:
        raise ValueError(f"{where}: codes is {tuple(w.codes.shape)}; expected [E, N, K / {w.format.codes_per_byte}].")
    if w.codes.dtype != w.format.storage:
        raise ValueError(f"{where}: codes is {w.codes.dtype}; expected {w.format.storage}.")
    if w.weight_layout not in WEIGHT_LAYOUTS:
        raise ValueError(f"{where}: weight_layout is {w.weight_layout!r}; expected one of {', '.join(WEIGHT_LAYOUTS)}.")
    if w.E < 1:
        raise ValueError(f"{where}: codes has no experts; expected [E, N, K] with E >= 1.")
    check_sizes(where, w.format, w.N, w.K)
    if not w.format.quantized:
        if w.scales is not None or w.zeros is not None:
            raise ValueError(f"{where}: scales and zeros must be None for an unquantized format.")
        return
    if w.scale_layout not in SCALE_LAYOUTS:
        raise ValueError(f"{where}: scale_layout is {w.scale_layout!r}; expected one of {', '.join(SCALE_LAYOUTS)}.")
    if w.format.asym and w.scale_layout not in ("group", "channel"):
        raise ValueError(f"{where}: scale_layout {w.scale_layout!r} has no zero points; use a symmetric format.")
    if w.scale_layout in ("group", "channel"):
        check_group_size(where, w.format, w.K, w.group_size)
    elif w.group_size is not None:
        raise ValueError(f"{where}: group_size is {w.group_size}; scale_layout {w.scale_layout!r} takes None.")
    if w.weight_layout != "public":
        return _check_words(where, w)
    _check_parameter(where, w, "scales", w.scales, SCALE_DTYPES)
    if w.format.asym:
        _check_parameter(where, w, "zeros", w.zeros, (w.scales.dtype,) if w.scales is not None else SCALE_DTYPES)
    elif w.zeros is not None:
        raise ValueError(f"{where}: zeros given; a symmetric or fp8 format has none. Drop them or use an asym format.")


def _check_words(where: str, w: QuantWeight) -> None:
    """Scales and zeros of the layouts "tiles" and "panels"."""
    if w.scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"{where}: scale_dtype is {w.scale_dtype}; expected one of {SCALE_DTYPES}.")
    apart = w.weight_layout == "panels" or w.scale_dtype == torch.float32
    dtype = w.scale_dtype if apart else torch.int32
    groups = scales_shape(w.scale_layout, w.E, w.N, w.K, w.group_size)[2] if w.scale_layout != "tensor" else 1
    shape = (w.E, groups, w.N)
    _check_parameter(where, w, "scales", w.scales, (dtype,), shape)
    if w.format.asym and apart:
        _check_parameter(where, w, "zeros", w.zeros, (dtype,), shape)
    elif w.zeros is not None:
        kept = "they are in the words of the scales" if w.format.asym else "a symmetric or fp8 format has none"
        raise ValueError(f"{where}: zeros given; {kept}.")


def _check_parameter(
    where: str,
    w: QuantWeight,
    name: str,
    t: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None = None,
) -> None:
    shape = shape or scales_shape(w.scale_layout, w.E, w.N, w.K, w.group_size)
    if t is None:
        raise ValueError(f"{where}: {name} missing; expected {shape} in {' or '.join(map(str, dtypes))}.")
    if t.dtype not in dtypes:
        raise ValueError(f"{where}: {name} is {t.dtype}; expected {' or '.join(map(str, dtypes))}.")
    if tuple(t.shape) != shape:
        raise ValueError(
            f"{where}: {name} is {tuple(t.shape)}; expected {shape} for scale_layout={w.scale_layout!r}, E={w.E}, "
            f"N={w.N}, K={w.K}, group_size={w.group_size}."
        )
    if t.device != w.codes.device:
        raise ValueError(f"{where}: {name} is on {t.device}, codes on {w.codes.device}; put them on one device.")
