"""Peer "humming": Humming (humming-kernels on PyPI; NVIDIA only; CUDA C++ compiled at run time), written for 0.1.19.

It gets the same codes, scales and zeros in its own packing, and the same counts on the device: its grouped GEMM over
contiguous rows reads the experts' offsets there, so one cumulative sum is inside the clock and nothing is read on the
host. Its own heuristics choose the configuration by the number of rows ("default"); they assume rows about evenly
spread, so what they choose for other numbers of rows is tried on the workload at hand too ("tuned"), and the fastest
of those that compute the right thing is measured.

Whatever the package raises while it is set up becomes the reason of a refused row: its API may differ from version to
version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..formats import QuantWeight
from ..strategies import Step, Take
from ..testing import Inputs, judge
from .binding import Bound, Refused, of_peer
from .candidates import Candidate
from .environment import version_of
from .timing import Sampler
from .workloads import Workload

__all__ = ["PACKAGE", "HummingProvider", "packed"]

PACKAGE = "humming-kernels"
MODULE = "humming"
COMPUTE = {"gemm_type": "grouped_contiguous"}
# Rows, as a multiple of the workload's, whose default configuration is worth a try: smaller tiles first, since a
# heavy-tailed distribution pads them less.
OTHER_ROWS = (1 / 2, 1 / 4, 2, 1 / 8, 4, 1 / 16, 1 / 32, 8)
TUNING_SAMPLES = 7


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """A layer with its fastest right configuration."""

    layer: Any
    kernel: torch.Tensor  # the handle that its launcher takes
    tuning: dict[str, Any]
    name: str


class HummingProvider:
    """Its layer, compiled and tuned once for a workload."""

    def __init__(self, workload: Workload, tensors: Inputs) -> None:
        self._t = tensors
        self._set_up: _Chosen | Refused | None = None

    def refuse(self, candidate: Candidate) -> str | None:
        device, fmt = self._t.x.device, self._t.weight.format
        if device.type != "cuda" or torch.version.hip is not None:
            return f"runs on NVIDIA GPUs; tensors are on {device}"
        if importlib.util.find_spec(MODULE) is None:
            return f"not installed: pip install {PACKAGE}"
        if not fmt.quantized:
            return f"takes weights of at most 8 bits, not {fmt.name}"
        scales = self._t.weight.scales
        if scales is not None and scales.dtype != self._t.x.dtype:
            return f"its scales have the dtype of the activations, not {scales.dtype}"
        return None

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        return None  # everything is inside the clock

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        t = self._t
        y = take((t.x.shape[0], t.weight.N), t.x.dtype)
        if dry:
            return Bound(lambda: y, Counter(), 0)
        chosen = self._chosen(candidate.tries)
        config = f"{PACKAGE} {version_of(PACKAGE)}: {chosen.name} {json.dumps(chosen.tuning, default=str)}"
        if candidate.api == "wrapper":
            return Bound(_public(chosen, t), Counter(), 0, uses_scratch=False, config=config)
        offsets = torch.zeros(t.weight.E + 1, dtype=torch.int32, device=t.x.device)
        steps = [
            Step("schedule", functools.partial(_sum_up, offsets, t.counts)),
            Step("gemm", _launcher(chosen.layer, chosen.kernel, t.x, y, offsets)),
        ]

        def run() -> torch.Tensor:
            for step in steps:
                step.run()
            return y

        return Bound(run, Counter(s.kind for s in steps), 0, schedule=steps[0].run, config=config)

    def _chosen(self, tries: int) -> _Chosen:
        if self._set_up is None:
            try:
                with of_peer("humming"), contextlib.redirect_stdout(sys.stderr):  # its compiler prints its complaints
                    self._set_up = _choose(self._t, tries)
            except Refused as refused:
                self._set_up = refused
        if isinstance(self._set_up, Refused):
            raise self._set_up
        return self._set_up


def packed(weight: QuantWeight) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Its description of a public weight, and the weight in its packing before its own transformation.

    Codes: int32 words of consecutive k, lowest bits first, counted from 0 (a symmetric format's from -2^(b-1)); zeros
    packed alike along n. Raises: ValueError for what it has no place for.
    """
    fmt, scales, zeros = weight.format, weight.scales, weight.zeros
    if scales is None or weight.scale_layout not in ("group", "channel") or weight.weight_layout != "public":
        raise ValueError(f"no packing for {weight.scale_layout} scales in layout {weight.weight_layout}")
    codes = weight.codes.contiguous().view(torch.uint8)
    if fmt.kind == "int" and not fmt.asym:
        codes = codes ^ {8: 0x80, 4: 0x88, 2: 0xAA}[fmt.bits]  # flips each code's sign bit
    config: dict[str, Any] = {
        "quant_method": "humming",
        "dtype": f"uint{fmt.bits}" if fmt.kind == "int" else fmt.name.replace("fp8_", "float8"),
        "group_size": 0 if weight.scale_layout == "channel" else weight.group_size,
    }
    tensors = {"weight": codes.view(torch.int32), "weight_scale": scales.contiguous()}
    if zeros is not None:
        config["has_zero_point"] = True
        tensors["zero_point"] = _packed_zeros(zeros, fmt.bits)
    return config, tensors


