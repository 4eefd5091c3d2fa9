"""Provider "fused", the peers, and what only a GPU measures: on the CPU as far as it goes, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_report import BF16, INT4, MM, clip, grouped, markdown_rows, record

from qexperts import FORMATS, dequantize, quantize
from qexperts.backends import BACKENDS, Problem, cpu_backend, explain, hopper_backend, triton_backend
from qexperts.bench import cpu_peers, humming, report, run, timing
from qexperts.bench.binding import Bound, Refused
from qexperts.bench.candidates import Candidate, enumerate_candidates
from qexperts.bench.fused import FusedProvider
from qexperts.bench.humming import HummingProvider, packed
from qexperts.bench.measure import measure_workload
from qexperts.bench.providers import Binder, _provider
from qexperts.bench.records import Record, record_from_json
from qexperts.bench.roofline import Ceilings
from qexperts.bench.timing import issue_us
from qexperts.bench.workloads import Workload, make_inputs
from qexperts.routing import Distribution
from qexperts.strategies import Strategy, parse_strategy

SRC = Path(__file__).resolve().parents[1] / "src"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ENV: dict[str, str | None] = {"device": "test", "device_type": "cpu"}
CEILINGS = Ceilings(1.0, 100.0)
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
STRATEGIES = [Strategy("per_expert"), Strategy("pad_and_clip", 3), Strategy("full_pad"), Strategy("grouped")]


def workload(fmt: str = "int4_sym", **changes: object) -> Workload:
    base = Workload(
        "prefill", Distribution("test", (3, 0, 7, 1), "made up"), 64, 64, 16, FORMATS[fmt], "bf16", 0
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def fused_candidates(w: Workload, device: torch.device, apis: list[str], layouts: list[str]) -> list[Candidate]:
    return enumerate_candidates(w, device, STRATEGIES, apis, ["fused"], layouts)


# ---- what is measured


def test_the_public_call_on_public_weights_takes_scales_of_the_activations_dtype() -> None:
    w = workload(scale_dtype="fp32")
    candidates = fused_candidates(w, CPU, ["raw", "wrapper"], ["prepared", "public"])
    records = measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1)
    found = {(r.api, r.weight_layout): r.reason for r in records}
    reason = "moe() takes scales of the activations' dtype, torch.bfloat16, not torch.float32"
    assert found.pop(("wrapper", "public")) == reason
    assert found == dict.fromkeys([("raw", "prepared"), ("raw", "public"), ("wrapper", "prepared")])


def test_every_strategy_is_measured_on_the_kernels() -> None:
    found = fused_candidates(workload(), CPU, ["raw"], ["prepared", "public"])
    assert {(c.layout, str(c.strategy)) for c in found} == {
        (layout, str(s)) for layout in ("prepared", "public") for s in STRATEGIES
    }
    assert all(c.scope == c.provider == "fused" and c.gather is None and c.phase == "prefill" for c in found)
    assert found[0].strategy == Strategy("per_expert")  # the baseline


def test_graphs_are_for_gpus() -> None:
    on_cpu, on_gpu = (fused_candidates(workload(), d, ["raw", "wrapper"], ["prepared"]) for d in (CPU, GPU))
    assert not any(c.graph for c in on_cpu)
    assert [c for c in on_gpu if not c.graph] == on_cpu
    assert [dataclasses.replace(c, graph=False) for c in on_gpu if c.graph] == on_cpu


def test_unquantized_weights_have_one_layout() -> None:
    assert {c.layout for c in fused_candidates(workload("bf16"), CPU, ["raw"], ["prepared", "public"])} == {"public"}


def test_public_calls() -> None:
    def calls(kind: str, layout: str) -> list[str | None]:
        found = fused_candidates(workload(kind=kind), CPU, ["wrapper"], [layout])
        assert all(c.strategy is None for c in found)
        return [c.phase for c in found]

    assert calls("prefill", "public") == ["prefill"] and calls("prefill", "prepared") == ["auto"]
    assert calls("decode", "public") == ["decode", "auto"] and calls("decode", "prepared") == ["auto"]
    raw = fused_candidates(workload(kind="decode"), CPU, ["raw"], ["prepared"])
    assert [(c.strategy and c.strategy.name, c.phase) for c in raw if not c.graph][-2:] == [
        ("grouped", "decode"), (None, "auto"),
    ]  # fmt: skip


def test_default_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "installed", lambda: True)
    assert run._providers(None, CPU) == ["torch", "fused"]
    monkeypatch.setattr(cpu_backend, "installed", lambda: False)
    assert run._providers(None, CPU) == ["torch"]
    monkeypatch.setattr(triton_backend, "installed", lambda: True)
    assert run._providers(None, GPU) == ["torch", "fused"]
    monkeypatch.setattr(triton_backend, "installed", lambda: False)
    assert run._providers(None, GPU) == ["torch"]
    assert run._providers("all", CPU) == ["torch", "fused", "humming", "prepacked", "ark", "ggml"]
    assert run._providers("fused, torch", CPU) == ["fused", "torch"]
    with pytest.raises(
        ValueError, match="--provider fast: expected a comma list of torch, fused, humming, prepacked, ark, ggml"
    ):
        run._providers("fast", CPU)


# ---- int8 activations

cpu_kernels = pytest.mark.skipif(
    not cpu_backend.installed() or triton_backend.interpreted(), reason="needs llvmlite, outside Triton's interpreter"
)


def int8_candidates(w: Workload, apis: list[str]) -> list[Candidate]:
    return enumerate_candidates(w, CPU, STRATEGIES, apis, ["fused"], ["prepared", "public"], activation_format="int8")


def test_int8_rows_come_when_asked_and_beside_the_others() -> None:
    for kind in ("prefill", "decode"):
        w = workload(kind=kind)
        usual = fused_candidates(w, CPU, ["raw", "wrapper"], ["prepared", "public"])
        assert not any(c.activation_format for c in usual)
        found = int8_candidates(w, ["raw", "wrapper"])
        assert found[: len(usual)] == usual
        added = [dataclasses.replace(c, activation_format=None) for c in found[len(usual) :]]
        assert added == [c for c in usual if c.strategy in (None, Strategy("grouped"))]
    for fmt in ("fp8_e4m3", "bf16"):
        assert not any(c.activation_format for c in int8_candidates(workload(fmt), ["raw"]))


@cpu_kernels
@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("fmt", ["int8_asym", "int4_sym", "int2_sym"])
def test_int8_rows_pass_the_gate_and_show_their_error(fmt: str, kind: str) -> None:
    w = workload(fmt, kind=kind)
    records = list(measure_workload(w, int8_candidates(w, ["raw", "wrapper"]), CEILINGS, ENV, CPU, rounds=1))
    assert {(r.status, r.reason) for r in records} == {("ok", None)}
    errors = {name: [r.error for r in records if r.activation_format == name] for name in (None, "int8")}
    assert max(errors[None]) < 2.2e-3 < min(errors["int8"]) <= max(errors["int8"]) < 2e-2
    text = report.render(records, "md", "full")
    assert "grouped, int8 activations" in str(text) and "not ranked with the other rows" in str(text)
    assert "activation_format" in records[0].to_json()
    best = [row.record for row in report.rows(records, "full") if row.best and row.record.api == "raw"]
    assert sorted(str(r.activation_format) for r in best) == ["None", "int8"]  # each among its own
    assert all(not row.best for row in report.rows(records, "summary") if row.record.activation_format)


@cpu_kernels
@pytest.mark.parametrize("wrong", ["scaled", "unrounded group", "row of another"])
def test_a_wrong_int8_row_is_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that the looser error of int8 activations would hide if their rows were judged by a looser rule."""
    run_into = cpu_backend.run_into

    def broken(problem: Problem, y: torch.Tensor, x: torch.Tensor, weight: Any, counts: torch.Tensor) -> None:
        int8 = problem.activation_format == "int8"
        if int8 and wrong == "unrounded group":
            x = x.clone()
            x[:, :16] += x[:, :16].abs().amax(1, keepdim=True) / 100
        run_into(problem, y, x, weight, counts)
        if int8 and wrong == "scaled":
            y.mul_(1.02)
        if int8 and wrong == "row of another":
            y[0] = y[1]

    monkeypatch.setattr(cpu_backend, "run_into", broken)
    w = workload()
    candidates = int8_candidates(w, ["raw"])
    candidates = [c for c in candidates if c.strategy == Strategy("grouped") and c.layout == "prepared"]
    records = list(measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1))
    assert [(r.activation_format, r.status) for r in records][-1] == ("int8", "WRONG")
    assert records[-1].median_ms is None and "rows fail" in (records[-1].reason or "")


