"""Quantized linears that are no experts: dequantized, or modules of the library that transformers runs them with."""

from __future__ import annotations

import copy
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import writers
from safetensors.torch import load_file, save_file

from qexperts import QuantExperts, UnsupportedError, from_pretrained, quantize_experts

IDS = torch.tensor([[1, 17, 3, 99, 42, 7, 64, 23, 5, 11]])
GOLDEN = sorted((Path(__file__).parent / "data" / "checkpoints").glob("ckpt_*"))
GPTQ = ("gptq_v1_sym", "gptq_v2_asym", "gptq_desc_act", "awq", "auto_round_w2", "auto_round_gptq", "auto_round_awq")
COMPRESSED = ("ct_group_sym", "ct_channel_sym", "ct_fp8_channel")


def absent(*packages: str) -> str:
    return " and ".join(package for package in packages if find_spec(package) is None)


MISSING = {format: absent("gptqmodel", "optimum", "accelerate") for format in GPTQ}
MISSING |= {format: absent("compressed_tensors") for format in COMPRESSED}


def needs_library(format: str) -> Any:
    """The parameter of a test that runs the library of a format."""
    reason = f"not installed: {MISSING[format]}"
    return pytest.param(format, marks=pytest.mark.skipif(bool(MISSING[format]), reason=reason))


