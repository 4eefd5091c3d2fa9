"""moe: its phases and its threshold; and every ValueError of the public contract, in one table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import DTYPES, KERNELS, QUANTIZED, arguments, dtype_for, name_of

import qexperts.ops
from qexperts import (
    FORMATS,
    Problem,
    TokenPlan,
    UnsupportedError,
    explain,
    grouped_gemm,
    moe,
    moe_gemm,
    moe_gemm_decode,
    moe_gemm_prefill,
)
from qexperts.testing import Case, make_inputs, nan_filled

# ---- phases


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("phase", KERNELS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_moe_equals_its_kernel_bit_for_bit(fmt: str, phase: str, dtype: torch.dtype) -> None:
    dtype = FORMATS[fmt].storage if fmt in ("bf16", "fp16") else dtype
    for rows in ((1, 0, 4, 2), (0, 33, 0, 5), (0, 0, 0, 0)):
        call = arguments(make_inputs(Case(rows, N=48, K=96, format=fmt, group_size=32, dtype=dtype)))
        expected = KERNELS[phase](**call)
        for threshold in (0, 4, 1000):
            assert torch.equal(moe(**call, phase=phase, decode_threshold=threshold), expected), (rows, threshold)


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What "auto" decided for the first call of each kind, in order. Nothing public tells: today's kernels give the
    same bits."""
    chosen: list[str] = []
    decide = qexperts.ops._phase

    def spied(*args: Any, **kwargs: Any) -> str:
        chosen.append(decide(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(qexperts.ops, "_phase", spied)
    return chosen


@pytest.mark.parametrize(
    ("rows", "threshold", "phase"),
    [
        ((4, 0, 4, 1), 4, "decode"),
        ((5, 0, 0, 0), 4, "prefill"),
        ((5, 5, 5, 5), 4, "prefill"),
        ((4, 4, 4, 4), 4, "decode"),
        ((4, 4, 4, 5), 4, "prefill"),
        ((1, 0, 2, 0), 4, "decode"),
        ((0, 0, 0, 0), 4, "decode"),
        ((0, 0, 0, 0), 0, "decode"),
        ((1, 0, 0, 0), 0, "prefill"),
        ((2, 1, 0, 0), 1, "prefill"),
        ((1, 1, 1, 0), 1, "decode"),
        ((33, 0, 7, 1), 33, "decode"),
        ((34, 0, 7, 1), 33, "prefill"),
        ((40, 0, 0, 0), 10**9, "decode"),
    ],
    ids=str,
)
def test_auto_on_both_sides_of_the_threshold(
    rows: tuple[int, ...], threshold: int, phase: str, phases: list[str]
) -> None:
    call = arguments(make_inputs(Case(rows, N=16, K=64, format="int4_sym", group_size=32)))
    got = moe(**call, decode_threshold=threshold)
    assert phases == [phase]
    assert torch.equal(got, KERNELS[phase](**call))


@pytest.mark.parametrize("given", [{}, {"decode_threshold": None}], ids=str)
def test_the_threshold_defaults_to_four_rows_an_expert(given: dict[str, Any], phases: list[str]) -> None:
    for rows, phase in (((4, 4), "decode"), ((5, 0), "prefill")):
        phases.clear()
        qexperts.ops._BOUND.clear()
        moe(**arguments(make_inputs(Case(rows, N=16, K=64, format="int8_asym", group_size=64))), **given)
        assert phases == [phase], rows


@pytest.mark.parametrize("fmt", FORMATS)
def test_auto_equals_the_kernel_it_picks(fmt: str) -> None:
    for rows, phase in (((4, 0, 1), "decode"), ((4, 0, 9), "prefill")):
        case = Case(rows, N=48, K=96, format=fmt, group_size=32, dtype=dtype_for(fmt))
        call = arguments(make_inputs(case))
        assert torch.equal(moe(**call), KERNELS[phase](**call))
        assert torch.equal(moe(**call, decode_threshold=100), moe_gemm_decode(**call))
        assert torch.equal(moe(**call, decode_threshold=0), moe_gemm_prefill(**call))


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    threshold=st.integers(0, 14),
    fmt=st.sampled_from(QUANTIZED),
)
def test_auto_follows_the_rule(rows: list[int], threshold: int, fmt: str) -> None:
    call = arguments(make_inputs(Case(tuple(rows), N=16, K=32, format=fmt, group_size=16)))
    phase = "decode" if max(rows) <= threshold else "prefill"
    assert torch.equal(moe(**call, decode_threshold=threshold), KERNELS[phase](**call))


# ---- the contract
#
# Every call starts from a good one: E = 3, N = 32, K = 64, groups of 32, 7 rows of bf16.

E, N, K, G, ROWS = 3, 32, 64, 32, (4, 0, 3)
Call = dict[str, Any]
PACKED = (moe_gemm_decode, moe_gemm_prefill, moe)


def good(fmt: str) -> Call:
    return arguments(make_inputs(Case(ROWS, N, K, fmt, G, dtype=dtype_for(fmt))))


@dataclasses.dataclass(frozen=True)
class Bad:
    """What is changed in a good call of `format`, and what the message must tell: the given and the needed."""

    format: str
    change: Callable[[Call], Call]
    given: str
    needed: str


def meta(name: str) -> Callable[[Call], Call]:
    return lambda c: {name: c[name].to("meta")}


def bf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def counts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BF16, ANY16 = r"bf16|bfloat16", r"bf16|bfloat16|fp16|float16"
ACTIVATIONS = {
    "x of rank 1": Bad("int4_sym", lambda c: dict(activations=c["activations"][0]), r"\(64,?\)", r"K"),
    "x of rank 3": Bad("int4_sym", lambda c: dict(activations=c["activations"][None]), r"\(1, 7, 64\)", r"K"),
    "x of fp64": Bad("int4_sym", lambda c: dict(activations=c["activations"].double()), r"float64|fp64", ANY16),
    "x of int32": Bad("int4_sym", lambda c: dict(activations=c["activations"].int()), r"int32", ANY16),
    "x too narrow": Bad("int4_sym", lambda c: dict(activations=c["activations"][:, :48]), r"48", r"24|32|64"),
}
PACKING = {
    "N": Bad(
        "int4_sym",
        lambda c: dict(weights=c["weights"][:, :24], scales=c["scales"][:, :24]),
        r"24",
        r"multiple of 16",
    ),
    "packed width": Bad("int4_sym", lambda c: dict(weights=c["weights"][..., :31]), r"31", r"32"),
    "packed width of int2": Bad("int2_sym", lambda c: dict(weight_bits=4), r"16", r"32"),
    "packed width of int8": Bad("int8_sym", lambda c: dict(weight_bits=2), r"64", r"K ?/ ?4|16"),
    "width of bf16": Bad("bf16", lambda c: dict(weights=c["weights"][..., :63]), r"63", r"64"),
    "width of fp8": Bad("fp8_e4m3", lambda c: dict(weights=c["weights"][..., :63]), r"63", r"64"),
    "weights of rank 2": Bad("int4_sym", lambda c: dict(weights=c["weights"][0]), r"\(32, 32\)", r"E, N"),
    "weights of int8": Bad("int8_sym", lambda c: dict(weights=c["weights"].view(torch.int8)), r"int8", r"uint8"),
    "weights of fp32": Bad("int4_sym", lambda c: dict(weights=c["weights"].float()), r"float32", r"uint8"),
    "packed weights as 16 bits": Bad("int4_sym", lambda c: dict(weight_bits=16, scales=None), r"uint8", ANY16),
    "16-bit weights as 4 bits": Bad(
        "bf16", lambda c: dict(weight_bits=4, scales=bf(E, N, K // G), group_size=G), r"bfloat16|bf16", r"uint8"
    ),
    "16-bit weights of another dtype": Bad(
        "bf16", lambda c: dict(weights=c["weights"].half()), r"float16|fp16", r"bfloat16|bf16"
    ),
    "weight_bits 3": Bad("int4_sym", lambda c: dict(weight_bits=3), r"\b3\b", r"2, 4, 8"),
    "weight_bits 0": Bad("int4_sym", lambda c: dict(weight_bits=0), r"\b0\b", r"2, 4, 8"),
    "weight_bits 32": Bad("int4_sym", lambda c: dict(weight_bits=32), r"\b32\b", r"2, 4, 8"),
}
SCALES = {
    "no scales": Bad("int4_sym", lambda c: dict(scales=None), r"scales", r"\(3, 32, 2\)|needs"),
    "no scales, fp8": Bad("fp8_e5m2", lambda c: dict(scales=None), r"scales", r"\(3, 32, 2\)|needs"),
    "scales' groups": Bad("int4_sym", lambda c: dict(scales=c["scales"][..., :1]), r"\(3, 32, 1\)", r"\(3, 32, 2\)"),
    "scales' N": Bad("int4_sym", lambda c: dict(scales=c["scales"][:, :16]), r"\(3, 16, 2\)", r"\(3, 32, 2\)"),
    "scales' E": Bad("int4_sym", lambda c: dict(scales=c["scales"][:2]), r"\(2, 32, 2\)", r"\(3, 32, 2\)"),
    "scales' rank": Bad("int4_sym", lambda c: dict(scales=c["scales"][0]), r"\(32, 2\)", r"\(3, 32, 2\)"),
    "channel scales": Bad("int4_sym", lambda c: dict(scales=c["scales"][..., 0]), r"\(3, 32\)", r"\(3, 32, 2\)"),
    "scales of fp32": Bad("int4_sym", lambda c: dict(scales=c["scales"].float()), r"float32|fp32", BF16),
    "scales of fp16": Bad("fp8_e4m3", lambda c: dict(scales=c["scales"].half()), r"\b(float16|fp16)", BF16),
    "scales of 16-bit weights": Bad("bf16", lambda c: dict(scales=bf(E, N, 2)), r"scales", r"None|no scales|16"),
    "no zeros": Bad("int4_asym", lambda c: dict(zeros=None), r"zeros", r"\(3, 32, 2\)|needs"),
    "superfluous zeros": Bad("int4_sym", lambda c: dict(zeros=bf(E, N, 2)), r"zeros", r"asym"),
    "zeros without asym": Bad("int4_asym", lambda c: dict(asym=False), r"zeros", r"asym"),
    "zeros' shape": Bad("int4_asym", lambda c: dict(zeros=c["zeros"][..., :1]), r"\(3, 32, 1\)", r"\(3, 32, 2\)"),
    "zeros of int32": Bad("int4_asym", lambda c: dict(zeros=c["zeros"].int()), r"int32", BF16),
    "zeros of fp32": Bad("int2_asym", lambda c: dict(zeros=c["zeros"].float()), r"float32|fp32", BF16),
    "asym fp8": Bad("fp8_e4m3", lambda c: dict(asym=True, zeros=bf(E, N, 2)), r"asym", r"(?i)fp8|float8"),
    "asym fp8 without zeros": Bad("fp8_e5m2", lambda c: dict(asym=True), r"asym", r"(?i)fp8|float8"),
    "zeros of fp8": Bad("fp8_e4m3", lambda c: dict(zeros=bf(E, N, 2)), r"zeros", r"(?i)fp8|asym"),
    "asym of 16 bits": Bad("bf16", lambda c: dict(asym=True, zeros=bf(E, N, 2)), r"asym", r"16"),
    "zeros of 16 bits": Bad("bf16", lambda c: dict(zeros=bf(E, N, 2)), r"zeros", r"16|asym|None"),
}
GROUPS = {
    f"group_size {g} of {fmt}": Bad(fmt, lambda c, g=g: dict(group_size=g), rf"(?<!\d){g}\b", needed)  # type: ignore[misc]
    for fmt, g, needed in (
        ("int4_sym", 48, r"64|divide"),
        ("int8_asym", 128, r"64|divide"),
        ("fp8_e4m3", 24, r"64|divide"),
        ("int4_sym", 0, r"positive|at least|divi|> 0"),
        ("int4_sym", -32, r"positive|at least|divi|> 0"),
        ("int4_sym", 1, r"even|multiple of 2|byte"),
        ("int2_sym", 2, r"multiple of 4|byte"),
        ("int8_sym", 0, r"positive|at least|divi|> 0"),
        ("fp8_e5m2", -1, r"positive|at least|divi|> 0"),
    )
}
COUNTS = {
    "counts' length": Bad(
        "int4_sym", lambda c: dict(num_tokens_per_expert=counts(4, 3)), r"\b2\b|\(2,\)", r"\b3\b|\(3,\)"
    ),
    "counts' rank": Bad(
        "int4_sym", lambda c: dict(num_tokens_per_expert=counts(4, 0, 3)[None]), r"\(1, 3\)", r"\(3,\)|\[E\]|rank"
    ),
    "float counts": Bad(
        "int4_sym", lambda c: dict(num_tokens_per_expert=torch.tensor([4.0, 0, 3])), r"float32", r"int32"
    ),
    "int16 counts": Bad("int4_sym", lambda c: dict(num_tokens_per_expert=counts(4, 0, 3).short()), r"int16", r"int32"),
    "sum below": Bad("int4_sym", lambda c: dict(num_tokens_per_expert=counts(4, 0, 2)), r"\b6\b", r"\b7\b"),
    "sum above": Bad("int4_sym", lambda c: dict(num_tokens_per_expert=counts(4, 1, 3)), r"\b8\b", r"\b7\b"),
    "all zero": Bad("int4_sym", lambda c: dict(num_tokens_per_expert=counts(0, 0, 0)), r"\b0\b", r"\b7\b"),
    "negative": Bad(
        "int4_sym", lambda c: dict(num_tokens_per_expert=counts(5, -1, 3)), r"-1", r"negative|>= 0|at least 0"
    ),
    "int64 sum": Bad(
        "int4_sym",
        lambda c: dict(num_tokens_per_expert=torch.tensor([2**32 + 4, 0, 3])),
        r"4294967303|4294967300",
        r"7",
    ),
}
DEVICES = {
    f"{name} on another device": Bad("int4_asym", meta(name), r"meta", r"cpu")
    for name in ("activations", "weights", "scales", "zeros", "num_tokens_per_expert")
}
GRADIENTS = {
    "weights' gradient": Bad(
        "bf16", lambda c: dict(weights=c["weights"].clone().requires_grad_()), r"weights", r"grad"
    ),
    "scales' gradient": Bad(
        "int4_asym", lambda c: dict(scales=c["scales"].clone().requires_grad_()), r"scales", r"grad"
    ),
    "zeros' gradient": Bad("int4_asym", lambda c: dict(zeros=c["zeros"].clone().requires_grad_()), r"zeros", r"grad"),
}
BAD_PACKED = ACTIVATIONS | PACKING | SCALES | GROUPS | COUNTS | DEVICES | GRADIENTS


def refused(function: Callable[..., object], call: Call, given: str, needed: str) -> None:
    with pytest.raises(ValueError) as caught:
        function(**call)
    message = str(caught.value)
    assert not isinstance(caught.value, UnsupportedError), message
    assert message.startswith(f"{function.__name__}: "), message
    assert len(message.splitlines()) == 1, message
    for pattern in (given, needed):
        assert re.search(pattern, message), f"{message!r} does not say {pattern!r}"


@pytest.mark.parametrize("name", BAD_PACKED)
@pytest.mark.parametrize("function", PACKED, ids=lambda f: f.__name__)
def test_contract(function: Callable[..., object], name: str) -> None:
    bad = BAD_PACKED[name]
    call = good(bad.format)
    function(**call)  # nothing but the change is wrong
    refused(function, call | bad.change(call), bad.given, bad.needed)


@pytest.mark.parametrize("phase", ["Decode", "", "both", None, 1], ids=repr)
def test_bad_phase(phase: object) -> None:
    refused(moe, good("int4_sym") | dict(phase=phase), re.escape(repr(phase)), "auto.*decode.*prefill")


@pytest.mark.parametrize("threshold", [-1, -100, 1.5, True, "4"], ids=repr)
def test_bad_threshold(threshold: object) -> None:
    for phase in ("auto", "decode", "prefill"):
        call = good("int4_sym") | dict(decode_threshold=threshold, phase=phase)
        refused(moe, call, re.escape(repr(threshold)), "decode_threshold")


@pytest.mark.parametrize("scheme", ["per_channel", "", "tensor", 1], ids=repr)
def test_bad_scheme(scheme: object) -> None:
    refused(moe_gemm_prefill, good("int4_sym") | dict(scale_scheme=scheme), re.escape(repr(scheme)), "per_tensor")


def per_tensor() -> Call:
    codes = torch.ones(E, K, N, dtype=torch.int8)
    x = torch.ones(7, K, dtype=torch.bfloat16)
    return dict(
        activations=x,
        weights=codes,
        num_tokens_per_expert=counts(*ROWS),
        scales=torch.ones(E),
        scale_scheme="per_tensor",
    )


PER_TENSOR: dict[str, tuple[Callable[[Call], Call], str, str]] = {
    "no scales": (lambda c: dict(scales=None), r"scales", r"\(3,\)|\[E\]|required"),
    "scales' shape": (lambda c: dict(scales=torch.ones(E, 1)), r"\(3, 1\)", r"\(3,\)"),
    "scales' length": (lambda c: dict(scales=torch.ones(2)), r"\(2,\)", r"\(3,\)"),
    "scales of bf16": (lambda c: dict(scales=bf(E)), r"bf16|bfloat16", r"fp32|float32"),
    "scales on another device": (meta("scales"), r"meta", r"cpu"),
    "zeros": (lambda c: dict(zeros=bf(E)), r"zeros", r"per_tensor"),
    "asym": (lambda c: dict(asym=True), r"asym", r"per_tensor"),
    "weights of uint8": (lambda c: dict(weights=c["weights"].view(torch.uint8)), r"uint8", r"int8"),
    "weights of bf16": (lambda c: dict(weights=c["weights"].bfloat16()), r"bf16|bfloat16", r"int8"),
    "weights' rank": (lambda c: dict(weights=c["weights"][0]), r"\(64, 32\)", r"E, K, N"),
    "K": (lambda c: dict(weights=c["weights"][:, :48]), r"48", r"64"),
    "N": (lambda c: dict(weights=c["weights"][..., :24]), r"24", r"multiple of 16"),
    "weights [E, N, K]": (lambda c: dict(weights=c["weights"].mT), r"32", r"64"),
    "sum": (lambda c: dict(num_tokens_per_expert=counts(4, 0, 2)), r"\b6\b", r"\b7\b"),
    "scales' gradient": (lambda c: dict(scales=torch.ones(E).requires_grad_()), r"scales", r"grad"),
    "x of fp64": (lambda c: dict(activations=c["activations"].double()), r"float64|fp64", ANY16),
}


@pytest.mark.parametrize("name", PER_TENSOR)
def test_contract_of_the_per_tensor_scheme(name: str) -> None:
    change, given, needed = PER_TENSOR[name]
    call = per_tensor()
    moe_gemm_prefill(**call)
    refused(moe_gemm_prefill, call | change(call), given, needed)


def plain() -> Call:
    inputs = make_inputs(Case(ROWS, N, K, "bf16"))
    return dict(activations=inputs.x, weights=inputs.weight.codes.mT.contiguous(), num_tokens_per_expert=inputs.counts)


PLAIN: dict[str, tuple[Callable[[Call], Call], str, str]] = {
    name: (bad.change, bad.given, bad.needed) for name, bad in (ACTIVATIONS | COUNTS).items() if name != "x too narrow"
} | {
    "K": (lambda c: dict(activations=c["activations"][:, :48]), r"48", r"64"),
    "weights [E, N, K]": (lambda c: dict(weights=c["weights"].mT.contiguous()), r"32", r"64"),
    "N": (lambda c: dict(weights=c["weights"][..., :24]), r"24", r"multiple of 16"),
    "weights' rank": (lambda c: dict(weights=c["weights"][0]), r"\(64, 32\)", r"E, K, N"),
    "packed weights": (lambda c: dict(weights=c["weights"].to(torch.uint8)), r"uint8", BF16),
    "weights of fp16": (lambda c: dict(weights=c["weights"].half()), r"float16|fp16", BF16),
    "scales' shape": (lambda c: dict(scales=bf(E, N, 1)), r"\(3, 32, 1\)", r"\(3, 32\)"),
    "scales' N": (lambda c: dict(scales=bf(E, 16)), r"\(3, 16\)", r"\(3, 32\)"),
    "scales' dtype": (lambda c: dict(scales=bf(E, N).double()), r"float64|fp64", BF16),
    "weights' gradient": (lambda c: dict(weights=c["weights"].clone().requires_grad_()), r"weights", r"grad"),
    "scales' gradient": (lambda c: dict(scales=bf(E, N).requires_grad_()), r"scales", r"grad"),
    "weights' device": (meta("weights"), r"meta", r"cpu"),
    "activations' device": (meta("activations"), r"meta", r"cpu"),
    "counts' device": (meta("num_tokens_per_expert"), r"meta", r"cpu"),
    "scales' device": (lambda c: dict(scales=bf(E, N).to("meta")), r"meta", r"cpu"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_contract_of_moe_gemm(name: str) -> None:
    change, given, needed = PLAIN[name]
    call = plain()
    moe_gemm(**call)
    refused(moe_gemm, call | change(call), given, needed)


def objects() -> Call:
    inputs = make_inputs(Case(ROWS, N, K, "int4_asym", G))
    return dict(x=inputs.x, weight=inputs.weight, plan=inputs.plan)


def plan_of(*rows: int) -> TokenPlan:
    return TokenPlan.from_counts(counts(*rows), sum(rows))


def weight_needing_grad(c: Call) -> Call:
    weight = c["weight"]
    return dict(weight=weight.with_tensors(weight.codes, weight.scales.clone().requires_grad_(), weight.zeros))


OBJECTS: dict[str, tuple[Callable[[Call], Call], str, str]] = {
    "x of rank 3": (lambda c: dict(x=c["x"][None]), r"\(1, 7, 64\)", r"K"),
    "K": (lambda c: dict(x=c["x"][:, :48]), r"48", r"64"),
    "x of fp64": (lambda c: dict(x=c["x"].double()), r"float64|fp64", ANY16),
    "rows": (lambda c: dict(plan=plan_of(4, 0, 4)), r"\b7\b", r"\b8\b"),
    "experts": (lambda c: dict(plan=plan_of(4, 3)), r"\b2\b", r"\b3\b"),
    "x's device": (lambda c: dict(x=c["x"].to("meta")), r"meta", r"cpu"),
    "weight's device": (lambda c: dict(weight=c["weight"].to("meta")), r"meta", r"cpu"),
    "plan's device": (
        lambda c: dict(plan=TokenPlan.from_counts(counts(*ROWS).to("meta"), 7)),
        r"meta",
        r"cpu",
    ),
    "weight's gradient": (weight_needing_grad, r"scales|weight", r"grad"),
    "backend": (lambda c: dict(backend="cublas"), r"cublas", r"torch"),
    "out's shape": (lambda c: dict(out=nan_filled(7, 16, dtype=torch.bfloat16)), r"\(7, 16\)", r"\(7, 32\)"),
    "out's dtype": (lambda c: dict(out=nan_filled(7, 32, dtype=torch.float32)), r"float32|fp32", BF16),
    "out's device": (lambda c: dict(out=torch.empty(7, 32, dtype=torch.bfloat16, device="meta")), r"meta", r"cpu"),
    "out with a gradient": (
        lambda c: dict(x=c["x"].clone().requires_grad_(), out=nan_filled(7, 32, dtype=torch.bfloat16)),
        r"out",
        r"grad",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_contract_of_grouped_gemm(name: str) -> None:
    change, given, needed = OBJECTS[name]
    call = objects()
    grouped_gemm(**call)
    refused(grouped_gemm, call | change(call), given, needed)


def test_a_gradient_of_out_is_refused_only_if_one_is_made() -> None:
    call = objects()
    out = nan_filled(7, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        grouped_gemm(call["x"].clone().requires_grad_(), call["weight"], call["plan"], out=out)
    assert not out.isnan().any()


def test_out_that_overlaps_itself_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        grouped_gemm(**objects(), out=torch.empty(1, 32, dtype=torch.bfloat16).expand(7, 32))


def test_a_device_nobody_serves_is_unsupported() -> None:
    """Every backend's reason, one a line; the first line is the problem."""
    call = objects()
    moved = dict(
        x=call["x"].to("meta"),
        weight=call["weight"].to("meta"),
        plan=TokenPlan.from_counts(counts(*ROWS).to("meta"), 7),
    )
    answers = explain(Problem.of("grouped_gemm", moved["x"], moved["weight"]))
    if any(answer.ok for answer in answers):
        assert grouped_gemm(**moved).device.type == "meta"
        return
    with pytest.raises(UnsupportedError, match=r"grouped_gemm: .*meta") as caught:
        grouped_gemm(**moved)
    assert len(str(caught.value).splitlines()) == 1 + len(answers)


def test_unsupported_lists_the_reasons() -> None:
    error = UnsupportedError("moe", "int4_asym, bf16 on sm_75", {"hopper": "needs sm_90", "cpu": "tensors are on cuda"})
    lines = str(error).splitlines()
    assert lines[0].startswith("moe: ") and "int4_asym, bf16 on sm_75" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["hopper: needs sm_90", "cpu: tensors are on cuda"]
    assert dict(error.reasons) == {"hopper": "needs sm_90", "cpu": "tensors are on cuda"}
