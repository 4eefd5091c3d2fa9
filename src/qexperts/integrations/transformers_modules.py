"""The experts modules of transformers: what one computes, and the same as `QuantExperts`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..formats import QuantWeight, index_experts
from ..layer import Activation, QuantExperts, fused_experts

__all__ = [
    "ExpertsSpec",
    "experts_forward",
    "experts_modules",
    "experts_of",
    "fold_order",
    "fp8_experts_forward",
    "replace",
]

# Classes of transformers.activations and torch.nn, by name -> the name in `layer.ACTIVATIONS`.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertsSpec:
    """What an experts module computes, but for its weights.

    Attributes:
        name: of the module in its model.
        experts, hidden, intermediate: E, H and I.
        gated, biased: whether there is a gate, whether there are biases.
        transposed: the parameters are [E, H, 2I] and [E, I, H].
        interleaved: rows of w_gate_up alternate between gate and up.
        activation: as for `fused_experts`, on rows in the order of the model.
    """

    name: str
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool
    activation: Activation

    @property
    def up_name(self) -> str:
        """The model's name of w_gate_up."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def rows(self) -> int:
        """N of w_gate_up."""
        return self.intermediate * (2 if self.gated else 1)

    def shape(self, projection: str) -> tuple[int, int, int]:
        """[E, N, K] of "gate_up_proj" or "down_proj"."""
        if projection == "down_proj":
            return self.experts, self.hidden, self.intermediate
        return self.experts, self.rows, self.hidden

    def interleave(self, t: torch.Tensor) -> torch.Tensor:
        """[2I, ...], gate block first -> the order of the model."""
        return t.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) if self.gated and self.interleaved else t


def unsupported(where: str, problem: str, reason: str) -> UnsupportedError:
    return UnsupportedError(where, problem, {"transformers": reason}, answer="no support for")


def experts_of(where: str, model: nn.Module) -> Iterator[tuple[ExpertsSpec, nn.Module]]:
    """The experts modules of a model, each with what it computes.

    Raises: UnsupportedError for experts that transformers' experts interface does not cover, or that `QuantExperts`
        cannot compute, and for a model that has none.
    """
    found = 0
    for name, module in list(model.named_modules()):
        if _is_experts(module):
            found += 1
            yield describe(where, name, module), module
        elif any(p is not None and p.ndim == 3 for key, p in module._parameters.items() if key.endswith("proj")):
            raise unsupported(
                where,
                f"{name} ({type(module).__name__})",
                "its experts do not follow transformers' experts interface (use_experts_implementation), so what they "
                "compute is unknown",
            )
    if not found:
        raise unsupported(where, type(model).__name__, "it has no module of experts that can be replaced")


def _is_experts(module: nn.Module) -> bool:
    """Whether use_experts_implementation has decorated the class of a module."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(type(module), "_apply_gate")


def experts_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of the experts of each layer, ours or transformers', whether or not ours could replace them."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, QuantExperts) or _is_experts(m)]


def describe(where: str, name: str, module: Any) -> ExpertsSpec:
    """What a module decorated by use_experts_implementation computes; see `experts_of`."""
    label = f"{name} ({type(module).__name__})"
    if getattr(module, "has_post_expert_norm", False):
        raise unsupported(where, label, "it normalises the result of each expert (post_expert_norm)")
    gated, biased = bool(module.has_gate), bool(module.has_bias)
    up_name = "gate_up_proj" if gated else "up_proj"
    expected = {up_name, "down_proj"} | ({f"{up_name}_bias", "down_proj_bias"} if biased else set())
    present = {key for key, _ in module.named_parameters()} | {key for key, _ in module.named_buffers()}
    if present != expected:
        raise unsupported(
            where, label, f"it has the parameters {', '.join(sorted(present))}; known are {', '.join(sorted(expected))}"
        )
    up, down = getattr(module, up_name), module.down_proj
    for key, weight in ((up_name, up), ("down_proj", down)):
        if weight.ndim != 3 or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise unsupported(where, label, f"{key} is {tuple(weight.shape)} {weight.dtype}, no floating [E, N, K]")
    if module.is_transposed:
        up, down = up.mT, down.mT
    experts, rows, hidden = up.shape
    if tuple(down.shape) != (experts, hidden, rows // (2 if gated else 1)):
        raise unsupported(
            where,
            label,
            f"{up_name} is {tuple(up.shape)}, down_proj {tuple(down.shape)}: no [E, 2I, H] and [E, H, I]",
        )
    interleaved = not getattr(module, "is_concatenated", True)
    activation = activation_of(module)
    if interleaved and not callable(activation):
        raise unsupported(where, label, "it interleaves gate and up, but splits them in two blocks")
    return ExpertsSpec(
        name, experts, hidden, down.shape[2], gated, biased, bool(module.is_transposed), interleaved, activation
    )


def activation_of(module: Any) -> Activation:
    """What lies between the two projections: a name where transformers' own default gate and a known function are used,
    else the module's own code, on a copy of the module without weights."""
    from transformers.integrations.moe import _default_apply_gate

    known = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        known = None
    if known is not None:
        return known
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = dict.fromkeys(module._parameters)
    return shell._apply_gate if shell.has_gate else shell.act_fn


