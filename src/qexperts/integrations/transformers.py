"""Quantized experts in the models of transformers 5: load, quantize, save, and an experts implementation.

Importing this module registers, with transformers, the quantization method and the experts implementation "qexperts".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from ..formats import QuantWeight
from ..layer import QuantExperts
from ..quantize import quantize as quantize_weight
from .checkpoints import Checkpoint
from .shards import Shards, read_json
from .transformers_loading import Loading, conversions_without_experts
from .transformers_modules import (
    ExpertsSpec,
    experts_forward,
    experts_of,
    fp8_experts_forward,
    replace,
    unsupported,
)
from .transformers_quantizer import METHOD, ExpertsConfig, mark
from .transformers_slots import Running

__all__ = ["from_pretrained", "quantize_experts"]

ExpertsInterface.register(METHOD, experts_forward)
FP8ExpertsInterface.register(METHOD, fp8_experts_forward)


def from_pretrained(
    path: str | Path,
    *,
    quantize: str | None = None,
    group_size: int = 128,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    backend: str = "auto",
    prepare: bool = True,
    linears: str = "auto",
    **kwargs: Any,
) -> Any:
    """A model of transformers whose experts are `QuantExperts`.

    Args:
        path: a directory with config.json and safetensors files: an AutoRound, GPTQ, AWQ, compressed-tensors or FP8
            checkpoint, one that `save_pretrained` of such a model wrote, or an unquantized one.
        quantize: the format that the experts of an unquantized checkpoint become, a name in `FORMATS`. Default: they
            stay bf16 or fp16.
        group_size: as for `quantize`; of scales in the dtype of the model.
        dtype: of the model; default: what config.json says, else that of its first floating tensor.
        device_map: as for transformers, whole layers to a device; experts are not offloaded. Prepared experts stay on
            the kind of device that they were loaded to.
        backend: as for `QuantExperts`.
        prepare: whether to bring the experts into the layout in which the backend runs fastest.
        linears: what becomes of quantized linears that are no experts. "library": modules of GPTQModel (GPTQ, AWQ,
            AutoRound), of compressed-tensors, or of transformers (FP8, on a GPU), with the tensors as they are;
            "dequantize": dequantized once; "auto": the library if it is installed and has a kernel for them, else
            dequantized, with one warning that says why.
        kwargs: passed on to transformers' from_pretrained.
    Returns: the model, in evaluation mode. `generate`, `save_pretrained` (which writes the public layout) and
        `torch.compile` work as on any other.
    Raises: ValueError naming the tensors if the checkpoint is incomplete, has tensors that the model does not take, or
        does not fit its config; UnsupportedError for experts, formats and (with "library") linears that cannot be run.
        No partly loaded model is ever returned.

    Experts are read one by one into their final memory: besides the model, loading takes a few copies of one expert and
    the scales of one layer. Linears of a library round as it does (FP8 ones round activations) and cannot be saved.
    """
    checkpoint, own = _open(Path(path))
    if own is not None and quantize is not None:
        raise ValueError(f"qexperts.from_pretrained: quantize={quantize!r}, but {path} is quantized; leave it out.")
    config = _config(path)
    dtype = _dtype(checkpoint, config) if dtype is None else dtype
    loading = Loading(checkpoint, dtype, quantize, group_size, own, linears)
    model, info = _model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=loading.tensors,
        dtype=dtype,
        device_map=device_map,
        quantization_config=ExpertsConfig.for_load(loading, Running(backend, prepare)),
        output_loading_info=True,
        **kwargs,
    )
    loading.check(model, info)
    loading.warn()
    model.name_or_path = model.config.name_or_path = str(path)
    return model if "generation_config" in kwargs else _with_generation_config(model, path)


def _config(path: str | Path) -> Any:
    """config.json without its quantization_config."""
    config: Any = transformers.AutoConfig.from_pretrained(path)
    for holder in (config, config.get_text_config(decoder=True)):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    return config


def _with_generation_config(model: Any, path: str | Path) -> Any:
    """A model after reading generation_config.json, if there is one."""
    if model.can_generate() and (Path(path) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _open(path: Path) -> tuple[Checkpoint, dict[str, Any] | None]:
    """The checkpoint, and what its config says of experts in our own format."""
    config = read_json(path / "config.json")
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") != METHOD:
        return Checkpoint.open(path), None
    return Checkpoint(path, config, None, Shards(path)), ExpertsConfig(**stored).experts


def _dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """What the config says, else the dtype of the first floating tensor."""
    for holder in (config, config.get_text_config(decoder=True)):
        found = getattr(holder, "dtype", None)
        if found is not None:
            return getattr(torch, found) if isinstance(found, str) else found
    for name in sorted(checkpoint.names):
        t = checkpoint.tensor(name)
        checkpoint.used.discard(name)  # a look is no use of it
        if t.dtype in (torch.bfloat16, torch.float16, torch.float32):
            return t.dtype
    return torch.get_default_dtype()


def _model_class(config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    raise unsupported(
        "qexperts.from_pretrained", f"{config.architectures or type(config).__name__}", "it has no such model class"
    )


def quantize_experts(
    model: Any,
    format: str,
    *,
    group_size: int = 128,
    scale_dtype: torch.dtype | None = None,
    backend: str = "auto",
    prepare: bool = True,
) -> Any:
    """Quantize the experts of a loaded model of transformers, in place, each layer's weights released as it goes.

    Args:
        model: with unquantized experts.
        format, group_size, scale_dtype: as for `quantize`.
        backend, prepare: as for `from_pretrained`.
    Returns: the model.
    Raises: ValueError if it is quantized already, or the format does not fit its sizes; UnsupportedError for experts
        that cannot be run. What raises in the first layer leaves the model as it was; what raises in a later one
        leaves it partly quantized.
    """
    where = "qexperts.quantize_experts"
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{where}: the model is quantized already ({model.quantization_method}); load it unquantized.")
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [
            c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)
        ]
    found = list(experts_of(where, model))
    while found:
        spec, module = found.pop(0)
        weights = [
            quantize_weight(w, format, group_size=group_size, scale_dtype=scale_dtype)
            for w in _matrices(where, spec, module)
        ]
        experts = _quantized(spec, module, weights, backend)
        del weights
        replace(model, spec.name, experts)
        del module
        if prepare:
            experts.prepare()
    model._weight_conversions = conversions_without_experts(conversions)
    mark(model)
    return model


def _matrices(where: str, spec: ExpertsSpec, module: Any) -> list[torch.Tensor]:
    """The weights of an experts module as [E, N, K]."""
    weights = [getattr(module, spec.up_name), module.down_proj]
    if any(w.is_meta for w in weights):
        raise unsupported(where, f"{spec.name} without memory", "it is offloaded; load the model without offloading")
    return [w.mT if spec.transposed else w for w in weights]


def _quantized(spec: ExpertsSpec, module: Any, weights: list[QuantWeight], backend: str) -> QuantExperts:
    biases = [getattr(module, f"{name}_bias") if spec.biased else None for name in (spec.up_name, "down_proj")]
    gate_up, down = weights
    return QuantExperts(gate_up, down, spec.activation, gate_up_bias=biases[0], down_bias=biases[1], backend=backend)
