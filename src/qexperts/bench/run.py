"""From options to workloads to records: `bench prefill` and `bench decode`.

Everything that can be wrong with the options is found before anything long runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..backends import cpu_backend, triton_backend
from ..routing import Distribution, is_synthetic, parse_distribution, recorded
from ..strategies import Strategy, parse_strategy
from .candidates import LAYOUTS, PROVIDERS, enumerate_candidates
from .environment import environment, pick_device
from .measure import measure_workload
from .records import Record, RecordWriter
from .roofline import measure_ceilings
from .workloads import DTYPES, PROJECTIONS, Workload, decode_distribution, select_formats

__all__ = ["BenchOptions", "Job", "prepare", "run"]

THRESHOLDS = (64, 128, 256, 512, 1024)
ROUNDS = {"cpu": 5}
ROUNDS_DEVICE = 20
# What a CPU measures when no size is asked for. The ratio of rows to experts, and with it the thresholds, is a
# quarter of the recorded one.
CPU_EXPERTS, CPU_TOKENS, CPU_DIVISOR, CPU_THRESHOLDS = 64, 2048, 4, (16, 64)
DECODE_EXPERTS = 192


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What the command line asks for; None means the default, which may depend on the device.

    Attributes:
        tokens: rows over all experts (S).
        provider: comma list; by default torch, and fused on a GPU with Triton and on a CPU with Numba.
        weight_layout: comma list, of the weights that fused kernels read.
        activation_format: "int8" adds rows of the fused kernels on activations rounded by row and group.
        threads: comma list, CPUs only: every row with each number of threads.
        peer_tries: configurations that a peer tries besides its default one; each is compiled.
        top_k: experts per token; caps synthetic distributions at tokens / top_k rows an expert, and sizes decode.
    """

    kind: str = "prefill"
    distribution: str | None = None
    tokens: int | None = None
    experts: int | None = None
    n: int | None = None
    k: int | None = None
    group_size: int = 128
    formats: str = "all"
    strategies: str = "all"
    thresholds: str | None = None
    provider: str | None = None
    weight_layout: str = "prepared"
    activation_format: str | None = None
    threads: str | None = None
    peer_tries: int = 4
    mode: str = "summary"
    api: str = "raw"
    device: str | None = None
    dtype: str = "bf16"
    save: str | None = None
    plot: str | None = None
    seed: int = 0
    rounds: int | None = None
    top_k: int = 8
    batch_sizes: str = "1,8,32"

    @property
    def sized(self) -> bool:
        """Whether any size was asked for; if not, a CPU takes its scaled preset."""
        return any(v is not None for v in (self.distribution, self.tokens, self.experts, self.n, self.k))


@dataclasses.dataclass(frozen=True)
class Job:
    """Checked options: what will be measured, where, and where it is saved."""

    options: BenchOptions
    device: torch.device
    workloads: list[Workload]
    strategies: list[Strategy]
    apis: list[str]
    providers: list[str]
    layouts: list[str]
    rounds: int
    threads: Sequence[int | None]
    writer: RecordWriter


def prepare(options: BenchOptions) -> Job:
    """Check every option, build the workloads, open the files. Raises ValueError or OSError, one line, naming it."""
    device = pick_device(options.device)
    if options.dtype not in DTYPES or (options.dtype == "fp32" and device.type != "cpu"):
        raise ValueError(f"--dtype {options.dtype}: expected bf16 or fp16 (fp32 on the CPU only)")
    if options.peer_tries < 0:
        raise ValueError(f"--peer-tries {options.peer_tries}: expected at least 0")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: expected at least 1")
    if options.activation_format not in (None, "int8"):
        raise ValueError(f"--activation-format {options.activation_format}: expected int8")
    apis = _words("--api", options.api, ("raw", "wrapper"))
    providers = _providers(options.provider, device)
    layouts = _words("--weight-layout", options.weight_layout, LAYOUTS)
    scaled = device.type == "cpu" and not options.sized
    strategies = _strategies(options, scaled)
    workloads = (_prefill if options.kind == "prefill" else _decode)(options, scaled)
    for workload in workloads:
        workload.check()
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: expected 0 to 2^63 - 1")
    if options.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot: needs matplotlib; install the bench extra: pip install 'qexperts[bench]'")
        Path(options.plot).mkdir(parents=True, exist_ok=True)
    if options.threads is not None and device.type != "cpu":
        raise ValueError(f"--threads {options.threads}: for CPUs; the device is {device}")
    threads = [None] if options.threads is None else _integers("--threads", options.threads)
    rounds = options.rounds or ROUNDS.get(device.type, ROUNDS_DEVICE)
    writer = RecordWriter(options.save)
    return Job(options, device, workloads, strategies, apis, providers, layouts, rounds, threads, writer)


