"""Sort, gate and combine, each against its torch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launching import DTYPES, framed, guards_hold, unwritten

from qexperts import TokenPlan, fused_experts, quantize
from qexperts.kernels import between
from qexperts.steps import ACTIVATIONS, KernelSteps, TorchSteps


def sorted_by_kernel(ids: torch.Tensor, experts: int) -> TokenPlan:
    slots = ids.numel()
    outputs = [framed(torch.full((n,), -7, dtype=torch.int32)) for n in (slots, slots, slots, experts)]
    between.sort(*outputs, framed(ids))
    assert all(guards_hold(t) for t in outputs)
    row_to_slot, slot_to_row, row_to_token, counts = outputs
    return TokenPlan(counts, slots, row_to_slot, slot_to_row, row_to_token)


def check_sort(ids: torch.Tensor, experts: int) -> None:
    found, expected = sorted_by_kernel(ids, experts), TokenPlan.from_expert_ids(ids, experts)
    for name in ("counts", "row_to_slot", "slot_to_row", "row_to_token"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@settings(max_examples=20)
@given(
    ids=st.lists(st.integers(-2, 9), min_size=1, max_size=60),
    top_k=st.integers(1, 4),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@example(ids=[7], top_k=1, dtype=torch.int64)
@example(ids=[-1] * 8, top_k=2, dtype=torch.int32)
def test_sort(ids: list[int], top_k: int, dtype: torch.dtype) -> None:
    check_sort(torch.tensor(ids, dtype=dtype)[:, None].repeat(1, top_k), 7)


def test_sort_of_many_slots_and_experts_and_of_ids_past_32_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    check_sort(torch.randint(0, 70, (50, 6), generator=generator), 70)
    check_sort(torch.tensor([[2**32, 3], [-(2**32), 2**32 + 3]]), 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_gate(activation: str, gated: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    h = (torch.randn(5, 144 if gated else 72, generator=generator) * 3).to(dtype)
    h[0, :3] = torch.tensor([0.0, -60.0, 60.0])
    out = unwritten(5, 72, dtype=dtype)
    between.gate(out, framed(h), activation)
    assert guards_hold(out)
    exact = TorchSteps.gate(h.double(), activation, 72)
    peer = TorchSteps.gate(h, activation, 72)
    error, allowed = (out.double() - exact).abs(), (peer.double() - exact).abs()
    size = h.double().abs()  # of what is added in fp32: 1 + erf of a negative number is small
    size = size[:, :72] * size[:, 72:] if gated else size**2 + size
    one = torch.finfo(dtype).eps * exact.abs() + 2.0**-22 * size + torch.finfo(dtype).tiny
    assert (error <= torch.maximum(2 * allowed, one)).all()


def test_gate_keeps_nan_and_inf() -> None:
    h = torch.tensor([[float("nan"), float("inf"), 1.0, 1.0]], dtype=torch.bfloat16)
    for activation in ACTIVATIONS:
        out = unwritten(1, 2, dtype=torch.bfloat16)
        between.gate(out, h, activation)
        assert out[0, 0].isnan() and out[0, 1] == float("inf"), activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_leaves_out_what_belongs_to_no_expert(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, 3, 1], [-1, 4, 9], [2, -5, 0]])
    plan = TokenPlan.from_expert_ids(ids, 4)
    y = torch.randn(9, 1040, generator=generator).to(dtype)
    y[5:] = float("nan")  # rows of no expert; their weights are not 0
    weights = torch.rand(3, 3, generator=generator)
    out = unwritten(3, 1040, dtype=dtype)
    between.combine(out, framed(y), plan.slot_to_row, ids, weights, 4)
    assert guards_hold(out)
    expected = TorchSteps.combine(y.nan_to_num(0).float(), plan, ids, weights)
    assert torch.allclose(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not out[1].count_nonzero()


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_layer_on_kernels_is_that_on_torch(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [quantize(torch.randn(4, n, k, generator=generator).bfloat16() * k**-0.5, "int4_sym", group_size=32)
               for n, k in ((128, 64), (64, 64))]  # fmt: skip
    x = torch.randn(tokens, 64, generator=generator).bfloat16()
    ids = torch.randint(-1, 5, (tokens, 2), generator=generator)
    expert_weights = torch.rand(tokens, 2, generator=generator)
    found = fused_experts(x, *weights, ids, expert_weights)
    monkeypatch.setattr(KernelSteps, "reason_against", lambda device, dtype: "the test says so")
    expected = fused_experts(x, *weights, ids, expert_weights)
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=2**-9)
