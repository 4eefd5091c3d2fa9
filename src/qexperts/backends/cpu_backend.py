"""Backend "cpu": kernels that read the packed weights, compiled by Numba for the instruction set of this machine.

    plan       one thread reads the counts and cuts the rows into items
    pack       activations into the order of the weights' codes, if they are not in it
    gemm       threads take units, an item times 64 (16) columns: few rows multiply what they unpack, many rows unpack
               a block of the weight once into the cache; either way sums are added in one order, so decode and
               prefill give the same bits

Activations and the products they are multiplied in:

    bf16       dot products of bf16 pairs where there are instructions (AVX-512 BF16), else fp32
    fp16       as the sum of two bf16 numbers, which is exact, where there are; else fp32
    fp32       fp32
    int8       (activation_format) each row and group rounded to 127 steps of its largest; dot products of bytes with
               AVX-512 VNNI, else fp32: the same sums

Codes are exact in each; scales and zero points are applied to a group's fp32 sum.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from ..formats import FORMATS, QuantWeight
from ..layouts import no_panels
from ..plan import TokenPlan
from ..strategies import Step, Take
from ..workspace import arena

if TYPE_CHECKING:
    from . import Problem

__all__ = ["DEVICES", "LAYOUT", "PackedGemm", "describe", "installed", "no_layout", "run", "run_into", "supports"]

LAYOUT = "panels"
DEVICES = ("cpu",)
UNIT = 16  # k that K and group sizes are multiples of
UNPACKED_BYTES = 2**18  # of weights that are unpacked at once: they stay in the second cache
WIDEST_GROUP = 256  # k; where scales are wider, sums are cut all the same
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@functools.cache
def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("numba", "llvmlite"))


def _isa() -> tuple[Any, str]:
    from ..kernels_cpu import isa

    return isa.choose(os.environ.get(isa.VARIABLE, ""))


def describe() -> str:
    """Which instruction set is used, and why, or why none."""
    if not installed():
        return _NOT_INSTALLED
    from ..kernels_cpu.team import team_name

    isa, why = _isa()
    return why if isa is None else f"{isa.name} ({why}), {torch.get_num_threads()} of {team_name()}"


_NOT_INSTALLED = "Numba is not installed: pip install 'qexperts[cpu]'"


def supports(problem: Problem) -> tuple[str | None, str, bool]:
    """Reason it cannot run (or None), how it runs, and whether the host synchronises."""
    fmt, group = problem.format, problem.group_size
    reason = None
    if problem.device.type not in DEVICES:
        reason = f"runs on CPUs; tensors are on {problem.device}"
    elif problem.backward:
        reason = "gradients run on the torch backend"
    elif not installed():
        reason = _NOT_INSTALLED
    elif problem.dtype not in _NAMES:
        reason = "takes bf16, fp16 or fp32 activations"
    elif not fmt.quantized and problem.dtype not in (fmt.storage, torch.float32):
        reason = f"{fmt.name} weights need {fmt.name} activations"
    elif problem.activation_format is not None and fmt.kind != "int":
        reason = f"int8 activations are for integer weights, not {fmt.name}"
    elif problem.K % UNIT:
        reason = f"K={problem.K} is not a multiple of {UNIT}"
    elif fmt.quantized and group is not None and group % UNIT:
        reason = f"group_size={group} is not a multiple of {UNIT}"
    elif problem.weight_layout not in ("public", LAYOUT):
        reason = f"weights are in layout {problem.weight_layout!r}, prepared for another backend; unprepare() them"
    elif problem.code_order == "strided" or (problem.code_order == "columns" and fmt.bits < 8):
        reason = f"{fmt.name} codes must be contiguous along k" + (" or n" if fmt.bits >= 8 else "")
    if reason is not None:
        return reason, "", False
    isa, why = _isa()
    if isa is None:
        return why, "", False
    read = "packed weights" if fmt.quantized else "weights"
    int8 = problem.activation_format is not None
    dot = _dot(isa, fmt.name, _NAMES[problem.dtype], int8) + " products" + (" of int8 activations" if int8 else "")
    return None, f"kernels for {isa.name} ({why}) read the {read}, {dot}", False


def no_layout(weight: QuantWeight) -> str | None:
    """Why a weight stays in the public layout, or None."""
    return no_panels(weight)


def _dot(isa: Any, fmt: str, x: str, int8: bool) -> str:
    if int8:
        return "int8" if "int8" in isa.dots else "fp32"
    return "bf16" if "bf16" in isa.dots and x != "fp32" and fmt != "fp16" else "fp32"


def run(problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan) -> torch.Tensor:
    """y[r] = x[r] @ dequantize(weight)[expert(r)].T; [S, N]; dtype of x, or fp32 for problem.wide."""
    y = torch.empty(x.shape[0], weight.N, dtype=torch.float32 if problem.wide else x.dtype)
    run_into(y, x, weight, plan.counts, problem.activation_format is not None)
    return y


def run_into(y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor, int8: bool = False) -> None:
    """`run` into an existing result: [S, N]; dtype of x, or fp32; rows contiguous."""
    if x.shape[0] == 0:
        return
    isa, why = _isa()
    assert isa is not None, why
    if y.dtype == torch.float16 and not isa.halves:  # no instruction rounds to fp16
        wide = torch.empty(y.shape, dtype=torch.float32)
        run_into(wide, x, weight, counts, int8)
        y.copy_(wide)
        return
    prepared = weight.weight_layout != "public"
    source = "panels" if prepared else weight.code_order
    layout, dtype = weight.scale_layout, weight.scale_dtype
    key = (isa, weight.format.name, _NAMES[x.dtype], _NAMES[y.dtype], layout, dtype, source, int8)
    if weight.zeros is not None and weight.scales is not None and weight.zeros.stride() != weight.scales.stride():
        weight = weight.with_tensors(weight.codes, weight.scales.contiguous(), weight.zeros.contiguous())
    _call(_kernel(key, weight.N, weight.K, weight.group_size), y, x, weight, counts.contiguous())


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What a call needs to know of its kernels: addresses of functions, sizes."""

    kind: Any
    functions: tuple[int, int, int]  # plan, pack, gemm
    groups: int
    group_words: int
    block_groups: int
    x_bytes: int  # of a packed row
    scratch: int  # bytes of a thread


