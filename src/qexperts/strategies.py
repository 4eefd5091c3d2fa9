"""Strategies cut the rows of a plan into GEMM launches; the GEMM itself is passed in.

A strategy makes a `Schedule` from a plan (host work, its time is "planning"), the schedule is bound to tensors and a
`Gemm` (views and buffers are made once), and the bound schedule runs as a list of `Step`s. What is counted (launches,
padded rows) is counted off the very steps and index tensors that run.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch

from .plan import TokenPlan

__all__ = ["STRATEGIES", "BoundSchedule", "Gemm", "Schedule", "Step", "StepKind", "Strategy", "Take", "parse_strategy"]

StepKind = Literal["gemm", "schedule", "dequant", "gather", "pad", "scatter"]
Take = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]  # an allocator of uninitialised tensors

STRATEGIES: tuple[str, ...] = ("per_expert", "pad_and_clip", "full_pad", "grouped")


@dataclasses.dataclass(frozen=True)
class Step:
    """One piece of a bound schedule.

    Attributes:
        kind: "gemm"; "schedule" (which tile is whose, for a kernel that takes many experts at once); "dequant" (packed
            weights to a working dtype); "gather" (experts' weights made contiguous); "pad" and "scatter" (activations
            in, results out).
        run: issues the work. A grouped GEMM may return the result instead of writing it in place.
        launches: device operations it issues.
    """

    kind: StepKind
    run: Callable[[], object]
    launches: int = 1


class Gemm(Protocol):
    """What a strategy needs of a provider: three shapes of one multiplication, as steps over fixed tensors."""

    def one(self, x: torch.Tensor, expert: int, out: torch.Tensor) -> list[Step]:
        """out[n, N] = x[n, K] @ w[expert].T"""
        ...

    def batch(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> list[Step]:
        """out[b, P, N] = x[b, P, K] @ w[experts[b]].T; experts: [B] int64 on the device."""
        ...

    def grouped(self, x: torch.Tensor, plan: TokenPlan) -> list[Step]:
        """[S, K] -> [S, N] in one launch, returned by the last step."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Experts padded to a common number of rows.

    Attributes:
        experts: [B]; int64; experts in the batch.
        padded: P, rows of each after padding.
        source: [B * P]; int64; row of x that fills each padded row (padding repeats the expert's last row).
        rows: [n]; int64; rows of the result that the batch computes.
        positions: [n]; int64; where each of them stands among the B * P padded rows.
    """

    experts: torch.Tensor
    padded: int
    source: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Launches of one strategy for one plan: at most one padded batch, then single experts; or one grouped launch."""

    plan: TokenPlan
    singles: tuple[tuple[int, int, int], ...] = ()  # (expert, first row, end row)
    batch: PaddedBatch | None = None
    grouped: bool = False

    @property
    def padded_rows(self) -> int:
        """Rows computed beyond the useful ones (tile padding inside a kernel is the kernel's)."""
        return 0 if self.batch is None else self.batch.source.shape[0] - self.batch.rows.shape[0]

    def bind(self, x: torch.Tensor, gemm: Gemm, out: torch.Tensor | None, take: Take) -> BoundSchedule:
        """Fix the tensors: x [S, K], out [S, N], scratch from take. Issues no work.

        A grouped schedule returns its own result and takes out=None: torch's grouped mm has no out=.
        """
        steps: list[Step] = []
        if self.grouped:
            return BoundSchedule(gemm.grouped(x, self.plan), None)
        if out is None:
            raise ValueError("Schedule.bind: out is None; only a grouped schedule makes its own result.")
        if self.batch is not None:
            steps += self._bind_batch(self.batch, x, gemm, out, take)
        for expert, start, stop in self.singles:
            steps += gemm.one(x[start:stop], expert, out[start:stop])
        return BoundSchedule(steps, out)

    @staticmethod
    def _bind_batch(b: PaddedBatch, x: torch.Tensor, gemm: Gemm, out: torch.Tensor, take: Take) -> list[Step]:
        n_experts, n_rows = b.experts.shape[0], b.rows.shape[0]
        x_padded = take((n_experts * b.padded, x.shape[1]), x.dtype)
        y_padded = take((n_experts * b.padded, out.shape[1]), out.dtype)
        y_rows = take((n_rows, out.shape[1]), out.dtype)

        def unpad() -> None:
            torch.index_select(y_padded, 0, b.positions, out=y_rows)
            out.index_copy_(0, b.rows, y_rows)

        steps = [Step("pad", lambda: torch.index_select(x, 0, b.source, out=x_padded))]
        steps += gemm.batch(x_padded.view(n_experts, b.padded, -1), b.experts, y_padded.view(n_experts, b.padded, -1))
        return [*steps, Step("scatter", unpad, 2)]


class BoundSchedule:
    """Steps over fixed tensors; calling it issues them and returns [S, N].

    Attributes:
        counts: device operations by step kind; counts["gemm"] are the launches a strategy is judged by.
    """

    def __init__(self, steps: Sequence[Step], out: torch.Tensor | None) -> None:
        self._run = [step.run for step in steps]
        self._steps = tuple(steps)
        self._out = out  # None: the last step returns the result
        self.counts: Counter[str] = Counter()
        for step in steps:
            self.counts[step.kind] += step.launches

    def __call__(self) -> torch.Tensor:
        result = self._out
        for run in self._run:
            last = run()
        return last if result is None else result  # type: ignore[return-value,possibly-undefined]

    def only(self, kind: StepKind) -> Callable[[], None] | None:
        """The steps of one kind alone, to be timed by themselves; None if there are none."""
        chosen = [step.run for step in self._steps if step.kind == kind]

        def run() -> None:
            for step in chosen:
                step()

        return run if chosen else None


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way of cutting a plan into launches.

    Attributes:
        name: one of `STRATEGIES`.
        threshold: of pad_and_clip: experts with at most this many rows are padded to the largest such count and run
            as one batched GEMM, each larger one by itself.
    """

    name: str
    threshold: int | None = None

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.name!r}; known strategies: {', '.join(STRATEGIES)}")
        if (self.threshold is not None) != (self.name == "pad_and_clip"):
            raise ValueError(f"strategy {self.name}: threshold is {self.threshold}; only pad_and_clip takes one")
        if self.threshold is not None and self.threshold < 1:
            raise ValueError(f"strategy pad_and_clip: threshold is {self.threshold}; expected at least 1")

    def __str__(self) -> str:
        return self.name if self.threshold is None else f"{self.name}({self.threshold})"

    @property
    def needs_host_counts(self) -> bool:
        """Whether planning reads the counts on the host (one synchronisation)."""
        return self.name != "grouped"

    def schedule(self, plan: TokenPlan) -> Schedule:
        """Plan the launches. Synchronises if `needs_host_counts`."""
        if self.name == "grouped":
            return Schedule(plan, grouped=True)
        counts = plan.host_counts()
        clip = {"per_expert": 0, "full_pad": max(counts)}.get(self.name, self.threshold or 0)
        small: list[tuple[int, int, int]] = []
        singles: list[tuple[int, int, int]] = []
        start = 0
        for expert, count in enumerate(counts):
            if count:
                (small if count <= clip else singles).append((expert, start, start + count))
            start += count
        return Schedule(plan, tuple(singles), _pad(small, plan.device) if small else None)


def _pad(experts: list[tuple[int, int, int]], device: torch.device) -> PaddedBatch:
    padded = max(stop - start for _, start, stop in experts)
    table = torch.tensor(experts, dtype=torch.int64)  # [B, 3], on the host
    start, stop = table[:, 1:2], table[:, 2:3]
    row = start + torch.arange(padded)  # [B, P]
    valid = row < stop
    positions = valid.reshape(-1).nonzero().squeeze(1)
    return PaddedBatch(
        experts=table[:, 0].to(device),
        padded=padded,
        source=torch.minimum(row, stop - 1).reshape(-1).to(device),
        rows=row[valid].to(device),
        positions=positions.to(device),
    )


def parse_strategy(text: str, thresholds: Sequence[int] = ()) -> list[Strategy]:
    """A name, or pad_and_clip(256); a bare pad_and_clip stands for one strategy per threshold."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*", text)
    if match is None:
        raise ValueError(f"strategy {text!r}: expected a name or pad_and_clip(N); known: {', '.join(STRATEGIES)}")
    name, threshold = match[1], match[2]
    if name == "pad_and_clip" and threshold is None:
        return [Strategy(name, t) for t in thresholds]
    return [Strategy(name, int(threshold) if threshold else None)]
