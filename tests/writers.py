"""Writes tiny models of transformers to disk the way each quantization library does, and as what they stand for.

Own code, from the descriptions of the formats: N outputs, K inputs, G groups; a word is 32 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from qexperts.integrations.tiny import ARCHITECTURES, Sizes, tiny_config

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

SMALL = Sizes(
    vocabulary=128,
    hidden=64,
    intermediate=64,
    dense=96,
    experts=4,
    top_k=2,
    layers=2,
    heads=4,
    head_dim=16,
    positions=64,
)
CONFIGS = {name: functools.partial(tiny_config, name, SMALL) for name in ARCHITECTURES}

# The linears that a library quantizes: those of experts, attention and dense layers, where they have whole groups.
LINEAR = re.compile(r"\.(experts\.\d+\.\w+|self_attn\.\w+_proj|mlp\.\w+_proj|shared_experts\.\w+_proj)\.weight$")


def tiny(architecture: str, dtype: torch.dtype = torch.float32, *, format: str = "", seed: int = 0) -> Any:
    """A random model whose weights are large enough for its tokens to depend on each of them. Blocks of 128 x 128 need
    sizes that they divide."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    if "block" in format:
        config.hidden_size, config.head_dim = 128, config.head_dim * 2 if architecture == "olmoe" else config.head_dim
        for name in ("moe_intermediate_size", "intermediate_size"):
            if hasattr(config, name):
                setattr(config, name, 128)
    config.dtype = dtype
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15 if "experts" in name else 0.1)
        elif "bias" in name:
            torch.nn.init.normal_(p, std=0.1)
    for name, b in model.named_buffers():
        if "bias" in name:
            torch.nn.init.normal_(b, std=0.1)
    return model


# ---- quantizers: float [N, K] -> the tensors on disk, and the weight they stand for


