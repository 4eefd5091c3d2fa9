"""Tables, CSV and JSON of whole models: pure views of `ModelRecord`, nothing is measured here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from .columns import Column, count_text, ms_text, number_text, ratio_text, worth_showing
from .model_records import PHASES, ModelRecord
from .report import Chapter, Out, Section, drawing, markdown, newest
from .timing import median_interval

__all__ = ["SLOWER", "ModelRow", "model_chapters", "model_rows", "render_models", "slow"]

SLOWER = 2.0  # how many times as long as the reference a decode may take
DECODES = ("decode", "graph")


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A record, and the fastest reference of its run in each phase that it was timed in."""

    record: ModelRecord
    best: dict[str, ModelRecord]
    dense: int | None = None  # bytes of the reference's experts

    def speedup(self, phase: str) -> float | None:
        """Median of the fastest reference over ours."""
        ours, best = self.record.median(phase), self.best.get(phase)
        reference = None if best is None else best.median(phase)
        return reference / ours if ours and reference and not self.record.is_reference else None

    def least(self, phase: str) -> float | None:
        """Lower end of the 90% interval of the median of the ratios, round by round."""
        if self.speedup(phase) is None:
            return None
        pairs = zip(self.best[phase].samples(phase), self.record.samples(phase), strict=False)
        interval = median_interval([reference / ours for reference, ours in pairs])
        return interval and interval[0]

    @property
    def size(self) -> float | None:
        """Bytes of the experts, of those of the reference."""
        own = self.record.expert_bytes
        return own / self.dense if own and self.dense and not self.record.is_reference else None


def model_rows(records: Sequence[ModelRecord]) -> list[ModelRow]:
    """A row for each record, in their order, each against the references of its own run."""
    found = []
    for record in records:
        references = [r for r in records if r.is_reference and r.run_key() == record.run_key()]
        best = {}
        for phase in PHASES:
            timed = [(ms, i) for i, r in enumerate(references) if (ms := r.median(phase)) is not None]
            if timed:
                best[phase] = references[min(timed)[1]]
        dense = next((r.expert_bytes for r in references if r.expert_bytes), None)
        found.append(ModelRow(record, best, dense))
    return found


def slow(records: Sequence[ModelRecord]) -> list[str]:
    """The guard: what is wrong with each of ours whose decode takes more than `SLOWER` times the reference's."""
    return [
        f"{row.record.format}: {phase} takes {1 / ratio:.2f} times as long as {row.best[phase].label}; at most "
        f"{SLOWER:g} times are allowed"
        for row in model_rows(records)
        for phase in DECODES
        if (ratio := row.speedup(phase)) is not None and ratio < 1 / SLOWER
    ]


# ---- columns


def _field(name: str) -> Callable[[ModelRow], Any]:
    return lambda row: getattr(row.record, name)


def _time(phase: str) -> Callable[[ModelRow], Any]:
    """A time, or why there is none."""
    states = {"WRONG": "WRONG", "unsupported": "n/a"}
    return lambda row: states.get(row.record.status) or row.record.median(phase)


def _rate(phase: str) -> Callable[[ModelRow], Any]:
    return lambda row: row.record.tokens_per_second(phase)


def _mib(name: str, header: str, drop: int) -> Column:
    return Column(name, header, "MiB", _field(name), lambda v: number_text(v / 2**20), show="any", drop=drop)


def kl_text(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4f}"


def share_text(value: float) -> str:
    return f"{100 * value:.1f}%"


def _mark(row: ModelRow) -> str:
    return "bad" if row.record.status == "WRONG" else ""


