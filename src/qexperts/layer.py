"""A whole layer of experts, composed of the public operations: gather, grouped GEMM, gate, grouped GEMM, combine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .checks import check_activation_format, check_activations
from .formats import QuantWeight
from .ops import grouped_gemm, prepare, traced
from .pages import use_huge_pages
from .steps import ACTIVATIONS, KernelSteps, TorchSteps

__all__ = ["ACTIVATIONS", "Activation", "QuantExperts", "QuantProjection", "fused_experts"]

Activation = str | Callable[[torch.Tensor], torch.Tensor]


def fused_experts(
    x: torch.Tensor,
    w_gate_up: QuantWeight,
    w_down: QuantWeight,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    activation: Activation = "silu",
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    backend: str = "auto",
    activation_format: str | None = None,
) -> torch.Tensor:
    """The experts of a Mixture-of-Experts layer on the tokens that a router sends them.

        h = x[t] @ w_gate_up[e].T + gate_up_bias[e]                 e = expert_ids[t, j]
        y = (act(h[:I]) * h[I:]) @ w_down[e].T + down_bias[e]       ungated: act(h); callable: activation(h)
        out[t] = sum over j of expert_weights[t, j] * y

    Args:
        x: [T, H]; bf16 or fp16, on the CPU also fp32; any row stride.
        w_gate_up: E matrices [2I, H], gate block first, or [I, H] for experts without a gate.
        w_down: E matrices [H, I].
        expert_ids: [T, top_k]; int32 or int64. Ids outside 0..E-1 (sentinels of expert parallelism) contribute
            exactly nothing, whatever their weight is.
        expert_weights: [T, top_k]; fp32, bf16 or fp16.
        activation: a name from `ACTIVATIONS`, or a function of all of h: [S, 2I] (or [S, I]) -> [S, I], which also
            sees rows of sentinels.
        gate_up_bias, down_bias: [E, 2I] (or [E, I]) and [E, H]; dtype of x; finite.
        backend, activation_format: as for `grouped_gemm`, of both multiplications.
    Returns: [T, H]; dtype of x. Each step before the last is rounded to the dtype of x, as a loop over experts in
        torch does it; the weighted sum is taken in fp32, in the order of the slots, and rounded once.
    Raises: ValueError if arguments disagree; UnsupportedError if no backend can run them.

    Deterministic, forward and backward. Differentiable with respect to x and expert_weights. Synchronisation and CUDA
    graphs as `grouped_gemm`.
    """
    experts = _Experts(w_gate_up, w_down, activation, gate_up_bias, down_bias, None, backend, activation_format)
    return _run("fused_experts", x, experts, expert_ids, expert_weights)


@dataclasses.dataclass(frozen=True, eq=False)
class _Experts:
    """All that a layer of experts is, but for the tokens; fields as the arguments of `fused_experts`.

    Attributes:
        phase, decode_threshold: as for `grouped_gemm`, of both multiplications.
        input_order: [E, H]; int32; each row a permutation: column j of w_gate_up[e] multiplies x[:, input_order[e, j]].
            None if that is x[:, j].
    """

    w_gate_up: QuantWeight
    w_down: QuantWeight
    activation: Activation
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    input_order: torch.Tensor | None
    backend: str
    activation_format: str | None
    phase: str = "auto"
    decode_threshold: int | None = None


def _run(
    where: str, x: torch.Tensor, experts: _Experts, expert_ids: torch.Tensor, expert_weights: torch.Tensor
) -> torch.Tensor:
    x = check_activations(where, x, experts.w_gate_up.K, experts.w_gate_up.device)
    _check_weights(where, experts, x.dtype)
    _check_routing(where, x, expert_ids, expert_weights)
    given = (x, expert_weights, experts.gate_up_bias, experts.down_bias)
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if traced(x) or gradients or experts.backend == "torch" or KernelSteps.reason_against(x.device, x.dtype):
        return _run_with(TorchSteps, where, x, experts, expert_ids, expert_weights)
    with KernelSteps.current(x.device):
        return _run_with(KernelSteps, where, x, experts, expert_ids, expert_weights)


def _run_with(
    steps: type[TorchSteps] | type[KernelSteps],
    where: str,
    x: torch.Tensor,
    experts: _Experts,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
) -> torch.Tensor:
    w_gate_up, w_down, count = experts.w_gate_up, experts.w_down, experts.w_gate_up.E
    plan = steps.plan(expert_ids, count)
    assert plan.row_to_slot is not None and plan.row_to_token is not None
    multiply = functools.partial(
        grouped_gemm,
        backend=experts.backend,
        phase=experts.phase,
        decode_threshold=experts.decode_threshold,
        activation_format=experts.activation_format,
    )
    row_expert: torch.Tensor | None = None
    if experts.input_order is not None or experts.gate_up_bias is not None or experts.down_bias is not None:
        row_expert = expert_ids.reshape(-1).index_select(0, plan.row_to_slot).clamp(0, count - 1)

    if torch.is_grad_enabled() and x.requires_grad:  # the gradient of a repetition is a sum in a fixed order
        rows = x.repeat_interleave(expert_ids.shape[1], 0).index_select(0, plan.row_to_slot)
    else:
        rows = x.index_select(0, plan.row_to_token)
    if experts.input_order is not None and row_expert is not None:
        rows = rows.gather(1, experts.input_order.index_select(0, row_expert).long())
    h = multiply(rows, w_gate_up, plan)
    if experts.gate_up_bias is not None and row_expert is not None:
        h = h + experts.gate_up_bias.index_select(0, row_expert)
    h = _activate(where, steps, h, experts.activation, w_down.K)
    y = multiply(h, w_down, plan)
    if experts.down_bias is not None and row_expert is not None:
        y = y + experts.down_bias.index_select(0, row_expert)
    return steps.combine(y, plan, expert_ids, expert_weights)


class QuantExperts(nn.Module):
    """`fused_experts` as a module with frozen weights, called as the experts of transformers are.

    Its parameters are the tensors of the two weights, not copies (int4 codes are uint8, and none requires a gradient),
    and the biases. `.to(device)` moves all of them; a cast (`.half()`, `.to(dtype)`) reaches the biases only. A state
    dict records formats and layouts, and one of another format or layout is refused before anything is loaded.

    Args:
        w_gate_up, w_down, activation, gate_up_bias, down_bias, backend, activation_format: as for `fused_experts`.
        input_order: [E, H]; int32; each row a permutation: column j of w_gate_up[e] multiplies x[:, input_order[e, j]]
            (weights whose groups were formed in another order than that of their inputs). Default: x[:, j].
    """

    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    input_order: nn.Parameter | None

    def __init__(
        self,
        w_gate_up: QuantWeight,
        w_down: QuantWeight,
        activation: Activation = "silu",
        *,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        input_order: torch.Tensor | None = None,
        backend: str = "auto",
        activation_format: str | None = None,
    ) -> None:
        super().__init__()
        experts = _Experts(
            w_gate_up, w_down, activation, gate_up_bias, down_bias, input_order, backend, activation_format
        )
        _check_weights("QuantExperts", experts, None)
        check_activation_format("QuantExperts", activation_format, traced=False)
        self.gate_up_proj = QuantProjection(w_gate_up)
        self.down_proj = QuantProjection(w_down)
        self.register_parameter("gate_up_bias", _frozen(gate_up_bias))
        self.register_parameter("down_bias", _frozen(down_bias))
        self.register_parameter("input_order", _frozen(input_order))
        self.activation = activation
        self.backend = backend
        self.activation_format = activation_format

    @property
    def gate_up(self) -> QuantWeight:
        """The weight over the present parameters: [E, 2I, H]."""
        return self.gate_up_proj.weight()

    @property
    def down(self) -> QuantWeight:
        """The weight over the present parameters: [E, H, I]."""
        return self.down_proj.weight()

    def prepare(self, backend: str | None = None) -> QuantExperts:
        """Bring both weights into the layout in which a backend runs fastest (default: the module's own), in place.

        The codes are permuted where they lie: a `QuantWeight` that shares them must not be used any more.
        Returns: self.
        """
        for projection in (self.gate_up_proj, self.down_proj):
            projection.hold(prepare(projection.weight(), self.backend if backend is None else backend))
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        *,
        phase: str = "auto",
        decode_threshold: int | None = None,
    ) -> torch.Tensor:
        """hidden_states [T, H] or [B, T, H]; top_k_index, top_k_weights [tokens, top_k]; result as hidden_states.

        phase, decode_threshold: as for `grouped_gemm`, of both multiplications; a caller who knows it may say so.
        """
        experts = _Experts(
            self.gate_up,
            self.down,
            self.activation,
            self.gate_up_bias,
            self.down_bias,
            self.input_order,
            self.backend,
            self.activation_format,
            phase,
            decode_threshold,
        )
        out = _run(
            "QuantExperts",
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            experts,
            top_k_index.reshape(-1, top_k_index.shape[-1]),
            top_k_weights.reshape(-1, top_k_weights.shape[-1]),
        )
        return out.view(hidden_states.shape)


_TENSORS = ("codes", "scales", "zeros")


class QuantProjection(nn.Module):
    """Keeps one `QuantWeight` as parameters `codes`, `scales` and `zeros`, whose dtypes never change."""

    codes: nn.Parameter
    scales: nn.Parameter | None
    zeros: nn.Parameter | None

    def __init__(self, weight: QuantWeight) -> None:
        super().__init__()
        self.hold(weight)

    def hold(self, weight: QuantWeight) -> None:
        """Replace the parameters by the tensors of another weight."""
        self._held: QuantWeight | None = None
        for name in _TENSORS:
            self.register_parameter(name, _frozen(getattr(weight, name)))
        use_huge_pages(*weight.tensors)
        self.format = weight.format.name
        self.group_size, self.scale_layout = weight.group_size, weight.scale_layout
        self.weight_layout, self.scale_dtype = weight.weight_layout, weight.scale_dtype

    def weight(self) -> QuantWeight:
        """The weight over the present parameters. A record costs as much host time as launching a kernel, so the last
        one is kept."""
        if torch.compiler.is_compiling():
            return self._weight()
        held, tensors = self._held, self._parameters
        if held is None or any(getattr(held, name) is not tensors[name] for name in _TENSORS):
            held = self._held = self._weight()
        return held

    def _weight(self) -> QuantWeight:
        return QuantWeight(
            self.codes,
            self.scales,
            self.zeros,
            self.format,  # type: ignore[arg-type]
            self.group_size,
            self.scale_layout,
            self.weight_layout,
            self.scale_dtype,
        )

    def extra_repr(self) -> str:
        return repr(self.weight())

    def get_extra_state(self) -> dict[str, Any]:
        scale_dtype = None if self.scale_dtype is None else str(self.scale_dtype).removeprefix("torch.")
        names = ("format", "group_size", "scale_layout", "weight_layout")
        return {name: getattr(self, name) for name in names} | {"scale_dtype": scale_dtype}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        own = self.get_extra_state()
        if state != own:
            raise ValueError(
                f"QuantExperts.load_state_dict: the state holds a weight with {state}; this module has {own}. Make the "
                f"module from a weight of that kind; prepare() it after loading, unless the state was saved prepared."
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}_extra_state" in state_dict:  # torch looks at it last, when the parameters are overwritten
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantProjection:
        def move(t: torch.Tensor) -> torch.Tensor:
            probe = fn(t.new_empty(0))
            return fn(t) if probe.dtype == t.dtype else t.to(probe.device)

        super()._apply(move, recurse)
        use_huge_pages(*self._parameters.values())
        return self


def _frozen(t: torch.Tensor | None) -> nn.Parameter | None:
    return None if t is None else nn.Parameter(t.detach(), requires_grad=False)


def _activate(
    where: str,
    steps: type[TorchSteps] | type[KernelSteps],
    h: torch.Tensor,
    activation: Activation,
    columns: int,
) -> torch.Tensor:
    if not callable(activation):
        return steps.gate(h, activation, columns)
    out = activation(h)
    if out.shape != (h.shape[0], columns) or out.dtype != h.dtype:
        raise ValueError(
            f"{where}: activation returned {tuple(out.shape)} {out.dtype}; expected [S, I] = "
            f"{(h.shape[0], columns)} {h.dtype}, the input of w_down."
        )
    return out


def _check_weights(where: str, experts: _Experts, dtype: torch.dtype | None) -> None:
    """dtype: of the biases; None for any."""
    w_gate_up, w_down, activation = experts.w_gate_up, experts.w_down, experts.activation
    e, n, h, i = w_gate_up.E, w_gate_up.N, w_gate_up.K, w_down.K
    if (e, h) != (w_down.E, w_down.N) or w_down.device != w_gate_up.device:
        raise ValueError(
            f"{where}: w_down is {(w_down.E, w_down.N, i)} on {w_down.device}; expected [E, H, I] = ({e}, {h}, I) on "
            f"{w_gate_up.device} for w_gate_up {(e, n, h)}."
        )
    if not callable(activation):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{where}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}, or a function "
                f"[S, {n}] -> [S, {i}]."
            )
        if n != i and n != 2 * i:  # `in` would fail on symbolic sizes
            raise ValueError(
                f"{where}: w_gate_up is {(e, n, h)}, w_down {(e, h, i)}; expected [E, 2I, H], or [E, I, H] without a "
                f"gate, with I={i} from w_down. Anything else needs a function as activation."
            )
    order = experts.input_order
    if order is not None and (
        tuple(order.shape) != (e, h) or order.dtype != torch.int32 or order.device != w_gate_up.device
    ):
        raise ValueError(
            f"{where}: input_order is {tuple(order.shape)} {order.dtype} on {order.device}; expected [E, H] = {(e, h)} "
            f"int32 on {w_gate_up.device}."
        )
    biases = (("gate_up_bias", experts.gate_up_bias, (e, n)), ("down_bias", experts.down_bias, (e, h)))
    for name, bias, shape in biases:
        if bias is None:
            continue
        if tuple(bias.shape) != shape or bias.device != w_gate_up.device or bias.dtype != (dtype or bias.dtype):
            raise ValueError(
                f"{where}: {name} is {tuple(bias.shape)} {bias.dtype} on {bias.device}; expected {shape} on "
                f"{w_gate_up.device} in the dtype of x."
            )


def _check_routing(where: str, x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> None:
    # sizes are formatted inside the raise only: under torch.compile that makes them constants
    if expert_ids.ndim != 2 or expert_ids.shape[0] != x.shape[0] or expert_ids.shape[1] < 1:
        raise ValueError(
            f"{where}: expert_ids is {tuple(expert_ids.shape)}; expected [T, top_k] with T={x.shape[0]}, as x, "
            f"and top_k >= 1."
        )
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{where}: expert_ids is {expert_ids.dtype}; expected int32 or int64.")
    if expert_weights.shape != expert_ids.shape:
        raise ValueError(
            f"{where}: expert_weights is {tuple(expert_weights.shape)}; expected {tuple(expert_ids.shape)}, one for "
            f"each of expert_ids."
        )
    if expert_weights.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{where}: expert_weights is {expert_weights.dtype}; expected fp32, bf16 or fp16.")
    for name, t in (("expert_ids", expert_ids), ("expert_weights", expert_weights)):
        if t.device != x.device:
            raise ValueError(f"{where}: {name} is on {t.device}, x on {x.device}; put all tensors on one device.")
