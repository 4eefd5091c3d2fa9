"""The public operations against the oracle: every format, both phases, every group size, awkward shapes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qexperts
from qexperts import (
    FORMATS,
    Problem,
    QuantWeight,
    TokenPlan,
    UnsupportedError,
    clear_moe_prefill_workspace_cache,
    dequantize,
    explain,
    grouped_gemm,
    moe,
    moe_gemm,
    moe_gemm_decode,
    moe_gemm_prefill,
    quantize,
)
from qexperts.backends import BACKENDS
from qexperts.reference import grouped_gemm_reference
from qexperts.testing import Case, Inputs, assert_no_worse, make_inputs, nan_filled, peer_gemm

DTYPES = [torch.float16, torch.bfloat16]
KERNELS: dict[str, Callable[..., torch.Tensor]] = {"decode": moe_gemm_decode, "prefill": moe_gemm_prefill}
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
UNQUANTIZED = {torch.float16: "fp16", torch.bfloat16: "bf16"}

# What must run, by (format, backend) and device: a capability that gets lost fails here, not silently elsewhere.
# "cuda" is checked by test_gpu.py, on NVIDIA from sm_80 on; a capability of NVIDIA's by its name.
SUPPORT: dict[tuple[str, str], tuple[str, ...]] = {
    ("bf16", "hopper"): ("sm_90",),
    ("fp16", "hopper"): ("sm_90",),
    ("bf16", "triton"): ("cuda",),
    ("fp16", "triton"): ("cuda",),
    ("int8_sym", "triton"): ("cuda",),
    ("int8_asym", "triton"): ("cuda",),
    ("int4_sym", "triton"): ("cuda",),
    ("int4_asym", "triton"): ("cuda",),
    ("int2_sym", "triton"): ("cuda",),
    ("int2_asym", "triton"): ("cuda",),
    ("fp8_e4m3", "triton"): ("cuda",),
    ("fp8_e5m2", "triton"): ("cuda",),
    ("bf16", "cpu"): ("cpu",),
    ("fp16", "cpu"): ("cpu",),
    ("int8_sym", "cpu"): ("cpu",),
    ("int8_asym", "cpu"): ("cpu",),
    ("int4_sym", "cpu"): ("cpu",),
    ("int4_asym", "cpu"): ("cpu",),
    ("int2_sym", "cpu"): ("cpu",),
    ("int2_asym", "cpu"): ("cpu",),
    ("fp8_e4m3", "cpu"): ("cpu",),
    ("fp8_e5m2", "cpu"): ("cpu",),
    ("bf16", "torch"): ("cpu", "cuda"),
    ("fp16", "torch"): ("cpu", "cuda"),
    ("int8_sym", "torch"): ("cpu", "cuda"),
    ("int8_asym", "torch"): ("cpu", "cuda"),
    ("int4_sym", "torch"): ("cpu", "cuda"),
    ("int4_asym", "torch"): ("cpu", "cuda"),
    ("int2_sym", "torch"): ("cpu", "cuda"),
    ("int2_asym", "torch"): ("cpu", "cuda"),
    ("fp8_e4m3", "torch"): ("cpu", "cuda"),
    ("fp8_e5m2", "torch"): ("cpu", "cuda"),
}
FORWARD_ONLY = ("triton", "hopper", "cpu")  # backends whose gradients run on another


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def dtype_for(fmt: str) -> torch.dtype:
    return torch.float16 if fmt == "fp16" else torch.bfloat16


def arguments(inputs: Inputs) -> dict[str, Any]:
    """The tensor-level call for a case."""
    weight = inputs.weight
    call: dict[str, Any] = dict(
        activations=inputs.x, weights=weight.codes, num_tokens_per_expert=inputs.counts, weight_bits=weight.format.bits
    )
    if weight.format.quantized:
        call |= dict(scales=weight.scales, group_size=weight.group_size)
    if weight.format.asym:
        call |= dict(zeros=weight.zeros, asym=True)
    return call


def check(case: Case, call: Callable[..., torch.Tensor], seed: int = 0) -> None:
    inputs = make_inputs(case, seed=seed)
    got = call(**arguments(inputs))
    assert got.shape == (sum(case.rows), case.N) and got.dtype == case.dtype
    assert_no_worse(got, inputs.oracle, inputs.peer)


# ---- the matrix: every format x dtype x phase x group size

DECODE, PREFILL = (1, 0, 2, 4, 1), (0, 33, 1, 0, 6, 0)
SIZES = {16: (272, 16), 32: (352, 80), 64: (768, 16), 128: (768, 80), 256: (768, 16), None: (272, 80)}


def matrix(decode: tuple[int, ...], prefill: tuple[int, ...]) -> list[Case]:
    return [
        Case(rows, N=SIZES[group][1], K=SIZES[group][0], format=fmt, group_size=group, dtype=dtype, why="the matrix")
        for fmt, dtype, group, rows in itertools.product(QUANTIZED, DTYPES, SIZES, (decode, prefill))
    ]


@pytest.mark.parametrize("case", matrix(DECODE, PREFILL), ids=str)
def test_matrix(case: Case) -> None:
    check(case, KERNELS["decode" if case.rows == DECODE else "prefill"])


@pytest.mark.parametrize(("k", "n"), [(272, 16), (352, 80), (768, 16)], ids=str)
@pytest.mark.parametrize("phase", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unquantized(dtype: torch.dtype, phase: str, k: int, n: int) -> None:
    check(Case(DECODE if phase == "decode" else PREFILL, n, k, UNQUANTIZED[dtype], dtype=dtype), KERNELS[phase])


@pytest.mark.parametrize("fmt", FORMATS)
def test_many_outputs(fmt: str) -> None:
    """N = 1408: the intermediate size of a real model, 88 * 16 and no multiple of 128 * 16."""
    check(Case((3, 0, 5), N=1408, K=256, format=fmt, dtype=dtype_for(fmt)), moe_gemm_prefill)


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("phase", KERNELS)
def test_fp32_activations_on_the_cpu(fmt: str, phase: str) -> None:
    check(Case(PREFILL, N=32, K=96, format=fmt, group_size=32, dtype=torch.float32), KERNELS[phase])


@pytest.mark.parametrize(("k", "group"), [(20, 4), (36, 12), (100, 20), (44, 44), (24, 8), (40, 40)], ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_sizes_only_the_torch_backend_takes(fmt: str, k: int, group: int) -> None:
    for phase in KERNELS:
        check(Case((2, 0, 17), N=16, K=k, format=fmt, group_size=group), KERNELS[phase])


AWKWARD = [
    Case((0, 0, 7, 0), 16, 64, "", 32, why="one hot expert, the others empty"),
    Case((1, 2, 90, 1), 16, 64, "", 32, why="one hot expert, the others small"),
    Case((0, 1, 0), 16, 64, "", 32, why="one row"),
    Case((0, 0, 0), 16, 64, "", 32, why="all experts empty: zero rows"),
    Case((0, 5, 3, 0), 16, 64, "", 32, why="first and last expert empty"),
    Case((5, 0, 0, 3), 16, 64, "", 32, why="only first and last expert"),
    Case((9,), 16, 64, "", 32, why="E = 1"),
    Case((1,), 16, 64, "", 32, why="E = 1, one row"),
    Case((0,), 16, 64, "", 32, why="E = 1, zero rows"),
    Case((1,) * 40, 16, 64, "", 32, why="one row for each of many experts"),
    Case((0, 5, 3, 0), 48, 96, "", 32, negative_scales=True, why="negative scales"),
]


@pytest.mark.parametrize("case", AWKWARD, ids=lambda c: c.why.replace(" ", "-"))
@pytest.mark.parametrize("fmt", FORMATS)
def test_awkward_counts(fmt: str, case: Case) -> None:
    case = dataclasses.replace(case, format=fmt, dtype=dtype_for(fmt))
    for kernel in KERNELS.values():
        check(case, kernel)
    inputs = make_inputs(case)
    assert_no_worse(grouped_gemm(inputs.x, inputs.weight, inputs.plan), inputs.oracle, inputs.peer)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_zero_scales_and_extreme_codes(fmt: str, dtype: torch.dtype) -> None:
    """Random bytes as codes (int8_sym holds -128), scales of both signs, some 0, zeros up to 2^bits."""
    record, generator = FORMATS[fmt], torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (3, 32, record.packed_k(64)), generator=generator, dtype=torch.uint8)
    if record.kind == "fp8":
        raw &= 0xBF  # not too large for fp16 sums, and no NaN
    elif fmt == "int8_sym":
        raw[:, ::3] = 0x80
    scales = torch.randn(3, 32, 2, generator=generator).mul_(2.0 ** (-3 - record.bits)).to(dtype)
    scales[:, 5] = 0
    zeros = torch.randint(0, 2**record.bits + 1, (3, 32, 2), generator=generator).to(dtype) if record.asym else None
    if zeros is not None:
        zeros[:, 0] = 2**record.bits
    weight = QuantWeight(raw.view(record.storage), scales, zeros, record, 32)
    x = torch.randn(9, 64, generator=generator).to(dtype)
    rows = (4, 0, 5)
    inputs = Inputs(
        x,
        weight,
        torch.tensor(rows, dtype=torch.int32),
        TokenPlan.from_counts(torch.tensor(rows), 9),
        grouped_gemm_reference(x, weight, rows),
        peer_gemm(x, weight, rows),
    )
    for kernel in KERNELS.values():
        got = kernel(**arguments(inputs))
        assert (got[:, 5] == 0).all()
        assert_no_worse(got, inputs.oracle, inputs.peer)


# ---- grouped_gemm: scale layouts, scale dtypes, plans

LAYOUTS = [
    (fmt, layout)
    for fmt in QUANTIZED
    for layout in ("group", "channel", "tensor", "block128")
    if not (FORMATS[fmt].asym and layout in ("tensor", "block128"))
]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize(("fmt", "layout"), LAYOUTS)
def test_scales_of_any_layout_and_dtype(fmt: str, layout: str, scale_dtype: torch.dtype) -> None:
    """Independent of the activations' dtype; the oracle has the scales unrounded."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(3, 144, 272, generator=generator) * 0.06
    weight = quantize(w, fmt, group_size=16, scale_layout=layout, scale_dtype=scale_dtype)
    rows = (2, 0, 5)
    plan = TokenPlan.from_counts(torch.tensor(rows), 7)
    for dtype in (torch.bfloat16, torch.float32) if layout == "group" else (torch.bfloat16,):
        x = torch.randn(7, 272, generator=generator).to(dtype)
        got = grouped_gemm(x, weight, plan)
        assert got.dtype == dtype
        assert_no_worse(got, grouped_gemm_reference(x, weight, rows), peer_gemm(x, weight, rows))


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_unquantized_weights_meet_activations_of_another_dtype(fmt: str) -> None:
    """fp32 holds both; between bf16 and fp16 nobody converts, and the error says so."""
    inputs = make_inputs(Case((2, 0, 5), N=16, K=64, format=fmt, dtype=torch.float32))
    assert inputs.weight.codes.dtype == FORMATS[fmt].storage
    assert_no_worse(grouped_gemm(inputs.x, inputs.weight, inputs.plan), inputs.oracle, inputs.peer)
    other = torch.float16 if fmt == "bf16" else torch.bfloat16
    with pytest.raises(UnsupportedError, match=f"grouped_gemm: .*{fmt}") as caught:
        grouped_gemm(inputs.x.to(other), inputs.weight, inputs.plan)
    assert set(caught.value.reasons) == set(BACKENDS) and all(caught.value.reasons.values())
    assert all(reason in str(caught.value) for reason in caught.value.reasons.values())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=name_of)
