"""Tables, CSV and JSON of records: pure views, nothing is measured here.

A table shows only the columns that vary; what is constant is said once, in the line above it.
A record whose status is not "ok" never shows a time, in any format.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .candidates import HINTED, OWN, PACKED
from .columns import (
    WHO,
    WORKLOAD,
    Column,
    Mode,
    Row,
    all_columns,
    label,
    least_ratio,
    number_text,
    time_of,
    timed,
    worth_showing,
)
from .records import Record

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

Out = Literal["table", "md", "csv", "json"]

_CEILINGS = (
    ("matmul", "TFLOP/s", "ceiling_tflops"),
    ("copy", "GB/s", "ceiling_copy_gbps"),
    ("read", "GB/s", "ceiling_read_gbps"),
)
_ROUNDED = {"int8": "group", "q8_0": "32 of k"}  # by what activations are rounded, beside by row
_TIMES = ("median_ms", "p20_ms", "p80_ms")
_DERIVED = (
    "speedup", "tflops", "gbps", "floor_ms", "roofline", "read_fraction",
    "peer", "versus_peer", "versus_peer_low", "scaling", "scaling_low",
)  # fmt: skip


def fastest(records: Iterable[Record]) -> Record | None:
    """The lowest median among the right results."""
    timed = [r for r in records if time_of(r) is not None]
    return min(timed, key=lambda r: r.median_ms or math.inf, default=None)


def newest(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, Record]:
    """The newest record of each key, keys in order of first appearance; a later line wins a tie."""
    found: dict[Any, Record] = {}
    for record in records:
        if key(record) not in found or record.time >= found[key(record)].time:
            found[key(record)] = record
    return found


def baseline_of(records: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
    """baseline_key -> the eager `per_expert` record that others of the key are compared with."""
    return newest((r for r in records if r.is_baseline() and time_of(r)), Record.baseline_key)


def paid(records: Sequence[Record]) -> list[Record]:
    """Records with everything inside the clock that a caller pays for on every call.

    Dequantization for quantized formats; for the others the gather of the small experts' weights, whose
    set changes with every routing.
    """
    return [r for r in records if r.scope != "base mm"] or [r for r in records if r.gather != "before"]


def columns(records: Sequence[Record], mode: Mode) -> list[Column]:
    """The columns a table of these records shows; records are of one kind. A summary has errors only where rows of
    another precision are in it."""
    if not records:
        return []
    found = all_columns(records[0].kind, mode)
    if mode == "summary" and not any(r.activation_format for r in records):
        found = [c for c in found if c.name != "error" or records[0].kind == "decode"]
    return worth_showing(found, rows(records, mode))


@dataclasses.dataclass(frozen=True)
class Section:
    """One table, before it is drawn."""

    title: str
    columns: list[Column]
    rows: list[Any]
    together: Callable[[Any], Any] = lambda row: None  # rows that differ in it are set apart


@dataclasses.dataclass(frozen=True)
class Chapter:
    """Tables under one caption, with notes below."""

    caption: str
    sections: list[Section]
    notes: list[str]


def _groups(items: Iterable[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    found: dict[Any, list[Record]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def _rank_key(record: Record) -> tuple[Any, ...]:
    """Records that compete to be the best: one workload, format, scope and precision; raw and wrapped calls apart."""
    key = (record.workload_key(), record.format, record.scope, record.api, record.torch)
    return (*key, record.activation_format)


def _full_rows(records: Sequence[Record]) -> list[Row]:
    baselines = baseline_of(records)
    ranked = [[r for r in group if time_of(r)] for group in _groups(records, _rank_key)]
    best = {id(fastest(group)) for group in ranked if len(group) > 1}
    ordered = [r for group in _groups(records, lambda r: r.format) for part in _groups(group, _rank_key) for r in part]
    contenders = {_contest(group[0]): group for group in _groups(records, _contest)}
    single = newest((r for r in records if r.threads == 1), _but_for_threads)
    found = [Row(r, baselines.get(r.baseline_key()), id(r) in best) for r in ordered]
    return [
        dataclasses.replace(
            row,
            peer=_peer_of(row, contenders[_contest(row.record)]),
            single=single.get(_but_for_threads(row.record)) if row.record.threads else None,
        )
        for row in found
    ]


def _contest(record: Record) -> tuple[Any, ...]:
    """Records of the same product: those of one are each other's peers."""
    return (record.format, record.workload_key(), record.api, record.torch)


def _but_for_threads(record: Record) -> tuple[Any, ...]:
    return (dataclasses.replace(record, threads=None).config_key(), record.time, record.command, record.torch)


