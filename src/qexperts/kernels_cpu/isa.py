"""Which instruction sets this machine executes, and which one is used."""

from __future__ import annotations

import functools
import platform

from llvmlite import binding

from .spec import ISA_VARIABLE, Isa

__all__ = ["choose", "executable"]

ORDER = ("avx512_bf16", "avx512", "avx2", "plain")
# What each needs of the processor, in LLVM's names. VBMI looks 8-bit codes up; F16C converts fp16.
_V3 = ("avx2", "fma", "f16c", "bmi2")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512dq", "avx512vl")
NEEDS = {"avx512_bf16": (*_V4, "avx512bf16", "avx512vnni", "avx512vbmi"), "avx512": _V4, "avx2": _V3, "plain": ()}


@functools.cache
def _features() -> dict[str, bool]:
    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know this machine
        return {}


def _missing(name: str) -> list[str]:
    return [feature for feature in NEEDS[name] if not _features().get(feature)]


@functools.cache
def executable() -> tuple[str, ...]:
    """Names of the instruction sets that this machine executes, the best first."""
    return tuple(name for name in ORDER if not _missing(name))


def _zen() -> bool:
    """Whether this is a Zen of AMD. Measured on Zen 4: weights are read up to 1.3 times as fast if they are fetched
    into the second cache, not the first; few rows on public codes of 2 and 4 bits take 0.7 and 0.94 times as long if
    the codes are gathered, since moving quarters of registers costs as much as products. Intel's Xeon is slower so.
    """
    return binding.get_host_cpu_name().startswith("znver")


@functools.cache
def _isa(name: str) -> Isa:
    if name == "plain":
        arm = platform.machine().lower() in ("aarch64", "arm64")
        cpu = binding.get_host_cpu_name() if arm else "x86-64" if "64" in platform.machine() else ""
        return Isa(name, cpu, "", 4, 1, 4 if arm else 2, halves=arm)
    features = ",".join(f"+{feature}" for feature in NEEDS[name])
    if name == "avx2":
        return Isa(name, "x86-64-v3", features, 8, 1, 6, ("int16", "fp32"), near=not _zen())
    dots: tuple[str, ...] = ("int16", "fp32")
    if name == "avx512_bf16":
        dots = ("bf16", "int8", *dots)
        features += ",+fast-dpwssd"  # else LLVM makes two instructions of many a `vpdpwssd`
    cpu = binding.get_host_cpu_name() if dots[0] == "bf16" else "x86-64-v4"
    # 24 accumulators of 32 registers
    return Isa(name, cpu, features, 16, 4, 6, dots, near=not _zen(), gathered_bits=4 if _zen() else 0)


@functools.cache
def choose(forced: str) -> tuple[Isa | None, str]:
    """The instruction set and why; None and why not, for one that cannot be.

    Args:
        forced: what $QEXPERTS_CPU_ISA names, or "".
    """
    if forced:
        if forced not in ORDER:
            return None, f"{ISA_VARIABLE}={forced}; expected one of {', '.join(ORDER)}"
        if missing := _missing(forced):
            return None, f"{ISA_VARIABLE}={forced} needs {', '.join(missing)}, which this CPU lacks; it runs {_runs()}"
        return _isa(forced), f"{ISA_VARIABLE} says so"
    best = executable()[0]
    if best == ORDER[0]:
        return _isa(best), "the best there is"
    better = ORDER[ORDER.index(best) - 1]
    return _isa(best), f"{better} needs {', '.join(_missing(better))}"


def _runs() -> str:
    return ", ".join(executable())
