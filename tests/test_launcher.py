"""Launching again: what goes to the driver, what goes through Triton, and what is refused; no kernel runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra 'triton' is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton import knobs

from qexperts.kernels import launcher
from qexperts.kernels.launcher import Launch, Launcher

CPU = torch.device("cpu")
STREAM = 77


class Kernel:
    """A kernel, and what it compiles to, that write down what they are asked."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.told: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.compiled.append((grid, args, options))
            return Compiled(self)

        return call


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def run(self, *args: Any) -> None:
        self._kernel.ran.append(args)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self._kernel.told.append((grid, args))


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    active = SimpleNamespace(get_current_stream=lambda index: STREAM)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=active))
    yield
    assert not knobs.runtime.launch_enter_hook.calls


def bound(of: Launcher, key: object = "key", size: int = 5) -> Launch:
    return of.bind(key, CPU, (3, 2, 1), (size,), {"FLAG": True}, 4, "this")


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    t = torch.empty(*shape, dtype=dtype)
    assert t.data_ptr() % 16 == 0
    return t


def test_the_second_launch_goes_to_the_driver_with_addresses() -> None:
    kernel, x, y = Kernel(), aligned(8), aligned(8)
    launch = bound(Launcher(kernel, "some"))
    launch(y, x)
    ((grid, args, options),) = kernel.compiled
    assert grid == (3, 2, 1) and args[0] is y and args[1] is x and args[2] == 5
    assert options == {"FLAG": True, "num_warps": 4, "enable_fp_fusion": True}
    launch(y, x)
    assert len(kernel.compiled) == 1
    assert kernel.ran == [
        (3, 2, 1, STREAM, "function", "metadata", None, None, None, y.data_ptr(), x.data_ptr(), 5, True)
    ]


def test_launches_of_a_key_share_what_is_compiled() -> None:
    kernel, x = Kernel(), aligned(8)
    of = Launcher(kernel, "some")
    first, same, other = bound(of), bound(of, size=6), bound(of, "another key")
    first(x)
    same(x)
    assert len(kernel.compiled) == 1 and kernel.ran[0][-2:] == (6, True)
    other(x)
    assert len(kernel.compiled) == 2


def test_a_tensor_that_lies_otherwise_is_compiled_for() -> None:
    """Each by itself: a kernel for one pointer off 16 bytes is not right for another one off."""
    kernel, x = Kernel(), aligned(9)
    launch = bound(Launcher(kernel, "some"))
    for tensors in ((x, x), (x[1:], x), (x, x[1:]), (x[1:], x[1:])):
        before = len(kernel.compiled)
        launch(*tensors)
        launch(*tensors)
        assert len(kernel.compiled) == before + 1
    assert len(kernel.ran) == 4


def test_on_amd_memory_of_2_gib_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_HIP", True)
    kernel, launch = Kernel(), None
    launch = bound(Launcher(kernel, "some"))
    sizes = (8, 2**31 - 1, 2**31, 2**31 + 1, 16)
    for size in sizes:
        launch(torch.empty(size, dtype=torch.uint8))
    assert len(kernel.compiled) == 2


def test_hooks_are_told_of_tensors() -> None:
    kernel, x = Kernel(), aligned(8)
    launch = bound(Launcher(kernel, "some"))
    launch(x)

    def hook(metadata: object) -> None: ...

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            launch(x)
        finally:
            chain.remove(hook)
    assert [(grid, args[0] is x, *args[1:]) for grid, args in kernel.told] == [((3, 2, 1), True, 5, True)] * 2
    assert not kernel.ran


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_passed_as_bytes(dtype: torch.dtype) -> None:
    kernel, x = Kernel(), torch.zeros(16, dtype=dtype)
    bound(Launcher(kernel, "some"))(x)
    ((_, args, _),) = kernel.compiled
    assert args[0].dtype == torch.uint8 and args[0].data_ptr() == x.data_ptr()


def test_only_a_kernel_that_is_not_compiled_is_refused_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(), aligned(9)
    launch = bound(Launcher(kernel, "some"))
    launch(x)
    monkeypatch.setattr(launcher, "is_capturing", lambda device: True)
    launch(x)
    assert len(kernel.ran) == 1
    with pytest.raises(RuntimeError, match=r"the some kernel for this is not compiled yet.*call once"):
        launch(x[1:])
    assert len(kernel.compiled) == 1
