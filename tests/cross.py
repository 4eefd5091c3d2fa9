"""Compile the Triton kernels for GPUs that are not there, exactly as a launch on them would.

    python tests/cross.py [--jobs N] [--only TEXT] [--triton installed 3.6.0]       every format, dtype, layout, target

The launchers are called on tensors without memory while `JITFunction.run` only records its arguments; the recorded
launch then goes through Triton's own specialisation. Another release than the installed one is put by pip into a
temporary directory in front of it.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from hazards import overwritten
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from qexperts import FORMATS, QuantWeight
from qexperts.kernels import between, config, decode, permute, prefill, schedule
from qexperts.kernels.operand import operand

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BETWEEN = ("sort", *(f"gate-{name}" for name in between.ACTIVATIONS), "combine")
KERNELS = ("prefill", "decode", "decode-auto", "schedule", "permute", *BETWEEN)
QUANTIZED = tuple(name for name, fmt in FORMATS.items() if fmt.quantized)
N, K, ROWS, EXPERTS = 3072, 1536, 4096, 256  # the recorded workload's projection
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Build:
    """A kernel to compile.

    Attributes:
        kernel: one of `KERNELS`; decode-auto is what `phase="auto"` launches on NVIDIA where K is computed in parts.
        layout: "tiles", "public", "strided" (unquantized [E, N, K]) or "transposed" (memory order [E, K, N]).
        dtype, scales: of the activations and of the scales.
        group: group size; None for K.
        many: the tile sizes of a decode with many active experts.
    """

    kernel: str
    target: str = "sm_90"
    format: str = "int4_sym"
    layout: str = "tiles"
    dtype: str = "bf16"
    scales: str = "bf16"
    group: int | None = 128
    k: int = K
    many: bool = False
    why: str = ""

    def __str__(self) -> str:
        if self.kernel == "schedule" or self.kernel in BETWEEN:
            return f"{self.kernel}-{self.dtype}-{self.target}"
        if self.kernel == "permute":
            return f"{self.kernel}-{self.format}-{self.dtype}-{self.target}"
        scales = f"-scales-{self.scales}" if self.scales != self.dtype else ""
        size = (f"-K{self.k}" if self.k != K else "") + "-many" * self.many
        return (
            f"{self.kernel}-{self.format}-{self.layout}-{self.dtype}{scales}-G{self.group or 'K'}{size}-{self.target}"
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """A compiled kernel. NVIDIA only: registers, stack (bytes of a thread), local (STL and LDL), hgmma, overwritten (of
    `hazards.py`)."""

    build: Build
    seconds: float
    shared: int = 0
    registers: int = 0
    stack: int = 0
    local: int = 0
    hgmma: int = 0
    overwritten: int = 0
    error: str = ""

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0

    def __str__(self) -> str:
        if self.error:
            return f"{self.build}: {self.error}"
        return (
            f"{self.build}: {self.registers} registers, {self.stack} bytes of stack, {self.local} STL/LDL, "
            f"{self.shared} bytes shared, {self.hgmma} HGMMA, {self.seconds:.1f} s"
        )


def meta_weight(build: Build) -> QuantWeight:
    """A weight of the build's kind that has no memory."""
    fmt = FORMATS[build.format]
    codes = torch.empty(EXPERTS, N, fmt.packed_k(build.k), dtype=fmt.storage, device="meta")
    if build.layout == "transposed":
        codes = torch.empty(EXPERTS, codes.shape[2], N, dtype=fmt.storage, device="meta").mT
    if not fmt.quantized:
        return QuantWeight(codes, None, None, fmt)
    dtype, group = DTYPES[build.scales], build.group or build.k
    groups = build.k // group
    if build.layout != "tiles":
        scales = torch.empty(EXPERTS, N, groups, dtype=dtype, device="meta")
        return QuantWeight(codes, scales, scales if fmt.asym else None, fmt, group)
    words = torch.float32 if dtype == torch.float32 else torch.int32
    scales = torch.empty(EXPERTS, groups, N, dtype=words, device="meta")
    zeros = scales if fmt.asym and words == torch.float32 else None
    return QuantWeight(codes, scales, zeros, fmt, group, "group", "tiles", dtype)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]]:
    """Launches inside are recorded, not run."""
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def launch(build: Build) -> None:
    """The build's launch, on tensors without memory, with the default tile sizes of its target."""
    nvidia = TARGETS[build.target].backend == "cuda"
    path = "ptx" if nvidia else "portable"
    dtype, fmt = DTYPES[build.dtype], FORMATS[build.format]
    x = torch.empty(ROWS, build.k, dtype=dtype, device="meta")
    y = torch.empty(ROWS, N, dtype=dtype, device="meta")
    counts = torch.empty(EXPERTS, dtype=torch.int32, device="meta")
    weight = meta_weight(build)
    w = operand(weight)
    expected = {"transposed": "strided", "tiles128": "tiles"}
    assert expected.get(w.layout, w.layout) == expected.get(build.layout, build.layout), f"{build}: {w.layout}"
    tiles = torch.empty(schedule.size(ROWS, EXPERTS), dtype=torch.int32, device="meta")
    if build.kernel == "schedule":
        schedule.launch(tiles, y, counts)
    elif build.kernel == "permute":
        permute.launch(x, x, fmt.name)
    elif build.kernel in BETWEEN:
        launch_between(build.kernel, y)
    elif build.kernel == "prefill":
        c = config.prefill_config(w, dtype, nvidia)
        prefill.launch(y, x, w, tiles, EXPERTS, c, c.programs_per_sm * PROCESSORS, path)
    else:
        slots, condition = (EXPERTS if build.many else 8), 2 if build.kernel == "decode-auto" else 0
        d = config.decode_config(w, nvidia, slots, PROCESSORS)
        decode.launch(y, x, w, counts, d, 4, condition, path)