@pytest.mark.skipif(triton_backend.interpreted(), reason="other reasons in the interpreter")
def test_int8_rows_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    w = workload()
    provider = FusedProvider(w, make_inputs(w, CPU))
    candidate = Candidate(Strategy("grouped"), "fused", provider="fused", layout="prepared", activation_format="int8")
    problem = provider._problem(candidate)
    answers = {a.backend: a.reason for a in explain(dataclasses.replace(problem, device=GPU))}
    assert answers["torch"] == "does not quantize activations to int8" and answers["triton"]


# ---- who cannot run says why


@pytest.mark.skipif(triton_backend.interpreted(), reason="in the interpreter the kernels do run on a CPU")
def test_a_cpu_gives_the_backends_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    w = workload()
    candidates = enumerate_candidates(w, CPU, STRATEGIES, ["raw", "wrapper"], ["fused", "humming"], ["prepared"])
    monkeypatch.setattr(cpu_backend, "installed", lambda: False)
    records = list(measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1))
    assert len(records) == len(candidates) and {r.status for r in records} == {"unsupported"}
    reason = "llvmlite is not installed: pip install 'qexperts[cpu]'"
    assert {r.provider: r.reason for r in records} == {
        "fused": reason, "humming": "runs on NVIDIA GPUs; tensors are on cpu",
    }  # fmt: skip
    assert all(r.median_ms is None and r.samples_ms == [] for r in records)