_ASKED = [
    Column("model", "model", "", _field("model"), str, "left", "varies", caption=str),
    Column("weights", "weights", "", _field("weights"), str, "left", "varies", caption=str),
    Column("architecture", "architecture", "", _field("architecture"), str, "left", "varies", caption=str),
    Column("layers", "layers", "", _field("layers"), count_text, show="varies", caption="{:,} layers".format),
    Column("num_experts", "experts", "", _field("num_experts"), count_text, show="varies",
           caption="{:,} experts".format),
    Column("top_k", "top_k", "", _field("top_k"), count_text, show="varies", caption="top_k {}".format),
    Column("hidden", "hidden", "", _field("hidden"), count_text, show="varies", caption="hidden {:,}".format),
    Column("dtype", "dtype", "", _field("dtype"), str, "left", "varies", caption="{} activations".format),
    Column("group_size", "group", "", _field("group_size"), count_text, show="varies", caption="group {}".format),
    Column("batch", "batch", "", _field("batch"), count_text, show="varies", caption="batch {}".format),
    Column("prompt_tokens", "prompt", "", _field("prompt_tokens"), count_text, show="varies",
           caption="prompt of {:,} tokens".format),
    Column("new_tokens", "new", "", _field("new_tokens"), count_text, show="varies",
           caption="{:,} new tokens".format),
    Column("device", "device", "", _field("device"), str, "left", "varies", caption=str),
    Column("torch", "torch", "", _field("torch"), str, "left", "varies", caption="torch {}".format),
    Column("transformers", "transformers", "", _field("transformers"), str, "left", "varies",
           caption="transformers {}".format),
]  # fmt: skip
_MEASURED = [
    _mib("expert_bytes", "experts", 0),
    Column("size", "of\nref", "", lambda row: row.size, share_text, show="any"),
    _mib("model_bytes", "model", 3),
    _mib("load_peak_bytes", "peak,\nloading", 4),
    _mib("run_peak_bytes", "peak,\nrunning", 5),
    Column("prefill_ms", "prefill", "ms", _time("prefill"), ms_text, mark=_mark),
    Column("prefill_rate", "tokens\n/s", "", _rate("prefill"), number_text, show="any", drop=6),
    Column("prefill_speedup", "vs\nref", "", lambda row: row.speedup("prefill"), ratio_text, show="any"),
    Column("first_token_ms", "first\ntoken", "ms", lambda row: row.record.median("first_token"), ms_text, show="any",
           drop=2),
    Column("decode_ms", "decode", "ms", _time("decode"), ms_text, mark=_mark),
    Column("decode_rate", "tokens\n/s", "", _rate("decode"), number_text, show="any", drop=6),
    Column("decode_speedup", "vs\nref", "", lambda row: row.speedup("decode"), ratio_text, show="any"),
    Column("decode_least", "vs ref,\nat least", "", lambda row: row.least("decode"), ratio_text, show="any", drop=1),
    Column("graph_ms", "decode,\ngraph", "ms", lambda row: row.record.median("graph"), ms_text, show="any"),
    Column("graph_speedup", "vs\nref", "", lambda row: row.speedup("graph"), ratio_text, show="any"),
    Column("kl", "KL", "nats", _field("kl"), kl_text, show="any"),
    Column("top1", "top-1\nagrees", "", _field("top1"), share_text, show="any"),
]  # fmt: skip
_FIRST = [
    Column("format", "format", "", _field("format"), str, "left", mark=_mark),
    Column("label", "experts by", "", lambda row: row.record.label, str, "left"),
]


# ---- chapters


def _caption(rows: Sequence[ModelRow]) -> str:
    pieces = []
    for column in _ASKED:
        values = {v for row in rows if (v := column.getter(row)) is not None}
        if column.caption and len(values) == 1:
            pieces.append(column.caption(values.pop()))
    return ", ".join(dict.fromkeys(pieces))


