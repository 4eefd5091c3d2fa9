"""Rules of the package as a whole: import direction, import cost, one version, sizes, bounded requirements."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PACKAGE = SRC / "qexperts"
FILES = sorted(PACKAGE.rglob("*.py"))

# Data flows downward: a module may import from its own entry and from those before it, never from one after it.
LAYERS = (
    "errors",
    "files",
    "formats",
    "pages",
    "layouts",
    "quantize",
    "workspace",
    "traces",
    "routing",
    "plan",
    "reference",
    "tuning",
    "kernels",
    "kernels_cpu",
    "strategies",
    "backends",
    "checks",
    "ops",
    "library",
    "steps",
    "layer",
    "testing",
    "integrations",
    "bench",
    "cli",
    "data",
)
EXEMPT = ("__init__", "__main__", "_version")

# These mirror the calls that ARK's users have today, argument for argument.
MANY_PARAMETERS = {"moe_gemm_prefill", "moe_gemm_decode", "moe"}


def test_imports_point_upward() -> None:
    wrong = [problem for path in FILES for problem in import_problems(path.relative_to(SRC), path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("plan.py", "from qexperts.formats import FORMATS", None),
        ("plan.py", "import qexperts.ops", "imports ops"),
        ("plan.py", "from .ops import moe", "imports ops"),
        ("plan.py", "from . import errors, ops", "imports ops"),
        ("plan.py", "from qexperts import layer", "imports layer"),
        ("plan.py", "from qexperts import TokenPlan", "imports the package root"),
        ("plan.py", "import qexperts", "imports the package root"),
        ("plan.py", "from qexperts._version import __version__", None),
        ("plan.py", "def f():\n    if True:\n        from .bench.timing import measure", "imports bench"),
        ("plan.py", "import importlib\nimportlib.import_module('qexperts.cli')", "imports cli"),
        ("plan.py", "import torch, json.decoder\nfrom os import path", None),
        ("plan.py", "from .plans import x", "imports plans, which LAYERS lacks"),
        ("extra.py", "import torch", "extra is not in LAYERS"),
        ("bench/report.py", "from . import timing\nfrom .timing import measure\nfrom ..ops import moe", None),
        ("bench/__init__.py", "from .timing import measure", None),
        ("bench/__init__.py", "from ..cli import main", "imports cli"),
        ("bench/deep/report.py", "from ...cli import main", "imports cli"),
        ("kernels/gpu.py", "from .. import strategies", "imports strategies"),
        ("__init__.py", "from .cli import main", None),
        ("__main__.py", "from .cli import main", None),
    ],
)
def test_the_import_rule_sees(path: str, source: str, problem: str | None) -> None:
    """The rule above is only as good as the parser: every way of writing an import."""
    found = import_problems(Path("qexperts", path), source)
    assert len(found) == (problem is not None), found
    assert not problem or problem in found[0]


def import_problems(path: Path, source: str) -> list[str]:
    """What breaks the import direction in a file; path is relative to src."""
    names = path.with_suffix("").parts
    own = names[1]
    if own in EXEMPT:
        return []
    if own not in LAYERS:
        return [f"{path}: {own} is not in LAYERS; every module has a place in the list"]
    problems = []
    for line, target in imported_names(ast.parse(source), names[:-1]):
        root, _, rest = target.partition(".")
        layer = rest.partition(".")[0]
        if root != "qexperts" or layer == "_version":
            continue
        if target.count(".") < 2 and layer not in LAYERS:
            problems.append(f"{path}:{line} imports the package root, which imports everything; name the module")
        elif layer not in LAYERS:
            problems.append(f"{path}:{line} imports {layer}, which LAYERS lacks")
        elif LAYERS.index(layer) > LAYERS.index(own):
            problems.append(f"{path}:{line} imports {layer}, which is below {own}")
    return problems


def imported_names(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports, at any depth; package is what holds the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            literals = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield from ((node.lineno, name) for name in literals if isinstance(name, str))


IMPORT_PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import qexperts
print(json.dumps([time.perf_counter() - start, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def test_importing_is_cheap() -> None:
    """Less than 0.3 s beyond torch, the best of three processes, and none of the optional packages."""
    # Without bytecode every process would compile the sources anew, which no user's does.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPATH"] = str(SRC)
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT_PROBE], env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        cost, added = json.loads(run.stdout)
        assert not {"triton", "transformers", "matplotlib", "rich", "click", "llvmlite"} & set(added)
        seconds.append(cost)
    assert min(seconds) < 0.3, seconds


def test_one_version() -> None:
    import qexperts

    namespace: dict[str, str] = {}
    exec((PACKAGE / "_version.py").read_text(), namespace)
    assert qexperts.__version__ == namespace["__version__"]
    try:
        installed = importlib.metadata.version("qexperts")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == qexperts.__version__, "the version has changed since qexperts was installed: install it again"


def test_sizes() -> None:
    """No file over 600 lines, no function over 60, no call with more than 10 parameters (but of device code, which can
    pass no records)."""
    wrong = []
    for path in FILES:
        source, name = path.read_text(), path.relative_to(SRC)
        if (lines := source.count("\n")) > 600:
            wrong.append(f"{name}: {lines} lines; 600 are allowed")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = f"{name}:{node.lineno} {node.name}"
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > 60:
                wrong.append(f"{where}: {lines} lines; 60 are allowed")
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            device_code = any("triton.jit" in text or "gluon.jit" in text for text in decorators)
            if (count := parameter_count(node.args)) > 10 and node.name not in MANY_PARAMETERS and not device_code:
                wrong.append(f"{where}: {count} parameters; 10 are allowed")
    assert not wrong, "\n".join(wrong)


def parameter_count(args: ast.arguments) -> int:
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + (args.vararg is not None) + (args.kwarg is not None)


def test_every_requirement_is_bounded() -> None:
    """An extra, its extras written out, names a lower and an upper bound for everything; the core is torch alone."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec and spec.loader
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = bootstrap.need("tomllib", "tomli", "pip._vendor.tomli").load(file)["project"]
    assert project["dependencies"] == ["torch>=2.9,<3"]
    for extra, lines in project["optional-dependencies"].items():
        written_out = bootstrap.requirements(project, extra)
        assert all(">=" in line and "<" in line for line in written_out), (extra, written_out)
        assert len(written_out) >= 1 + len([line for line in lines if not line.startswith("qexperts[")])
    assert set(bootstrap.requirements(project, "bench")) < set(bootstrap.requirements(project, "test"))
    assert not any("ruff" in line or "pyright" in line for line in bootstrap.requirements(project, "test"))
