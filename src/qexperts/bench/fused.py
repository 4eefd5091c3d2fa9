"""Provider "fused": the strategies, and the public calls, on kernels that read the packed weights."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch

from ..backends import Problem, explain, select, triton_backend
from ..formats import QuantWeight
from ..ops import grouped_gemm, moe, prepare
from ..plan import TokenPlan
from ..strategies import Schedule, Step, Strategy, Take
from ..testing import Inputs
from .binding import Bound
from .candidates import Candidate
from .workloads import Workload

__all__ = ["FusedProvider", "PackedProvider"]

BACKEND = "triton"


class PackedProvider:
    """What providers share whose backend reads packed weights. The prepared copy of the weight is made once.

    Args:
        backend: its name.
        no_layout: of the backend: why it has no prepared layout for a weight.
    """

    def __init__(self, tensors: Inputs, backend: str, no_layout: Callable[[QuantWeight], str | None]) -> None:
        self._t = tensors
        self._backend, self._no_layout = backend, no_layout
        self._prepared: QuantWeight | None = None

    def refuse(self, candidate: Candidate) -> str | None:
        problem = self._problem(candidate, self._t.weight)
        answer = next(a for a in explain(problem) if a.backend == self._backend)
        if not answer.ok:
            return answer.reason
        if candidate.layout == "prepared":
            return self._no_layout(self._t.weight)
        chosen = select(problem).name
        if candidate.api == "wrapper" and chosen != self._backend:
            return f"moe() takes the backend {chosen} here"
        return None

    def _public(self, candidate: Candidate, weight: QuantWeight) -> Callable[[], torch.Tensor]:
        t, w, fmt = self._t, weight, weight.format
        if candidate.layout == "prepared":
            how = {"backend": self._backend, "activation_format": candidate.activation_format}
            return lambda: grouped_gemm(t.x, w, TokenPlan.from_counts(t.counts, t.x.shape[0]), **how)
        options = {
            "scales": w.scales, "zeros": w.zeros, "weight_bits": fmt.bits, "group_size": w.group_size or 128,
            "asym": fmt.asym, "phase": candidate.phase, "activation_format": candidate.activation_format,
        }  # fmt: skip
        return lambda: moe(t.x, w.codes, t.counts, **options)

    def _problem(self, candidate: Candidate, weight: QuantWeight) -> Problem:
        phase, rounded = candidate.phase or "auto", candidate.activation_format
        return Problem.of("bench", self._t.x, weight, phase=phase, activation_format=rounded)

    def _schedule(self, strategy: Strategy) -> Schedule:
        return strategy.schedule(TokenPlan.from_counts(self._t.counts, self._t.x.shape[0]))

    def _weight(self, candidate: Candidate) -> QuantWeight:
        if candidate.layout == "public":
            return self._t.weight
        if self._prepared is None:
            self._prepared = prepare(self._t.weight, self._backend, keep_source=True)
        return self._prepared


class FusedProvider(PackedProvider):
    """Kernels of the backend "triton"."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        super().__init__(tensors, BACKEND, triton_backend.no_layout)

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        strategy = candidate.strategy
        if strategy is None or candidate.api != "raw":
            return None

        def plan() -> None:
            self._tables(self._schedule(strategy))

        return plan

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        weight = self._weight(candidate)
        config = _config(candidate, weight, self._t.x)
        if candidate.api == "wrapper":
            return Bound(self._public(candidate, weight), Counter(), None, uses_scratch=False, config=config)
        if candidate.strategy is None:
            return self._bind_auto(candidate, weight, take)
        schedule = self._schedule(candidate.strategy)
        x, permute = self._t.x, None
        if candidate.phase == "prefill":
            x, permute = triton_backend.permuted(weight, x, take)
        gemm = triton_backend.PackedGemm(weight, take, self._tables(schedule), candidate.phase or "prefill")
        out = None if schedule.grouped else take((x.shape[0], weight.N), x.dtype)
        bound = schedule.bind(x, gemm, out, take)
        counts = bound.counts + Counter([permute.kind] if permute else [])
        run = bound if permute is None else functools.partial(_after, permute, bound)
        made = bound.only("schedule") if schedule.grouped else None
        return Bound(run, counts, schedule.padded_rows, schedule=made, config=config)

    def _bind_auto(self, candidate: Candidate, weight: QuantWeight, take: Take) -> Bound:
        """The backend's own choice by the counts, its result written in place; scratch is the package's."""
        t = self._t
        y = take((t.x.shape[0], weight.N), t.x.dtype)
        problem = self._problem(candidate, weight)

        def run() -> torch.Tensor:
            triton_backend.run_into(problem, y, t.x, weight, t.counts)
            return y

        return Bound(run, Counter(), None, uses_scratch=False, config=_config(candidate, weight, t.x))

    def _tables(self, schedule: Schedule) -> triton_backend.TileTables | None:
        """None for one grouped launch: its schedule is made on the device, inside the clock."""
        return None if schedule.grouped else triton_backend.TileTables(schedule, self._t.weight.E)


def _after(first: Step, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    first.run()
    return run()


def _config(candidate: Candidate, weight: QuantWeight, x: torch.Tensor) -> str:
    phase = candidate.phase
    parts = []
    if phase != "decode":
        parts.append(triton_backend.prefill_config_of(weight, x.dtype))
    if phase != "prefill":
        parts.append(triton_backend.decode_config_of(weight, x.shape[0]))
    return f"{BACKEND}: {', '.join(map(repr, parts))}"
