"""Backend "hopper" on a GPU: the bits of backend "triton", in every way in which it is called."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_tools import no_sync

from qexperts import FORMATS, TokenPlan, grouped_gemm, moe, prepare
from qexperts.backends import BACKENDS, Problem, hopper_backend, select, triton_backend
from qexperts.formats import QuantWeight
from qexperts.strategies import parse_strategy
from qexperts.testing import Case, Inputs, assert_no_worse, make_inputs, nan_filled

pytestmark = pytest.mark.gpu

PHASES = ["prefill", "decode", "auto"]


@pytest.fixture
def device() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    return device


def made(case: Case, device: torch.device, seed: int = 3) -> tuple[Inputs, QuantWeight]:
    i = make_inputs(case, device, seed=seed)
    return i, prepare(i.weight, "hopper", keep_source=True)


def run(i: Inputs, weight: QuantWeight, phase: str, name: str = "hopper", limit: int = 4) -> torch.Tensor:
    """A backend into a result that shows what nobody wrote."""
    y = nan_filled(i.x.shape[0], weight.N, dtype=i.x.dtype, device=i.x.device)
    problem = Problem.of("test", i.x, weight, phase=phase, decode_threshold=limit)
    {"hopper": hopper_backend, "triton": triton_backend}[name].run_into(problem, y, i.x, weight, i.plan.counts)
    return y


def case(*rows: int, n: int = 384, k: int = 1536, fmt: str = "int4_sym", why: str = "") -> Case:
    return Case(rows, n, k, fmt, 128, why=why)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "which",
    [
        case(70, 0, 16, 5, 130, 33, 300, why="all classes"),
        case(1, 0, 0, 2, why="a decode"),
        case(5, 1, 0, 2, n=128, k=2048, why="between the shape rules, K in parts"),
        case(1, n=128, k=128, why="one row"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (fmt, dtype)
        for fmt in FORMATS
        for dtype in (torch.bfloat16, torch.float16)
        if FORMATS[fmt].quantized or FORMATS[fmt].storage == dtype
    ],
    ids=str,
)
def test_bits_and_oracle(fmt: str, dtype: torch.dtype, which: Case, phase: str, device: torch.device) -> None:
    i, weight = made(dataclasses.replace(which, format=fmt, dtype=dtype), device)
    y = run(i, weight, phase)
    assert torch.equal(y, run(i, weight, phase, "triton"))
    assert_no_worse(y, i.oracle, i.peer, which.K)
    assert torch.equal(grouped_gemm(i.x, weight, i.plan, phase=phase), y)  # whoever `auto` takes


def test_auto_takes_it_for_prefills_of_prepared_weights(device: torch.device) -> None:
    i, weight = made(case(70, 9, n=128, k=256), device)
    for phase, prepared, picked in (
        ("prefill", True, "hopper"), ("auto", True, "hopper"), ("decode", True, "triton"), ("prefill", False, "triton"),
    ):  # fmt: skip
        assert select(Problem.of("test", i.x, weight if prepared else i.weight, phase=phase)).name == picked
    y = moe(i.x, i.weight.codes, i.counts, scales=i.weight.scales, phase="prefill")
    assert_no_worse(y, i.oracle, i.peer, 256)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("counts", [(3, -5, 10, 2), (30, 30, 30, 30), (0, 0, 0, 0), (5, 4, 0, 0)], ids=str)
def test_counts_that_do_not_add_up(counts: tuple[int, ...], phase: str, device: torch.device) -> None:
    i, weight = made(case(10, 10, 10, 10, n=128, k=256), device)
    plan = TokenPlan.from_counts(torch.tensor(counts, dtype=torch.int64, device=device), 40)
    used = plan.num_tokens_per_expert.tolist()
    expected = Inputs.of(i.x, i.weight, used)
    y = run(dataclasses.replace(i, plan=plan), weight, phase)
    assert_no_worse(y, expected.oracle, expected.peer, 256)
    assert not y[sum(used) :].any()


@pytest.mark.parametrize("phase", PHASES)
def test_a_graph_replays_with_other_counts_and_values(phase: str, device: torch.device) -> None:
    i, weight = made(case(4, 0, 20, 8, n=256, k=512), device)
    counts, x = i.counts.clone(), i.x.clone()
    plan = TokenPlan.from_counts(counts, 32)

    def call() -> torch.Tensor:
        return grouped_gemm(x, weight, plan, backend="hopper", phase=phase)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for seed, rows in enumerate(((4, 0, 20, 8), (0, 0, 32, 0), (8, 8, 8, 8), (1, 31, 0, 0), (2, 3, 1, 4))):
        other = make_inputs(case(4, 0, 20, 8, n=256, k=512), device, seed=seed + 10)
        x.copy_(other.x)
        counts.copy_(torch.tensor(rows, dtype=torch.int32))
        y.fill_(float("nan"))
        graph.replay()
        expected = Inputs.of(x, i.weight, rows)
        assert_no_worse(y, expected.oracle, expected.peer, 512)


def test_the_first_call_of_a_kind_raises_inside_a_capture(device: torch.device) -> None:
    i, weight = made(case(40, 30, n=128 * 7, k=128 * 5), device)
    from qexperts.kernels import schedule

    tiles = torch.empty(schedule.size(70, 2), dtype=torch.int32, device=device)
    schedule.launch(tiles, nan_filled(70, 128 * 7, dtype=i.x.dtype, device=device), i.counts, split=False)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"Gluon prefill kernel .* call once"), torch.cuda.graph(graph):
        BACKENDS["hopper"].run(Problem.of("test", i.x, weight, phase="prefill"), i.x, weight, i.plan)


def test_nothing_synchronises(device: torch.device) -> None:
    i, weight = made(case(40, 0, 200, 8, n=128, k=256), device)

    def calls() -> None:
        for phase in PHASES:
            grouped_gemm(i.x, weight, TokenPlan.from_counts(i.counts, 248), backend="hopper", phase=phase)

    calls()
    with no_sync():
        calls()


def test_sizes_that_share_a_kernel(device: torch.device) -> None:
    """Descriptors are of the call's own sizes, not of those with which the kernel was compiled."""
    for rows in ((3, 2), (140, 200), (9, 130, 7, 260), (1,), (300, 300, 300, 5)):
        i, weight = made(case(*rows, n=128, k=256), device)
        assert torch.equal(run(i, weight, "prefill"), run(i, weight, "prefill", "triton"))