def fold_order(spec: ExpertsSpec, gate_up: QuantWeight, bias: torch.Tensor | None, order: torch.Tensor) -> None:
    """Reorder the rows of w_gate_up, in place, so that its result comes in the order of the columns of w_down.

    Args:
        bias: [E, N] of w_gate_up, or None.
        order: [E, I] int32: column j of w_down[e] multiplies h[:, order[e, j]].
    Raises: UnsupportedError if the activation mixes elements, so that a permutation of its input is none of its result.
    """
    _check_elementwise(spec, order[0].long(), gate_up.device)
    for e in range(spec.experts):
        rows = _rows(spec, order[e].long())
        for t in gate_up.tensors:
            t[e] = index_experts(t[e], rows)
        if bias is not None:
            bias[e] = bias[e].index_select(0, rows)


def _rows(spec: ExpertsSpec, order: torch.Tensor) -> torch.Tensor:
    """Rows of w_gate_up whose activation is h[:, order]."""
    if not spec.gated:
        return order
    if spec.interleaved:
        return torch.stack([2 * order, 2 * order + 1], 1).flatten()
    return torch.cat([order, order + spec.intermediate])


def _check_elementwise(spec: ExpertsSpec, order: torch.Tensor, device: torch.device) -> None:
    if not callable(spec.activation):
        return
    h = torch.linspace(-3, 3, spec.rows, device=device).roll(1)[None]
    with torch.no_grad():
        if torch.equal(spec.activation(h[:, _rows(spec, order)]), spec.activation(h)[:, order]):
            return
    raise unsupported(
        "qexperts.from_pretrained",
        f"the act-order of {spec.name}.down_proj",
        f"its activation {spec.activation} is no function of each element alone",
    )


def replace(model: nn.Module, name: str, experts: QuantExperts) -> None:
    """Put experts in the place of a module, under the same hook of accelerate, if it has one."""
    old = model.get_submodule(name)
    model.set_submodule(name, experts)
    experts.train(old.training)
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(experts, old._hf_hook)  # type: ignore[arg-type]


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`fused_experts` on the parameters of an experts module of transformers, as they are.

    Registered as the experts implementation "qexperts". Arguments and result as transformers' experts interface.
    Raises: UnsupportedError for weights that are neither bf16 nor fp16, and for what `QuantExperts` cannot compute.
    """
    where, name = "experts_implementation='qexperts'", type(self).__name__
    if getattr(self, "has_post_expert_norm", False):
        raise unsupported(where, name, "it normalises the result of each expert (post_expert_norm)")
    gate_up, down = (self.gate_up_proj if self.has_gate else self.up_proj), self.down_proj
    weights = [_plain(where, name, w.mT if getattr(self, "is_transposed", False) else w) for w in (gate_up, down)]
    return _forward(self, weights, hidden_states, top_k_index, top_k_weights)


def fp8_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As `experts_forward`, for transformers' FP8Experts: e4m3 weights with a scale for 128 x 128 of them. Activations
    are not rounded to fp8."""
    where, name = "experts_implementation='qexperts'", type(self).__name__
    if tuple(self.block_size or ()) != (128, 128):  # type: ignore[arg-type]
        raise unsupported(where, name, f"its block_size is {self.block_size}; fp8 experts need (128, 128)")
    if self.activation_scheme != "dynamic":
        raise unsupported(where, name, f"its activation_scheme is {self.activation_scheme!r}; only 'dynamic' is run")
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    weights = []
    for key in (up_name, "down_proj"):
        codes, scales = getattr(self, key), getattr(self, f"{key}_scale_inv")
        if codes.dtype != torch.float8_e4m3fn or scales.dtype not in (torch.float32, torch.bfloat16):
            raise unsupported(where, name, f"{key} is {codes.dtype} with scales in {scales.dtype}")
        weights.append(QuantWeight(codes, scales, None, "fp8_e4m3", None, "block128"))  # type: ignore[arg-type]
    return _forward(self, weights, hidden_states, top_k_index, top_k_weights)


def _forward(
    module: Any, weights: list[QuantWeight], x: torch.Tensor, ids: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    biased = getattr(module, "has_bias", False)
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    gate_up, down = weights
    return fused_experts(
        x,
        gate_up,
        down,
        ids,
        expert_weights,
        module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
        gate_up_bias=getattr(module, f"{up_name}_bias") if biased else None,
        down_bias=module.down_proj_bias if biased else None,  # type: ignore[arg-type]
    )


def _plain(where: str, name: str, weight: torch.Tensor) -> QuantWeight:
    formats = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if weight.dtype not in formats:
        raise unsupported(
            where, name, f"its weights are {weight.dtype}; load the model with dtype=torch.bfloat16 or torch.float16"
        )
    return QuantWeight(weight, None, None, formats[weight.dtype])  # type: ignore[arg-type]
