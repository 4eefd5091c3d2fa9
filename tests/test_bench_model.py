"""`bench model`: what is measured of a whole model, what is wrong or too slow, and how its records look."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import transformers
import writers
from test_cli import qexperts

from qexperts import from_pretrained
from qexperts.bench import model as bench
from qexperts.bench.generation import Decode
from qexperts.bench.model import ModelOptions, measure_model, prepare_model
from qexperts.bench.model_check import check_decode, check_experts
from qexperts.bench.model_plots import plot_models
from qexperts.bench.model_records import ModelRecord
from qexperts.bench.model_report import model_chapters, model_rows, slow
from qexperts.bench.model_session import model_session
from qexperts.bench.quality import Text, compare_on, read_text
from qexperts.bench.records import load_all, load_records
from qexperts.integrations.transformers_modules import experts_modules

SHORT = {"prompt_tokens": 8, "new_tokens": 2, "text_tokens": 64, "rounds": 5, "device": "cpu"}


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models of the tests' sizes, with positions for the prompt."""
    sizes = dataclasses.replace(writers.SMALL, vocabulary=256, positions=128)
    monkeypatch.setattr(bench, "write_tiny", lambda name, path, seed, device: _write(name, path, seed, sizes))


def _write(name: str, path: Path, seed: int, sizes: Any) -> None:
    from qexperts.integrations.tiny import write_tiny

    write_tiny(name, path, seed, sizes)


def measured(**options: Any) -> list[ModelRecord]:
    found: list[ModelRecord] = []
    measure_model(prepare_model(ModelOptions(**{**SHORT, **options})), found)
    return found


