"""`bench layer`: routing, the ways to call a layer, the gate, records and tables."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import qexperts
from test_layer import E, activations, layer_for, loop, routing
from test_report import markdown_rows

from qexperts import FORMATS, QuantExperts, dequantize
from qexperts.backends import cpu_backend
from qexperts.bench import compare, layer, report, transformers_peer
from qexperts.bench.candidates import HINTED, WAYS
from qexperts.bench.layer import measure_layer
from qexperts.bench.records import Record, load_records, record_from_json
from qexperts.bench.roofline import Ceilings
from qexperts.bench.timing import Sampler
from qexperts.bench.workloads import LayerWorkload, route_steps
from qexperts.routing import Distribution
from qexperts.testing import assert_no_worse, experts_loop

CPU = torch.device("cpu")
ENV: dict[str, str | None] = {"device": "test", "device_type": "cpu", "time": "2026-01-01T00:00:00+00:00"}
CEILINGS = Ceilings(1.0, 100.0)
COUNTS = (9, 0, 2, 7, 3, 3)
OURS = "fused" if cpu_backend.installed() else "torch"
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def workload(fmt: str = "int4_sym", **changes: Any) -> LayerWorkload:
    distribution = Distribution("test", COUNTS, "made up")
    base = LayerWorkload(distribution, 2, 3, 4, 2, 64, 32, 16, FORMATS[fmt], "bf16", 0)
    return dataclasses.replace(base, **changes)


def measured(w: LayerWorkload, device: torch.device = CPU, rounds: int = 2) -> list[Record]:
    w.check()
    env = ENV | {"device_type": device.type}
    return list(measure_layer(w, ["prepared", "public"], CEILINGS, env, device, rounds))


def by_way(records: list[Record]) -> dict[tuple[str, str], Record]:
    """(way, step) -> record, of one layout."""
    return {(r.strategy, str(r.step)): r for r in records if r.provider != OURS or r.weight_layout == "public"}


# ---- what a router sends


def test_routing() -> None:
    w = workload(layers=3)
    layers = route_steps(w, CPU)
    assert [len(steps) for steps in layers] == [1 + w.decode_steps] * 3
    for prefill, *decode in layers:
        assert sorted(prefill.counts.tolist()) == sorted(COUNTS)
        assert prefill.expert_ids.shape == (12, 2) and all(r.expert_ids.shape == (4, 2) for r in decode)
        for routed in (prefill, *decode):
            ids = routed.expert_ids
            assert routed.counts.dtype == torch.int32 and int(routed.counts.sum()) == ids.numel()
            assert torch.equal(ids.flatten().bincount(minlength=6), routed.counts.long())
            assert all(len(set(token)) == 2 for token in ids.tolist())
            assert routed.expert_weights.dtype == torch.bfloat16
            assert torch.allclose(routed.expert_weights.float().sum(1), torch.ones(len(ids)), atol=0.02)
        empty = prefill.counts == 0
        assert all(int(routed.counts[empty].sum()) == 0 for routed in decode)


def test_routing_is_that_of_the_seed_and_of_the_layer() -> None:
    def ids(seed: int) -> list[list[list[int]]]:
        return [r.expert_ids.tolist() for steps in route_steps(workload(seed=seed), CPU) for r in steps]

    first, other = ids(0), ids(1)
    assert first == ids(0) and all(a != b for a, b in zip(first, other, strict=True))
    assert len({str(step) for step in first}) == len(first)


def test_a_decode_draws_experts_as_the_prefill_has_them() -> None:
    counts = (60, 20, 10, 10, 0, 0)
    w = workload(distribution=Distribution("test", counts, "made up"), top_k=1, batch=4000, decode_steps=1)
    prefill, decode = route_steps(w, CPU)[0]
    assert torch.allclose(decode.counts / 4000, prefill.counts / 100, atol=0.03)


# ---- what judges


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_the_loop_over_experts_is_the_loop_over_tokens(gated: bool) -> None:
    weights, x = layer_for("int4_asym", gated=gated), activations(9, torch.bfloat16)
    ids, shares = routing(9, 3)
    biases = dict(gate_up_bias=torch.randn(E, weights[0].N).bfloat16(), down_bias=torch.randn(E, 64).bfloat16())
    oracle = loop(x.double(), *weights, ids, shares, "gelu", **biases, dtype=torch.float64)
    exact = experts_loop(x, *weights, ids, shares, "gelu", **biases, exact=True)
    torch.testing.assert_close(exact, oracle, rtol=1e-12, atol=1e-12)
    rounded = loop(x, *weights, ids, shares, "gelu", **biases, dtype=torch.bfloat16)
    assert_no_worse(experts_loop(x, *weights, ids, shares, "gelu", **biases), oracle, rounded)


@needs_transformers
@pytest.mark.parametrize("implementation", transformers_peer.IMPLEMENTATIONS)
def test_transformers_computes_the_same_layer(implementation: str) -> None:
    weights, x = layer_for("int8_sym"), activations(8, torch.bfloat16)
    shares = torch.rand(8, 2).bfloat16()
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(8)])
    module = transformers_peer.experts_of(implementation, *(dequantize(w, x.dtype) for w in weights))
    call = (x, *weights, ids, shares)
    assert_no_worse(module(x, ids, shares), experts_loop(*call, exact=True), experts_loop(*call))


# ---- the ways


@pytest.mark.parametrize("fmt", ["int4_sym", "int8_asym", "fp8_e4m3", "bf16"])
def test_every_way_passes_the_gate(fmt: str) -> None:
    w = workload(fmt)
    records = measured(w)
    assert [r.step for r in records] == ["prefill", "decode"] * (len(records) // 2)
    layouts = {r.weight_layout for r in records if r.provider == OURS}
    assert layouts == ({"public", "prepared"} if OURS == "fused" and fmt != "bf16" else {"public"})
    assert {r.strategy for r in records} == {*WAYS, *transformers_peer.IMPLEMENTATIONS}
    for r in records:
        if r.strategy == "batched_mm":
            assert r.status == "unsupported" and "GPUs only" in str(r.reason)
        elif r.provider == "transformers" and importlib.util.find_spec("transformers") is None:
            assert r.status == "unsupported" and "not installed" in str(r.reason)
        else:
            assert r.status == "ok" and len(r.samples_ms) == 2 and r.median_ms and r.error, (r.strategy, r.reason)
        assert (r.layers, r.decode_steps, r.batch, r.top_k, r.decode_threshold) == (2, 3, 4, 2, 4)
        assert (r.n, r.k, r.total_tokens) == (64, 64, 24 if r.step == "prefill" else 8)
        assert tuple(r.num_tokens_per_expert) == COUNTS and r.host_us is None
        assert record_from_json(r.to_json(), "here") == r


def test_sizes_of_a_record() -> None:
    w = workload("bf16")
    records = by_way(measured(w))
    prefill, decode = records[HINTED, "prefill"], records[HINTED, "decode"]
    expert = 3 * 64 * 32 * 2
    assert (prefill.active_experts, prefill.max_tokens) == (5, 9)
    assert prefill.mandatory_bytes == 2 * (5 * expert + 2 * 12 * 64 * 2)
    assert prefill.flop == 2 * 2 * 24 * 3 * 64 * 32
    counts = torch.stack([r.counts for steps in route_steps(w, CPU) for r in steps[1:]])
    assert decode.max_tokens == int(counts.max())
    assert decode.active_experts == round(float((counts > 0).sum(1).double().mean()))
    assert decode.mandatory_bytes == int((counts > 0).sum()) * expert // 3 + 2 * 2 * 4 * 64 * 2


def test_a_decode_sample_is_the_mean_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "sample", lambda self, run: run() and 6.0)
    records = by_way(measured(workload()))
    assert records[HINTED, "prefill"].samples_ms == [6.0, 6.0]
    assert records[HINTED, "decode"].samples_ms == [2.0, 2.0] and records[HINTED, "decode"].median_ms == 2.0


def test_ways_with_the_same_kernels_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[torch.Tensor] = []
    judge = layer.judge
    monkeypatch.setattr(layer, "judge", lambda y, *others: results.append(y) or judge(y, *others))
    monkeypatch.setattr(transformers_peer, "reason_against", lambda name, device: "not now")
    measured(workload())
    ours, steps = len(WAYS) * (2 if OURS == "fused" else 1), 2
    assert len(results) == ours * steps
    for step in range(steps):
        assert all(torch.equal(y, results[step]) for y in results[step::steps])
    assert results[0].shape == (2 * 12, 64) and results[1].shape == (3 * 2 * 4, 64)


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []

    class Spied(QuantExperts):
        def forward(self, *args: Any, phase: str = "auto", decode_threshold: int = 4) -> torch.Tensor:
            seen.append((phase, decode_threshold))
            return super().forward(*args, phase=phase, decode_threshold=decode_threshold)

    monkeypatch.setattr(layer, "QuantExperts", Spied)
    yield seen


def test_what_each_way_passes(phases: list[tuple[str, int]]) -> None:
    w = workload(decode_threshold=3)
    layers = layer._layers(w, CPU)
    template = layer._template(w, layers, CEILINGS, ENV)
    steps = {"prefill": [0], "decode": [1, 2, 3]}
    largest = {s: [int(one.steps[i][1].counts.max()) for i in steps[s] for one in layers] for s in steps}
    assert max(largest["decode"]) > 3 >= min(largest["decode"]), "the threshold must matter"
    for way in WAYS:
        for step in layer.STEPS:
            phases.clear()
            called = layer._Way(way, OURS, "public")
            layer._prepare(layer._Row(called, step, layer._describe(template, called, step, layers)), w, layers, CPU)
            expected = {
                "always_prefill": "prefill", "always_decode": "decode", "unified_auto": "auto", HINTED: step,
            }.get(way)  # fmt: skip
            by_counts = ["decode" if n <= 3 else "prefill" for n in largest[step]]
            assert [phase for phase, _ in phases] == ([expected] * len(by_counts) if expected else by_counts), way
            assert way != "unified_auto" or {threshold for _, threshold in phases} == {3}


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(QuantExperts):
        """One row is wrong if the caller says decode."""

        def forward(self, *args: Any, phase: str = "auto", decode_threshold: int = 4) -> torch.Tensor:
            y = super().forward(*args, phase=phase, decode_threshold=decode_threshold)
            y[-1] *= 1.1 if phase == "decode" else 1
            return y

    monkeypatch.setattr(layer, "QuantExperts", Broken)
    found = measured(workload())
    records = by_way(found)
    wrong = {(way, step) for (way, step), r in records.items() if r.status == "WRONG"}
    assert {*wrong} - {("manual_branch", "decode")} == {
        ("always_decode", "prefill"), ("always_decode", "decode"), (HINTED, "decode"),
    }  # fmt: skip
    for key in wrong:
        assert (
            records[key].median_ms is None and records[key].samples_ms == [] and "rows fail" in str(records[key].reason)
        )
    (table,) = markdown_rows(report.render(found, "md"))  # type: ignore[arg-type]
    rows = {row["call"].strip("*"): row for row in table if row.get("layout", "public") == "public"}
    assert rows["always_decode"]["prefill ms"] == rows["always_decode"]["decode step ms"] == "WRONG"
    assert rows[HINTED]["decode step ms"] == "WRONG" and rows[HINTED]["total ms"].strip("*") == "-"
    assert rows["always_prefill"]["total ms"] != "-"
    assert "WRONG: int4_sym" in str(report.render(found, "md"))


def test_without_transformers_the_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_peer.importlib.util, "find_spec", lambda name: None)
    for r in measured(workload()):
        missing = r.status == "unsupported" and "pip install 'qexperts[transformers]'" in str(r.reason)
        assert missing == (r.provider == "transformers")


def test_more_memory_than_there_is_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "fits", lambda need, device: need < 1000)
    reasons = {r.reason for r in measured(workload()) if r.strategy == "grouped_mm"}
    assert reasons == ({"unquantized weights need 0.0 GiB, more than is free"} if _transformers() else reasons)
    w = torch.empty(6, 64, 64, dtype=torch.bfloat16)
    assert transformers_peer.needed_bytes("batched_mm", w, 24) == 24 * (64 * 64 + 64 * 32) * 2
    assert transformers_peer.needed_bytes("grouped_mm", w, 24) == 0


def _transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def test_interrupt_yields_what_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = 0

    def sample(self: Sampler, run: object) -> float:
        nonlocal samples
        samples += 1
        if samples == 4:
            raise KeyboardInterrupt
        return 3.0

    monkeypatch.setattr(Sampler, "sample", sample)
    monkeypatch.setattr(transformers_peer, "reason_against", lambda name, device: "not now")
    found: list[Record] = []
    with pytest.raises(KeyboardInterrupt):
        for record in measure_layer(workload(), ["public"], CEILINGS, ENV, CPU, 5):
            found.append(record)
    timed = [r for r in found if r.status == "ok"]
    assert len(timed) == 3 and all(r.samples_ms == [3.0 if r.step == "prefill" else 1.0] for r in timed)
    assert "interrupted: 3 rows" in str(report.render(found, "md"))


# ---- tables


def record(way: str, step: str, ms: float | None, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "kind": "layer", "distribution": "test", "scaled": None, "num_experts": 6, "active_experts": 5,
        "total_tokens": 24 if step == "prefill" else 8, "max_tokens": 9, "num_tokens_per_expert": list(COUNTS),
        "n": 64, "k": 64, "group_size": 16, "format": "int4_sym", "dtype": "bf16", "seed": 0, "provider": "fused",
        "strategy": way, "threshold": None, "scope": "fused", "gather": None, "graph": False, "api": "wrapper",
        "weight_layout": "prepared", "step": step, "layers": 2, "decode_steps": 3, "decode_threshold": 4, "batch": 4,
        "top_k": 2, "device": "test", "time": "2026", "rounds": 5, "median_ms": ms,
        "samples_ms": [] if ms is None else [ms * f for f in (0.9, 1, 1, 1, 1.1)],
    }  # fmt: skip
    return Record(**(fields | changes))


def pair(way: str, prefill: float, decode: float, **changes: Any) -> list[Record]:
    return [record(way, "prefill", prefill, **changes), record(way, "decode", decode, **changes)]


def test_a_row_is_a_way() -> None:
    peer = dict(provider="transformers", scope="base mm", weight_layout="public", config="transformers 5")
    records = [
        *pair(HINTED, 10.0, 2.0), *pair("manual_branch", 10.0, 3.0), *pair(HINTED, 12.0, 4.0, weight_layout="public"),
        *pair("unified_auto", 12.0, 2.0, weight_layout="public"), *pair("eager", 40.0, 20.0, **peer),
        *pair(HINTED, 5.0, 1.0, graph=True),
        *(record("manual_branch", s, None, graph=True, status="unsupported", reason="reads") for s in layer.STEPS),
    ]  # fmt: skip
    text = str(report.render(records, "md"))
    (table,) = markdown_rows(text)
    seen = [
        [row[c].strip("*") for c in ("call", "layout", "prefill ms", "decode step ms", "total ms")] for row in table
    ]
    assert seen == [
        [HINTED, "prepared", "10.00", "2.000", "16.00"],
        ["manual_branch", "prepared", "10.00", "3.000", "19.00"],
        [HINTED, "public", "12.00", "4.000", "24.00"],
        ["unified_auto", "public", "12.00", "2.000", "18.00"],
        ["eager", "public", "40.00", "20.00", "100.0"],
        [f"{HINTED}, graph", "prepared", "5.000", "1.000", "8.000"],
        ["manual_branch, graph", "prepared", "n/a", "n/a", "-"],
    ]
    rows = report.rows(records, "summary")
    assert [row.hinted and row.hinted.total_ms for row in rows] == [16, 16, 24, 24, 16, 8, 8]
    assert [row.best for row in rows] == [False] * 5 + [True, False]
    assert "2 layers, a prefill and 3 decode steps of batch 4" in text and "24 rows (5 active, max 9)" in text
    assert "decode step: 8 rows" in text and "more than 4 are a prefill" in text and "layer H=64 I=32" in text
    assert "n/a: int4_sym fused manual_branch, prefill, graph" in text


def test_ratios_and_their_intervals() -> None:
    records = [*pair(HINTED, 10.0, 2.0), *pair("manual_branch", 11.0, 3.0)]
    (table,) = markdown_rows(str(report.render(records, "md", "full")))
    assert table[1]["step vs hinted, 90%"] == "1.50–1.50x"
    shown = {c.name: c for c in report.columns(records, "full")}
    row = report.rows(records, "full")[1]
    ratios = [shown[f"{name}versus_hinted"].text(row) for name in ("prefill_", "", "total_")]
    assert ratios == ["1.10x", "1.50x", "1.25x"]


def test_a_step_that_was_not_measured_has_no_time() -> None:
    (table,) = markdown_rows(str(report.render([record(HINTED, "prefill", 10.0)], "md")))
    assert table[0]["prefill ms"] == "10.00" and table[0]["decode step ms"] == "n/a" and table[0]["total ms"] == "-"


def test_steps_are_compared_with_their_like() -> None:
    a, b = pair(HINTED, 10.0, 2.0), pair(HINTED, 10.0, 3.0)
    found = compare.compare(a, b)
    assert [row.verdict for row in found.rows] == ["same", "slower"] and found.exit_code == 1
    with pytest.raises(ValueError, match="no configuration is in both"):
        compare.compare(a, pair(HINTED, 10.0, 2.0, layers=3))


# ---- the command

TINY = ["--experts", "6", "--tokens", "48", "--top-k", "2", "--hidden", "32", "--intermediate", "16", "--layers", "2"]
TINY += ["--decode-steps", "2", "--batch", "3", "--group-size", "16", "--rounds", "2", "--device", "cpu"]


def test_command_saves_and_show_repeats(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    arguments = [*TINY, "--distribution", "zipf:1.2", "--formats", "int4_sym,bf16", "--out", "md"]
    done = qexperts("bench", "layer", *arguments, "--save", str(path))
    assert done.returncode == 0, done.stderr
    records = load_records(path)
    assert {r.kind for r in records} == {"layer"} and {r.format for r in records} == {"int4_sym", "bf16"}
    assert {r.distribution for r in records} == {"zipf:1.2"} and all(
        sum(r.num_tokens_per_expert) == 48 for r in records
    )
    assert all(name in done.stdout for name in (*WAYS, *transformers_peer.IMPLEMENTATIONS))
    assert "2/2 2 layers H=32 I=16 bf16" in done.stderr
    assert qexperts("show", str(path), "--out", "md").stdout == done.stdout
    assert qexperts("compare", str(path), str(path)).returncode == 0


@pytest.mark.slow
def test_the_preset_of_a_cpu_says_it_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    options = ["--device", "cpu", "--layers", "1", "--decode-steps", "1", "--rounds", "1", "--save", str(path)]
    done = qexperts("bench", "layer", *options)
    assert done.returncode == 0, done.stderr
    for r in load_records(path):
        assert (r.n, r.k, r.num_experts, r.format) == (768, 768, 64, "int4_sym")
        assert r.scaled and "64 experts, 2048 rows" in r.scaled and "H and I divided by 4" in r.scaled


BAD = {
    "layers": (["--layers", "0"], "--layers 0"),
    "decode steps": (["--decode-steps", "0"], "--decode-steps 0"),
    "batch": (["--batch", "-1"], "--batch -1"),
    "top_k": (["--top-k", "0"], "--top-k 0"),
    "threshold": (["--decode-threshold", "-1"], "--decode-threshold -1"),
    "half a size": (["--hidden", "64"], "--hidden and --intermediate"),
    "rows are no tokens": (["--tokens", "2047"], "2047 rows are no tokens of 8"),
    "no rows": (["--tokens", "0"], "0 rows"),
    "too few experts": (["--experts", "6", "--tokens", "64"], "have rows, and those of a token differ"),
    "group size": (["--hidden", "96", "--intermediate", "64"], "K=96 is not a multiple of group_size=128"),
    "H": (["--hidden", "60", "--intermediate", "64", "--group-size", "4"], "N=60"),
    "format": (["--formats", "int3"], "unknown format int3"),
    "dtype": (["--formats", "fp16"], "need --dtype fp16"),
    "distribution": (["--distribution", "zipff"], "zipff"),
    "rounds": (["--rounds", "0"], "--rounds 0"),
    "layout": (["--weight-layout", "tiles"], "prepared, public"),
    "strategies": (["--strategies", "grouped"], "--strategies"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_end_in_one_line_and_2(name: str, tmp_path: Path) -> None:
    arguments, expected = BAD[name]
    done = qexperts("bench", "layer", "--device", "cpu", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert len(done.stderr.splitlines()) == 1 and expected in done.stderr


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["int4_sym", "bf16"])
def test_graphs(fmt: str) -> None:
    device = torch.accelerator.current_accelerator()
    if device is None or device.type != "cuda":
        pytest.skip("this test speaks CUDA")
    wide = workload(fmt, hidden=128, intermediate=64)  # prepared weights have K in 64s
    records = measured(wide, torch.device("cuda", 0), rounds=3)
    assert sum(r.graph for r in records) == len(records) // 2
    for r in records:
        if r.graph and r.strategy in ("manual_branch", "eager"):
            assert r.status == "unsupported" and "CUDA graph" in str(r.reason)
            continue
        assert r.status == "ok", (r.strategy, r.step, r.graph, r.reason)
        assert len(r.samples_ms) == 3 and (r.host_us is None) == r.graph