def test_fused_is_what_auto_picks_and_a_backend_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_backend, "_no_device", lambda device: None)
    monkeypatch.setattr(triton_backend, "no_device", lambda device, dtype: None)
    w = workload(n=128, k=256, group_size=128)
    t = make_inputs(w, CPU)
    providers = {name: _provider(name, GPU)(w, t) for name in ("fused", "triton", "hopper")}
    rows = {
        (layout, phase): Candidate(Strategy("grouped"), "fused", layout=layout, phase=phase)
        for layout in ("prepared", "public")
        for phase in ("prefill", "decode", "auto")
    }
    picked = {key: providers["fused"]._backend(c) for key, c in rows.items()}
    assert picked == {key: "hopper" if key[0] == "prepared" and key[1] != "decode" else "triton" for key in rows}
    for name in ("triton", "hopper"):
        assert {providers[name]._backend(c) for c in rows.values()} == {name}
    public = rows["public", "prefill"]
    assert providers["hopper"].refuse(public) == "reads prepared weights only: prepare() them"
    assert [p.refuse(rows["prepared", "prefill"]) for p in providers.values()] == [None] * 3
    assert providers["fused"].refuse(public) is None


def test_rows_of_named_backends_are_those_of_fused() -> None:
    w, of = workload(), lambda name: enumerate_candidates(w, GPU, STRATEGIES, ["raw", "wrapper"], [name])
    for name in ("triton", "hopper"):
        assert [dataclasses.replace(c, provider="fused") for c in of(name)] == of("fused")
    assert run._providers("triton,hopper,torch", GPU) == ["triton", "hopper", "torch"]


def test_a_layout_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    yes = dataclasses.replace(BACKENDS["triton"], supports=lambda problem: (None, "", False))
    monkeypatch.setitem(BACKENDS, "triton", yes)  # type: ignore[arg-type]
    w = workload(k=80)
    provider = FusedProvider(w, make_inputs(w, CPU))
    candidate = Candidate(Strategy("grouped"), "fused", provider="fused", layout="prepared", phase="prefill")
    assert provider.refuse(candidate) == "K=80 is not a multiple of 64"
    assert provider.refuse(dataclasses.replace(candidate, layout="public")) is None


# ---- in Triton's interpreter

