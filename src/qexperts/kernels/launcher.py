"""Launching a kernel again without Triton's look-up.

Triton finds the compiled kernel of a call by inspecting every argument, which costs more host time than a decode
kernel runs. A launch bound once keeps everything but its tensors. A compiled kernel depends on those by their dtypes,
which belong to the launch's key, and by where they lie, which every call looks at. The first call for a key and a
place goes through Triton, later ones straight to the driver, with addresses instead of tensors.

A tensor that a kernel reads through the copy engine (TMA) is passed as a descriptor, which the driver encodes from the
address and a `View`. Encodings are kept by address: they depend on nothing else and keep no tensor alive.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

from ..workspace import is_capturing

__all__ = ["Launch", "Launcher", "View"]

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # GPUs before sm_89 have no such pointers: passed as bytes
_HIP = torch.version.hip is not None
_TRITON_3_6 = triton.__version__.split(".")[:2] == ["3", "6"]
_address = torch.Tensor.data_ptr
_MAX_ENCODED = 4096


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor as the copy engine reads it.

    Attributes:
        tensor: which of the launch's tensors.
        dtype: of an element, whatever that of the tensor is.
        shape, strides: in elements; the last stride is 1, the others are multiples of 16 bytes.
        block: what is copied at a time.
        layout: of a block in shared memory, a `NVMMASharedLayout`.
    """

    tensor: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: Any

    @classmethod
    def of(cls, descriptor: Any, tensors: Sequence[torch.Tensor]) -> View:
        """What a `TensorDescriptor` says of the one of these tensors that it is of."""
        tensor = [t.data_ptr() for t in tensors].index(descriptor.base.data_ptr())
        sizes = (tuple(map(int, s)) for s in (descriptor.shape, descriptor.strides, descriptor.block_shape))
        return cls(tensor, descriptor.base.dtype, *sizes, descriptor.layout)

    def descriptor(self, t: torch.Tensor) -> Any:
        """For a call through Triton."""
        make = importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
        return make(t.view(self.dtype), list(self.shape), list(self.strides), list(self.block), self.layout)


class _Placed:
    """A descriptor of what lies at an address, and the tensor there: as much of both as Triton's driver asks for."""

    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, view: View, address: int) -> None:
        self.shape, self.strides, self._address = view.shape, view.strides, address

    @property
    def base(self) -> _Placed:
        return self

    def data_ptr(self) -> int:
        return self._address


