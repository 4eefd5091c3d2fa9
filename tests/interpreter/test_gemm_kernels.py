"""The prefill and decode kernels against the oracle, in the interpreter: every format, layout, group and scale."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from launching import DTYPES, QUANTIZED, check, check_unchecked, framed, in_layout, multiply

from qexperts import FORMATS, Problem, QuantWeight, TokenPlan, grouped_gemm, moe, moe_gemm, moe_gemm_prefill, quantize
from qexperts.backends import BACKENDS
from qexperts.kernels import config
from qexperts.kernels.operand import operand
from qexperts.layouts import tile_k
from qexperts.reference import grouped_gemm_reference
from qexperts.testing import Case, Inputs, assert_no_worse, make_inputs, nan_filled, peer_gemm

PHASES = ["decode", "prefill"]
DECODE, PREFILL = (1, 0, 2), (0, 33, 1)
ROWS = {"decode": DECODE, "prefill": PREFILL}
EIGHT_BITS = [name for name in QUANTIZED if FORMATS[name].bits == 8]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


# ---- the matrix: every format x layout x group size x phase; the dtype and the tile sizes alternate

# group size -> N, K of the public layout (any multiple of 16) and of tiles (multiples of 64)
SIZES = {
    16: (16, 80, 128),
    32: (80, 96, 192),
    64: (16, 192, 192),
    128: (48, 256, 256),
    256: (16, 512, 512),
    None: (80, 112, 192),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A case in a layout and a phase, with the tile sizes of NVIDIA GPUs or the portable ones."""

    case: Case
    layout: str
    phase: str
    nvidia: bool

    def __str__(self) -> str:
        return f"{self.layout}-{self.phase}-{'nvidia' if self.nvidia else 'portable'}-{self.case}"


