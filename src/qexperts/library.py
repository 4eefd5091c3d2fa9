"""The public operations as torch operators over flat tensors: what torch.compile, make_fx and fake tensors record.

An eager call never comes here (the dispatcher would cost more than the call's own host time); while a call is traced,
`ops.py` calls these instead. A kernel is the eager call itself, so both give the same bits, and values that only a run
knows (counts that do not add up on a CPU) are checked in it; a fake checks everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .checks import PackedCall, check_activations, check_columns, check_counts, check_frozen, check_packed
from .formats import QuantWeight, weight_fields
from .ops import Manner, run_columns, run_gradient, run_now, run_packed
from .plan import TokenPlan

__all__: list[str] = []

_LIBRARY = torch.library.Library("qexperts", "FRAGMENT")
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_exact_strides") if hasattr(torch.Tag, name)
)
_WEIGHT = (  # the fields of QuantWeight, in their order
    "Tensor codes, Tensor? scales, Tensor? zeros, str format, int? group_size, str scale_layout, str weight_layout, "
    "ScalarType? scale_dtype"
)
_FIELDS = 8

Setup = Callable[[Any, tuple[Any, ...], torch.Tensor], None]


def _define(
    schema: str, run: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor], setup: Setup, backward: Any
) -> None:
    name = f"qexperts::{schema.partition('(')[0]}"
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name.partition("::")[2], run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=setup, lib=_LIBRARY)


def _save(
    ctx: Any, where: str, x: torch.Tensor, counts: torch.Tensor, weight: QuantWeight, scales: torch.Tensor | None = None
) -> None:
    """Keep what `_gradient` needs; scales: [E, N] of `moe_gemm`."""
    check_frozen(where, weights=weight.codes, scales=weight.scales if scales is None else scales, zeros=weight.zeros)
    codes, weight_scales, zeros, *ctx.fields = weight_fields(weight)
    ctx.save_for_backward(counts, codes, weight_scales, zeros, scales)
    ctx.where, ctx.dtype = where, x.dtype


def _gradient(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient with respect to the first argument, the activations."""
    counts, codes, weight_scales, zeros, scales = ctx.saved_tensors
    fields = (codes, weight_scales, zeros, *ctx.fields)
    dx = torch.ops.qexperts.grouped_gemm_backward(dy, counts, *fields, scales, ctx.dtype, ctx.where)
    return dx, *[None] * (len(ctx.needs_input_grad) - 1)


def _grouped_gemm(x: torch.Tensor, counts: torch.Tensor, *arguments: Any) -> torch.Tensor:
    x, weight = _check_grouped(x, counts, arguments)
    return run_now("grouped_gemm", x, weight, TokenPlan(counts, x.shape[0]), *arguments[_FIELDS:])


def _grouped_gemm_fake(x: torch.Tensor, counts: torch.Tensor, *arguments: Any) -> torch.Tensor:
    x, weight = _check_grouped(x, counts, arguments)
    return x.new_empty(x.shape[0], weight.N)


def _check_grouped(
    x: torch.Tensor, counts: torch.Tensor, arguments: tuple[Any, ...]
) -> tuple[torch.Tensor, QuantWeight]:
    weight = QuantWeight(*arguments[:_FIELDS])
    x = check_activations("grouped_gemm", x, weight.K, weight.device)
    check_counts("grouped_gemm", counts, x, weight)
    return x, weight


def _grouped_gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, counts, *arguments = inputs
    _save(ctx, "grouped_gemm", x, counts, QuantWeight(*arguments[:_FIELDS]))


_define(
    f"grouped_gemm(Tensor x, Tensor counts, {_WEIGHT}, str backend, str phase, int? decode_threshold) -> Tensor",
    _grouped_gemm,
    _grouped_gemm_fake,
    _grouped_gemm_setup,
    _gradient,
)


def _backward(dy: torch.Tensor, counts: torch.Tensor, *arguments: Any) -> torch.Tensor:
    scales, dtype, where = arguments[_FIELDS:]
    weight = QuantWeight(*arguments[:_FIELDS])
    return run_gradient(where, dy, weight, TokenPlan(counts, dy.shape[0]), dtype, scales).contiguous()


def _backward_fake(dy: torch.Tensor, counts: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return dy.new_empty(dy.shape[0], QuantWeight(*arguments[:_FIELDS]).K, dtype=arguments[_FIELDS + 1])


def _once(ctx: Any, ddx: torch.Tensor) -> None:
    raise RuntimeError("qexperts::grouped_gemm_backward: the experts are differentiable once, not twice.")


_define(
    f"grouped_gemm_backward(Tensor dy, Tensor counts, {_WEIGHT}, Tensor? column_scales, ScalarType dtype, str where) "
    "-> Tensor",
    _backward,
    _backward_fake,
    lambda ctx, inputs, output: None,
    _once,
)


def _split(arguments: tuple[Any, ...]) -> tuple[PackedCall, Manner]:
    return arguments[:8], arguments[8:]  # type: ignore[return-value]


def _moe(*arguments: Any) -> torch.Tensor:
    return run_packed(*_split(arguments))


def _moe_fake(*arguments: Any) -> torch.Tensor:
    call, (where, scale_scheme, _, _) = _split(arguments)
    x, weight = check_packed(where, scale_scheme, call)
    check_counts(where, call[2], x, weight)
    return x.new_empty(x.shape[0], weight.N)


def _moe_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    call, (where, scale_scheme, _, _) = _split(inputs)
    x, weight = check_packed(where, scale_scheme, call)
    _save(ctx, where, x, call[2], weight)


_define(
    "moe(Tensor activations, Tensor weights, Tensor num_tokens_per_expert, Tensor? scales, Tensor? zeros, "
    "int weight_bits, int group_size, bool asym, str where, str? scale_scheme, str phase, int? decode_threshold) "
    "-> Tensor",
    _moe,
    _moe_fake,
    _moe_setup,
    _gradient,
)


def _moe_gemm_fake(
    activations: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    x, weight = check_columns("moe_gemm", activations, weights, scales)
    check_counts("moe_gemm", counts, x, weight)
    return x.new_empty(x.shape[0], weight.N)


def _moe_gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    activations, weights, counts, scales = inputs
    x, weight = check_columns("moe_gemm", activations, weights, scales)
    _save(ctx, "moe_gemm", x, counts, weight, scales)


_define(
    "moe_gemm(Tensor activations, Tensor weights, Tensor num_tokens_per_expert, Tensor? scales) -> Tensor",
    run_columns,
    _moe_gemm_fake,
    _moe_gemm_setup,
    _gradient,
)
