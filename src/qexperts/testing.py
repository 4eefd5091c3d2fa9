"""Cases and the error rule: used by the tests and by the benchmark's correctness gate.

A result passes when, row by row, its error against the oracle (exact weights, fp64) is no worse than twice that of
torch in the working dtype on the rounded weights, plus one rounding of the output and what fp32 accumulation in
another order may cost (nothing in bf16 and fp16; in fp32 all there is). These numbers are the only ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .formats import QuantWeight
from .layer import ACTIVATIONS, Activation
from .plan import TokenPlan
from .quantize import dequantize, quantize
from .reference import exact_weight, grouped_gemm_reference

__all__ = [
    "Q8_0_BLOCK",
    "ROUNDED",
    "Case",
    "ErrorReport",
    "Inputs",
    "assert_no_worse",
    "experts_loop",
    "int8_rounded",
    "judge",
    "make_inputs",
    "nan_filled",
    "peer_gemm",
    "q8_0_rounded",
]

RMS_FACTOR = 2.0
MAX_FACTOR = 4.0
INT8_GROUP = 256  # k that share a scale of int8 activations where a group of the weight is all of K
Q8_0_BLOCK = 32  # k that share a scale of ggml's activations
ACCUMULATION = 2.0**-24  # one fp32 rounding; k of them add up to about sqrt(k)


@dataclasses.dataclass(frozen=True)
class Case:
    """One multiplication to check, and why it is worth checking.

    Attributes:
        rows: rows of each expert; E = len(rows).
        N, K, group_size: sizes; group_size None stands for K.
        negative_scales: flip the sign of about half the scales (and of the codes' meaning), as real exports have it.
        scale_dtype: None stands for the activation dtype, as the tensor-level API wants it.
    """

    rows: tuple[int, ...]
    N: int
    K: int
    format: str
    group_size: int | None = 128
    dtype: torch.dtype = torch.bfloat16
    negative_scales: bool = False
    scale_dtype: torch.dtype | None = None
    why: str = ""

    @property
    def E(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        rows = ",".join(map(str, self.rows)) if len(self.rows) <= 8 else f"{len(self.rows)} experts"
        dtype = str(self.dtype).removeprefix("torch.")
        if self.scale_dtype not in (None, self.dtype):
            dtype += "-scales-" + str(self.scale_dtype).removeprefix("torch.")
        return f"{self.format}-{dtype}-N{self.N}-K{self.K}-G{self.group_size or 'K'}-[{rows}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of a multiplication, with what judges it.

    Attributes:
        x: [S, K].
        counts: [E]; int32.
        oracle: [S, N]; exact weights; fp64, on a GPU fp32.
        peer: [S, N]; torch in the working dtype on the rounded weights.
    """

    x: torch.Tensor
    weight: QuantWeight
    counts: torch.Tensor
    plan: TokenPlan
    oracle: torch.Tensor
    peer: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, weight: QuantWeight, rows: Sequence[int]) -> Inputs:
        counts = torch.tensor(rows, dtype=torch.int32, device=x.device)
        plan = TokenPlan.from_counts(counts, x.shape[0])
        return cls(x, weight, counts, plan, grouped_gemm_reference(x, weight, rows), peer_gemm(x, weight, rows))

    def with_activations(self, activation_format: str) -> Inputs:
        """The same x, judged by what activations of a format (of `ROUNDED`) are rounded to: no rounding error of theirs
        is forgiven or charged, only what is done with them."""
        rows, x = self.counts.tolist(), ROUNDED[activation_format](self.x, self.weight)
        peer = peer_gemm(x.to(self.x.dtype), self.weight, rows)
        return dataclasses.replace(self, oracle=grouped_gemm_reference(x, self.weight, rows), peer=peer)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors for a case."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(case.rows), case.K, generator=generator).to(case.dtype)
    dense = torch.randn(case.E, case.N, case.K, generator=generator).mul_(case.K**-0.5).to(case.dtype)
    weight = quantize(dense, case.format, group_size=case.group_size or case.K, scale_dtype=case.scale_dtype)
    if case.negative_scales and weight.scales is not None:
        flip = torch.randint(0, 2, weight.scales.shape, generator=generator).bool()
        weight.scales[flip] *= -1
    return Inputs.of(x.to(device), weight.to(device), case.rows)


