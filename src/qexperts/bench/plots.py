"""Plots of records as PNG files; matplotlib is imported when a plot is drawn, and needs no display."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .columns import ms_text, time_of
from .records import Record
from .report import caption, fastest, newest, paid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any kind of colour vision
_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _RED, _PINK, _GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#767676",
)  # fmt: skip
_CURVES = {None: (_BLUE, "o"), "before": (_SKY, "s"), "inside": (_BLUE, "o")}  # by gather: colour, marker
_LINES = (  # strategy, graph, label, colour
    ("per_expert", False, "per_expert", _RED),
    ("per_expert", True, "per_expert, graph", _ORANGE),
    ("grouped", False, "grouped", _GREEN),
)
_BARS = (  # strategy, graph, label, colour
    ("per_expert", False, "per_expert", _RED),
    ("per_expert", True, "per_expert, graph", _ORANGE),
    ("pad_and_clip", False, "pad_and_clip at its best threshold", _BLUE),
    ("full_pad", False, "full_pad", _PINK),
    ("grouped", False, "grouped", _GREEN),
)
_THRESHOLDS = (64, 128, 256, 512, 1024)


def plot_all(records: Sequence[Record], counts: Mapping[str, Sequence[int]], directory: str | Path) -> list[Path]:
    """Draw what the records and the token counts allow.

    Args:
        records: of any kind; latency and strategies are drawn for prefill, once per workload and projection.
        counts: distribution -> rows of each expert.
        directory: made if missing; files of equal name are replaced.
    Returns: the files written: `latency-*`, `strategies-*`, `tokens-*`.
    Raises: ImportError if matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plot: {error}; plots need matplotlib; pip install 'qexperts[bench]'") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, part in _projections(records):
        if any(r.strategy == "pad_and_clip" and time_of(r) for r in part):
            written.append(_save(_latency(part), folder / f"latency-{name}.png"))
        if any(time_of(r) for r in part):
            written.append(_save(_strategies(part), folder / f"strategies-{name}.png"))
    thresholds = sorted({r.threshold for r in records if r.threshold is not None}) or list(_THRESHOLDS)
    for distribution, rows in counts.items():
        if any(rows):
            name = _unique(f"tokens-{_slug(distribution)}", [path.stem for path in written])
            written.append(_save(_tokens(distribution, rows, thresholds), folder / f"{name}.png"))
    return written


def _slug(text: str) -> str:
    """A file name: the last part of a path, only plain characters."""
    stem = text.rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "unnamed"


