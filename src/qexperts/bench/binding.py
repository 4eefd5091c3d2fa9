"""What a provider of multiplications owes the benchmark: candidates bound to tensors, or the reason why not."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ..strategies import Take
from .candidates import OWN, Candidate

__all__ = ["Bound", "Provider", "Refused", "of_peer"]


class Refused(Exception):
    """A candidate cannot run; the text is the reason."""


@contextlib.contextmanager
def of_peer(provider: str) -> Iterator[None]:
    """Around what belongs to a provider. Whatever a foreign package raises becomes the reason of a refusal: what was
    raised, and the line that raised it where it says nothing itself. Our own errors stay errors."""
    try:
        yield
    except (Refused, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if provider in OWN:
            raise
        text = " ".join(str(error).split())
        if not text:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{frame.line} ({frame.name})"
        raise Refused(f"{provider}: {type(error).__name__}: {text[:300]}") from error


@dataclasses.dataclass
class Bound:
    """A candidate over fixed tensors.

    Attributes:
        run: issues the work and returns [S, N] in the activation dtype.
        counts: device operations by step kind, counted off the steps that run; empty if the call hides them.
        padded_rows: rows computed beyond the useful ones, or None.
        own_bytes: memory taken for this candidate alone.
        uses_scratch: scratch comes from the benchmark, not from what the package keeps between calls.
        schedule: makes the tile schedule alone, where a run does.
        config: of the kernel.
    """

    run: Callable[[], torch.Tensor]
    counts: Counter[str]
    padded_rows: int | None
    own_bytes: int = 0
    uses_scratch: bool = True
    schedule: Callable[[], object] | None = None
    config: str | None = None


class Provider(Protocol):
    """Who multiplies, for one workload."""

    def refuse(self, candidate: Candidate) -> str | None:
        """Why a candidate cannot run here, or None."""
        ...

    def bind(self, candidate: Candidate, take: Take, dry: bool) -> Bound:
        """Fix the tensors of a candidate; scratch comes from take. A dry binding is never run and costs no work."""
        ...

    def plan(self, candidate: Candidate) -> Callable[[], object] | None:
        """The host planning that a raw candidate does before the clock, from counts on the device; None if none."""
        ...
