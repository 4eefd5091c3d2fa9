"""Every kernel compiles for GPUs that are not there; on sm_90 without spilling, and a prefill with HGMMA."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from cross import BETWEEN, KERNELS, TARGETS, Build, compile_launch, compiled, full_matrix, problem
from hazards import overwritten

FAMILIES = ("int8_sym", "int4_sym", "int2_sym", "fp8_e4m3")
GEMMS = ("prefill", "decode", "decode-auto")

SM_90 = [
    *(
        Build(kernel, format=fmt, layout=layout)
        for kernel in GEMMS
        for fmt in FAMILIES
        for layout in ("tiles", "public")
    ),
    *(Build("decode", format=fmt, layout="tiles", many=True) for fmt in FAMILIES),
    *(Build(kernel, format="bf16", layout="strided") for kernel in GEMMS),
    *(Build("permute", format=fmt, layout="public") for fmt in FAMILIES[:3]),
    Build("schedule"),
    *(Build(kernel) for kernel in BETWEEN),
    Build("prefill", format="bf16", layout="transposed", why="moe_gemm: [E, K, N]"),
    Build("prefill", format="int4_asym", why="the format of most checkpoints: zeros next to the scales"),
    Build("prefill", dtype="fp16", scales="fp16", why="another magic exponent"),
    Build("prefill", scales="fp32", why="the product in fp32"),
    Build("prefill", format="int8_sym", layout="transposed", why="the per-tensor scheme"),
    Build("prefill", group=16, why="a scale for each step of 16 k"),
    Build("decode", layout="public", group=16, k=1552, why="a masked tail"),
]

ELSEWHERE = [
    *(Build("prefill", target, fmt) for target in ("sm_80", "sm_100", "gfx942") for fmt in FAMILIES),
    *(Build("prefill", target, "bf16", "strided") for target in ("sm_80", "sm_100", "gfx942")),
    *(Build(kernel, "gfx942") for kernel in ("decode", "decode-auto", "schedule")),
    Build("permute", "gfx942", layout="public"),
    *(Build(kernel, "gfx942") for kernel in ("sort", "gate-gelu", "combine")),
    Build("decode", "sm_80"),
]


@pytest.mark.parametrize("build", SM_90, ids=str)
def test_sm_90(build: Build) -> None:
    result = compiled(build)
    assert not problem(result), f"{build.why}: {problem(result)}"


def test_scales_in_bf16_are_not_rounded_to_fp16() -> None:
    """LLVM narrows the product of a widened fp16 and a widened bf16 that is rounded to fp16, if it sees all three."""
    ptx = compile_launch(Build("decode", dtype="fp16", scales="bf16")).asm["ptx"]
    assert "mul.f32" in ptx and "mul.f16" not in ptx


@pytest.mark.parametrize("build", ELSEWHERE, ids=str)
def test_other_targets(build: Build) -> None:
    kernel = compile_launch(build)
    assert kernel.asm["hsaco" if TARGETS[build.target].backend == "hip" else "cubin"]


LOOP = """
    /*0100*/  LDS.64 R{first}, [R9] ;
    /*0110*/  HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24 ;
    /*0120*/  HGMMA.64x16x16.F32.BF16 R32, R44, gdesc[UR8], R32, gsb0 ;
    /*0130*/  HGMMA.64x16x16.F32.BF16 R24, R48, gdesc[UR4], R24, gsb0 ;
    /*0140*/  WARPGROUP.DEPBAR.LE gsb0, {left} ;
    /*0150*/  @!P1 BRA 0x100 ;
"""


@pytest.mark.parametrize(
    ("first", "left", "bad"),
    [(40, "0x0", 0), (40, "0x1", 0), (46, "0x2", 1), (48, "0x1", 1), (47, "0x1", 1), (50, "0x0", 0)],
)
def test_an_operand_in_flight_that_is_overwritten_is_found(first: int, left: str, bad: int) -> None:
    """Two groups a round; `left` of them may run on into the next, where two registers from `first` are loaded."""
    assert len(overwritten(LOOP.format(first=first, left=left))) == bad


def test_full_matrix_names_each_build_once() -> None:
    names = [str(build) for build in full_matrix()]
    assert len(names) == len(set(names))
    assert {build.kernel for build in full_matrix()} == set(KERNELS)
    assert {build.target for build in full_matrix()} == set(TARGETS)
