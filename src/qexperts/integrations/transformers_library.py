"""Quantized linears that are no experts, as the modules of the library that transformers runs their format with.

transformers' own quantizer does the work; here is which one, what it is told, and whether its modules take the tensors.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .checkpoints import Checkpoint
from .schemes import Scheme
from .transformers_slots import Slot

__all__ = ["LINEARS", "Library", "StoredLinear"]

LINEARS = ("auto", "dequantize", "library")
# Method of transformers -> packages it needs.
_NEEDS = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": ("accelerate",),
}
_NAMES = {"gptq": "GPTQModel", "awq": "GPTQModel", "compressed-tensors": "compressed-tensors", "fp8": "transformers"}
# Dtypes that a change of would be a change of values, as safetensors names them.
_CODES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
# What quantizers of transformers raise for what they cannot run, fetch or compile.
_FAILURES = (ImportError, RuntimeError, ValueError, OSError)


class StoredLinear:
    """A quantized linear of a checkpoint.

    Attributes:
        module: its name there.
        scheme: how it is stored.
        tensors: last part of the name -> shape and dtype, as safetensors has them.
    """

    def __init__(self, module: str, checkpoint: Checkpoint) -> None:
        scheme = checkpoint.scheme(module)
        assert scheme is not None
        self.module, self.scheme = module, scheme
        self.tensors = checkpoint.headers(module)


class Library:
    """transformers' own quantizer for a checkpoint, on the linears of one model that are no experts.

    Attributes:
        name: of who runs them.
        reason: why it does not, or not all of them; None as long as it does.
        quantizer: that of transformers, once `install` has put its modules in place.

    Args:
        config: the quantization_config of the checkpoint.
        dtype: of the model.
        kernels_only: leave alone what the library would decompress before it is first run.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, *, kernels_only: bool) -> None:
        self.config, self.dtype, self.kernels_only = config, dtype, kernels_only
        self.method = str(config.get("quant_method", "")).lower()
        self.reason: str | None = None
        self.quantizer: Any = None
        self.scheme: Scheme | None = None  # of the linears that a quantizer with one for all is made for

    @property
    def name(self) -> str:
        return _NAMES.get(self.method, "GPTQModel")  # AutoRound's packings are those of GPTQ and AWQ

    def install(self, model: Any, linears: Mapping[str, StoredLinear], device_map: Any) -> set[str]:
        """Put the library's modules into a model without memory.

        Args:
            linears: name in the model -> what the checkpoint has for it.
            device_map: as for transformers.
        Returns: the names of those that the library runs. All others, and every module that the checkpoint does not
            have quantized, are as they were; reason says why.
        """
        before = dict(model.named_modules())
        # compressed-tensors changes linears in place, so what they were is kept as a copy, without memory
        plain = {name: copy.deepcopy(module) for name, module in before.items() if type(module) is nn.Linear}
        linears = {name: stored for name, stored in linears.items() if name in plain}
        try:
            self.quantizer = self._start(model, linears, device_map)
            self.quantizer._process_model_before_weight_loading(model, device_map=device_map or {"": "cpu"})
        except _FAILURES as error:
            self.reason = " ".join(str(error).split())
            linears = {}
        run = {name for name, stored in linears.items() if self._takes(model.get_submodule(name), stored)}
        _restore(model, {name: module for name, module in before.items() if name not in run}, plain)
        if len(run) < len(linears):
            self.reason = (
                "it has no kernel for them and would decompress them when they are first run"
                if self.method == "compressed-tensors" and self.kernels_only
                else "transformers' modules for this quantization_config do not take their tensors"
            )
        if not run:
            self.quantizer = None
        return run

    def given(self, module: nn.Module, stored: StoredLinear) -> dict[str, Callable[[], torch.Tensor]]:
        """Tensors that a module of the library holds and the checkpoint leaves out: suffix -> what makes it."""
        if "g_idx" in stored.tensors or "g_idx" not in dict(module.named_buffers(recurse=False)):
            return {}
        (k,), size = module.get_buffer("g_idx").shape, stored.scheme.group_size
        return {"g_idx": lambda: torch.arange(k, dtype=torch.int32) // (size or k)}

    def conversions(self) -> list[Any]:
        """Transformers' conversions of what the linears hold."""
        return [] if self.quantizer is None else self.quantizer.get_weight_conversions()

    def finish(self, model: Any) -> None:
        """What the library does once its modules are loaded.

        Raises: UnsupportedError if it cannot, for instance because its kernels do not compile.
        """
        if self.quantizer is None:
            return
        try:
            self.quantizer._process_model_after_weight_loading(model)
        except _FAILURES as error:
            raise UnsupportedError(
                "qexperts.from_pretrained",
                f"linears as modules of {self.name}",
                {self.name: f'{error}; pass linears="dequantize"'},
                answer="no support for",
            ) from error

    def _start(self, model: nn.Module, linears: Mapping[str, StoredLinear], device_map: Any) -> Any:
        """The quantizer of transformers.

        Raises: one of `_FAILURES` with the reason if there is none.
        """
        from transformers.quantizers import AutoHfQuantizer

        config = self._stock_config(model, linears)
        method = config["quant_method"]
        if missing := [package for package in _NEEDS[method] if find_spec(package) is None]:
            packages = " ".join(missing).replace("_", "-")
            raise ImportError(f"it is not installed (pip install {packages})")
        quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=True)
        quantizer.validate_environment(device_map=device_map or {"": "cpu"})
        by_row = getattr(quantizer, "use_fp8_kernel", False)
        on_gpu = method == "fp8" or by_row
        if getattr(quantizer.quantization_config, "dequantize", False) or (on_gpu and not _on_gpu(device_map)):
            raise RuntimeError("its fp8 linears need a GPU with fp8; give one in device_map")
        if method == "fp8":
            from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

            load_finegrained_fp8_kernel()  # of the package kernels, which fetches it; else at the first forward
        # the matmul of scaled rows and columns has bf16 results
        if (dtype := torch.bfloat16 if by_row else quantizer.update_dtype(self.dtype)) != self.dtype:
            raise ValueError(f"it runs them in {dtype}, not in {self.dtype}; pass dtype={dtype}")
        return quantizer

    def _takes(self, module: nn.Module, stored: StoredLinear) -> bool:
        """Whether a module holds the tensors of a linear, no more and no fewer."""
        if self.kernels_only and type(module) is nn.Linear:
            return False
        held = module.state_dict()
        extra = self.given(module, stored)
        if held.keys() != stored.tensors.keys() | extra.keys():
            return False
        # scales by row or tensor, which transformers brings into another shape
        converted = {name for c in self.conversions() for name in c.source_patterns}
        if converted & held.keys() and (stored.scheme.scale_layout not in ("channel", "tensor") or _odd(module)):
            return False
        if self.scheme not in (None, stored.scheme):
            return False
        return all(
            (tuple(held[name].shape) == shape or name in converted)
            and _CODES.get(dtype, held[name].dtype) == held[name].dtype
            for name, (shape, dtype) in stored.tensors.items()
        )

    def _stock_config(self, model: nn.Module, linears: Mapping[str, StoredLinear]) -> dict[str, Any]:
        """The quantization_config for transformers' quantizer, which for GPTQ and AWQ knows one scheme for all linears.

        Raises: ValueError if it has none.
        """
        slots = [(name, module) for name, module in model.named_modules() if isinstance(module, Slot)]
        experts = [inner for name, slot in slots for inner, _ in slot.named_modules(prefix=name)]
        if self.method == "compressed-tensors":
            left = [name for name, m in model.named_modules() if type(m) is nn.Linear and name not in linears]
            return {**self.config, "ignore": left + experts, "use_optimized_inference": True}
        if self.method == "fp8":
            skipped = self.config.get("modules_to_not_convert") or []
            return {**self.config, "modules_to_not_convert": [*skipped, *experts]}
        kinds = Counter(stored.scheme for stored in linears.values())
        if not kinds:
            raise ValueError("no linear of the model is quantized")
        scheme = self.scheme = kinds.most_common(1)[0][0]
        sym = not scheme.format.endswith("asym")
        sizes = {"bits": int(scheme.format[3]), "group_size": scheme.group_size or -1, "sym": sym}
        if self.method == "awq":
            return dict(self.config)
        if self.method == "gptq":
            return {**self.config, **sizes}
        if scheme.packing == "awq":
            return {"quant_method": "awq", "version": "gemm", "zero_point": not sym, **sizes}
        if scheme.packing == "gptq" and (sym or scheme.zeros == "raw"):
            stored = "gptq_v2" if scheme.zeros == "raw" else "gptq"
            return {"quant_method": "gptq", "checkpoint_format": stored, "desc_act": False, **sizes}
        raise ValueError(f"it does not read {scheme.method} as AutoRound writes it")


