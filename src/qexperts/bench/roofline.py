"""Ceilings measured on the machine at hand, and the bytes and operations that a workload cannot do without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..backends import triton_backend
from ..backends.torch_backend import compute_dtype
from ..formats import QuantWeight
from .timing import Sampler

__all__ = ["Ceilings", "mandatory_bytes", "measure_ceilings", "reads", "useful_flop"]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best.

    Attributes:
        tflops: large matmul in the activation dtype, 1e12 FLOP/s.
        copy_gbps: large copy, bytes read plus bytes written, 1e9 B/s.
        read_gbps: reading only, 1e9 B/s; None in older records of CPUs.
    """

    tflops: float
    copy_gbps: float
    read_gbps: float | None = None


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of a few large matmuls on random data, of a few large copies, and of a few ways of reading.

    Under a second on an idle machine, plus the compilation of a kernel that reads.
    """
    sampler = Sampler(device)
    gpu = device.type != "cpu"
    m, repeats = (8192, 9) if gpu else (2048, 5)
    used = compute_dtype(device, dtype)
    a, b = (torch.randn(m, m, device=device, dtype=used) for _ in range(2))
    c = torch.empty_like(a)
    source = torch.zeros(2**31 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def best(run: Callable[[], object]) -> float:
        for _ in range(2):
            run()
        return min(sampler.sample(run) for _ in range(repeats))

    matmul_ms = best(lambda: torch.mm(a, b, out=c))
    copy_ms = best(lambda: target.copy_(source))
    read_ms = min(best(run) for run in reads(source))
    copied = 2 * source.numel() / copy_ms / 1e6
    return Ceilings(2 * m**3 / matmul_ms / 1e9, copied, source.numel() / read_ms / 1e6)


def reads(source: torch.Tensor) -> list[Callable[[], object]]:
    """Ways of reading a buffer of zeros once; reductions of torch do not reach the bandwidth everywhere."""
    floats, halves = source.view(torch.float32), source.view(torch.bfloat16)
    found: list[Callable[[], object]] = [floats.sum, halves.sum, floats.amax]
    if source.device.type != "cpu" and triton_backend.installed():
        from .read import readers

        found += readers(source)
    return found


def useful_flop(total_tokens: int, n: int, k: int) -> int:
    """2 S N K: what the rows need, without padding."""
    return 2 * total_tokens * n * k


def mandatory_bytes(weight: QuantWeight, active_experts: int, total_tokens: int, dtype: torch.dtype) -> int:
    """Codes, scales and zeros of the active experts, x and y: each read or written once."""
    per_expert = weight.nbytes // weight.E
    return active_experts * per_expert + total_tokens * (weight.N + weight.K) * dtype.itemsize