def _packed_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """[E, N, groups] -> [E, N * bits / 32, groups]; int32."""
    if bool((zeros >= 2**bits).any()) or zeros.shape[1] % (32 // bits):
        raise ValueError(f"no packing for zero points of {2**bits} or N not a multiple of {32 // bits}")
    fields = zeros.to(torch.int64).unflatten(1, (-1, 32 // bits))  # [E, words, fields, groups]
    shifts = torch.arange(0, 32, bits, device=zeros.device).view(1, 1, -1, 1)
    words = (fields << shifts).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _layer(t: Inputs) -> Any:
    """Its layer with our weight, transformed."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    weight = t.weight
    config, tensors = packed(weight)
    with torch.device(t.x.device):
        layer = HummingLayer(
            shape_n=weight.N, shape_k=weight.K, weight_config=config, num_experts=weight.E, torch_dtype=t.x.dtype
        )
    wanted = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        raise ValueError(f"its layer wants {wanted}, the packed weight has {given}")
    layer.load_from_tensors(tensors)
    layer.transform()
    return layer


def _choose(t: Inputs, tries: int) -> _Chosen:
    """Set the layer up, compile its default and other configurations, and take the fastest right one."""
    from humming.kernel.humming import HummingKernel  # type: ignore[import-not-found]
    from humming.tune import get_heuristics_config  # type: ignore[import-not-found]

    layer = _layer(t)
    device, rows = t.x.device, t.x.shape[0]
    find = functools.partial(get_heuristics_config, layer.humming_config, gemm_type=COMPUTE["gemm_type"], device=device)
    tunings = [dict(find(shape_m=rows))]
    for factor in OTHER_ROWS:
        other = dict(find(shape_m=max(1, round(rows * factor))))
        if len(tunings) <= tries and other not in tunings:
            tunings.append(other)
    layer_text, compute_text = layer.humming_config.to_str(), json.dumps(COMPUTE)
    intervals = [[0, 1 << 30, tuning] for tuning in tunings]
    kernels = HummingKernel.prepare_kernels(layer_text, compute_text, intervals, device).view(len(tunings), -1)
    offsets = torch.zeros(t.weight.E + 1, dtype=torch.int32, device=device)
    _sum_up(offsets, t.counts)
    y = torch.empty(rows, t.weight.N, dtype=t.x.dtype, device=device)
    sampler, times = Sampler(device), []
    for kernel in kernels:
        run = _launcher(layer, kernel.clone(), t.x, y.fill_(float("nan")), offsets)
        run()
        right = judge(y, t.oracle, t.peer, t.weight.K).ok
        samples = [sampler.sample(run) for _ in range(TUNING_SAMPLES)] if right else [float("inf")]
        times.append(statistics.median(samples))
    best = times.index(min(times))  # the default if none is right, for the gate to say so
    wrong = times.count(float("inf"))
    name = "default" if best == 0 else "tuned"
    name += f", best of {len(times)}" + (f", {wrong} of them WRONG" if wrong else "")
    return _Chosen(layer, kernels[best].clone(), tunings[best], name)


def _sum_up(offsets: torch.Tensor, counts: torch.Tensor) -> None:
    """First row of each expert, offsets[0] being 0 already."""
    torch.cumsum(counts, 0, dtype=offsets.dtype, out=offsets[1:])


def _launcher(
    layer: Any, kernel: torch.Tensor, x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor
) -> Callable[[], object]:
    """A launch on fixed tensors: what its layer calls in the end."""
    from humming import ops  # type: ignore[import-not-found]

    names = ("weight", "weight_scale", "zero_point", "weight_scale_2")
    tensors = {name: getattr(layer, name, None) for name in names}
    return functools.partial(
        ops.launch_kernel, configs=kernel, inputs=x, outputs=y, expert_layout=offsets, locks=layer.locks, **tensors
    )


def _public(chosen: _Chosen, t: Inputs) -> Callable[[], torch.Tensor]:
    """Its layer's own call, from counts to a new result."""
    compute, tuning = json.dumps(COMPUTE), json.dumps([[0, 1 << 30, chosen.tuning]], default=str)

    def run() -> torch.Tensor:
        ends = torch.cumsum(t.counts, 0, dtype=torch.int32)
        offsets = torch.nn.functional.pad(ends, (1, 0))
        return chosen.layer(t.x, expert_layout=offsets, compute_config=compute, tuning_config=tuning)

    return run
