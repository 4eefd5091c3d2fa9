"""The error rule must fail what is wrong: every gate of the tests and of the benchmark hangs on it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qexperts import FORMATS, QuantWeight, dequantize, pack
from qexperts.reference import exact_weight, grouped_gemm_reference
from qexperts.testing import Case, Inputs, assert_no_worse, judge, make_inputs, nan_filled, peer_gemm

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CASE = Case((3, 0, 5, 1), N=32, K=256, format="int4_asym", group_size=64, why="an empty expert among others")


@pytest.fixture(params=DTYPES, ids=str)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return make_inputs(dataclasses.replace(CASE, dtype=request.param))


def fails(actual: torch.Tensor, inputs: Inputs) -> str:
    report = judge(actual, inputs.oracle, inputs.peer)
    assert not report.ok, "the rule let it pass"
    with pytest.raises(AssertionError) as caught:
        assert_no_worse(actual, inputs.oracle, inputs.peer)
    assert str(caught.value) == report.message != ""
    return report.message


def test_the_peer_and_the_rounded_oracle_pass(inputs: Inputs) -> None:
    for actual in (inputs.peer, inputs.oracle.to(inputs.peer.dtype)):
        report = judge(actual, inputs.oracle, inputs.peer)
        assert report.ok and report.message == ""
        assert report.error < 0.02
        assert_no_worse(actual, inputs.oracle, inputs.peer)
    assert judge(inputs.peer, inputs.oracle, inputs.peer).error == pytest.approx(report.error_peer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_one_value_that_is_not_finite_fails(inputs: Inputs, value: float) -> None:
    actual = inputs.peer.clone()
    actual[4, 7] = value
    assert "row 4" in fails(actual, inputs)


def test_an_unwritten_output_fails(inputs: Inputs) -> None:
    fails(nan_filled(*inputs.peer.shape, dtype=inputs.peer.dtype), inputs)


def test_one_wrong_row_fails(inputs: Inputs) -> None:
    for wrong in (inputs.peer[5], torch.zeros_like(inputs.peer[5]), -inputs.peer[6]):
        actual = inputs.peer.clone()
        actual[6] = wrong
        assert "row 6" in fails(actual, inputs)


def test_swapped_rows_fail(inputs: Inputs) -> None:
    fails(inputs.peer[[1, 0, *range(2, len(inputs.peer))]], inputs)


def test_swapped_columns_fail(inputs: Inputs) -> None:
    fails(inputs.peer.flip(1), inputs)


def test_one_wrong_element_fails(inputs: Inputs) -> None:
    actual = inputs.peer.clone()
    worst = float((inputs.peer.double() - inputs.oracle)[2].abs().max())
    rounding = float(inputs.oracle[2].abs().max()) * torch.finfo(actual.dtype).eps
    actual[2, 3] += 6 * (worst + rounding)
    assert "row 2" in fails(actual, inputs)


def test_an_error_slightly_too_large_fails_and_one_within_the_rule_passes() -> None:
    """In numbers: the peer errs by 1e-3 everywhere, the output's rounding adds 2^-24."""
    oracle = torch.ones(4, 64, dtype=torch.float64)
    peer = (oracle + 1e-3).float()
    assert judge((oracle + 1.99e-3).float(), oracle, peer).ok
    assert judge((oracle - 1.99e-3).float(), oracle, peer).ok
    actual = (oracle + 1e-3).float()
    actual[2] = 1 + 2.01e-3
    report = judge(actual, oracle, peer)
    assert not report.ok and "row 2" in report.message

    single = oracle.float()
    single[1, 0] += 3.99e-3  # its row's RMS error is below 1e-3
    assert judge(single, oracle, peer).ok
    single[1, 0] = 1 + 4.01e-3
    assert not judge(single, oracle, peer).ok


def test_a_perfect_peer_still_allows_one_rounding_of_the_output() -> None:
    oracle = torch.ones(2, 16, dtype=torch.float64)
    peer = oracle.bfloat16()
    assert judge(torch.full((2, 16), 1 - 2.0**-8, dtype=torch.bfloat16), oracle, peer).ok
    assert not judge(torch.full((2, 16), 1 + 2.0**-7, dtype=torch.bfloat16), oracle, peer).ok


def test_rows_whose_reference_is_zero_are_exact() -> None:
    oracle = torch.ones(3, 16, dtype=torch.float64)
    oracle[1] = 0
    peer = oracle.to(torch.bfloat16)
    peer[1, 4] = 1e-30  # a peer that errs there is no excuse
    actual = oracle.to(torch.bfloat16)
    assert judge(actual, oracle, peer).ok
    actual[1, 3] = 1e-30
    report = judge(actual, oracle, peer)
    assert not report.ok and "row 1" in report.message