def launch_between(kernel: str, y: torch.Tensor) -> None:
    ids = torch.empty(ROWS // 8, 8, dtype=torch.int64, device="meta")
    slots, counts = (torch.empty(n, dtype=torch.int32, device="meta") for n in (ROWS, EXPERTS))
    if kernel == "sort":
        between.sort(slots, slots, slots, counts, ids)
    elif kernel == "combine":
        between.combine(y[: ROWS // 8], y, slots, ids, torch.empty(ids.shape, device="meta"), EXPERTS)
    else:
        between.gate(y[:, : N // 2], y, kernel.removeprefix("gate-"))


def compile_launch(build: Build) -> Any:
    """The build's launch, compiled for its target: what Triton's `JITFunction.run` does before it launches."""
    with recorded() as launches:
        launch(build)
    ((fn, args, kwargs),) = launches
    return compile_call(fn, args, kwargs, TARGETS[build.target])


def compile_call(fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget) -> Any:
    """A kernel as a call compiles it."""
    backend = make_backend(target)
    kwargs = {**kwargs, "debug": False}
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = fn._pack_args(backend, kwargs, bound, specialization, options)
    source = GluonASTSource if fn.is_gluon() else ASTSource
    return triton.compile(source(fn, signature, constants, attributes), target=target, options=options.__dict__)


def compiled(build: Build) -> Result:
    """Compile and read what the assembler made of it."""
    started = time.monotonic()
    kernel = compile_launch(build)
    seconds, shared = time.monotonic() - started, kernel.metadata.shared
    if "cubin" not in kernel.asm:
        return Result(build, seconds, shared)
    sass, usage = (dump(kernel, option) for option in ("-sass", "-res-usage"))
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    operations = collections.Counter(re.findall(r"\b(STL|LDL|HGMMA)\b", sass))
    return Result(
        build, seconds, shared, used["REG"], used["STACK"], operations["STL"] + operations["LDL"], operations["HGMMA"],
        overwritten=len(overwritten(sass)),
    )  # fmt: skip


def dump(kernel: Any, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def attempt(build: Build) -> Result:
    try:
        return compiled(build)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Result(build, 0.0, error=f"{type(error).__name__}: {line}")


def problem(result: Result) -> str:
    """What is wrong with a compiled kernel, or ""."""
    build = result.build
    if result.error:
        return result.error
    if build.kernel == "prefill" and build.target == "sm_90" and not result.hgmma:
        return "no HGMMA: the matrix units of sm_90 are not used"
    if result.overwritten:
        return f"{result.overwritten} instructions write over operands that a matrix instruction may still read"
    if build.target == "sm_90" and result.spills:
        return f"spills: {result.stack} bytes of stack, {result.local} STL/LDL, {result.registers} registers"
    return ""


def full_matrix() -> list[Build]:
    """Every kernel x format x dtype x layout x target; scales of another dtype and ragged K for sm_90 and gfx942."""
    builds = []
    for target, dtype in itertools.product(TARGETS, ("bf16", "fp16")):
        builds += [Build(kernel, target, dtype=dtype, scales=dtype) for kernel in ("schedule", *BETWEEN)]
        builds += [
            Build("permute", target, fmt, "public", dtype, dtype) for fmt in ("int8_sym", "int4_sym", "int2_sym")
        ]
        for fmt, layout in itertools.product(QUANTIZED, ("tiles", "public")):
            builds.append(Build("decode", target, fmt, layout, dtype, dtype, many=True))
        for kernel in ("prefill", "decode", "decode-auto"):
            builds += [Build(kernel, target, dtype, layout, dtype, dtype) for layout in ("strided", "transposed")]
            for fmt, layout in itertools.product(QUANTIZED, ("tiles", "public")):
                builds.append(Build(kernel, target, fmt, layout, dtype, dtype))
            for fmt in ("int8_sym", "fp8_e4m3", "fp8_e5m2"):
                builds.append(Build(kernel, target, fmt, "transposed", dtype, dtype))
    for target, kernel, fmt in itertools.product(("sm_90", "gfx942"), ("prefill", "decode"), QUANTIZED):
        builds += [Build(kernel, target, fmt, "tiles", "bf16", scales) for scales in ("fp16", "fp32")]
        builds += [Build(kernel, target, fmt, "tiles", group=group) for group in (16, 32, 64, None)]
        builds += [Build(kernel, target, fmt, "public", group=16, k=1552)]
    return builds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--triton", nargs="+", default=["installed"], metavar="VERSION", help="releases (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only builds whose name contains this")
    arguments = parser.parse_args()
    options = ("--jobs", str(arguments.jobs), "--only", arguments.only)
    ok = True
    for version in arguments.triton:
        if version == "installed":
            ok &= compile_all([build for build in full_matrix() if arguments.only in str(build)], arguments.jobs)
        else:
            ok &= with_another(version, *options)
    return int(not ok)


def compile_all(builds: list[Build], jobs: int) -> bool:
    """Compile and print each; whether nothing is wrong."""
    print(f"triton {triton.__version__}: {len(builds)} kernels in {jobs} processes", flush=True)
    started, bad = time.monotonic(), []
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for i, result in enumerate(pool.map(attempt, builds), 1):
            wrong = problem(result)
            bad += [f"{result.build}: {wrong}"] * bool(wrong)
            print(f"{i}/{len(builds)} {'WRONG ' if wrong else ''}{result}", flush=True)
    print(f"triton {triton.__version__}: {len(bad)} of {len(builds)} wrong, {time.monotonic() - started:.0f} s")
    print(*bad, sep="\n", flush=True)
    return not bad


def with_another(version: str, *options: str) -> bool:
    """This command with another Triton in front of the installed one; whether it succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        subprocess.run([*pip, "--target", folder, f"triton=={version}"], check=True)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, __file__, *options]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
