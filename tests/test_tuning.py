"""Profiles: read, refused with the place that is wrong, looked up, obeyed; and the search that fills them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qexperts import Problem, TokenPlan, explain, files, grouped_gemm, tuning
from qexperts.backends import hopper_backend, torch_backend, triton_backend
from qexperts.backends.triton_backend import Crossover
from qexperts.testing import Case as Shape
from qexperts.testing import make_inputs
from qexperts.tuning import Case, Entry, bucket, lookup, neighbours, read, tuned, with_entry, write

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from qexperts.kernels.config import DecodeConfig, PrefillConfig, case_of, valid
from qexperts.kernels.operand import operand

SRC = Path(__file__).resolve().parent.parent / "src"
GPU = torch.device("cuda", 0)
KEY = ("some GPU", "triton 3.6")
CASE = Case("triton", "prefill", "int4_sym", "bf16", "bf16", "tiles128", 128, 256, 384, 8, 64)
RULES = PrefillConfig(128, 128, 3)
ENTRY = {**dataclasses.asdict(CASE), "rules": repr(RULES), "config": {"stages": 4}, "ms": 0.5}
TABLE = {"kind": "tuned", "schema": 2, "device": KEY[0], "software": KEY[1], "entries": [ENTRY]}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's directory, and a device whose name is known."""
    monkeypatch.setenv("QEXPERTS_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(tuning.GIVEN, raising=False)
    monkeypatch.setattr(tuning, "key_of", lambda device: KEY)
    tuning.forget()
    yield tmp_path / "own" / "tuned"
    tuning.forget()


def entry(case: Case, rules: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {**dataclasses.asdict(case), "rules": repr(rules), "config": config}


def put(directory: Path, table: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "some.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


# ---- reading


def test_the_users_table_is_used_over_the_shipped_one(own: Path, tmp_path: Path) -> None:
    assert lookup(GPU, CASE) is None and tuned(RULES, CASE, GPU) is RULES and tuning.used(GPU) == ""
    tuning.forget()
    shipped = put(tmp_path / "shipped", TABLE)
    assert tuned(RULES, CASE, GPU) == dataclasses.replace(RULES, stages=4) and tuning.used(GPU) == str(shipped)
    tuning.forget()
    put(own, {**TABLE, "entries": [{**ENTRY, "config": {}}]})
    assert tuned(RULES, CASE, GPU) == RULES
    assert lookup(GPU, dataclasses.replace(CASE, n=512)) is None


def test_an_entry_says_nothing_of_other_rules_than_it_was_measured_beside(own: Path) -> None:
    put(own, TABLE)
    other = dataclasses.replace(RULES, block_k=64)
    assert tuned(RULES, CASE, GPU).stages == 4 and tuned(other, CASE, GPU) is other


def test_the_table_that_is_named_is_used_over_all(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(own, {**TABLE, "entries": [{**ENTRY, "config": {}}]})
    monkeypatch.setenv(tuning.GIVEN, str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=r"QEXPERTS_PROFILE=.*nowhere.json: no such file; .*--save"):
        lookup(GPU, CASE)
    monkeypatch.setenv(tuning.GIVEN, str(put(tmp_path / "given", TABLE)))
    assert tuned(RULES, CASE, GPU) == dataclasses.replace(RULES, stages=4)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("device", "another", "is for another with triton 3.6, this is some GPU with triton 3.6"),
        ("software", "another", "is for some GPU with another, this is some GPU with triton 3.6"),
        ("schema", 1, "is of schema 1, this is 2; run qexperts tune again"),
    ],
)
def test_tables_for_something_else_are_not_used_and_say_why(name: str, value: object, said: str, own: Path) -> None:
    path = put(own, {**TABLE, name: value, "entries": [7]})
    assert lookup(GPU, CASE) is None and tuning.used(GPU) == ""
    assert tuning.profiles(GPU) == [tuning.Profile(path, (), said)]


def test_explain_says_which_table_is_used(own: Path) -> None:
    i = make_inputs(Shape((3, 2), 64, 128, "int4_sym", 32))

    def note() -> str:
        return next(a.note for a in explain(Problem.of("test", i.x, i.weight)) if a.backend == "torch")

    assert "profile" not in note()
    tuning.forget()
    path = put(own, TABLE)
    assert note().endswith(f"; profile {path}")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("{", "not a profile"),
        ([], "expected a JSON object of kind tuned"),
        ({**TABLE, "schema": "1"}, "schema is '1'; expected an integer"),
        ({**TABLE, "device": 3}, "device is 3; expected a string"),
        ({**TABLE, "entries": {}}, "entries is {}; expected a list"),
        ({**TABLE, "entries": [ENTRY, 7]}, "entry 2 is 7; expected an object"),
        ({**TABLE, "entries": [{**ENTRY, "backend": "cpu"}]}, "entry 1: backend is 'cpu'; expected one of hopper"),
        ({**TABLE, "entries": [{**ENTRY, "phase": "both"}]}, "entry 1: phase is 'both'; expected one of prefill"),
        ({**TABLE, "entries": [{**ENTRY, "format": "int3"}]}, "entry 1: format is 'int3'; expected one of bf16"),
        ({**TABLE, "entries": [{**ENTRY, "n": "256"}]}, "entry 1: n is '256'; expected an integer"),
        ({**TABLE, "entries": [{**ENTRY, "rows": True}]}, "entry 1: rows is True; expected an integer"),
        ({**TABLE, "entries": [{k: v for k, v in ENTRY.items() if k != "k"}]}, "entry 1: k is None"),
        ({**TABLE, "entries": [{**ENTRY, "rules": None}]}, "entry 1: rules is None; expected a string"),
        ({**TABLE, "entries": [{**ENTRY, "config": [4]}]}, r"entry 1: config is \[4\]; expected an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said_with_its_place(table: Any, said: str, own: Path) -> None:
    path = put(own, table)
    with pytest.raises(ValueError, match=f"some.json: .*{said}|some.json: {said}") as caught:
        lookup(GPU, CASE)
    assert str(path) in str(caught.value) and "run qexperts tune again" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"block_k": 64}, "names block_k; expected only block_n, stages, warps, programs_per_sm"),  # other sums
        ({"speed": 9}, "names speed; expected only"),
        ({"stages": "4"}, "stages is '4'; expected one of 2, 3, 4, 5"),
        ({"stages": 4.0}, "stages is 4.0; expected one of"),
        ({"stages": 2}, "stages is 2; expected at least 3"),
        ({"block_n": 96}, "block_n is 96; expected one of 64, 128, 256"),
        ({"warps": True}, "warps is True; expected one of 4, 8"),
    ],
    ids=str,
)
def test_an_entry_may_name_nothing_else_than_what_leaves_bits_as_they_are(
    values: dict[str, Any], said: str, own: Path
) -> None:
    put(own, {**TABLE, "entries": [{**ENTRY, "config": values}]})
    with pytest.raises(ValueError, match=rf"some\.json: entry 1: .*{said}"):
        tuned(RULES, CASE, GPU, lambda c: valid(c, True))


