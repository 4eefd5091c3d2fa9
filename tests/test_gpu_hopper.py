"""The Gluon prefills on sm_90, by themselves."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType

import pytest
import torch

from qexperts import FORMATS, QuantWeight, dequantize, prepare, quantize
from qexperts.backends import Problem
from qexperts.backends.triton_backend import run_into
from qexperts.testing import Case, assert_no_worse, make_inputs, nan_filled

pytestmark = pytest.mark.gpu

QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
DTYPES = (torch.bfloat16, torch.float16)
DENSE = [("bf16", torch.bfloat16), ("fp16", torch.float16)]
# each format with scales of other dtypes, of groups that take turns: format, activations, scales, group
MIXED = [
    (fmt, dtype, scale, (128, 16, 64, 32)[(i + j) % 4])
    for i, fmt in enumerate(QUANTIZED)
    for j, (dtype, scale) in enumerate(
        [
            (torch.bfloat16, torch.float16),
            (torch.bfloat16, torch.float32),
            (torch.float16, (torch.bfloat16, torch.float32)[i // 2 % 2]),
        ]
    )
]
FULL = [
    *((fmt, dtype, dtype, 128) for fmt in QUANTIZED for dtype in DTYPES),
    *((fmt, torch.bfloat16, torch.bfloat16, group) for fmt in QUANTIZED for group in (64, 32, 16)),
    *(("int4_asym", torch.bfloat16, scale, group) for scale in (torch.float16, torch.float32) for group in (128, 16)),
    *((fmt, dtype, dtype, 128) for fmt, dtype in DENSE),
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
    *(
        Case((7, 40, 20, 129, 90), 256, 768, fmt, 16, dtype, why="each step of a block has a scale")
        for fmt, dtype in zip(QUANTIZED, itertools.cycle(DTYPES), strict=False)
    ),
    *(
        Case((70, 5, 20, 129, 90), 256, 768, fmt, group, dtype, True, scale, why="scales of another dtype")
        for fmt, dtype, scale, group in MIXED
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
@pytest.mark.parametrize(("fmt", "dtype", "scale", "group"), FULL, ids=str)
def test_bits_where_the_machine_is_full(
    fmt: str, dtype: torch.dtype, scale: torch.dtype, group: int, rows: tuple[int, ...]
) -> None:
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
    weight = prepare(quantize(w, fmt, group_size=group, scale_dtype=scale))
    expected = nan_filled(total, n, dtype=x.dtype, device=device)
    run_into(Problem.of("test", x, weight, phase="prefill"), expected, x, weight, counts)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = torch.empty(schedule.size(total, experts), dtype=torch.int32, device=device)
    for _ in range(10):
        y = nan_filled(total, n, dtype=x.dtype, device=device)
        schedule.launch(tiles, y, counts, split=False)
        kernel(fmt).launch(y, x, operand(weight), tiles, experts, processors)
        assert torch.equal(y, expected)


@pytest.mark.parametrize(("fmt", "dtype", "scale", "group"), MIXED, ids=str)
def test_every_code_times_scales_of_another_dtype(fmt: str, dtype: torch.dtype, scale: torch.dtype, group: int) -> None:
    """K = 512 holds every byte twice; scales are of any size, subnormal in fp16 too, that leaves products finite."""
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    from qexperts.kernels import hopper_prefill, schedule
    from qexperts.kernels.operand import operand

    f, n, k = FORMATS[fmt], 128, 512
    codes = torch.arange(256, dtype=torch.uint8).repeat(n * k // f.codes_per_byte // 256).view(1, n, -1)
    if f.kind == "fp8":
        codes = torch.where(torch.isfinite(codes.view(f.storage).float()), codes, 0).view(f.storage)
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-24, 0 if fmt == "fp8_e5m2" else 6, (1, n, k // group), generator=generator)
    scales = (torch.randn(exponents.shape, generator=generator).clamp(-1, 1) * 2.0**exponents).to(scale)
    zeros = torch.randint(0, 2**f.bits + 1, scales.shape, generator=generator).to(scale) if f.asym else None
    weight = QuantWeight(codes, scales, zeros, f, group).to(device)
    expected = dequantize(weight, dtype)[0]
    assert expected.isfinite().all()
    x = torch.eye(k, device=device, dtype=dtype)  # y = w.T: each weight by itself
    prepared, counts = prepare(weight, keep_source=True), torch.tensor([k], dtype=torch.int32, device=device)
    y = nan_filled(k, n, dtype=dtype, device=device)
    tiles = torch.empty(schedule.size(k, 1), dtype=torch.int32, device=device)
    schedule.launch(tiles, y, counts, split=False)
    hopper_prefill.launch(y, x, operand(prepared), tiles, 1, 1)
    assert torch.equal(y.T, expected)
    y.fill_(float("nan"))
    run_into(Problem.of("test", x, prepared, phase="prefill"), y, x, prepared, counts)
    assert torch.equal(y.T, expected)
