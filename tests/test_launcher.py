"""Launching again: what goes to the driver, what goes through Triton, and what is refused; no kernel runs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
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
from triton.experimental.gluon import language as gl

from qexperts.kernels import launcher
from qexperts.kernels.launcher import Launch, Launcher, View

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


# ---- descriptors


class Described(Compiled):
    """A kernel of Triton 3.6 with descriptors: `run` is its launcher around a function around the driver's."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        ran, encoded = kernel.ran, kernel.encoded

        def launcher(*args: Any) -> None:
            ran.append(args)

        def inner(*args: Any) -> None:
            encoded.append("anew")
            launcher(*args)

        self.run = CudaLauncher(inner)
        self.metadata = SimpleNamespace(tensordesc_meta=["first", "second"])


class CudaLauncher:
    global_scratch_size = profile_scratch_size = launch_cooperative_grid = launch_pdl = 0

    def __init__(self, launch: Any) -> None:
        self.launch = launch


class DescribedKernel(Kernel):
    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.compiled.append((grid, args, options))
            return Described(self) if launcher._TRITON_3_6 else Compiled(self)

        return call


def views() -> tuple[View | int, ...]:
    layout = gl.NVMMASharedLayout(128, 16, 2)
    shapes: tuple[Any, ...] = ((8, 64), (64, 1), (8, 64), layout)
    return View(1, torch.bfloat16, *shapes), 0, View(1, torch.bfloat16, (16, 64), (32, 1), (16, 64), layout)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> DescribedKernel:
    kernel = DescribedKernel()
    monkeypatch.setattr(launcher, "_ENCODED", {})

    def encode(placed: Any, meta: str) -> list[object]:
        kernel.encoded.append((placed.base.data_ptr(), meta))
        return [f"{meta} at {placed.base.data_ptr()}", *placed.shape, *placed.strides]

    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", encode)
    return kernel


def test_descriptors_are_encoded_once_for_an_address(
    described: DescribedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_TRITON_3_6", True)
    of = Launcher(described, "some")
    y, x, other = (aligned(512, dtype=torch.bfloat16) for _ in range(3))
    launch = of.bind("key", CPU, (3, 2, 1), (5,), {"FLAG": True}, 4, "this", views(), {"maxnreg": 128})
    launch(y, x)
    ((grid, args, options),) = described.compiled
    assert (grid, args[1], args[3:]) == ((3, 2, 1), y, (5,))
    assert [(a.shape, a.base.data_ptr()) for a in (args[0], args[2])] == [
        ([8, 64], x.data_ptr()), ([16, 64], x.data_ptr()),
    ]  # fmt: skip
    assert options == {"FLAG": True, "num_warps": 4, "maxnreg": 128, "enable_fp_fusion": True}
    for given in (x, x, other, x):
        launch(y, given)
    again = of.bind("key", CPU, (3, 2, 1), (5,), {"FLAG": True}, 4, "this", views(), {"maxnreg": 128})
    again(y, x)
    assert described.encoded == [(t.data_ptr(), meta) for t in (x, other) for meta in ("first", "second")]
    a = x.data_ptr()
    head = (3, 2, 1, STREAM, "function", 0, 0, None, None, "metadata", None, None, None)
    first, second = (f"first at {a}", 8, 64, 64, 1), (f"second at {a}", 16, 64, 32, 1)
    assert described.ran[0] == described.ran[-1] == (*head, *first, y.data_ptr(), *second, 5, True)
    assert len(described.compiled) == 1


@pytest.mark.parametrize("triton_3_6", [True, False])
def test_a_kernel_compiled_for_other_sizes_gets_descriptors_of_these(
    triton_3_6: bool, described: DescribedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_TRITON_3_6", triton_3_6)
    of, (y, x) = Launcher(described, "some"), (aligned(512, dtype=torch.bfloat16) for _ in range(2))
    first = views()
    assert isinstance(first[0], View)
    second = (dataclasses.replace(first[0], shape=(4, 64)), *first[1:])
    for given in (first, second, second, first):
        of.bind("key", CPU, (1, 1, 1), (), {}, 4, "this", given)(y, x)
    assert len(described.compiled) == 1
    if triton_3_6:
        shapes = [ran[ran.index(f"first at {x.data_ptr()}") + 1] for ran in described.ran]
    else:
        shapes = [ran[-3].shape[0] for ran in described.ran]
    assert shapes == [4, 4, 8]


def test_encodings_are_bounded(described: DescribedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_TRITON_3_6", True)
    monkeypatch.setattr(launcher, "_MAX_ENCODED", 6)
    launch = Launcher(described, "some").bind("key", CPU, (1, 1, 1), (), {}, 4, "this", views())
    memory = [aligned(512, dtype=torch.bfloat16) for _ in range(20)]
    for x in memory:
        launch(memory[0], x)
    assert 0 < len(launcher._ENCODED) <= 6


def test_other_releases_encode_themselves(described: DescribedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_TRITON_3_6", False)
    y, x = (aligned(512, dtype=torch.bfloat16) for _ in range(2))
    launch = Launcher(described, "some").bind("key", CPU, (3, 2, 1), (), {}, 4, "this", views())
    launch(y, x)
    launch(y, x)
    ((*head, first, address, second),) = described.ran
    assert head == [3, 2, 1, STREAM, "function", "metadata", None, None, None] and address == y.data_ptr()
    assert [(d.shape, d.strides, d.base.data_ptr()) for d in (first, second)] == [
        ((8, 64), (64, 1), x.data_ptr()), ((16, 64), (32, 1), x.data_ptr()),
    ]  # fmt: skip


def test_the_installed_driver_takes_what_stands_for_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own encoding, around a driver that writes down what it is asked, and its launcher within."""
    asked: list[tuple[Any, ...]] = []
    ran: list[tuple[Any, ...]] = []
    fill = lambda *args: asked.append(args) or "map"  # noqa: E731
    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    module = importlib.import_module("triton.backends.nvidia.driver")
    view = views()[2]
    assert isinstance(view, View)
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 64], "fp4_padded": False}
    signature = {0: "*bf16", 1: "tensordesc<bf16[16, 64],NVMMASharedLayout()>"}
    run = module.wrap_handle_tensordesc(lambda *args: ran.append(args), signature, [meta])
    placed, base = launcher._Placed(view, 4096), (0,) * 13
    if launcher._TRITON_3_6:
        run(*base, "y", placed)
        found = ran[0][13:]
        assert launcher._encode(meta, view, 4096) == found[1:]
        assert inspect.getclosurevars(run).nonlocals["launcher"](1) is None and ran[1] == (1,)
    else:
        run(*base, ("y", placed))
        found = ran[0][-1]
    assert tuple(found) == ("y", "map", 16, 64, 32, 1)
    assert asked[0][0] == 4096 and asked[0][1:3] == (3, 2) and list(asked[0][4]) == [16, 64]