@dataclasses.dataclass(frozen=True)
class Codes:
    """w = (codes - zeros) * scales, by group of each column: codes [N, K] unsigned, zeros [N, G], scales [N, G] fp16;
    group: [K]."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return (self.codes - self.zeros[:, self.group]).float() * self.scales.float()[:, self.group]


def integers(w: torch.Tensor, bits: int, sym: bool, size: int, group: torch.Tensor | None = None) -> Codes:
    k = w.shape[1]
    group = torch.arange(k) // size if group is None else group
    top = 2**bits - 1
    columns = [w[:, group == g] for g in range(k // size)]
    if sym:
        scales = torch.stack([c.abs().amax(1) for c in columns], 1) / (2 ** (bits - 1) - (bits > 2))
        scales[1::2] *= -1  # AutoRound's exports have negative scales
        scales = scales.half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low = torch.stack([c.amin(1).clamp(max=0) for c in columns], 1)
        high = torch.stack([c.amax(1).clamp(min=0) for c in columns], 1)
        scales = ((high - low) / top).half()
        zeros = (-low / scales).round().clamp(0, top)
    codes = ((w / scales.float()[:, group]).round() + zeros.float()[:, group]).clamp(0, top)
    return Codes(codes.long(), zeros.long(), scales, group)


def words(fields: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack little-endian fields along a dimension into int32."""
    t = fields.movedim(dim, -1).unflatten(-1, (-1, 32 // bits))
    packed = sum(t[..., j] << (bits * j) for j in range(32 // bits))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


Written = tuple[dict[str, torch.Tensor], torch.Tensor]


def gptq(w: torch.Tensor, bits: int = 4, sym: bool = True, offset: int = 1, order: int | None = None) -> Written:
    group = None
    if order is not None:
        random = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(order))
        group = torch.empty_like(random)
        group[random] = torch.arange(w.shape[1]) // GROUP
    c = integers(w, bits, sym, GROUP, group)
    tensors = {
        "qweight": words(c.codes.T, bits, 0),
        "qzeros": words((c.zeros - offset).T & (2**bits - 1), bits, 1),
        "scales": c.scales.T.contiguous(),
    }
    if order is not None or offset:
        tensors["g_idx"] = c.group.to(torch.int32)
    return tensors, c.weight


def awq(w: torch.Tensor) -> Written:
    c = integers(w, 4, False, GROUP)

    def shuffled(t: torch.Tensor) -> torch.Tensor:
        return words(t.T.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4, 1)

    return {"qweight": shuffled(c.codes), "qzeros": shuffled(c.zeros), "scales": c.scales.T.contiguous()}, c.weight


def compressed(w: torch.Tensor, bits: int = 4, sym: bool = True, channel: bool = False) -> Written:
    c = integers(w, bits, sym, w.shape[1] if channel else GROUP)
    tensors = {
        "weight_packed": words(c.codes, bits, 1),
        "weight_scale": c.scales,
        "weight_shape": torch.tensor(w.shape),
    }
    if not sym:
        tensors["weight_zero_point"] = words(c.zeros, bits, 0)
    return tensors, c.weight


def int8_channel(w: torch.Tensor) -> Written:
    scales = (w.abs().amax(1, keepdim=True) / 127).half()
    codes = (w / scales.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def fp8_channel(w: torch.Tensor) -> Written:
    scales = w.abs().amax(1, keepdim=True) / 448
    codes = (w / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def fp8_block(w: torch.Tensor, name: str = "weight_scale_inv", block: int = 128) -> Written:
    n, k = w.shape
    padded = torch.nn.functional.pad(w, (0, -k % block, 0, -n % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scales = tiles.abs().amax((1, 3)) / 448
    wide = scales.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
    codes = (w / wide).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scales}, codes.float() * wide


# ---- formats


@dataclasses.dataclass(frozen=True)
class Format:
    """One library's way of storing a model.

    Attributes:
        write: [N, K] -> tensors and weight.
        config: its quantization_config, without the linears it leaves alone.
        ignore: key of config that lists those; None if it does not.
    """

    write: Callable[..., Written]
    config: dict[str, Any]
    ignore: str | None = None
    ordered: bool = False


def _ct(fmt: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


def _ct_int(sym: bool, channel: bool) -> Format:
    grouping = {"strategy": "channel"} if channel else {"strategy": "group", "group_size": GROUP}
    return Format(
        lambda w: compressed(w, sym=sym, channel=channel),
        _ct("pack-quantized", num_bits=4, type="int", symmetric=sym, **grouping),
        "ignore",
    )


_BITS = {"bits": 4, "group_size": GROUP}
_GPTQ = {"quant_method": "gptq", "desc_act": False, "true_sequential": False, "lm_head": False, **_BITS}
_AR = {"quant_method": "auto-round", "data_type": "int", "block_name_to_quantize": "model.layers"}

FORMATS: dict[str, Format] = {
    "gptq_v1_sym": Format(gptq, {**_GPTQ, "sym": True}),
    "gptq_v2_asym": Format(
        lambda w: gptq(w, sym=False, offset=0), {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}
    ),
    "gptq_desc_act": Format(
        lambda w, order: gptq(w, sym=False, offset=0, order=order),
        {**_GPTQ, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
        ordered=True,
    ),
    "awq": Format(
        awq, {"quant_method": "awq", "version": "gemm", "zero_point": True, **_BITS}, "modules_to_not_convert"
    ),
    "auto_round_w2": Format(
        lambda w: gptq(w, bits=2, sym=False, offset=0),
        {**_AR, "packing_format": "auto_round", "bits": 2, "group_size": GROUP, "sym": False},
        "extra_config",
    ),
    "auto_round_gptq": Format(
        gptq, {**_AR, "packing_format": "auto_round:auto_gptq", "sym": True, **_BITS}, "extra_config"
    ),
    "auto_round_awq": Format(
        awq, {**_AR, "packing_format": "auto_round:auto_awq", "sym": False, **_BITS}, "extra_config"
    ),
    "ct_group_sym": _ct_int(True, False),
    "ct_group_asym": _ct_int(False, False),
    "ct_channel_sym": _ct_int(True, True),
    "ct_channel_asym": _ct_int(False, True),
    "ct_fp8_channel": Format(
        fp8_channel,
        _ct("float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel"),
        "ignore",
    ),
    "ct_fp8_block": Format(
        lambda w: fp8_block(w, "weight_scale"),
        _ct("float-quantized", num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[128, 128]),
        "ignore",
    ),
    "fp8_block128": Format(
        fp8_block,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "modules_to_not_convert",
    ),
    "ct_int8_channel": Format(
        int8_channel, _ct("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel"), "ignore"
    ),
}


# ---- whole checkpoints


def unfused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss as its quantized exports have it: one linear for each expert, gate and up apart."""
    out = {}
    for name, t in state.items():
        match = re.match(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?$", name)
        if match is None:
            out[name] = t
            continue
        stem, projection, bias = match.groups()
        for e in range(len(t)):
            rows = t[e] if bias else t[e].T
            parts = (("gate_proj", rows[0::2]), ("up_proj", rows[1::2]))
            for role, part in parts if projection == "gate_up_proj" else (("down_proj", rows),):
                out[f"{stem}.{e}.{role}.{'bias' if bias else 'weight'}"] = part.contiguous()
    return out


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `unfused`."""
    out, experts = {}, {}
    for name, t in state.items():
        match = re.match(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.(\w+)$", name)
        if match is None:
            out[name] = t
        else:
            stem, e, role, kind = match.groups()
            experts.setdefault((stem, kind), {})[int(e), role] = t
    for (stem, kind), parts in experts.items():
        count = 1 + max(e for e, _ in parts)
        suffix = "_bias" if kind == "bias" else ""
        both = [torch.stack([parts[e, "gate"], parts[e, "up"]], 1).flatten(0, 1) for e in range(count)]
        for projection, rows in (("gate_up", both), ("down", [parts[e, "down"] for e in range(count)])):
            stacked = torch.stack(rows)
            out[f"{stem}.{projection}_proj{suffix}"] = stacked if suffix else stacked.mT.contiguous()
    return out


def write(model: Any, format: str, path: Path) -> Any:
    """Write a model in a format to path; returns the model that the file stands for, in fp32, with eager experts."""
    fmt, plain = FORMATS[format], path / "plain"
    gpt_oss = model.config.model_type == "gpt_oss"
    model.save_pretrained(plain)
    state = load_file(plain / "model.safetensors")
    if gpt_oss:
        state = unfused(state)
    tensors, dense, left = {}, {}, []
    for name, t in state.items():
        module = name.removesuffix(".weight")
        size = 128 if "block" in format else GROUP
        if LINEAR.search(name) and not any(n % size for n in t.shape):
            # inputs are shared by the gate and the up projection, and so is the order of their groups
            order = [hash(re.sub(r"\.(w1|w3|gate_proj|up_proj)$", "", module)) % 1000] if fmt.ordered else []
            written, dense[name] = fmt.write(t.float(), *order)
            tensors |= {f"{module}.{suffix}": part.contiguous() for suffix, part in written.items()}
        else:
            tensors[name] = dense[name] = t
            if t.ndim == 2 and name.endswith(".weight"):
                left.append(module)
    config = json.loads((plain / "config.json").read_text())
    named: dict[str, Any] = {}
    if fmt.ignore is not None:
        named[fmt.ignore] = {m: {"bits": 16} for m in left} if fmt.ignore == "extra_config" else left
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {**fmt.config, **named}}))
    save_file(fused(dense) if gpt_oss else dense, plain / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, experts_implementation="eager"
    ).eval()
