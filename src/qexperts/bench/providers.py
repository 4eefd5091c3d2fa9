"""Candidates: every way of running one workload that a benchmark compares, ready to be bound and timed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ..backends.torch_backend import DenseGemm, DequantGemm, compute_dtype, no_grouped_mm
from ..ops import moe
from ..plan import TokenPlan
from ..quantize import dequantize
from ..strategies import Gemm, Schedule, Strategy, Take
from ..testing import Inputs
from ..workspace import arena
from .workloads import Workload

__all__ = ["Bound", "Candidate", "enumerate_candidates"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of a benchmark before it is measured.

    Attributes:
        strategy: None stands for the public call ("auto").
        scope: "base mm", "base+deq" or, unquantized, "base mm".
        gather: "before" or "inside" the clock, where a strategy needs some experts' weights contiguous.
        graph: replay from a CUDA graph.
        api: "raw": views, buffers and the plan are made before the clock; "wrapper": all inside.
    """

    strategy: Strategy | None
    scope: str
    gather: str | None = None
    graph: bool = False
    api: str = "raw"
    provider: str = "torch"


@dataclasses.dataclass
class Bound:
    """A candidate over fixed tensors.

    Attributes:
        run: issues the work and returns [S, N] in the activation dtype.
        counts: device operations by step kind, counted off the steps that run; empty if the call hides them.
        padded_rows: rows computed beyond the useful ones, or None.
        own_bytes: memory taken for this candidate alone.
        uses_scratch: scratch comes from the benchmark, not from what the package keeps between calls.
    """

    run: Callable[[], torch.Tensor]
    counts: Counter[str]
    padded_rows: int | None
    own_bytes: int = 0
    uses_scratch: bool = True


class Binder:
    """Binds candidates of one workload. The dequantized weights of "base mm" are made once and shared."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        self._workload = workload
        self._t = tensors
        self._dtype = compute_dtype(tensors.x.device, tensors.x.dtype)
        self._dense: torch.Tensor | None = None

    def refuse(self, candidate: Candidate) -> str | None:
        """Why a candidate cannot run here, or None."""
        grouped = candidate.strategy is not None and candidate.strategy.name == "grouped"
        if grouped and self.device.type != "cpu":
            return no_grouped_mm(self.device, self._t.x.dtype, self._t.weight.E)
        return None

    def schedule(self, strategy: Strategy) -> Schedule:
        """Plan from counts on the device: what plan_ms times."""
        return strategy.schedule(TokenPlan.from_counts(self._t.counts, self._t.x.shape[0]))

    @property
    def device(self) -> torch.device:
        return self._t.x.device

    def bind(self, candidate: Candidate, take: Take, *, dry: bool = False) -> Bound:
        """Fix the tensors of a candidate; scratch comes from take. A dry binding is never run and costs no work."""
        if candidate.api == "wrapper":
            return self._bind_wrapper(candidate)
        assert candidate.strategy is not None
        schedule = self.schedule(candidate.strategy)
        own = 0
        batch_weights = None
        if candidate.gather == "before" and schedule.batch is not None:
            experts = schedule.batch.experts[:0] if dry else schedule.batch.experts
            batch_weights = self._dense_weights().index_select(0, experts)
            own = batch_weights.numel() * batch_weights.element_size()
        gemm = self._gemm(candidate, take, batch_weights)
        run, counts = self._bind_schedule(schedule, gemm, take)
        return Bound(run, counts, schedule.padded_rows, own)

    def _bind_schedule(self, schedule: Schedule, gemm: Gemm, take: Take) -> tuple[Callable[[], torch.Tensor], Counter]:
        """A schedule in the matmul's dtype, with the casts inside where that is not the activations'."""
        x = self._t.x
        shape = (x.shape[0], self._workload.n)
        if self._dtype == x.dtype:
            bound = schedule.bind(x, gemm, None if schedule.grouped else take(shape, x.dtype), take)
            return bound, bound.counts
        x_wide, y = take(tuple(x.shape), self._dtype), take(shape, x.dtype)
        bound = schedule.bind(x_wide, gemm, None if schedule.grouped else take(shape, self._dtype), take)

        def run() -> torch.Tensor:
            x_wide.copy_(x)
            return y.copy_(bound())

        return run, bound.counts

    def _bind_wrapper(self, candidate: Candidate) -> Bound:
        t, strategy = self._t, candidate.strategy
        w = t.weight
        if strategy is None:
            fmt = w.format
            phase = self._workload.kind

            def public() -> torch.Tensor:
                return moe(
                    t.x, w.codes, t.counts, scales=w.scales, zeros=w.zeros, weight_bits=fmt.bits,
                    group_size=w.group_size or 128, asym=fmt.asym, phase=phase,
                )  # fmt: skip

            return Bound(public, Counter(), None, uses_scratch=False)
        schedule = self.schedule(strategy)

        def run() -> torch.Tensor:
            take = arena(t.x.device).take
            return self._bind_schedule(self.schedule(strategy), self._gemm(candidate, take, None), take)[0]()

        take = torch_empty(self.device)  # as a call binds it, since chunks depend on the device; not run
        counts = self._bind_schedule(schedule, self._gemm(candidate, take, None), take)[1]
        return Bound(run, counts, schedule.padded_rows, uses_scratch=False)

    def _gemm(self, candidate: Candidate, take: Take, batch_weights: torch.Tensor | None) -> Gemm:
        if candidate.scope == "base mm":
            return DenseGemm(self._dense_weights(), take, batch_weights=batch_weights)
        return DequantGemm(self._t.weight, self._dtype, take)

    def _dense_weights(self) -> torch.Tensor:
        if self._dense is None:
            w = self._t.weight
            same = not w.format.quantized and w.codes.dtype == self._dtype
            self._dense = w.codes if same else dequantize(w, self._dtype)
        return self._dense


def _distinct(strategies: Sequence[Strategy], max_tokens: int) -> list[Strategy]:
    whole = [s for s in strategies if s.name == "full_pad"]
    whole += [s for s in strategies if s.threshold is not None and s.threshold >= max_tokens]
    return [s for s in strategies if s not in whole[1:]]


def torch_empty(device: torch.device | str) -> Take:
    """An allocator on a device; on "meta" it takes no memory, which is how needs are summed up."""
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def enumerate_candidates(
    workload: Workload, device: torch.device, strategies: Sequence[Strategy], apis: Sequence[str]
) -> list[Candidate]:
    """Every row to measure for one workload, the baseline first.

    A pad_and_clip threshold that every expert is within is the work of full_pad: of those that are the same, only the
    first is measured. `base+deq` gathers packed weights inside the clock by its nature; `base mm` shows both. The loop
    over experts, and in decode everything that needs no host sync, is also shown under a CUDA graph.
    """
    strategies = _distinct(strategies, workload.distribution.max_tokens)
    scopes = ["base+deq", "base mm"] if workload.format.quantized else ["base mm"]
    result: list[Candidate] = []
    for api in apis:
        for scope in scopes:
            for strategy in sorted(strategies, key=lambda s: s.name != "per_expert"):
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
