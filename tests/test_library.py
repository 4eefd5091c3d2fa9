"""The operators: what torch itself checks of them, one graph under torch.compile, fake tensors, gradients, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import KERNELS, QUANTIZED, arguments, dtype_for
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qexperts import (
    FORMATS,
    QuantWeight,
    TokenPlan,
    grouped_gemm,
    moe,
    moe_gemm,
    moe_gemm_decode,
    moe_gemm_prefill,
)
from qexperts.formats import weight_fields
from qexperts.layouts import to_layout
from qexperts.testing import Case, Inputs, make_inputs

OPS = torch.ops.qexperts
ROWS = (3, 0, 5)
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


# "eager" keeps what Dynamo records; "aot_eager" traces it again, with gradients, for every format
COMPILED = [("int4_asym", "eager"), ("bf16", "eager"), *((fmt, "aot_eager") for fmt in FORMATS)]


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


def inputs_for(
    fmt: str, rows: tuple[int, ...] = ROWS, seed: int = 0, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Inputs:
    case = Case(rows, N=32, K=64, format=fmt, group_size=32, dtype=dtype or dtype_for(fmt))
    return make_inputs(case, device, seed)


def tiles(weight: QuantWeight) -> QuantWeight:
    return to_layout(weight.with_tensors(*(t.clone() for t in weight.tensors)), "tiles")


def check_operator(op: Any, *args: Any) -> None:
    fp8 = any(isinstance(a, torch.Tensor) and a.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for a in args)
    # torch compares the inputs before and after with allclose, which it lacks for float8
    torch.library.opcheck(op, args, test_utils=ALL_CHECKS[1:] if fp8 else ALL_CHECKS)


def moe_arguments(inputs: Inputs, x: torch.Tensor) -> tuple[Any, ...]:
    w = inputs.weight
    return x, w.codes, inputs.counts, w.scales, w.zeros, w.format.bits, w.group_size or 128, w.format.asym


# ---- what torch checks


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_opcheck(fmt: str, grad: bool) -> None:
    inputs = inputs_for(fmt)
    x = inputs.x.clone().requires_grad_(grad)
    check_operator(OPS.moe, *moe_arguments(inputs, x), "moe", None, "auto", 4)
    check_operator(OPS.grouped_gemm, x, inputs.counts, *weight_fields(inputs.weight), "auto", "auto", 4)
    dy = torch.randn(8, 32).to(x.dtype)
    check_operator(OPS.grouped_gemm_backward, dy, inputs.counts, *weight_fields(inputs.weight), None, x.dtype, "moe")


@pytest.mark.parametrize("scale_dtype", ["own", torch.float32], ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_opcheck_of_a_prepared_weight(fmt: str, scale_dtype: Any) -> None:
    inputs = inputs_for(fmt, dtype=torch.bfloat16 if scale_dtype == "own" else torch.float32)
    fields = weight_fields(tiles(inputs.weight))
    check_operator(OPS.grouped_gemm, inputs.x.clone().requires_grad_(), inputs.counts, *fields, "auto", "auto", 4)
    check_operator(
        OPS.grouped_gemm_backward, torch.randn(8, 32), inputs.counts, *fields, None, torch.float32, "grouped_gemm"
    )


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_opcheck_of_other_layouts(grad: bool) -> None:
    inputs = inputs_for("bf16")
    x = inputs.x.clone().requires_grad_(grad)
    weights = inputs.weight.codes.mT.contiguous()
    scales = torch.rand(3, 32)
    check_operator(OPS.moe_gemm, x, weights, inputs.counts, None)
    check_operator(OPS.moe_gemm, x, weights, inputs.counts, scales)
    fields = weight_fields(inputs.weight)
    check_operator(
        OPS.grouped_gemm_backward, torch.randn(8, 32), inputs.counts, *fields, scales, torch.bfloat16, "moe_gemm"
    )
    codes = torch.randint(-128, 128, (3, 64, 32), dtype=torch.int8)
    call = (x, codes, inputs.counts, torch.rand(3), None, 4, 128, False)
    check_operator(OPS.moe, *call, "moe_gemm_prefill", "per_tensor", "prefill", 4)


# ---- torch.compile: one graph, the same bits


def calls(fmt: str, device: str = "cpu") -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Every public way of multiplying x by the weight of `inputs_for(fmt)`."""
    inputs = inputs_for(fmt, device=device)
    fixed = {k: v for k, v in arguments(inputs).items() if k not in ("activations", "num_tokens_per_expert")}
    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        name: lambda x, n, f=f: f(x, num_tokens_per_expert=n, **fixed)  # type: ignore[misc]
        for name, f in (KERNELS | {"moe": moe}).items()
    }
    ways["grouped_gemm"] = lambda x, n: grouped_gemm(x, inputs.weight, TokenPlan(n, x.shape[0]), phase="prefill")
    if inputs.weight.format.quantized:
        prepared = tiles(inputs.weight)
        ways["prepared"] = lambda x, n: grouped_gemm(x, prepared, TokenPlan(n, x.shape[0]))
        return ways
    weights = inputs.weight.codes.mT.contiguous()
    scales = torch.rand(3, 32, generator=torch.Generator().manual_seed(3)).to(device)
    ways["moe_gemm"] = lambda x, n: moe_gemm(x, weights, n)
    ways["moe_gemm with scales"] = lambda x, n: moe_gemm(x, weights, n, scales=scales)
    return ways


