"""The command line as a person meets it: one-line errors, exit codes, what is printed and what is saved."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qexperts.backends import cpu_backend
from qexperts.bench import run as running
from qexperts.bench.records import Record, load_records

SRC = Path(__file__).resolve().parents[1] / "src"
TINY = ["--experts", "6", "--tokens", "48", "--n", "16", "--k", "32", "--group-size", "16", "--rounds", "2"]
TINY += ["--device", "cpu"]


REQUIRED = """schema strategy threshold provider format n k launches padded_rows median_ms samples_ms error
    weight_layout device torch commit command"""


def qexperts(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qexperts", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


BAD = {
    "unknown format": (["--formats", "int3_sym"], ["int3_sym", "int4_sym"]),
    "group size": (["--n", "64", "--k", "100"], ["K=100", "group_size=128"]),
    "N": (["--n", "60", "--k", "128"], ["N=60", "multiple of 16"]),
    "half a projection": (["--n", "64"], ["--n", "--k"]),
    "unknown distribution": (["--distribution", "zipff"], ["zipff", "autoround-256"]),
    "missing file": (["--distribution", "nope.json"], ["nope.json"]),
    "bad file": (["--distribution", "bad.json"], ["bad.json", "'x'"]),
    "not JSON": (["--distribution", "text.json"], ["text.json", "JSON"]),
    "no rows": (["--distribution", "zero.json", "--tokens", "9"], ["zero", "9"]),
    "experts": (["--distribution", "good.json", "--experts", "0"], ["0 experts"]),
    "negative tokens": (["--distribution", "good.json", "--tokens", "-1"], ["-1"]),
    "unwritable save": (["--save", "no/such/dir/r.jsonl"], ["no/such/dir/r.jsonl"]),
    "save is a folder": (["--save", "."], ["directory"]),
    "strategies": (["--strategies", "fastest"], ["fastest", "per_expert"]),
    "thresholds": (["--thresholds", "64,x"], ["64,x", "integers"]),
    "provider": (["--provider", "torch,ours"], ["torch,ours", "humming"]),
    "threads": (["--threads", "1,0"], ["--threads 1,0", "positive integers"]),
    "activation format": (["--activation-format", "int4"], ["int4", "int8"]),
    "hot share": (["--distribution", "hot:2", "--top-k", "1"], ["share is 2", "1/E to 1"]),
    "weight layout": (["--weight-layout", "tiles"], ["tiles", "prepared, public"]),
    "peer tries": (["--peer-tries", "-1"], ["--peer-tries -1"]),
    "api": (["--api", "raw,cooked"], ["raw,cooked"]),
    "scale dtype": (["--scale-dtype", "fp8"], ["fp8", "fp32"]),
    "rounds": (["--rounds", "0"], ["--rounds 0"]),
    "device": (["--device", "nonsense"], ["nonsense"]),
    "device without data": (["--device", "meta"], ["meta"]),
    "save over something else": (["--save", "text.json"], ["text.json:1", "record"]),
    "seed": (["--seed", str(10**22)], ["--seed"]),
    "top-k": (["--top-k", "0"], ["--top-k 0"]),
    "dtype against format": (["--dtype", "fp16", "--formats", "bf16"], ["bf16", "fp16"]),
    "unknown option": (["--bogus"], ["--bogus"]),
    "choice": (["--out", "xml"], ["xml", "json"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_end_in_one_line_and_2(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('[1, "x"]')
    (tmp_path / "text.json").write_text("1 2 3")
    (tmp_path / "zero.json").write_text("[0, 0]")
    (tmp_path / "good.json").write_text('{"num_tokens_per_expert": [5, 0, 9]}')
    arguments, expected = BAD[name]
    started = time.monotonic()
    done = qexperts("bench", "prefill", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qexperts: error: "), done.stderr
    for text in expected:
        assert text in lines[0]
    assert time.monotonic() - started < 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "good.json", "text.json", "zero.json"]


def test_decode_and_compare_errors(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for arguments, expected in (
        (["bench", "decode", "--top-k", "300"], "--top-k 300"),
        (["bench", "decode", "--batch-sizes", "0"], "--batch-sizes 0"),
        (["bench", "decode", "--experts", "0"], "0, the number of experts"),
        (["compare", "none.jsonl", "none.jsonl"], "none.jsonl"),
        (["compare", "other.jsonl", "other.jsonl"], "other.jsonl:1"),
        (["show", "binary.jsonl"], "binary.jsonl: not UTF-8"),
        (["nonsense"], "nonsense"),
    ):
        done = qexperts(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and expected in done.stderr


def test_recorded_launches_and_records(tmp_path: Path) -> None:
    """The unscaled recorded distribution on tiny matrices: what each strategy launches is counted."""
    path = tmp_path / "r.jsonl"
    done = qexperts(
        "bench", "prefill", "--mode", "full", "--formats", "int4_sym", "--save", str(path), "--n", "16", "--k", "128",
        "--rounds", "1", "--device", "cpu", "--strategies", "per_expert,pad_and_clip,grouped", "--thresholds", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = load_records(path)
    assert {(r.strategy, r.launches) for r in records} == {("per_expert", 238), ("pad_and_clip", 38), ("grouped", 1)}
    assert {r.scope for r in records} == {"base mm", "base+deq"} | ({"fused"} if cpu_backend.installed() else set())
    assert all(r.status == "ok" and r.median_ms and len(r.samples_ms) == 1 and r.error for r in records)
    assert all(r.scaled is None and r.total_tokens == 31440 and r.active_experts == 238 for r in records)
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        assert set(REQUIRED.split()) <= fields.keys()
        assert fields["command"].startswith("qexperts bench prefill") and "--save r.jsonl" in fields["command"]
    assert "238" in done.stdout and "pad_and_clip(256)" in done.stdout


def test_saving_appends(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    arguments = ["bench", "prefill", *TINY, "--formats", "int8_sym", "--strategies", "grouped", "--save", str(path)]
    assert qexperts(*arguments).returncode == 0
    first = path.read_text()
    assert qexperts(*arguments).returncode == 0
    assert path.read_text().startswith(first) and len(path.read_text()) > len(first)


@pytest.mark.parametrize("out", ["table", "md", "csv", "json"])
@pytest.mark.parametrize("mode", ["summary", "full"])
def test_outputs(out: str, mode: str) -> None:
    done = qexperts("bench", "prefill", *TINY, "--formats", "int2_asym,fp8_e5m2", "--out", out, "--mode", mode)
    assert done.returncode == 0, done.stderr
    assert "int2_asym" in done.stdout and "fp8_e5m2" in done.stdout
    assert "WRONG" not in done.stdout
    if out == "json":
        rows = json.loads(done.stdout)
        assert {r["format"] for r in rows} == {"int2_asym", "fp8_e5m2"} and all(r["speedup"] for r in rows)


def test_cpu_preset_says_it_is_scaled() -> None:
    done = qexperts("bench", "prefill", "--device", "cpu", "--formats", "int4_sym", "--rounds", "1", "--out", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(r["n"], r["k"]) for r in rows} == {(768, 384), (384, 768)}
    for r in rows:
        assert r["total_tokens"] == 768 and r["num_experts"] == 24
        assert "31440" in r["scaled"] and "768 rows" in r["scaled"] and "divided by 4" in r["scaled"]
        assert "the second projection where 75 s are enough" in r["scaled"]


def test_a_preset_that_would_take_too_long_leaves_its_second_projection_out(monkeypatch: pytest.MonkeyPatch) -> None:
    job = running.prepare(running.BenchOptions(device="cpu", formats="int8_sym,int4_sym", provider="torch", rounds=1))
    times = iter([0.0, 1.0, 40.0])  # the start, the first workload, the first of the second projection
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(running, "measure_workload", lambda workload, *rest: [workload])
    monkeypatch.setattr(running, "measure_ceilings", lambda *arguments: None)
    said: list[str] = []
    measured = list(running.run(dataclasses.replace(job, writer=SimpleNamespace(write=len)), say=said.append))
    assert [(w.n, w.k, w.format.name) for w in measured] == [(768, 384, "int8_sym"), (768, 384, "int4_sym")]
    assert said == [
        "left out: N=384 K=768, which would end after 79 s; without sizes a CPU takes at most 75 s. Measure it with "
        "--experts 24 --tokens 768 --n 384 --k 768 --thresholds 16,64"
    ]


def test_decode_runs_the_public_call(tmp_path: Path) -> None:
    arguments = ["--experts", "8", "--n", "16", "--k", "32", "--group-size", "16", "--rounds", "2", "--device", "cpu"]
    done = qexperts("bench", "decode", *arguments, "--top-k", "2", "--batch-sizes", "1,4", "--out", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(r["batch"], r["total_tokens"]) for r in rows} == {(1, 2), (4, 8)}
    assert {"auto", "per_expert", "grouped"} <= {r["strategy"] for r in rows}
    assert {r["status"] for r in rows} == {"ok"}


def test_peers_for_gpus_are_refused_on_a_cpu_with_the_reason() -> None:
    done = qexperts("bench", "prefill", *TINY, "--formats", "int4_sym", "--provider", "fused,humming")
    assert done.returncode == 0, done.stderr
    assert "humming grouped" in done.stdout or "humming fused grouped" in done.stdout
    assert "runs on NVIDIA GPUs" in done.stdout
    done = qexperts("bench", "decode", "--help")
    assert all(text in done.stdout for text in ("--provider", "humming", "--weight-layout", "--peer-tries"))


def test_wrapper_api_times_planning_and_the_public_call() -> None:
    done = qexperts("bench", "prefill", *TINY, "--formats", "int4_asym", "--api", "raw,wrapper", "--out", "json")
    rows = json.loads(done.stdout)
    assert {r["api"] for r in rows} == {"raw", "wrapper"}
    assert any(r["strategy"] == "auto" and r["api"] == "wrapper" and r["status"] == "ok" for r in rows)


def test_show_repeats_the_report_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    arguments = ["bench", "prefill", *TINY, "--formats", "int4_sym,bf16", "--save", str(path), "--thresholds", "2,4"]
    run = qexperts(*arguments, "--out", "csv")
    done = qexperts("show", str(path), "--out", "csv", "--plot", str(tmp_path / "plots"))
    assert done.returncode == 0 and done.stdout == run.stdout
    assert list((tmp_path / "plots").glob("latency-*.png"))
    assert "int4_sym" in qexperts("show", str(path), "--mode", "full").stdout
    (tmp_path / "empty.jsonl").write_text("")
    done = qexperts("show", str(tmp_path / "empty.jsonl"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_plots(tmp_path: Path) -> None:
    done = qexperts(
        "bench", "prefill", *TINY, "--formats", "int4_sym", "--thresholds", "2,4,8", "--plot", str(tmp_path / "plots")
    )
    assert done.returncode == 0, done.stderr
    pictures = list((tmp_path / "plots").glob("*.png"))
    assert len(pictures) >= 3 and all(p.stat().st_size > 5000 for p in pictures)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_keeps_the_rows_measured_so_far(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qexperts", "bench", "prefill", *TINY, "--rounds", "40", "--save", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") >= 12):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    records = load_records(path)  # every line is whole
    assert len(records) >= 12 and all(isinstance(r, Record) and r.samples_ms for r in records)
    assert "interrupted" in stderr and str(len(records)) in stderr
    assert records[0].format in stdout  # the report of what there is
    assert "Traceback" not in stderr


def test_compare_exit_codes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    arguments = ["bench", "prefill", *TINY, "--formats", "int4_sym", "--strategies", "per_expert,grouped"]
    assert qexperts(*arguments, "--save", str(a)).returncode == 0
    assert qexperts("compare", str(a), str(a)).returncode == 0
    slower = [json.loads(line) for line in a.read_text().splitlines()]
    for record in slower:
        for field in ("median_ms", "p20_ms", "p80_ms"):
            record[field] *= 1.5
        record["samples_ms"] = [s * 1.5 for s in record["samples_ms"]]
    b.write_text("".join(json.dumps(r) + "\n" for r in slower))
    done = qexperts("compare", str(a), str(b))
    assert done.returncode == 1 and "slower" in done.stdout
    assert qexperts("compare", str(a), str(b), "--threshold", "0.6").returncode == 0
    assert qexperts("compare", str(b), str(a)).returncode == 0


def test_formats_doctor_and_help() -> None:
    done = qexperts("formats")
    assert done.returncode == 0 and "int2_asym" in done.stdout and "4.125" in done.stdout
    done = qexperts("doctor", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for text in (
        "AMD GPU", "Intel GPU", "never run", "Ceilings", "torch", "int4_asym", "fp16 weights need fp16", "triton",
        "runs on GPUs", "Peers: humming-kernels", "auto-round-lib", "llama-cpp-python", "Profiles: ",
    ):  # fmt: skip
        assert text in done.stdout
    for arguments in ([], ["bench"], ["--help"], ["bench", "prefill", "--help"], ["tune", "--help"]):
        done = qexperts(*arguments)
        assert done.returncode == 0 and "Usage" in done.stdout
