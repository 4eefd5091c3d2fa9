"""Launching a kernel again without Triton's look-up.

Triton finds the compiled kernel of a call by inspecting every argument, which costs more host time than a decode
kernel runs. A launch bound once keeps everything but its tensors. A compiled kernel depends on those by their dtypes,
which belong to the launch's key, and by where they lie, which every call looks at. The first call for a key and a
place goes through Triton, later ones straight to the driver, with addresses instead of tensors.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

from ..workspace import is_capturing

__all__ = ["Launch", "Launcher"]

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # GPUs before sm_89 have no such pointers: passed as bytes
_HIP = torch.version.hip is not None
_TRITON_3_6 = triton.__version__.split(".")[:2] == ["3", "6"]
_address = torch.Tensor.data_ptr


class Launcher:
    """Launches of one @triton.jit function.

    Args:
        name: of the kernel, for error messages.
    """

    def __init__(self, kernel: Any, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self._known: dict[object, dict[object, Any]] = {}

    def bind(
        self,
        key: object,
        device: torch.device,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...],
        constants: dict[str, object],
        warps: int,
        what: str,
        registers: int | None = None,
    ) -> Launch:
        """A launch for tensors on a device.

        Args:
            key: hashable; equal only for launches on a device that may share a compiled kernel if their tensors lie
                alike: dtypes, constants, warps, and the sizes that are specialised.
            sizes: the arguments between the tensors and the constants, in order.
            constants: the constants (tl.constexpr), in order.
            what: the kernel is compiled for, for error messages.
            registers: of a thread at most; None: as the compiler likes.
        """
        known = self._known.setdefault((device, key), {})
        options = {"num_warps": warps} if registers is None else {"num_warps": warps, "maxnreg": registers}
        return Launch(self, known, device, grid, sizes, constants, options, what)


class Launch:
    """A launch but for its tensors; holds none alive."""

    def __init__(
        self,
        launcher: Launcher,
        known: dict[object, Any],
        device: torch.device,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...],
        constants: dict[str, object],
        options: dict[str, int],
        what: str,
    ) -> None:
        self._launcher, self._known, self._device, self._grid = launcher, known, device, grid
        self._sizes, self._constants, self._options, self._what = sizes, constants, options, what
        self._index = device.index
        self._tail = (*sizes, *constants.values())

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream of the device, which has to be the current one.

        Args:
            tensors: the arguments before the sizes, in order.
        Raises: RuntimeError if a CUDA graph is being captured and the kernel is not compiled yet.
        """
        addresses = tuple(map(_address, tensors))
        place: object = None
        if _HIP or functools.reduce(operator.or_, addresses) & 15:
            place = _place(tensors, addresses)
        known = self._known.get(place)
        if known is None:
            return self._first(place, tensors)
        compiled, call, head, stream = known
        if _watched():
            compiled[self._grid](*tensors, *self._tail)
        else:
            call(*self._grid, stream(self._index), *head, *addresses, *self._tail)

    def _first(self, place: object, tensors: tuple[torch.Tensor, ...]) -> None:
        if is_capturing(self._device):
            raise RuntimeError(
                f"triton backend: the {self._launcher.name} kernel for {self._what} is not compiled yet, and a CUDA "
                f"graph is being captured; call once with tensors of this kind before capturing."
            )
        compiled = self._launcher.kernel[self._grid](
            *(t.view(torch.uint8) if t.dtype in _FLOAT8 else t for t in tensors),
            *self._sizes,
            **self._constants,
            **self._options,
            enable_fp_fusion=True,  # said explicitly, since its default changes between Triton releases
        )
        if compiled is not None:  # the interpreter compiles nothing
            self._known[place] = compiled, *_direct(compiled), driver.active.get_current_stream


def _place(tensors: tuple[torch.Tensor, ...], addresses: tuple[int, ...]) -> tuple[bool, ...]:
    """What Triton specialises a pointer by: a multiple of 16 bytes; on AMD also memory of less than 2 GiB."""
    place = tuple([address % 16 == 0 for address in addresses])
    return place + tuple([t.untyped_storage().nbytes() < 2**31 for t in tensors]) if _HIP else place


def _direct(compiled: Any) -> tuple[Any, tuple[object, ...]]:
    """What launches a compiled kernel, and its arguments between the stream and the kernel's: no launch metadata, no
    hooks."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if (
        _TRITON_3_6
        and type(run).__name__ == "CudaLauncher"
        and not (run.global_scratch_size or run.profile_scratch_size)
    ):
        # its __call__, where a kernel needs no scratch memory: it only adds arguments, at the cost of a launch
        return run.launch, (
            function,
            run.launch_cooperative_grid,
            run.launch_pdl,
            None,
            None,
            metadata,
            None,
            None,
            None,
        )
    return run, (function, metadata, None, None, None)


def _watched() -> bool:
    """Whether hooks, a profiler's for instance, want to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
