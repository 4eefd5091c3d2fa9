"""The prepared layout "tiles": an exact permutation of the public one, and a weight like any other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qexperts import FORMATS, QuantWeight, TokenPlan, dequantize, grouped_gemm, prepare, quantize, unprepare
from qexperts.backends import BACKENDS
from qexperts.layouts import from_tiles, no_tiles, restore, tile_k, to_layout, to_tiles
from qexperts.reference import exact_weight
from qexperts.testing import Case, make_inputs

QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SCALE_LAYOUTS = ["group", "channel", "tensor", "block128"]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def copy_of(weight: QuantWeight) -> QuantWeight:
    return weight.with_tensors(*(t.clone() for t in weight.tensors))


def tiles_of(weight: QuantWeight) -> QuantWeight:
    """A prepared copy."""
    return to_layout(copy_of(weight), "tiles")


def random_weight(
    fmt: str,
    n: int = 48,
    k: int = 192,
    *,
    group_size: int = 32,
    scale_layout: str = "group",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantWeight:
    """Any bytes for codes but NaN, scales of either sign, zeros from 0 to 2^bits."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(3, n, k, generator=generator)
    weight = quantize(dense, fmt, group_size=group_size, scale_layout=scale_layout, scale_dtype=scale_dtype)
    assert weight.scales is not None
    raw = torch.randint(0, 256, weight.codes.shape, dtype=torch.uint8, generator=generator)
    if weight.format.kind == "fp8":
        raw[~raw.view(weight.codes.dtype).float().isfinite()] = 0
    weight.codes.copy_(raw.view(weight.codes.dtype))
    weight.scales[torch.randint(0, 2, weight.scales.shape, generator=generator).bool()] *= -1
    weight.scales.view(-1)[0] = 0
    if weight.zeros is not None:
        top = 2**weight.format.bits
        weight.zeros.copy_(torch.randint(0, top + 1, weight.zeros.shape, generator=generator))
        weight.zeros.view(-1)[:2] = torch.tensor([0, top])
    return weight


def assert_same_bits(a: QuantWeight, b: QuantWeight) -> None:
    for field in dataclasses.fields(QuantWeight):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and one.shape == other.shape, field.name
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), field.name
        else:
            assert one == other, field.name


