"""Models of transformers with quantized experts: loaded from every format, quantized, saved, compiled, refused."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import subprocess
import sys
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

ROOT = Path(__file__).parent.parent
IDS = torch.tensor([[1, 17, 3, 99, 42, 7, 64, 23, 5, 11]])


def tokens(model: Any, new: int = 8) -> list[int]:
    return model.generate(IDS, max_new_tokens=new, do_sample=False)[0].tolist()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS.to(model.device)).logits


def assert_same(model: Any, reference: Any) -> None:
    """Same greedy tokens, and logits that differ by no more than fp32 sums in another order do."""
    torch.testing.assert_close(logits(model), logits(reference), rtol=2e-4, atol=2e-4)
    assert tokens(model) == tokens(reference)


def experts_of(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


@pytest.mark.parametrize("architecture", writers.CONFIGS)
@pytest.mark.parametrize("format", writers.FORMATS)
def test_every_format_of_every_architecture(tmp_path: Path, format: str, architecture: str) -> None:
    reference = writers.write(writers.tiny(architecture, format=format), format, tmp_path)
    model = from_pretrained(tmp_path, backend="torch", linears="dequantize")
    assert experts_of(model)
    assert_same(model, reference)


# ---- golden checkpoints, written by the libraries themselves

GOLDEN = sorted((Path(__file__).parent / "data" / "checkpoints").glob("ckpt_*"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden_checkpoints(path: Path) -> None:
    expected = load_file(path / "expected.safetensors")
    model = from_pretrained(path, dtype=torch.float32, backend="torch", linears="dequantize")
    ids = expected["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected["logits"], rtol=0, atol=5e-6)
    new = expected["tokens"].shape[1] - ids.shape[1]
    assert torch.equal(model.generate(ids, max_new_tokens=new, do_sample=False), expected["tokens"])


def test_there_are_golden_checkpoints() -> None:
    assert len(GOLDEN) == 4


# ---- quantized here


def dequantized(model: Any, format: str = "int4_sym", **options: Any) -> Any:
    """A copy of a model with experts rounded as `quantize_experts` does it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            for p in (module.gate_up_proj, module.down_proj):
                w = p.data.mT if module.is_transposed else p.data
                w = dequantize(quantize(w, format, group_size=32, **options))
                p.data = (w.mT if module.is_transposed else w).contiguous()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("architecture", writers.CONFIGS)
def test_quantize_on_the_fly_save_and_reload(tmp_path: Path, architecture: str) -> None:
    """One model quantized while it is loaded, and one afterwards; both saved and loaded again."""
    plain = writers.tiny(architecture)
    reference = dequantized(plain)
    plain.save_pretrained(tmp_path / "plain")
    loaded = from_pretrained(tmp_path / "plain", quantize="int4_sym", group_size=32, backend="torch")
    assert_same(loaded, reference)
    assert quantize_experts(plain, "int4_sym", group_size=32, backend="torch") is plain
    assert torch.equal(logits(plain), logits(loaded))
    for i, model in enumerate((loaded, plain)):
        model.save_pretrained(tmp_path / str(i))
        again = from_pretrained(tmp_path / str(i), backend="torch")
        assert torch.equal(logits(again), logits(loaded))
        assert again.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
        by_auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        for module in experts_of(by_auto):
            module.backend = "torch"
        assert torch.equal(logits(by_auto), logits(loaded))


