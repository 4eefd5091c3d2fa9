"""What is multiplied: a token distribution, a projection, a format, and the tensors made from a seed."""

from __future__ import annotations

import dataclasses

import torch

from ..formats import FORMATS, QuantWeight, WeightFormat, check_group_size, check_sizes
from ..quantize import quantize
from ..routing import Distribution
from ..testing import Inputs

__all__ = [
    "DTYPES",
    "PROJECTIONS",
    "LayerWorkload",
    "Routed",
    "Workload",
    "decode_distribution",
    "make_inputs",
    "random_weight",
    "route_steps",
    "select_formats",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROJECTIONS = ((3072, 1536), (1536, 3072))  # (N, K) of the recorded workload's two projections


@dataclasses.dataclass(frozen=True)
class Workload:
    """One multiplication to measure.

    Attributes:
        distribution: rows of each expert.
        scaled: how this differs from the workload it stands for, None if it does not.
        scale_dtype: of the scales, a name of `DTYPES`; None: that of the activations.
        batch, top_k: decode only: the tokens and the experts per token that the distribution comes from.
    """

    kind: str
    distribution: Distribution
    n: int
    k: int
    group_size: int
    format: WeightFormat
    dtype: str
    seed: int
    scaled: str | None = None
    scale_dtype: str | None = None
    batch: int | None = None
    top_k: int | None = None

    def check(self) -> None:
        """ValueError if no backend could take these sizes."""
        _check(f"--n {self.n} --k {self.k}", self, self.n, self.k)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def title(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        return f"{self.kind} N={self.n} K={self.k} {self.format.name}{batch}"


@dataclasses.dataclass(frozen=True)
class LayerWorkload:
    """A prefill and decode steps of layers of experts, w_gate_up [E, 2I, H] and w_down [E, H, I].

    Attributes:
        distribution: rows of each expert in the prefill; each layer has them for other experts, and draws the experts
            of its decode steps in proportion to them.
        layers: each with weights of its own.
        batch: sequences of a decode step.
        decode_threshold: rows per expert up to which a call that looks at the counts is a decode.
        scaled: how this differs from the workload it stands for, None if it does not.
        scale_dtype: of the scales, a name of `DTYPES`; None: that of the activations.
    """

    distribution: Distribution
    layers: int
    decode_steps: int
    batch: int
    top_k: int
    hidden: int
    intermediate: int
    group_size: int
    format: WeightFormat
    dtype: str
    seed: int
    decode_threshold: int = 4
    scaled: str | None = None
    scale_dtype: str | None = None
    kind: str = "layer"

    def check(self) -> None:
        """ValueError if no backend could take these sizes."""
        where = f"--hidden {self.hidden} --intermediate {self.intermediate}"
        for n, k in self.projections:
            _check(where, self, n, k)

    @property
    def projections(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(N, K) of w_gate_up and of w_down."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)

    @property
    def tokens(self) -> int:
        """T of the prefill."""
        return self.distribution.total_tokens // self.top_k

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def title(self) -> str:
        return f"{self.layers} layers H={self.hidden} I={self.intermediate} {self.format.name}"


def _check(where: str, workload: Workload | LayerWorkload, n: int, k: int) -> None:
    fmt, dtype = workload.format, workload.dtype
    check_sizes(where, fmt, n, k)
    if fmt.quantized:
        check_group_size(where, fmt, k, workload.group_size)
    elif fmt.name != dtype:
        raise ValueError(f"--formats {fmt.name}: unquantized weights need --dtype {fmt.name}, not {dtype}")


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    """A workload's tensors, made on the device: x standard normal, weights normal of variance 1/K.

    Public layout, group scales.
    """
    w, dist = workload, workload.distribution
    generator = torch.Generator(device).manual_seed(w.seed)
    weight = random_weight(w, w.n, w.k, generator)
    x = torch.randn(dist.total_tokens, w.k, generator=generator, device=device).to(w.torch_dtype)
    return Inputs.of(x, weight, dist.counts)


def random_weight(workload: Workload | LayerWorkload, n: int, k: int, generator: torch.Generator) -> QuantWeight:
    """A weight [E, N, K], normal of variance 1/K, on the generator's device. One fp32 copy of one expert at a time."""
    experts, device = workload.distribution.num_experts, generator.device
    dense = torch.empty((experts, n, k), dtype=workload.torch_dtype, device=device)
    for expert in range(experts):
        dense[expert] = torch.randn((n, k), generator=generator, device=device).mul_(k**-0.5)
    scale_dtype = DTYPES[workload.scale_dtype or workload.dtype]
    return quantize(dense, workload.format, group_size=workload.group_size, scale_dtype=scale_dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """What a router gives to one layer in one step.

    Attributes:
        expert_ids, expert_weights: [T, top_k]; int64 and the dtype of the activations, as routers of transformers give
            them; the experts of a token differ.
        counts: [E]; int32; rows of each expert.
    """

    expert_ids: torch.Tensor
    expert_weights: torch.Tensor
    counts: torch.Tensor


def route_steps(w: LayerWorkload, device: torch.device) -> list[list[Routed]]:
    """For each layer, the routing of the prefill and of each decode step; the same for the same seed.

    In the prefill a layer has the counts of the distribution, of experts in another order. A token of a decode step
    draws top_k different experts, each in proportion to those counts.
    """
    generator = torch.Generator().manual_seed(w.seed)
    experts = w.distribution.num_experts
    found = []
    for _ in range(w.layers):
        order = torch.randperm(experts, generator=generator)
        counts = torch.tensor(w.distribution.counts)[order]
        # Rows sorted by expert go to one token after the other: no expert has more than T, so no token has one twice.
        ids = torch.arange(experts).repeat_interleave(counts).view(w.top_k, w.tokens).T
        steps = [ids[torch.randperm(w.tokens, generator=generator)]]
        share = counts.double().expand(w.batch, experts)
        steps += [torch.multinomial(share, w.top_k, generator=generator) for _ in range(w.decode_steps)]
        found.append([_routed(w, step, generator, device) for step in steps])
    return found


def _routed(w: LayerWorkload, ids: torch.Tensor, generator: torch.Generator, device: torch.device) -> Routed:
    weights = torch.rand(ids.shape, generator=generator)
    weights = (weights / weights.sum(1, keepdim=True)).to(w.torch_dtype)
    counts = ids.flatten().bincount(minlength=w.distribution.num_experts).to(torch.int32)
    return Routed(ids.contiguous().to(device), weights.to(device), counts.to(device))


def decode_distribution(batch: int, top_k: int, num_experts: int, seed: int) -> Distribution:
    """Rows of each expert when `batch` tokens each choose top_k distinct experts, uniformly at random."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(num_experts, dtype=torch.int64)
    for _ in range(batch):
        counts[torch.randperm(num_experts, generator=generator)[:top_k]] += 1
    name = f"decode-{batch}x{top_k}"
    return Distribution(name, tuple(counts.tolist()), f"{batch} tokens, top-{top_k} uniform, seed {seed}")


def select_formats(text: str, dtype: str) -> list[WeightFormat]:
    """A comma list of names, or "all": every quantized format and the unquantized one of the dtype."""
    if text == "all":
        return [f for f in FORMATS.values() if f.quantized or f.name == dtype]
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        given = ", ".join(unknown) or "(none)"
        raise ValueError(f"--formats {text}: unknown format {given}; known: all, {', '.join(FORMATS)}")
    return [FORMATS[name] for name in dict.fromkeys(names)]