SMOKE = """
import dataclasses, json, sys
import torch
from qexperts.bench.read import readers
from qexperts.bench.run import BenchOptions, prepare, run
from qexperts.bench.roofline import Ceilings
from qexperts.bench import run as running

running.measure_ceilings = lambda device, dtype: Ceilings(1.0, 10.0, 20.0)
common = dict(device="cpu", experts=4, n=64, k=64, group_size=32, provider="fused", rounds=1, mode="full")
jobs = [
    BenchOptions("prefill", tokens=11, formats="int4_sym", strategies="per_expert,pad_and_clip,grouped", thresholds="3",
                 distribution=sys.argv[1], weight_layout="prepared,public", api="raw,wrapper", **common),
    BenchOptions("prefill", tokens=11, formats="fp8_e4m3,bf16", strategies="full_pad", distribution=sys.argv[1],
                 **common),
    BenchOptions("decode", formats="int8_asym", api="raw,wrapper", top_k=2, batch_sizes="1", **common),
]
for options in jobs:
    for record in run(prepare(options)):
        print(record.to_json())

source = torch.arange(2**17, dtype=torch.int32).view(torch.uint8)
for reader in readers(source):
    reader()
    assert int(reader.args[0].long().sum() - source.view(torch.int32).long().sum()) % 2**32 == 0, reader
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, interpreter: None) -> list[dict[str, Any]]:
    counts = tmp_path_factory.mktemp("smoke") / "counts.json"
    counts.write_text("[3, 0, 7, 1]")
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SMOKE, str(counts)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_kernels_pass_the_gate_in_every_strategy(smoke: list[dict[str, Any]]) -> None:
    assert [(r["strategy"], r["reason"]) for r in smoke if r["status"] != "ok"] == []
    prefill = [r for r in smoke if r["kind"] == "prefill" and r["format"] == "int4_sym"]
    raw = {(r["weight_layout"], r["strategy"]): r for r in prefill if r["api"] == "raw"}
    assert set(raw) == {(w, s) for w in ("prepared", "public") for s in ("per_expert", "pad_and_clip", "grouped")}
    assert all(r["provider"] == r["scope"] == "fused" and r["error"] < 0.01 for r in smoke)
    assert {(r["weight_layout"], r["phase"]) for r in prefill if r["api"] == "wrapper"} == {
        ("prepared", "auto"), ("public", "prefill"),
    }  # fmt: skip


def test_launches_are_counted(smoke: list[dict[str, Any]]) -> None:
    names = ("launches", "schedule_launches", "pad_launches", "scatter_launches", "gather_launches", "dequant_launches")
    found = {
        (r["weight_layout"], r["strategy"]): [r[name] for name in names]
        for r in smoke
        if r["kind"] == "prefill" and r["api"] == "raw"
    }
    assert found["prepared", "per_expert"] == [3, 1, 0, 0, 0, 0]
    assert found["prepared", "pad_and_clip"] == [2, 1, 1, 2, 0, 0]  # experts 0 and 3 in a batch, expert 2 by itself
    assert found["prepared", "grouped"] == [1, 1, 0, 0, 0, 0]
    assert found["public", "grouped"] == [1, 1, 1, 0, 0, 0]  # and x, permuted
    full = [r for r in smoke if r["strategy"] == "full_pad"]
    assert [(r["format"], r["weight_layout"], r["launches"], r["padded_rows"]) for r in full] == [
        ("fp8_e4m3", "prepared", 1, 10), ("bf16", "public", 1, 10),
    ]  # fmt: skip


def test_records_say_what_ran(smoke: list[dict[str, Any]]) -> None:
    assert all(r["config"].startswith("triton: ") for r in smoke)
    assert all("PrefillConfig(block_n=" in r["config"] for r in smoke if r["kind"] == "prefill")
    decode = [r for r in smoke if r["kind"] == "decode"]
    assert {(r["api"], r["strategy"], r["phase"]) for r in decode} == {
        ("raw", "per_expert", "decode"), ("raw", "grouped", "decode"), ("raw", "auto", "auto"),
        ("wrapper", "auto", "auto"),
    }  # fmt: skip
    assert all(r["host_us"] is r["schedule_ms"] is None for r in smoke)
    assert all(r["ceiling_read_gbps"] == 20.0 for r in smoke if r["kind"] == "prefill")
    assert all(0 < r["ceiling_read_gbps"] != 20.0 for r in decode)  # of a decode on a CPU, measured in its rounds
    assert all((r["plan_ms"] is not None) == (r["api"] == "raw" and r["strategy"] != "auto") for r in smoke)


# ---- peers on CPUs


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize(("fmt", "dtype"), [("int4_asym", "bf16"), ("fp8_e4m3", "fp16"), ("int8_sym", "fp32"),
                                            ("bf16", "bf16")])  # fmt: skip
def test_prepacked_weights_pass_the_gate(fmt: str, dtype: str, kind: str) -> None:
    w = workload(fmt, dtype=dtype, kind=kind)
    candidates = enumerate_candidates(w, CPU, STRATEGIES, ["raw", "wrapper"], ["prepacked"])
    records = list(measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1))
    assert [(r.status, r.scope, r.strategy, r.api, r.launches) for r in records] == [
        ("ok", "base mm", "per_expert", "raw", 3), ("ok", "base mm", "auto", "wrapper", 3),
    ]  # fmt: skip
    assert (records[0].plan_ms is None, records[1].plan_ms is None) == (False, True)


def test_a_wrong_prepacked_weight_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = cpu_peers.PrepackedProvider._weights

    def shuffled(self: cpu_peers.PrepackedProvider, pack: Any) -> list[torch.Tensor]:
        return weights(self, pack)[::-1]

    monkeypatch.setattr(cpu_peers.PrepackedProvider, "_weights", shuffled)
    w = workload()
    (r,) = measure_workload(
        w, enumerate_candidates(w, CPU, STRATEGIES, ["raw"], ["prepacked"]), CEILINGS, ENV, CPU, rounds=1
    )
    assert r.status == "WRONG" and r.median_ms is None


@pytest.mark.parametrize("fmt", [name for name in QUANTIZED if FORMATS[name].kind == "int"])
def test_ark_gets_the_same_weight(fmt: str) -> None:
    w = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = quantize(w, fmt, group_size=32).experts(1, 2)
    codes, zeros, scales = cpu_peers.ark_operands(weight)
    assert codes.dtype == zeros.dtype == torch.int8 and scales.dtype == torch.float32
    wide = [t.double().repeat_interleave(32, 0) for t in (zeros, scales)]
    assert torch.equal(((codes.double() - wide[0]) * wide[1]).T, dequantize(weight, torch.float64)[0])


def test_ark_has_no_place_for_some_weights() -> None:
    weight = quantize(torch.randn(1, 32, 64), "int4_asym", group_size=64)
    weight.zeros[0, 0, 0] = 16  # type: ignore[index]
    with pytest.raises(ValueError, match="zero points of 16"):
        cpu_peers.ark_operands(weight)
    with pytest.raises(ValueError, match="tensor scales"):
        cpu_peers.ark_operands(quantize(torch.randn(1, 32, 64), "int8_sym", scale_layout="tensor"))


class FakeArk(types.ModuleType):
    """Stores operands in a pickle and multiplies in fp32, by `error` too much."""

    cpu_lib, error, spoiled = object(), 1.0, 0

    def repack_quantized_weight(self, codes, scales, zeros, group, *rest):  # type: ignore[no-untyped-def]
        dense = (codes.float() - zeros.float().repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)
        return dense + self.spoiled

    def unpack_weight(self, packed, dtype, n, k, *rest):  # type: ignore[no-untyped-def]
        return packed.T.to(dtype)

    def woqgemm(self, x, packed, bias, *rest, out):  # type: ignore[no-untyped-def]
        assert x.dtype == out.dtype == torch.float32
        return out.copy_(x @ packed * self.error)


@pytest.mark.parametrize(("error", "spoiled", "status"), [(1.0, 0, "ok"), (1.1, 0, "WRONG"), (1.0, 1, "unsupported")])
def test_ark_in_the_flow(error: float, spoiled: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: the gate, and the check that what it packs is the weight."""
    fake = FakeArk(cpu_peers.MODULE)
    fake.error, fake.spoiled = error, spoiled
    monkeypatch.setitem(sys.modules, cpu_peers.MODULE, fake)
    monkeypatch.setattr(cpu_peers.importlib.util, "find_spec", lambda name: fake)
    w = workload("int4_asym")
    candidates = enumerate_candidates(w, CPU, STRATEGIES, ["raw", "wrapper"], ["ark"])
    records = list(measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1))
    assert [r.status for r in records] == [status, status]
    if status == "ok":
        assert all(r.config.startswith("auto-round-lib ") and r.launches == 3 for r in records)
    if spoiled:
        assert records[0].reason == "ark: ValueError: what it unpacks is not the weight that it packed"


