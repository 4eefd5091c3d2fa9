"""Launching the Gluon prefill of `hopper_prefill.py`, as `prefill.py` launches the Triton one."""

from __future__ import annotations

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import hopper_prefill
from .launcher import Launch, Launcher, View
from .operand import Operand

__all__ = ["PROGRAMS_PER_SM", "bind", "describe"]

PROGRAMS_PER_SM = 2

_LAUNCH = Launcher(hopper_prefill.hopper_kernel, "Gluon prefill")


def bind(y: torch.Tensor, x: torch.Tensor, w: Operand, schedule: torch.Tensor, E: int, processors: int) -> Launch:
    """A launch for tensors that differ from these in values alone: of y, x, w.w, w.s, w.z and a schedule.

    All lie on multiples of 16 bytes, and so do the rows of x.
    """
    tensors = (y, x, w.w, w.s, w.z, schedule)
    places = [t.data_ptr() for t in tensors]
    views: list[View | int] = []
    sizes: list[int] = []
    for argument in hopper_prefill.arguments(y, x, w, schedule, E):
        if isinstance(argument, TensorDescriptor):
            views.append(View.of(argument, tensors))
        elif isinstance(argument, torch.Tensor):
            views.append(places.index(argument.data_ptr()))
        else:
            sizes.append(argument)  # type: ignore[arg-type]
    return _LAUNCH.bind(
        (w.facts, x.dtype, y.dtype),
        y.device,
        (PROGRAMS_PER_SM * processors, 1, 1),
        tuple(sizes),
        hopper_prefill.constants(w),
        4,
        f"{w.format} (N={w.N}, K={w.K})",
        tuple(views),
        {"maxnreg": hopper_prefill.REGISTERS},
    )


def describe() -> str:
    """What is as the tile sizes of `config.py` are to `prefill.py`."""
    return f"Gluon(x_slots={hopper_prefill.X_SLOTS}, w_slots={hopper_prefill.W_SLOTS})"