def _summary_row(group: list[Record], baselines: dict[tuple[Any, ...], Record]) -> Row:
    inside = paid(group) or group
    wrong = next((r for r in inside if r.status == "WRONG"), inside[0])
    chosen = fastest(inside) or wrong
    clip = fastest(r for r in inside if r.strategy == "pad_and_clip" and not r.graph)
    grouped = fastest(r for r in inside if r.strategy == "grouped" and not r.graph)
    prepared = [r for r in group if r.scope == "base mm" and r.gather != "inside"]
    graph = fastest(r for r in inside if r.strategy == "per_expert" and r.graph)
    ready, ready_clip = fastest(prepared), fastest(r for r in prepared if r.strategy == "pad_and_clip")
    return Row(
        chosen, baselines.get(chosen.baseline_key()), clip=clip, ready_clip=ready_clip, graph=graph, ready=ready,
        grouped=grouped,
    )  # fmt: skip


def _peer_of(row: Row, group: Sequence[Record]) -> Record | None:
    """Of kernels on packed weights: the fastest of the other packages' launches over all experts, with torch's on
    weights that are ready; on a CPU, where that is a loop, torch's loop too. Only rows on
    rounded activations have peers on rounded ones."""
    if row.record.provider not in PACKED:
        return None
    launches = ("grouped", "per_expert") if row.record.device_type == "cpu" else ("grouped",)
    return fastest(
        r for r in group
        if r.provider not in PACKED and (r.provider != "torch" or (r.scope == "base mm" and r.strategy in launches))
        and (r.activation_format is None or row.record.activation_format is not None)
    )  # fmt: skip


def _summary_rows(records: Sequence[Record]) -> list[Row]:
    """One row per format, provider and precision; the best provider is marked where there are several of it."""
    baselines = baseline_of(records)
    found = []
    for format_group in _groups(records, _contest):
        parts = _groups(format_group, lambda r: (r.provider, r.weight_layout, r.activation_format))
        part = [_summary_row(g, baselines) for g in parts]
        full = [row.record for row in part if row.record.activation_format is None]
        best = fastest(full) if len(full) > 1 else None
        peers = [_peer_of(row, format_group) for row in part]
        found += [
            dataclasses.replace(row, best=row.record is best, peer=peer) for row, peer in zip(part, peers, strict=True)
        ]
    formats = list(dict.fromkeys(r.format for r in records))
    return sorted(found, key=lambda row: formats.index(row.record.format))


def _layer_rows(records: Sequence[Record]) -> list[Row]:
    """One row per way of calling the layers: its decode step and its prefill. The least total of a format is best."""
    found = []
    for group in _groups(records, lambda r: _contest(dataclasses.replace(r, step=None, total_tokens=0))):
        ways = _groups(group, lambda r: (r.provider, r.strategy, r.weight_layout, r.graph))
        part = [_layer_row(way) for way in ways]
        total = min((ms for row in part if (ms := row.total_ms) is not None), default=None)
        for row in part:
            hinted = [
                other for other in part if other.record.strategy == HINTED and other.record.graph == row.record.graph
            ]
            same = [other for other in hinted if other.record.weight_layout == row.record.weight_layout]
            base = next(iter((same if row.record.provider in OWN else []) or hinted), None)
            found.append(dataclasses.replace(row, hinted=base, best=row.total_ms is not None and row.total_ms == total))
    return found


def _layer_row(way: Sequence[Record]) -> Row:
    """A run that was interrupted may have only one of the two."""
    steps = {r.step: r for r in way}
    missing = dataclasses.replace(
        way[0], step="decode", status="not measured", median_ms=None, samples_ms=[], error=None
    )
    return Row(steps.get("decode", missing), prefill=steps.get("prefill"))


def rows(records: Sequence[Record], mode: Mode) -> list[Row]:
    """Rows in the order measured, formats kept together; summary keeps the best of each format."""
    if records and records[0].kind == "layer":
        return _layer_rows(records)
    return _summary_rows(records) if mode == "summary" else _full_rows(records)


def caption(records: Sequence[Record]) -> str:
    """What all records share, in words, and the ceilings they are judged by."""
    pieces = {}
    shared = [r for r in records if r.step != "decode"] or records  # of a layer: the sizes of its prefill
    for column in (*WORKLOAD, *WHO):
        values = {v for r in shared if (v := column.getter(Row(r))) is not None}
        if column.caption and len(values) == 1:
            pieces[column.name] = column.caption(values.pop())
    if "distribution" in pieces and "scaled" in pieces:
        pieces["distribution"] += f" ({pieces.pop('scaled')})"
    if "total_tokens" in pieces and "active_experts" in pieces and "max_tokens" in pieces:
        pieces["total_tokens"] += f" ({pieces.pop('active_experts')}, {pieces.pop('max_tokens')})"
    ceilings = [
        f"{name} {_span(values)} {unit}"
        for name, unit, attribute in _CEILINGS
        if (values := {number_text(v) for r in records if (v := getattr(r, attribute))})
    ]
    text = ", ".join(text for text in pieces.values() if text)
    return text + ("; ceilings: " + ", ".join(ceilings) if ceilings else "")