def _restore(model: nn.Module, modules: Mapping[str, nn.Module], plain: Mapping[str, nn.Module]) -> None:
    """Put modules back where a library has replaced or changed them.

    Args:
        plain: copies of linears from before.
    """
    held = dict(model.named_modules())  # without what a quantizer has taken out before it failed
    for name, module in modules.items():
        if held.get(name) is not module:
            model.set_submodule(name, module)
        if name in plain and module.state_dict().keys() != plain[name].state_dict().keys():
            model.set_submodule(name, plain[name])


def _odd(module: nn.Module) -> bool:
    """Whether the fp8 matmul, which needs multiples of 16, cannot run a linear."""
    return any(n % 16 for n in module.get_parameter("weight").shape)


def _on_gpu(device_map: Any) -> bool:
    """Whether a device_map leaves nothing on the CPU or a disk, as far as it says."""
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return not any(device is None or str(device).startswith(("cpu", "disk")) for device in devices)


def cannot_save(name: str) -> UnsupportedError:
    """What save_pretrained says of a model with linears of a library."""
    return UnsupportedError(
        "save_pretrained",
        f"a model whose linears are modules of {name}",
        {"qexperts": 'its format holds packed experts and no other packed linears; reload with linears="dequantize"'},
        answer="no support for",
    )
