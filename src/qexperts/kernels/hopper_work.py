"""What the prefills in Gluon share: units of work, a tile of the schedule times rows of the weight, that the producer
of a persistent program claims and tells its consumers; the launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launcher import Launch, Launcher, View

__all__ = ["advance", "announce", "barriers", "below", "bind", "claim", "described", "heard", "rows_of", "tile"]


@triton.constexpr_function
def rows_of(descs):  # type: ignore[no-untyped-def]
    """Rows that a class of tiles holds; descs: descriptors of the boxes of x that it is made of."""
    return sum(desc.block_shape[0] for desc in descs)


@triton.constexpr_function
def below(classes):  # type: ignore[no-untyped-def]
    """Rows that fit the next class, for which the first is not needed; classes: the largest first."""
    return rows_of(classes[1]) if len(classes) > 1 else 0


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """So many, each of one arrival; a fence must follow."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=1)
    return made


@gluon.jit
def claim(schedule_ptr, back, units):
    """The next unit of work, or -1; a front counter and one from the back in the halves of 64 bits."""
    one = gl.where(back == 1, 1 << 32, 1).to(gl.int64)
    ticket = gl.atomic_add((schedule_ptr + 2).to(gl.pointer_type(gl.int64)), one, sem="relaxed")
    f = (ticket & 0x7FFFFFFF).to(gl.int32)
    b = (ticket >> 32).to(gl.int32)
    return gl.where(f + b < units, gl.where(back == 1, units - 1 - b, f), -1)


@gluon.jit
def tile(tiles_ptr, unit, MAX_TILES, BLOCKS_N: gl.constexpr):
    """Expert, row, rows, block of n of a unit."""
    t = gl.maximum(unit, 0) // BLOCKS_N
    e = gl.load(tiles_ptr + t)
    row = gl.load(tiles_ptr + MAX_TILES + t)
    rows = gl.load(tiles_ptr + 2 * MAX_TILES + t)
    return e, row, rows, gl.maximum(unit, 0) % BLOCKS_N


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
    slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
    return slot, phase


@gluon.jit
def announce(infos, info_full, i, row, rows, block_n, INFOS: gl.constexpr):
    """Tell the consumers of the i-th unit; of no rows: the last."""
    field = gl.arange(0, 4, gl.BlockedLayout([4], [32], [1], [0]))
    infos.index(i % INFOS).store(gl.where(field == 0, row, gl.where(field == 1, rows, block_n)))
    mbarrier.arrive(info_full.index(i % INFOS), count=1)


@gluon.jit
def _uniform(v):
    """The same value, known to the assembler to be that of the whole warp: it then uses uniform registers."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [v], gl.int32, True, 1)


@gluon.jit
def heard(infos, info_full, i, INFOS: gl.constexpr):
    """Row, rows, block of n of the i-th unit."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    field = gl.arange(0, 4, L)
    mbarrier.wait(info_full.index(i % INFOS), i // INFOS & 1)
    info = infos.index(i % INFOS).load(L)
    row = _uniform(gl.sum(gl.where(field == 0, info, 0), 0))
    rows = _uniform(gl.sum(gl.where(field == 1, info, 0), 0))
    return row, rows, _uniform(gl.sum(gl.where(field == 2, info, 0), 0))


def described(
    t: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int], swizzle: int
) -> TensorDescriptor:
    """t as the copy engine reads it; swizzle: bytes."""
    layout = gl.NVMMASharedLayout(swizzle, 8 * t.element_size(), len(block))
    return TensorDescriptor(t, list(shape), list(strides), list(block), layout)


def bind(
    launcher: Launcher, key: object, tensors: Sequence[torch.Tensor], arguments: Sequence[object], programs: int,
    constants: Mapping[str, object], warps: int, registers: int, what: str,
) -> Launch:  # fmt: skip
    """A launch for tensors that differ from these in values alone; arguments: of the kernel, before its constants."""
    places = [t.data_ptr() for t in tensors]
    views: list[View | int] = []
    sizes: list[int] = []
    for argument in arguments:
        if isinstance(argument, TensorDescriptor):
            views.append(View.of(argument, tensors))
        elif isinstance(argument, torch.Tensor):
            views.append(places.index(argument.data_ptr()))
        else:
            sizes.append(argument)  # type: ignore[arg-type]
    return launcher.bind(
        key, tensors[0].device, (programs, 1, 1), tuple(sizes), dict(constants), warps, what, tuple(views),
        {"maxnreg": registers},
    )  # fmt: skip
