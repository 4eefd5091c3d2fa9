"""Bits, codes and scales: exact examples by hand, then properties against arithmetic in fp64 and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qexperts import FORMATS, QuantWeight, dequantize, pack, quantize, unpack
from qexperts.quantize import dequantize_into

INT_FORMATS = [name for name, fmt in FORMATS.items() if fmt.kind == "int"]
SYM_FORMATS = [name for name in INT_FORMATS if name.endswith("_sym")]
ASYM_FORMATS = [name for name in INT_FORMATS if name.endswith("_asym")]
FP8_FORMATS = [name for name, fmt in FORMATS.items() if fmt.kind == "fp8"]
QUANTIZED = INT_FORMATS + FP8_FORMATS
SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]

# What DESIGN 2 divides by, and the codes a quantizer may give.
DIVISOR = {"int8_sym": 127, "int4_sym": 7, "int2_sym": 2, "int8_asym": 255, "int4_asym": 15, "int2_asym": 3}
DIVISOR |= {"fp8_e4m3": 448, "fp8_e5m2": 57344}
CODES = {"int8_sym": (-127, 127), "int4_sym": (-8, 7), "int2_sym": (-2, 1)}
CODES |= {"int8_asym": (0, 255), "int4_asym": (0, 15), "int2_asym": (0, 3)}
BITS = {name: int(name[3]) for name in INT_FORMATS}
SMALLEST = {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149}  # log2 of the smallest positive value


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def codes_of(weight: QuantWeight) -> torch.Tensor:
    """[E, N, K] of the codes' values; fp64."""
    if weight.format.kind != "int":
        return weight.codes.to(torch.float64)
    bits, k = weight.format.bits, torch.arange(weight.K)
    per_byte = 8 // bits
    byte = weight.codes.to(torch.int64)[..., k // per_byte]
    value = (byte >> (k % per_byte * bits)) & (2**bits - 1)
    if not weight.format.asym:
        value = torch.where(value >= 2 ** (bits - 1), value - 2**bits, value)
    return value.to(torch.float64)


def per_weight(t: torch.Tensor, weight: QuantWeight) -> torch.Tensor:
    """Scales or zeros, one for each weight: [E, N, K]; fp64. By the definition of each layout."""
    n, k = torch.arange(weight.N)[:, None], torch.arange(weight.K)[None, :]
    t = t.to(torch.float64)
    match weight.scale_layout:
        case "group":
            return t[:, n, k // weight.group_size]  # type: ignore[operator]
        case "channel":
            return t[:, n, k * 0]
        case "tensor":
            return t[:, None, None].expand(weight.E, weight.N, weight.K)
        case _:
            return t[:, n // 128, k // 128]


def exact(weight: QuantWeight) -> torch.Tensor:
    """(code - zero) * scale in fp64, which is exact for fp16 and bf16 scales."""
    codes = codes_of(weight)
    if weight.zeros is not None:
        codes = codes - per_weight(weight.zeros, weight)
    return codes if weight.scales is None else codes * per_weight(weight.scales, weight)


def one_group(
    values: list[float], fmt: str, scale_dtype: torch.dtype = torch.float32
) -> tuple[list[float], float, float]:
    """Codes, scale and zero of a single group (the same in each of 16 rows)."""
    w = torch.tensor(values, dtype=torch.float32).expand(1, 16, len(values))
    weight = quantize(w, fmt, group_size=len(values), scale_dtype=scale_dtype)
    codes = codes_of(weight)[0]
    assert (codes == codes[0]).all(), f"equal rows got different codes:\n{codes}"
    assert weight.scales is not None and weight.scales.dtype == scale_dtype
    zero = 0.0 if weight.zeros is None else float(weight.zeros[0, 0, 0])
    return codes[0].tolist(), float(weight.scales[0, 0, 0]), zero


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- packing


@pytest.mark.parametrize(
    ("fmt", "values", "packed"),
    [
        ("int4_asym", [1, 2], [0x21]),
        ("int4_asym", [15, 0, 0, 15], [0x0F, 0xF0]),
        ("int4_sym", [1, 2], [0x21]),
        ("int4_sym", [-8, 7], [0x78]),
        ("int4_sym", [-1, -2], [0xEF]),
        ("int2_asym", [0, 1, 2, 3], [0xE4]),
        ("int2_asym", [3, 2, 1, 0], [0x1B]),
        ("int2_sym", [-2, -1, 0, 1], [0x4E]),
        ("int2_sym", [1, 0, 0, 0, 0, 0, 0, -1], [0x01, 0xC0]),
        ("int8_sym", [-128, -127, -1, 0, 127], [0x80, 0x81, 0xFF, 0x00, 0x7F]),
        ("int8_asym", [0, 127, 128, 255], [0x00, 0x7F, 0x80, 0xFF]),
    ],
    ids=str,
)
def test_bit_positions(fmt: str, values: list[int], packed: list[int]) -> None:
    codes = pack(torch.tensor(values, dtype=torch.int16), fmt)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == packed
    assert unpack(codes, fmt).tolist() == values


@pytest.mark.parametrize("fmt", INT_FORMATS)
def test_every_code_survives_in_every_place(fmt: str) -> None:
    low, high = FORMATS[fmt].code_min, FORMATS[fmt].code_max
    per_byte = 8 // BITS[fmt]
    every = torch.arange(low, high + 1, dtype=torch.int16)
    assert len(every) == 2 ** BITS[fmt]
    for place in range(per_byte):
        values = torch.full((len(every), per_byte), high, dtype=torch.int16)
        values[:, place] = every
        assert torch.equal(unpack(pack(values, fmt), fmt), values), f"place {place}"


@pytest.mark.parametrize("fmt", INT_FORMATS)
def test_every_byte_survives(fmt: str) -> None:
    bytes_ = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(2, 4, 32)
    values = unpack(bytes_, fmt)
    assert values.shape == (2, 4, 32 * 8 // BITS[fmt]) and values.dtype == torch.int16
    assert values.min() == FORMATS[fmt].code_min and values.max() == FORMATS[fmt].code_max
    assert torch.equal(pack(values, fmt), bytes_)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("fmt", SYM_FORMATS)
def test_pack_takes_any_integer_dtype(fmt: str, dtype: torch.dtype) -> None:
    values = torch.tensor([-2, -1, 0, 1], dtype=dtype)
    assert torch.equal(unpack(pack(values, fmt), fmt).to(dtype), values)


def test_pack_takes_uint8_for_unsigned_codes() -> None:
    assert pack(torch.tensor([15, 8], dtype=torch.uint8), "int4_asym").tolist() == [0x8F]


@pytest.mark.parametrize(("fmt", "k"), [("int4_sym", 3), ("int4_asym", 1), ("int2_sym", 6), ("int2_asym", 2)])
def test_pack_needs_whole_bytes(fmt: str, k: int) -> None:
    with pytest.raises(ValueError, match=rf"pack.*{k}"):
        pack(torch.zeros(2, k, dtype=torch.int16), fmt)


@pytest.mark.parametrize("fmt", ["bf16", "fp16", *FP8_FORMATS])
def test_only_integer_codes_are_packed(fmt: str) -> None:
    with pytest.raises(ValueError, match=fmt):
        pack(torch.zeros(4, dtype=torch.int16), fmt)
    with pytest.raises(ValueError, match=fmt):
        unpack(torch.zeros(4, dtype=torch.uint8), fmt)


# ---- codes, by hand


@pytest.mark.parametrize(
    ("fmt", "values", "codes", "scale", "zero"),
    [
        ("int8_sym", [127, -127, 0.4, 0.6], [127, -127, 0, 1], 1, 0),
        ("int8_sym", [-254, 3, 5.1, -0.9], [-127, 2, 3, 0], 2, 0),
        ("int4_sym", [7, -7, 3.2, -2.7], [7, -7, 3, -3], 1, 0),
        ("int4_sym", [-3.5, 0.3, 0.2, 3], [-7, 1, 0, 6], 0.5, 0),
        ("int2_sym", [2, -2, 0.9, -0.4], [1, -2, 1, 0], 1, 0),
        ("int2_sym", [-8, 5.9, -3, 1], [-2, 1, -1, 0], 4, 0),
        ("int8_asym", [-100, 155, 0, 20.4], [0, 255, 100, 120], 1, 100),
        ("int4_asym", [-5, 10, 0, 2.4], [0, 15, 5, 7], 1, 5),
        ("int2_asym", [-1, 2, 0, 1.2], [0, 3, 1, 2], 1, 1),
        ("int2_asym", [-2, 4, 0.5, 2], [0, 3, 1, 2], 2, 1),
        ("fp8_e4m3", [448, -224, 1, 0.5], [448, -224, 1, 0.5], 1, 0),
        ("fp8_e4m3", [-896, 34.3, 0, 2], [-448, 17.15, 0, 1], 2, 0),
        ("fp8_e5m2", [57344, -1, 3, 0.25], [57344, -1, 3, 0.25], 1, 0),
        ("fp8_e5m2", [28672, -2.2, 0, 0.5], [57344, -4.4, 0, 1], 0.5, 0),
    ],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_codes_by_hand(fmt: str, values: list[float], codes: list[float], scale: float, zero: float) -> None:
    storage = FORMATS[fmt].storage
    expected = torch.tensor(codes).to(storage).double().tolist() if fmt in FP8_FORMATS else codes
    assert one_group(values, fmt) == (expected, scale, zero)


@pytest.mark.parametrize(
    ("fmt", "values", "codes", "scale", "zero"),
    [
        ("int4_asym", [3, 15, 7.2, 4], [3, 15, 7, 4], 1, 0),
        ("int4_asym", [-15, -3, -7.2, -4], [0, 12, 8, 11], 1, 15),
        ("int8_asym", [254, 255, 254.6, 255], [254, 255, 255, 255], 1, 0),
        ("int8_asym", [-255, -254, -254.6, -255], [0, 1, 0, 0], 1, 255),
        ("int2_asym", [9, 8, 9, 9], [3, 3, 3, 3], 3, 0),
        ("int2_asym", [-9, -8, -9, -3], [0, 0, 0, 2], 3, 3),
    ],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_groups_of_one_sign_keep_their_values(
    fmt: str, values: list[float], codes: list[int], scale: float, zero: float
) -> None:
    assert one_group(values, fmt) == (codes, scale, zero)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_all_zero_group(fmt: str, scale_dtype: torch.dtype) -> None:
    w = torch.zeros(2, 16, 32)
    w[1, 3, 16:] = 1.0  # its neighbours stay zero groups
    weight = quantize(w, fmt, group_size=16, scale_dtype=scale_dtype)
    assert weight.scales is not None
    zero_group = torch.ones(2, 16, 2, dtype=torch.bool)
    zero_group[1, 3, 1] = False
    assert (weight.scales[zero_group] == 1).all()
    assert (codes_of(weight).view(2, 16, 2, 16)[zero_group] == 0).all()
    if weight.zeros is not None:
        assert (weight.zeros[zero_group] == 0).all()
    assert (dequantize(weight) == 0).view(2, 16, 2, 16)[zero_group].all()


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_unquantized_formats_only_cast(fmt: str) -> None:
    w = randn(2, 16, 20)
    weight = quantize(w, fmt)
    assert weight.scales is None and weight.zeros is None
    assert torch.equal(weight.codes, w.to(FORMATS[fmt].storage))
    assert torch.equal(dequantize(weight), weight.codes)


# ---- codes, as properties

GROUP = st.lists(st.floats(-1e3, 1e3, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3), min_size=8, max_size=8)


def rounding_of(scale: float, dtype: torch.dtype) -> float:
    """How far a stored scale may be from the ideal one, and a little for fp32 arithmetic."""
    return max(scale * torch.finfo(dtype).eps / 2, 2.0 ** (SMALLEST[dtype] - 1)) + scale * 1e-6


@settings(max_examples=250)
@given(fmt=st.sampled_from(INT_FORMATS), scale_dtype=st.sampled_from(SCALE_DTYPES), values=GROUP)
def test_error_is_at_most_half_a_step(fmt: str, scale_dtype: torch.dtype, values: list[float]) -> None:
    codes, scale, zero = one_group(values, fmt, scale_dtype)
    low, high = CODES[fmt]
    for value, code in zip(torch.tensor(values).tolist(), codes, strict=True):
        assert low <= code <= high, f"code {code} is outside {low}..{high}"
        # A stored scale may be rounded down by half an ulp; the ends of the range then miss by that much a step.
        bound = scale * 0.5 + DIVISOR[fmt] * rounding_of(scale, scale_dtype)
        if fmt == "int2_sym" and value > 0:
            bound *= 2  # +2 does not exist and saturates to +1
        got = (code - zero) * scale
        assert abs(value - got) <= bound, f"{value} became {got} (code {code}, zero {zero}, scale {scale})"


@settings(max_examples=300)
@given(fmt=st.sampled_from(QUANTIZED), scale_dtype=st.sampled_from(SCALE_DTYPES), values=GROUP)
def test_scale_and_codes_follow_the_formula(fmt: str, scale_dtype: torch.dtype, values: list[float]) -> None:
    w = torch.tensor(values).double()
    codes, scale, zero = one_group(values, fmt, scale_dtype)
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    span = high - low if fmt in ASYM_FORMATS else max(high, -low)
    if span == 0:
        return
    ideal = span / DIVISOR[fmt]
    # Twice, because a scale that underflows may be raised by one.
    assert abs(scale - ideal) <= rounding_of(ideal, scale_dtype) * (2 if scale_dtype == torch.float16 else 1)
    if fmt in FP8_FORMATS:
        quotient = (w.float() / scale).clamp(-DIVISOR[fmt], DIVISOR[fmt])
        assert codes == quotient.to(FORMATS[fmt].storage).double().tolist()
        return
    if fmt in ASYM_FORMATS:
        assert 0 <= zero <= CODES[fmt][1] and zero == int(zero)
        assert abs(zero - min(-low / scale, CODES[fmt][1])) <= 0.5 + 1e-4
    for value, code in zip(w.tolist(), codes, strict=True):
        ideal_code = min(max(value / scale + zero, CODES[fmt][0]), CODES[fmt][1])
        assert abs(code - ideal_code) <= 0.5 + 1e-4, f"{value} got code {code}, expected {ideal_code}"


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
def test_int8_sym_never_uses_minus_128(scale_dtype: torch.dtype) -> None:
    w = randn(1, 256, 64) * torch.logspace(-9, 3, 256)[None, :, None]  # fp16 scales underflow at one end
    w[..., ::8] = -w.abs().amax(-1, keepdim=True)
    codes = codes_of(quantize(w, "int8_sym", group_size=64, scale_dtype=scale_dtype))
    assert codes.min() == -127 and codes.max() <= 127


def test_dequantize_handles_code_minus_128() -> None:
    codes = torch.full((1, 16, 16), 0x80, dtype=torch.uint8)
    weight = QuantWeight(codes, torch.full((1, 16, 1), 0.5), None, FORMATS["int8_sym"], 16)
    assert (dequantize(weight) == -64).all()


@pytest.mark.parametrize(("fmt", "low"), [("int4_sym", -8), ("int2_sym", -2)])
def test_dequantize_handles_the_lowest_code(fmt: str, low: int) -> None:
    codes = pack(torch.full((1, 16, 16), low, dtype=torch.int8), fmt)
    weight = QuantWeight(codes, torch.full((1, 16, 1), -0.5), None, FORMATS[fmt], 16)
    assert (dequantize(weight) == -low * 0.5).all()


# ---- scales at the ends of their dtype


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("fmt", INT_FORMATS)
def test_underflowing_scale_is_the_smallest_that_keeps_codes_in_range(
    fmt: str, sign: int, scale_dtype: torch.dtype
) -> None:
    """In units of the smallest positive scale; up to 60 of them, where every scale is an integer."""
    unit, q = 2.0 ** SMALLEST[scale_dtype], DIVISOR[fmt]
    units = torch.arange(1, 16 * (60 * q // 16) + 1).view(1, -1, 1)
    w = torch.cat([units * sign, torch.zeros(1, units.shape[1], 3)], -1).double().mul(unit).float()
    assert torch.equal(w[..., :1].double() / unit, units * sign), "the test's weights must be exact"
    weight = quantize(w, fmt, group_size=4, scale_dtype=scale_dtype)
    assert weight.scales is not None
    scales = (weight.scales.double() / unit).flatten().tolist()
    wrong = []
    for span, scale in zip(units.flatten().tolist(), scales, strict=True):
        stored = round(Fraction(span, q))  # to nearest, ties to even, as IEEE
        largest = Fraction(span, stored) if stored else math.inf
        # Half a step past the last code counts as inside or outside.
        allowed = {stored} if largest < q + 0.5 else {stored, stored + 1} if largest == q + 0.5 else {stored + 1}
        if scale not in allowed:
            wrong.append(f"span {span}: scale {scale}, expected {allowed}")
    assert not wrong, f"{len(wrong)} of {len(scales)}: " + "; ".join(wrong[:5])
    error = (dequantize(weight, torch.float64) - w.double()).abs()
    # A weight of +2 steps saturates to +1 in int2_sym; an asym weight is rounded twice.
    assert (error <= weight.scales.double() * (1.5 if fmt == "int2_sym" else 1)).all()


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", FP8_FORMATS)
def test_underflowing_fp8_scale(fmt: str, scale_dtype: torch.dtype) -> None:
    unit, q = 2.0 ** SMALLEST[scale_dtype], DIVISOR[fmt]
    units = torch.cat([torch.arange(1, 9), torch.arange(1, 9) * (q // 3), torch.arange(q - 40, q + 40)]).view(1, -1, 1)
    w = units.double().mul(unit).float().expand(1, -1, 4).contiguous()
    weight = quantize(w, fmt, group_size=4, scale_dtype=scale_dtype)
    assert weight.scales is not None
    span, scale = units.flatten().double(), weight.scales.double().div(unit).flatten()
    assert (scale >= 1).all(), f"{int((scale < 1).sum())} scales underflowed to zero"
    half_ulp = torch.finfo(FORMATS[fmt].storage).eps / 2 / 1.75 if fmt == "fp8_e5m2" else 16 / 448
    assert (span / scale <= q * (1 + half_ulp)).all(), "a code saturates although its scale could be raised"
    assert ((scale == torch.round(span / q)) | (scale == 1) | (span / (scale - 1) > q)).all(), "raised without need"
    relative = (dequantize(weight, torch.float64) / w.double() - 1).abs()
    assert (relative <= torch.finfo(FORMATS[fmt].storage).eps / 2).all()


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_overflowing_scale_raises(fmt: str) -> None:
    w = torch.zeros(3, 16, 32)
    w[2, 5, 3] = 60000.0 * DIVISOR[fmt] * 2
    with pytest.raises(ValueError, match=r"quantize.*(float16|fp16)") as caught:
        quantize(w, fmt, group_size=16, scale_dtype=torch.float16)
    assert len(str(caught.value).splitlines()) == 1
    assert quantize(w, fmt, group_size=16, scale_dtype=torch.float32).scales is not None


@pytest.mark.parametrize("fmt", ASYM_FORMATS)
def test_range_of_an_asym_group_may_exceed_fp32(fmt: str) -> None:
    """max - min is no fp32, but the scale is."""
    w = torch.tensor([3e38, -3e38, 1e38, 0.0]).expand(1, 16, 4)
    weight = quantize(w, fmt, group_size=4)
    assert weight.scales is not None and weight.scales.isfinite().all()
    error = (dequantize(weight, torch.float64) - w.double()).abs()
    assert (error <= weight.scales.double() * 0.51).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_and_inf_raise_and_name_the_expert(fmt: str, value: float) -> None:
    w = randn(4, 16, 32)
    w[2, 5, 7] = value
    with pytest.raises(ValueError, match=r"quantize.*expert 2") as caught:
        quantize(w, fmt, group_size=16)
    assert len(str(caught.value).splitlines()) == 1


def test_fp16_cast_that_overflows_raises() -> None:
    with pytest.raises(ValueError, match=r"quantize.*(fp16|float16)"):
        quantize(torch.full((1, 16, 16), 1e6), "fp16")


# ---- layouts

LAYOUT_SHAPES = {
    "group": (3, 144, 17),
    "channel": (3, 144, 1),
    "tensor": (3,),
    "block128": (3, 2, 3),
}
LAYOUT_CASES = [
    (fmt, layout)
    for fmt in QUANTIZED
    for layout in LAYOUT_SHAPES
    if not (fmt in ASYM_FORMATS and layout in ("tensor", "block128"))
]


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize(("fmt", "layout"), LAYOUT_CASES)
def test_scale_layouts(fmt: str, layout: str, scale_dtype: torch.dtype) -> None:
    """Ragged on purpose: N = 128 + 16, K = 2 * 128 + 16."""
    w = randn(3, 144, 272) * torch.linspace(0.5, 3, 144)[:, None] * torch.linspace(0.3, 2, 272)
    weight = quantize(w, fmt, group_size=16, scale_layout=layout, scale_dtype=scale_dtype)
    assert weight.scale_layout == layout
    assert weight.scales is not None
    assert weight.scales.shape == LAYOUT_SHAPES[layout] and weight.scales.dtype == scale_dtype
    assert (weight.zeros is not None) == (fmt in ASYM_FORMATS)
    steps = per_weight(weight.scales, weight)
    error = (exact(weight) - w.double()).abs()
    if fmt in INT_FORMATS:
        bound = steps * (0.5 + DIVISOR[fmt] * (torch.finfo(scale_dtype).eps / 2 + 1e-6))
        assert (error <= bound * (2 if fmt == "int2_sym" else 1)).all()
    else:
        assert (error <= torch.maximum(w.double().abs() * 0.126, steps * 0.01)).all()
    # The scale is that of the largest weight of exactly its block, wherever the block ends.
    height, width = {"group": (1, 16), "channel": (1, 272), "tensor": (144, 272), "block128": (128, 128)}[layout]
    for e, n, k in [(0, 0, 0), (1, 143, 271), (2, 127, 128), (0, 128, 127), (1, 128, 256), (2, 15, 255)]:
        n0, k0 = n // height * height, k // width * width
        block = w[e, n0 : n0 + height, k0 : k0 + width].double()
        span = block.max().clamp(min=0) - block.min().clamp(max=0) if fmt in ASYM_FORMATS else block.abs().max()
        ideal = float(span) / DIVISOR[fmt]
        assert abs(float(steps[e, n, k]) - ideal) <= rounding_of(ideal, scale_dtype), f"scale of weight {(e, n, k)}"


@pytest.mark.parametrize("fmt", ASYM_FORMATS)
@pytest.mark.parametrize("layout", ["tensor", "block128"])
def test_asym_needs_groups_or_channels(fmt: str, layout: str) -> None:
    with pytest.raises(ValueError, match=rf"quantize.*{layout}|quantize.*{fmt}"):
        quantize(randn(1, 16, 128), fmt, scale_layout=layout)


@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=name_of)
def test_scale_dtype_defaults_to_that_of_the_weights(dtype: torch.dtype) -> None:
    weight = quantize(randn(1, 16, 32).to(dtype), "int4_asym", group_size=32)
    assert weight.scales is not None and weight.zeros is not None
    assert weight.scales.dtype == weight.zeros.dtype == dtype
    assert dequantize(weight).dtype == dtype


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_strided_weights_give_the_same_codes(fmt: str) -> None:
    w = randn(2, 48, 32).mT
    assert not w.is_contiguous()
    a, b = (quantize(t, fmt, group_size=16) for t in (w, w.contiguous()))
    assert torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
    assert torch.equal(a.scales, b.scales)  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_experts_are_quantized_independently(fmt: str) -> None:
    w = randn(5, 32, 64)
    together = quantize(w, fmt, group_size=32)
    for e in range(5):
        alone = quantize(w[e : e + 1], fmt, group_size=32)
        assert torch.equal(dequantize(together, torch.float64)[e], dequantize(alone, torch.float64)[0])


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantize_needs_memory_for_one_expert_only(fmt: str) -> None:
    n, k, experts = 32, 64, 16
    w = randn(experts, n, k)

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            known = (w.untyped_storage().data_ptr(),)
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor) and not func.is_view and t.untyped_storage().data_ptr() not in known:
                    self.bytes = max(self.bytes, t.nbytes)
            return result

    with Largest() as largest:
        weight = quantize(w, fmt, group_size=16)
    assert largest.bytes <= max(4 * n * k * 4, weight.codes.nbytes), f"a temporary of {largest.bytes} bytes"


BAD_QUANTIZE = {
    "N": (dict(shape=(1, 24, 32)), r"24.*16"),
    "rank": (dict(shape=(16, 32)), r"\(16, 32\)"),
    "K": (dict(group_size=48), r"(64.*48|48.*64)"),
    "group zero": (dict(group_size=0), r"group_size.*\b0\b"),
    "group negative": (dict(group_size=-16), r"group_size.*-16"),
    "odd group in int4": (dict(group_size=1), r"group_size.*\b1\b"),
    "group of 2 in int2": (dict(format="int2_sym", group_size=2), r"group_size.*\b2\b"),
    "group of 6 in int2": (dict(format="int2_sym", shape=(1, 16, 24), group_size=6), r"group_size.*\b6\b"),
    "odd K": (dict(shape=(1, 16, 33), group_size=33), r"33"),
    "format": (dict(format="int3_sym"), r"int3_sym.*int4_sym"),
    "layout": (dict(scale_layout="row"), r"row.*group"),
    "scale dtype": (dict(scale_dtype=torch.float64), r"float64"),
    "fp64 weights": (dict(dtype=torch.float64), r"float64"),
    "integer weights": (dict(dtype=torch.int32), r"int32"),
}


@pytest.mark.parametrize("name", BAD_QUANTIZE)
def test_quantize_refuses(name: str) -> None:
    options, pattern = BAD_QUANTIZE[name]
    call = dict(shape=(1, 16, 64), dtype=torch.float32, format="int4_sym", group_size=16) | options
    w = torch.ones(call.pop("shape"), dtype=call.pop("dtype"))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=pattern) as caught:
        quantize(w, call.pop("format"), **call)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


# ---- dequantize


def random_weight(fmt: str, scale_dtype: torch.dtype) -> QuantWeight:
    """Random bytes as codes, scales of both signs and of many magnitudes, some of them 0."""
    E, N, K, G = 2, 32, 64, 16
    generator = torch.Generator().manual_seed(1)
    record = FORMATS[fmt]
    raw = torch.randint(0, 256, (E, N, record.packed_k(K)), dtype=torch.uint8, generator=generator)
    if record.kind == "fp8":
        raw = torch.where(raw.view(record.storage).float().isfinite(), raw, 0)
    scales = torch.randn(E, N, K // G, generator=generator) * torch.logspace(-4, 0, N)[:, None]
    scales[:, ::5] = 0
    zeros = torch.randint(0, 2**record.bits + 1, scales.shape, generator=generator).to(scale_dtype)
    zeros[:, 0] = 2**record.bits
    zeros[:, 1] = 0
    return QuantWeight(raw.view(record.storage), scales.to(scale_dtype), zeros if record.asym else None, record, G)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_dequantize_rounds_once(fmt: str, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weight = random_weight(fmt, scale_dtype)
    product = exact(weight)
    if scale_dtype == torch.float32 and dtype != torch.float64:
        product = product.float()
    expected = product.to(dtype)
    got = dequantize(weight, dtype)
    assert got.dtype == dtype and got.shape == (2, 32, 64)
    wrong = (got != expected) & ~(got.isnan() & expected.isnan())
    first = tuple(wrong.nonzero()[0].tolist()) if wrong.any() else ()
    assert not wrong.any(), f"{int(wrong.sum())} weights differ, first {first}: {got[first]} != {expected[first]}"


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_zero_and_negative_scales(fmt: str) -> None:
    weight = random_weight(fmt, torch.bfloat16)
    assert weight.scales is not None
    assert (weight.scales < 0).any() and (weight.scales == 0).any()
    flipped = weight.with_tensors(weight.codes, -weight.scales, *([] if weight.zeros is None else [weight.zeros]))
    assert torch.equal(dequantize(flipped), -dequantize(weight))
    assert (dequantize(weight)[:, ::5] == 0).all()


@pytest.mark.parametrize(("fmt", "zero"), [("int8_asym", 256), ("int4_asym", 16), ("int2_asym", 4)])
def test_zero_point_may_be_one_past_the_codes(fmt: str, zero: int) -> None:
    codes = pack(torch.full((1, 16, 16), zero - 1, dtype=torch.int16), fmt)
    scales, zeros = torch.full((1, 16, 1), 2.0), torch.full((1, 16, 1), float(zero))
    for dtype in SCALE_DTYPES:
        weight = QuantWeight(codes, scales.to(dtype), zeros.to(dtype), FORMATS[fmt], 16)
        assert (dequantize(weight) == -2).all(), dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize(("fmt", "layout"), LAYOUT_CASES)
def test_dequantize_into_writes_everything(fmt: str, layout: str, dtype: torch.dtype) -> None:
    weight = quantize(randn(2, 144, 272), fmt, group_size=16, scale_layout=layout, scale_dtype=torch.bfloat16)
    expected = exact(weight).to(dtype)
    backing = torch.full((2, 144, 280), math.nan, dtype=dtype)
    for out in (torch.full((2, 144, 272), math.nan, dtype=dtype), backing[..., :272]):
        assert dequantize_into(out, weight) is out
        assert torch.equal(out, expected)
    assert backing[..., 272:].isnan().all(), "wrote past the end of a row"


@pytest.mark.parametrize("fmt", ["int8_sym", *FP8_FORMATS])
def test_dequantize_of_a_strided_tensor_scaled_weight(fmt: str) -> None:
    """[E, K, N] row-major in memory, as the per-tensor scheme has it."""
    codes = quantize(randn(2, 32, 48), fmt, scale_layout="tensor").codes
    strided = codes.mT.contiguous().mT
    assert not strided.is_contiguous()
    scales = torch.tensor([0.5, -3.0])
    a, b = (QuantWeight(c, scales, None, FORMATS[fmt], None, "tensor") for c in (codes, strided))
    assert torch.equal(dequantize(a, torch.bfloat16), dequantize(b, torch.bfloat16))
