"""How long a kernel takes that only reads what a decode has to: python docs/reads.py [--save FILE.jsonl]

The weights of 8 and of 134 experts, N=3072 K=1536, prepared (scales of groups of 128 take 4 bytes), lie one behind the
other; nothing says where, nothing is computed, nothing written. In a CUDA graph, caches made cold as the benchmark does
it; the fastest of several ways to share the reading out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from qexperts import FORMATS
from qexperts.bench.environment import environment
from qexperts.bench.measure import captured
from qexperts.bench.timing import Sampler

N, K, GROUP = 3072, 1536, 128
EXPERTS = (8, 134)  # active of 192: top-8 of 1 and of 32 tokens
LOADS = 8  # under way at a time
PROGRAMS = (4, 8, 16, 32)  # for each multiprocessor
SPAN = 1024  # words
ROUNDS = 25


@triton.jit
def read_kernel(out_ptr, w_ptr, blocks, SPAN: tl.constexpr, LOADS: tl.constexpr):
    """Programs take equal, consecutive shares of blocks of SPAN words."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = program * (blocks // programs) + tl.minimum(program, blocks % programs)
    mine = blocks // programs + (program < blocks % programs).to(tl.int32)
    offs = tl.arange(0, SPAN)
    acc = tl.zeros((SPAN,), tl.int32)
    for i in range(0, mine, LOADS):
        for j in tl.static_range(LOADS):
            acc ^= tl.load(w_ptr + (first + i + j) * SPAN + offs, mask=i + j < mine, other=0)
    total = tl.sum(acc, 0)
    if total == 1:  # never: the words are 0
        tl.store(out_ptr, total)


@triton.jit
def empty_kernel():
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="FILE.jsonl", help="append a line for each size")
    save = parser.parse_args().save
    device = torch.device("cuda", torch.cuda.current_device())
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(1, dtype=torch.int32, device=device)
    sizes = {
        (name, experts): experts * N * (K * FORMATS[name].bits // 8 + K // GROUP * 4)
        for name in ("int2_sym", "int4_sym", "int8_sym")
        for experts in EXPERTS
    }
    words = torch.zeros(max(sizes.values()) // 4, dtype=torch.int32, device=device)
    launches: dict[object, Callable[[], object]] = {None: lambda: empty_kernel[(1,)]()}
    for key, size in sizes.items():
        for each in PROGRAMS:
            grid, blocks = (each * processors,), size // 4 // SPAN
            launches[key, each] = lambda g=grid, b=blocks: read_kernel[g](out, words, b, SPAN, LOADS)
    for launch in launches.values():
        launch()  # compiled before it is captured
    samples: list[list[float]] = [[] for _ in launches]
    Sampler(device).rounds([captured(launch, device) for launch in launches.values()], ROUNDS, samples)
    times = {key: 1e3 * statistics.median(ms) for key, ms in zip(launches, samples, strict=True)}
    lines = [{"what": "empty kernel", "bytes": 0, "median_us": times[None]}]
    for (name, experts), size in sizes.items():
        best = min(times[(name, experts), each] for each in PROGRAMS)
        lines.append({"what": name, "experts": experts, "bytes": size, "median_us": best})
    for line in lines:
        print(json.dumps(line))
    if save:
        with open(save, "a", encoding="utf-8") as file:
            where = {"rounds": ROUNDS, **environment(device), "command": "python docs/reads.py"}
            file.writelines(json.dumps({**line, **where}) + "\n" for line in lines)


if __name__ == "__main__":
    main()
