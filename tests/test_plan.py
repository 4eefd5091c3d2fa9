"""Plans: permutations invert, offsets are monotone and bounded, tiles cover every row once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qexperts import TokenPlan, check_tokens, tile_schedule
from qexperts.plan import TILE_CLASSES, max_tiles

INDEX = [torch.int32, torch.int64]
counts_lists = st.lists(st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 300)), min_size=1, max_size=40)


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """(E, expert ids [T, top_k]), with sentinels: -1, E, and far outside."""
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, 4))
    outside = st.sampled_from([-1, experts, experts + 1, 2**31 - 1, -(2**31)])
    one = st.one_of(st.integers(0, experts - 1), st.integers(0, experts - 1), outside)
    return experts, draw(st.lists(st.lists(one, min_size=top_k, max_size=top_k), max_size=24))


def ids_tensor(ids: list[list[int]], dtype: torch.dtype, top_k: int = 1) -> torch.Tensor:
    return torch.tensor(ids, dtype=dtype) if ids else torch.empty(0, top_k, dtype=dtype)


def plan_of(counts: list[int], dtype: torch.dtype = torch.int32) -> TokenPlan:
    return TokenPlan.from_counts(torch.tensor(counts, dtype=dtype), sum(counts))


# ---- counts


@given(counts=counts_lists, dtype=st.sampled_from(INDEX))
def test_offsets_of_counts(counts: list[int], dtype: torch.dtype) -> None:
    plan = plan_of(counts, dtype)
    offsets = plan.expert_offsets.tolist()
    assert plan.total_tokens == sum(counts) and plan.num_experts == len(counts)
    assert plan.num_tokens_per_expert.tolist() == counts == plan.host_counts()
    assert offsets == [sum(counts[:e]) for e in range(len(counts) + 1)]
    assert plan.num_tokens_per_expert.dtype == plan.expert_offsets.dtype == torch.int32
    assert plan.row_expert().tolist() == [e for e, n in enumerate(counts) for _ in range(n)]
    assert plan.row_expert().dtype == torch.int64


@pytest.mark.parametrize("dtype", INDEX, ids=str)
@pytest.mark.parametrize(
    ("counts", "total", "given"),
    [
        ([3, -1, 2], 4, "-1"),
        ([-4, 4], 0, "-4"),
        ([3, 1], 5, "4"),
        ([3, 1], 3, "4"),
        ([0, 0], 1, "0"),
        ([1], 0, "1"),
    ],
    ids=str,
)
def test_counts_that_do_not_add_up_raise_on_the_cpu(
    counts: list[int], total: int, given: str, dtype: torch.dtype
) -> None:
    tensor = torch.tensor(counts, dtype=dtype)
    for call in (lambda: TokenPlan.from_counts(tensor, total), lambda: check_tokens(tensor, total)):
        with pytest.raises(ValueError, match=given) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    assert str(total) in str(caught.value) or given.startswith("-")


def test_counts_beyond_int32_do_not_wrap() -> None:
    tensor = torch.tensor([2**32 + 3, 1])
    for total in (4, 2**32 + 3):
        with pytest.raises(ValueError):
            TokenPlan.from_counts(tensor, total)
        with pytest.raises(ValueError):
            check_tokens(tensor, total)


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_check_tokens_accepts_what_adds_up(dtype: torch.dtype) -> None:
    check_tokens(torch.tensor([3, 0, 2], dtype=dtype), 5)
    check_tokens(torch.tensor([0], dtype=dtype), 0)


@pytest.mark.parametrize(
    "counts",
    [torch.tensor([[1, 2]]), torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor(3)],
    ids=["rank 2", "float", "bool", "rank 0"],
)
def test_counts_of_the_wrong_kind_raise(counts: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        TokenPlan.from_counts(counts, 3)
    with pytest.raises(ValueError):
        check_tokens(counts, 3)


def test_negative_total_raises() -> None:
    with pytest.raises(ValueError, match="-1"):
        TokenPlan.from_counts(torch.tensor([0, 0], device="meta"), -1)


# ---- expert ids


@given(routing=routings(), dtype=st.sampled_from(INDEX))
@example(routing=(1, []), dtype=torch.int32)
@example(routing=(3, [[-1, 3]]), dtype=torch.int64)
def test_permutations(routing: tuple[int, list[list[int]]], dtype: torch.dtype) -> None:
    experts, ids = routing
    flat = [e for token in ids for e in token]
    top_k = len(ids[0]) if ids else 2
    plan = TokenPlan.from_expert_ids(ids_tensor(ids, dtype, top_k), experts)
    assert plan.row_to_slot is not None and plan.slot_to_row is not None and plan.row_to_token is not None
    row_to_slot, slot_to_row = plan.row_to_slot.tolist(), plan.slot_to_row.tolist()
    assert plan.total_tokens == len(flat)
    for t in (plan.row_to_slot, plan.slot_to_row, plan.row_to_token, plan.expert_offsets, plan.num_tokens_per_expert):
        assert t.dtype == torch.int32

    assert [slot_to_row[s] for s in row_to_slot] == list(range(len(flat)))
    assert [row_to_slot[r] for r in slot_to_row] == list(range(len(flat)))
    assert plan.row_to_token.tolist() == [s // top_k for s in row_to_slot]

    # Sorted by expert, slots of one expert in their order, sentinels last.
    local = [e if 0 <= e < experts else experts for e in flat]
    expected = sorted(range(len(flat)), key=lambda s: local[s])
    inside = sum(e < experts for e in local)
    assert row_to_slot[:inside] == expected[:inside]
    assert sorted(row_to_slot[inside:]) == sorted(expected[inside:])
    counts = [local.count(e) for e in range(experts)]
    assert plan.num_tokens_per_expert.tolist() == counts
    assert plan.expert_offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
    assert plan.row_expert().tolist() == sorted(local)


@given(routing=routings())
def test_gathering_then_scattering_restores_the_slots(routing: tuple[int, list[list[int]]]) -> None:
    experts, ids = routing
    plan = TokenPlan.from_expert_ids(ids_tensor(ids, torch.int32), experts)
    slots = torch.arange(plan.total_tokens) * 10
    assert plan.row_to_slot is not None and plan.slot_to_row is not None
    assert torch.equal(slots[plan.row_to_slot][plan.slot_to_row], slots)


@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        (torch.zeros(4, dtype=torch.int32), 2),
        (torch.zeros(2, 2, 2, dtype=torch.int32), 2),
        (torch.zeros(2, 2), 2),
        (torch.zeros(2, 2, dtype=torch.int32), 0),
    ],
    ids=["rank 1", "rank 3", "float", "no experts"],
)
def test_expert_ids_of_the_wrong_kind_raise(ids: torch.Tensor, experts: int) -> None:
    with pytest.raises(ValueError):
        TokenPlan.from_expert_ids(ids, experts)


# ---- tiles


def cheapest(rows: int) -> tuple[int, ...]:
    """Classes that cover at most 128 rows: a tile costs its class, at least 32; then few tiles, then little padding."""
    covers = [(c,) for c in TILE_CLASSES] + list(itertools.combinations_with_replacement(TILE_CLASSES, 2))
    fitting = [cover for cover in covers if sum(cover) >= rows]
    return min(fitting, key=lambda cover: (sum(max(c, 32) for c in cover), len(cover), sum(cover)))


def tile_class(rows: int) -> int:
    return min(c for c in TILE_CLASSES if c >= rows)


def check_tiles(plan: TokenPlan) -> None:
    schedule = tile_schedule(plan)
    columns = (schedule.tile_expert, schedule.tile_row, schedule.tile_rows)
    length = max_tiles(plan.total_tokens, plan.num_experts)
    assert all(t.dtype == torch.int32 and t.shape == (length,) for t in columns)
    tiles = list(zip(*(t.tolist() for t in columns), strict=True))
    real = [tile for tile in tiles if tile[0] >= 0]
    assert all(tile == (-1, -1, -1) for tile in tiles[len(real) :]), "padding must come last and be -1 everywhere"
    offsets, counts = plan.expert_offsets.tolist(), plan.host_counts()
    covered, classes = [], [[] for _ in counts]
    for expert, row, rows in real:
        assert 0 <= expert < plan.num_experts
        assert 1 <= rows <= 128, f"tile of {rows} rows"
        assert offsets[expert] <= row and row + rows <= offsets[expert + 1], f"tile at {row} leaves expert {expert}"
        covered += range(row, row + rows)
        classes[expert].append(tile_class(rows))
    assert sorted(covered) == list(range(offsets[-1])), "every row of an expert once, no other"
    order = [(-counts[expert], expert, row) for expert, row, _ in real]
    assert order == sorted(order), "the expert with the most rows first, in it by row"
    for count, found in zip(counts, classes, strict=True):
        left = count % 128
        assert found == [128] * (count // 128) + (list(cheapest(left)) if left else []), f"tiles for {count} rows"


@pytest.mark.parametrize("left", range(1, 129))
def test_what_remains_of_an_expert_is_covered_cheaply(left: int) -> None:
    check_tiles(plan_of([left]))
    check_tiles(plan_of([0, 256 + left, 3, left]))


@given(counts=counts_lists)
@example(counts=[0])
@example(counts=[1] * 40)
@example(counts=[17] * 8)
@example(counts=[0, 0, 33, 0])
@example(counts=[96] * 40)
def test_tiles_cover_every_row_once(counts: list[int]) -> None:
    check_tiles(plan_of(counts))


@given(routing=routings())
def test_tiles_leave_sentinels_out(routing: tuple[int, list[list[int]]]) -> None:
    experts, ids = routing
    check_tiles(TokenPlan.from_expert_ids(ids_tensor(ids, torch.int32), experts))


@given(
    counts=st.lists(st.one_of(st.integers(-300, 300), st.sampled_from([2**31 - 1, -(2**31)])), min_size=1, max_size=9),
    total=st.integers(0, 600),
    dtype=st.sampled_from(INDEX),
)
@example(counts=[3, 1], total=300, dtype=torch.int32)
@example(counts=[-1, 300, 2], total=150, dtype=torch.int64)
def test_tiles_of_counts_that_nobody_checked(counts: list[int], total: int, dtype: torch.dtype) -> None:
    """Negative counts are 0, no tile passes the rows there are, rows past the sum are in no tile."""
    plan = TokenPlan(torch.tensor(counts, dtype=dtype), total)
    used, left = [], total
    for count in counts:
        used.append(min(max(count, 0), left))
        left -= used[-1]
    assert plan.host_counts() == used
    check_tiles(plan)


@given(experts=st.integers(1, 40), total=st.integers(0, 5000))
@example(experts=40, total=40 * 65)
@example(experts=3, total=2)
def test_length_of_a_schedule_depends_on_shapes_alone(experts: int, total: int) -> None:
    """So that a captured graph holds for other counts: one hot expert, even, 1 over, and two tiles for each rest."""
    hot = [total] + [0] * (experts - 1)
    even = [total // experts + (e < total % experts) for e in range(experts)]
    lengths = set()
    for counts in (hot, even, spread(experts, total, 1), spread(experts, total, 65)):
        plan = plan_of(counts)
        check_tiles(plan)
        lengths.add(tile_schedule(plan).tile_expert.shape[0])
    assert lengths == {max_tiles(total, experts)}


def spread(experts: int, total: int, each: int) -> list[int]:
    """So many rows for each expert as long as there are any; what is left goes to the last."""
    counts = [max(min(total - e * each, each), 0) for e in range(experts)]
    counts[-1] += total - sum(counts)
    return counts


# ---- no host sync: on the meta device there is nothing to read


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_planning_reads_no_device_memory(dtype: torch.dtype) -> None:
    plan = TokenPlan.from_counts(torch.empty(5, dtype=dtype, device="meta"), 12)
    assert plan.total_tokens == 12 and plan.device.type == "meta"
    assert plan.row_expert().shape == (12,)
    assert tile_schedule(plan).tile_expert.device.type == "meta"
    routed = TokenPlan.from_expert_ids(torch.empty(6, 2, dtype=dtype, device="meta"), 5)
    assert routed.total_tokens == 12 and routed.row_to_slot is not None and routed.row_to_slot.shape == (12,)
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says of a read from meta
        plan.host_counts()
