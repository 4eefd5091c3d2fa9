"""A measurement of a whole model as a person sees it: progress, the report, plots, and what an interrupt leaves."""

from __future__ import annotations

import time
from collections.abc import Callable

import transformers
from rich.console import Console

from .model import ModelJob, measure_model
from .model_records import ModelRecord
from .model_report import slow
from .session import reported

__all__ = ["model_session", "progress"]


def progress(console: Console) -> Callable[[str], None]:
    """Lines of what happens now, with the time since the start, on stderr."""
    started = time.monotonic()

    def tick(text: str) -> None:
        console.print(f"[{time.monotonic() - started:6.1f} s] {text}", highlight=False, markup=False)

    return tick


def model_session(job: ModelJob, out: str) -> int:
    """Measure, print, plot. Returns the exit code: 0; 1 if a variant was WRONG, or a decode of ours breaks the guard;
    130 if interrupted."""
    console = Console(stderr=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: list[ModelRecord] = []
    code = reported(job, lambda: measure_model(job, found, progress(console)), found, (out, "summary"), console)
    return code or int(bool(slow(found)))
