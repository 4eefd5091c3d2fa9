"""Check, then time, every candidate of one workload; a wrong result is never timed.

Each is judged by the error rule of `qexperts.testing`. Rows on rounded activations have another error by their nature:
the same rule is applied to them against the oracle, and the peer, on equally rounded activations, so that a wrong
result is caught as it is elsewhere; the error that their records state is the one against the true oracle, x unrounded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..pages import use_huge_pages
from ..strategies import Take
from ..testing import ErrorReport, Inputs, judge
from ..workspace import Arena, clear_workspaces
from .binding import Bound, Refused, of_peer
from .candidates import Candidate
from .environment import with_threads
from .providers import Binder
from .records import Record
from .roofline import Ceilings, mandatory_bytes, reads, useful_flop
from .timing import ROTATE, Rotation, Sampler, host_ms, issue_us, last_level_cache, percentile
from .workloads import LayerWorkload, Workload, make_inputs

__all__ = ["captured", "fits", "measure_workload", "summarise", "template_of"]

T = TypeVar("T")
SCHEDULE_SAMPLES = 9
UNKNOWN_LAUNCHES = 8  # of a public call, which hides them
CACHES = 3  # that weights taking turns must exceed
MAX_SETS = 32  # of weights taking turns: smaller ones stay in the cache


@dataclasses.dataclass
class _Row:
    candidate: Candidate
    record: Record
    scratch_bytes: int = 0
    run: Callable[[], object] | None = None  # what is timed
    samples: list[float] = dataclasses.field(default_factory=list)


def measure_workload(
    workload: Workload,
    candidates: Sequence[Candidate],
    ceilings: Ceilings,
    env: dict[str, str | None],
    device: torch.device,
    rounds: int,
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[Record]:
    """Yield a record per candidate, in order. If interrupted, those with samples are yielded before it goes on."""
    tick("preparing weights")
    threads = torch.get_num_threads()
    tensors = make_inputs(workload, device)
    sets = _WeightSets(workload, tensors)
    template = dataclasses.replace(_template(workload, tensors, ceilings, env), rounds=rounds)
    if sets.rotate:
        template.flush = ROTATE
    rows = [_Row(c, _describe(template, c)) for c in candidates]
    space = _SharedScratch(device, [_need(row, sets.binders[0]) for row in rows])
    gate = _Gate(tensors)
    sampler = Sampler(device)
    for row in rows:
        tick(f"checking {row.record.provider} {row.record.strategy}")
        if row.record.status == "ok":
            try:
                _use_threads(row.candidate.threads or threads)
                with of_peer(row.candidate.provider):
                    _prepare(row, sets, gate, space, sampler)
            except (torch.OutOfMemoryError, Refused) as error:
                row.record.status, row.record.reason = "unsupported", str(error).splitlines()[0]
    timed = [row for row in rows if row.run is not None]
    reading = _Reading(sets.rotate)
    used = [row.candidate.threads for row in timed] + [None] * len(reading.ways)
    try:
        sampler.rounds(
            [*(row.run for row in timed if row.run is not None), *reading.ways],
            rounds,
            [*(row.samples for row in timed), *reading.samples],
            lambda: tick("timing"),
            [functools.partial(_use_threads, n or threads) for n in used],
        )
    finally:
        _use_threads(threads)
        for row in rows:
            if row.samples:
                summarise(row.record, row.samples)
                row.record.ceiling_read_gbps = reading.gbps or row.record.ceiling_read_gbps
            if row.samples or row.record.status != "ok":
                yield row.record


class _WeightSets:
    """Binders of one workload on weights of their own. A decode on a CPU rotates over as many as it takes that none is
    in the cache when its turn comes; all else has one, and makes the cache cold."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        self._workload, self._tensors = workload, tensors
        self.rotate = workload.kind == "decode" and tensors.x.device.type == "cpu"
        self.binders = [Binder(workload, tensors)]

    def of(self, candidate: Candidate) -> list[Binder]:
        """As many as a candidate rotates over, by the bytes that it reads."""
        count = self._count(candidate) if self.rotate else 1
        while len(self.binders) < count:
            t = self._tensors
            copied = t.weight.with_tensors(*(part.clone() for part in t.weight.tensors))
            use_huge_pages(*copied.tensors)  # as those that `quantize` returns
            self.binders.append(Binder(self._workload, dataclasses.replace(t, weight=copied)))
        return self.binders[:count]

    def _count(self, candidate: Candidate) -> int:
        w = self._workload
        bits = 16 if candidate.scope == "base mm" else w.format.bits
        read = max(1, w.distribution.active_experts * w.n * w.k * bits // 8)
        return min(max(2, -(-CACHES * last_level_cache() // read)), MAX_SETS)


class _Reading:
    """What reading alone reaches in the rounds of a decode on a CPU, whose memory others share: it may be a third more
    or less a minute later. From huge pages, as the kernels read, and a slice at a time, as a decode is a call."""

    def __init__(self, used: bool) -> None:
        self.ways: list[Rotation] = []
        if used:
            slices = torch.zeros(CACHES + 1, last_level_cache(), dtype=torch.uint8)
            use_huge_pages(slices)
            self._bytes = slices.shape[1]
            self.ways = [Rotation(way) for way in zip(*(reads(part) for part in slices), strict=True)]
        self.samples: list[list[float]] = [[] for _ in self.ways]

    @property
    def gbps(self) -> float | None:
        """Of the fastest way by its median; None without samples."""
        medians = [percentile(samples, 50) for samples in self.samples if samples]
        return self._bytes / min(medians) / 1e6 if medians else None


def _use_threads(n: int) -> None:
    if n != torch.get_num_threads():
        torch.set_num_threads(n)


class _Gate:
    """Judges results of a workload, each by the activations it is computed from."""

    def __init__(self, tensors: Inputs) -> None:
        self._t = tensors
        self._rounded: dict[str, Inputs] = {}

    def judge(self, y: torch.Tensor, activation_format: str | None) -> ErrorReport:
        t = self._t
        report = judge(y, t.oracle, t.peer, t.x.shape[1])
        if activation_format is None:
            return report
        if activation_format not in self._rounded:
            self._rounded[activation_format] = t.with_activations(activation_format)
        rounded = self._rounded[activation_format]
        verdict = judge(y, rounded.oracle, rounded.peer, t.x.shape[1])
        return dataclasses.replace(verdict, error=report.error, error_peer=report.error_peer)


class _SharedScratch:
    """One buffer for all candidates of a workload: each run writes what it reads, so they can take turns in it."""

    def __init__(self, device: torch.device, needs: Sequence[int]) -> None:
        self._buffer = torch.empty(max(needs, default=0), dtype=torch.uint8, device=device)

    def take(self) -> Take:
        """A fresh allocator over the whole buffer."""
        return Arena.over(self._buffer).take

    def poison(self) -> None:
        """Fill with NaN (every byte 0xff is one in fp16, bf16 and fp32), so that an unwritten result shows."""
        self._buffer.fill_(255)


def _need(row: _Row, binder: Binder) -> int:
    """Scratch bytes of a row, found by binding it to memory that does not exist; settles rows that cannot run."""
    record, candidate = row.record, row.candidate
    record.reason = binder.refuse(candidate)
    if record.reason is None and candidate.api != "wrapper":
        counter = Arena(torch.device("meta"), None)
        binder.bind(candidate, counter.take, dry=True)
        row.scratch_bytes = counter.used
        if not fits(counter.used, binder.device):
            record.reason = f"needs {counter.used / 2**30:.1f} GiB of scratch memory, more than is free"
    if record.reason is None:
        return row.scratch_bytes
    record.status = "unsupported"
    return 0


def template_of(
    w: Workload | LayerWorkload, n: int, k: int, group_size: int | None, ceilings: Ceilings, env: dict[str, str | None]
) -> Record:
    """What all records of a workload share: the workload, the ceilings and the machine."""
    d = w.distribution
    return Record(
        kind=w.kind,
        distribution=d.name,
        scaled=w.scaled,
        num_experts=d.num_experts,
        active_experts=d.active_experts,
        total_tokens=d.total_tokens,
        max_tokens=d.max_tokens,
        num_tokens_per_expert=list(d.counts),
        n=n,
        k=k,
        group_size=group_size,
        scale_dtype=(w.scale_dtype or w.dtype) if w.format.quantized else None,
        format=w.format.name,
        dtype=w.dtype,
        seed=w.seed,
        batch=w.batch,
        top_k=w.top_k,
        provider="",
        strategy="",
        threshold=None,
        scope="",
        gather=None,
        graph=False,
        api="",
        weight_layout="",
        ceiling_tflops=ceilings.tflops,
        ceiling_copy_gbps=ceilings.copy_gbps,
        ceiling_read_gbps=ceilings.read_gbps,
        **env,  # type: ignore[arg-type]
    )


def _template(workload: Workload, t: Inputs, ceilings: Ceilings, env: dict[str, str | None]) -> Record:
    d, n, k = workload.distribution, workload.n, workload.k
    return dataclasses.replace(
        template_of(workload, n, k, t.weight.group_size, ceilings, env),
        flop=useful_flop(d.total_tokens, n, k),
        mandatory_bytes=mandatory_bytes(t.weight, d.active_experts, d.total_tokens, workload.torch_dtype),
    )


def _describe(template: Record, c: Candidate) -> Record:
    return dataclasses.replace(
        template,
        provider=c.provider,
        strategy="auto" if c.strategy is None else c.strategy.name,
        threshold=None if c.strategy is None else c.strategy.threshold,
        scope=c.scope,
        gather=c.gather,
        graph=c.graph,
        api=c.api,
        weight_layout=c.layout,
        phase=c.phase,
        activation_format=c.activation_format,
        threads=c.threads,
        device=template.device if c.threads is None else with_threads(template.device, c.threads),
        samples_ms=[],
    )


def _prepare(row: _Row, sets: _WeightSets, gate: _Gate, space: _SharedScratch, sampler: Sampler) -> None:
    """Bind, count, run once on poisoned memory, judge; capture, if the candidate asks for a graph; time what is apart:
    planning, the schedule kernel, the host. Where weights rotate, each set is judged."""
    record, candidate = row.record, row.candidate
    binder, *others = sets.of(candidate)
    device, bound = binder.device, binder.bind(candidate, space.take())
    _count(record, bound)
    verdict = functools.partial(gate.judge, activation_format=candidate.activation_format)
    report, transient = _check(bound, verdict, space, device)
    record.error, record.error_peer = report.error, report.error_peer
    if transient is not None:
        record.peak_bytes = row.scratch_bytes + bound.own_bytes + transient
    if report.ok:
        _time_parts(record, bound, binder.plan(candidate), sampler, device)
    if report.ok and candidate.graph:
        bound = dataclasses.replace(bound, run=captured(bound.run, device))
        report, _ = _check(bound, verdict, space, device)
    calls = [bound.run]
    for other in others if report.ok else ():
        bound = other.bind(candidate, space.take())
        report, _ = _check(bound, verdict, space, device)
        calls.append(bound.run)
        if not report.ok:
            break
    if report.ok:
        row.run = Rotation(tuple(calls)) if sets.rotate else calls[0]
    else:
        record.status, record.reason = "WRONG", report.message


def _count(record: Record, bound: Bound) -> None:
    record.padded_rows, record.config = bound.padded_rows, bound.config
    if bound.counts:
        record.launches = bound.counts["gemm"]
        record.schedule_launches = bound.counts["schedule"]
        record.dequant_launches = bound.counts["dequant"]
        record.gather_launches = bound.counts["gather"]
        record.pad_launches = bound.counts["pad"]
        record.scatter_launches = bound.counts["scatter"]


def _time_parts(
    record: Record, bound: Bound, plan: Callable[[], object] | None, sampler: Sampler, device: torch.device
) -> None:
    """Host planning; on a GPU the schedule kernel (replayed, so that the host is not in it) and the issuing host."""
    if plan is not None:
        record.plan_ms = host_ms(plan, device)
    if device.type != "cuda":
        return
    if bound.schedule is not None:
        replay = captured(bound.schedule, device)
        replay()
        record.schedule_ms = percentile([sampler.sample(replay) for _ in range(SCHEDULE_SAMPLES)], 50)
    if not record.graph:
        record.host_us = issue_us(bound.run, device, sum(bound.counts.values()) or UNKNOWN_LAUNCHES)


def _check(
    bound: Bound, verdict: Callable[[torch.Tensor], ErrorReport], space: _SharedScratch, device: torch.device
) -> tuple[ErrorReport, int | None]:
    """Run on poisoned scratch and judge; also the device memory the run took beyond it, where torch keeps count."""
    space.poison()
    if not bound.uses_scratch:
        clear_workspaces()  # so that what the call keeps between calls is counted, whoever ran before
    if device.type != "cuda":
        return verdict(bound.run()), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    y = bound.run()
    torch.cuda.synchronize(device)
    transient = torch.cuda.max_memory_allocated(device) - before
    return verdict(y), transient


def captured(run: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """The same call as a replay of a CUDA graph.

    The graph holds addresses, not tensors: the replay keeps the call, and with it the plan and the views, alive.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        y = run()

    def replay() -> T:
        graph.replay()
        return y

    return functools.partial(_keeping, run, replay)


def _keeping(kept: object, run: Callable[[], T]) -> T:
    """Run while holding on to what the run needs but does not name."""
    return run()


def fits(need: int, device: torch.device) -> bool:
    """Whether scratch memory of this size can be had; unknown counts as yes."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return need < 0.9 * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return True
    available = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    return not available or need < 0.9 * int(available[0]) * 1024


def summarise(record: Record, samples: list[float]) -> None:
    record.samples_ms = [round(s, 6) for s in samples]
    record.median_ms = percentile(samples, 50)
    record.p20_ms = percentile(samples, 20)
    record.p80_ms = percentile(samples, 80)
