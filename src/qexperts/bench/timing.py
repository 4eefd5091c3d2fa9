"""Timing with cold caches, in interleaved rounds.

Every round runs every candidate once, in a new (seeded) order, so that a machine that drifts does so for all alike.
Before each sample the caches are overwritten. GPU samples are device events around the call (launch gaps included,
as a user meets them); CPU samples are wall-clock.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

__all__ = ["CacheFlusher", "Sampler", "host_ms", "issue_us", "percentile", "synchronize"]

QUEUE = 800  # launches that a device takes without holding up the host; NVIDIA's queue holds 1,024
ISSUE_SECONDS = 0.5  # for the host time of one candidate
_CPU_CACHE_BYTES = 64 * 2**20  # where the size of the last-level cache is not known


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class CacheFlusher:
    """Overwrites a buffer larger than the cache."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * _last_level_cache() or _CPU_CACHE_BYTES
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(size, 2**20), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def _last_level_cache() -> int:
    """Bytes of the first processor's largest cache, 0 if the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(text[:-1]) * units[text[-1]] for text in sizes if text[-1:] in units), default=0)


class Sampler:
    """Collects samples of several callables in interleaved rounds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = CacheFlusher(device)

    def sample(self, run: Callable[[], object]) -> float:
        """One cold-cache time in ms."""
        self._flush()
        if self._device.type != "cuda":
            synchronize(self._device)
            start = time.perf_counter_ns()
            run()
            synchronize(self._device)
            return (time.perf_counter_ns() - start) / 1e6
        stream = torch.cuda.current_stream(self._device)
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_event.record(stream)
        run()
        end_event.record(stream)
        end_event.synchronize()
        return start_event.elapsed_time(end_event)

    def rounds(
        self,
        candidates: Sequence[Callable[[], object]],
        rounds: int,
        samples: Sequence[list[float]],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Append `rounds` samples of each candidate to its list; what is there stays if this is interrupted."""
        for run in candidates:
            run()  # warm: the check was the first call, this one has every buffer in place
        synchronize(self._device)
        order, shuffled = list(range(len(candidates))), random.Random(0)
        for _ in range(rounds):
            shuffled.shuffle(order)
            for c in order:
                samples[c].append(self.sample(candidates[c]))
                tick()


def host_ms(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median wall-clock time of host work that ends with whatever synchronisation it contains, in ms."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return statistics.median(times)


def issue_us(run: Callable[[], object], device: torch.device, launches: int, calls: int = 200) -> float:
    """Median host time of issuing a warmed call, in us.

    There are `calls` calls between two synchronisations, or fewer where their launches would fill the device's queue
    or their work take long.
    """
    started = time.perf_counter()
    run()
    synchronize(device)
    once = time.perf_counter() - started
    together = max(1, min(calls, QUEUE // max(1, launches), int(ISSUE_SECONDS / once)))
    times: list[int] = []
    while len(times) < calls and (not times or time.perf_counter() - started < ISSUE_SECONDS):
        synchronize(device)
        for _ in range(together):
            start = time.perf_counter_ns()
            run()
            times.append(time.perf_counter_ns() - start)
    synchronize(device)
    return statistics.median(times) / 1e3


def percentile(samples: Sequence[float], q: float) -> float:
    """Linear-interpolated percentile, q in 0..100; q=50 is the median."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
