"""The threads that run a kernel: the very ones that torch's operators run on.

torch brings its OpenMP library; kernels are given to the same library, from the same thread, in the same number. So
there is one pool: no second set of threads that waits actively while torch computes, and none that the system places
on a core beside torch's. (Another pool, Numba's, cost up to 16-60 ms a call where 0.4-3 ms were expected, whenever two
threads shared a core.)
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["run", "team_name"]

Start = Callable[[int, int, int, int], None]


def _loaded_libraries() -> list[str]:
    """Shared libraries of this process whose name is that of an OpenMP library that starts teams as GNU's does."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line}
    found = [p for p in paths if os.path.basename(p).startswith(("libgomp", "libiomp5", "libomp"))]
    home = os.path.dirname(torch.__file__)
    return sorted(found, key=lambda p: (not p.startswith(home), p))  # torch's own first: others may be loaded too


@functools.cache
def _openmp() -> tuple[str, Start] | None:
    if not torch.backends.openmp.is_available():
        return None
    for path in _loaded_libraries():
        try:
            start = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        start.restype = None
        return os.path.basename(path), start
    return None


@functools.cache
def _workers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(thread_name_prefix="qexperts")


@functools.cache
def _entry(function: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


def run(function: int, record: int, threads: int) -> None:
    """Call `void function(void *record)` on as many threads, this one among them, and wait for all."""
    openmp = _openmp()
    if threads == 1:
        _entry(function)(record)
    elif openmp is not None:
        openmp[1](function, record, threads, 0)
    else:
        entry = _entry(function)
        others = [_workers().submit(entry, record) for _ in range(threads - 1)]
        entry(record)
        for other in others:
            other.result()


def team_name() -> str:
    """Whose threads run."""
    openmp = _openmp()
    return f"torch's OpenMP threads ({openmp[0]})" if openmp is not None else "Python threads"
