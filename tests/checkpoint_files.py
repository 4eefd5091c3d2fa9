"""Writers of checkpoints for the tests: every packing, from unsigned codes, zero points and scales, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field j of a word holds this column of eight

Tensors = dict[str, torch.Tensor]


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] -> [..., ceil(n * bits / 32)] int32; field j at bits j * bits, the tail padded with zeros."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    total = sum(padded[..., j] << (bits * j) for j in range(per_word))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def unwords(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `words`, tail included: int64."""
    unsigned = packed.long() & 0xFFFFFFFF
    return torch.stack([(unsigned >> (bits * j)) & (2**bits - 1) for j in range(32 // bits)], -1).flatten(-2)


def gptq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int, convention: str) -> Tensors:
    """codes [N, K], zeros and scales [N, G]; convention as of `Scheme.zeros`."""
    stored = zeros.t().long()
    if convention == "field-1":
        stored = stored - 1
    packed = words(stored, bits)
    if convention == "word-1":
        ones = sum(1 << (bits * j) for j in range(32 // bits))
        packed = ((packed.long() - ones) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
    return {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": packed,
        "scales": scales.t().contiguous(),
    }


def awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Tensors:
    def shuffle(t: torch.Tensor) -> torch.Tensor:
        return words(t.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), 4)

    return {"qweight": shuffle(codes.t()), "qzeros": shuffle(zeros.t()), "scales": scales.t().contiguous()}


def compressed(codes: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor, bits: int) -> Tensors:
    out = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zeros is not None:
        out["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    return out


def product(codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor, group: int) -> torch.Tensor:
    """(code - zero) * scale in fp64: [N, K]."""
    index = torch.arange(codes.shape[1]) // group
    spread = zeros.double()[:, index] if isinstance(zeros, torch.Tensor) else zeros
    return (codes.double() - spread) * scales.double()[:, index]


def random_groups(bits: int, n: int, k: int, group: int, seed: int, *, sym: bool = False) -> tuple[torch.Tensor, ...]:
    """codes, zeros and scales of both signs; every code, and zero points 0 and 2^bits - 1, occur."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=gen, dtype=torch.uint8)
    codes.view(-1)[: 2**bits] = torch.arange(2**bits).to(torch.uint8)[: codes.numel()]
    if sym:
        zeros = torch.full((n, k // group), 2 ** (bits - 1), dtype=torch.int32)
    else:
        zeros = torch.randint(0, 2**bits, (n, k // group), generator=gen, dtype=torch.int32)
        zeros.view(-1)[:2] = torch.tensor([0, 2**bits - 1])
    scales = torch.randn(n, k // group, generator=gen).half()
    return codes, zeros, scales


def under(module: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{module}.{name}": t for name, t in tensors.items()}


def write(path: Path, tensors: Tensors, quantization: dict[str, Any] | None, *, shards: Sequence[str] = ()) -> Path:
    """A checkpoint in one file, or with an index in one file for each name prefix in shards (and one for the rest)."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "qwen3_moe"} | ({} if quantization is None else {"quantization_config": quantization})
    (path / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path / "model.safetensors")
        return path
    placed: dict[str, Tensors] = {}
    for name, t in tensors.items():
        i = next((i for i, prefix in enumerate(shards) if name.startswith(prefix)), len(shards))
        placed.setdefault(f"model-{i + 1:05}-of-{len(shards) + 1:05}.safetensors", {})[name] = t.clone().contiguous()
    for file, held in placed.items():
        save_file(held, path / file)
    weight_map = {name: file for file, held in placed.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4, "group_size": 32, "sym": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed_config(stored: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    defaults = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": defaults | weights}},
    }
