"""Timing with cold caches, in interleaved rounds.

Every round runs every candidate once, in a new (seeded) order, so that a machine that drifts does so for all alike.
GPU samples are device events around the call (launch gaps included, as a user meets them); CPU samples are wall-clock.

Before each sample a CPU reads a buffer larger than its cache: as in a running model, it holds clean lines of weights
that were read before. On a GPU the cache is overwritten, and then a second buffer is read. A cache that was only
overwritten is full of dirty lines, and writing them back is charged to whoever is timed next.
Measured on an H100 (50 MB of L2): a kernel that reads 160 MB takes 67 us after overwriting and 57 us after reading; a
decode that reads 328 MB takes 140 us after overwriting, 132 us after overwriting and reading, and 136 us a call where
eight sets of experts take turns without a flush, launch gaps included.

A decode on a CPU takes as long as the flush changes it: reading 96 MB also drives the interpreter and torch's code out
of the caches, which no model does between two layers, and a call of 0.5 ms then takes 0.15-0.2 ms more. So a
`Rotation` takes its place there: calls with weights of their own, together larger than the cache, one after the other.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

__all__ = [
    "ROTATE",
    "CacheFlusher",
    "Rotation",
    "Sampler",
    "flush_method",
    "host_ms",
    "issue_us",
    "last_level_cache",
    "median_interval",
    "percentile",
    "synchronize",
]

QUEUE = 800  # launches that a device takes without holding up the host; NVIDIA's queue holds 1,024
ISSUE_SECONDS = 0.5  # for the host time of one candidate
OVERWRITE, READ = 2, 3  # sizes of the cache; the more is read, the fewer dirty lines are left
_CACHE_BYTES = 32 * 2**20  # where the size of the last-level cache is not known
ROTATE = "rotate"  # what records say of samples of a `Rotation`


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def flush_method(device: torch.device) -> str:
    """What `CacheFlusher` does on a device, as records name it: "read" or "write+read"."""
    return "read" if device.type == "cpu" else "write+read"


class CacheFlusher:
    """Reads a buffer larger than the cache, so that it holds clean lines of other data; on a GPU, overwrites another
    one first."""

    def __init__(self, device: torch.device) -> None:
        cache = last_level_cache()
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
        cache = max(cache, 2**19)
        self._device = device
        self._written: torch.Tensor | None = None
        if flush_method(device) == "write+read":
            self._written = torch.empty(OVERWRITE * cache, dtype=torch.uint8, device=device)
        self._read = torch.zeros(READ * cache // 4, dtype=torch.int32, device=device)
        self._largest = torch.zeros((), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        if self._written is not None:
            self._written.zero_()
            synchronize(self._device)  # so that the host is ahead of the device by the reading, not by both
        torch.amax(self._read, dim=0, out=self._largest)


def last_level_cache() -> int:
    """Bytes of the first processor's largest cache; 32 MiB if the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    found = max((int(text[:-1]) * units[text[-1]] for text in sizes if text[-1:] in units), default=0)
    return found or _CACHE_BYTES


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Calls on weights of their own, which together do not fit the cache: a sample is the mean of one pass."""

    calls: tuple[Callable[[], object], ...]

    def __call__(self) -> None:
        for call in self.calls:
            call()


class Sampler:
    """Collects samples of several callables in interleaved rounds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = CacheFlusher(device)

    def sample(self, run: Callable[[], object]) -> float:
        """One cold-cache time in ms, of a `Rotation` that of a call."""
        if isinstance(run, Rotation):
            return self._wall_ms(run) / len(run.calls)
        self._flush()
        if self._device.type != "cuda":
            return self._wall_ms(run)
        stream = torch.cuda.current_stream(self._device)
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_event.record(stream)
        run()
        end_event.record(stream)
        end_event.synchronize()
        return start_event.elapsed_time(end_event)

    def _wall_ms(self, run: Callable[[], object]) -> float:
        synchronize(self._device)
        start = time.perf_counter_ns()
        run()
        synchronize(self._device)
        return (time.perf_counter_ns() - start) / 1e6

    def rounds(
        self,
        candidates: Sequence[Callable[[], object]],
        rounds: int,
        samples: Sequence[list[float]],
        tick: Callable[[], None] = lambda: None,
        before: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Append `rounds` samples of each candidate to its list; what is there stays if this is interrupted. The i-th
        samples of all candidates are those of round i. before: of each candidate, called outside the clock."""
        for c, run in enumerate(candidates):
            if before:
                before[c]()
            run()  # warm: the check was the first call, this one has every buffer in place
        synchronize(self._device)
        order, shuffled = list(range(len(candidates))), random.Random(0)
        for _ in range(rounds):
            shuffled.shuffle(order)
            for c in order:
                if before:
                    before[c]()
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


def median_interval(values: Sequence[float], confidence: float = 0.9) -> tuple[float, float] | None:
    """Bounds of the median by order statistics, whatever the distribution is; None for too few values (90%: under 5).

    P(value[j] <= median <= value[n-1-j]) = 1 - 2 P(Binomial(n, 1/2) <= j) >= confidence      largest such j
    """
    n, j, tail = len(values), -1, 0.0
    while j + 1 < n and 1 - 2 * (tail + math.comb(n, j + 1) / 2**n) >= confidence:
        j += 1
        tail += math.comb(n, j) / 2**n
    ordered = sorted(values)
    return None if j < 0 else (ordered[j], ordered[n - 1 - j])


def percentile(samples: Sequence[float], q: float) -> float:
    """Linear-interpolated percentile, q in 0..100; q=50 is the median."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
