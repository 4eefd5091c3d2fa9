"""Backend "torch": dequantize into scratch memory, then the best matmul torch has. The honest baseline on any device.

    S == 0                           nothing
    CPU                              per_expert: dequantize an expert into the cache, multiply, next; or where a profile
                                     says so, grouped: dequantize all experts, then one grouped mm
    S <= E, if dequantization or     gather the codes row by row, dequantize, one batched matmul
      copies would cost all experts
    sm_90, sm_100, bf16, E <= 1024   dequantize all experts, one grouped mm
    other GPUs, fp16                 per_expert, with one host sync: torch's grouped mm would loop on the host too

The way depends on shapes and dtypes alone, never on decode or prefill, so the two are bit-identical. A profile
(`tuning.py`) chooses among strategies that multiply the same matrices, so it leaves every bit as it is: padded ones do
not. On GPUs none but `grouped` does without the counts on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from ..formats import QuantWeight, index_experts
from ..plan import TokenPlan
from ..quantize import dequantize_into, dequantize_steps
from ..strategies import Step, StepKind, Strategy, Take
from ..tuning import DTYPES, Case, Choice, bucket, noted, tuned
from ..workspace import arena, is_capturing

if TYPE_CHECKING:
    from . import Problem

__all__ = [
    "CpuWay", "DenseGemm", "DequantGemm", "case_of", "compute_dtype", "grouped_mm", "no_grouped_mm", "run", "supports",
]  # fmt: skip

MAX_GROUPED_EXPERTS = 1024  # torch's grouped mm on CUDA: "Can't process more than 1024 groups"
_ALIGN = 8  # bf16 elements in the 16 bytes that its strides must be multiples of


def grouped_mm(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's grouped mm under the name this version has it: x [S, K], w [E, K, N], ends [E] int32."""
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return function(x, w, offs=ends)