def matrix() -> list[Run]:
    runs = []
    cases = itertools.product(QUANTIZED, ["tiles", "public"], SIZES, PHASES)
    for i, (fmt, layout, group, phase) in enumerate(cases):
        n, public_k, tiles_k = SIZES[group]
        dtype = DTYPES[(i // 2 + i // 24) % 2]
        k = tiles_k if layout == "tiles" else public_k
        case = Case(ROWS[phase], n, k, fmt, group, dtype, why="the matrix")
        runs.append(Run(case, layout, phase, nvidia=(i + i // 12) % 2 == 1))
    return runs


@pytest.mark.parametrize("run", matrix(), ids=str)
def test_matrix(run: Run) -> None:
    check(make_inputs(run.case), run.layout, run.phase, nvidia=run.nvidia, many=run.case.N > 32)


WIDE_BLOCKS = [
    Case(DECODE, 48, 384, "", group, why="blocks of 128 k: one group, several, or half of one")
    for group in (16, 32, 64, 128, None)
]


@pytest.mark.parametrize("case", WIDE_BLOCKS, ids=str)
@pytest.mark.parametrize("fmt", ["int4_asym", "int2_sym"])
def test_blocks_of_128_k(fmt: str, case: Case) -> None:
    check(make_inputs(dataclasses.replace(case, format=fmt)), "tiles", "decode", nvidia=True)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("group", [16, 64, None], ids=name_of)
@pytest.mark.parametrize("fmt", EIGHT_BITS)
def test_strided_codes(fmt: str, group: int | None, phase: str) -> None:
    dtype = DTYPES[EIGHT_BITS.index(fmt) % 2]
    check(make_inputs(Case(ROWS[phase], 48, 192, fmt, group, dtype, why="k not contiguous")), "strided", phase)


@pytest.mark.parametrize("layout", ["tiles", "public"])
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_negative_scales(fmt: str, layout: str) -> None:
    dtype, phase = DTYPES[QUANTIZED.index(fmt) % 2], PHASES[layout == "tiles"]
    case = Case(ROWS[phase], 16, 128, fmt, 32, dtype, negative_scales=True, why="about half of real scales")
    check(make_inputs(case), layout, phase)


# ---- scales: their own dtype, every layout, extreme zeros


def scaled(case: Case, scale_dtype: torch.dtype, scale_layout: str = "group") -> Inputs:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(case.rows), case.K, generator=generator).to(case.dtype)
    dense = torch.randn(case.E, case.N, case.K, generator=generator).mul_(case.K**-0.5)
    group = case.group_size or case.K
    weight = quantize(dense, case.format, group_size=group, scale_layout=scale_layout, scale_dtype=scale_dtype)
    return Inputs.of(x, weight, case.rows)


SCALES = [
    (activations, scales)
    for activations, scales in itertools.product(DTYPES, [torch.float16, torch.bfloat16, torch.float32])
    if activations != scales
]


@pytest.mark.parametrize("layout", ["tiles", "public"])
@pytest.mark.parametrize(("dtype", "scale_dtype"), SCALES, ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_scales_of_another_dtype(fmt: str, dtype: torch.dtype, scale_dtype: torch.dtype, layout: str) -> None:
    """Rounding them to the dtype of the activations would change every weight."""
    phase = PHASES[SCALES.index((dtype, scale_dtype)) % 2]
    check(scaled(Case((1, 0, 2), 16, 64, fmt, 32, dtype), scale_dtype), layout, phase)


LAYOUTS = ["channel", "tensor", "block128"]


@pytest.mark.parametrize("layout", ["tiles", "public"])
@pytest.mark.parametrize("scale_layout", LAYOUTS)
@pytest.mark.parametrize("fmt", ["int8_sym", "int4_sym", "int2_sym", "fp8_e4m3", "int4_asym"])
def test_scale_layouts(fmt: str, scale_layout: str, layout: str) -> None:
    if FORMATS[fmt].asym and scale_layout != "channel":
        return  # has no zero points: a ValueError, tested elsewhere
    phase = PHASES[(QUANTIZED.index(fmt) + LAYOUTS.index(scale_layout)) % 2]
    k = 192 if layout == "tiles" else 208
    case = Case((0, 2), 144, k, fmt, None, why="two ragged blocks of 128 each way")
    check(scaled(case, torch.float32 if phase == "decode" else torch.bfloat16, scale_layout), layout, phase)


@pytest.mark.parametrize("scale_layout", LAYOUTS)
@pytest.mark.parametrize("fmt", EIGHT_BITS)
def test_scale_layouts_of_strided_codes(fmt: str, scale_layout: str) -> None:
    if FORMATS[fmt].asym and scale_layout != "channel":
        return
    check(scaled(Case((0, 2), 144, 144, fmt, None), torch.float32, scale_layout), "strided", "prefill")


@pytest.mark.parametrize("layout", ["tiles", "public"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", [name for name in QUANTIZED if FORMATS[name].asym])
def test_zeros_up_to_two_to_the_bits(fmt: str, dtype: torch.dtype, layout: str) -> None:
    inputs = make_inputs(Case((3, 1), 32, 128, fmt, 32, dtype, why="zeros from 0 to 2^bits, both included"))
    zeros = inputs.weight.zeros
    assert zeros is not None
    top = 2 ** FORMATS[fmt].bits
    zeros.copy_((torch.arange(zeros.numel()) * (top // 2 + 1) % (top + 1)).view(zeros.shape))
    zeros.view(-1)[:2] = torch.tensor([0, top])
    check(Inputs.of(inputs.x, inputs.weight, (3, 1)), layout, "decode")


@pytest.mark.parametrize("layout", ["tiles", "public"])
@pytest.mark.parametrize("phase", PHASES)
def test_zero_scales(phase: str, layout: str) -> None:
    inputs = make_inputs(Case((3, 1), 32, 128, "int4_sym", 32))
    assert inputs.weight.scales is not None
    inputs.weight.scales[:, ::2] = 0
    inputs.weight.scales[:, 1::2, ::2] = 0
    check(Inputs.of(inputs.x, inputs.weight, (3, 1)), layout, phase)


# ---- unquantized weights, and what the tensor-level functions make of theirs


@pytest.mark.parametrize("transposed", [False, True], ids=["[E, N, K]", "[E, K, N]"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unquantized(dtype: torch.dtype, phase: str, transposed: bool) -> None:
    fmt = "bf16" if dtype == torch.bfloat16 else "fp16"
    inputs = make_inputs(Case(ROWS[phase], 80, 144, fmt, None, dtype))
    codes = framed(inputs.weight.codes.mT).mT if transposed else framed(inputs.weight.codes)
    y = multiply(framed(inputs.x), inputs.weight.with_tensors(codes), inputs.counts, phase, nvidia=transposed)
    assert_no_worse(y, inputs.oracle, inputs.peer)


@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=PHASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_moe_gemm(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    inputs = make_inputs(Case(rows, 48, 80, "bf16" if dtype == torch.bfloat16 else "fp16", None, dtype))
    weights = inputs.weight.codes.mT.contiguous()
    assert_no_worse(moe_gemm(inputs.x, weights, inputs.counts), inputs.oracle, inputs.peer)
    scales = torch.rand(len(rows), 48) + 0.5
    by_row = scales.repeat_interleave(inputs.counts.long(), 0)
    y = moe_gemm(inputs.x, weights, inputs.counts, scales=scales)
    assert_no_worse(y, inputs.oracle * by_row, (inputs.peer.float() * by_row).to(dtype))


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_per_tensor_scheme(dtype: torch.dtype, storage: torch.dtype) -> None:
    fmt = {torch.int8: "int8_sym", torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}[storage]
    inputs = scaled(Case(PREFILL, 48, 80, fmt, None, dtype), torch.float32, "tensor")
    weights = inputs.weight.codes.view(torch.uint8).mT.contiguous().view(storage)
    y = moe_gemm_prefill(inputs.x, weights, inputs.counts, scales=inputs.weight.scales, scale_scheme="per_tensor")
    assert_no_worse(y, inputs.oracle, inputs.peer)


# ---- counts

AWKWARD = [
    Case((0, 0, 90, 0), 16, 64, "", 32, why="one hot expert, the others empty"),
    Case((0, 1, 0), 16, 64, "", 32, why="one row"),
    Case((0, 0, 0), 16, 64, "", 32, why="all experts empty: zero rows"),
    Case((0, 5, 3, 0), 16, 64, "", 32, why="first and last expert empty"),
    Case((9,), 16, 64, "", 32, why="E = 1"),
    Case((1,) * 20, 16, 64, "", 32, why="as many rows as experts"),
    Case((150, 16, 17, 97), 16, 64, "", 32, why="every class of tiles, two for one remainder"),
]


@pytest.mark.parametrize("case", AWKWARD, ids=lambda c: c.why.replace(" ", "-"))
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("fmt", "layout"), [("int4_sym", "tiles"), ("int8_asym", "public")])
def test_awkward_counts(fmt: str, layout: str, phase: str, case: Case) -> None:
    inputs = make_inputs(dataclasses.replace(case, format=fmt))
    weight = in_layout(inputs.weight, layout)
    problem = Problem.of("test", inputs.x, weight, phase=phase)
    y = BACKENDS["triton"].run(problem, inputs.x, weight, inputs.plan)
    assert_no_worse(y, inputs.oracle, inputs.peer)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Rows of each expert that nobody checked, and the rows there are."""

    counts: tuple[int, ...]
    total: int
    why: str

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


UNCHECKED = [
    Counts((3, 0, 2), 9, why="rows past the sum"),
    Counts((0, 0, 0), 5, why="rows, but no expert has any"),
    Counts((4, -3, 2), 6, why="a negative count"),
    Counts((-1, -(2**31), -7), 4, why="only negative counts"),
    Counts((3, 9, 2), 7, why="an expert beyond the rows, then another"),
    Counts((2, 2**31 - 1, 2**31 - 1), 140, why="a sum beyond 32 bits"),
    Counts((1, 0, 0), 140, why="more than a tile past the sum"),
]


@pytest.mark.parametrize("phase", [*PHASES, "parts", "auto"])
@pytest.mark.parametrize("given", UNCHECKED, ids=str)
def test_counts_that_do_not_add_up(given: Counts, phase: str) -> None:
    counts, total = given.counts, given.total
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(total, 128, generator=generator).to(torch.bfloat16)
    dense = torch.randn(len(counts), 16, 128, generator=generator).to(torch.bfloat16)
    weight = quantize(dense, "int4_sym", group_size=32)
    tensor = torch.tensor(counts, dtype=torch.int64 if phase == "prefill" else torch.int32)
    if phase == "auto":
        run = in_layout(weight, "public")
        y = BACKENDS["triton"].run(Problem.of("test", x, run, phase="auto"), x, run, TokenPlan(tensor, total))
    else:
        parts = 2 if phase == "parts" else 1
        name = "decode" if phase == "parts" else phase
        y = multiply(framed(x), in_layout(weight, "tiles"), tensor, name, parts=parts)
    check_unchecked(x, weight, counts, y)


@pytest.mark.parametrize("counts", [(2, 1), (2**32 + 2, 2**40)], ids=["that add up", "beyond 32 bits"])
@pytest.mark.parametrize("phase", PHASES)
def test_counts_in_int64(phase: str, counts: tuple[int, int]) -> None:
    inputs = make_inputs(Case((2, 1), 16, 64, "int4_sym", 32))
    y = multiply(framed(inputs.x), in_layout(inputs.weight, "tiles"), torch.tensor(counts), phase)
    check_unchecked(inputs.x, inputs.weight, counts, y)


# ---- activations with a row stride


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("fmt", "layout"), [("int4_sym", "tiles"), ("int2_asym", "public"), ("bf16", "public")])
@pytest.mark.parametrize("extra", [16, 3], ids=str)
def test_activations_with_a_row_stride(extra: int, fmt: str, layout: str, phase: str) -> None:
    inputs = make_inputs(Case((2, 0, 19), 16, 128, fmt, 64))
    wide = nan_filled(21, 128 + extra, dtype=torch.bfloat16)
    wide[:, :128] = inputs.x
    y = multiply(wide[:, :128], in_layout(inputs.weight, layout), inputs.counts, phase)
    assert_no_worse(y, inputs.oracle, inputs.peer)


def test_rows_that_all_lie_at_one_address() -> None:
    inputs = make_inputs(Case((2, 0, 3), 16, 128, "int4_sym", 64))
    x = inputs.x[:1].expand(5, -1)
    again = Inputs.of(x, inputs.weight, (2, 0, 3))
    for phase in PHASES:
        y = multiply(x, in_layout(inputs.weight, "public"), inputs.counts, phase)
        assert_no_worse(y, again.oracle, again.peer)


def test_zeros_that_lie_otherwise_than_scales_are_refused() -> None:
    weight = make_inputs(Case((1,), 16, 128, "int4_asym", 32)).weight
    assert weight.scales is not None and weight.zeros is not None
    apart = weight.with_tensors(weight.codes, weight.scales.mT.contiguous().mT, weight.zeros)
    with pytest.raises(ValueError, match="strides of the scales"):
        operand(apart)


# ---- a decode in parts of K, and calls that the counts decide


@pytest.mark.parametrize("layout", ["tiles", "public", "strided"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("fmt", ["int4_asym", "int2_sym", "int8_sym"])
def test_parts_of_k(fmt: str, parts: int, layout: str) -> None:
    """19 rows are several blocks of rows: a tile of 16 columns has 8 or 4 rows of x."""
    if layout == "strided" and FORMATS[fmt].bits < 8:
        return  # packed codes are contiguous along k
    check(make_inputs(Case((1, 0, 19), 48, 512, fmt, 32)), layout, "decode", parts=parts)


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("fmt", ["int4_sym", "int2_asym"])
def test_parts_of_k_in_the_sizes_of_nvidia(fmt: str, group: int | None) -> None:
    check(make_inputs(Case((1, 3), 160, 1024, fmt, group)), "tiles", "decode", nvidia=True, parts=4)


@pytest.mark.parametrize("group", [0, 16, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_parts_divide_k_into_whole_blocks_tiles_and_groups(bits: int, group: int) -> None:
    inputs = make_inputs(Case((1,), 16, 1024, f"int{bits}_sym", group or None))
    w = operand(in_layout(inputs.weight, "tiles"))
    for k, n, slots in itertools.product(range(64, 4096, 64), (16, 768, 4096), (1, 8, 200)):
        layout = {64: "tiles", 128: "tiles128"}[tile_k(bits, k)]
        c = config.decode_config(w._replace(N=n, K=k, layout=layout), True, slots, 132)
        part = k // c.parts
        assert (
            c.parts == 1 or (k % c.parts, part % c.block_k, part % tile_k(bits, k), part % (group or part)) == (0,) * 4
        )


@dataclasses.dataclass(frozen=True)
class Limit:
    """Counts over 7 rows, and whether every expert has at most limit of them."""

    counts: tuple[int, ...]
    limit: int
    few: bool
    why: str

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


LIMITS = [
    Limit((4, 0, 2), 4, True, why="at the limit"),
    Limit((5, 0, 2), 4, False, why="one more"),
    Limit((0, 1, 0), 0, False, why="limit 0"),
    Limit((0, 0, 0), 0, True, why="no rows of any expert"),
    Limit((9, -5, 0), 7, True, why="clamped to the rows there are"),
]


@pytest.mark.parametrize(("phase", "condition", "parts"), [("decode", 1, 1), ("decode", 1, 2), ("prefill", 2, 1)])
@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_conditions(case: Limit, phase: str, condition: int, parts: int) -> None:
    """A decode of condition 1 writes for few rows an expert, a prefill of condition 2 for more."""
    inputs = make_inputs(Case((3, 2, 2), 16, 128, "int4_sym", 32))
    weight, counts = in_layout(inputs.weight, "tiles"), torch.tensor(case.counts, dtype=torch.int32)
    y = multiply(framed(inputs.x), weight, counts, phase, parts=parts, limit=case.limit, condition=condition)
    if case.few == (phase == "decode"):
        check_unchecked(inputs.x, inputs.weight, case.counts, y)
    else:
        assert y.isnan().all(), "a launch whose condition does not hold writes nothing"


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_a_decode_in_parts_that_does_as_a_prefill(case: Limit, parts: int) -> None:
    """Condition 2: parts of K for few rows an expert, and for more the bits of a decode that has none."""
    inputs = make_inputs(Case((3, 2, 2), 80, 512, "int4_sym", 32))
    weight, counts = in_layout(inputs.weight, "tiles"), torch.tensor(case.counts, dtype=torch.int32)
    run = functools.partial(multiply, framed(inputs.x), weight, counts, "decode", dtype=torch.float32)
    one, several = (run(parts=p) for p in (1, parts))
    y = run(parts=parts, limit=case.limit, condition=2)
    check_unchecked(inputs.x, inputs.weight, case.counts, y.to(torch.bfloat16))
    assert torch.equal(y, several if case.few else one)
    if max(case.counts) > 0:
        assert not torch.equal(one, several), "the two ways can be told apart"


# ---- through the backend


@pytest.mark.parametrize("rows", [(4, 0, 2, 1), (5, 0, 0, 2)], ids=PHASES)
@pytest.mark.parametrize("layout", ["tiles", "public"])
def test_phase_auto(layout: str, rows: tuple[int, ...]) -> None:
    inputs = make_inputs(Case(rows, 48, 128, "int4_asym", 32))
    y = grouped_gemm(inputs.x, in_layout(inputs.weight, layout), inputs.plan, backend="triton")
    assert_no_worse(y, inputs.oracle, inputs.peer)


def test_auto_takes_the_interpreted_kernels() -> None:
    inputs = make_inputs(Case((2, 0, 3), 16, 128, "int4_asym", 32))
    weight, named = inputs.weight, grouped_gemm(inputs.x, inputs.weight, inputs.plan, backend="triton")
    assert torch.equal(grouped_gemm(inputs.x, weight, inputs.plan), named)
    y = moe(inputs.x, weight.codes, inputs.counts, scales=weight.scales, zeros=weight.zeros, asym=True, group_size=32)
    assert_no_worse(y, inputs.oracle, inputs.peer)


@pytest.mark.parametrize("fmt", FORMATS)
def test_fp32_results(fmt: str) -> None:
    """problem.wide: the sums themselves."""
    dtype = torch.float16 if fmt == "fp16" else torch.bfloat16
    inputs = make_inputs(Case((2, 0, 19), 16, 64, fmt, 32, dtype))
    weight = inputs.weight
    for phase in PHASES:
        problem = Problem.of("test", inputs.x, weight, phase=phase, wide=True)
        y = BACKENDS["triton"].run(problem, inputs.x, weight, inputs.plan)
        assert y.dtype == torch.float32
        assert_no_worse(y.to(dtype), inputs.oracle, inputs.peer)
        assert (y - inputs.oracle).abs().max() < 0.01 * inputs.oracle.abs().max()


def unaligned(weight: QuantWeight, offset: int, stride: int) -> QuantWeight:
    """The same codes, `offset` bytes into a buffer, rows `stride` bytes further apart."""
    e, n, b = weight.codes.shape
    raw = torch.full((e * n * (b + stride) + offset,), 0xFF, dtype=torch.uint8)
    codes = raw[offset:].view(e, n, b + stride)[:, :, :b]
    codes.copy_(weight.codes.view(torch.uint8))
    return weight.with_tensors(codes.view(weight.codes.dtype), *weight.tensors[1:])


@pytest.mark.parametrize(("offset", "stride"), [(1, 0), (0, 2), (0, 4)], ids=str)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fmt", ["int4_sym", "int2_sym", "int8_asym", "fp8_e4m3"])
def test_codes_that_are_a_view(fmt: str, phase: str, offset: int, stride: int) -> None:
    """A slice of a larger tensor: right, or refused."""
    inputs = make_inputs(Case((2, 0, 3), 16, 128, fmt, 32))
    weight = unaligned(inputs.weight, offset, stride)
    problem = Problem.of("test", inputs.x, weight, phase=phase)
    if BACKENDS["triton"].answer(problem).ok:
        y = BACKENDS["triton"].run(problem, inputs.x, weight, inputs.plan)
        assert_no_worse(y, grouped_gemm_reference(inputs.x, weight, (2, 0, 3)), peer_gemm(inputs.x, weight, (2, 0, 3)))
