"""A bound call, which callers keep, serves other tensors of the kind and keeps none alive."""

from __future__ import annotations

import gc
import weakref

import torch

from qexperts.backends import Problem
from qexperts.backends.triton_backend import bind
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