def run(job: Job, tick: Callable[[Workload, int, str], None] = lambda w, i, text: None) -> Iterator[Record]:
    """Measure every workload; each record is saved before it is yielded.

    Args:
        tick: progress: workload, its index, and what happens now.
    """
    if job.workloads:
        tick(job.workloads[0], 0, "measuring ceilings")
    with torch.cuda.device(job.device) if job.device.type == "cuda" else contextlib.nullcontext():
        ceilings = measure_ceilings(job.device, DTYPES[job.options.dtype])
        env = environment(job.device)
        for i, workload in enumerate(job.workloads):
            candidates = enumerate_candidates(
                workload, job.device, job.strategies, job.apis, job.providers, job.layouts,
                job.options.peer_tries, job.options.activation_format,
            )  # fmt: skip
            by_threads = [dataclasses.replace(c, threads=n) for n in job.threads for c in candidates]
            for record in measure_workload(
                workload, by_threads, ceilings, env, job.device, job.rounds,
                lambda text, w=workload, i=i: tick(w, i, text),
            ):  # fmt: skip
                job.writer.write([record])
                yield record


def _providers(text: str | None, device: torch.device) -> list[str]:
    if text is None:
        backend = cpu_backend if device.type == "cpu" else triton_backend
        text = "torch,fused" if backend.installed() else "torch"
    return list(PROVIDERS) if text == "all" else _words("--provider", text, PROVIDERS)


def _prefill(o: BenchOptions, scaled: bool) -> list[Workload]:
    text = o.distribution or "autoround-256"
    cap = None
    if o.top_k < 1:
        raise ValueError(f"--top-k {o.top_k}: expected at least 1")
    if is_synthetic(text):
        total = recorded().total_tokens if o.tokens is None else o.tokens
        cap = -(-total // max(1, min(o.top_k, o.top_k if o.experts is None else o.experts)))
    experts, tokens = (CPU_EXPERTS, CPU_TOKENS) if scaled else (o.experts, o.tokens)
    distribution = parse_distribution(text, num_experts=experts, total_tokens=tokens, seed=o.seed, max_per_expert=cap)
    if distribution.total_tokens == 0:
        raise ValueError(f"--distribution {text}: no rows at all; there is nothing to measure")
    note = [distribution.scaled, f"N and K divided by {CPU_DIVISOR}" if scaled else None]
    return _workloads(o, scaled, distribution, "; ".join(filter(None, note)) or None)


def _decode(o: BenchOptions, scaled: bool) -> list[Workload]:
    if o.distribution is not None or o.tokens is not None:
        raise ValueError("bench decode: rows come from --batch-sizes and --top-k, not from a distribution")
    experts = o.experts
    if experts is None:
        experts = CPU_EXPERTS if scaled else DECODE_EXPERTS
    if not 1 <= o.top_k <= experts:
        raise ValueError(f"--top-k {o.top_k}: expected 1 to {experts}, the number of experts")
    note = f"{CPU_EXPERTS} experts instead of {DECODE_EXPERTS}; N and K divided by {CPU_DIVISOR}" if scaled else None
    found = []
    for batch in _integers("--batch-sizes", o.batch_sizes):
        distribution = decode_distribution(batch, o.top_k, experts, o.seed)
        found += [dataclasses.replace(w, batch=batch, top_k=o.top_k) for w in _workloads(o, scaled, distribution, note)]
    return found


def _workloads(o: BenchOptions, scaled: bool, distribution: Distribution, note: str | None) -> list[Workload]:
    if (o.n is None) != (o.k is None):
        raise ValueError("--n and --k: give both, or neither for the two projections of the recorded workload")
    sizes = [(o.n, o.k)] if o.n is not None and o.k is not None else list(PROJECTIONS)
    if scaled:
        sizes = [(n // CPU_DIVISOR, k // CPU_DIVISOR) for n, k in sizes]
    formats = select_formats(o.formats, o.dtype)
    return [
        Workload(o.kind, distribution, n, k, o.group_size, f, o.dtype, o.seed, note) for n, k in sizes for f in formats
    ]


def _strategies(o: BenchOptions, scaled: bool) -> list[Strategy]:
    default = CPU_THRESHOLDS if scaled else THRESHOLDS
    thresholds = default if o.thresholds is None else _integers("--thresholds", o.thresholds)
    names = o.strategies
    if names == "all":
        names = "per_expert,pad_and_clip,full_pad,grouped" if o.kind == "prefill" else "per_expert,grouped"
    try:
        found = [s for name in names.split(",") for s in parse_strategy(name, thresholds)]
    except ValueError as error:
        raise ValueError(f"--strategies {o.strategies}: {error}") from None
    return list(dict.fromkeys(found))


def _integers(option: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ValueError(f"{option} {text}: expected a comma list of positive integers")
    return list(dict.fromkeys(values))


def _words(option: str, text: str, known: Sequence[str]) -> list[str]:
    words = [part.strip() for part in text.split(",")]
    if not set(words) <= set(known):
        raise ValueError(f"{option} {text}: expected a comma list of {', '.join(known)}")
    return list(dict.fromkeys(words))
