"""What a table can show of a record: rows, columns, and how numbers are written. No table is built here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from .records import Record
from .timing import median_interval

Mode = Literal["summary", "full"]


def time_of(record: Record | None) -> float | None:
    """Median in ms, None unless the result was right."""
    return record.median_ms if record is not None and record.status == "ok" else None


def label(record: Record) -> str:
    """The strategy with all that distinguishes it: `pad_and_clip(256), graph, weights gathered inside`.

    Only `base mm` has a choice of where weights are gathered; elsewhere it is inside by nature. A call that chooses by
    itself is named after the phase it was given: `phase decode`.
    """
    text = record.strategy if record.threshold is None else f"{record.strategy}({record.threshold})"
    phase = getattr(record, "phase", None)
    text = f"phase {phase}" if record.strategy == "auto" and phase else text
    text += f", {record.step}" if getattr(record, "step", None) else ""
    text += ", graph" if record.graph else ""
    text += f", {record.activation_format} activations" if record.activation_format else ""
    return text + (f", weights gathered {record.gather}" if record.gather and record.scope == "base mm" else "")


def ratio_interval(base: Record | None, record: Record | None) -> tuple[float, float] | None:
    """90% interval of the median of base over record, round by round; None unless both were timed in the same rounds,
    at least five."""
    if base is None or record is None or not (time_of(base) and time_of(record)) or not base.same_rounds(record):
        return None
    return median_interval([b / r for b, r in zip(base.samples_ms, record.samples_ms, strict=False)])


def least_ratio(base: Record | None, record: Record | None) -> float | None:
    """Lower end of the `ratio_interval`."""
    interval = ratio_interval(base, record)
    return interval and interval[0]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a record and the records it is seen against."""

    record: Record
    baseline: Record | None = None
    best: bool = False  # lowest median of its format and scope
    clip: Record | None = None  # summary: the best pad_and_clip with everything inside
    ready_clip: Record | None = None  # summary: the best pad_and_clip with weights made ready before the clock
    graph: Record | None = None  # summary: the loop over experts under a CUDA graph
    ready: Record | None = None  # summary: the best with weights dequantized or gathered before the clock
    grouped: Record | None = None  # summary: one launch over all experts
    peer: Record | None = None  # of kernels on packed weights: the fastest of the others' launches over all experts
    single: Record | None = None  # full: the same on one thread
    prefill: Record | None = None  # layer: of the same way; record is its decode step
    hinted: Row | None = None  # layer: the way in which the caller passes the phase

    @property
    def peer_low(self) -> float | None:
        """The least that the peer's time over this one is."""
        return least_ratio(self.peer, self.record)

    @property
    def scaling(self) -> float | None:
        """Median on one thread over the median of this record."""
        ours, one = time_of(self.record), time_of(self.single)
        return one / ours if ours and one else None

    @property
    def total_ms(self) -> float | None:
        """layer: the prefill and all decode steps."""
        prefill, decode = time_of(self.prefill), time_of(self.record)
        return prefill + (self.record.decode_steps or 0) * decode if prefill and decode else None

    @property
    def speedup(self) -> float | None:
        """Median of the baseline over the median of this record."""
        ours, base = time_of(self.record), time_of(self.baseline)
        return base / ours if ours and base else None


@dataclasses.dataclass(frozen=True)
class Column:
    """How one value of a row is found, shown, and named.

    `show`: "always"; "varies": only if rows differ in it, else `caption` says it once; "any": if any row has it.
    `drop`: the higher, the sooner it gives way on a narrow terminal; 0 stays.
    """

    name: str
    header: str
    unit: str
    getter: Callable[[Any], Any]
    formatter: Callable[[Any], str] = str
    justify: Literal["left", "right"] = "right"
    show: Literal["always", "varies", "any"] = "always"
    drop: int = 0
    caption: Callable[[Any], str] | None = None
    mark: Callable[[Any], str] = lambda row: ""  # "" | "best" | "bad"

    def text(self, row: Any) -> str:
        value = self.getter(row)
        return "-" if value is None else value if isinstance(value, str) else self.formatter(value)


def count_text(value: int) -> str:
    return f"{value:,}"


def ms_text(value: float) -> str:
    """Four digits or so, always with the same number of decimals in a range of ten."""
    decimals = 4 if value < 0.1 else 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:,.{decimals}f}"


def number_text(value: float) -> str:
    """Three digits."""
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def ratio_text(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}x"


def _percent(value: float) -> str:
    return f"{100 * value:.{1 if value < 0.0995 else 0}f}%"


