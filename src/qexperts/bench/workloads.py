"""What is multiplied: a token distribution, a projection, a format, and the tensors made from a seed."""

from __future__ import annotations

import dataclasses

import torch

from ..formats import FORMATS, WeightFormat, check_group_size, check_sizes
from ..quantize import quantize
from ..routing import Distribution
from ..testing import Inputs

__all__ = ["DTYPES", "PROJECTIONS", "Workload", "decode_distribution", "make_inputs", "select_formats"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROJECTIONS = ((3072, 1536), (1536, 3072))  # (N, K) of the recorded workload's two projections


@dataclasses.dataclass(frozen=True)
class Workload:
    """One multiplication to measure.

    Attributes:
        distribution: rows of each expert.
        scaled: how this differs from the workload it stands for, None if it does not.
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
    batch: int | None = None
    top_k: int | None = None

    def check(self) -> None:
        """ValueError if no backend could take these sizes."""
        where = f"--n {self.n} --k {self.k}"
        check_sizes(where, self.format, self.n, self.k)
        if self.format.quantized:
            check_group_size(where, self.format, self.k, self.group_size)
        elif self.format.name != self.dtype:
            raise ValueError(
                f"--formats {self.format.name}: unquantized weights need --dtype {self.format.name}, not {self.dtype}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    """A workload's tensors, made on the device: x standard normal, weights normal of variance 1/K.

    Public layout, group scales in the activation dtype. One fp32 copy of one expert at a time.
    """
    w, dist = workload, workload.distribution
    generator = torch.Generator(device).manual_seed(w.seed)
    dense = torch.empty((dist.num_experts, w.n, w.k), dtype=w.torch_dtype, device=device)
    for expert in range(dist.num_experts):
        dense[expert] = torch.randn((w.n, w.k), generator=generator, device=device).mul_(w.k**-0.5)
    weight = quantize(dense, w.format, group_size=w.group_size)
    del dense
    x = torch.randn(dist.total_tokens, w.k, generator=generator, device=device).to(w.torch_dtype)
    return Inputs.of(x, weight, dist.counts)


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
