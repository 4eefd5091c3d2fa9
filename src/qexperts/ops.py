"""The public operations: check the arguments once, select a backend, run.

Under torch.compile and fake tensors they call the operators of `library.py` instead, whose kernels come back here.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.autograd.function import once_differentiable

from .backends import BACKENDS, Backend, Call, Problem, select
from .checks import (
    PackedCall,
    check_activation_format,
    check_activations,
    check_columns,
    check_counts,
    check_frozen,
    check_out,
    check_packed,
    check_phase,
)
from .formats import QuantWeight, weight_fields
from .layouts import restore, to_layout
from .plan import TokenPlan, check_tokens
from .tuning import DECODE_THRESHOLD
from .workspace import clear_workspaces

__all__ = [
    "check_tokens",
    "clear_moe_prefill_workspace_cache",
    "grouped_gemm",
    "moe",
    "moe_gemm",
    "moe_gemm_decode",
    "moe_gemm_prefill",
    "prepare",
    "unprepare",
]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def traced(x: torch.Tensor) -> bool:
    """Whether a call is recorded (torch.compile, make_fx, fake tensors) rather than run on the memory of x."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(x) not in _PLAIN


def grouped_gemm(
    x: torch.Tensor,
    weight: QuantWeight,
    plan: TokenPlan,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    phase: str = "auto",
    decode_threshold: int | None = None,
    activation_format: str | None = None,
) -> torch.Tensor:
    """Multiply each row by the weight of its expert.

        y[r] = x[r] @ dequantize(weight)[expert(r)].T        r = 0..S-1

    Args:
        x: [S, K]; bf16 or fp16, on the CPU also fp32; rows sorted by expert; any row stride.
        weight: E matrices of logical shape [N, K], any quantized format, scale layout and scale dtype; bf16 or fp16
            weights need activations of their dtype, or fp32.
        plan: S rows over E experts, on the device of x.
        out: [S, N]; dtype of x; every element is written. Not with gradients.
        backend: "auto" or a name from `qexperts.backends.BACKENDS`.
        phase, decode_threshold: which kernel multiplies, as for `moe`; right for any counts.
        activation_format: None, or "int8" (less exact; `cpu` backend, integer weights, not traced; faster with AVX-512
            VNNI only, slower without): x rounded to 127 steps of the largest magnitude of each row and group (256 k
            where a group is all of K); gradients pass through the rounding.
    Returns: [S, N]; dtype of x; fp32 accumulation, rounded once; 0 in rows that belong to no expert.
    Raises: ValueError if arguments disagree; UnsupportedError if no backend can run them.

    Differentiable with respect to x; asking for a gradient of the weight raises ValueError. No host
    synchronisation and safe in a CUDA graph, but for the case the torch backend names in `explain`.
    """
    where = "grouped_gemm"
    weight.check_alive(where)
    x = check_activations(where, x, weight.K, weight.device)
    if plan.device != x.device or plan.num_experts != weight.E or plan.total_tokens != x.shape[0]:
        raise ValueError(
            f"{where}: plan has {plan.total_tokens} rows over {plan.num_experts} experts on {plan.device}; expected "
            f"{x.shape[0]} rows over {weight.E} experts on {x.device}, as x and weight have."
        )
    if out is not None:
        check_out(where, out, x, weight.N)
    check_phase(where, phase, decode_threshold)
    check_activation_format(where, activation_format, traced=traced(x))
    if traced(x):
        y = torch.ops.qexperts.grouped_gemm(x, plan.counts, *weight_fields(weight), backend, phase, decode_threshold)
    else:
        y = run_now(where, x, weight, plan, backend, phase, decode_threshold, activation_format=activation_format)
    return y if out is None else out.copy_(y)