def test_rows_of_no_expert_are_zero(dtype: torch.dtype) -> None:
    """Sentinel ids: their rows come last, hold anything, and give exactly 0."""
    ids = torch.tensor([[0, -1], [2, 3], [3, 0], [1, -1], [99, 2]])
    plan = TokenPlan.from_expert_ids(ids, 3)
    inputs = make_inputs(Case((2, 1, 2), N=32, K=64, format="int4_asym", group_size=32, dtype=dtype))
    x = torch.full((10, 64), math.nan, dtype=dtype)
    x[:5] = inputs.x
    out = nan_filled(10, 32, dtype=dtype)
    assert grouped_gemm(x, inputs.weight, plan, out=out) is out
    assert_no_worse(out[:5], inputs.oracle, inputs.peer)
    assert (out[5:] == 0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=name_of)
def test_only_sentinels(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case((2, 1, 2), N=32, K=64, format="int8_sym", group_size=32, dtype=dtype))
    plan = TokenPlan.from_expert_ids(torch.full((5, 1), -1), 3)
    x = torch.full((5, 64), math.nan, dtype=dtype)
    assert (grouped_gemm(x, inputs.weight, plan) == 0).all()


# ---- outputs and inputs in memory


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [(3, 0, 5), (0, 0, 0), (1, 1, 0)], ids=str)
def test_every_element_of_out_is_written(fmt: str, rows: tuple[int, ...]) -> None:
    inputs = make_inputs(Case(rows, N=32, K=96, format=fmt, group_size=32, dtype=dtype_for(fmt)))
    out = nan_filled(sum(rows), 32, dtype=inputs.x.dtype)
    assert grouped_gemm(inputs.x, inputs.weight, inputs.plan, out=out) is out
    assert_no_worse(out, inputs.oracle, inputs.peer)
    assert torch.equal(out, grouped_gemm(inputs.x, inputs.weight, inputs.plan))


