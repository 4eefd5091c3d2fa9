"""Peer "transformers": the implementations of a layer of experts that transformers has, on unquantized weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

__all__ = ["IMPLEMENTATIONS", "SYNCING", "experts_of", "needed_bytes", "reason_against"]

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
SYNCING = ("eager",)  # it asks the host which experts have rows


def reason_against(implementation: str, device: torch.device) -> str | None:
    """Why an implementation does not run on a device, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'qexperts[transformers]'"
    if implementation == "batched_mm" and device.type == "cpu":
        return "copies the weights of every row, which transformers does on GPUs only"
    return None


def experts_of(implementation: str, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> Any:
    """An experts module over weights [E, 2I, H] and [E, H, I], which are not copied; it is called as `QuantExperts`.

    Qwen3-MoE's: gate block first, silu, no biases.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, intermediate = w_down.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, hidden_act="silu"
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(w_gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(w_down, requires_grad=False)
    return module.eval()


def needed_bytes(implementation: str, w_gate_up: torch.Tensor, rows: int) -> int:
    """Memory that a call takes for copies of weights: batched_mm makes one of both weights for each row."""
    if implementation != "batched_mm":
        return 0
    return rows * (w_gate_up[0].numel() * 3 // 2) * w_gate_up.element_size()
