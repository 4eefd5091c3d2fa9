"""Tables, plots and comparisons of records with known numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import struct
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qexperts.bench import columns, plots, report
from qexperts.bench import compare as comparing
from qexperts.bench.records import Record, record_from_json


def record(ms: float | None = 1.0, **changes: Any) -> Record:
    """int4_sym, 238 launches in `ms`; 1e12 FLOP and 1e9 bytes, so 1 ms is 1,000 TFLOP/s and 1,000 GB/s."""
    values: dict[str, Any] = {
        "kind": "prefill", "distribution": "recorded", "scaled": None, "num_experts": 256, "active_experts": 238,
        "total_tokens": 31_440, "max_tokens": 2_491, "num_tokens_per_expert": [2_491, 28_949],
        "n": 3072, "k": 1536, "group_size": 128, "format": "int4_sym",
        "dtype": "bf16", "seed": 0, "provider": "torch", "strategy": "per_expert", "threshold": None,
        "scope": "base+deq", "gather": None, "graph": False, "api": "raw", "weight_layout": "public",
        "launches": 238, "dequant_launches": 238, "error": 2.1e-3, "flop": 10**12, "mandatory_bytes": 10**9,
        "ceiling_tflops": 2000.0, "ceiling_copy_gbps": 4000.0, "device": "Device 1", "torch": "2.11.0",
        "time": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    if ms is not None:
        values.update(median_ms=ms, p20_ms=0.99 * ms, p80_ms=1.01 * ms, samples_ms=[0.99 * ms, ms, 1.01 * ms])
    return Record(**{**values, **changes})


def clip(ms: float, threshold: int, launches: int = 38, **changes: Any) -> Record:
    return record(ms, strategy="pad_and_clip", threshold=threshold, launches=launches, padded_rows=1_234, **changes)


def grouped(ms: float | None, **changes: Any) -> Record:
    return record(ms, strategy="grouped", launches=1, **{"dequant_launches": 1, **changes})


MM: dict[str, Any] = {"scope": "base mm", "dequant_launches": 0}
BF16: dict[str, Any] = {**MM, "format": "bf16", "group_size": None}
INT4 = [
    record(8.0), record(4.0, graph=True), clip(5.0, 64, 91), clip(2.5, 256), grouped(3.2),
    record(4.0, **MM), clip(1.25, 128, 65, gather="before", **MM), clip(2.0, 128, 65, gather="inside", **MM),
]  # fmt: skip
UNQUANTIZED = [
    record(4.4, **BF16), clip(1.1, 128, 65, gather="before", **BF16), clip(2.2, 256, gather="inside", **BF16),
]  # fmt: skip
WRONG = grouped(None, format="int2_asym", status="WRONG", reason="row 17\nis off", error=0.31)
REFUSED = grouped(None, format="fp8_e5m2", status="unsupported", reason="grouped mm needs sm_90")


def markdown_rows(text: str) -> list[list[dict[str, str]]]:
    """The tables of a markdown text, each a list of rows by column name."""
    tables: list[list[dict[str, str]]] = []
    header: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = [cell.strip() for cell in line.strip("|").split("|")]
            tables.append([])
        elif not set(line) <= set("|:-"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            tables[-1].append(dict(zip(header, cells, strict=True)))
    return tables


def printed(records: list[Record], mode: report.Mode, width: int, plain: bool = True) -> str:
    console_module = pytest.importorskip("rich.console")
    colours = None if plain else "standard"
    console = console_module.Console(file=io.StringIO(), width=width, force_terminal=not plain, color_system=colours)
    console.print(report.render(records, "table", mode, width, plain))
    return console.file.getvalue()


class TestDerived:
    def test_baseline_is_eager_per_expert_of_the_same_scope(self) -> None:
        baselines = report.baseline_of(INT4)
        assert {key[4]: value.median_ms for key, value in baselines.items()} == {"base+deq": 8.0, "base mm": 4.0}

    def test_a_wrong_baseline_is_none(self) -> None:
        assert report.baseline_of([record(8.0, status="WRONG")]) == {}

    def test_newest_by_time_then_by_position(self) -> None:
        late, early, last = record(1.0, time="2026-02"), record(2.0, time="2026-01"), record(3.0, time="2026-02")
        assert report.newest([late, early], Record.config_key) == {late.config_key(): late}
        assert report.newest([late, early, last], Record.config_key)[late.config_key()] is last

    def test_labels(self) -> None:
        assert report.label(clip(1, 256)) == "pad_and_clip(256)"
        assert report.label(record(1, graph=True)) == "per_expert, graph"
        assert report.label(clip(1, 64, gather="inside", **MM)) == "pad_and_clip(64), weights gathered inside"
        assert report.label(clip(1, 64, gather="inside")) == "pad_and_clip(64)"

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.01234, "0.0123"), (0.6354, "0.635"), (9.8765, "9.877"), (12.346, "12.35"), (1234.5, "1,234.5")],
    )
    def test_times_keep_four_digits(self, value: float, text: str) -> None:
        assert columns.ms_text(value) == text


class TestFull:
    def test_every_number_of_a_row(self) -> None:
        (table,) = markdown_rows(report.render(INT4, "md", "full"))
        row = next(row for row in table if "pad_and_clip(256)" in row["strategy"])
        assert row["scope"] == "base+deq"
        assert row["GEMM launches"] == "38" and row["dequant"] == "238" and row["padded rows"] == "1,234"
        assert row["median ms"] == "**2.500**" and row["p20–p80 ms"] == "2.475–2.525"
        assert row["vs per_expert"] == "3.20x"  # 8 / 2.5
        assert row["TFLOP/s"] == "400" and row["GB/s"] == "400"  # 1e12 FLOP and 1e9 bytes in 2.5 ms
        assert row["% of roofline"] == "20%"  # the floor is 1e12 FLOP at 2000 TFLOP/s, 0.5 ms
        assert row["error"] == "2.1e-3"

    def test_ratio_is_to_the_baseline_of_the_scope(self) -> None:
        (table,) = markdown_rows(report.render(INT4, "md", "full"))
        row = next(row for row in table if row["strategy"].strip("*") == "pad_and_clip(128), weights gathered before")
        assert row["vs per_expert"] == "3.20x"  # 4 / 1.25, not 8 / 1.25

    def test_best_of_each_format_and_scope_is_bold(self) -> None:
        (table,) = markdown_rows(report.render(INT4 + UNQUANTIZED, "md", "full"))
        bold = [(row["format"], row["scope"], row["median ms"]) for row in table if row["strategy"].startswith("**")]
        assert bold == [
            ("int4_sym", "base+deq", "**2.500**"),
            ("int4_sym", "base mm", "**1.250**"),
            ("bf16", "base mm", "**1.100**"),
        ]

    def test_nothing_is_best_without_a_rival(self) -> None:
        assert "**3" not in report.render([grouped(3.0), WRONG], "md", "full")

    def test_one_table_per_projection(self) -> None:
        text = report.render([record(1.0), record(2.0, n=1536, k=3072)], "md", "full")
        assert [line for line in text.splitlines() if line.startswith("**")] == [
            "**prefill N=3072 K=1536**", "**prefill N=1536 K=3072**",
        ]  # fmt: skip
        assert [[row["median ms"] for row in table] for table in markdown_rows(text)] == [["1.000"], ["2.000"]]

    def test_a_rerun_replaces_its_row(self) -> None:
        rerun = [record(8.0), record(7.0, time="2026-02-01T00:00:00Z")]
        assert [row["median ms"] for row in markdown_rows(report.render(rerun, "md", "full"))[0]] == ["7.000"]

    def test_no_baseline_no_ratio(self) -> None:
        assert "vs per_expert" not in markdown_rows(report.render([grouped(3.0)], "md", "full"))[0][0]


class TestColumns:
    def test_only_what_varies_is_shown(self) -> None:
        names = [column.name for column in report.columns(INT4, "full")]
        assert {"format", "strategy", "launches", "median_ms", "scope", "dequant_launches"} <= set(names)
        constant = {"distribution", "num_experts", "total_tokens", "dtype", "group_size", "provider", "api", "device"}
        absent = {"gather_launches", "pad_launches", "plan_ms", "peak_bytes"}
        assert not (constant | absent) & set(names)

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"provider": "fused"}, "provider"), ({"group_size": 32}, "group_size"), ({"dtype": "fp16"}, "dtype"),
            ({"scale_dtype": "fp32"}, "scales"),
            ({"device": "Device 2"}, "device"), ({"weight_layout": "prepared"}, "weight_layout"), ({"seed": 1}, "seed"),
            ({"distribution": "even"}, "distribution"), ({"plan_ms": 0.2}, "plan_ms"),
            ({"peak_bytes": 1}, "peak_bytes"), ({"schedule_ms": 0.01}, "schedule_ms"), ({"host_us": 9.0}, "host_us"),
        ],
    )  # fmt: skip
    def test_a_difference_brings_its_column(self, change: dict[str, Any], name: str) -> None:
        records = [record(2.0), grouped(1.0, **change)]
        assert name not in [c.name for c in report.columns([record(2.0), grouped(1.0)], "full")]
        assert name in [c.name for c in report.columns(records, "full")]

    def test_an_absent_group_size_is_no_difference(self) -> None:
        assert "group_size" not in [c.name for c in report.columns([record(1.0), record(1.0, **BF16)], "full")]

    def test_what_is_constant_is_in_the_caption(self) -> None:
        text = report.caption(INT4 + UNQUANTIZED)
        assert (
            "recorded, 256 experts, 31,440 rows (238 active, max 2,491), bf16 activations, group 128, bf16 scales"
            in text
        )
        assert text.endswith("Device 1, torch 2.11.0; ceilings: matmul 2,000 TFLOP/s, copy 4,000 GB/s")

    def test_caption_says_scaled_and_spans_ceilings(self) -> None:
        records = [record(1.0, scaled="E 256 to 32"), record(1.0, scaled="E 256 to 32", ceiling_tflops=900.0)]
        assert report.caption(records).startswith("recorded (scaled: E 256 to 32), 256 experts")
        assert "matmul 900–2,000 TFLOP/s" in report.caption(records)

    def test_no_records(self) -> None:
        assert report.columns([], "full") == [] and report.render([], "md").strip() == ""


class TestSummary:
    def test_a_quantized_format_at_a_glance(self) -> None:
        ((row,),) = markdown_rows(report.render(INT4, "md", "summary"))
        assert row["per_expert ms"] == "8.000"
        assert row["best strategy"] == "pad_and_clip(256)" and row["best ms"] == "2.500"
        assert row["pad_and_clip launches"] == "238→38" and row["best speed-up"] == "3.20x"
        assert row["pad_and_clip (threshold) ms"] == "2.500 (256)" and row["pad_and_clip speed-up"] == "3.20x"
        assert row["ready, best strategy"] == "pad_and_clip(128), weights gathered before"
        assert row["ready, best ms"] == "1.250" and row["ready, pad_and_clip ms"] == "1.250 (128)"
        assert row["floor ms"] == "0.500" and row["% of roofline"] == "20%" and row["could gain"] == "5.00x"

    def test_the_best_threshold_is_told_when_another_strategy_wins(self) -> None:
        ((row,),) = markdown_rows(report.render([*INT4, grouped(1.0, time="2026-03")], "md", "summary"))
        assert row["best strategy"] == "grouped" and row["best speed-up"] == "8.00x"
        assert row["pad_and_clip (threshold) ms"] == "2.500 (256)" and row["pad_and_clip launches"] == "238→38"
        assert row["pad_and_clip speed-up"] == "3.20x"
        assert row["ready, best ms"] == "1.250"  # without dequantization, even if that was slower

    def test_without_dequantization_the_gather_is_what_a_caller_pays(self) -> None:
        ((row,),) = markdown_rows(report.render(UNQUANTIZED, "md", "summary"))
        assert row["best strategy"] == "pad_and_clip(256), weights gathered inside" and row["best ms"] == "2.200"
        assert row["best speed-up"] == "2.00x"
        assert row["ready, best strategy"] == "pad_and_clip(128), weights gathered before"
        assert row["ready, best ms"] == "1.100"

    def test_one_row_per_format_and_projection(self) -> None:
        other = [dataclasses.replace(r, n=1536, k=3072) for r in INT4]
        tables = markdown_rows(report.render(INT4 + UNQUANTIZED + other, "md", "summary"))
        assert [[row["format"] for row in table] for table in tables] == [["int4_sym", "bf16"], ["int4_sym"]]

    def test_providers_get_rows_and_the_best_is_bold(self) -> None:
        fused = grouped(0.8, provider="fused", scope="fused", dequant_launches=None)
        (table,) = markdown_rows(report.render([*INT4, fused], "md", "summary"))
        assert [(row["provider"], row["best ms"]) for row in table] == [("torch", "2.500"), ("fused", "**0.800**")]
        assert table[1]["best speed-up"] == "-"  # no per_expert of this provider

    def test_times_after_different_flushes_share_no_baseline(self) -> None:
        (table,) = markdown_rows(report.render([record(8.0), grouped(2.0, flush="write+read")], "md", "full"))
        assert [(row["flush"], row["vs per_expert"]) for row in table] == [("write", "1.00x"), ("write+read", "-")]

    def test_a_graph_is_explained(self) -> None:
        text = report.render([record(8.0), record(2.0, graph=True)], "md", "summary")
        assert "| per_expert, graph |" in text and "exactly these counts" in text
        assert "exactly these counts" not in report.render([record(8.0), grouped(2.0)], "md", "summary")


class TestStatus:
    @pytest.mark.parametrize("mode", ["summary", "full"])
    @pytest.mark.parametrize("out", ["md", "csv", "json"])
    def test_wrong_never_shows_a_time(self, out: report.Out, mode: report.Mode) -> None:
        timed = dataclasses.replace(record(7.654), **{f: getattr(WRONG, f) for f in ("status", "reason", "format")})
        text = report.render([record(8.0), timed], out, mode)
        assert isinstance(text, str) and "WRONG" in text
        assert not re.search(r"7\.(65|57|73)|130\.|131\b", text)  # median, p20, p80, TFLOP/s
        assert "8.0" in text

    def test_wrong_is_red_and_not_a_time_in_a_terminal(self) -> None:
        text = printed(
            [record(8.0), dataclasses.replace(WRONG, median_ms=7.654, p20_ms=7.6, p80_ms=7.7)], "full", 120, False
        )
        assert re.search(r"\x1b\[1;31m *WRONG", text) and "7.6" not in text

    def test_reasons_are_printed_below(self) -> None:
        text = report.render(
            [record(8.0), WRONG, REFUSED, dataclasses.replace(REFUSED, format="fp8_e4m3")], "md", "full"
        )
        assert "- WRONG: int2_asym torch base+deq grouped: row 17 is off" in text
        assert "- n/a: fp8_e5m2 torch base+deq grouped; fp8_e4m3 torch base+deq grouped: grouped mm needs sm_90" in text
        assert [row["median ms"] for row in markdown_rows(text)[0]] == ["8.000", "**WRONG**", "n/a", "n/a"]

    def test_a_provider_that_cannot_run_at_all_is_named_once(self) -> None:
        refused = [
            dataclasses.replace(r, provider="fused", scope="fused", status="unsupported", reason="runs on GPUs")
            for r in INT4[:5]
        ]
        text = report.render([*INT4, *refused], "md", "full")
        assert "- n/a: every row of fused: runs on GPUs" in text

    def test_a_reason_of_one_projection_names_it(self) -> None:
        text = report.render([record(8.0), record(8.0, n=1536, k=3072), REFUSED], "md", "full")
        assert "fp8_e5m2 torch base+deq grouped N=3072 K=1536: grouped mm" in text

    def test_a_summary_prefers_right_results_and_says_when_there_are_none(self) -> None:
        records = [record(8.0, format="int2_asym"), WRONG, REFUSED, dataclasses.replace(WRONG, format="int8_sym")]
        (table,) = markdown_rows(report.render(records, "md", "summary"))
        assert {row["format"]: row["best ms"].strip("*") for row in table} == {
            "int2_asym": "8.000", "fp8_e5m2": "n/a", "int8_sym": "WRONG",
        }  # fmt: skip


class TestText:
    def test_csv_round_trip(self) -> None:
        rows = list(csv.DictReader(io.StringIO(report.render([*INT4, WRONG], "csv"))))
        assert len(rows) == len(INT4) + 1
        derived = ["speedup", "tflops", "gbps", "floor_ms", "roofline", "read_fraction"]
        derived += ["peer", "versus_peer", "versus_peer_low", "scaling", "scaling_low"]
        assert list(rows[0])[-len(derived) :] == derived
        assert {f.name for f in dataclasses.fields(Record)} < set(rows[0])
        row = rows[3]
        assert (row["strategy"], row["threshold"], row["launches"], row["graph"]) == (
            "pad_and_clip",
            "256",
            "38",
            "False",
        )
        assert [float(sample) for sample in row["samples_ms"].split(" ")] == INT4[3].samples_ms
        assert [float(row[key]) for key in ("speedup", "tflops", "floor_ms")] == [3.2, 400.0, 0.5]
        assert rows[-1]["reason"] == "row 17\nis off" and rows[-1]["speedup"] == rows[-1]["median_ms"] == ""

    def test_json_round_trip(self) -> None:
        nan = dataclasses.replace(WRONG, error=math.nan)
        rows = json.loads(report.render([*INT4, nan], "json"), parse_constant=pytest.fail)
        assert [row["median_ms"] for row in rows] == [r.median_ms for r in INT4] + [None]
        assert rows[3]["speedup"] == 3.2 and rows[3]["roofline"] == 0.2 and rows[3]["samples_ms"] == INT4[3].samples_ms
        assert rows[-1]["error"] is None and rows[-1]["status"] == "WRONG" and rows[-1]["speedup"] is None
        fields = {f.name for f in dataclasses.fields(Record)}
        assert [Record(**{k: row[k] for k in fields}) for row in rows[:-1]] == INT4

    def test_csv_and_json_keep_reruns(self) -> None:
        assert len(json.loads(report.render([record(8.0), record(7.0)], "json"))) == 2

    def test_a_bar_in_a_name_does_not_break_the_table(self) -> None:
        text = report.render([record(1.0, distribution="a|b"), record(1.0)], "md", "full")
        assert r"a\|b" in text

    def test_an_unknown_output_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"render: out is 'html'; expected \"table\""):
            report.render(INT4, "html")  # type: ignore[arg-type]


class TestTerminal:
    RECORDS: ClassVar[list[Record]] = [
        dataclasses.replace(r, n=n, k=k, plan_ms=0.2, gather_launches=1, pad_launches=1, scatter_launches=1,
                            peak_bytes=2_415_919_104)
        for n, k in ((3072, 1536), (1536, 3072)) for r in [*INT4, *UNQUANTIZED, WRONG, REFUSED]
    ]  # fmt: skip

    @pytest.mark.parametrize("mode", ["summary", "full"])
    @pytest.mark.parametrize("width", [100, 120])
    def test_fits_and_cuts_nothing(self, mode: report.Mode, width: int) -> None:
        text = printed(self.RECORDS, mode, width)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        assert "…" not in text and "..." not in text
        more = ("1.250",) if mode == "summary" and width == 120 else ()
        for number in ("2.500", "3.20x", "2.200", "8.000", *more):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text), number
        assert "left out to fit" in text

    def test_what_is_left_out_is_named_and_not_shown(self) -> None:
        text = printed(self.RECORDS, "full", 100)
        names = re.search(r"left out to fit 100 columns: ([^\n]*)", text)
        assert names and "pad_launches" in names[1] and "scat-" not in text

    def test_the_best_row_is_starred_without_styles_and_bold_with_them(self) -> None:
        plain, styled = printed(INT4, "full", 120), printed(INT4, "full", 120, plain=False)
        assert re.search(r"pad_and_clip\(256\) \* ", plain)
        assert plain.count(" *") == 2 and " *" not in styled
        assert re.search(r"\x1b\[1m *pad_and_clip\(256\)", styled)

    def test_a_pipe_gets_every_column_at_full_width(self) -> None:
        console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=80)
        report.show(report.chapters(self.RECORDS, "full"), console)
        text = console.file.getvalue()
        assert "left out" not in text and "scat-" in text and "2.475–2.525" in text
        assert "pad_and_clip(128), weights gathered before *" in text

    def test_brackets_in_reasons_are_not_markup(self) -> None:
        assert "expected [E, N]" in printed([dataclasses.replace(WRONG, reason="expected [E, N] [bold]")], "full", 120)


class TestDecode:
    RECORDS: ClassVar[list[Record]] = [
        record(ms, kind="decode", strategy="decode", total_tokens=rows, active_experts=active, launches=active, **kw)
        for ms, rows, active, kw in (
            (0.5, 8, 8, {}), (2.0, 256, 140, {}), (0.8, 8, 8, BF16),
            (None, 8, 8, {"format": "fp8_e5m2", "status": "unsupported", "reason": "no kernel"}),
        )
    ]  # fmt: skip

    def test_rows_in_microseconds(self) -> None:
        (table,) = markdown_rows(report.render(self.RECORDS, "md", "full"))
        assert list(table[0]) == [
            "format", "rows", "active experts", "scope", "strategy", "GEMM launches", "median us", "GB/s",
            "% of roofline", "error",
        ]  # fmt: skip
        assert [(row["rows"], row["active experts"], row["median us"], row["GB/s"]) for row in table] == [
            ("8", "8", "500", "2,000"),
            ("256", "140", "2,000", "500"),
            ("8", "8", "800", "1,250"),
            ("8", "8", "n/a", "-"),
        ]

    def test_several_strategies_are_compared(self) -> None:
        records = [record(0.8, kind="decode"), grouped(0.2, kind="decode")]
        (table,) = markdown_rows(report.render(records, "md", "full"))
        assert [(row["strategy"], row["vs per_expert"]) for row in table] == [
            ("per_expert", "1.00x"),
            ("**grouped**", "4.00x"),
        ]

    def test_batch_is_shown_where_records_have_it(self) -> None:
        @dataclasses.dataclass
        class Batched(Record):
            batch: int | None = None

        records = [Batched(**{**dataclasses.asdict(r), "batch": r.total_tokens // 8}) for r in self.RECORDS]
        (table,) = markdown_rows(report.render(records, "md", "full"))
        assert [row["batch"] for row in table] == ["1", "32", "1", "1"]

    def test_a_summary_keeps_formats_together(self) -> None:
        (table,) = markdown_rows(report.render([self.RECORDS[0], self.RECORDS[2], self.RECORDS[1]], "md", "summary"))
        assert [(row["format"], row["rows"]) for row in table] == [
            ("int4_sym", "8"),
            ("int4_sym", "256"),
            ("bf16", "8"),
        ]

    def test_kinds_have_captions_of_their_own(self) -> None:
        text = report.render([*INT4, *self.RECORDS], "md", "summary")
        assert [len(table) for table in markdown_rows(text)] == [1, 4]
        assert "**prefill N=3072 K=1536**" in text and "**decode N=3072 K=1536**" in text


class TestCompare:
    @pytest.mark.parametrize(
        ("ms", "verdict", "code"),
        [(10.0, "same", 0), (10.4, "same", 0), (10.6, "slower", 1), (9.6, "same", 0), (9.4, "faster", 0)],
    )
    def test_threshold(self, ms: float, verdict: str, code: int) -> None:
        result = comparing.compare([record(10.0)], [record(ms)], 0.05)
        assert [row.verdict for row in result.rows] == [verdict] and result.exit_code == code

    def test_the_median_is_of_the_samples(self) -> None:
        skewed = record(10.0, samples_ms=[20.0, 21.0, 22.0])
        assert comparing.compare([record(10.0)], [skewed], 0.05).rows[0].ratio == pytest.approx(2.1)
        stored = record(10.0, samples_ms=[])
        assert comparing.compare([stored], [record(10.0)], 0.05).rows[0].ratio == 1.0

    def test_noise_where_ranges_overlap(self) -> None:
        wide = record(12.0, p20_ms=9.0, p80_ms=15.0)
        apart = grouped(12.0, p20_ms=11.9, p80_ms=12.1)
        result = comparing.compare([record(10.0), grouped(10.0), clip(10.0, 64)], [wide, apart, clip(8.0, 64)], 0.05)
        assert [row.overlap for row in result.rows] == [True, False, False]
        (table,) = markdown_rows(str(comparing.render(result, "md")))
        assert [(row["verdict"], row["noise?"]) for row in table] == [
            ("**slower**", "maybe"), ("**slower**", "no"), ("**faster**", "no"),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("before", "after", "verdict", "code"),
        [
            ("ok", "WRONG", "regressed", 1), ("ok", "unsupported", "regressed", 1),
            ("unsupported", "WRONG", "regressed", 1),
            ("WRONG", "ok", "fixed", 0), ("WRONG", "WRONG", "not timed", 0), ("WRONG", "unsupported", "not timed", 0),
        ],
    )  # fmt: skip
    def test_status_changes(self, before: str, after: str, verdict: str, code: int) -> None:
        # WRONG records with times: the times must not count
        result = comparing.compare([record(10.0, status=before)], [record(1.0, status=after, reason="why")], 0.05)
        assert result.rows[0].verdict == verdict and result.exit_code == code and result.rows[0].ratio is None
        text = str(comparing.render(result, "md"))
        assert "1.000" not in text or after == "ok"
        assert (f"{before} -> {after}: " in text and ": why" in text) is (verdict == "regressed")

    def test_matching_ignores_where_and_when_but_not_what(self) -> None:
        a = [record(10.0), clip(5.0, 64), grouped(3.0, group_size=32), grouped(3.0, scale_dtype="fp32")]
        b = [record(10.0, device="Device 2", torch="2.13.0", time="2027"), clip(5.0, 128), grouped(3.0)]
        result = comparing.compare(a, b, 0.05)
        assert [row.a.strategy for row in result.rows] == ["per_expert"]
        assert result.only_a == a[1:] and result.only_b == b[1:]
        text = str(comparing.render(result, "md"))
        assert re.search(r"only in A: .*pad_and_clip\(64\)", text) and re.search(
            r"only in B: .*pad_and_clip\(128\)", text
        )
        assert "A: Device 1, torch 2.11.0" in text and "B: Device 2, torch 2.13.0" in text

    def test_scales_are_of_the_dtype_of_the_activations_where_a_record_does_not_say(self) -> None:
        old, new = record(10.0), record(9.0, scale_dtype="bf16")
        assert (old.scales, new.scales, record(1.0, **BF16).scales) == ("bf16", "bf16", None)
        assert len(comparing.compare([old], [new]).rows) == 1

    def test_another_flush_is_said(self) -> None:
        """A record without the field was made by overwriting alone."""
        old = json.loads(record(10.0).to_json())
        del old["flush"]
        a = record_from_json(json.dumps(old), "here")
        assert a.flush == "write"
        text = str(comparing.render(comparing.compare([a], [record(9.0, flush="write+read")]), "md"))
        assert text.count("flush: A write, B write+read: ") == 1
        assert "flush" not in str(comparing.render(comparing.compare([a], [record(9.0)]), "md"))

    def test_the_newest_of_a_key_wins(self) -> None:
        b = [record(20.0, time="2026-02"), record(10.0, time="2026-03"), record(30.0, time="2026-01")]
        assert comparing.compare([record(10.0)], b, 0.05).exit_code == 0

    @pytest.mark.parametrize("b", [[], [clip(1.0, 64)]])
    def test_nothing_in_common(self, b: list[Record]) -> None:
        with pytest.raises(
            ValueError, match=rf"^compare: no configuration is in both \(1 in A, {len(b)} in B\)[^\n]*$"
        ):
            comparing.compare([record(1.0)], b, 0.05)

    @pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
    def test_bad_thresholds(self, threshold: float) -> None:
        with pytest.raises(ValueError, match="compare: threshold is"):
            comparing.compare([record(1.0)], [record(1.0)], threshold)

    def test_table(self) -> None:
        console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=100)
        result = comparing.compare([record(10.0), grouped(2.0)], [record(10.0), grouped(3.0)], 0.05)
        console.print(comparing.render(result, "table", 100, True))
        assert re.search(r"grouped +2\.000 +3\.000 +1\.50x +slower", console.file.getvalue())
        assert "1 same, 1 slower (beyond 5% of the median)" in console.file.getvalue()
        with pytest.raises(ValueError, match="compare: out is 'csv'"):
            comparing.render(result, "csv")


class TestPlots:
    def size(self, path: Path) -> tuple[int, int]:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
        return struct.unpack(">II", data[16:24])  # type: ignore[return-value]

    def test_files_per_projection_and_distribution(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        records = [*INT4, *UNQUANTIZED, WRONG, REFUSED]
        records += [dataclasses.replace(r, n=1536, k=3072) for r in records] + TestDecode.RECORDS
        written = plots.plot_all(records, {"recorded": [0, 3, 500, 20], "dir/b c.json": [1]}, tmp_path / "new")
        assert [path.name for path in written] == [
            "latency-recorded-N3072-K1536.png", "strategies-recorded-N3072-K1536.png",
            "latency-recorded-N1536-K3072.png", "strategies-recorded-N1536-K3072.png",
            "tokens-recorded.png", "tokens-b-c.png",
        ]  # fmt: skip
        assert all(min(self.size(path)) >= 500 for path in written)

    def test_what_differs_is_in_the_name_and_nothing_is_overwritten(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        records = [
            dataclasses.replace(r, device=device) for device in ("Device 1", "Device 2", "Device-2") for r in INT4
        ]
        written = plots.plot_all(records, {"a/x.json": [1, 2], "b/x.json": [3]}, tmp_path)
        assert len(set(written)) == len(written) == 8
        assert {"latency-recorded-N3072-K1536-Device-2.png", "tokens-x.png", "tokens-x-2.png"} <= {
            p.name for p in written
        }

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        assert plots.plot_all([WRONG, *TestDecode.RECORDS], {"empty": [0, 0]}, tmp_path) == []
        (only,) = plots.plot_all([grouped(1.0)], {}, tmp_path)
        assert only.name.startswith("strategies")

    def test_what_the_latency_plot_says(self) -> None:
        pytest.importorskip("matplotlib")
        figure = plots._latency([*INT4, *UNQUANTIZED])
        quantized, plain = (axes for axes in figure.axes if axes.get_visible())
        curve = next(line for line in quantized.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
        assert list(curve.get_xdata()) == [64, 256] and list(curve.get_ydata()) == [5.0, 2.5]
        texts = {text.get_text() for text in quantized.texts}
        assert texts == {"2.500 at 256", "pad_and_clip", "per_expert 8.000", "per_expert, graph 4.000", "grouped 3.200"}
        texts = {text.get_text() for text in plain.texts}
        assert texts >= {"weights gathered before", "weights gathered inside", "1.100 at 128", "2.200 at 256"}
        assert "Device 1, torch 2.11.0" in " ".join(" ".join(t.get_text().split()) for t in figure.texts)

    def test_what_the_strategies_plot_says(self) -> None:
        pytest.importorskip("matplotlib")
        wrong = [dataclasses.replace(r, format=WRONG.format) for r in INT4 if r.strategy != "grouped"]
        figure = plots._strategies([*INT4, *wrong, WRONG])
        inside, ready = figure.axes
        heights = sorted(round(bar.get_height(), 3) for bar in inside.patches)
        assert heights == [2.5, 2.5, 3.2, 4.0, 4.0, 8.0, 8.0]  # the best threshold only, and no bar for WRONG
        assert [text.get_text() for text in inside.texts].count("WRONG") == 1
        assert "1.250 (128)" in [text.get_text() for text in ready.texts]
        assert [list(line.get_ydata()) for line in inside.lines] == [[0.5, 0.5]] * 2  # floors

    def test_unknown_strategies_get_bars_too(self) -> None:
        pytest.importorskip("matplotlib")
        axes = plots._strategies([record(3.0, strategy="new"), record(2.0, strategy="new", graph=True)]).axes[0]
        assert [bar.get_height() for bar in axes.patches] == [3.0, 2.0]

    def test_what_the_tokens_plot_says(self) -> None:
        pytest.importorskip("matplotlib")
        axes = plots._tokens("recorded", [0, 3, 500, 20, 0], [64, 1024]).axes[0]
        texts = {text.get_text() for text in axes.texts}
        assert texts == {"1 expert above 64", "max 500", "2 empty"}
        assert axes.get_yscale() == "log" and [bar.get_height() for bar in axes.patches][:3] == [500, 20, 3]

    def test_labels_are_spread_in_order(self) -> None:
        placed = plots._spread([0.0, 0.1, 0.2, 5.0, 5.05], 0.0, 5.2, 0.5)
        assert all(b - a >= 0.5 - 1e-9 for a, b in itertools.pairwise(placed)) and placed[-1] <= 5.2
