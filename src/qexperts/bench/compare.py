"""What changed between two files of records, and whether it is a regression.

Configurations match on `Record.config_key`: what was asked, not the device, the versions or the time.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from .columns import Column, label, ms_text, ratio_text, worth_showing
from .records import Record
from .report import Chapter, Section, drawing, markdown, newest

if TYPE_CHECKING:
    from rich.console import Group

Verdict = Literal["slower", "faster", "same", "regressed", "fixed", "not timed"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One configuration in both files."""

    a: Record
    b: Record
    threshold: float

    @property
    def a_ms(self) -> float | None:
        return _median(self.a)

    @property
    def b_ms(self) -> float | None:
        return _median(self.b)

    @property
    def ratio(self) -> float | None:
        """Time of b over time of a: above 1 is slower."""
        return self.b_ms / self.a_ms if self.a_ms and self.b_ms else None

    @property
    def verdict(self) -> Verdict:
        """Symmetric: what is slower from a to b is faster from b to a.

        "regressed": b is wrong and a was not, or a ran and b does not.
        """
        if self.a.status != self.b.status and (self.a.status == "ok" or self.b.status == "WRONG"):
            return "regressed"
        if self.a.status != self.b.status and self.b.status == "ok":
            return "fixed"
        if self.ratio is None:
            return "not timed"
        if self.ratio > 1 + self.threshold:
            return "slower"
        return "faster" if 1 / self.ratio > 1 + self.threshold else "same"

    @property
    def overlap(self) -> bool | None:
        """Whether the p20-p80 ranges meet: then the difference may be noise."""
        a, b = _range(self.a), _range(self.b)
        return a[0] <= b[1] and b[0] <= a[1] if a and b else None

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "regressed")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All configurations of two files; the order is that of the first."""

    rows: list[Change]
    only_a: list[Record]
    only_b: list[Record]
    threshold: float

    @property
    def regressions(self) -> list[Change]:
        return [row for row in self.rows if row.regressed]

    @property
    def exit_code(self) -> int:
        """1 when anything became slower than the threshold allows, or wrong; else 0."""
        return 1 if self.regressions else 0


def compare(a: Sequence[Record], b: Sequence[Record], threshold: float = 0.05) -> Comparison:
    """Match the newest record of each configuration and judge the ratio of the medians.

    Args:
        a: records of the reference.
        b: records to be judged.
        threshold: relative difference of the medians that is tolerated; 0.05 is 5%.
    Raises: ValueError if the threshold is not a number >= 0, or if no configuration is in both.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"compare: threshold is {threshold}; expected a finite number >= 0, such as 0.05 for 5%.")
    old, new = newest(a, Record.config_key), newest(b, Record.config_key)
    rows = [Change(old[key], new[key], threshold) for key in old if key in new]
    if not rows:
        raise ValueError(
            f"compare: no configuration is in both ({len(old)} in A, {len(new)} in B); workload, format, provider and "
            "strategy must be equal in every option; run both with the same arguments of `qexperts bench`."
        )
    only_a = [record for key, record in old.items() if key not in new]
    only_b = [record for key, record in new.items() if key not in old]
    return Comparison(rows, only_a, only_b, threshold)


def _median(record: Record) -> float | None:
    if record.status != "ok":
        return None
    return statistics.median(record.samples_ms) if record.samples_ms else record.median_ms


def _range(record: Record) -> tuple[float, float] | None:
    if record.status != "ok" or record.p20_ms is None or record.p80_ms is None:
        return None
    return record.p20_ms, record.p80_ms


def _setting(record: Record) -> str:
    """A configuration without its strategy."""
    workload = f"{record.kind} {record.distribution} S={record.total_tokens} N={record.n} K={record.k}"
    scales = "" if record.scales is None else f", {record.scales} scales, group {record.group_size}"
    return f"{workload} {record.format} ({record.dtype} activations{scales}) {record.provider} {record.scope}"


