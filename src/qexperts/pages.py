"""Weights in huge pages: a decode reads every byte of an expert once, and with pages of 4 KiB it waits for page tables.

Measured on two cores of an EPYC, int4, 8 rows on 8 of 64 experts: 634 us, in huge pages 442 us. Who allocates a weight
asks before filling it: then the system fills huge pages from the start. What is there already it copies, at once.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

__all__ = ["use_huge_pages"]

HUGE = 2**21  # bytes
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_COLLAPSE, _ADVISE = 25, 14  # madvise: MADV_COLLAPSE, at once, since Linux 6.1; MADV_HUGEPAGE, in time
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(*tensors: torch.Tensor | None) -> None:
    """Ask the system to keep these tensors in huge pages, but for what lies outside whole ones.

    Advice: their values, addresses and size stay, and nothing happens where the system has no such pages, has them
    switched off ("never") or does not find any free; nor to tensors on other devices, strided ones and those without
    memory (fake tensors).
    """
    ranges = [_whole_pages(t) for t in tensors if t is not None and type(t) in _PLAIN and t.device.type == "cpu"]
    ranges = [(first, size) for first, size in ranges if size > 0]
    if not ranges or not _SETTING.exists() or "[never]" in _SETTING.read_text():
        return
    libc = ctypes.CDLL(None)
    for first, size in ranges:
        where = ctypes.c_void_p(first), ctypes.c_size_t(size)
        if libc.madvise(*where, _COLLAPSE) != 0:  # such as memory that nothing was written to yet
            libc.madvise(*where, _ADVISE)


def _whole_pages(t: torch.Tensor) -> tuple[int, int]:
    """Address and size of the huge pages that lie inside a tensor; the size is 0 or less if there are none."""
    if not t.is_contiguous():
        return 0, 0
    first = -(-t.data_ptr() // HUGE) * HUGE
    return first, (t.data_ptr() + t.nbytes) // HUGE * HUGE - first
