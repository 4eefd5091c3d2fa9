"""Find or make the Python environment of a make target and print its interpreter.

    python3 scripts/bootstrap.py EXTRA [--wish EXTRA] [--torch SPEC]        EXTRA: an extra of pyproject.toml

The environment is the active one ($VIRTUAL_ENV, or the interpreter running this if it is a virtual environment's), else
.venv beside pyproject.toml, made at first use; where the base interpreter has torch, .venv sees its packages. Then pip
installs the requirements of the core and of EXTRA that are not satisfied; with none, pip is not called. In an
environment that is not ours nothing else changes: torch, and the Triton that belongs to it, are never replaced, and
qexperts itself is not installed. What --wish names is installed too, but only said to be missing where it cannot be (no
network): the package works without it.

Standard output holds the interpreter's path alone; progress goes to standard error. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / ".venv"
PROJECT = "qexperts"
# One tested release, and only where there is no torch yet; pip takes the build that its index has for this platform.
TORCH = "torch==2.13.0"
# Another version of these may break the environment that they are found in.
KEPT = ("torch", "triton")


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    say(text)
    raise SystemExit(1)


def call(*command: str) -> bool:
    """Run a command with its output on standard error; whether it succeeded."""
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0


def interpreter(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def runs(python: Path) -> bool:
    """Whether this interpreter starts: the base of a virtual environment may have been removed."""
    return python.exists() and call(str(python), "-c", "")


def find_environment() -> Path:
    """The interpreter of the active environment, else of .venv, which is made if need be."""
    active = os.environ.get("VIRTUAL_ENV")
    if active and runs(interpreter(Path(active))):
        return interpreter(Path(active))
    if active:
        say(f"VIRTUAL_ENV={active} has no working interpreter; ignored.")
    if sys.prefix != sys.base_prefix:
        return Path(sys.executable)
    if not runs(interpreter(OWN)):
        make_own()
    return interpreter(OWN)


def make_own() -> None:
    try:
        options = ["--system-site-packages"]
        say(f"making {OWN} on top of the installed torch {importlib.metadata.version('torch')}")
    except importlib.metadata.PackageNotFoundError:
        options = []
        say(f"making {OWN}")
    if not call(sys.executable, "-m", "venv", "--clear", *options, str(OWN)):
        shutil.rmtree(OWN, ignore_errors=True)
        fail(f"{sys.executable} -m venv failed; it needs the venv and ensurepip modules (Debian: python3-venv)")


def first_of(*names: str) -> ModuleType | None:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def need(*names: str) -> ModuleType:
    """The first of these modules there is; the last is pip's own copy, for which pip is installed if missing."""
    module = first_of(*names)
    if module is None and call(sys.executable, "-m", "ensurepip"):
        importlib.invalidate_caches()
        module = first_of(*names)
    return module or fail(f"{sys.executable} has neither pip nor ensurepip; install pip into this environment")


def requirements(project: dict, extra: str) -> list[str]:
    """Requirements of the core and of an extra, with the extras of this project that it names written out."""
    parse = need("packaging.requirements", "pip._vendor.packaging.requirements").Requirement

    def expand(line: str) -> list[str]:
        requirement = parse(line)
        if requirement.name != PROJECT:
            return [line]
        inner = (item for name in sorted(requirement.extras) for item in project["optional-dependencies"][name])
        return [found for item in inner for found in expand(item)]

    return [*project["dependencies"], *expand(f"{PROJECT}[{extra}]")]


def unsatisfied(lines: list[str]) -> dict[str, str]:
    """Name -> requirement, of those that this environment does not meet."""
    parse = need("packaging.requirements", "pip._vendor.packaging.requirements").Requirement
    version = need("packaging.version", "pip._vendor.packaging.version").Version
    found = {}
    for line in lines:
        requirement = parse(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        installed = installed_version(requirement.name)
        # Vendors call their own builds of 2.10 "2.10.0a0+...", which counts as 2.10 here.
        if installed is None or version(installed).base_version not in requirement.specifier:
            found[requirement.name] = line
    return found


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install(missing: dict[str, str], torch: str) -> None:
    own = Path(sys.prefix).resolve() == OWN.resolve()
    for name in KEPT:
        there = installed_version(name)
        if name in missing and there and not own:
            fail(
                f"{name} {there} is installed in {sys.prefix}; {PROJECT} needs {missing[name]} and does not replace "
                f"yours; deactivate the environment (then .venv is used) or change its {name} yourself"
            )
    if "torch" in missing:
        missing = {**missing, "torch": torch}
    wanted = list(missing.values())
    say(f"installing into {sys.prefix}: {', '.join(wanted)}")
    need("pip")
    pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check")
    if not call(*pip, *wanted):
        fail("pip could not install them: see its message above")
    if own and not installed_version(PROJECT) and not call(*pip, "--no-deps", "--editable", str(ROOT)):
        fail(f"pip could not install {PROJECT} itself: see its message above")


def wish(lines: list[str]) -> None:
    """Install what is missing of an extra that the package works without, in one short try."""
    missing = unsatisfied(lines)
    if not missing or any(name in missing for name in KEPT):
        return
    need("pip")
    say(f"installing into {sys.prefix}: {', '.join(missing.values())}")
    pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--retries", "0", "--timeout", "10")
    if not call(*pip, *missing.values()):
        say(f"going on without {', '.join(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extra", help="extra of pyproject.toml whose requirements must be there")
    parser.add_argument(
        "--torch", default=TORCH, metavar="SPEC", help=f"what to install if there is no torch ({TORCH})"
    )
    parser.add_argument("--wish", metavar="EXTRA", help="extra that is installed if it can be")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (the one place where an older Python may arrive)
        fail(f"{sys.executable} is Python {sys.version.split()[0]}; 3.10 or newer is needed; name one: make PYTHON=...")
    if not arguments.inside:
        python = str(find_environment())
        os.execv(python, [python, __file__, "--inside", *sys.argv[1:]])
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = need("tomllib", "tomli", "pip._vendor.tomli").load(file)["project"]
    extras = project["optional-dependencies"]
    if unknown := {arguments.extra, arguments.wish or arguments.extra} - set(extras):
        parser.error(f"{', '.join(sorted(unknown))} is not an extra of pyproject.toml; there are {', '.join(extras)}")
    lines = requirements(project, arguments.extra)
    if missing := unsatisfied(lines):
        install(missing, arguments.torch)
        importlib.invalidate_caches()
        if missing := unsatisfied(lines):
            fail(f"still not satisfied after pip: {', '.join(missing.values())}")
    if arguments.wish:
        wish(requirements(project, arguments.wish))
    print(sys.executable)


if __name__ == "__main__":
    main()
