"""Profiles on a GPU: tile sizes leave every bit as it is, a crossover changes which kernel runs and nothing of what an
explicit threshold returns, and a search ends in a table that is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the extra 'bench' is not installed")
pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from rich.console import Console

import qexperts.ops
from qexperts import Problem, TokenPlan, grouped_gemm, prepare, tuning
from qexperts.backends import BACKENDS, triton_backend
from qexperts.bench import tune
from qexperts.bench.binding import Refused
from qexperts.bench.candidates import Candidate
from qexperts.bench.fused import FusedProvider
from qexperts.bench.providers import torch_empty
from qexperts.bench.roofline import Ceilings
from qexperts.bench.workloads import Workload, make_inputs
from qexperts.formats import FORMATS
from qexperts.kernels import config
from qexperts.kernels.operand import operand
from qexperts.routing import Distribution
from qexperts.strategies import Strategy

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["prepared", "public"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("fmt", ["int4_sym", "int2_asym", "fp8_e4m3"])
def test_free_sizes_leave_every_bit_as_it_is(fmt: str, phase: str, layout: str, device: torch.device) -> None:
    rows = (70, 0, 16, 5, 130, 33, 300) if phase == "prefill" else (1, 2, 0, 4)
    w = Workload(phase, Distribution("test", rows, "made up"), 320, 512, 128, FORMATS[fmt], "bf16", 0)
    t = make_inputs(w, device)
    weight = prepare(t.weight, "triton", keep_source=True) if layout == "prepared" else t.weight
    rules = triton_backend.rules_of(phase, operand(weight), t.x, device, weight.E)
    provider = FusedProvider(w, t, ["triton"])

    def run(c: object) -> torch.Tensor:
        candidate = Candidate(
            Strategy("grouped"), "fused", provider="triton", layout=layout, phase=phase, config=c
        )  # fmt: skip
        return provider.bind(candidate, torch_empty(device), False).run()

    expected, same = run(rules), 0
    for c in tuning.neighbours(rules, lambda c: config.valid(c, torch.version.hip is None)):
        try:
            y = run(c)
        except Refused as refusal:
            print(f"{c!r}: {refusal}")
            continue
        assert torch.equal(y, expected), c
        same += 1
    assert same >= 3


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_crossover_chooses_the_kernel_of_calls_that_do_not(
    backend: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEXPERTS_CACHE_DIR", str(tmp_path))
    w = Workload(
        "prefill", Distribution("test", (5, 0, 9, 2), "made up"), 256, 1024, 128, FORMATS["int4_sym"], "bf16", 0
    )
    t = make_inputs(w, device)
    weight = prepare(t.weight, "triton", keep_source=True)
    if reason := BACKENDS[backend].supports(Problem.of("test", t.x, weight))[0]:
        pytest.skip(f"{backend}: {reason}")
    plan, path, key = TokenPlan.from_counts(t.counts, 16), tuning.own_path(device), tuning.key_of(device)
    assert path is not None and key is not None

    def run(**how: Any) -> torch.Tensor:
        return grouped_gemm(t.x, weight, plan, backend=backend, **how)

    rules = {n: run(decode_threshold=n) for n in (0, 4, 8, 64)}
    by_phase = {phase: run(phase=phase) for phase in ("prefill", "decode")}
    expected = {0: by_phase["prefill"], 64: by_phase["decode"], 4: rules[4], 8: rules[8]}
    for n, y in expected.items():
        case = config.case_of(backend, "auto", operand(weight), t.x.dtype, 4, 16)
        tuning.write(
            path, key, [tuning.Entry(case, repr(triton_backend.Crossover()), {"decode_threshold": n} if n != 4 else {})]
        )
        tuning.forget()
        monkeypatch.setattr(triton_backend, "_BOUND", {})
        monkeypatch.setattr(qexperts.ops, "_BOUND", {})
        assert torch.equal(run(), y)
        assert all(torch.equal(run(decode_threshold=m), given) for m, given in rules.items())
        assert all(torch.equal(run(phase=phase), given) for phase, given in by_phase.items())
    tuning.forget()


def test_a_search_ends_in_a_table_that_is_used(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEXPERTS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.PrefillConfig, "FREE", {"warps": (4, 8)})
    monkeypatch.setattr(config.DecodeConfig, "FREE", {"unroll": (1, 2)})
    monkeypatch.setattr(tune, "MARGIN", 0.0)  # whatever is the fastest is kept
    monkeypatch.setattr(tune, "measure_ceilings", lambda device, dtype: Ceilings(1.0, 1.0))
    tuning.forget()
    options = tune.TuneOptions(
        formats="int4_asym", n=320, k=512, experts=4, tokens="300", batch_sizes="2", top_k=2, rounds=5
    )  # fmt: skip
    assert tune.tune_session(options, Console(width=200)) == 0
    path = tuning.own_path(device)
    assert path is not None
    entries = tuning.read(path).entries
    assert {e.case.phase for e in entries} == set(tuning.PHASES)
    assert all(e.facts["rules_ms"] > 0 and tuning.lookup(device, e.case) == e for e in entries)
    tuning.forget()
