"""Layers of experts, a prefill and decode steps, called in the ways in which a model can call them.

The work is that of `fused_experts`: hidden states, expert ids and weights in, hidden states out, in each layer on
weights and a routing of its own. Every way does all of it:

    always_prefill, always_decode   one kernel for everything
    manual_branch     the caller reads the largest count on the host and passes the phase; the counts are given
    unified_auto      phase="auto": the call decides, without the host
    unified_hinted    the caller passes the phase because it knows it
    eager, batched_mm, grouped_mm   transformers' implementations, on the weights dequantized before the clock
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from ..backends import Answer, Problem, select
from ..formats import QuantWeight
from ..layer import QuantExperts
from ..ops import prepare
from ..quantize import dequantize
from ..testing import experts_loop, judge, nan_filled
from . import transformers_peer
from .binding import Refused, of_peer
from .candidates import HINTED, WAYS
from .environment import version_of
from .measure import captured, fits, summarise, template_of
from .records import Record
from .roofline import Ceilings, useful_flop
from .timing import Sampler, issue_us
from .workloads import LayerWorkload, Routed, random_weight, route_steps

__all__ = ["measure_layer"]

STEPS = ("prefill", "decode")
SYNCING = ("manual_branch",)
PEER = "transformers"
LAUNCHES = 32  # of a call, about the most; that of a way that waits for the host does not matter

Experts = Callable[[torch.Tensor, Routed], torch.Tensor]  # one layer


@dataclasses.dataclass(frozen=True)
class _Way:
    """A way to call all layers; graph: the call is replayed from a CUDA graph."""

    name: str
    provider: str
    layout: str
    graph: bool = False


@dataclasses.dataclass
class _Row:
    way: _Way
    step: str
    record: Record
    run: Callable[[], object] | None = None  # what is timed
    samples: list[float] = dataclasses.field(default_factory=list)


class _Layer:
    """One layer: its weights in every layout asked for, what it is sent in each step (the prefill first), and what
    judges its results."""

    def __init__(
        self, weights: tuple[QuantWeight, QuantWeight], states: Sequence[torch.Tensor], routed: Sequence[Routed]
    ) -> None:
        self.weights, self.steps = weights, list(zip(states, routed, strict=True))
        ids, shares = (torch.cat([getattr(r, name) for r in routed]) for name in ("expert_ids", "expert_weights"))
        call, lengths = (torch.cat(list(states)), *weights, ids, shares), [len(x) for x in states]
        self.oracle = experts_loop(*call, exact=True).split(lengths)
        self.peer = experts_loop(*call).split(lengths)
        self._ours: dict[str, QuantExperts] = {}

    def ours(self, layout: str) -> QuantExperts:
        if layout not in self._ours:
            up, down = self.weights
            if layout == "prepared":
                up, down = prepare(up, keep_source=True), prepare(down, keep_source=True)
            self._ours[layout] = QuantExperts(up, down)
        return self._ours[layout]

    @functools.cached_property
    def dense(self) -> list[torch.Tensor]:
        dtype = self.steps[0][0].dtype
        return [dequantize(w, dtype) if w.format.quantized else w.codes for w in self.weights]


def measure_layer(
    workload: LayerWorkload,
    layouts: Sequence[str],
    ceilings: Ceilings,
    env: dict[str, str | None],
    device: torch.device,
    rounds: int,
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[Record]:
    """Yield a record for each way and step, in order; if interrupted, those with samples, before it goes on."""
    tick("preparing weights")
    layers = _layers(workload, device)
    template = dataclasses.replace(_template(workload, layers, ceilings, env), rounds=rounds)
    rows = [_Row(way, step, _describe(template, way, step, layers)) for way in _ways(layers, layouts) for step in STEPS]
    sampler = Sampler(device)
    for row in rows:
        tick(f"checking {row.way.provider} {row.way.name}")
        try:
            with of_peer(row.way.provider):
                _prepare(row, workload, layers, device)
        except (torch.OutOfMemoryError, Refused) as error:
            row.record.status, row.record.reason = "unsupported", str(error).splitlines()[0]
    timed = [row for row in rows if row.run is not None]
    try:
        runs = [row.run for row in timed if row.run is not None]
        sampler.rounds(runs, rounds, [row.samples for row in timed], lambda: tick("timing"))
    finally:
        for row in rows:
            if row.samples:
                summarise(row.record, [s / len(_indices(row.step, workload)) for s in row.samples])
            if row.samples or row.record.status != "ok":
                yield row.record


def _layers(w: LayerWorkload, device: torch.device) -> list[_Layer]:
    generator = torch.Generator(device).manual_seed(w.seed)
    lengths = [w.tokens, *[w.batch] * w.decode_steps]
    states = [torch.randn(n, w.hidden, generator=generator, device=device).to(w.torch_dtype) for n in lengths]
    (n1, k1), (n2, k2) = w.projections
    return [
        _Layer((random_weight(w, n1, k1, generator), random_weight(w, n2, k2, generator)), states, routed)
        for routed in route_steps(w, device)
    ]


def _indices(step: str, w: LayerWorkload) -> range:
    """Of the steps of a layer, those that a sample of a step runs: a sample is the mean of all decode steps."""
    return range(1) if step == "prefill" else range(1, 1 + w.decode_steps)


def _answer(layer: _Layer, layout: str = "public") -> Answer:
    """Of the backend that runs ours on weights in a layout."""
    problem = _problem(layer)
    if layout == "prepared":
        problem = dataclasses.replace(problem, weight_layout=select(problem).layout)
    return select(problem).answer(problem)


def _problem(layer: _Layer) -> Problem:
    return Problem.of("bench layer", layer.steps[0][0], layer.weights[0])


def _ways(layers: Sequence[_Layer], layouts: Sequence[str]) -> list[_Way]:
    """Everything is also shown under a CUDA graph. Only packed weights of a backend with a layout can be prepared."""
    layer = layers[0]
    packed = _answer(layer).backend != "torch"
    if not packed or not layer.weights[0].format.quantized:
        layouts = ("public",)
    found = [_Way(name, "fused" if packed else "torch", layout) for layout in layouts for name in WAYS]
    found += [_Way(name, PEER, "public") for name in transformers_peer.IMPLEMENTATIONS]
    graphs = (False, True) if layer.steps[0][0].device.type == "cuda" else (False,)
    return [dataclasses.replace(way, graph=graph) for way in found for graph in graphs]


def _template(w: LayerWorkload, layers: Sequence[_Layer], ceilings: Ceilings, env: dict[str, str | None]) -> Record:
    return dataclasses.replace(
        template_of(w, *w.projections[0], layers[0].weights[0].group_size, ceilings, env),
        layers=w.layers,
        decode_steps=w.decode_steps,
        decode_threshold=w.decode_threshold,
        api="wrapper",
    )


def _describe(template: Record, way: _Way, step: str, layers: Sequence[_Layer]) -> Record:
    """What one pass over all layers needs; of decode steps, the mean over all of them."""
    steps = [s for layer in layers for s in (layer.steps[:1] if step == "prefill" else layer.steps[1:])]
    passes = len(steps) // len(layers)
    counts = torch.stack([r.counts for _, r in steps]).cpu()
    active = int((counts > 0).sum())
    rows, tokens = int(counts[0].sum()), len(steps[0][0])
    w, x = layers[0].weights, steps[0][0]
    per_expert, states = sum(part.nbytes // part.E for part in w), 2 * tokens * x.shape[1] * x.element_size()
    answer = _answer(layers[0], way.layout)
    scope = "fused" if way.provider == "fused" else "base mm"
    return dataclasses.replace(
        template,
        provider=way.provider,
        strategy=way.name,
        step=step,
        scope="base+deq" if way.provider == "torch" and w[0].format.quantized else scope,
        graph=way.graph,
        weight_layout=way.layout,
        config=f"{answer.backend}: {answer.note}" if way.provider != PEER else None,
        active_experts=round(active / len(steps)),
        total_tokens=rows,
        max_tokens=int(counts.max()),
        flop=len(layers) * sum(useful_flop(rows, part.N, part.K) for part in w),
        mandatory_bytes=active * per_expert // passes + len(layers) * states,
        samples_ms=[],
    )


def _prepare(row: _Row, workload: LayerWorkload, layers: Sequence[_Layer], device: torch.device) -> None:
    """Bind, run once, judge; capture, if the way asks for a graph; time the issuing host of an eager call on a GPU."""
    record, indices = row.record, _indices(row.step, workload)
    if reason := _reason_against(row, layers):
        raise Refused(reason)
    if row.way.provider == PEER:
        record.config = f"{PEER} {version_of(PEER)}"
    calls = [_call(row, layer, workload.decode_threshold) for layer in layers]
    work = [(call, *layer.steps[i]) for i in indices for call, layer in zip(calls, layers, strict=True)]
    oracle, peer = (
        torch.cat([getattr(layer, of)[i] for i in indices for layer in layers]) for of in ("oracle", "peer")
    )
    run = functools.partial(_run, work)
    for graph in (False, True) if row.way.graph else (False,):
        run = captured(run, device) if graph else run
        for x in [layer.steps[i][0] for i in indices for layer in layers]:
            nan_filled(*x.shape, dtype=x.dtype, device=device)  # what the allocator may hand out for the results
        report = judge(torch.cat(run()), oracle, peer, workload.hidden)
        record.error, record.error_peer = report.error, report.error_peer
        if not report.ok:
            record.status, record.reason = "WRONG", report.message
            return
    row.run = run
    if device.type == "cuda" and not row.way.graph:
        one_pass = functools.partial(_run, work[: len(layers)])
        record.host_us = issue_us(one_pass, device, LAUNCHES * len(layers))


@torch.no_grad()
def _run(work: Sequence[tuple[Experts, torch.Tensor, Routed]]) -> list[torch.Tensor]:
    return [call(x, routed) for call, x, routed in work]


def _reason_against(row: _Row, layers: Sequence[_Layer]) -> str | None:
    way, layer = row.way, layers[0]
    if way.name in (*SYNCING, *transformers_peer.SYNCING) and way.graph:
        return "reads counts on the host, which a CUDA graph cannot"
    if way.provider != PEER:
        if way.graph and _answer(layer).syncs:
            return f"backend {_answer(layer).backend} reads counts on the host, which a CUDA graph cannot"
        reasons = [select(_problem(layer)).no_layout(w) for w in layer.weights] if way.layout == "prepared" else []
        return next(filter(None, reasons), None)
    x = layer.steps[0][0]
    if reason := transformers_peer.reason_against(way.name, x.device):
        return reason
    if "dense" not in vars(layer) and layer.weights[0].format.quantized:
        size = sum(w.E * w.N * w.K for w in layer.weights) * x.element_size() * len(layers)
        if not fits(size, x.device):
            return f"unquantized weights need {size / 2**30:.1f} GiB, more than is free"
    size = transformers_peer.needed_bytes(way.name, layer.dense[0], row.record.total_tokens)
    if not fits(size, x.device):
        return f"needs {size / 2**30:.1f} GiB for copies of weights, more than is free"
    return None


def _call(row: _Row, layer: _Layer, threshold: int) -> Experts:
    """One layer, called in a way."""
    way = row.way
    if way.provider == PEER:
        module = transformers_peer.experts_of(way.name, *layer.dense)
        return lambda x, r: module(x, r.expert_ids, r.expert_weights)
    experts = layer.ours(way.layout)
    if way.name == "manual_branch":

        def branch(x: torch.Tensor, r: Routed) -> torch.Tensor:
            phase = "decode" if r.counts.max().item() <= threshold else "prefill"
            return experts(x, r.expert_ids, r.expert_weights, phase=phase)

        return branch
    phases = {"always_prefill": "prefill", "always_decode": "decode", "unified_auto": "auto", HINTED: row.step}
    how = {"phase": phases[way.name], "decode_threshold": threshold}
    return lambda x, r: experts(x, r.expert_ids, r.expert_weights, **how)