@pytest.mark.parametrize("format", ["gptq_desc_act", "awq", "auto_round_w2", "fp8_block128", "ct_fp8_channel"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_save_and_reload_what_others_wrote(tmp_path: Path, format: str, architecture: str) -> None:
    writers.write(writers.tiny(architecture, format=format), format, tmp_path)
    model = from_pretrained(tmp_path, backend="torch", linears="dequantize")
    model.save_pretrained(tmp_path / "own", max_shard_size="100KB")
    again = from_pretrained(tmp_path / "own", backend="torch")
    assert torch.equal(logits(again), logits(model))
    assert tokens(again) == tokens(model)
    for module, other in zip(experts_of(model), experts_of(again), strict=True):
        assert (module.input_order is None) == (other.input_order is None) == (format != "gptq_desc_act")


def test_prepared_weights(tmp_path: Path) -> None:
    """A backend with a layout of its own: same result, saved as public tensors."""
    plain = writers.tiny("qwen3_moe")
    reference = dequantized(plain)
    plain.save_pretrained(tmp_path / "plain")
    model = from_pretrained(tmp_path / "plain", quantize="int4_sym", group_size=32, backend="cpu")
    assert {module.gate_up.weight_layout for module in experts_of(model)} == {"panels"}
    assert_same(model, reference)
    model.save_pretrained(tmp_path / "saved")
    public = from_pretrained(tmp_path / "saved", backend="torch", prepare=False)
    assert {module.gate_up.weight_layout for module in experts_of(public)} == {"public"}
    assert_same(public, reference)
    again = from_pretrained(tmp_path / "saved", backend="cpu")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("format", ["int8_asym", "int2_sym", "fp8_e4m3"])
def test_other_formats(format: str) -> None:
    plain = writers.tiny("gpt_oss")
    reference = dequantized(plain, format)
    assert_same(quantize_experts(plain, format, group_size=32, backend="torch"), reference)


def test_unquantized_checkpoints_stay_as_they_are(tmp_path: Path) -> None:
    plain = writers.tiny("qwen3_moe", torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, backend="torch")
    assert {module.gate_up.format.name for module in experts_of(model)} == {"bf16"}
    assert model.dtype == torch.bfloat16
    model = from_pretrained(tmp_path, dtype=torch.float32, backend="torch")
    plain.float().set_experts_implementation("eager")
    assert_same(model, plain)


def test_bytes_of_prepared_experts() -> None:
    config = writers.CONFIGS["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size = 256, 128
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = sum(p.numel() * 2 for name, p in model.named_parameters() if ".experts." in name)
    quantize_experts(model, "int4_sym", backend="cpu")
    kept = sum(
        t.numel() * t.element_size()
        for name, t in model.state_dict().items()
        if ".experts." in name and torch.is_tensor(t)
    )
    assert kept <= 0.27 * dense


MEMORY_PROBE = """
import json, re, sys, threading, torch, qexperts, qexperts.integrations.transformers
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
small, large, backend = sys.argv[1:]
qexperts.from_pretrained(small, quantize="int4_sym", group_size=32, backend=backend)  # imports, threads
before, peak, done = anonymous(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = qexperts.from_pretrained(large, quantize="int4_sym", backend=backend)
done.set()
thread.join()
print(json.dumps([peak[0] - before, sum(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process's memory")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_memory_while_loading(tmp_path: Path, backend: str) -> None:
    """The peak is at most 1.2 times what stays, plus a few MB for Python and the allocator: no dense copy."""
    writers.tiny("qwen3_moe").save_pretrained(tmp_path / "small")
    config = writers.CONFIGS["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size, config.num_local_experts = 512, 256, 64
    config.num_experts, config.num_hidden_layers = 64, 4
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", MEMORY_PROBE, *(str(tmp_path / size) for size in ("small", "large")), backend]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    found = []
    for _ in range(3):  # how many tensors transformers' threads hold at a time depends on who else runs on this machine
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    peak, resident = min(found)
    assert peak <= 1.2 * resident + 2**23, found


def test_tied_embeddings(tmp_path: Path) -> None:
    """lm_head is not on disk, and no parameter that the checkpoint lacks."""
    config = writers.CONFIGS["olmoe"]()
    config.tie_word_embeddings = True
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain.save_pretrained(tmp_path / "plain")
    assert "lm_head.weight" not in load_file(tmp_path / "plain" / "model.safetensors")
    model = from_pretrained(tmp_path / "plain", quantize="int8_sym", group_size=32, backend="torch")
    assert_same(model, dequantized(plain, "int8_sym"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(from_pretrained(tmp_path / "own", backend="torch")), logits(model))


def test_dtypes(tmp_path: Path) -> None:
    """The argument, else what the config says, else that of the tensors."""
    plain = writers.tiny("qwen3_moe", torch.bfloat16)
    plain.save_pretrained(tmp_path)
    options = {"quantize": "int4_sym", "group_size": 32, "backend": "torch"}
    assert from_pretrained(tmp_path, **options).dtype == torch.bfloat16
    model = from_pretrained(tmp_path, dtype=torch.float16, **options)
    assert model.dtype == torch.float16 and experts_of(model)[0].gate_up.scale_dtype == torch.float16
    assert logits(model).isfinite().all()
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path, **options).dtype == torch.bfloat16


def test_devices_by_layer(tmp_path: Path) -> None:
    plain = writers.tiny("deepseek_v3", torch.bfloat16)  # fp32 activations are for CPUs
    plain.save_pretrained(tmp_path)
    options = {"quantize": "int8_sym", "group_size": 32, "backend": "torch"}
    model = from_pretrained(tmp_path, **options)
    by_layer = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for device_map in ("cpu", {"": "cpu"}, {**by_layer, **rest}):
        assert torch.equal(logits(from_pretrained(tmp_path, device_map=device_map, **options)), logits(model))
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    auto, there = (from_pretrained(tmp_path, device_map=where, **options) for where in ("auto", {"": best.type}))
    assert auto.device.type == best.type and torch.equal(logits(auto), logits(there))


def test_experts_are_not_offloaded(tmp_path: Path) -> None:
    writers.tiny("qwen3_moe").save_pretrained(tmp_path / "plain")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.experts.*offloaded"):
        from_pretrained(
            tmp_path / "plain",
            quantize="int4_sym",
            group_size=32,
            device_map=device_map,
            offload_folder=str(tmp_path / "off"),
        )


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = quantize_experts(writers.tiny("gpt_oss"), "int4_sym", group_size=32, backend="torch")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


# ---- the experts implementation "qexperts"


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that compiles nothing; the implementation picks its backend itself."""
    from qexperts.integrations import transformers_modules

    on_torch = functools.partial(transformers_modules.fused_experts, backend="torch")
    monkeypatch.setattr(transformers_modules, "fused_experts", on_torch)


def test_experts_implementation_picks_its_backend() -> None:
    model = writers.tiny("qwen3_moe", torch.bfloat16)
    model.set_experts_implementation("eager")
    eager, expected = logits(model), tokens(model)
    model.set_experts_implementation("qexperts")
    torch.testing.assert_close(logits(model), eager, rtol=0.05, atol=0.05)
    assert tokens(model) == expected


@pytest.mark.parametrize("architecture", writers.CONFIGS)
def test_experts_implementation(tmp_path: Path, architecture: str, on_torch: None) -> None:
    model = writers.tiny(architecture, torch.bfloat16)
    model.set_experts_implementation("eager")
    eager, expected = logits(model), tokens(model)
    model.set_experts_implementation("qexperts")
    torch.testing.assert_close(logits(model), eager, rtol=0.05, atol=0.05)
    assert tokens(model) == expected
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="qexperts")
    assert again.config._experts_implementation == "qexperts"
    assert torch.equal(logits(again), logits(model))


def experts_class(*, gate: bool = True, bias: bool = False, transposed: bool = False, interleaved: bool = False) -> Any:
    """An experts module of each layout, with transformers' own loop as its forward."""
    from transformers.integrations.moe import use_experts_implementation

    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 4, torch.nn.SiLU()
            rows = 64 if gate else 32
            for name, n, k in (("gate_up_proj" if gate else "up_proj", rows, 48), ("down_proj", 48, 32)):
                shape = (4, k, n) if transposed else (4, n, k)
                self.register_parameter(name, torch.nn.Parameter(torch.randn(shape) / 4, requires_grad=False))
                if bias:
                    value = torch.nn.Parameter(torch.randn(4, n), requires_grad=False)
                    self.register_parameter(f"{name}_bias", value)

        if interleaved:

            def _apply_gate(self, h: torch.Tensor) -> torch.Tensor:
                return (h[..., 1::2] + 1) * torch.sigmoid(h[..., ::2])

        def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            up = "gate_up_proj" if gate else "up_proj"

            def linear(h: torch.Tensor, name: str, e: int) -> torch.Tensor:
                w = getattr(self, name)[e]
                h = h @ w if transposed else h @ w.T
                return h + getattr(self, f"{name}_bias")[e] if bias else h

            for t, j in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
                e = int(ids[t, j])
                if 0 <= e < self.num_experts:
                    h = linear(x[t], up, e)
                    h = self._apply_gate(h) if gate else self.act_fn(h)
                    out[t] += weights[t, j] * linear(h, "down_proj", e)
            return out

    decorate = use_experts_implementation(
        is_concatenated=not interleaved, is_transposed=transposed, has_bias=bias, has_gate=gate
    )
    return decorate(Experts)


LAYOUTS = {
    "default": {},
    "no gate": {"gate": False},
    "no gate, biases": {"gate": False, "bias": True},
    "transposed": {"transposed": True},
    "transposed, biases": {"transposed": True, "bias": True},
    "interleaved": {"transposed": True, "bias": True, "interleaved": True},
}


class Config:
    _experts_implementation = "eager"


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, ids with both sentinels of expert parallelism, and weights that are never 0."""
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(6)[:3] - 1 for _ in range(9)])
    return torch.randn(9, 48), ids, torch.rand(9, 3) + 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_experts_interface(layout: str, on_torch: None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.config = Config()
    model.experts = experts_class(**LAYOUTS[layout])(model.config).bfloat16()
    x, ids, weights = routing()
    expected = copy.deepcopy(model.experts).float()(x, ids, weights)
    model.config._experts_implementation = "qexperts"
    with torch.no_grad():
        y = model.experts(x.bfloat16(), ids, weights)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)

    model.experts.float()
    rounded, model.config._experts_implementation = copy.deepcopy(model.experts), "eager"
    rounded.config = model.config
    for p in rounded.parameters():
        if p.ndim == 3:
            w = dequantize(quantize(p.mT if rounded.is_transposed else p, "int8_sym", group_size=16))
            p.data = w.mT if rounded.is_transposed else w
    quantize_experts(model, "int8_sym", group_size=16, backend="torch")
    torch.testing.assert_close(model.experts(x, ids, weights), rounded(x, ids, weights), rtol=1e-4, atol=1e-4)


def test_fp8_experts(on_torch: None) -> None:
    """transformers' own module for block-scaled fp8, which it runs on a GPU only."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config = writers.CONFIGS["qwen3_moe"]()
    config.hidden_size = config.moe_intermediate_size = 128
    config._experts_implementation = "qexperts"
    decorated = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = decorated(config, block_size=(128, 128)).requires_grad_(False)
    torch.manual_seed(0)
    dense = []
    for name in ("gate_up_proj", "down_proj"):
        weight = quantize(torch.randn(getattr(module, name).shape), "fp8_e4m3", scale_layout="block128")
        getattr(module, name).data = weight.codes
        getattr(module, f"{name}_scale_inv").data = weight.scales
        dense.append(dequantize(weight))
    x, ids, weights = torch.randn(5, 128), torch.tensor([[0, 3]] * 4 + [[1, 4]]), torch.rand(5, 2)
    expected = torch.zeros_like(x)
    for t, j in torch.cartesian_prod(torch.arange(5), torch.arange(2)).tolist():
        if (e := int(ids[t, j])) < 4:
            gate, up = (dense[0][e] @ x[t]).chunk(2)
            expected[t] += weights[t, j] * (dense[1][e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(module(x, ids, weights), expected, rtol=1e-4, atol=1e-3)
    module.block_size = (64, 128)
    with pytest.raises(UnsupportedError, match="block_size"):
        module(x, ids, weights)


@pytest.mark.parametrize(
    ("architecture", "how"), [("qwen3_moe", "module"), ("gpt_oss", "module"), ("gpt_oss", "implementation")]
)
def test_compile_without_graph_breaks(architecture: str, how: str, on_torch: None) -> None:
    """A decoder layer in one graph, over prompts of two lengths."""
    torch._dynamo.reset()
    model = writers.tiny(architecture, torch.bfloat16).requires_grad_(False)
    if how == "module":
        quantize_experts(model, "int4_sym", group_size=32, backend="torch")
    else:
        model.set_experts_implementation("qexperts")
    prompts = (IDS, IDS[:, :7])
    with torch.no_grad():
        expected = [model(ids).logits for ids in prompts]
        layer = model.model.layers[1]
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="eager", dynamic=True)
        for ids, y in zip(prompts, expected, strict=True):
            torch.testing.assert_close(model(ids).logits, y, rtol=1e-2, atol=1e-2)


# ---- refused


def broken(tmp_path: Path, change: Any, architecture: str = "qwen3_moe", format: str = "ct_group_asym") -> Path:
    """A quantized checkpoint after change(tensors, config)."""
    writers.write(writers.tiny(architecture, format=format), format, tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


EXPERT = "model.layers.1.mlp.experts.2.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(f"{EXPERT}.weight_packed"), rf"{EXPERT}.*weight_packed"),
        (lambda t, c: t.pop("model.layers.0.input_layernorm.weight"), r"lacks: model\.layers\.0\.input_layernorm"),
        (lambda t, c: [t.pop(n) for n in list(t) if n.startswith(EXPERT)], r"lacks down of expert 2 for .*layers\.1"),
        (lambda t, c: [t.pop(n) for n in list(t) if ".1.mlp.experts." in n], "lacks gate of expert 0"),
        (lambda t, c: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, :1].clone()}), EXPERT),
        (lambda t, c: t.update({"model.norm.weight": torch.ones(32)}), r"norm\.weight of .* is \(32,\); expected"),
        (lambda t, c: t.update({"model.stray.weight": torch.ones(4, 4)}), r"no part of the model takes: model\.stray"),
        (lambda t, c: c.update(num_experts=3, num_local_experts=3), "has 3 experts"),
        (lambda t, c: c.update(hidden_size=128), "128"),
        (lambda t, c: c["quantization_config"].update(quant_method="secret"), "secret"),
        (lambda t, c: c["quantization_config"].update(format="marlin-24"), "marlin-24"),
    ],
    ids=["expert tensor", "norm", "one expert", "layer", "scale shape", "norm shape", "stray", "experts", "hidden",
         "method", "format"],
)  # fmt: skip
def test_broken_checkpoints(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises((ValueError, UnsupportedError), match=message):
        from_pretrained(broken(tmp_path, change), backend="torch")


def test_a_truncated_file(tmp_path: Path) -> None:
    path = broken(tmp_path, lambda tensors, config: None) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["experts.down_proj.codes", "experts.gate_up_proj.scales", "input_layernorm.weight"])
