"""Peer "ggml": its blocks, its rounding, its gate and its place in the tables; where it is installed, itself."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch
from test_fused_bench import CEILINGS, CPU, ENV, STRATEGIES, workload
from test_report import grouped, markdown_rows, record

from qexperts import QuantWeight, dequantize, quantize
from qexperts.bench import ggml, report
from qexperts.bench.binding import Bound, Refused
from qexperts.bench.candidates import Candidate, enumerate_candidates
from qexperts.bench.measure import measure_workload
from qexperts.bench.records import Record
from qexperts.bench.workloads import Workload, make_inputs
from qexperts.routing import Distribution
from qexperts.testing import int8_rounded, peer_gemm, q8_0_rounded

TYPES = ["int4_sym", "int8_sym"]
installed = pytest.mark.skipif(
    importlib.util.find_spec(ggml.MODULE) is None, reason="llama-cpp-python is not installed"
)


def candidates(w: Workload, apis: list[str] | None = None) -> list[Candidate]:
    return enumerate_candidates(w, CPU, STRATEGIES, apis or ["raw"], ["ggml"])


def measured(w: Workload, apis: list[str] | None = None) -> list[Record]:
    return list(measure_workload(w, candidates(w, apis), CEILINGS, ENV, CPU, rounds=1))


def small(fmt: str = "int4_sym", **changes: object) -> Workload:
    return workload(fmt, **{"k": 128, "group_size": 64, **changes})


# ---- blocks


def dequantized(blocks: torch.Tensor) -> torch.Tensor:
    """Its dequantize_row_q4_0 and dequantize_row_q8_0, from their definition: [E, N, K] in fp64."""
    scale = blocks[..., :2].contiguous().view(torch.float16).double()
    codes = blocks[..., 2:].contiguous()
    if codes.shape[-1] == 16:
        values = torch.cat([codes % 16, codes // 16], -1).double() - 8
    else:
        values = codes.view(torch.int8).double()
    return (values * scale).flatten(-2)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("fmt", TYPES)
def test_the_blocks_are_the_weight(fmt: str, group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(2, 16, 256, generator=generator).to(torch.bfloat16), fmt, group_size=group_size)
    weight.codes[1] = torch.arange(weight.codes[1].numel()).view_as(weight.codes[1]) % 256  # every code
    weight.scales[0, ::2] *= -1  # type: ignore[index]
    written = ggml.blocks(weight)
    assert written.shape == (2, 16, 8, {"int4_sym": 18, "int8_sym": 34}[fmt]) and written.dtype == torch.uint8
    assert torch.equal(dequantized(written), dequantize(weight, torch.float64))


def test_scales_that_fp16_does_not_hold_are_a_reason() -> None:
    weight = quantize(torch.randn(1, 16, 64), "int4_sym", group_size=32)
    weight.scales.fill_(2.0**-14)  # type: ignore[union-attr]
    assert ggml.blocks(weight).shape == (1, 16, 2, 18)
    weight.scales[0, 3, 1] = 0.1  # type: ignore[index]
    with pytest.raises(ValueError, match=r"its scales are fp16, which some of these are not: 0\.1"):
        ggml.blocks(weight)
    with pytest.raises(ValueError, match="tensor scales"):
        ggml.blocks(quantize(torch.randn(1, 16, 64), "int8_sym", scale_layout="tensor"))


# ---- activations and the gate


def test_activations_by_32() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[1, 32:] = 0
    x[2, 5] = 1000  # leaves nothing of its block
    rounded = q8_0_rounded(x, quantize(torch.randn(1, 16, 64), "int4_sym", group_size=64))
    for row, found in zip(x.tolist(), rounded.tolist(), strict=True):
        for start in (0, 32):
            block = row[start : start + 32]
            top = max(map(abs, block))
            step = torch.tensor(top / 127).half().item()
            assert found[start : start + 32] == [round(v * 127 / top) * step if top else 0.0 for v in block]
    assert rounded[2, :32].count_nonzero() == 1


@pytest.mark.parametrize(
    ("how", "status"),
    [("as ggml", "ok"), ("unrounded", "WRONG"), ("by group", "WRONG"), ("scaled", "WRONG"), ("rows swapped", "WRONG")],
)
def test_the_gate_knows_its_rounding(how: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that multiplies in torch: what is rounded otherwise, or wrong, has no time."""

    def bind(self: ggml.GgmlProvider, candidate: Candidate, take: Any, dry: bool) -> Bound:
        t = self._t
        rounded = {"unrounded": t.x, "by group": int8_rounded(t.x, t.weight)}.get(how, q8_0_rounded(t.x, t.weight))
        y = peer_gemm(rounded.float(), t.weight, t.counts.tolist())
        y = y * 1.02 if how == "scaled" else y.flip(0) if how == "rows swapped" else y
        return Bound(lambda: y.to(t.x.dtype), Counter(gemm=1), 0)

    monkeypatch.setattr(ggml.GgmlProvider, "bind", bind)
    monkeypatch.setattr(ggml.GgmlProvider, "refuse", lambda self, candidate: None)
    monkeypatch.setattr(ggml.GgmlProvider, "plan", lambda self, candidate: None)
    records = measured(small(dtype="fp16"))  # in bf16 the rule forgives as much as q8_0 rounds away
    assert {r.status for r in records} == {status} and {r.activation_format for r in records} == {"q8_0"}
    assert all(4e-3 < (r.error or 0) < 8e-3 for r in records if status == "ok")