def moe_gemm(
    activations: torch.Tensor,
    weights: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grouped GEMM on unquantized weights stored [E, K, N].

        y[r] = (x[r] @ w[e(r)]) * scales[e(r)]

    Args:
        activations: [total_tokens, K]; bf16 or fp16, on the CPU also fp32; sorted by expert; any row stride.
        weights: [E, K, N]; bf16 or fp16, the dtype of the activations unless those are fp32.
        num_tokens_per_expert: [E]; int32 (int64 is cast on the device); sums to total_tokens.
        scales: [E, N]; bf16, fp16 or fp32; multiplies output column n of expert e; default none. Applied to the fp32
            sum; only bf16 on a GPU with one grouped mm has it rounded to bf16 first, where torch gives no other.
    Returns: [total_tokens, N]; dtype of the activations; fp32 accumulation.
    Raises: ValueError for a mismatch; on the CPU also if the counts do not add up.

    Synchronisation, graphs and gradients as `grouped_gemm`.
    """
    if traced(activations):
        return torch.ops.qexperts.moe_gemm(activations, weights, num_tokens_per_expert, scales)
    return run_columns(activations, weights, num_tokens_per_expert, scales)


def moe_gemm_decode(
    activations: torch.Tensor,
    weights: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    weight_bits: int = 4,
    group_size: int = 128,
    asym: bool = False,
    activation_format: str | None = None,
) -> torch.Tensor:
    """Grouped GEMM for few rows per expert; right for any counts, meant to be fast at 1-4.

        y[r] = x[r] @ ((codes - zeros) * scales)[e(r)].T

    Args:
        activations: [total_tokens, K]; bf16 or fp16, on the CPU also fp32; sorted by expert; any row stride.
        weights: [E, N, K * weight_bits / 8]; uint8; N a multiple of 16. With weight_bits=16: [E, N, K] in bf16 or
            fp16, the dtype of the activations unless those are fp32. float8_e4m3fn or float8_e5m2 [E, N, K]: FP8,
            whatever weight_bits says.
        num_tokens_per_expert: [E]; int32 (int64 is cast on the device); sums to total_tokens.
        scales: [E, N, K / group_size]; dtype of the activations; None for weight_bits=16.
        zeros: shape and dtype of scales, integers; required if asym, refused otherwise.
        weight_bits: 2, 4, 8 or 16.
        group_size: consecutive k that share a scale; divides K.
        asym: codes are unsigned and come with zeros.
        activation_format: None, or "int8" as for `grouped_gemm`.
    Returns: [total_tokens, N]; dtype of the activations; fp32 accumulation, rounded once.
    Raises: ValueError for any mismatch; on the CPU also for counts that do not add up. On a GPU rows past the sum
        are written as 0 and nothing is read to check it: see `check_tokens`.

    Synchronisation, graphs and gradients as `grouped_gemm`.
    """
    call = (activations, weights, num_tokens_per_expert, scales, zeros, weight_bits, group_size, asym)
    return _packed(call, ("moe_gemm_decode", None, "decode", None), activation_format)


def moe_gemm_prefill(
    activations: torch.Tensor,
    weights: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    weight_bits: int = 4,
    group_size: int = 128,
    asym: bool = False,
    scale_scheme: str | None = None,
    activation_format: str | None = None,
) -> torch.Tensor:
    """Grouped GEMM for many, unevenly spread rows per expert.

        y[r] = x[r] @ ((codes - zeros) * scales)[e(r)].T

    Arguments, result, errors and promises as `moe_gemm_decode`, and:

    Args:
        scale_scheme: None, or "per_tensor": weights are torch.int8, float8_e4m3fn or float8_e5m2 [E, K, N]
            row-major, scales fp32 [E]; group_size and weight_bits are ignored, zeros and asym refused.
    """
    call = (activations, weights, num_tokens_per_expert, scales, zeros, weight_bits, group_size, asym)
    return _packed(call, ("moe_gemm_prefill", scale_scheme, "prefill", None), activation_format)


def moe(
    activations: torch.Tensor,
    weights: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    weight_bits: int = 4,
    group_size: int = 128,
    asym: bool = False,
    phase: str = "auto",
    decode_threshold: int | None = None,
    activation_format: str | None = None,
) -> torch.Tensor:
    """One entry point for prefill and decode; bit-identical to the kernel it dispatches to.

    Arguments, result, errors and promises as `moe_gemm_decode`, and:

    Args:
        phase: "decode", "prefill", or "auto": decode when every expert has at most decode_threshold rows. Shapes
            decide first (total_tokens <= threshold is decode, total_tokens > threshold * E prefill). In between the
            counts decide: on the CPU they are read; on a GPU the kernels read them, or both phases give the same bits.
        decode_threshold: rows per expert, at least 0; by default 4, or what `qexperts tune` measured on this device
            for such a call. (ARK 0.16 compares total rows with 128; this is rows per expert, as ARK's repository has
            it.)
    """
    check_phase("moe", phase, decode_threshold)
    call = (activations, weights, num_tokens_per_expert, scales, zeros, weight_bits, group_size, asym)
    return _packed(call, ("moe", None, phase, decode_threshold), activation_format)


def prepare(weight: QuantWeight, backend: str = "auto", *, keep_source: bool = False) -> QuantWeight:
    """Bring a weight into the layout in which a backend runs fastest, for prefill and decode alike.

    Args:
        weight: in the public layout. Its codes are permuted in place, expert by expert, so that no second copy of
            them exists; the weight itself is released and raises when used (tensors that share its memory change).
        backend: a name from `qexperts.backends.BACKENDS`, or "auto": the one that `auto` picks on the weight's device
            for activations of its scale dtype (bf16 for fp32 scales).
        keep_source: work on a copy and leave the weight as it is.
    Returns: the same weight prepared, or the weight itself if the backend reads its public layout (unquantized
        weights, K not a multiple of 64, the torch backend). `unprepare` gives the public layout back, bit for bit.
    Raises: ValueError if the weight is prepared already or has been released; UnsupportedError as `grouped_gemm`.
    """
    where = "prepare"
    _check_public(where, weight)
    half = torch.float16 in (weight.scale_dtype, weight.codes.dtype)
    x = torch.empty(0, weight.K, dtype=torch.float16 if half else torch.bfloat16, device=weight.device)
    problem = Problem.of(where, x, weight)
    if backend in BACKENDS and BACKENDS[backend].no_layout(weight) is None:  # may read no other layout than its own
        problem = dataclasses.replace(problem, weight_layout=BACKENDS[backend].layout)
    chosen = select(problem, backend)
    if chosen.layout == "public" or chosen.no_layout(weight) is not None:
        return weight
    source = weight.with_tensors(*(t.clone() for t in weight.tensors)) if keep_source else weight
    prepared = to_layout(source, chosen.layout)
    chosen.settle(prepared)
    if not keep_source:
        weight.release()
    return prepared


def unprepare(weight: QuantWeight) -> QuantWeight:
    """The public layout of a prepared weight, in new tensors: exactly what `prepare` was given."""
    return restore(weight)


def clear_moe_prefill_workspace_cache() -> None:
    """Release the scratch memory that the torch backend keeps between calls (not that of captured graphs)."""
    clear_workspaces()


def _check_public(where: str, weight: QuantWeight) -> None:
    weight.check_alive(where)
    if weight.weight_layout != "public":
        raise ValueError(f"{where}: the weight is already in layout {weight.weight_layout!r}; unprepare() it first.")


# where, scale_scheme, phase, decode_threshold
Manner = tuple[str, str | None, str, int | None]


def _packed(call: PackedCall, manner: Manner, activation_format: str | None) -> torch.Tensor:
    check_activation_format(manner[0], activation_format, traced=traced(call[0]))
    if traced(call[0]):
        return torch.ops.qexperts.moe(*call, *manner)
    return run_packed(call, manner, activation_format)


def run_packed(call: PackedCall, manner: Manner, activation_format: str | None = None) -> torch.Tensor:
    """`moe`, `moe_gemm_decode` and `moe_gemm_prefill`, not traced."""
    key = _kind(call, manner, activation_format)
    known = _BOUND.get(key) if key is not None else None
    if known is not None and (not call[0].is_cpu or _adds_up(call[2], call[0].shape[0])):
        return known(call[0], call[1], call[3], call[4], call[2])
    where, scale_scheme, phase, decode_threshold = manner
    x, weight = check_packed(where, scale_scheme, call)
    plan = _plan(where, call[2], x, weight)
    if key is not None and weight.codes is call[1] and x is call[0]:
        options = {"phase": phase, "decode_threshold": decode_threshold, "activation_format": activation_format}
        problem = Problem.of(where, x, weight, **options)
        _remember(key, select(problem), problem, weight)
    phase = _phase(plan, phase, decode_threshold)
    return run_now(
        where, x, weight, plan, phase=phase, decode_threshold=decode_threshold, activation_format=activation_format
    )


# Calls that have been checked, by everything the checks read: a call like one before costs a look-up.
_BOUND: dict[tuple[object, ...], Call] = {}
_MAX_BOUND = 4096


def _remember(key: tuple[object, ...], backend: Backend, problem: Problem, weight: QuantWeight) -> None:
    if backend.bind is not None:
        if len(_BOUND) >= _MAX_BOUND:
            _BOUND.clear()
        _BOUND[key] = backend.bind(problem, weight)


def _adds_up(counts: torch.Tensor, rows: int) -> bool:
    """Whether counts on the CPU, which are read there, are good; if not, the checks say why."""
    values = counts.tolist()
    return sum(values) == rows and min(values) >= 0


def _kind(call: PackedCall, manner: Manner, activation_format: str | None) -> tuple[object, ...] | None:
    """What decides how a call is run, the number of rows excepted; None if it is to be checked each time: with
    gradients, and for arguments that are no tensors."""
    x, weights, counts, scales, zeros = call[:5]
    if type(weights) not in _PLAIN or type(counts) not in _PLAIN or x.ndim != 2:
        return None
    if (scales is not None and type(scales) not in _PLAIN) or (zeros is not None and type(zeros) not in _PLAIN):
        return None
    if torch.is_grad_enabled() and _differentiable(x, weights, scales, zeros):
        return None
    return (
        manner,
        activation_format,
        *call[5:],
        x.dtype,
        x.shape[1],
        x.stride(),
        x.device,
        weights.data_ptr() & 15,
        _form(weights),
        _form(counts),
        scales if scales is None else _form(scales),
        zeros if zeros is None else _form(zeros),
    )


def _form(t: torch.Tensor) -> tuple[object, ...]:
    return t.dtype, t.shape, t.stride(), t.device


def _differentiable(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None
) -> bool:
    return (
        x.requires_grad
        or codes.requires_grad
        or (scales is not None and scales.requires_grad)
        or (zeros is not None and zeros.requires_grad)
    )


def _phase(plan: TokenPlan, phase: str, decode_threshold: int | None) -> str:
    """On the CPU the counts decide here, for kernels that have the same bits; elsewhere where they are."""
    if phase != "auto" or plan.device.type != "cpu":
        return phase
    limit = DECODE_THRESHOLD if decode_threshold is None else decode_threshold
    return "decode" if max(plan.host_counts()) <= limit else "prefill"


def run_columns(
    activations: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    """`moe_gemm`, not traced."""
    where = "moe_gemm"
    x, weight = check_columns(where, activations, weights, scales)
    plan = _plan(where, counts, x, weight)
    if scales is None:
        return run_now(where, x, weight, plan)
    _check_no_grad(where, scales=scales)
    y = run_now(where, x, weight, plan, wide=True)  # fp32, so that large sums times small scales do not overflow fp16
    return (y * _by_row(scales, plan)).to(x.dtype)


def run_gradient(
    where: str, dy: torch.Tensor, weight: QuantWeight, plan: TokenPlan, dtype: torch.dtype, scales: torch.Tensor | None
) -> torch.Tensor:
    """dx[r] = (dy[r] * scales[expert(r)]) @ dequantize(weight)[expert(r)] in dtype; scales: [E, N] of `moe_gemm`."""
    dy = (dy if scales is None else dy * _by_row(scales, plan).float()).to(dtype).contiguous()
    problem = Problem.of(where, dy, weight, backward=True)
    return select(problem).run(problem, dy, weight, plan)


def _by_row(scales: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    """[E, N] -> [S, N]."""
    return scales.index_select(0, plan.row_expert().clamp(max=plan.num_experts - 1))


def run_now(
    where: str,
    x: torch.Tensor,
    weight: QuantWeight,
    plan: TokenPlan,
    backend: str = "auto",
    phase: str = "auto",
    decode_threshold: int | None = None,
    wide: bool = False,
    activation_format: str | None = None,
) -> torch.Tensor:
    """Select a backend and run; what has been selected for a weight of this kind before is not selected again."""
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    key: tuple[object, ...] | None = None
    frozen = not torch.is_grad_enabled() or not _differentiable(x, codes, scales, zeros)
    if frozen and type(codes) in _PLAIN:
        key = (
            backend,
            phase,
            decode_threshold,
            wide,
            activation_format,
            *weight_fields(weight)[3:],
            x.dtype,
            x.stride(),
            codes.data_ptr() & 15,
            _form(codes),
            scales if scales is None else _form(scales),
            zeros if zeros is None else _form(zeros),
        )
        known = _BOUND.get(key)
        if known is not None:
            return known(x, codes, scales, zeros, plan.counts)
    problem = Problem.of(
        where, x, weight, phase=phase, decode_threshold=decode_threshold, wide=wide, activation_format=activation_format
    )
    chosen = select(problem, backend)
    if key is not None:
        _remember(key, chosen, problem, weight)
    if not torch.is_grad_enabled():
        return chosen.run(problem, x, weight, plan)
    _check_no_grad(where, weights=weight.codes, scales=weight.scales, zeros=weight.zeros)
    if x.requires_grad:
        return _GroupedGemm.apply(x, chosen, problem, weight, plan)  # type: ignore[no-any-return]
    return chosen.run(problem, x, weight, plan)


class _GroupedGemm(torch.autograd.Function):
    """dx[r] = dy[r] @ dequantize(weight)[expert(r)]: adapters on frozen experts. Differentiable once."""

    @staticmethod
    def forward(ctx, x, backend: Backend, problem: Problem, weight: QuantWeight, plan: TokenPlan):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*weight.tensors)  # so that a weight changed before the backward is noticed
        ctx.problem, ctx.weight, ctx.plan = problem, weight, plan
        return backend.run(problem, x, weight, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        weight = ctx.weight.with_tensors(*ctx.saved_tensors)
        dx = run_gradient(ctx.problem.where, dy, weight, ctx.plan, ctx.problem.dtype, None)
        return dx, None, None, None, None


def _check_no_grad(where: str, **tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled():
        check_frozen(where, **tensors)


def _plan(where: str, counts: torch.Tensor, x: torch.Tensor, weight: QuantWeight) -> TokenPlan:
    check_counts(where, counts, x, weight)
    try:
        return TokenPlan.from_counts(counts, x.shape[0])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
