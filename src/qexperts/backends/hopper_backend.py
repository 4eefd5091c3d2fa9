"""Backend "hopper": on sm_90 the prefill in Gluon, of prepared and of unquantized weights; the rest as by "triton".

    decode     that of "triton"
    prefill    schedule, then one grouped GEMM in which the copy engine runs ahead of the multiplications

The Gluon prefill has the bits of the Triton one, so phase "auto" is decided as by "triton"; weights prepared for one
backend serve the other. What the copy engine cannot read (tensors that do not lie on multiples of 16 bytes, rows of x
or of an unquantized weight that do not or that overlap) goes through the Triton prefill.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..formats import FORMATS, QuantWeight
from ..tuning import noted
from . import triton_backend

if TYPE_CHECKING:
    from . import Problem

__all__ = [
    "FASTER",
    "LAYOUT",
    "PREFILL",
    "bind",
    "describe",
    "no_layout",
    "preferred",
    "run",
    "run_into",
    "supports",
]

LAYOUT = triton_backend.LAYOUT
no_layout = triton_backend.no_layout

# What the Gluon prefill takes of quantized weights.
BLOCK = 128  # N and K are multiples of it, and so is the group size, if it is neither K nor one of
GROUPS = (16, 32, 64)

# Formats in which it was measured to be faster than "triton": 1.25 to 1.40 times as fast on the recorded workload, 1.08
# to 1.27 times with 128 rows for each expert; with scales of another dtype than the activations, or groups of 16 to 64,
# 1.24 to 3.8 and 1.09 to 1.9 times (results/h100/prefill_hopper*.jsonl). Unquantized weights are not among them: up to
# 1.07 times as fast on the recorded workload, but 0.96 times where every expert has as many rows.
FASTER = tuple(fmt.name for fmt in FORMATS.values() if fmt.quantized)


def supports(problem: Problem) -> tuple[str | None, str, bool]:
    """As of the backend "triton"."""
    reason = _no_device(problem.device) or _no_kernel(problem) or triton_backend.supports(problem)[0]
    if reason is not None:
        return reason, "", False
    how = "Gluon: one launch, which copies ahead of its multiplications" if problem.phase != "decode" else "as triton"
    return None, noted(how + ("" if preferred(problem) else "; auto takes triton"), problem.device), False


def preferred(problem: Problem) -> bool:
    """Whether `auto` takes this backend where it can run."""
    return problem.phase != "decode" and problem.format.name in FASTER


@functools.cache
def _no_device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs of sm_90; tensors are on {device}"
    if not triton_backend.installed():
        return "Triton is not installed: pip install 'qexperts[triton]'"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return f"needs Triton 3.6, this is {version}"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return "needs sm_90, this is sm_{}{}".format(*capability)
    return None


def _no_kernel(problem: Problem) -> str | None:
    p = problem
    if p.backward:
        return "gradients run on the torch backend"
    if p.activation_format is not None:
        return f"does not quantize activations to {p.activation_format}"
    if p.wide:
        return "returns the dtype of the activations, not fp32"
    if not p.format.quantized:
        return None if p.code_order == "rows" else "reads unquantized weights whose k lie beside each other"
    if p.group_size not in (None, p.K, *GROUPS) and p.group_size % BLOCK:
        return f"group_size={p.group_size}; it has kernels for 16, 32, 64, multiples of {BLOCK}, and K"
    if p.N % BLOCK or p.K % BLOCK:
        return f"N={p.N} K={p.K} are not multiples of {BLOCK}"
    if p.weight_layout != LAYOUT:
        return "reads prepared weights only: prepare() them"
    return None


def describe(weight: QuantWeight, x: torch.Tensor, phase: str | None) -> str:
    """As of the backend "triton"."""
    parts = [] if phase == "decode" else [_kernel(weight.format.name).describe(weight)]
    parts += [] if phase == "prefill" else [triton_backend.describe(weight, x, "decode")]
    parts += [repr(triton_backend.config_of(weight, x, "auto", PREFILL))] if phase == "auto" else []
    return ", ".join(parts)


def _kernel(fmt: str) -> ModuleType:
    """The Gluon prefill of a format."""
    from ..kernels import hopper_dense, hopper_prefill

    return hopper_prefill if FORMATS[fmt].quantized else hopper_dense


def _apart(x: torch.Tensor, w: Any) -> bool:
    """Whether rows of x, and of an unquantized weight, lie apart on multiples of 16 bytes."""
    e, n, k = w.strides[:3] if w.layout == "strided" else (w.K, w.K, 1)
    m, size = x.stride(0), x.element_size()
    return m >= w.K and m * size % 16 == 0 and k == 1 and e >= n >= w.K and e % n == 0 and n * size % 16 == 0


class _Prefill:
    """A launch of the Gluon prefill, or for tensors that the copy engine cannot read, of the Triton one."""

    def __init__(self, y: torch.Tensor, x: torch.Tensor, w: Any, experts: int) -> None:
        self._w, self._experts = w._replace(w=None, s=None, z=None), experts
        self._rows_apart = _apart(x, w)
        self._bound: dict[bool, Callable[..., None]] = {}  # by whether the copy engine can read the tensors

    def __call__(self, *tensors: torch.Tensor) -> None:
        y, x, w, s, z, _ = tensors
        places = y.data_ptr() | x.data_ptr() | w.data_ptr() | s.data_ptr() | z.data_ptr()
        readable = self._rows_apart and not places & 15
        launch = self._bound.get(readable)
        if launch is None:
            launch = self._bound[readable] = self._bind(readable, *tensors)
        launch(*tensors)

    def _bind(self, readable: bool, y: torch.Tensor, x: torch.Tensor, *rest: torch.Tensor) -> Callable[..., None]:
        *weight, tiles = rest
        operand = self._w._replace(**dict(zip("wsz", weight, strict=True)))
        if not readable:
            return triton_backend.bind_prefill(y, x, operand, self._experts)
        return _kernel(operand.format).bind(y, x, operand, tiles, self._experts, triton_backend.processors(y.device))


PREFILL = triton_backend.PrefillKernel("hopper", _Prefill, split=False)

# As of the backend "triton", but for the prefill.
run = functools.partial(triton_backend.run, prefill=PREFILL)
run_into = functools.partial(triton_backend.run_into, prefill=PREFILL)
bind = functools.partial(triton_backend.bind, prefill=PREFILL)
