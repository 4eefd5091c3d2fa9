"""Models of transformers with quantized experts: loaded from every format, quantized, saved, compiled, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import transformers
import writers
from safetensors.torch import load_file, save_file

import qexperts
from qexperts import QuantExperts, UnsupportedError, dequantize, from_pretrained, quantize, quantize_experts

IDS = torch.tensor([[1, 17, 3, 99, 42, 7, 64, 23, 5, 11]])


def tokens(model: Any, new: int = 8) -> list[int]:
    return model.generate(IDS, max_new_tokens=new, do_sample=False)[0].tolist()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def assert_same(model: Any, reference: Any) -> None:
    """Same greedy tokens, and logits that differ by no more than fp32 sums in another order do."""
    torch.testing.assert_close(logits(model), logits(reference), rtol=2e-4, atol=2e-4)
    assert tokens(model) == tokens(reference)


def experts_of(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


@pytest.mark.filterwarnings("ignore:.*have been dequantized")
@pytest.mark.parametrize("architecture", writers.CONFIGS)
@pytest.mark.parametrize("format", writers.FORMATS)
def test_every_format_of_every_architecture(tmp_path: Path, format: str, architecture: str) -> None:
    reference = writers.write(writers.tiny(architecture, format=format), format, tmp_path)
    model = from_pretrained(tmp_path, backend="torch")
    assert experts_of(model)
    assert_same(model, reference)
