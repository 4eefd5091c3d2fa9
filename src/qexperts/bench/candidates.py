"""Candidates: every way of running one workload that a benchmark compares, before anything is bound."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from ..strategies import Strategy
from ..tuning import Choice
from .workloads import Workload

__all__ = ["HINTED", "LAYOUTS", "NAMED", "OWN", "PACKED", "PROVIDERS", "WAYS", "Candidate", "enumerate_candidates"]

PROVIDERS: tuple[str, ...] = ("torch", "fused", "humming", "prepacked", "ark", "ggml")
NAMED: tuple[str, ...] = ("triton", "hopper")  # of the backends that "fused" picks from, one
PACKED: tuple[str, ...] = ("fused", *NAMED)  # our kernels on packed weights
OWN: tuple[str, ...] = ("torch", *PACKED)  # the others are peers, packages of their own
LAYOUTS: tuple[str, ...] = ("prepared", "public")
HINTED = "unified_hinted"
WAYS: tuple[str, ...] = ("always_prefill", "always_decode", "manual_branch", "unified_auto", HINTED)  # to call a layer


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of a benchmark before it is measured.

    Attributes:
        strategy: None stands for the public call ("auto").
        scope: "base mm", "base+deq", "fused" or, unquantized in torch, "base mm".
        gather: "before" or "inside" the clock, where a strategy needs some experts' weights contiguous.
        graph: replay from a CUDA graph.
        api: "raw": views, buffers and the plan are made before the clock; "wrapper": all inside.
        layout: of the weight: "public" or "prepared".
        phase: "decode" or "prefill" where the caller says so, "auto" where the call decides; None: no such choice.
        activation_format: activations rounded inside the clock, "int8": by row and group, "q8_0": by row and 32 of k;
            None: as they are.
        threads: of a CPU; None: as many as torch has.
        tries: of a peer: configurations to try besides its default one.
        config: the `Choice` of a backend on GPUs, in the place of what rules and tables say.
    """

    strategy: Strategy | None
    scope: str
    gather: str | None = None
    graph: bool = False
    api: str = "raw"
    provider: str = "torch"
    layout: str = "public"
    phase: str | None = None
    activation_format: str | None = None
    threads: int | None = None
    tries: int = 0
    config: Choice | None = None


def _distinct(strategies: Sequence[Strategy], max_tokens: int) -> list[Strategy]:
    whole = [s for s in strategies if s.name == "full_pad"]
    whole += [s for s in strategies if s.threshold is not None and s.threshold >= max_tokens]
    return [s for s in strategies if s not in whole[1:]]


def enumerate_candidates(
    workload: Workload,
    device: torch.device,
    strategies: Sequence[Strategy],
    apis: Sequence[str],
    providers: Sequence[str] = ("torch",),
    layouts: Sequence[str] = ("prepared",),
    tries: int = 4,
    activation_format: str | None = None,
) -> list[Candidate]:
    """Every row to measure for one workload, the baseline of each provider before its other rows.

    A pad_and_clip threshold that every expert is within is the work of full_pad: of those that are the same, only the
    first is measured.

    Args:
        activation_format: "int8" adds, for integer weights, the fused kernels' own launch on rounded activations.
    """
    strategies = sorted(_distinct(strategies, workload.distribution.max_tokens), key=lambda s: s.name != "per_expert")
    found: list[Candidate] = []
    for provider in providers:
        if provider == "torch":
            found += _torch(workload, device, strategies, apis)
        elif provider in PACKED:
            found += _fused(provider, workload, device, strategies, apis, layouts)
            if activation_format is not None and workload.format.kind == "int":
                grouped = _fused(provider, workload, device, [Strategy("grouped")], apis, layouts)
                found += [dataclasses.replace(c, activation_format=activation_format) for c in grouped]
        else:
            found += _peer(provider, device, apis, tries)
    return found


def _torch(
    workload: Workload, device: torch.device, strategies: Sequence[Strategy], apis: Sequence[str]
) -> list[Candidate]:
    """`base+deq` gathers packed weights inside the clock by its nature; `base mm` shows both. The loop over experts,
    and in decode everything that needs no host sync, is also shown under a CUDA graph."""
    scopes = ["base+deq", "base mm"] if workload.format.quantized else ["base mm"]
    result: list[Candidate] = []
    for api in apis:
        for scope in scopes:
            for strategy in strategies:
                batched = strategy.name in ("pad_and_clip", "full_pad")
                if not batched:
                    gathers: tuple[str | None, ...] = (None,)
                elif scope == "base mm" and api == "raw":
                    gathers = ("before", "inside")
                else:
                    gathers = ("inside",)
                result += [Candidate(strategy, scope, gather, api=api) for gather in gathers]
                graph = strategy.name == "per_expert" or workload.kind == "decode"
                if graph and api == "raw" and device.type == "cuda":
                    result += [Candidate(strategy, scope, gathers[0], graph=True)]
        if api == "wrapper":
            result.append(Candidate(None, scopes[0], api="wrapper"))
    return result


def _fused(
    provider: str,
    workload: Workload,
    device: torch.device,
    strategies: Sequence[Strategy],
    apis: Sequence[str],
    layouts: Sequence[str],
) -> list[Candidate]:
    """Kernels on packed weights: nothing to dequantize or to gather. Everything is also shown under a CUDA graph.

    In decode, raw rows run the kernel for few rows, or ("auto") let the counts choose. `moe` takes the public layout
    and a phase, `grouped_gemm` either layout and no phase.
    """
    hint = workload.kind
    if not workload.format.quantized:
        layouts = ("public",)  # there is no other
    found: list[Candidate] = []
    for layout in layouts:
        for api in apis:
            make = _maker(provider, "fused", layout, api)
            if api == "raw":
                found += [make(strategy, phase=hint) for strategy in strategies]
                found += [make(None, phase="auto")] if hint == "decode" else []
            else:
                found += [make(None, phase=hint)] if layout == "public" else []
                found += [make(None, phase="auto")] if layout == "prepared" or hint == "decode" else []
    return _with_graphs(found, device)


def _peer(provider: str, device: torch.device, apis: Sequence[str], tries: int) -> list[Candidate]:
    """Weights are in the peer's own layout. Humming has one launch over all experts, the CPU's peers a loop over them;
    prepacked weights are dequantized before the clock. ggml has both, and a plain layout beside its others."""
    scope = "base mm" if provider == "prepacked" else "fused"
    names = {"humming": ("grouped",), "ggml": ("per_expert", "grouped")}.get(provider, ("per_expert",))
    rounded = "q8_0" if provider == "ggml" else None
    found = []
    for layout in LAYOUTS if provider == "ggml" else ("prepared",):
        for api in apis:
            make = _maker(provider, scope, layout, api)
            strategies = [Strategy(name) for name in names] if api == "raw" else [None]
            found += [make(strategy, tries=tries, activation_format=rounded) for strategy in strategies]
    return _with_graphs(found, device)


def _maker(provider: str, scope: str, layout: str, api: str) -> Callable[..., Candidate]:
    return functools.partial(Candidate, scope=scope, api=api, provider=provider, layout=layout)


def _with_graphs(candidates: Sequence[Candidate], device: torch.device) -> list[Candidate]:
    graphs = (False, True) if device.type == "cuda" else (False,)
    return [dataclasses.replace(c, graph=graph) for c in candidates for graph in graphs]