@pytest.mark.parametrize("architecture", writers.CONFIGS)
def test_every_architecture(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    found = measured(tiny=architecture, formats="int4_sym", group_size=32, rounds=1, batch=2)
    assert [(r.provider, r.implementation, r.format) for r in found] == [
        ("transformers", "grouped_mm", "bf16"), ("transformers", "eager", "bf16"), ("qexperts", None, "int4_sym")
    ]  # fmt: skip
    for r in found:
        assert r.status == "ok", r.reason
        assert len(r.prefill_samples_ms) == len(r.first_token_samples_ms) == len(r.decode_samples_ms) == 1
        assert r.first_token_ms >= r.prefill_ms > 0 and r.decode_ms > 0
        assert r.batch == 2 and r.architecture == architecture and r.tokenizer == "bytes" and r.text_tokens == 64
    assert found[0].expert_bytes > 3 * found[2].expert_bytes


def test_quality_and_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fewer bits are worse on these weights, the reference is itself, and everything can be told from the file."""
    small(monkeypatch)
    save = tmp_path / "r.jsonl"
    formats = "int8_sym,fp8_e4m3,int4_sym,int2_sym"
    found = measured(tiny="qwen3_moe", formats=formats, group_size=32, text_tokens=1024, save=str(save))
    assert load_all(save) == found
    reference, eager, *ours = found
    assert (reference.kl, reference.top1) == (0, 1) and eager.kl is not None and eager.kl < 1e-2
    kl = [r.kl for r in ours]
    assert kl == sorted(kl) and kl[0] > 0, kl
    assert all(r.reference == "transformers grouped_mm" and 0 < r.top1 <= 1 for r in ours)
    row = model_rows(found)[4]
    best = min(reference.decode_ms or 0, eager.decode_ms or 0)
    assert row.speedup("decode") == pytest.approx(best / (ours[2].decode_ms or 0))
    assert row.least("decode") <= max(b / m for b, m in zip(row.best["decode"].decode_samples_ms,
                                                            ours[2].decode_samples_ms, strict=True))  # fmt: skip
    assert row.size == ours[2].expert_bytes / reference.expert_bytes
    (chapter,) = model_chapters(found)
    text = " ".join(chapter.notes)
    assert "random weights are not a trained model" in text and "no tokenizer" in text and "guard" in text
    (picture,) = plot_models(found, tmp_path)
    assert picture.stat().st_size > 5000


def test_the_seed_decides_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    kl = [measured(tiny="olmoe", formats="int4_sym", group_size=32, rounds=1, seed=seed)[-1].kl for seed in (0, 0, 1)]
    assert kl[0] == kl[1] != kl[2]


def test_kl_by_hand() -> None:
    """Against the definition in fp64, over windows."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 16, 16, generator=generator)
    ids = torch.randint(0, 16, (600,), generator=generator)
    same, other = compare_on(ids, lambda x: tables[0][x], [lambda x: tables[0][x], lambda x: tables[1][x]])
    p, q = (tables[i][ids].double().softmax(-1) for i in (0, 1))
    assert same == (0, 1)
    assert other[0] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert other[1] == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_texts(tmp_path: Path) -> None:
    text = read_text(None, tmp_path, 256)
    assert text.tokenizer == "bytes" and text.name == "default" and len(text.ids) > 2048
    assert bytes(text.ids.tolist()).decode().startswith("A small workshop")
    (tmp_path / "t.txt").write_bytes(bytes([0, 200, 255]))
    assert read_text(str(tmp_path / "t.txt"), tmp_path, 128).ids.tolist() == [0, 72, 127]
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="0 tokens"):
        read_text(str(tmp_path / "empty.txt"), tmp_path, 128)
    assert Text("x", "bytes", torch.arange(4)).prompt(6, 2).tolist() == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]]


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that add an error: WRONG, with the layer, no times and exit code 1; the reference is timed."""
    small(monkeypatch)
    load = bench.from_pretrained

    def broken(path: Path, **options: Any) -> Any:
        model = load(path, **options)
        module = experts_modules(model)[1][1]
        module.register_forward_hook(lambda module, args, out: out * 1.5)
        return model

    monkeypatch.setattr(bench, "from_pretrained", broken)
    found = measured(tiny="qwen3_moe", formats="int4_sym", group_size=32)
    assert [r.status for r in found] == ["ok", "ok", "WRONG"]
    assert "layers.1" in (found[2].reason or "") and not found[2].decode_samples_ms and found[2].kl is None
    assert found[0].decode_ms and model_chapters(found)[0].notes[0].startswith("WRONG: int4_sym")
    options = ModelOptions(tiny="qwen3_moe", formats="int4_sym", group_size=32, **SHORT)
    assert model_session(prepare_model(options), "csv") == 1


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_checks(architecture: str, tmp_path: Path) -> None:
    """Both hold for a model that is right, past the sliding window too; a cache that is off by one is seen."""
    model = writers.tiny(architecture, torch.bfloat16)
    decode = Decode(model, lambda: None, torch.arange(1, 41)[None], cache=60)
    assert decode.slides == (architecture == "gpt_oss")
    assert check_decode(decode) is None
    once = decode.generate(decode.step, 8)
    assert once == decode.generate(decode.step, 8)
    expected = model.generate(decode.prompt, max_new_tokens=9, do_sample=False)[0, 40:].tolist()
    assert sum(a == b for a, b in zip(once, expected, strict=True)) >= 5  # near ties in bf16
    decode.first = (decode.first + 1) % 128  # not what the prompt says, but consistent
    assert check_decode(decode) is None
    step = decode.step
    decode.step = lambda: step().roll(1, -1)  # type: ignore[method-assign]
    assert "differ by" in (check_decode(decode) or "")
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, quantize="int4_sym", group_size=32)
    assert check_experts(ours, 2) is None
    experts_modules(ours)[0][1].gate_up_proj.scales.data.mul_(-1)
    assert check_experts(ours, 2) is None  # other weights, but the right product of them


def test_a_quantized_checkpoint_has_no_reference(tmp_path: Path) -> None:
    writers.write(writers.tiny("qwen3_moe", torch.bfloat16), "gptq_v1_sym", tmp_path)
    found = measured(model=str(tmp_path))
    assert found[0].provider == "qexperts" and found[0].format == "int4_sym" and found[0].decode_ms
    assert found[1].provider == "gptqmodel" and found[1].status == "unsupported" and found[1].reason
    assert all(r.kl is None and r.weights == "checkpoint" for r in found) and not slow(found)
    notes = model_chapters(found)[0].notes
    assert any("no reference" in note for note in notes) and any(note.startswith("n/a: int4_sym") for note in notes)
    with pytest.raises(ValueError, match="is quantized"):
        prepare_model(ModelOptions(model=str(tmp_path), formats="int4_sym", **SHORT))


def test_the_models_own_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    writers.tiny("mixtral", torch.bfloat16).save_pretrained(tmp_path)
    own = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "of": 2}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>").save_pretrained(tmp_path)
    text = read_text(None, tmp_path, 128)
    assert text.tokenizer == "model" and {0, 1, 2} == set(text.ids.tolist())


# ---- records, tables and the guard


def made_up(provider: str, decode: float, **changes: Any) -> ModelRecord:
    implementation = "eager" if provider == "transformers" else None
    base = ModelRecord(
        "m", "checkpoint", "qwen3_moe", 2, 2, 4, 2, 64, 8, 2, 1, "bf16", 0, provider, implementation,
        "bf16" if implementation else "int4_sym", None if implementation else 128, None,
        rounds=5, decode_samples_ms=[decode * f for f in (0.9, 0.95, 1, 1.05, 1.1)], time="t", command="c",
    )  # fmt: skip
    record = dataclasses.replace(base, **changes)
    record.finish()
    return record


@pytest.mark.parametrize(("ours", "fails"), [(1.99, False), (2.01, True)])
def test_the_guard(ours: float, fails: bool) -> None:
    """Against the fastest reference of the same run."""
    slower = made_up("transformers", 9.0, implementation="grouped_mm")
    other_run = made_up("transformers", 0.1, time="u")
    records = [slower, made_up("transformers", 1.0), made_up("qexperts", ours), other_run]
    assert bool(slow(records)) == fails
    notes = model_chapters(records)[0].notes
    assert any(note.startswith("WRONG: int4_sym: decode takes 2.01") for note in notes) == fails
    graph = [10.0] * 5
    records = [made_up("transformers", 1, graph_samples_ms=[1.0] * 5), made_up("qexperts", 1, graph_samples_ms=graph)]
    assert [text.split(" takes")[0] for text in slow(records)] == ["int4_sym: graph"]


def test_too_slow_ends_in_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(job: Any, found: list[ModelRecord], tick: Any) -> None:
        found += [made_up("transformers", 1.0), made_up("qexperts", 3.0)]

    monkeypatch.setattr("qexperts.bench.model_session.measure_model", measure)
    job = prepare_model(ModelOptions(tiny="qwen3_moe", **SHORT))
    assert model_session(job, "table") == 1
    assert "3.00 times as long" in capsys.readouterr().out


def test_an_interrupt_keeps_the_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch)
    rounds = bench.Sampler.rounds
    calls = [0]

    def interrupted(self: Any, candidates: Any, count: int, samples: Any, **options: Any) -> None:
        calls[0] += 1
        rounds(self, candidates, 2 if calls[0] == 2 else count, samples, **options)
        if calls[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench.Sampler, "rounds", interrupted)
    save = tmp_path / "r.jsonl"
    job = prepare_model(ModelOptions(tiny="olmoe", formats="int4_sym", group_size=32, save=str(save), **SHORT))
    assert model_session(job, "table") == 130
    found = load_all(save)
    assert [len(r.decode_samples_ms) for r in found] == [2, 2, 2] and all(len(r.prefill_samples_ms) == 5 for r in found)
    assert any("interrupted" in note for note in model_chapters(found)[0].notes)


def test_records_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(made_up("qexperts", 1, kl=math.nan).to_json() + "\n")
    assert load_all(path)[0].kl is None
    with pytest.raises(ValueError, match="record 1 is of kind model"):
        load_records(path)
    data = json.loads(path.read_text())
    for change, says in (({"decode_ms": "fast"}, "decode_ms is 'fast'"), ({"schema": 9}, "schema 9")):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=says):
            load_all(path)
    del data["top_k"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="lacks top_k"):
        load_all(path)


def test_the_command(tmp_path: Path) -> None:
    """Saved, and shown again in every form; `compare` refuses."""
    model, save = tmp_path / "m", tmp_path / "r.jsonl"
    writers.tiny("mixtral", torch.bfloat16).save_pretrained(model)
    short = ["--prompt-tokens", "8", "--new-tokens", "2", "--text-tokens", "32", "--rounds", "1", "--device", "cpu"]
    done = qexperts("bench", "model", "--model", str(model), "--group-size", "32", *short, "--save", str(save))
    assert done.returncode in (0, 1), done.stderr  # of one sample, the guard proves nothing
    assert "int4_sym" in done.stdout and "top-1" in done.stdout and "n/a" not in done.stdout
    for out, says in (("md", "| int4_sym |"), ("csv", "decode_speedup"), ("json", '"decode_speedup"')):
        shown = qexperts("show", str(save), "--out", out)
        assert shown.returncode == 0 and says in shown.stdout, shown.stderr
    shown = qexperts("show", str(save), "--plot", str(tmp_path))
    assert shown.stdout == done.stdout and (tmp_path / "model-m-batch1.png").exists()
    done = qexperts("compare", str(save), str(save))
    assert done.returncode == 2 and "kind model" in done.stderr


def test_an_older_run_keeps_its_reference() -> None:
    """Two runs of other formats in one file: each ratio is against its own run; a repeated variant is shown once."""
    first = [made_up("transformers", 2.0), made_up("qexperts", 1.0), made_up("qexperts", 1.0, format="int8_sym")]
    second = [made_up("transformers", 8.0, time="u"), made_up("qexperts", 1.0, time="u")]
    rows = [row for chapter in model_chapters(first + second) for row in chapter.sections[0].rows]
    found = [(row.record.format, row.speedup("decode")) for row in rows if not row.record.is_reference]
    assert found == [("int8_sym", 2.0), ("int4_sym", 8.0)]


def test_refusals(tmp_path: Path) -> None:
    writers.tiny("mixtral", torch.bfloat16).save_pretrained(tmp_path)
    for options, expected in (
        ({}, "--model PATH or --tiny NAME"),
        ({"tiny": "llama"}, "--tiny llama"),
        ({"model": "none"}, "none: no directory"),
        ({"tiny": "qwen3_moe", "formats": "int3"}, "int3"),
        ({"tiny": "qwen3_moe", "batch": 0}, "--batch 0"),
        ({"model": str(tmp_path), "prompt_tokens": 63}, "64 positions"),
        ({"tiny": "qwen3_moe", "text": "none.txt"}, "none.txt"),
    ):
        with pytest.raises((ValueError, OSError)) as error:
            prepare_model(ModelOptions(**{"device": "cpu", **options}))
        assert expected in str(error.value)
