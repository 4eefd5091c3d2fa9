"""Peer "ggml": the library under llama.cpp, as llama-cpp-python installs it; written for ggml 0.25 (package 0.3.36).

It gets our codes and scales in its own blocks of 32 codes and an fp16 scale: Q4_0 for int4_sym, Q8_0 for int8_sym, so a
group is several blocks of one scale. Its rows:

    grouped      ggml_mul_mat_id over all experts, as llama.cpp runs MoE layers
    per_expert   ggml_mul_mat for each active expert, in one graph
    prepared     in the first of its buffer types for this CPU that runs the operation (AMX, repacked), as llama.cpp
                 takes it
    public       in its plain blocks

Activations and results are fp32 there, the casts inside the clock; it rounds activations to 8 bits by 32 ("q8_0") as
it multiplies. Threads are as many as torch's: where it uses OpenMP, torch's own pool.

Its libraries are called through ctypes: only functions whose arguments have long been the same, on opaque pointers.
What it cannot do it answers by ending the process, so it is asked first (`ggml_backend_dev_supports_op`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import torch

from ..formats import QuantWeight
from ..pages import use_huge_pages
from ..quantize import unpack
from ..strategies import Take
from ..testing import Q8_0_BLOCK, Inputs
from .binding import Bound, Refused
from .candidates import Candidate
from .cpu_peers import Loop, Slices
from .environment import version_of
from .workloads import Workload

__all__ = ["PACKAGE", "GgmlProvider", "blocks"]

PACKAGE = "llama-cpp-python"
MODULE = "llama_cpp"
F32, I32, CPU = 0, 26, 0  # of its enums ggml_type and ggml_backend_dev_type
TYPES = {"int4_sym": ("Q4_0", 2), "int8_sym": ("Q8_0", 8)}  # name and number of a ggml_type


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


@LOG
def _log(level: int, text: bytes, data: int | None) -> None:
    """Warnings and errors; it also tells of every matrix that it repacks."""
    if level in (3, 4):
        sys.stderr.write(text.decode(errors="replace"))


# name -> result, arguments
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_log_set": (None, LOG, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_new_tensor_3d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64),
    "ggml_permute": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_mul_mat_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_dev_by_type": (c_void_p, c_int),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buft_get_alloc_size": (c_size_t, c_void_p, c_void_p),
    "ggml_backend_buffer_get_base": (c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}


def blocks(weight: QuantWeight) -> torch.Tensor:
    """A public weight in its blocks: uint8 [E, N, K/32, 2 + bytes of 32 codes], the fp16 scale first.

    Q8_0: int8 codes in order. Q4_0: codes counted from -8, byte j holds code j (low nibble) and code j + 16.
    Raises: ValueError for what it has no place for.
    """
    fmt, scales = weight.format, weight.scales
    if scales is None or weight.scale_layout != "group" or weight.weight_layout != "public":
        raise ValueError(f"no blocks for {weight.scale_layout} scales in layout {weight.weight_layout}")
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales):
        raise ValueError(
            f"its scales are fp16, which some of these are not: {scales[half.to(scales.dtype) != scales][0]}"
        )
    codes = unpack(weight.codes, fmt).to(torch.int16).unflatten(-1, (-1, Q8_0_BLOCK))
    if fmt.bits == 4:
        low, high = (codes + 8).chunk(2, -1)
        codes = low | high << 4
    head = half.repeat_interleave((weight.group_size or weight.K) // Q8_0_BLOCK, -1)[..., None].view(torch.uint8)
    return torch.cat([head, codes.to(torch.uint8)], -1)


class _Handle:
    """One of its pointers, freed with this object."""

    def __init__(self, pointer: int | None, free: Callable[[int], None]) -> None:
        if not pointer:
            raise torch.OutOfMemoryError("ggml: out of memory")
        self._as_parameter_ = pointer  # what ctypes passes on
        weakref.finalize(self, free, pointer)


class _Library:
    """Its functions, its CPU device, and what only the device's registry names."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.c.ggml_log_set(_log, None)
        self.device = self.c.ggml_backend_dev_by_type(CPU)
        self.backend = self.c.ggml_backend_dev_init(self.device, None)
        self.set_threads = self._registered("ggml_backend_set_n_threads", None, c_void_p, c_int)

    def _registered(self, name: str, result: Any, *arguments: Any) -> Any:
        registry = self.c.ggml_backend_dev_backend_reg(self.device)
        address = self.c.ggml_backend_reg_get_proc_address(registry, name.encode())
        if not address:
            raise Refused(f"its CPU backend has no {name}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def buffer_types(self, layout: str) -> list[int]:
        """public: that of plain blocks; prepared: the others of this CPU, the preferred ones first."""
        if layout == "public":
            return [self.c.ggml_backend_cpu_buffer_type()]
        extra = self._registered("ggml_backend_dev_get_extra_bufts", POINTER(c_void_p), c_void_p)(self.device)
        return list(itertools.takewhile(bool, (extra[i] for i in itertools.count())))

    def context(self, tensors: int, graph: int = 0) -> _Handle:
        """Room for the descriptions of tensors and for a graph of some size."""
        size = tensors * self.c.ggml_tensor_overhead() + self.c.ggml_graph_overhead_custom(graph, False)
        return _Handle(self.c.ggml_init(_InitParams(size, None, True)), self.c.ggml_free)

    def buffer(self, pointer: int | None) -> _Handle:
        return _Handle(pointer, self.c.ggml_backend_buffer_free)


@functools.cache
def _library() -> _Library:
    spec = importlib.util.find_spec(MODULE)
    places = (spec and spec.submodule_search_locations) or ()
    found = [path for place in places for path in sorted(Path(place, "lib").glob("libggml.*"))]
    if not found:
        raise Refused(f"{PACKAGE} has no lib/libggml here")
    return _Library(found[0])


class _Memory:
    """A torch tensor's memory as a buffer."""

    def __init__(self, library: _Library, tensor: torch.Tensor) -> None:
        self._c, self._tensor = library.c, tensor
        size = tensor.numel() * tensor.element_size()
        self._buffer = library.buffer(library.c.ggml_backend_cpu_buffer_from_ptr(tensor.data_ptr(), size))

    def hold(self, described: int, row: int = 0) -> int:
        """The same description of a tensor, which lies here now, from a row on."""
        self._c.ggml_backend_tensor_alloc(self._buffer, described, self._tensor[row:].data_ptr())
        return described


class _Weights:
    """All experts in one buffer, which keeps them in its own layout: a matrix each, and the 3-D tensor over them."""

    def __init__(self, library: _Library, weight: QuantWeight, buffer_type: int) -> None:
        c, self._library, self._k = library.c, library, weight.K
        self.name = c.ggml_backend_buft_name(buffer_type).decode()
        self._context = library.context(weight.E + 1)
        described = TYPES[weight.format.name][1], weight.K, weight.N
        self.experts = [c.ggml_new_tensor_2d(self._context, *described) for _ in range(weight.E)]
        self.all = c.ggml_new_tensor_3d(self._context, *described, weight.E)
        step, whole = (c.ggml_backend_buft_get_alloc_size(buffer_type, t) for t in (self.experts[0], self.all))
        size = max(step * weight.E, whole)
        self._buffer = library.buffer(c.ggml_backend_buft_alloc_buffer(buffer_type, size))
        base = c.ggml_backend_buffer_get_base(self._buffer)
        self._bytes = torch.frombuffer((c_uint8 * size).from_address(base), dtype=torch.uint8)
        for tensor, offset in zip([*self.experts, self.all], [*range(0, step * weight.E, step), 0], strict=True):
            c.ggml_backend_tensor_alloc(self._buffer, tensor, base + offset)

    def runs(self, grouped: bool) -> bool:
        """Whether its CPU backend multiplies by them."""
        c, context = self._library.c, self._library.context(3)
        x = c.ggml_new_tensor_2d(context, F32, self._k, 1)
        ids = c.ggml_new_tensor_2d(context, I32, 1, 1)
        product = (
            c.ggml_mul_mat_id(context, self.all, x, ids) if grouped else c.ggml_mul_mat(context, self.experts[0], x)
        )
        return c.ggml_backend_dev_supports_op(self._library.device, product)

    def fill(self, weight: QuantWeight) -> None:
        for e, matrix in enumerate(self.experts):
            written = blocks(weight.experts(e, e + 1))
            self._library.c.ggml_backend_tensor_set(matrix, written.data_ptr(), 0, written.numel())
        use_huge_pages(self._bytes)  # as our prepared weights have them


class _Product:
    """Its graph for one set of counts, over fixed fp32 memory.

    mul_mat_id takes experts by token, each token's distinct: row r is the (r // T)-th of token r % T, for the fewest
    tokens T that divide the rows and for which that is so.

    Attributes:
        tokens: T; of a loop over experts, all rows.
        launches: multiplications in it.
        weights: what it multiplies by.
    """

    def __init__(
        self, library: _Library, weights: _Weights, grouped: bool, slices: Slices, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        c, (rows, k) = library.c, x.shape
        self._library, self.weights, self._memory = library, weights, [_Memory(library, x), _Memory(library, y)]
        self.launches = 1 if grouped else len(slices)
        size = 4 * self.launches  # at least the tensors in it
        context = self._context = library.context(size, size)
        self._graph = c.ggml_new_graph_custom(context, size, False)
        x_memory, y_memory = self._memory
        if not grouped:
            self.tokens = rows
            for expert, first, last in slices:
                part = x_memory.hold(c.ggml_new_tensor_2d(context, F32, k, last - first), first)
                product = y_memory.hold(c.ggml_mul_mat(context, weights.experts[expert], part), first)
                c.ggml_build_forward_expand(self._graph, product)
            return
        most = max(last - first for _, first, last in slices)
        t = self.tokens = next(t for t in range(most, rows + 1) if rows % t == 0)
        experts = torch.cat([torch.full((last - first,), e, dtype=torch.int32) for e, first, last in slices])
        self._memory.append(_Memory(library, experts.view(-1, t).T.contiguous()))
        ids = self._memory[2].hold(c.ggml_new_tensor_2d(context, I32, rows // t, t))
        by_token = c.ggml_permute(
            context, x_memory.hold(c.ggml_new_tensor_3d(context, F32, k, t, rows // t)), 0, 2, 1, 3
        )
        product = y_memory.hold(c.ggml_mul_mat_id(context, weights.all, by_token, ids))
        c.ggml_build_forward_expand(self._graph, product)

    def __call__(self) -> None:
        self._library.set_threads(self._library.backend, torch.get_num_threads())
        status = self._library.c.ggml_backend_graph_compute(self._library.backend, self._graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}")


class GgmlProvider(Loop):
    """ggml's CPU backend."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        super().__init__(workload, tensors)
        self._made: dict[int, _Weights] = {}

    def refuse(self, candidate: Candidate) -> str | None:
        if reason := self._absent(MODULE, PACKAGE):
            return reason
        weight = self._t.weight
        if weight.format.name not in TYPES:
            return f"has blocks for {' and '.join(TYPES)}, not {weight.format.name}"
        if weight.K % Q8_0_BLOCK or (weight.group_size or weight.K) % Q8_0_BLOCK:
            return f"its blocks are {Q8_0_BLOCK} codes; K={weight.K}, group_size={weight.group_size}"
        return None

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        if candidate.api != "raw":
            return None
        x, y = (torch.empty(self._t.x.shape[0], columns) for columns in (self._t.weight.K, self._t.weight.N))
        return lambda: self._product(candidate, x, y)

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        x, n = self._t.x, self._t.weight.N
        s, k = x.shape
        x_wide, y_wide, y = take((s, k), torch.float32), take((s, n), torch.float32), take((s, n), x.dtype)
        if dry:
            return Bound(lambda: y, Counter(), 0)
        made = self._product(candidate, x_wide, y_wide)

        def run(product: _Product) -> torch.Tensor:
            x_wide.copy_(x)
            product()
            y.view(-1, product.tokens, n).copy_(y_wide.view(product.tokens, -1, n).transpose(0, 1))
            return y

        type_name, operation = TYPES[self._t.weight.format.name][0], "mul_mat_id" if _grouped(candidate) else "mul_mat"
        config = f"{PACKAGE} {version_of(PACKAGE)}: {type_name}, {operation}, buffer {made.weights.name}"
        counts = Counter(gemm=made.launches)
        if candidate.api == "wrapper":
            return Bound(lambda: run(self._product(candidate, x_wide, y_wide)), counts, 0, config=config)
        return Bound(lambda: run(made), counts, 0, config=config)

    def _product(self, candidate: Candidate, x: torch.Tensor, y: torch.Tensor) -> _Product:
        library, grouped = _library(), _grouped(candidate)
        weights = self._weights_in(library, candidate.layout, grouped)
        return _Product(library, weights, grouped, self._slices(), x, y)

    def _weights_in(self, library: _Library, layout: str, grouped: bool) -> _Weights:
        """In the first buffer type that the operation runs in."""
        for buffer_type in library.buffer_types(layout):
            weights = self._made.get(buffer_type) or _Weights(library, self._t.weight, buffer_type)
            if weights.runs(grouped):
                if buffer_type not in self._made:
                    weights.fill(self._t.weight)
                    self._made[buffer_type] = weights
                return weights
        name, operation = TYPES[self._t.weight.format.name][0], "mul_mat_id" if grouped else "mul_mat"
        raise Refused(f"has no layout of its own for {name} in {operation} on this CPU; public: its plain blocks")


def _grouped(candidate: Candidate) -> bool:
    return candidate.strategy is None or candidate.strategy.name == "grouped"