def test_a_strided_out_is_filled_or_refused() -> None:
    inputs = make_inputs(Case((3, 0, 5), N=32, K=96, format="int4_sym", group_size=32))
    backing = nan_filled(8, 40, dtype=torch.bfloat16)
    try:
        grouped_gemm(inputs.x, inputs.weight, inputs.plan, out=backing[:, 4:36])
    except ValueError:
        assert backing.isnan().all()
        return
    assert_no_worse(backing[:, 4:36], inputs.oracle, inputs.peer)
    assert backing[:, :4].isnan().all() and backing[:, 36:].isnan().all(), "wrote outside of out"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=name_of)
@pytest.mark.parametrize("fmt", ["int4_sym", "fp8_e4m3", "int2_asym"])
def test_strided_activations_give_the_same_bits(fmt: str, dtype: torch.dtype) -> None:
    """Not so in fp32, where a BLAS may sum in another order for another alignment."""
    inputs = make_inputs(Case((3, 0, 9), N=32, K=96, format=fmt, group_size=32, dtype=dtype))
    x = inputs.x
    wide = nan_filled(12, 103, dtype=dtype)
    wide[:, 5:101] = x
    views = {
        "row stride 103": wide[:, 5:101],
        "every other row": x.repeat_interleave(2, 0)[::2],
        "transposed": x.T.contiguous().T,
        "every other column": x.repeat_interleave(2, 1)[:, ::2],
    }
    for call in (*KERNELS.values(), moe):
        expected = call(**arguments(inputs))
        for name, view in views.items():
            assert torch.equal(view, x) and not view.is_contiguous()
            got = call(**(arguments(inputs) | dict(activations=view)))
            assert_no_worse(got, inputs.oracle, inputs.peer)
            assert dtype == torch.float32 or torch.equal(got, expected), f"{call.__name__}, {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_row_repeated_by_a_stride_of_zero(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case((4, 0), N=32, K=96, format="int4_sym", group_size=32, dtype=dtype))
    same = inputs.x[:1].expand(4, 96)
    expected = grouped_gemm(same.contiguous(), inputs.weight, inputs.plan)
    assert torch.equal(grouped_gemm(same, inputs.weight, inputs.plan), expected)