_NUMBERS: dict[View, int] = {}
_ENCODED: dict[tuple[int, int], Sequence[object]] = {}  # by a view's number and an address


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
        views: tuple[View | int, ...] | None = None,
        options: dict[str, int] | None = None,
    ) -> Launch:
        """A launch for tensors on a device.

        Args:
            key: hashable; equal only for launches on a device that may share a compiled kernel if their tensors lie
                alike: dtypes, constants, warps, and the sizes that are specialised.
            sizes: the arguments between the tensors and the constants, in order.
            constants: the constants (tl.constexpr), in order.
            what: the kernel is compiled for, for error messages.
            views: the kernel's arguments before the sizes, in order, where they are not the tensors as they come: views
                of them, or which of them is passed by its address.
            options: of the compiler, besides the warps.
        """
        known = self._known.setdefault((device, key), {})
        options = {"num_warps": warps, **(options or {})}
        return Launch(self, known, device, grid, sizes, constants, options, what, views)


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
        views: tuple[View | int, ...] | None,
    ) -> None:
        self._launcher, self._known, self._device, self._grid = launcher, known, device, grid
        self._sizes, self._constants, self._options, self._what = sizes, constants, options, what
        self._index = device.index
        self._tail = (*sizes, *constants.values())
        self._views = views
        # which tensor an argument is of, and if it is a view, that and its number
        self._read = [
            (v.tensor, v, _NUMBERS.setdefault(v, len(_NUMBERS))) if isinstance(v, View) else (v, None, 0)
            for v in views or ()
        ]

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream of the device, which has to be the current one.

        Args:
            tensors: the arguments before the sizes, in order, or what the views are of; those on multiples of 16 bytes.
        Raises: RuntimeError if a CUDA graph is being captured and the kernel is not compiled yet.
        """
        addresses = tuple(map(_address, tensors))
        place: object = None
        if _HIP or functools.reduce(operator.or_, addresses) & 15:
            place = _place(tensors, addresses)
        known = self._known.get(place)
        if known is None:
            return self._first(place, tensors)
        compiled, call, head, stream, encode = known
        if _watched():
            compiled[self._grid](*self._arguments(tensors), *self._tail)
        elif self._views is None:
            call(*self._grid, stream(self._index), *head, *addresses, *self._tail)
        else:
            call(*self._grid, stream(self._index), *head, *self._described(addresses, encode), *self._tail)

    def _arguments(self, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """What a call through Triton takes for the tensors."""
        if self._views is None:
            return tensors
        return tuple(v.descriptor(tensors[v.tensor]) if isinstance(v, View) else tensors[v] for v in self._views)

    def _described(self, addresses: tuple[int, ...], encode: Sequence[Any]) -> list[object]:
        """What the driver takes for the tensors at these addresses."""
        found: list[object] = []
        for (tensor, view, number), make in zip(self._read, encode, strict=True):
            address = addresses[tensor]
            if view is None:
                found.append(address)
                continue
            encoded = _ENCODED.get((number, address))
            if encoded is None:
                if len(_ENCODED) >= _MAX_ENCODED:
                    _ENCODED.clear()
                encoded = _ENCODED[number, address] = make(view, address)
            found += encoded
        return found

    def _first(self, place: object, tensors: tuple[torch.Tensor, ...]) -> None:
        if is_capturing(self._device):
            raise RuntimeError(
                f"qexperts: the {self._launcher.name} kernel for {self._what} is not compiled yet, and a CUDA "
                f"graph is being captured; call once with tensors of this kind before capturing."
            )
        compiled = self._launcher.kernel[self._grid](
            *self._arguments(tuple(t.view(torch.uint8) if t.dtype in _FLOAT8 else t for t in tensors)),
            *self._sizes,
            **self._constants,
            **self._options,
            enable_fp_fusion=True,  # said explicitly, since its default changes between Triton releases
        )
        if compiled is not None:  # the interpreter compiles nothing
            call, head = _direct(compiled)
            call, encode = (call, ()) if self._views is None else _encoders(compiled, call, self._views)
            self._known[place] = compiled, call, head, driver.active.get_current_stream, encode


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


def _encoders(compiled: Any, call: Any, views: Sequence[View | int]) -> tuple[Any, list[Any]]:
    """What launches a kernel that takes descriptors, and for each view, what makes arguments of such a one, of whatever
    size, and an address.

    Triton 3.6 wraps the driver's launcher in a function that encodes the descriptors of every call anew; that one is
    taken out, and its encoding kept. Other releases encode at each call.
    """
    if not _TRITON_3_6 or call is compiled.run:
        return call, [_stand_in] * len(views)
    metas = iter(compiled.metadata.tensordesc_meta)
    made = [functools.partial(_encode, next(metas)) if isinstance(v, View) else None for v in views]
    return inspect.getclosurevars(call).nonlocals["launcher"], made


def _stand_in(view: View, address: int) -> Sequence[object]:
    return (_Placed(view, address),)


def _encode(meta: object, view: View, address: int) -> Sequence[object]:
    """What Triton's driver makes of a descriptor: the encoded map, shape and strides."""
    make = importlib.import_module("triton.backends.nvidia.driver").make_tensordesc_arg
    return tuple(make(_Placed(view, address), meta))


def _watched() -> bool:
    """Whether hooks, a profiler's for instance, want to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