def _listed(records: Sequence[Record]) -> list[str]:
    """One line per setting, with its strategies."""
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(_setting(record), []).append(label(record))
    return [f"{setting}: {'; '.join(labels)}" for setting, labels in found.items()]


def _time(record: Record) -> float | str | None:
    return {"ok": _median(record), "WRONG": "WRONG"}.get(record.status, "n/a")


def _mark(row: Change) -> str:
    return "bad" if row.regressed else "best" if row.verdict in ("faster", "fixed") else ""


def _noise(row: Change) -> str | None:
    """A doubt about a difference; no difference needs none."""
    if row.verdict not in ("slower", "faster") or row.overlap is None:
        return None
    return "maybe" if row.overlap else "no"


def _field(name: str, header: str = "", **options: Any) -> Column:
    return Column(name, header or name, "", lambda row: getattr(row.a, name, None), **options)


_COLUMNS = [
    _field("format", justify="left"),
    *(_field(name, show="varies", justify="left") for name in ("kind", "distribution", "dtype", "provider", "api")),
    _field("weight_layout", "layout", show="varies", justify="left"),
    _field("num_experts", "experts", show="varies"),
    _field("total_tokens", "rows", show="varies"),
    _field("n", "N", show="varies"),
    _field("k", "K", show="varies"),
    _field("group_size", "group", show="varies"),
    _field("scales", show="varies", justify="left"),
    _field("seed", show="varies"),
    _field("scope", justify="left"),
    Column("strategy", "strategy", "", lambda row: label(row.a), justify="left"),
    Column("a_ms", "A", "ms", lambda row: _time(row.a), ms_text),
    Column("b_ms", "B", "ms", lambda row: _time(row.b), ms_text),
    Column("ratio", "B / A", "", lambda row: row.ratio, ratio_text),
    Column("verdict", "verdict", "", lambda row: row.verdict, justify="left", mark=_mark),
    Column("noise", "noise?", "", _noise, justify="left"),
]


def _where(records: Sequence[Record]) -> str:
    parts = {", ".join(filter(None, (r.device, r.torch and f"torch {r.torch}", r.commit))): None for r in records}
    return "; ".join(parts)


def chapter(comparison: Comparison) -> Chapter:
    """The comparison as a table with a caption and notes."""
    rows = comparison.rows
    caption = f"A: {_where([row.a for row in rows])}\nB: {_where([row.b for row in rows])}"
    counts = {v: sum(row.verdict == v for row in rows) for v in dict.fromkeys(row.verdict for row in rows)}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    notes = [f"{summary} (beyond {100 * comparison.threshold:g}% of the median)"]
    for row in rows:
        if row.verdict == "regressed":
            reason = " ".join((row.b.reason or "no reason recorded").split())
            notes.append(f"{row.a.status} -> {row.b.status}: {_setting(row.b)} {label(row.b)}: {reason}")
    for a, b in dict.fromkeys((row.a.flush, row.b.flush) for row in rows if row.a.flush != row.b.flush):
        notes.append(
            f"flush: A {a}, B {b}: after write, a GPU's times contain the write-back of its cache (6 and 18% in two "
            f"measurements bound by memory on an H100), after write+read they do not"
        )
    for name, only in (("A", comparison.only_a), ("B", comparison.only_b)):
        notes += [f"only in {name}: {line}" for line in _listed(only)]
    if any(_noise(row) for row in rows):
        notes.append("noise?: maybe, where the p20-p80 ranges of A and B overlap")
    return Chapter(caption, [Section("B against A", worth_showing(_COLUMNS, rows), rows)], notes)


def render(comparison: Comparison, out: str = "table", width: int | None = None, plain: bool = False) -> str | Group:
    """A rich renderable ("table") or a GitHub table ("md")."""
    if out == "md":
        return markdown([chapter(comparison)])
    if out == "table":
        return drawing([chapter(comparison)], width, plain)
    raise ValueError(f'compare: out is {out!r}; expected "table" or "md".')