def test_inputs_are_left_alone() -> None:
    inputs = make_inputs(Case((3, 0, 9), N=32, K=96, format="int4_asym", group_size=32))
    before = [t.clone() for t in (inputs.x, inputs.weight.codes, inputs.weight.scales, inputs.weight.zeros)]  # type: ignore[union-attr]
    for call in (*KERNELS.values(), moe):
        call(**arguments(inputs))
    after = (inputs.x, inputs.weight.codes, inputs.weight.scales, inputs.weight.zeros)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", FORMATS)
def test_int64_counts(fmt: str) -> None:
    inputs = make_inputs(Case((3, 0, 9), N=32, K=96, format=fmt, group_size=32, dtype=dtype_for(fmt)))
    call = arguments(inputs)
    for kernel in (*KERNELS.values(), moe):
        expected = kernel(**call)
        assert torch.equal(kernel(**(call | dict(num_tokens_per_expert=inputs.counts.long()))), expected)


def test_results_survive_clearing_the_workspace() -> None:
    inputs = make_inputs(Case((3, 0, 9), N=32, K=96, format="int4_asym", group_size=32))
    first = moe_gemm_prefill(**arguments(inputs))
    kept = first.clone()
    clear_moe_prefill_workspace_cache()
    assert torch.equal(moe_gemm_prefill(**arguments(inputs)), kept) and torch.equal(first, kept)


