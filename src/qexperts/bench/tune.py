"""`qexperts tune`: choices that are faster on this machine than the rules, found by measuring.

    triton          tile sizes of a prefill and of a decode: from those of the rules one size at a time is changed, then
                    one of the fastest, until nothing is faster
    triton, hopper  where decode and prefill part, if a call does not say: each threshold that changes the call
    torch on CPUs   the strategy, of those with the same bits

All of a step are checked and timed in the same interleaved rounds, the rules among them. What is kept is faster than
the rules by `MARGIN` at the lower end of the 90% interval of the ratios round by round. Tile sizes and strategies have
the same bits besides; a threshold chooses between two kernels, and the result is that of the one that runs. It is
looked up by the number of rows alone, so it must not be slower either where as many are spread otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import tuning
from ..backends import BACKENDS, Problem, select, torch_backend, triton_backend
from ..files import unwritable
from ..formats import QuantWeight
from ..ops import prepare as prepare_weight
from ..routing import parse_distribution, recorded
from ..strategies import Strategy
from ..testing import Inputs
from .candidates import Candidate
from .columns import least_ratio, ms_text, ratio_text, time_of
from .environment import environment
from .fused import GPU_BACKENDS
from .measure import measure_workload
from .providers import Binder, torch_empty
from .records import Record
from .roofline import measure_ceilings
from .run import BenchOptions, Job, prepare
from .workloads import DTYPES, Workload, make_inputs

__all__ = ["Found", "Subject", "TuneJob", "TuneOptions", "prepare_tune", "search", "subjects", "tune", "tune_session"]

MARGIN = 1.02
STEPS = 4


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """What the command line asks for; what it shares with `BenchOptions` is as there.

    Attributes:
        phases: comma list.
        tokens: comma list, of rows over all experts.
        backend: "auto", or a name.
        save: the table that what is found goes into; None: the user's own.
    """

    phases: str = "prefill,decode,auto"
    formats: str = "int4_sym"
    n: int | None = None
    k: int | None = None
    group_size: int = 128
    experts: int | None = None
    distribution: str | None = None
    tokens: str | None = None
    batch_sizes: str = "1,8,32"
    top_k: int = 8
    backend: str = "auto"
    weight_layout: str = "prepared"
    device: str | None = None
    dtype: str = "bf16"
    rounds: int | None = None
    save: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TuneJob:
    """Checked options: what is searched, and the table that it goes into."""

    options: TuneOptions
    jobs: Sequence[Job]
    phases: Sequence[str]
    path: Path
    key: tuple[str, str]

    @property
    def device(self) -> torch.device:
        return self.jobs[0].device


@dataclasses.dataclass(frozen=True)
class Subject:
    """What there is to choose for one case.

    Attributes:
        rules: what is run with by default; None: nothing can be chosen, and `reason` says why.
        tried: from a choice, those to try next.
        candidate: a choice as a row to measure.
        same_bits: whether what is kept must have the bits of the rules.
        elsewhere: where what is kept must not be slower; None: nowhere.
    """

    case: tuning.Case
    rules: Any = None
    tried: Callable[[Any], list[Any]] = lambda choice: []
    candidate: Callable[[Any], Candidate] | None = None
    same_bits: bool = True
    elsewhere: Workload | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome of one search.

    Attributes:
        rules, best: choices; best is rules where nothing is faster.
        before, after: their records, of the same rounds; None if they were not timed.
        wrong: what was tried and failed the error rule, with the reason.
        reason: why best is not kept, or why nothing was timed; None if it is.
    """

    rules: Any
    best: Any
    before: Record | None = None
    after: Record | None = None
    wrong: Sequence[str] = ()
    reason: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What an entry says: where what is kept differs from the rules."""
        if self.reason is not None:
            return {}
        fields = (f.name for f in dataclasses.fields(self.rules))
        return {name: v for name in fields if (v := getattr(self.best, name)) != getattr(self.rules, name)}


def search(
    rules: Any,
    neighbours: Callable[[Any], list[Any]],
    measure: Callable[[list[Any]], list[Record]],
    same_bits: Callable[[Any, Any], bool],
) -> Found:
    """The fastest choice that can be reached from the rules, one change at a time.

    Args:
        measure: a record for each choice, of the same rounds.
        same_bits: whether two choices give the same result.
    """
    best, seen = rules, {rules}
    before: Record | None = None
    after: Record | None = None
    wrong: list[str] = []
    for _ in range(STEPS):
        tried = [c for c in neighbours(best) if c not in seen]
        if not tried and before is None:
            return Found(rules, rules, reason="no other choice changes this call")
        seen.update(tried)
        configs = list(dict.fromkeys([rules, best, *tried]))
        records = dict(zip(configs, measure(configs), strict=True))
        wrong += [f"{c!r}: {r.reason}" for c, r in records.items() if r.status == "WRONG"]
        times = {c: ms for c, r in records.items() if (ms := time_of(r)) is not None}
        if rules not in times:
            return Found(rules, rules, wrong=wrong, reason=records[rules].reason or "not timed")
        fastest = min(times, key=lambda c: times[c])
        before, after, stays = records[rules], records[fastest], fastest == best
        best = fastest
        if stays:
            break
    reason = None
    if best == rules:
        reason = "the rules are the fastest"
    elif (least := least_ratio(before, after)) is None or least < MARGIN:
        reason = f"not {ratio_text(MARGIN)} as fast for certain" + ("" if least else ": too few rounds")
    elif not same_bits(rules, best):
        reason = "other bits than by the rules"
    return Found(rules, best, before, after, wrong, reason)


def prepare_tune(options: TuneOptions) -> TuneJob:
    """Check every option. Raises ValueError, one line, naming it."""
    phases = [part.strip() for part in options.phases.split(",")]
    if not set(phases) <= set(tuning.PHASES):
        raise ValueError(f"--phases {options.phases}: expected a comma list of {', '.join(tuning.PHASES)}")
    if options.backend not in ("auto", *BACKENDS):
        raise ValueError(f"--backend {options.backend}: expected auto or one of {', '.join(BACKENDS)}")
    shared = dataclasses.asdict(options)
    for name in ("phases", "tokens", "distribution", "batch_sizes", "backend", "save"):
        del shared[name]
    jobs = []
    if phases != ["decode"]:
        for tokens in _tokens(options.tokens):
            jobs.append(prepare(BenchOptions("prefill", tokens=tokens, distribution=options.distribution, **shared)))
    if phases != ["prefill"]:
        jobs.append(prepare(BenchOptions("decode", batch_sizes=options.batch_sizes, **shared)))
    _check_cases(jobs, "auto" in phases)
    device = jobs[0].device
    key, own = tuning.key_of(device), tuning.own_path(device)
    if key is None or own is None:
        raise ValueError(f"tune: nothing is tuned on {device}: Triton is not installed")
    path = own if options.save is None else Path(options.save)
    if options.save is not None and path.exists() and (reason := tuning.read(path, key).unused):
        raise ValueError(f"--save {path}: {reason}; give another file")
    _check_writable(path)
    return TuneJob(options, jobs, phases, path, key)


def _check_writable(path: Path) -> None:
    """ValueError now rather than after measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason: str | None = error.strerror
    else:
        reason = unwritable(path.parent)
    if reason is not None:
        raise ValueError(f"tune: {path} cannot be written ({reason}); give a file that can with --save")


