"""Triton decides when a kernel is imported whether it is interpreted: these tests have a process of their own.

TRITON_INTERPRET=1 pytest tests/interpreter
"""

from __future__ import annotations

import importlib.util
import os

import pytest

collect_ignore_glob: list[str] = []
if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(scope="session", autouse=True)
def interpreted(interpreter: None) -> None:
    """Every test here runs kernels in the interpreter."""
