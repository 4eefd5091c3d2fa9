"""The benchmark's own machinery: candidates, the correctness gate, counting, timing, rooflines."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qexperts import FORMATS
from qexperts.backends.torch_backend import compute_dtype
from qexperts.bench import measure, providers, report, timing
from qexperts.bench.candidates import Candidate, enumerate_candidates
from qexperts.bench.columns import least_ratio
from qexperts.bench.environment import environment
from qexperts.bench.measure import measure_workload
from qexperts.bench.providers import Binder
from qexperts.bench.records import Record
from qexperts.bench.roofline import Ceilings, mandatory_bytes, measure_ceilings
from qexperts.bench.timing import CacheFlusher, Sampler, median_interval, percentile
from qexperts.bench.workloads import DTYPES, Workload, decode_distribution, make_inputs
from qexperts.routing import Distribution
from qexperts.strategies import Strategy, parse_strategy

CPU = torch.device("cpu")
ENV: dict[str, str | None] = {"device": "test", "device_type": "cpu"}
CEILINGS = Ceilings(1.0, 100.0)
STRATEGIES = [
    *parse_strategy("per_expert"),
    *parse_strategy("pad_and_clip", (2, 4)),
    Strategy("full_pad"),
    Strategy("grouped"),
]


def workload(fmt: str = "int4_sym", **changes: object) -> Workload:
    distribution = Distribution("test", (3, 0, 7, 1, 2), "made up")
    base = Workload("prefill", distribution, 32, 64, 16, FORMATS[fmt], "bf16", 0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_candidate_passes_the_gate(fmt: str, dtype: str) -> None:
    if fmt in ("bf16", "fp16") and fmt != dtype:
        pytest.skip("an unquantized format is measured in its own dtype")
    w = workload(fmt, dtype=dtype)
    w.check()
    candidates = enumerate_candidates(w, CPU, STRATEGIES, ["raw", "wrapper"])
    records = list(measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=2))
    assert len(records) == len(candidates)
    assert [r.status for r in records] == ["ok"] * len(candidates), [r.reason for r in records]
    assert all(len(r.samples_ms) == 2 and r.median_ms > 0 and r.floor_ms > 0 for r in records)
    assert all((r.plan_ms is not None) == (r.api == "raw") for r in records)


def test_candidates_cover_the_design() -> None:
    names = [
        (c.strategy and str(c.strategy), c.scope, c.gather)
        for c in enumerate_candidates(workload(), CPU, STRATEGIES, ["raw"])
    ]
    assert names[0] == ("per_expert", "base+deq", None)
    for threshold in (2, 4):
        assert (f"pad_and_clip({threshold})", "base mm", "before") in names
        assert (f"pad_and_clip({threshold})", "base mm", "inside") in names
        assert (f"pad_and_clip({threshold})", "base+deq", "inside") in names
    assert ("grouped", "base mm", None) in names and ("full_pad", "base+deq", "inside") in names
    assert {c.scope for c in enumerate_candidates(workload("bf16"), CPU, STRATEGIES, ["raw"])} == {"base mm"}
    gpu = enumerate_candidates(workload(), torch.device("cuda"), STRATEGIES, ["raw"])
    assert any(c.graph and c.strategy == Strategy("per_expert") for c in gpu)


def test_equal_work_is_measured_once() -> None:
    many = [*parse_strategy("pad_and_clip", (2, 7, 9, 64)), Strategy("full_pad"), Strategy("grouped")]
    names = {str(c.strategy) for c in enumerate_candidates(workload(), CPU, many, ["raw"])}
    assert names == {"pad_and_clip(2)", "full_pad", "grouped"}
    names = {str(c.strategy) for c in enumerate_candidates(workload(), CPU, many[:4], ["raw"])}
    assert names == {"pad_and_clip(2)", "pad_and_clip(7)"}


def test_running_out_of_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(providers.DenseGemm):
        def one(self, x, expert, out):  # type: ignore[no-untyped-def]
            def run() -> None:
                raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")

            return [dataclasses.replace(super().one(x, expert, out)[0], run=run)]

    monkeypatch.setattr(providers, "DenseGemm", Greedy)
    candidates = [Candidate(Strategy("per_expert"), "base mm"), Candidate(Strategy("grouped"), "base mm")]
    records = list(measure_workload(workload(), candidates, CEILINGS, ENV, CPU, rounds=1))
    assert [r.status for r in records] == ["unsupported", "ok"] and "2 GiB" in (records[0].reason or "")


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(providers.DenseGemm):
        def one(self, x, expert, out):  # type: ignore[no-untyped-def]
            steps = super().one(x, expert, out)
            return [*steps, dataclasses.replace(steps[0], run=lambda: out[-1].mul_(1.1))]

    class Lazy(providers.DenseGemm):
        def one(self, x, expert, out):  # type: ignore[no-untyped-def]
            return [] if expert == 2 else super().one(x, expert, out)

    for broken, message in ((Broken, "rows fail"), (Lazy, "nan")):
        monkeypatch.setattr(providers, "DenseGemm", broken)
        candidates = [
            Candidate(Strategy("per_expert"), "base mm"),
            Candidate(Strategy("full_pad"), "base mm", "inside"),
        ]
        records = list(measure_workload(workload(), candidates, CEILINGS, ENV, CPU, rounds=2))
        assert [r.status for r in records] == ["WRONG", "ok"]
        assert records[0].median_ms is None and records[0].samples_ms == [] and message in (records[0].reason or "")


def test_interrupt_yields_what_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = 0

    def sample(self: Sampler, run: object) -> float:
        nonlocal samples
        samples += 1
        if samples == 4:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(measure.Sampler, "sample", sample)
    candidates = enumerate_candidates(workload(), CPU, [Strategy("per_expert"), Strategy("grouped")], ["raw"])
    found = []
    with pytest.raises(KeyboardInterrupt):
        for record in measure_workload(workload(), candidates, CEILINGS, ENV, CPU, rounds=5):
            found.append(record)
    assert len(found) == 3 and all(r.samples_ms == [1.0] for r in found)


def test_counts_come_from_the_bound_steps() -> None:
    w = workload()
    binder = Binder(w, make_inputs(w, CPU))
    take = providers.torch_empty(CPU)
    bound = binder.bind(Candidate(Strategy("pad_and_clip", 3), "base mm", "inside"), take)
    assert bound.counts["gemm"] == 2  # one batch of experts 0, 3, 4 and expert 2 by itself
    assert bound.counts["gather"] == 1 and bound.counts["pad"] == 1 and bound.counts["scatter"] == 2
    assert bound.padded_rows == 3 * 3 - (3 + 1 + 2)
    assert binder.bind(Candidate(Strategy("pad_and_clip", 3), "base mm", "before"), take).counts["gather"] == 0
    dry = binder.bind(Candidate(Strategy("full_pad"), "base+deq", "inside"), providers.torch_empty("meta"), dry=True)
    assert dry.padded_rows == 4 * 7 - 13


def test_wrapper_rows_count_what_their_calls_issue() -> None:
    """Chunks of the dequantization depend on the device: on a CPU [2048, 1024] in bf16 is half of one."""
    w = workload("int4_sym", n=2048, k=1024)
    candidates = [Candidate(Strategy("grouped"), "base+deq", api=api) for api in ("raw", "wrapper")]
    raw, wrapper = measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1)
    each = 5 if compute_dtype(CPU, torch.bfloat16) == torch.bfloat16 else 7  # fp32: the scales are cast, twice
    assert raw.dequant_launches == wrapper.dequant_launches == 3 * each  # five experts in three chunks
    assert wrapper.plan_ms is None and raw.plan_ms is not None


def test_refusals_name_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Binder, "refuse", lambda self, c: "not today" if c.strategy == Strategy("grouped") else None)
    candidates = [Candidate(Strategy("grouped"), "base+deq"), Candidate(Strategy("per_expert"), "base+deq")]
    records = list(measure_workload(workload(), candidates, CEILINGS, ENV, CPU, rounds=1))
    assert [r.status for r in records] == ["unsupported", "ok"]
    assert records[0].reason == "not today" and records[0].median_ms is None


def test_mandatory_bytes_count_active_experts_once() -> None:
    w = workload("int4_asym")
    t = make_inputs(w, CPU)
    per_expert = 32 * 64 // 2 + 2 * 32 * (64 // 16) * 2  # codes, then scales and zeros in bf16
    assert mandatory_bytes(t.weight, 4, 13, torch.bfloat16) == 4 * per_expert + 13 * (32 + 64) * 2


def test_workload_tensors_are_reproducible() -> None:
    a, b = (make_inputs(workload(), CPU) for _ in range(2))
    other = make_inputs(workload(seed=1), CPU)
    assert torch.equal(a.x, b.x) and torch.equal(a.weight.codes, b.weight.codes)
    assert not torch.equal(a.x, other.x)


def test_decode_distribution() -> None:
    d = decode_distribution(16, 4, 32, 0)
    assert d.total_tokens == 64 and max(d.counts) <= 16 and d == decode_distribution(16, 4, 32, 0)
    assert decode_distribution(1, 8, 8, 3).counts == (1,) * 8


def test_percentile() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 20) == 2.0
    assert percentile([7.0], 80) == 7.0


def test_median_interval() -> None:
    """Binomial tables: of 17 values the 5th and 13th hold the median with 95%, the 6th and 12th with 86."""
    assert median_interval([float(i) for i in range(1, 18)]) == (5.0, 13.0)
    assert median_interval([5.0, 1.0, 4.0, 2.0, 3.0]) == (1.0, 5.0)  # 94%
    assert median_interval([1.0, 2.0, 3.0, 4.0]) is None  # 88%
    assert median_interval([1.0, 2.0, 3.0, 4.0], 0.8) == (1.0, 4.0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 17, generator=generator).tolist()
    inside = sum(low <= 0.5 <= high for low, high in filter(None, map(median_interval, draws)))
    assert 0.93 < inside / 2000 < 0.97


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row runs on its number of threads, in the rounds of the others; torch has its own number afterwards."""
    before, seen = torch.get_num_threads(), []
    multiply = torch.mm

    def spied(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return multiply(*arguments, **options)

    monkeypatch.setattr(torch, "mm", spied)
    plain = Candidate(Strategy("per_expert"), "base mm")
    candidates = [dataclasses.replace(plain, threads=n) for n in (1, 3)]
    env = ENV | {"device": "some processor, 2 threads"}
    records = list(measure_workload(workload(), candidates, CEILINGS, env, CPU, rounds=6))
    assert [(r.threads, r.device, r.status) for r in records] == [
        (1, "some processor, 1 threads", "ok"), (3, "some processor, 3 threads", "ok"),
    ]  # fmt: skip
    assert seen.count(1) == seen.count(3) > 0 and set(seen) == {1, 3} and torch.get_num_threads() == before
    one, three = report.rows(records, "full")
    assert one.scaling == 1.0 and three.scaling == one.record.median_ms / three.record.median_ms  # type: ignore[operator]
    assert three.single is one.record
    ratios = [a / b for a, b in zip(one.record.samples_ms, three.record.samples_ms, strict=True)]
    assert least_ratio(one.record, three.record) == median_interval(ratios)[0]  # type: ignore[index]


def test_ratios_are_of_one_run() -> None:
    candidates = [Candidate(Strategy("per_expert"), "base mm"), Candidate(Strategy("grouped"), "base mm")]
    a, b = measure_workload(workload(), candidates, CEILINGS, ENV, CPU, rounds=6)
    assert least_ratio(a, a) == 1.0 and least_ratio(a, b) is not None
    assert least_ratio(dataclasses.replace(a, time="later"), b) is None
    assert least_ratio(dataclasses.replace(a, format="int8_sym"), b) is None
    assert least_ratio(dataclasses.replace(a, status="WRONG"), b) is None
    assert least_ratio(dataclasses.replace(a, samples_ms=a.samples_ms[:4]), b) is None


def test_rounds_interleave() -> None:
    order: list[int] = []
    samples: list[list[float]] = [[], [], []]
    Sampler(CPU).rounds([lambda i=i: order.append(i) for i in range(3)], 2, samples)
    rounds = [order[i : i + 3] for i in range(0, 9, 3)]  # a warm-up in order, then a new order each round
    assert rounds[0] == [0, 1, 2] and all(sorted(r) == [0, 1, 2] for r in rounds) and rounds[1] != rounds[2]
    assert [len(s) for s in samples] == [2, 2, 2]


@pytest.mark.parametrize(("device", "flush"), [("cpu", "read"), ("meta", "write+read")])
def test_caches_are_read_full_and_on_a_gpu_overwritten_before(
    device: str, flush: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU: it shows what is called, on which memory."""
    log: list[tuple[str, Any]] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            log.append((func._opname, args[0]))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(timing, "synchronize", lambda device: log.append(("wait", device)))
    monkeypatch.setattr(timing, "last_level_cache", lambda: 3 * 2**20)
    flusher = CacheFlusher(torch.device(device))
    for _ in range(2):  # the same buffers each time
        log.clear()
        with Log():
            flusher()
        assert [name for name, _ in log] == ["zero_", "wait", "amax"][-1 if flush == "read" else 0 :]
        assert log[-1][1].nbytes == 9 * 2**20
        if flush == "write+read":
            assert log[0][1].nbytes == 6 * 2**20 and log[2][1] is not log[0][1]
    assert timing.flush_method(torch.device(device)) == flush


@pytest.mark.parametrize("scale_dtype", [None, *DTYPES])
def test_records_say_which_scales(scale_dtype: str | None) -> None:
    def measured(w: Workload) -> Record:
        candidates = enumerate_candidates(w, CPU, [Strategy("grouped")], ["raw"])
        record, *_ = measure_workload(w, candidates, CEILINGS, ENV, CPU, rounds=1)
        assert record.status == "ok"
        return record

    w = workload(scale_dtype=scale_dtype)
    expected = scale_dtype or "bf16"
    scales = make_inputs(w, CPU).weight.scales
    assert scales is not None and scales.dtype == DTYPES[expected]
    record, dense = measured(w), measured(dataclasses.replace(w, format=FORMATS["bf16"]))
    assert record.scale_dtype == record.scales == expected and dense.scale_dtype is dense.scales is None


def test_records_say_how_the_caches_were_made_cold() -> None:
    candidates = [Candidate(Strategy("grouped"), "base mm")]
    (made,) = measure_workload(workload(), candidates, CEILINGS, environment(CPU), CPU, rounds=1)
    assert made.flush == "read"
    (made,) = measure_workload(workload(), candidates, CEILINGS, ENV | {"flush": "write+read"}, CPU, rounds=1)
    assert made.flush == "write+read"


def test_a_decode_on_a_cpu_rotates_over_weights_that_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    bind = Binder.bind

    def spied(self: Binder, candidate: Candidate, take: Any, *, dry: bool = False) -> Any:
        bound = bind(self, candidate, take, dry=dry)
        if not dry:
            weight = self._tensors.weight
            bound.run = lambda run=bound.run: (read.append(weight.codes.data_ptr()), run())[1]
        return bound

    monkeypatch.setattr(Binder, "bind", spied)
    w = dataclasses.replace(workload("int8_sym"), kind="decode")
    bytes_read = w.distribution.active_experts * w.n * w.k
    monkeypatch.setattr(measure, "last_level_cache", lambda: bytes_read)
    (made,) = measure_workload(w, [Candidate(Strategy("grouped"), "base+deq")], CEILINGS, ENV, CPU, rounds=2)
    assert made.flush == "rotate" and len(made.samples_ms) == 2
    checked, timed = read[:3], read[3:]
    assert len(set(checked)) == 3, "three times the cache, each set judged"
    assert timed == checked * 3, "a warm pass and two rounds, in the same order"


def test_a_sample_of_a_rotation_is_the_mean_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 9_000_000])
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(clock))
    made: list[int] = []
    run = timing.Rotation(tuple(lambda i=i: made.append(i) for i in range(3)))
    assert timing.Sampler(CPU).sample(run) == 3.0 and made == [0, 1, 2]


def test_ceilings_are_positive() -> None:
    found = measure_ceilings(CPU, torch.bfloat16)
    assert found.tflops > 0.001 and found.copy_gbps > 0.1 and found.read_gbps > 0.1