def test_a_good_row_does_not_hide_a_bad_one() -> None:
    """Per row: a large row's error must not pay for a small row's."""
    oracle = torch.ones(2, 16, dtype=torch.float64)
    oracle[0] *= 1e4
    peer = (oracle * 1.001).float()
    actual = oracle.float()
    actual[1] = 2
    assert not judge(actual, oracle, peer).ok


def test_wrong_shape_or_dtype_fails(inputs: Inputs) -> None:
    assert "expected" in fails(inputs.peer[:-1], inputs)
    assert "expected" in fails(inputs.peer[:, :-1], inputs)
    assert "expected" in fails(inputs.peer.double(), inputs)


def test_no_rows_pass() -> None:
    empty = torch.empty(0, 16, dtype=torch.float64)
    assert judge(empty.bfloat16(), empty, empty.bfloat16()).ok


def test_nan_filled() -> None:
    for dtype in DTYPES:
        t = nan_filled(3, 5, dtype=dtype)
        assert t.shape == (3, 5) and t.dtype == dtype and t.isnan().all()


# ---- inputs


@pytest.mark.parametrize("fmt", FORMATS)
def test_inputs_are_those_of_the_case(fmt: str) -> None:
    dtype = torch.float16 if fmt == "fp16" else torch.bfloat16
    case = Case((2, 0, 3), N=16, K=64, format=fmt, group_size=None, dtype=dtype)
    inputs = make_inputs(case)
    assert case.E == 3
    assert inputs.x.shape == (5, 64) and inputs.x.dtype == dtype
    assert inputs.counts.tolist() == [2, 0, 3] and inputs.counts.dtype == torch.int32
    assert inputs.plan.host_counts() == [2, 0, 3]
    assert (inputs.weight.E, inputs.weight.N, inputs.weight.K) == (3, 16, 64)
    assert inputs.oracle.dtype == torch.float64 and inputs.peer.dtype == dtype
    if inputs.weight.scales is not None:
        assert inputs.weight.group_size == 64 and inputs.weight.scales.dtype == dtype
    again, other = make_inputs(case), make_inputs(case, seed=1)
    assert torch.equal(inputs.x, again.x) and not torch.equal(inputs.x, other.x)


@pytest.mark.parametrize("fmt", ["int8_sym", "int4_asym", "int2_sym", "fp8_e4m3"])
def test_negative_scales_are_negative(fmt: str) -> None:
    scales = make_inputs(Case((1, 2), 32, 64, fmt, 16, negative_scales=True)).weight.scales
    assert scales is not None and 0.2 < (scales < 0).float().mean() < 0.8


def test_peer_is_torch_on_the_rounded_weights() -> None:
    inputs = make_inputs(CASE)
    w = dequantize(inputs.weight, torch.bfloat16)
    expected = torch.cat([inputs.x[0:3] @ w[0].T, inputs.x[3:8] @ w[2].T, inputs.x[8:9] @ w[3].T])
    assert torch.equal(inputs.peer, expected)
    assert torch.equal(peer_gemm(inputs.x, inputs.weight, CASE.rows), expected)


# ---- the oracle


def test_oracle_by_hand() -> None:
    """int4_asym, zero 8: codes 9 and 6 are +1 and -2; scale 0.5."""
    values = torch.full((2, 16, 16), 8, dtype=torch.int16)
    values[0, 0, 0], values[0, 0, 1], values[1, 3, 15] = 9, 6, 15
    weight = QuantWeight(
        pack(values, "int4_asym"), torch.full((2, 16, 1), 0.5), torch.full((2, 16, 1), 8.0), FORMATS["int4_asym"], 16
    )
    x = torch.ones(3, 16)
    x[:, 0] = 3
    expected = torch.zeros(3, 16, dtype=torch.float64)
    expected[0, 0] = 3 * 0.5 + 1 * -1.0
    expected[1, 3] = 3.5
    assert torch.equal(grouped_gemm_reference(x, weight, [1, 1]), expected)  # the third row belongs to no expert


@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_weight_agrees_with_dequantize_in_fp64(fmt: str) -> None:
    weight = make_inputs(Case((1, 1), 32, 96, fmt, 32, negative_scales=True)).weight
    expected = dequantize(weight, torch.float64)
    for expert in range(2):
        assert torch.equal(exact_weight(weight, expert), expected[expert])
