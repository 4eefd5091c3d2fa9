"""Backend "triton": kernels that read the packed weights, in plain Triton.

    decode     one launch (two where K is split): counts are read by the kernel itself
    prefill    schedule, then one grouped GEMM; in the public layout x is permuted first, one launch more

Between the shape rules, phase "auto" decides without the host: where decode does not split K and both phases give the
same bits (NVIDIA), decode runs, which is right for any counts; elsewhere both are launched, and each reads the counts
and leaves at once if they are the other's.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from ..formats import QuantWeight
from ..layouts import no_tiles
from ..plan import TokenPlan, max_tiles
from ..workspace import arena, is_capturing

if TYPE_CHECKING:
    from . import Problem

__all__ = ["LAYOUT", "no_layout", "run", "supports"]

LAYOUT = "tiles"
GROUPS = (16, 32, 64, 128, 256)
MAX_EXPERTS = 4096  # each program holds all counts
_DEVICES = ("cuda", "xpu")


@functools.cache
def _interpreted() -> bool:
    """Whether this process runs Triton kernels in the interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


@functools.cache
def _no_device(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu" and installed() and _interpreted():
        return None
    if device.type not in _DEVICES:
        return f"runs on GPUs; tensors are on {device}"
    if not installed():
        return "Triton is not installed: pip install 'qexperts[triton]'"
    if _nvidia(device) and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            need = "; use fp16 activations on sm_75" if dtype == torch.bfloat16 and (major, minor) == (7, 5) else ""
            if dtype == torch.bfloat16 or (major, minor) < (7, 5):
                return f"{'bf16 needs sm_80' if major == 7 else 'needs sm_75'}, this is sm_{major}{minor}{need}"
    return None


def supports(problem: Problem) -> tuple[str | None, str, bool]:
    """Reason it cannot run (or None), how it runs, and whether the host synchronises."""
    fmt, group = problem.format, problem.group_size
    reason = None
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reason = "takes bf16 or fp16 activations"
    elif problem.backward:
        reason = "gradients run on the torch backend"
    elif not fmt.quantized and fmt.storage != problem.dtype:
        reason = f"{fmt.name} weights need {fmt.name} activations"
    elif problem.K % 16:
        reason = f"K={problem.K} is not a multiple of 16"
    elif fmt.quantized and group is not None and group != problem.K and group not in GROUPS:
        reason = f"group_size={group}; it has kernels for {', '.join(map(str, GROUPS))} and K"
    elif problem.E > MAX_EXPERTS:
        reason = f"at most {MAX_EXPERTS} experts, not {problem.E}"
    else:
        reason = _no_device(problem.device, problem.dtype)
    if reason is not None:
        return reason, "", False
    read = "packed weights" if fmt.quantized else "weights"
    return None, f"one launch reads the {read}; nothing is read on the host", False


def no_layout(weight: QuantWeight) -> str | None:
    """Why a weight stays in the public layout, or None."""
    return no_tiles(weight)


def run(problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan) -> torch.Tensor:
    """y[r] = x[r] @ dequantize(weight)[expert(r)].T; [S, N]; dtype of x, or fp32 for problem.wide.

    No host synchronisation; safe in a CUDA graph once a call of the same kind has compiled its kernels.
    """
    s, experts = x.shape[0], weight.E
    y = torch.empty(s, weight.N, dtype=torch.float32 if problem.wide else x.dtype, device=x.device)
    if s == 0:
        return y
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            _phases(problem, y, x, weight, plan.counts)
        return y
    _phases(problem, y, x, weight, plan.counts)
    return y


def _phases(problem: Problem, y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor) -> None:
    from ..kernels.operand import operand

    s, limit, phase = x.shape[0], problem.decode_threshold, problem.phase
    w = operand(weight, y)
    if phase == "auto":
        phase = "decode" if s <= limit else "prefill" if s > limit * weight.E else "auto"
    if phase == "prefill":
        _prefill(problem, y, x, w, counts, 0)
    elif phase == "decode":
        _decode(problem, y, x, w, counts, 0)
    elif _nvidia(x.device) and _parts(x, w, counts) == 1:
        _decode(problem, y, x, w, counts, 0)
    elif _nvidia(x.device):
        _decode(problem, y, x, w, counts, 1)
        _decode(problem, y, x, w, counts, 2)  # not split: the bits of a prefill
    else:
        _decode(problem, y, x, w, counts, 1)
        _prefill(problem, y, x, w, counts, 2)


def _path(device: torch.device) -> str:
    if _nvidia(device):
        return "ptx"
    return "interpreter" if device.type == "cpu" else "portable"


@functools.cache
def _config(kind: str, bits: int, k: int, strided: bool, device: torch.device) -> Any:
    from ..kernels import config

    rule = config.prefill_config if kind == "prefill" else config.decode_config
    return rule(bits, k, strided, _nvidia(device))


def _bits(w: Any) -> int:
    return 4 if w.format.startswith("int4") else 2 if w.format.startswith("int2") else 8


def _parts(x: torch.Tensor, w: Any, counts: torch.Tensor) -> int:
    from ..kernels.config import split_k

    c = _config("decode", _bits(w), w.K, w.layout == "strided", x.device)
    blocks = -(-w.N // c.block_n) * min(x.shape[0], counts.shape[0])
    return split_k(blocks, -(-w.K // c.block_k), _processors(x.device))


def _decode(problem: Problem, y: torch.Tensor, x: torch.Tensor, w: Any, counts: torch.Tensor, condition: int) -> None:
    """condition: 0 always, 1 if every expert has at most decode_threshold rows, 2 (as prefill computes it) if not."""
    from ..kernels import decode

    c = _config("decode", _bits(w), w.K, w.layout == "strided", x.device)
    parts = 1 if condition == 2 else _parts(x, w, counts)
    part = arena(x.device).take((parts, *y.shape), torch.float32) if parts > 1 else None
    limit, path = problem.decode_threshold, _path(x.device)
    _first_call_outside_graphs(x, w, "decode", condition, parts, counts.shape[0])
    decode.launch(y, part, x, w, counts, c, limit, condition, path)
    if part is not None:
        decode.launch_reduce(y, part, counts, limit, condition, path)


def _prefill(problem: Problem, y: torch.Tensor, x: torch.Tensor, w: Any, counts: torch.Tensor, condition: int) -> None:
    """condition: 0 always, 2 if some expert has more than decode_threshold rows."""
    from ..kernels import permute, prefill, schedule

    c = _config("prefill", _bits(w), w.K, w.layout == "strided", x.device)
    s, experts, path = x.shape[0], counts.shape[0], _path(x.device)
    _first_call_outside_graphs(x, w, "prefill", condition, experts)
    space = arena(x.device)
    tiles = space.take((schedule.size(s, experts),), torch.int32)
    schedule.launch(tiles, counts, s, problem.decode_threshold, condition)
    if w.layout == "public":
        permuted = space.take((s, -(-w.K // 64) * 64), x.dtype)
        permute.launch(permuted, x, w.format)
        x = permuted
    prefill.launch(y, x, w, tiles, experts, c, c.programs_per_sm * _processors(x.device), path)


_seen: set[tuple[object, ...]] = set()


def _first_call_outside_graphs(x: torch.Tensor, w: Any, *kind: object) -> None:
    """Compiling and loading a kernel is not allowed while a graph is captured: ask for a call before."""
    key = (x.device, x.dtype, x.stride(0) % 16, w[3:], *kind)
    if key in _seen:
        return
    if is_capturing(x.device):
        raise RuntimeError(
            f"triton backend: the {kind[0]} kernel for {w.format} (N={w.N}, K={w.K}) is not compiled yet, and a CUDA "
            f"graph is being captured; call once with tensors of this kind before capturing."
        )
    _seen.add(key)
