"""How a trace looks: the load of each layer, in the terminal and as a picture."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..traces import PHASES, Trace, unevenness
from .columns import Column, count_text, number_text, ratio_text
from .plots import _figure, _save, _slug
from .report import Chapter, Section, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["plot_trace", "read_trace", "show_trace"]

_BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 32  # characters of a load


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer in one phase: rows of each expert, summed over the steps."""

    index: int
    name: str
    counts: list[int] | None

    @property
    def sorted(self) -> list[int]:
        return sorted(self.counts or (), reverse=True)


def read_trace(path: str) -> Trace:
    """A trace from a file. Raises: ValueError, one line that names the file; OSError."""
    try:
        data = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected a trace") from None
    return Trace.of(data, path)


def _layers(trace: Trace, phase: str) -> list[_Layer]:
    return [_Layer(i, name, trace.counts(i, phase)) for i, name in enumerate(trace.layers)]


def load_text(counts: Sequence[int], width: int = WIDTH) -> str:
    """Rows of experts as bars, largest first, each the mean of as many neighbours as it takes to fit the width; an
    expert without rows is a blank."""
    ordered = sorted(counts, reverse=True)
    share = -(-len(ordered) // width)
    means = [statistics.fmean(ordered[i : i + share]) for i in range(0, len(ordered), share)]
    top = max(means) or 1
    return "".join(_BARS[0 if m == 0 else max(1, round(m / top * 8))] for m in means)


_COLUMNS = [
    Column("layer", "layer", "", lambda row: row.index, str),
    Column("rows", "rows", "", lambda row: row.counts and sum(row.counts), count_text),
    Column("experts", "experts", "", lambda row: row.counts and len(row.counts), count_text),
    Column("empty", "empty", "", lambda row: row.counts and sum(n == 0 for n in row.counts), count_text),
    Column("mean", "mean", "rows", lambda row: row.counts and statistics.fmean(row.counts), number_text),
    Column("max", "max", "rows", lambda row: row.counts and max(row.counts), count_text),
    Column("uneven", "max /\nmean", "", lambda row: row.counts and unevenness(row.counts), ratio_text),
    Column("load", "rows of each expert, sorted", "", lambda row: row.counts and load_text(row.counts), str, "left"),
]


def trace_chapter(trace: Trace) -> Chapter:
    """A table of the prefill and one of all decode steps together."""
    steps = {phase: [s for s in trace.steps if s.phase == phase] for phase in PHASES}
    sections = []
    for phase, found in steps.items():
        if found:
            tokens = sum(s.tokens for s in found)
            title = f"{phase}, {tokens:,} tokens" + (f" in {len(found)} steps" if phase == "decode" else "")
            sections.append(Section(title, _COLUMNS, _layers(trace, phase)))
    caption = f"{trace.model}: {len(trace.layers)} layers of experts, top_k {trace.top_k}"
    notes = [] if trace.complete else ["interrupted: the last step may lack layers"]
    return Chapter(caption, sections, notes)


def show_trace(trace: Trace, console: Console) -> None:
    """Print the load of each layer."""
    show([trace_chapter(trace)], console)


def plot_trace(trace: Trace, name: str, directory: str | Path) -> Path:
    """Write `trace-NAME.png`: for each phase, experts of each layer by load, and max / mean beside them."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return _save(_heat(trace), folder / f"trace-{_slug(name)}.png")


def _heat(trace: Trace) -> Figure:
    from matplotlib.colors import SymLogNorm

    phases = [phase for phase in PHASES if any(s.phase == phase for s in trace.steps)]
    tall = max(2.4, 0.17 * len(trace.layers) + 1.2)
    figure = _figure(6.2 * len(phases) + 0.4, tall, f"Load of the experts, {trace.model}", trace_chapter(trace).caption)
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False).ravel(), phases, strict=True):
        rows = _layers(trace, phase)
        wide = max(len(row.sorted) for row in rows)
        blank = [float("nan")] * wide
        loads = [[n / (statistics.fmean(row.sorted) or 1) for n in row.sorted] if row.counts else blank for row in rows]
        top = max((v for load in loads for v in load if v == v), default=1.0)
        image = axes.imshow(
            [load + blank[len(load) :] for load in loads], aspect="auto", cmap="viridis", interpolation="nearest",
            norm=SymLogNorm(linthresh=0.25, vmin=0, vmax=max(top, 1.0)),
        )  # fmt: skip
        axes.set_title(f"{phase}: rows of an expert over the layer's mean", fontsize=10.5, loc="left")
        axes.set_xlabel("experts, by number of rows", fontsize=9.5)
        axes.set_ylabel("layer", fontsize=9.5)
        if len(rows) <= 16:
            axes.set_yticks(range(len(rows)))
        axes.tick_params(labelsize=9)
        right = axes.secondary_yaxis("right")
        step = -(-len(rows) // 24)
        shown = [row for row in rows[::step] if row.counts]
        texts = [f"{unevenness(row.sorted):.1f}x, {row.sorted.count(0)} empty" for row in shown]
        right.set_yticks([row.index for row in shown], texts, fontsize=8.5)
        right.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[t for t in (0, 0.25, 0.5, 1, 2, 4, 8, 16) if t <= top])
        bar.ax.set_yticklabels([f"{t:g}" for t in bar.get_ticks()], fontsize=8.5)
        bar.ax.minorticks_off()
    return figure
