"""The schedule, the permutation and the dequantization, each against its plain torch twin, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launching import DTYPES, QUANTIZED, framed, guards_hold, unwritten

from qexperts import FORMATS, QuantWeight, TokenPlan, dequantize, tile_schedule
from qexperts.kernels import permute, schedule
from qexperts.kernels.dequant import code_bits, dequant_words, slot_to_k
from qexperts.kernels.operand import tl_dtype
from qexperts.layouts import to_tiles
from qexperts.plan import max_tiles

# ---- schedule

counts_lists = st.lists(
    st.one_of(st.just(0), st.integers(-2, 20), st.integers(-300, 600), st.sampled_from([2**31 - 1, -(2**31)])),
    min_size=1,
    max_size=9,
)


def scheduled(
    counts: list[int],
    total: int,
    dtype: torch.dtype = torch.int32,
    limit: int = 0,
    condition: int = 0,
    split: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel writes into its buffer, and into a result [S, 16] that was NaN."""
    buffer = framed(torch.full((schedule.size(total, len(counts)),), -7, dtype=torch.int32))
    y = unwritten(total, 16, dtype=torch.bfloat16)
    schedule.launch(buffer, y, torch.tensor(counts, dtype=dtype), limit, condition, split)
    assert guards_hold(buffer) and guards_hold(y)
    return buffer, y


def check_schedule(counts: list[int], total: int, dtype: torch.dtype = torch.int32) -> None:
    buffer, y = scheduled(counts, total, dtype)
    plan = TokenPlan(torch.tensor(counts, dtype=dtype), total)
    expected = tile_schedule(plan)
    n = len(expected.tile_expert)
    head, offsets, experts, row, rows = buffer.split([4, len(counts) + 1, n, n, n])
    assert head.tolist() == [int((expected.tile_expert >= 0).sum()), 0, 0, 0], "the tiles, and three counters"
    assert torch.equal(offsets, plan.expert_offsets)
    assert torch.equal(experts, expected.tile_expert)
    assert torch.equal(row, expected.tile_row)
    assert torch.equal(rows, expected.tile_rows)
    end = int(plan.expert_offsets[-1])
    assert not y[end:].count_nonzero() and y[:end].isnan().all(), "zeroed past the sum and nowhere else"


@settings(max_examples=15)
@given(counts=counts_lists, total=st.integers(0, 260), dtype=st.sampled_from([torch.int32, torch.int64]))
@example(counts=[0], total=0, dtype=torch.int32)
@example(counts=[1] * 9, total=9, dtype=torch.int32)
@example(counts=[-5, 3, 2**31 - 1, 2**31 - 1], total=130, dtype=torch.int32)
def test_schedule_of_any_counts(counts: list[int], total: int, dtype: torch.dtype) -> None:
    check_schedule(counts, total, dtype)


@settings(max_examples=15)
@given(counts=st.lists(st.one_of(st.just(0), st.integers(0, 300)), min_size=1, max_size=9))
@example(counts=list(range(0, 130, 16)))
@example(counts=[17, 33, 49, 65, 81, 97, 113, 129])
def test_schedule_of_counts_that_add_up(counts: list[int]) -> None:
    check_schedule(counts, sum(counts))


@pytest.mark.parametrize(
    ("counts", "total"),
    [([128 * 130 + 5], 128 * 130 + 5), ([0] * 63 + [3], 3), ([2] * 65, 140), ([1, 96] * 18, 1800)],
    ids=["more-than-128-tiles-of-one-expert", "64-experts", "65-experts", "more-padding-than-tiles"],
)
def test_schedule_of_many(counts: list[int], total: int) -> None:
    check_schedule(counts, total)


@pytest.mark.parametrize(("counts", "limit"), [([4, 2], 4), ([5, 1], 4), ([0, 0], 0), ([0, 1], 0), ([99, 0], 8)])
def test_condition_of_a_schedule(counts: list[int], limit: int) -> None:
    """No tiles, and no row zeroed, unless some expert has more than limit rows: of those there are, 8."""
    buffer, y = scheduled(counts, 8, limit=limit, condition=2)
    used = [min(counts[0], 8), min(counts[1], 8 - min(counts[0], 8))]
    if max(used) > limit:
        assert buffer[0] == int((tile_schedule(TokenPlan(torch.tensor(counts), 8)).tile_expert >= 0).sum())
        assert not y[sum(used) :].count_nonzero()
    else:
        assert buffer[0] == 0
        assert y.isnan().all()


def test_tiles_that_are_not_split() -> None:
    """What remains of an expert is one tile; a class of 128 rows from 65 on."""
    counts = [*range(16, 300, 16), 0, 97, 65]
    total = sum(counts)
    buffer, _ = scheduled(counts, total, split=False)
    n = int(buffer[0])
    _, offsets, experts, row, rows = buffer.split([4, len(counts) + 1] + [max_tiles(total, len(counts))] * 3)
    expected = [
        (e, int(offsets[e]) + first, min(128, count - first))
        for e, count in sorted(enumerate(counts), key=lambda i: -i[1])
        for first in range(0, count, 128)
    ]
    assert list(zip(experts[:n].tolist(), row[:n].tolist(), rows[:n].tolist(), strict=True)) == expected


