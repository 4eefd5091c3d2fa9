"""Backend "cpu": kernels that read the packed weights, compiled by LLVM for the instruction set of this machine.

    plan       the first thread reads the counts and cuts the rows into items
    pack       activations into the order of the weights' codes, if they are not in it
    gemm       threads take units, an item times 64 (16) columns: few rows multiply what they unpack, many rows unpack
               a block of the weight once into the cache; public weights are gathered into that order, or, if they
               are fp8 or sums are integers, multiplied with few rows as they lie (but on Zen with AVX-512 codes of 2
               and 4 bits are gathered)

The same call gives the same bits on any number of threads, in decode and prefill, and with public and prepared weights:
what lies in panels or is gathered into them has one order of sums, and sums of integers are exact. The one exception is
public fp8 weights: an item (drivers.py) of at most `direct_rows` rows, 4 ("plain" on x86-64: 2), is summed in the order
of rows as they lie, with other bits than more rows have, and prepared weights.

Activations and the products they are multiplied in:

    bf16       on integer weights as 16-bit integers: each row and group rounded to 32,767 steps of its largest, an
               error far below that of a bf16 result, added exactly (AVX2, AVX-512); where small activations of a
               group would lose too much beside its largest, and on other weights: dot products of bf16 pairs where
               there are instructions (AVX-512 BF16), else fp32
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
import math
import os
from typing import TYPE_CHECKING, Any

import torch

from ..formats import BLOCK, QuantWeight
from ..kernels_cpu.spec import ISA_VARIABLE, ITEM_ROWS, PANEL, Arg, Kind
from ..layouts import no_panels
from ..pages import use_huge_pages
from ..plan import TokenPlan
from ..strategies import Step, Take
from ..workspace import arena

if TYPE_CHECKING:
    from . import Problem

__all__ = [
    "DEVICES", "LAYOUT", "BoundCall", "PackedGemm", "bind", "describe", "installed", "no_layout", "run", "run_into",
    "settle", "supports",
]  # fmt: skip

LAYOUT = "panels"
DEVICES = ("cpu",)
UNIT = 16  # k that K and group sizes are multiples of
UNPACKED_BYTES = 2**18  # of weights that are unpacked at once: they stay in the second cache
GATHERED_BYTES = 2**12  # of public weights that are gathered at once for few rows
WIDEST_GROUP = 256  # k; where scales are wider, sums are cut all the same
_LEAST_ROW_WORDS = 4  # 128 bits, inside which sums are transposed first
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_CPU = torch.device("cpu")
_LINE = 64  # bytes of a cache line
# Plain integers: an index by name costs as much as all of a record.
_S, _E, _END, _CODES, _SCALES, _ZEROS = (int(a) for a in (Arg.S, Arg.E, Arg.END, Arg.CODES, Arg.SCALES, Arg.ZEROS))
_X_IN, _X_IN_STEP, _X, _X_STEP = (int(a) for a in (Arg.X_IN, Arg.X_IN_STEP, Arg.X, Arg.X_STEP))
_Y, _Y_STEP, _SUMS, _SUMS_STEP = (int(a) for a in (Arg.Y, Arg.Y_STEP, Arg.SUMS, Arg.SUMS_STEP))
_COUNTS, _COUNTS_WIDE = int(Arg.COUNTS), int(Arg.COUNTS_WIDE)
_SCRATCH, _ITEMS, _WIDE = int(Arg.SCRATCH), int(Arg.ITEMS), int(Arg.WIDE)


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("llvmlite") is not None


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


_NOT_INSTALLED = "llvmlite is not installed: pip install 'qexperts[cpu]'"


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
    shared = _shared_k(problem.scale_layout, group, problem.K)
    dot = _dot(isa, fmt.name, _NAMES[problem.dtype], int8, shared) + " products"
    dot += " of int8 activations" if int8 else ""
    return None, f"kernels for {isa.name} ({why}) read the {read}, {dot}", False


def no_layout(weight: QuantWeight) -> str | None:
    """Why a weight stays in the public layout, or None."""
    return no_panels(weight)


def settle(weight: QuantWeight) -> None:
    """Give a prepared weight the pages that it is read fastest from."""
    use_huge_pages(*weight.tensors)


def _shared_k(scale_layout: str, group_size: int | None, k: int) -> int:
    """Consecutive k whose products are added before they are scaled."""
    if scale_layout == "block128":
        return BLOCK
    return min(WIDEST_GROUP, k) if group_size in (None, k) else group_size  # type: ignore[return-value]


def _dot(isa: Any, fmt: str, x: str, int8: bool, shared: int, exact: bool = False) -> str:
    if int8:
        return "int8" if "int8" in isa.dots else "fp32"
    if "int16" in isa.dots and x == "bf16" and fmt.startswith("int") and shared <= WIDEST_GROUP and not exact:
        return "int16"  # a sum of more might not fit 32 bits
    return "bf16" if "bf16" in isa.dots and x != "fp32" and fmt != "fp16" else "fp32"


def run(problem: Problem, x: torch.Tensor, weight: QuantWeight, plan: TokenPlan) -> torch.Tensor:
    """y[r] = x[r] @ dequantize(weight)[expert(r)].T; [S, N]; dtype of x, or fp32 for problem.wide."""
    return bind(problem, weight)(x, weight.codes, weight.scales, weight.zeros, plan.counts)


def run_into(problem: Problem, y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor) -> None:
    """`run` into an existing result: [S, N]; dtype of x, or fp32 for problem.wide; rows contiguous."""
    bind(problem, weight).into(y, x, weight.codes, weight.scales, weight.zeros, counts)


def bind(problem: Problem, weight: QuantWeight) -> BoundCall:
    """`run` for every x (of any S), codes, scales, zeros and counts that differ from these in values alone. The
    instruction set is chosen here, once for each kind of weight and activations."""
    return _bound(weight, problem.dtype, problem.wide, problem.activation_format is not None)


def _bound(weight: QuantWeight, dtype: torch.dtype, wide: bool = False, int8: bool = False) -> BoundCall:
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    key = (
        os.environ.get(ISA_VARIABLE), weight.format.name, weight.group_size, weight.scale_layout, weight.weight_layout,
        weight.scale_dtype, codes.shape, codes.stride(), scales is None or (scales.shape, scales.stride()),
        zeros is None or zeros.stride(), dtype, wide, int8,
    )  # fmt: skip
    call = _BOUND.get(key)
    if call is None:
        if len(_BOUND) >= _MAX_BOUND:
            _BOUND.clear()
        call = _BOUND[key] = BoundCall(weight, dtype, wide, int8)
    return call


def _isa_used() -> Any:
    isa, why = _isa()
    assert isa is not None, why
    return isa


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


def _kind(weight: QuantWeight, x: str, y: str, int8: bool, exact: bool) -> Kind:
    shared = _shared_k(weight.scale_layout, weight.group_size, weight.K)
    isa, fmt, prepared = _isa_used(), weight.format, weight.weight_layout != "public"
    dot = _dot(isa, fmt.name, x, int8, shared, exact)
    source = "panels" if prepared else weight.code_order
    access = {"group": "strided", "channel": "strided", "block128": "block128", "tensor": "tensor", "none": ""}
    kind = Kind(
        isa=isa, format=fmt.name, bits=fmt.bits, asym=fmt.asym, x=x, y=y,
        dot=dot,
        int8=int8,
        scale=_NAMES[weight.scale_dtype] if weight.scale_dtype is not None else "",
        scale_access="vector" if prepared else access[weight.scale_layout],
        source=source,
        panels=isa.panels if isa.panels * PANEL <= weight.N else 1,
    )  # fmt: skip
    return dataclasses.replace(kind, row_words=_row_words(kind, shared // kind.per_word, weight.K // kind.per_word))


def _row_words(kind: Kind, group_words: int, words: int) -> int:
    """`Kind.row_words`: registers and groups must fit each other.

    Sums of integers are the same in any order. Of fp32, a row as it lies gives a sum for each lane, and panels would
    give the same bits only with as many sums for each column, which no kernel has the registers for: fp8 weights have
    other bits so, all others are gathered into panels, and codes of few bits where that is faster.
    """
    lanes, fp8 = kind.isa.lanes, kind.format.startswith("fp8")
    as_they_lie = (kind.whole and kind.bits > kind.isa.gathered_bits) or fp8
    if kind.source != "rows" or not as_they_lie or words % max(lanes, group_words):
        return 0
    fits = group_words % lanes == 0 or lanes % group_words == 0
    return group_words if fits and group_words >= _LEAST_ROW_WORDS else 0


def _kernel(weight: QuantWeight, kind: Kind) -> _Kernel:
    from ..kernels_cpu import build

    k, group = weight.K, _shared_k(weight.scale_layout, weight.group_size, weight.K)
    groups, group_words, words = -(-k // group), group // kind.per_word, k // kind.per_word
    block = min(groups, max(1, UNPACKED_BYTES // (group_words * kind.operands * kind.panels * PANEL * 4)))
    whole = kind.isa.lanes // math.gcd(kind.isa.lanes, group_words)  # groups that are whole squares of words
    chunk = min(groups, max(1, GATHERED_BYTES // (group_words * kind.panels * PANEL * 4) // whole) * whole)
    return _Kernel(
        kind=kind,
        run=build.function("run", kind),
        pack=build.function("pack", kind) if kind.packs_x else 0,
        gemm=build.function("gemm", kind),
        groups=groups,
        group_words=group_words,
        block_groups=block,
        chunk_groups=chunk,
        x_bytes=words * kind.x_words * 4,
        scratch=kind.scratch_bytes(min(words, max(block, chunk) * group_words), words, groups, block * group_words),
    )


class BoundCall:
    """The kernels on weights of one kind: a record of all but what each call brings, made once. No tensor is kept
    alive."""

    def __init__(self, weight: QuantWeight, dtype: torch.dtype, wide: bool, int8: bool, exact: bool = False) -> None:
        from ..kernels_cpu import team

        self._wide, self._dtype, self._like = wide, dtype, _without_memory(weight)
        self._by_way_of_fp32 = dtype == torch.float16 and not wide and not _isa_used().halves
        y = "fp32" if wide or self._by_way_of_fp32 else _NAMES[dtype]
        scales, zeros = weight.scales, weight.zeros
        self._same_strides = scales is None or zeros is None or zeros.stride() == scales.stride()
        if not self._same_strides and scales is not None and zeros is not None:
            weight = weight.with_tensors(weight.codes, scales.contiguous(), zeros.contiguous())
        self._kernel, self._start = _kernel(weight, _kind(weight, _NAMES[dtype], y, int8, exact)), team.run
        kernel, record = self._kernel, (ctypes.c_int64 * len(Arg))()
        self._record, self._n = record, weight.N
        self._row_bytes = -(-(kernel.x_bytes + 8 * kernel.groups) // _LINE) * _LINE if kernel.pack else 0
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

    def __call__(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        zeros: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        n = self._n
        y = x.new_empty(x.shape[0], n, dtype=torch.float32) if self._wide else x.new_empty(x.shape[0], n)
        self.into(y, x, codes, scales, zeros, counts)
        return y

    def into(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        zeros: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> None:
        """The same into an existing result."""
        result, s, threads = y, x.shape[0], torch.get_num_threads()
        if s == 0:
            return
        if self._by_way_of_fp32:  # no instruction rounds to fp16
            y = torch.empty(y.shape, dtype=torch.float32)
        if not self._same_strides and scales is not None and zeros is not None:
            scales, zeros = scales.contiguous(), zeros.contiguous()
        if not counts.is_contiguous():
            counts = counts.contiguous()
        record = type(self._record).from_buffer_copy(self._record)
        record[_S], record[_CODES], record[_COUNTS] = s, codes.data_ptr(), counts.data_ptr()
        record[_COUNTS_WIDE] = counts.dtype == torch.int64
        record[_X_IN], record[_X_IN_STEP] = x.data_ptr(), x.stride(0) * x.element_size()
        record[_Y], record[_Y_STEP] = y.data_ptr(), y.stride(0) * y.element_size()
        if scales is not None:
            record[_SCALES] = scales.data_ptr()
        if zeros is not None:
            record[_ZEROS] = zeros.data_ptr()
        scratch = self._place(record, s, threads)
        self._start(self._kernel.run, ctypes.addressof(record), threads)
        del scratch
        if record[_WIDE]:
            self._exact.into(result, x, codes, scales, zeros, counts)
            return
        if record[_END] < s:
            y[record[_END] :].zero_()
        if y is not result:
            result.copy_(y)

    @functools.cached_property
    def _exact(self) -> BoundCall:
        """For activations that 16 bits do not hold; compiled when the first come."""
        return BoundCall(self._like, self._dtype, self._wide, int8=False, exact=True)

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


def _without_memory(weight: QuantWeight) -> QuantWeight:
    """The same kind of weight, strides included, over tensors that hold nothing."""
    return weight.with_tensors(
        *(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in weight.tensors)
    )


_BOUND: dict[tuple[object, ...], BoundCall] = {}
_MAX_BOUND = 4096


class PackedGemm:
    """A `Gemm` on packed weights: every GEMM step is one call of the kernels."""

    def __init__(self, weight: QuantWeight, take: Take) -> None:
        self._weight, self._take = weight, take

    def one(self, x: torch.Tensor, expert: int, out: torch.Tensor) -> list[Step]:
        weight, counts = self._weight.experts(expert, expert + 1), torch.tensor([x.shape[0]], dtype=torch.int32)
        return [self._step(out, x, weight, counts)]

    def batch(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> list[Step]:
        """experts ascend, so the padded rows are sorted by expert: one call over all of them."""
        counts = torch.zeros(self._weight.E, dtype=torch.int32).index_fill_(0, experts, x.shape[1])
        return [self._step(out.flatten(0, 1), x.flatten(0, 1), self._weight, counts)]

    def grouped(self, x: torch.Tensor, plan: TokenPlan) -> list[Step]:
        y = self._take((x.shape[0], self._weight.N), x.dtype)
        step = self._step(y, x, self._weight, plan.counts)

        def run() -> torch.Tensor:
            step.run()
            return y

        return [Step("gemm", run)]

    @staticmethod
    def _step(y: torch.Tensor, x: torch.Tensor, weight: QuantWeight, counts: torch.Tensor) -> Step:
        def run() -> None:
            _bound(weight, x.dtype).into(y, x, weight.codes, weight.scales, weight.zeros, counts)

        return Step("gemm", run)
