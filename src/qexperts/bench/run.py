"""From options to workloads to records: `bench prefill`, `bench decode` and `bench layer`.

Everything that can be wrong with the options is found before anything long runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..backends import cpu_backend, triton_backend
from ..routing import Distribution, is_synthetic, parse_distribution, recorded
from ..strategies import Strategy, parse_strategy
from .candidates import LAYOUTS, NAMED, PROVIDERS, Candidate, enumerate_candidates
from .environment import environment, pick_device
from .layer import measure_layer
from .measure import measure_workload
from .records import Record, RecordWriter
from .roofline import measure_ceilings
from .workloads import DTYPES, PROJECTIONS, LayerWorkload, Workload, decode_distribution, select_formats

__all__ = ["BenchOptions", "Job", "prepare", "run"]

THRESHOLDS = (64, 128, 256, 512, 1024)
ROUNDS = {"cpu": 5}
ROUNDS_DEVICE = 20
# What a CPU measures when no size is asked for. The ratio of rows to experts, and with it the thresholds, is a
# quarter of the recorded one. A prefill has many rows to time, of every strategy; its second projection is measured if
# it takes no longer than the rest of these seconds, judged by the first.
CPU_EXPERTS, CPU_TOKENS, CPU_DIVISOR, CPU_THRESHOLDS = 64, 2048, 4, (16, 64)
CPU_PREFILL_EXPERTS, CPU_PREFILL_TOKENS, CPU_PREFILL_SECONDS = 24, 768, 75
DECODE_EXPERTS = 192
HIDDEN, INTERMEDIATE = PROJECTIONS[0]  # w_down is the first recorded projection, gate and up are each the second


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What the command line asks for; None means the default, which may depend on the device.

    Attributes:
        tokens: rows over all experts (S).
        provider: comma list; by default torch, and fused on a GPU with Triton and on a CPU with llvmlite.
        weight_layout: comma list, of the weights that fused kernels read.
        scale_dtype: of the scales; None: that of the activations.
        activation_format: "int8" adds rows of the fused kernels on activations rounded by row and group.
        threads: comma list, CPUs only: every row with each number of threads.
        peer_tries: configurations that a peer tries besides its default one; each is compiled.
        top_k: experts per token; caps synthetic distributions at tokens / top_k rows an expert, and sizes decode.
        hidden, intermediate, layers, decode_steps, batch, decode_threshold: of `LayerWorkload`.
    """

    kind: str = "prefill"
    distribution: str | None = None
    tokens: int | None = None
    experts: int | None = None
    n: int | None = None
    k: int | None = None
    group_size: int = 128
    scale_dtype: str | None = None
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
    hidden: int | None = None
    intermediate: int | None = None
    layers: int = 4
    decode_steps: int = 16
    batch: int = 8
    decode_threshold: int = 4

    @property
    def sized(self) -> bool:
        """Whether any size was asked for; if not, a CPU takes its scaled preset."""
        sizes = (self.distribution, self.tokens, self.experts, self.n, self.k, self.hidden, self.intermediate)
        return any(v is not None for v in sizes)


@dataclasses.dataclass(frozen=True)
class Job:
    """Checked options: what will be measured, where, and where it is saved.

    Attributes:
        seconds: of the preset of a CPU: workloads of further projections are left out if they would take longer.
    """

    options: BenchOptions
    device: torch.device
    workloads: Sequence[Workload | LayerWorkload]
    strategies: list[Strategy]
    apis: list[str]
    providers: list[str]
    layouts: list[str]
    rounds: int
    threads: Sequence[int | None]
    seconds: float | None
    writer: RecordWriter


