"""Quantized Mixture-of-Experts layers: kernels, strategies and the evidence.

y[r] = x[r] @ dequantize(w)[e(r)].T
"""

from typing import TYPE_CHECKING, Any

from . import library as library  # registers the operators
from ._version import __version__
from .backends import Answer, Problem, explain
from .errors import UnsupportedError
from .formats import FORMATS, QuantWeight, WeightFormat
from .layer import QuantExperts, fused_experts
from .ops import (
    check_tokens,
    clear_moe_prefill_workspace_cache,
    grouped_gemm,
    moe,
    moe_gemm,
    moe_gemm_decode,
    moe_gemm_prefill,
    prepare,
    unprepare,
)
from .plan import TileSchedule, TokenPlan, tile_schedule
from .quantize import dequantize, pack, quantize, unpack

if TYPE_CHECKING:
    from .integrations.transformers import from_pretrained as from_pretrained
    from .integrations.transformers import quantize_experts as quantize_experts

__all__ = [
    "FORMATS",
    "Answer",
    "Problem",
    "QuantExperts",
    "QuantWeight",
    "TileSchedule",
    "TokenPlan",
    "UnsupportedError",
    "WeightFormat",
    "__version__",
    "check_tokens",
    "clear_moe_prefill_workspace_cache",
    "dequantize",
    "explain",
    "fused_experts",
    "grouped_gemm",
    "moe",
    "moe_gemm",
    "moe_gemm_decode",
    "moe_gemm_prefill",
    "pack",
    "prepare",
    "quantize",
    "tile_schedule",
    "unpack",
    "unprepare",
]

# Functions of this package that need transformers, imported when they are asked for. Not in __all__: `import *` would.
_TRANSFORMERS = ("from_pretrained", "quantize_experts")


def __getattr__(name: str) -> Any:
    if name not in _TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(".integrations.transformers", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRANSFORMERS})
