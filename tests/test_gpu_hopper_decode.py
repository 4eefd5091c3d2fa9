"""The Gluon decode on sm_90, by itself: no backend launches it yet."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qexperts import FORMATS, prepare
from qexperts.testing import Case, Inputs, assert_no_worse, make_inputs, nan_filled

pytestmark = pytest.mark.gpu

ROWS = (1, 0, 3, 8, 9, 1, 0, 2)
QUANTIZED = [name for name, fmt in FORMATS.items() if fmt.quantized]
SHAPES = [
    (272, 1536, 128, "panels that programs share unevenly"),
    (48, 3072, 128, "eight parts"),
    (48, 1408, 128, "parts that are not full"),
    (48, 256, 32, "several groups a tile"),
    (48, 1024, 256, "several tiles a group"),
    (48, 192, None, "tiles of 64 k, one group a row"),
    (48, 320, 16, "a group for each step"),
]
CASES = [
    Case(ROWS, n, k, name, group, dtype=dtype, negative_scales=True, why=why)
    for name in QUANTIZED
    for dtype in (torch.bfloat16, torch.float16)
    for n, k, group, why in SHAPES
]
PAST_THE_SUM = 5  # rows


@pytest.fixture
def device() -> torch.device:
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    return torch.device("cuda", torch.cuda.current_device())


def check(i: Inputs, case: Case, **changes: int) -> None:
    """No worse than the peer, the same every time, zero past the sum of the counts."""
    from qexperts.kernels import config, hopper_decode
    from qexperts.kernels.operand import operand

    w = operand(prepare(i.weight, keep_source=True))
    assert hopper_decode.unfit(w) is None
    rows = i.x.shape[0]
    x = torch.cat([i.x, i.x[:1].expand(PAST_THE_SUM, -1)])
    c = config.hopper_decode_config(
        w, case.E + rows // 8, torch.cuda.get_device_properties(i.x.device).multi_processor_count
    )
    c = dataclasses.replace(c, **changes)
    y = nan_filled(rows + PAST_THE_SUM, case.N, dtype=x.dtype, device=x.device)
    first = None
    for counts in (i.counts, i.counts.long(), i.counts):
        y.fill_(float("nan"))
        hopper_decode.launch(y, x, w, counts, c)
        first = y.clone() if first is None else first
        assert torch.equal(y, first)
    assert not y[rows:].any()
    assert_no_worse(y[:rows], i.oracle, i.peer, case.K)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case: Case, device: torch.device) -> None:
    check(make_inputs(case, device, seed=3), case)


@pytest.mark.parametrize("name", QUANTIZED)
def test_one_activation_a_thousand_times_the_others(name: str, device: torch.device) -> None:
    """What zero points add to the sums and take away again may not cost more than the peer's rounding."""
    case = Case(ROWS, 272, 1536, name, 128)
    i = make_inputs(case, device, seed=3)
    x = i.x.clone()
    x[:, 77] *= 1000
    check(Inputs.of(x, i.weight, case.rows), case)


@pytest.mark.parametrize(
    "changes",
    [
        {"resident": 3, "programs": 3},
        {"resident": 2, "programs": 6, "tail": 3},
        {"resident": 500, "programs": 500},
    ],
    ids=str,
)
def test_sizes(changes: dict[str, int], device: torch.device) -> None:
    case = Case(ROWS, 272, 1536, "int4_sym", 128)
    check(make_inputs(case, device, seed=3), case, **changes)


def test_counts_that_do_not_add_up_and_a_limit(device: torch.device) -> None:
    """Negative counts count as 0, rows past S do not count; with a condition, all or nothing."""
    from qexperts.kernels import config, hopper_decode
    from qexperts.kernels.operand import operand

    case = Case((2, 3, 4), 64, 256, "int4_sym", 128)
    i = make_inputs(case, device, seed=3)
    w = operand(prepare(i.weight, keep_source=True))
    c = config.hopper_decode_config(w, 9, 4)

    def run(counts: list[int], **options: int) -> torch.Tensor:
        y = nan_filled(9, 64, dtype=torch.bfloat16, device=device)
        hopper_decode.launch(y, i.x, w, torch.tensor(counts, dtype=torch.int32, device=device), c, **options)
        return y

    right = run([2, 3, 4])
    assert torch.equal(run([2, 3, 2**31 - 1]), right)
    assert torch.equal(run([2, 3, 4], condition=1, limit=4), right)
    assert run([2, 3, 4], condition=1, limit=3).isnan().all()
    cut = run([2, -7, 0])
    assert torch.equal(cut[:2], right[:2]) and not cut[2:].any()
