"""The Triton kernels on a GPU: every format and layout against the oracle, bits between paths, graphs, traps."""

from __future__ import annotations

import dataclasses
import zlib

import pytest
import torch
from gpu_tools import no_sync

from qexperts import FORMATS, TokenPlan, dequantize, grouped_gemm, moe, prepare, quantize
from qexperts.backends import Problem, triton_backend
from qexperts.backends.triton_backend import run_into
from qexperts.testing import Case, Inputs, assert_no_worse, make_inputs, nan_filled

pytestmark = pytest.mark.gpu

ROWS = (70, 0, 16, 5, 130, 33, 300)
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
DTYPES = (torch.bfloat16, torch.float16)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def nvidia() -> bool:
    return torch.version.hip is None


def inputs(case: Case) -> Inputs:
    return make_inputs(case, device(), seed=zlib.crc32(str(case).encode()))


def run(i: Inputs, weight, phase: str, limit: int = 4) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The kernels into a result that shows what nobody wrote."""
    problem = Problem.of("test", i.x, weight, phase=phase, decode_threshold=limit)
    y = nan_filled(i.x.shape[0], weight.N, dtype=i.x.dtype, device=device())
    run_into(problem, y, i.x, weight, i.plan.counts)
    return y


CASES = [
    *(Case(ROWS, 192, 256, f, 128, d, why="classes, empty expert, N not of 128") for f in QUANTIZED for d in DTYPES),
    *(Case(ROWS, 128, 512, f, g, why="groups") for f in QUANTIZED for g in (16, 32, 64, 256, None)),
    *(Case((1, 2, 0, 4), 256, 384, f, 128, negative_scales=True, why="decode, negative scales") for f in QUANTIZED),
    *(Case((3, 20), 48, 80, f, 16, why="K and N of no block") for f in QUANTIZED),
    *(Case(ROWS, 192, 256, f, None, d, why="unquantized") for f, d in zip(("bf16", "fp16"), DTYPES, strict=True)),
]


@pytest.mark.parametrize("phase", ["prefill", "decode", "auto"])
@pytest.mark.parametrize("layout", ["public", "prepared"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_format(case: Case, layout: str, phase: str) -> None:
    i = inputs(case)
    weight = prepare(i.weight, keep_source=True) if layout == "prepared" else i.weight
    assert_no_worse(run(i, weight, phase), i.oracle, i.peer, case.K)


@pytest.mark.parametrize("scale_layout", ["channel", "tensor", "block128"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["int8_sym", "int4_asym", "int2_sym", "fp8_e4m3"])
def test_scales_of_other_dtypes_and_layouts(name: str, scale_dtype: torch.dtype, scale_layout: str) -> None:
    if FORMATS[name].asym and scale_layout != "channel":
        pytest.skip("asymmetric formats have group and channel scales")
    w = quantize(
        torch.randn(3, 192, 320, device=device()) / 20, name, scale_layout=scale_layout, scale_dtype=scale_dtype
    )
    i = Inputs.of(torch.randn(90, 320, device=device(), dtype=torch.bfloat16), w, (20, 0, 70))
    for weight in (w, prepare(w, keep_source=True)):
        for phase in ("prefill", "decode"):
            assert_no_worse(run(i, weight, phase), i.oracle, i.peer, 320)


@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="grouped mm is compared on CUDA")
@pytest.mark.parametrize("name", QUANTIZED)
def test_bits_of_prepared_prefill_are_those_of_grouped_mm(name: str) -> None:
    if not nvidia() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("measured on sm_90")
    i = inputs(Case(ROWS, 256, 512, name, 128))
    dense = dequantize(i.weight, torch.bfloat16)
    expected = torch._grouped_mm(i.x, dense.mT, offs=i.plan.expert_offsets[1:])
    assert torch.equal(run(i, prepare(i.weight, keep_source=True), "prefill"), expected)


@pytest.mark.parametrize("layout", ["public", "prepared"])
@pytest.mark.parametrize("name", [*QUANTIZED, "bf16"])
def test_phases_give_the_same_bits_where_k_is_not_split(name: str, layout: str) -> None:
    """`auto` relies on it between the shape rules."""
    if not nvidia():
        pytest.skip("promised on NVIDIA only")
    i = inputs(Case((9, 0, 40, 1, 2, 3, 4, 30) * 8, 1024, 512, name, 128))
    weight = prepare(i.weight, keep_source=True) if layout == "prepared" else i.weight
    assert torch.equal(run(i, weight, "prefill"), run(i, weight, "decode"))


@pytest.mark.parametrize("rows", [(1, 1, 0, 0), (2, 1, 5, 0)], ids=str)
def test_auto_is_one_of_the_phases_where_k_is_split(rows: tuple[int, ...]) -> None:
    i = inputs(Case(rows, 64, 2048, "int4_sym", 128))
    weight = prepare(i.weight, keep_source=True)
    expected = "decode" if max(rows) <= 1 else "prefill"
    assert torch.equal(run(i, weight, "auto", 1), run(i, weight, expected))


@pytest.mark.parametrize("phase", ["prefill", "decode", "auto"])
@pytest.mark.parametrize("counts", [(3, -5, 10, 2), (30, 30, 30, 30), (0, 0, 0, 0), (5, 4, 0, 0)], ids=str)
def test_counts_that_do_not_add_up(counts: tuple[int, ...], phase: str) -> None:
    i = inputs(Case((10, 10, 10, 10), 128, 256, "int4_asym", 64))
    tensor = torch.tensor(counts, dtype=torch.int64, device=device())
    plan = TokenPlan.from_counts(tensor, 40)
    used = plan.num_tokens_per_expert.tolist()
    expected = Inputs.of(i.x, i.weight, used)
    y = run(dataclasses.replace(i, plan=plan), prepare(i.weight, keep_source=True), phase)
    assert_no_worse(y, expected.oracle, expected.peer, 256)
    assert not y[sum(used) :].any()


@pytest.mark.parametrize("phase", ["prefill", "decode", "auto"])
@pytest.mark.parametrize("layout", ["public", "prepared"])
def test_a_graph_replays_with_other_counts(layout: str, phase: str) -> None:
    i = inputs(Case((4, 0, 20, 8), 192, 512, "int4_sym", 128))
    weight = prepare(i.weight, keep_source=True) if layout == "prepared" else i.weight
    counts = i.counts.clone()
    plan = TokenPlan.from_counts(counts, 32)
    problem = Problem.of("test", i.x, weight, phase=phase)

    def call() -> torch.Tensor:
        return triton_backend.run(problem, i.x, weight, plan)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for rows in ((4, 0, 20, 8), (0, 0, 32, 0), (8, 8, 8, 8), (1, 31, 0, 0), (2, 3, 1, 4)):
        counts.copy_(torch.tensor(rows, dtype=torch.int32))
        y.fill_(float("nan"))
        graph.replay()
        expected = Inputs.of(i.x, i.weight, rows)
        assert_no_worse(y, expected.oracle, expected.peer, 512)


def test_the_first_call_of_a_kind_raises_inside_a_capture() -> None:
    i = inputs(Case((4, 3), 16 * 23, 192, "int2_sym", 64))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="call once"), torch.cuda.graph(graph):
        triton_backend.run(Problem.of("test", i.x, i.weight, phase="prefill"), i.x, i.weight, i.plan)


@pytest.mark.parametrize("phase", ["prefill", "decode", "auto"])
def test_nothing_synchronises(phase: str) -> None:
    i = inputs(Case((4, 0, 20, 8), 128, 256, "int4_sym", 128))
    weight = prepare(i.weight, keep_source=True)

    def calls() -> None:
        moe(i.x, i.weight.codes, i.counts, scales=i.weight.scales, phase=phase)
        grouped_gemm(i.x, weight, TokenPlan.from_counts(i.counts, 32))

    calls()
    with no_sync():
        calls()


def test_rows_may_have_a_stride_and_streams_do_not_mix() -> None:
    i = inputs(Case((40, 3), 128, 256, "int8_asym", 128))
    wide = torch.zeros(43, 300, device=device(), dtype=torch.bfloat16)
    wide[:, 5:261] = i.x
    weight = prepare(i.weight, keep_source=True)
    for x in (wide[:, 5:261], i.x):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = grouped_gemm(x, weight, i.plan)
        stream.synchronize()
        assert_no_worse(y, i.oracle, i.peer, 256)


def test_known_calls_are_still_checked_by_kind() -> None:
    """A call like one before skips the checks; one that differs in anything they read does not."""
    i = inputs(Case((4, 3), 64, 128, "int4_sym", 128))
    arguments = (i.x, i.weight.codes, i.counts)
    first = moe(*arguments, scales=i.weight.scales)
    assert torch.equal(first, moe(*arguments, scales=i.weight.scales))
    with pytest.raises(ValueError, match="scales"):
        moe(*arguments, scales=i.weight.scales.float())
    with pytest.raises(ValueError):
        moe(i.x[:, :64].contiguous(), i.weight.codes, i.counts, scales=i.weight.scales)
    assert moe(i.x[:0], i.weight.codes, i.counts * 0, scales=i.weight.scales).shape == (0, 64)


@pytest.mark.parametrize("stages", [3, 4, 5])
@pytest.mark.parametrize("name", ["int4_sym", "int8_sym"])
def test_no_result_depends_on_the_stages(name: str, stages: int) -> None:
    """With 2, Triton 3.6 overwrites operands that are still read; `config.valid` refuses it."""
    from qexperts.kernels import config, prefill, schedule
    from qexperts.kernels.operand import operand

    i = inputs(Case(ROWS, 256, 1024, name, 128))
    weight = prepare(i.weight, keep_source=True)
    sizes = config.PrefillConfig(128, 64, stages)
    assert config.valid(sizes, True) is None
    assert config.valid(dataclasses.replace(sizes, stages=2), True) is not None
    y = nan_filled(i.x.shape[0], 256, dtype=i.x.dtype, device=device())
    tiles = torch.empty(schedule.size(i.x.shape[0], 7), dtype=torch.int32, device=device())
    schedule.launch(tiles, y, i.counts)
    prefill.launch(y, i.x, operand(weight), tiles, 7, sizes, 8, "ptx" if nvidia() else "portable")
    assert torch.equal(y, run(i, weight, "prefill"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_ptx_and_its_twin_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """All codes: K = 512 holds every byte twice. Left out are the FP8 codes that stand for NaN or infinity, which
    `dequant.py` does not preserve. No scale is above 1: 57344, the largest e5m2 code, times 1.15 is infinite in fp16,
    and infinity times the zeros of x is NaN in every row, equal to nothing."""
    if not nvidia():
        pytest.skip("PTX runs on NVIDIA")
    from qexperts.kernels import config, prefill, schedule
    from qexperts.kernels.operand import operand

    fmt = FORMATS[name]
    codes = torch.arange(256, dtype=torch.uint8).repeat(2 * 16 // fmt.codes_per_byte).view(1, 16, -1)
    if fmt.kind == "fp8":
        finite = torch.isfinite(codes.view(fmt.storage).float())
        assert len(codes[finite].unique()) == {"fp8_e4m3": 254, "fp8_e5m2": 248}[name]
        codes = torch.where(finite, codes, 0).view(fmt.storage)
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(1, 16, codes.shape[2] * fmt.codes_per_byte // 128, generator=generator)
    scales = (2 * scales - 1).to(dtype)
    zeros = torch.randint(0, 2**fmt.bits + 1, scales.shape, generator=generator).to(dtype) if fmt.asym else None
    weight = type(quantize(torch.zeros(1, 16, 128), "int8_sym"))(codes, scales, zeros, fmt, 128).to(device())
    x = torch.eye(weight.K, device=device(), dtype=dtype)  # y = w.T: each weight by itself
    counts = torch.tensor([weight.K], dtype=torch.int32, device=device())
    results = []
    for path in ("ptx", "portable"):
        y = nan_filled(weight.K, 16, dtype=dtype, device=device())
        tiles = torch.empty(schedule.size(weight.K, 1), dtype=torch.int32, device=device())
        schedule.launch(tiles, y, counts)
        prepared = operand(prepare(weight, keep_source=True))
        prefill.launch(y, x, prepared, tiles, 1, config.PrefillConfig(64, 64, 3), 4, path)
        results.append(y)
    expected = dequantize(weight, dtype)[0]
    assert expected.isfinite().all()
    assert torch.equal(*results)
    assert torch.equal(results[0].T, expected)