def without_library(format: str) -> Any:
    return pytest.param(format, marks=pytest.mark.skipif(not MISSING[format], reason="its library is installed"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def experts_of(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


def packed(model: Any) -> dict[str, torch.nn.Module]:
    """The linears that hold no floating weight."""
    held = ("qweight", "weight_packed")
    found = {name: m for name, m in model.named_modules() if any(hasattr(m, key) for key in held)}
    fp8 = (name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn and ".experts." not in name)
    return found | {name.removesuffix(".weight"): model.get_submodule(name.removesuffix(".weight")) for name in fp8}


def stored(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the quantized linears of a checkpoint that are no experts."""
    tensors = load_file(path / "model.safetensors")
    suffixes = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(suffixes) and ".experts." not in name}
    return {name: t for name, t in tensors.items() if name.rpartition(".")[0] in modules}


def assert_library(model: Any, path: Path) -> None:
    """Every quantized linear holds the tensors of the checkpoint, no other does, and the experts are ours."""
    tensors = stored(path)
    assert packed(model).keys() == {name.rpartition(".")[0] for name in tensors} != set()
    assert experts_of(model)
    with torch.no_grad():
        dense = from_pretrained(path, backend="torch", dtype=model.dtype, linears="dequantize")
        y, expected = logits(model), logits(dense)
    # a library may compute in half precision whatever the dtype of the model
    assert (y - expected).norm() <= 2e-3 * expected.norm()


# ---- with the libraries


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("format", [needs_library(format) for format in (*GPTQ, *COMPRESSED)])
def test_library(tmp_path: Path, format: str, architecture: str) -> None:
    writers.write(writers.tiny(architecture, format=format), format, tmp_path)
    model = from_pretrained(tmp_path, backend="torch", linears="library")
    for name in ("weight_packed", "weight_scale"):
        for module_name, module in packed(model).items():
            if hasattr(module, name):  # GPTQModel packs anew, compressed-tensors does not
                assert torch.equal(getattr(module, name).float(), stored(tmp_path)[f"{module_name}.{name}"].float())
    assert_library(model, tmp_path)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 14)


@pytest.mark.parametrize("format", [needs_library("gptq_v1_sym"), needs_library("awq")])
def test_auto_takes_a_library_with_kernels(tmp_path: Path, format: str) -> None:
    writers.write(writers.tiny("glm4_moe"), format, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="qexperts")
        model = from_pretrained(tmp_path, backend="torch")
    assert any("shared_experts" in name for name in packed(model))
    assert_library(model, tmp_path)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    with pytest.raises(UnsupportedError, match='reload with linears="dequantize"'):
        model.save_pretrained(tmp_path / "own")
    assert not list((tmp_path / "own").glob("*"))


@pytest.mark.parametrize("format", [needs_library("ct_group_sym"), needs_library("ct_fp8_channel")])
def test_auto_leaves_a_library_without_kernels(tmp_path: Path, format: str) -> None:
    writers.write(writers.tiny("qwen3_moe"), format, tmp_path)
    with pytest.warns(UserWarning, match=r"8 quantized linears .* dequantized .* no kernel for them"):
        model = from_pretrained(tmp_path, backend="torch")
    assert not packed(model)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(from_pretrained(tmp_path / "own", backend="torch")), logits(model))


@pytest.mark.parametrize("format", [needs_library("gptq_v1_sym")])
def test_golden_checkpoints(format: str) -> None:
    """Those that the libraries wrote: as near to the expected logits as half precision is."""
    run = 0
    for path in GOLDEN:
        method = json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
        if method == "compressed-tensors" and find_spec("compressed_tensors") is None:
            continue
        expected = load_file(path / "expected.safetensors")
        model = from_pretrained(path, dtype=torch.float32, backend="torch", linears="library")
        assert packed(model)
        with torch.no_grad():
            y = model(expected["input_ids"]).logits
        assert (y - expected["logits"]).norm() <= 2e-3 * expected["logits"].norm()
        run += 1
    assert run >= 2


@pytest.mark.parametrize("format", [needs_library("gptq_v1_sym")])
def test_linears_of_another_scheme_are_dequantized(tmp_path: Path, format: str) -> None:
    """GPTQ with another number of bits in one layer, which transformers' quantizer knows nothing of."""
    writers.write(writers.tiny("qwen3_moe"), format, tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    name = "model.layers.1.self_attn.q_proj"
    written, _ = writers.gptq(torch.randn(64, 64), bits=8)
    tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in written.items()}
    config["quantization_config"]["dynamic"] = {"+:" + name.replace(".", r"\."): {"bits": 8}}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=rf"1 quantized linears .*{name}"):
        from_pretrained(tmp_path, backend="torch", linears="library")
    with pytest.warns(UserWarning, match=rf"1 quantized linears .*{name}.* dequantized"):
        model = from_pretrained(tmp_path, backend="torch")
    assert len(packed(model)) == 7 and type(model.get_submodule(name)) is torch.nn.Linear
    dense = from_pretrained(tmp_path, backend="torch", linears="dequantize")
    assert (logits(model) - logits(dense)).norm() <= 2e-3 * logits(dense).norm()


# ---- without them


@pytest.mark.parametrize("format", [without_library(format) for format in ("gptq_v1_sym", "awq", "ct_group_sym")])
def test_a_library_that_is_not_installed(tmp_path: Path, format: str) -> None:
    reason = r"it is not installed \(pip install (gptqmodel|optimum|compressed-tensors)"
    writers.write(writers.tiny("qwen3_moe"), format, tmp_path)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        from_pretrained(tmp_path, backend="torch", linears="library")
    assert "cannot run 8 quantized linears" in str(caught.value)
    with pytest.warns(UserWarning, match=rf"8 quantized linears .* dequantized to torch.float32.*{reason}"):
        model = from_pretrained(tmp_path, backend="torch")
    dense = from_pretrained(tmp_path, backend="torch", linears="dequantize")
    assert not packed(model) and torch.equal(logits(model), logits(dense))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_linears_on_a_cpu(tmp_path: Path) -> None:
    writers.write(writers.tiny("glm4_moe", format="fp8_block128"), "fp8_block128", tmp_path)
    assert any("shared_experts" in name for name in stored(tmp_path))
    reason = "not installed .pip install accelerate" if absent("accelerate") else "need a GPU with fp8"
    with pytest.raises(UnsupportedError, match=reason):
        from_pretrained(tmp_path, backend="torch", linears="library")
    with pytest.warns(UserWarning, match=rf"6 quantized linears .*{reason}"):
        assert not packed(from_pretrained(tmp_path, backend="torch"))


@pytest.mark.gpu
def test_fp8_linears_on_a_gpu(tmp_path: Path) -> None:
    """transformers' own modules where their kernels can be had, else the reason; experts are ours in both cases."""
    writers.write(writers.tiny("glm4_moe", format="fp8_block128"), "fp8_block128", tmp_path)
    options = {"dtype": torch.bfloat16, "device_map": "cuda"}
    dense = from_pretrained(tmp_path, linears="dequantize", **options)
    model = from_pretrained(tmp_path, **options)
    assert experts_of(model)
    with torch.no_grad():
        y, expected = (m(IDS.cuda()).logits.float() for m in (model, dense))
    assert (y - expected).norm() <= (0.1 if packed(model) else 0) * expected.norm()


def test_auto_round_zeros_that_gptq_reads_otherwise(tmp_path: Path) -> None:
    writers.write(writers.tiny("qwen3_moe"), "auto_round_gptq", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["sym"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"it does not read .* as AutoRound writes it"):
        from_pretrained(tmp_path, backend="torch", linears="library")


@pytest.mark.parametrize("format", ["awq", "auto_round_gptq", "ct_int8_channel"])
def test_dequantized_without_a_word(tmp_path: Path, format: str) -> None:
    writers.write(writers.tiny("qwen3_moe"), format, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="qexperts")
        model = from_pretrained(tmp_path, backend="torch", linears="dequantize")
    assert not packed(model)


def test_nothing_to_run(tmp_path: Path) -> None:
    """Unquantized checkpoints and our own have no such linears."""
    plain = writers.tiny("qwen3_moe", torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    quantize_experts(plain, "int4_sym", group_size=32, backend="torch").save_pretrained(tmp_path / "own")
    for path in (tmp_path / "plain", tmp_path / "own"):
        assert experts_of(from_pretrained(path, backend="torch", linears="library"))
    with pytest.raises(ValueError, match="linears='packed'; expected one of auto, dequantize, library"):
        from_pretrained(tmp_path / "plain", linears="packed")
