"""The layer and the operators on a GPU: the loop again, no host sync, graphs, torch.compile, determinism."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_gpu import DEVICE, needs_grouped_mm, no_sync
from test_layer import Clamped, E, H, I, activations, check, gradients, layer_for, loop, routing
from test_library import calls, check_operator, inputs_for, moe_arguments
from test_ops import QUANTIZED, dtype_for

from qexperts import FORMATS, QuantExperts, QuantWeight, fused_experts, prepare
from qexperts.formats import weight_fields
from qexperts.testing import assert_no_worse

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def finish() -> Iterator[None]:
    """A kernel's fault belongs to the test that launched it."""
    if torch.accelerator.current_accelerator().type != DEVICE:  # type: ignore[union-attr]
        pytest.skip("these tests speak CUDA")
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()


def on_gpu(*values: Any) -> tuple[Any, ...]:
    return tuple(v.to(DEVICE) if isinstance(v, torch.Tensor | QuantWeight) else v for v in values)


def layer_call(fmt: str, tokens: int, top_k: int, seed: int = 0) -> tuple[Any, ...]:
    """x, both weights, ids with sentinels, weights."""
    ids, weights = routing(tokens, top_k, seed=seed, sentinels=True)
    return on_gpu(activations(tokens, dtype_for(fmt)), *layer_for(fmt), ids, weights)


# ---- against the loop


@pytest.mark.parametrize("tokens", [3, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt: str, tokens: int) -> None:
    x, first, second, ids, weights = layer_call(fmt, tokens, 3)
    biases = dict(
        gate_up_bias=torch.randn(E, 2 * I, device=DEVICE).to(x.dtype),
        down_bias=torch.randn(E, H, device=DEVICE).to(x.dtype),
    )
    got = check(x, first, second, ids, weights)
    check(x, first, second, ids, weights, Clamped(), **biases)
    for way in ("triton", "torch"):
        check(x, first, second, ids, weights, "gelu", backend=way)
    assert torch.equal(got, fused_experts(x, first, second, ids, weights))


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_prepared_weights(fmt: str) -> None:
    first, second = on_gpu(*layer_for(fmt, h=128, i=64))
    ids, weights = on_gpu(*routing(40, 3, sentinels=True))
    x = activations(40, torch.bfloat16, 128).to(DEVICE)
    module = QuantExperts(*(prepare(w, keep_source=True) for w in (first, second)))
    assert module.gate_up.weight_layout == module.down.weight_layout == "tiles"
    got = module(x, ids, weights)
    args = (first, second, ids, weights)
    assert_no_worse(got, loop(x.double(), *args, dtype=torch.float64), loop(x, *args, dtype=torch.bfloat16), 128)
    before = copy.deepcopy(module)
    in_place = QuantExperts(first, second).prepare()
    assert in_place.down.weight_layout == "tiles" and torch.equal(in_place(x, ids, weights), got)
    in_place.load_state_dict(before.state_dict())
    assert torch.equal(in_place.cpu().to(DEVICE)(x, ids, weights), got)


def test_sentinels_contribute_nothing() -> None:
    x, first, second, ids, weights = layer_call("int4_asym", 12, 3)
    skipped = (ids < 0) | (ids >= E)
    ids[0], skipped[0], x[0] = -1, True, float("nan")
    got = fused_experts(x, first, second, ids, weights.masked_fill(skipped, float("nan")))
    assert torch.equal(got, fused_experts(x, first, second, ids, weights.masked_fill(skipped, 0)))
    assert torch.equal(got[0], torch.zeros_like(got[0])) and not got.isnan().any()


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens: int) -> None:
    x, first, second, ids, weights = layer_call("int4_sym", tokens, 2)
    assert check(x, first, second, ids, weights).shape == (tokens, H)


# ---- no sync, graphs


@pytest.mark.parametrize("tokens", [3, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("fmt", ["int4_asym", "fp8_e4m3", "bf16"])
def test_no_sync_and_replay_with_another_routing(fmt: str, tokens: int) -> None:
    x, first, second, ids, weights = layer_call(fmt, tokens, 3)
    module = QuantExperts(first, second, gate_up_bias=torch.randn(E, 2 * I, device=DEVICE).bfloat16())
    module(x, ids, weights)
    with no_sync():
        module(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x, ids, weights)
    for seed in (1, 2):
        others = on_gpu(*routing(tokens, 3, seed=seed, sentinels=True))
        for target, source in zip((ids, weights), others, strict=True):
            target.copy_(source)
        x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, module(x, ids, weights))


def test_gradients_are_deterministic_and_need_no_sync() -> None:
    needs_grouped_mm()
    (first, second), (ids, weights) = on_gpu(*layer_for("int4_asym")), on_gpu(*routing(40, 3, sentinels=True))
    x = activations(40, torch.bfloat16).to(DEVICE)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, first, second, ids, w)

    dy = torch.randn(40, H, generator=torch.Generator().manual_seed(11)).to(DEVICE)
    got = gradients(run, x, weights, dy)
    for _ in range(3):
        with no_sync():
            again = gradients(run, x, weights, dy)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    double = gradients(
        lambda x, w: loop(x, first, second, ids, w, dtype=torch.float64), x.double(), weights.double(), dy
    )
    peer = gradients(lambda x, w: loop(x, first, second, ids, w, dtype=torch.bfloat16), x, weights, dy)
    assert_no_worse(got[1], double[1], peer[1])
    assert float((got[2] - double[2]).norm()) <= 2 * float((peer[2] - double[2]).norm())


# ---- torch.compile and the operators


@pytest.mark.parametrize("fmt", ["int4_asym", "int8_sym", "fp8_e4m3", "bf16"])
def test_opcheck(fmt: str) -> None:
    inputs = inputs_for(fmt, device=DEVICE)
    x = inputs.x.clone().requires_grad_()
    ops = torch.ops.qexperts
    check_operator(ops.moe, *moe_arguments(inputs, x), "moe", None, "auto", 4)
    check_operator(ops.grouped_gemm, x, inputs.counts, *weight_fields(inputs.weight), "auto", "auto", 4)
    dy = torch.randn(8, 32, device=DEVICE).to(x.dtype)
    check_operator(ops.grouped_gemm_backward, dy, inputs.counts, *weight_fields(inputs.weight), None, x.dtype, "moe")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("fmt", ["int4_asym", "bf16"])
def test_compiled_calls_give_the_same_bits(fmt: str, backend: str) -> None:
    for name, call in calls(fmt, DEVICE).items():
        compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
        for seed, rows in enumerate([(3, 0, 5), (9, 2, 60), (1, 2, 1)]):
            inputs = inputs_for(fmt, rows, seed, device=DEVICE)
            assert torch.equal(compiled(inputs.x, inputs.counts), call(inputs.x, inputs.counts)), (name, rows)
        torch._dynamo.reset()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["default", "cuda-graphs"])
def test_the_compiled_module(mode: str | None) -> None:
    _, first, second, *_ = layer_call("int4_asym", 3, 2)
    module = QuantExperts(first, second)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for tokens in (3, 40):
        for seed in range(3):
            ids, weights = on_gpu(*routing(tokens, 2, seed=seed, sentinels=True))
            x = activations(tokens, torch.bfloat16).to(DEVICE)
            module(x, ids, weights)  # compiles the kernels before a graph is captured
            args = (first, second, ids, weights)
            oracle, peer = loop(x.double(), *args, dtype=torch.float64), loop(x, *args, dtype=torch.bfloat16)
            with torch.no_grad():
                assert_no_worse(compiled(x, ids, weights), oracle, peer, H)