@pytest.mark.parametrize(("fmt", "backend"), COMPILED)
def test_compiles_to_one_graph_with_the_same_bits(fmt: str, backend: str) -> None:
    for name, call in calls(fmt).items():
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
        for seed, rows in enumerate([ROWS, (9, 2, 6), (1, 2, 40)]):
            inputs = inputs_for(fmt, rows, seed)
            assert torch.equal(compiled(inputs.x, inputs.counts), call(inputs.x, inputs.counts)), (name, rows)
        assert counter.frame_count == 1, f"{name} was compiled {counter.frame_count} times"
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "dynamic"), [("int4_asym", None), ("fp8_e4m3", True), ("bf16", True)])
def test_inductor(fmt: str, dynamic: bool | None) -> None:
    for name, call in calls(fmt).items():
        if name in ("decode", "prefill", "moe_gemm"):  # the same operators as the others
            continue
        compiled = torch.compile(lambda x, n, call=call: call(x * 2, n).relu(), fullgraph=True, dynamic=dynamic)
        for seed, rows in enumerate([ROWS, (9, 2, 6)]):
            inputs = inputs_for(fmt, rows, seed)
            expected = call(inputs.x * 2, inputs.counts).relu()
            assert torch.equal(compiled(inputs.x, inputs.counts), expected), (name, rows)


def test_the_static_shapes_of_a_second_call_become_dynamic() -> None:
    call = calls("int4_sym")["moe"]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed, rows in enumerate([ROWS, (9, 2, 6), (1, 2, 40), (7, 7, 7)]):
        inputs = inputs_for("int4_sym", rows, seed)
        assert torch.equal(compiled(inputs.x, inputs.counts), call(inputs.x, inputs.counts))
    assert counter.frame_count == 2