def test_own_checkpoints_that_lack_a_tensor(tmp_path: Path, part: str) -> None:
    quantize_experts(writers.tiny("mixtral"), "int4_asym", group_size=32, backend="torch").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(part))]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks.*{part}"):
        from_pretrained(tmp_path, backend="torch")
    if "experts" in part:
        with pytest.raises(ValueError, match=rf"lacks.*{part}"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layers_that_transformers_ignores(tmp_path: Path) -> None:
    """Layers for multi-token prediction, which deepseek_v3 has on disk and transformers leaves there."""

    def add(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        extra = {n.replace(".layers.1.", ".layers.61."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
        tensors.update(extra, **{"model.layers.61.enorm.weight": torch.ones(64)})

    model = from_pretrained(broken(tmp_path, add, "deepseek_v3"), backend="torch", linears="dequantize")
    assert len(experts_of(model)) == 1


def test_what_cannot_be_quantized(tmp_path: Path) -> None:
    model = writers.tiny("qwen3_moe")
    with pytest.raises(ValueError, match="group_size"):
        quantize_experts(model, "int4_sym", group_size=48)
    assert not experts_of(model) and not hasattr(model.config, "quantization_config")
    quantize_experts(model, "int4_sym", group_size=32, backend="torch")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_experts(model, "int4_sym", group_size=32)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leave it out"):
        from_pretrained(tmp_path, quantize="int4_sym")
    writers.write(writers.tiny("qwen3_moe"), "awq", tmp_path / "awq")
    with pytest.raises(ValueError, match="quantized already"):
        from_pretrained(tmp_path / "awq", quantize="int4_sym")


def test_models_that_are_not_understood() -> None:
    config = transformers.Qwen3Config(**{**writers.SMALL.common, "intermediate_size": 64})
    with pytest.raises(UnsupportedError, match="no module of experts"):
        quantize_experts(transformers.AutoModelForCausalLM.from_config(config), "int4_sym")
    module = torch.nn.Module()
    module.experts = torch.nn.Module()
    module.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 32))
    with pytest.raises(UnsupportedError, match="do not follow transformers' experts interface"):
        quantize_experts(module, "int4_sym")
    module.experts = experts_class()(Config())
    module.experts.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="post_expert_norm"):
        quantize_experts(module, "int4_sym")
    module.experts = experts_class()(Config())
    module.experts.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedError, match="extra"):
        quantize_experts(module, "int4_sym")