# ---- what is measured, and who cannot run says why


def test_both_operations_in_both_layouts() -> None:
    found = candidates(small(kind="decode"), ["raw", "wrapper"])
    assert [(c.layout, c.api, c.strategy and c.strategy.name) for c in found] == [
        (layout, api, name)
        for layout in ("prepared", "public")
        for api, name in (("raw", "per_expert"), ("raw", "grouped"), ("wrapper", None))
    ]
    assert {(c.scope, c.provider, c.activation_format) for c in found} == {("fused", "ggml", "q8_0")}


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(w: Workload) -> str | None:
        return ggml.GgmlProvider(w, make_inputs(w, CPU)).refuse(candidates(w)[0])

    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    assert reason(small()) == "not installed: pip install llama-cpp-python"
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: name)
    assert reason(small()) is None
    assert reason(small("int4_asym")) == "has blocks for int4_sym and int8_sym, not int4_asym"
    assert reason(small("bf16")) == "has blocks for int4_sym and int8_sym, not bf16"
    assert reason(workload(k=64, group_size=16)) == "its blocks are 32 codes; K=64, group_size=16"
    t = make_inputs(small(), CPU)
    far = dataclasses.replace(t, x=torch.empty_like(t.x, device="meta"))
    assert ggml.GgmlProvider(small(), far).refuse(candidates(small())[0]) == "is measured on CPUs; tensors are on meta"


def test_a_package_without_the_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    package = importlib.util.spec_from_loader("llama_cpp", None, is_package=True)
    assert package is not None and package.submodule_search_locations is not None
    package.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: package)
    with pytest.raises(Refused, match="llama-cpp-python has no lib/libggml here"):
        ggml._library.__wrapped__()


def test_it_is_a_peer_of_rows_on_rounded_activations_only() -> None:
    ours: dict[str, Any] = {"provider": "fused", "scope": "fused", "weight_layout": "prepared"}
    records = [
        grouped(4.0, **ours), grouped(2.0, activation_format="int8", **ours),
        record(3.0, **{**ours, "provider": "ggml"}, activation_format="q8_0"),
        record(6.0, **{**ours, "provider": "prepacked", "scope": "base mm"}, device_type="cpu"),
    ]  # fmt: skip
    for mode in ("summary", "full"):
        text = report.render([dataclasses.replace(r, device_type="cpu") for r in records], "md", mode)
        found = [row for row in markdown_rows(str(text))[0] if row["provider"] == "fused"]
        assert [row["best peer ms"] for row in found] == ["6.000 (prepacked, ready)", "3.000 (ggml)"]
        assert "q8_0 activations: rounded by row and 32 of k inside the clock" in str(text)


# ---- itself


@installed
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("fmt", TYPES)
def test_ggml_itself_passes_the_gate(fmt: str, kind: str, dtype: str) -> None:
    """Where this CPU has no layout of its own for a type, that is the reason and the only one."""
    records = measured(small(fmt, kind=kind, dtype=dtype), ["raw", "wrapper"])
    assert len(records) == 6 and all(r.status == "ok" for r in records if r.weight_layout == "public")
    for r in records:
        assert r.status == "ok" or (r.reason or "").startswith(
            f"has no layout of its own for {fmt_name(fmt)} in mul_mat"
        )
        assert r.status != "ok" or (r.config or "").startswith("llama-cpp-python ")
    loop, one = (r for r in records if r.weight_layout == "public" and r.api == "raw")
    assert (loop.strategy, loop.launches, one.strategy, one.launches) == ("per_expert", 3, "grouped", 1)
    assert loop.plan_ms is not None and one.plan_ms is not None


def fmt_name(fmt: str) -> str:
    return ggml.TYPES[fmt][0]


@installed
@pytest.mark.parametrize(
    "rows",
    [(5,), (0, 7, 0), (1, 1, 1, 1), (2, 2, 2, 2), (13, 1, 0, 5), (1, 0, 0, 16)],
    ids=lambda rows: ",".join(map(str, rows)),
)
def test_ggml_takes_any_counts(rows: tuple[int, ...]) -> None:
    """mul_mat_id wants experts by token: prime numbers of rows, one hot expert, one expert, as many tokens as rows."""
    w = small(distribution=Distribution("test", rows, "made up"))
    assert {r.reason for r in measured(w) if r.weight_layout == "public"} == {None}


@installed
def test_scales_in_fp32_are_a_reason() -> None:
    reasons = {r.reason for r in measured(small(dtype="fp32"))}
    assert all((reason or "").startswith("ggml: ValueError: its scales are fp16") for reason in reasons)


@installed
def test_a_wrong_block_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = ggml.blocks

    def spoiled(weight: QuantWeight) -> torch.Tensor:
        written = blocks(weight)
        written[0, 3, 1, 5] ^= 0xF0
        return written

    monkeypatch.setattr(ggml, "blocks", spoiled)
    records = measured(small())
    assert {r.status for r in records} == {"WRONG"} and all(r.median_ms is None for r in records)


@installed
def test_threads_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    w, threads = small(), []
    set_threads = ggml._library().set_threads
    monkeypatch.setattr(ggml._library(), "set_threads", lambda b, n: (threads.append(n), set_threads(b, n)))
    both = [dataclasses.replace(c, threads=n) for n in (1, 2) for c in candidates(w) if c.layout == "public"]
    records = list(measure_workload(w, both, CEILINGS, ENV, CPU, rounds=1))
    assert {r.status for r in records} == {"ok"} and set(threads) == {1, 2}