# ---- moe_gemm: [E, K, N]


@pytest.mark.parametrize("scale_dtype", [None, torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("rows", [(3, 0, 9), (0, 1, 0), (0, 0, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_moe_gemm(dtype: torch.dtype, rows: tuple[int, ...], scale_dtype: torch.dtype | None) -> None:
    inputs = make_inputs(Case(rows, N=48, K=272, format=UNQUANTIZED[dtype], dtype=dtype))
    scales, oracle, peer = None, inputs.oracle, inputs.peer
    if scale_dtype is not None:
        scales = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).to(scale_dtype)
        by_row = scales.repeat_interleave(torch.tensor(rows), 0)
        oracle, peer = oracle * by_row.double(), (peer.float() * by_row.float()).to(dtype)
    weights = inputs.weight.codes.mT.contiguous()
    got = moe_gemm(inputs.x, weights, inputs.counts, scales=scales)
    assert got.shape == (sum(rows), 48) and got.dtype == dtype
    assert_no_worse(got, oracle, peer)
    assert torch.equal(moe_gemm(inputs.x, weights, inputs.counts.long(), scales=scales), got)
    assert_no_worse(moe_gemm(inputs.x, inputs.weight.codes.mT, inputs.counts, scales=scales), oracle, peer)


# ---- the per-tensor scheme


@pytest.mark.parametrize("strided", [False, True], ids=["row-major", "a view"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=name_of)
def test_per_tensor_scheme(storage: torch.dtype, dtype: torch.dtype, strided: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(3, 80, 48, generator=generator)
    codes = w.mul(20).to(torch.int8) if storage == torch.int8 else w.to(storage)
    if storage == torch.int8:
        codes[:, 3] = -128
    if strided:
        codes = torch.cat([codes.view(torch.int8), codes.view(torch.int8)], 1)[:, :80].view(storage)
    scales = torch.tensor([0.01, -0.37, 1e-5]) * (1 if storage == torch.int8 else 20)
    x = torch.randn(14, 80, generator=generator).to(dtype)
    rows = (4, 3, 7)
    fmt = {torch.int8: "int8_sym", torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}[storage]
    public = codes.mT.contiguous()
    weight = QuantWeight(
        public.view(torch.uint8) if storage == torch.int8 else public, scales, None, FORMATS[fmt], None, "tensor"
    )
    oracle, peer = grouped_gemm_reference(x, weight, rows), peer_gemm(x, weight, rows)
    counts = torch.tensor(rows, dtype=torch.int32)
    for options in ({}, dict(group_size=7, weight_bits=4), dict(group_size=0, weight_bits=3)):
        got = moe_gemm_prefill(x, codes, counts, scales=scales, scale_scheme="per_tensor", **options)
        assert got.shape == (14, 48) and got.dtype == dtype
        assert_no_worse(got, oracle, peer)


# ---- gradients with respect to the activations


def autograd_of(x: torch.Tensor, weight: QuantWeight, rows: tuple[int, ...], dy: torch.Tensor) -> torch.Tensor:
    """Through dequantize and one matmul an expert, in fp64."""
    leaf = x.detach().double().requires_grad_()
    w = dequantize(weight, torch.float64)
    parts = torch.split(leaf, rows)
    torch.cat([part @ w[e].T for e, part in enumerate(parts)]).backward(dy.double())
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("rows", [(3, 0, 9, 0), (0, 0, 0, 0), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients(fmt: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    dtype = dtype_for(fmt) if dtype == torch.bfloat16 else dtype
    inputs = make_inputs(Case(rows, N=32, K=96, format=fmt, group_size=32, dtype=dtype))
    dy = torch.randn(sum(rows), 32, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = autograd_of(inputs.x, inputs.weight, rows, dy)
    w = dequantize(inputs.weight, dtype)
    parts = [part @ w[e] for e, part in enumerate(torch.split(dy, rows))]
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "grouped_gemm": lambda x: grouped_gemm(x, inputs.weight, inputs.plan)
    }
    if inputs.weight.format.quantized or inputs.weight.codes.dtype == dtype:
        for kernel in (*KERNELS.values(), moe):
            calls[kernel.__name__] = lambda x, kernel=kernel: kernel(**(arguments(inputs) | dict(activations=x)))  # type: ignore[misc]
    for name, call in calls.items():
        x = inputs.x.clone().requires_grad_()
        y = call(x)
        assert y.requires_grad and torch.equal(y.detach(), call(inputs.x)), f"{name}: the forward differs"
        y.backward(dy)
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == dtype, name
        assert_no_worse(x.grad, expected, torch.cat(parts))


def test_gradients_through_expanded_and_strided_grad_outputs() -> None:
    inputs = make_inputs(Case((3, 0, 9), N=32, K=96, format="int4_asym", group_size=32, dtype=torch.float32))
    w = dequantize(inputs.weight)
    for name, loss in {"sum": lambda y: y.sum(), "transposed": lambda y: (y.T * 2).square().sum()}.items():
        x, ref = inputs.x.clone().requires_grad_(), inputs.x.clone().requires_grad_()
        loss(grouped_gemm(x, inputs.weight, inputs.plan)).backward()
        loss(torch.cat([part @ w[e].T for e, part in enumerate(torch.split(ref, (3, 0, 9)))])).backward()
        torch.testing.assert_close(x.grad, ref.grad, msg=lambda m, name=name: f"{name}: {m}")  # type: ignore[misc]


def test_gradients_of_strided_activations_and_of_sentinel_rows() -> None:
    inputs = make_inputs(Case((2, 1), N=32, K=64, format="int8_sym", group_size=32, dtype=torch.float32))
    plan = TokenPlan.from_expert_ids(torch.tensor([[0], [-1], [1], [0], [7]]), 2)
    base = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grouped_gemm(base.T, inputs.weight, plan).sum().backward()
    assert base.grad is not None
    w = dequantize(inputs.weight).sum(1)
    torch.testing.assert_close(base.grad, torch.stack([w[0], w[0], w[1], 0 * w[0], 0 * w[0]]).T)


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scales"])
def test_gradients_of_moe_gemm(scales: bool) -> None:
    inputs = make_inputs(Case((3, 0, 9), N=32, K=96, format="bf16"))
    s = torch.rand(3, 32, generator=torch.Generator().manual_seed(0)) + 0.5 if scales else None
    x = inputs.x.clone().requires_grad_()
    y = moe_gemm(x, inputs.weight.codes.mT.contiguous(), inputs.counts, scales=s)
    dy = torch.randn(12, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(dy)
    by_row = torch.ones(12, 32) if s is None else s.repeat_interleave(torch.tensor([3, 0, 9]), 0)
    expected = autograd_of(inputs.x, inputs.weight, (3, 0, 9), dy.double() * by_row.double())
    scaled = (dy.float() * by_row).bfloat16()
    parts = [part @ inputs.weight.codes[e] for e, part in enumerate(torch.split(scaled, (3, 0, 9)))]
    assert x.grad is not None
    assert_no_worse(x.grad, expected, torch.cat(parts))


def test_gradients_of_the_per_tensor_scheme() -> None:
    codes = torch.randint(-128, 128, (2, 64, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    scales = torch.tensor([0.01, 0.02])
    y = moe_gemm_prefill(x, codes, torch.tensor([4, 3]), scales=scales, scale_scheme="per_tensor")
    y.sum().backward()
    w = (codes.double() * scales.double()[:, None, None]).sum(2)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), w.repeat_interleave(torch.tensor([4, 3]), 0), rtol=0.02, atol=0.05)


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    inputs = make_inputs(Case((3, 0, 9), N=32, K=96, format="int4_sym", group_size=32))
    assert not grouped_gemm(inputs.x, inputs.weight, inputs.plan).requires_grad
    with torch.no_grad():
        assert not grouped_gemm(inputs.x.clone().requires_grad_(), inputs.weight, inputs.plan).requires_grad


# ---- support


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=name_of)
@pytest.mark.parametrize("fmt", FORMATS)
def test_support_table(fmt: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case((3, 2), N=16, K=32, format=fmt, group_size=16, dtype=dtype))
    for backward in (False, True):
        answers = explain(Problem.of("grouped_gemm", inputs.x, inputs.weight, backward=backward))
        for answer in answers:
            mixed = fmt in ("bf16", "fp16") and dtype not in (torch.float32, FORMATS[fmt].storage)
            must = "cpu" in SUPPORT.get((fmt, answer.backend), ()) and not mixed
            must = must and not (backward and answer.backend in FORWARD_ONLY)
            assert answer.ok == must, f"{answer.backend} answers {answer}; the table says {must}: mend one of them"
            assert bool(answer.reason) == (not answer.ok), "a reason exactly if it cannot"
            assert not answer.syncs, "on a CPU there is nothing to wait for"
    missing = {backend for name, backend in SUPPORT if name == fmt} - {answer.backend for answer in answers}
    assert not missing, f"backends in the table that nobody knows: {missing}"
    for backend in {answer.backend for answer in answers if answer.ok}:
        got = grouped_gemm(inputs.x, inputs.weight, inputs.plan, backend=backend)
        assert_no_worse(got, inputs.oracle, inputs.peer)


def test_column_scales_apply_to_the_fp32_sum() -> None:
    """100 * 100 * 64 overflows fp16; times 1e-3 it is 640."""
    x = torch.full((3, 64), 100.0, dtype=torch.float16)
    w = torch.full((2, 64, 16), 100.0, dtype=torch.float16)
    y = qexperts.moe_gemm(x, w, torch.tensor([1, 2], dtype=torch.int32), scales=torch.full((2, 16), 1e-3))
    assert torch.equal(y, torch.full((3, 16), 640.0, dtype=torch.float16))


def test_fp32_activations_of_moe_gemm_on_the_cpu() -> None:
    x, w = torch.randn(3, 64), torch.randn(2, 64, 16).bfloat16()
    y = qexperts.moe_gemm(x, w, torch.tensor([1, 2], dtype=torch.int32))
    torch.testing.assert_close(y, torch.cat([x[:1] @ w[0].float(), x[1:] @ w[1].float()]))


def test_a_weight_is_moved_but_never_cast() -> None:
    weight = qexperts.quantize(torch.randn(2, 16, 32), "int8_sym", group_size=16)
    assert torch.equal(weight.to("cpu").codes, weight.codes)
    with pytest.raises(ValueError, match=r"QuantWeight.to: torch.bfloat16; expected a device"):
        weight.to(torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scales"):
        weight.with_tensors(weight.codes, weight.codes)


def test_quantize_keeps_no_graph() -> None:
    w = torch.nn.Parameter(torch.randn(2, 16, 32))
    for name in qexperts.FORMATS:
        weight = qexperts.quantize(w, name, group_size=16)
        assert not any(t.requires_grad for t in (weight.codes, weight.scales, weight.zeros) if t is not None)
        assert not qexperts.dequantize(weight).requires_grad


def test_gradients_once_and_of_the_weight_that_was_used() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    weight = qexperts.quantize(torch.randn(2, 16, 32), "int8_sym", group_size=16)
    plan = qexperts.TokenPlan.from_counts(torch.tensor([1, 2]), 3)
    (dx,) = torch.autograd.grad(qexperts.grouped_gemm(x, weight, plan).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    y = qexperts.grouped_gemm(x, weight, plan)
    weight.codes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
