"""Backend "cpu": kernels that read the packed weights, compiled by Numba for the instruction set of this machine.

    plan       the first thread reads the counts and cuts the rows into items
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

An activation that is Inf gives Inf in columns where the products do, NaN where its code is 0. With zero points (asym
formats, bf16 products) or int8 activations it may give NaN in any column: the sum of the activations takes part.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from ..formats import QuantWeight
from ..kernels_cpu.spec import ISA_VARIABLE, ITEM_ROWS, PANEL, Arg, Kind
from ..layouts import no_panels
from ..plan import TokenPlan
from ..strategies import Step, Take
from ..workspace import arena

if TYPE_CHECKING:
    from . import Problem

__all__ = [
    "DEVICES", "LAYOUT", "PackedGemm", "describe", "installed", "no_layout", "run", "run_into", "settle", "supports",
]  # fmt: skip

LAYOUT = "panels"
DEVICES = ("cpu",)
UNIT = 16  # k that K and group sizes are multiples of
UNPACKED_BYTES = 2**18  # of weights that are unpacked at once: they stay in the second cache
CHUNK_WORDS = 16  # of a row, gathered at once for few rows: a cache line of each
WIDEST_GROUP = 256  # k; where scales are wider, sums are cut all the same
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_CPU = torch.device("cpu")
_LINE = 64  # bytes of a cache line
# Plain integers: an index by name costs as much as all of a record.
_S, _E, _END, _CODES, _SCALES, _ZEROS = (int(a) for a in (Arg.S, Arg.E, Arg.END, Arg.CODES, Arg.SCALES, Arg.ZEROS))
_X_IN, _X_IN_STEP, _X, _X_STEP = (int(a) for a in (Arg.X_IN, Arg.X_IN_STEP, Arg.X, Arg.X_STEP))
_Y, _Y_STEP, _SUMS, _SUMS_STEP = (int(a) for a in (Arg.Y, Arg.Y_STEP, Arg.SUMS, Arg.SUMS_STEP))
_COUNTS, _COUNTS_WIDE = int(Arg.COUNTS), int(Arg.COUNTS_WIDE)
_SCRATCH, _ITEMS = int(Arg.SCRATCH), int(Arg.ITEMS)


@functools.cache
def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("numba", "llvmlite"))


def _isa() -> tuple[Any, str]:
    from ..kernels_cpu import isa

    return isa.choose(os.environ.get(ISA_VARIABLE, ""))


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


def settle(weight: QuantWeight) -> None:
    """Give a prepared weight the pages that it is read fastest from."""
    from ..kernels_cpu.pages import use_huge_pages

    use_huge_pages(*weight.tensors)


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
    if y.dtype == torch.float16 and not _isa_used().halves:  # no instruction rounds to fp16
        wide = torch.empty(y.shape, dtype=torch.float32)
        run_into(wide, x, weight, counts, int8)
        y.copy_(wide)
        return
    if weight.zeros is not None and weight.scales is not None and weight.zeros.stride() != weight.scales.stride():
        weight = weight.with_tensors(weight.codes, weight.scales.contiguous(), weight.zeros.contiguous())
    facts = _facts(y, x, weight, int8)
    call = _BOUND.get(facts)
    if call is None:
        if len(_BOUND) >= _MAX_BOUND:
            _BOUND.clear()
        call = _BOUND[facts] = _Call(_kernel(y, x, weight, int8), weight)
    call(y, x, weight, counts.contiguous())


def _isa_used() -> Any:
    isa, why = _isa()
    assert isa is not None, why
    return isa


def _facts(y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, int8: bool) -> tuple[object, ...]:
    """Everything that decides what a call does, but for the number of rows, of threads, and where things are."""
    codes, scales = weight.codes, weight.scales
    return (
        os.environ.get(ISA_VARIABLE), weight.format.name, weight.group_size, weight.scale_layout, weight.weight_layout,
        weight.scale_dtype, codes.shape, codes.stride(), scales is None or (scales.shape, scales.stride()), x.dtype,
        y.dtype, int8,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What a call needs to know of its kernels: addresses of functions, sizes."""

    kind: Kind
    run: int
    pack: int  # 0: x is read as it is
    gemm: int
    groups: int
    group_words: int
    block_groups: int
    chunk_groups: int
    x_bytes: int  # of a packed row
    scratch: int  # of a thread


def _kind(y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, int8: bool) -> Kind:
    isa, fmt, prepared = _isa_used(), weight.format, weight.weight_layout != "public"
    access = {"group": "strided", "channel": "strided", "block128": "block128", "tensor": "tensor", "none": ""}
    name = _NAMES[x.dtype]
    return Kind(
        isa=isa, format=fmt.name, bits=fmt.bits, asym=fmt.asym, x=name, y=_NAMES[y.dtype],
        dot=_dot(isa, fmt.name, name, int8), int8=int8,
        scale=_NAMES[weight.scale_dtype] if weight.scale_dtype is not None else "",
        scale_access="vector" if prepared else access[weight.scale_layout],
        source="panels" if prepared else weight.code_order,
        panels=isa.panels if isa.panels * PANEL <= weight.N else 1,
    )  # fmt: skip


