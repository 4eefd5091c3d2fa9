"""Decode and prefill of a whole model against transformers' own experts: `pytest -m perf`, or `make test-perf`.

A tiny model, on which a call costs what its host code costs; QEXPERTS_PERF_MODEL names an unquantized checkpoint to
measure instead. `perf_model.py` measures a model of real width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import perf_model
import perf_tools
import transformers

from qexperts.bench.environment import pick_device

ROUNDS = 15
SLOWER = 2.0  # how many times as long as transformers' experts a decode may take


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[perf_model.Models]:
    device, work = pick_device(None), tmp_path_factory.mktemp("perf")
    named = os.environ.get("QEXPERTS_PERF_MODEL")
    path = Path(named) if named else work / "bf16"
    if not named:
        perf_tools.write_checkpoint(path, perf_model.TINY, device)
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    if named and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # conftest leaves one, which tiny models want
    prefill = 512 if named else 128
    yield perf_model.Models(perf_model.Options(device, path, work, rounds=ROUNDS, prefill=prefill, targets=False))
    torch.set_num_threads(threads)
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.perf
@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_against_transformers(models: perf_model.Models, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Eager, and on a GPU from CUDA graphs; prefill is shown only."""
    report = perf_model.Report()
    with capsys.disabled():
        report.start(f"{what}: {models.options.device}, {models.options.model.name}")
        if what == "decode":
            timings = perf_model.decode_timings(models, report)
        else:
            timings = perf_model.prefill_timings(models)
        perf_tools.time_all(timings, models.options.device, ROUNDS, perf_model.STEPS)
        perf_model.tell(report, timings, models.name)
    ratios = {row["what"]: row["value"] for row in report.rows if row["what"].startswith("speed-up")}
    assert ratios
    if what == "decode":
        assert all(ratio > 1 / SLOWER for ratio in ratios.values()), ratios


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section of `perf_model.py` runs, and is right where that does not depend on the machine; no times."""
    arguments = ["--tiny", "--device", "cpu", "--rounds", "1", "--prefill", "16", "--json", str(tmp_path / "out.json")]
    assert perf_model.main(arguments) == 0, capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    rows: dict[tuple[str, str], Any] = {(row["section"], row["what"]): row["value"] for row in record["rows"]}
    assert {section for section, _ in rows} == {"checkpoint", *perf_model.SECTIONS}
    assert rows["memory", "experts, of bf16"] <= perf_model.EXPERT_BYTES
    assert rows["accuracy", "error rule, row by row"] == "holds"
    assert ("decode", "speed-up, eager") in rows and not record["errors"]


def test_a_section_that_fails_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(models: Any, report: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(perf_model.SECTIONS, "memory", broken)
    arguments = ["--tiny", "--device", "cpu", "--sections", "memory,host", "--json", str(tmp_path / "out.json")]
    assert perf_model.main(arguments) == 1
    out = capsys.readouterr().out
    assert "FAILED: memory" in out and "no such thing" in out
    record = json.loads((tmp_path / "out.json").read_text())
    assert list(record["errors"]) == ["memory"] and any(row["section"] == "host" for row in record["rows"])