def _error(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _median(row: Row) -> float | str | None:
    """A time, or why there is none: WRONG stays in the reader's eye, the reason is below the table."""
    if row.record.status == "ok":
        return row.record.median_ms
    return "WRONG" if row.record.status == "WRONG" else "n/a"


def _range(row: Row) -> str | None:
    low, high = row.record.p20_ms, row.record.p80_ms
    return f"{ms_text(low)}–{ms_text(high)}" if time_of(row.record) and low and high else None


def timed(name: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row.record, name) if time_of(row.record) else None


def field(name: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row.record, name, None)


def _launches_saved(row: Row) -> str | None:
    ours, base = row.record.launches, row.baseline and row.baseline.launches
    return None if ours is None else f"{ours:,}" if base in (None, ours) else f"{base:,}→{ours:,}"


def _at(name: str) -> Callable[[Row], Any]:
    """Time of a pad_and_clip record and the threshold it was reached at."""

    def text(row: Row) -> str | None:
        record = getattr(row, name)
        ms = time_of(record)
        return f"{ms_text(ms)} ({record.threshold})" if ms else None

    return text


def _clip_speedup(row: Row) -> float | None:
    ours, base = time_of(row.clip), time_of(row.baseline)
    return base / ours if ours and base else None


def _clip_launches(row: Row) -> str | None:
    return _launches_saved(dataclasses.replace(row, record=row.clip)) if row.clip else None


def _ready(row: Row) -> str | None:
    return label(row.ready) if row.ready else None


def _peer(row: Row) -> str | None:
    """Time of the best peer and who it is; with weights ready, it does less work."""
    ms = time_of(row.peer)
    if row.peer is None or not ms:
        return None
    ready = ", ready" if row.peer.scope == "base mm" and row.peer.group_size is not None else ""
    return f"{ms_text(ms)} ({row.peer.provider}{ready})"


def _versus_peer(row: Row) -> float | None:
    ours, peer = time_of(row.record), time_of(row.peer)
    return peer / ours if ours and peer else None


def _mark(row: Row) -> str:
    return "bad" if row.record.status == "WRONG" else "best" if row.best else ""


def _steps(row: Row) -> str | None:
    r = row.record
    if r.layers is None:
        return None
    return f"{r.layers} layers, a prefill and {r.decode_steps} decode steps of batch {r.batch}"


def _way(row: Row) -> str:
    return label(dataclasses.replace(row.record, step=None))


def _of_prefill(getter: Callable[[Row], Any]) -> Callable[[Row], Any]:
    """A value of the prefill of a layer, which may be missing."""
    return lambda row: None if row.prefill is None else getter(dataclasses.replace(row, record=row.prefill))


def _versus_hinted(name: str, getter: Callable[[Row], float | None]) -> Column:
    """A time over that of the way in which the caller passes the phase."""

    def ratio(row: Row) -> float | None:
        ours, hinted = getter(row), row.hinted and getter(row.hinted)
        return ours / hinted if ours and hinted else None

    return Column(name, "vs\nhinted", "", ratio, ratio_text, show="any")


def _interval(row: Row) -> str | None:
    interval = ratio_interval(row.record, row.hinted and row.hinted.record) if row.hinted is not None else None
    return interval and f"{interval[0]:.2f}–{interval[1]:.2f}x"


def _unless_batch(row: Row) -> str | None:
    """A decode distribution is named after its batch, which has a column of its own."""
    return row.record.distribution if getattr(row.record, "batch", None) is None else None


WORKLOAD = [
    Column("distribution", "distri-\nbution", "", field("distribution"), str, "left", "varies", caption=str),
    Column("scaled", "scaled", "", field("scaled"), str, "left", "varies", caption="scaled: {}".format),
    Column(
        "num_experts", "experts", "", field("num_experts"), count_text, show="varies", caption="{:,} experts".format
    ),
    Column("total_tokens", "rows", "", field("total_tokens"), count_text, show="varies", caption="{:,} rows".format),
    Column("active_experts", "active", "", field("active_experts"), str, show="varies", caption="{:,} active".format),
    Column("max_tokens", "largest", "rows", field("max_tokens"), count_text, show="varies", caption="max {:,}".format),
    Column("steps", "steps", "", _steps, str, "left", "varies", caption=str),
    Column("top_k", "top_k", "", field("top_k"), count_text, show="varies", caption="top_k {}".format),
    Column("dtype", "dtype", "", field("dtype"), str, "left", "varies", caption="{} activations".format),
    Column("group_size", "group", "", field("group_size"), count_text, show="varies", caption="group {}".format),
    Column("scales", "scales", "", field("scales"), str, "left", "varies", caption="{} scales".format),
    Column("seed", "seed", "", field("seed"), str, show="varies"),
]
WHO = [
    Column("provider", "provider", "", field("provider"), str, "left", "varies", caption="provider {}".format),
    Column("scope", "scope", "", field("scope"), str, "left", "varies", caption=str),
    Column("api", "api", "", field("api"), str, "left", "varies", caption="{} calls".format),
    Column("weight_layout", "layout", "", field("weight_layout"), str, "left", "varies", caption="{} weights".format),
    Column("device", "device", "", field("device"), str, "left", "varies", caption=str),
    Column("torch", "torch", "", field("torch"), str, "left", "varies", caption="torch {}".format),
    Column("flush", "flush", "", field("flush"), str, "left", "varies"),
]  # fmt: skip
_PEER = [
    Column("peer", "best\npeer", "ms", _peer, str, "left", "any", drop=3),
    Column("versus_peer", "vs\npeer", "", _versus_peer, ratio_text, show="any", drop=2),
    Column("versus_peer_low", "vs peer,\nat least", "", lambda row: row.peer_low, ratio_text, show="any", drop=2),
]
_SCALING = [
    Column("scaling", "vs 1\nthread", "", lambda row: row.scaling, ratio_text, show="any"),
    Column("scaling_low", "vs 1\nthread,\nat least", "", lambda row: least_ratio(row.single, row.record), ratio_text,
           show="any"),
]  # fmt: skip
_FORMAT = [Column("format", "format", "", field("format"), str, "left")]
_STRATEGY = [Column("strategy", "strategy", "", lambda row: label(row.record), str, "left", mark=_mark)]
_ROOFLINE = Column("roofline", "% of\nroof-\nline", "", timed("roofline"), _percent)
_RATES = [
    Column("tflops", "TFLOP\n/s", "", timed("tflops"), number_text, show="any", drop=3),
    Column("gbps", "GB/s", "", timed("gbps"), number_text, show="any", drop=4),
]
_VERSUS = Column("speedup", "vs per_\nexpert", "", lambda row: row.speedup, ratio_text, show="any")
_READ = Column("read_fraction", "% of\nread", "", timed("read_fraction"), _percent, show="any", drop=1)
_HOST = Column("host_us", "host", "us", field("host_us"), number_text, show="any", drop=4)
_ERROR = Column("error", "error", "", field("error"), _error, show="any", drop=3)
_FULL = [
    Column("launches", "GEMM\nlaun-\nches", "", field("launches"), count_text),
    Column("schedule_launches", "sche-\ndule", "", field("schedule_launches"), count_text, show="any", drop=7),
    Column("dequant_launches", "de-\nquant", "", field("dequant_launches"), count_text, show="any", drop=5),
    Column("gather_launches", "ga-\nther", "", field("gather_launches"), count_text, show="any", drop=6),
    Column("pad_launches", "pad", "", field("pad_launches"), count_text, show="any", drop=9),
    Column("scatter_launches", "scat-\nter", "", field("scatter_launches"), count_text, show="any", drop=8),
    Column("padded_rows", "padded\nrows", "", field("padded_rows"), count_text, show="any", drop=2),
    Column("plan_ms", "plan", "ms", field("plan_ms"), ms_text, show="any", drop=5),
    Column("median_ms", "median", "ms", _median, ms_text, mark=_mark),
    Column("p20_p80_ms", "p20–p80", "ms", _range, show="any", drop=7),
    Column("schedule_ms", "of it\nsche-\ndule", "ms", timed("schedule_ms"), ms_text, show="any", drop=6),
    _HOST,
    _VERSUS,
    *_PEER,
    *_SCALING,
    *_RATES,
    _ROOFLINE,
    Column("peak_bytes", "peak", "MiB", field("peak_bytes"), lambda v: number_text(v / 2**20), show="any", drop=3),
    _ERROR,
]
_SUMMARY = [
    Column("baseline_ms", "per_\nexpert", "ms", lambda row: time_of(row.baseline), ms_text, show="any"),
    Column("graph_ms", "per_expert,\ngraph", "ms", lambda row: time_of(row.graph), ms_text, show="any", drop=3),
    Column("clip", "pad_and_clip\n(threshold)", "ms", _at("clip"), show="any"),
    Column("clip_launches", "pad_and_\nclip\nlaunches", "", _clip_launches, show="any", drop=6),
    Column(
        "clip_plan_ms",
        "pad_and_\nclip\nplan",
        "ms",
        lambda row: row.clip and row.clip.plan_ms,
        ms_text,
        show="any",
        drop=5,
    ),
    Column("clip_speedup", "pad_and_\nclip\nspeed-up", "", _clip_speedup, ratio_text, show="any"),
    Column("grouped_ms", "grouped", "ms", lambda row: time_of(row.grouped), ms_text, show="any", drop=4),
    Column("strategy", "best\nstrategy", "", lambda row: label(row.record), str, "left", mark=_mark),
    Column("best_launches", "best\nlaunches", "", _launches_saved, show="any", drop=6),
    Column("median_ms", "best", "ms", _median, ms_text, mark=_mark),
    dataclasses.replace(_VERSUS, header="best\nspeed-up"),
    *_PEER,
    Column("ready_clip", "ready,\npad_and_clip", "ms", _at("ready_clip"), show="any", drop=4),
    Column("ready_strategy", "ready,\nbest\nstrategy", "", _ready, str, "left", "any", drop=7),
    Column("ready_ms", "ready,\nbest", "ms", lambda row: time_of(row.ready), ms_text, show="any", drop=2),
    *(dataclasses.replace(c, drop=8) for c in _RATES),
    dataclasses.replace(_ERROR, drop=0),
    Column("floor_ms", "floor", "ms", timed("floor_ms"), ms_text, drop=2),
    _ROOFLINE,
    Column("headroom", "could\ngain", "", timed("roofline"), lambda v: ratio_text(1 / v), drop=1),
]
_DECODE = [
    Column("distribution", "distri-\nbution", "", _unless_batch, str, "left", "varies"),
    Column("batch", "batch", "", field("batch"), count_text, show="any"),
    Column("total_tokens", "rows", "", field("total_tokens"), count_text),
    Column("active_experts", "active\nexperts", "", field("active_experts"), count_text),
]
_DECODE_MEASURED = [
    Column("launches", "GEMM\nlaun-\nches", "", field("launches"), count_text),
    Column("median_us", "median", "us", lambda row: v if isinstance(v := _median(row), str) else v and v * 1e3,
           number_text, mark=_mark),
    _HOST,
    _VERSUS,
    *_PEER,
    *_SCALING,
    _RATES[1],
    _READ,
    _ROOFLINE,
    _ERROR,
]  # fmt: skip

_LAYER = [
    Column("way", "call", "", _way, str, "left", mark=_mark),
    Column("prefill_ms", "prefill", "ms", _of_prefill(_median), ms_text),
    _versus_hinted("prefill_versus_hinted", lambda row: time_of(row.prefill)),
    Column("median_ms", "decode\nstep", "ms", _median, ms_text),
    _versus_hinted("versus_hinted", lambda row: time_of(row.record)),
    Column("total_ms", "total", "ms", lambda row: row.total_ms, ms_text, mark=_mark),
    _versus_hinted("total_versus_hinted", lambda row: row.total_ms),
    dataclasses.replace(_HOST, header="host,\nstep"),
]  # fmt: skip
_LAYER_FULL = [
    Column("prefill_range", "prefill\np20–p80", "ms", _of_prefill(_range), show="any", drop=5),
    Column("range", "step\np20–p80", "ms", _range, show="any", drop=5),
    Column("versus_hinted_interval", "step vs\nhinted, 90%", "", _interval, show="any", drop=1),
    Column("prefill_tflops", "prefill\nTFLOP/s", "", _of_prefill(timed("tflops")), number_text, show="any", drop=3),
    _RATES[1],
    Column("prefill_error", "prefill\nerror", "", _of_prefill(field("error")), _error, show="any", drop=4),
    _ERROR,
]


def all_columns(kind: str, mode: Mode) -> list[Column]:
    if kind == "layer":
        varying = {"total_tokens", "active_experts", "max_tokens"}  # those of a step, not of a row
        workload = [c for c in WORKLOAD if c.name not in varying]
        who = [c for c in WHO if c.name != "scope"]
        return [*_FORMAT, *workload, *who, *_LAYER, *(_LAYER_FULL if mode == "full" else [])]
    if kind == "decode":
        given = {c.name for c in _DECODE}
        workload = [c for c in WORKLOAD if c.name not in given | {"distribution", "max_tokens"}]
        return [*_FORMAT, *_DECODE, *workload, *WHO, *_STRATEGY, *_DECODE_MEASURED]
    if mode == "summary":
        who = [c for c in WHO if c.name != "scope"]
        return [*_FORMAT, *WORKLOAD, *who, *_SUMMARY]
    return [*_FORMAT, *WORKLOAD, *WHO, *_STRATEGY, *_FULL]


def worth_showing(columns: Iterable[Column], rows: Sequence[Any]) -> list[Column]:
    """Columns worth their width: always, any row has a value, or rows differ."""
    shown = []
    for column in columns:
        values = {value for row in rows if (value := column.getter(row)) is not None}
        if column.show == "always" or len(values) > 1 or (column.show == "any" and values - {0}):
            shown.append(column)
    return shown