# ---- an exact permutation


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("scale_layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_round_trip(fmt: str, scale_layout: str, scale_dtype: torch.dtype) -> None:
    if FORMATS[fmt].asym and scale_layout in ("tensor", "block128"):
        return  # has no zero points
    weight = random_weight(fmt, 144, 192, scale_layout=scale_layout, scale_dtype=scale_dtype)
    prepared = tiles_of(weight)
    assert prepared.weight_layout == "tiles" and prepared.scale_dtype == scale_dtype
    assert (prepared.E, prepared.N, prepared.K) == (weight.E, weight.N, weight.K)
    restored = restore(prepared)
    assert_same_bits(restored, weight)
    assert all(t.is_contiguous() for t in restored.tensors)
    assert torch.equal(restored.codes.view(torch.uint8), weight.codes.view(torch.uint8))


@pytest.mark.parametrize("group_size", [16, 32, 64, 192], ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_round_trip_of_group_sizes(fmt: str, group_size: int) -> None:
    weight = random_weight(fmt, 16, 192, group_size=group_size)
    prepared = tiles_of(weight)
    assert prepared.scales is not None and prepared.scales.shape == (3, 192 // group_size, 16)
    assert_same_bits(restore(prepared), weight)


@pytest.mark.parametrize(("n", "k"), [(16, 64), (32, 64), (16, 320), (80, 128)], ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_codes_are_permuted(fmt: str, n: int, k: int) -> None:
    """Move a single code: exactly one code of the tiles changes, another for each, each to the same value."""
    record = FORMATS[fmt]
    codes = torch.zeros(n, record.packed_k(k), dtype=torch.uint8)
    seen = set()
    for i in range(0, n * k, 7):  # 7: every place in a word, every lane, every row of a tile
        codes.zero_()
        row, column = i // k, i % k
        shift = record.bits * (column % record.codes_per_byte)
        codes[row, column // record.codes_per_byte] = 1 << shift
        tiles = to_tiles(codes.view(record.storage), record).view(torch.uint8)
        assert int(tiles.count_nonzero()) == 1
        place = int(tiles.flatten().nonzero()[0])
        value = int(tiles.flatten()[place])
        slot = value.bit_length() - 1
        assert value == 1 << slot and slot % record.bits == 0
        wide, at = tile_k(record.bits, k), place * 8 // record.bits
        assert at // (16 * wide) == row // 16 * (k // wide) + column // wide, "a tile is 16 rows x tile_k"
        assert at // wide % 16 == row % 16, "row by row"
        seen.add((place, slot))
    assert len(seen) == len(range(0, n * k, 7))


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_any_bytes_survive(fmt: str) -> None:
    """NaN codes of fp8 too: codes are moved, never read as numbers."""
    record = FORMATS[fmt]
    codes = (torch.arange(16 * record.packed_k(128)) % 256).to(torch.uint8).view(16, -1).view(record.storage)
    there = to_tiles(codes, record)
    assert there.dtype == record.storage and there.shape == codes.shape
    assert torch.equal(from_tiles(there, record).view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(to_tiles(from_tiles(codes, record), record).view(torch.uint8), codes.view(torch.uint8))


# ---- words of scales and zeros


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", ["int4_sym", "int4_asym"])
def test_words(fmt: str, scale_dtype: torch.dtype) -> None:
    """Low half the scale; high half the zero, or the scale again; fp32 as it is. [E, groups, N]."""
    weight = random_weight(fmt, scale_dtype=scale_dtype)
    prepared = tiles_of(weight)
    assert weight.scales is not None and prepared.scales is not None
    if scale_dtype == torch.float32:
        assert torch.equal(prepared.scales, weight.scales.mT)
        assert (prepared.zeros is None) == (weight.zeros is None)
        assert weight.zeros is None or torch.equal(prepared.zeros, weight.zeros.mT)  # type: ignore[arg-type]
        return
    assert prepared.scales.dtype == torch.int32 and prepared.zeros is None
    halves = prepared.scales.view(scale_dtype).unflatten(-1, (-1, 2))
    high = weight.scales if weight.zeros is None else weight.zeros
    assert torch.equal(halves[..., 0], weight.scales.mT) and torch.equal(halves[..., 1], high.mT)
    assert torch.equal((prepared.scales & 0xFFFF).to(torch.int16).view(scale_dtype), weight.scales.mT)


def test_tensor_and_block_scales_are_written_out_for_each_row() -> None:
    for scale_layout, groups in (("tensor", 1), ("block128", 2), ("channel", 1)):
        weight = random_weight("int8_sym", 144, 192, scale_layout=scale_layout, scale_dtype=torch.float32)
        prepared = tiles_of(weight)
        assert prepared.scales is not None and weight.scales is not None
        assert prepared.scales.shape == (3, groups, 144) and prepared.scales.is_contiguous()
        if scale_layout == "block128":
            assert torch.equal(prepared.scales[:, :, 127], weight.scales[:, 0])
            assert torch.equal(prepared.scales[:, :, 128], weight.scales[:, 1])


# ---- a weight like any other


@pytest.mark.parametrize("scale_layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_dequantize(fmt: str, scale_dtype: torch.dtype, scale_layout: str) -> None:
    if FORMATS[fmt].asym and scale_layout in ("tensor", "block128"):
        return
    weight = random_weight(fmt, 144, 192, scale_layout=scale_layout, scale_dtype=scale_dtype)
    prepared = tiles_of(weight)
    assert dequantize(prepared).dtype == scale_dtype
    for dtype in (None, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(dequantize(prepared, dtype), dequantize(weight, dtype))
    assert torch.equal(exact_weight(prepared, 1), exact_weight(weight, 1))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", ["int4_asym", "int8_sym", "fp8_e4m3"])
def test_experts_select_and_to(fmt: str, scale_dtype: torch.dtype) -> None:
    weight = random_weight(fmt, scale_dtype=scale_dtype)
    prepared = tiles_of(weight)
    part = prepared.experts(1, 3)
    assert part.E == 2 and part.codes.data_ptr() == prepared.codes[1].data_ptr(), "a view"
    assert_same_bits(restore(part), weight.experts(1, 3))
    for dtype in (torch.int32, torch.int64):
        chosen = torch.tensor([2, 0, 2], dtype=dtype)
        assert_same_bits(restore(prepared.select(chosen)), weight.select(chosen))
    assert_same_bits(restore(prepared.to("cpu")), weight)
    meta = prepared.to("meta")
    assert meta.weight_layout == "tiles" and meta.device.type == "meta" and meta.scale_dtype == scale_dtype
    assert (meta.N, meta.K, meta.nbytes) == (prepared.N, prepared.K, prepared.nbytes)
    assert "tiles" in repr(prepared) and name_of(scale_dtype) in repr(prepared)
    again = prepared.with_tensors(*prepared.tensors)
    assert_same_bits(again, prepared)


def test_wrong_words_raise() -> None:
    prepared = tiles_of(random_weight("int4_asym"))
    codes, words = prepared.tensors
    for tensors in ((codes, words.float()), (codes, words.mT.contiguous()), (codes[:2], words)):
        with pytest.raises(ValueError, match="scales"):
            prepared.with_tensors(*tensors)
    with pytest.raises(ValueError, match="weight_layout"):
        QuantWeight(codes, words, None, "int4_asym", 32, "group", "tile", torch.bfloat16)
    with pytest.raises(ValueError, match="scale_dtype"):
        QuantWeight(codes, words, None, "int4_asym", 32, "group", "tiles")
    with pytest.raises(ValueError, match="zeros"):
        QuantWeight(codes, words, words, "int4_asym", 32, "group", "tiles", torch.bfloat16)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_the_torch_backend_runs_it(fmt: str) -> None:
    inputs = make_inputs(Case((2, 0, 3), 32, 128, fmt, 32, negative_scales=True))
    y = grouped_gemm(inputs.x, tiles_of(inputs.weight), inputs.plan, backend="torch")
    assert torch.equal(y, grouped_gemm(inputs.x, inputs.weight, inputs.plan, backend="torch"))


# ---- who gets it


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (quantize(torch.randn(2, 16, 64), "bf16"), "bf16 weights"),
        (random_weight("int4_sym", 16, 96), "K=96"),
        (random_weight("int8_sym", scale_layout="tensor"), None),
        (random_weight("int4_asym"), None),
    ],
    ids=["unquantized", "K not a multiple of 64", "tensor scales", "groups"],
)
def test_no_tiles(weight: QuantWeight, reason: str | None) -> None:
    found = no_tiles(weight)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")
    assert BACKENDS["triton"].no_layout(weight) == found
    assert BACKENDS["triton"].layout == "tiles" and BACKENDS["torch"].layout == "public"


def test_strided_codes_have_no_tiles() -> None:
    weight = random_weight("int8_sym", scale_layout="tensor", scale_dtype=torch.float32)
    strided = weight.with_tensors(weight.codes.mT.contiguous().mT, *weight.tensors[1:])
    assert "strided" in str(no_tiles(strided))


def test_to_layout_permutes_in_place() -> None:
    weight = random_weight("int4_sym")
    address, before = weight.codes.data_ptr(), weight.codes.clone()
    prepared = to_layout(weight, "tiles")
    assert prepared.codes.data_ptr() == address and not torch.equal(weight.codes, before)
    assert to_layout(weight, "public") is weight
    assert restore(weight) is weight


# ---- prepare and unprepare: on a CPU the torch backend runs, which reads the public layout


def test_prepare_gives_a_public_weight_back_where_the_backend_has_no_layout() -> None:
    weight = random_weight("int4_sym")
    for prepared in (prepare(weight, "torch"), prepare(weight, "torch", keep_source=True)):
        assert prepared is weight
        assert unprepare(prepared) is weight


@pytest.fixture
def tiles_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which backend "triton" is there, as in the interpreter."""
    triton = dataclasses.replace(BACKENDS["triton"], supports=lambda problem: (None, "", False))
    monkeypatch.setitem(BACKENDS, "triton", triton)  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_prepare_and_unprepare(fmt: str, tiles_backend: None) -> None:
    weight = random_weight(fmt)
    source = copy_of(weight)
    prepared = prepare(source, "triton")
    assert prepared.weight_layout == "tiles"
    assert_same_bits(unprepare(prepared), weight)
    assert torch.equal(dequantize(prepared), dequantize(weight))


def test_prepare_releases_its_source(tiles_backend: None) -> None:
    source = random_weight("int4_asym")
    x, plan = torch.zeros(3, 192, dtype=torch.bfloat16), TokenPlan.from_counts(torch.tensor([1, 1, 1]), 3)
    prepare(source, "triton")
    for call in (
        lambda: prepare(source, "triton"),
        lambda: grouped_gemm(x, source, plan),
        lambda: unprepare(source),
        lambda: dequantize(source),
    ):
        with pytest.raises(ValueError, match="released"):
            call()


def test_prepare_can_keep_its_source(tiles_backend: None) -> None:
    source = random_weight("int4_asym")
    before = copy_of(source)
    prepared = prepare(source, "triton", keep_source=True)
    assert_same_bits(source, before)
    assert_same_bits(restore(prepared), before)
    assert not {t.data_ptr() for t in prepared.tensors} & {t.data_ptr() for t in source.tensors}


def test_prepare_twice_raises(tiles_backend: None) -> None:
    prepared = prepare(random_weight("int4_asym"), "triton")
    with pytest.raises(ValueError, match="unprepare"):
        prepare(prepared, "triton")


def test_prepare_leaves_what_has_no_tiles(tiles_backend: None) -> None:
    for weight in (quantize(torch.randn(2, 16, 64), "bf16"), random_weight("int4_sym", 16, 96)):
        assert prepare(weight, "triton") is weight
        assert weight.weight_layout == "public"