def test_parts_of_k_belong_to_the_rules() -> None:
    with pytest.raises(ValueError, match="names parts; expected only"):
        with_entry(DecodeConfig(128, 128, 3), Entry(CASE, "", {"parts": 2}, source="here"))


def test_shipped_tables_are_right() -> None:
    """Every entry that is shipped can be used; there may be none."""
    kinds = {"prefill": RULES, "decode": DecodeConfig(128, 128, 3), "auto": Crossover()}
    for path in (SRC / "qexperts" / "data" / "tuned").glob("*.json"):
        for entry in read(path).entries:
            with_entry(kinds[entry.case.phase], entry, lambda c: None if isinstance(c, Crossover) else valid(c, True))


def test_what_is_written_is_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuning.own_path(GPU)
    assert path is not None and path.parent == own and path.name == "some-GPU-triton-3.6.json"
    entries = [Entry(CASE, "a", {"warps": 8}, {"ms": 0.25}), Entry(dataclasses.replace(CASE, phase="decode"), "b", {})]
    write(path, KEY, entries)
    assert [dataclasses.replace(e, source="") for e in read(path, KEY).entries] == entries
    assert read(path, ("some GPU", "triton 3.9")).entries == ()
    assert [p.name for p in own.iterdir()] == [path.name]

    def fail(*args: object) -> None:
        raise OSError("full")

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write(path, KEY, [])
    assert path.read_bytes() == before and [p.name for p in own.iterdir()] == [path.name]


@pytest.mark.parametrize(("rows", "found"), [(0, 1), (1, 1), (2, 2), (3, 4), (31440, 32768), (32768, 32768)])
def test_bucket(rows: int, found: int) -> None:
    assert bucket(rows) == found


