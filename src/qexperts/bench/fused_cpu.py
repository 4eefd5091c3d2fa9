"""Provider "fused" on CPUs: the strategies, and the public calls, on the kernels of backend "cpu"."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch

from ..backends import Problem, cpu_backend, explain, select
from ..backends.cpu_backend import PackedGemm
from ..formats import QuantWeight
from ..ops import grouped_gemm, moe, prepare
from ..plan import TokenPlan
from ..strategies import Schedule, Strategy, Take
from ..testing import Inputs
from .binding import Bound
from .candidates import Candidate
from .workloads import Workload

__all__ = ["BACKEND", "CpuProvider"]

BACKEND = "cpu"


class CpuProvider:
    """Kernels of the backend "cpu". The prepared copy of the weight is made once."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        self._t = tensors
        self._prepared: QuantWeight | None = None

    def refuse(self, candidate: Candidate) -> str | None:
        problem = Problem.of("bench", self._t.x, self._t.weight, phase=candidate.phase or "auto")
        answer = next(a for a in explain(problem) if a.backend == BACKEND)
        if not answer.ok:
            return answer.reason
        if candidate.layout == "prepared":
            return cpu_backend.no_layout(self._t.weight)
        chosen = select(problem).name
        if candidate.api == "wrapper" and chosen != BACKEND:
            return f"moe() takes the backend {chosen} here"
        return None

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        strategy = candidate.strategy
        return None if strategy is None or candidate.api != "raw" else lambda: self._schedule(strategy)

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        weight, x = self._weight(candidate), self._t.x
        config = f"{BACKEND}: {cpu_backend.describe()}"
        if candidate.api == "wrapper":
            return Bound(self._public(candidate, weight), Counter(), None, uses_scratch=False, config=config)
        y = take((x.shape[0], weight.N), x.dtype)
        if candidate.strategy is None:
            run = functools.partial(_run_into, y, x, weight, self._t.counts)
            return Bound(run, Counter(), None, uses_scratch=False, config=config)
        schedule = self._schedule(candidate.strategy)
        bound = schedule.bind(x, PackedGemm(weight, take), None if schedule.grouped else y, take)
        return Bound(bound, bound.counts, schedule.padded_rows, config=config)

    def _public(self, candidate: Candidate, weight: QuantWeight) -> Callable[[], torch.Tensor]:
        t, w, fmt = self._t, weight, weight.format
        if candidate.layout == "prepared":
            return lambda: grouped_gemm(t.x, w, TokenPlan.from_counts(t.counts, t.x.shape[0]), backend=BACKEND)
        options = {
            "scales": w.scales, "zeros": w.zeros, "weight_bits": fmt.bits, "group_size": w.group_size or 128,
            "asym": fmt.asym, "phase": candidate.phase,
        }  # fmt: skip
        return lambda: moe(t.x, w.codes, t.counts, **options)

    def _schedule(self, strategy: Strategy) -> Schedule:
        return strategy.schedule(TokenPlan.from_counts(self._t.counts, self._t.x.shape[0]))

    def _weight(self, candidate: Candidate) -> QuantWeight:
        if candidate.layout == "public":
            return self._t.weight
        if self._prepared is None:
            self._prepared = prepare(self._t.weight, BACKEND, keep_source=True)
        return self._prepared


def _run_into(y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor) -> torch.Tensor:
    cpu_backend.run_into(y, x, weight, counts)
    return y
