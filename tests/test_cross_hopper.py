"""The Gluon prefills compile for sm_90, with HGMMA that runs behind the program and as many programs to a processor."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="the extra 'triton' is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from cross import DTYPES, TARGETS, Build, compile_call, dump, meta_weight
from hazards import overwritten
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qexperts import FORMATS
from qexperts.kernels import hopper_dense, hopper_prefill, schedule
from qexperts.kernels.operand import operand

SHARED = 228 * 1024  # of a multiprocessor; each program takes 1 KiB more than it says


class Placed(torch.Tensor):
    """A tensor without memory that says it lies on 16 bytes."""

    def data_ptr(self) -> int:
        return 16


@pytest.mark.parametrize(
    ("fmt", "dtype", "scales", "group", "k"),
    [
        ("int4_sym", "bf16", "bf16", 128, 1536), ("int4_sym", "bf16", "bf16", 128, 3072),
        ("int4_asym", "bf16", "bf16", 128, 1536), ("int2_sym", "bf16", "bf16", 128, 1536),
        ("int2_asym", "bf16", "bf16", 128, 3072), ("int8_sym", "bf16", "bf16", 128, 1536),
        ("int8_asym", "bf16", "bf16", 128, 3072), ("fp8_e4m3", "bf16", "bf16", 128, 3072),
        ("fp8_e5m2", "bf16", "bf16", 128, 1536), ("int4_sym", "fp16", "fp16", 128, 1536),
        ("int4_asym", "fp16", "fp16", 128, 3072), ("int2_asym", "fp16", "fp16", 128, 1536),
        ("int8_asym", "fp16", "fp16", 128, 1536), ("fp8_e4m3", "fp16", "fp16", 128, 1536),
        ("int4_asym", "bf16", "bf16", 64, 1536), ("int4_sym", "bf16", "bf16", 32, 1536),
        ("int2_asym", "bf16", "bf16", 32, 3072), ("int8_sym", "bf16", "bf16", 32, 1536),
        ("int4_asym", "fp16", "fp16", 32, 1536), ("bf16", "bf16", "bf16", None, 1536),
        ("fp16", "fp16", "fp16", None, 3072), ("int4_asym", "bf16", "fp16", 128, 1536),
        ("fp8_e4m3", "bf16", "fp32", 128, 3072), ("int8_asym", "fp16", "fp32", 16, 1536),
        ("int2_sym", "bf16", "bf16", 16, 1536),
    ],
)  # fmt: skip
def test_compiles_for_sm_90(fmt: str, dtype: str, scales: str, group: int | None, k: int) -> None:
    quantized = FORMATS[fmt].quantized
    if quantized:
        module, fn, warps = hopper_prefill, hopper_prefill.hopper_kernel, 4
    else:
        module, fn, warps = hopper_dense, hopper_dense.dense_kernel, hopper_dense.WARPS
    layout = "tiles" if quantized else "strided"
    w = operand(meta_weight(Build("prefill", format=fmt, layout=layout, scales=scales, group=group, k=k)))
    w = w._replace(**{t: getattr(w, t).as_subclass(Placed) for t in "wsz"})
    x = torch.empty(4096, k, dtype=DTYPES[dtype], device="meta").as_subclass(Placed)
    y = torch.empty(4096, w.N, dtype=DTYPES[dtype], device="meta")
    tiles = torch.empty(schedule.size(4096, 256), dtype=torch.int32, device="meta")
    options = {"num_warps": warps, "maxnreg": module.REGISTERS, "enable_fp_fusion": True}
    arguments = module.arguments(y, x, w, tiles, 256)
    kernel = compile_call(fn, arguments, {**module.constants(w), **options}, TARGETS["sm_90"])
    descriptors = [a for a in arguments if isinstance(a, TensorDescriptor)]
    encoded = [(meta["block_size"], meta["elem_size"]) for meta in kernel.metadata.tensordesc_meta]
    assert encoded == [
        (d.block_shape, d.base.element_size()) for d in descriptors
    ]  # in order: `launcher.py` counts on it
    sass = dump(kernel, "-sass")
    multiplications, waits = len(re.findall(r"\bHGMMA\b", sass)), len(re.findall(r"WARPGROUP\.DEPBAR", sass))
    assert multiplications and waits < multiplications, f"a wait behind each of {multiplications} HGMMA"
    assert not overwritten(sass)
    assert not re.search(r"\b(STL|LDL)\b", sass), "registers of the loops are spilled"
    assert module.PROGRAMS_PER_SM * (kernel.metadata.shared + 1024) <= SHARED