def _span(values: set[str]) -> str:
    ordered = sorted(values, key=lambda v: float(v.replace(",", "")))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]}–{ordered[-1]}"


def _refusals(records: Sequence[Record]) -> list[str]:
    """Why rows have no time, a line for each reason."""
    notes = []
    projections = {(r.n, r.k) for r in records}
    for group in _groups((r for r in records if r.status != "ok"), lambda r: (r.status, r.reason)):
        who = []
        for part in _groups(group, lambda r: r.provider):
            if len(part) > 1 and len(part) == sum(r.provider == part[0].provider for r in records):
                who.append(f"every row of {part[0].provider}")
                continue
            for same in _groups(part, lambda r: (r.format, r.scope, label(r))):
                some = {(r.n, r.k) for r in same} != projections
                where = "".join(f" N={n} K={k}" for n, k in dict.fromkeys((r.n, r.k) for r in same)) if some else ""
                scope = "" if same[0].scope == same[0].provider else f" {same[0].scope}"
                who.append(f"{same[0].format} {same[0].provider}{scope} {label(same[0])}{where}")
        more = f" and {len(who) - 4} more" if len(who) > 4 else ""
        status = "WRONG" if group[0].status == "WRONG" else "n/a"
        reason = " ".join((group[0].reason or "no reason recorded").split())
        notes.append(f"{status}: {'; '.join(who[:4])}{more}: {reason}")
    return notes


def _peer_configs(records: Sequence[Record]) -> list[str]:
    """Which configuration of a peer was measured, for each format and projection."""
    found: dict[str, dict[str, None]] = {}
    for r in records:
        if r.provider not in OWN and r.config and time_of(r):
            batch = "" if r.batch is None else f" batch {r.batch}"
            found.setdefault(r.config.partition(" {")[0], {})[f"{r.format} N={r.n}{batch}"] = None
    return [f"{config}: {', '.join(where)}" for config, where in found.items()]


def _decode_sizes(r: Record) -> tuple[Any, ...]:
    return r.total_tokens, r.active_experts, r.max_tokens, r.decode_threshold


def _notes(records: Sequence[Record], shown: Sequence[Row], mode: Mode) -> list[str]:
    """Why rows have no time; which configuration a peer ran; and what the labels mean where they occur."""
    notes = _refusals(records)
    cut = sum(len(r.samples_ms) < r.rounds for r in records if r.status == "ok")
    if cut:
        notes.append(f"interrupted: {cut} rows have fewer samples than were asked for")
    if any(row.best for row in shown):
        ranked = "providers of a format" if mode == "summary" else "strategies of a format and scope"
        ranked = "ways of a format, in total" if records[0].kind == "layer" else ranked
        notes.append(f"best: the lowest median of the {ranked}")
    seen = [r for row in shown for r in (row.record, row.ready) if r is not None]
    rounded = [f"{name} activations: rounded by row and {of}" for name, of in _ROUNDED.items()
               if any(r.activation_format == name for r in seen)]  # fmt: skip
    if rounded:
        notes.append(
            f"{', '.join(rounded)} inside the clock; checked against the oracle on equally rounded activations, their "
            "error is that against the true one; not ranked with the other rows"
        )
    if any(r.graph for r in seen):
        notes.append("graph: replayed from a CUDA graph, which holds for exactly these counts")
    if any("gathered" in label(r) for r in seen):
        notes.append("weights gathered: the small experts' weights made contiguous before or inside the clock")
    notes += _peer_configs(records)
    if any(row.peer for row in shown):
        notes.append(
            "best peer: the fastest launch over all experts (on a CPU, or loop) that is not ours; ready: on "
            "dequantized weights"
        )
    if any(row.peer_low or least_ratio(row.single, row.record) for row in shown):
        notes.append("at least: lower end of the 90% interval of the median of the ratios round by round")
    if any(r.host_us for r in records) and (mode == "full" or records[0].kind != "prefill"):
        waits = "; manual_branch and eager wait for it themselves" if records[0].kind == "layer" else ""
        notes.append(f"host: median host time to issue one warmed call, without waiting for the device{waits}")
    if records[0].kind == "layer":
        notes += [
            f"decode step: {r.total_tokens} rows, {r.active_experts} experts active (mean), max {r.max_tokens} rows; "
            f"for a call that looks at the counts, more than {r.decode_threshold} are a prefill"
            for r in newest((r for r in records if r.step == "decode"), _decode_sizes).values()
        ]
        notes.append(
            "every call is a whole layer, from hidden states to hidden states; decode step: the mean of all steps; "
            "total: the prefill and all steps; vs hinted: over unified_hinted of the same layout and graph; "
            "transformers: its implementations, on weights dequantized before the clock"
        )
    if mode == "summary" and records[0].kind == "prefill":
        notes.append(
            "per_expert (an eager loop, so it varies with the host), pad_and_clip (at its best threshold) and best "
            "have dequantization and every copy inside the clock, host planning (plan) not; ready: weights "
            "dequantized, or gathered, before it; floor: the larger of arithmetic and bytes at the ceilings; "
            "speed-up: over per_expert; could gain: best / floor"
        )
    return notes