def test_the_per_tensor_scheme_and_strided_activations() -> None:
    codes = torch.randint(-128, 128, (2, 64, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    counts, scales = torch.tensor([4, 3]), torch.tensor([0.01, 0.02])
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(1)).bfloat16().T

    def call(x: torch.Tensor) -> torch.Tensor:
        return moe_gemm_prefill(x, codes, counts, scales=scales, scale_scheme="per_tensor")

    for backend in ("eager", "aot_eager"):
        assert torch.equal(torch.compile(call, fullgraph=True, backend=backend)(x), call(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_counts_are_checked_when_a_compiled_graph_runs(backend: str) -> None:
    inputs = inputs_for("int4_asym")
    for name in ("moe", "decode", "prefill"):
        compiled = torch.compile(calls("int4_asym")[name], fullgraph=True, backend=backend)
        compiled(inputs.x, inputs.counts)
        for counts in (inputs.counts + 1, torch.tensor([9, -1, 0], dtype=torch.int32)):
            with pytest.raises(ValueError, match="num_tokens_per_expert"):
                compiled(inputs.x, counts)
        torch._dynamo.reset()


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            return moe_gemm_decode(x, codes, n, scales=scales, group_size=32)

    inputs = inputs_for("int4_sym")
    codes, scales = inputs.weight.codes, inputs.weight.scales
    exported = torch.export.export(Module(), (inputs.x, inputs.counts), dynamic_shapes=({0: torch.export.Dim("S")}, {}))
    assert targets(exported.graph) == ["qexperts.moe.default"]
    other = inputs_for("int4_sym", (4, 5, 6))
    assert torch.equal(exported.module()(other.x, other.counts), Module()(other.x, other.counts))


# ---- fake tensors and make_fx


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("qexperts.")]


@pytest.mark.parametrize("fmt", FORMATS)
def test_make_fx_records_one_operator(fmt: str) -> None:
    inputs = inputs_for(fmt)
    for name, call in calls(fmt).items():
        for mode in ("real", "fake", "symbolic"):
            trace = make_fx(lambda x, n, /: call(x, n), tracing_mode=mode, _allow_non_fake_inputs=True)  # noqa: B023
            traced = trace(inputs.x, inputs.counts)
            assert len(targets(traced.graph)) == 1, (name, mode)
            assert torch.equal(traced(inputs.x, inputs.counts), call(inputs.x, inputs.counts)), (name, mode)


def test_fake_tensors_inside_and_outside_their_mode() -> None:
    inputs = inputs_for("int4_asym", dtype=torch.float16)
    mode = FakeTensorMode()
    call = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments(inputs).items()}
    weight = inputs.weight.with_tensors(*map(mode.from_tensor, inputs.weight.tensors))
    plan = TokenPlan(call["num_tokens_per_expert"], 8)
    for y in (moe(**call), moe_gemm_decode(**call), grouped_gemm(call["activations"], weight, plan)):
        assert isinstance(y, FakeTensor) and y.shape == (8, 32) and y.dtype == torch.float16
    with mode:
        for y in (moe(**call), moe_gemm_decode(**call), grouped_gemm(call["activations"], weight, plan)):
            assert isinstance(y, FakeTensor) and y.shape == (8, 32) and y.stride() == (32, 1)


def test_fake_calls_raise_what_real_calls_raise() -> None:
    inputs = inputs_for("int4_asym")
    wrong: list[dict[str, Any]] = [
        dict(weights=inputs.weight.codes[..., :-1]),
        dict(scales=inputs.weight.scales.float()),  # type: ignore[union-attr]
        dict(zeros=None),
        dict(group_size=48),
        dict(weight_bits=3),
        dict(num_tokens_per_expert=inputs.counts[:-1]),
        dict(num_tokens_per_expert=inputs.counts.float()),
        dict(phase="both"),
        dict(decode_threshold=-1),
    ]
    for change in wrong:
        call = arguments(inputs) | change
        with pytest.raises(ValueError, match="moe: ") as real:
            moe(**call)
        mode = FakeTensorMode()
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        with mode, pytest.raises(ValueError, match=re.escape(str(real.value))):
            moe(**fake)


def test_an_error_inside_a_graph_names_the_function() -> None:
    inputs = inputs_for("int4_asym")
    call = arguments(inputs) | dict(scales=None)
    with pytest.raises(Exception, match=r"moe: QuantWeight\(int4_asym\): scales missing"):
        torch.compile(lambda: moe(**call), fullgraph=True, backend="eager")()


def test_an_eager_call_does_not_go_through_the_dispatcher() -> None:
    inputs = inputs_for("int4_sym")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        moe(**arguments(inputs))
        grouped_gemm(inputs.x.requires_grad_(), inputs.weight, inputs.plan).sum().backward()
    assert not [event.key for event in profile.key_averages() if event.key.startswith("qexperts::")]


# ---- gradients


@pytest.mark.parametrize(("fmt", "backend"), COMPILED)
def test_gradients_are_those_of_eager(fmt: str, backend: str) -> None:
    inputs = inputs_for(fmt)
    dy = torch.randn(8, 32, generator=torch.Generator().manual_seed(9)).to(inputs.x.dtype)
    for name, call in calls(fmt).items():
        grads = []
        for run in (call, torch.compile(call, fullgraph=True, backend=backend)):
            x = inputs.x.clone().requires_grad_()
            y = run(x, inputs.counts)
            y.backward(dy)
            assert x.grad is not None
            grads.append((y.detach(), x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), name
        torch._dynamo.reset()


@pytest.mark.slow
def test_gradients_through_inductor() -> None:
    inputs = inputs_for("int4_asym")
    call = calls("int4_asym")["moe"]
    grads = []
    for run in (call, torch.compile(call, fullgraph=True)):
        x = inputs.x.clone().requires_grad_()
        run(x, inputs.counts).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]


def test_a_weight_gradient_is_refused() -> None:
    inputs = inputs_for("bf16")
    weights = inputs.weight.codes.clone().requires_grad_()
    with FakeTensorMode() as mode:
        x, n, w = (mode.from_tensor(t) for t in (inputs.x, inputs.counts, weights))
        with pytest.raises(ValueError, match="moe: weights requires a gradient"):
            moe(x, w, n, weight_bits=16)
        with torch.no_grad():
            moe(x, w, n, weight_bits=16)
    with pytest.raises(Exception, match="weights requires a gradient"):
        torch.compile(lambda: moe(inputs.x, weights, inputs.counts, weight_bits=16), fullgraph=True, backend="eager")()
    scales = torch.rand(3, 32).requires_grad_()
    for s, w, name in ((scales, inputs.weight.codes.mT, "scales"), (None, weights.mT, "weights")):
        with pytest.raises(ValueError, match=f"moe_gemm: {name} requires a gradient"):
            OPS.moe_gemm(inputs.x, w, inputs.counts, s)


def test_the_operators_are_differentiable_once() -> None:
    inputs = inputs_for("int8_sym", dtype=torch.float32)
    x = inputs.x.clone().requires_grad_()
    y = OPS.grouped_gemm(x, inputs.counts, *weight_fields(inputs.weight), "auto", "auto", 4)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()
