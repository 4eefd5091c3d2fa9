"""Tile sizes on a GPU: what tables may change leaves every bit as it is, and a search ends in a table that is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the extra 'bench' is not installed")
pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from rich.console import Console

from qexperts import prepare, tuning
from qexperts.backends import triton_backend
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