def chapters(records: Sequence[Record], mode: Mode) -> list[Chapter]:
    """Tables of the newest record of each configuration, one per kind and projection."""
    kept = newest(records, lambda r: (r.config_key(), getattr(r, "top_k", None), r.device, r.torch)).values()
    together = (lambda row: None) if mode == "summary" else (lambda row: (row.record.format, row.record.scope))
    found = []
    for group in _groups(kept, lambda r: r.kind):
        shown = columns(group, mode)
        sections = [
            Section(_title(part[0]), shown, rows(part, mode), together) for part in _groups(group, lambda r: (r.n, r.k))
        ]
        everything = [row for section in sections for row in section.rows]
        found.append(Chapter(caption(group), sections, _notes(group, everything, mode)))
    return found


def _title(record: Record) -> str:
    if record.kind == "layer":
        return f"layer H={record.k} I={record.n // 2}"
    return f"{record.kind} N={record.n} K={record.k}"


def _header(column: Column) -> str:
    return f"{column.header}\n{column.unit}" if column.unit else column.header


def _cell(column: Column, row: Any, plain: bool) -> str:
    """The text of a cell; `plain` is for output without styles: a star where the best row would be bold."""
    star = plain and column.justify == "left" and column.mark(row) == "best"
    return column.text(row) + (" *" if star else "")


def _widths(column: Column, cells: Sequence[str]) -> tuple[int, int]:
    """Least and natural width: a label may break after its commas, a number may not."""
    header = max(map(len, _header(column).split("\n")))
    pieces = [piece for cell in cells for piece in (re.split("(?<=,) ", cell) if column.justify == "left" else [cell])]
    return max([header, *map(len, pieces)]), max([header, *map(len, cells)])


def _fit(section: Section, width: int | None, plain: bool) -> tuple[list[tuple[Column, int]], int]:
    """Columns with their widths, and the gap between them.

    In a narrow terminal labels break first, then the gap shrinks, then the least needed columns are left out.
    """
    kept = list(section.columns)
    sizes = {c.name: _widths(c, [_cell(c, row, plain) for row in section.rows]) for c in kept}
    if width is None:
        return [(c, sizes[c.name][1]) for c in kept], 2
    while True:
        least = sum(sizes[c.name][0] for c in kept)
        gap = 2 if least + 2 * (len(kept) - 1) <= width else 1
        spare = width - least - gap * (len(kept) - 1)
        victim = max(kept, key=lambda c: c.drop)
        if spare >= 0 or victim.drop == 0:
            break
        kept.remove(victim)
    fitted = []
    for column in kept:
        least, natural = sizes[column.name]
        extra = max(0, min(spare, natural - least))
        spare -= extra
        fitted.append((column, least + extra))
    return fitted, gap


def table(section: Section, width: int | None = None, plain: bool = False) -> Table:
    """Draw a section for a terminal of `width` columns; None shows everything, at any width."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kept, gap = _fit(section, width, plain)
    left_out = [c.name for c in section.columns if c not in [column for column, _ in kept]]
    drawn = Table(
        title=section.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
        padding=(0, gap - 1, 0, 0), pad_edge=False, caption_justify="left", caption_style="dim",
        caption=f"left out to fit {width} columns: {', '.join(left_out)}" if left_out else None,
    )  # fmt: skip
    for column, characters in kept:
        drawn.add_column(Text(_header(column)), justify=column.justify, width=characters, overflow="fold")
    styles = {"": "", "best": "bold", "bad": "bold red"}
    for i, row in enumerate(section.rows):
        if i and section.together(row) != section.together(section.rows[i - 1]):
            drawn.add_section()
        drawn.add_row(*(Text(_cell(c, row, plain), style=styles[c.mark(row)]) for c, _ in kept))
    return drawn


def drawing(found: Sequence[Chapter], width: int | None = None, plain: bool = False) -> Group:
    """All chapters as one renderable for a rich console."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for chapter in found:
        parts.append(Text(chapter.caption))
        for section in chapter.sections:
            parts += [Text(""), table(section, width, plain)]
        parts += [Text(""), *(Text(note, style="red" if note.startswith("WRONG") else "dim") for note in chapter.notes)]
    return Group(*parts)