def prepare(options: BenchOptions) -> Job:
    """Check every option, build the workloads, open the files. Raises ValueError or OSError, one line, naming it."""
    device = pick_device(options.device)
    if options.dtype not in DTYPES or (options.dtype == "fp32" and device.type != "cpu"):
        raise ValueError(f"--dtype {options.dtype}: expected bf16 or fp16 (fp32 on the CPU only)")
    if options.scale_dtype not in (None, *DTYPES):
        raise ValueError(f"--scale-dtype {options.scale_dtype}: expected one of {', '.join(DTYPES)}")
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
    workloads = {"prefill": _prefill, "decode": _decode, "layer": _layer}[options.kind](options, scaled)
    for workload in workloads:
        workload.check()
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: expected 0 to 2^63 - 1")
    if options.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot: needs matplotlib; install the bench extra: pip install 'qexperts[bench]'")
        Path(options.plot).mkdir(parents=True, exist_ok=True)
    threads = [None] if options.threads is None else _integers("--threads", options.threads)
    if options.threads is not None and device.type != "cpu":
        raise ValueError(f"--threads {options.threads}: for CPUs; the device is {device}")
    rounds = options.rounds or ROUNDS.get(device.type, ROUNDS_DEVICE)
    writer = RecordWriter(options.save)
    seconds = CPU_PREFILL_SECONDS if scaled and options.kind == "prefill" else None
    return Job(options, device, workloads, strategies, apis, providers, layouts, rounds, threads, seconds, writer)


def run(
    job: Job,
    tick: Callable[[Workload | LayerWorkload, int, str], None] = lambda w, i, text: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Record]:
    """Measure every workload; each record is saved before it is yielded.

    Args:
        tick: progress: workload, its index, and what happens now.
        say: what is left out, and why.
    """
    started, further = time.monotonic(), _further(job.workloads)
    if job.workloads:
        tick(job.workloads[0], 0, "measuring ceilings")
    with torch.cuda.device(job.device) if job.device.type == "cuda" else contextlib.nullcontext():
        ceilings = measure_ceilings(job.device, DTYPES[job.options.dtype])
        env = environment(job.device)
        began = time.monotonic()
        for i, workload in enumerate(job.workloads):
            if i == further and (reason := _too_long(job, i, started, began)):
                say(reason)
                break
            how = (ceilings, env, job.device, job.rounds, lambda text, w=workload, i=i: tick(w, i, text))
            if isinstance(workload, LayerWorkload):
                records = measure_layer(workload, job.layouts, *how)
            else:
                records = measure_workload(workload, _candidates(job, workload), *how)
            for record in records:
                job.writer.write([record])
                yield record


def _further(workloads: Sequence[Workload | LayerWorkload]) -> int | None:
    """The first workload of another projection than the first one's."""
    sizes = [(w.n, w.k) for w in workloads if isinstance(w, Workload)]
    return next((i for i, size in enumerate(sizes) if size != sizes[0]), None)


def _too_long(job: Job, i: int, started: float, began: float) -> str | None:
    """Why the workloads from the i-th on are left out, if they would take as long as those before them did."""
    workload, now = job.workloads[i], time.monotonic()
    would_end = now - started + now - began
    if job.seconds is None or would_end <= job.seconds or not isinstance(workload, Workload):
        return None
    sizes = f"--experts {CPU_PREFILL_EXPERTS} --tokens {CPU_PREFILL_TOKENS} --n {workload.n} --k {workload.k}"
    thresholds = ",".join(map(str, CPU_THRESHOLDS))
    return (
        f"left out: N={workload.n} K={workload.k}, which would end after {would_end:.0f} s; without sizes a CPU "
        f"takes at most {job.seconds:.0f} s. Measure it with {sizes} --thresholds {thresholds}"
    )


def _candidates(job: Job, workload: Workload) -> list[Candidate]:
    candidates = enumerate_candidates(
        workload, job.device, job.strategies, job.apis, job.providers, job.layouts,
        job.options.peer_tries, job.options.activation_format,
    )  # fmt: skip
    return [dataclasses.replace(c, threads=n) for n in job.threads for c in candidates]