def _tokens(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--tokens {text}: expected a comma list of integers")
    return [int(part) for part in text.split(",")]


def _check_cases(jobs: Sequence[Job], auto: bool) -> None:
    """ValueError if two workloads would be looked up alike: only what was found last could be kept."""
    seen: dict[tuple[object, ...], Workload] = {}
    for workload in (w for job in jobs for w in job.workloads):
        assert isinstance(workload, Workload)
        d, rows = workload.distribution, tuning.bucket(workload.distribution.total_tokens)
        case = (workload.format.name, workload.n, workload.k, d.num_experts, rows, None if auto else workload.kind)
        if (other := seen.setdefault(case, workload)) is not workload:
            raise ValueError(
                f"tune: {other.title} of {other.distribution.total_tokens:,} rows and {workload.title} of "
                f"{d.total_tokens:,} are looked up alike, as up to {rows:,}; leave one out of --tokens or --batch-sizes"
            )


def subjects(
    workload: Workload, tensors: Inputs, weight: QuantWeight, phases: Sequence[str], options: TuneOptions
) -> list[Subject]:
    """What can be chosen for calls like this workload, its own phase and "auto", by the backend that runs them."""
    found: dict[tuning.Case, Subject] = {}
    for phase in (workload.kind, "auto"):
        if phase in phases:
            problem = Problem.of("tune", tensors.x, weight, phase=phase)
            name = select(problem, options.backend).name
            one = (_on_gpu if name in GPU_BACKENDS else _on_host)(name, problem, workload, tensors, weight)
            elsewhere = None if one.same_bits else _spread_otherwise(workload, options.distribution)
            found[one.case] = dataclasses.replace(one, elsewhere=elsewhere)
    return list(found.values())


def _spread_otherwise(w: Workload, distribution: str | None) -> Workload:
    """As many rows, in a prefill evenly, in a decode as in the prefills."""
    d, text = w.distribution, "even" if w.kind == "prefill" else distribution or recorded().name
    sizes = {"num_experts": d.num_experts, "total_tokens": d.total_tokens, "seed": w.seed, "max_per_expert": w.batch}
    return dataclasses.replace(w, distribution=parse_distribution(text, **sizes))


def _on_gpu(name: str, problem: Problem, workload: Workload, t: Inputs, weight: QuantWeight) -> Subject:
    from ..kernels.config import case_of, valid
    from ..kernels.operand import operand

    w, device, phase = operand(weight), t.x.device, problem.phase
    case = case_of(name, phase, w, t.x.dtype, weight.E, t.x.shape[0])
    graph, layout = device.type == "cuda", "public" if weight.weight_layout == "public" else "prepared"
    if phase == "auto":
        make = functools.partial(Candidate, None, "fused", None, graph, "raw", name, layout, phase)
        tried = functools.partial(_crossovers, workload)
        return Subject(case, triton_backend.Crossover(), tried, lambda c: make(config=c), same_bits=False)
    if name == "hopper":
        return Subject(case, reason="backend hopper runs it, whose sizes are fixed")
    make = functools.partial(Candidate, Strategy("grouped"), "fused", None, graph, "raw", name, layout, phase)
    tried = functools.partial(tuning.neighbours, check=functools.partial(valid, nvidia=triton_backend.nvidia(device)))
    return Subject(case, triton_backend.rules_of(phase, w, t.x, device, weight.E), tried, lambda c: make(config=c))


def _crossovers(workload: Workload, choice: triton_backend.Crossover) -> list[triton_backend.Crossover]:
    """Of the thresholds by which this workload runs alike, the one nearest to that of the rules."""
    d = workload.distribution

    def how(threshold: int) -> str | bool:
        if d.total_tokens <= threshold:
            return "decode"
        return "prefill" if d.total_tokens > threshold * d.num_experts else d.max_tokens <= threshold

    found = {how(choice.decode_threshold): choice}
    for c in sorted(tuning.neighbours(choice), key=lambda c: abs(c.decode_threshold - tuning.DECODE_THRESHOLD)):
        found.setdefault(how(c.decode_threshold), c)
    return [c for c in found.values() if c != choice]


def _on_host(name: str, problem: Problem, workload: Workload, t: Inputs, weight: QuantWeight) -> Subject:
    case = dataclasses.replace(torch_backend.case_of(problem), backend=name)
    if name == "cpu":
        return Subject(case, reason="backend cpu runs it, in one way")
    if t.x.device.type != "cpu":
        return Subject(case, reason="backend torch runs it, and other strategies need the counts on the host")
    scope = "base+deq" if workload.format.quantized else "base mm"
    make = functools.partial(Candidate, scope=scope, api="wrapper")
    return Subject(case, torch_backend.CpuWay(), tuning.neighbours, lambda c: make(Strategy(c.strategy)))


def tune(job: TuneJob, tick: Callable[[str], None] = lambda text: None) -> Iterator[tuple[tuning.Case, Found]]:
    """Search for each workload and layout; what is found is in the table before it is yielded."""
    device = job.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        ceilings, env = measure_ceilings(device, DTYPES[job.options.dtype]), environment(device)
        for bench in job.jobs:
            how, done = (ceilings, env, device, bench.rounds), set()
            for workload in bench.workloads:
                assert isinstance(workload, Workload)
                tensors = make_inputs(workload, device)
                for layout in bench.layouts:
                    weight = tensors.weight
                    if layout == "prepared":
                        weight = prepare_weight(weight, job.options.backend, keep_source=True)
                    for subject in subjects(workload, tensors, weight, job.phases, job.options):
                        if subject.case not in done:  # what has no layout of its own stays public
                            done.add(subject.case)
                            yield subject.case, _tune_one(subject, workload, tensors, job, how, tick)


def _tune_one(
    subject: Subject,
    workload: Workload,
    tensors: Inputs,
    job: TuneJob,
    how: tuple[Any, ...],
    tick: Callable[[str], None],
) -> Found:
    candidate = subject.candidate
    if candidate is None:
        return Found(None, None, reason=subject.reason)
    binder = Binder(workload, tensors)

    def measure(choices: list[Any], where: Workload = workload) -> list[Record]:
        tick(f"{subject.case} {subject.case.layout}, {where.distribution.name}: {len(choices)} choices")
        return list(measure_workload(where, [candidate(c) for c in choices], *how))

    def same_bits(a: Any, b: Any) -> bool:
        first, second = (binder.bind(candidate(c), torch_empty(job.device)).run().clone() for c in (a, b))
        return torch.equal(first, second)

    found = search(subject.rules, subject.tried, measure, same_bits if subject.same_bits else lambda a, b: True)
    if found.config and subject.elsewhere is not None:
        found = _unless_slower(found, measure([found.rules, found.best], subject.elsewhere), subject.elsewhere)
    if found.after is not None:
        _keep(subject.case, found, job)
    return found


def _unless_slower(found: Found, records: Sequence[Record], elsewhere: Workload) -> Found:
    """What was found, but not kept if there it may take longer than the rules by more than `MARGIN`."""
    wrong = [
        f"{c!r}: {r.reason}" for c, r in zip((found.rules, found.best), records, strict=True) if r.status == "WRONG"
    ]
    least, where = least_ratio(*records), elsewhere.distribution.name
    if least is not None and least * MARGIN >= 1:
        return found
    reason = f"slower with rows as in {where}" + (f", {ratio_text(least)}" if least else "")
    return dataclasses.replace(found, reason=reason, wrong=[*found.wrong, *wrong])


def _keep(case: tuning.Case, found: Found, job: TuneJob) -> None:
    """Into the table, in the place of what it says of this case."""
    assert found.before is not None and found.after is not None
    least = least_ratio(found.before, found.after)
    facts = {
        "rules_ms": found.before.median_ms, "ms": found.after.median_ms if found.config else found.before.median_ms,
        "at_least": least if found.config else None, "rounds": found.before.rounds,
        "distribution": found.before.distribution, "torch": found.before.torch, "qexperts": found.before.qexperts,
        "commit": found.before.commit, "command": found.before.command, "time": found.before.time,
    }  # fmt: skip
    entries = {entry.case: entry for entry in tuning.read(job.path).entries} if job.path.exists() else {}
    if least is None and found.best != found.rules and case in entries:
        return  # too few rounds to say something else
    entries[case] = tuning.Entry(case, repr(found.rules), found.config, facts)
    tuning.write(job.path, job.key, entries.values())
    tuning.forget()


def tune_session(options: TuneOptions, console: Console) -> int:
    """Search, print what was found and where it is kept. Returns the exit code: 0, 1 if a result was WRONG, 130 if
    interrupted."""
    job, progress = prepare_tune(options), Console(stderr=True)
    rows: list[tuple[tuning.Case, Found]] = []
    code = 0
    try:
        for row in tune(job, lambda text: progress.print(text, highlight=False, markup=False)):
            rows.append(row)
    except KeyboardInterrupt:
        code = 130
    console.print(table(rows, job.key))
    for _, found in rows:
        for text in found.wrong:
            console.print(f"WRONG: {text}", style="red", highlight=False, soft_wrap=True)
    kept = sum(bool(found.config) for _, found in rows)
    use = "new processes read it" if options.save is None else f"{tuning.GIVEN}={job.path} makes processes read it"
    console.print(
        f"{kept} of {len(rows)} kept in {job.path}; {use}. Gain: rules over best, in brackets at least, by the 90% "
        f"interval of the ratios round by round, of which {MARGIN} is needed.", highlight=False, soft_wrap=True,
    )  # fmt: skip
    return code or int(any(found.wrong for _, found in rows))


def table(rows: Sequence[tuple[tuning.Case, Found]], key: tuple[str, str]) -> Table:
    drawn = Table(title=f"Choices on {' with '.join(key)}", title_justify="left", box=SIMPLE_HEAD)
    names = ("backend", "phase", "format", "layout", "N", "K", "experts", "rows", "rules ms", "best ms", "gain", "kept")
    for name in names:
        right = name in ("N", "K", "experts", "rows", "gain") or "ms" in name
        drawn.add_column(name, justify="right" if right else "left")
    for case, found in rows:
        before, after = time_of(found.before), time_of(found.after)
        least = least_ratio(found.before, found.after)
        gain = f"{ratio_text(before / after)} ({ratio_text(least)})" if before and after and least else "-"
        kept = ", ".join(f"{name}={value}" for name, value in found.config.items())
        drawn.add_row(
            case.backend, case.phase, case.format, case.layout, str(case.n), str(case.k), str(case.experts),
            f"≤ {case.rows:,}", *(ms_text(ms) if ms else "-" for ms in (before, after)), gain,
            kept or f"no: {found.reason}",
        )  # fmt: skip
    return drawn