def _unique(name: str, taken: Iterable[str]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique


def _projections(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Prefill records that belong into one figure, with a file name that says what differs between figures."""
    shown = (r for r in records if r.kind == "prefill" and r.activation_format is None)
    kept = list(newest(shown, lambda r: (r.config_key(), r.device)).values())
    split = (
        "num_experts",
        "total_tokens",
        "dtype",
        "group_size",
        "scales",
        "provider",
        "api",
        "weight_layout",
        "device",
    )
    varying = [name for name in split if len({getattr(r, name) for r in kept} - {None}) > 1]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in kept:
        groups.setdefault((r.distribution, r.n, r.k, *(getattr(r, name) for name in varying)), []).append(r)
    names: dict[str, list[Record]] = {}
    for (distribution, n, k, *values), part in groups.items():
        name = "-".join([_slug(distribution), f"N{n}", f"K{k}", *(_slug(str(value)) for value in values)])
        names[_unique(name, names)] = part
    return list(names.items())


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A figure with `height` inches for the axes, below a title and as many lines as the subtitle takes."""
    from matplotlib.figure import Figure  # pyplot would pick a backend for the whole process

    lines = textwrap.wrap(subtitle, int(width * 13))
    header = 0.5 + 0.17 * len(lines)
    total = height + header
    figure = Figure(figsize=(width, total), layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, 0.005, 0.99, height / total - 0.005))  # type: ignore[union-attr]
    figure.text(0.1 / width, 1 - 0.12 / total, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.1 / width, 1 - 0.42 / total, "\n".join(lines), fontsize=9.5, color="#444444", va="top")
    return figure


def _plain_axes(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _formats(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each format, in order of first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.format, []).append(record)
    return found


def _spread(values: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Move sorted label positions apart by `gap`, within low..high, keeping their order."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap if placed else low))
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _latency(records: Sequence[Record]) -> Figure:
    """Small multiples, one a format: pad_and_clip over its threshold, the other strategies as lines across."""
    from matplotlib.ticker import FixedLocator, NullLocator

    formats = {name: part for name, part in _formats(records).items() if any(time_of(r) for r in part)}
    wide = min(3, len(formats))
    tall = math.ceil(len(formats) / wide)
    title = f"Prefill latency against the pad_and_clip threshold, N={records[0].n} K={records[0].k}"
    figure = _figure(max(7.5, 4.3 * wide), 0.4 + 2.7 * tall, title, caption(records))
    grid = figure.subplots(tall, wide, sharex=True, sharey=True, squeeze=False).ravel()
    thresholds = sorted({r.threshold for r in records if r.threshold is not None and time_of(r)})
    times = [t for part in formats.values() for r in _drawn(part) if (t := time_of(r))]
    low, high = min(times) / 1.4, max(times) * 1.25
    for i, (axes, (name, part)) in enumerate(zip(grid, formats.items(), strict=False)):
        axes.set(xscale="log", yscale="log", ylim=(low, high))
        axes.set_xlim(thresholds[0] / 1.3, thresholds[-1] * (thresholds[-1] / thresholds[0]) ** 0.75 * 2.2)
        axes.xaxis.set(major_locator=FixedLocator(thresholds), minor_locator=NullLocator())
        axes.set_xticklabels([str(t) for t in thresholds])
        ticks = [t * 10.0**e for e in range(-4, 6) for t in (1, 2, 5) if low <= t * 10.0**e <= high]
        axes.yaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
        axes.set_yticklabels([f"{t:g}" for t in ticks])
        axes.set_title(f"{name}, {_inside(part)}", fontsize=10.5, loc="left")
        _plain_axes(axes)
        _latency_panel(axes, part, thresholds, (low, high))
        if i % wide == 0:
            axes.set_ylabel("ms, median", fontsize=9.5)
        if i + wide >= len(formats):
            axes.set_xlabel("threshold, rows", fontsize=9.5)
            axes.tick_params(labelbottom=True)
    for axes in grid[len(formats) :]:
        axes.set_visible(False)
    return figure


def _inside(part: Sequence[Record]) -> str:
    return "dequantization inside" if any(r.scope != "base mm" for r in part) else "no dequantization"


def _drawn(part: Sequence[Record]) -> list[Record]:
    """All that a panel of `_latency` shows: weights gathered before the clock only where nothing is dequantized."""
    return [r for r in part if r.scope != "base mm"] or list(part)


def _latency_panel(axes: Axes, part: Sequence[Record], thresholds: list[int], limits: tuple[float, float]) -> None:
    shown = _drawn(part)
    labels: list[tuple[float, str, str]] = []  # ms, text, colour
    curves: dict[str | None, list[Record]] = {}
    for record in shown:
        if record.strategy == "pad_and_clip" and not record.graph and time_of(record):
            curves.setdefault(record.gather, []).append(record)
    several = len(curves) > 1
    for gather, curve in curves.items():
        curve.sort(key=lambda r: r.threshold or 0)
        colour, marker = _CURVES[gather]
        points = [(r.threshold or 0, r.median_ms or 0.0) for r in curve]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.8)
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, "o", ms=11, mfc="none", mec=colour, mew=1.5)
        axes.annotate(
            f"{ms_text(best[1])} at {best[0]}", best, xytext=(4, -9), textcoords="offset points", va="top",
            fontsize=8.5, color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )  # fmt: skip
        text = f"weights gathered {gather}" if several else "pad_and_clip"
        labels.append((points[-1][1], text, colour))
    for strategy, graph, text, colour in _LINES:
        record = fastest(r for r in shown if (r.strategy, r.graph) == (strategy, graph))
        if record is not None and record.median_ms is not None:
            axes.axhline(record.median_ms, color=colour, linestyle="--", linewidth=1.3)
            labels.append((record.median_ms, f"{text} {ms_text(record.median_ms)}", colour))
    labels.sort()
    low, high = map(math.log, limits)
    places = _spread([math.log(ms) for ms, _, _ in labels], low, high - (high - low) * 0.03, (high - low) * 0.085)
    for (_, text, colour), place in zip(labels, places, strict=True):
        axes.text(
            thresholds[-1] * 1.22, math.exp(place), text, color=colour, fontsize=8.5, va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def _strategies(records: Sequence[Record]) -> Figure:
    """Grouped bars per format, one panel with everything inside the clock, one with the weights ready before."""
    formats = _formats(records)
    panels = [("everything inside the clock", {name: paid(part) for name, part in formats.items()})]
    ready = {name: [r for r in part if r.scope == "base mm"] for name, part in formats.items()}
    if any(time_of(r) for name, part in ready.items() for r in part if r not in panels[0][1][name]):
        panels.append(("weights dequantized, or gathered, before the clock", ready))
    width = max(8.0, 1.5 + 1.35 * len(formats))
    title = f"Prefill strategies, N={records[0].n} K={records[0].k}"
    figure = _figure(width, 0.4 + 3.3 * len(panels), title, caption(records))
    grid = figure.subplots(len(panels), 1, squeeze=False, sharey=True).ravel()
    bars = _bars(records)
    for axes, (title, parts) in zip(grid, panels, strict=True):
        _plain_axes(axes)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_ylabel("ms, median", fontsize=9.5)
        axes.set_xticks(range(len(parts)), list(parts), fontsize=10)
        axes.set_xlim(-0.55, len(parts) - 0.45)
        for position, part in enumerate(parts.values()):
            _bar_group(axes, position, part, bars)
        axes.margins(y=0.22)
    handles, texts = _legend(bars)
    figure.legend(handles, texts, loc="outside lower left", ncols=6 if width > 10 else 3, fontsize=9, frameon=False)
    return figure


def _bars(records: Sequence[Record]) -> list[tuple[str, bool, str, str]]:
    """Those of the known bars that have a time, then any other strategy."""
    timed = dict.fromkeys((r.strategy, r.graph) for r in records if time_of(r))
    known = {bar[:2]: bar for bar in _BARS}
    others = [key for key in timed if key not in known]
    colours = (_SKY, _GREY, _BLACK)
    extra = [(*key, key[0] + ", graph" * key[1], colours[i % 3]) for i, key in enumerate(others)]
    return [bar for key, bar in known.items() if key in timed] + extra


def _legend(bars: Sequence[tuple[str, bool, str, str]]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    floor = Line2D([], [], color=_BLACK, linewidth=2.2)
    return [*(Patch(color=colour) for *_, colour in bars), floor], [*(text for _, _, text, _ in bars), "floor"]


def _bar_group(axes: Axes, position: int, part: Sequence[Record], bars: Sequence[tuple[str, bool, str, str]]) -> None:
    """The bars of one format; a strategy that did not run, or was wrong, says so in place of its bar."""
    size = 0.84 / len(bars)
    floor = next((r.floor_ms for r in part if r.floor_ms), None)
    for i, (strategy, graph, _, colour) in enumerate(bars):
        candidates = [r for r in part if (r.strategy, r.graph) == (strategy, graph)]
        best = fastest(candidates)
        x = position - 0.42 + size * (i + 0.5)
        if best is not None and best.median_ms is not None:
            axes.bar(x, best.median_ms, size * 0.9, color=colour)
            threshold = f" ({best.threshold})" if best.threshold is not None else ""
            text, colour, height = f"{ms_text(best.median_ms)}{threshold}", "#222222", best.median_ms
        elif candidates:
            wrong = any(r.status == "WRONG" for r in candidates)
            text, colour, height = ("WRONG", _RED, floor or 0.0) if wrong else ("not run", _GREY, floor or 0.0)
        else:
            continue
        axes.annotate(
            text, (x, height), xytext=(0, 3), textcoords="offset points", rotation=90, ha="center", va="bottom",
            fontsize=8, color=colour,
        )  # fmt: skip
    if floor is not None:
        axes.plot([position - 0.44, position + 0.44], [floor, floor], color=_BLACK, linewidth=2.2)


def _tokens(distribution: str, counts: Sequence[int], thresholds: Sequence[int]) -> Figure:
    """Rows of each expert, sorted, with what each threshold leaves to launches of their own."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    rows = sorted(counts, reverse=True)
    active = sum(row > 0 for row in rows)
    title = f"Tokens per expert, {_slug(distribution)}"
    facts = (
        f"{len(rows)} experts, {sum(rows):,} rows; {active} active, {len(rows) - active} empty; max {rows[0]:,} rows"
    )
    figure = _figure(9.5, 4.4, title, facts)
    axes = figure.subplots()
    _plain_axes(axes)
    axes.bar(range(active), rows[:active], width=1.0, color=_SKY, edgecolor=_SKY, linewidth=0.3)
    axes.set(yscale="log", ylim=(0.8, rows[0] * 1.9), xlim=(-0.5 - len(rows) * 0.01, len(rows) * 1.005))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("experts, by number of rows", fontsize=10)
    axes.set_ylabel("rows", fontsize=10)
    for threshold in (t for t in thresholds if t < rows[0]):
        above = sum(row > threshold for row in rows)
        axes.axhline(threshold, color=_RED, linestyle="--", linewidth=1)
        text = f"{above} expert{'s' * (above != 1)} above {threshold}"
        axes.text(len(rows), threshold * 1.04, text, color=_RED, fontsize=9.5, ha="right", va="bottom")
    axes.annotate(
        f"max {rows[0]:,}", (0, rows[0]), xytext=(8, 2), textcoords="offset points", fontsize=9.5, va="bottom",
    )  # fmt: skip
    if active < len(rows):
        axes.axvspan(active - 0.5, len(rows) - 0.5, color="#eeeeee", zorder=0)
        axes.text((active + len(rows) - 1) / 2, 1.0, f"{len(rows) - active} empty", rotation=90, fontsize=9.5,
                  ha="center", va="bottom", color="#444444")  # fmt: skip
    return figure