@functools.lru_cache(maxsize=4096)
def _kernel(key: tuple[Any, ...], n: int, k: int, group_size: int | None) -> _Kernel:
    from ..kernels_cpu import build
    from ..kernels_cpu.spec import PANEL, Kind

    isa, name, x, y, scale_layout, scale_dtype, source, int8 = key
    fmt = FORMATS[name]
    prepared = source == "panels"
    access = {"group": "strided", "channel": "strided", "block128": "block128", "tensor": "tensor", "none": ""}
    kind = Kind(
        isa=isa, format=name, bits=fmt.bits, asym=fmt.asym, x=x, y=y, dot=_dot(isa, name, x, int8), int8=int8,
        scale=_NAMES[scale_dtype] if fmt.quantized else "",
        scale_access="vector" if prepared else access[scale_layout], source=source,
        panels=isa.panels if n >= isa.panels * PANEL else 1,
    )  # fmt: skip
    one = scale_layout in ("channel", "tensor", "none") or group_size == k
    group = min(WIDEST_GROUP, k) if one else 128 if scale_layout == "block128" else group_size
    assert group is not None
    groups, group_words, words = -(-k // group), group // kind.per_word, k // kind.per_word
    block = min(groups, max(1, UNPACKED_BYTES // (group_words * kind.operands * kind.panels * PANEL * 4)))
    functions = tuple(build.function(part, kind) if part else 0 for part in
                      ("plan", "pack" if kind.packs_x else "", "gemm"))  # fmt: skip
    x_bytes = words * kind.operands * 4 * kind.terms
    scratch = kind.scratch_bytes(words, groups, block * group_words)
    return _Kernel(kind, functions, groups, group_words, block, x_bytes, scratch)  # type: ignore[arg-type]


def _call(kernel: _Kernel, y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor) -> None:
    from ..kernels_cpu import team
    from ..kernels_cpu.spec import ITEM_ROWS, Arg

    kind, s, threads = kernel.kind, x.shape[0], torch.get_num_threads()
    take = arena(x.device).take
    items = take((min(weight.E, s) + s // ITEM_ROWS, 3), torch.int64)
    scratch = take((threads, kernel.scratch), torch.uint8)
    record = (ctypes.c_int64 * len(Arg))()
    if kernel.functions[1]:
        packed = take((s, kernel.x_bytes), torch.uint8)
        record[Arg.X], record[Arg.X_STEP] = packed.data_ptr(), kernel.x_bytes
        record[Arg.X_TERM] = kernel.x_bytes // kind.terms
        if kind.sums:
            sums = take((s, kernel.groups, 2), torch.float32)
            record[Arg.SUMS], record[Arg.SUMS_STEP] = sums.data_ptr(), 8 * kernel.groups
    else:
        record[Arg.X], record[Arg.X_STEP] = x.data_ptr(), x.stride(0) * x.element_size()
    record[Arg.X_IN], record[Arg.X_IN_STEP] = x.data_ptr(), x.stride(0) * x.element_size()
    _describe_weight(record, kernel, weight)
    record[Arg.Y], record[Arg.Y_STEP] = y.data_ptr(), y.stride(0) * y.element_size()
    record[Arg.COUNTS], record[Arg.COUNTS_WIDE] = counts.data_ptr(), int(counts.dtype == torch.int64)
    record[Arg.E], record[Arg.S] = weight.E, s
    record[Arg.ITEMS], record[Arg.SCRATCH], record[Arg.SCRATCH_STEP] = (
        items.data_ptr(),
        scratch.data_ptr(),
        kernel.scratch,
    )
    address = ctypes.addressof(record)
    plan, pack, gemm = kernel.functions
    team.run(plan, address, 1)
    if pack:
        team.run(pack, address, threads)
        record[Arg.NEXT] = 0
    team.run(gemm, address, threads)
    if record[Arg.END] < s:
        y[record[Arg.END] :].zero_()


def _describe_weight(record: Any, kernel: _Kernel, weight: QuantWeight) -> None:
    from ..kernels_cpu.spec import Arg

    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    size = codes.element_size()
    record[Arg.CODES], record[Arg.CODES_E] = codes.data_ptr(), codes.stride(0) * size
    along = 2 if kernel.kind.source == "columns" else 1
    record[Arg.CODES_STEP] = codes.stride(along) * size
    record[Arg.N], record[Arg.K], record[Arg.WORDS] = weight.N, weight.K, weight.K // kernel.kind.per_word
    record[Arg.GROUPS], record[Arg.GROUP_WORDS] = kernel.groups, kernel.group_words
    record[Arg.BLOCK_GROUPS] = kernel.block_groups
    if scales is None:
        return
    size = scales.element_size()
    record[Arg.SCALES], record[Arg.SCALES_E] = scales.data_ptr(), scales.stride(0) * size
    if scales.ndim == 3:
        n, g = (2, 1) if weight.weight_layout == LAYOUT else (1, 2)
        record[Arg.SCALES_N] = scales.stride(n) * size
        record[Arg.SCALES_G] = scales.stride(g) * size if scales.shape[g] > 1 else 0
    if zeros is not None:
        record[Arg.ZEROS] = zeros.data_ptr()


class PackedGemm:
    """A `Gemm` on packed weights: every GEMM step is one call of the kernels."""

    def __init__(self, weight: QuantWeight, take: Take) -> None:
        self._weight, self._take = weight, take

    def one(self, x: torch.Tensor, expert: int, out: torch.Tensor) -> list[Step]:
        weight, counts = self._weight.experts(expert, expert + 1), torch.tensor([x.shape[0]], dtype=torch.int32)
        return [Step("gemm", lambda: run_into(out, x, weight, counts))]

    def batch(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> list[Step]:
        """experts ascend, so the padded rows are sorted by expert: one call over all of them."""
        counts = torch.zeros(self._weight.E, dtype=torch.int32).index_fill_(0, experts, x.shape[1])
        rows, y = x.flatten(0, 1), out.flatten(0, 1)
        return [Step("gemm", lambda: run_into(y, rows, self._weight, counts))]

    def grouped(self, x: torch.Tensor, plan: TokenPlan) -> list[Step]:
        y = self._take((x.shape[0], self._weight.N), x.dtype)

        def run() -> torch.Tensor:
            run_into(y, x, self._weight, plan.counts)
            return y

        return [Step("gemm", run)]