def test_float32_weights_have_no_implementation() -> None:
    model = writers.tiny("qwen3_moe")
    model.set_experts_implementation("qexperts")
    with pytest.raises(UnsupportedError, match="float32"):
        logits(model)


def test_names_of_the_package() -> None:
    assert qexperts.from_pretrained is from_pretrained
    assert {"from_pretrained", "quantize_experts"} <= set(dir(qexperts))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qexperts.nothing  # type: ignore[attr-defined]


# ---- the documentation


def parametrized(test: Any) -> dict[str, list[str]]:
    """Parameter -> values of a test."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return {mark.args[0]: list(mark.args[1]) for mark in marks}


def test_the_table_of_the_documentation() -> None:
    """docs/models.md promises what is tested above, no more and no less."""
    every = parametrized(test_every_format_of_every_architecture)
    tested = {(f, a) for f in every["format"] for a in every["architecture"]}
    for row, test in (
        ("quantize", test_quantize_on_the_fly_save_and_reload),
        ("implementation", test_experts_implementation),
    ):
        tested |= {(row, a) for a in parametrized(test)["architecture"]}
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| case |"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(bool, lines[start:])]
    architectures, promised = table[0][3:], set()
    for row in table[2:]:
        cells = dict(zip(architectures, row[3:], strict=True))
        assert set(cells.values()) <= {"yes", "-"}, row
        promised |= {(row[0].strip("`"), a) for a, cell in cells.items() if cell == "yes"}
    assert promised == tested
    assert all(f" {name}" in (ROOT / "README.md").read_text() for name in architectures)


def test_the_five_lines_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint to text, as the README has it but for the path."""
    pytest.importorskip("accelerate", reason="transformers needs it for device_map")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<unk>": 1, **{f"word{i}": i for i in range(2, 128)}, "The": 2, "capital": 3, "of": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    model = writers.tiny("qwen3_moe", torch.bfloat16)
    quantize_experts(model, "int4_sym", group_size=32, backend="torch").save_pretrained(tmp_path)
    section = (ROOT / "README.md").read_text().partition("## Run a quantized MoE model")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert 'path = "Qwen3-30B-A3B-int4"' in code
    code = code.replace('"Qwen3-30B-A3B-int4"', repr(str(tmp_path)))
    code = code.replace("device_map=", 'backend="torch", device_map=')  # which compiles nothing
    exec(code, {})
    assert len(capsys.readouterr().out.split()) >= 32
