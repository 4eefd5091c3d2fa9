"""Models of transformers on GPUs: loaded, prepared, compiled, spread over two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import transformers
import writers

from qexperts import QuantExperts, dequantize, from_pretrained, quantize, quantize_experts

pytestmark = pytest.mark.gpu
IDS = torch.tensor([[1, 17, 3, 99, 42, 7, 64, 23, 5, 11]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    config = writers.CONFIGS["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers = 256, 128, 4
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(plain: Path) -> torch.Tensor:
    """Logits in fp32 on the CPU, of the weights that int4_sym stands for."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, experts_implementation="eager"
    )
    for name, p in model.named_parameters():
        if ".experts." in name:
            p.data = dequantize(quantize(p.data, "int4_sym"), torch.float32).to(p.dtype)
    with torch.no_grad():
        return model.float()(IDS).logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.float().cpu()


def assert_close(model: Any, reference: torch.Tensor) -> None:
    """bf16 activations keep 8 bits; logits are sums of many of them."""
    y = logits(model)
    assert (y - reference).norm() / reference.norm() < 0.03


@pytest.mark.parametrize("prepare", [True, False])
def test_on_one_gpu(plain: Path, reference: torch.Tensor, prepare: bool, tmp_path: Path) -> None:
    model = from_pretrained(plain, quantize="int4_sym", device_map=0, prepare=prepare)
    layouts = {m.gate_up.weight_layout for m in model.modules() if isinstance(m, QuantExperts)}
    assert layouts == ({"tiles"} if prepare else {"public"})
    assert_close(model, reference)
    ids = model.generate(IDS.cuda(), max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, device_map=0, prepare=prepare)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(IDS.cuda(), max_new_tokens=8, do_sample=False), ids)


def test_other_ways_to_the_gpu(plain: Path, reference: torch.Tensor) -> None:
    moved = from_pretrained(plain, quantize="int4_sym", prepare=False).cuda()
    assert_close(moved, reference)
    stock = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, device_map=0)
    assert_close(quantize_experts(copy.deepcopy(stock), "int4_sym"), reference)
    stock.set_experts_implementation("eager")
    eager = logits(stock)
    stock.set_experts_implementation("qexperts")
    assert_close(stock, eager)


def test_memory_while_loading(plain: Path) -> None:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = from_pretrained(plain, quantize="int4_sym", device_map=0)
    resident, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert resident < 1.1 * sum(t.numel() * t.element_size() for t in model.parameters()) + 2**20
    assert peak <= 1.2 * resident


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus(plain: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    layers = {f"model.layers.{i}": i // 2 for i in range(4)}
    rest = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    device_map = {**layers, **rest}
    model = from_pretrained(plain, quantize="int4_sym", device_map=device_map)
    devices = {m.gate_up.device.index for m in model.modules() if isinstance(m, QuantExperts)}
    assert devices == {0, 1}
    assert_close(model, reference)
    ids = model.generate(IDS.cuda(), max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(again.generate(IDS.cuda(), max_new_tokens=8, do_sample=False), ids)
