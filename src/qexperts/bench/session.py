"""A benchmark run as a person sees it: progress, the report, plots, and what an interrupt leaves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .model_plots import plot_models
from .model_records import ModelRecord
from .model_report import model_chapters, render_models
from .plots import plot_all
from .records import Record
from .report import chapters, render, show
from .run import Job, run
from .workloads import LayerWorkload, Workload

if TYPE_CHECKING:
    from .model import ModelJob

__all__ = ["bench_session", "plot_records", "print_records", "reported"]


def bench_session(job: Job, out: str) -> int:
    """Measure, print, plot. Returns the exit code: 0, 1 if a result was WRONG, 130 if interrupted."""
    console = Console(stderr=True)
    found: list[Record] = []

    def measure() -> None:
        with _Progress(console, len(job.workloads)) as progress:
            for record in run(job, progress.tick, lambda text: console.print(text, style="yellow", highlight=False)):
                found.append(record)

    return reported(job, measure, found, (out, job.options.mode), console)


def reported(
    job: Job | ModelJob,
    measure: Callable[[], None],
    found: Sequence[Record | ModelRecord],
    report: tuple[str, str],
    console: Console,
) -> int:
    """Measure, which fills `found`; print and plot that, also what an interrupt leaves.

    report: how to print, and which mode. Returns the exit code, as `bench_session`.
    """
    code = 0
    try:
        measure()
    except KeyboardInterrupt:
        code = 130
        saved = f", kept in {job.options.save}" if job.options.save else ""
        unit = "rows measured" if isinstance(job, Job) else "variants"
        console.print(f"interrupted: {len(found)} {unit} so far{saved}", style="yellow", highlight=False)
    finally:
        job.writer.close()
    if found:
        print_records(found, *report)
    if found and job.options.plot is not None and code == 0:
        plot_records(found, job.options.plot)
    return code or int(any(r.status == "WRONG" for r in found))


def print_records(found: Sequence[Record | ModelRecord], out: str, mode: str) -> None:
    """The report of records on stdout; whole models have columns of their own, and a csv or json of their own."""
    plain, models = _by_class(found)
    if plain and models and out in ("csv", "json"):
        raise ValueError(f"--out {out}: the records are of several kinds; show each kind by itself")
    if out == "table":
        show([*chapters(plain, mode), *model_chapters(models)], Console())  # type: ignore[arg-type]
        return
    texts = [render(plain, out, mode)] if plain else []  # type: ignore[arg-type]
    texts += [render_models(models, out)] if models else []  # type: ignore[arg-type]
    sys.stdout.write("\n".join(map(str, texts)) + ("" if out in ("csv", "json") else "\n"))


def _by_class(found: Sequence[Record | ModelRecord]) -> tuple[list[Record], list[ModelRecord]]:
    return [r for r in found if isinstance(r, Record)], [r for r in found if isinstance(r, ModelRecord)]


def plot_records(found: Sequence[Record | ModelRecord], directory: str) -> None:
    """PNG files of records."""
    plain, models = _by_class(found)
    counts = {r.distribution: r.num_tokens_per_expert for r in plain}
    for path in [*plot_all(plain, counts, directory), *plot_models(models, directory)]:
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
