"""Small random models of real architectures: what tests load and `bench model --tiny` measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["ARCHITECTURES", "NAMES", "Sizes", "tiny_config", "write_tiny"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a tiny model. vocabulary: 256, so that the bytes of a text are its tokens."""

    vocabulary: int = 256
    hidden: int = 512
    intermediate: int = 512  # of an expert
    dense: int = 1024  # intermediate size of layers without experts
    experts: int = 16
    top_k: int = 4
    layers: int = 2
    heads: int = 8
    key_value_heads: int | None = None  # half of them
    head_dim: int = 64
    positions: int = 4096

    @property
    def common(self) -> dict[str, Any]:
        """What every config calls by the same name."""
        return dict(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads or self.heads // 2,
            head_dim=self.head_dim, num_experts_per_tok=self.top_k, max_position_embeddings=self.positions,
            pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip


def _qwen3_moe(s: Sizes) -> Any:
    return transformers.Qwen3MoeConfig(
        **s.common, num_experts=s.experts, intermediate_size=s.dense, moe_intermediate_size=s.intermediate
    )


def _mixtral(s: Sizes) -> Any:
    return transformers.MixtralConfig(**s.common, num_local_experts=s.experts, intermediate_size=s.intermediate)


def _olmoe(s: Sizes) -> Any:
    return transformers.OlmoeConfig(**s.common, num_experts=s.experts, intermediate_size=s.intermediate)


def _deepseek_v3(s: Sizes) -> Any:
    rotated = s.head_dim // 2
    return transformers.DeepseekV3Config(
        **{**s.common, "head_dim": rotated, "num_key_value_heads": s.heads},
        n_routed_experts=2 * s.experts, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        intermediate_size=s.dense, moe_intermediate_size=s.intermediate, q_lora_rank=s.hidden // 2,
        kv_lora_rank=s.hidden // 2, qk_rope_head_dim=rotated, qk_nope_head_dim=s.head_dim, v_head_dim=s.head_dim,
    )  # fmt: skip


def _gpt_oss(s: Sizes) -> Any:
    return transformers.GptOssConfig(
        **s.common, num_local_experts=s.experts, intermediate_size=s.intermediate, sliding_window=s.positions // 4,
        layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(s.layers)],
    )  # fmt: skip


def _minimax_m2(s: Sizes) -> Any:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return transformers.MiniMaxM2Config(
        **s.common, num_local_experts=s.experts, intermediate_size=s.intermediate, rope_parameters=rotary
    )


def _glm4_moe(s: Sizes) -> Any:
    return transformers.Glm4MoeConfig(
        **s.common, n_routed_experts=s.experts, n_shared_experts=1, first_k_dense_replace=1, intermediate_size=s.dense,
        moe_intermediate_size=s.intermediate, n_group=1, topk_group=1,
    )  # fmt: skip


_CONFIGS = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "minimax_m2": _minimax_m2,
    "glm4_moe": _glm4_moe,
}
ARCHITECTURES = tuple(_CONFIGS)
# what is not tiny: as wide as a published model, with fewer layers and a small vocabulary
WIDE = {
    "qwen3_30b_a3b": ("qwen3_moe", Sizes(
        hidden=2048, intermediate=768, dense=6144, experts=128, top_k=8, layers=4, heads=32,
        key_value_heads=4, head_dim=128,
    )),
}  # fmt: skip
NAMES = (*ARCHITECTURES, *WIDE)


def tiny_config(name: str, sizes: Sizes | None = None) -> Any:
    """The config of a name in `NAMES`, at other sizes if they are given. ValueError for any other name."""
    if name not in NAMES:
        raise ValueError(f"--tiny {name}: no such architecture; expected one of {', '.join(NAMES)}")
    architecture, own = WIDE.get(name, (name, Sizes()))
    return _CONFIGS[architecture](sizes or own)


def write_tiny(
    name: str, path: Path, seed: int = 0, sizes: Sizes | None = None, device: torch.device | None = None
) -> None:
    """Write a bf16 checkpoint of seeded random weights: normal, of variance 1/K, so that activations keep their size
    and the experts decide what the model says. It has no tokenizer.

    device: what draws them; another kind of device draws other weights. Default: the CPU.
    """
    device = device or torch.device("cpu")
    config = tiny_config(name, sizes)
    config.dtype = torch.bfloat16
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type), device:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.ndim > 1:
                    inputs = p.shape[-2] if p.ndim == 3 and getattr(module, "is_transposed", False) else p.shape[-1]
                    torch.nn.init.normal_(p, std=inputs**-0.5)
    model.save_pretrained(path)
