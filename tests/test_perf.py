"""Decode and prefill of a whole model against transformers' own experts: `pytest -m perf`, or `make test-perf`.

A tiny model, on which a call costs what its host code costs; QEXPERTS_PERF_MODEL names an unquantized checkpoint to
measure instead. `perf_model.py` measures more of a model of real width.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import perf_model

from qexperts.bench.model import ModelOptions, prepare_model
from qexperts.bench.model_session import model_session


@pytest.mark.perf
def test_against_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """Decode, eager and on a GPU from CUDA graphs, within the guard of `bench model`; the rest is shown only."""
    named = os.environ.get("QEXPERTS_PERF_MODEL")
    threads = torch.get_num_threads()
    if named and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # conftest leaves one, which tiny models want
    options = ModelOptions(model=named, tiny=None if named else "qwen3_moe", formats="int4_sym", rounds=15)
    with capsys.disabled():
        code = model_session(prepare_model(options), "table")
    torch.set_num_threads(threads)
    assert code == 0


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section of `perf_model.py` runs, and is right where that does not depend on the machine; no times."""
    arguments = ["--tiny", "--device", "cpu", "--rounds", "1", "--json", str(tmp_path / "out.json")]
    assert perf_model.main(arguments) == 0, capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    rows: dict[tuple[str, str], Any] = {(row["section"], row["what"]): row["value"] for row in record["rows"]}
    assert {section for section, _ in rows} == {"checkpoint", *perf_model.SECTIONS}
    assert rows["memory", "experts, of bf16"] <= perf_model.EXPERT_BYTES
    assert rows["accuracy", "error rule, row by row"] == "holds"
    assert ("experts", "speed-up, eager") in rows and not record["errors"]


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
