"""On a GPU: the oracle again, and what only a GPU can break: host syncs, graphs, streams, counts nobody checked.

`auto`, and so every tensor-level call, takes triton wherever it runs; what is about the torch backend names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_tools import no_sync
from test_ops import (
    DTYPES,
    FORWARD_ONLY,
    KERNELS,
    QUANTIZED,
    SUPPORT,
    UNQUANTIZED,
    arguments,
    dtype_for,
    matrix,
    name_of,
)

from qexperts import (
    FORMATS,
    Problem,
    QuantWeight,
    TokenPlan,
    UnsupportedError,
    check_tokens,
    clear_moe_prefill_workspace_cache,
    dequantize,
    explain,
    grouped_gemm,
    moe,
    moe_gemm,
    moe_gemm_prefill,
    quantize,
    tile_schedule,
)
from qexperts.backends import select
from qexperts.reference import grouped_gemm_reference
from qexperts.testing import Case, Inputs, assert_no_worse, make_inputs, nan_filled, peer_gemm
from qexperts.workspace import workspace_bytes

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DECODE, PREFILL = (1, 0, 2, 0, 1), (0, 33, 1, 0, 6, 0)
GROUPED_MM = [9, 10]  # compute capabilities where torch multiplies bf16 groups in one launch, without a sync
each_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.fixture(autouse=True)
def finish() -> Iterator[None]:
    """A kernel's fault belongs to the test that launched it."""
    if torch.accelerator.current_accelerator().type != DEVICE:  # type: ignore[union-attr]
        pytest.skip("these tests speak CUDA")
    yield
    torch.cuda.synchronize()


def has_grouped_mm() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] in GROUPED_MM


def needs_grouped_mm() -> None:
    if not has_grouped_mm():
        pytest.skip("torch has no bf16 grouped mm without a sync here")


def run_on(backend: str, inputs: Inputs) -> torch.Tensor:
    """One backend by name. The plan is made here: on the current stream, and inside a capture if there is one."""
    plan = TokenPlan.from_counts(inputs.counts, inputs.x.shape[0])
    return grouped_gemm(inputs.x, inputs.weight, plan, backend=backend)


def check(case: Case, call: Callable[..., torch.Tensor]) -> None:
    """The tensor-level call, and the torch backend by name."""
    inputs = make_inputs(case, DEVICE)
    got = call(**arguments(inputs))
    assert got.shape == inputs.peer.shape and got.dtype == case.dtype and got.device == inputs.x.device
    assert_no_worse(got, inputs.oracle, inputs.peer)
    assert_no_worse(run_on("torch", inputs), inputs.oracle, inputs.peer)


# ---- results


@pytest.mark.parametrize("case", matrix(DECODE, PREFILL), ids=str)
def test_matrix(case: Case) -> None:
    check(case, KERNELS["decode" if case.rows == DECODE else "prefill"])


