"""Errors that say where, what was given, what is needed and what to do."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["UnsupportedError"]


class UnsupportedError(RuntimeError):
    """No backend can run a problem that is in itself well formed.

    Attributes:
        reasons: backend name -> why it cannot run.
    """

    def __init__(self, where: str, problem: str, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = [f"{where}: no backend for {problem}."]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        super().__init__("\n".join(lines))
