"""Triton decides when a kernel is imported whether it is interpreted: these tests have a process of their own.

TRITON_INTERPRET=1 pytest tests/interpreter
"""

from __future__ import annotations

import importlib.util
import os

collect_ignore_glob: list[str] = []
if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_*.py")
