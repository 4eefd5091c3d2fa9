"""Scratch memory: reused between calls, grown to the largest need, released on demand, never shared."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from qexperts import clear_moe_prefill_workspace_cache, grouped_gemm
from qexperts.testing import Case, assert_no_worse, make_inputs
from qexperts.workspace import Arena, arena, clear_workspaces, is_capturing, workspace_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    clear_workspaces()
    yield
    clear_workspaces()


def span(t: torch.Tensor) -> range:
    return range(t.data_ptr(), t.data_ptr() + max(t.nbytes, 1))


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    return span(a).start < span(b).stop and span(b).start < span(a).stop


def use(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    a = arena(CPU)
    return [a.take(shape, dtype) for shape in shapes]


def test_tensors_of_one_call_do_not_overlap() -> None:
    for _ in range(3):  # not kept yet, then from the kept buffer
        a = arena(CPU)
        made = [a.take((3, 5), torch.bfloat16), a.take((7,), torch.uint8), a.take((0, 4), torch.float32)]
        made += [a.take((2, 2, 2), torch.float32), a.take((9,), torch.int64), a.take((5,), torch.float8_e4m3fn)]
        shapes = [(3, 5), (7,), (0, 4), (2, 2, 2), (9,), (5,)]
        assert [tuple(t.shape) for t in made] == shapes and all(t.is_contiguous() for t in made)
        for i, t in enumerate(made):
            assert t.data_ptr() % t.element_size() == 0
            assert not any(overlap(t, u) for u in made[i + 1 :] if t.numel() and u.numel())
        for i, t in enumerate(made):
            t.view(torch.uint8).fill_(i)
        assert all((t.view(torch.uint8) == i).all() for i, t in enumerate(made))


def test_a_second_call_reuses_the_memory() -> None:
    use((64, 64), (32,))
    second = use((64, 64), (32,))
    size = workspace_bytes()
    third = use((64, 64), (32,))
    assert [t.data_ptr() for t in second] == [t.data_ptr() for t in third]
    assert workspace_bytes() == size >= 64 * 64 * 2 + 64


def test_it_grows_to_the_largest_need_and_stays() -> None:
    sizes = []
    for n in (64, 4096, 64, 64):
        use((n,), dtype=torch.uint8)
        use((n,), dtype=torch.uint8)
        sizes.append(workspace_bytes())
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]
    assert sizes[1] < 4096 * 2


def test_clear_releases() -> None:
    for clear in (clear_workspaces, clear_moe_prefill_workspace_cache):
        use((64, 64))
        use((64, 64))
        assert workspace_bytes() > 0
        clear()
        assert workspace_bytes() == 0


def test_public_calls_keep_their_scratch_memory_stable() -> None:
    inputs = make_inputs(Case((3, 0, 9), N=64, K=128, format="int4_sym"))
    sizes = []
    for _ in range(4):
        assert_no_worse(grouped_gemm(inputs.x, inputs.weight, inputs.plan), inputs.oracle, inputs.peer)
        sizes.append(workspace_bytes())
    assert sizes[1] == sizes[2] == sizes[3] > 0
    clear_moe_prefill_workspace_cache()
    assert workspace_bytes() == 0
    assert_no_worse(grouped_gemm(inputs.x, inputs.weight, inputs.plan), inputs.oracle, inputs.peer)


def test_results_do_not_live_in_scratch_memory() -> None:
    a, b = (make_inputs(Case((4, 4), N=32, K=64, format="int8_sym", group_size=64), seed=s) for s in (0, 1))
    for _ in range(3):
        first = grouped_gemm(a.x, a.weight, a.plan)
        kept = first.clone()
        grouped_gemm(b.x, b.weight, b.plan)
        assert torch.equal(first, kept), "a later call overwrote an earlier result"


def test_threads_never_share() -> None:
    """Both hold an arena at the same time."""
    barrier = threading.Barrier(4)
    taken: list[list[torch.Tensor]] = []

    def work() -> None:
        use((256,))
        barrier.wait(timeout=30)
        tensors = use((256,))
        barrier.wait(timeout=30)
        taken.append(tensors)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert len(taken) == 4, "a thread did not finish"
    tensors = [t for ts in taken for t in ts]
    assert not any(overlap(t, u) for i, t in enumerate(tensors) for u in tensors[i + 1 :])


def test_concurrent_calls_give_right_results() -> None:
    cases = [make_inputs(Case((5, 0, 7), N=64, K=128, format="int4_asym", group_size=32), seed=s) for s in range(4)]
    failures: list[str] = []

    def work(i: int) -> None:
        inputs = cases[i]
        try:
            for _ in range(20):
                assert_no_worse(grouped_gemm(inputs.x, inputs.weight, inputs.plan), inputs.oracle, inputs.peer)
        except BaseException as error:
            failures.append(f"thread {i}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not failures, failures


def test_an_arena_over_a_callers_buffer() -> None:
    buffer = torch.zeros(4096, dtype=torch.uint8)
    a = Arena.over(buffer)
    t = a.take((16, 8), torch.float32)
    t.fill_(1.0)
    assert span(buffer).start <= span(t).start and span(t).stop <= span(buffer).stop
    assert a.take((4096,), torch.float32).shape == (4096,), "what does not fit is allocated on its own"
    assert workspace_bytes() == 0


def test_a_cpu_never_captures() -> None:
    assert not is_capturing(CPU)


def test_a_failed_allocation_costs_nothing_later() -> None:
    clear_workspaces()
    with pytest.raises(RuntimeError):
        arena(torch.device("cpu")).take((2**60,), torch.uint8)  # more than there are addresses
    for _ in range(2):
        assert arena(torch.device("cpu")).take((64,), torch.float32).shape == (64,)
    assert workspace_bytes() == 256


def test_a_buffer_that_cannot_grow_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_workspaces()
    arena(torch.device("cpu")).take((1024,), torch.uint8)
    real = torch.empty

    def tight(*shape: object, **options: object) -> torch.Tensor:
        if shape == (1024,):
            raise RuntimeError("no room")
        return real(*shape, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", tight)
    assert arena(torch.device("cpu")).take((16,), torch.uint8).shape == (16,)
