"""A benchmark run as a person sees it: progress, the report, plots, and what an interrupt leaves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .plots import plot_all
from .records import Record
from .report import chapters, render, show
from .run import Job, run
from .workloads import LayerWorkload, Workload

__all__ = ["bench_session", "plot_records", "print_records"]


def bench_session(job: Job, out: str) -> int:
    """Measure, print, plot. Returns the exit code: 0, 1 if a result was WRONG, 130 if interrupted."""
    console = Console(stderr=True)
    found: list[Record] = []
    code = 0
    try:
        with _Progress(console, len(job.workloads)) as progress:
            for record in run(job, progress.tick):
                found.append(record)
    except KeyboardInterrupt:
        code = 130
        saved = f", kept in {job.options.save}" if job.options.save else ""
        console.print(f"interrupted: {len(found)} rows measured so far{saved}", style="yellow", highlight=False)
    finally:
        job.writer.close()
    if found:
        print_records(found, out, job.options.mode)
    if found and job.options.plot is not None and code == 0:
        plot_records(found, job.options.plot)
    return code or int(any(r.status == "WRONG" for r in found))


def print_records(found: Sequence[Record], out: str, mode: str) -> None:
    """The report of records on stdout."""
    if out == "table":
        show(chapters(found, mode), Console())  # type: ignore[arg-type]
        return
    sys.stdout.write(str(render(found, out, mode)))  # type: ignore[arg-type]
    sys.stdout.write("" if out in ("csv", "json") else "\n")


def plot_records(found: Sequence[Record], directory: str) -> None:
    """PNG files of records."""
    counts = {r.distribution: r.num_tokens_per_expert for r in found}
    for path in plot_all(found, counts, directory):
        Console(stderr=True).print(f"plot: {path}", highlight=False, soft_wrap=True)


class _Progress:
    """A bar on a terminal; elsewhere a line per workload, on stderr, so that stdout stays the report."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._last = -1
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)
        self.tick: Callable[[Workload | LayerWorkload, int, str], None] = (
            self._draw if console.is_terminal else self._log
        )

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def _draw(self, workload: Workload | LayerWorkload, index: int, text: str) -> None:
        self._bar.update(self._task, completed=index, description=f"{workload.title}: {text}")

    def _log(self, workload: Workload | LayerWorkload, index: int, text: str) -> None:
        if index != self._last:
            self._last = index
            elapsed = time.monotonic() - self._started
            self._console.print(
                f"[{elapsed:6.1f} s] {index + 1}/{self._total} {workload.title}", highlight=False, markup=False
            )
