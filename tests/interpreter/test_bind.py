"""A bound call, which callers keep, serves other tensors of the kind and keeps none alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from qexperts import TokenPlan
from qexperts.backends import Problem
from qexperts.backends.triton_backend import bind, run
from qexperts.testing import Case, assert_no_worse, make_inputs


def test_a_bound_call_serves_other_tensors_and_keeps_none_alive() -> None:
    case = Case((3, 0, 2), 32, 64, "int4_asym", 32)
    first, second = make_inputs(case, seed=1), make_inputs(Case((1, 5, 2), 32, 64, "int4_asym", 32), seed=2)
    call = bind(Problem.of("test", first.x, first.weight, phase="decode"), first.weight)
    kept = [weakref.ref(t) for t in (*first.weight.tensors, first.x)]
    del first
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4
    w = second.weight
    y = call(second.x, w.codes, w.scales, w.zeros, second.counts)
    assert y.dtype == torch.bfloat16
    assert_no_worse(y, second.oracle, second.peer, 64)


@pytest.mark.parametrize("phase", ["decode", "prefill", "auto"])
def test_a_bound_call_serves_any_number_of_rows(phase: str) -> None:
    cases = [Case(rows, 32, 64, "int8_sym", 32) for rows in ((3, 0, 2), (0, 0, 0), (9, 0, 1), (3, 0, 2))]
    inputs = [make_inputs(case, seed=seed) for seed, case in enumerate(cases)]
    call = bind(Problem.of("test", inputs[0].x, inputs[0].weight, phase=phase), inputs[0].weight)
    for i in inputs:
        y = call(i.x, i.weight.codes, i.weight.scales, i.weight.zeros, i.counts)
        assert_no_worse(y, i.oracle, i.peer, 64)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_counts_may_have_a_stride(phase: str) -> None:
    i = make_inputs(Case((3, 0, 2), 32, 64, "int4_asym", 32))
    counts = torch.stack([i.counts, torch.full_like(i.counts, 7)], 1)[:, 0]
    y = run(Problem.of("test", i.x, i.weight, phase=phase), i.x, i.weight, TokenPlan(counts, 5))
    assert_no_worse(y, i.oracle, i.peer, 64)


def test_a_threshold_above_every_integer_of_a_kernel_is_decode() -> None:
    i = make_inputs(Case((3, 0, 2), 32, 64, "int4_asym", 32))
    y = run(Problem.of("test", i.x, i.weight, decode_threshold=2**40), i.x, i.weight, i.plan)
    assert torch.equal(y, run(Problem.of("test", i.x, i.weight, phase="decode"), i.x, i.weight, i.plan))
