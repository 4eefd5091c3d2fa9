"""Providers: who multiplies. Each binds candidates of one workload to its tensors, ready to be timed."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch

from ..backends import triton_backend
from ..backends.torch_backend import DenseGemm, DequantGemm, compute_dtype, no_grouped_mm
from ..ops import grouped_gemm
from ..pages import use_huge_pages
from ..plan import TokenPlan
from ..quantize import dequantize
from ..strategies import Gemm, Schedule, Strategy, Take
from ..testing import Inputs
from ..workspace import arena
from .binding import Bound, Provider
from .candidates import PACKED, Candidate
from .workloads import Workload

__all__ = ["Binder", "TorchProvider", "torch_empty"]


class Binder:
    """Binds candidates of one workload, whoever provides them. What candidates share is made once."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        self._workload = workload
        self._tensors = tensors
        self._providers: dict[str, Provider] = {}

    @property
    def device(self) -> torch.device:
        return self._tensors.x.device

    def refuse(self, candidate: Candidate) -> str | None:
        return self._of(candidate).refuse(candidate)

    def bind(self, candidate: Candidate, take: Take, *, dry: bool = False) -> Bound:
        return self._of(candidate).bind(candidate, take, dry)

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        return self._of(candidate).plan(candidate)

    def _of(self, candidate: Candidate) -> Provider:
        name = candidate.provider
        if name not in self._providers:
            self._providers[name] = _provider(name, self.device)(self._workload, self._tensors)
        return self._providers[name]


def _provider(name: str, device: torch.device) -> Callable[[Workload, Inputs], Provider]:
    if name == "torch":
        return TorchProvider
    if name == "fused" and device.type == "cpu" and not triton_backend.interpreted():
        from .fused_cpu import CpuProvider

        return CpuProvider
    if name in PACKED:
        from .fused import FusedProvider

        return FusedProvider if name == "fused" else functools.partial(FusedProvider, names=[name])
    if name in ("prepacked", "ark"):
        from .cpu_peers import ArkProvider, PrepackedProvider

        return PrepackedProvider if name == "prepacked" else ArkProvider
    if name == "ggml":
        from .ggml import GgmlProvider

        return GgmlProvider
    from .humming import HummingProvider

    return HummingProvider


class TorchProvider:
    """torch's matmuls. The dequantized weights of "base mm" are made once and shared."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        self._workload = workload
        self._t = tensors
        self._dtype = compute_dtype(tensors.x.device, tensors.x.dtype)
        self._dense: torch.Tensor | None = None

    def refuse(self, candidate: Candidate) -> str | None:
        grouped = candidate.strategy is not None and candidate.strategy.name == "grouped"
        if grouped and self._t.x.device.type != "cpu":
            return no_grouped_mm(self._t.x.device, self._t.x.dtype, self._t.weight.E)
        return None

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        strategy = candidate.strategy
        return None if strategy is None or candidate.api != "raw" else lambda: self._schedule(strategy)

    def _schedule(self, strategy: Strategy) -> Schedule:
        return strategy.schedule(TokenPlan.from_counts(self._t.counts, self._t.x.shape[0]))

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        if candidate.api == "wrapper":
            return self._bind_wrapper(candidate)
        assert candidate.strategy is not None
        schedule = self._schedule(candidate.strategy)
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
        if strategy is None:

            def public() -> torch.Tensor:
                plan = TokenPlan.from_counts(t.counts, t.x.shape[0])
                return grouped_gemm(t.x, t.weight, plan, backend="torch")

            return Bound(public, Counter(), None, uses_scratch=False)
        schedule = self._schedule(strategy)

        def run() -> torch.Tensor:
            take = arena(t.x.device).take
            return self._bind_schedule(self._schedule(strategy), self._gemm(candidate, take, None), take)[0]()

        take = torch_empty(t.x.device)  # as a call binds it, since chunks depend on the device; not run
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
            use_huge_pages(self._dense)  # as quantized weights have them
        return self._dense


def torch_empty(device: torch.device | str) -> Take:
    """An allocator on a device; on "meta" it takes no memory, which is how needs are summed up."""
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)
