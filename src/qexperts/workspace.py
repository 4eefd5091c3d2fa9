"""Reusable scratch memory: one byte buffer per (device, stream, thread), grown to the largest need.

A buffer is never shared between streams, nor between host threads: two threads that issue to one stream would
otherwise overwrite each other's weights between two launches. During CUDA-graph capture memory comes from the
graph's own pool and is not kept, so replays never touch a buffer that eager calls write.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref

import torch

__all__ = ["Arena", "arena", "clear_workspaces", "is_capturing", "workspace_bytes"]

_ALIGN = 256


@dataclasses.dataclass
class _Kept:
    buffer: torch.Tensor | None = None
    high_water: int = 0


class _Owner:
    """What one host thread keeps, by (device, stream); freed with the thread."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.device, int], _Kept] = {}


_lock = threading.Lock()
_local = threading.local()
_owners: weakref.WeakSet[_Owner] = weakref.WeakSet()


def _owner() -> _Owner:
    owner = getattr(_local, "owner", None)
    if owner is None:
        owner = _local.owner = _Owner()
        with _lock:
            _owners.add(owner)
    return owner


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` records a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Arena:
    """Hands out uninitialised tensors front to back; they are valid until the next `arena()` of the same owner.

    What does not fit the kept buffer is allocated on its own, and the buffer is grown to the sum next time.
    """

    def __init__(self, device: torch.device, kept: _Kept | None) -> None:
        self._device = device
        self._kept = kept
        self.used = 0

    @classmethod
    def over(cls, buffer: torch.Tensor) -> Arena:
        """An arena inside a caller's own uint8 buffer."""
        return cls(buffer.device, _Kept(buffer))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous, uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        start, self.used = self.used, self.used + -(-size // _ALIGN) * _ALIGN
        buffer = None if self._kept is None else self._kept.buffer
        if buffer is not None and self.used <= buffer.numel():
            part = buffer[start : start + size]
            return part if dtype == torch.uint8 and len(shape) == 1 else part.view(dtype).view(shape)
        taken = torch.empty(shape, dtype=dtype, device=self._device)
        if self._kept is not None:  # only what could be had is asked for again
            self._kept.high_water = max(self._kept.high_water, self.used)
        return taken


def arena(device: torch.device) -> Arena:
    """Scratch memory for one call on the device's current stream. No host sync."""
    if is_capturing(device):
        return Arena(device, None)
    stream = 0 if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
    kept = _owner().kept.setdefault((device, stream), _Kept())
    if kept.high_water > (0 if kept.buffer is None else kept.buffer.numel()):
        kept.buffer = None  # free the old one first: the two need not fit side by side
        try:
            kept.buffer = torch.empty(kept.high_water, dtype=torch.uint8, device=device)
        except RuntimeError:  # no room for the largest call so far: this one takes just what it needs
            kept.high_water = 0
    return Arena(device, kept)


def clear_workspaces() -> None:
    """Release every kept buffer (not those that belong to captured graphs)."""
    with _lock:
        for owner in _owners:
            owner.kept.clear()


def workspace_bytes() -> int:
    """Bytes kept right now, over all devices, streams and threads."""
    with _lock:
        kept = [k for owner in _owners for k in list(owner.kept.values())]
    return sum(k.buffer.numel() for k in kept if k.buffer is not None)