def test_ark_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_peers.importlib.util, "find_spec", lambda name: None)
    w = workload()
    provider = cpu_peers.ArkProvider(w, make_inputs(w, CPU))
    (candidate,) = enumerate_candidates(w, CPU, STRATEGIES, ["raw"], ["ark"])
    assert provider.refuse(candidate) == "not installed: pip install auto-round-lib"
    monkeypatch.setattr(cpu_peers.importlib.util, "find_spec", lambda name: name)
    fp8 = workload("fp8_e4m3")
    provider = cpu_peers.ArkProvider(fp8, make_inputs(fp8, CPU))
    assert provider.refuse(candidate) == "takes integer weights here, not fp8_e4m3"


@pytest.mark.skipif(importlib.util.find_spec(cpu_peers.MODULE) is None, reason="auto-round-lib is not installed")
@pytest.mark.parametrize("fmt", ["int8_asym", "int4_sym", "int4_asym", "int2_sym"])
def test_ark_itself_passes_the_gate(fmt: str) -> None:
    w = workload(fmt)
    candidates = enumerate_candidates(w, CPU, STRATEGIES, ["raw", "wrapper"], ["ark"])
    records = list(measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1))
    assert {(r.status, r.reason) for r in records} == {("ok", None)}


# ---- Humming: its packing, and its flow with a stand-in


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Its convention: the k-th of a word's codes in the k-th bits from below."""
    shifts = torch.arange(0, 32, bits)
    return ((words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def unpacked(config: dict[str, Any], tensors: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """The weight that its dequantization defines: codes count from 0, less the zero or half the range."""
    kind, scales = config["dtype"], tensors["weight_scale"].double().repeat_interleave(group, -1)
    if kind.startswith("float8"):
        storage = torch.float8_e4m3fn if kind.endswith("e4m3") else torch.float8_e5m2
        return fields(tensors["weight"], 8).to(torch.uint8).view(storage).double() * scales
    bits = int(kind.removeprefix("uint"))
    codes = fields(tensors["weight"], bits)
    if config.get("has_zero_point"):
        zeros = fields(tensors["zero_point"].mT.contiguous(), bits).mT
        return (codes - zeros.repeat_interleave(group, -1)).double() * scales
    return (codes - 2 ** (bits - 1)).double() * scales


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_humming_gets_the_same_weight(fmt: str) -> None:
    w = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = quantize(w, fmt, group_size=64)
    config, tensors = packed(weight)
    assert torch.equal(unpacked(config, tensors, 64), dequantize(weight, torch.float64))
    assert tensors["weight"].dtype == torch.int32 and config["group_size"] == 64


def test_humming_has_no_place_for_some_weights() -> None:
    weight = quantize(torch.randn(1, 32, 64), "int4_asym", group_size=64)
    weight.zeros[0, 0, 0] = 16  # type: ignore[index]
    with pytest.raises(ValueError, match="zero points of 16"):
        packed(weight)
    with pytest.raises(ValueError, match="tensor scales"):
        packed(quantize(torch.randn(1, 32, 64), "int8_sym", scale_layout="tensor"))


class FakeLayer(torch.nn.Module):
    """Multiplies by what `unpacked` makes of its tensors; a tuning of 3 doubles the result, one of 1 sleeps."""

    def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, Any], num_experts: int, torch_dtype: Any):
        super().__init__()
        self.config, self.humming_config = weight_config, types.SimpleNamespace(to_str=lambda: "{}")
        bits = int("".join(filter(str.isdigit, weight_config["dtype"])))
        shapes = {"weight": (num_experts, shape_n, shape_k * bits // 32)}
        shapes["weight_scale"] = (num_experts, shape_n, shape_k // weight_config["group_size"])
        for name, shape in shapes.items():
            dtype = torch.int32 if name == "weight" else torch_dtype
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.register_buffer("locks", torch.zeros(8, dtype=torch.int32))

    def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(tensors, strict=False)

    def transform(self) -> None:
        FakeLayer.instance = self


def launch_kernel(*, configs, inputs, outputs, expert_layout, locks, weight, weight_scale, **rest) -> torch.Tensor:  # type: ignore[no-untyped-def]
    layer, block = FakeLayer.instance, int(configs[2])
    dense = unpacked(layer.config, {"weight": weight, "weight_scale": weight_scale}, layer.config["group_size"])
    starts = expert_layout.tolist()
    if block == 1:
        torch.randn(700, 700) @ torch.randn(700, 700)
    for e, (start, stop) in enumerate(itertools.pairwise(starts)):
        y = inputs[start:stop].double() @ dense[e].T * (2 if block == 3 else 1)
        outputs[start:stop] = y.to(outputs.dtype)
    return outputs


class FakeKernel:
    @staticmethod
    def prepare_kernels(layer: str, compute: str, intervals: list[Any], device: torch.device) -> torch.Tensor:
        assert json.loads(compute) == {"gemm_type": "grouped_contiguous"}
        return torch.tensor([[low, high, tuning["block"], 0] for low, high, tuning in intervals]).flatten()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Modules of Humming's names; rows -> the block that its heuristics choose. Rows of the workload: 11."""
    blocks = {11: 1, 6: 3, 3: 2, 22: 1, 1: 4}
    heuristics = lambda config, shape_m, gemm_type, device: {"block": blocks.get(shape_m, 9)}  # noqa: E731
    modules = {
        "humming": {"ops": types.SimpleNamespace(launch_kernel=launch_kernel)},
        "humming.layer": {"HummingLayer": FakeLayer},
        "humming.kernel": {},
        "humming.kernel.humming": {"HummingKernel": FakeKernel},
        "humming.tune": {"get_heuristics_config": heuristics},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(HummingProvider, "refuse", lambda self, candidate: None)
    yield blocks


def peer_records(tries: int) -> list[Record]:
    candidates = enumerate_candidates(workload(), CPU, STRATEGIES, ["raw"], ["humming"], tries=tries)
    return list(measure_workload(workload(), candidates, CEILINGS, ENV, CPU, rounds=2))


def test_a_peer_runs_its_best_right_configuration(stand_in: dict[int, int]) -> None:
    (record,) = peer_records(tries=2)
    assert record.status == "ok" and record.provider == "humming" and record.scope == "fused"
    assert record.config is not None and 'tuned, best of 3, 1 of them WRONG {"block": 2}' in record.config
    assert (record.launches, record.schedule_launches, record.weight_layout) == (1, 1, "prepared")
    (record,) = peer_records(tries=0)
    assert record.status == "ok" and 'default, best of 1 {"block": 1}' in (record.config or "")


def test_a_wrong_peer_is_not_timed(stand_in: dict[int, int]) -> None:
    stand_in[11] = 3
    (record,) = peer_records(tries=0)
    assert record.status == "WRONG" and record.median_ms is None and "rows fail" in (record.reason or "")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TypeError("launch() got an unexpected keyword argument 'x'"), "TypeError: launch() got an unexpected keyword"),
        (AssertionError(), "AssertionError: raise error (broken)"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
    ],
)
def test_what_a_peer_raises_is_its_reason(
    stand_in: dict[int, int], monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def broken(self: FakeLayer) -> None:
        raise error

    monkeypatch.setattr(FakeLayer, "transform", broken)
    (record,) = peer_records(tries=1)
    assert record.status == "unsupported" and text in (record.reason or "") and "\n" not in (record.reason or "")


def test_a_peer_that_fails_when_it_runs_is_refused(stand_in: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: HummingProvider, candidate: Candidate, take: Any, dry: bool) -> Bound:
        def run() -> torch.Tensor:
            raise RuntimeError("invalid argument")

        return Bound(run, Counter(), 0)

    monkeypatch.setattr(HummingProvider, "bind", failing)
    (record,) = peer_records(tries=0)
    assert record.status == "unsupported" and (record.reason or "").endswith("RuntimeError: invalid argument")


def test_a_layer_of_other_shapes_is_a_reason(stand_in: dict[int, int]) -> None:
    t = make_inputs(workload("int4_asym"), CPU)  # the stand-in knows no zero points
    with pytest.raises(Refused, match="its layer wants"):
        HummingProvider(workload("int4_asym"), t).bind(peer_candidate(), torch_take, dry=False)


def peer_candidate() -> Candidate:
    return Candidate(Strategy("grouped"), "fused", provider="humming", layout="prepared")


def torch_take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def test_what_is_refused_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    t = make_inputs(workload("bf16"), CPU)
    provider = HummingProvider(workload("bf16"), t)
    assert provider.refuse(peer_candidate()) == "runs on NVIDIA GPUs; tensors are on cpu"
    far = types.SimpleNamespace(x=types.SimpleNamespace(device=GPU), weight=t.weight)
    monkeypatch.setattr(provider, "_t", far)
    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: None)
    assert provider.refuse(peer_candidate()) == "not installed: pip install humming-kernels"
    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: object())
    assert provider.refuse(peer_candidate()) == "takes weights of at most 8 bits, not bf16"
    for scale_dtype, why in ((None, None), ("fp32", "its scales have the dtype of the activations, not torch.float32")):
        t = make_inputs(workload(scale_dtype=scale_dtype), CPU)
        far.weight, far.x.dtype = t.weight, t.x.dtype
        assert provider.refuse(peer_candidate()) == why


# ---- the issuing host


def test_the_queue_is_never_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(timing, "synchronize", lambda device: log.append("sync"))
    assert issue_us(lambda: log.append("call"), CPU, launches=3) > 0
    assert log == ["call", "sync", "sync", *["call"] * 200, "sync"]
    log.clear()
    issue_us(lambda: log.append("call"), CPU, launches=238)
    assert log[2:7] == ["sync", *["call"] * (timing.QUEUE // 238), "sync"] and log.count("call") >= 200


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("fmt", ["int4_asym", "fp8_e5m2", "bf16"])
def test_on_a_gpu(fmt: str, kind: str) -> None:
    pytest.importorskip("triton")
    if torch.accelerator.current_accelerator().type != "cuda":  # type: ignore[union-attr]
        pytest.skip("speaks CUDA")
    device = torch.device("cuda", 0)
    w = workload(fmt, kind=kind, n=128, k=256, group_size=128)
    strategies = [*STRATEGIES, *parse_strategy("pad_and_clip", (1,))]
    candidates = enumerate_candidates(
        w, device, strategies, ["raw", "wrapper"], ["torch", "fused"], ["prepared", "public"]
    )
    records = list(measure_workload(w, candidates, CEILINGS, ENV, device, rounds=3))
    ours = [r for r in records if r.provider == "fused"]
    assert [(r.strategy, r.graph, r.reason) for r in ours if r.status != "ok"] == []
    assert any(r.graph for r in ours) and all((r.host_us is None) == r.graph for r in ours)
    made = [r for r in ours if r.strategy == "grouped" and r.phase == "prefill"]
    assert all(r.schedule_ms for r in made) and bool(made) == (kind == "prefill")


def test_a_binder_makes_each_provider_once() -> None:
    w = workload()
    binder = Binder(w, make_inputs(w, CPU))
    a, b = Candidate(Strategy("grouped"), "fused", provider="fused"), Candidate(None, "fused", provider="fused")
    assert binder._of(a) is binder._of(b) and binder._of(peer_candidate()) is not binder._of(a)


# ---- the tables, with known numbers


class TestDecode:
    DECODE: ClassVar[dict[str, Any]] = {"kind": "decode", "batch": 1, "top_k": 8, "ceiling_read_gbps": 5000.0}

    def test_share_of_the_read_bandwidth_and_the_host(self) -> None:
        ours = {"provider": "fused", "scope": "fused", **self.DECODE}
        records = [
            record(2.0, phase="decode", host_us=61.25, **ours), grouped(0.5, phase="decode", host_us=48.0, **ours),
            record(0.8, strategy="auto", phase="auto", launches=None, api="wrapper", host_us=95.0, **ours),
        ]  # fmt: skip
        text = report.render(records, "md", "full")
        per_expert, hinted, auto = markdown_rows(text)[0]
        assert hinted["% of read"] == "40%"  # 1e9 bytes at 5,000 GB/s take 0.2 ms
        assert hinted["host us"] == "48.0" and per_expert["host us"] == "61.2" and hinted["vs per_expert"] == "4.00x"
        assert auto["strategy"].strip("*") == "phase auto" and auto["vs per_expert"] == "-"
        assert "read 5,000 GB/s" in text and "without waiting for the device" in text

    def test_without_a_read_ceiling_there_is_no_share(self) -> None:
        records = [record(2.0, **{**self.DECODE, "ceiling_read_gbps": None})]
        assert records[0].read_fraction is None
        assert "% of read" not in markdown_rows(report.render(records, "md", "summary"))[0][0]


class TestSummary:
    FUSED: ClassVar[list[Record]] = [
        record(4.0, **(ours := {"provider": "fused", "scope": "fused", "weight_layout": "prepared",
                                "dequant_launches": 0})),
        record(1.6, graph=True, **ours), clip(2.0, 256, **ours), clip(1.0, 512, 16, **ours),
        clip(0.9, 512, 16, graph=True, **ours), grouped(0.8, **ours),
    ]  # fmt: skip
    HUMMING = grouped(
        1.0, provider="humming", scope="fused", weight_layout="prepared",
        config='humming-kernels 0.1.19: tuned, best of 5 {"num_stages": 4}',
    )  # fmt: skip

    def test_kernels_on_packed_weights_beside_the_peers(self) -> None:
        torch_grouped = grouped(1.2, **MM)
        text = report.render([*INT4, torch_grouped, *self.FUSED, self.HUMMING], "md", "summary")
        (table,) = markdown_rows(text)
        torch_row, ours, peer = table
        assert [row["provider"] for row in table] == ["torch", "fused", "humming"]
        assert ours["per_expert ms"] == "4.000" and ours["per_expert, graph ms"] == "1.600"
        assert ours["pad_and_clip (threshold) ms"] == "1.000 (512)"  # not the one in a graph
        assert ours["pad_and_clip launches"] == "238→16" and ours["pad_and_clip speed-up"] == "4.00x"
        assert ours["best strategy"] == "**grouped**" and ours["best launches"] == "238→1"
        assert ours["best speed-up"] == "5.00x" and ours["grouped ms"] == "0.800"
        assert ours["best peer ms"] == "1.000 (humming)" and ours["vs peer"] == "1.25x"
        assert torch_row["best peer ms"] == peer["best peer ms"] == "-" and peer["best ms"] == "1.000"
        assert peer["best speed-up"] == "-"  # it has no loop over experts
        assert "- humming-kernels 0.1.19: tuned, best of 5: int4_sym N=3072" in text

    def test_torchs_grouped_mm_is_a_peer_on_ready_weights(self) -> None:
        (table,) = markdown_rows(report.render([*INT4, grouped(1.2, **MM), *self.FUSED], "md", "summary"))
        assert table[1]["best peer ms"] == "1.200 (torch, ready)" and table[1]["vs peer"] == "1.50x"
        bf16 = [grouped(1.2, **BF16), grouped(1.0, provider="fused", **{**BF16, "scope": "fused"})]
        (table,) = markdown_rows(report.render(bf16, "md", "summary"))
        assert table[1]["best peer ms"] == "1.200 (torch)"

    def test_wrong_peers_do_not_count(self) -> None:
        wrong = dataclasses.replace(self.HUMMING, status="WRONG", reason="off")
        (table,) = markdown_rows(report.render([*INT4, *self.FUSED, wrong], "md", "summary"))
        assert "vs peer" not in table[1]


class TestOldFiles:
    def test_records_without_the_newer_fields_are_shown(self) -> None:
        newer = {"phase", "config", "schedule_launches", "schedule_ms", "host_us", "ceiling_read_gbps"}
        lines = []
        for old in INT4:
            kept = {key: value for key, value in json.loads(old.to_json()).items() if key not in newer}
            lines.append(json.dumps(kept))
        loaded = [record_from_json(line, "old") for line in lines]
        assert loaded == INT4
        for mode in ("summary", "full"):
            assert report.render(loaded, "md", mode) == report.render(INT4, "md", mode)
