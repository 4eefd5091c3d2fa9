"""A picture of a whole model: how fast, how large and how good it is in each format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .columns import ms_text, number_text, ratio_text
from .model_records import ModelRecord
from .model_report import ModelRow, kl_text, model_chapters
from .plots import _BLUE, _GREEN, _GREY, _RED, _figure, _plain_axes, _save, _slug, _unique

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class _Panel:
    """What bars show, and what is written beside them."""

    title: str
    value: Callable[[ModelRow], float | None]
    text: Callable[[ModelRow, float], str]
    colour: str
    log: bool = False


def _decode(row: ModelRow) -> str:
    """The faster way to decode that was measured."""
    return "graph" if row.record.median("graph") else "decode"


def _ms(title: str, phase: Callable[[ModelRow], str]) -> _Panel:
    def text(row: ModelRow, value: float) -> str:
        ratio = row.speedup(phase(row))
        return ms_text(value) + (f" ({ratio_text(ratio)})" if ratio else "")

    return _Panel(title, lambda row: row.record.median(phase(row)), text, _BLUE)


_PANELS = (
    _ms("decode, ms a step", _decode),
    _ms("prefill, ms", lambda row: "prefill"),
    _Panel("experts, MiB", lambda row: row.record.expert_bytes, lambda row, v: number_text(v / 2**20), _GREEN),
    _Panel("KL, nats a token (log)", lambda row: row.record.kl, lambda row, v: kl_text(v), _RED, log=True),
)


def plot_models(records: Sequence[ModelRecord], directory: str | Path) -> list[Path]:
    """One figure a run, `model-*`, of records that were timed. Returns the files written."""
    written: list[Path] = []
    for chapter in model_chapters(records):
        rows = [row for row in chapter.sections[0].rows if row.record.median("decode")]
        if rows:
            first = rows[0].record
            name = _unique(f"model-{_slug(first.model)}-batch{first.batch}", [path.stem for path in written])
            written.append(_save(_model(rows, chapter.caption), Path(directory) / f"{name}.png"))
    return written


def _model(rows: Sequence[ModelRow], caption: str) -> Figure:
    """A line for each variant; panels side by side: speed, size and quality of a format."""
    panels = [panel for panel in _PANELS if any(panel.value(row) for row in rows)]
    figure = _figure(3.4 * len(panels) + 1.6, 0.9 + 0.36 * len(rows), f"{rows[0].record.model}, formats", caption)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, rows, panel)
    names = [f"{row.record.format}, {row.record.implementation or row.record.provider}" for row in rows]
    grid[0].set_yticks(range(len(rows)), names, fontsize=9.5)
    grid[0].invert_yaxis()
    return figure


def _draw(axes: Axes, rows: Sequence[ModelRow], panel: _Panel) -> None:
    values = [panel.value(row) for row in rows]
    drawn = [v for v in values if v]
    _plain_axes(axes)
    axes.grid(visible=False)
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=False, length=0, which="both")  # each bar has its number
    low, high = min(drawn), max(drawn)
    if panel.log:
        axes.set(xscale="log", xlim=(low / 3, high * 3 * (high / low) ** 0.35))
    else:
        axes.set_xlim(0, high * 1.5)
    for y, (row, v) in enumerate(zip(rows, values, strict=True)):
        if v:
            axes.barh(y, v, 0.68, color=_GREY if row.record.is_reference else panel.colour)
        axes.annotate(
            "-" if v is None else panel.text(row, v), (v or (low / 3 if panel.log else 0), y), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9, color="#222222",
        )  # fmt: skip