def peer_gemm(x: torch.Tensor, weight: QuantWeight, counts: Sequence[int]) -> torch.Tensor:
    """What torch gives in the working dtype on the rounded weights, one expert at a time: [S, N]."""
    out = torch.zeros(x.shape[0], weight.N, dtype=x.dtype, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            w = dequantize(weight.experts(expert, expert + 1), x.dtype)[0]
            out[start : start + count] = x[start : start + count] @ w.T
        start += count
    return out


def experts_loop(
    x: torch.Tensor,
    w_gate_up: QuantWeight,
    w_down: QuantWeight,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    activation: Activation = "silu",
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    input_order: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """What `fused_experts` computes, one expert after the other in plain torch: [T, H].

    Arguments as there, of ids that are experts. exact: on exact weights, in fp64, on a GPU fp32; else on weights
    rounded to the dtype of x, each step rounded to it and the weighted sum taken in fp32. Synchronises.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if exact:
        dtype = wide = torch.float64 if x.device.type == "cpu" else torch.float32
    x, out = x.to(dtype), torch.zeros(x.shape[0], w_down.N, dtype=wide, device=x.device)
    for e in expert_ids.unique().tolist():
        token, choice = (expert_ids == e).nonzero(as_tuple=True)
        up, down = (
            exact_weight(w, e, dtype) if exact else dequantize(w.experts(e, e + 1), dtype)[0]
            for w in (w_gate_up, w_down)
        )
        rows = x[token] if input_order is None else x[token][:, input_order[e].long()]
        h = rows @ up.T
        h = h if gate_up_bias is None else h + gate_up_bias[e].to(dtype)
        if callable(activation):
            h = activation(h)
        elif h.shape[1] == w_down.K:
            h = ACTIVATIONS[activation](h)
        else:
            gate, rest = h.chunk(2, -1)
            h = ACTIVATIONS[activation](gate) * rest
        y = h @ down.T
        y = y if down_bias is None else y + down_bias[e].to(dtype)
        out.index_add_(0, token, y.to(wide) * expert_weights[token, choice, None].to(wide))
    return out.to(dtype)


def int8_rounded(x: torch.Tensor, weight: QuantWeight) -> torch.Tensor:
    """What activation_format="int8" makes of x: each row and group to 127 steps of its largest magnitude, in fp64."""
    k = x.shape[1]
    group = 128 if weight.scale_layout == "block128" else weight.group_size or k
    if weight.scale_layout in ("channel", "tensor") or group == k:
        group = min(INT8_GROUP, k)
    return _rounded(x, group, torch.float32)


def q8_0_rounded(x: torch.Tensor, weight: QuantWeight) -> torch.Tensor:
    """What ggml makes of x as it multiplies: each row and 32 of k to 127 steps, whose size is fp16, in fp64."""
    return _rounded(x, Q8_0_BLOCK, torch.float16)


def _rounded(x: torch.Tensor, group: int, scale_dtype: torch.dtype) -> torch.Tensor:
    k = x.shape[1]
    groups = torch.nn.functional.pad(x.float(), (0, -k % group)).unflatten(1, (-1, group))
    top = groups.abs().amax(2, keepdim=True)
    scale = torch.where(top == 0, 1.0, top / 127).to(scale_dtype)
    steps = torch.full_like(top, 127) / top  # 127 / top is 127 times a rounded reciprocal: ties round otherwise
    codes = torch.round(groups * torch.where(top == 0, 1.0, steps))
    return (codes.double() * scale.double()).flatten(1)[:, :k]


# What activations are rounded to, by `activation_format`: (x, weight) -> x in fp64.
ROUNDED = {"int8": int8_rounded, "q8_0": q8_0_rounded}


def nan_filled(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An output buffer that shows every element nobody wrote."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@dataclasses.dataclass(frozen=True)
class ErrorReport:
    """Verdict of the error rule.

    Attributes:
        ok: whether every row passes.
        error, error_peer: RMS error over all rows, relative to the oracle's RMS.
        message: the first failing row and its numbers, or "".
    """

    ok: bool
    error: float
    error_peer: float
    message: str = ""


def judge(actual: torch.Tensor, oracle: torch.Tensor, peer: torch.Tensor, k: int = 1) -> ErrorReport:
    """Apply the error rule to [S, N] results; k is the length of the contraction. Synchronises."""
    if actual.shape != oracle.shape or actual.dtype != peer.dtype:
        shape = f"result is {tuple(actual.shape)} {actual.dtype}; expected {tuple(oracle.shape)} {peer.dtype}"
        return ErrorReport(False, float("nan"), float("nan"), shape)
    if oracle.numel() == 0:
        return ErrorReport(True, 0.0, 0.0)
    wide = oracle.dtype
    error, error_peer = actual.to(wide) - oracle, peer.to(wide) - oracle
    rounding = torch.finfo(actual.dtype).eps / 2 + ACCUMULATION * k**0.5
    rms, rms_peer, rms_ref = (t.square().mean(1).sqrt() for t in (error, error_peer, oracle))
    top, top_peer, top_ref = (t.abs().amax(1) for t in (error, error_peer, oracle))
    bad = ~(rms <= RMS_FACTOR * rms_peer + rounding * rms_ref)  # written so that NaN fails
    bad |= ~(top <= MAX_FACTOR * top_peer + rounding * top_ref)
    bad |= (top_ref == 0) & (actual != 0).any(1)
    scale = float(oracle.square().mean().sqrt()) or 1.0
    total, total_peer = (float(t.square().mean().sqrt()) / scale for t in (error, error_peer))
    message = ""
    if bool(bad.any()):
        r = int(bad.nonzero()[0])
        message = (
            f"{int(bad.sum())} of {len(bad)} rows fail, first row {r}: RMS error {float(rms[r]):.3g} (peer "
            f"{float(rms_peer[r]):.3g}), max {float(top[r]):.3g} (peer {float(top_peer[r]):.3g}), "
            f"reference RMS {float(rms_ref[r]):.3g}"
        )
    return ErrorReport(not message, total, total_peer, message)


def assert_no_worse(actual: torch.Tensor, oracle: torch.Tensor, peer: torch.Tensor, k: int = 1) -> None:
    """Raise AssertionError unless the result passes the error rule (see `judge`)."""
    report = judge(actual, oracle, peer, k)
    if not report.ok:
        raise AssertionError(report.message)
