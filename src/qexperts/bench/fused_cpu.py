"""Provider "fused" on CPUs: the strategies, and the public calls, on the kernels of backend "cpu"."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch

from ..backends import Problem, cpu_backend
from ..backends.cpu_backend import PackedGemm
from ..formats import QuantWeight
from ..strategies import Take
from ..testing import Inputs
from .binding import Bound
from .candidates import Candidate
from .fused import PackedProvider
from .workloads import Workload

__all__ = ["CpuProvider"]

BACKEND = "cpu"


class CpuProvider(PackedProvider):
    """Kernels of the backend "cpu"."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        super().__init__(tensors, [BACKEND])

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        strategy = candidate.strategy
        return None if strategy is None or candidate.api != "raw" else lambda: self._schedule(strategy)

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        weight, x = self._weight(candidate), self._t.x
        config = f"{BACKEND}: {cpu_backend.describe()}"
        if candidate.api == "wrapper":
            return Bound(self._public(candidate, weight), Counter(), None, uses_scratch=False, config=config)
        y = take((x.shape[0], weight.N), x.dtype)
        problem, int8 = self._problem(candidate), candidate.activation_format is not None
        run = functools.partial(_run_into, problem, y, x, weight, self._t.counts)
        if candidate.strategy is None:
            return Bound(run, Counter(), None, uses_scratch=False, config=config)
        if int8:  # the one strategy that it is measured in
            assert candidate.strategy.name == "grouped", candidate
            return Bound(run, Counter(gemm=1), 0, uses_scratch=False, config=config)
        schedule = self._schedule(candidate.strategy)
        bound = schedule.bind(x, PackedGemm(weight, take), None if schedule.grouped else y, take)
        return Bound(bound, bound.counts, schedule.padded_rows, config=config)


def _run_into(
    problem: Problem, y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor
) -> torch.Tensor:
    cpu_backend.run_into(problem, y, x, weight, counts)
    return y
