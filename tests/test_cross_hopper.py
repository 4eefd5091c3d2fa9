"""The Gluon kernel compiles for sm_90, with HGMMA that runs behind the program and two programs to a processor."""

from __future__ import annotations

import os
import re
import tempfile

import pytest
import torch

pytest.importorskip("triton", reason="the extra 'triton' is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton
from cross import TARGETS, Build, dump, meta_weight
from hazards import overwritten
from triton.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from qexperts.kernels import hopper_prefill, schedule
from qexperts.kernels.operand import operand

SHARED = 227 * 1024 // 2 - 1024  # of a program, where two share a multiprocessor


class Placed(torch.Tensor):
    """A tensor without memory that says it lies on 16 bytes."""

    def data_ptr(self) -> int:
        return 16


@pytest.mark.parametrize("k", [1536, 3072])
def test_compiles_for_sm_90(k: int) -> None:
    w = operand(meta_weight(Build("prefill", k=k)))
    w = w._replace(w=w.w.as_subclass(Placed), s=w.s.as_subclass(Placed))
    x = torch.empty(4096, k, dtype=torch.bfloat16, device="meta").as_subclass(Placed)
    y = torch.empty(4096, w.N, dtype=torch.bfloat16, device="meta")
    tiles = torch.empty(schedule.size(4096, 256), dtype=torch.int32, device="meta")
    fn, target = hopper_prefill.hopper_kernel, TARGETS["sm_90"]
    backend = make_backend(target)
    options = {"num_warps": 4, "maxnreg": hopper_prefill.REGISTERS, "enable_fp_fusion": True, "debug": False}
    kwargs = {**hopper_prefill.constants(w), **options}
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    arguments = hopper_prefill.arguments(y, x, w, tiles, 256)
    bound, specialization, rest = binder(*arguments, **kwargs)
    rest, signature, constants, attributes = fn._pack_args(backend, kwargs, bound, specialization, rest)
    kernel = triton.compile(GluonASTSource(fn, signature, constants, attributes), target=target, options=rest.__dict__)
    descriptors = [a for a in arguments if isinstance(a, hopper_prefill.TensorDescriptor)]
    encoded = [(meta["block_size"], meta["elem_size"]) for meta in kernel.metadata.tensordesc_meta]
    assert encoded == [
        (d.block_shape, d.base.element_size()) for d in descriptors
    ]  # in order: `launcher.py` counts on it
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = dump("-sass", file.name)
    multiplications, waits = len(re.findall(r"\bHGMMA\b", sass)), len(re.findall(r"WARPGROUP\.DEPBAR", sass))
    assert multiplications and waits < multiplications, f"a wait behind each of {multiplications} HGMMA"
    assert not overwritten(sass)
    assert kernel.metadata.shared <= SHARED
