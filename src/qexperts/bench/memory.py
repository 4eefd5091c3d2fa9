"""Memory taken while something runs."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
import time
from pathlib import Path

import torch

from .timing import synchronize

__all__ = ["Peak"]

_STATUS = Path("/proc/self/status")


class Peak:
    """Memory taken inside a `with`, beyond what was in use before, in bytes: of a GPU what torch allocates there, of a
    CPU what is anonymous in this process (mapped files are not).

    Attributes:
        peak: the most at any time; None on a CPU whose system does not say, which only Linux does.
        seconds: spent inside.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self.peak: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type != "cpu":
            synchronize(self.device)
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats(self.device)
            self.before = torch.accelerator.memory_allocated(self.device)
        elif _STATUS.exists():
            if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be taken again
            self.before = self.highest = _anonymous()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.started
        if self.device.type != "cpu":
            self.peak = torch.accelerator.max_memory_allocated(self.device) - self.before
        elif _STATUS.exists():
            self.done.set()
            self.thread.join()
            self.peak = self.highest - self.before

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, _anonymous())


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", _STATUS.read_text())
    if found is None:
        raise RuntimeError(f"{_STATUS} has no line RssAnon; it takes Linux 4.5")
    return int(found[1]) * 1024
