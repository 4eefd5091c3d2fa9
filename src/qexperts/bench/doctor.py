"""What this machine has and what runs on it: `qexperts doctor` and `qexperts formats`."""

from __future__ import annotations

import dataclasses
import platform

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..backends import BACKENDS, Problem, cpu_backend, triton_backend
from ..formats import FORMATS, WeightFormat, check_group_size
from ..tuning import device_name, profiles
from . import cpu_peers, ggml, humming
from .environment import environment, pick_device, version_of
from .roofline import measure_ceilings
from .workloads import DTYPES, PROJECTIONS

__all__ = ["devices", "doctor", "formats_table"]

_FORMAT_COLUMNS = ("format", "stored", "codes", "scales", "zeros", "bits/weight", "of bf16")


def devices() -> list[tuple[str, str]]:
    """(kind, what was found): every kind of device this package is written for, present or not."""
    found = [("CPU", device_name(torch.device("cpu")))]
    hip = torch.version.hip is not None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    capability = ""
    if names and not hip:
        capability = " (sm_{}{})".format(*torch.cuda.get_device_capability(0))
    here = ", ".join(names) + capability
    found.append(("NVIDIA GPU", here if names and not hip else "none here"))
    found.append(("AMD GPU", here + "; never run on real hardware" if names and hip else "none here; never run on one"))
    xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    found.append(
        ("Intel GPU", f"{torch.xpu.get_device_name(0)}; never run on one" if xpu else "none here; never run on one")
    )
    return found


def doctor(console: Console, device_text: str | None, dtype: str) -> None:
    """Print devices, versions, ceilings, and what each backend answers for each format."""
    device = pick_device(device_text)
    env = environment(device)
    table = Table("device", "found", title="Devices", title_justify="left", box=SIMPLE_HEAD)
    for row in devices():
        table.add_row(*row)
    console.print(table)
    versions = [f"qexperts {env['qexperts']}", f"Python {env['python']}", f"torch {env['torch']}"]
    versions += [_triton(env["triton"]), f"driver {env['driver'] or '-'}", platform.platform()]
    console.print("Versions: " + ", ".join(versions), highlight=False, soft_wrap=True)
    console.print(f"Peers: {_peer()}", highlight=False, soft_wrap=True)
    console.print(f"CPU kernels: {cpu_backend.describe()}", highlight=False, soft_wrap=True)
    console.print(f"Profiles: {_profiles(device)}", highlight=False, soft_wrap=True)
    ceilings = measure_ceilings(device, DTYPES[dtype])
    read = f", read {ceilings.read_gbps:,.0f} GB/s" if ceilings.read_gbps else ""
    console.print(
        f"Ceilings measured on {env['device']}: {dtype} matmul {ceilings.tflops:,.2f} TFLOP/s, copy "
        f"{ceilings.copy_gbps:,.0f} GB/s (read + written){read}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_matrix(device, dtype))


def _triton(version: str | None) -> str:
    if version is None:
        return "triton not installed"
    return f"triton {version}" + (" in its interpreter (TRITON_INTERPRET)" if triton_backend.interpreted() else "")


def _profiles(device: torch.device) -> str:
    """What `qexperts tune` left, and whether it is used here."""
    found = [f"{p.path}: {p.unused or f'{len(p.entries)} cases'}" for p in profiles(device)]
    return "; ".join(found) or "none, rules alone (qexperts tune makes one)"


def _peer() -> str:
    """Whether the packages of the peers are there; who can use them says the benchmark."""
    packages = [peer.PACKAGE for peer in (humming, cpu_peers, ggml)]
    found = [f"{package} {version_of(package) or 'not installed'}" for package in packages]
    return "; ".join([*found, "torch's own grouped mm, and its oneDNN on prepacked weights"])


def _matrix(device: torch.device, dtype: str) -> Table:
    """Each backend on weights in its own layout. Formats with equal answers share a row."""
    n, k = PROJECTIONS[0]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, backend in BACKENDS.items():
        for fmt in FORMATS.values():
            cells = []
            for phase, s in (("prefill", 31440), ("decode", 8)):
                layout = backend.layout if fmt.quantized else "public"
                problem = _problem(fmt, device, dtype, phase, s, n, k)
                answer = backend.answer(dataclasses.replace(problem, weight_layout=layout))
                sync = " [yellow](host sync)[/]" if answer.syncs else ""
                cells.append(f"[green]yes[/]: {answer.note}{sync}" if answer.ok else f"[red]no[/]: {answer.reason}")
            rows.setdefault((name, *cells), []).append(fmt.name)
    title = f"What runs on {device} with {dtype} activations (N={n} K={k}, group 128, 256 experts, prepared weights)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_lines=True)
    for column in ("backend", "formats", "prefill, 31,440 rows", "decode, 8 rows"):
        table.add_column(column, overflow="fold")
    for (name, *cells), formats in rows.items():
        table.add_row(name, ", ".join(formats), *cells)
    return table


def _problem(fmt: WeightFormat, device: torch.device, dtype: str, phase: str, rows: int, n: int, k: int) -> Problem:
    group = 128 if fmt.quantized else None
    scale = DTYPES[dtype] if fmt.quantized else None
    return Problem("doctor", fmt, DTYPES[dtype], device, rows, 256, n, k, group, scale_dtype=scale, phase=phase)


def formats_table(group_size: int) -> Table:
    """The formats of this package, with what a weight costs at a group size (16-bit scales and zeros)."""
    check_group_size("--group-size", FORMATS["int2_sym"], group_size, group_size)
    table = Table(
        title=f"Weight formats, group size {group_size}, 16-bit scales and zero points", title_justify="left",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for column in _FORMAT_COLUMNS:
        table.add_column(column, justify="right" if column in ("bits/weight", "of bf16") else "left", no_wrap=True)
    for f in FORMATS.values():
        bits = f.bits + (16 * (1 + f.asym) / group_size if f.quantized else 0.0)
        stored = str(f.storage).removeprefix("torch.") + (f", {f.codes_per_byte} a byte" if f.kind == "int" else "")
        codes = f"{f.code_min}..{f.code_max}" if f.quantized else "-"
        has = ("yes" if f.quantized else "-", "yes" if f.asym else "-")
        table.add_row(f.name, stored, codes, *has, f"{bits:.3f}", f"{bits / 16:.1%}")
    return table