@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unquantized(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    for kernel in (*KERNELS.values(), moe):
        check(Case(rows, N=80, K=272, format=UNQUANTIZED[dtype], dtype=dtype), kernel)
    inputs = make_inputs(Case(rows, N=80, K=272, format=UNQUANTIZED[dtype], dtype=dtype), DEVICE)
    for weights in (inputs.weight.codes.mT.contiguous(), inputs.weight.codes.mT):
        assert_no_worse(moe_gemm(inputs.x, weights, inputs.counts), inputs.oracle, inputs.peer)
    scales = torch.rand(len(rows), 80, device=DEVICE) + 0.5
    by_row = scales.repeat_interleave(inputs.counts.long(), 0)
    peer = (inputs.peer.float() * by_row).to(dtype)
    got = moe_gemm(inputs.x, inputs.weight.codes.mT.contiguous(), inputs.counts, scales=scales)
    assert_no_worse(got, inputs.oracle * by_row, peer)


@pytest.mark.parametrize("fmt", FORMATS)
def test_many_outputs(fmt: str) -> None:
    check(Case((3, 0, 150), N=1408, K=512, format=fmt, dtype=dtype_for(fmt)), moe_gemm_prefill)


AWKWARD = [
    Case((0, 0, 90, 0), 48, 64, "", 32, why="one hot expert, the others empty"),
    Case((0, 1, 0), 48, 64, "", 32, why="one row"),
    Case((0, 0, 0), 48, 64, "", 32, why="all experts empty: zero rows"),
    Case((0, 5, 3, 0), 48, 64, "", 32, why="first and last expert empty"),
    Case((9,), 48, 64, "", 32, why="E = 1"),
    Case((1,) * 40, 48, 64, "", 32, why="one row for each expert: as many rows as experts"),
    Case((1,) * 39 + (2,), 48, 64, "", 32, why="one row more than experts"),
    Case((0, 5, 3, 0), 48, 96, "", 32, negative_scales=True, why="negative scales"),
]


@pytest.mark.parametrize("case", AWKWARD, ids=lambda c: c.why.replace(" ", "-"))
@pytest.mark.parametrize("fmt", FORMATS)
def test_awkward_counts(fmt: str, case: Case) -> None:
    for dtype in DTYPES if FORMATS[fmt].quantized else [FORMATS[fmt].storage]:
        inputs = make_inputs(dataclasses.replace(case, format=fmt, dtype=dtype), DEVICE)
        for backend in ("auto", "torch"):
            out = nan_filled(*inputs.peer.shape, dtype=dtype, device=DEVICE)
            assert grouped_gemm(inputs.x, inputs.weight, inputs.plan, out=out, backend=backend) is out
            assert_no_worse(out, inputs.oracle, inputs.peer)


@pytest.mark.parametrize(("k", "group"), [(20, 4), (36, 12), (100, 20), (44, 44), (40, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_k_that_is_no_multiple_of_sixteen(fmt: str, dtype: torch.dtype, k: int, group: int) -> None:
    for rows in ((1, 0, 1), (2, 0, 40)):
        case = Case(rows, N=16, K=k, format=fmt, group_size=group, dtype=dtype)
        for kernel in KERNELS.values():
            check(case, kernel)


def test_unquantized_k_that_is_no_multiple_of_eight() -> None:
    for k, rows in itertools.product((17, 20, 36), ((1, 0, 1), (2, 0, 40))):
        check(Case(rows, N=16, K=k, format="bf16"), moe_gemm_prefill)
        inputs = make_inputs(Case(rows, N=16, K=k, format="bf16"), DEVICE)
        weights = inputs.weight.codes.mT.contiguous()
        assert_no_worse(moe_gemm(inputs.x, weights, inputs.counts), inputs.oracle, inputs.peer)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize(
    ("fmt", "layout"),
    [("int4_asym", "group"), ("int8_sym", "tensor"), ("int2_asym", "channel"), ("fp8_e4m3", "block128")],
)
def test_scales_of_any_layout_and_dtype(fmt: str, layout: str, scale_dtype: torch.dtype) -> None:
    w = torch.randn(3, 144, 272, generator=torch.Generator().manual_seed(3)) * 0.06
    weight = quantize(w, fmt, group_size=16, scale_layout=layout, scale_dtype=scale_dtype).to(DEVICE)
    for rows in ((1, 0, 1), (2, 0, 40)):
        x = torch.randn(sum(rows), 272, device=DEVICE, dtype=torch.bfloat16)
        plan = TokenPlan.from_counts(torch.tensor(rows, device=DEVICE), sum(rows))
        oracle, peer = grouped_gemm_reference(x, weight, rows), peer_gemm(x, weight, rows)
        for backend in ("auto", "torch"):
            assert_no_worse(grouped_gemm(x, weight, plan, backend=backend), oracle, peer)


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=name_of)
@pytest.mark.parametrize("rows", [(1, 1, 0), (4, 3, 57)], ids=str)
def test_per_tensor_scheme(storage: torch.dtype, rows: tuple[int, ...]) -> None:
    w = torch.randn(3, 80, 48, generator=torch.Generator().manual_seed(2))
    codes = (w.mul(20).to(torch.int8) if storage == torch.int8 else w.to(storage)).to(DEVICE)
    fmt = {torch.int8: "int8_sym", torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}[storage]
    scales = torch.tensor([0.01, -0.37, 0.1], device=DEVICE)
    weight = QuantWeight(codes.mT.contiguous().view(FORMATS[fmt].storage), scales, None, FORMATS[fmt], None, "tensor")
    counts = torch.tensor(rows, device=DEVICE, dtype=torch.int32)
    for dtype in DTYPES:
        x = torch.randn(sum(rows), 80, device=DEVICE, dtype=dtype)
        oracle, peer = grouped_gemm_reference(x, weight, rows), peer_gemm(x, weight, rows)
        got = moe_gemm_prefill(x, codes, counts, scales=scales, scale_scheme="per_tensor")
        assert_no_worse(got, oracle, peer)
        plan, where_they_lie = TokenPlan.from_counts(counts, len(x)), weight.codes.mT.contiguous().mT
        strided = weight.with_tensors(where_they_lie, scales)
        assert_no_worse(grouped_gemm(x, strided, plan, backend="torch"), oracle, peer)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows", [(1, 0, 2, 0), (3, 0, 9, 40)], ids=str)
def test_strided_activations(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """Row strides that are no multiple of 8, starts that are not aligned, a stride along k."""
    for fmt in ("int4_sym", UNQUANTIZED[dtype]):
        inputs = make_inputs(Case(rows, N=32, K=96, format=fmt, group_size=32, dtype=dtype), DEVICE)
        x = inputs.x
        wide = nan_filled(len(x), 103, dtype=dtype, device=DEVICE)
        wide[:, 5:101] = x
        views = [wide[:, 5:101], x.repeat_interleave(2, 0)[::2], x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]]
        for call, view in itertools.product((*KERNELS.values(), moe), views):
            got = call(**(arguments(inputs) | dict(activations=view)))
            assert_no_worse(got, inputs.oracle, inputs.peer)
            assert torch.equal(got, call(**arguments(inputs)))
        for view in views:
            got = run_on("torch", dataclasses.replace(inputs, x=view))
            assert_no_worse(got, inputs.oracle, inputs.peer)
            assert torch.equal(got, run_on("torch", inputs))


@pytest.mark.parametrize("fmt", FORMATS)
def test_moe_equals_its_kernel_bit_for_bit(fmt: str) -> None:
    for rows in (DECODE, PREFILL, (4, 4, 4), (4, 4, 5)):
        call = arguments(make_inputs(Case(rows, N=48, K=96, format=fmt, group_size=32, dtype=dtype_for(fmt)), DEVICE))
        for phase, kernel in KERNELS.items():
            assert torch.equal(moe(**call, phase=phase), kernel(**call)), (rows, phase)
        decode = max(rows) <= 4
        assert torch.equal(moe(**call), KERNELS["decode" if decode else "prefill"](**call)), rows


# ---- no host synchronisation


def small(fmt: str, dtype: torch.dtype, rows: tuple[int, ...], seed: int = 0) -> Inputs:
    return make_inputs(Case(rows, N=48, K=96, format=fmt, group_size=32, dtype=dtype), DEVICE, seed)


def torch_reads_counts(dtype: torch.dtype, rows: tuple[int, ...]) -> bool:
    """Whether the torch backend, and with it every gradient, has no way but to read the counts on the host."""
    return sum(rows) > len(rows) and not (dtype == torch.bfloat16 and has_grouped_mm())


WAYS = [(fmt, torch.bfloat16, rows) for fmt in FORMATS if fmt != "fp16" for rows in (DECODE, PREFILL)]
WAYS += [(fmt, torch.float16, rows) for fmt in FORMATS if fmt != "bf16" for rows in (DECODE, PREFILL)]


@pytest.mark.parametrize(("fmt", "dtype", "rows"), WAYS, ids=name_of)
def test_no_host_sync(fmt: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    inputs = small(fmt, dtype, rows)
    call = arguments(inputs)
    clear_moe_prefill_workspace_cache()
    long = call | dict(num_tokens_per_expert=inputs.counts.long())
    x = inputs.x.clone().requires_grad_()
    with no_sync():  # the first call too
        results = [kernel(**c) for kernel in (*KERNELS.values(), moe) for c in (call, long)]
        results.append(grouped_gemm(inputs.x, inputs.weight, inputs.plan))
        if not torch_reads_counts(dtype, rows):
            grouped_gemm(x, inputs.weight, inputs.plan).sum().backward()
    for result in results:
        assert_no_worse(result, inputs.oracle, inputs.peer)
    answer = {a.backend: a for a in explain(Problem.of("grouped_gemm", inputs.x, inputs.weight))}["triton"]
    assert answer.ok and not answer.syncs


@pytest.mark.parametrize(("fmt", "dtype", "rows"), WAYS, ids=name_of)
def test_the_torch_backend_syncs_where_it_says_so_and_nowhere_else(
    fmt: str, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    inputs, syncs = small(fmt, dtype, rows), torch_reads_counts(dtype, rows)
    clear_moe_prefill_workspace_cache()
    with pytest.raises(RuntimeError, match="synchroniz") if syncs else contextlib.nullcontext(), no_sync():
        got = run_on("torch", inputs)
    if not syncs:
        assert_no_worse(got, inputs.oracle, inputs.peer)
    answer = {a.backend: a for a in explain(Problem.of("grouped_gemm", inputs.x, inputs.weight))}["torch"]
    assert answer.ok and answer.syncs == syncs


def test_planning_does_not_sync() -> None:
    counts = torch.tensor([3, 0, 5], device=DEVICE)
    ids = torch.tensor([[0, 2], [-1, 1], [2, 7]], device=DEVICE)
    with no_sync():
        plan = TokenPlan.from_counts(counts, 8)
        routed = TokenPlan.from_expert_ids(ids, 3)
        for p in (plan, routed):
            p.row_expert()
            tile_schedule(p)
    assert plan.expert_offsets.tolist() == [0, 3, 3, 8]
    assert routed.expert_offsets.tolist() == [0, 1, 2, 4]


def test_explain_tells_of_the_sync_that_torch_forces() -> None:
    inputs = make_inputs(Case(PREFILL, N=48, K=96, format="int4_sym", group_size=32, dtype=torch.float16), DEVICE)
    answers = {a.backend: a for a in explain(Problem.of("grouped_gemm", inputs.x, inputs.weight))}
    assert answers["torch"].ok and answers["torch"].syncs and "sync" in answers["torch"].note


def test_dequantize_does_not_sync() -> None:
    for fmt in FORMATS:
        weight = make_inputs(Case((1, 1), N=48, K=96, format=fmt, group_size=32, dtype=dtype_for(fmt)), DEVICE).weight
        with no_sync():
            got = dequantize(weight, torch.bfloat16)
        assert torch.equal(got.cpu(), dequantize(weight.to("cpu"), torch.bfloat16))


# ---- graphs


def capture(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize(("fmt", "dtype", "rows"), WAYS, ids=name_of)
def test_a_graph_replays_with_other_counts(fmt: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    inputs = small(fmt, dtype, rows)
    others = [rows, rows[::-1], (sum(rows),) + (0,) * (len(rows) - 1), (0,) * (len(rows) - 1) + (sum(rows),)]
    ways: list[Callable[[Inputs], torch.Tensor]] = [
        lambda i, kernel=kernel: kernel(**arguments(i)) for kernel in (*KERNELS.values(), moe)
    ]
    if not torch_reads_counts(dtype, rows):
        ways.append(lambda i: run_on("torch", i))
    for way in ways:
        fixed = dataclasses.replace(inputs, x=inputs.x.clone(), counts=inputs.counts.clone())
        graph, result = capture(lambda way=way, fixed=fixed: way(fixed))  # type: ignore[misc]
        for seed, counts in enumerate(others):
            other = small(fmt, dtype, counts, seed)
            fixed.x.copy_(other.x)
            fixed.counts.copy_(other.counts)
            result.fill_(math.nan)
            graph.replay()
            oracle = grouped_gemm_reference(other.x, inputs.weight, counts)
            assert_no_worse(result, oracle, peer_gemm(other.x, inputs.weight, counts))


@each_backend
def test_a_graph_does_not_share_memory_with_eager_calls(backend: str) -> None:
    if backend == "torch":
        needs_grouped_mm()
    inputs = make_inputs(Case(PREFILL, N=64, K=128, format="int4_asym", group_size=32), DEVICE)
    clear_moe_prefill_workspace_cache()
    graph = torch.cuda.CUDAGraph()
    run_on(backend, inputs)
    kept = workspace_bytes()
    with torch.cuda.graph(graph):
        result = run_on(backend, inputs)
    assert workspace_bytes() == kept, "memory of a capture is not kept"
    expected = run_on(backend, inputs)
    other = make_inputs(Case((50, 3, 0, 9, 1, 70), N=256, K=512, format="int4_asym", group_size=32), DEVICE)
    for clear in (False, True):
        if clear:
            clear_moe_prefill_workspace_cache()
            torch.cuda.empty_cache()
        poison = [nan_filled(1 << 20, dtype=torch.float32, device=DEVICE) for _ in range(8)]
        eager = run_on(backend, other)
        result.fill_(math.nan)
        graph.replay()
        again = run_on(backend, other)
        assert torch.equal(result, expected)
        assert_no_worse(eager, other.oracle, other.peer)
        assert torch.equal(eager, again)
        del poison


def test_fp16_with_more_rows_than_experts_cannot_be_captured_on_the_torch_backend() -> None:
    inputs = small("int4_sym", torch.float16, PREFILL)
    run_on("torch", inputs)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"graph"), torch.cuda.graph(graph):
        run_on("torch", inputs)
    torch.cuda.synchronize()
    assert_no_worse(run_on("torch", inputs), inputs.oracle, inputs.peer)  # the context is sound


# ---- counts nobody checked


def effective(counts: list[int], total: int) -> list[int]:
    """Negative counts count as 0, offsets are clamped to the rows there are."""
    left, used = total, []
    for count in counts:
        used.append(min(max(count, 0), left))
        left -= used[-1]
    return used


ODD_COUNTS = [
    [3, 0, 4, 2],
    [0, 0, 0, 0],
    [30, 0, 40, 2],
    [5, 60, 1, 1],
    [-3, 5, 0, 7],
    [-100, -1, -1, -1],
    [2, -(2**31), 40, 2**31 - 1],
    [2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    [20, 4, 4, 4],
]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("total", [3, 20], ids=["few rows", "more rows than experts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("counts", ODD_COUNTS, ids=str)
def test_counts_that_do_not_add_up(counts: list[int], dtype: torch.dtype, total: int, index: torch.dtype) -> None:
    used = effective(counts, total)
    end = sum(used)
    for fmt in ("int4_asym", UNQUANTIZED[dtype]):
        weight = make_inputs(Case((0,) * 4, N=32, K=64, format=fmt, group_size=32, dtype=dtype), DEVICE).weight
        x = torch.randn(total, 64, device=DEVICE, dtype=dtype)
        x[end:] = math.nan
        tensor = torch.tensor(counts, device=DEVICE, dtype=index)
        oracle, peer = (f(x[:end], weight, used) for f in (grouped_gemm_reference, peer_gemm))
        call: dict[str, Any] = dict(weight_bits=weight.format.bits)
        if weight.format.quantized:
            call |= dict(scales=weight.scales, zeros=weight.zeros, asym=True, group_size=32)
        for kernel in (*KERNELS.values(), moe):
            got = kernel(x, weight.codes, tensor, **call)
            assert (got[end:] == 0).all(), f"{kernel.__name__}: rows past the sum are not 0"
            assert_no_worse(got[:end], oracle, peer)
        for backend in ("auto", "torch"):
            out = nan_filled(total, 32, dtype=dtype, device=DEVICE)
            grouped_gemm(x, weight, TokenPlan.from_counts(tensor, total), out=out, backend=backend)
            assert (out[end:] == 0).all(), backend
            assert_no_worse(out[:end], oracle, peer)
    if sum(counts) != total or min(counts) < 0:
        with pytest.raises(ValueError):
            check_tokens(tensor, total)


@pytest.mark.parametrize("counts", [[2**32 + 2, 1, 0, 0], [2**40, 2**40, 0, 0], [-(2**40), 5, 2**33, 0]], ids=str)
def test_int64_counts_beyond_int32_read_nothing_out_of_bounds(counts: list[int]) -> None:
    plan = TokenPlan.from_counts(torch.tensor(counts, device=DEVICE), 20)
    offsets = plan.expert_offsets.tolist()
    assert offsets[0] == 0 and offsets[-1] <= 20 and offsets == sorted(offsets)
    with pytest.raises(ValueError):
        check_tokens(torch.tensor(counts, device=DEVICE), 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradients_of_rows_past_the_sum_are_zero(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case((3, 0, 4), N=32, K=64, format="int4_asym", group_size=32, dtype=dtype), DEVICE)
    x = torch.randn(9, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    grouped_gemm(x, inputs.weight, TokenPlan.from_counts(inputs.counts, 9)).sum().backward()
    assert x.grad is not None and (x.grad[7:] == 0).all() and (x.grad[:7] != 0).any()


# ---- streams and threads


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_launches_go_to_the_current_stream(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """The activations become right on that stream only after a long wait: who launches elsewhere reads NaN."""
    inputs = small("int4_asym", dtype, rows)
    ways: list[Callable[[Inputs], torch.Tensor]] = [
        lambda i, kernel=kernel: kernel(**arguments(i)) for kernel in (*KERNELS.values(), moe)
    ]
    for way in (*ways, lambda i: run_on("torch", i)):
        way(inputs)  # compiling a kernel takes longer than the wait
        late = dataclasses.replace(inputs, x=torch.full_like(inputs.x, math.nan))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.x.copy_(inputs.x)
            got = way(late)
        stream.synchronize()
        assert_no_worse(got, inputs.oracle, inputs.peer)


@each_backend
def test_two_streams_do_not_share_scratch_memory(backend: str) -> None:
    if backend == "torch":
        needs_grouped_mm()
    cases = [make_inputs(Case((40, 0, 90, 7), 128, 512, "int4_asym", 32), DEVICE, seed) for seed in (0, 1)]
    expected = [run_on(backend, inputs) for inputs in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(30):
        for i, (inputs, stream) in enumerate(zip(cases, streams, strict=True)):
            with torch.cuda.stream(stream):
                if not results[i]:
                    torch.cuda._sleep(10_000_000)  # so that both queues fill before either runs
                results[i].append(run_on(backend, inputs))
    torch.cuda.synchronize()
    for i in range(2):
        wrong = [n for n, result in enumerate(results[i]) if not torch.equal(result, expected[i])]
        assert not wrong, f"stream {i}: calls {wrong} differ"


@each_backend
def test_two_threads_on_one_stream(backend: str) -> None:
    cases = [make_inputs(Case((40, 0, 90, 7), 128, 512, "int4_asym", 32), DEVICE, seed) for seed in (0, 1)]
    expected = [run_on(backend, inputs) for inputs in cases]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(i: int) -> None:
        try:
            results = [run_on(backend, cases[i]) for _ in range(50)]
            torch.cuda.synchronize()
            failures.extend(f"thread {i}, call {n}" for n, r in enumerate(results) if not torch.equal(r, expected[i]))
        except BaseException as error:
            failures.append(f"thread {i}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not failures, failures[:5]


def test_scratch_memory_is_reused_and_released() -> None:
    """Of the torch backend; triton allocates its scratch in each call."""
    inputs = make_inputs(Case(PREFILL, N=256, K=512, format="int4_asym", group_size=32), DEVICE)
    clear_moe_prefill_workspace_cache()
    run_on("triton", inputs)
    assert workspace_bytes() == 0
    sizes = []
    for _ in range(4):
        run_on("torch", inputs)
        sizes.append(workspace_bytes())
    assert sizes[1] == sizes[2] == sizes[3] > 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    clear_moe_prefill_workspace_cache()
    assert workspace_bytes() == 0 and torch.cuda.memory_allocated() <= before - sizes[3]


# ---- gradients


@pytest.mark.parametrize("rows", [(3, 0, 9, 40), (0, 1, 1, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("k", [96, 36])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", ["16 bits", "int4_asym", "int2_sym", "fp8_e4m3"])
def test_gradients(fmt: str, dtype: torch.dtype, k: int, rows: tuple[int, ...]) -> None:
    fmt = UNQUANTIZED[dtype] if fmt == "16 bits" else fmt
    inputs = make_inputs(Case(rows, N=32, K=k, format=fmt, group_size=k // 3, dtype=dtype), DEVICE)
    w, exact = dequantize(inputs.weight, dtype), dequantize(inputs.weight, torch.float64)
    dy = torch.randn(sum(rows), 32, device=DEVICE, dtype=dtype)
    parts = list(enumerate(torch.split(dy, rows)))
    oracle = torch.cat([part.double() @ exact[e] for e, part in parts])
    peer = torch.cat([part @ w[e] for e, part in parts])
    for name, call in {
        "grouped_gemm": lambda x: grouped_gemm(x, inputs.weight, inputs.plan),
        "torch": lambda x: grouped_gemm(x, inputs.weight, inputs.plan, backend="torch"),
        "moe": lambda x: moe(**(arguments(inputs) | dict(activations=x))),
    }.items():
        x = inputs.x.clone().requires_grad_()
        y = call(x)
        assert torch.equal(y.detach(), call(inputs.x)), name
        y.backward(dy)
        assert x.grad is not None
        assert_no_worse(x.grad, oracle, peer)


# ---- the quantizer


def bytes_of(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.cpu().view(torch.uint8)


def assert_same_weight(a: QuantWeight, b: QuantWeight) -> None:
    for name in ("codes", "scales", "zeros"):
        x, y = bytes_of(getattr(a, name)), bytes_of(getattr(b, name))
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} bytes differ"


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_quantize_equals_the_cpu_in_bounded_memory(fmt: str) -> None:
    """32 x 1024 x 1024: as codes on the CPU, within a few fp32 copies of one matrix beyond the result."""
    experts, size = 32, 1024
    w = torch.randn(experts, size, size, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight = quantize(w, fmt, group_size=128)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - weight.nbytes
    assert extra <= 16 * size * size * 4, f"{extra / 2**20:.0f} MiB beyond the result"
    some = slice(0, 8)
    assert_same_weight(weight.experts(0, 8), quantize(w[some].cpu(), fmt, group_size=128))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_quantize_equals_the_cpu_for_every_scale_dtype(fmt: str, scale_dtype: torch.dtype) -> None:
    w = torch.randn(2, 256, 512, generator=torch.Generator().manual_seed(0))
    w *= torch.logspace(-6, 2, 256)[:, None]  # some fp16 scales underflow
    w[1, 3, :32] = 0
    options: dict[str, Any] = dict(group_size=32, scale_dtype=scale_dtype)
    assert_same_weight(quantize(w.to(DEVICE), fmt, **options), quantize(w, fmt, **options))


# ---- support


@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", FORMATS)
def test_support_table(fmt: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    mixed = not FORMATS[fmt].quantized and dtype != FORMATS[fmt].storage
    here = {DEVICE}
    if torch.version.hip is None:
        here.add("sm_{}{}".format(*torch.cuda.get_device_capability()))
    inputs = make_inputs(Case(rows, N=16, K=32, format=fmt, group_size=16, dtype=dtype), DEVICE)
    for backward in (True, False):
        problem = Problem.of("grouped_gemm", inputs.x, inputs.weight, backward=backward)
        answers = explain(problem)
        for answer in answers:
            must = not here.isdisjoint(SUPPORT.get((fmt, answer.backend), ())) and not mixed
            must = must and not (backward and answer.backend in FORWARD_ONLY)
            assert answer.ok == must, f"{answer.backend} answers {answer}; the table says {must}: mend one of them"
            assert bool(answer.reason) == (not answer.ok), "a reason exactly if it cannot"
        if not mixed:
            assert select(problem).name == ("torch" if backward else "triton"), "auto prefers packed weights"
    missing = {backend for name, backend in SUPPORT if name == fmt} - {answer.backend for answer in answers}
    assert not missing, f"backends in the table that nobody knows: {missing}"
    for backend in [answer.backend for answer in answers if answer.ok]:
        got = grouped_gemm(inputs.x, inputs.weight, inputs.plan, backend=backend)
        assert_no_worse(got, inputs.oracle, inputs.peer)


def test_fp32_activations_are_refused_with_every_reason() -> None:
    inputs = make_inputs(Case(DECODE, N=16, K=32, format="int8_sym", group_size=16, dtype=torch.float32), DEVICE)
    with pytest.raises((UnsupportedError, ValueError), match="grouped_gemm: ") as caught:
        grouped_gemm(inputs.x, inputs.weight, inputs.plan)
    assert "float32" in str(caught.value) or "fp32" in str(caught.value)


def test_devices_that_differ() -> None:
    inputs = make_inputs(Case(DECODE, N=16, K=32, format="int4_asym", group_size=16), DEVICE)
    for name in ("activations", "weights", "scales", "zeros", "num_tokens_per_expert"):
        call = arguments(inputs)
        with pytest.raises(ValueError, match=r"moe: .*(cuda.*cpu|cpu.*cuda)"):
            moe(**(call | {name: call[name].cpu()}))