def no_grouped_mm(device: torch.device, dtype: torch.dtype, num_experts: int) -> str | None:
    """Why torch does not multiply groups in one launch here without reading the offsets on the host, or None.

    Measured with torch 2.11 on an H100: bf16 does; fp16 and fp32 take a loop that synchronises.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch has a grouped mm in one launch on NVIDIA sm_90 and sm_100 only"
    if dtype != torch.bfloat16:
        return f"torch's grouped mm in one launch takes bf16 only, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"torch has a grouped mm in one launch on sm_90 and sm_100 only, not sm_{major}{minor}"
    if num_experts > MAX_GROUPED_EXPERTS:
        return f"torch's grouped mm takes at most {MAX_GROUPED_EXPERTS} experts, not {num_experts}"
    return None


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """dtype the matmul runs in: that of the activations, but fp32 where a CPU has no fast path for it."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class DenseGemm:
    """Multiplies by weights that are already in the working dtype.

    Args:
        w: [E, N, K], or [E, K, N] with transposed=True; every row's product is x @ w.T (x @ w if transposed).
        take: scratch for gathered weights.
        batch_weights: the experts of the padded batch, contiguous, if gathered before the clock.
    """

    def __init__(
        self, w: torch.Tensor, take: Take, *, transposed: bool = False, batch_weights: torch.Tensor | None = None
    ) -> None:
        self._w = w if transposed else w.mT  # [E, contraction, outputs]
        self._take = take
        self._stored = w
        self._transposed = transposed
        self._batch_weights = batch_weights

    def one(self, x: torch.Tensor, expert: int, out: torch.Tensor) -> list[Step]:
        w = self._w[expert]
        return [Step("gemm", lambda: torch.mm(x, w, out=out))]

    def batch(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> list[Step]:
        if self._batch_weights is not None:
            gathered, steps = self._batch_weights, []
        else:
            gathered = self._take((experts.shape[0], *self._stored.shape[1:]), self._stored.dtype)
            steps = [Step("gather", lambda: torch.index_select(self._stored, 0, experts, out=gathered))]
        w = gathered if self._transposed else gathered.mT
        return [*steps, Step("gemm", lambda: torch.bmm(x, w, out=out))]

    def grouped(self, x: torch.Tensor, plan: TokenPlan) -> list[Step]:
        n_experts, rows, columns = self._stored.shape
        stored, steps = self._stored, []
        if not _aligned(stored):
            stored = self._take((n_experts, rows, _round_up(columns)), stored.dtype)
            steps = [_fill("gather", stored, self._stored)]
        return [*steps, *_grouped_steps(x, stored, columns, self._transposed, plan, self._take)]


class DequantGemm:
    """Multiplies by packed weights: each step dequantizes what it needs into scratch memory first.

    Args:
        weight: in the public layout.
        dtype: the matmul's.
        take: scratch for dequantized (and gathered packed) weights.
        transposed: multiply by w instead of w.T (the gradient with respect to x).
    """

    def __init__(self, weight: QuantWeight, dtype: torch.dtype, take: Take, *, transposed: bool = False) -> None:
        self._weight = weight
        self._dtype = dtype
        self._take = take
        self._transposed = transposed
        self._one: torch.Tensor | None = None

    def one(self, x: torch.Tensor, expert: int, out: torch.Tensor) -> list[Step]:
        if self._one is None:  # one expert's worth serves all of them in turn
            self._one = self._dense(1)
        dense, weight = self._one, self._weight.experts(expert, expert + 1)
        w = self._operand(dense)[0]
        return [*self._dequant(dense, weight), Step("gemm", lambda: torch.mm(x, w, out=out))]

    def batch(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> list[Step]:
        weight = self._weight
        packed = [self._take((experts.shape[0], *t.shape[1:]), t.dtype) for t in weight.tensors]

        def gather() -> None:
            for source, target in zip(weight.tensors, packed, strict=True):
                target.copy_(index_experts(source, experts))

        selected = weight.with_tensors(*packed)
        dense = self._dense(experts.shape[0])
        w = self._operand(dense)
        return [
            Step("gather", gather, 2 * len(packed)),
            *self._dequant(dense, selected),
            Step("gemm", lambda: torch.bmm(x, w, out=out)),
        ]

    def grouped(self, x: torch.Tensor, plan: TokenPlan) -> list[Step]:
        k = self._weight.K
        full = self._dense(self._weight.E, _round_up(k))
        dense = full[..., :k]
        steps = self._dequant(dense, self._weight)
        if full.shape[2] != k:
            steps.append(Step("dequant", full[..., k:].zero_))
        return [*steps, *_grouped_steps(x, full, k, self._transposed, plan, self._take)]

    def _operand(self, dense: torch.Tensor) -> torch.Tensor:
        return dense if self._transposed else dense.mT

    def _dense(self, n_experts: int, k: int | None = None) -> torch.Tensor:
        n, k = self._weight.N, k or self._weight.K
        if self._weight.n_is_contiguous:
            return self._take((n_experts, k, n), self._dtype).mT
        return self._take((n_experts, n, k), self._dtype)

    @staticmethod
    def _dequant(dense: torch.Tensor, weight: QuantWeight) -> list[Step]:
        return [Step("dequant", run, launches) for run, launches in dequantize_steps(dense, weight)]


def _round_up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _aligned(t: torch.Tensor) -> bool:
    """Whether rows start on the 16 bytes that grouped mm needs."""
    strides = t.stride()
    return t.data_ptr() % 16 == 0 and 1 in strides[-2:] and all(s % _ALIGN == 0 for s in strides if s != 1)


def _fill(kind: StepKind, target: torch.Tensor, source: torch.Tensor) -> Step:
    """Copy into the first columns of a wider buffer and zero the rest."""
    n = source.shape[-1]
    left, right = target[..., :n], target[..., n:]

    def run() -> None:
        left.copy_(source)
        right.zero_()

    return Step(kind, run, 2)


def _grouped_steps(
    x: torch.Tensor, stored: torch.Tensor, columns: int, transposed: bool, plan: TokenPlan, take: Take
) -> list[Step]:
    """One grouped mm over aligned weights [E, N, >= columns], with x padded to match where it must be."""
    ends = plan.expert_offsets[1:]
    if transposed:  # the padding is in the outputs
        operand, width = stored, stored.shape[1]
    else:
        operand, width = stored.mT, stored.shape[2]
    steps: list[Step] = []
    overlapping = x.shape[0] > 1 and x.stride(0) < x.shape[1]
    if x.shape[1] != width or overlapping or not _aligned(x):
        padded = take((x.shape[0], _round_up(width)), x.dtype)[:, :width]
        steps = [_fill("pad", padded, x)]
        x = padded
    if transposed and stored.shape[2] != columns:
        return [*steps, Step("gemm", lambda: grouped_mm(x, operand, ends)[:, :columns])]
    return [*steps, Step("gemm", lambda: grouped_mm(x, operand, ends))]


@dataclasses.dataclass(frozen=True)
class CpuWay(Choice):
    """The `Strategy` that multiplies on a CPU."""

    strategy: str = "per_expert"

    FREE: ClassVar[Mapping[str, tuple[Any, ...]]] = {"strategy": ("per_expert", "grouped")}


def case_of(problem: Problem) -> Case:
    """What tables are asked for; the same for every phase."""
    p, dtype = problem, DTYPES[problem.dtype]
    scale = dtype if p.scale_dtype is None else DTYPES[p.scale_dtype]
    group = 0 if p.group_size in (None, p.K) else p.group_size
    sizes = (group, p.N, p.K, p.E, bucket(p.S))
    return Case("torch", "auto", p.format.name, dtype, scale, p.scale_layout, *sizes)


def _way(problem: Problem) -> str:
    if problem.device.type == "cpu":
        rules = CpuWay()
        padded = problem.K % _ALIGN  # a grouped mm would add up zeros, and round otherwise
        return (rules if problem.backward or padded else tuned(rules, case_of(problem), problem.device)).strategy
    one_launch = no_grouped_mm(problem.device, problem.dtype, problem.E) is None
    stored_as_is = not problem.format.quantized and problem.K % _ALIGN == 0
    if problem.S <= problem.E and not (one_launch and stored_as_is):
        return "rows"
    return "grouped" if one_launch else "per_expert"


def supports(problem: Problem) -> tuple[str | None, str, bool]:
    """Reason it cannot run (or None), how it runs, and whether the host synchronises."""
    fmt, dtype = problem.format, problem.dtype
    if problem.device.type == "meta":
        return "tensors on the meta device hold no data", "", False
    if dtype == torch.float32 and problem.device.type != "cpu":
        return "fp32 activations run on the CPU only; use bf16 or fp16", "", False
    if not fmt.quantized and dtype not in (fmt.storage, torch.float32):
        return f"{fmt.name} weights need {fmt.name} activations", "", False
    if problem.activation_format is not None:
        return f"does not quantize activations to {problem.activation_format}", "", False
    way = _way(problem)
    first = "dequantizes all experts, " if fmt.quantized else ""
    if problem.device.type == "cpu":
        computes = str(compute_dtype(problem.device, dtype)).removeprefix("torch.")
        if way == "per_expert":
            first = "dequantizes one expert at a time, " if fmt.quantized else "one expert at a time, "
        how = "multiplies" if way == "per_expert" else "one grouped mm"
        return None, noted(f"{first}{how} in {computes}", problem.device), False
    if way == "rows":
        return None, "no more rows than experts: gathers the weights row by row, one batched matmul", False
    if way == "grouped":
        return None, f"{first}one grouped mm", False
    why = no_grouped_mm(problem.device, dtype, problem.E)
    return None, f"one matmul per expert, and one host sync to read the counts: {why}", True


def run(problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan) -> torch.Tensor:
    """y[r] = x[r] @ dequantize(weight)[expert(r)].T, or without the transpose if problem.backward.

    Args:
        x: [S, K] (backward: [S, N]); last dimension contiguous.
    Returns: [S, N] (backward: [S, K]); dtype of x, or fp32 for problem.wide; fp32 accumulation; rows past the plan's
        sum are 0.

    Synchronises with the host only for more rows than experts where torch has no grouped mm in one launch (fp16, or
    a GPU other than sm_90 and sm_100, or more than 1,024 experts); that case cannot be captured in a CUDA graph.
    """
    way = _way(problem)
    if x.shape[0] == 0:
        columns = weight.K if problem.backward else weight.N
        return torch.empty(0, columns, dtype=torch.float32 if problem.wide else x.dtype, device=x.device)
    if way == "per_expert" or x.device.type == "cpu":
        return _on_host(problem, x, weight, plan, Strategy(way))
    y = (_rows if way == "rows" else _grouped)(problem, x, weight, plan)
    beyond = torch.arange(x.shape[0], device=x.device) >= plan.expert_offsets[-1]
    y = y.masked_fill_(beyond[:, None], 0)
    return y.float() if problem.wide else y


def _rows(problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan) -> torch.Tensor:
    selected = weight.select(plan.row_expert().clamp(max=weight.E - 1))
    dtype = torch.float32 if problem.wide else x.dtype
    if weight.format.quantized:
        dense = arena(x.device).take((x.shape[0], weight.N, weight.K), dtype)
        dequantize_into(dense, selected)
    else:
        dense = selected.codes.to(dtype)
    return torch.bmm(x.to(dtype)[:, None, :], dense if problem.backward else dense.mT)[:, 0]


def _grouped(problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan) -> torch.Tensor:
    space = arena(x.device)
    gemm = _gemm(weight, x.dtype, space.take, problem.backward)
    return Strategy("grouped").schedule(plan).bind(x, gemm, None, space.take)()


def _gemm(weight: QuantWeight, dtype: torch.dtype, take: Take, transposed: bool) -> DenseGemm | DequantGemm:
    if not weight.format.quantized and weight.codes.dtype == dtype:
        return DenseGemm(weight.codes, take, transposed=transposed)
    return DequantGemm(weight, dtype, take, transposed=transposed)


def _on_host(
    problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan, strategy: Strategy
) -> torch.Tensor:
    """In a strategy that reads the counts on the host."""
    if is_capturing(x.device):
        raise RuntimeError(
            f"torch backend: {weight.format.name} with {x.dtype} activations and more rows than experts reads the "
            f"counts on the host, which a CUDA graph cannot; use bf16 activations on sm_90 or sm_100, or run it "
            f"outside the graph."
        )
    space = arena(x.device)
    dtype = torch.float32 if problem.wide else compute_dtype(x.device, x.dtype)
    gemm = _gemm(weight, dtype, space.take, problem.backward)
    schedule = strategy.schedule(plan)
    columns = weight.K if problem.backward else weight.N
    out = None if schedule.grouped else torch.empty(x.shape[0], columns, dtype=dtype, device=x.device)
    y = schedule.bind(x.to(dtype), gemm, out, space.take)()
    end = schedule.singles[-1][2] if schedule.singles else 0
    y[int(plan.expert_offsets[-1]) if schedule.grouped else end :].zero_()
    return y if problem.wide else y.to(x.dtype)
