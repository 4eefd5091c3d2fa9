"""Peers on CPUs: loops over the active experts, on weights that each brings into its own packing before the clock.

    prepacked   oneDNN in torch: dequantized weights, reordered as torch.compile's freezing does it
    ark         ARK (auto-round-lib on PyPI), AutoRound's kernel package: quantized weights, written for 0.16.0

ARK's grouped calls (`moe` and its kin) are for Intel GPUs; on a CPU it has its quantized linear layer, called here for
each expert as its own `QuantLinear` does it: fp32 scales, activations and results (it writes fp32 results whatever the
dtype of the activations is: bf16 ones end in a corrupted heap), compute type "auto". The casts from and to the dtype of
the activations are one each for all experts, inside the clock. Its threads are those of its own OpenMP runtime:
OMP_NUM_THREADS, not torch's number.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..backends.torch_backend import compute_dtype
from ..formats import QuantWeight
from ..quantize import dequantize, unpack
from ..strategies import Take
from ..testing import Inputs
from .binding import Bound, of_peer
from .candidates import Candidate
from .environment import version_of
from .workloads import Workload

__all__ = ["PACKAGE", "ArkProvider", "Loop", "PrepackedProvider", "Slices", "ark_operands"]

PACKAGE = "auto-round-lib"
MODULE = "auto_round_kernel"
COMPUTE, SCALES = "auto", "fp32"

# expert, rows [first, last)
Slices = list[tuple[int, int, int]]


class Loop:
    """What the loops share: one multiplication for each active expert. The packed weights are made once."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        self._t = tensors
        self._packed: list[torch.Tensor] | None = None

    def _absent(self, module: str, package: str) -> str | None:
        """Why a package for CPUs cannot be called, or None."""
        if self._t.x.device.type != "cpu":
            return f"is measured on CPUs; tensors are on {self._t.x.device}"
        return f"not installed: pip install {package}" if importlib.util.find_spec(module) is None else None

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        return self._slices if candidate.api == "raw" else None

    def _slices(self) -> Slices:
        found, first = [], 0
        for expert, rows in enumerate(self._t.counts.tolist()):
            if rows:
                found.append((expert, first, first + rows))
            first += rows
        return found

    def _weights(self, pack: Callable[[QuantWeight], torch.Tensor]) -> list[torch.Tensor]:
        if self._packed is None:
            self._packed = [pack(self._t.weight.experts(e, e + 1)) for e in range(self._t.weight.E)]
        return self._packed

    def _bound(self, candidate: Candidate, run: Callable[[Slices], torch.Tensor], config: str | None = None) -> Bound:
        slices = self._slices()
        if candidate.api == "wrapper":
            return Bound(lambda: run(self._slices()), Counter(gemm=len(slices)), 0, config=config)
        return Bound(lambda: run(slices), Counter(gemm=len(slices)), 0, config=config)


class PrepackedProvider(Loop):
    """oneDNN on weights reordered into its blocks, in the dtype torch multiplies in."""

    def refuse(self, candidate: Candidate) -> str | None:
        if self._t.x.device.type != "cpu":
            return f"runs on CPUs; tensors are on {self._t.x.device}"
        if not torch.backends.mkldnn.is_available():
            return "torch is built without oneDNN"
        return None

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        x, weight = self._t.x, self._t.weight
        dtype = compute_dtype(x.device, x.dtype)
        y = take((x.shape[0], weight.N), dtype)
        if dry:
            return Bound(lambda: y, Counter(), 0)
        linear, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        packed = self._weights(lambda one: reorder(dequantize(one, dtype)[0], None))

        def run(slices: Slices) -> torch.Tensor:
            rows = x.to(dtype)
            for expert, first, last in slices:
                y[first:last] = linear(rows[first:last], packed[expert], None, "none", [], "")
            return y.to(x.dtype)

        return self._bound(candidate, run)


class ArkProvider(Loop):
    """ARK's quantized linear layer."""

    def refuse(self, candidate: Candidate) -> str | None:
        if reason := self._absent(MODULE, PACKAGE):
            return reason
        fmt = self._t.weight.format
        return None if fmt.kind == "int" else f"takes integer weights here, not {fmt.name}"

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        x, weight = self._t.x, self._t.weight
        y = take((x.shape[0], weight.N), torch.float32)
        if dry:
            return Bound(lambda: y, Counter(), 0)
        with of_peer("ark"), contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot load
            ark = _module()
            packed = self._weights(lambda one: _pack(ark, one))
        none = torch.empty(0)
        fixed = (weight.N, weight.K, weight.group_size, COMPUTE, f"int{weight.format.bits}", SCALES, weight.format.asym)

        def run(slices: Slices) -> torch.Tensor:
            rows = x.float()
            for expert, first, last in slices:
                ark.woqgemm(rows[first:last], packed[expert], none, *fixed, out=y[first:last])
            return y.to(x.dtype)

        return self._bound(
            candidate, run, f"{PACKAGE} {version_of(PACKAGE)}: woqgemm, compute type {COMPUTE}, {SCALES} scales"
        )


def _module() -> Any:
    import auto_round_kernel  # type: ignore[import-not-found]

    if auto_round_kernel.cpu_lib is None:
        raise ValueError(f"{PACKAGE} has no library for CPUs here")
    return auto_round_kernel


def ark_operands(weight: QuantWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One expert as it takes it: codes [K, N] and zeros [K/G, N], int8, counted from -2^(b-1); scales [K/G, N], fp32.

    Symmetric formats have zeros of 0. Raises: ValueError for what it has no place for.
    """
    fmt, scales, zeros = weight.format, weight.scales, weight.zeros
    if scales is None or weight.scale_layout != "group" or weight.weight_layout != "public":
        raise ValueError(f"no packing for {weight.scale_layout} scales in layout {weight.weight_layout}")
    half = 2 ** (fmt.bits - 1) if fmt.asym else 0
    codes = (unpack(weight.codes[0], fmt).to(torch.int16) - half).T.contiguous().to(torch.int8)
    scale = scales[0].T.contiguous().float()
    if zeros is None:
        return codes, torch.zeros(scale.shape, dtype=torch.int8), scale
    if bool((zeros > 2**fmt.bits - 1).any()):
        raise ValueError(f"no packing for zero points of {2**fmt.bits}")
    return codes, (zeros[0].to(torch.int16) - half).T.contiguous().to(torch.int8), scale


def _pack(ark: Any, weight: QuantWeight) -> torch.Tensor:
    """Its packing of one expert, checked: what it unpacks again is the exact weight, bit for bit."""
    codes, zeros, scales = ark_operands(weight)
    fixed = (weight.group_size, COMPUTE, f"int{weight.format.bits}", SCALES, weight.format.asym)
    packed = ark.repack_quantized_weight(codes, scales, zeros, *fixed)
    if not torch.equal(ark.unpack_weight(packed, torch.float32, weight.N, weight.K, *fixed), _exact(weight)):
        raise ValueError("what it unpacks is not the weight that it packed")
    return packed


def _exact(weight: QuantWeight) -> torch.Tensor:
    return dequantize(weight, torch.float32)[0]