def test_size_of_a_schedule() -> None:
    for total, experts in ((0, 1), (1, 1), (500, 7), (3, 300)):
        assert schedule.size(total, experts) == 4 + experts + 1 + 3 * max_tiles(total, experts)


# ---- permute


@triton.jit
def slots_kernel(k_ptr, BITS: tl.constexpr):
    slot = tl.arange(0, 256)
    tl.store(k_ptr + slot, slot_to_k(slot, BITS))


def slots(bits: int) -> torch.Tensor:
    k = torch.full((256,), -1, dtype=torch.int32)
    slots_kernel[(1,)](k, BITS=bits)
    return k.long()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_slots_permute_each_block_of_64(bits: int) -> None:
    blocks = slots(bits).view(4, 64)
    assert torch.equal(blocks.sort(1).values, torch.arange(256).view(4, 64))
    assert torch.equal(blocks, blocks[0] + 64 * torch.arange(4)[:, None])


@pytest.mark.parametrize(("rows", "k"), [(1, 16), (9, 64), (8, 80), (3, 272)], ids=str)
@pytest.mark.parametrize("fmt", ["int8_asym", "fp8_e4m3", "int4_sym", "int2_sym"])
def test_permute(fmt: str, rows: int, k: int) -> None:
    """x gathered by slot_to_k, zeros past K."""
    dtype = torch.float16 if rows == 8 else torch.bfloat16
    wide = torch.full((rows, k + 24), float("nan"), dtype=dtype)
    x = wide[:, :k]
    x.copy_(torch.randn(rows, k, generator=torch.Generator().manual_seed(3)))
    padded = -(-k // 64) * 64
    y = unwritten(rows, padded, dtype=dtype)
    permute.launch(y, x, fmt)
    blocks = torch.nn.functional.pad(x, (0, padded - k)).view(rows, -1, 64)
    assert torch.equal(y, blocks[:, :, slots(FORMATS[fmt].bits)[:64]].reshape(rows, padded))
    assert guards_hold(y)


# ---- dequantize


@triton.jit
def dequant_kernel(out_ptr, w_ptr, s_ptr, z_ptr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """One block: words [16, 1, 4, J] in tile order; scales and zeros [16, 4], one for each step of 16 k."""
    J: tl.constexpr = code_bits(FORMAT) // 2
    offs_n = tl.arange(0, 16)[:, None]
    w = tl.reshape(tl.load(w_ptr + offs_n * (4 * J) + tl.arange(0, 4 * J)[None, :]), (16, 1, 4, J))
    steps = offs_n[:, :, None, None] * 4 + (4 // J) * tl.arange(0, J)[None, None, None, :]
    s0, z0 = tl.load(s_ptr + steps), tl.load(z_ptr + steps)
    s1, s2, s3, z1, z2, z3 = s0, s0, s0, z0, z0, z0
    if J <= 2:
        s1, z1 = tl.load(s_ptr + steps + 1), tl.load(z_ptr + steps + 1)
    if J == 1:
        s2, z2 = tl.load(s_ptr + steps + 2), tl.load(z_ptr + steps + 2)
        s3, z3 = tl.load(s_ptr + steps + 3), tl.load(z_ptr + steps + 3)
    a = dequant_words(w, s0, s1, s2, s3, z0, z1, z2, z3, FORMAT, DTYPE, "interpreter", WIDE)
    tl.store(out_ptr + offs_n * 64 + tl.arange(0, 64)[None, :], a)


def every_code(fmt: str) -> torch.Tensor:
    """Codes [16, 64 / codes_per_byte] that hold every byte; the NaN of fp8 (not preserved) is replaced by 0."""
    record = FORMATS[fmt]
    size = 16 * 64 // record.codes_per_byte
    codes = (torch.arange(size) % 256).to(torch.uint8)[torch.randperm(size, generator=torch.Generator().manual_seed(4))]
    if record.kind == "fp8":
        values = codes.view(record.storage)
        codes = torch.where(values.float().isfinite(), codes, 0)
    return codes.view(16, -1).view(record.storage)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_dequantization(fmt: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """Every code, scales of either sign: the bits of `qexperts.dequantize`."""
    generator = torch.Generator().manual_seed(5)
    record = FORMATS[fmt]
    scales = torch.randn(1, 16, 4, generator=generator).to(scale_dtype)
    zeros = torch.randint(0, 2**record.bits + 1, (1, 16, 4), generator=generator).to(torch.float32)
    codes = every_code(fmt)
    held = zeros.to(scale_dtype)  # up to 256: exact in bf16 too
    weight = QuantWeight(codes[None].clone(), scales, held if record.asym else None, fmt, 16)
    out = unwritten(16, 64, dtype=dtype)
    words = to_tiles(codes, record).view(torch.uint8).view(torch.int32)
    wide = scale_dtype != dtype
    dequant_kernel[(1,)](out, words, scales.float(), zeros, FORMAT=fmt, DTYPE=tl_dtype(dtype), WIDE=wide)
    expected = dequantize(weight, dtype)[0]
    assert guards_hold(out)
    same = out.view(torch.int16) == expected.view(torch.int16)
    assert same.all(), f"{out[~same][:8].tolist()}, expected {expected[~same][:8].tolist()}"
