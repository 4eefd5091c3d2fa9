"""The Gluon decode compiles for sm_90: no local memory in the loop over panels, and four programs to a processor."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from cross import Build, compile_launch, dump

SHARED = 227 * 1024 // 4 - 1024  # of a program, where four share a multiprocessor

BUILDS = [
    Build("hopper-decode", format="int4_sym", why="the headline"),
    Build("hopper-decode", format="int2_sym", many=True, why="the most instructions a byte"),
    Build("hopper-decode", format="int8_asym", why="zeros beside the scales, tiles of 64 k"),
    Build("hopper-decode", format="fp8_e4m3", dtype="fp16", scales="fp16", why="no zero points"),
    Build("hopper-decode", format="int4_asym", scales="fp32", why="zeros apart"),
    Build("hopper-decode", format="int2_asym", group=64, k=1408, why="several groups a tile; parts that are not full"),
]


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_compiles_for_sm_90(build: Build) -> None:
    kernel = compile_launch(build)
    sass = dump(kernel, "-sass")
    (loop,) = [body for body in innermost_loops(sass) if "HMMA" in body]
    assert not re.findall(r"\b(?:LDL|STL)\b.*", loop)
    assert len(re.findall(r"\bBAR\.SYNC", loop)) == 2
    assert kernel.metadata.shared <= SHARED


def innermost_loops(sass: str) -> list[str]:
    """Code between a jump back and where it goes, if it holds no other such jump."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.M)
    jumps = [
        (int(at, 16), int(found[1], 16)) for at, line in lines if (found := re.search(r"\bBRA.* 0x([0-9a-f]+)", line))
    ]
    back = [(to, at) for at, to in jumps if to < at]
    inner = [(a, b) for a, b in back if not any((c, d) != (a, b) and a <= c and d <= b for c, d in back)]
    return ["\n".join(line for at, line in lines if a <= int(at, 16) <= b) for a, b in inner]
