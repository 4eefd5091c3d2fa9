"""What tests on a GPU share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["no_sync"]


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Any host synchronisation raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
