"""What every test shares: deterministic properties, few threads, GPU tests only on a GPU, timing only on demand."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from hypothesis import HealthCheck, settings

import qexperts

# Derandomized: a red test is red again. No deadline: the first call of a torch operator pays for its lookup.
settings.register_profile(
    "qexperts",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("qexperts")

torch.set_num_threads(1)  # the tests' shapes are too small for more, and pytest-xdist brings its own processes


@pytest.fixture(autouse=True)
def no_known_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test's first call of a kind is checked and selects its backend: tests change what that depends on."""
    monkeypatch.setattr(qexperts.ops, "_BOUND", {})


@pytest.fixture(scope="session")
def interpreter() -> None:
    """What each test needs that runs kernels in Triton's interpreter.

    Up to Triton 3.6 it converts arrays of one element to integers (`tensor.__index__`), which NumPy 2.5 refuses; 3.7
    squeezes them first.
    """
    pytest.importorskip("triton")
    triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 5):
        pytest.skip(f"the interpreter of Triton {triton} does not run with NumPy {numpy}: use Triton 3.7 or NumPy 2.4")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "perf" not in config.option.markexpr:  # not in addopts, whose -m any other -m would replace
        timed = [item for item in items if item.get_closest_marker("perf")]
        items[:] = [item for item in items if item not in timed]
        config.hook.pytest_deselected(items=timed)
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="no accelerator on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