@pytest.mark.parametrize("columns", [(0, 0), (0, 8), (8, 8), (5, 11), (4, 0)], ids=str)
def test_rows_may_lie_anywhere_and_streams_do_not_mix(columns: tuple[int, int], device: torch.device) -> None:
    before, after = columns
    i, weight = made(case(140, 3, n=128, k=256), device)
    wide = torch.full((143, before + 256 + after), float("nan"), device=device, dtype=torch.bfloat16)
    x = wide[:, before : before + 256]
    x.copy_(i.x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = run(dataclasses.replace(i, x=x), weight, "prefill")
    stream.synchronize()
    assert torch.equal(y, run(i, weight, "prefill", "triton"))


def test_unquantized_weights_may_lie_anywhere(device: torch.device) -> None:
    i, weight = made(case(140, 3, n=128, k=256, fmt="bf16"), device)
    expected = run(i, weight, "prefill", "triton")
    for before, after in ((0, 8), (8, 8), (5, 11), (4, 0)):
        wide = torch.full((2, 144, before + 256 + after), float("nan"), device=device, dtype=torch.bfloat16)
        codes = wide[:, :128, before : before + 256]
        codes.copy_(weight.codes)
        assert torch.equal(run(i, weight.with_tensors(codes, None, None), "prefill"), expected)
    first = weight.with_tensors(weight.codes[:1].expand(2, -1, -1), None, None)
    assert torch.equal(run(i, first, "prefill"), run(i, first, "prefill", "triton"))


def test_rows_that_are_one_row(device: torch.device) -> None:
    i, weight = made(case(140, 3, n=128, k=256), device)
    x = i.x[:1].expand(143, 256)
    y = run(dataclasses.replace(i, x=x), weight, "prefill")
    assert torch.equal(y, run(dataclasses.replace(i, x=x.contiguous()), weight, "prefill"))


def test_one_bound_call_serves_weights_that_come_and_go(device: torch.device) -> None:
    """Encoded descriptors are kept by address, and memory is used again for other weights, activations and sizes."""
    for seed in range(4):
        for rows in ((64, 70), (30, 3), (64, 70)):
            i, weight = made(case(*rows, n=128, k=256), device, seed)
            y = run(i, weight, "prefill")
            assert_no_worse(y, i.oracle, i.peer, 256)
            assert torch.equal(y, run(i, weight, "prefill", "triton"))


@pytest.mark.parametrize("strategy", ["per_expert", "pad_and_clip(40)", "full_pad", "grouped"])
def test_strategies(strategy: str, device: torch.device) -> None:
    i, weight = made(case(70, 0, 16, 5, 130, 33, n=128, k=256), device)
    schedule = parse_strategy(strategy)[0].schedule(i.plan)

    def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, -1 if dtype == torch.int32 else float("nan"), dtype=dtype, device=device)

    tables = None if schedule.grouped else triton_backend.TileTables(schedule, weight.E, split=False)
    gemm = triton_backend.PackedGemm(weight, take, tables, "prefill", hopper_backend.PREFILL)
    out = None if schedule.grouped else take((i.x.shape[0], weight.N), i.x.dtype)
    call = schedule.bind(i.x, gemm, out, take)
    expected = run(i, weight, "prefill", "triton")
    for _ in range(2):
        assert torch.equal(call(), expected)