def show(found: Sequence[Chapter], console: Console) -> None:
    """Print chapters: fitted to a terminal, at full width into a file or a pipe."""
    from rich.measure import Measurement

    if console.is_terminal:
        console.print(drawing(found, console.width))
        return
    unbounded = console.options.update(width=10_000)
    widths = [
        Measurement.get(console, unbounded, table(section, plain=True)).maximum
        for chapter in found
        for section in chapter.sections
    ]
    console.width = max([console.width, *widths])
    console.print(drawing(found, plain=True))


def _markdown_section(section: Section) -> list[str]:
    names = []
    for column in section.columns:
        name = column.header.replace("-\n", "").replace("_\n", "_").replace("\n/", "/").replace("\n", " ")
        names.append(f"{name} {column.unit}" if column.unit else name)
    lines = [f"**{section.title}**", "", "| " + " | ".join(names) + " |"]
    lines.append("|" + "|".join("---:" if c.justify == "right" else ":---" for c in section.columns) + "|")
    for row in section.rows:
        cells = [(c.text(row).replace("|", "\\|"), c.mark(row)) for c in section.columns]
        lines.append("| " + " | ".join(f"**{text}**" if mark else text for text, mark in cells) + " |")
    return [*lines, ""]


def markdown(found: Sequence[Chapter]) -> str:
    """GitHub tables with captions and notes as text."""
    lines: list[str] = []
    for chapter in found:
        lines += [chapter.caption, ""]
        for section in chapter.sections:
            lines += _markdown_section(section)
        lines += [*(f"- {note}" for note in chapter.notes), ""]
    return "\n".join(lines).rstrip() + "\n"


def flat(row: Row) -> dict[str, Any]:
    """All fields of a record and what is derived from them; a wrong result has no times."""
    record = row.record
    data = dataclasses.asdict(record)
    if record.status != "ok":
        data.update(dict.fromkeys(_TIMES), samples_ms=[])
    peer, ours = time_of(row.peer), time_of(record)
    derived = (
        row.speedup,
        *(timed(name)(row) for name in ("tflops", "gbps")),
        record.floor_ms,
        timed("roofline")(row),
        timed("read_fraction")(row),
        label_of_peer(row),
        peer / ours if peer and ours else None,
        row.peer_low,
        row.scaling,
        least_ratio(row.single, record),
    )
    return {**data, **dict(zip(_DERIVED, derived, strict=True))}


def label_of_peer(row: Row) -> str | None:
    return f"{row.peer.provider} {row.peer.scope} {label(row.peer)}" if row.peer is not None else None


def _rows_in_order(records: Sequence[Record]) -> list[Row]:
    found = {id(row.record): row for row in _full_rows(records)}
    return [found[id(record)] for record in records]


def _csv(records: Sequence[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(Record)] + list(_DERIVED), lineterminator="\n")
    writer.writeheader()
    for row in _rows_in_order(records):
        data = flat(row)
        writer.writerow({**data, "samples_ms": " ".join(map(repr, data["samples_ms"]))})
    return text.getvalue()


def _json(records: Sequence[Record]) -> str:
    """Strict JSON: an error that is not a number becomes null, the status says the rest."""
    found = [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in flat(row).items()}
        for row in _rows_in_order(records)
    ]
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def render(
    records: Sequence[Record], out: Out, mode: Mode = "summary", width: int | None = None, plain: bool = False
) -> str | Group:
    """Records as text ("md", "csv", "json": every column) or as a rich renderable ("table").

    `width` and `plain` concern tables only; `show(chapters(records, mode), console)` sets them from the console.
    CSV and JSON hold every record in the order given; `mode` does not matter to them.
    """
    if out == "csv":
        return _csv(records)
    if out == "json":
        return _json(records)
    if out == "md":
        return markdown(chapters(records, mode))
    if out == "table":
        return drawing(chapters(records, mode), width, plain)
    raise ValueError(f'render: out is {out!r}; expected "table", "md", "csv" or "json".')