def test_a_case_is_made_of_what_a_launch_knows() -> None:
    i = make_inputs(Shape((3, 2), 64, 128, "int4_asym", 32))
    found = case_of("triton", "decode", operand(i.weight), i.x.dtype, 2, 5)
    assert found == Case("triton", "decode", "int4_asym", "bf16", "bf16", "public", 32, 64, 128, 2, 8)


def test_tables_are_looked_up_when_a_call_is_bound(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    i = make_inputs(Shape((3, 2), 64, 128, "int4_sym", 32))
    case = case_of("triton", "prefill", operand(i.weight), i.x.dtype, 2, 5)
    rules = triton_backend.rules_of("prefill", operand(i.weight), i.x, i.x.device, 2)
    put(own, {**TABLE, "entries": [entry(case, rules, {"warps": 8})]})
    assert triton_backend.config_of(i.weight, i.x, "prefill") == dataclasses.replace(rules, warps=8)
    asked: list[Case] = []
    monkeypatch.setattr(tuning, "lookup", lambda device, case: asked.append(case))
    triton_backend.bind_prefill(torch.empty(5, 64, dtype=i.x.dtype), i.x, operand(i.weight), 2)
    assert asked == [case]


# ---- where decode and prefill part


@pytest.mark.parametrize("module", [triton_backend, hopper_backend], ids=["triton", "hopper"])
def test_the_crossover_is_that_of_the_table_unless_the_call_says_so(
    module: Any, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 experts, 8 rows: with 4 rows an expert the counts decide, with 3 it is a prefill, with 8 a decode."""
    i = make_inputs(Shape((5, 3), 64, 128, "int4_sym", 32))
    w, name = operand(i.weight), module.PREFILL.backend
    made: list[str] = []
    for kind in ("_Decode", "_Prefill"):
        monkeypatch.setattr(triton_backend, kind, lambda *given, kind=kind: made.append(kind))

    def phases(threshold: int | None, table: int | None, phase: str = "auto") -> list[str]:
        made.clear()
        tuning.forget()
        config = {} if table is None else {"decode_threshold": table}
        case = case_of(name, "auto", w, i.x.dtype, 2, 8)
        put(own, {**TABLE, "entries": [entry(case, Crossover(), config)]})
        problem = Problem.of("test", i.x, i.weight, phase=phase, decode_threshold=threshold)
        triton_backend.BoundCall(problem, w, module.PREFILL)._plan(torch.empty(8, 64), i.x, i.counts)
        return [*made]

    both = ["_Decode", "_Prefill"]
    assert phases(None, None) == both  # the rules: 4
    assert phases(None, 2) == ["_Prefill"] and phases(None, 8) == ["_Decode"]
    for table in (None, 2, 8, 64):
        assert phases(4, table) == both and phases(3, table) == ["_Prefill"] and phases(8, table) == ["_Decode"]
        assert phases(None, table, "decode") == ["_Decode"] and phases(None, table, "prefill") == ["_Prefill"]
    other = "triton" if name == "hopper" else "hopper"
    name = other
    assert phases(None, 2) == both  # what was measured with another prefill says nothing of this one


def test_a_threshold_in_a_table_is_one_that_is_tried(own: Path) -> None:
    with pytest.raises(ValueError, match="here: decode_threshold is 5; expected one of 0, 1, 2, 4"):
        with_entry(Crossover(), Entry(CASE, "", {"decode_threshold": 5}, source="here"))


# ---- strategies of the torch backend


@pytest.mark.parametrize("fmt", ["int4_asym", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_strategy_from_a_table_runs_with_the_same_bits(
    fmt: str, dtype: torch.dtype, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    i = make_inputs(Shape((9, 0, 33, 1), 48, 96, fmt, 32, dtype=dtype))
    plan, ran = TokenPlan.from_counts(i.counts, 43), []
    inner = torch_backend.Strategy.schedule
    monkeypatch.setattr(
        torch_backend.Strategy, "schedule", lambda self, plan: ran.append(self.name) or inner(self, plan)
    )

    def run(phase: str) -> torch.Tensor:
        tuning.forget()
        ran.clear()
        return grouped_gemm(i.x, i.weight, plan, backend="torch", phase=phase)

    expected = run("auto")
    assert ran == ["per_expert"]
    case = torch_backend.case_of(Problem.of("test", i.x, i.weight))
    put(own, {**TABLE, "entries": [entry(case, torch_backend.CpuWay(), {"strategy": "grouped"})]})
    for phase in ("auto", "decode", "prefill"):
        assert torch.equal(run(phase), expected) and ran == ["grouped"]
    put(own, {**TABLE, "entries": [entry(case, torch_backend.CpuWay(), {"strategy": "full_pad"})]})
    with pytest.raises(ValueError, match="strategy is 'full_pad'; expected one of 'per_expert', 'grouped'"):
        run("auto")


# ---- searching


@pytest.mark.parametrize("rules", [RULES, DecodeConfig(128, 128, 4, parts=2), PrefillConfig(64, 64, 2)], ids=str)
@pytest.mark.parametrize("nvidia", [True, False])
def test_neighbours_differ_in_one_free_size(rules: Any, nvidia: bool) -> None:
    found = neighbours(rules, lambda c: valid(c, nvidia))
    assert found and len(set(found)) == len(found) and rules not in found
    for c in found:
        changed = [f.name for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(rules, f.name)]
        assert len(changed) == 1 and changed[0] in rules.FREE and valid(c, nvidia) is None


pytest.importorskip("rich", reason="the extra 'bench' is not installed")
tune = importlib.import_module("qexperts.bench.tune")


class Machine:
    """Times that are a function of the sizes, as records of the same rounds."""

    def __init__(self, ms: Callable[[Any], float | str], rounds: int = 20, noise: float = 0.0) -> None:
        self.ms, self.rounds, self.noise = ms, rounds, noise
        self.asked: list[list[Any]] = []

    def __call__(self, configs: list[Any]) -> list[Any]:
        from test_report import record

        self.asked.append(configs)
        found = []
        for i, c in enumerate(configs):
            ms = self.ms(c)
            if isinstance(ms, str):
                found.append(record(None, status="WRONG", reason=ms))
                continue
            samples = [ms * (1 + self.noise * ((r * 7 + i * 3) % 5 - 2)) for r in range(self.rounds)]
            found.append(dataclasses.replace(record(ms), samples_ms=samples, rounds=self.rounds))
        return found


def found_by(machine: Machine, same_bits: bool = True) -> Any:
    return tune.search(RULES, lambda c: neighbours(c, lambda c: valid(c, True)), machine, lambda a, b: same_bits)


def test_the_search_goes_on_from_the_fastest() -> None:
    best = dataclasses.replace(RULES, stages=5, warps=8, programs_per_sm=1)
    machine = Machine(
        lambda c: 1.0 + 0.1 * sum(getattr(c, n) != getattr(best, n) for n in ("stages", "warps", "programs_per_sm"))
    )
    found = found_by(machine)
    assert found.best == best and found.reason is None
    assert found.config == {"stages": 5, "warps": 8, "programs_per_sm": 1}
    assert all(RULES in asked for asked in machine.asked) and len(machine.asked) == 4
    tried = [c for asked in machine.asked for c in asked]
    assert len(set(tried)) >= len(tried) - 2 * len(machine.asked)  # but for the rules and the fastest, none twice


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine(lambda c: 1.0 if c == RULES else 1.5), "the rules are the fastest"),
        (Machine(lambda c: 1.0 - 0.005 * (c.warps == 8)), "not 1.02x as fast for certain"),
        (Machine(lambda c: 1.0 - 0.05 * (c.warps == 8), noise=0.2), "not 1.02x as fast for certain"),
        (Machine(lambda c: 1.0 - 0.3 * (c.warps == 8), rounds=3), "too few rounds"),
    ],
    ids=["nothing is faster", "within the margin", "within the noise", "no interval"],
)
def test_what_is_not_faster_for_certain_is_not_kept(machine: Machine, reason: str) -> None:
    found = found_by(machine)
    assert reason in str(found.reason) and found.config == {}


def test_what_has_other_bits_is_not_kept() -> None:
    found = found_by(Machine(lambda c: 1.0 - 0.3 * (c.warps == 8)), same_bits=False)
    assert found.reason == "other bits than by the rules" and found.config == {}


def test_a_wrong_result_is_told_and_never_chosen() -> None:
    found = found_by(Machine(lambda c: "3 rows fail" if c.warps == 8 else 1.0 + 0.1 * (c.stages - 3)))
    assert found.best == RULES and found.wrong and all("warps=8" in w and "3 rows fail" in w for w in found.wrong)
    found = found_by(Machine(lambda c: "all rows fail"))
    assert found.before is None and found.reason == "all rows fail" and found.wrong


def test_a_search_without_alternatives_measures_nothing() -> None:
    machine = Machine(lambda c: 1.0)
    found = tune.search(RULES, lambda c: [], machine, lambda a, b: True)
    assert found.reason == "no other choice changes this call" and not machine.asked and found.after is None


@pytest.mark.parametrize(
    ("rows", "tried"),
    [
        ((4, 4, 1), [2, 16]),  # the counts decide: a decode; a prefill by its shape, a decode by its shape
        ((5, 4, 1), [2, 8, 16]),  # the counts decide: a prefill; besides the two, a decode by the counts
        ((1, 1), [0, 1]),  # a decode by its shape
        ((40, 30), [64]),  # a prefill by its shape
        ((300, 300), []),
    ],
    ids=str,
)
def test_thresholds_that_run_alike_are_tried_once(rows: tuple[int, ...], tried: list[int]) -> None:
    workload = a_workload("prefill", rows)
    assert sorted(c.decode_threshold for c in tune._crossovers(workload, Crossover())) == sorted(tried)


def a_workload(kind: str, rows: tuple[int, ...], fmt: str = "int4_sym") -> Any:
    from qexperts.bench.workloads import Workload
    from qexperts.formats import FORMATS
    from qexperts.routing import Distribution

    return Workload(kind, Distribution("test", rows, "made up"), 64, 128, 32, FORMATS[fmt], "bf16", 0)


@pytest.mark.parametrize(
    ("chosen", "kind", "expected"),
    [
        ("triton", "prefill", [("triton", "prefill", PrefillConfig), ("triton", "auto", Crossover)]),
        ("triton", "decode", [("triton", "decode", DecodeConfig), ("triton", "auto", Crossover)]),
        ("hopper", "prefill", [("hopper", "prefill", "whose sizes are fixed"), ("hopper", "auto", Crossover)]),
        ("cpu", "prefill", [("cpu", "auto", "in one way")]),
        ("torch", "decode", [("torch", "auto", torch_backend.CpuWay)]),
    ],
)
def test_what_there_is_to_choose(
    chosen: str, kind: str, expected: list[tuple[str, str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qexperts.backends import BACKENDS
    from qexperts.bench.workloads import make_inputs as inputs_of

    monkeypatch.setattr(tune, "select", lambda problem, backend: BACKENDS[chosen])
    workload = a_workload(kind, (3, 2))
    t = inputs_of(workload, torch.device("cpu"))
    found = tune.subjects(workload, t, t.weight, tuning.PHASES, tune.TuneOptions())
    assert [(s.case.backend, s.case.phase) for s in found] == [(backend, phase) for backend, phase, _ in expected]
    for subject, (_, _, what) in zip(found, expected, strict=True):
        if isinstance(what, str):
            assert what in str(subject.reason) and subject.candidate is None
        else:
            assert type(subject.rules) is what and subject.reason is None
            assert (subject.elsewhere is not None) == (what is Crossover)


def test_a_crossover_is_judged_where_rows_are_spread_otherwise() -> None:
    decode = dataclasses.replace(a_workload("decode", (2, 2, 2, 2)), batch=4, top_k=2)
    d = tune._spread_otherwise(decode, None).distribution
    assert d.name == "autoround-256" and d.total_tokens == 8 and d.num_experts == 4 and 2 < d.max_tokens <= 4
    assert tune._spread_otherwise(decode, "hot:0.5").distribution.max_tokens == 4
    assert tune._spread_otherwise(a_workload("prefill", (7, 0, 1)), "zipf").distribution.counts == (3, 3, 2)


@pytest.mark.parametrize(("there", "kept"), [(0.9, True), (1.0, True), (1.1, False), ("3 rows fail", False)], ids=str)
def test_a_crossover_that_is_slower_elsewhere_is_not_kept(there: float | str, kept: bool) -> None:
    best = Crossover(8)
    machine = Machine(lambda c: 0.8 if c == best else 1.0)
    found = tune.search(Crossover(), neighbours, machine, lambda a, b: True)
    assert found.config == {"decode_threshold": 8}
    records = Machine(lambda c: there if c == best else 1.0)([Crossover(), best])
    judged = tune._unless_slower(found, records, a_workload("prefill", (3, 2)))
    assert judged.config == (found.config if kept else {})
    assert kept or "slower with rows as in test" in str(judged.reason)
    assert bool(judged.wrong) == isinstance(there, str)


SMOKE = """
import sys
import torch
from rich.console import Console
from qexperts import tuning
from qexperts.bench import measure, tune
from qexperts.bench.roofline import Ceilings
from qexperts.backends import torch_backend, triton_backend
from qexperts.kernels import config

tune.measure_ceilings, measure.MAX_SETS = lambda device, dtype: Ceilings(1.0, 10.0, 20.0), 2
config.PrefillConfig.FREE, config.DecodeConfig.FREE = {"warps": (4, 8)}, {"unroll": (1, 2)}
options = tune.TuneOptions(phases=sys.argv[1], formats="int4_sym", n=64, k=64, group_size=32, experts=2, tokens="5",
                           batch_sizes="1", top_k=2, device="cpu", rounds=int(sys.argv[3]), backend=sys.argv[2])
print("code", tune.tune_session(options, Console(width=200)))
cpu = torch.device("cpu")
for entry in tuning.read(tuning.own_path(cpu)).entries:
    print(entry.case, entry.config, entry.facts["rules_ms"] > 0, tuning.lookup(cpu, entry.case) == entry)
"""


def smoke(tmp_path: Path, *arguments: str, interpret: str = "0") -> list[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret}
    env["QEXPERTS_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SMOKE, *arguments], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "code 0" in done.stdout
    return done.stdout.splitlines()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_search_on_interpreted_kernels(phase: str, tmp_path: Path, interpreter: None) -> None:
    """From options to a table: the gate, the rounds and the file are those of a GPU; the times mean nothing."""
    lines = smoke(tmp_path, phase, "triton", "1", interpret="1")
    assert any("too few rounds" in line or "the rules are the fastest" in line for line in lines)
    assert lines[-1].startswith(f"triton {phase} int4_sym N=64 K=64, 2 experts") and lines[-1].endswith("{} True True")


def test_a_search_for_the_crossover_on_interpreted_kernels(tmp_path: Path, interpreter: None) -> None:
    lines = smoke(tmp_path, "auto", "triton", "5", interpret="1")
    assert [line.split(", up")[0] for line in lines[-2:]] == ["triton auto int4_sym N=64 K=64, 2 experts"] * 2


def test_a_search_for_the_strategy_on_a_cpu(tmp_path: Path) -> None:
    lines = smoke(tmp_path, "auto", "torch", "5")
    assert [line.split(", up")[0] for line in lines[-2:]] == ["torch auto int4_sym N=64 K=64, 2 experts"] * 2
    assert all(line.endswith("True True") for line in lines[-2:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phases": "both"}, "--phases both: expected a comma list of prefill, decode, auto"),
        ({"tokens": "many"}, "--tokens many: expected a comma list of integers"),
        ({"formats": "int3"}, "--formats int3"),
        ({"backend": "cuda"}, "--backend cuda: expected auto or one of hopper, triton"),
        (
            {"tokens": "600,1000", "experts": 8},
            r"prefill .* of 600 rows and prefill .* of 1,000 are looked up alike, as up to 1,024; leave one out",
        ),
    ],
    ids=str,
)
def test_options_are_checked_first(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tune.prepare_tune(tune.TuneOptions(**{"n": 64, "k": 128, "device": "cpu", **change}))


def test_a_table_for_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = put(tmp_path, {**TABLE, "device": "another"})
    with pytest.raises(ValueError, match=r"--save .*some.json: is for another .*; give another file"):
        tune.prepare_tune(tune.TuneOptions(n=64, k=128, device="cpu", save=str(path)))


def test_a_path_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"tune: .*file/x.json cannot be written \(.+\); give a file that can"):
        tune.prepare_tune(tune.TuneOptions(n=64, k=128, device="cpu", save=str(tmp_path / "file" / "x.json")))


def test_a_table_that_cannot_be_read_is_named(own: Path) -> None:
    (own / "folder.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"folder.json: cannot be read \(.+\); mend it, or delete it"):
        lookup(GPU, CASE)


def test_who_has_no_home_has_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("QEXPERTS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    directory = files.cache_directory()
    assert not directory.exists() and files.unwritable(directory) is not None
    assert lookup(GPU, CASE) is None
