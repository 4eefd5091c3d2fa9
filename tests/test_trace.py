"""Recorded routing: what is counted, what a file holds, what is chosen from it, and what an interrupt leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import writers
from test_cli import SRC, qexperts

from qexperts import quantize_experts
from qexperts.bench.trace import TraceOptions, Tracer, record, trace_session
from qexperts.bench.trace_report import load_text, plot_trace, read_trace
from qexperts.integrations.transformers_modules import experts_modules
from qexperts.routing import parse_distribution
from qexperts.traces import Step, Trace, unevenness

IDS = torch.tensor([[1, 17, 3, 99, 42, 7, 64, 23, 5, 11]])


def made_up(**changes: Any) -> Trace:
    steps = [
        Step("prefill", 4, [[8, 0], [4, 4], [6, 2]]),
        Step("decode", 1, [[1, 1], [0, 2], [2, 0]]),
        Step("decode", 1, [[1, 1], [2, 0], None]),
    ]
    return Trace(**{"model": "m", "top_k": 2, "layers": ["a", "b", "c"], "steps": steps, **changes})


@pytest.mark.parametrize("architecture", writers.CONFIGS)
@pytest.mark.parametrize("quantized", [False, True], ids=["transformers", "qexperts"])
def test_what_is_counted(architecture: str, quantized: bool) -> None:
    """Every layer and step has top_k rows a token: those that the experts were given."""
    model = writers.tiny(architecture)
    if quantized:
        quantize_experts(model, "int4_sym", group_size=32, backend="torch")
    seen: list[torch.Tensor] = []
    for _, module in experts_modules(model):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    tracer = Tracer(model, architecture)
    record(model, tracer, IDS, 3)
    trace = tracer.trace
    assert trace.complete and [s.phase for s in trace.steps] == ["prefill", "decode", "decode", "decode"]
    assert [s.tokens for s in trace.steps] == [10, 1, 1, 1]
    found = [counts for step in trace.steps for counts in step.num_tokens_per_expert]
    assert len(found) == len(seen) == 4 * len(trace.layers)
    for counts, ids in zip(found, seen, strict=True):
        assert counts == [int((ids == e).sum()) for e in range(len(counts or ()))]
        assert sum(counts or ()) == ids.numel()
    count = len(seen)
    model(IDS)
    assert len(trace.steps) == 4 and found[-1] == trace.steps[-1].num_tokens_per_expert[-1]  # no hook is left
    assert len(seen) > count


def test_a_failure_between_layers_keeps_what_was_seen(tmp_path: Path) -> None:
    model = writers.tiny("qwen3_moe")
    tracer, path = Tracer(model, "m"), tmp_path / "t.json"
    last, calls = experts_modules(model)[-1][1], [0]

    def broken(module: Any, args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt

    last.register_forward_pre_hook(broken)  # before that of the tracer
    with pytest.raises(KeyboardInterrupt):
        record(model, tracer, IDS, 5, lambda trace: trace.write(path))
    trace = read_trace(str(path))
    assert not trace.complete and len(trace.steps) == 3
    first, missing = trace.steps[2].num_tokens_per_expert
    assert first is not None and sum(first) == 2 and missing is None
    assert sum(parse_distribution(f"{path}:step=0").counts) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    made_up().write(path)
    assert Trace.of(json.loads(path.read_text()), "t") == made_up()
    broken = made_up(facts={"device": object()})
    with pytest.raises(TypeError):
        broken.write(path)
    assert read_trace(str(path)) == made_up() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("choice", "counts", "name"),
    [
        ("", (6, 2), "layer=2,step=prefill"),  # max / mean are 2, 1 and 1.5
        (":layer=0", (8, 0), "layer=0,step=prefill"),
        (":layer=1,step=2", (2, 0), "layer=1,step=2"),
        (":step=decode,layer=0", (2, 2), "layer=0,step=decode"),
        (":layer=2,step=decode", (2, 0), "layer=2,step=decode"),
        (":layer=all", (18, 6), "layer=all,step=prefill"),
    ],
)
def test_what_distribution_chooses(tmp_path: Path, choice: str, counts: tuple[int, ...], name: str) -> None:
    made_up().write(tmp_path / "t.json")
    found = parse_distribution(f"{tmp_path / 't.json'}{choice}")
    assert found.counts == counts and found.name == f"t:{name}"
    assert parse_distribution(f"{tmp_path / 't.json'}{choice}", total_tokens=80).total_tokens == 80


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("layer=3", "layer=3; expected 0 to 2, or all"),
        ("layer=x", "layer=x; expected 0 to 2"),
        ("step=9", "step=9; expected 0 to 2, or prefill or decode"),
        ("layer=2,step=2", "layer 2 was not seen in step=2"),
        ("layer=all,step=2", "ended before layer c"),
        ("layer=1,layer=2", "expected layer=..., step=..."),
        ("layer=1,rows=2", "expected layer=..., step=..."),
    ],
)
def test_bad_choices(tmp_path: Path, choice: str, says: str) -> None:
    made_up().write(tmp_path / "t.json")
    with pytest.raises(ValueError) as error:
        parse_distribution(f"{tmp_path / 't.json'}:{choice}")
    assert says in str(error.value) and "t.json" in str(error.value) and "\n" not in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    good = json.loads(made_up().to_json())
    bad = [
        ({**good, "schema": 2}, "schema 1"),
        ({**good, "layers": []}, "lists layers and steps"),
        ({**good, "top_k": None}, "top_k is None"),
        ({**good, "steps": [{"phase": "prefill", "num_tokens_per_expert": [[1]]}]}, "steps[0]: expected a phase"),
        ({**good, "steps": [{**good["steps"][0], "num_tokens_per_expert": [[1], [-1], [0]]}]}, "expert[1] is [-1]"),
        ({**good, "steps": []}, "no such step"),
    ]
    for data, says in bad:
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError) as error:
            parse_distribution(str(path))
        assert says in str(error.value)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="is no trace"):
        parse_distribution(f"{path}:layer=0")
    assert unevenness([0, 0]) == 0 and unevenness([1, 1]) == 1


def test_loads_are_drawn() -> None:
    assert load_text([0, 8, 4, 1]) == "█▄▁ "
    assert len(load_text(list(range(128)))) == 32 and load_text([0]) == " "


def test_the_command_and_its_replay(tmp_path: Path) -> None:
    """A trace of a tiny model on a text replays in `bench prefill` with as many rows; nothing of the text is in it."""
    text, path = tmp_path / "secret.txt", tmp_path / "t.json"
    text.write_text("Attack at dawn. " * 6)
    done = qexperts("trace", "--tiny", "qwen3_moe", "--text", str(text), "--new-tokens", "2", "--save", str(path),
                    "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "96 bytes of the text as tokens" in done.stderr and "prefill, 96 tokens" in done.stdout
    trace = read_trace(str(path))
    assert len(trace.steps) == 3 and "dawn" not in path.read_text() and "secret" not in path.read_text()
    assert set(json.loads(path.read_text())["steps"][0]) == {"phase", "tokens", "num_tokens_per_expert"}
    for layer, counts in enumerate(trace.steps[0].num_tokens_per_expert):
        done = qexperts("bench", "prefill", "--distribution", f"{path}:layer={layer},step=0", "--n", "16", "--k", "32",
                        "--group-size", "16", "--rounds", "1", "--device", "cpu", "--formats", "int4_sym",
                        "--strategies", "grouped", "--out", "json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        assert all(r["num_tokens_per_expert"] == counts and r["total_tokens"] == 96 * trace.top_k for r in rows)
        assert {r["distribution"] for r in rows} == {f"t:layer={layer},step=0"}
    done = qexperts("trace", "show", str(path), "--plot", str(tmp_path))
    assert done.returncode == 0 and "decode, 2 tokens in 2 steps" in done.stdout
    assert (tmp_path / "trace-t.png").stat().st_size > 5000


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    for options, expected in (
        ({"tiny": None}, "MODEL or --tiny NAME"),
        ({"tiny": "nope"}, "--tiny nope"),
        ({"model": "none", "tiny": None}, "none: no directory with a config.json"),
        ({"save": "other.json"}, "other.json is no trace"),
        ({"save": "no/such/t.json"}, "no/such/t.json"),
        ({"tokens": 0}, "--tokens 0"),
        ({"tokens": 4090}, "the 4096 positions"),
    ):
        with pytest.raises(ValueError) as error:
            trace_session(TraceOptions(**{"model": None, "tiny": "qwen3_moe", "device": "cpu", **options}))
        assert expected in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]
    done = qexperts("trace", "show", "other.json", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "other.json is no trace" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qexperts", "trace", "--tiny", "qwen3_moe", "--device", "cpu"]
    command += ["--tokens", "64", "--new-tokens", "4000", "--save", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not path.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    trace = read_trace(str(path))
    assert not trace.complete and 1 <= len(trace.steps) < 4000
    assert parse_distribution(str(path)).total_tokens == 64 * trace.top_k
    assert "interrupted" in stderr and "Traceback" not in stderr


def test_plots(tmp_path: Path) -> None:
    assert plot_trace(made_up(), "x/y.json", tmp_path) == tmp_path / "trace-y.png"
