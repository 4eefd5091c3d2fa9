"""Whether a model computes what it should, before it is timed."""

from __future__ import annotations

import torch
from torch import nn

from ..integrations.transformers_modules import experts_modules
from ..layer import QuantExperts
from ..testing import experts_loop, judge
from .generation import Decode

__all__ = ["NEAR", "Loop", "check_decode", "check_experts", "relative"]

NEAR = 0.25  # relative difference of logits up to which two ways to compute them are taken for one model
ROWS = 8  # tokens that `check_experts` sends through each layer


def relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.float() - reference.float()).norm() / reference.float().norm())


def check_decode(decode: Decode) -> str | None:
    """What is wrong unless a step on the fixed cache gives about the logits of the whole sequence without one."""
    decode.reset()
    tokens = [decode.prompt, decode.first.clone()]
    decode.step()
    tokens.append(decode.token.clone())
    y = decode.step()[:, -1].clone()
    decode.reset()
    decode.select_prompt()
    with torch.no_grad():
        expected = decode.model(torch.cat(tokens, 1), logits_to_keep=1).logits[:, -1]
    if (difference := relative(y, expected)) < NEAR:
        return None
    return f"logits of a decode step differ by {difference:.2g} from those of a prefill; expected less than {NEAR}"


class Loop(nn.Module):
    """What `QuantExperts` computes, one expert after the other in plain torch, on weights rounded to the dtype of x."""

    def __init__(self, experts: QuantExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        m = self.experts
        return experts_loop(
            x, m.gate_up, m.down, ids, weights, m.activation, gate_up_bias=m.gate_up_bias, down_bias=m.down_bias,
            input_order=m.input_order,
        )  # fmt: skip


@torch.no_grad()
def check_experts(model: nn.Module, top_k: int) -> str | None:
    """The first layer of `QuantExperts` whose result breaks the error rule against the dequantized weights in fp32, on
    random tokens and routing; None if all of them hold it."""
    generator = torch.Generator().manual_seed(0)
    for name, module in experts_modules(model):
        if not isinstance(module, QuantExperts):
            continue
        weight, dtype = module.gate_up, next(p.dtype for p in model.parameters() if p.is_floating_point())
        x = torch.randn(ROWS, weight.K, generator=generator).to(dtype).to(weight.device)
        ids = torch.stack([torch.randperm(weight.E, generator=generator)[:top_k] for _ in range(ROWS)])
        args = ids.to(weight.device), torch.full((ROWS, top_k), 1 / top_k, device=weight.device)
        oracle = Loop(module)(x.float(), *args)
        verdict = judge(module(x, *args), oracle, Loop(module)(x, *args), weight.K)
        if not verdict.ok:
            return f"{name}: {verdict.message}"
    return None
