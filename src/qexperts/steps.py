"""What a layer does before, between and after its multiplications: in torch, or on GPUs as one kernel each.

A decode step of a layer is bound by launches: in torch these steps are about 25 of them, as kernels four.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from .backends import triton_backend
from .plan import TokenPlan

__all__ = ["ACTIVATIONS", "KernelSteps", "TorchSteps"]

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda t: F.relu(t).square(),
}


class TorchSteps:
    """On any device, traced or with gradients."""

    @staticmethod
    def plan(expert_ids: torch.Tensor, experts: int) -> TokenPlan:
        """Slots sorted by expert, as `TokenPlan.from_expert_ids`."""
        return TokenPlan.from_expert_ids(expert_ids, experts)

    @staticmethod
    def gate(h: torch.Tensor, activation: str, columns: int) -> torch.Tensor:
        """act(h[:, :I]) * h[:, I:], or act(h) if it has no more than I columns: [S, I]; each rounded to the dtype."""
        act = ACTIVATIONS[activation]
        if h.shape[1] == columns:
            return act(h)
        gate, up = h.chunk(2, -1)
        return act(gate) * up

    @staticmethod
    def combine(
        y: torch.Tensor, plan: TokenPlan, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """out[t] = sum over j of expert_weights[t, j] * y[slot_to_row[t, j]]: [T, N]; fp32, rounded once; nothing of
        ids that are no expert."""
        assert plan.slot_to_row is not None
        y = y.index_select(0, plan.slot_to_row)
        slots = y.view(*expert_ids.shape, y.shape[1])
        known = (expert_ids >= 0) & (expert_ids < plan.num_experts)
        weights = torch.where(known, expert_weights.float(), 0.0)
        return (slots * weights[..., None]).sum(1).to(y.dtype)


class KernelSteps:
    """The same on GPUs with Triton, without gradients; sizes and dtypes as `fused_experts` has checked them."""

    @staticmethod
    def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
        """Why they cannot run, or None."""
        return triton_backend.no_device(device, dtype)

    @staticmethod
    def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Make a device the current one, as launches need it."""
        if device.type == "cpu":
            return contextlib.nullcontext()
        module = torch.get_device_module(device)
        return contextlib.nullcontext() if module.current_device() == device.index else module.device(device)

    @staticmethod
    def plan(expert_ids: torch.Tensor, experts: int) -> TokenPlan:
        from .kernels import between

        slots = expert_ids.numel()
        if not 0 < slots <= between.MAX_SLOTS:
            return TokenPlan.from_expert_ids(expert_ids, experts)
        made = expert_ids.new_empty(3 * slots + experts, dtype=torch.int32)
        row_to_slot, slot_to_row, row_to_token, counts = made.split([slots, slots, slots, experts])
        between.sort(row_to_slot, slot_to_row, row_to_token, counts, expert_ids.contiguous())
        return TokenPlan(counts, slots, row_to_slot, slot_to_row, row_to_token)

    @staticmethod
    def gate(h: torch.Tensor, activation: str, columns: int) -> torch.Tensor:
        from .kernels import between

        out = h.new_empty(h.shape[0], columns)
        if len(out):
            between.gate(out, h.contiguous(), activation)
        return out

    @staticmethod
    def combine(
        y: torch.Tensor, plan: TokenPlan, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        from .kernels import between

        assert plan.slot_to_row is not None
        out = y.new_empty(expert_ids.shape[0], y.shape[1])
        if len(out):
            ids, weights = expert_ids.contiguous(), expert_weights.contiguous()
            between.combine(out, y, plan.slot_to_row, ids, weights, plan.num_experts)
        return out