def _notes(rows: Sequence[ModelRow]) -> list[str]:
    records = [row.record for row in rows]
    notes = []
    for r in records:
        if r.status != "ok":
            state = "WRONG" if r.status == "WRONG" else "n/a"
            notes.append(f"{state}: {r.format} {r.label}: {r.reason or 'no reason recorded'}")
        if r.graph_reason:
            notes.append(f"no graph: {r.format} {r.label}: {r.graph_reason}")
    if any(r.status == "ok" and len(r.decode_samples_ms) < r.rounds for r in records):
        notes.append("interrupted: fewer samples than were asked for")
    if not any(r.is_reference for r in records):
        notes.append("no reference: the checkpoint is quantized, so neither speed-up nor quality has a base")
        return notes
    notes.append(
        "vs ref: the fastest of transformers' own experts on unquantized weights, in the same rounds, over ours"
    )
    if any(row.least("decode") for row in rows):
        notes.append("at least: lower end of the 90% interval of the median of the ratios round by round")
    notes += _quality_notes(records)
    problems = slow(records)
    notes += [f"WRONG: {problem}" for problem in problems] or [
        f"guard: no decode takes more than {SLOWER:g} times as long as the reference"
    ]
    return notes


def _quality_notes(records: Sequence[ModelRecord]) -> list[str]:
    r = next((r for r in records if r.kl is not None), None)
    if r is None:
        return []
    source = "the shipped text" if r.text == "default" else str(r.text)
    tokens = "its bytes, since the model has no tokenizer" if r.tokenizer == "bytes" else "the model's tokens"
    notes = [
        f"KL, top-1: of the next token's distribution against {r.reference} in {r.dtype}, teacher-forced on "
        f"{r.text_tokens:,} tokens of {source} ({tokens}), in windows that do not see each other; another "
        f"implementation on the same weights is the noise floor"
    ]
    if r.weights.startswith("random"):
        notes.append(
            "random weights are not a trained model: KL and top-1 show that the formats are what they are, not what "
            "they do to a model that has learned something"
        )
    return notes


def _kept(records: Sequence[ModelRecord]) -> list[ModelRecord]:
    """The newest record of each variant of ours, with the references of its run: a ratio needs both."""
    ours = _newest([r for r in records if not r.is_reference])
    runs = {r.run_key() for r in ours}
    return [r for r in records if r in ours or (r.run_key() in runs and r.is_reference)] if runs else _newest(records)


def _newest(records: Sequence[ModelRecord]) -> list[Any]:
    key: Any = lambda r: (r.config_key(), r.device, r.torch)  # noqa: E731
    return list(newest(records, key).values())  # type: ignore[arg-type]


def model_chapters(records: Sequence[ModelRecord]) -> list[Chapter]:
    """One table a run, of the newest record of each variant."""
    runs: dict[Any, list[ModelRow]] = {}
    for row in model_rows(_kept(records)):
        runs.setdefault(row.record.run_key(), []).append(row)
    found = []
    for rows in runs.values():
        shown = worth_showing([*_FIRST, *_ASKED, *_MEASURED], rows)
        found.append(Chapter(_caption(rows), [Section(f"model {rows[0].record.model}", shown, rows)], _notes(rows)))
    return found


def flat_model(row: ModelRow) -> dict[str, Any]:
    """All fields of a record and what is derived from them; a wrong result has no times."""
    data = dataclasses.asdict(row.record)
    for phase in PHASES:
        if row.record.status != "ok":
            data.update({f"{phase}_ms": None, f"{phase}_samples_ms": []})
        data[f"{phase}_tokens_per_s"] = row.record.tokens_per_second(phase)
        data[f"{phase}_speedup"] = row.speedup(phase)
        data[f"{phase}_speedup_low"] = row.least(phase)
    return data | {"expert_bytes_of_reference": row.size}


def render_models(records: Sequence[ModelRecord], out: Out) -> Any:
    """As `report.render`: text, or a rich renderable for "table"."""
    if out == "table":
        return drawing(model_chapters(records))
    if out == "md":
        return markdown(model_chapters(records))
    found = [flat_model(row) for row in model_rows(records)]
    if out == "json":
        return json.dumps(found, indent=1, allow_nan=False) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    for data in found:
        writer.writerow({k: " ".join(map(repr, v)) if isinstance(v, list) else v for k, v in data.items()})
    return text.getvalue()
