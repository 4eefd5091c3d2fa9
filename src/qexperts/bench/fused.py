"""The strategies, and the public calls, on kernels that read the packed weights.

Provider "fused" is the backend that `auto` picks for each row; providers "triton" and "hopper" are those backends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from ..backends import BACKENDS, Problem, hopper_backend, select, triton_backend
from ..formats import QuantWeight
from ..ops import grouped_gemm, moe, prepare
from ..plan import TokenPlan
from ..strategies import Schedule, Step, Strategy, Take
from ..testing import Inputs
from .binding import Bound, Refused
from .candidates import Candidate
from .workloads import Workload

__all__ = ["FusedProvider", "PackedProvider"]

# Those that share a prepared layout. The one that reads everything the others do comes first.
GPU_BACKENDS = {"triton": triton_backend, "hopper": hopper_backend}


class PackedProvider:
    """What providers share whose backends read packed weights. The prepared copy of the weight is made once.

    Args:
        names: of the backends, all of one prepared layout: of several, the one that `auto` picks for a candidate, else
            the first.
    """

    def __init__(self, tensors: Inputs, names: Sequence[str]) -> None:
        self._t, self._names = tensors, names
        self._prepared: QuantWeight | None = None

    def refuse(self, candidate: Candidate) -> str | None:
        if candidate.layout == "prepared" and (reason := BACKENDS[self._names[0]].no_layout(self._t.weight)):
            return reason
        scales, dtype = self._t.weight.scales, self._t.x.dtype
        if candidate.api == "wrapper" and candidate.layout == "public" and scales is not None and scales.dtype != dtype:
            return f"moe() takes scales of the activations' dtype, {dtype}, not {scales.dtype}"
        problem, name = self._problem(candidate), self._backend(candidate)
        if reason := BACKENDS[name].supports(problem)[0]:
            return reason
        if candidate.api == "wrapper" and candidate.layout == "public" and (chosen := select(problem).name) != name:
            return f"moe() takes the backend {chosen} here"
        return None

    def _backend(self, candidate: Candidate) -> str:
        """Which of them runs a candidate."""
        problem, runs = self._problem(candidate), [b for b in BACKENDS.values() if b.name in self._names]
        picked = (b.name for b in runs if b.preferred(problem) and b.supports(problem)[0] is None)
        return next(picked, self._names[0])

    def _public(self, candidate: Candidate, weight: QuantWeight) -> Callable[[], torch.Tensor]:
        t, w, fmt = self._t, weight, weight.format
        if candidate.layout == "prepared":
            how = {"backend": self._backend(candidate), "activation_format": candidate.activation_format}
            return lambda: grouped_gemm(t.x, w, TokenPlan.from_counts(t.counts, t.x.shape[0]), **how)
        options = {
            "scales": w.scales, "zeros": w.zeros, "weight_bits": fmt.bits, "group_size": w.group_size or 128,
            "asym": fmt.asym, "phase": candidate.phase, "activation_format": candidate.activation_format,
        }  # fmt: skip
        return lambda: moe(t.x, w.codes, t.counts, **options)

    def _problem(self, candidate: Candidate) -> Problem:
        phase, rounded = candidate.phase or "auto", candidate.activation_format
        problem = Problem.of("bench", self._t.x, self._t.weight, phase=phase, activation_format=rounded)
        layout = "public" if candidate.layout == "public" else BACKENDS[self._names[0]].layout
        return dataclasses.replace(problem, weight_layout=layout)

    def _schedule(self, strategy: Strategy) -> Schedule:
        return strategy.schedule(TokenPlan.from_counts(self._t.counts, self._t.x.shape[0]))

    def _weight(self, candidate: Candidate) -> QuantWeight:
        if candidate.layout == "public":
            return self._t.weight
        if self._prepared is None:
            self._prepared = prepare(self._t.weight, self._names[0], keep_source=True)
        return self._prepared


class FusedProvider(PackedProvider):
    """Kernels of the backends on GPUs: of the one that `auto` picks, or of a named one."""

    def __init__(self, workload: Workload, tensors: Inputs, names: Sequence[str] = tuple(GPU_BACKENDS)) -> None:
        super().__init__(tensors, names)

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        strategy = candidate.strategy
        if strategy is None or candidate.api != "raw":
            return None

        def plan() -> None:
            self._tables(self._schedule(strategy), GPU_BACKENDS[self._backend(candidate)])

        return plan

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        weight, name = self._weight(candidate), self._backend(candidate)
        backend = GPU_BACKENDS[name]
        config = f"{name}: {backend.describe(weight, self._t.x, candidate.phase)}"
        if candidate.api == "wrapper":
            return Bound(self._public(candidate, weight), Counter(), None, uses_scratch=False, config=config)
        if candidate.strategy is None:
            return self._bind_auto(candidate, weight, take, config)
        schedule = self._schedule(candidate.strategy)
        x, permute = self._t.x, None
        if candidate.phase == "prefill":
            x, permute = triton_backend.permuted(weight, x, take)
        tables, phase, kernel = self._tables(schedule, backend), candidate.phase or "prefill", backend.PREFILL
        if (sizes := candidate.config) is not None:
            config, kernel = f"{name}: {sizes!r}", kernel._replace(bind=functools.partial(kernel.bind, config=sizes))
        gemm = triton_backend.PackedGemm(weight, take, tables, phase, kernel, sizes)
        out = None if schedule.grouped else take((x.shape[0], weight.N), x.dtype)
        bound = schedule.bind(x, gemm, out, take)
        counts = bound.counts + Counter([permute.kind] if permute else [])
        run = bound if permute is None else functools.partial(_after, permute, bound)
        made = bound.only("schedule") if schedule.grouped else None
        if sizes is not None and not dry:
            _try(run)
        return Bound(run, counts, schedule.padded_rows, schedule=made, config=config)

    def _bind_auto(self, candidate: Candidate, weight: QuantWeight, take: Take, config: str) -> Bound:
        """The backend's own choice by the counts, its result written in place; scratch is the package's."""
        t = self._t
        y = take((t.x.shape[0], weight.N), t.x.dtype)
        problem, backend = self._problem(candidate), GPU_BACKENDS[self._backend(candidate)]
        if isinstance(crossover := candidate.config, triton_backend.Crossover):
            problem = dataclasses.replace(problem, decode_threshold=crossover.decode_threshold)
            config = f"{config}: {crossover!r}"

        def run() -> torch.Tensor:
            backend.run_into(problem, y, t.x, weight, t.counts)
            return y

        return Bound(run, Counter(), None, uses_scratch=False, config=config)

    def _tables(self, schedule: Schedule, backend: ModuleType) -> triton_backend.TileTables | None:
        """None for one grouped launch: its schedule is made on the device, inside the clock."""
        split = backend.PREFILL.split
        return None if schedule.grouped else triton_backend.TileTables(schedule, self._t.weight.E, split)


def _try(run: Callable[[], object]) -> None:
    """Tile sizes that are asked for need not fit the device: what the compiler says to that is a reason."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        run()
    except (OutOfResources, PTXASError) as error:
        raise Refused(str(error)) from error


def _after(first: Step, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    first.run()
    return run()
