"""Where and how a measurement was made: device, driver, versions, commit, command, cold caches."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from .._version import __version__
from ..tuning import device_name
from .timing import flush_method

__all__ = ["environment", "pick_device", "version_of", "with_threads"]


def pick_device(name: str | None) -> torch.device:
    """A named device, or the accelerator if there is one, else the CPU. ValueError if it is not there."""
    if name in (None, "auto"):
        device = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if device is None else torch.device(device.type, 0)
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("tensors there hold no data")
        if device.type != "cpu":
            device = torch.device(device.type, device.index or 0)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def with_threads(name: str, threads: int) -> str:
    """The `device_name` of a CPU, with another number of threads."""
    return re.sub(r", \d+ threads$", "", name) + f", {threads} threads"


def environment(device: torch.device) -> dict[str, str | None]:
    """Fields of a `Record` that say where, when and by which method; no host names, no paths."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver(device),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "qexperts": __version__,
        "commit": _commit(),
        "command": shlex.join(["qexperts", *(_portable(argument) for argument in sys.argv[1:])]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "flush": flush_method(device),
    }


def _portable(argument: str) -> str:
    """An argument as it may be published: of absolute paths only the name."""
    option, equals, value = argument.partition("=")
    if equals and os.path.isabs(value):
        return f"{option}={Path(value).name}"
    return Path(argument).name if os.path.isabs(argument) else argument


def version_of(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query, None)


def _commit() -> str | None:
    """Commit of the checkout this package runs from, "+dirty" with local changes; None if it is not a checkout.

    Where a copy of the sources runs without its .git (in a container, say), QEXPERTS_COMMIT names it.
    """
    named = os.environ.get("QEXPERTS_COMMIT")
    if named:
        return named
    here = Path(__file__).resolve().parent
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"], here)
    if commit is None or _output(["git", "ls-files", "--error-unmatch", __file__], here) is None:
        return None
    dirty = _output(["git", "status", "--porcelain", "--untracked-files=no"], here)
    return f"{commit}+dirty" if dirty else commit


def _output(command: list[str], cwd: Path | None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
