"""Backend "cpu": every instruction set that this machine executes against the oracle and against the others."""

from __future__ import annotations

import dataclasses
import mmap
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qexperts import (
    FORMATS,
    Problem,
    QuantExperts,
    QuantWeight,
    TokenPlan,
    UnsupportedError,
    backends,
    explain,
    fused_experts,
    grouped_gemm,
    moe,
    moe_gemm_decode,
    moe_gemm_prefill,
    prepare,
    quantize,
    unprepare,
)
from qexperts.backends import BACKENDS, _say_skipped, cpu_backend, select
from qexperts.reference import grouped_gemm_reference
from qexperts.testing import Case, Inputs, assert_no_worse, int8_rounded, judge, make_inputs, nan_filled, peer_gemm

pytestmark = pytest.mark.skipif(not cpu_backend.installed(), reason="llvmlite is not installed")
SRC = Path(__file__).resolve().parents[1] / "src"
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
INTEGER = [name for name in QUANTIZED if FORMATS[name].kind == "int"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = (0, 7, 1, 0, 23, 4)  # what is unpacked in registers, and what first goes into the cache


def isas() -> tuple[str, ...]:
    if not cpu_backend.installed():
        return ()
    from qexperts.kernels_cpu.isa import executable

    return executable()


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def multiply(inputs: Inputs, weight: QuantWeight | None = None, **options: str) -> torch.Tensor:
    out = nan_filled(inputs.x.shape[0], inputs.weight.N, dtype=inputs.x.dtype)
    return grouped_gemm(inputs.x, weight or inputs.weight, inputs.plan, out=out, backend="cpu", **options)


# ---- activations as 16-bit integers


def beside_one_of(size: float, rows: int = 9) -> Inputs:
    """Activations beside a large one whose weights are zero: all that is multiplied is the small ones."""
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.randn(rows, 256, generator=generator), torch.randn(2, 48, 256, generator=generator)
    x[:, 7], dense[:, :, 7] = size, 0
    weight = quantize(dense.bfloat16(), "int4_sym", group_size=128)
    return Inputs.of(x.bfloat16(), weight, (rows - 2, 2))


def calls_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dot product of every call, in order."""
    made: list[str] = []
    into = cpu_backend.BoundCall.into

    def spied(self: cpu_backend.BoundCall, *tensors: Any) -> None:
        made.append(self._kernel.kind.dot)
        into(self, *tensors)

    monkeypatch.setattr(cpu_backend.BoundCall, "into", spied)
    return made


@pytest.mark.parametrize("isa", [name for name in isas() if name != "plain"])
def test_small_activations_beside_a_large_one_keep_their_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXPERTS_CPU_ISA", isa)
    made, exact = calls_made(monkeypatch), "bf16" if isa == "avx512_bf16" else "fp32"
    for size, dots in ((100.0, ["int16"]), (1e4, ["int16", exact]), (float("inf"), ["int16", exact])):
        inputs = beside_one_of(size)
        made.clear()
        y = multiply(inputs)
        assert made == dots, size
        if size < float("inf"):
            assert_no_worse(y, inputs.oracle, inputs.peer, 256)


def test_groups_that_are_small_throughout_or_zero_are_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls_made(monkeypatch)
    inputs = beside_one_of(1.0)
    x = inputs.x.clone()
    x[0] = 0
    x[1, :128] *= 2.0**-20
    x[2, 1:128] = 0
    x[3, :120] = 3.0  # most are as large as the largest: the few small ones are no eighth
    x[4] = torch.where(torch.arange(256) % 2 == 0, 0, x[4])
    again = Inputs.of(x, inputs.weight, inputs.counts.tolist())
    assert_no_worse(multiply(again), again.oracle, again.peer, 256)
    assert made == (["int16"] if isas()[0] != "plain" else ["fp32"])


@pytest.mark.skipif("avx2" not in isas(), reason="for x86-64")
@pytest.mark.parametrize(
    ("part", "source", "words"),
    [("pack", "panels", 0), ("gemm", "panels", 0), ("gemm", "rows", 16), ("gemm", "rows", 4)],
)
@pytest.mark.parametrize(
    ("fmt", "x"),
    [("int8_sym", "bf16"), ("int4_sym", "bf16"), ("int2_asym", "bf16"), ("fp8_e4m3", "bf16"), ("fp8_e5m2", "fp16")],
)
@pytest.mark.parametrize("name", ["avx512", "avx512_bf16"])
def test_avx512_compiles_where_it_does_not_run(
    name: str, fmt: str, x: str, part: str, source: str, words: int, capfd: pytest.CaptureFixture[str]
) -> None:
    from qexperts.kernels_cpu import build, isa
    from qexperts.kernels_cpu.spec import Kind

    spec, chosen = FORMATS[fmt], isa._isa(name)
    kind = Kind(
        isa=chosen, format=fmt, bits=spec.bits, asym=spec.asym, x=x, y=x,
        dot=cpu_backend._dot(chosen, fmt, x, int8=False, shared=128), int8=False,
        scale="bf16", scale_access="vector", source=source, panels=4, row_words=words,
    )  # fmt: skip
    assert len(build._compile(part, kind.deciding(part))) > 1000
    assert capfd.readouterr().err == "", "LLVM knows every feature"


# ---- rows of public weights


@pytest.fixture(params=[False, True], ids=["others", "zen"])
def zen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Kernels as they are tuned for a processor of AMD, and for others, whatever this one is."""
    from qexperts.kernels_cpu import isa

    def forget() -> None:
        isa._isa.cache_clear()
        isa.choose.cache_clear()
        cpu_backend._BOUND.clear()

    monkeypatch.setattr(isa, "_zen", lambda: request.param)
    forget()
    yield request.param
    forget()


@pytest.mark.parametrize(
    ("fmt", "k", "group", "words"),
    [
        ("int8_sym", 512, 128, 32),
        ("int8_asym", 512, 512, 64),  # whose sums are cut at 256
        ("int4_sym", 2048, 128, 16),
        ("int4_asym", 640, 32, 4),  # a register holds several groups
        ("int2_sym", 512, 256, 16),
        ("int2_asym", 512, 64, 4),
        ("int4_sym", 400, 16, 0),  # groups smaller than what is transposed at once
        ("int4_sym", 576, 48, 0),  # groups that are no whole squares of words
        ("int2_asym", 960, 240, 0),
        ("int4_asym", 272, 16, 0),
        ("int8_sym", 1056, 1056, 0),  # the last part of K is short
    ],
)
@pytest.mark.parametrize("isa", [name for name in isas() if name != "plain"])
def test_rows_of_public_weights_give_the_bits_of_prepared_ones(
    isa: str, fmt: str, k: int, group: int, words: int, zen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEXPERTS_CPU_ISA", isa)
    inputs = make_inputs(Case((1, 2, 3, 4, 0, 5), 112, k, fmt, group))
    weight = inputs.weight
    gathered = zen and isa.startswith("avx512") and weight.format.bits <= 4
    kind = cpu_backend._kind(weight, "bf16", "bf16", int8=False, exact=False)
    assert kind.row_words == (0 if gathered else words) and kind.isa.near != zen
    y = multiply(inputs)
    assert_no_worse(y, inputs.oracle, inputs.peer, k)
    prepared = prepare(weight.with_tensors(*(t.clone() for t in weight.tensors)), "cpu")
    assert torch.equal(y, multiply(inputs, prepared))


@pytest.mark.parametrize(
    ("fmt", "dtype", "k", "group", "words"),
    [
        ("fp8_e4m3", torch.bfloat16, 512, 128, 32),
        ("fp8_e4m3", torch.float16, 512, 512, 64),  # with AVX-512 BF16 the sum of two
        ("fp8_e4m3", torch.float32, 320, 64, 16),
        ("fp8_e5m2", torch.bfloat16, 320, 32, 8),  # a set of AVX-512 sums two groups at once
        ("fp8_e5m2", torch.float16, 320, 16, 4),
        ("fp8_e5m2", torch.bfloat16, 272, 272, 0),  # the last part of K is short
    ],
)
@pytest.mark.parametrize("isa", isas())
def test_rows_of_public_fp8_weights_have_the_same_bits_beside_any_others(
    isa: str, fmt: str, dtype: torch.dtype, k: int, group: int, words: int, zen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of fp32 have an order of their own: other bits than prepared weights give, but the same for 1 to
    `direct_rows` rows and on any number of threads."""
    monkeypatch.setenv("QEXPERTS_CPU_ISA", isa)
    inputs = make_inputs(Case((1, 2, 3, 4, 0, 5), 112, k, fmt, group, dtype))
    kind = cpu_backend._kind(inputs.weight, cpu_backend._NAMES[dtype], "fp32", int8=False, exact=False)
    assert kind.row_words == words
    y = multiply(inputs)
    assert_no_worse(y, inputs.oracle, inputs.peer, k)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(multiply(inputs), y)
    finally:
        torch.set_num_threads(threads)
    for row, expert in ((0, 0), (1, 1), (2, 1), (4, 2), (9, 3)):
        weight, x = inputs.weight.experts(expert, expert + 1), inputs.x[row : row + 1]
        alone = grouped_gemm(x, weight, TokenPlan.from_counts(torch.tensor([1]), 1), backend="cpu")
        if inputs.counts[expert] <= kind.isa.direct_rows:
            assert torch.equal(alone, y[row : row + 1])


@pytest.mark.skipif("avx2" not in isas(), reason="for x86-64")
@pytest.mark.parametrize(
    ("fmt", "group"),
    [("int8_asym", 256), ("int4_sym", 128), ("int4_asym", 32), ("int2_sym", 128), ("int2_asym", 64), ("fp8_e4m3", 128),
     ("fp8_e5m2", 32), ("fp8_e4m3", 16)],
)  # fmt: skip
def test_rows_in_registers_of_16_lanes(fmt: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of AVX-512, with the instructions of AVX2: the same bits where sums are integers."""
    inputs = make_inputs(Case((1, 2, 3, 4, 0, 5), 112, 512, fmt, group))
    w = inputs.weight
    calls = [cpu_backend.BoundCall(w, torch.bfloat16, wide=False, int8=False)]
    wide = dataclasses.replace(cpu_backend._isa_used(), name="16 lanes", lanes=16, panels=4, gathered_bits=0)
    monkeypatch.setattr(cpu_backend, "_isa_used", lambda: wide)
    calls += [cpu_backend.BoundCall(w, torch.bfloat16, wide=False, int8=False)]
    assert calls[1]._kernel.kind.row_words and calls[1]._kernel.kind.isa.set_rows == 4
    y, same = (call(inputs.x, w.codes, w.scales, w.zeros, inputs.counts) for call in calls)
    assert_no_worse(same, inputs.oracle, inputs.peer, 512)
    assert w.format.kind == "fp8" or torch.equal(y, same)


@pytest.mark.skipif("avx2" not in isas(), reason="for x86-64")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(("fmt", "group"), [("fp8_e4m3", 128), ("fp8_e5m2", 32)])
def test_rows_of_fp8_weights_in_pairs_of_bf16(
    fmt: str, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of AVX-512 BF16, in instructions of AVX2 that make the same pairs and the same sums of products."""
    from qexperts.kernels_cpu.micro import MicroKernels
    from qexperts.kernels_cpu.vectors import Emitter

    def halves(e: Any, pairs: Any) -> list[Any]:
        floats = [e.bits(pairs, "shl", 16), e.bits(pairs, "and_", -0x10000)]
        return [e.builder.bitcast(one, e.float_of_int(one).type) for one in floats]

    def dot_bf16(e: Any, total: Any, a: Any, b: Any) -> Any:
        for one, other in zip(halves(e, a), halves(e, b), strict=True):
            total = e.fma(one, other, total)
        return total

    def as_bf16(self: Any, e: Any, word: Any) -> list[Any]:
        codes = [e.cast(self._one_fp32(e, word, i), word.type) for i in range(4)]
        return [e.builder.or_(e.bits(low, "lshr", 16), high) for low, high in zip(codes[:2], codes[2:], strict=True)]

    monkeypatch.setattr(Emitter, "dot_bf16", dot_bf16)
    monkeypatch.setattr(MicroKernels, "_as_bf16", as_bf16)
    pairs = dataclasses.replace(
        cpu_backend._isa_used(), name="pairs of bf16", lanes=16, panels=4, dots=("bf16", "fp32"), gathered_bits=0
    )
    monkeypatch.setattr(cpu_backend, "_isa_used", lambda: pairs)
    inputs = make_inputs(Case((1, 2, 3, 4, 0, 5), 112, 512, fmt, group, dtype))
    w = inputs.weight
    call = cpu_backend.BoundCall(w, dtype, wide=False, int8=False)
    kind = call._kernel.kind
    assert kind.row_words and kind.dot == "bf16" and kind.isa.set_rows == 4
    assert_no_worse(call(inputs.x, w.codes, w.scales, w.zeros, inputs.counts), inputs.oracle, inputs.peer, 512)


# ---- instruction sets

# A kind of kernel each; what one instruction set has in common for all formats needs no repetition.
CASES = [
    Case(ROWS, 80, 544, "int4_sym", 32, why="blocks of columns and squares of scales that overlap"),
    Case(ROWS, 16, 272, "int4_asym", None, torch.float16, why="K in parts, the last one short"),
    Case(ROWS, 64, 576, "int8_asym", 32, torch.float32, why="the strictest error rule"),
    Case(ROWS, 64, 128, "int8_sym", 128, negative_scales=True),
    Case(ROWS, 48, 256, "int2_sym", 64, torch.float16),
    Case(ROWS, 64, 128, "fp8_e4m3", 32, torch.float16, why="codes below the smallest normal number"),
    Case(ROWS, 16, 128, "fp8_e5m2", 64),
    Case(ROWS, 64, 272, "fp16", None, torch.float16),
    Case(ROWS, 16, 272, "bf16", None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_instruction_sets(isa: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXPERTS_CPU_ISA", isa)
    inputs = make_inputs(case)
    assert f"kernels for {isa} (QEXPERTS_CPU_ISA says so)" in answer(inputs).note
    got = multiply(inputs)
    assert_no_worse(got, inputs.oracle, inputs.peer, case.K)
    prepared = multiply(inputs, prepare(inputs.weight, "cpu", keep_source=True))
    assert_no_worse(prepared, inputs.oracle, inputs.peer, case.K)
    # fp32 sums of rows as they lie have an order of their own
    assert inputs.weight.format.kind == "fp8" or torch.equal(prepared, got)


def answer(inputs: Inputs):  # type: ignore[no-untyped-def]
    return next(a for a in explain(Problem.of("test", inputs.x, inputs.weight)) if a.backend == "cpu")


@pytest.mark.parametrize(
    ("forced", "reason"), [("avx1024", "expected one of avx512_bf16, avx512, avx2, plain")], ids=str
)
def test_an_instruction_set_that_cannot_be_says_so(forced: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXPERTS_CPU_ISA", forced)
    with pytest.raises(UnsupportedError, match=f"QEXPERTS_CPU_ISA={forced}.*{reason}"):
        multiply(make_inputs(CASES[0]))


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    from qexperts.kernels_cpu import isa

    monkeypatch.setattr(isa, "_features", lambda: {"avx2": True, "fma": True})
    isa.choose.cache_clear()
    isa.executable.cache_clear()
    try:
        assert isa.executable() == ("plain",)
        chosen, why = isa.choose("")
        assert chosen is not None and chosen.name == "plain" and why == "avx2 needs f16c, bmi2"
        assert isa.choose("avx512")[0] is None and "which this CPU lacks" in isa.choose("avx512")[1]
    finally:
        isa.choose.cache_clear()
        isa.executable.cache_clear()


# ---- every code, every layout of scales


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_every_code_exactly(fmt: str, dtype: torch.dtype) -> None:
    """One row of x picks one column of w: the product is the weight, rounded once."""
    record, k = FORMATS[fmt], 256
    raw = torch.arange(k * record.bits // 8, dtype=torch.int64).repeat(1, 16, 1) % 256
    raw[0, 1:] = raw[0, 1:].flip(1)
    codes = raw.to(torch.uint8).view(record.storage) if record.kind == "fp8" else raw.to(torch.uint8)
    if record.kind == "fp8":
        codes = torch.where(codes.float().isfinite(), codes.float(), 1.0).to(record.storage)
    scales = torch.full((1, 16, k // 32), 0.5)
    zeros = torch.full_like(scales, 2**record.bits) if record.asym else None
    weight = QuantWeight(codes, scales, zeros, fmt, 32)
    x = torch.eye(k).to(dtype)
    got = grouped_gemm(x, weight, TokenPlan.from_counts(torch.tensor([k], dtype=torch.int32), k), backend="cpu")
    expected = grouped_gemm_reference(x, weight, [k]).to(dtype)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("scale_layout", ["channel", "tensor", "block128"])
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=name_of)
def test_scale_layouts(scale_layout: str, scale_dtype: torch.dtype) -> None:
    rows = (5, 0, 2)
    dense = torch.randn(3, 144, 320, generator=torch.Generator().manual_seed(0)) * 320**-0.5
    weight = quantize(dense, "fp8_e4m3", scale_layout=scale_layout, scale_dtype=scale_dtype)
    x = torch.randn(7, 320, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = Inputs.of(x, weight, rows)
    got = multiply(inputs)
    assert_no_worse(got, inputs.oracle, inputs.peer, 320)
    prepared = prepare(weight, "cpu", keep_source=True)
    assert prepared.weight_layout == "panels" and torch.equal(multiply(inputs, prepared), got)
    restored = unprepare(prepared)
    for field in dataclasses.fields(weight):
        one, other = getattr(restored, field.name), getattr(weight, field.name)
        same = torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if torch.is_tensor(one) else one == other
        assert same, field.name


# ---- rows


def test_a_hot_expert_an_odd_stride_and_rows_of_nobody() -> None:
    inputs = make_inputs(Case((1, 530, 0, 5), 64, 128, "int4_sym", 32))
    wide = torch.full((536, 300), float("nan"), dtype=torch.bfloat16)
    wide[:, 3:131] = inputs.x
    got = grouped_gemm(wide[:, 3:131], inputs.weight, inputs.plan, backend="cpu")
    assert_no_worse(got, inputs.oracle, inputs.peer, 128)
    for dtype in (torch.int32, torch.int64):
        plan = TokenPlan(torch.tensor([1, 500, 0, 5], dtype=dtype), 536)
        some = grouped_gemm(inputs.x, inputs.weight, plan, out=nan_filled(536, 64, dtype=inputs.x.dtype), backend="cpu")
        assert torch.equal(some[:501], got[:501]) and not some[506:].any()


@pytest.mark.parametrize("fmt", ["int8_sym", "fp8_e4m3"])
def test_threads_and_phases_change_no_bit(fmt: str) -> None:
    inputs = make_inputs(Case((3, 250, 0, 90), 192, 128, fmt, 32))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(multiply(inputs))
    finally:
        torch.set_num_threads(threads)
    w = inputs.weight
    call = dict(scales=w.scales, weight_bits=8, group_size=32)
    results += [moe(inputs.x, w.codes, inputs.counts, **call, phase=phase) for phase in ("decode", "prefill")]  # type: ignore[arg-type]
    assert all(torch.equal(result, results[0]) for result in results)


# ---- int8 activations


@pytest.mark.parametrize("fmt", INTEGER)
@pytest.mark.parametrize("isa", [name for name in isas() if name in ("avx512_bf16", "avx2")])
def test_int8_activations(isa: str, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXPERTS_CPU_ISA", isa)
    inputs = make_inputs(Case(ROWS, 64, 128, fmt, 32))
    inputs.x[3] = 0  # a group of zeros
    inputs = Inputs.of(inputs.x, inputs.weight, ROWS)
    rounded = inputs.with_activations("int8")
    got = multiply(inputs, activation_format="int8")
    assert_no_worse(got, rounded.oracle, rounded.peer, 128)
    assert 1e-3 < judge(got, inputs.oracle, inputs.peer, 128).error < 2e-2  # and what it costs
    assert not torch.equal(multiply(inputs), got), "never the default"


def test_int8_activations_are_for_integer_weights_on_this_backend() -> None:
    inputs = make_inputs(Case(ROWS, 16, 64, "fp8_e4m3", 32))
    with pytest.raises(UnsupportedError, match="cpu: int8 activations are for integer weights, not fp8_e4m3"):
        grouped_gemm(inputs.x, inputs.weight, inputs.plan, activation_format="int8")
    with pytest.raises(ValueError, match="activation_format is 'int4'; expected None"):
        grouped_gemm(inputs.x, inputs.weight, inputs.plan, activation_format="int4")


@pytest.mark.parametrize("k", [400, 272, 256, 48])
@pytest.mark.parametrize("scale_layout", ["channel", "tensor", "block128"])
def test_int8_groups_of_other_scales(scale_layout: str, k: int) -> None:
    """Where scales are wider, or blocks, activations are rounded by 256 k, or by 128."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(len(ROWS), 32, k, generator=generator).mul_(k**-0.5)
    weight = quantize(w, "int8_sym", scale_layout=scale_layout)
    inputs = Inputs.of(torch.randn(sum(ROWS), k, generator=generator).bfloat16(), weight, ROWS)
    inputs.x[:, ::7] *= 20  # so that groups differ
    rounded = inputs.with_activations("int8")
    assert_no_worse(multiply(inputs, activation_format="int8"), rounded.oracle, rounded.peer, k)


def test_int8_activations_of_the_tensor_level() -> None:
    """The three calls give what `grouped_gemm` gives, whatever the phase, in each dtype of activations."""
    for dtype in DTYPES:
        inputs = make_inputs(Case(ROWS, 64, 128, "int4_asym", 32, dtype))
        w = inputs.weight
        call = dict(scales=w.scales, zeros=w.zeros, weight_bits=4, group_size=32, asym=True, activation_format="int8")
        arguments = (inputs.x, w.codes, inputs.counts)
        expected = multiply(inputs, activation_format="int8")
        results = [function(*arguments, **call) for function in (moe, moe_gemm_decode, moe_gemm_prefill)]  # type: ignore[operator]
        results += [moe(*arguments, **call, phase=phase) for phase in ("decode", "prefill")]  # type: ignore[arg-type]
        assert all(torch.equal(result, expected) for result in results)
        assert not torch.equal(moe(*arguments, **{**call, "activation_format": None}), expected), "never the default"  # type: ignore[arg-type]


def test_int8_activations_of_the_per_tensor_scheme() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (2, 64, 32), generator=generator, dtype=torch.int8)  # [E, K, N]
    x = torch.randn(9, 64, generator=generator, dtype=torch.bfloat16)
    scales = torch.tensor([0.01, 0.02])
    counts = torch.tensor([5, 4], dtype=torch.int32)
    how = dict(scales=scales, scale_scheme="per_tensor")
    got = moe_gemm_prefill(x, codes, counts, **how, activation_format="int8")  # type: ignore[arg-type]
    weight = QuantWeight(codes.view(torch.uint8).mT, scales, None, FORMATS["int8_sym"], None, "tensor")
    rounded = int8_rounded(x, weight)
    oracle = grouped_gemm_reference(rounded, weight, (5, 4))
    assert_no_worse(got, oracle, peer_gemm(rounded.bfloat16(), weight, (5, 4)), 64)
    assert not torch.equal(got, moe_gemm_prefill(x, codes, counts, **how))  # type: ignore[arg-type]


def test_int8_activations_of_a_layer() -> None:
    """The layer rounds the input of both multiplications, and the module does what the function does."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        quantize(torch.randn(4, n, k, generator=generator).mul_(k**-0.5).bfloat16(), "int4_sym", group_size=32)
        for n, k in ((128, 64), (64, 64))
    )
    x = torch.randn(6, 64, generator=generator).bfloat16()
    ids = torch.randint(0, 4, (6, 2), generator=generator)
    weights = torch.rand(6, 2, generator=generator)
    exact = fused_experts(x, first, second, ids, weights)
    got = fused_experts(x, first, second, ids, weights, activation_format="int8")
    error = (got.float() - exact.float()).square().mean().sqrt() / exact.float().square().mean().sqrt()
    assert 1e-3 < float(error) < 3e-2
    assert torch.equal(QuantExperts(first, second, activation_format="int8")(x, ids, weights), got)
    assert torch.equal(QuantExperts(first, second)(x, ids, weights), exact), "never the default"
    plan = TokenPlan.from_expert_ids(ids, 4)
    rows = x.index_select(0, plan.row_to_token)  # type: ignore[arg-type]
    h = grouped_gemm(rows, first, plan, activation_format="int8")
    y = grouped_gemm(torch.nn.functional.silu(h[:, :64]) * h[:, 64:], second, plan, activation_format="int8")
    slots = y.index_select(0, plan.slot_to_row).view(6, 2, 64)  # type: ignore[arg-type]
    assert torch.equal((slots * weights[..., None]).sum(1).to(x.dtype), got)


def test_int8_activations_pass_gradients_through() -> None:
    inputs = make_inputs(Case(ROWS, 64, 128, "int4_sym", 32))
    gradients = []
    for how in (None, "int8"):
        x = inputs.x.clone().requires_grad_()
        grouped_gemm(x, inputs.weight, inputs.plan, activation_format=how).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


INT8 = dict(scales=torch.ones(2, 16, 2, dtype=torch.bfloat16), group_size=32, activation_format="int8")


@pytest.mark.parametrize("function", [moe, moe_gemm_decode, moe_gemm_prefill])
def test_int8_activations_are_refused_where_nothing_rounds_them(function: Any) -> None:
    x, counts = torch.zeros(3, 64, dtype=torch.bfloat16), torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="cpu: int8 activations are for integer weights, not fp8_e4m3"):
        function(x, torch.zeros(2, 16, 64).to(torch.float8_e4m3fn), counts, **INT8)
    with pytest.raises(UnsupportedError, match="torch: does not quantize activations to int8"):
        function(x, torch.zeros(2, 16, 64).bfloat16(), counts, weight_bits=16, activation_format="int8")
    codes = torch.zeros(2, 16, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"{function.__name__}: activation_format is 'fp8'; expected None"):
        function(x, codes, counts, **{**INT8, "activation_format": "fp8"})
    with pytest.raises(Exception, match="activation_format is 'int8'; expected None, or untraced 'int8'"):
        torch.compile(lambda: function(x, codes, counts, **INT8), fullgraph=True, backend="eager")()
    wide = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    with pytest.raises(UnsupportedError, match="triton: "):
        function(wide, codes.to("meta"), counts.to("meta"), **{**INT8, "scales": INT8["scales"].to("meta")})


def test_int8_activations_of_a_layer_are_refused_where_nothing_rounds_them() -> None:
    first, second = (quantize(torch.randn(2, 64, 64).bfloat16(), "fp8_e4m3", group_size=32) for _ in range(2))
    x, ids, weights = torch.randn(3, 64).bfloat16(), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    with pytest.raises(UnsupportedError, match="cpu: int8 activations are for integer weights"):
        fused_experts(x, first, second, ids, weights, activation=lambda h: h, activation_format="int8")
    with pytest.raises(ValueError, match="QuantExperts: activation_format is 'int4'; expected None"):
        QuantExperts(first, second, lambda h: h, activation_format="int4")


# ---- who cannot run says why


@pytest.fixture
def skips(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that `auto` says it skips."""
    said: list[str] = []
    monkeypatch.setattr(backends, "_say_skipped", lambda name, reason: said.append(name))
    return said


def test_auto_says_what_it_skips_only_where_something_is_lost(
    skips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(Case(ROWS, 64, 64, "int4_sym", 32))
    problem = Problem.of("test", inputs.x, inputs.weight)
    assert select(problem).name == "cpu" and skips == []
    with pytest.raises(UnsupportedError):  # the error has every reason
        select(dataclasses.replace(problem, format=FORMATS["fp8_e4m3"], activation_format="int8"))
    assert skips == []
    tiles = dataclasses.replace(problem, weight_layout="tiles")
    assert select(tiles).name == "torch" and skips == ["cpu"]  # undoes the layout at each call: unprepare() gains
    skips.clear()
    anywhere = dataclasses.replace(BACKENDS["triton"], supports=lambda problem: (None, "", False))
    order = {"cpu": BACKENDS["cpu"], "triton": anywhere, "torch": BACKENDS["torch"]}
    monkeypatch.setattr(backends, "BACKENDS", order)
    assert select(tiles).name == "triton" and skips == []  # prepared for the one that runs it


def test_without_llvmlite_auto_falls_to_torch_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "installed", lambda: False)
    _say_skipped.cache_clear()
    inputs = make_inputs(Case(ROWS, 16, 64, "int4_sym", 32))
    with pytest.raises(UnsupportedError, match=r"cpu: llvmlite is not installed: pip install 'qexperts\[cpu\]'"):
        multiply(inputs)
    with pytest.warns(RuntimeWarning, match="backend cpu is skipped: llvmlite is not installed"):
        got = grouped_gemm(inputs.x, inputs.weight, inputs.plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(grouped_gemm(inputs.x, inputs.weight, inputs.plan, backend="auto"), got)
    assert_no_worse(got, inputs.oracle, inputs.peer)


# ---- the cache of compiled kernels

PROBE = """
import sys, time
import torch, qexperts
w = qexperts.quantize(torch.ones(1, 16, 64), "int4_sym", group_size=32, scale_dtype=torch.bfloat16)
x, plan = torch.ones(1, 64).bfloat16(), qexperts.TokenPlan.from_counts(torch.tensor([1]), 1)
start = time.perf_counter()
y = qexperts.grouped_gemm(x, w, plan, backend="cpu")
print(time.perf_counter() - start, "qexperts.kernels_cpu.drivers" in sys.modules)
assert y[0, 0] == 64, y
"""


def probe(directory: Path) -> tuple[float, str, str]:
    env = os.environ | {"QEXPERTS_CACHE_DIR": str(directory), "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, written = done.stdout.split()
    return float(seconds), written, done.stderr


def test_compiled_kernels_are_kept(tmp_path: Path) -> None:
    _, written, said = probe(tmp_path)
    assert written == "True" and said.count("qexperts: compiling") == 3 and "int4_sym, bf16 activations" in said
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    seconds, written, said = probe(tmp_path)
    assert seconds < 1 and written == "False" and said == "", (seconds, written, said)
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # a file that was cut off is made again
    assert probe(tmp_path)[2].count("qexperts: compiling") == 1


def test_a_cache_that_cannot_be_written_works_with_one_warning(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    said = probe(file / "below")[2]
    assert said.count("qexperts: compiling") == 3 and said.count("RuntimeWarning") == 1
    assert "Set QEXPERTS_CACHE_DIR to a directory that can be written" in said


# ---- pages


def huge_bytes(t: torch.Tensor) -> int:
    """Bytes of huge pages in the memory regions that a tensor lies in."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            first, stop = (int(part, 16) for part in name.split("-"))
            inside = first < t.data_ptr() + t.nbytes and t.data_ptr() < stop
        elif name == "AnonHugePages:" and inside:
            found += int(words[0]) * 1024
    return found


def test_prepared_weights_lie_in_huge_pages() -> None:
    from qexperts.pages import HUGE, use_huge_pages

    plain = torch.ones(8 * HUGE, dtype=torch.uint8)
    use_huge_pages(plain)
    if huge_bytes(plain) == 0:
        pytest.skip("this system gives no huge pages")
    codes = torch.randint(0, 256, (16, 1024, 512), dtype=torch.uint8)  # 8 MiB
    weight = QuantWeight(codes, torch.ones(16, 1024, 8, dtype=torch.bfloat16), None, FORMATS["int4_sym"], 128)
    before = weight.codes.clone()
    prepared = prepare(weight, "cpu")
    assert prepared.weight_layout == cpu_backend.LAYOUT and prepared.codes.data_ptr() == codes.data_ptr()
    assert huge_bytes(prepared.codes) >= prepared.codes.nbytes - 2 * HUGE
    public = unprepare(prepared)
    assert torch.equal(public.codes, before) and huge_bytes(public.codes) >= public.codes.nbytes - 2 * HUGE


@pytest.mark.parametrize("fmt", ["int4_asym", "bf16"])
def test_public_weights_that_we_make_or_hold_lie_in_huge_pages(fmt: str) -> None:
    from qexperts.layer import QuantExperts
    from qexperts.pages import HUGE, use_huge_pages

    plain = torch.ones(8 * HUGE, dtype=torch.uint8)
    use_huge_pages(plain)
    if huge_bytes(plain) == 0:
        pytest.skip("this system gives no huge pages")
    made = quantize(torch.randn(16, 1024, 1024, dtype=torch.bfloat16), fmt)
    assert huge_bytes(made.codes) >= made.codes.nbytes - 2 * HUGE
    memory = mmap.mmap(-1, made.codes.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # new, unlike a clone's
    codes = torch.frombuffer(memory, dtype=torch.uint8).view(made.codes.dtype).view(made.codes.shape).copy_(made.codes)
    before = huge_bytes(codes)
    held = QuantExperts(made, made.with_tensors(codes, *made.tensors[1:]), "silu").down
    assert held.codes.data_ptr() == codes.data_ptr() and torch.equal(held.codes, made.codes)
    assert huge_bytes(codes) - before >= codes.nbytes - 2 * HUGE


def test_what_is_no_whole_huge_page_stays_as_it_is() -> None:
    from qexperts.pages import use_huge_pages

    small, strided = torch.arange(100), torch.arange(2**22).view(2**11, 2**11).mT
    use_huge_pages(small, strided, None, torch.empty(0))
    assert torch.equal(small, torch.arange(100)) and torch.equal(strided.mT.flatten(), torch.arange(2**22))
