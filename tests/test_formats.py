"""The table of formats, and the record of a quantized weight: what it holds, what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from qexperts import FORMATS, QuantWeight, dequantize, quantize
from qexperts.formats import SCALE_DTYPES, SCALE_LAYOUTS, get_format

E, N, K, G = 3, 32, 64, 16

# name: (bits, asym, storage, code range, stored elements along K = 64)
TABLE = {
    "bf16": (16, False, torch.bfloat16, None, 64),
    "fp16": (16, False, torch.float16, None, 64),
    "int8_sym": (8, False, torch.uint8, (-128, 127), 64),
    "int8_asym": (8, True, torch.uint8, (0, 255), 64),
    "int4_sym": (4, False, torch.uint8, (-8, 7), 32),
    "int4_asym": (4, True, torch.uint8, (0, 15), 32),
    "int2_sym": (2, False, torch.uint8, (-2, 1), 16),
    "int2_asym": (2, True, torch.uint8, (0, 3), 16),
    "fp8_e4m3": (8, False, torch.float8_e4m3fn, None, 64),
    "fp8_e5m2": (8, False, torch.float8_e5m2, None, 64),
}


def weight_of(fmt: str, layout: str = "group") -> QuantWeight:
    w = torch.randn(E, N, K, generator=torch.Generator().manual_seed(0))
    return quantize(w, fmt, group_size=G, scale_layout=layout, scale_dtype=torch.bfloat16)


def test_table_is_complete() -> None:
    assert set(FORMATS) == set(TABLE)
    assert set(SCALE_DTYPES) == {torch.float16, torch.bfloat16, torch.float32}
    assert set(SCALE_LAYOUTS) == {"group", "channel", "tensor", "block128"}


@pytest.mark.parametrize("name", TABLE)
def test_table(name: str) -> None:
    bits, asym, storage, code_range, packed = TABLE[name]
    fmt = FORMATS[name]
    assert fmt.name == name and get_format(name) is fmt and get_format(fmt) is fmt
    assert (fmt.bits, fmt.asym, fmt.storage) == (bits, asym, storage)
    assert fmt.packed_k(K) == packed
    assert fmt.quantized == (bits < 16)
    assert fmt.codes_per_byte == (8 // bits if name.startswith("int") else 1)
    if code_range:
        assert (fmt.code_min, fmt.code_max) == code_range
    if fmt.kind == "fp8":
        assert (fmt.code_min, fmt.code_max) == (-torch.finfo(storage).max, torch.finfo(storage).max)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMATS["int3"] = FORMATS["bf16"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["bf16"].bits = 8  # type: ignore[misc]


def test_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="int5") as caught:
        get_format("int5")
    assert all(name in str(caught.value) for name in FORMATS)


@pytest.mark.parametrize("name", TABLE)
def test_record(name: str) -> None:
    weight = weight_of(name)
    assert (weight.E, weight.N, weight.K) == (E, N, K)
    assert weight.device == torch.device("cpu") and weight.weight_layout == "public"
    assert weight.codes.shape == (E, N, TABLE[name][4]) and weight.codes.dtype == TABLE[name][2]
    tensors = [t for t in (weight.codes, weight.scales, weight.zeros) if t is not None]
    assert weight.nbytes == sum(t.nbytes for t in tensors)
    if FORMATS[name].quantized:
        assert (weight.scale_layout, weight.group_size) == ("group", G)
        assert weight.scales is not None and weight.scales.shape == (E, N, K // G)
        assert (weight.zeros is None) == (not FORMATS[name].asym)
    else:
        assert (weight.scale_layout, weight.group_size) == ("none", None)
        assert weight.scales is None and weight.zeros is None


def test_format_may_be_given_by_name() -> None:
    weight = QuantWeight(torch.zeros(E, N, K, dtype=torch.float16), None, None, "fp16")  # type: ignore[arg-type]
    assert weight.format is FORMATS["fp16"]


def test_channel_scales_have_groups_of_k() -> None:
    assert weight_of("int4_asym", "channel").group_size == K
    assert weight_of("int8_sym", "tensor").group_size is None
    assert weight_of("int8_sym", "block128").group_size is None


ALL = [(n, "group") for n in TABLE] + [("int4_asym", "channel"), ("int8_sym", "tensor"), ("fp8_e4m3", "block128")]


@pytest.mark.parametrize(("name", "layout"), ALL)
def test_a_slice_of_experts_is_a_view(name: str, layout: str) -> None:
    weight = weight_of(name, layout)
    part = weight.experts(1, 3)
    assert part.E == 2 and torch.equal(dequantize(part), dequantize(weight)[1:3])
    assert part.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
    assert weight.experts(1, 1).E == 0


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("name", "layout"), ALL)
def test_select_copies_with_repeats(name: str, layout: str, index: torch.dtype) -> None:
    weight = weight_of(name, layout)
    chosen = weight.select(torch.tensor([2, 0, 2, 2], dtype=index))
    assert chosen.E == 4 and torch.equal(dequantize(chosen), dequantize(weight)[[2, 0, 2, 2]])
    assert chosen.codes.untyped_storage().data_ptr() != weight.codes.untyped_storage().data_ptr()


@pytest.mark.parametrize(("name", "layout"), ALL)
def test_moving_keeps_dtypes_and_options(name: str, layout: str) -> None:
    weight = weight_of(name, layout)
    moved = weight.to("meta")
    assert moved.device.type == "meta"
    assert (moved.format, moved.group_size, moved.scale_layout) == (weight.format, weight.group_size, layout) or (
        not weight.format.quantized and moved.scale_layout == "none"
    )
    for a, b in ((moved.codes, weight.codes), (moved.scales, weight.scales), (moved.zeros, weight.zeros)):
        assert (a is None) == (b is None)
        assert a is None or b is None or (a.dtype == b.dtype and a.shape == b.shape)


def test_values_are_not_read() -> None:
    """On the meta device there are none: any read raises."""
    weight = weight_of("int4_asym").to("meta")
    assert "int4_asym" in repr(weight)
    assert weight.experts(0, 1).E == 1


def test_with_tensors_keeps_the_kind() -> None:
    for name, layout in ALL:
        weight = weight_of(name, layout)
        tensors = [t.clone() for t in (weight.codes, weight.scales, weight.zeros) if t is not None]
        other = weight.with_tensors(*tensors)
        assert other.codes is tensors[0]
        assert (other.format, other.group_size, other.scale_layout) == (
            weight.format,
            weight.group_size,
            weight.scale_layout,
        )
        assert torch.equal(dequantize(other), dequantize(weight))


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


ZEROS = scales(E, N, K // G)
BAD: dict[str, tuple[Callable[[], QuantWeight], str]] = {
    "rank": (lambda: QuantWeight(codes(N, K // 2), scales(E, N, 4), None, FORMATS["int4_sym"], G), r"\(32, 32\)"),
    "storage": (
        lambda: QuantWeight(codes(E, N, 32, dtype=torch.int8), scales(E, N, 4), None, FORMATS["int4_sym"], G),
        r"int8.*uint8",
    ),
    "fp8 storage": (
        lambda: QuantWeight(codes(E, N, K, dtype=torch.float8_e5m2), scales(E, N, 4), None, FORMATS["fp8_e4m3"], G),
        r"e5m2.*e4m3",
    ),
    "N": (lambda: QuantWeight(codes(E, 24, 32), scales(E, 24, 4), None, FORMATS["int4_sym"], G), r"24.*16"),
    "no scales": (lambda: QuantWeight(codes(E, N, 32), None, None, FORMATS["int4_sym"], G), r"scales"),
    "scales of bf16": (
        lambda: QuantWeight(codes(E, N, K, dtype=torch.bfloat16), scales(E, N, 4), None, FORMATS["bf16"]),
        r"scales",
    ),
    "group scales": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 3), None, FORMATS["int4_sym"], G),
        r"\(3, 32, 3\).*\(3, 32, 4\)",
    ),
    "channel scales": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N), None, FORMATS["int4_sym"], None, "channel"),
        r"\(3, 32\).*\(3, 32, 1\)",
    ),
    "tensor scales": (
        lambda: QuantWeight(codes(E, N, K), scales(E, 1), None, FORMATS["int8_sym"], None, "tensor"),
        r"\(3, 1\).*\(3,\)",
    ),
    "block scales": (
        lambda: QuantWeight(codes(E, N, K), scales(E, N, 1), None, FORMATS["int8_sym"], None, "block128"),
        r"\(3, 32, 1\).*\(3, 1, 1\)",
    ),
    "scale dtype": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4, dtype=torch.float64), None, FORMATS["int4_sym"], G),
        r"float64",
    ),
    "scale device": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4, device="meta"), None, FORMATS["int4_sym"], G),
        r"meta.*cpu|cpu.*meta",
    ),
    "no zeros": (lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), None, FORMATS["int4_asym"], G), r"zeros"),
    "superfluous zeros": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), ZEROS, FORMATS["int4_sym"], G),
        r"zeros",
    ),
    "zeros of fp8": (
        lambda: QuantWeight(codes(E, N, K, dtype=torch.float8_e4m3fn), scales(E, N, 4), ZEROS, FORMATS["fp8_e4m3"], G),
        r"zeros",
    ),
    "zeros' shape": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), scales(E, N, 2), FORMATS["int4_asym"], G),
        r"zeros.*\(3, 32, 2\)",
    ),
    "zeros' dtype": (
        lambda: QuantWeight(
            codes(E, N, 32), scales(E, N, 4), scales(E, N, 4, dtype=torch.float16), FORMATS["int4_asym"], G
        ),
        r"zeros.*float16",
    ),
    "group size": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 1), None, FORMATS["int4_sym"], 48),
        r"48",
    ),
    "no group size": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), None, FORMATS["int4_sym"], None),
        r"group_size.*None",
    ),
    "group size 0": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), None, FORMATS["int4_sym"], 0),
        r"group_size.*0",
    ),
    "odd group size": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, K), None, FORMATS["int4_sym"], 1),
        r"group_size.*1",
    ),
    "scale layout": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), None, FORMATS["int4_sym"], G, "row"),
        r"row.*group",
    ),
    "weight layout": (
        lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), None, FORMATS["int4_sym"], G, "group", "private"),
        r"private.*public",
    ),
    "format": (lambda: QuantWeight(codes(E, N, 32), scales(E, N, 4), None, "int3", G), r"int3"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD)
def test_record_refuses(name: str) -> None:
    make, pattern = BAD[name]
    with pytest.raises(ValueError, match=pattern) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1
