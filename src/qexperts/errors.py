"""Errors that say where, what was given, what is needed and what to do."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["UnsupportedError"]


class UnsupportedError(RuntimeError):
    """No backend can run, or no reader can read, what is in itself well formed.

    Attributes:
        reasons: name of a backend or reader -> why it cannot.
    """

    def __init__(self, where: str, problem: str, reasons: Mapping[str, str], *, answer: str = "no backend for") -> None:
        self.reasons = dict(reasons)
        lines = [f"{where}: {answer} {problem}."]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        super().__init__("\n".join(lines))
