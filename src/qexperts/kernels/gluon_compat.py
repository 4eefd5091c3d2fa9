"""Gluon of Triton 3.6 to 3.9: what changed between the releases."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["reinterpret", "thread_barrier", "tma_load"]

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory seen as another shape in another layout."""
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)

else:

    @gluon.jit
    def reinterpret(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory seen as another shape in another layout."""
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)