def _kernel(y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, int8: bool) -> _Kernel:
    from ..kernels_cpu import build

    kind, k, size = _kind(y, x, weight, int8), weight.K, weight.group_size
    one = weight.scale_layout in ("channel", "tensor", "none") or size == k
    group = min(WIDEST_GROUP, k) if one else 128 if weight.scale_layout == "block128" else size
    assert group is not None
    groups, group_words, words = -(-k // group), group // kind.per_word, k // kind.per_word
    block = min(groups, max(1, UNPACKED_BYTES // (group_words * kind.operands * kind.panels * PANEL * 4)))
    chunk = min(groups, max(1, CHUNK_WORDS // group_words))
    return _Kernel(
        kind=kind,
        run=build.function("run", kind),
        pack=build.function("pack", kind) if kind.packs_x else 0,
        gemm=build.function("gemm", kind),
        groups=groups,
        group_words=group_words,
        block_groups=block,
        chunk_groups=chunk,
        x_bytes=words * kind.operands * 4 * kind.terms,
        scratch=kind.scratch_bytes(min(words, max(block, chunk) * group_words), groups, block * group_words),
    )


class _Call:
    """The kernels on weights of one kind: a record of all but what each call brings, made once."""

    def __init__(self, kernel: _Kernel, weight: QuantWeight) -> None:
        from ..kernels_cpu import team

        self._kernel, self._start = kernel, team.run
        self._record = (ctypes.c_int64 * len(Arg))()
        self._row_bytes = -(-(kernel.x_bytes + 8 * kernel.groups) // _LINE) * _LINE if kernel.pack else 0
        record = self._record
        record[Arg.PACK], record[Arg.GEMM] = kernel.pack, kernel.gemm
        record[Arg.E], record[Arg.N], record[Arg.K] = weight.E, weight.N, weight.K
        record[Arg.WORDS] = weight.K // kernel.kind.per_word
        record[Arg.GROUPS], record[Arg.GROUP_WORDS] = kernel.groups, kernel.group_words
        record[Arg.BLOCK_GROUPS], record[Arg.CHUNK_GROUPS] = kernel.block_groups, kernel.chunk_groups
        record[Arg.SCRATCH_STEP] = kernel.scratch
        record[Arg.X_TERM] = kernel.x_bytes // kernel.kind.terms
        self._describe(weight)

    def _describe(self, weight: QuantWeight) -> None:
        record, codes, scales = self._record, weight.codes, weight.scales
        size = codes.element_size()
        record[Arg.CODES_E] = codes.stride(0) * size
        record[Arg.CODES_STEP] = codes.stride(2 if self._kernel.kind.source == "columns" else 1) * size
        if scales is None:
            return
        size = scales.element_size()
        record[Arg.SCALES_E] = scales.stride(0) * size
        if scales.ndim == 3:
            n, g = (2, 1) if weight.weight_layout == LAYOUT else (1, 2)
            record[Arg.SCALES_N] = scales.stride(n) * size
            record[Arg.SCALES_G] = scales.stride(g) * size if scales.shape[g] > 1 else 0

    def __call__(self, y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor) -> None:
        s, threads, record = x.shape[0], torch.get_num_threads(), type(self._record).from_buffer_copy(self._record)
        record[_S], record[_CODES], record[_COUNTS] = s, weight.codes.data_ptr(), counts.data_ptr()
        record[_COUNTS_WIDE] = counts.dtype == torch.int64
        record[_X_IN], record[_X_IN_STEP] = x.data_ptr(), x.stride(0) * x.element_size()
        record[_Y], record[_Y_STEP] = y.data_ptr(), y.stride(0) * y.element_size()
        if weight.scales is not None:
            record[_SCALES] = weight.scales.data_ptr()
        if weight.zeros is not None:
            record[_ZEROS] = weight.zeros.data_ptr()
        scratch = self._place(record, s, threads)
        self._start(self._kernel.run, ctypes.addressof(record), threads)
        del scratch
        if record[_END] < s:
            y[record[_END] :].zero_()

    def _place(self, record: Any, s: int, threads: int) -> torch.Tensor:
        """Give a call its scratch memory: of the threads, of the packed rows, of the items."""
        kernel, e = self._kernel, record[_E]
        threads_bytes, rows_bytes = threads * kernel.scratch, s * self._row_bytes
        items = min(e, s) + s // ITEM_ROWS
        scratch = arena(_CPU).take((threads_bytes + rows_bytes + 24 * items,), torch.uint8)
        at = scratch.data_ptr()
        record[_SCRATCH] = at
        if self._row_bytes:
            record[_X], record[_SUMS] = at + threads_bytes, at + threads_bytes + kernel.x_bytes
            record[_X_STEP] = record[_SUMS_STEP] = self._row_bytes
        else:
            record[_X], record[_X_STEP] = record[_X_IN], record[_X_IN_STEP]
        record[_ITEMS] = at + threads_bytes + rows_bytes
        return scratch


_BOUND: dict[tuple[object, ...], _Call] = {}
_MAX_BOUND = 4096


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
