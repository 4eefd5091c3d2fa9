"""Launching a kernel again without Triton's look-up.

Triton finds the compiled kernel of a call by inspecting every argument, which costs more host time than a decode
kernel runs. A caller that knows what the compiled kernel depends on (dtypes, alignment, sizes, constants) passes that
as a key; the first call of a key goes through Triton, later ones straight to the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Launcher"]


class Launcher:
    """Launches of one @triton.jit function."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[object, tuple[Any, tuple[object, ...]]] = {}

    def __call__(
        self,
        key: object,
        grid: tuple[int, int, int],
        args: tuple[object, ...],
        constants: Callable[[], dict[str, object]],
        warps: int,
    ) -> None:
        """Launch on the current device and stream.

        Args:
            key: hashable; equal only for calls that may share a compiled kernel, device included.
            args: the arguments before the constants, in order.
            constants: makes the constants (tl.constexpr), in order.
        """
        known = self._known.get(key)
        if known is None:
            made = constants()
            # said explicitly, since its default changes between Triton releases
            compiled = self._kernel[grid](*args, **made, num_warps=warps, enable_fp_fusion=True)
            if compiled is not None:  # the interpreter compiles nothing
                self._known[key] = compiled, tuple(made.values())
            return
        compiled, values = known
        compiled[grid](*args, *values)
