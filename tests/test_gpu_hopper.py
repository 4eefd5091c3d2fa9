"""The Gluon prefills on sm_90, by themselves."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch

from qexperts import FORMATS, prepare, quantize
from qexperts.backends import Problem
from qexperts.backends.triton_backend import run_into
from qexperts.testing import Case, assert_no_worse, make_inputs, nan_filled

pytestmark = pytest.mark.gpu

QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
DTYPES = (torch.bfloat16, torch.float16)
DENSE = [("bf16", torch.bfloat16), ("fp16", torch.float16)]
FULL = [
    *((fmt, dtype, 128) for fmt in QUANTIZED for dtype in DTYPES),
    *((fmt, torch.bfloat16, group) for fmt in QUANTIZED for group in (64, 32)),
    *((fmt, dtype, 128) for fmt, dtype in DENSE),
]
CASES = [
    *(
        Case((70, 0, 16, 5, 130, 33, 300, 65, 80, 96, 97), 384, 1536, fmt, 128, dtype, why="all classes")
        for fmt in QUANTIZED
        for dtype in DTYPES
    ),
    *(
        Case((7, 40, 20, 129, 90), 256, 768, fmt, group, dtype, why="a block has several scales")
        for fmt in QUANTIZED
        for group in (64, 32)
        for dtype in DTYPES
    ),
    *(Case((7, 40, 20, 129, 90), 128, 512, fmt, 256, why="two blocks share a scale") for fmt in QUANTIZED),
    *(Case((7, 40, 20, 129, 90), 128, 384, fmt, None, why="one scale a row") for fmt in QUANTIZED),
    Case((70, 0, 16, 5, 130, 33, 300), 128, 128, "int4_sym", 128, why="fewer blocks than slots"),
    Case((70, 0, 16, 5, 130, 33, 300), 128, 128, "int8_sym", 128, why="fewer blocks than slots"),
    Case(
        (7, 40, 90, 20, 129, 250) * 6, 1536, 384, "int4_sym", 128, negative_scales=True, why="units follow each other"
    ),
    Case((0, 0, 0), 128, 256, "int4_sym", 128, why="no units"),
    *(Case((70, 0, 16, 5, 130, 33, 300), 384, 1536, fmt, None, dtype, why="all classes") for fmt, dtype in DENSE),
    *(Case((7, 40, 20, 129), 272, 80, fmt, None, dtype, why="parts of blocks") for fmt, dtype in DENSE),
    Case((7, 40, 0, 20, 129, 250) * 6, 1536, 384, "bf16", None, why="units follow each other"),
    Case((7, 40, 0, 20, 129, 250) * 6, 1536, 64, "bf16", None, why="units of one block"),
    Case((0, 0, 0), 256, 256, "bf16", None, why="no units"),
]


def kernel(fmt: str) -> ModuleType:
    from qexperts.kernels import hopper_dense, hopper_prefill

    return hopper_prefill if FORMATS[fmt].quantized else hopper_dense


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_and_bits_of_the_triton_kernel(case: Case) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    from qexperts.kernels import schedule
    from qexperts.kernels.operand import operand

    i = make_inputs(case, device, seed=7)
    weight = prepare(i.weight, keep_source=True)
    rows, processors = i.x.shape[0], torch.cuda.get_device_properties(device).multi_processor_count
    if not rows:  # a descriptor needs a row; its counts claim none
        i = make_inputs(dataclasses.replace(case, rows=(1, 0, 0)), device)
        counts = torch.zeros_like(i.counts)
    else:
        counts = i.counts
    y = nan_filled(i.x.shape[0], case.N, dtype=i.x.dtype, device=device)
    expected = y.clone()
    tiles = torch.empty(schedule.size(i.x.shape[0], case.E), dtype=torch.int32, device=device)
    run_into(Problem.of("test", i.x, weight, phase="prefill"), expected, i.x, weight, counts)
    for _ in range(3):
        y.fill_(float("nan"))
        schedule.launch(tiles, y, counts, split=False)
        kernel(case.format).launch(y, i.x, operand(weight), tiles, case.E, processors)
        assert torch.equal(y, expected)
    if rows:
        assert_no_worse(y, i.oracle, i.peer, case.K)


@pytest.mark.parametrize("rows", [(128, 64), (128, 16), (128,), (96, 65), (300, 100, 40, 20, 5, 81)], ids=str)
@pytest.mark.parametrize(("fmt", "dtype", "group"), FULL, ids=str)
def test_bits_where_the_machine_is_full(fmt: str, dtype: torch.dtype, group: int, rows: tuple[int, ...]) -> None:
    """Consumers that fall behind their producer: a slot that is freed too early shows only here."""
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    from qexperts.kernels import schedule
    from qexperts.kernels.operand import operand

    experts, n, k = 128, 1536, 1536
    counts = torch.tensor((rows * experts)[:experts], dtype=torch.int32, device=device)
    total = int(counts.sum())
    generator = torch.Generator(device).manual_seed(5)
    w = torch.randn(experts, n, k, dtype=dtype, device=device, generator=generator)
    x = torch.randn(total, k, dtype=dtype, device=device, generator=generator)
    weight = prepare(quantize(w, fmt, group_size=group))
    expected = nan_filled(total, n, dtype=x.dtype, device=device)
    run_into(Problem.of("test", x, weight, phase="prefill"), expected, x, weight, counts)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = torch.empty(schedule.size(total, experts), dtype=torch.int32, device=device)
    for _ in range(10):
        y = nan_filled(total, n, dtype=x.dtype, device=device)
        schedule.launch(tiles, y, counts, split=False)
        kernel(fmt).launch(y, x, operand(weight), tiles, experts, processors)
        assert torch.equal(y, expected)