def _providers(text: str | None, device: torch.device) -> list[str]:
    if text is None:
        backend = cpu_backend if device.type == "cpu" else triton_backend
        text = "torch,fused" if backend.installed() else "torch"
    return list(PROVIDERS) if text == "all" else _words("--provider", text, (*PROVIDERS, *NAMED))


def _prefill(o: BenchOptions, scaled: bool) -> list[Workload]:
    text = o.distribution or "autoround-256"
    cap = None
    if o.top_k < 1:
        raise ValueError(f"--top-k {o.top_k}: expected at least 1")
    if is_synthetic(text):
        total = recorded().total_tokens if o.tokens is None else o.tokens
        cap = -(-total // max(1, min(o.top_k, o.top_k if o.experts is None else o.experts)))
    experts, tokens = (CPU_PREFILL_EXPERTS, CPU_PREFILL_TOKENS) if scaled else (o.experts, o.tokens)
    distribution = parse_distribution(text, num_experts=experts, total_tokens=tokens, seed=o.seed, max_per_expert=cap)
    if distribution.total_tokens == 0:
        raise ValueError(f"--distribution {text}: no rows at all; there is nothing to measure")
    note = [distribution.scaled]
    if scaled:
        note.append(f"N and K divided by {CPU_DIVISOR}; the second projection where {CPU_PREFILL_SECONDS} s are enough")
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


def _layer(o: BenchOptions, scaled: bool) -> list[LayerWorkload]:
    for name in ("layers", "decode_steps", "batch", "top_k"):
        if (value := getattr(o, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if o.decode_threshold < 0:
        raise ValueError(f"--decode-threshold {o.decode_threshold}: expected rows per expert, at least 0")
    if (o.hidden is None) != (o.intermediate is None):
        raise ValueError("--hidden and --intermediate: give both, or neither for those of the recorded workload")
    hidden, intermediate = o.hidden or HIDDEN, o.intermediate or INTERMEDIATE
    experts, tokens, divided = o.experts, o.tokens, None
    if scaled:
        experts, tokens, divided = CPU_EXPERTS, CPU_TOKENS, f"H and I divided by {CPU_DIVISOR}"
        hidden, intermediate = hidden // CPU_DIVISOR, intermediate // CPU_DIVISOR
    text = o.distribution or "autoround-256"
    parse = functools.partial(parse_distribution, text, num_experts=experts, seed=o.seed)
    distribution = parse(total_tokens=tokens)
    rows, active = distribution.total_tokens, distribution.active_experts
    if rows == 0 or rows % o.top_k:
        raise ValueError(f"--top-k {o.top_k}: {rows} rows are no tokens of {o.top_k} experts each; give --tokens")
    if active < o.top_k:
        raise ValueError(f"--top-k {o.top_k}: only {active} experts have rows, and those of a token differ")
    distribution = parse(total_tokens=rows, max_per_expert=rows // o.top_k)
    note = "; ".join(filter(None, (distribution.scaled, divided))) or None
    sizes = (o.layers, o.decode_steps, o.batch, o.top_k, hidden, intermediate, o.group_size)
    return [
        LayerWorkload(distribution, *sizes, f, o.dtype, o.seed, o.decode_threshold, note, o.scale_dtype)
        for f in select_formats(o.formats, o.dtype)
    ]


def _workloads(o: BenchOptions, scaled: bool, distribution: Distribution, note: str | None) -> list[Workload]:
    if (o.n is None) != (o.k is None):
        raise ValueError("--n and --k: give both, or neither for the two projections of the recorded workload")
    sizes = [(o.n, o.k)] if o.n is not None and o.k is not None else list(PROJECTIONS)
    if scaled:
        sizes = [(n // CPU_DIVISOR, k // CPU_DIVISOR) for n, k in sizes]
    formats = select_formats(o.formats, o.dtype)
    return [
        Workload(o.kind, distribution, n, k, o.group_size, f, o.dtype, o.seed, note, o.scale_dtype)
        for n, k in sizes
        for f in formats
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
